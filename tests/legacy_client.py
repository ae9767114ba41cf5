"""A client program of radical.edge or radical.orbit, told over stdin what to call.

    .venv-compat/bin/python tests/legacy_client.py radical.edge

Each line is a JSON object: {"call": "name.method", "args", "kwargs", "keep": name of the result}.
Known from the start are the package's module `client` and the functions below. An argument "$name"
is an object by its name. The reply is a line: {"value"} or {"error", "text"}.
"""
from __future__ import annotations

import importlib
import json
import sys
import threading

REPLIES, sys.stdout = sys.stdout, sys.stderr    # the package's log goes to stdout, in part
EVENTS: list = []
SEEN = threading.Condition()


def on_event(*arguments):
    """Take a callback's arguments."""
    with SEEN:
        EVENTS.append(list(arguments))
        SEEN.notify_all()


def find_event(wanted: dict, timeout: float = 30):
    """Return the first callback's arguments whose last one has all of `wanted`; None: too late."""
    def find():
        return next((item for item in EVENTS if isinstance(item[-1], dict)
                     and all(item[-1].get(key) == value for key, value in wanted.items())), None)

    with SEEN:
        SEEN.wait_for(find, timeout)
        return find()


def find_topology(name: str, timeout: float = 30):
    """Return the first topology that a callback got with an edge in it; None: too late."""
    def find():
        return next((item[0] for item in EVENTS if len(item) == 1 and name in item[0]), None)

    with SEEN:
        SEEN.wait_for(find, timeout)
        return find()


def read_sse(url: str, count: int):
    """Return the first events of a stream, as sseclient and requests read them."""
    import requests
    import sseclient
    with requests.get(f"{url}/events", stream=True, timeout=30) as response:
        stream = sseclient.SSEClient(response).events()
        found = [next(stream) for _ in range(count)]
        return [{"id": event.id, "event": event.event, "data": json.loads(event.data)}
                for event in found]


def post(bridge, path: str, size: int, content_type: str = "application/octet-stream"):
    """Send bytes with the client's own httpx client; return the status and whether they came back.

    bridge: one of the package's BridgeClient.
    """
    content = bytes(range(256)) * (size // 256)
    reply = bridge._http.post(path, content=content, headers={"Content-Type": content_type})
    return [reply.status_code, reply.content == content, reply.text[:300] if reply.is_error else ""]


def serve(objects: dict) -> None:
    """Do what the lines on stdin say."""
    print("ready", file=REPLIES, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            target, *path = order["call"].split(".")
            value = objects[target]
            for name in path:
                value = getattr(value, name)
            arguments = [objects[item[1:]] if isinstance(item, str) and item[:1] == "$" else item
                         for item in order.get("args", [])]
            value = value(*arguments, **order.get("kwargs", {})) if callable(value) else value
            objects[order.get("keep") or "_"] = value
            reply = {"value": value}
            json.dumps(reply)
        except TypeError as error:                # an object that stays here
            reply = {"value": None} if "serializable" in str(error) else \
                {"error": "TypeError", "text": str(error)}
        except Exception as error:
            reply = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps(reply), file=REPLIES, flush=True)


if __name__ == "__main__":
    importlib.import_module(sys.argv[1])          # with its plugins, whose classes clients need
    serve({"client": importlib.import_module(sys.argv[1] + ".client"), "on_event": on_event,
           "find_event": find_event, "find_topology": find_topology, "read_sse": read_sse,
           "post": post})
