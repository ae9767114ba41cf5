#!/usr/bin/env python3
"""Measure the Explorer in headless Chromium: what it weighs, when it can be used, what holds it up.

    python bench/explorer.py [--rounds 5] [--events 10000]

Needs what tests/setup-explorer.sh installs. Bridge and edge run beside the browser, on loopback.

* the page: bytes of the file, and as it is sent
* usable: milliseconds from the start of the navigation until the first edge is listed, signed in,
  with an empty cache and with a filled one; beside it the same for a page without any content
* events: as many notifications as --events come in one burst while the list of a plugin is open;
  how long it takes until the page shows the last of them, and its longest task
  (PerformanceObserver, "longtask"; the browser reports none of less than 50 ms, which stand as 0)
"""
from __future__ import annotations

import argparse
import contextlib
import http.client
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]

from browser import Browser, Driver, find_programs           # noqa: E402
from common import Scene                                     # noqa: E402

PLUGIN = '''
import asyncio
from radical_edge import Plugin, PluginSession, plugin, post

class BenchSession(PluginSession):
    pass

@plugin("bench")
class Bench(Plugin):
    session_class = BenchSession
    ui_config = {"monitors": [{"id": "jobs", "title": "Jobs", "type": "task_list"}],
                 "notifications": {"topic": "job", "id_field": "id", "state_field": "state"}}

    @post("burst/{count}")
    async def burst(self, request):
        count = int(request.path_params["count"])
        for number in range(count):
            self._dispatch_notify("job", {"id": f"job-{number}", "state": "RUNNING"})
            if number % 100 == 99:
                await asyncio.sleep(0)
        await self.send_notification("job", {"id": "last", "state": "DONE"})
        return {}
'''
WATCH = """
window.longest = 0; window.held = 0;
new PerformanceObserver((seen) => { for (const task of seen.getEntries()) {
    window.longest = Math.max(window.longest, task.duration); window.held++; } })
    .observe({entryTypes: ["longtask"]});
"""
USABLE = """
return await new Promise((done) => {
    const look = () => document.querySelector(args[0]) ? done(performance.now())
        : requestAnimationFrame(look);
    look();
});"""


def size_of(scene: Scene, encoding: str) -> int:
    """Return the bytes of the page as it is sent."""
    made = http.client.HTTPConnection("localhost", scene.port)
    try:
        made.request("GET", "/", headers={"Accept-Encoding": encoding})
        return len(made.getresponse().read())
    finally:
        made.close()


def measure_usable(browser: Browser, url: str, selector: str, *, cached: bool) -> float:
    """Return milliseconds from the start of a navigation until something is on the page."""
    browser.cdp("Network.setCacheDisabled", cacheDisabled=not cached)
    browser.go("about:blank")
    browser.go(url)
    return browser.run(USABLE, selector)


def measure_events(browser: Browser, scene: Scene, count: int) -> tuple[float, float, int]:
    """Return (seconds until the last is shown, longest task in ms, number of long tasks)."""
    browser.run("location.hash = '#/e/bench/bench'")
    browser.find(".tabs")
    browser.run(WATCH)
    begin = time.perf_counter()
    scene.request("POST", f"/bench/bench/burst/{count}")
    browser.wait(lambda: browser.run(
        "return [...document.querySelectorAll('.vrow .main')].some((n) => n.textContent === 'last')"
        " && document.querySelector('.tabs button').textContent") == f"All {count + 1}",
        "the last event", 120)
    took = time.perf_counter() - begin
    time.sleep(1)                                  # what is still drawn is counted too
    longest, number = browser.run("return [window.longest, window.held]")
    return took, longest, number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--events", type=int, default=10_000)
    options = parser.parse_args()
    chromium, chromedriver = find_programs()
    if not chromium or not chromedriver:
        raise SystemExit("chromium or chromedriver is not installed: run tests/setup-explorer.sh")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        scene = Scene(folder, PLUGIN)
        stack.callback(scene.close)
        scene.wait_online()
        driver = Driver(chromedriver, folder)
        stack.callback(driver.close)
        browser = Browser(driver, chromium, folder / "profile")
        stack.callback(browser.close)
        report(scene, browser, options)


def report(scene: Scene, browser: Browser, options: argparse.Namespace) -> None:
    url = f"http://127.0.0.1:{scene.port}/"
    print(f"page: {size_of(scene, 'identity')} bytes, {size_of(scene, 'gzip')} as sent")
    browser.go(url)
    browser.type("#token", scene.token)
    browser.click("button", "Sign in")
    browser.find("a.main", "bench")
    for name, address, selector, cached in (
            ("usable, empty cache", url, "a.main", False),
            ("usable, filled cache", url, "a.main", True),
            ("a page of nothing", url + "plugins/frame", "main", False)):
        found = [measure_usable(browser, address, selector, cached=cached)
                 for _ in range(options.rounds)]
        print(f"{name}: median {statistics.median(found):.0f} ms, worst {max(found):.0f} ms")
    browser.go(url)
    browser.find("a.main", "bench")
    took, longest, number = measure_events(browser, scene, options.events)
    print(f"{options.events} events: shown after {took:.1f} s, longest task {longest:.0f} ms, "
          f"{number} of 50 ms or more")


if __name__ == "__main__":
    main()
