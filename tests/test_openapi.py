"""The API as /openapi.json describes it: valid, and without a 500 for whatever schemathesis sends.

    $ python -m pytest tests/test_openapi.py    # RADICAL_EDGE_LONG=1: 50 times as many requests
"""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import radical_edge
from test_edge import bridge_url, needs, needs_module, run, start, wait_until    # noqa: F401

EXAMPLES = 500 if os.environ.get("RADICAL_EDGE_LONG") else 10
# ends what is tested, or never ends
LEFT_OUT = ("/bridge/terminate", "/edge/disconnect/{name}", "/events")

# what gets further than to the check of the body's shape
JOBS = {"content": {"application/json": {"schema": {"type": "object", "properties": {
    "executor": {"enum": ["local", "nosuch", 7]},
    "job_spec": {"type": "object", "required": ["executable"], "properties": {
        "executable": {"enum": ["true", "/nonexistent", "", "\0"]}, "arguments": {},
        "environment": {}, "directory": {"enum": ["/tmp", "/nonexistent", 7]},
        "resources": {}, "attributes": {}}}}}}}}


@pytest.fixture
def running(start, home):                                           # noqa: F811
    """A bridge and an edge with all plugins, in a process of their own: (url, token)."""
    process = start("--bridge", "--edge", "--name", "e1", "--port", "0", expect="edge: e1")
    url, token = bridge_url(process), (home / ".radical/edge/token").read_text().strip()
    wait_until(lambda: radical_edge.list_edges(url=url, token=token) == ["e1"])
    return url, token


def describe(url, token):
    import urllib.request
    request = urllib.request.Request(url + "/openapi.json",
                                     headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def test_the_description_is_valid_and_names_every_route(running):
    validator = needs_module("openapi_spec_validator", "security")
    document = describe(*running)
    assert document["openapi"].startswith("3.1")
    validator.validate(document)
    for path in ("/edges", "/health/ready", "/edge/disconnect/{name}", "/e1/sysinfo/metrics/{sid}",
                 "/e1/psij/submit/{sid}"):
        assert path in document["paths"], path
    assert document["paths"]["/edges"]["get"]["security"] == [{"token": []}]
    assert document["paths"]["/health"]["get"]["security"] == []


def test_the_description_of_odd_plugins_is_valid_too(bridge, raw, tokens):
    validator = needs_module("openapi_spec_validator", "security")
    from test_edge import FakeEdge
    fake = FakeEdge(bridge, tokens[1]["edge"], "f1")
    fake.say(type="topology", edges={"f1": {"plugins": {
        "p": {"routes": [["GET", "a/{x}/{x}"], ["PATCH", "{a}.{b}"], ["PUT", "x/"], ["GET", "{"],
                         ["TRACE", "t"], ["GET", "{a-b}"], ["GET", "}{"], ["GET", ""], ["GET"], 5]}}}})
    client = raw()
    document = wait_until(lambda: json.loads(client.request("GET", "/openapi.json")[2]))
    wait_until(lambda: any(path.startswith("/f1/p/x") for path in json.loads(
        client.request("GET", "/openapi.json")[2])["paths"]))
    document = json.loads(client.request("GET", "/openapi.json")[2])
    validator.validate(document)
    fake.close()


def test_nothing_that_schemathesis_sends_is_a_500(running, tmp_path):
    program = Path(sys.executable).with_name("schemathesis")
    needs("security", program.exists(), "schemathesis: pip install '.[security]'")
    url, token = running
    document = describe(url, token)
    sids = {plugin: radical_edge.call("e1", plugin, "register_session", {}, url=url, token=token)["sid"]
            for plugin in ("sysinfo", "psij")}
    for path, operations in document["paths"].items():
        parts = path.split("/")
        if len(parts) > 2 and parts[2] in sids:   # a session that is there, so that it gets further
            for operation in operations.values():
                for parameter in operation.get("parameters", ()):
                    if parameter["name"] == "sid":
                        parameter["schema"] = {"enum": [sids[parts[2]], "session.0"]}
    document["paths"]["/e1/psij/submit/{sid}"]["post"]["requestBody"] = JOBS
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    left_out = [part for path in LEFT_OUT for part in ("--exclude-path", path)]
    done = subprocess.run(
        [str(program), "run", str(tmp_path / "openapi.json"), "--url", url, "--checks",
         "not_a_server_error", "--max-examples", str(EXAMPLES), "--header",
         f"Authorization: Bearer {token}", "--request-timeout", "30", "--no-color",
         "--exclude-path-regex", "unregister_session", "--phases", "examples,coverage,fuzzing",
         *left_out], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=3600)
    assert done.returncode == 0, done.stdout[-6000:]
    tested = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert tested and int(tested[1]) > 100, done.stdout[-6000:]
