#!/bin/sh
# Install the peers of tests/test_compat.py, into .venv-compat:  tests/setup-compat.sh [PYTHON]
#
# radical.orbit 0.2.0 is the code of radical.edge 0.2 just after a renaming (edge became endpoint),
# and is on the package index, which radical.edge is not. It is installed as it is; beside it,
# legacy_peers.py writes a copy that has the old names again.
set -e
cd "$(dirname "$0")/.."
venv=.venv-compat

usable() { "$1" -c 'import ensurepip, sys; assert sys.version_info >= (3, 10)' 2>/dev/null; }

python=$1
for candidate in python3 python3.11 python3.12 python3.13 python3.10 \
                 "$HOME"/.pyenv/versions/3.1[0-3].*/bin/python; do
    [ -z "$python" ] && usable "$candidate" && python=$candidate
done
[ -n "$python" ] || { echo "needs Python 3.10 or later with venv" >&2; exit 1; }

if ! $venv/bin/python -c 'import radical.orbit, sseclient, opentelemetry.sdk' 2>/dev/null; then
    rm -rf $venv
    "$python" -m venv $venv
    $venv/bin/python -m pip install --quiet --disable-pip-version-check \
        radical.orbit==0.2.0 opentelemetry-sdk sseclient-py requests   # the second: not declared
fi
$venv/bin/python tests/legacy_peers.py
$venv/bin/python -c 'import radical.edge'          # fails when it is not whole
