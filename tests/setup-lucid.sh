#!/bin/sh
# Install what tests/test_lucid.py needs of RADICAL-Pilot, into .venv-lucid:
#     tests/setup-lucid.sh [PYTHON]
# A compiler and Python's headers are needed for one of its dependencies (Debian: build-essential,
# python3-dev); they are installed when they are missing and this runs as root.
set -e
cd "$(dirname "$0")/.."
python=${1:-python3}
if ! command -v cc >/dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq
    apt-get install -y -qq build-essential python3-dev >/dev/null
fi
if ! .venv-lucid/bin/python -c 'import radical.pilot' 2>/dev/null; then
    rm -rf .venv-lucid
    "$python" -m venv .venv-lucid
    .venv-lucid/bin/python -m pip install --quiet --disable-pip-version-check \
        'radical.pilot>=1.100,<1.110'
fi
