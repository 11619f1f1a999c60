#!/bin/sh
# Gets a source tree ready: Debian packages that are missing, .venv, the Python dependencies, the C extension.
#
#   scripts/setup.sh demo|test|vm|guest
#
# vm installs only what the virtual machine bench needs; guest is called inside it, where the packages are there.
# Each part looks first whether its work is done already, so a second call takes a moment and needs no network.
# PYTHON=/path/to/python3.x chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."

VENV=.venv
BUILD="gcc libc6-dev"
DEMO="$BUILD busybox-static"
TEST="$DEMO bubblewrap clang-format crun gcc-aarch64-linux-gnu libc6-dev-arm64-cross strace"
VM="apt busybox-static e2fsprogs git kmod mmdebstrap qemu-system-x86 util-linux xz-utils"

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo "$@"
    else fail "this needs root, and there is no sudo; as root, run: $*"
    fi
}

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

# need PACKAGE... installs the missing ones; the package lists are fetched only if there is one.
need() {
    missing=
    for package in "$@"; do installed "$package" || missing="$missing $package"; done
    [ -n "$missing" ] || return 0
    say "installing Debian packages:$missing"
    as_root apt-get update -q || say "the package lists could not be refreshed; trying with those at hand"
    # shellcheck disable=SC2086  # a list of words
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing ||
        fail "apt-get could not install:$missing"
}

packages() {
    if command -v dpkg-query >/dev/null && command -v apt-get >/dev/null; then
        # shellcheck disable=SC2086
        need $1
    else
        say "no apt-get here: these, or your distribution's like, must be installed already: $1"
    fi
}

# Python 3.11 or later (with the GIL, which the stable ABI needs) that can make a virtual environment and compile an
# extension: Debian packs what these take apart from the interpreter.
usable() {
    "$1" -c 'import ensurepip, os, sqlite3, ssl, sys, sysconfig, venv
sys.exit(sys.version_info < (3, 11) or bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
         or not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null
}

# Prints the interpreter to use: the one asked for; else Debian's own; else the first on PATH. Fails if none of
# these is usable.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        chosen=$(command -v "$PYTHON") || fail "PYTHON=$PYTHON: no such program"
        usable "$chosen" || fail "PYTHON=$PYTHON: needs Python 3.11 or later with the venv module and its C headers"
        echo "$chosen"
        return
    fi
    for candidate in /usr/bin/python3 $(on_path); do
        if usable "$candidate"; then echo "$candidate"; return; fi
    done
    return 1
}

# Every python3 on PATH, in its order.
on_path() {
    (IFS=:; for directory in $PATH; do [ ! -x "$directory/python3" ] || echo "$directory/python3"; done)
}

# What tells one interpreter from another, also behind a shim and across its upgrades.
identity() { "$1" -c 'import os, sys; print(os.path.realpath(sys.executable), sys.version.split()[0])'; }

virtual_environment() {
    maker="$(identity "$1") in $PWD"
    if [ "$(cat $VENV/made-by 2>/dev/null)" = "$maker" ] && $VENV/bin/python -m pip --version >/dev/null 2>&1; then
        return 0
    fi
    [ ! -e $VENV ] || say "$VENV is broken, moved, or made by another interpreter: making it anew"
    rm -rf $VENV
    say "making $VENV with $maker"
    "$1" -m venv $VENV || fail "$1 -m venv failed"
    echo "$maker" >$VENV/made-by
}

# stale STAMP FILE...: true if the stamp is missing or older than a file (or than something in a directory).
stale() {
    stamp=$1; shift
    [ ! -e "$stamp" ] || [ -n "$(find "$@" -newer "$stamp" -print -quit)" ]
}

pip() { $VENV/bin/python -m pip --disable-pip-version-check "$@"; }

dependencies() {
    extras=$1; stamp=$VENV/installed-${1:-demo}
    stale "$stamp" pyproject.toml || return 0
    say "installing the Python dependencies${extras:+ and the tools of make test} into $VENV"
    # The build's own requirements come first, so that building needs no network of its own later.
    # shellcheck disable=SC2046
    pip install --quiet $(requirements) || fail "pip could not install what the build requires"
    pip install --quiet --no-build-isolation --editable ".${extras:+[$extras]}" || fail "pip could not install diyc"
    touch "$stamp" $VENV/built
}

requirements() {
    $VENV/bin/python -c 'import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])'
}

extension() {
    if [ -e diyc/_core.abi3.so ] && ! stale $VENV/built csrc setup.py; then return 0; fi
    say "building the C extension"
    $VENV/bin/python setup.py --quiet build_ext --inplace || fail "the C extension could not be built"
    touch $VENV/built
}

case "${1:-}" in
    demo) wanted=$DEMO; extras= ;;
    test) wanted=$TEST; extras=test,dev ;;
    guest) wanted=; extras=test ;;
    vm) packages "$VM"; exit ;;
    *) fail "usage: scripts/setup.sh demo|test|vm|guest" ;;
esac
if python=$(find_python); then
    packages "$wanted"
elif [ -n "${PYTHON:-}" ]; then
    exit 1
else
    packages "$wanted python3-venv python3-dev"
    python=$(find_python) || fail "found no Python 3.11 or later with venv and headers; name one: PYTHON=/path/to/python3"
fi
virtual_environment "$python"
dependencies "$extras"
# In the bench `make demo` finds all that it needs too: there is no network.
[ "$1" != guest ] || touch $VENV/installed-demo
extension
