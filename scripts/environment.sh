#!/bin/sh
# usage: scripts/environment.sh ENVIRONMENT
# Makes the environment ready for `make demo` and `make test`: .venv is made where it is missing,
# an active environment gets what it lacks. Quick where nothing is to be done.
set -eu
environment=$1
scripts=$(dirname "$0")

if "$environment/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    python=$environment/bin/python
elif [ "$environment" = .venv ]; then
    python=$(sh "$scripts/find_python.sh")
else
    echo "make: the active environment $environment has no working Python 3.10 or newer;" \
        "deactivate it, and make uses a .venv of its own" >&2
    exit 1
fi
exec "$python" "$scripts/install.py" "$environment"
