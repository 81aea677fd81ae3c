#!/usr/bin/env bash
# Install the release of torch that the lock names.
#   locks/install_torch.sh PYTHON VERSION [INDEX]
# PyPI's file must have the lock's hash. Another index or folder has a build of its own ("2.13.0+cpu"),
# with another hash and without CUDA or with another one: of it the version alone is held.
set -euo pipefail
python=$1 version=$2 index=${3:-}
install=$(dirname "$0")/install.sh

if [ -n "$index" ]; then
  exec "$install" "$python" --index-url "$index" "torch==$version"
fi
build=$("$python" -m pip install -qq --disable-pip-version-check --no-input --dry-run --no-deps \
  --ignore-installed --report - "torch==$version" 2>/dev/null |
  "$python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])' 2>/dev/null) || true
case $build in
  *+*) exec "$install" "$python" "torch==$version" ;;
esac
if [ "$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then
  echo "PyPI's torch carries CUDA, gigabytes that a CPU does not need: make TORCH_INDEX_URL=... names an index with the CPU's build" >&2
fi
exec "$install" "$python" --no-deps --require-hashes -r "$(dirname "$0")/torch.txt"
