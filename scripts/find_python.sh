#!/bin/sh
# Prints the Python to make the .venv with: $PYTHON if it is set, else the first that runs of
# Python 3.10 to 3.12, else a newer one. Fails with a message where there is none.
set -eu

# Prints 310 for CPython 3.10, and nothing for what does not run: a name on PATH may be one of
# pyenv's shims, with no Python behind it.
version_of() {
    "$1" -c 'import sys, venv
if sys.implementation.name == "cpython":
    print("%d%02d" % sys.version_info[:2])' 2>/dev/null </dev/null || true
}

fail() {
    echo "make: $1" >&2
    exit 1
}

if [ -n "${PYTHON:-}" ]; then
    version=$(version_of "$PYTHON")
    [ "${version:-0}" -ge 310 ] || fail "PYTHON=$PYTHON is not a working Python 3.10 or newer"
    echo "$PYTHON"
    exit
fi

newer=
# 3.11 first of the named ones: the suite runs on it most.
for python in python3 python3.11 python3.12 python3.10 python \
    "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[0-2]*/bin/python3 \
    python3.13 python3.14 "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[3-9]*/bin/python3; do
    version=$(version_of "$python")
    if [ "${version:-0}" -ge 310 ] && [ "$version" -le 312 ]; then
        echo "$python"
        exit
    fi
    if [ -z "$newer" ] && [ "${version:-0}" -ge 313 ]; then
        newer=$python
    fi
done
[ -n "$newer" ] || fail "no Python 3.10 to 3.12 was found on PATH or among pyenv's versions; \
install one, or name it: make PYTHON=/path/to/python3.11 ..."
echo "$newer"
