"""psij as edges of before have it: it does not tell what a job was submitted as."""
from __future__ import annotations

from radical_edge import Plugin

Current = Plugin.get_plugin_class("psij")


class Older(Current):
    """Takes the place of psij."""

    plugin_name = "psij"

    def add_route_get(self, path, method):
        if not path.startswith("job_spec/"):
            super().add_route_get(path, method)
