#!/usr/bin/env bash
# Fetch MicroPython's source into <cache>/micropython-src, as the Debian source package of trixie.
set -euo pipefail

suite=trixie
pinned=1.25.0
cache=${ULEARN_CACHE:-$HOME/.cache/ulearn}
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
source=$cache/micropython-src

fail() { echo "fetch_micropython: $*" >&2; exit 1; }

[ -f "$source/.fetched-$pinned" ] && exit 0

apt_dir=$cache/apt
log=$cache/fetch.log
# shellcheck source=boards/private_apt.sh
. "$(dirname "$0")/private_apt.sh"

echo "fetching MicroPython $pinned from Debian $suite (about 10 s)"
: >"$log"
update_private_apt deb-src "$suite"
cd "$apt_dir/download"
rm -rf ./* "$source"
private_apt source --download-only --only-source micropython >>"$log" 2>&1 || fail "download failed (log: $log)"
dsc=$(ls micropython_*.dsc)
[[ $dsc == micropython_"$pinned"* ]] || fail "Debian $suite has $dsc, expected version $pinned"
# apt has verified the .dsc already; --no-check skips only the maintainer's own signature.
dpkg-source --no-check -x "$dsc" unpacked >>"$log" 2>&1 || fail "unpacking failed (log: $log)"
touch "unpacked/.fetched-$pinned"
mv unpacked "$source"
rm -rf "$apt_dir"
