"""Run the edge service of radical.edge or radical.orbit with one plugin more, `probe`.

    .venv-compat/bin/python tests/legacy_service.py radical.edge .venv-compat/bin/PROGRAM ...

The plugin is written against their plugin API, as plugins of other people are.
"""
from __future__ import annotations

import asyncio
import hashlib
import importlib
import runpy
import sys
import time


class Notifying:
    """What the tests of notifications use; a mixin of PluginSession."""

    async def say(self, text):
        self._plugin._dispatch_notify("said", {"text": text})
        return {"said": text}


class Routes:
    """What the tests ask for things; a mixin of Plugin."""

    def __init__(self, app, instance_name="probe"):
        super().__init__(app, instance_name)
        self.topologies = []
        self.runs = 0
        self.add_route_post("digest", self.digest)
        self.add_route_post("json", self.json)
        self.add_route_post("count/{seconds}", self.count)
        self.add_route_get("query", self.query)
        self.add_route_get("say/{sid}/{text}", self.say)
        self.add_route_get("wait/{seconds}", self.wait)
        self.add_route_get("block/{seconds}", self.block)
        self.add_route_get("large/{size}", self.large)
        self.add_route_get("topologies", self.get_topologies)
        self.add_route_get("runs", self.get_runs)

    @classmethod
    def is_enabled(cls, app):
        return app is not None

    async def on_topology_change(self, edges):
        self.topologies.append(edges)

    async def digest(self, request):
        body = await request.body()
        return {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()}

    async def json(self, request):
        return {"got": await request.json()}

    async def count(self, request):
        self.runs += 1
        await asyncio.sleep(float(request.path_params["seconds"]))
        return {"runs": self.runs}

    async def query(self, request):
        return dict(request.query_params)

    async def say(self, request):
        return await self._forward(request.path_params["sid"], Notifying.say,
                                   request.path_params["text"])

    async def wait(self, request):
        await asyncio.sleep(float(request.path_params["seconds"]))
        return {}

    async def block(self, request):
        time.sleep(float(request.path_params["seconds"]))      # their plugins share one loop
        return {}

    async def large(self, request):
        return {"text": "x" * int(request.path_params["size"])}

    async def get_topologies(self, request):
        return {"topologies": self.topologies}

    async def get_runs(self, request):
        return {"runs": self.runs}


def make_probe(package):
    """Return the plugin class, and let radical.edge, or another package with its API, know it."""
    class ProbeSession(Notifying, package.PluginSession):
        """A session."""

    class Probe(Routes, package.Plugin):
        """The plugin."""

        plugin_name = "probe"
        session_class = ProbeSession
        version = "7"
        ui_config = {"icon": "?", "title": "Probe"}

    return Probe


if __name__ == "__main__":
    make_probe(importlib.import_module(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
