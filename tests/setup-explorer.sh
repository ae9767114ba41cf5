#!/bin/sh
# Install what tests/test_explorer.py needs on a Debian 12: Chromium, its driver, and axe-core.
# axe-core goes to the directory in RADICAL_EDGE_AXE, by default ~/.cache/radical-edge/axe.
set -e
if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
    apt-get update -qq
    apt-get install -y -qq chromium chromium-driver fonts-dejavu-core fonts-noto-color-emoji >/dev/null
fi
folder=${RADICAL_EDGE_AXE:-$HOME/.cache/radical-edge/axe}
if [ ! -f "$folder/node_modules/axe-core/axe.min.js" ]; then
    command -v npm >/dev/null || { apt-get update -qq; apt-get install -y -qq npm >/dev/null; }
    mkdir -p "$folder"
    npm install --silent --no-audit --no-fund --prefix "$folder" axe-core@4
fi
