# shellcheck shell=bash
# apt apart from the system's: its own source list, lists and state in a folder, so that the system's apt knows
# nothing of another suite afterwards. Sourced; the caller has `fail`, `apt_dir` (the folder) and `log`.
#
# The packages come from the mirror this machine already uses. apt checks its signature against Debian's archive
# keyring, then every hash down to the files.

keyring=/usr/share/keyrings/debian-archive-keyring.gpg

private_apt() {
    apt-get -q -o Dir::Etc::SourceList="$apt_dir/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null \
        -o Dir::State="$apt_dir" -o Dir::State::Lists="$apt_dir/lists" -o Dir::State::status=/dev/null \
        -o Dir::Cache="$apt_dir" -o APT::Sandbox::User="$(id -un)" -o APT::Update::Error-Mode=any "$@"
}

# update_private_apt deb|deb-src SUITE: from the first mirror that has the suite.
update_private_apt() {
    [ -f "$keyring" ] || fail "no $keyring; install the package debian-archive-keyring"
    # apt itself reads both formats of source lists. The release's own suite comes before its updates;
    # third-party mirrors may be listed too, but fail the signature check and are passed over.
    local mirror mirrors
    mirrors=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk '$3 == "main" && $2 !~ /-/ && !seen[$1]++ { print $1 }')
    [ -n "$mirrors" ] || fail "no Debian mirror among this machine's apt sources"
    mkdir -p "$apt_dir/lists/partial" "$apt_dir/archives/partial" "$apt_dir/download"
    for mirror in $mirrors; do
        echo "$1 [signed-by=$keyring] $mirror $2 main" >"$apt_dir/sources.list"
        private_apt update >>"$log" 2>&1 && return
    done
    # The usual cause is a keyring from before the suite.
    fail "no mirror of $2 with a good signature (log: $log); if it names a missing key, upgrade debian-archive-keyring"
}
