#!/bin/sh
# Installs what the tests and benchmarks drive, where it is missing: Debian
# packages, and into .tools the programs that must not be installed for the whole
# machine (containerd would start a service) or that Debian has too old.
# Whatever cannot be had is named at the end, with what is not tested then.
set -eu

containerd=2.4.2 # built from source
old_containerd=1.6 # Debian's own binary
crane=0.22.1

root=$(cd "$(dirname "$0")/../.." && pwd)
tools=$root/.tools
go=${GO:-go}
failures=""

say() { echo "setup: $*" >&2; }
fail() { failures="$failures
setup:   $*"; }

# 1. Debian packages.

missing=""
need() { # command, package
	command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
PATH=$PATH:/usr/sbin:/sbin
need debootstrap debootstrap # makes the Debian image of the end-to-end test
need tar tar                 # packs it
need gcc gcc                 # the race detector links with it
need runc runc               # runs containers under containerd
need skopeo skopeo           # pulls, as one of the clients
need mkfs.ext4 e2fsprogs     # makes small file systems that get full

apt_updated=""
apt_update() { # package lists, once, and only as root
	[ -z "$apt_updated" ] || return 0
	[ "$(id -u)" -eq 0 ] || return 1
	apt-get update -q >&2 && apt_updated=yes
}

install_packages() {
	[ -n "$missing" ] || return 0
	if [ "$(id -u)" -ne 0 ]; then
		fail "packages:$missing; as root: apt-get install --no-install-recommends$missing"
		return 0
	fi
	say "installing$missing"
	export DEBIAN_FRONTEND=noninteractive
	# shellcheck disable=SC2086 # a list of words
	apt_update && apt-get install -qy --no-install-recommends $missing libc6-dev >&2 || fail "packages:$missing: apt-get failed, see above"
}

# 2. Programs in .tools. Each is made beside its place and renamed, so that one
# that is there is whole.

commit() { # staged, place; another set-up may have been quicker
	mv -T "$1" "$2" 2>/dev/null || rm -rf "$1"
	[ -e "$2" ]
}

build_containerd() {
	[ -x "$tools/containerd-$containerd/ctr" ] && return 0
	say "building containerd $containerd (a few minutes)"
	staged=$tools/containerd-$containerd.$$
	module=github.com/containerd/containerd/v2/cmd
	# Without cgo it needs no headers of btrfs, and runs on any libc.
	CGO_ENABLED=0 GOBIN=$staged "$go" install -trimpath -ldflags='-s -w' -tags 'no_btrfs no_devmapper no_zfs' \
		"$module/containerd@v$containerd" "$module/ctr@v$containerd" "$module/containerd-shim-runc-v2@v$containerd" &&
		commit "$staged" "$tools/containerd-$containerd" && return 0
	rm -rf "$staged"
	fail "containerd $containerd: go install failed, see above"
}

unpack_old_containerd() {
	[ -x "$tools/containerd-$old_containerd/ctr" ] && return 0
	say "unpacking Debian's containerd $old_containerd"
	staged=$tools/containerd-$old_containerd.$$
	mkdir -p "$staged/deb"
	if ! (cd "$staged/deb" && { apt-get download -q containerd >&2 || { apt_update && apt-get download -q containerd >&2; }; } && dpkg -x containerd_*.deb .); then
		rm -rf "$staged"
		fail "containerd $old_containerd: apt-get download or dpkg -x failed, see above"
		return 0
	fi
	for p in containerd ctr containerd-shim-runc-v2; do mv "$staged/deb/usr/bin/$p" "$staged/"; done
	rm -rf "$staged/deb"
	case $("$staged/containerd" --version) in
	*" $old_containerd."*) commit "$staged" "$tools/containerd-$old_containerd" && return 0 ;;
	*) fail "containerd $old_containerd: this machine's Debian has $("$staged/containerd" --version)" ;;
	esac
	rm -rf "$staged"
}

build_crane() {
	[ -x "$tools/crane-$crane" ] && return 0
	say "building crane $crane"
	staged=$tools/crane.$$
	GOBIN=$staged "$go" install "github.com/google/go-containerregistry/cmd/crane@v$crane" &&
		commit "$staged/crane" "$tools/crane-$crane" && rm -rf "$staged" && return 0
	rm -rf "$staged"
	fail "crane $crane: go install failed, see above"
}

mkdir -p "$tools"
install_packages
build_containerd
unpack_old_containerd
build_crane

if [ -n "$failures" ]; then
	say "MISSING, and what needs it is NOT TESTED:$failures"
	say "the tests that need them are skipped without root and fail with it"
fi
