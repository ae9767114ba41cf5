"""What README.md says is true: its commands are understood, its files are there, and the plugin that
it shows works, with the test that it shows.

    $ python -m pytest tests/test_readme.py
"""
from __future__ import annotations

import http.cookiejar
import json
import os
import queue
import re
import shlex
import ssl
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

import radical_edge
from nginx import pick_port, run_nginx
from radical_edge import Bridge, BridgeClient, Edge
from test_edge import ROOT, Relay, certificate                            # noqa: F401 (fixture)

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


# ---------------------------------------------------------------------------
# nginx, as it is shown
# ---------------------------------------------------------------------------

@pytest.fixture(params=["www.example.org", "www.example.org:8443"])
def behind_nginx(request, tokens, certificate, tmp_path, monkeypatch):    # noqa: F811
    """The URL of a bridge behind nginx with what is shown, and the pin of nginx' certificate.

    A proxy leads to nginx by the name that is shown, whichever port is asked for.
    """
    cert, key, pin = certificate
    port, where = pick_port(), request.param
    bridge = Bridge(port=0, tokens=tokens[0], allow_hosts=[where]).start()
    relay = Relay(port, connect_host="www.example.org")
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{relay.port}")
    try:
        with run_nginx(tmp_path / "nginx", port, certificate=(cert, key),
                       edge=bridge._listener.server_address[1]):
            yield f"https://{where}/edge", pin
    finally:
        relay.close()
        assert bridge.stop()


def test_page_events_links_and_requests_go_through_what_is_shown_for_nginx(behind_nginx, tokens):
    url, pin = behind_nginx
    edge = Edge(url, "e1", plugins=["echo"], token=tokens[1]["edge"], cert=pin).start()
    try:
        with BridgeClient(url, cert=pin, token=tokens[1]["client"]) as client:
            assert client.wait_for_edge("e1", timeout=30) == "e1"
            page = client.http.get("/")
            assert "<title>Radical Edge</title>" in page.text
            assert "default-src 'none'" in page.headers["Content-Security-Policy"]
            said, body = queue.Queue(), os.urandom(3_000_000)     # more than nginx takes by default
            assert client.http.post("/e1/echo/echo", content=body).content == body
            echo = client.get_edge_client("e1").get_plugin("echo")
            echo.register_notification_callback(lambda *event: said.put(event[3]))
            echo._get(f"say/{echo.sid}/hello")
            assert said.get(timeout=20) == {"text": "hello"}      # now, not when a buffer is full
            echo.close()
    finally:
        assert edge.stop()


def test_a_browser_signs_in_behind_what_is_shown_for_nginx(behind_nginx, tokens):
    url, _ = behind_nginx
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    cookies = http.cookiejar.CookieJar()
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context),
                                         urllib.request.HTTPCookieProcessor(cookies))

    def post(path, body, origin):
        request = urllib.request.Request(f"{url}/{path}", json.dumps(body).encode(), headers={
            "Origin": origin, "Content-Type": "application/json"})
        try:
            with opener.open(request, timeout=30) as reply:
                return reply.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    with opener.open(url, timeout=30) as reply:    # nginx adds the slash
        assert b"<title>Radical Edge</title>" in reply.read()
    own = url[:-len("/edge")]
    assert post("edge/list", {}, own) == 401
    assert post("auth", {"token": tokens[1]["client"]}, own) == 200
    assert [cookie.secure for cookie in cookies] == [True]
    assert post("edge/list", {}, own) == 200
    assert post("edge/list", {}, "https://www.example.org:9") == 403
    assert post("edge/list", {}, "https://elsewhere.example.org") == 403
