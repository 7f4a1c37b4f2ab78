#!/usr/bin/env bash
# Fetch MicroPython's source into <cache>/micropython-src, as the Debian source package of trixie.
#
# The package comes from the mirror this machine already uses, through a private apt configuration:
# its own source list, lists and state, so that the system's apt knows nothing of trixie afterwards.
# apt checks the mirror's signature against Debian's archive keyring, then every hash down to the files.
set -euo pipefail

suite=trixie
pinned=1.25.0
cache=${ULEARN_CACHE:-$HOME/.cache/ulearn}
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
source=$cache/micropython-src
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

fail() { echo "fetch_micropython: $*" >&2; exit 1; }

[ -f "$source/.fetched-$pinned" ] && exit 0
[ -f "$keyring" ] || fail "no $keyring; install the package debian-archive-keyring"

# apt itself reads both formats of source lists. The release's own suite comes before its updates;
# third-party mirrors may be listed too, but fail the signature check and are passed over.
mirrors=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
    awk '$3 == "main" && $2 !~ /-/ && !seen[$1]++ { print $1 }')
[ -n "$mirrors" ] || fail "no Debian mirror among this machine's apt sources"

apt_dir=$cache/apt
log=$cache/fetch.log
mkdir -p "$apt_dir/lists/partial" "$apt_dir/archives/partial" "$apt_dir/download"
private_apt() {
    apt-get -q -o Dir::Etc::SourceList="$apt_dir/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null \
        -o Dir::State="$apt_dir" -o Dir::State::Lists="$apt_dir/lists" -o Dir::State::status=/dev/null \
        -o Dir::Cache="$apt_dir" -o APT::Sandbox::User="$(id -un)" -o APT::Update::Error-Mode=any "$@"
}
update() {
    for mirror in $mirrors; do
        echo "deb-src [signed-by=$keyring] $mirror $suite main" >"$apt_dir/sources.list"
        private_apt update >>"$log" 2>&1 && return
    done
    # The usual cause is a keyring from before trixie.
    fail "no mirror of $suite with a good signature (log: $log); if it names a missing key, upgrade debian-archive-keyring"
}

echo "fetching MicroPython $pinned from Debian $suite (about 10 s)"
: >"$log"
update
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
