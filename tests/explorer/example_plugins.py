"""Plugins for the tests of the Explorer: one that describes its page, one with a module of its own,
and two that mean harm."""
from __future__ import annotations

import asyncio
import os
from pathlib import Path

from radical_edge import Plugin, PluginSession, Unprocessable, get, plugin, post

FOLDER = Path(__file__).resolve().parent
MARKUP = "<img src=x onerror=\"window.pwned=1\"><script>window.pwned=1</script>"


class GardenSession(PluginSession):
    """Beds that were dug in this session."""

    def __init__(self, sid):
        super().__init__(sid)
        self.beds = {}


@plugin("garden")
class Garden(Plugin):
    """A third party's plugin: it has a page without a line of JavaScript."""

    session_class = GardenSession
    version = "1.2.3"
    ui_config = {
        "icon": "🌱", "title": "Garden", "description": "Digs beds, and waters what grows there.",
        "refresh_button": True,
        "forms": [{
            "id": "dig", "title": "Dig a bed", "layout": "grid3",
            "submit": {"label": "Dig", "style": "primary", "endpoint": "dig/{sid}"},
            "fields": [
                {"name": "plant", "type": "text", "label": "Plant", "column": 0,
                 "placeholder": "such as thyme", "help": "What is to grow there."},
                {"name": "rows", "type": "number", "label": "Rows", "default": 3, "column": 0},
                {"name": "notes", "type": "textarea", "label": "Notes", "required": False,
                 "column": 1},
                {"name": "soil", "type": "select", "label": "Soil", "column": 1,
                 "options": ["loam", {"value": 7, "label": "sand, pH 7"}]},
                {"name": "tool", "type": "select", "label": "Tool", "column": 2,
                 "options_endpoint": "tools"},
                {"name": "shade", "type": "checkbox", "label": "In the shade", "default": True,
                 "column": 2},
                {"name": "origin", "type": "hidden", "default": "page"},
                {"name": "labels", "type": "custom_attributes", "label": "Labels", "column": 2,
                 "required": False}]}],
        "monitors": [
            {"id": "beds", "title": "Beds", "type": "task_list", "empty_text": "No bed yet.",
             "auto_load": "beds/{sid}", "detail": "bed/{sid}/{id}",
             "actions": [{"label": "Fill in", "endpoint": "fill/{sid}/{id}", "style": "danger",
                          "states": ["RUNNING"]}]},
            {"id": "air", "title": "Air", "type": "metrics", "auto_load": "air", "refresh": 1},
            {"id": "stock", "title": "Stock", "type": "table", "auto_load": "stock"},
            {"id": "letter", "title": "Letter", "type": "raw", "auto_load": "letter"}],
        "notifications": {"topic": "bed", "id_field": "bed_id", "state_field": "state"}}

    def __init__(self, app, instance_name=None):
        super().__init__(app, instance_name)
        self.readings = 0

    def _session(self, request):
        return self._find(request.path_params["sid"]).session

    @get("tools")
    async def tools(self, request):
        return {"tools": ["spade", "fork"]}

    @post("dig/{sid}")
    async def dig(self, request):
        session, body = self._session(request), await request.json_object()
        if body["rows"] > 100:
            raise Unprocessable("rows: at most 100 fit")
        bed = {"bed_id": f"bed-{len(session.beds) + 1}", "state": "RUNNING", **body}
        session.beds[bed["bed_id"]] = bed
        session.notify("bed", bed)
        return bed

    @get("beds/{sid}")
    async def beds(self, request):
        return {"beds": list(self._session(request).beds.values())}

    @get("bed/{sid}/{id}")
    async def bed(self, request):
        return self._session(request).beds[request.path_params["id"]]

    @post("fill/{sid}/{id}")
    async def fill(self, request):
        bed = self._session(request).beds[request.path_params["id"]]
        bed["state"] = "CANCELED"
        self._dispatch_notify("bed", bed)
        return {}

    @get("air")
    async def air(self, request):
        self.readings += 1
        return {"reading": self.readings, "humidity_percent": 64, "wind": {"speed": 3.5},
                "gusts": [1, 2, 3]}

    @get("stock")
    async def stock(self, request):
        return {"stock": [{"plant": f"plant {n:02}", "left": n * n % 17, "state": "ready"}
                          for n in range(250)]}

    @get("letter")
    async def letter(self, request):
        return {"dear": "reader"}

    @post("flood/{count}")
    async def flood(self, request):
        """Tell of very many beds; answer when all is told."""
        count = int(request.path_params["count"])
        for number in range(count):
            self._dispatch_notify("bed", {"bed_id": f"bed-{number % 10000}",
                                          "state": ("QUEUED", "RUNNING", "DONE")[number % 3]})
            if number % 200 == 199:
                await asyncio.sleep(0.005)
        await self.send_notification("bed", {"bed_id": "the-last", "state": "DONE"})
        return {"told": count}


class NotingSession(PluginSession):
    """Nothing but a session."""


class Noting(Plugin):
    """What plugins with modules share: they are told things, and a test reads them."""

    session_class = NotingSession

    def __init__(self, app, instance_name=None):
        super().__init__(app, instance_name)
        self.reports = []

    @get("target")
    async def target(self, request):
        return {"url": os.environ.get("TEST_TARGET", "")}

    @get("hello/{sid}")
    async def hello(self, request):
        return {"hello": self._find(request.path_params["sid"]).session.sid}

    @post("report")
    async def report(self, request):
        self.reports.append(await request.json())
        return {"taken": len(self.reports), "type": request.headers.get("content-type"),
                "authorization": request.headers.get("authorization")}

    @get("reports")
    async def give(self, request):
        return self.reports

    @post("tell")
    async def tell(self, request):
        self._dispatch_notify("told", await request.json())
        return {}


@plugin("friendly")
class Friendly(Noting):
    """Its page is a module of its own."""

    ui_module = str(FOLDER / "friendly.js")
    ui_config = {"icon": "🌍", "title": "Friendly", "description": "Draws its own page."}


@plugin("askew")
class Askew(Noting):
    """What it says of its page is wrong."""

    ui_config = {"title": "Askew", "forms": [{
        "id": "paint", "fields": [{"name": "paint", "type": "colour"}]}]}


@plugin("hostile")
class Hostile(Noting):
    """Its module tries whatever it can."""

    ui_module = str(FOLDER / "hostile.js")
    ui_config = {"title": MARKUP, "icon": "<b>", "description": MARKUP}


@plugin("markup")
class Markup(Plugin):
    """All of its texts are markup."""

    session_class = NotingSession
    version = MARKUP
    ui_config = {
        "icon": "<i>", "title": MARKUP, "description": MARKUP, "stub_message": MARKUP,
        "forms": [{"id": "f", "title": MARKUP, "submit": {"label": MARKUP, "endpoint": "echo"},
                   "fields": [{"name": "a", "label": MARKUP, "placeholder": MARKUP,
                               "default": MARKUP, "help": MARKUP},
                              {"name": "b", "type": "select", "label": MARKUP,
                               "options": [MARKUP, {"value": 1, "label": MARKUP}]},
                              {"name": "c", "type": "custom_attributes", "label": MARKUP}]}],
        "monitors": [{"id": "t", "title": MARKUP, "type": "task_list", "empty_text": MARKUP,
                      "auto_load": "rows", "actions": [{"label": MARKUP, "endpoint": "echo"}]},
                     {"id": "m", "title": MARKUP, "type": "metrics", "auto_load": "rows"},
                     {"id": "u", "title": MARKUP, "type": "table", "auto_load": "rows"},
                     {"id": "r", "title": MARKUP, "type": "raw", "auto_load": "text"}],
        "notifications": {"topic": "bad", "id_field": "id", "state_field": "state"}}

    @get("rows")
    async def rows(self, request):
        return {"rows": [{"id": MARKUP, "name": MARKUP, "state": MARKUP, MARKUP: MARKUP}],
                MARKUP: {MARKUP: MARKUP, "deep": [MARKUP]}}

    @get("text")
    async def text(self, request):
        return MARKUP

    @post("echo")
    async def echo(self, request):
        body = await request.json_object()
        self._dispatch_notify("bad", {"id": MARKUP, "state": MARKUP, "data": MARKUP, **body})
        self._dispatch_notify(MARKUP, {MARKUP: MARKUP})
        return {"id": MARKUP, "state": MARKUP, MARKUP: MARKUP}
