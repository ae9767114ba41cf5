"""A browser for tests: Debian's Chromium, driven through chromedriver (W3C WebDriver)."""
from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"   # the key of a reference (WebDriver, 12.2)
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage", "--hide-scrollbars", "--window-size=1280,900"]
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "Tab": "\ue004", "ArrowDown": "\ue015",
        "ArrowUp": "\ue013", "End": "\ue010", "Home": "\ue011", "PageDown": "\ue00f"}


def find_programs():
    """Return (chromium, chromedriver); None in the place of one that is not installed."""
    return (shutil.which("chromium") or shutil.which("google-chrome"),
            shutil.which("chromedriver"))


class BrowserError(Exception):
    """WebDriver's error; `kind` is its code, such as "no such element"."""

    def __init__(self, kind, message):
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Driver:
    """chromedriver in a process of its own, and the requests that it takes."""

    def __init__(self, program, folder):
        self._log = open(Path(folder) / "chromedriver.txt", "w")
        environment = {name: value for name, value in os.environ.items()
                       if not name.lower().endswith("_proxy")}
        self.process = subprocess.Popen([program, "--port=0"], stdout=subprocess.PIPE, text=True,
                                        stderr=self._log, env=environment, start_new_session=True)
        self.url = None
        for line in self.process.stdout:
            if "started successfully on port" in line:
                self.url = f"http://127.0.0.1:{line.split()[-1].rstrip('.')}"
                break
        assert self.url, f"{program} did not start"
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def ask(self, method, path, body=None, timeout=90):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method,
                                         headers={"Content-Type": "application/json"})
        try:
            with self._open(request, timeout=timeout) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            told = json.load(error)["value"]
            raise BrowserError(told["error"], told["message"].partition("\n")[0]) from None

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        self.process.stdout.close()
        self._log.close()


class Browser:
    """One window with a profile of its own."""

    def __init__(self, driver, chromium, folder, downloads=None):
        self._driver = driver
        options = {"binary": chromium, "args": [*FLAGS, f"--user-data-dir={folder}"],
                   "prefs": {"download.default_directory": str(downloads or folder)}}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options,
                  "goog:loggingPrefs": {"browser": "ALL"}}
        made = driver.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._path = f"/session/{made['sessionId']}"
        self._post("/timeouts", {"script": 60000, "pageLoad": 60000})

    def _post(self, path, body=None):
        return self._driver.ask("POST", self._path + path, {} if body is None else body)

    def go(self, url):
        """Load a page."""
        self._post("/url", {"url": url})

    def run(self, script, *arguments):
        """Return what the body of a function in the page returns; promises are awaited."""
        text = ("const done = arguments[arguments.length - 1], args = [...arguments].slice(0, -1);"
                f"(async (...args) => {{{script}}})(...args)"
                ".then((value) => done([value]), (error) => done(String(error)));")
        found = self._post("/execute/async", {"script": text, "args": list(arguments)})
        if isinstance(found, str):
            raise BrowserError("script", found)
        return found[0]

    def cdp(self, command, **parameters):
        """Run a command of the DevTools protocol."""
        return self._post("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def find(self, selector, words=None, timeout=20):
        """Return the first element that is seen, fits the selector and has the words in it."""
        end = time.monotonic() + timeout
        while True:
            found = self.run(
                "return [...document.querySelectorAll(args[0])].find((node) =>"
                " node.checkVisibility()"
                " && (!args[1] || `${node.textContent} ${node.getAttribute('aria-label') || ''}`"
                ".includes(args[1]))) || null", selector, words)
            if found is not None:
                return found[ELEMENT]
            if time.monotonic() > end:
                raise AssertionError(f"no {selector} with {words!r}; there is:\n{self.text()}")
            time.sleep(0.05)

    def click(self, selector, words=None, timeout=20):
        """Click an element as a user does; it is found again when the page redraws meanwhile."""
        end = time.monotonic() + timeout
        while True:
            element = self.find(selector, words, timeout)
            try:
                self.run("args[0].scrollIntoView({block: 'center'})", {ELEMENT: element})
                self._post(f"/element/{element}/click")
                return
            except BrowserError as error:
                if time.monotonic() > end or error.kind not in (
                        "stale element reference", "element click intercepted",
                        "element not interactable"):
                    raise

    def type(self, selector, text, *, clear=True):
        """Type into a field."""
        element = self.find(selector)
        if clear:
            self._post(f"/element/{element}/clear")
        self._post(f"/element/{element}/value", {"text": text})

    def choose(self, selector, words):
        """Choose the option of a select that reads `words`, once it is there."""
        self.wait(lambda: self.run("""
            const select = document.querySelector(args[0]);
            const option = [...(select?.options || [])].find((one) => one.textContent === args[1]);
            if (!option) return false;
            select.value = option.value;
            select.dispatchEvent(new Event("change"));
            return true""", selector, words), f"the option {words!r} of {selector}")

    def send_file(self, selector, path):
        """Choose a file in a (hidden) file input."""
        found = self.run("return document.querySelector(args[0])", selector)
        self._post(f"/element/{found[ELEMENT]}/value", {"text": str(path)})

    def drop(self, selector, *paths):
        """Drag files over an element, let the page draw, and drop them there."""
        self.drag(selector, *paths)
        self._drag("drop", *self._dragged)

    def drag(self, selector, *paths):
        """Drag files over an element."""
        element = self.find(selector)
        x, y = self.run("args[0].scrollIntoView({block: 'center'});"
                        " const box = args[0].getBoundingClientRect();"
                        " return [box.x + box.width / 2, box.y + box.height / 2]",
                        {ELEMENT: element})
        self._dragged = x, y, [str(path) for path in paths]
        for kind in ("dragEnter", "dragOver"):
            self._drag(kind, *self._dragged)

    def _drag(self, kind, x, y, files):
        self.cdp("Input.dispatchDragEvent", type=kind, x=x, y=y,
                 data={"items": [], "files": files, "dragOperationsMask": 1})

    def open_tab(self):
        """Open a tab in front of this one, which is hidden then; return how to come back."""
        here = self._driver.ask("GET", self._path + "/window")
        made = self._post("/window/new", {"type": "tab"})
        self._post("/window", {"handle": made["handle"]})

        def come_back():
            self._driver.ask("DELETE", self._path + "/window")
            self._post("/window", {"handle": here})

        return come_back

    def press(self, *keys):
        """Press keys, one after the other, wherever the focus is."""
        actions = []
        for key in keys:
            value = KEYS.get(key, key)
            actions += [{"type": "keyDown", "value": value}, {"type": "keyUp", "value": value}]
        self._post("/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def text(self):
        """Return what is read on the page."""
        return self.run("return document.body.innerText")

    def wait_text(self, words, timeout=30):
        """Return once the words are on the page."""
        self.wait(lambda: words in self.text(), f"{words!r}", timeout)

    def wait(self, condition, what, timeout=30):
        """Return condition()'s first true value; fail after `timeout` seconds."""
        end = time.monotonic() + timeout
        while True:
            value = condition()
            if value:
                return value
            if time.monotonic() > end:
                raise AssertionError(f"{what} did not come; there is:\n{self.text()}")
            time.sleep(0.05)

    def resize(self, width, height):
        """Set the size of the page itself."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height,
                 deviceScaleFactor=1, mobile=width < 600)

    def media(self, scheme):
        """Prefer "light" or "dark"."""
        self.cdp("Emulation.setEmulatedMedia",
                 features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path):
        """Save what is seen as PNG."""
        data = self._driver.ask("GET", self._path + "/screenshot")
        Path(path).write_bytes(base64.b64decode(data))

    def console(self):
        """Return the messages since the last time, as text."""
        return [f"{entry['level']} {entry['message']}"
                for entry in self._post("/se/log", {"type": "browser"})]

    def close(self):
        self._driver.ask("DELETE", self._path)
