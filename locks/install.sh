#!/usr/bin/env bash
# Install with pip, and end in one line that says what to do if that fails.
#   locks/install.sh PYTHON ARGUMENTS...
set -uo pipefail
python=$1
shift
log=$(dirname "$python")/../install.log
"$python" -m pip install -q --disable-pip-version-check --no-input --progress-bar off "$@" >"$log" 2>&1 && exit 0

says() { grep -qiE "$1" "$log"; }
fail() { echo "$1; all that pip said: $(realpath --relative-to=. "$log" 2>/dev/null || echo "$log")" >&2; exit 1; }
free=$(df -Pk "$(dirname "$log")" | awk 'NR == 2 { print $4 }') # a full disk may hold no log either
{ says 'no space left|disk quota' || [ "$free" -lt 10240 ]; } &&
  fail "the disk is full: make room (about 3 GB, with CUDA 9 GB) and run the same command again"
says 'name resolution|name or service not known|nodename nor servname|network is unreachable|connection (refused|timed out|reset|aborted)|failed to establish|read timed out|proxyerror' &&
  fail "no package index answers: look at the network and pip's settings (pip config list), then run the same command again"
says 'do not match the hashes|hashes are required|invalid requirement|could not open requirements|no such file.*locks/' &&
  fail "the lock does not fit the packages: bring it back with 'git checkout locks', or make it anew with 'make lock'"
says 'no matching distribution|could not find a version' &&
  fail "$(grep -iE 'no matching distribution' "$log" | tail -1 | sed 's/^ERROR: //'): another Python may have it (make distclean; make PYTHON=python3.12), or 'make lock' renews the lock"
fail "pip failed: $(grep -v '^ *$' "$log" | tail -1)"
