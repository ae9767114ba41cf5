#!/bin/sh
# Install what the security suites need on Debian beside the extra `security`: nginx.
# tests/setup-security.sh [PYTHON]: also makes .venv-security with that Python, for tests and fuzzing.
set -e
cd "$(dirname "$0")/.."
if ! command -v nginx >/dev/null && ! [ -x /usr/sbin/nginx ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nginx-light >/dev/null
fi
if [ $# -gt 0 ]; then
    "$1" -m venv .venv-security
    .venv-security/bin/python -m pip install --quiet --disable-pip-version-check ".[test,security]"
fi
