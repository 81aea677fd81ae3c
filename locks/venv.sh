#!/usr/bin/env bash
# Make a virtual environment, or look whether the one that is there can be used.
#   locks/venv.sh FOLDER PYTHON [asked]      "asked": PYTHON was named for this run
set -euo pipefail
folder=$1 python=$2 asked=${3:-}
fail() { echo "$1" >&2; exit 1; }
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo none; }
supported() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if [ -e "$folder" ]; then
  remedy="remove $folder (make distclean) and run the same command again"
  is=$(version "$folder/bin/python")
  [ "$is" != none ] || fail "$folder must hold a Python that runs, its Python is gone or not complete; $remedy"
  supported "$folder/bin/python" || fail "$folder must hold Python 3.11 or newer, got $is; $remedy"
  made=$(sed -n 's/^version *= *\([0-9]*\.[0-9]*\).*/\1/p' "$folder/pyvenv.cfg" 2>/dev/null || true)
  [ -z "$made" ] || [ "$made" = "$is" ] || fail "$folder must hold the Python that made it, $made, got $is; $remedy"
  [ -z "$asked" ] || [ "$(version "$python")" = "$is" ] ||
    fail "$folder must hold Python $(version "$python") as PYTHON says, got $is; $remedy"
  "$folder/bin/python" -m pip --version >/dev/null 2>&1 || fail "$folder must hold pip, it has none; $remedy"
else
  supported "$python" ||
    fail "Python must be 3.11 or newer, got $("$python" --version 2>/dev/null || echo none); name another one: make PYTHON=python3.12"
  echo "making $folder with $("$python" --version)"
  if ! said=$("$python" -m venv "$folder" 2>&1); then
    free=$(df -Pk "$(dirname "$folder")" | awk 'NR == 2 { print $4 }')
    rm -rf "$folder"
    [ "$free" -ge 10240 ] || fail "the disk is full: make room (about 3 GB, with CUDA 9 GB) and run the same command again"
    case $said in
      *ensurepip*) fail "$python cannot make environments: install Debian's python3-venv, or name another one: make PYTHON=python3.12" ;;
      *) fail "$folder was not made: $(tail -1 <<<"$said")" ;;
    esac
  fi
fi
mkdir -p "$folder/.stamps"
[ -e "$folder/.stamps/venv" ] || touch "$folder/.stamps/venv"
