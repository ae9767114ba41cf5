"""What README.md says is true: its commands are understood, its files are there, and the plugin that
it shows works, with the test that it shows.

    $ python -m pytest tests/test_readme.py
"""
from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

import radical_edge
from test_edge import ROOT

TEXTS = ("README.md", "SECURITY.md")
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.partition("radical_edge.py ")[2] for name in TEXTS
            for line in (ROOT / name).read_text(encoding="utf-8").replace("\\\n", "").splitlines()
            if re.match(r"    [\w.]*\$ .*radical_edge\.py ", line)]


# of sbatch, squeue, our tests and our measurements
OTHERS = {"--account", "--cpus-per-task", "--gpus-per-task", "--job-name", "--json", "--mem",
          "--nodes", "--ntasks", "--ntasks-per-node", "--partition", "--qos", "--requeue",
          "--reservation", "--seconds", "--stuck", "--time"}


def python_blocks(text):
    """Return the contents of its ```python blocks."""
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def find_block(start):
    """Return the block that starts with a text."""
    return next(block for block in python_blocks(README) if block.startswith(start))


def test_there_are_commands():
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_the_parser_takes(command):
    options = radical_edge.make_parser().parse_args(shlex.split(command, comments=True))
    assert any((options.bridge, options.edge, options.list, options.call, options.check,
                options.events is not None, options.put, options.get, options.token))


def test_each_option_that_is_named_is_one():
    known = {option for action in radical_edge.make_parser()._actions
             for option in action.option_strings}
    for text in [(ROOT / name).read_text(encoding="utf-8") for name in (*TEXTS, "CHANGELOG.md")]:
        assert not set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - known - OTHERS


def test_each_file_that_is_named_is_there():
    for name in TEXTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        named = set(re.findall(r"\b(?:tests|bench|examples)/[\w*-]+(?:\.\w+)?", text))
        assert named and not [path for path in named if not list(ROOT.glob(path))]
        for path in re.findall(r"`(tests/setup-[\w-]+\.sh)", text):
            assert os.access(ROOT / path, os.X_OK), path


def test_each_block_of_python_is_python():
    blocks = python_blocks(README)
    assert len(blocks) > 6
    for block in blocks:
        lines = block if not block.startswith(" ") else f"if True:\n{block}"
        compile(lines, block[:40], "exec")


def test_the_plugin_that_is_shown_passes_the_test_that_is_shown(tmp_path):
    (tmp_path / "weather.py").write_text(find_block("# weather.py"))
    (tmp_path / "test_weather.py").write_text(find_block("# test_weather.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_weather.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


def test_the_page_that_is_shown_is_right():
    scope = {}
    exec(f"class Shown:\n{find_block('    ui_config = {')}", scope)
    radical_edge.check_ui_config(scope["Shown"].ui_config)


def test_the_bodies_that_are_shown_stream(tmp_path):
    scope = {}
    exec(find_block("from radical_edge import FileResponse"), scope)
    try:
        assert radical_edge.Plugin.get_plugin_class("archive") is scope["Archive"]
    finally:
        radical_edge.Plugin._registry.pop("archive")
