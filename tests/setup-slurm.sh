#!/bin/sh
# What the suites against a real Slurm need, installed and brought up: as root on Debian 12; safe to
# run again. RADICAL_EDGE_REQUIRE=slurm then makes tests fail, not skip, when Slurm is missing.
#   sh tests/setup-slurm.sh [24.11|22.05 ...]
set -eu
cd "$(dirname "$0")/slurm"
[ "$#" -gt 0 ] || set -- 24.11
for version in "$@"; do ./up "$version" --reset >/dev/null; done
