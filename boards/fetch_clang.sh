#!/usr/bin/env bash
# Fetch clang from Debian sid into <cache>/clang-xtensa: no release has a compiler for the ESP32's windowed Xtensa.
#
# A release's libc is too old for it: sid's comes along. Nothing is installed, and no root is needed; what starts it is
# boards/xtensa/xtensa-esp32-elf-gcc.
set -euo pipefail

version=23
cache=${ULEARN_CACHE:-$HOME/.cache/ulearn}
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
folder=$cache/clang-xtensa
boards=$(cd "$(dirname "$0")" && pwd)

fail() { echo "fetch_clang: $*" >&2; exit 1; }

[ -f "$folder/.fetched-$version" ] && exit 0

apt_dir=$cache/apt-clang
log=$cache/fetch_clang.log
# shellcheck source=boards/private_apt.sh
. "$boards/private_apt.sh"

echo "fetching clang $version from Debian sid (100 MB, about 30 s)"
: >"$log"
rm -rf "$apt_dir" "$folder"
update_private_apt deb sid
private_apt install -y --download-only --no-install-recommends "clang-$version" >>"$log" 2>&1 ||
    fail "sid has no clang-$version that can be fetched (log: $log); a newer one is named by version= in $0"

mkdir -p "$folder"
for package in "$apt_dir"/archives/*.deb; do
    case ${package##*/} in
        # What links programs of the host, or checks them: not needed here, and most of the bytes.
        libclang-common-*) ;;
        *-dev_* | binutils* | libbinutils* | lib*san[0-9]* | libclang1-* | libc-gconv-*) continue ;;
    esac
    dpkg-deb -x "$package" "$folder"
done
rm -rf "$apt_dir"

ULEARN_CACHE=$cache "$boards/xtensa/xtensa-esp32-elf-gcc" -Werror -x c -c -o /dev/null - <<<'int f(int x) { return x; }' >>"$log" 2>&1 ||
    fail "the compiler does not run (log: $log)"
touch "$folder/.fetched-$version"
