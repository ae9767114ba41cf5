"""Fixtures of test_edge.py for the suites in this directory."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_edge import bridge, edge, home, raw, start, tokens, wire  # noqa: E402, F401
