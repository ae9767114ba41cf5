"""Give radical.orbit 0.2.0 the names back that it had as radical.edge 0.2, and run its programs.

Run by the Python of a virtual environment that has radical.orbit 0.2.0, this file writes the
package radical.edge beside it (see setup-compat.sh). What it knows:

* The renaming was edge -> endpoint in identifiers, fields and routes. Back again it is not one to
  one: the "endpoint" of a register message, which describes the host, was called so before.
* The environment variables lost a part: RADICAL_ORBIT_BRIDGE_URL was RADICAL_BRIDGE_URL.
* What the older package did not have (Globus) is left out.
"""
from __future__ import annotations

import re
import shutil
import sys
import sysconfig
from pathlib import Path

PROGRAMS = {"radical-orbit-bridge.py": "radical-edge-bridge.py",
            "radical-orbit-endpoint.py": "radical-edge-service.py"}

KEPT = (                       # "endpoint" that means an endpoint, also in radical.edge
    r"\bIRI_ENDPOINTS\b", r"\biri_endpoints\b",
    r'    endpoint: Dict\[str, Any\] = Field\(default_factory=dict',       # RegisterMessage
    r'\bendpoint=\{"type"', r"'endpoint': \{'type'", r'"endpoint": data\.get\("endpoint", \{\}\)')

RENAMED = (
    (r"RADICAL_ORBIT_BRIDGE", "RADICAL_BRIDGE"), (r"RADICAL_ORBIT", "RADICAL_EDGE"),
    (r"radical-orbit-endpoint", "radical-edge-service"), (r"ORBIT", "Edge"), (r"orbit", "edge"),
    (r"Endpoint", "Edge"), (r"ENDPOINT", "EDGE"), (r"endpoint", "edge"))


def rename(text: str) -> str:
    """Return a source text with the older names."""
    def mark(match: re.Match) -> str:             # \0 hides it from the renaming
        return re.sub("(?i)end(?=point)", lambda found: found.group()[0] + "\0"
                      + found.group()[1:], match.group())

    for pattern in KEPT:
        text = re.sub(pattern, mark, text)
    for pattern, new in RENAMED:
        text = re.sub(pattern, new, text)
    return text.replace("\0", "")


def derive(site: Path, scripts: Path) -> None:
    """Write the package radical.edge beside radical.orbit, and its two programs."""
    old, new = site / "radical/orbit", site / "radical/edge"
    shutil.rmtree(new, ignore_errors=True)
    for path in sorted(old.rglob("*")):
        if path.suffix not in (".py", ".json", ".js", ".html") or "globus" in path.name:
            continue
        target = new / str(path.relative_to(old)).replace("orbit", "edge")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(rename(path.read_text()))
    for name, older in PROGRAMS.items():
        (scripts / older).write_text(rename((scripts / name).read_text()))


if __name__ == "__main__":
    derive(Path(sysconfig.get_path("purelib")), Path(sys.prefix) / "bin")
