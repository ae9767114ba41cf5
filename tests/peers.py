"""What h11 and wsproto make of the same bytes as we do, and where we mean to differ.

`compare_http()` and `compare_frames()` raise AssertionError for every disagreement that is not in
the lists here. test_parsers.py calls them with what hypothesis makes up, fuzz.py with what a
coverage-guided fuzzer does.
"""
from __future__ import annotations

import re
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import radical_edge
from radical_edge import EdgeError, FrameParser, Opcode, ProtocolError, RequestParser, parse_close


class Outcome(NamedTuple):
    """What a parser made of some bytes: "taken", "more" or "refused", and what it found."""
    verdict: str
    value: Any = None


class Difference(NamedTuple):
    """A disagreement that is meant: who takes the bytes, why, and how to know them."""
    taken_by: str
    reason: str
    applies: Callable[[bytes], bool]


# ---------------------------------------------------------------------------
# HTTP: the first request of a connection, and where it ends
# ---------------------------------------------------------------------------

def our_request(data: bytes, *, cut: int = 0) -> Outcome:
    """Return what RequestParser makes of `data`: (method, target, body, rest)."""
    parser, head, body = RequestParser(), None, bytearray()
    try:
        for piece in (data[:cut], data[cut:]) if cut else (data,):
            parser.feed(piece)
            for event in iter(parser.next_event, None):
                if event is radical_edge.END:
                    rest = parser.take_rest() + (data[cut:] if cut and piece is not data[cut:]
                                                 and len(piece) == cut else b"")
                    return Outcome("taken", (head.method, head.target, bytes(body), rest))
                if head is None:
                    head = event
                else:
                    body += event
    except EdgeError as error:
        return Outcome("refused", int(error.status))
    return Outcome("more")


def h11_request(data: bytes) -> Outcome:
    """Return what h11 makes of `data`."""
    import h11
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    if data:                                      # to h11, nothing is the end of the connection
        connection.receive_data(data)
    request, body = None, bytearray()
    try:
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA or event is h11.PAUSED:
                return Outcome("more")
            if isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                rest = connection.trailing_data[0]
                return Outcome("taken", (request.method.decode(), request.target.decode(),
                                         bytes(body), rest))
    except h11.RemoteProtocolError:
        return Outcome("refused")


def _head(data: bytes) -> bytes:
    return data.lstrip(b"\r\n").partition(b"\r\n\r\n")[0]


def _has(pattern: bytes) -> Callable[[bytes], bool]:
    compiled = re.compile(pattern, re.I | re.S | re.M)
    return lambda data: compiled.search(data) is not None


def _in_head(pattern: bytes) -> Callable[[bytes], bool]:
    compiled = re.compile(pattern, re.I | re.S | re.M)
    return lambda data: compiled.search(_head(data)) is not None


HTTP_DIFFERENCES = [
    Difference("us", "an empty line first is ignored (RFC 9112, section 2.2); h11 refuses it",
               lambda data: data.startswith(b"\r\n")),
    Difference("us", "spaces before a chunk extension are allowed (section 7.1.1)",
               _has(rb"^[0-9a-f]+[ \t]+;")),
    Difference("us", "h11 looks for an impossible request line only in what is complete",
               lambda data: b"\r\n\r\n" not in data),
    Difference("h11", "a bare LF or CR (section 2.2 allows it, and smuggling lives on it)",
               _has(rb"(?<!\r)\n|\r(?!\n)")),
    Difference("h11", "obs-fold: a server must refuse or replace it (section 5.2); h11 replaces",
               _has(rb"\r\n[ \t]")),
    Difference("h11", "Transfer-Encoding beside Content-Length or in HTTP/1.0 (section 6.1, 6.3)",
               _in_head(rb"^transfer-encoding:")),
    Difference("h11", "a repeated Content-Length, or a list of them (section 6.3)",
               _in_head(rb"^content-length:.*(^content-length:|,)")),
    Difference("h11", "a Content-Length of more than 18 digits",
               _in_head(rb"^content-length:[ \t]*[0-9]{19}")),
    Difference("h11", "a field that has one value stands there twice", _in_head(
        rb"^(content-type|authorization|origin|x-request-id|idempotency-key):.*^\1:")),
    Difference("h11", "control characters in a value (RFC 9110, section 5.5)",
               _has(rb"[\x01-\x08\x0e-\x1f\x7f]")),
    Difference("h11", "any version; h11 leaves it to the application",
               _in_head(rb"HTTP/(?!1\.)[0-9]\.[0-9]")),
    Difference("h11", "no Host in HTTP/1.2 and up; h11 asks for it in 1.1 alone",
               _in_head(rb"HTTP/1\.[2-9]")),
    Difference("h11", "a target that is neither a path nor an http URL without user and fragment",
               lambda data: not re.match(rb"[^ ]+ (/|https?://[^/?#@]+([/?][^#]*)?($| ))",
                                         _head(data), re.I)),
    Difference("h11", "a POST of HTTP/1.0 without a length (RFC 1945, section 7.2.2)",
               _in_head(rb"\A(POST|PUT|PATCH) [^ ]+ HTTP/1\.0")),
    Difference("h11", "a trailer with Transfer-Encoding, Content-Length or Host (RFC 9110, 6.5.1)",
               lambda data: re.search(rb"^(transfer-encoding|content-length|host):",
                                      data.lstrip(b"\r\n").partition(b"\r\n\r\n")[2],
                                      re.I | re.M) is not None),
    Difference("h11", "a chunk size of more than 15 digits, which h11 takes up to 20",
               _has(rb"^[0-9a-f]{16,20}\s*(;|\r)")),
    Difference("h11", "a chunk-size line, request line, head or trailer of more than our limits",
               lambda data: len(data) > radical_edge.MAX_CHUNK_LINE),
    Difference("h11", "more than 100 fields", lambda data: data.count(b"\r\n") > 100),
]


def compare_http(data: bytes) -> None:
    """Check that h11 and we decide the same of `data`, but for HTTP_DIFFERENCES."""
    ours, theirs = our_request(data), h11_request(data)
    if ours.verdict == theirs.verdict == "taken":
        # h11 gives the target as it came, and we its origin form
        target = re.sub(r"(?i)\Ahttps?://[^/?#@]+", "", theirs.value[1])
        target = target if target.startswith("/") else "/" + target
        assert ours.value == (theirs.value[0], target, *theirs.value[2:]), (data, ours, theirs)
        return
    if ours.verdict == theirs.verdict:
        return
    taken_by = "h11" if ours.verdict == "refused" else "us"
    if ours.verdict == "refused" or theirs.verdict == "refused":
        if any(item.applies(data) for item in HTTP_DIFFERENCES if item.taken_by == taken_by):
            return
    raise AssertionError((data, ours, theirs))


# ---------------------------------------------------------------------------
# WebSocket: messages and control frames until the first CLOSE
# ---------------------------------------------------------------------------

def our_messages(data: bytes, masked: bool, cuts: Tuple[int, ...] = ()) -> Outcome:
    """Return [(opcode, payload)] that FrameParser finds, or the close code it refuses with."""
    parser = FrameParser(masked=masked)
    found: List[Tuple[int, Any]] = []
    bounds = [0, *sorted(cuts), len(data)]
    try:
        for begin, end in zip(bounds, bounds[1:]):
            parser.feed(data[begin:end])
            for opcode, payload in iter(parser.next_message, None):
                found.append((int(opcode), parse_close(payload) if opcode is Opcode.CLOSE
                              else payload))
                if opcode is Opcode.CLOSE:
                    return Outcome("taken", found)
    except ProtocolError as error:
        return Outcome("refused", (found, error.code))
    return Outcome("taken", found)


def wsproto_messages(data: bytes, masked: bool) -> Outcome:
    """Return what wsproto finds."""
    from wsproto.frame_protocol import FrameProtocol, ParseFailed
    protocol = FrameProtocol(not masked, [])
    protocol.receive_bytes(data)
    found: List[Tuple[int, Any]] = []
    pieces: List[Any] = []
    try:
        for frame in protocol.received_frames():
            if frame.opcode.iscontrol():
                payload = frame.payload
                found.append((int(frame.opcode), (int(payload[0]), payload[1])
                              if frame.opcode == 8 else bytes(payload)))
                continue
            pieces.append(frame.payload)
            if frame.message_finished:
                empty = "" if frame.opcode == 1 else b""
                found.append((int(frame.opcode), empty.join(pieces)))
                pieces = []
    except ParseFailed as error:
        return Outcome("refused", (found, int(error.code)))
    return Outcome("taken", found)


FRAME_DIFFERENCES = [
    "text that is not UTF-8 is refused by wsproto before the message is whole; by us at its end",
    "a close code of 1012 to 1014 (IANA's registry) is refused by wsproto and not by us",
    "a message of more than MAX_MESSAGE is refused by us when its length is announced",
    "a bad frame head is refused by us after two bytes; by wsproto once its length is whole",
]


def compare_frames(data: bytes, masked: bool) -> None:
    """Check that wsproto and we decide the same of `data`, but for FRAME_DIFFERENCES."""
    ours, theirs = our_messages(data, masked), wsproto_messages(data, masked)
    if ours == theirs:
        return
    ours_found, our_code = _found(ours)
    their_found, their_code = _found(theirs)
    if their_code == 1007 and our_code in (None, 1002, 1007, 1009) and \
            ours_found[:len(their_found)] == their_found:
        return                                    # the message was not whole, or another trouble came
    if our_code == 1002 and their_code is None and ours_found == their_found and \
            wsproto_messages(data + bytes(14), masked).verdict == "refused":
        return                                    # the length was not whole
    if our_code == 1009 and ours_found == their_found[:len(ours_found)]:
        return
    if (our_code, their_code) == (1007, 1002) and ours_found == their_found:
        return                                    # such a code, and a reason that is not UTF-8
    last = ours_found[len(their_found):]
    if their_code == 1002 and last and last[0][0] == 8 and last[0][1][0] in (1012, 1013, 1014):
        return
    raise AssertionError((data.hex(), ours, theirs))


def _found(outcome: Outcome) -> Tuple[List[Any], Optional[int]]:
    return (outcome.value, None) if outcome.verdict == "taken" else outcome.value
