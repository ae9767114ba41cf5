"""Tests of the plugin staging: real files, real sockets, a link that is cut, processes that die.

    $ python -m pytest tests/test_staging.py
    $ RADICAL_EDGE_LONG=1 python -m pytest tests/test_staging.py -k cut_three_times      # 4 GiB
"""
from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

import pytest

import plugins
import radical_edge
from chaos import Proxy
from plugins import FileExists, FileMissing, Files, PluginStaging, Roots, StagingClient
from radical_edge import (BridgeClient, Conflict, Edge, EdgeError, Forbidden, InsufficientStorage,
                          StreamingResponse, Unprocessable, get)
from test_edge import bridge_url, needs, run, wait_until

LONG = bool(os.environ.get("RADICAL_EDGE_LONG"))          # the long forms: see the README
MIB = 1 << 20


# ---------------------------------------------------------------------------
# Helpers and fixtures
# ---------------------------------------------------------------------------

class Scene:
    """An edge "e1" behind a proxy, its one root `there`, a directory `here`, and a client."""

    def __init__(self, bridge, tokens, folder):
        self.here, self.there, self.outside = (folder / name
                                               for name in ("here", "there", "outside"))
        for path in (self.here, self.there, self.outside):
            path.mkdir()
        (self.outside / "secret").write_text("secret")
        self.proxy = Proxy(bridge._listener.server_address[1])
        self.edge = Edge(f"http://127.0.0.1:{self.proxy.port}", "e1", plugins=["staging"],
                         token=tokens[1]["edge"], options={"staging_roots": [str(self.there)]})
        self.edge.start()
        self.bridge_client = BridgeClient(bridge.url)
        wait_until(lambda: "e1" in self.bridge_client.list_edges())
        self.client = self.bridge_client.get_edge_client("e1").get_plugin("staging")

    def path(self, name):
        """Return the path on the edge."""
        return f"{self.there}/{name}"

    def write(self, name, content, mode=0o644):
        """Make a file here; return its path."""
        path = self.here / name
        path.write_bytes(content)
        path.chmod(mode)
        return path

    def leftovers(self):
        """Return the partial files that lie anywhere."""
        return [path for folder in (self.here, self.there) for path in folder.rglob(".radical-*")]

    def close(self):
        self.client.close()
        self.bridge_client.close()
        assert self.edge.stop()
        self.proxy.close()


@pytest.fixture
def scene(bridge, tokens, tmp_path):
    made = Scene(bridge, tokens, tmp_path)
    yield made
    made.close()


@pytest.fixture
def files(tmp_path):
    """What an edge does with files, without an edge; its root is tmp_path/there."""
    root, outside = tmp_path / "there", tmp_path / "outside"
    for path in (root, outside):
        path.mkdir()
    (outside / "secret").write_text("secret")
    made = Files(Roots([str(root)]))
    made.root, made.outside = root, outside
    return made


def query(route, path, **values):
    """Return the target of a request about a path of bytes or text."""
    return f"/e1/staging/{route}?" + urllib.parse.urlencode({"path": os.fsencode(path), **values})


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(MIB), b""):
            digest.update(piece)
    return digest.hexdigest()


def make_random_file(path, size):
    with open(path, "wb") as file:
        for begin in range(0, size, MIB):
            file.write(os.urandom(min(MIB, size - begin)))
    return path


def put_whole(files, path, content, **options):
    return files.uploads.put(str(path), [content],
                             **{"overwrite": False, "sha256": None, **options})


# ---------------------------------------------------------------------------
# There and back
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("size", [0, 1, 300_000, 3_000_000])
def test_a_file_goes_there_and_back_with_its_mode_and_time(wire, scene, size):
    content = os.urandom(size)
    source = scene.write("source", content, 0o750)
    os.utime(source, (1, 1_234_567_890.25))
    seen = []
    done = scene.client.put(source, scene.path("a/b/file"),
                            progress=lambda *figures: seen.append(figures))
    assert (done["path"], done["size"]) == (scene.path("a/b/file"), size)
    assert done["sha256"] == hashlib.sha256(content).hexdigest()
    assert seen[-1] == (size, size) and all(done <= total == size for done, total in seen)
    back = scene.client.get(scene.path("a/b/file"), scene.here / "new/back")
    assert back["sha256"] == done["sha256"]
    for path in (scene.there / "a/b/file", scene.here / "new/back"):
        status = path.stat()
        assert path.read_bytes() == content
        assert stat.S_IMODE(status.st_mode) == 0o750 and status.st_mtime == 1_234_567_890.25
    assert not scene.leftovers()


def test_what_is_there_is_replaced_only_when_that_is_wanted(scene):
    one, two = scene.write("one", b"one", 0o600), scene.write("two", b"two")
    scene.client.put(one, scene.path("file"))
    with pytest.raises(FileExistsError):
        scene.client.put(two, scene.path("file"))
    with pytest.raises(FileExists):
        scene.client.get(scene.path("file"), two)
    assert (scene.there / "file").read_bytes() == b"one" and two.read_bytes() == b"two"
    scene.client.put(two, scene.path("file"), overwrite=True)
    scene.client.get(scene.path("file"), one, True)
    assert (scene.there / "file").read_bytes() == b"two" == one.read_bytes()
    with pytest.raises(Conflict, match="is a directory"):
        scene.client.put(one, str(scene.there), True)
    with pytest.raises(FileNotFoundError):
        scene.client.get(scene.path("none"), scene.here / "none")
    with pytest.raises(FileNotFoundError):
        scene.client.put(scene.here / "none", scene.path("none"))
    assert not scene.leftovers()


def test_of_many_who_make_the_same_file_one_succeeds(scene, raw):
    clients, results = [raw() for _ in range(8)], []

    def make(client, content):
        results.append((client.request("PUT", query("file", scene.path("file")), content)[0],
                        content))

    threads = [threading.Thread(target=make, args=(client, b"%d" % number * 100_000))
               for number, client in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(status for status, _ in results) == [201] + [409] * 7
    winner = next(content for status, content in results if status == 201)
    assert (scene.there / "file").read_bytes() == winner and not scene.leftovers()


def test_curl_like_requests_put_and_get_a_file(scene, raw):
    content = os.urandom(200_000)
    digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
    target = query("file", scene.path("file"), mode="0640", mtime="1000.5")
    status, headers, body = raw().request(
        "PUT", target, content, [("Repr-Digest", f"sha-256=:{digest}:")])
    assert (status, json.loads(body)["size"]) == (201, 200_000)
    assert headers["repr-digest"] == f"sha-256=:{digest}:"
    assert (scene.there / "file").stat().st_mtime == 1000.5
    status, first, body = raw().request("GET", target)
    assert (status, body, first["x-file-mode"]) == (200, content, "0640")
    wait_until(lambda: "repr-digest" in raw().request("HEAD", target)[1])   # known from sending it
    status, headers, body = raw().request("HEAD", target)
    assert (status, headers["content-length"], body) == (200, "200000", b"")
    assert headers["repr-digest"] == f"sha-256=:{digest}:" and headers["etag"] == first["etag"]
    for wanted, expected in (("bytes=10-19", content[10:20]), ("bytes=-5", content[-5:]),
                             ("bytes=199990-", content[199990:])):
        status, headers, body = raw().request("GET", target, headers=[
            ("Range", wanted), ("If-Match", first["etag"])])
        assert (status, body) == (206, expected)
    assert raw().request("GET", target, headers=[("Range", "bytes=200000-")])[0] == 416
    assert raw().request("GET", target, headers=[("If-None-Match", first["etag"])])[0] == 304
    assert raw().request("GET", target, headers=[("If-Match", '"other"')])[0] == 412


def test_a_file_that_was_damaged_on_its_way_is_refused(scene, raw):
    wrong = base64.b64encode(bytes(32)).decode()
    for content in (b"x", bytes(1_000_000)):
        status, _, body = raw().request("PUT", query("file", scene.path("file")), content,
                                        [("Repr-Digest", f"sha-256=:{wrong}:")])
        assert status == 422 and b"sha256" in body
    assert raw().request("PUT", query("file", scene.path("file")), b"x",
                         [("Repr-Digest", "sha-256=:AAAA:")])[0] == 400
    scene.client.ask("upload", {"path": scene.path("file"), "upload": "u" * 8, "size": 1})
    raw().request("PUT", query("upload", scene.path("file"), upload="u" * 8), b"x")
    with pytest.raises(Unprocessable, match="damaged"):
        scene.client.ask("upload/commit", {"path": scene.path("file"), "upload": "u" * 8,
                                           "sha256": "0" * 64})
    assert list(scene.there.iterdir()) == []


def test_the_json_forms_of_older_clients_work(scene, raw, tokens):
    sid = scene.client.sid

    def ask(route, token=None, **body):
        status, _, answer = raw(token or tokens[1]["admin"]).request(
            "POST", f"/e1/staging/{route}/{sid}", json.dumps(body).encode())
        return status, json.loads(answer)

    content = base64.b64encode(b"\0\1\2").decode()
    path = scene.path("new/file")
    status, answer = ask("put", filename=path, content=content)
    assert (status, answer["path"], answer["size"]) == (200, path, 3)
    assert ask("put", filename=path, content=content)[0] == 409
    assert ask("put", filename=path, content="", overwrite=True)[1]["size"] == 0
    assert ask("put", filename=path, content=content, overwrite=True)[0] == 200
    assert ask("get", filename=path)[1] == {"path": path, "size": 3, "content": content}
    status, answer = ask("list", path=scene.path("new"))
    assert answer["path"] == scene.path("new")
    assert [(entry["name"], entry["type"], entry["size"]) for entry in answer["entries"]] == \
        [("file", "file", 3)]
    assert ask("list", path=str(scene.there))[1]["entries"][0]["type"] == "dir"
    status, answer = ask("list", path=path)
    assert status == 400 and "Not a directory" in answer["detail"]
    assert ask("get", filename=scene.path("none"))[0] == 404
    for body in ({}, {"filename": path}, {"filename": path, "content": "%%%"},
                 {"filename": 7, "content": content},
                 {"filename": path, "content": content, "overwrite": "perhaps"}):
        assert ask("put", **body)[0] == 422
    assert ask("get", tokens[1]["client"], filename=path)[0] == 403          # not its session
    with open(path, "r+b") as file:
        file.truncate(plugins.MAX_JSON_FILE + 1)
    assert ask("get", filename=path)[0] == 413


def test_a_token_to_look_with_sees_names_and_no_contents(scene, raw, tokens):
    (scene.there / "file").write_text("text")
    looker = raw(tokens[1]["read"])
    assert looker.request("GET", query("stat", scene.path("file")))[0] == 200
    assert looker.request("GET", query("list", scene.there))[0] == 200
    for route, values in (("file", {}), ("tail", {}), ("stat", {"digest": "true"})):
        assert looker.request("GET", query(route, scene.path("file"), **values))[0] == 403
    for method, route in (("PUT", "file"), ("DELETE", "file"), ("PUT", "upload"),
                          ("POST", "files/write")):
        assert raw(tokens[1]["read"]).request(
            method, query(route, scene.path("file"), overwrite="true"), b"x")[0] == 403
    for route in ("upload", "upload/commit", "mkdir", "rename", "delete", "files/read"):
        assert raw(tokens[1]["read"]).request("POST", f"/e1/staging/{route}", b"{}")[0] == 403
    assert (scene.there / "file").read_text() == "text"


# ---------------------------------------------------------------------------
# Over breaks
# ---------------------------------------------------------------------------

class Cutter:
    """A progress callback that does something at a few points of a transfer, once at each."""

    def __init__(self, action, points=(0.25, 0.5, 0.75)):
        self._action, self._points = action, list(points)
        self.resumed = []                         # where it went on, after each
        self._cut = False

    def __call__(self, done, total):
        if self._cut:
            self.resumed.append(done / total)
            self._cut = False
        if self._points and done >= self._points[0] * total:
            self._points.pop(0)
            self._cut = True
            self._action()


def test_a_file_goes_there_and_back_with_the_link_cut_three_times(start, tmp_path):
    """64 MiB, or 4 GiB in the long form."""
    size = (4096 if LONG else 64) * MIB
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    source = make_random_file(folder / "source", size)
    wanted = sha256_of(source)
    bridge = start("--bridge", "--port", "0", expect="bridge: http")
    proxy = Proxy(int(bridge_url(bridge).rpartition(":")[2]))
    edge = start("--edge", "--name", "e1", "-p", "staging", "--staging-root", str(folder / "there"),
                 "--url", f"http://127.0.0.1:{proxy.port}", expect="edge: e1")
    (folder / "there").mkdir()
    try:
        with BridgeClient(bridge_url(bridge)) as client:
            wait_until(lambda: client.list_edges() == ["e1"])
            staging = client.get_edge_client("e1").get_plugin("staging")
            for go, paths in ((staging.put, (source, f"{folder}/there/file")),
                              (staging.get, (f"{folder}/there/file", folder / "back"))):
                cutter = Cutter(proxy.cut)
                done = go(*paths, progress=cutter)
                assert done["sha256"] == wanted and done["size"] == size
                # it went on, and did not begin anew (some of what was sent was on its way)
                assert len(cutter.resumed) == 3
                assert all(where > point - 0.15 for where, point in
                           zip(cutter.resumed, (0.25, 0.5, 0.75)))
            assert sha256_of(folder / "there/file") == wanted == sha256_of(folder / "back")
            assert not list(folder.rglob(".radical-*"))
            staging.close()
    finally:
        proxy.close()
    for process in (bridge, edge):
        status = Path(f"/proc/{process.process.pid}/status")
        if status.exists():
            peak = next(line for line in status.read_text().splitlines() if "VmHWM" in line)
            assert int(peak.split()[1]) < 120 * 1024, peak
    shutil.rmtree(folder)


@pytest.mark.parametrize("victim", ["edge", "bridge"])
def test_a_transfer_outlives_a_killed_edge_and_a_killed_bridge(start, tmp_path, victim):
    size = 32 * MIB
    source, root = make_random_file(tmp_path / "source", size), tmp_path / "there"
    root.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    flags = {"bridge": ["--bridge", "--port", port],
             "edge": ["--edge", "--name", "e1", "-p", "staging", "--staging-root", str(root),
                      "--url", f"http://127.0.0.1:{port}"]}
    running = {name: start(*flags[name], expect=f"{name}: ") for name in ("bridge", "edge")}

    def kill():
        running[victim].end(9)
        running[victim] = start(*flags[victim], expect=f"{victim}: ")

    with BridgeClient(f"http://127.0.0.1:{port}") as client:
        wait_until(lambda: client.list_edges() == ["e1"], 20)
        staging = client.get_edge_client("e1").get_plugin("staging")
        for go, paths in ((staging.put, (source, f"{root}/file")),
                          (staging.get, (f"{root}/file", tmp_path / "back"))):
            cutter = Cutter(kill, [0.5])
            go(*paths, progress=cutter)
            assert cutter.resumed[0] > 0.2
        assert sha256_of(source) == sha256_of(root / "file") == sha256_of(tmp_path / "back")


def test_a_connection_on_which_nothing_moves_is_given_up(bridge, scene, monkeypatch):
    monkeypatch.setattr(plugins, "STALL_S", 0.5)
    proxy = Proxy(bridge._listener.server_address[1])
    source = make_random_file(scene.here / "source", 16 * MIB)
    try:
        with BridgeClient(f"http://127.0.0.1:{proxy.port}") as client:
            staging = client.get_edge_client("e1").get_plugin("staging")
            for go, paths in ((staging.put, (source, scene.path("file"))),
                              (staging.get, (scene.path("file"), scene.here / "back"))):
                cutter = Cutter(proxy.stall, [0.5])
                go(*paths, progress=cutter)
                assert cutter.resumed
        assert sha256_of(source) == sha256_of(scene.here / "back")
    finally:
        proxy.close()


@pytest.mark.parametrize("wire", [1], indirect=True)
def test_a_file_larger_than_wire_version_1_takes_goes_in_segments(wire, scene):
    source = make_random_file(scene.here / "source", radical_edge.MAX_BODY + MIB)
    scene.client.put(source, scene.path("file"))
    scene.client.segment = sys.maxsize            # as another client would begin
    scene.client.get(scene.path("file"), scene.here / "back")
    assert sha256_of(source) == sha256_of(scene.there / "file") == sha256_of(scene.here / "back")


def test_an_edge_that_asks_for_signatures_takes_files_from_who_signs(bridge, tokens, tmp_path,
                                                                     home):
    there, keys = tmp_path / "there", tmp_path / "keys"
    there.mkdir()
    run("--token", "keygen", "alice")
    key = (home / ".radical/edge/client.key").read_text()
    keys.write_text(key)
    keys.chmod(0o600)
    source = make_random_file(tmp_path / "source", 20 * MIB)
    edge = Edge(bridge.url, "e1", plugins=["staging"], token=tokens[1]["edge"],
                options={"staging_roots": [str(there)]}, client_key=str(keys)).start()
    try:
        assert edge.online.wait(10)
        with BridgeClient(bridge.url) as client:
            wait_until(lambda: client.list_edges() == ["e1"])
            staging = client.get_edge_client("e1").get_plugin("staging")
            seen = []
            staging.put(source, f"{there}/file", progress=lambda *n: seen.append(n[0]))
            assert seen == sorted(seen)
            staging.get(f"{there}/file", tmp_path / "back")
            (tmp_path / "tree").mkdir()
            (tmp_path / "tree/f").write_text("f")
            staging.put(tmp_path / "tree", f"{there}/tree")
            staging.get(f"{there}/tree", tmp_path / "tree-back")
        assert sha256_of(source) == sha256_of(there / "file") == sha256_of(tmp_path / "back")
        assert (tmp_path / "tree-back/f").read_text() == "f"
    finally:
        assert edge.stop()


class Killed(BaseException):
    """What ends a client in the middle of a transfer."""


def test_a_new_client_goes_on_where_a_killed_one_was(scene):
    source = make_random_file(scene.here / "source", 16 * MIB)

    def die():
        raise Killed

    for go, paths in ((scene.client.put, (source, scene.path("file"))),
                      (scene.client.get, (scene.path("file"), scene.here / "back"))):
        with pytest.raises(Killed):
            go(*paths, progress=Cutter(die, [0.6]))
        assert len(scene.leftovers()) == 1        # what came is kept
        seen = []
        go(*paths, progress=lambda done, total: seen.append(done / total))
        assert seen[0] > 0.3
    assert sha256_of(source) == sha256_of(scene.here / "back") and not scene.leftovers()


def test_a_source_that_changes_is_fetched_as_it_is_at_the_end(scene):
    there = make_random_file(scene.there / "file", 24 * MIB)

    def change():
        there.write_bytes(b"new" * 1_000_000)
        scene.proxy.cut()

    done = scene.client.get(str(there), scene.here / "back", progress=Cutter(change, [0.3]))
    assert done["size"] == 3_000_000 and (scene.here / "back").read_bytes() == there.read_bytes()


def test_a_source_that_changes_while_it_is_sent_is_not_taken_for_a_file(scene):
    source = make_random_file(scene.here / "source", 8 * MIB)

    def change():
        with open(source, "r+b") as file:
            file.write(b"changed")

    with pytest.raises(Conflict, match="changed while it was sent"):
        scene.client.put(source, scene.path("file"), progress=Cutter(change, [0.5]))
    assert not (scene.there / "file").exists()
    scene.client.put(source, scene.path("file"))
    assert sha256_of(source) == sha256_of(scene.there / "file")


def test_an_upload_is_appended_only_where_it_ends(scene, raw):
    told = {"path": scene.path("file"), "upload": "upload-1", "size": 6}
    assert scene.client.ask("upload", told)["offset"] == 0
    target = query("upload", scene.path("file"), upload="upload-1")
    assert json.loads(raw().request("PUT", f"{target}&offset=0", b"abc")[2])["offset"] == 3
    for offset in (0, 2, 4):
        status, _, body = raw().request("PUT", f"{target}&offset={offset}", b"abc")
        assert status == 409 and b"3 bytes are here" in body
    assert json.loads(raw().request("GET", target)[2])["offset"] == 3
    raw().request("PUT", f"{target}&offset=3", b"def")
    assert not (scene.there / "file").exists()
    assert scene.client.list(str(scene.there))["entries"] == []              # not there yet
    commit = {**told, "sha256": hashlib.sha256(b"abcdef").hexdigest()}
    first = scene.client.ask("upload/commit", commit)
    assert scene.client.ask("upload/commit", commit) == first                # it may be repeated
    assert (scene.there / "file").read_bytes() == b"abcdef"
    assert raw().request("GET", target)[0] == 404
    assert raw().request("PUT", f"{target}&offset=0", b"abc")[0] == 404
    scene.client.ask("upload", {**told, "path": scene.path("other")})
    dropped = query("upload", scene.path("other"), upload="upload-1")
    assert raw().request("DELETE", dropped)[0] == 200
    assert raw().request("DELETE", dropped)[0] == 404 and not scene.leftovers()


def test_a_new_request_takes_an_upload_over_from_one_that_is_stuck(files):
    path, name, goes_on, results = str(files.root / "file"), "upload-1", threading.Event(), []
    files.uploads.begin(path, name, 10, overwrite=False)

    def pieces():
        yield b"a" * plugins.COPY_SIZE
        results.append("stuck")
        goes_on.wait(10)
        yield b"b" * plugins.COPY_SIZE

    def write():
        try:
            files.uploads.write(path, name, 0, pieces())
        except EdgeError as error:
            results.append(error.status)

    thread = threading.Thread(target=write)
    thread.start()
    wait_until(lambda: results)
    size = plugins.COPY_SIZE + 1
    assert files.uploads.begin(path, name, size, overwrite=False)["offset"] == size - 1
    assert files.uploads.write(path, name, size - 1, [b"c"])["offset"] == size
    goes_on.set()
    thread.join()
    assert results == ["stuck", 503]
    content = b"a" * (size - 1) + b"c"
    files.uploads.commit(path, name, sha256=hashlib.sha256(content).hexdigest(), overwrite=False)
    assert (files.root / "file").read_bytes() == content


def test_an_edge_killed_between_the_two_steps_of_a_commit_finds_it_done(files):
    path, name = str(files.root / "file"), "upload-1"
    files.uploads.begin(path, name, 3, overwrite=False)
    files.uploads.write(path, name, 0, [b"abc"])
    part, = files.root.glob(".radical-*")
    os.link(part, path)                           # and then it was killed
    digest = hashlib.sha256(b"abc").hexdigest()
    assert Files(Roots([str(files.root)])).uploads.commit(
        path, name, sha256=digest, overwrite=False)["size"] == 3
    assert os.listdir(files.root) == ["file"]


def test_partial_files_that_nobody_goes_on_with_are_deleted(files):
    old, new = (files.root / f".radical-edge-{digit * 32}.part" for digit in "ab")
    for path in (old, new):
        path.write_text("")
    os.utime(old, (1, time.time() - plugins.PARTIAL_S - 60))
    files.uploads.begin(str(files.root / "file"), "upload-1", 0, overwrite=False)
    assert not old.exists() and new.exists()


# ---------------------------------------------------------------------------
# Trees
# ---------------------------------------------------------------------------

def make_tree(top, count):
    """Make `count` small files in 50 directories, and what else a tree may have."""
    for number in range(count):
        folder = top / f"d{number % 50}" / "sub"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{number}").write_bytes(b"%d" % number * (number % 500))
    (top / "empty/dir").mkdir(parents=True)
    (top / "large").write_bytes(os.urandom(3 * plugins.SMALL_FILE))
    (top / "script").write_text("#!/bin/sh\n")
    (top / "script").chmod(0o755)
    Path(os.fsdecode(os.fsencode(top) + b"/not \xff utf-8\nat all")).write_text("odd")
    (top / "link").symlink_to("script")
    return count + 4                              # a link to a file counts as one


def describe_tree(top):
    return {str(path.relative_to(top)): (path.stat().st_mode, path.read_bytes())
            if path.is_file() else "dir" for path in top.rglob("*") if not path.is_symlink()}


def test_a_tree_of_many_small_files_goes_there_and_back(wire, scene):
    top = scene.here / "tree"
    count = make_tree(top, 2000 if LONG else 500)
    (top / "dangling").symlink_to("nowhere")
    os.mkfifo(top / "fifo")
    seen = []
    done = scene.client.put(top, scene.path("tree"), progress=lambda *n: seen.append(n))
    assert done["files"] == count and sorted(done["skipped"]) == ["dangling", "fifo"]
    assert seen[-1] == (done["size"], done["size"])
    back = scene.client.get(scene.path("tree"), scene.here / "back")
    assert back["files"] == count and back["skipped"] == []
    wanted = describe_tree(top)
    del wanted["fifo"]
    wanted["link"] = wanted["script"]
    assert describe_tree(scene.there / "tree") == wanted == describe_tree(scene.here / "back")
    assert (scene.here / "back/d1/sub/f1").stat().st_mtime == \
        pytest.approx((top / "d1/sub/f1").stat().st_mtime, abs=1e-5)
    assert scene.client.put(top, scene.path("tree"))["files"] == count       # the same again
    (top / "d1/sub/f1").write_text("changed")
    with pytest.raises(FileExists):
        scene.client.put(top, scene.path("tree"))
    scene.client.put(top, scene.path("tree"), overwrite=True)
    assert (scene.there / "tree/d1/sub/f1").read_text() == "changed"
    with pytest.raises(Conflict, match="not empty"):
        scene.client.delete(scene.path("tree"))
    assert scene.client.delete(scene.path("tree"), recursive=True)["deleted"] > count
    assert list(scene.there.iterdir()) == []


def test_a_tree_is_moved_over_a_link_that_is_cut(scene):
    top = scene.here / "tree"
    make_tree(top, 3000 if LONG else 1000)
    wanted = None
    for go, paths in ((scene.client.put, (top, scene.path("tree"))),
                      (scene.client.get, (scene.path("tree"), scene.here / "back"))):
        cutter = Cutter(scene.proxy.cut, [0.1, 0.5])
        go(*paths, progress=cutter)
        assert not cutter._points
        wanted = wanted or describe_tree(scene.there / "tree")
    assert describe_tree(scene.here / "back") == wanted
    assert not scene.leftovers()


def test_batches_at_the_same_time_make_the_same_directories(files):
    entries = b"".join(plugins.encode_entry({"path": "/".join("abcdefgh"[:depth]), "type": "dir"})
                       for depth in range(1, 9))
    start, results = threading.Barrier(8), []

    def write():
        start.wait()
        for number in range(30):
            results.append(files.write_batch(f"{files.root}/{number}", [entries], overwrite=False))

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 240 and (files.root / "29/a/b/c/d/e/f/g/h").is_dir()
    (files.root / "file").write_text("x")
    with pytest.raises(FileExists):
        files.make_dir(str(files.root / "file"))


def test_an_edge_that_answers_with_paths_outside_of_the_tree_writes_nothing(scene, tmp_path):
    class Hostile(PluginStaging):
        plugin_name = "hostile"
        names, closed = ["../evil"], []

        @get("tree")
        def get_tree(self, request):
            lines = [{"path": name, "type": "file", "size": 1} for name in self.names]
            return StreamingResponse([json.dumps(line).encode() + b"\n"
                                      for line in [*lines, {"end": True, "entries": 1,
                                                             "closed": self.closed}]])

        @radical_edge.post("files/read")
        def read_files(self, request):
            digest = hashlib.sha256(b"x").hexdigest()
            return StreamingResponse([plugins.encode_entry(
                {"path": "sub/../../evil", "type": "file", "sha256": digest}, b"x")])

    hostile = scene.edge.host.add(Hostile)
    wait_until(lambda: "hostile" in scene.bridge_client.get_edge_client("e1").list_plugins())
    client = StagingClient(scene.bridge_client.http, "/e1/hostile")
    client.patience = 0
    for names in (["../evil"], ["/evil"], ["ok"], ["a\0b"]):
        hostile.names = names
        with pytest.raises(EdgeError):
            client.get_tree(str(scene.there), scene.here / "back")
    hostile.names, hostile.closed = [], ["may not be listed"]
    assert client.get_tree(str(scene.there), scene.here / "back")["skipped"] == hostile.closed
    (scene.here / "back/out").symlink_to(scene.outside)
    hostile.names = ["out/evil"]
    with pytest.raises(EdgeError):
        client.get_tree(str(scene.there), scene.here / "back")
    assert not list(tmp_path.rglob("evil")) and len(list(scene.outside.iterdir())) == 1


# ---------------------------------------------------------------------------
# Paths that lead out
# ---------------------------------------------------------------------------

ESCAPES = {
    "..": lambda scene: scene.path("../outside/secret"),
    ".. in the middle": lambda scene: scene.path("dir/../../outside/secret"),
    ".. through a new directory": lambda scene: scene.path("none/../../outside/secret"),
    "absolute": lambda scene: str(scene.outside / "secret"),
    "a system file": lambda scene: "/etc/passwd",
    "a longer name than the root's": lambda scene: f"{scene.there}-2/secret",
    "home": lambda scene: "~/secret",
    "a link to a file": lambda scene: scene.path("file-link"),
    "a link to a directory": lambda scene: scene.path("dir-link/secret"),
    "a relative link": lambda scene: scene.path("relative-link/secret"),
    "a link to a link": lambda scene: scene.path("link-link/secret"),
    "a link to nothing": lambda scene: scene.path("dangling"),
    "a link to itself": lambda scene: scene.path("circle"),
    "a link to /proc": lambda scene: scene.path("proc-link/self/environ"),
}


@pytest.mark.parametrize("way", ESCAPES)
def test_each_way_out_of_the_roots_is_refused(scene, raw, way):
    (scene.there / "dir").mkdir()
    (scene.there / "file").write_text("file")
    Path(f"{scene.there}-2").mkdir()
    for name, target in (("file-link", scene.outside / "secret"), ("dir-link", scene.outside),
                         ("relative-link", "../outside"), ("link-link", "dir-link"),
                         ("dangling", scene.outside / "new"), ("circle", "circle"),
                         ("proc-link", "/proc")):
        (scene.there / name).symlink_to(target)
    path, client, source = ESCAPES[way](scene), scene.client, scene.write("source", b"x")
    inner = scene.path("file")
    attempts = [
        lambda: client.put(source, path, True), lambda: client.get(path, scene.here / "got"),
        lambda: client.list(os.path.dirname(path) if "link/" in path else path),
        lambda: client.stat(path), lambda: client.stat(path, digest=True),
        lambda: client.tail(path), lambda: client.get_tree(path, scene.here / "tree"),
        lambda: client.put_tree(scene.here, path, True), lambda: client.mkdir(path + "/x"),
        lambda: client.rename(path + "/x", scene.path("new")),
        lambda: client.rename(inner, path + "/x"), lambda: client.delete(path + "/x"),
        lambda: client.ask("upload", {"path": path, "upload": "upload-1", "size": 1}),
        lambda: client.ask("upload/commit", {"path": path, "upload": "upload-1"}),
        lambda: client.value(client.send("PUT", "file", content=b"x", path=path, overwrite=True)),
        lambda: client.ask(f"put/{client.sid}", {"filename": path, "content": "eA==",
                                                 "overwrite": True}),
        lambda: client.ask(f"get/{client.sid}", {"filename": path})]
    for number, attempt in enumerate(attempts):
        with pytest.raises(EdgeError) as caught:
            attempt()
        expected = {403} if way not in ("a link to itself", ".. through a new directory") else \
            {403, 404, 422}
        assert caught.value.status in expected, (number, caught.value)
    assert client.value(client.send("POST", "files/write", path=path, overwrite=True,
                                    content=b"")) == {"written": 0, "unchanged": 0}
    entry = plugins.encode_entry({"path": "x", "type": "file",
                                  "sha256": hashlib.sha256(b"x").hexdigest()}, b"x")
    assert client.send("POST", "files/write", path=path, overwrite=True,
                       content=entry).status_code in (403, 422)
    assert os.listdir(scene.outside) == ["secret"]
    assert (scene.outside / "secret").read_text() == "secret"
    assert (scene.there / "file").read_text() == "file" and not scene.leftovers()


def test_a_link_that_is_renamed_or_deleted_is_itself_meant(scene):
    (scene.there / "link").symlink_to(scene.outside)
    scene.client.rename(scene.path("link"), scene.path("moved"))
    assert os.readlink(scene.there / "moved") == str(scene.outside)
    assert scene.client.stat(scene.path("moved"), follow=False)["type"] == "link"
    (scene.there / "tree").mkdir()
    scene.client.rename(scene.path("moved"), scene.path("tree/link"))
    scene.client.delete(scene.path("tree"), recursive=True)
    assert os.listdir(scene.outside) == ["secret"] and os.listdir(scene.there) == []


def test_links_within_the_roots_are_followed(scene):
    (scene.there / "a/b").mkdir(parents=True)
    (scene.there / "a/b/file").write_text("text")
    (scene.there / "absolute").symlink_to(scene.there / "a")
    (scene.there / "a/up").symlink_to("../a/b/./../b")
    (scene.there / "to-file").symlink_to("absolute/up/file")
    assert scene.client.tail(scene.path("to-file"))["text"] == "text"
    source = scene.write("source", b"new")
    scene.client.put(source, scene.path("to-file"), True)        # where it leads, not the link
    assert (scene.there / "a/b/file").read_bytes() == b"new"
    assert (scene.there / "to-file").is_symlink()
    listed = {entry["name"]: entry["type"]
              for entry in scene.client.list(str(scene.there))["entries"]}
    assert listed == {"a": "dir", "absolute": "dir", "to-file": "file"}
    assert scene.client.stat(scene.path("a/up/../b/file"))["size"] == 3      # up from where it led


def test_a_directory_that_is_swapped_for_a_link_meanwhile_lets_nothing_out(files):
    """Two names change places all the time: a directory, and a link to one outside."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    needs("system", exchange, "renameat2, to exchange two names at once")
    swapped, spare = files.root / "swapped", files.root / "spare"
    swapped.mkdir()
    (swapped / "secret").write_text("inner")
    spare.symlink_to(files.outside)
    done, found = threading.Event(), set()

    def swap():
        while not done.is_set():                  # AT_FDCWD, RENAME_EXCHANGE
            assert exchange(-100, bytes(swapped), -100, bytes(spare), 2) == 0

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        end, number = time.monotonic() + 3, 0
        while time.monotonic() < end:
            number += 1
            for attempt in (
                    lambda: found.add(files.read(f"{swapped}/secret")[1]),
                    lambda: put_whole(files, swapped / f"n{number}", b"x"),
                    lambda: found.update(entry.get("path")
                                         for entry in files.list_tree(str(swapped))),
                    lambda: files.make_dir(f"{swapped}/d{number}/e"),
                    lambda: files.delete(f"{swapped}/d{number}", recursive=True),
                    lambda: files.rename(f"{swapped}/n{number}", f"{swapped}/m", overwrite=True)):
                with contextlib.suppress(EdgeError):
                    attempt()
    finally:
        done.set()
        thread.join()
    assert b"inner" in found and b"secret" not in found
    assert os.listdir(files.outside) == ["secret"]
    assert (files.outside / "secret").read_text() == "secret" and number > 50


def test_the_files_of_the_edge_itself_are_closed(home):
    private = home / ".radical/edge"
    (private / "state").mkdir(parents=True)
    (private / "token").write_text("secret")
    files = Files(Roots(["~", tempfile.gettempdir()], [str(private)]))
    (home / "link").symlink_to(private)
    for path in ("~/.radical/edge/token", str(private / "token"), ".radical/edge/token",
                 "link/token", "~/.radical/./edge/state/../token"):
        for attempt in (files.read, files.describe, files.open, files.read_tail, files.delete,
                        lambda path: put_whole(files, path, b"x", overwrite=True)):
            with pytest.raises(Forbidden):
                attempt(path)
    for path in ("~/.radical/edge", "~/.radical", "~"):
        for attempt in (lambda path: files.rename(path, "~/moved", overwrite=False),
                        lambda path: files.rename(path, "~/moved", overwrite=True),
                        lambda path: files.delete(path, recursive=True)):
            with pytest.raises(Forbidden):
                attempt(path)
    with pytest.raises(Forbidden):
        files.list_dir("~/.radical/edge")
    assert [entry.get("path") for entry in files.list_tree("~")] == [".radical", "link", None]
    assert (private / "token").read_text() == "secret"


def test_a_hard_link_at_the_place_of_a_partial_file_is_not_written_to(files):
    """Another user could make one in /tmp, of a file of ours."""
    victim = files.outside / "secret"
    with files.roots.find(str(files.root / "file")) as place:
        os.link(victim, files.root / plugins.partial_name(place, "upload-1"))
    with pytest.raises(Forbidden, match="not this edge's own"):
        files.uploads.begin(str(files.root / "file"), "upload-1", 10, overwrite=False)
    (files.root / "hard").hardlink_to(victim) if sys.version_info >= (3, 10) else \
        os.link(victim, files.root / "hard")
    put_whole(files, files.root / "hard", b"new", overwrite=True)            # a new file
    assert victim.read_text() == "secret"


def test_a_link_that_another_user_left_where_everybody_may_write_is_not_followed(files):
    needs("root", os.geteuid() == 0, "root, to make a link of another user")
    shared = files.root / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (files.root / "file").write_text("mine")
    (shared / "link").symlink_to("../file")
    assert files.read(str(shared / "link"))[1] == b"mine"
    os.chown(shared / "link", 12345, 12345, follow_symlinks=False)
    with pytest.raises(Forbidden, match="another user"):
        files.read(str(shared / "link"))


def test_roots_that_lie_in_each_other_and_behind_links_are_one(tmp_path):
    (tmp_path / "real/inner").mkdir(parents=True)
    (tmp_path / "alias").symlink_to("real")
    files = Files(Roots([str(tmp_path / "alias"), str(tmp_path / "real/inner")]))
    assert files.roots.paths == [str(tmp_path / "real")]
    for path in ("alias/inner/file", "real/inner/file"):
        put_whole(files, tmp_path / path, b"x", overwrite=True)
        assert files.describe(str(tmp_path / path))["path"] == str(tmp_path / "real/inner/file")
    assert files.describe("inner/file")["size"] == 1              # relative: to the first root
    shutil.rmtree(tmp_path / "real/inner")
    (tmp_path / "real/inner").symlink_to("/etc")  # a root's place, swapped
    with pytest.raises(Forbidden):
        files.read(str(tmp_path / "real/inner/passwd"))


# ---------------------------------------------------------------------------
# What is no plain file, odd names, full disks
# ---------------------------------------------------------------------------

def test_special_files_are_refused_without_waiting_for_them(scene):
    os.mkfifo(scene.there / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        here = os.getcwd()
        os.chdir(scene.there)                     # the names of sockets are short
        try:
            sock.bind("socket")
        finally:
            os.chdir(here)
    source = scene.write("source", b"x")
    for name in ("fifo", "socket"):
        path = scene.path(name)
        for attempt in (lambda: scene.client.get(path, scene.here / "got"),
                        lambda: scene.client.tail(path),
                        lambda: scene.client.stat(path, digest=True),
                        lambda: scene.client.put(source, path, True)):
            with pytest.raises(Unprocessable, match="not a regular file"):
                attempt()
        assert scene.client.stat(path)["type"] == "unknown"
    with pytest.raises(Unprocessable, match="not a regular file"):
        scene.client.put(scene.there / "fifo", scene.path("x"))
    if os.geteuid() == 0:
        os.mknod(scene.there / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        with pytest.raises(Unprocessable):
            scene.client.get(scene.path("null"), scene.here / "got")
    scene.client.rename(scene.path("fifo"), scene.path("other"))
    assert scene.client.delete(scene.path("other"))["deleted"] == 1


@pytest.mark.parametrize("name", [
    b"new\nline", b"\xff\xfe", b"%41 ?&=#", b"n" * 255, "ñ€😀".encode(), b" ", b"-rf", b"~",
    b"/".join([b"d"] * 300)], ids=repr)
def test_odd_names_are_names(wire, scene, name):
    text = os.fsdecode(name)
    source = scene.write("source", b"content")
    done = scene.client.put(source, scene.path(text))
    assert os.path.exists(os.fsencode(scene.there) + b"/" + name) and done["path"].endswith(text)
    assert scene.client.tail(scene.path(text))["text"] == "content"
    folder, _, last = scene.path(text).rpartition("/")
    assert scene.client.list(folder)["entries"][0]["name"] == last
    scene.client.rename(scene.path(text), scene.path("x"))
    scene.client.rename(scene.path("x"), scene.path(text))
    scene.client.get(scene.path(text), scene.here / "back")
    assert scene.client.delete(scene.path(text))["deleted"] == 1


@pytest.mark.parametrize("path, status", [
    ("", 422), ("a\0b", 422), ("n" * 256, 422), ("d/" * 2100 + "f", 422), (None, 422), (7, 422),
    ("\ud800", 422), (["x"], 422)])
def test_what_is_no_path_is_refused_with_the_name_of_the_field(scene, raw, path, status):
    whole = scene.path(path) if isinstance(path, str) and path else path
    for route, field in (("mkdir", "path"), ("delete", "path"), ("upload", "path")):
        reply = raw().request("POST", f"/e1/staging/{route}",
                              json.dumps({"path": whole, "upload": "upload-1"}).encode())
        assert reply[0] in (status, 404) and (reply[0] == 404 or b"path" in reply[2]), reply
    assert raw().request("GET", "/e1/staging/stat")[0] == 422
    assert raw().request("POST", "/e1/staging/rename", b'{"src": "a"}')[0] == 422
    assert raw().request("POST", "/e1/staging/rename", b'[]')[0] == 422
    assert raw().request("POST", "/e1/staging/mkdir", b'{')[0] == 400
    for values in ({"mode": "9"}, {"mtime": "soon"}, {"overwrite": "maybe"}, {"mtime": "nan"}):
        assert raw().request("PUT", query("file", scene.path("f"), **values), b"x")[0] == 422
    for upload in ("short", "a/b/c/d/e/f", ""):
        assert raw().request("GET", query("upload", scene.path("f"), upload=upload))[0] == 422
    assert scene.client.list(str(scene.there))["entries"] == []


def test_a_tree_that_is_too_deep_is_refused(files):
    path = files.root
    for _ in range(plugins.MAX_DEPTH + 1):
        path = path / "d"
        os.mkdir(path)
    with pytest.raises(Unprocessable, match="levels"):
        list(files.list_tree(str(files.root)))
    with pytest.raises(Unprocessable, match="levels"):
        files.delete(str(files.root / "d"), recursive=True)
    assert path.exists()


@pytest.fixture
def small_disk(files):
    """A directory under the root with room for a megabyte."""
    path = files.root / "small"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path],
                             stderr=subprocess.DEVNULL).returncode == 0
    needs("root", mounted, "root, to mount a small file system")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_disk_is_507_and_leaves_nothing(files, small_disk):
    path = small_disk / "file"
    with pytest.raises(InsufficientStorage, match="no room"):
        files.uploads.begin(str(path), "upload-1", 2 * MIB, overwrite=False)
    with pytest.raises(InsufficientStorage):
        put_whole(files, path, bytes(2 * MIB))
    files.uploads.begin(str(path), "upload-1", MIB // 2, overwrite=False)
    with pytest.raises(InsufficientStorage):
        files.uploads.write(str(path), "upload-1", 0, [bytes(2 * MIB)])
    assert os.listdir(small_disk) == []
    put_whole(files, path, bytes(MIB // 2))
    with pytest.raises(InsufficientStorage):
        put_whole(files, path, bytes(MIB), overwrite=True)
    assert path.read_bytes() == bytes(MIB // 2) and os.listdir(small_disk) == ["file"]
    with pytest.raises(Conflict, match="another file system"):
        files.rename(str(path), str(files.root / "moved"), overwrite=False)
    with pytest.raises(Conflict, match="another file system"):
        files.rename(str(path), str(files.root / "moved"), overwrite=True)


def test_a_file_system_without_hard_links_is_no_race_either(files, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)       # the system's, not ours
    put_whole(files, files.root / "file", b"one")
    with pytest.raises(FileExists):
        put_whole(files, files.root / "file", b"two")
    files.rename(str(files.root / "file"), str(files.root / "new"), overwrite=False)
    assert (files.root / "new").read_bytes() == b"one" and os.listdir(files.root) == ["new"]


def test_what_may_not_be_done_is_403():
    """As a user who is not root, whom nothing is forbidden."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    for name in ("closed", "open"):
        (folder / name).mkdir()
    (folder / "open").chmod(0o755)
    (folder / "closed").chmod(0)
    (folder / "open/unreadable").write_text("x")
    (folder / "open/unreadable").chmod(0)
    code = f"""
import os, threading
from plugins import Files, Roots
from radical_edge import Forbidden
if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)
files = Files(Roots([{str(folder)!r}]))
print(list(files.list_tree("."))[-1]["closed"])
for attempt in (lambda: files.read("open/unreadable"), lambda: files.list_dir("closed"),
                lambda: files.read("closed/x"), lambda: files.make_dir("open/new"),
                lambda: files.uploads.put("open/x", [b"x"], overwrite=False, sha256=None),
                lambda: files.delete("open/unreadable")):
    try: attempt()
    except Forbidden: print("403")
"""
    if os.geteuid() != 0:
        (folder / "open").chmod(0o555)
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              env={"PATH": os.environ["PATH"], "HOME": str(folder),
                                   "PYTHONPATH": os.pathsep.join(sys.path)})
        assert done.stdout.split() == ["['closed']"] + ["403"] * 6, done.stderr
    finally:
        for name in ("closed", "open"):
            (folder / name).chmod(0o755)
        shutil.rmtree(folder)


def test_too_many_uploads_at_a_time_are_told_to_come_back(files):
    with contextlib.ExitStack() as stack:
        for _ in range(plugins.MAX_UPLOADS):
            stack.enter_context(files.uploads.slot())
        with pytest.raises(EdgeError) as caught:
            put_whole(files, files.root / "file", b"x")
        assert caught.value.status == 503 and caught.value.headers["Retry-After"]
    put_whole(files, files.root / "file", b"x")


# ---------------------------------------------------------------------------
# Names, ends of files, the command line
# ---------------------------------------------------------------------------

def test_directories_are_made_listed_renamed_and_deleted(scene):
    client = scene.client
    assert client.mkdir(scene.path("a/b")) == {"path": scene.path("a/b"), "created": True}
    assert client.mkdir(scene.path("a/b"))["created"] is False
    with pytest.raises(FileExists):
        client.mkdir(scene.path("a/b"), parents=False)
    with pytest.raises(FileMissing):
        client.mkdir(scene.path("x/y"), parents=False)
    source = scene.write("source", b"abc", 0o640)
    client.put(source, scene.path("a/file"))
    told = client.stat(scene.path("a/file"), digest=True)
    assert (told["type"], told["size"], told["mode"]) == ("file", 3, "0640")
    assert told["sha256"] == hashlib.sha256(b"abc").hexdigest()
    assert client.stat(str(scene.there))["type"] == "dir"
    with pytest.raises(FileMissing):
        client.stat(scene.path("none"))
    client.rename(scene.path("a"), scene.path("new/place"))
    assert (scene.there / "new/place/file").read_bytes() == b"abc"
    client.mkdir(scene.path("other"))
    with pytest.raises(FileExists):
        client.rename(scene.path("new/place"), scene.path("other"))
    with pytest.raises(FileExists):
        client.rename(scene.path("new/place/file"), scene.path("other"))
    client.rename(scene.path("new/place"), scene.path("other"), overwrite=True)    # it was empty
    with pytest.raises(Unprocessable):
        client.rename(scene.path("other"), scene.path("other/inside"))
    assert sorted(os.listdir(scene.there / "other")) == ["b", "file"]
    with pytest.raises(FileMissing):
        client.rename(scene.path("none"), scene.path("more"))
    with pytest.raises(EdgeError):
        client.list(scene.path("other/file"))
    assert client.delete(scene.path("other"), recursive=True)["deleted"] == 3
    with pytest.raises(FileMissing):
        client.delete(scene.path("other"))
    with pytest.raises(Forbidden):
        client.delete(str(scene.there), recursive=True)


def test_the_end_of_a_file_is_shown_and_followed(scene):
    path = scene.there / "log"
    path.write_text("".join(f"line {number}\n" for number in range(1000)))
    tail = scene.client.tail(str(path), lines=2)
    assert tail["text"] == "line 998\nline 999\n" and tail["next"] == tail["size"]
    assert scene.client.tail(str(path), bytes=5)["text"] == " 999\n"
    assert scene.client.tail(str(path), lines=5000)["text"] == path.read_text()
    with open(path, "ab") as file:
        file.write("€".encode()[:2])              # half a character
    told = scene.client.tail(str(path), offset=tail["next"])
    assert (told["text"], told["next"]) == ("", tail["next"])
    followed, ended = scene.client.follow(str(path), lines=2), threading.Event()
    assert next(followed).startswith("line 999\n")

    def append():
        with open(path, "ab") as file:
            file.write("€".encode()[2:] + b" more\n")
        ended.set()

    thread = threading.Thread(target=append)
    thread.start()
    assert next(followed) == "€ more\n"
    thread.join()
    path.write_text("anew\n")                     # shorter: from the start again
    assert next(followed) == "anew\n"
    assert scene.client.tail(str(path), bytes=2)["text"] == "w\n"
    path.write_bytes("€€".encode())
    assert scene.client.tail(str(path), bytes=4)["text"] == "€"


def test_the_command_line_puts_and_gets_files_and_directories(start, tmp_path, home):
    both = start("--bridge", "--edge", "--name", "e1", "-p", "staging", "--port", "0",
                 expect="edge: e1")
    assert both.lines
    wait_until(lambda: "e1" in run("--list"))
    (tmp_path / "file").write_text("text")
    digest = hashlib.sha256(b"text").hexdigest()
    assert run("--put", str(tmp_path / "file"), "e1:~/sub/file") == \
        f"e1:{home}/sub/file: 4 bytes, sha256 {digest}\n"
    assert "exists already" in run("--put", str(tmp_path / "file"), "e1:sub/file", status=1)
    run("--put", str(tmp_path / "file"), "e1:sub/file", "--overwrite")
    run("--put", str(tmp_path / "file"), "e1:")
    assert (home / "file").read_text() == "text"
    run("--put", str(tmp_path / "file"), "e1:sub/", "--overwrite")
    assert "1 files, 4 bytes" in run("--get", "e1:sub", str(tmp_path / "back"))
    assert (tmp_path / "back/file").read_text() == "text"
    assert "exists already" in run("--get", "e1:sub/file", str(tmp_path / "back"), status=1)
    (tmp_path / "tree/inner").mkdir(parents=True)
    (tmp_path / "tree/inner/f").write_text("f")
    (tmp_path / "tree/none").symlink_to("nowhere")
    assert "skipped" in run("--put", str(tmp_path / "tree"), "e1:tree", status=1)
    assert (home / "tree/inner/f").read_text() == "f"
    for arguments in (["--put", str(tmp_path / "none"), "e1:x"], ["--put", "/etc/passwd", "x"],
                      ["--get", "e1:none", str(tmp_path / "x")], ["--get", "e2:x", "y"],
                      ["--put", "/etc/passwd", "e1:/etc/x"]):
        assert len(run(*arguments, status=1).splitlines()) == 1


def test_the_progress_bar_is_for_terminals(monkeypatch, capsys):
    with radical_edge._ProgressBar("some/file") as silent:
        silent(1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with radical_edge._ProgressBar("some/file") as shown:
        shown(0, 3_000_000)
        shown(1_500_000, 3_000_000)               # too soon after the first to be shown
        shown(3_000_000, 3_000_000)
    text = capsys.readouterr().err
    assert text.startswith("\rfile") and " 100%    3.0 MB" in text and text.endswith("\n")
    assert " 50%" not in text
