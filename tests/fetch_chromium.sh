#!/usr/bin/env bash
# Put a headless Chromium for the browser's tests into TARGET, without root and without installing.
#   tests/fetch_chromium.sh TARGET PROGRAM
# Debian's packages that this machine lacks are downloaded and unpacked under TARGET; PROGRAM becomes
# the command. A chromium on the PATH is taken as it is.
set -euo pipefail
target=$1 program=$2
fail() { echo "the tests of the feature browser need Chromium: $1; install chromium, or put it on the PATH" >&2; exit 1; }

for name in chromium google-chrome chrome; do
  if found=$(command -v "$name") && [ "$found" != "$(realpath -m "$program")" ]; then
    ln -sf "$found" "$program"
    exit 0
  fi
done
for tool in apt-get dpkg-deb; do
  command -v "$tool" >/dev/null || fail "there is none, and no $tool to unpack Debian's packages with"
done

mkdir -p "$target"/{lists,archives}/partial "$target/root"
target=$(realpath "$target")
apt() {
  apt-get -qq -o Debug::NoLocking=1 -o APT::Sandbox::User="$(id -un)" -o Dir::State::lists="$target/lists" \
    -o Dir::Cache="$target" -o Dir::Cache::archives="$target/archives" "$@" >"$target/log" 2>&1
}
echo "unpacking Debian's headless Chromium into $(realpath --relative-to=. "$target")"
apt update || fail "apt-get update failed: $(tail -1 "$target/log")"
apt install -y --download-only --no-install-recommends chromium-headless-shell fonts-dejavu-core ||
  fail "its packages cannot be had: $(tail -1 "$target/log")"
for package in "$target"/archives/*.deb; do
  dpkg-deb -x "$package" "$target/root"
done
rm -rf "$target"/{lists,archives}
shell=$(find "$target/root/usr" -type f -name 'chromium-headless-shell' -perm -u+x -path '*lib*' | head -1)
[ -n "$shell" ] || fail "Debian's package has no headless shell where it was looked for"
libraries=$(find "$target/root" -type f -name '*.so*' -printf '%h\n' | sort -u | paste -sd:)
cat >"$program" <<EOF
#!/bin/sh
export LD_LIBRARY_PATH="$libraries\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
[ -e /etc/fonts/fonts.conf ] || export FONTCONFIG_PATH="$target/root/etc/fonts"
export XDG_DATA_DIRS="$target/root/usr/share:\${XDG_DATA_DIRS:-/usr/local/share:/usr/share}"
exec "$shell" "\$@"
EOF
chmod +x "$program"
"$program" --version >"$target/log" 2>&1 || fail "what was unpacked does not run: $(tail -1 "$target/log")"
