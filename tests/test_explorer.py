"""The Explorer in real headless Chromium, against real bridge and edge processes.

Needs what tests/setup-explorer.sh installs; without it these tests are skipped, unless
RADICAL_EDGE_REQUIRE names "explorer". RADICAL_EDGE_SHOTS: where screenshots go, and stay.
A message on the browser's console, such as one of a violated policy, fails the test that caused it.
"""
from __future__ import annotations

import http.server
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.request
from pathlib import Path

import pytest

import radical_edge
from browser import Browser, Driver, find_programs
from test_edge import bridge_url, home, needs, start, tokens, wait_until     # noqa: F401 (fixtures)

HERE = Path(__file__).resolve().parent
PLUGINS = str(HERE / "explorer" / "example_plugins.py")
MARKUP = "<img src=x onerror=\"window.pwned=1\"><script>window.pwned=1</script>"
CHROMIUM, CHROMEDRIVER = find_programs()
AXE = Path(os.environ.get("RADICAL_EDGE_AXE") or Path.home() / ".cache/radical-edge/axe",
           "node_modules/axe-core/axe.min.js")       # read now: HOME is the test's own later
SHOTS = os.environ.get("RADICAL_EDGE_SHOTS")


needs("explorer", CHROMIUM and CHROMEDRIVER and AXE.is_file(),
      f"chromium, chromedriver and {AXE}: run tests/setup-explorer.sh")


# ---------------------------------------------------------------------------
# A bridge, edges and a window
# ---------------------------------------------------------------------------

class Stage:
    """A bridge, edges and tokens. The admin's token stands in the home of the test."""

    def __init__(self, start, home, *arguments):
        self._start, self.home = start, home
        self.bridge = None
        self.edges = {}
        self.start_bridge(0, *arguments)
        self.token = (home / ".radical/edge/token").read_text().strip()

    def start_bridge(self, port=0, *arguments):
        self.bridge = self._start("--bridge", "--port", str(port), "--grace", "4", *arguments,
                                  expect="bridge: http")
        self.url = bridge_url(self.bridge)
        self.port = int(self.url.rpartition(":")[2])

    def start_edge(self, name="site", *arguments, env=None):
        self.edges[name] = self._start("--edge", "--name", name, "--url", self.url, *arguments,
                                       expect=f"registered as {name}", env=env)

    def add_token(self, name, scope):
        store = radical_edge.TokenStore(self.home / ".radical/edge/tokens.json")
        token = store.add(name, scope)
        wait_until(lambda: self.status("/auth", token) == 200, what="the new token")
        return token

    def call(self, method, path, body=None, token=None):
        """Return the JSON value of an answer."""
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.url + path, data, method=method, headers={
            "Authorization": f"Bearer {token or self.token}", "Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def status(self, path, token=None):
        try:
            self.call("GET", path, token=token)
        except urllib.error.HTTPError as error:
            return error.code
        return 200


@pytest.fixture
def stage(start, home):
    """A bridge of the test's own."""
    return Stage(start, home)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """chromedriver, for all tests of this file."""
    running = Driver(CHROMEDRIVER, tmp_path_factory.mktemp("driver"))
    yield running
    running.close()


class Window(Browser):
    """A window whose console must stay empty, but for what a test expects."""

    def __init__(self, driver, stage, folder):
        super().__init__(driver, CHROMIUM, folder / "profile", folder)
        self.stage, self.expected, self.downloads = stage, [], folder
        self.resize(1280, 860)
        self.media("light")

    def sign_in(self, token=None):
        self.go(self.stage.url + "/")
        self.find("#token")
        self.type("#token", token or self.stage.token)
        self.click("button", "Sign in")
        self.find("#who .chip")

    def open(self, place):
        """Go to a place within the page."""
        self.run("location.hash = args[0]", place)

    def check_console(self):
        strange = [line for line in self.console()
                   if not any(re.search(pattern, line) for pattern in self.expected)]
        assert not strange, "\n".join(strange)


@pytest.fixture
def window(driver, stage, tmp_path):
    """A window, and after the test a look at its console."""
    made = Window(driver, stage, tmp_path)
    yield made
    try:
        if made.run("return typeof window.pwned") != "undefined":
            pytest.fail("markup of an edge was run")
        made.check_console()
    finally:
        made.close()


# what leaves a window of 360 pixels, but for what can be scrolled there
OUTSIDE = """
    const scrolls = (node) => node && (/auto|scroll/.test(getComputedStyle(node).overflowX)
        && !node.matches('.vlist') || scrolls(node.parentElement));
    return [document.documentElement, ...document.querySelectorAll(
            'a, button, input, select, textarea, summary, h1, h2, pre, .state, .card, svg')]
        .filter((node) => node.checkVisibility() && !node.matches('.skip') && !scrolls(node))
        .map((node) => [node, node.getBoundingClientRect()])
        .filter(([node, box]) => box.width && (box.right > 361 || box.left < -1
            || node.matches('button:not(.cut), .state') && node.textContent.length < 24
                && node.scrollWidth > node.clientWidth + 1
            || node === document.documentElement && node.scrollWidth > 360))
        .map(([node, box]) => `${node.outerHTML.slice(0, 100)} to ${Math.round(box.right)}`)"""


def look(window, name):
    """Check the page that is shown for accessibility, light and dark, and save what it looks like.

    Fails on what axe-core calls serious or critical, and on a page that does not fit a telephone.
    """
    folder = Path(SHOTS or window.downloads)
    folder.mkdir(parents=True, exist_ok=True)
    for scheme in ("light", "dark"):
        window.media(scheme)
        window.wait(lambda: window.run("return document.documentElement.dataset.theme") == scheme,
                    f"the {scheme} theme")
        window.run("await Promise.all(document.getAnimations().map("
                   "(one) => one.effect.getTiming().iterations < 9 ? one.finished : 0))")
        check_access(window, f"{name}, {scheme}")
        window.screenshot(folder / f"{name}-{scheme}.png")
    window.media("light")
    window.resize(360, 740)
    outside = window.run(OUTSIDE)
    window.screenshot(folder / f"{name}-narrow.png")
    window.resize(1280, 860)
    assert not outside, f"{name}, in a window of 360 pixels: {outside}"


def check_access(window, what):
    window.cdp("Runtime.evaluate", expression=AXE.read_text())
    found = window.run("""
        const ran = await axe.run(document, {iframes: false, resultTypes: ["violations"]});
        return ran.violations.filter((one) => ["serious", "critical"].includes(one.impact))
            .map((one) => `${one.id}: ${one.nodes.map((node) => node.html.slice(0, 200)
                + " " + (node.any[0]?.message || "")).join(" | ")}`)""")
    assert not found, f"{what}: " + "\n".join(found)


# ---------------------------------------------------------------------------
# Signing in, and what a token may do
# ---------------------------------------------------------------------------

def test_a_wrong_token_is_refused_and_a_right_one_is_forgotten_by_the_page(stage, window):
    window.expected = ["/auth - Failed to load resource: .* 401"]
    window.go(stage.url + "/")
    window.find("#token")
    look(window, "sign-in")
    window.type("#token", "not-a-token")
    window.click("button", "Sign in")
    window.wait_text("This token is not known here")
    window.sign_in()
    assert window.run("return document.cookie") == ""
    stored = window.run("return JSON.stringify([{...localStorage}, {...sessionStorage}, "
                        "document.documentElement.outerHTML, location.href])")
    assert stage.token not in stored
    window.go(stage.url + "/")
    window.find("#who .chip", "admin")             # the cookie is enough
    window.click("button", "Sign out")
    window.find("#token")
    window.go(stage.url + "/")
    window.find("#token")
    assert "No edge is connected" not in window.text()


def test_a_page_without_edges_says_what_to_type(stage, window):
    window.sign_in()
    window.wait_text("No edge is connected.")
    shown = window.text()
    assert f"python3 radical_edge.py --edge --url {stage.url} --name NAME" in shown
    assert "python3 radical_edge.py --token add NAME --scope edge" in shown
    look(window, "no-edges")
    window.open("#/events")
    window.wait_text("python3 radical_edge.py --events")


def test_a_token_that_may_only_look_is_shown_no_more(stage, window):
    stage.start_edge("site", "-p", "psij,sysinfo")
    window.sign_in(stage.add_token("guest", "read"))
    window.find("#who .chip", "read")
    window.click("a.main", "site")
    window.find("a", "System Info")
    assert "Disconnect" not in window.text()
    window.click("a", "System Info")
    window.wait_text("This token may look only.")
    window.open("#/e/site/psij")
    window.click("summary", "New job")
    window.wait_text("This token may look only.")
    assert window.run("return [...document.querySelectorAll('form button[type=submit]')]"
                      ".every((button) => button.disabled)")


def test_a_client_cannot_disconnect_and_an_admin_can(stage, window):
    stage.start_edge("site", "-p", "sysinfo")
    window.sign_in(stage.add_token("carol", "client"))
    window.open("#/e/site")
    window.find("a", "System Info")
    assert "Disconnect" not in window.text()
    window.click("button", "Sign out")
    window.sign_in()
    window.open("#/e/site")
    window.click("button", "Disconnect")
    window.click("button", "Really?")
    assert stage.edges["site"].process.wait(20) == 0
    window.find(".state", "gone")


def test_a_token_for_edges_and_one_that_is_revoked_are_told_so(stage, window):
    window.go(stage.url + "/")
    window.type("#token", stage.add_token("box", "edge"))
    window.click("button", "Sign in")
    window.wait_text("A token of scope edge is for edges")
    window.expected = ["Failed to load resource: .* 401"]
    window.sign_in(stage.add_token("brief", "client"))
    radical_edge.TokenStore(stage.home / ".radical/edge/tokens.json").revoke("brief")
    window.wait_text("The sign-in has ended")


# ---------------------------------------------------------------------------
# Jobs
# ---------------------------------------------------------------------------

def submit(window, executable, arguments):
    """Submit a job by the form, and wait until it is shown."""
    window.run("document.querySelector('details.card').open = true")
    window.type("input[name=exec]", executable)
    window.type("input[name=args]", arguments)
    window.click("button[type=submit]", "Submit job")
    window.find("section[aria-label=Job]", executable)


def output(window, name="Standard output"):
    return window.run("return document.querySelector(`pre[aria-label='${args[0]}']`)?.textContent"
                      " || ''", name)


def test_a_job_is_submitted_by_form_seen_running_followed_and_cancelled(stage, window):
    stage.start_edge("site", "-p", "psij")
    window.sign_in()
    window.click("a.chip", "psij")
    window.wait_text("No jobs yet.")
    look(window, "psij-empty")
    submit(window, "sh", "-c 'echo $$; n=0; while :; do n=$((n+1)); echo \"line $n\"; "
                         "echo \"odd $n\" >&2; sleep 0.2; done'")
    detail = "section[aria-label=Job]"
    window.find(f"{detail} .state.run", "ACTIVE")
    window.wait(lambda: "line 2" in output(window), "the output")
    first = output(window)
    window.wait(lambda: "line 12" in output(window), "more of the output")
    grown = output(window)
    assert grown.startswith(first) and len(re.findall("^line 3$", grown, re.M)) == 1
    assert "odd 2" in output(window, "Standard error")
    look(window, "psij-job")
    pid = int(grown.split()[0])
    os.kill(pid, 0)
    window.click(f"{detail} button", "Cancel")
    window.click(f"{detail} button", "Really?")
    window.find(f"{detail} .state", "CANCELED")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not window.run("return [...document.querySelectorAll(args[0])]"
                          ".some((button) => button.textContent === 'Cancel')", f"{detail} button")
    steps = window.run("return [...document.querySelectorAll(args[0])]"
                       ".map((node) => node.textContent)", f"{detail} .row .row .state")
    assert steps[-2:] == ["ACTIVE", "CANCELED"]    # states over time


def test_a_job_is_submitted_again_and_what_the_command_line_submits_is_seen(stage, window):
    stage.start_edge("site", "-p", "psij")
    window.sign_in()
    window.open("#/e/site/psij")
    submit(window, "/bin/echo", "'two words' \"it's\"")
    window.wait(lambda: output(window) == "two words it's\n", "the output")
    window.click("section[aria-label=Job] button", "Submit again")
    window.wait(lambda: window.run("return document.querySelectorAll('.vrow').length") == 2,
                "a second job")
    sid = stage.call("POST", "/site/psij/register_session")["sid"]
    spec = {"job_spec": {"executable": "/bin/false", "name": "from elsewhere"}}
    stage.call("POST", f"/site/psij/submit/{sid}", spec)
    window.find(".vrow", "from elsewhere")
    window.find(".vrow .state.bad", "FAILED")
    window.click(".tabs button", "Failed 1")
    window.wait(lambda: window.run("return document.querySelectorAll('.vrow').length") == 1,
                "the failed one alone")
    submit(window, "/no/such/program", "")
    window.find("section[aria-label=Job] .state", "FAILED")


def test_a_mistake_in_the_form_is_named_and_nothing_is_lost(stage, window):
    window.expected = [r"submit/session\.\w+ - Failed to load resource: .* 422"]
    stage.start_edge("site", "-p", "psij")
    window.sign_in()
    window.open("#/e/site/psij")
    window.find("input[name=exec]")
    window.type("input[name=exec]", "sleep")
    window.type("input[name=args]", "'5")
    window.click("button[type=submit]")
    window.find("form .error", "a ' is not closed")
    window.type("input[name=args]", "5")
    window.type("input[name=duration]", "-3")
    window.click("button[type=submit]")
    window.find("form .error", "duration")
    assert window.run("return document.querySelector('input[name=exec]').value") == "sleep"


def test_a_task_is_submitted_followed_and_cancelled(stage, window):
    stage.start_edge("site", "-p", "rhapsody")
    window.sign_in()
    window.open("#/e/site/rhapsody")
    window.wait_text("No tasks yet.")
    window.choose("select[name=backends]", "local")
    window.type("input[name=exec]", "sh")
    window.type("input[name=args]", "-c 'n=0; while :; do n=$((n+1)); echo \"line $n\"; "
                                    "sleep 0.2; done'")
    window.click("button[type=submit]", "Submit task")
    detail = "section[aria-label=Job]"
    window.find(f"{detail} .state.run", "RUNNING", timeout=60)
    window.wait(lambda: "line 3" in output(window), "the output")
    first = output(window)
    window.wait(lambda: "line 10" in output(window), "more of the output")
    assert output(window).startswith(first)
    assert len(re.findall("^line 2$", output(window), re.M)) == 1
    look(window, "rhapsody")
    window.click(f"{detail} button", "Cancel")
    window.click(f"{detail} button", "Really?")
    window.find(f"{detail} .state", "CANCELED")
    window.run("document.querySelector('details.card').open = true")
    window.type("input[name=args]", "-c 'echo well; exit 3'")
    window.click("button[type=submit]", "Submit task")
    window.find(f"{detail} .state.bad", "FAILED")
    window.wait(lambda: output(window) == "well\n", "the output")
    window.find(f"{detail} dl", "Exit code3")


# ---------------------------------------------------------------------------
# What is live
# ---------------------------------------------------------------------------

def test_metrics_move_and_their_history_stays(stage, window):
    stage.start_edge("site", "-p", "sysinfo")
    window.sign_in()
    window.open("#/e/site/sysinfo")
    window.find(".chart", "CPU")
    points = ("return Object.fromEntries([...document.querySelectorAll('.chart')].map((chart) => ["
              "chart.querySelector('h2').textContent, chart.querySelector('path:not(.area)')"
              ".getAttribute('d').split('L').length]))")
    first = window.wait(lambda: window.run(points).get("CPU", 0) >= 2 and window.run(points),
                        "points")
    assert {"CPU", "Memory", "Load"} <= set(first)
    more = window.wait(lambda: window.run(points)["CPU"] >= first["CPU"] + 2 and
                       window.run(points), "more points")
    assert more["Memory"] > first["Memory"]
    assert re.search(r"\d", window.run("return document.querySelector('.chart .now').textContent"))
    window.find("[role=img][aria-label*='% used']")             # a disk
    look(window, "sysinfo")
    window.open("#/events")
    window.find("h1", "Events")
    window.open("#/e/site/sysinfo")
    window.find(".chart", "CPU")
    assert window.run(points)["CPU"] >= more["CPU"]


def test_an_edge_that_is_killed_is_seen_to_go_and_to_come_back(stage, window):
    stage.start_edge("site", "-p", "sysinfo")
    stage.start_edge("other", "-p", "sysinfo")
    window.sign_in()
    window.wait_text("2 connected")
    window.wait(lambda: re.search(r"\d ms", window.text()), "a latency")
    window.find(".vrow", "login")                  # its role
    window.find(".vrow", "session")
    look(window, "edges")
    stage.edges["site"].end(signal.SIGKILL)
    window.find(".vrow .state.wait", "link lost")
    window.wait_text("1 connected, 1 away")
    window.find(".vrow .state.off", "gone")
    look(window, "edge-gone")
    stage.start_edge("site", "-p", "sysinfo")
    window.wait_text("2 connected")
    window.open("#/events")
    for change in ("site lost its link", "site went", "site came"):
        window.find(".vrow .main", change)


def test_a_bridge_that_is_restarted_under_an_open_page_is_caught_up_with(stage, window):
    window.expected = ["ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING",
                       "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE", "Failed to load resource"]
    stage.start_edge("site", "-p", "psij")
    window.sign_in()
    window.open("#/e/site/psij")
    window.find("input[name=exec]")
    flag = stage.home / "go-on"
    submit(window, "sh", f"-c 'echo before; while [ ! -e {flag} ]; do sleep 0.1; done; echo after'")
    window.find("section[aria-label=Job] .state", "ACTIVE")
    stage.bridge.end(signal.SIGKILL)
    window.wait_text("The connection to the bridge is lost")
    window.find("#link", "Reconnecting")
    flag.touch()                                   # the job ends while nobody can be told
    stage.start_bridge(stage.port)
    window.find("#link", "Live")
    window.find("section[aria-label=Job] .state.good", "COMPLETED")
    window.wait(lambda: output(window) == "before\nafter\n", "the rest of the output")
    assert not window.run("return document.getElementById('banner').offsetParent")
    window.open("#/events")
    window.find(".vrow .mono", "COMPLETED")        # the event itself: nothing was missed
    states = window.run("return [...document.querySelectorAll('.vrow .mono')].map((node) => "
                        "/\"state\":\"(\\w+)\"/.exec(node.textContent)?.[1]).filter(Boolean)")
    assert sorted(states) == ["ACTIVE", "COMPLETED", "QUEUED"]


def test_a_page_that_was_left_keeps_no_connection(stage, window):
    stage.start_edge("site", "-p", "sysinfo")
    window.sign_in()
    for _ in range(8):                             # more than a browser has connections to a host
        window.go("about:blank")
        window.go(stage.url + "/")
        window.find("a.main", "site")
    window.find("#link", "Live")


def test_events_are_filtered_paused_and_shown_whole(stage, window):
    stage.start_edge("site", "-p", "garden,friendly", "--plugin-file", PLUGINS)
    window.sign_in()
    window.open("#/events")
    window.wait_text("No events.")
    stage.call("POST", "/site/friendly/tell", {"word": "hello"})
    stage.call("POST", "/site/garden/flood/3")
    window.find(".vrow", "friendly · told")
    window.wait(lambda: window.run("return document.querySelectorAll('.vrow').length") == 5,
                "five events")
    look(window, "events")
    window.choose("select[aria-label=Plugin]", "friendly")
    window.wait(lambda: window.run("return document.querySelectorAll('.vrow').length") == 1,
                "one event")
    window.click(".vrow .main", "told")
    window.find("pre", '"word": "hello"')
    window.click("button", "Pause")
    stage.call("POST", "/site/friendly/tell", {"word": "later"})
    window.choose("select[aria-label=Plugin]", "Plugin: all")
    assert "later" not in window.text()
    window.click("button", "Go on")
    window.find(".vrow", "later")
    window.type("input[type=search]", "the-last")
    window.wait(lambda: window.run("return document.querySelectorAll('.vrow').length") == 1,
                "the one that is searched")


# ---------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------

def test_files_are_browsed_uploaded_downloaded_and_deleted(stage, window, tmp_path):
    stage.start_edge("site", "-p", "staging")
    folder = stage.home / "results"
    folder.mkdir()
    for number in range(300):
        (folder / f"part-{number:03}.txt").write_text("x" * number)
    (folder / "<img src=x onerror=window.pwned=1>.txt").write_text("harmless")
    window.sign_in()
    window.open("#/e/site/staging")
    window.click(".main", "results")
    window.find(".vrow", "<img src=x")
    look(window, "staging")
    assert window.run("return document.querySelectorAll('.vrow').length") < 60
    own = tmp_path / "own data é.bin"
    own.write_bytes(os.urandom(3_000_000))
    window.send_file("input[type=file]", own)
    window.find(".toast", "is uploaded")
    assert (folder / own.name).read_bytes() == own.read_bytes()
    window.type("input[type=search]", "own data")
    window.click(".vrow button", "Download")
    saved = window.downloads / own.name
    own.rename(tmp_path / "original")
    wait_until(lambda: saved.exists() and saved.stat().st_size == 3_000_000, 30, "the download")
    assert saved.read_bytes() == (tmp_path / "original").read_bytes()
    own.write_bytes(b"newer")                      # a name that is taken is asked about
    window.send_file("input[type=file]", own)
    window.find("dialog", "is here already")
    window.click("dialog button", "Leave it")
    window.send_file("input[type=file]", own)
    window.click("dialog button", "Replace it")
    wait_until(lambda: (folder / own.name).read_bytes() == b"newer", 20, "the newer file")
    window.click(".vrow button", "Delete")
    window.click(".vrow button", "Really?")
    wait_until(lambda: not (folder / own.name).exists(), 20, "the end of the file")
    window.type("input[type=search]", " ")
    window.type("input[aria-label='Name of a new folder']", "new one")
    window.click("button", "Make")
    window.click(".vrow .main", "new one")
    window.wait_text("This folder is empty.")
    assert (folder / "new one").is_dir()
    window.click("nav[aria-label=Folder] button", "results")
    window.find(".vrow", "part-000.txt")


def test_an_upload_shows_its_progress_and_can_be_cancelled(stage, window, tmp_path):
    stage.start_edge("site", "-p", "staging")
    window.sign_in()
    window.open("#/e/site/staging")
    window.find("nav[aria-label=Folder]")
    window.cdp("Network.enable")
    window.cdp("Network.emulateNetworkConditions", offline=False, latency=0,
               downloadThroughput=-1, uploadThroughput=2_000_000)
    large = tmp_path / "large.bin"
    large.write_bytes(os.urandom(40_000_000))
    window.send_file("input[type=file]", large)
    moving = "section[aria-label='Uploading large.bin']"
    window.find(moving, "of 40 MB")
    done = "return document.querySelector(args[0]).querySelector('i').style.width"
    first = window.wait(lambda: float(window.run(done, moving).rstrip("%")) > 1 and
                        window.run(done, moving), "some progress")
    window.wait(lambda: float(window.run(done, moving).rstrip("%")) >
                float(first.rstrip("%")), "more progress")
    window.click(f"{moving} button", "Cancel")
    window.find(".toast", "cancelled")
    window.wait(lambda: not window.run("return document.querySelector(args[0])", moving), "its end")
    assert not (stage.home / "large.bin").exists()


def test_a_path_that_is_not_allowed_is_refused_with_the_edge_s_words(stage, window):
    window.expected = ["Failed to load resource: .* 40[34]"]
    stage.start_edge("site", "-p", "staging")
    (stage.home / "away").symlink_to("/etc")
    window.sign_in()
    window.open("#/e/site/staging")
    window.click(".main", "away")
    window.find(".error", "/etc")
    window.find(".vrow", "away")                   # one stays where one was


# ---------------------------------------------------------------------------
# Plugins of others
# ---------------------------------------------------------------------------

BED = {"plant": "thyme", "rows": 4, "notes": "keep dry", "soil": 7, "tool": "fork",
       "shade": False, "origin": "page", "labels": {"bed.colour": "green"}}


def dig(window):
    """Fill in the garden's form with BED, and send it."""
    window.type("input[name=plant]", "thyme")
    window.type("input[name=rows]", "4")
    window.type("textarea[name=notes]", "keep dry")
    window.choose("select[name=soil]", "sand, pH 7")
    window.choose("select[name=tool]", "fork")     # an option of an endpoint
    window.click("input[name=shade]")
    window.click("button", "Labels: add")
    window.type("input[aria-label='Labels: name']", "bed.colour")
    window.type("input[aria-label='Labels: value']", "green")
    window.click("button[type=submit]", "Dig")


def test_a_plugin_with_a_ui_config_alone_has_a_page(stage, window):
    stage.start_edge("site", "-p", "garden", "--plugin-file", PLUGINS)
    window.sign_in()
    window.open("#/e/site")
    window.find("section.card", "Digs beds, and waters what grows there.")
    look(window, "edge")
    window.click("a", "Garden")
    window.find("h1", "Garden")
    window.wait_text("No bed yet.")
    columns = window.run("return [...document.querySelectorAll('.fields.grid3 > div')].map("
                         "(column) => [...column.querySelectorAll('[name]')].map((n) => n.name))")
    assert columns == [["plant", "rows"], ["notes", "soil"], ["tool", "shade"]]
    dig(window)
    window.click(".vrow .main", "bed-1")
    sid = stage.call("GET", "/site/garden/list_sessions")["sessions"][0]
    assert stage.call("GET", f"/site/garden/bed/{sid}/bed-1") == {
        "bed_id": "bed-1", "state": "RUNNING", **BED}
    window.find("section[aria-label=Job] .tile", "keep dry")    # what `detail` answers
    look(window, "described")
    window.click("section[aria-label=Job] button", "Fill in")
    window.click("section[aria-label=Job] button", "Really?")
    window.find(".vrow .state", "CANCELED")        # told by its notification


def test_a_form_s_mistakes_are_named(stage, window):
    window.expected = [r"dig/session\.\w+ - Failed to load resource: .* 422"]
    stage.start_edge("site", "-p", "garden", "--plugin-file", PLUGINS)
    window.sign_in()
    window.open("#/e/site/garden")
    window.wait_text("No bed yet.")
    window.click("button[type=submit]", "Dig")     # a required field is empty: nothing is sent
    window.type("input[name=plant]", "thyme")
    window.type("input[name=rows]", "500")
    window.click("button[type=submit]", "Dig")
    window.find("form .error", "rows: at most 100 fit")
    assert stage.call("GET", "/site/garden/list_sessions")["sessions"]
    assert "No bed yet." in window.text()


def test_monitors_show_what_their_routes_answer(stage, window):
    stage.start_edge("site", "-p", "garden", "--plugin-file", PLUGINS)
    window.sign_in()
    window.open("#/e/site/garden")
    window.find(".tile", "Humidity percent")
    reading = ("return [...document.querySelectorAll('.tile')].find((tile) => "
               "tile.textContent.startsWith('Reading')).querySelector('b').textContent")
    before = int(window.run(reading))
    window.wait(lambda: int(window.run(reading)) > before, "the next reading")
    window.find("pre", '"dear": "reader"')
    rows = "return document.querySelectorAll('tbody tr').length"
    assert window.run(rows) == 100
    window.click("th button", "Left")
    window.click("th button", "Left")
    window.find("th[aria-sort=descending]", "Left")
    window.click("button", "Show more")
    window.wait(lambda: window.run(rows) == 250, "all rows")
    window.type("input[aria-label=Filter]", "plant 07")
    window.wait(lambda: window.run(rows) == 1, "the one that is searched")
    before = int(window.run(reading))
    window.click("button", "Refresh")
    window.wait(lambda: int(window.run(reading)) > before, "what is asked for again")


def test_a_module_draws_its_page_in_a_frame(stage, window):
    stage.start_edge("site", "-p", "friendly", "--plugin-file", PLUGINS)
    window.sign_in()
    window.open("#/e/site/friendly")
    window.find("iframe")
    frame = Frame(window)
    frame.wait_text("ready")
    shown = frame.text()
    for line in ("I am friendly on site", "200 my session", "taken 1 as application/json"):
        assert line in shown
    stage.call("POST", "/site/friendly/tell", {"word": "over there"})
    frame.wait_text("heard told: over there")
    frame.click("Say it")
    window.find(".toast", "friendly on site: from the frame")
    look(window, "module")
    assert stage.call("GET", "/site/friendly/reports") == [{"from": "friendly"}]


class Frame:
    """What is in the one frame of a window."""

    def __init__(self, window):
        self.window = window

    def _run(self, script):
        element = self.window.find("iframe")
        self.window._post("/frame", {"id": {
            "element-6066-11e4-a52e-4f735466cecf": element}})
        try:
            return self.window._post("/execute/sync", {"script": script, "args": []})
        finally:
            self.window._post("/frame", {"id": None})

    def text(self):
        return self._run("return document.body.innerText")

    def click(self, words):
        self._run("[...document.querySelectorAll('button')]"
                  f".find((node) => node.textContent === {json.dumps(words)}).click()")

    def wait_text(self, words):
        self.window.wait(lambda: words in self.text(), f"{words!r} in the frame")


class Target:
    """A server of the attacker's: nothing must ever arrive at it."""

    def __init__(self):
        hits = self.hits = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hits.append(f"{self.command} {self.path}")
                self.send_response(200)
                self.send_header("Access-Control-Allow-Origin", "*")
                self.end_headers()

            do_POST = do_OPTIONS = do_GET

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def target():
    running = Target()
    yield running
    running.close()


def test_a_hostile_module_gets_nowhere(stage, window, target):
    # what the browser has to say of each attempt: the frame's policy, not the page's
    window.expected = ["plugins/frame", "blob:", re.escape(target.url), "sandbox", "Blocked",
                       "frame-src", "Unsafe attempt", "webrtc", "404"]
    stage.start_edge("site", "-p", "hostile,markup", "--plugin-file", PLUGINS,
                     env={"TEST_TARGET": target.url})
    window.sign_in()
    window.open("#/e/site/hostile")
    reports = wait_until(lambda: [report for report in stage.call("GET", "/site/hostile/reports")
                                  if "found" in report], 90, "the module's report")
    found = reports[0]["found"]
    for name, outcome in found.items():
        if name.startswith("path") and "did: 404" in outcome:
            continue                               # a route of its own plugin that is not there
        assert outcome.startswith("refused: ") or name == "flash", (name, outcome)
    assert len(found) > 40 and not reports[0]["heard"]
    window.find(".toast", "<img src=x onerror=window.pwned=1>")
    window.wait(lambda: window.run("return document.querySelector('iframe') !== null"), "the page")
    assert window.run("return location.href").startswith(stage.url)
    time.sleep(1)                                  # what was to arrive has had its time
    assert target.hits == []
    assert window.run("return document.querySelectorAll('main img, main script').length") == 0
    window.find("#who .chip", "admin")


def test_a_module_hears_of_its_own_plugin_alone(stage, window, target):
    window.expected = [".*"]                       # see the test above
    stage.start_edge("site", "-p", "friendly,garden", "--plugin-file", PLUGINS)
    stage.start_edge("other", "-p", "friendly", "--plugin-file", PLUGINS)
    window.sign_in()
    window.open("#/e/site/friendly")
    frame = Frame(window)
    frame.wait_text("ready")
    stage.call("POST", "/other/friendly/tell", {"word": "of another edge"})
    stage.call("POST", "/site/garden/flood/2")
    stage.call("POST", "/site/friendly/tell", {"word": "its own"})
    frame.wait_text("its own")
    assert "another" not in frame.text() and "bed" not in frame.text()


def test_markup_of_an_edge_is_text_everywhere(stage, window):
    stage.start_edge("site", "-p", "markup,psij,sysinfo", "--plugin-file", PLUGINS)
    window.sign_in()
    window.find(".vrow", "site")
    harmless = ("return document.querySelectorAll('main img, main script, main b i, #toasts img')"
                ".length === 0 && typeof window.pwned === 'undefined'")
    for place, words in (("#/e/site", MARKUP), ("#/e/site/markup", MARKUP)):
        window.open(place)
        window.wait_text(words)
        assert window.run(harmless), place
    window.click("button[type=submit]")            # its answer, and the notifications, are markup
    window.find(".vrow .main", "<img")
    window.click(".vrow .main", "<img")
    window.find("section[aria-label=Job]", "<img")
    assert window.run(harmless)
    look(window, "markup")
    window.open("#/e/site/psij")
    submit(window, "sh", "-c 'echo \"<img src=x onerror=window.pwned=1>\"; echo \"<script>"
                         "window.pwned=1</script>\" >&2; printf \"\\033[31m\\007\"'")
    window.wait(lambda: "<img src=x" in output(window), "the output")
    window.find(".vrow .main", "<img")
    assert window.run(harmless)
    window.open("#/events")
    window.find(".vrow .main", "<img")
    window.click(".vrow .main", "<img")
    window.find("pre[aria-label=Data]", "<img")
    assert window.run(harmless)


# ---------------------------------------------------------------------------
# Keys, and very much of everything
# ---------------------------------------------------------------------------

def test_keys_move_open_and_search(stage, window):
    for name in ("alpha", "beta"):
        stage.start_edge(name, "-p", "garden", "--plugin-file", PLUGINS)
    window.sign_in()
    window.find(".vrow", "beta")
    active = "return document.activeElement.textContent || document.activeElement.type"
    window.go(stage.url + "/")                     # the focus is where a page begins
    window.find(".vrow", "beta")
    window.press("Tab")
    assert window.run(active) == "Skip to the content"
    window.press("Enter")
    assert window.run("return document.activeElement.id") == "main"
    window.press("/")
    assert window.run(active) == "search"
    window.press("b", "e", "t")
    window.wait(lambda: window.run("return document.querySelectorAll('.vrow').length") == 1, "one")
    window.press("Escape", "Tab")
    window.run("document.querySelector('.vrow .main').focus()")
    window.press("Enter")
    window.find("h1", "beta")
    assert window.run("return document.activeElement.tagName") == "H1"
    window.press("?")
    window.find("dialog", "Keyboard")
    check_access(window, "the help")
    window.press("Escape")
    window.wait(lambda: window.run("return !document.querySelector('dialog')"), "the end of it")
    window.press("g", "e")
    window.find(".vrow", "alpha")
    window.run("document.querySelector('.vrow .main').focus()")
    window.press("ArrowDown")
    assert window.run(active) == "beta"
    window.press("Home")
    assert window.run(active) == "alpha"
    window.press("t")
    assert window.run("return document.documentElement.dataset.theme") == "dark"
    window.press("g", "v")
    window.find("h1", "Events")


def test_ten_thousand_jobs_are_listed_and_only_what_is_seen_is_drawn(stage, window):
    stage.start_edge("site", "-p", "garden", "--plugin-file", PLUGINS)
    window.sign_in()
    window.open("#/e/site/garden")
    window.wait_text("No bed yet.")
    stage.call("POST", "/site/garden/flood/10000")
    window.find(".tabs button", "All 10001", timeout=60)
    assert window.run("return document.querySelectorAll('.vrow').length") < 60
    counts = window.run("return [...document.querySelectorAll('.tabs button')]"
                        ".map((node) => Number(node.textContent.split(' ').pop()))")
    assert counts[0] == sum(counts[1:]) == 10001
    window.type("main input[type=search]", "bed-9999")
    window.find(".vrow .main", "bed-9999")
    window.type("main input[type=search]", "bed-")
    window.run("document.querySelector('.vrow .main').focus()")
    window.press("End")
    window.wait(lambda: window.run("return document.activeElement.textContent") == "bed-0",
                "the oldest")
    assert window.run("return document.querySelectorAll('.vrow').length") < 60
    assert window.run("return document.activeElement.closest('.vrow').ariaSetSize") == "10000"
    window.open("#/events")
    window.find("h1", "Events")
    window.wait(lambda: 0 < window.run("return document.querySelectorAll('.vrow').length") < 60,
                "some events")


def test_five_hundred_edges_are_listed(stage, window):
    links = FakeEdges(stage, 500)
    try:
        window.sign_in()
        window.wait_text("500 connected")
        assert window.run("return document.querySelectorAll('.vrow').length") < 60
        window.type("main input[type=search]", "edge-0499")
        window.wait(lambda: window.run("return document.querySelectorAll('.vrow').length") == 1,
                    "one")
        window.find(".vrow .main", "edge-0499")
        links.drop(100)
        window.wait_text("400 connected, 100 away")
    finally:
        links.close()


class FakeEdges:
    """Registered links that serve nothing: what 500 edges are to a page."""

    def __init__(self, stage, count):
        url = radical_edge.parse_bridge_url(stage.url)
        self._sockets = []
        for number in range(count):
            sock, _ = radical_edge.open_websocket(url, stage.token, None)
            message = {"type": "register", "edge_name": f"edge-{number:04}",
                       "endpoint": {"hostname": f"node{number}"}, "plugins": {
                           name: {"type": name, "version": "1", "enabled": True, "ui_config": {}}
                           for name in ("psij", "sysinfo", "staging")}}
            sock.sendall(radical_edge.encode_frame(1, json.dumps(message).encode(),
                                                   mask=b"\0\0\0\0"))
            self._sockets.append(sock)

    def drop(self, count):
        for sock in self._sockets[:count]:
            sock.close()
        del self._sockets[:count]

    def close(self):
        self.drop(len(self._sockets))


# ---------------------------------------------------------------------------
# A workflow
# ---------------------------------------------------------------------------

def test_a_workflow_is_started_seen_in_its_phases_and_stopped(stage, window):
    stage.start_edge("ucsb", "-p", "rhapsody,staging,sysinfo")
    stage.start_edge("fabric", "-p", "xgfabric")
    window.sign_in()
    window.open("#/e/fabric/xgfabric")
    window.find("select[aria-label=Workflow]", "workflow: test")
    choose = ("for (const name of ['Workflow', 'Resources']) {"
              " document.querySelector(`select[aria-label=${name}]`).value = 'test'; }")
    window.run(choose)
    window.find(".state", "idle")
    window.click("button", "Start")
    window.find(".state.run", "running")
    window.find(".steps li.now")
    window.find("pre[aria-label=Log]", "looking for clusters")
    window.find(".steps li.now", "Run the simulations", timeout=60)
    look(window, "xgfabric")
    window.find(".state.good", "completed", timeout=120)
    window.find("dl", "4 of 4")
    assert window.run("return document.querySelectorAll('.steps li.done').length") == 10
    window.run(choose)
    window.click("button", "Start")
    window.find(".steps li.now", "Run the simulations", timeout=60)
    window.click("button", "Stop")
    window.click("button", "Really?")
    window.find(".state", "cancelled", timeout=60)
