"""Tests of what the bridge and the plugin API do for the Explorer. They need no browser."""
from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import plugins
import radical_edge
from radical_edge import Bridge, Edge, Plugin, check_ui_config
from test_edge import (ROOT, Raw, bridge, home, raw, tokens,        # noqa: F401 (fixtures)
                       wait_until)

HOSTILE = "</script><img src=x onerror=alert(1)>"


# ---------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------

def directives(fields):
    """Return a Content-Security-Policy as {directive: [sources]}."""
    parts = [part.split() for part in fields["content-security-policy"].split(";")]
    return {part[0]: part[1:] for part in parts if part}


def test_the_page_is_small_and_comes_compressed_and_once(raw):
    client = raw(None)
    status, fields, body = client.request("GET", "/")
    assert status == 200 and len(body) < 150 * 1000
    assert fields["cache-control"] == "no-cache" and "accept-encoding" in fields["vary"].lower()
    assert client.request("GET", "/", headers=[("If-None-Match", fields["etag"])])[0] == 304
    zipped = client.request("GET", "/", headers=[("Accept-Encoding", "br, gzip;q=0.8")])
    assert zipped[1]["content-encoding"] == "gzip" and gzip.decompress(zipped[2]) == body
    assert zipped[1]["etag"] != fields["etag"] and len(zipped[2]) < len(body) / 2
    again = [("Accept-Encoding", "gzip"), ("If-None-Match", f'W/"x", {zipped[1]["etag"]}')]
    status, fields, body = client.request("GET", "/", headers=again)
    assert (status, body) == (304, b"") and "content-length" not in fields
    refused = client.request("GET", "/", headers=[("Accept-Encoding", "gzip;q=0, identity")])
    assert "content-encoding" not in refused[1]


def test_nothing_runs_in_the_page_but_what_stands_in_it(raw):
    _, fields, body = raw(None).request("GET", "/")
    policy = directives(fields)
    assert policy["default-src"] == ["'none'"] and policy["connect-src"] == ["'self'"]
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == ["'none'"]
    assert "unsafe-inline" not in fields["content-security-policy"]
    assert "unsafe-eval" not in fields["content-security-policy"]
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        found = re.findall(f"<{tag}>(.*?)</{tag}>".encode(), body, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in found]
        assert policy[directive] == [f"'sha256-{value}'" for value in hashes] and len(found) == 1
    page = body.decode()
    assert not re.search(r"\s(style|on[a-z]+)=[\"']", page)     # the policy would block them
    assert not re.search(r"(src|href)=[\"'](https?:)?//", page), "a request to another host"


def test_the_frame_of_a_module_has_no_network_and_no_origin(raw):
    _, fields, body = raw(None).request("GET", "/plugins/frame")
    policy = directives(fields)
    assert policy["sandbox"] == ["allow-scripts"] and policy["default-src"] == ["'none'"]
    assert "connect-src" not in policy and policy["frame-ancestors"] == ["'self'"]
    assert "unsafe-inline" not in policy["script-src"] and b"<script>" in body
    assert b'<template id="frame">' not in raw(None).request("GET", "/")[2]


def test_a_bridge_without_the_page_says_where_it_belongs(tmp_path, caplog):
    page, frame = radical_edge.load_explorer(tmp_path / "explorer.html")
    assert b"explorer.html" in page.respond({}).body and "cannot be read" in caplog.text
    assert directives(page.respond({}).headers)["script-src"] == ["'none'"]
    assert frame.respond({}).body == b""


def test_an_installed_package_has_the_page(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("radical_edge.py", "plugins.py", "explorer.html", "setup.cfg", "pyproject.toml",
                 "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)], check=True)
    wheel = next(tmp_path.glob("*.whl"))
    assert any(name.endswith("explorer.html") for name in zipfile.ZipFile(wheel).namelist())
    target = tmp_path / "target"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(target)], check=True)
    python = str(target / "bin" / "python")
    subprocess.run([*pip, "--python", python, "install", "-q", "--no-deps", str(wheel)], check=True)
    code = "import radical_edge; print(radical_edge._find_explorer())"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True,
                           cwd=tmp_path).stdout.strip()
    assert Path(found).read_bytes() == (ROOT / "explorer.html").read_bytes()
    assert str(target) in found


# ---------------------------------------------------------------------------
# What a page is told
# ---------------------------------------------------------------------------

def test_a_caller_is_told_what_it_may_do(raw, tokens):
    rights = {"admin": ["look", "use", "register", "manage"], "client": ["look", "use"],
              "read": ["look"], "edge": ["register"]}
    for scope, expected in rights.items():
        told = json.loads(raw(tokens[1][scope]).request("GET", "/auth")[2])
        assert (told["scope"], told["rights"], told["expires"]) == (scope, expected, None)
    told = json.loads(raw(None).request("GET", "/auth")[2])
    assert told["name"] is None and told["rights"] == [] and told["needs_token"] is True
    assert raw("wrong").request("GET", "/auth")[0] == 401


def test_without_authentication_nobody_needs_to_sign_in(home):
    bridge = Bridge(port=0, tokens=None).start()
    try:
        client = Raw(bridge)
        told = json.loads(client.request("GET", "/auth")[2])
        assert (told["scope"], told["needs_token"]) == ("admin", False)
        client.close()
    finally:
        bridge.stop()


def module_plugin(tmp_path, name, text):
    """Return a plugin class with a UI module."""
    path = tmp_path / f"{name}.js"
    path.write_text(text)
    return type(name, (Plugin,), {"plugin_name": name, "ui_module": str(path)})


@pytest.fixture
def registry(monkeypatch):
    """Plugins that a test defines are forgotten after it."""
    monkeypatch.setattr(Plugin, "_registry", dict(Plugin._registry))


def test_the_module_of_an_edge_comes_from_that_edge_alone(bridge, raw, tokens, tmp_path, registry):
    names = ("e1", "e2")
    edges = []
    for name in names:
        module_plugin(tmp_path, "shown", f"// of {name}")
        edges.append(Edge(bridge.url, name, plugins=["shown"], token=tokens[1]["edge"],
                          state_dir=tmp_path / name).start())
        assert edges[-1].online.wait(10)
    wait_until(lambda: set(bridge._registry.links) == set(names))
    client = raw()
    listed = json.loads(client.request("POST", "/edge/list")[2])["data"]["edges"]
    for name in names:
        address = listed[name]["plugins"]["shown"]["ui_module"]
        assert address == f"plugins/shown.js?edge={name}"
        status, fields, body = client.request("GET", "/" + address)
        assert (status, body) == (200, f"// of {name}".encode())
        assert directives(fields)["sandbox"] == []
    assert client.request("GET", "/plugins/shown.js?edge=none")[0] == 404
    assert client.request("GET", "/plugins/other.js?edge=e1")[0] == 404
    for edge in edges:
        edge.stop()


def test_a_module_that_is_too_large_is_left_out(bridge, tokens, tmp_path, registry, caplog):
    module_plugin(tmp_path, "shown", "/" * (radical_edge.MAX_UI_MODULE + 1))
    edge = Edge(bridge.url, "e1", plugins=["shown"], token=tokens[1]["edge"]).start()
    assert edge.online.wait(10) and "the UI module is left out" in caplog.text
    wait_until(lambda: "e1" in bridge._registry.links)
    assert "ui_module" not in bridge._registry.links["e1"].plugins["shown"]
    edge.stop()


def test_the_bridge_serves_the_modules_of_its_own_plugins(home, tokens, tmp_path, registry):
    module_plugin(tmp_path, "shown", "// of the bridge")
    bridge = Bridge(port=0, tokens=tokens[0], plugins=["shown"]).start()
    try:
        client = Raw(bridge, tokens[1]["read"])
        listed = json.loads(client.request("POST", "/edge/list")[2])["data"]["edges"]["bridge"]
        assert listed["plugins"]["shown"]["ui_module"] == "plugins/shown.js?edge=bridge"
        module = client.request("GET", "/plugins/shown.js?edge=bridge")
        assert module[0] == 200 and module[2] == b"// of the bridge"
        client.close()
    finally:
        bridge.stop()


def test_an_edge_in_grace_is_marked_in_the_topology(bridge, raw, tokens):
    edge = Edge(bridge.url, "e1", plugins=[], token=tokens[1]["edge"]).start()
    assert edge.online.wait(10)
    wait_until(lambda: "e1" in bridge._registry.links)
    client = raw()

    def told():
        return json.loads(client.request("POST", "/edge/list")[2])["data"]["edges"]

    assert "connected" not in told()["e1"]
    bridge._thread.call(bridge._registry.links["e1"].channel.close, "cut, for a test")
    wait_until(lambda: told().get("e1", {}).get("connected") is False, what="the mark")
    wait_until(lambda: "connected" not in told()["e1"], what="the edge's return")
    edge.stop()


# ---------------------------------------------------------------------------
# ui_config
# ---------------------------------------------------------------------------

FULL = {
    "icon": "x", "title": "T", "description": "d", "stub_message": "s", "refresh_button": True,
    "custom_template": False, "auto_load": "status/{sid}",
    "forms": [{
        "id": "submit", "title": "t", "layout": "grid3",
        "submit": {"label": "Go", "style": "danger", "endpoint": "start/{sid}"},
        "fields": [
            {"name": "a", "type": "text", "label": "A", "css_class": "c", "placeholder": "p",
             "default": "x", "required": False, "column": 2, "help": "h"},
            {"name": "b", "type": "number", "default": 3}, {"name": "c", "type": "textarea"},
            {"name": "d", "type": "select", "options": ["x", 1, {"value": "y", "label": "Y"}]},
            {"name": "e", "type": "select", "options_endpoint": "names?all=true"},
            {"name": "f", "type": "checkbox", "default": True}, {"name": "g", "type": "hidden"},
            {"name": "h", "type": "custom_attributes"}]}],
    "monitors": [
        {"id": "m", "title": "t", "type": "task_list", "css_class": "c", "empty_text": "none",
         "auto_load": "list/{sid}", "refresh": 2.5, "detail": "status/{sid}/{id}",
         "actions": [{"label": "Stop", "endpoint": "stop/{sid}/{id}", "style": "danger",
                      "states": ["RUNNING"]}]},
        {"id": "n", "type": "metrics"}, {"id": "o", "type": "table"}, {"id": "p", "type": "raw"}],
    "notifications": {"topic": "t", "id_field": "i", "state_field": "s"},
}


def changed(value, *path):
    """Return FULL with `value` at a path."""
    config = json.loads(json.dumps(FULL))
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return config


def test_a_ui_config_with_everything_is_taken():
    check_ui_config(FULL)
    check_ui_config({})
    check_ui_config({"title": None, "forms": None})
    for cls in Plugin._registry.values():
        if cls.__module__ == plugins.__name__:
            check_ui_config(cls.ui_config or {})


WRONG = {
    "ui_config: must be an object": ["x"],
    "ui_config: has no key 'titel'": changed("T", "titel"),
    "ui_config.title: 5 is not a string": changed(5, "title"),
    "ui_config.refresh_button: 'yes' is not true or false": changed("yes", "refresh_button"),
    "ui_config.forms: must be a list": changed({}, "forms"),
    "ui_config.forms[0]: must be an object": changed("x", "forms", 0),
    "ui_config.forms[0].id: is missing": changed(None, "forms", 0, "id"),
    "ui_config.forms[0].layout: 'grid4' is none of single, grid2, grid3":
        changed("grid4", "forms", 0, "layout"),
    "ui_config.forms[0].fields[0].type: 'date' is none of text,":
        changed("date", "forms", 0, "fields", 0, "type"),
    "ui_config.forms[0].fields[0].column: 3 is not 0, 1 or 2":
        changed(3, "forms", 0, "fields", 0, "column"),
    "ui_config.forms[0].fields[1].name: 'a' is used twice":
        changed("a", "forms", 0, "fields", 1, "name"),
    "ui_config.forms[0].fields[3].options: a select needs them":
        changed([], "forms", 0, "fields", 3, "options"),
    "ui_config.forms[0].fields[3].options[2].value: is missing":
        changed({"label": "Y"}, "forms", 0, "fields", 3, "options", 2),
    "ui_config.forms[0].submit.endpoint: '../other/x' is not a route":
        changed("../other/x", "forms", 0, "submit", "endpoint"),
    "ui_config.forms[0].submit.style: 'loud' is none of": changed("loud", "forms", 0, "submit",
                                                                  "style"),
    "ui_config.auto_load: '/x' is not a route": changed("/x", "auto_load"),
    "ui_config.auto_load: 'a/../b' is not a route": changed("a/../b", "auto_load"),
    "ui_config.auto_load: 'https://x' is not a route": changed("https://x", "auto_load"),
    "ui_config.monitors[0].type: 'chart' is none of": changed("chart", "monitors", 0, "type"),
    "ui_config.monitors[0].refresh: 0 is not a number of seconds":
        changed(0, "monitors", 0, "refresh"),
    "ui_config.monitors[0].actions[0].endpoint: is missing":
        changed(None, "monitors", 0, "actions", 0, "endpoint"),
    "ui_config.notifications.topic: is missing": changed({"id_field": "i"}, "notifications"),
    "must hold JSON values only": changed(float("nan"), "forms", 0, "fields", 0, "default"),
    "ui_config: has 1": changed(["y" * 4000] * 30, "forms", 0, "fields", 3, "options"),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_with_a_ui_config_is_named(message):
    with pytest.raises(ValueError) as caught:
        check_ui_config(WRONG[message])
    assert message in str(caught.value)


def test_a_plugin_with_a_wrong_ui_config_is_served_and_says_what_is_wrong(
        bridge, raw, tokens, registry, caplog):
    type("Askew", (Plugin,), {"plugin_name": "askew", "ui_config": {"titel": HOSTILE}})
    edge = Edge(bridge.url, "e1", plugins=["askew"], token=tokens[1]["edge"]).start()
    assert edge.online.wait(10)
    wait_until(lambda: "e1" in bridge._registry.links)
    client = raw()
    described = json.loads(client.request("POST", "/edge/list")[2])["data"]["edges"]["e1"]
    assert described["plugins"]["askew"]["ui_config"] == {}
    assert "has no key 'titel'" in described["plugins"]["askew"]["ui_problem"]
    assert "has no key 'titel'" in caplog.text
    assert client.request("GET", "/e1/askew/version")[0] == 200
    edge.stop()


def test_a_ui_config_may_be_an_object_that_knows_its_dict():
    class Described:
        def model_dump(self):
            return {"title": "T"}

    made = type("Modelled", (Plugin,), {"ui_config": Described()})(None, "modelled")
    assert made.describe_ui() == {"title": "T"} and made.ui_problem() is None
