#!/usr/bin/env python3
"""Fuzz the parsers with coverage guidance (atheris, which is libFuzzer for Python).

    python tests/fuzz.py head --seconds 60          one target
    python tests/fuzz.py all --seconds 3600         all of them, as many at a time as there are
                                                    cores (or --jobs); the seconds are for each

Most of what there is to find is found within seconds, for each target begins with examples of what
it parses: a short run after each change, and a long one now and then, are worth more than the same
time in equal parts.

A target fails when a parser raises anything but the error that it promises, takes more than 10 s of
the processor, ten minutes or 1.5 GiB, depends on how the bytes are cut, or decides otherwise than
h11 or wsproto where peers.py does not say so. What made it fail is left in a file that is named in
the output; give it as a further argument to run it again. The exit status is 1 then, and 3 without
atheris.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

try:
    import atheris
    with atheris.instrument_imports(include=["radical_edge", "plugins"]):
        import radical_edge
        import plugins
except ImportError:
    print("fuzz.py needs atheris: pip install atheris (Python 3.11 to 3.13, Linux)")
    sys.exit(3)

import peers  # noqa: E402
from radical_edge import EdgeError, EventParser, FrameParser, ProtocolError  # noqa: E402

SLOW_S = 10.0                                     # of the processor, for one input
SEEDS = {
    "head": [b"GET /a?b HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
             b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhelloGET / HTTP/1.1\r\n",
             b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"],
    "chunk": [b"5\r\nhello\r\n0\r\n\r\n", b"5;a=b\r\nhello\r\n0\r\nT: v\r\n\r\n"],
    "response": [b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"],
    "frame": [bytes.fromhex("8105 48656c6c6f"), bytes.fromhex("8185 37fa213d 7f9f4d5158"),
              bytes.fromhex("0103 48656c 8900 8002 6c6f"), bytes.fromhex("880203e8")],
    "message": [b'{"type":"request","req_id":"1","method":"GET","path":"/a","headers":{},"body":null}',
                b'{"type":"response","req_id":"1","status":200,"headers":{"a":"b"},"body":"eA==",'
                b'"is_binary":true}'],
    "msgpack": [radical_edge.encode_msgpack({"type": "request", "body": b"\xff", "headers": {}})],
    "wire": [radical_edge.encode_wire(1, 7, ["GET", "/a", {"x": "y"}], end=True) + b"body",
             radical_edge.encode_wire_request(7, "r-1", b'["GET","/a",{"x":"y"}]', end=True),
             radical_edge.encode_wire_number(4, 7, 65536)],
    "fields": [b"Bearer abc\x00a=b; c=d\x00/a/b%20c\x00a=1&b=2\x00bytes=0-5"],
    "events": [b"id: 1\ndata: x\n\n", b"retry: 10\r\nevent: y\rdata: a\ndata: b\n\n: c\n"],
    "jobspec": [b'{"executable":"sh","arguments":["-c","true"],"environment":{"A":"b"},"resources":'
                b'{"node_count":1},"attributes":{"duration":60,"queue_name":"q"}}'],
}


def fuzz_head(data):
    """Heads and bodies of requests; beside h11, and cut at every place that the first byte names."""
    whole = peers.our_request(data)
    cut = peers.our_request(data, cut=data[0] % len(data)) if data else whole
    assert whole.verdict == cut.verdict, data
    peers.compare_http(data)


def fuzz_chunk(data):
    """Chunked bodies."""
    fuzz_head(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + data)


def fuzz_response(data):
    """Heads of responses, as an edge reads them from a bridge or a proxy."""
    parsed = radical_edge.parse_response_head(data)
    if parsed is not None:
        assert 100 <= parsed[0] <= 599 and all(name == name.lower() for name in parsed[1])


def fuzz_frame(data):
    """WebSocket frames, beside wsproto, and byte by byte."""
    for masked in (False, True):
        peers.compare_frames(data, masked)
    if len(data) < 200:
        assert peers.our_messages(data, True) == \
            peers.our_messages(data, True, tuple(range(len(data))))
    parser = FrameParser(masked=False, max_message=1000)
    parser.feed(data)
    while True:
        message = _or_none(parser.next_message)
        if message is None:
            break
        assert len(message[1]) <= 1000


def fuzz_message(data):
    """Messages of version 1, as either side reads them."""
    for payload in (data, data.decode(errors="replace")):
        message = _or_none(radical_edge.parse_message, payload)
        if message is not None:
            _or_none(radical_edge.parse_request, message)
            answer = _or_none(radical_edge.parse_response, message)
            if answer is not None:                # what was taken can be written as an answer
                head = radical_edge.encode_response_head(answer[0], answer[1].items())
                assert radical_edge.parse_response_head(head)[0] == answer[0]


def fuzz_msgpack(data):
    """msgpack: what is read can be written and read again, if the encoder is made for it."""
    value = radical_edge.parse_msgpack(data)
    try:
        again = radical_edge.encode_msgpack(value)
    except (ValueError, radical_edge.struct.error):
        return
    assert radical_edge.parse_msgpack(again) == value


def fuzz_wire(data):
    """Frames of version 2."""
    frame = radical_edge.parse_wire(data)
    if frame is None:
        return
    _or_none(lambda: frame.number)
    asked = _or_none(radical_edge.parse_wire_request, frame)
    if asked is not None:
        assert radical_edge.REQUEST_ID_PATTERN.fullmatch(asked.req_id), data
    head = _or_none(lambda: frame.head)
    if head is not None and frame.kind is radical_edge.Kind.RESPONSE:
        status, fields = [*head, None, None][:2]
        _or_none(lambda: (radical_edge.check_status(status),
                          radical_edge.parse_fields_object(fields)))


def fuzz_fields(data):
    """What stands in fields, paths and queries; NUL separates them."""
    parts = [part.decode("latin-1") for part in data.split(b"\0", 4)]
    authorization, cookie, path, query, ranges = [*parts, "", "", "", "", ""][:5]
    radical_edge.parse_authorization(authorization)
    radical_edge.parse_cookies(cookie)
    _or_none(radical_edge.parse_path, "/" + path)
    _or_none(radical_edge.parse_query, query)
    _or_none(radical_edge.parse_bridge_url, path)
    response = radical_edge.FileResponse.__new__(radical_edge.FileResponse)
    response.headers = {}
    bounds = _or_none(response._take_range, ranges, 1000)
    assert bounds is None or 0 <= bounds[0] < bounds[1] <= 1000
    radical_edge.connection_options({"connection": cookie})


def fuzz_events(data):
    """Event streams; the cuts make no difference."""
    whole, pieces = EventParser(max_event=10_000), EventParser(max_event=10_000)
    found = [event for at in range(0, len(data), 7) for event in pieces.feed(data[at:at + 7])]
    assert whole.feed(data) == found


def fuzz_jobspec(data):
    """Job specifications."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    try:
        plugins.parse_job_spec(value)
    except EdgeError as error:
        assert error.status == 422, error


def _or_none(function, *args):
    try:
        return function(*args)
    except (EdgeError, ProtocolError, ValueError):
        return None


TARGETS = {name[len("fuzz_"):]: function for name, function in list(globals().items())
           if name.startswith("fuzz_")}
PROMISED = {"response": ProtocolError, "msgpack": ProtocolError, "wire": ProtocolError,
            "events": ProtocolError}


def run_target(name, seconds, inputs):
    """Fuzz one target; does not return."""
    promised = PROMISED.get(name, ())

    def run(data):
        begin = time.process_time()               # not of the clock: others may use the processor
        try:
            TARGETS[name](data)
        except promised:
            pass
        assert time.process_time() - begin < SLOW_S, "too slow"

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(SEEDS.get(name, [])):
            (Path(corpus) / str(number)).write_bytes(seed)
        atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-timeout=600",
                       "-rss_limit_mb=1536", "-max_len=4096", "-print_final_stats=1",
                       f"-artifact_prefix={tempfile.gettempdir()}/fuzz-{name}-",
                       *(inputs or [corpus])], run)
        atheris.Fuzz()


def start_one(name, seconds):
    """Fuzz a target in a process of its own; return (its id, the file with its output)."""
    output = tempfile.TemporaryFile("w+", errors="replace")      # noqa: SIM115 - closed by tell()
    process = os.fork()                           # the parsers are instrumented already
    if not process:
        for standard in (1, 2):
            os.dup2(output.fileno(), standard)
        try:
            run_target(name, seconds, [])
        finally:                                  # where it returns, it has failed
            os._exit(1)
    return process, output


def tell(name, status, output):
    """Print how a target has ended; return whether it has failed."""
    with output:
        output.seek(0)
        lines = output.read().splitlines()
    runs = [line for line in lines if "number_of_executed_units" in line]
    print(f"{name:9} {'FAILED' if status else 'ok'} {''.join(runs)}", flush=True)
    if status:
        print("\n".join(lines[-40:]), flush=True)
    return bool(status)


def run_all(seconds, jobs):
    """Fuzz all targets, `jobs` at a time, each in a process of its own; return the exit status."""
    waiting, running, failed = list(TARGETS), {}, []
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            process, output = start_one(name, seconds)
            running[process] = name, output
        process, status = os.wait()
        name, output = running.pop(process)
        failed.append(tell(name, status, output))
    return 1 if any(failed) else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("input", nargs="*", help="files that made a target fail")
    options = parser.parse_args()
    if options.target == "all":
        sys.exit(run_all(options.seconds, options.jobs))
    run_target(options.target, options.seconds, options.input)


if __name__ == "__main__":
    main()
