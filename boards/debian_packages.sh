#!/usr/bin/env bash
# Install the Debian packages that building the boards needs, and any named as arguments.
# Asks nobody and does nothing when they are there.
set -euo pipefail

needed="gcc libc6-dev make dpkg-dev util-linux debian-archive-keyring libmbedtls-dev
    gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm
    gcc-riscv64-unknown-elf picolibc-riscv64-unknown-elf qemu-system-misc cmake $*"
# The benchmarks count x64 instructions with it.
[ "$(uname -m)" != x86_64 ] || needed+=" valgrind"

missing=
for package in $needed; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing+=" $package"
done
[ -n "$missing" ] || exit 0

sudo=
if [ "$(id -u)" != 0 ]; then
    sudo="sudo -n"
    if ! $sudo true 2>/dev/null; then
        echo "run this first: sudo apt-get install --no-install-recommends$missing" >&2
        exit 1
    fi
fi

log=$(mktemp)
echo "installing$missing (about 1 min)"
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086  # both are lists of words
if ! { $sudo apt-get -q update && $sudo apt-get -qy install --no-install-recommends $missing; } >"$log" 2>&1; then
    tail -n 5 "$log" >&2
    echo "apt-get failed (log: $log)" >&2
    exit 1
fi
rm "$log"
