"""Fixtures for the suites in this directory: those of test_edge.py, and a real Slurm."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# here alone: a module that imported them too would have fixtures of its own, and a second Slurm
from slurm_cluster import slurm, slurm_home                               # noqa: E402, F401
from test_edge import bridge, edge, home, raw, start, tokens, wire        # noqa: E402, F401
