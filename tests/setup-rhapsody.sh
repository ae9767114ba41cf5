#!/bin/sh
# Install what tests/test_rhapsody_backends.py and bench/tasks.py need:
#     tests/setup-rhapsody.sh [PYTHON [WHAT ...]]
# WHAT: rhapsody (the default; with dask, into .venv-rhapsody), dragon (.venv-dragon, Python 3.11 or
# later), radical_pilot (.venv-pilot; one of its dependencies needs a compiler and Python's headers).
set -e
cd "$(dirname "$0")/.."
python=${1:-python3}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- rhapsody

install() {  # install FOLDER MODULE PACKAGE ...
    folder=$1 module=$2
    shift 2
    if ! "$folder/bin/python" -c "import rhapsody, $module" 2>/dev/null; then
        rm -rf "$folder"
        "$python" -m venv "$folder"
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
            'rhapsody-py>=0.6,<0.7' cloudpickle "$@"
    fi
}

for what in "$@"; do
    case $what in
    rhapsody) install .venv-rhapsody distributed 'dask[distributed]>=2023.5' ;;
    dragon) install .venv-dragon flask 'dragonhpc>=0.14.1' flask gunicorn ;;
    radical_pilot)
        if ! command -v cc >/dev/null && [ "$(id -u)" = 0 ]; then
            apt-get update -qq
            apt-get install -y -qq build-essential python3-dev >/dev/null
        fi
        install .venv-pilot radical.pilot 'radical.pilot>=1.100,<1.110' ;;
    *) echo "setup-rhapsody.sh: there is no $what" >&2; exit 2 ;;
    esac
done
