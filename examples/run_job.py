#!/usr/bin/env python3
"""Run a program on an edge, print its output as it comes, and exit with its exit code.

    python examples/run_job.py EDGE PROGRAM [ARGUMENT ...]
"""
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from radical_edge import BridgeClient, EdgeError  # noqa: E402


def run_job(edge, program, *arguments):
    """Return the job's last status, after printing all of its output."""
    with BridgeClient() as bridge, bridge.get_edge_client(edge).get_plugin("psij") as psij:
        changed = threading.Event()
        psij.register_notification_callback(lambda *_: changed.set(), topic="job_status")
        job = psij.submit_job({"executable": program, "arguments": list(arguments)})
        status = {"eof": False, "stdout_offset": 0, "stderr_offset": 0}
        while not status["eof"]:
            changed.wait(0.5)                      # output is no event: look for it meanwhile
            changed.clear()
            status = psij.get_job_status(job["job_id"], status["stdout_offset"],
                                         status["stderr_offset"])
            print(status["stdout"], end="", flush=True)
            print(status["stderr"], end="", file=sys.stderr, flush=True)
        return status


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        status = run_job(*sys.argv[1:])
    except EdgeError as error:
        sys.exit(f"{error.detail} (HTTP {int(error.status)})")
    if status["message"]:
        print(f"{status['state']}: {status['message']}", file=sys.stderr)
    sys.exit(status["exit_code"] or 0)


if __name__ == "__main__":
    main()
