#!/bin/sh
# Installs the Debian packages that the tests drive, where they are missing.
# Without root it says which are missing, why, and what is not tested then.
set -eu

missing=""
need() { # command, package
	command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need debootstrap debootstrap # makes the Debian image of the end-to-end test
need tar tar                 # packs it
need gcc gcc                 # the race detector links with it
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
	echo "setup: missing packages:$missing" >&2
	echo "setup: they are for the end-to-end tests with a Debian image and the race detector; install them as root:" >&2
	echo "setup:   apt-get install --no-install-recommends$missing" >&2
	exit 0
fi
echo "setup: installing$missing" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -q >&2
# shellcheck disable=SC2086 # a list of words
apt-get install -qy --no-install-recommends $missing libc6-dev >&2
