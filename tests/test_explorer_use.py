"""The Explorer as it is used: behind nginx, by keys alone, by one who may only look, with figures
that must be right. In real Chromium, as test_explorer.py, which says what it needs."""
from __future__ import annotations

import os
import re
import signal
import urllib.request

import pytest

from nginx import pick_port, run_nginx
from test_edge import NVIDIA_SMI, ROCM_SMI, home, make_program, start, wait_until    # noqa: F401
from test_explorer import (HERE, PLUGINS, Frame, Stage, Window, check_access,              # noqa: F401
                           driver, look, output, stage, submit, window)
from test_queue_info import replay

OLDER = str(HERE / "explorer" / "older_psij.py")


def rows(window):
    """Return how many rows of lists are drawn."""
    return window.run("return document.querySelectorAll('.vrow').length")


# ---------------------------------------------------------------------------
# Where it is
# ---------------------------------------------------------------------------

def test_all_of_the_page_works_under_a_path_behind_nginx(driver, start, home, tmp_path):
    port = pick_port()
    stage = Stage(start, home, "--allow-host", f"127.0.0.1:{port}")
    with run_nginx(tmp_path / "nginx", port, prefix=stage.port):
        stage.url = f"http://127.0.0.1:{port}/prefix"
        window = Window(driver, stage, tmp_path)
        try:
            use_under_a_path(stage, window, tmp_path)
            window.check_console()
        finally:
            window.close()
        asked = (tmp_path / "nginx/access.log").read_text()
        assert set(re.findall(r'"\w+ (/[\w.]*)', asked)) == {"/prefix"}


def test_the_pages_of_two_bridges_under_paths_of_one_host_are_signed_in_apart(
        driver, start, home, tmp_path, monkeypatch):
    port, stages = pick_port(), []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("HOME", str(tmp_path / name))
        stages.append(Stage(start, tmp_path / name, "--allow-host", f"127.0.0.1:{port}"))
    with run_nginx(tmp_path / "nginx", port, a=stages[0].port, b=stages[1].port):
        for stage, name in zip(stages, "ab"):
            stage.url = f"http://127.0.0.1:{port}/{name}"
        window = Window(driver, stages[0], tmp_path)
        try:
            for window.stage in stages:
                window.sign_in()
            for stage in reversed(stages):         # the cookie is enough, also for events
                window.go(stage.url + "/")
                window.find("#who .chip", "admin")
                stage.start_edge("site", "-p", "sysinfo", env={"HOME": str(stage.home)})
                window.find("a.main", "site")
            window.click("button", "Sign out")
            window.find("#token")
            window.go(stages[1].url + "/")
            window.find("#who .chip", "admin")
            window.check_console()
        finally:
            window.close()


def use_under_a_path(stage, window, tmp_path):
    window.sign_in()
    window.wait_text(f"--edge --url {stage.url} --name NAME")
    stage.start_edge("site", "-p", "psij,staging,friendly", "--plugin-file", PLUGINS)
    window.click("a.chip", "psij")                 # it was told by an event
    submit(window, "sh", "-c 'echo well; sleep 1'")
    window.find("section[aria-label=Job] .state.good", "COMPLETED")
    window.wait(lambda: output(window) == "well\n", "the output")
    window.open("#/e/site/staging")
    own = tmp_path / "own.txt"
    own.write_text("of mine")
    window.send_file("input[type=file]", own)
    window.find(".toast", "is uploaded")
    own.unlink()
    window.click(".vrow button.main", "own.txt")
    wait_until(lambda: own.exists() and own.read_text() == "of mine", 30, "the download")
    window.open("#/e/site/friendly")
    Frame(window).wait_text("ready")
    window.click("button", "Sign out")
    window.go(stage.url + "/")
    window.find("#token")


def test_a_tab_that_is_hidden_gives_its_stream_back_and_then_misses_nothing(stage, window):
    stage.start_edge("site", "-p", "friendly", "--plugin-file", PLUGINS)
    window.sign_in()
    window.open("#/events")
    stage.call("POST", "/site/friendly/tell", {"word": "before"})
    window.find(".vrow", "before")
    wait_until(lambda: subscribers(stage) == 1, what="the stream")
    window.run("const later = window.setTimeout; window.setTimeout = (task, ms, ...rest) =>"
               " later(task, ms === 20000 ? 100 : ms, ...rest)")      # it would rest after 20 s
    come_back = window.open_tab()
    wait_until(lambda: subscribers(stage) == 0, 30, "the end of the stream")
    stage.call("POST", "/site/friendly/tell", {"word": "meanwhile"})
    stage.start_edge("other", "-p", "friendly", "--plugin-file", PLUGINS)
    come_back()
    window.find(".vrow", "meanwhile")
    window.find("#link", "Live")
    assert subscribers(stage) == 1 and rows(window) == 3
    window.open("#/")
    window.wait_text("2 connected")


def test_a_network_or_a_bridge_that_is_silent_is_noticed_and_caught_up_with(stage, window):
    window.expected = ["ERR_INTERNET_DISCONNECTED", "ERR_TIMED_OUT", "Failed to load resource"]
    stage.start_edge("site", "-p", "friendly", "--plugin-file", PLUGINS)
    window.sign_in()
    window.open("#/events")
    window.find("#link", "Live")
    window.cdp("Network.enable")
    network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    window.cdp("Network.emulateNetworkConditions", offline=True, **network)
    window.wait_text("The connection to the bridge is lost", timeout=5)
    stage.call("POST", "/site/friendly/tell", {"word": "meanwhile"})
    window.cdp("Network.emulateNetworkConditions", offline=False, **network)
    window.find(".vrow", "meanwhile")
    window.find("#link", "Live")
    os.kill(stage.bridge.process.pid, signal.SIGSTOP)          # its sockets stay open
    try:
        window.wait_text("The connection to the bridge is lost", timeout=60)
    finally:
        os.kill(stage.bridge.process.pid, signal.SIGCONT)
    window.find("#link", "Live", timeout=60)
    stage.call("POST", "/site/friendly/tell", {"word": "afterwards"})
    window.find(".vrow", "afterwards")


def subscribers(stage):
    """Return how many event streams the bridge has."""
    request = urllib.request.Request(stage.url + "/metrics", headers={
        "Authorization": f"Bearer {stage.token}"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return int(re.search(r"(?m)^radical_edge_subscribers (\d+)", reply.read().decode())[1])


# ---------------------------------------------------------------------------
# Who may only look, and who has only keys
# ---------------------------------------------------------------------------

def test_a_token_that_may_only_look_browses_and_changes_nothing(stage, window):
    stage.start_edge("site", "-p", "staging,xgfabric,garden", "--plugin-file", PLUGINS)
    (stage.home / "reports").mkdir()
    (stage.home / "reports/one.txt").write_text("not to be read")
    window.sign_in(stage.add_token("guest", "read"))
    window.open("#/e/site/staging")
    window.click(".vrow .main", "reports")
    window.find(".vrow [aria-disabled=true]", "one.txt")
    shown = window.run("return [...document.querySelectorAll('main button, main input')]"
                       ".map((node) => node.ariaLabel || node.textContent).join()")
    assert not re.search("Download|Upload|Delete|new folder|Make", shown)
    (stage.home / "two.txt").write_text("not to be sent")
    window.drop(".vlist", stage.home / "two.txt")  # nothing comes of it, and the page stays
    window.find(".vrow", "one.txt")
    window.open("#/e/site/xgfabric")
    window.wait_text("This token may look only.")
    assert window.run("return document.querySelector('main button.primary').disabled")
    window.open("#/e/site/garden")
    window.find(".tile", "Humidity percent")       # what needs no session is seen
    assert window.run("return document.querySelector('form button[type=submit]').disabled")
    window.expected = [r"(mkdir|file\?path=~.*) - Failed to load resource: .* 403"]     # the bridge
    assert window.run("return (await fetch('site/staging/mkdir', {method: 'POST', body:"
                      " '{\"path\": \"~/mine\"}'})).status") == 403
    assert window.run(
        "return (await fetch('site/staging/file?path=~/reports/one.txt')).status") == 403
    assert not (stage.home / "mine").exists() and not (stage.home / "reports/two.txt").exists()


class Keys:
    """Somebody at a window who has no mouse."""

    def __init__(self, window):
        self.window = window

    def focused(self):
        """Return what is said of what has the focus."""
        return self.window.run(
            "const node = document.activeElement; return node === document.body ? 'nothing' :"
            " [node.ariaLabel, node.labels?.[0]?.textContent, node.textContent, node.id]"
            ".filter(Boolean).join(' ')")

    def tab_to(self, words, most=60):
        for _ in range(most):
            self.window.press("Tab")
            if words in self.focused():
                return
        raise AssertionError(f"{words!r} is not reached by Tab; there is:\n{self.window.text()}")

    def press(self, *keys):
        self.window.press(*keys)

    def wait_focus(self, words):
        self.window.wait(lambda: words in self.focused(), f"the focus on {words!r}")


def test_a_job_is_submitted_and_cancelled_by_keys_alone(stage, window):
    stage.start_edge("site", "-p", "psij")
    keys = Keys(window)
    window.go(stage.url + "/")
    keys.wait_focus("Token")
    keys.press(*stage.token, "Enter")
    window.find(".vrow", "site")
    keys.tab_to("site")
    keys.press("Enter")
    keys.wait_focus("site")
    keys.tab_to("PsiJ Jobs")
    keys.press("Enter")
    keys.wait_focus("PsiJ Jobs")
    window.find("input[name=exec]")
    keys.tab_to("Executable")
    keys.press(*"sleep", "Tab", *"600")
    keys.tab_to("Submit job")
    keys.press("Enter")
    keys.wait_focus("sleep 600")                   # the job that was opened
    window.find("section[aria-label=Job] .state.run", "ACTIVE")
    keys.tab_to("Cancel")
    keys.press("Enter", "Enter")
    window.find("section[aria-label=Job] .state", "CANCELED")
    keys.wait_focus("sleep 600")                   # its buttons are others now
    keys.press("Escape")
    window.wait(lambda: not window.run("return document.querySelector('section[aria-label=Job]')"),
                "the end of the detail")
    assert "sleep 600" in keys.focused()           # its row
    keys.press("Enter")
    window.find("section[aria-label=Job]", "Submit again")
    keys.tab_to("Close")
    keys.press("Enter")
    keys.wait_focus("sleep 600")
    assert window.run("return document.activeElement.matches('.vrow .main')")


def test_files_are_gone_through_by_keys_alone(stage, window):
    stage.start_edge("site", "-p", "staging")
    for name in ("deep/er", "other"):
        (stage.home / "data" / name).mkdir(parents=True)
    for name in "abc":
        (stage.home / "data" / f"{name}.txt").write_text(name)
    window.sign_in()
    window.open("#/e/site/staging")
    window.find(".vrow", "data")
    keys = Keys(window)
    keys.tab_to("Folder data")
    keys.press("Enter")
    keys.wait_focus("Folder deep")
    keys.press("End")
    keys.wait_focus("File c.txt")
    keys.press("ArrowUp")
    keys.wait_focus("File b.txt")
    keys.tab_to("Delete")
    keys.press("Enter", "Enter")
    keys.wait_focus("File c.txt")                  # what is in its place
    assert sorted(path.name for path in (stage.home / "data").glob("*.txt")) == ["a.txt", "c.txt"]
    keys.press("Home", "Enter")
    keys.wait_focus("Folder er")
    keys.press("Enter")
    window.wait_text("This folder is empty.")
    assert keys.focused() != "nothing"


# ---------------------------------------------------------------------------
# Files that are dropped
# ---------------------------------------------------------------------------

def test_files_are_uploaded_by_dropping_them(stage, window, tmp_path):
    stage.start_edge("site", "-p", "staging")
    window.sign_in()
    window.open("#/e/site/staging")
    window.wait_text("Drop files here")
    one, two, folder = tmp_path / "one.bin", tmp_path / "two é.txt", tmp_path / "folder"
    one.write_bytes(os.urandom(2_000_000))
    two.write_text("two")
    folder.mkdir()
    window.drag(".drop", one)
    window.find(".over")                           # it shows where they will go
    window.drop(".drop", one, two)
    window.find(".vrow", "one.bin")
    window.find(".vrow", "two é.txt")
    assert (stage.home / one.name).read_bytes() == one.read_bytes()
    assert (stage.home / two.name).read_text() == "two"
    assert not window.run("return document.querySelector('.over')")
    two.write_text("newer")
    window.drop(".vlist", two, folder)
    window.find(".toast", "A folder cannot be uploaded: folder")
    window.click("dialog button", "Replace it")
    wait_until(lambda: (stage.home / two.name).read_text() == "newer", 20, "the newer file")
    assert not (stage.home / "folder").exists()
    assert window.run("return location.hash") == "#/e/site/staging"


def test_a_download_shows_its_progress_and_can_be_cancelled(stage, window):
    stage.start_edge("site", "-p", "staging")
    (stage.home / "large.bin").write_bytes(os.urandom(40_000_000))
    window.sign_in()
    window.open("#/e/site/staging")
    window.find(".vrow", "large.bin")
    window.cdp("Network.enable")
    window.cdp("Network.emulateNetworkConditions", offline=False, latency=0,
               downloadThroughput=2_000_000, uploadThroughput=-1)
    window.click(".vrow button.main", "large.bin")
    moving = "section[aria-label='Downloading large.bin']"
    window.find(moving, "of 40 MB")
    done = "return parseFloat(document.querySelector(args[0]).querySelector('i').style.width)"
    first = window.wait(lambda: window.run(done, moving), "some progress")
    window.wait(lambda: window.run(done, moving) > first, "more progress")
    window.click(f"{moving} button", "Cancel")
    window.find(".toast", "cancelled")
    window.wait(lambda: not window.run("return document.querySelector(args[0])", moving), "its end")
    assert not (window.downloads / "large.bin").exists()


# ---------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------

def test_gpus_are_charted_and_what_is_not_known_is_not_drawn(stage, window, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    with_third = NVIDIA_SMI.replace('3d4c"', '3d4c"; echo "2, Tesla K20, 470.1, GPU-5e6f"').replace(
        ', 40960" ;;', ', 40960"; echo "2, [N/A], [N/A], [N/A], [N/A], [N/A]" ;;')
    make_program(folder, "nvidia-smi", with_third)
    make_program(folder, "rocm-smi", ROCM_SMI)
    stage.start_edge("node", "-p", "sysinfo", env={"PATH": f"{folder}:{os.environ['PATH']}"})
    window.sign_in()
    window.open("#/e/node/sysinfo")
    one, two, amd = "GPU 0 NVIDIA A100", "GPU 1 NVIDIA A100", "GPU 0 AMD Instinct"
    assert told(window, one) == "37 %, 1.1 GB of 43 GB"         # 1,024 of 40,960 MiB
    assert told(window, two) == "0 B of 43 GB"
    assert told(window, amd) == "55 %, 1.1 GB of 69 GB"
    window.wait(lambda: len(lines(window, one)[0]) >= 3, "its history")
    busy, memory = lines(window, one)
    assert len(busy) == len(memory) and max(busy) < min(memory)          # 37 is above 2.5 percent
    assert lines(window, two)[0] == [] and len(lines(window, two)[1]) >= 3
    window.find(".chip", "Tesla K20")              # which tells no figures at all
    assert "GPU 2" not in window.text()
    look(window, "gpus")


def told(window, name):
    """Return what a screen reader hears of a chart, behind its name."""
    return window.run("return args[0].ariaLabel", {"element-6066-11e4-a52e-4f735466cecf":
                      window.find(f"svg[aria-label^='{name}']")}).split(": ", 1)[1]


def lines(window, name):
    """Return the heights, from above, that each line of a chart goes through."""
    paths = window.run("return [...document.querySelectorAll(`svg[aria-label^='${args[0]}']"
                       " path:not(.area)`)].map((path) => path.getAttribute('d') || '')", name)
    return [[float(point.split(",")[1]) for point in re.findall(r"[\d.-]+,[\d.-]+", path)]
            for path in paths]


class Programs:
    """Stand-ins for a scheduler's programs, in a folder for PATH; see replay()."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()

    def __call__(self, name, script):
        make_program(self.folder, name, f"#!/bin/sh\n{script}\n")


@pytest.fixture
def cluster(stage, tmp_path):
    """An edge whose Slurm is a recording, with 10,000 jobs and a limit of node hours beside."""
    put = Programs(tmp_path / "slurm")
    replay(put, "24.11", with_json=False)
    job = ("##|{0}|{0}|N/A|{1}|None|carol|debug|proj_a|normal|1|1|1:30:00|{2}|1795602840|"
           "1795602841|1795608241|792|N/A|(null)|n1|job{0}\n")
    with open(put.folder / "squeue-busy-text.txt", "a") as file:
        file.writelines(job.format(number, *(("RUNNING", "1-02:00:00") if number % 2 else
                                             ("PENDING", "0:00"))) for number in range(1000, 11000))
    hours = "testcluster|proj_h|alice||1|normal|normal|||02:00:00||||||node=600000\n"
    with open(put.folder / "sacctmgr-assoc-text.txt", "a") as file:
        file.write(hours)
    stage.start_edge("cluster", "-p", "queue_info",
                     env={"PATH": f"{put.folder}:{os.environ['PATH']}"})


def test_queues_are_shown_in_the_units_that_they_have(cluster, stage, window):
    window.sign_in()
    window.open("#/e/cluster/queue_info")
    window.wait_text("1 of 2 nodes free · 4 CPUs, 8.4 GB a node · 30 min at most")   # 8,000 MiB
    shown = window.text()
    assert "1 of 3 nodes free · 4 CPUs, 4 GPUs, 17 GB a node · no limit" in shown
    assert "0 of 1 node free · 4 CPUs, 4 GPUs, 17 GB a node · 1 d at most" in shown
    window.click("button", "Everybody's")
    window.type("main input[type=search]", "job1001")
    window.find(".vrow", "ran 1 d 2 h of 1 h 30 min")
    window.type("main input[type=search]", "job1000")
    window.find(".vrow", "1 h 30 min at most")
    window.wait_text("alice · gpuq, high, normal · 2 h at most")
    window.wait_text("bob · low, normal · 1 h at most")
    hours = window.run("return document.querySelector('main').innerText.split('proj_h')[1]")
    assert "10,000 node hours" in hours and "used" not in hours       # Slurm does not tell here
    look(window, "queues")


def test_ten_thousand_batch_jobs_are_filtered_and_reached_by_keys(cluster, stage, window):
    window.sign_in()
    window.open("#/e/cluster/queue_info")
    window.find("[role=img][aria-label^='debug: ']")
    window.click("button", "Everybody's")
    window.wait(lambda: re.search(r"10,0\d\d jobs", window.text()), "all jobs")
    assert rows(window) < 60
    window.choose("select[aria-label=State]", "PENDING")
    window.wait(lambda: re.search(r"5,0\d\d of 10,0\d\d jobs", window.text()), "the pending ones")
    keys = Keys(window)
    keys.tab_to("job1")
    keys.press("End")
    keys.wait_focus("job10998")
    assert rows(window) < 60
    keys.press("Tab")
    assert "Cancel" in keys.focused()
    window.choose("select[aria-label=Partition]", "gpu")
    window.wait(lambda: rows(window) < 10, "those of a partition")


# ---------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------

def submit_from_elsewhere(stage, spec):
    """Submit a job in a session that is not the page's."""
    sid = stage.call("POST", "/site/psij/register_session")["sid"]
    stage.call("POST", f"/site/psij/submit/{sid}", {"job_spec": spec})
    return sid


def test_a_job_of_another_session_is_submitted_again_with_all_that_it_was_given(stage, window):
    stage.start_edge("site", "-p", "psij")
    (stage.home / "data").mkdir()
    spec = {"executable": "/bin/sh", "arguments": ["-c", "pwd; env"], "attributes": {"duration": 60},
            "directory": str(stage.home / "data"), "inherit_environment": False,
            "environment": {"PASSWORD": "two words"}, "resources": {"node_count": 1}}
    theirs = submit_from_elsewhere(stage, spec)
    window.sign_in()
    window.open("#/e/site/psij")
    window.click(".vrow .main", "/bin/sh")
    window.wait(lambda: "two words" in output(window), "the output")
    first = output(window)
    assert first.startswith(f"{stage.home}/data\n") and "environment" not in window.text().lower()
    window.click("section[aria-label=Job] button", "Submit again")
    window.find(".toast", "The job is submitted.")
    window.wait(lambda: rows(window) == 2 and output(window) == first, "the second job's output")
    sids = stage.call("GET", "/site/psij/list_sessions")["sessions"]
    jobs = [(sid, job["job_id"]) for sid in sids
            for job in stage.call("GET", f"/site/psij/list_jobs/{sid}")["jobs"]]
    specs = [stage.call("GET", f"/site/psij/job_spec/{sid}/{job}") for sid, job in jobs]
    assert specs == [{"job_spec": spec, "executor": "local"}] * 2
    assert len({sid for sid, _ in jobs}) == 2 and theirs in sids     # each in its own session


def test_a_job_of_an_older_edge_is_submitted_again_by_way_of_the_form(stage, window):
    window.expected = ["/job_spec/.* - Failed to load resource: .* 404"]
    stage.start_edge("site", "-p", "psij", "--plugin-file", OLDER)
    submit_from_elsewhere(stage, {
        "executable": "/bin/echo", "arguments": ["two words", "it's"],
        "attributes": {"duration": 60}, "resources": {"node_count": 1}})
    window.sign_in()
    window.open("#/e/site/psij")
    window.click(".vrow .main", "/bin/echo")
    window.wait(lambda: output(window) == "two words it's\n", "the output")
    window.click("section[aria-label=Job] button", "Submit again")
    window.find(".toast", "Look it over")
    values = window.run("return args[0].map((name) =>"
                        " document.querySelector(`form [name=${name}]`).value)",
                        ["exec", "args", "duration", "node_count", "executor"])
    assert values == ["/bin/echo", "'two words' 'it'\\''s'", "60", "1", "0"]
    assert rows(window) == 1                       # nothing is sent that was not looked at
    window.click("button[type=submit]", "Submit job")
    window.wait(lambda: rows(window) == 2, "the second job")
    window.wait(lambda: output(window) == "two words it's\n", "its output")


def test_a_plugin_that_describes_its_page_wrongly_is_told_what_is_wrong(stage, window):
    stage.start_edge("site", "-p", "askew", "--plugin-file", PLUGINS)
    window.sign_in()
    window.open("#/e/site")
    window.find("section.card .error", "ui_config.forms[0].fields[0].type: 'colour' is none of")
    window.click("section.card a", "askew")
    window.find("[role=alert]", "ui_config.forms[0].fields[0].type: 'colour' is none of")
    window.wait_text("This plugin describes no page of its own.")
    look(window, "askew")


def test_what_is_not_there_says_what_to_type(stage, window):
    window.sign_in()
    for place in ("#/e/away", "#/e/away/psij"):
        window.open(place)
        window.wait_text(f"python3 radical_edge.py --edge --url {stage.url} --name away")
    window.open("#/e/" + "x;reboot")               # a name in an address is not to be trusted
    window.wait_text("--name 'x;reboot'")
    stage.start_edge("away", "-p", "sysinfo")
    window.open("#/e/away/psij")
    window.wait_text("This edge has no such plugin.")
    window.wait_text("python3 radical_edge.py --check")
    look(window, "no-plugin")
    window.open("#/e/away/sysinfo")
    window.find(".chart", "CPU")
