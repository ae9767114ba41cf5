"""Properties of the parsers, with hypothesis: what we take and refuse is what h11 and wsproto do,
but for what peers.py writes down; and nothing depends on how the network cuts the bytes.

    $ python -m pytest tests/test_parsers.py                     # RADICAL_EDGE_LONG=1: an hour
"""
from __future__ import annotations

import json
import os

import pytest

from test_edge import needs_module

hypothesis = needs_module("hypothesis", "security")
needs_module("h11")
needs_module("wsproto")

from hypothesis import HealthCheck, given, settings, strategies as st      # noqa: E402

import peers                                                              # noqa: E402
import plugins                                                            # noqa: E402
import radical_edge                                                       # noqa: E402
from radical_edge import EdgeError, EventParser, ProtocolError            # noqa: E402

EXAMPLES = 200_000 if os.environ.get("RADICAL_EDGE_LONG") else 200
# the fixture `home` is the same for all examples, which touch no file
few = settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=False,
               suppress_health_check=list(HealthCheck))


# ---------------------------------------------------------------------------
# What requests are made of: mostly right, and wrong in the ways that smugglers know
# ---------------------------------------------------------------------------

METHODS = st.sampled_from([b"GET", b"POST", b"PUT", b"HEAD", b"DELETE", b"OPTIONS", b"CONNECT",
                           b"get", b"G\x00T", b"P(ST", b"", b"X-1"])
TARGETS = st.sampled_from([b"/", b"/a/b?c=d", b"*", b"http://h/", b"http://h", b"https://h?q",
                           b"http://u@h/", b"http://h/#f", b"/#f", b"a", b"h:80", b"/\xe4", b"//",
                           b"/a b", b"", b"/%00", b"/..", b"ftp://h/", b"HTTP://H/a", b"http:///"])
VERSIONS = st.sampled_from([b"HTTP/1.1"] * 8 + [b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"http/1.1",
                                                b"HTTP/1.1 ", b"HTTP/1.", b"HTTP/11", b"", b"HTTP/1.2"])
ENDS = st.sampled_from([b"\r\n"] * 20 + [b"\n", b"\r", b"\r\r\n", b"\n\r", b""])
LINES = st.one_of(
    st.sampled_from([
        b"Host: h", b"Host: h", b"Host:", b"host: g", b"Host : h", b" Host: h", b"Connection: close",
        b"Connection: keep-alive, upgrade", b"Upgrade: websocket", b"Expect: 100-continue",
        b"Content-Length: 5", b"Content-Length: 0", b"Content-Length: 5, 5", b"Content-Length: +5",
        b"Content-Length: 0x5", b"Content-Length: 5 ", b"Content-Length:\t5", b"Content-Length: -1",
        b"Content-Length: 00005", b"Content-Length: 5\x0b", b"Content-Length: \xb2",
        b"Content-Length: 99999999999999999999999", b"Content-Length", b"Content_Length: 3",
        b"Transfer-Encoding: chunked", b"Transfer-Encoding: Chunked", b"Transfer-Encoding:chunked",
        b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: identity",
        b"Transfer-Encoding: chunked, chunked", b"Transfer-Encoding: \x0bchunked",
        b"Transfer-Encoding : chunked", b"Transfer-Encoding: chunked\x00", b"Transfer-Encoding: xchunked",
        b" folded", b"\tfolded", b"X: \x7f", b"X: a\x00b", b"X: \xff\xe4", b": empty", b"X", b"\xe4: x",
        b"Cookie: a=b", b"Cookie: c=d", b"Authorization: Bearer x", b"Authorization: Basic eDp5",
        b"Content-Type: a/b", b"Content-Type: c/d", b"X-Request-ID: 1"]),
    st.binary(max_size=12), st.builds(lambda a, b: a + b": " + b, st.binary(max_size=5),
                                      st.binary(max_size=8)))
SIZES = st.sampled_from([b"5", b"05", b"5;a=b", b"5 ;a", b"5 ", b"0x5", b"-5", b"+5", b"G", b"", b"5\t",
                         b"00000000000000005", b"ffffffffffffffff", b"5;\x00", b"5,", b"5\x0b", b"3"])
CHUNKS = st.builds(lambda size, end, data, after: size + end + data + after, SIZES, ENDS,
                   st.sampled_from([b"hello", b"abc", b"hell", b"hello!"]), ENDS)
BODIES = st.one_of(
    st.sampled_from([b"", b"hello", b"hell", b"helloGET /2 HTTP/1.1\r\nHost: h\r\n\r\n"]),
    st.builds(lambda chunks, last, trailer: b"".join(chunks) + last + trailer,
              st.lists(CHUNKS, max_size=3),
              st.sampled_from([b"0\r\n", b"0\n", b"00\r\n", b"0;x\r\n", b""]),
              st.sampled_from([b"\r\n", b"\n", b"T: v\r\n\r\n", b"T : v\r\n\r\n", b" x\r\n\r\n",
                               b"\r\nGET / HTTP/1.1\r\n", b""])))


@st.composite
def requests(draw):
    lines = [draw(METHODS) + b" " + draw(TARGETS) + b" " + draw(VERSIONS)]
    if draw(st.booleans()):
        lines.append(b"Host: h")
    lines += draw(st.lists(LINES, max_size=5))
    start = draw(st.sampled_from([b""] * 12 + [b"\r\n", b"\n", b" "]))
    return start + b"".join(line + draw(ENDS) for line in lines) + draw(ENDS) + draw(BODIES)


@st.composite
def good_requests(draw):
    """Requests without mistakes, so that agreement is not only about refusing."""
    method = draw(st.sampled_from([b"GET", b"POST", b"PUT", b"DELETE"]))
    body = draw(st.binary(max_size=200))
    lines = [method + b" /" + draw(st.from_regex(rb"[a-z/%0-9=&?]{0,20}", fullmatch=True))
             + b" HTTP/1.1", b"Host: h"]
    lines += draw(st.lists(st.from_regex(rb"X-[a-z]{1,8}:[ \t]{0,2}[!-~]{0,20}[ \t]{0,2}",
                                         fullmatch=True), max_size=5))
    if not body:
        encoded = b""
    elif draw(st.booleans()):
        lines.append(b"Content-Length: %d" % len(body))
        encoded = body
    else:
        lines.append(b"Transfer-Encoding: chunked")
        at = draw(st.integers(0, len(body)))
        pieces = [piece for piece in (body[:at], body[at:]) if piece]
        encoded = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    return b"\r\n".join([*lines, b"", b""]) + encoded, body


@few
@given(requests())
def test_h11_and_we_decide_the_same_but_for_what_is_written_down(data):
    peers.compare_http(data)


@few
@given(good_requests(), st.binary(max_size=30))
def test_h11_and_we_read_the_same_from_good_requests(request_and_body, rest):
    data, body = request_and_body
    ours = peers.our_request(data + rest)
    assert ours.verdict == "taken" and ours.value[2:] == (body, rest)
    peers.compare_http(data + rest)


@few
@given(requests(), st.data())
def test_what_a_request_is_does_not_depend_on_its_cuts(data, draw):
    whole = peers.our_request(data)
    cut = draw.draw(st.integers(0, len(data)))
    in_two = peers.our_request(data, cut=cut)
    if "refused" in (whole.verdict, in_two.verdict):             # the status may tell of another part
        assert whole.verdict == in_two.verdict
    else:
        assert whole == in_two


# ---------------------------------------------------------------------------
# WebSocket frames
# ---------------------------------------------------------------------------

PAYLOADS = st.one_of(st.binary(max_size=130), st.text(max_size=40).map(str.encode),
                     st.sampled_from([b"\xc3", b"\xa4", b"\xed\xa0\x80", b"\x03\xe8", b"\x03\xed",
                                      b"\x03\xf4", b"\x0b\xb8ok", b"\x03\xe8\xff", b"\x13\x88", b"x" * 126,
                                      b"x" * 65536]))


@st.composite
def frames(draw, masked):
    first = draw(st.sampled_from([0x81, 0x82, 0x01, 0x02, 0x00, 0x80, 0x89, 0x8A, 0x88, 0x09, 0xC1,
                                  0x83, 0x8B, 0x91]))
    payload = draw(PAYLOADS)
    mask = bool(masked) ^ (draw(st.integers(0, 30)) == 0)
    size = len(payload)
    forms = [form for form, fits in ((0, size < 126), (2, size < 65536), (8, True)) if fits]
    form = draw(st.sampled_from([forms[0]] * 9 + forms))
    length = bytes([size | mask << 7]) if form == 0 else \
        bytes([(126 if form == 2 else 127) | mask << 7]) + size.to_bytes(form, "big")
    key = draw(st.binary(min_size=4, max_size=4)) if mask else b""
    body = radical_edge.apply_mask(payload, key) if mask else payload
    return bytes([first]) + length + key + body


@few
@given(st.booleans().flatmap(lambda masked: st.tuples(
    st.just(masked), st.lists(frames(masked), max_size=6).map(b"".join), st.integers(0, 3))))
def test_wsproto_and_we_decide_the_same_but_for_what_is_written_down(case):
    masked, data, missing = case
    peers.compare_frames(data[:len(data) - missing] if missing else data, masked)


@few
@given(st.booleans(), st.binary(max_size=60))
def test_wsproto_and_we_decide_the_same_of_noise(masked, data):
    peers.compare_frames(data, masked)


@few
@given(st.lists(frames(True), max_size=4).map(b"".join), st.lists(st.integers(0, 400), max_size=5))
def test_what_frames_hold_does_not_depend_on_their_cuts(data, cuts):
    cuts = tuple(min(cut, len(data)) for cut in cuts)
    assert peers.our_messages(data, True) == peers.our_messages(data, True, cuts)


# ---------------------------------------------------------------------------
# Messages, msgpack, version 2, events, job specifications: nothing but the errors they promise
# ---------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800"),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12)
NAMES = st.sampled_from(["type", "req_id", "method", "path", "headers", "body", "is_binary", "status"])
MESSAGES = st.dictionaries(NAMES, JSON | st.sampled_from(["request", "response", "GET", "/a", 200]))


@few
@given(MESSAGES)
def test_a_message_of_any_content_is_read_or_refused(value):
    try:
        message = radical_edge.parse_message(json.dumps(value))
    except ProtocolError:
        return
    for parse in (radical_edge.parse_request, radical_edge.parse_response):
        try:
            parse(message)
        except ProtocolError:
            pass


MSGPACK = st.recursive(
    st.none() | st.booleans() | st.integers(-2**31, 2**31 - 1) | st.text() | st.binary(),
    lambda children: st.dictionaries(st.text(), children, max_size=4), max_leaves=12)


@few
@given(MSGPACK)
def test_msgpack_comes_back_as_it_was_written_and_cut_is_refused(value):
    data = radical_edge.encode_msgpack(value)
    assert radical_edge.parse_msgpack(data) == value
    for wrong in (data[:-1], data + b"\xc0"):
        with pytest.raises(ProtocolError):
            radical_edge.parse_msgpack(wrong)


@few
@given(st.binary(max_size=60))
def test_msgpack_of_noise_is_read_or_refused(data):
    try:
        radical_edge.parse_msgpack(data)
    except ProtocolError:
        pass


@few
@given(st.sampled_from(list(radical_edge.Kind)), st.integers(0, 2**32 - 1),
       st.lists(st.text(), max_size=3) | st.none(), st.binary(max_size=40), st.booleans())
def test_a_frame_of_version_2_comes_back_as_it_was_encoded(kind, stream, head, body, end):
    frame = radical_edge.parse_wire(radical_edge.encode_wire(kind, stream, head, end=end) + body)
    assert (*frame[:3], frame.head, frame.body) == (kind, end, stream, head or [], body)


@few
@given(st.binary(max_size=80))
def test_a_frame_of_version_2_of_noise_is_read_or_refused(data):
    try:
        frame = radical_edge.parse_wire(data)
        if frame is not None:
            frame.head
            frame.number
    except ProtocolError:
        pass


@few
@given(st.lists(st.tuples(st.text(), st.integers(0, 10**9) | st.none()), max_size=5),
       st.lists(st.integers(0, 300), max_size=4))
def test_events_come_back_as_they_were_encoded_whatever_the_cuts(events, cuts):
    events = [(text.replace("\r\n", "\n").replace("\r", "\n"), number) for text, number in events]
    data = b"".join(radical_edge.encode_event(text, number) for text, number in events)
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    parser, found = EventParser(), []
    for begin, end in zip(bounds, bounds[1:]):
        found += parser.feed(data[begin:end])
    expected = [text.encode(errors="replace").decode() for text, _ in events]
    assert [event.data for event in found] == expected


@few
@given(st.dictionaries(st.sampled_from([
    "executable", "arguments", "directory", "environment", "inherit_environment", "stdin_path",
    "stdout_path", "name", "pre_launch", "resources", "attributes", "nosuch"]), JSON) | JSON)
def test_a_job_of_any_content_is_read_or_refused_by_name(value):
    try:
        spec = plugins.parse_job_spec(value)
    except EdgeError as error:
        assert error.status == 422
    else:
        assert isinstance(spec, dict) and spec["executable"]


@few
@given(st.text(max_size=40), st.binary(max_size=40))
def test_small_parsers_raise_nothing_but_what_they_promise(text, data):
    for parse, value in ((radical_edge.parse_path, "/" + text), (radical_edge.parse_query, text),
                         (radical_edge.parse_authorization, text), (radical_edge.parse_cookies, text),
                         (radical_edge.parse_response_head, data),
                         (radical_edge.parse_bridge_url, text)):
        try:
            parse(value)
        except (EdgeError, ProtocolError, ValueError):
            pass
