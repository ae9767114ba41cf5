#!/usr/bin/env python3
"""Radical Edge: reach supercomputers from anywhere, with one Python file and no installs.

Usage:

    python3 radical_edge.py --bridge                  the meeting point of clients and edges
    python3 radical_edge.py --edge --url URL          on a login or compute node: dials out to it
    python3 radical_edge.py --call EDGE/PLUGIN/ROUTE  a client; so are curl and this module

Connections:

    client --HTTP--> bridge <--one outgoing WebSocket-- edge --> plugins --> jobs, files, metrics
           <--SSE---

Threads of a bridge: `http.server` accepts, and a short-lived thread per new connection does what
may block (TLS handshake, the first request head). Then the *loop*, one thread running asyncio, owns
the socket: it parses later requests, proxies them to edges, and serves event streams, so ten
thousand idle connections cost no thread.

Threads of an edge: the *transport* loop owns the link to the bridge and nothing else, so that
heartbeats never wait. Every plugin has a thread and loop of its own; its plain `def` handlers run
in worker threads. A plugin that blocks delays only itself.

`--bridge --edge` are two processes, the edge forked off the bridge: a plugin may hold or crash its
interpreter, and the bridge serves on.

What must survive the process (notifications, events, answers) goes through a `Journal`, which has a
thread that writes, so that a slow or full disk delays nothing but what must be on it first.

The file reads from top to bottom, and each section uses only what stands above it:

    1. Constants and errors          7. Sockets on a loop, dialling
    2. WebSocket frames              8. Security: tokens, TLS, browsers
    3. HTTP/1.1 heads and bodies     9. State: journals, locks, counters
    4. Event streams                10. Routing, requests, responses
    5. Messages between the two     11. Plugins and their host
    6. Threads that run a loop      12. Edge   13. Bridge   14. Client   15. Command line
"""
from __future__ import annotations

import os
import sys

if (__name__ == "__main__" and __spec__ is None and {"--bridge", "--edge"} & set(sys.argv[1:])
        and os.path.basename(os.path.realpath(__file__)) == "radical_edge.py"):
    # What is to run for long is started anew, in the same process, as a module: of that, Python
    # keeps the compiled code for the next start, and does not keep the syntax tree (12 MB). What is
    # not compiled yet is now, for some of the memory which that takes is never given back.
    script = os.path.realpath(__file__)
    folder = os.path.dirname(script)
    if os.access(folder, os.W_OK) and not sys.dont_write_bytecode:
        from importlib.machinery import SourceFileLoader
        for source in (script, f"{folder}/plugins.py"):
            try:
                SourceFileLoader("_", source).get_code("_")
            except (OSError, SyntaxError):        # who needs the file says what is wrong with it
                pass
    forget = ""
    if "MALLOC_ARENA_MAX" not in os.environ:
        # GNU's malloc would give each thread an arena, and each of them holds on to some memory.
        # What this process starts must not inherit that, so it is taken out again at once.
        os.environ["MALLOC_ARENA_MAX"] = "1"
        forget = "os.environ.pop('MALLOC_ARENA_MAX'); "
    os.execv(sys.executable, [
        # what stood before the script's name; Python 3.9 does not know
        *(getattr(sys, "orig_argv", [sys.executable])[:-len(sys.argv)] or [sys.executable]),
        # path[0] is the current directory here: it must not be searched
        "-c", f"import os, sys; {forget}sys.path[0] = sys.argv.pop(1).rpartition('/')[0]; "
        "import radical_edge; sys.exit(radical_edge.main())", script, *sys.argv[1:]])

import argparse
import asyncio
import atexit
import base64
import bisect
import codecs
import collections
import concurrent.futures
import contextlib
import contextvars
import enum
import errno
import fnmatch
import functools
import gc
import hashlib
import hmac
import inspect
import itertools
import json
import logging
import math
import random
import re
import secrets
import select
import selectors
import signal
import socket
import ssl
import stat
import struct
import subprocess
import threading
import time
import types
import urllib.parse
from http import HTTPStatus
from pathlib import Path
from typing import (TYPE_CHECKING, Any, AsyncIterator, Callable, Deque, Dict, Iterable, Iterator,
                    List, NamedTuple, Optional, Set, Tuple, Type, Union)

if TYPE_CHECKING:                                 # imported where they are used: an edge at rest
    import http.client                            # has no use for them, nor for the 3 MiB
    import urllib.request

if __name__ == "__main__":                      # plugins import it by its name: the same object
    sys.modules["radical_edge"] = sys.modules["__main__"]

__version__ = "0.1.0"

__all__ = [
    "BadGateway", "BadRequest", "Bridge", "BridgeClient", "ClientManagedPlugin", "Conflict",
    "ContentTooLarge", "DeadlineExceeded", "Edge", "EdgeClient", "EdgeError", "EdgeOffline",
    "FileResponse", "Forbidden", "Gone", "HTTPException", "InsufficientStorage", "JSONResponse",
    "LengthRequired", "MethodNotAllowed", "NotFound", "NotInstalled", "Plugin", "PluginClient",
    "PluginHost", "PluginSession", "Policy", "PreconditionFailed", "ProtocolError", "Request",
    "Response",
    "StreamingResponse", "TokenStore", "TooManyRequests", "Tunnel", "Unauthorized", "Unavailable",
    "Unprocessable", "Uplink", "call", "delete", "events", "get", "list_edges", "list_plugins",
    "main", "note_for_audit", "plugin", "post", "put", "repeatable", "write_private",
]

log = logging.getLogger("radical_edge")

# ---------------------------------------------------------------------------
# 1. Constants and errors. What is a limit, how long is too long, and which status an error has.
# ---------------------------------------------------------------------------

DEFAULT_PORT = 8000
BRIDGE_NAME = "bridge"         # the name under which the bridge's own plugins are reached

MAX_TARGET = 8 * 1024          # bytes of a request line; RFC 9112, section 3, asks for 8000 or more
MAX_HEAD = 32 * 1024           # bytes of a request or response head
MAX_FIELDS = 100               # field lines in one head
HEADS_KEPT = 256               # heads and paths of each kind that are known without being parsed again
MAX_KEPT_HEAD = 2048           # bytes of one
MAX_CHUNK_LINE = 256           # bytes of a chunk-size line with its extensions
MAX_BODY = 64 * 1024 * 1024    # bytes of a body, which wire version 1 holds in memory whole
MAX_BODIES = 256 * 1024 * 1024   # bytes of all bodies that a bridge holds whole at one time, and
                               # of all whole answers that clients have not read
MAX_OWN_BODY = 64 * 1024       # bytes of a body for the bridge itself, which asks no token of some
MAX_MESSAGE = 96 * 1024 * 1024  # bytes of a WebSocket message: a base64 body and its surroundings
MAX_OLD_MESSAGE = 10 * 1024 * 1024   # bytes of one that radical.edge 0.x takes: more ends its link
MAX_LINK_BUFFER = 128 * 1024 * 1024  # bytes waiting to be sent to one edge; more is a stuck link
MAX_PIPELINED = 64 * 1024      # bytes read ahead of the request that is being answered
MAX_EVENTS = 50_000            # events kept for subscribers that are slow or come back
MAX_EVENT_BYTES = 48 * 1024 * 1024   # bytes of the events kept
MAX_UNSENT_EVENTS = 50_000     # notifications an edge keeps until all its bridges have them
MAX_UNSENT_BYTES = 48 * 1024 * 1024  # bytes of them
NOTIFY_WINDOW = 256            # notifications on their way: a reply does not queue behind more
SUBSCRIBER_SLICE = 200         # subscribers served in one turn of the loop
MAX_NOTIFICATION = 1024 * 1024  # bytes of one notification
MAX_OPENING = 512              # connections in their handshake or first request, a thread each
MAX_CONNECTIONS = 16_384       # open client connections
MAX_PER_ADDRESS = 2048         # of one address; this machine's are exempt, for proxies end here
MAX_RATE = 20_000              # requests a second with one token
MAX_SESSIONS = 1000            # sessions of one token in one plugin
MAX_JOBS = 10_000              # jobs of one session
MAX_EDGES = 4096               # edges registered with one bridge, or about to
MAX_REGISTER = 8 * 1024 * 1024  # bytes of what an edge says of itself, UI modules included
MAX_DESCRIBED = 512 * 1024     # bytes of it that every client is told
MAX_TOLD = 32 * 1024 * 1024    # bytes of what all edges of one token say of themselves, and of
                               # what is on its way from those that have not registered
MAX_EDGE_PLUGINS = 256         # plugins of one edge
MAX_NOTIFY_RATE = 10_000       # notifications a second from one edge
NOTIFY_BURST = 50_000          # of which so many may come at once
MAX_COUNTED_ROUTES = 1000      # routes that /metrics tells apart; edges name theirs as they like
MAX_STREAMS = 1024             # bodies and answers of one link on their way in pieces
MAX_HELD = 64 * 1024 * 1024    # bytes of the bodies that wait at an edge, for one link
MAX_PENDING = 8192             # requests waiting for one edge
MAX_ONCE = 20_000              # answers kept for retries
MAX_ONCE_BYTES = 24 * 1024 * 1024    # bytes of them
MAX_WORKERS = 64               # threads that run one plugin's plain `def` handlers
MAX_HELPERS = min(32, (os.cpu_count() or 1) + 4)   # that its coroutines may use; as in asyncio
MAX_EXPIRED = 4096             # expired session ids remembered, so that they are 410 and not 404
MAX_UI_CONFIG = 64 * 1024      # bytes of a plugin's description of its page, as JSON
MAX_UI_MODULE = 512 * 1024     # bytes of a plugin's own JavaScript for its page
MAX_PRIVATE_FILE = 256 * 1024 * 1024  # bytes of a token or state file
READ_SIZE = 64 * 1024          # bytes asked of a socket at once; more costs page faults
MAX_RECORD = 16 * 1024         # bytes in a TLS record (RFC 8446, section 5.1)
DATA_SIZE = 64 * 1024          # bytes of a body in one frame of wire version 2
INITIAL_WINDOW = 64 * 1024     # bytes of a body that may be sent before the peer gives credit
MAX_WINDOW = 1024 * 1024       # bytes on their way in one stream that is read fast
WINDOW_SUM = 16 * 1024 * 1024  # bytes on their way in all streams, if each has more than the first
LINK_ROOM = 256 * 1024         # bodies wait while so many bytes are unsent: answers go before them
MAX_PIECES = 64                # buffers given to the system in one call; it takes up to 1024
FILE_PIECE = 256 * 1024        # bytes read from a file at once
MAX_WHOLE = 64 * 1024          # bytes of a body that goes in one frame with its head
MAX_FRAME = 16 * 1024 * 1024   # bytes of a message of wire version 2

HANDSHAKE_S = 10.0             # TCP, TLS, upgrade, registration, each
HEAD_S = 10.0                  # a request's head, from its first byte to its last
FIRST_HEAD_S = 1.0             # a new connection's thread waits so long; then the loop does
BODY_IDLE_S = 30.0             # a request body must grow by MIN_PROGRESS within so long
MIN_PROGRESS = 1024            # bytes; fewer would let a client hold a connection with a drip
MIN_BODY_RATE = 500            # bytes a second of a request body, averaged over BODY_RATE_S
BODY_RATE_S = 120.0            # long enough for the pauses of a bad line
LINGER_S = 1.0                 # a closing connection reads on, or its answer may be lost
KEEP_ALIVE_S = 120.0           # an idle client connection
REQUEST_S = 600.0              # a proxied request; see --request-timeout, X-Request-Timeout
HEARTBEAT_S = 15.0             # event streams and links; common proxies drop what is idle for 60 s
LINK_DEAD = 2                  # missed heartbeats that end a link
OLD_LINK_DEAD_S = 600.0        # silence that ends one to an edge of version 1, whose plugins may
                               # block its heartbeat; its own bridges wait as long
ONCE_S = 24 * 3600.0           # an answer is kept so long for a retry with its Idempotency-Key
GRACE_S = 10.0                 # requests wait so long for an edge that has lost its link
BACKOFF_S = (0.25, 30.0)       # first and longest pause between an edge's attempts to connect
STOP_S = 2.0                   # a clean end; what still runs then is left behind
EXIT_S = 0.4                   # then, what others have registered with atexit
TOPOLOGY_S = 0.05              # changes within so long are told in one message
ANSWER_LOG_S = 0.005           # a line for an answer is written so late, and delays no request
SWEEP_S = 0.25                 # deadlines are looked at so often
RELOAD_S = 1.0                 # token files are looked at so often
TOKENS_LOCK_S = 10.0           # who changes a token file waits so long for others that do
LOGIN_FAILURES = 10            # wrong tokens an address has, per LOGIN_WINDOW_S
LOGIN_WINDOW_S = 60.0
SIGNATURE_S = 300.0            # a client's signature is good so long; clocks may differ so much
MAX_NONCES = 100_000           # signatures remembered for that time
COOKIE_S = 12 * 3600           # a browser's sign-in lasts so long

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9._:@/+-]{1,128}")

# first path segments that are the bridge's own, and so no names of edges
RESERVED_NAMES = frozenset((BRIDGE_NAME, "edge", "edges", "events", "plugins", "auth", "logout",
                            "health", "metrics", "openapi.json", "register", "favicon.ico"))
ROLE_EDGE, ROLE_BRIDGE = "edge", "bridge"


# what --limit may change: {name: (constant above, what it is)}. They are set before anything starts
LIMITS: Dict[str, Tuple[str, str]] = {
    "connections": ("MAX_CONNECTIONS", "open client connections (503)"),
    "per-address": ("MAX_PER_ADDRESS", "of one address, this machine's own excepted (429)"),
    "head": ("MAX_HEAD", "bytes of a request's head (431)"),
    "body": ("MAX_BODY", "bytes of a body that a route takes whole (413)"),
    "request-rate": ("MAX_RATE", "requests a second with one token (429)"),
    "sessions": ("MAX_SESSIONS", "sessions of one token in one plugin (429)"),
    "jobs": ("MAX_JOBS", "jobs of one session (429)"),
    "notification": ("MAX_NOTIFICATION", "bytes of one notification (dropped)"),
    "notification-rate": ("MAX_NOTIFY_RATE", "notifications a second from one edge (delayed)"),
    "registrations": ("MAX_EDGES", "edges registered with one bridge (503)"),
    "pending": ("MAX_PENDING", "requests that wait for one edge (503)"),
    "head-time": ("HEAD_S", "seconds for a request's head (408)"),
    "body-time": ("BODY_IDLE_S", "seconds for each KiB of a body (408)"),
    "body-rate": ("MIN_BODY_RATE", "bytes a second of a body, on average, at least (408)"),
    "handshake-time": ("HANDSHAKE_S", "seconds for TCP, TLS, upgrade, registration, each"),
    "login": ("LOGIN_FAILURES", "wrong tokens an address has in a minute (429)"),
}


def set_limit(text: str) -> None:
    """Change a limit of this process, "NAME=NUMBER". Raises ValueError."""
    name, _, number = text.partition("=")
    if name not in LIMITS:
        raise ValueError(f"--limit {text}: take NAME=NUMBER, with one of {', '.join(LIMITS)}")
    constant = LIMITS[name][0]
    kind = type(globals()[constant])
    if not re.fullmatch(r"[0-9]{1,12}" + (r"(\.[0-9]{1,6})?" if kind is float else ""), number) or \
            not float(number):
        raise ValueError(f"--limit {name}: {number!r} is not a "
                         f"{'number' if kind is float else 'whole number'} above 0")
    globals()[constant] = kind(number)


class EdgeError(RuntimeError):
    """What went wrong, with its HTTP status and a `detail` that says what to do about it.

    `request_id` names the request in every log, where it is known. `headers` go out with the reply.
    `limit`: which of LIMITS was reached, if it was one; the reply names it as X-Limit.
    Raise it anywhere in a plugin: the caller sees the status and the detail.
    """

    status: int = HTTPStatus.INTERNAL_SERVER_ERROR
    limit: str = ""

    def __init__(self, detail: str = "", status: Optional[int] = None, *,
                 request_id: Optional[str] = None, headers: Optional[Dict[str, str]] = None,
                 limit: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        self.request_id = request_id
        self.headers = dict(headers or {})
        if status is not None:
            self.status = int(status)
        limit = limit or self.limit
        if limit:
            self.limit = self.headers["X-Limit"] = limit

    def __str__(self) -> str:
        return f"HTTP {int(self.status)}: {self.detail}"

    def to_dict(self) -> Dict[str, Any]:
        """Return the body of every error reply: {"error", "status_code", "detail"}."""
        return {"error": True, "status_code": int(self.status), "detail": self.detail}


class BadRequest(EdgeError):
    """The request cannot be read: its syntax, framing or JSON is wrong."""
    status = HTTPStatus.BAD_REQUEST


class Unauthorized(EdgeError):
    """No token, or one that is not known (any more)."""
    status = HTTPStatus.UNAUTHORIZED


class Forbidden(EdgeError):
    """The token is good, but not for this."""
    status = HTTPStatus.FORBIDDEN


class NotFound(EdgeError):
    """No such edge, plugin, route, session or thing."""
    status = HTTPStatus.NOT_FOUND


class MethodNotAllowed(EdgeError):
    """The path exists, but not for this method; `Allow` names those that do."""
    status = HTTPStatus.METHOD_NOT_ALLOWED


class RequestTimeout(EdgeError):
    """The client began a request and did not finish it in time."""
    status = HTTPStatus.REQUEST_TIMEOUT


class Conflict(EdgeError):
    """The request does not fit the present state."""
    status = HTTPStatus.CONFLICT


class Gone(EdgeError):
    """The session was there, and has expired."""
    status = HTTPStatus.GONE


class LengthRequired(EdgeError):
    """A body that could not be delimited."""
    status = HTTPStatus.LENGTH_REQUIRED


class PreconditionFailed(EdgeError):
    """What the request is about is not what the client thinks it is (If-Match)."""
    status = HTTPStatus.PRECONDITION_FAILED


class ContentTooLarge(EdgeError):
    """The body is larger than this route or this wire takes."""
    status, limit = HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body"


class TargetTooLong(EdgeError):
    """The request line is longer than MAX_TARGET."""
    status, limit = HTTPStatus.REQUEST_URI_TOO_LONG, "head"


class Unprocessable(EdgeError):
    """A field or query value is missing or wrong; the detail begins with its name."""
    status = HTTPStatus.UNPROCESSABLE_ENTITY


class TooManyRequests(EdgeError):
    """Too much at once, or too many wrong tokens; `Retry-After` says when to come back."""
    status = HTTPStatus.TOO_MANY_REQUESTS


class HeadTooLarge(EdgeError):
    """The head is larger than MAX_HEAD, or has more than MAX_FIELDS fields."""
    status, limit = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "head"


class NotInstalled(EdgeError):
    """This needs an optional package; the detail says which and how to get it."""
    status = HTTPStatus.NOT_IMPLEMENTED


class BadGateway(EdgeError):
    """The edge, or what stands behind a plugin, gave an answer that makes no sense."""
    status = HTTPStatus.BAD_GATEWAY


class Unavailable(EdgeError):
    """Not now: something is full, starting or ending."""
    status = HTTPStatus.SERVICE_UNAVAILABLE


class EdgeOffline(Unavailable):
    """The edge is known, but its link is down."""


class InsufficientStorage(EdgeError):
    """A disk or a quota is full; nothing is left half-written."""
    status = HTTPStatus.INSUFFICIENT_STORAGE


class DeadlineExceeded(EdgeError):
    """The edge did not answer within the request's deadline."""
    status = HTTPStatus.GATEWAY_TIMEOUT


class HTTPException(EdgeError):
    """An error with any status, under the name and signature that FastAPI plugins use."""

    def __init__(self, status_code: int, detail: str = "",
                 headers: Optional[Dict[str, str]] = None) -> None:
        super().__init__(detail, status_code, headers=headers)

    @property
    def status_code(self) -> int:
        """The HTTP status."""
        return int(self.status)


class ProtocolError(Exception):
    """The peer broke the protocol. `code` is the WebSocket close code to leave with."""

    def __init__(self, reason: str, code: int = 1002) -> None:
        super().__init__(reason)
        self.code = code


def _retry_after(seconds: float) -> Dict[str, str]:
    return {"Retry-After": str(max(1, round(seconds)))}


# ---------------------------------------------------------------------------
# 2. WebSocket frames (RFC 6455, section 5): bytes in, frames and messages out. No sockets.
# ---------------------------------------------------------------------------

WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"    # RFC 6455, section 1.3
MAX_CONTROL_PAYLOAD = 125     # bytes; RFC 6455, section 5.5


class Opcode(enum.IntEnum):
    """Frame opcodes (RFC 6455, section 11.8)."""
    CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA


class CloseCode(enum.IntEnum):
    """The close codes used here (RFC 6455, section 7.4.1; 4000 and up are ours)."""
    NORMAL, GOING_AWAY, PROTOCOL_ERROR, INVALID_DATA = 1000, 1001, 1002, 1007
    POLICY, TOO_BIG, INTERNAL = 1008, 1009, 1011
    REPLACED = 4001


# codes that may stand in a close frame; 1004 to 1006 and 1015 may not (RFC 6455, section 7.4)
_VALID_CLOSE = (range(1000, 1004), range(1007, 1015), range(3000, 5000))
_OPCODES = {int(opcode): opcode for opcode in Opcode}     # a look-up is faster than Opcode(value)
_WHOLE = {0x80 | opcode: opcode for opcode in (Opcode.TEXT, Opcode.BINARY)}     # by first byte
NO_MASK = bytes(4)            # a key that changes nothing; see _BridgeLink.send_wire()


def apply_mask(payload: bytes, key: bytes) -> bytes:
    """Return `payload` XORed with the repeated 4-byte `key`; its own inverse (section 5.3).

    One XOR of two large integers: the fastest way that the standard library has.
    """
    size = len(payload)
    pad = (key * (size // 4 + 1))[:size]
    mixed = int.from_bytes(payload, "little") ^ int.from_bytes(pad, "little")
    return mixed.to_bytes(size, "little")


def encode_frame(opcode: int, payload: bytes, *, mask: Optional[bytes] = None,
                 fin: bool = True) -> bytes:
    """Return one frame (RFC 6455, section 5.2).

    mask: the 4-byte key that a client must use, None for a server.
    Raises ValueError for a control frame that is too long or not final (section 5.5).
    """
    head = encode_frame_head(opcode, len(payload), mask=mask, fin=fin)
    return head + (apply_mask(payload, mask) if mask and mask != NO_MASK else payload)


def encode_frame_head(opcode: int, size: int, *, mask: Optional[bytes] = None,
                      fin: bool = True) -> bytes:
    """Return what stands before a frame's payload of `size` bytes, which the caller masks."""
    if opcode & 0x8 and (size > MAX_CONTROL_PAYLOAD or not fin):
        raise ValueError(f"control frame of {size} bytes, fin={fin}")
    first = (0x80 if fin else 0) | opcode
    masked = 0x80 if mask else 0
    if size < 126:
        head = bytes((first, masked | size))
    elif size < 0x10000:
        head = struct.pack("!BBH", first, masked | 126, size)
    else:
        head = struct.pack("!BBQ", first, masked | 127, size)
    return head + mask if mask else head


def encode_close(code: int, reason: str = "", *, mask: Optional[bytes] = None) -> bytes:
    """Return a close frame; the reason is cut to what fits (RFC 6455, section 5.5.1)."""
    text = reason.encode()[:MAX_CONTROL_PAYLOAD - 2].decode(errors="ignore")   # whole characters
    return encode_frame(Opcode.CLOSE, struct.pack("!H", code) + text.encode(), mask=mask)


def parse_close(payload: bytes) -> Tuple[int, str]:
    """Return (code, reason) of a close frame's payload; (1005, "") when it is empty.

    Raises ProtocolError for a code that must not be sent or a reason that is not UTF-8.
    """
    if not payload:
        return 1005, ""
    code = int.from_bytes(payload[:2], "big")
    if len(payload) == 1 or not any(code in codes for codes in _VALID_CLOSE):
        raise ProtocolError(f"close code {payload[:2].hex()}")
    return code, _decode_utf8(payload[2:])


def _decode_utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ProtocolError("text that is not UTF-8", CloseCode.INVALID_DATA) from None


class FrameParser:
    """Turns bytes into messages and control frames, whatever the cuts between the bytes.

    masked: True for the server's side, whose peer must mask; False for the client's (section 5.1).
    max_message: bytes; more is refused when its length is announced, before it is buffered.
    """

    def __init__(self, *, masked: bool, max_message: int = MAX_MESSAGE) -> None:
        self._masked = masked
        self.max_message = max_message
        self._buffer: Union[bytes, bytearray] = b""
        self._start = 0                           # where in _buffer the next frame begins
        self._fragments = bytearray()             # one buffer: objects of few bytes would cost 20
        self._fragments_size = 0                  # times their payload
        self._opcode: Optional[Opcode] = None     # of the fragmented message under way

    def feed(self, data: bytes) -> None:
        """Add bytes from the peer; then call next_message() until it returns None."""
        if self._start == len(self._buffer):
            self._buffer, self._start = data, 0   # all was read: nothing need be moved or copied
            return
        if self._start > READ_SIZE or isinstance(self._buffer, bytes):
            self._buffer, self._start = bytearray(memoryview(self._buffer)[self._start:]), 0
        self._buffer += data

    def next_message(self) -> Optional[Tuple[Opcode, Union[str, bytes]]]:
        """Return (TEXT, str), (BINARY, bytes) or a control frame; None when more bytes are needed.

        Control frames come out between the fragments of a message, as they were sent (section 5.4).
        Raises ProtocolError, after which the connection must be closed with its `code`.
        """
        while self._start < len(self._buffer):
            frame = self._next_frame()
            if frame is None:
                return None
            opcode, fin, payload = frame
            if opcode >= Opcode.CLOSE or opcode is Opcode.BINARY and fin and self._opcode is None:
                return opcode, payload
            message = self._join(opcode, fin, payload)
            if message is not None:
                return message
        return None

    def _next_frame(self) -> Optional[Tuple[Opcode, bool, bytes]]:
        buffer, start = self._buffer, self._start
        if len(buffer) - start < 2:
            return None
        first, second = buffer[start], buffer[start + 1]
        opcode = _WHOLE.get(first)                # nearly always: of a message in one frame
        if opcode is None or self._opcode is not None or (second >= 0x80) is not self._masked:
            opcode = self._check_head(first, second)
        size, start = second & 0x7F, start + 2
        if size >= 126:
            extended = 2 if size == 126 else 8
            if len(buffer) - start < extended:
                return None
            size = self._check_size(int.from_bytes(buffer[start:start + extended], "big"), extended)
            start += extended
        if self._fragments_size + size > self.max_message:
            self._check_room(opcode)
        start += 4 * self._masked
        end = start + size
        if len(buffer) < end:
            return None
        self._start = end
        if isinstance(buffer, bytes):
            payload = buffer[start:end]
        else:                                     # a slice of a bytearray would be copied twice
            payload = bytes(memoryview(buffer)[start:end])
        if self._masked and buffer[start - 4:start] != NO_MASK:
            payload = apply_mask(payload, bytes(buffer[start - 4:start]))
        return opcode, first >= 0x80, payload

    def _check_head(self, first: int, second: int) -> Opcode:
        opcode = _OPCODES.get(first & 0x0F)
        if opcode is None or first & 0x70:        # no extension was negotiated: RSV must be 0
            raise ProtocolError(f"frame head {first:02x}{second:02x}")
        if (second >= 0x80) != self._masked:
            raise ProtocolError("masked frame" if second >= 0x80 else "frame without a mask")
        if opcode >= Opcode.CLOSE:
            if first < 0x80 or second & 0x7F > MAX_CONTROL_PAYLOAD:
                raise ProtocolError("control frame in fragments or too long")
        elif (opcode is Opcode.CONTINUATION) != (self._opcode is not None):
            raise ProtocolError("fragments out of order")
        return opcode

    @staticmethod
    def _check_size(size: int, extended: int) -> int:
        if size < (126 if extended == 2 else 0x10000) or size >= 1 << 63:
            raise ProtocolError(f"length {size} in {extended} bytes")     # not minimal, or negative
        return size

    def _check_room(self, opcode: Opcode) -> None:
        if opcode < Opcode.CLOSE:
            raise ProtocolError(f"message of more than {self.max_message} bytes",
                                CloseCode.TOO_BIG)

    def _join(self, opcode: Opcode, fin: bool,
              payload: bytes) -> Optional[Tuple[Opcode, Union[str, bytes]]]:
        if not fin or self._opcode is not None:
            self._opcode = self._opcode or opcode
            self._fragments += payload
            # an empty fragment counts too, or a peer could send them without end
            self._fragments_size += len(payload) or 1
            if not fin:
                return None
            opcode, payload = self._opcode, bytes(self._fragments)
            self._opcode, self._fragments, self._fragments_size = None, bytearray(), 0
        return (opcode, _decode_utf8(payload)) if opcode is Opcode.TEXT else (opcode, payload)


class MaskKeys:
    """Makes masking keys, which must not be predictable (RFC 6455, section 10.3). Any thread.

    They come from the system's random numbers, fetched for many frames at once.
    """

    FETCHED = 1024             # bytes

    def __init__(self) -> None:
        self._keys: Deque[bytes] = collections.deque()           # its methods are atomic

    def __call__(self) -> bytes:
        """Return 4 bytes that were not used before."""
        try:
            return self._keys.pop()
        except IndexError:
            fresh = os.urandom(self.FETCHED)
            self._keys.extend(fresh[at:at + 4] for at in range(4, self.FETCHED, 4))
            return fresh[:4]


new_mask = MaskKeys()


def accept_key(key: str) -> str:
    """Return the Sec-WebSocket-Accept value for a Sec-WebSocket-Key (RFC 6455, section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key.encode() + WEBSOCKET_GUID).digest()).decode()


# ---------------------------------------------------------------------------
# 3. HTTP/1.1 heads and bodies (RFC 9110, RFC 9112), strictly: bytes in, events out. No sockets.
#    What one recipient could read otherwise than another is refused, not repaired.
# ---------------------------------------------------------------------------

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])".encode())
_ABSOLUTE_FORM = re.compile(r"(?i:https?)://([^/?#@]+)((?:[/?][^#]*)?)")
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?: ([^\x00-\x08\x0a-\x1f\x7f]*))?")
_FIELD_LINE = re.compile(rf"({_TOKEN}):([^\x00-\x08\x0a-\x1f\x7f]*)".encode())
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?")
_BARE_LF = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
_FIELD_NAME = re.compile(_TOKEN)
_FIELD_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")
_SINGLE_FIELDS = frozenset(("host", "content-length", "transfer-encoding", "content-type",
                            "authorization", "origin", "x-request-id", "idempotency-key"))

# fields that concern one connection only (RFC 9110, section 7.6.1)
HOP_BY_HOP = frozenset(("connection", "keep-alive", "proxy-connection", "proxy-authenticate",
                        "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade",
                        "expect", "http2-settings"))
# fields of a client's request that an edge does not get: credentials, and what only we may say
NOT_FORWARDED = HOP_BY_HOP | {"authorization", "cookie", "host", "content-length", "origin",
                              "referer"}
SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))      # they only read; RFC 9110, section 9.2.1
_FRAMING_FIELDS = frozenset(("transfer-encoding", "content-length", "host"))
_REASONS = {int(status): status.phrase for status in HTTPStatus}


class _Remembered(dict):
    """What a parser returned for short texts, by the text: peers repeat themselves. Any thread.

    known[text] is what it returned before, or else returns now. That is shared, so that nobody may
    change it. What it raises is not remembered. size: of a key, where that is no text.
    """

    def __init__(self, parse: Callable[[Any], Any], size: Callable[[Any], int] = len) -> None:
        super().__init__()
        self._parse, self._size = parse, size

    def __missing__(self, text: Any) -> Any:
        parsed = self._parse(text)
        if self._size(text) <= MAX_KEPT_HEAD:
            if len(self) >= HEADS_KEPT:
                self.clear()                      # what is in use is soon there again
            self[text] = parsed
        return parsed


def _is_field(name: Any, value: str) -> bool:
    return (isinstance(name, str) and _FIELD_NAME.fullmatch(name) is not None
            and _FIELD_VALUE.fullmatch(value) is not None and value.isprintable())


def parse_fields(lines: Iterable[bytes]) -> Dict[str, str]:
    """Return the field lines as {lower-case name: value}; values of a repeated field are joined.

    Raises BadRequest for an obs-fold, a space before the colon, a control character, or a repeated
    field that has only one value (RFC 9112, section 5), and HeadTooLarge for too many.
    """
    fields: Dict[str, str] = {}
    count = 0
    for line in lines:
        match = _FIELD_LINE.fullmatch(line)
        if match is None:
            raise BadRequest(f"field line {line[:40]!r} is not 'name: value' (RFC 9112, section 5)")
        name = match[1].decode().lower()
        value = match[2].strip(b" \t").decode("latin-1")
        count += 1
        if name in fields:
            if name in _SINGLE_FIELDS:
                raise BadRequest(f"field {name!r} stands there twice")
            value = fields[name] + ("; " if name == "cookie" else ", ") + value
        fields[name] = value
    if count > MAX_FIELDS:
        raise HeadTooLarge(f"{count} fields; {MAX_FIELDS} are allowed")
    return fields


# of the lines of a whole block
_known_fields = _Remembered(lambda block: parse_fields(block.split(b"\r\n")) if block else {})


def connection_options(fields: Dict[str, str]) -> Set[str]:
    """Return the lower-case options of the Connection field (RFC 9110, section 7.6.1)."""
    connection = fields.get("connection")
    return {option.strip().lower() for option in connection.split(",")} if connection else set()


class RequestHead:
    """A request's head. `target` is what was asked for, `path` and `query` are its parts.

    length: bytes of the body, or None when it is chunked. forwarded: the fields that concern
    neither this connection nor the bridge alone. It never changes, so that requests may share it,
    but for what is kept with it: `caller`, (table of tokens, whose its token is there), and `told`,
    (caller, what an edge was told of the request then).
    """

    __slots__ = ("method", "target", "path", "query", "fields", "length", "keep_alive", "is_http10",
                 "host", "forwarded", "expects_continue", "caller", "told")

    def __init__(self, method: str, target: str, minor: int, fields: Dict[str, str]) -> None:
        self.method = method
        self.fields = fields
        self.is_http10 = minor == 0
        self.host = fields.get("host", "")
        if not target.startswith("/"):
            target = self._origin_form(target)
        self.target = target
        self.path, _, self.query = target.partition("?")
        options = connection_options(fields)
        self.keep_alive = "keep-alive" in options if self.is_http10 else "close" not in options
        self.length = self._body_length()
        self.forwarded = {name: value for name, value in fields.items()
                          if name not in NOT_FORWARDED and name not in options
                          and not name.startswith("x-forwarded-")}
        # whether the client waits for 100 (Continue) before it sends its body
        self.expects_continue = fields.get("expect", "").lower() == "100-continue" and minor > 0
        self.caller: Tuple[Any, Any] = (None, None)
        self.told: Tuple[Any, bytes] = (None, b"")

    def _origin_form(self, target: str) -> str:
        """Accept the absolute form, as a server must; its host counts (RFC 9112, section 3.2.2)."""
        match = _ABSOLUTE_FORM.fullmatch(target)
        if match is not None:
            self.host = match[1]
            return ("" if match[2].startswith("/") else "/") + match[2]
        if target == "*" and self.method == "OPTIONS":
            return "/*"
        raise BadRequest("the request target must begin with '/'")

    def _body_length(self) -> Optional[int]:
        coding, length = self.fields.get("transfer-encoding"), self.fields.get("content-length")
        if coding is not None:
            if length is not None or self.is_http10:    # the classic of request smuggling
                raise BadRequest("Transfer-Encoding does not go with Content-Length or HTTP/1.0")
            if coding.lower() != "chunked":
                raise EdgeError(f"transfer coding {coding[:40]!r} is not known; use 'chunked'",
                                HTTPStatus.NOT_IMPLEMENTED)
            return None
        if length is None:
            if self.is_http10 and self.method in ("POST", "PUT", "PATCH"):
                raise LengthRequired("an HTTP/1.0 request with a body needs Content-Length")
            return 0
        if not (length.isascii() and length.isdigit() and len(length) <= 18):
            raise BadRequest(f"Content-Length {length[:40]!r} is not a number of bytes")
        return int(length)


def parse_request_head(head: bytes) -> RequestHead:
    """Return the request head in `head`, which ends before its empty line.

    Raises BadRequest, TargetTooLong, HeadTooLarge, LengthRequired, or EdgeError with 501 or 505.
    """
    line, _, rest = head.partition(b"\r\n")
    if len(line) > MAX_TARGET:
        raise TargetTooLong(f"the request line has {len(line)} bytes; {MAX_TARGET} are allowed")
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise BadRequest(f"request line {line[:40]!r} is not 'METHOD target HTTP/1.1'")
    if match[3] != b"1":
        raise EdgeError("only HTTP/1.0 and HTTP/1.1 are spoken here",
                        HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
    fields = _known_fields[rest]
    minor = int(match[4])
    if minor and "host" not in fields:
        raise BadRequest("an HTTP/1.1 request needs one Host field (RFC 9112, section 3.2)")
    return RequestHead(match[1].decode(), match[2].decode(), minor, fields)


_known_heads = _Remembered(parse_request_head)


class _Phase(enum.IntEnum):
    """Where in a message a parser is; the steps of RequestParser in their order."""
    HEAD, LENGTH, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER = range(6)


END = object()                 # the event after the last byte of a request


class RequestParser:
    """Turns a connection's bytes into requests: a RequestHead, pieces of its body, END; and again.

    Raises EdgeErrors, after which the bytes are out of step and the connection must be closed.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._phase = _Phase.HEAD
        self._left = 0                            # bytes of the body or chunk still to come
        self._piece = b""                         # of a long body: it need not pass _buffer
        self._searched = 0                        # bytes of an incomplete head known to be in order
        self._steps = (self._parse_head, self._parse_length, self._parse_chunk_size,
                       self._parse_chunk_data, self._parse_chunk_end, self._parse_trailer)

    @property
    def buffered(self) -> int:
        """Bytes that were fed and not yet returned."""
        return len(self._buffer) + len(self._piece)

    def feed(self, data: bytes) -> None:
        """Add bytes from the client; then call next_event() until it returns None."""
        if len(data) <= self._left and not self._buffer and not self._piece:
            self._piece = data
        else:
            if self._piece:
                self._buffer, self._piece = bytearray(self._piece), b""
            self._buffer += data

    def take_rest(self) -> bytes:
        """Return what came after the request, for the protocol the connection is switched to."""
        rest, self._buffer = self._piece + bytes(self._buffer), bytearray()
        return rest

    def next_event(self) -> Optional[Union[RequestHead, bytes, object]]:
        """Return a RequestHead, bytes of its body, or END; None when more bytes are needed."""
        while True:
            phase = self._phase
            event = self._steps[phase]()
            if event is not None or self._phase is phase:
                return event

    def _parse_head(self) -> Optional[RequestHead]:
        buffer = self._buffer
        if not buffer:
            return None
        while buffer.startswith(b"\r\n"):         # empty lines are ignored (RFC 9112, 2.2)
            del buffer[:2]
        end = buffer.find(b"\r\n\r\n", 0, MAX_HEAD + 4)
        if end < 0:
            self._check_incomplete_head()
            return None
        head = _known_heads[bytes(buffer[:end])]
        del buffer[:end + 4]
        self._searched = 0
        self._phase = _Phase.CHUNK_SIZE if head.length is None else _Phase.LENGTH
        self._left = head.length or 0
        return head

    def _check_incomplete_head(self) -> None:
        buffer = self._buffer
        if _BARE_LF.search(buffer, self._searched):
            raise BadRequest("lines must end with CR LF (RFC 9112, section 2.2)")
        self._searched = max(0, len(buffer) - 1)  # a CR at the end may yet get its LF
        if b"\r\n" not in buffer[:MAX_TARGET + 2] and len(buffer) >= MAX_TARGET + 2:
            raise TargetTooLong(f"the request line is longer than {MAX_TARGET} bytes")
        if len(buffer) >= MAX_HEAD + 4:
            raise HeadTooLarge(f"the head is larger than {MAX_HEAD} bytes")

    def _parse_length(self) -> Optional[Union[bytes, object]]:
        if self._left == 0:
            self._phase = _Phase.HEAD
            return END
        return self._take_body()

    def _take_body(self) -> Optional[bytes]:
        if self._piece:
            piece, self._piece = self._piece, b""
        else:
            piece = bytes(self._buffer[:self._left])
            del self._buffer[:len(piece)]
        self._left -= len(piece)
        return piece or None

    def _take_line(self, limit: int) -> Optional[bytes]:
        end = self._buffer.find(b"\r\n", 0, limit + 2)
        if end < 0:
            if len(self._buffer) >= limit + 2 or _BARE_LF.search(self._buffer):
                raise BadRequest("a line of the chunked body is too long, or has no CR LF")
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[:end + 2]
        return line

    def _parse_chunk_size(self) -> None:
        line = self._take_line(MAX_CHUNK_LINE)
        if line is None:
            return
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise BadRequest(f"chunk size {line[:40]!r} is not hexadecimal (RFC 9112, section 7.1)")
        self._left = int(match[1], 16)
        self._phase = _Phase.CHUNK_DATA if self._left else _Phase.TRAILER
        self._trailer: List[bytes] = []

    def _parse_chunk_data(self) -> Optional[bytes]:
        if self._left == 0:
            self._phase = _Phase.CHUNK_END
            return None
        return self._take_body()

    def _parse_chunk_end(self) -> None:
        if self._buffer[:2] != b"\r\n"[:len(self._buffer)]:
            raise BadRequest("a chunk is longer than its size says")
        if len(self._buffer) >= 2:
            del self._buffer[:2]
            self._phase = _Phase.CHUNK_SIZE

    def _parse_trailer(self) -> Optional[object]:
        line = self._take_line(MAX_TARGET)
        if line is None:
            return None
        if line:                                  # checked, counted and dropped
            self._trailer.append(line)
            if not _FRAMING_FIELDS.isdisjoint(parse_fields(self._trailer)):
                raise BadRequest("a trailer must not say how the message is framed or for whom it "
                                 "is (RFC 9110, section 6.5.1)")
            return self._parse_trailer()
        self._phase = _Phase.HEAD
        return END


def parse_response_head(buffer: bytes) -> Optional[Tuple[int, Dict[str, str], bytes]]:
    """Return (status, fields, rest) of the response that `buffer` starts with; None if incomplete.

    Raises ProtocolError when it is not HTTP/1.x or its head is too large.
    """
    end = buffer.find(b"\r\n\r\n", 0, MAX_HEAD + 4)
    if end < 0:
        if len(buffer) >= MAX_HEAD + 4:
            raise ProtocolError("response head is too large")
        return None
    line, _, rest = bytes(buffer[:end]).partition(b"\r\n")
    match = _STATUS_LINE.fullmatch(line)
    if match is None:
        raise ProtocolError(f"not an HTTP response: {line[:40]!r}")
    try:
        fields = parse_fields(rest.split(b"\r\n")) if rest else {}
    except EdgeError as error:
        raise ProtocolError(error.detail) from None
    return int(match[1]), fields, bytes(buffer[end + 4:])


def encode_response_head(status: int, fields: Iterable[Tuple[str, str]]) -> bytes:
    """Return a response's status line, field lines and empty line. The fields must be checked."""
    return join_response_head(status, encode_field_lines(fields))


def encode_field_lines(fields: Iterable[Tuple[str, str]]) -> str:
    """Return the field lines of a head, as text."""
    return "".join([f"{name}: {value}\r\n" for name, value in fields])


def join_response_head(status: int, lines: str) -> bytes:
    """Return what encode_response_head() does, with field lines that are encoded already."""
    head = f"HTTP/1.1 {status} {_REASONS.get(status, '')}\r\n{lines}\r\n"
    return head.encode("latin-1", "replace")


def encode_chunk(data: bytes) -> bytes:
    """Return `data` as one chunk; the empty one is the last (RFC 9112, section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def parse_path(path: str) -> Tuple[str, ...]:
    """Return the decoded segments of an absolute path: "/a/b%20c" is ("a", "b c").

    Raises BadRequest for dot segments, NUL, control characters and what is not UTF-8. A segment may
    hold "/" after decoding: it is a value, and no file name.
    """
    segments = path[1:].split("/")
    if "%" in path:
        try:
            segments = [urllib.parse.unquote(part, errors="strict") for part in segments]
        except UnicodeDecodeError:
            raise BadRequest("the path is not UTF-8 once its %XX are decoded") from None
    for part in segments:
        if part in (".", "..") or not (part.isprintable() or not part):
            raise BadRequest("the path has a '.' or '..' segment or a control character")
    return tuple(segments)


known_paths = _Remembered(parse_path)


def parse_query(query: str) -> Dict[str, str]:
    """Return a query string as {name: value}; of a repeated name the last value counts.

    Raises BadRequest for what is not UTF-8 once decoded and for more than MAX_FIELDS values.
    """
    if not query:
        return {}
    try:
        return dict(urllib.parse.parse_qsl(query, keep_blank_values=True, errors="strict",
                                           max_num_fields=MAX_FIELDS))
    except ValueError:
        raise BadRequest(f"the query is not UTF-8 or has more than {MAX_FIELDS} values") from None


class BodyClock:
    """By when more of a request's body must have come: `deadline`, on the caller's clock.

    MIN_PROGRESS in each BODY_IDLE_S, and MIN_BODY_RATE in each BODY_RATE_S. It stands still while
    it is we who do not read: a client is only held to what it can do.
    """

    __slots__ = ("_idle_end", "_rate_end", "_progress", "_received", "_paused")

    def __init__(self, now: float) -> None:
        self._idle_end, self._rate_end = now + BODY_IDLE_S, now + BODY_RATE_S
        self._progress = self._received = 0       # bytes since either was put off
        self._paused: Optional[float] = None

    @property
    def deadline(self) -> float:
        """When it is too late; never while paused."""
        return min(self._idle_end, self._rate_end) if self._paused is None else math.inf

    @property
    def limit(self) -> str:
        """Which of LIMITS that is."""
        return "body-time" if self._idle_end <= self._rate_end else "body-rate"

    def on_data(self, size: int, now: float) -> None:
        """Count what came."""
        self._progress += size
        self._received += size
        if self._progress >= MIN_PROGRESS:
            self._idle_end, self._progress = now + BODY_IDLE_S, 0
        if self._received >= MIN_BODY_RATE * BODY_RATE_S:
            self._rate_end, self._received = now + BODY_RATE_S, 0

    def pause(self, now: float) -> None:
        """Stand still: nothing is read from now on."""
        if self._paused is None:
            self._paused = now

    def resume(self, now: float) -> None:
        """Go on."""
        if self._paused is not None:
            self._idle_end += now - self._paused
            self._rate_end += now - self._paused
            self._paused = None


# ---------------------------------------------------------------------------
# 4. Event streams (WHATWG HTML, section 9.2). No sockets.
# ---------------------------------------------------------------------------

class Event(NamedTuple):
    """One event of a stream. `id` is the last id seen, which the event itself may not have set."""
    id: str
    event: str
    data: str


def encode_event(data: str, event_id: Optional[int] = None) -> bytes:
    """Return an event without an `event:` line, so that EventSource.onmessage fires."""
    head = "" if event_id is None else f"id: {event_id}\n"
    data = data.replace("\r\n", "\n").replace("\r", "\n")       # each of them ends a line
    return (head + "".join([f"data: {line}\n" for line in data.split("\n")]) + "\n").encode()


class EventParser:
    """Turns a stream's bytes into events, whatever the cuts. `last_id` is for Last-Event-ID."""

    def __init__(self, max_event: int = 4 * MAX_NOTIFICATION) -> None:
        self.last_id = ""
        self.retry_s: Optional[float] = None      # the reconnection time the server asked for
        self._max_event = max_event
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self._text = ""
        self._data: List[str] = []
        self._size = 0
        self._event = self._id = ""

    def feed(self, data: bytes) -> List[Event]:
        """Return the events that `data` completes. Raises ProtocolError for a too large one."""
        self._text += self._decoder.decode(data)
        if "\r" in self._text:                    # a CR at the very end may be half a CR LF
            held = self._text.endswith("\r")
            text = self._text[:-1] if held else self._text
            self._text = text.replace("\r\n", "\n").replace("\r", "\n") + ("\r" if held else "")
        *lines, self._text = self._text.split("\n")
        if self._size + len(self._text) > self._max_event:
            raise ProtocolError(f"event of more than {self._max_event} bytes")
        return [event for event in map(self._on_line, lines) if event is not None]

    def _on_line(self, line: str) -> Optional[Event]:
        if not line:
            return self._finish()
        name, _, value = line.partition(":")
        value = value[1:] if value.startswith(" ") else value
        if name == "data":
            self._data.append(value)
            self._size += len(value) + 1          # empty lines count too
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "event":
            self._event = value
        elif name == "retry" and value.isascii() and value.isdigit() and len(value) < 10:
            self.retry_s = int(value) / 1000
        return None

    def _finish(self) -> Optional[Event]:
        self.last_id = self._id                   # only now: half an event was not received
        event = Event(self.last_id, self._event or "message", "\n".join(self._data))
        empty = not self._data
        self._data, self._event, self._size = [], "", 0
        return None if empty else event


# ---------------------------------------------------------------------------
# 5. Messages between edge and bridge. Version 1: JSON text, and msgpack for a request whose body is
#    binary. Version 2: binary frames with a compact head and a raw body. No sockets.
# ---------------------------------------------------------------------------

WIRE_VERSIONS = (1, 2)
MAX_NESTING = 32               # levels of arrays and maps in a msgpack message

_MSGPACK_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_MSGPACK_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
                    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_MSGPACK_SIZED = {0xC4: (1, "bin"), 0xC5: (2, "bin"), 0xC6: (4, "bin"),      # size of the length
                  0xD9: (1, "str"), 0xDA: (2, "str"), 0xDB: (4, "str"),
                  0xDC: (2, "array"), 0xDD: (4, "array"), 0xDE: (2, "map"), 0xDF: (4, "map")}


def parse_msgpack(data: bytes) -> Any:
    """Return the value that `data` holds, whole (the msgpack specification; no extension types).

    Raises ProtocolError when it is cut, has bytes left over, or nests deeper than MAX_NESTING.
    """
    try:
        value, end = _parse_msgpack(data, 0, 0)
    except (IndexError, struct.error):
        raise ProtocolError("msgpack message is cut short") from None
    if end != len(data):
        raise ProtocolError("bytes after the msgpack message")
    return value


def _parse_msgpack(data: bytes, at: int, depth: int) -> Tuple[Any, int]:
    code, at = data[at], at + 1
    if code < 0x80 or code >= 0xE0:
        return (code if code < 0x80 else code - 0x100), at
    if code in _MSGPACK_CONSTANTS:
        return _MSGPACK_CONSTANTS[code], at
    if code in _MSGPACK_NUMBERS:
        form = _MSGPACK_NUMBERS[code]
        return struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)
    if code < 0xC0:
        kind = "map" if code < 0x90 else "array" if code < 0xA0 else "str"
        size = code & (0x1F if kind == "str" else 0x0F)
    elif code in _MSGPACK_SIZED:
        width, kind = _MSGPACK_SIZED[code]
        size, at = int.from_bytes(data[at:at + width], "big"), at + width
    else:
        raise ProtocolError(f"msgpack type {code:02x}")
    return _parse_msgpack_body(data, at, kind, size, depth)


def _parse_msgpack_body(data: bytes, at: int, kind: str, size: int, depth: int) -> Tuple[Any, int]:
    if size > len(data) - at or depth > MAX_NESTING:    # every element takes a byte at the least
        raise ProtocolError("msgpack message is cut short or too deep")
    if kind in ("bin", "str"):
        raw = bytes(data[at:at + size])
        return (raw if kind == "bin" else _decode_utf8(raw)), at + size
    items = []
    for _ in range(size * (2 if kind == "map" else 1)):
        item, at = _parse_msgpack(data, at, depth + 1)
        items.append(item)
    if kind == "array":
        return items, at
    if not all(isinstance(key, str) for key in items[::2]):
        raise ProtocolError("msgpack map with a key that is not text")
    return dict(zip(items[::2], items[1::2])), at


def encode_msgpack(value: Any) -> bytes:
    """Return `value` (None, bool, int of 32 bits, str, bytes, or a dict of them) as msgpack."""
    if value is None or value is True or value is False:
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        return b"\xd2" + struct.pack(">i", value)
    if isinstance(value, str):
        raw = value.encode()
        return b"\xdb" + struct.pack(">I", len(raw)) + raw
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    if isinstance(value, dict):
        pairs = b"".join(encode_msgpack(key) + encode_msgpack(item) for key, item in value.items())
        return b"\xdf" + struct.pack(">I", len(value)) + pairs
    raise ValueError(f"not for this msgpack encoder: {type(value).__name__}")


def _make_json_encoder() -> Callable[[Any], str]:
    """Return a function that returns a value as JSON; raises ValueError or TypeError for no JSON.
    """
    encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:                                          # its encode() makes one of these for each call
        encode = json.encoder.c_make_encoder(None, encoder.default, json.encoder.encode_basestring,
                                             None, ":", ",", False, False, False)
    except TypeError:                             # a Python without it, or whose own is another
        return encoder.encode

    def encode_json_value(value: Any) -> str:
        try:
            return "".join(encode(value, 0))
        except RecursionError:
            raise ValueError("a value holds itself, or nests too deep") from None

    return encode_json_value


encode_json = _make_json_encoder()
_parse_json = json.JSONDecoder().decode


def refuse_constant(name: str) -> None:
    """Raise ValueError for NaN, Infinity and -Infinity, which Python takes for JSON."""
    raise ValueError(f"there is no {name} in JSON")


def parse_message(payload: Union[str, bytes]) -> Dict[str, Any]:
    """Return the message in a text frame (JSON) or a binary frame (msgpack): a dict with "type".

    Raises ProtocolError for anything else. Unknown types and fields are the caller's to ignore.
    """
    try:
        message = _parse_json(payload) if isinstance(payload, str) else parse_msgpack(payload)
    except (ValueError, RecursionError):
        raise ProtocolError("message that is not JSON", CloseCode.INVALID_DATA) from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise ProtocolError("message without a type", CloseCode.INVALID_DATA)
    return message


def encode_request(req_id: str, method: str, target: str, headers: Dict[str, str],
                   body: bytes) -> Tuple[Opcode, bytes]:
    """Return the frame type and payload of a request to an edge; msgpack when not UTF-8.

    Text that JSON makes too long for an older edge, such as zeros, goes as msgpack, too.
    """
    message = {"type": "request", "req_id": req_id, "method": method, "path": target,
               "headers": headers, "is_binary": False, "body": None}
    if body:
        with contextlib.suppress(UnicodeDecodeError):
            message["body"] = body.decode()
            text = encode_json(message).encode()
            if len(text) <= MAX_OLD_MESSAGE:
                return Opcode.TEXT, text
        message.update(is_binary=True, body=bytes(body))
        return Opcode.BINARY, encode_msgpack(message)
    return Opcode.TEXT, encode_json(message).encode()


class EdgeRequest(NamedTuple):
    """A request as it arrives at an edge."""
    req_id: str
    method: str
    target: str
    headers: Dict[str, str]       # names in lower case
    body: bytes


def parse_request(message: Dict[str, Any]) -> EdgeRequest:
    """Return the checked fields of a "request" message; raises ProtocolError for a wrong one."""
    req_id, method, target = (message.get(key) for key in ("req_id", "method", "path"))
    headers = message.get("headers") or {}
    if not (isinstance(req_id, str) and isinstance(method, str) and isinstance(target, str)
            and isinstance(headers, dict)):
        raise ProtocolError("request without req_id, method, path or headers")
    body = _parse_body(message)
    return EdgeRequest(req_id, method, target, _forwarded_fields(headers), body)


def _forwarded_fields(headers: Dict[Any, Any]) -> Dict[str, str]:
    """Return a request's fields with names in lower case, and an id that can stand in a log."""
    fields = {str(name).lower(): str(value) for name, value in headers.items()}
    if "x-request-id" in fields:
        fields["x-request-id"] = _check_request_id(fields["x-request-id"])
    return fields


def _check_request_id(text: str) -> str:
    return text if REQUEST_ID_PATTERN.fullmatch(text) else "-"


def _parse_body(message: Dict[str, Any]) -> bytes:
    body = message.get("body")
    if body is None:
        return b""
    if isinstance(body, bytes):
        return body
    try:
        if not isinstance(body, str):             # a JSON value in place of its text
            return encode_json(body).encode()
        if message.get("is_binary"):
            return base64.b64decode(body, validate=True)
    except (ValueError, TypeError, RecursionError):    # NaN, half a surrogate pair, no base64, ...
        raise ProtocolError("body that is no JSON value or no base64") from None
    return body.encode(errors="surrogatepass")


def encode_response(req_id: str, status: int, headers: Dict[str, str], body: bytes) -> str:
    """Return a "response" message; a body that is not UTF-8 travels as base64.

    So does text that JSON makes too long for an older bridge.
    """
    message = {"type": "response", "req_id": req_id, "status": status, "headers": headers,
               "is_binary": False, "body": ""}
    with contextlib.suppress(UnicodeDecodeError):
        message["body"] = body.decode()
        text = encode_json(message)
        if len(text) <= MAX_OLD_MESSAGE:
            return text
    message.update(is_binary=True, body=base64.b64encode(body).decode())
    return encode_json(message)


def parse_response(message: Dict[str, Any]) -> Tuple[int, Dict[str, str], bytes]:
    """Return (status, headers, body) of a "response" message; raises ProtocolError."""
    status = check_status(message.get("status"))
    fields = parse_fields_object(message.get("headers") or {})
    body = _parse_body(message)
    if isinstance(message.get("body"), (dict, list)):
        fields.setdefault("content-type", "application/json")
    return status, fields, body


class Kind(enum.IntEnum):
    """What a frame of version 2 holds, and what its JSON head is.

    REQUEST [method, target, fields], after a line with the request's id, so that the rest is the
    same again and again, and RESPONSE [status, fields] begin a stream; DATA goes on with
    the body; CREDIT (a number of bytes) lets the peer send more of it; CANCEL (a reason) ends it
    before its time. NOTIFICATION [number, plugin, topic] has its data, as JSON, for a body; ACK (a
    number) says that it and all before it are safe. Only some have a head; numbers are 8 bytes.
    """
    REQUEST, RESPONSE, DATA, CREDIT, CANCEL, NOTIFICATION, ACK = range(1, 8)


_KINDS = {int(kind): kind for kind in Kind}
_WIRE_PREFIX = struct.Struct("!BBHI")     # kind, 1 when the body ends here, size of head, stream
_WIRE_NUMBER = struct.Struct("!Q")


class WireFrame(NamedTuple):
    """A frame of version 2. `end`: the stream's body ends with this one. `text`: of its head."""
    kind: Kind
    end: bool
    stream: int
    text: bytes
    body: Union[bytes, memoryview]

    @property
    def head(self) -> List[Any]:
        """The JSON array that `text` is. Raises ProtocolError when it is none."""
        return parse_wire_head(self.text)

    @property
    def number(self) -> int:
        """The body of a CREDIT or an ACK. Raises ProtocolError when it is none."""
        if len(self.body) != _WIRE_NUMBER.size:
            raise ProtocolError(f"{self.kind.name} without a number")
        return _WIRE_NUMBER.unpack(self.body)[0]


def encode_wire(kind: int, stream: int, head: Union[List[Any], bytes, None] = None, *,
                end: bool = False) -> bytes:
    """Return what stands before the body of a version 2 frame. Raises ValueError for a long head.

    head: the array, or the text of one.
    """
    text = head or b"" if not isinstance(head, list) else encode_json(head).encode()
    if len(text) > 0xFFFF:
        raise ValueError(f"fields of {len(text)} bytes; {0xFFFF} are allowed")
    return _WIRE_PREFIX.pack(kind, end, len(text), stream) + text


def encode_wire_number(kind: int, stream: int, number: int) -> bytes:
    """Return a whole CREDIT or ACK frame's payload."""
    return _WIRE_PREFIX.pack(kind, 0, 0, stream) + _WIRE_NUMBER.pack(number)


def parse_wire(payload: bytes) -> Optional[WireFrame]:
    """Return the frame in a binary message; None for a kind that later versions may have.

    Raises ProtocolError when it is cut short.
    """
    if len(payload) < _WIRE_PREFIX.size:
        raise ProtocolError("binary message is cut short")
    number, flags, size, stream = _WIRE_PREFIX.unpack_from(payload)
    kind, at = _KINDS.get(number), _WIRE_PREFIX.size + size
    if kind is None:
        return None
    if len(payload) < at:
        raise ProtocolError("head that is cut short", CloseCode.INVALID_DATA)
    body = payload[at:] if len(payload) - at < READ_SIZE else memoryview(payload)[at:]
    return WireFrame(kind, bool(flags & 1), stream, payload[_WIRE_PREFIX.size:at], body)


def parse_wire_head(text: bytes) -> List[Any]:
    """Return the head of a version 2 frame. Raises ProtocolError when it is no JSON array."""
    if not text:
        return []
    try:
        head = _parse_json(text.decode())
    except (ValueError, RecursionError):
        head = None
    if not isinstance(head, list):
        raise ProtocolError("head that is no JSON array", CloseCode.INVALID_DATA)
    return head


def encode_wire_request(stream: int, request_id: str, text: bytes, *, end: bool) -> bytes:
    """Return what stands before the body of a REQUEST. Raises ValueError for a long head.

    text: of [method, target, fields].
    """
    return encode_wire(Kind.REQUEST, stream, b"%b\n%b" % (request_id.encode(), text), end=end)


def _read_request(text: bytes) -> Tuple[str, str, Dict[str, str]]:
    """Return (method, target, fields) of a REQUEST. Raises ProtocolError when it makes no sense."""
    method, target, fields = [*parse_wire_head(text), None, None, None][:3]
    if not (isinstance(method, str) and isinstance(target, str) and isinstance(fields, dict)):
        raise ProtocolError("request without method, target or fields")
    return method, target, _forwarded_fields(fields)


_known_requests = _Remembered(_read_request)


def parse_wire_request(frame: WireFrame) -> EdgeRequest:
    """Return what a REQUEST asks for, with the body if it is whole. Raises ProtocolError."""
    line, _, text = frame.text.rpartition(b"\n")
    method, target, known = _known_requests[text]
    fields = known.copy()
    if line:
        fields["x-request-id"] = _check_request_id(line.decode("latin-1"))
    return EdgeRequest(fields.get("x-request-id", "-"), method, target, fields,
                       bytes(frame.body) if frame.end else b"")


def _encode_answer(answer: Tuple[int, Tuple[Tuple[str, str], ...]]) -> bytes:
    return encode_json([answer[0], dict(answer[1])]).encode()


_known_replies = _Remembered(_encode_answer, lambda answer: len(repr(answer)))


def encode_wire_answer(status: int, fields: Dict[str, str]) -> bytes:
    """Return the text of a RESPONSE's head. Raises ValueError or TypeError when it cannot be."""
    return _known_replies[status, tuple(fields.items())]


def parse_fields_object(headers: Any) -> Dict[str, str]:
    """Return an edge's response fields, with their names in lower case; raises ProtocolError.

    Fields that could break the framing of an HTTP/1.1 reply are refused here.
    """
    if not isinstance(headers, dict):
        raise ProtocolError("response without valid fields")
    fields = {}
    for name, value in headers.items():
        if not isinstance(value, (str, int)) or not _is_field(name, str(value)):
            raise ProtocolError(f"response with a bad field {str(name)[:40]!r}")
        fields[name.lower()] = str(value)
    return fields


def runs_once(endpoint: Any) -> bool:
    """Whether an edge that describes itself so runs requests with the same Idempotency-Key once.

    Edges of radical.edge 0.x do not.
    """
    return isinstance(endpoint, dict) and endpoint.get("idempotency_key") is True


def check_status(status: Any) -> int:
    """Return the status of an edge's answer; raises ProtocolError when it cannot be one."""
    if type(status) is not int or not 200 <= status <= 599:
        raise ProtocolError("response without a valid status")
    return status


def is_label(value: Any) -> bool:
    """Whether the name of a plugin or a topic in a notification is short and printable."""
    return isinstance(value, str) and len(value) <= 256 and value.isprintable()


class SendWindow:
    """How much of a stream's body may be sent: what the peer has room for. Any thread.

    After close() everything may be sent, and is lost: nobody waits for a peer that is gone.

    A waiter is called once, on the thread that changes the window; it must not block.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._credit = INITIAL_WINDOW             # guarded by _lock
        self._waiters: List[Callable[[], None]] = []             # guarded by _lock

    def take(self, wanted: int) -> int:
        """Return how many of `wanted` bytes may be sent now; they count as sent."""
        with self._lock:
            granted = min(wanted, self._credit)
            self._credit -= granted
        return granted

    def add(self, credit: int) -> None:
        """Take credit from the peer."""
        with self._lock:
            self._credit += credit
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter()

    def close(self) -> None:
        """Take no more notice of credit."""
        self.add(1 << 62)

    def when_open(self, waiter: Callable[[], None]) -> None:
        """Call `waiter` when something may be sent, perhaps at once."""
        with self._lock:
            if not self._credit:
                self._waiters.append(waiter)
                return
        waiter()


class ReceiveWindow:
    """How much of a stream's body the peer may send us. Any thread.

    It begins small, for there may be thousands; a stream that is read gets its share of WINDOW_SUM.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = INITIAL_WINDOW               # guarded by _lock; bytes that may still come
        self._held = 0                            # guarded by _lock; bytes not passed on

    def on_received(self, size: int) -> None:
        """Count what came. Raises ProtocolError when the peer sent more than it may."""
        with self._lock:
            self._left -= size
            self._held += size
            if self._left < 0:
                raise ProtocolError("body without credit")

    def on_consumed(self, size: int, streams: int) -> int:
        """Count what was passed on; return the credit to give the peer now, mostly 0.

        streams: how many there are, of this process or link, to share WINDOW_SUM.
        """
        wanted = max(INITIAL_WINDOW, min(MAX_WINDOW, WINDOW_SUM // max(1, streams)))
        with self._lock:
            self._held -= size
            credit = wanted - self._left - self._held
            if credit < wanted // 4:              # not a frame for every few bytes
                return 0
            self._left += credit
        return credit


# ---------------------------------------------------------------------------
# 6. Threads that run a loop. They know nothing of what runs on them.
# ---------------------------------------------------------------------------

class _LockSelector(selectors.DefaultSelector):
    """Waits on a lock while nothing but the loop's own wake-up socket is registered.

    Waking a thread through a lock takes half the time that it takes through a socket and epoll, and
    that is a sixth of a proxied request's latency. With sockets to watch it is an ordinary one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._token = threading.Lock()            # released: the loop was woken
        self._token.acquire()
        self.waits_on_lock = True                 # whether wake() ends a select()

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Watch a socket."""
        key = super().register(fileobj, events, data)
        self.waits_on_lock = len(self.get_map()) <= 1
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """Watch a socket no more."""
        key = super().unregister(fileobj)
        self.waits_on_lock = len(self.get_map()) <= 1
        return key

    def wake(self) -> None:
        """End the select() under way, or else the next one. Any thread."""
        try:
            self._token.release()
        except RuntimeError:                      # released already: the loop will look soon
            pass

    def select(self, timeout: Optional[float] = None) -> List[Tuple[selectors.SelectorKey, int]]:
        if not self.waits_on_lock:
            return super().select(timeout)
        if timeout is None:
            self._token.acquire()
        else:
            self._token.acquire(timeout > 0, timeout if timeout > 0 else -1)
        return []


class WorkLoop(asyncio.SelectorEventLoop):
    """An asyncio loop that other threads wake often and that has few sockets, as plugins' do.

    helpers: the threads of asyncio.to_thread() and run_in_executor(None, ...).
    """

    def __init__(self, helpers: "Workers") -> None:
        self._lock_selector, self._helpers = _LockSelector(), helpers
        super().__init__(self._lock_selector)

    def run_in_executor(self, executor: Any, func: Callable[..., Any],
                        *args: Any) -> "asyncio.Future[Any]":
        """Run a blocking call in a thread, a helper when `executor` is None; return its future."""
        if executor is None:
            return self._helpers.submit(self, func, *args)
        return super().run_in_executor(executor, func, *args)

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:
        """Run a callback on the loop's thread soon. Raises RuntimeError when the loop is closed."""
        if self.get_debug():                      # then call_soon() refuses other threads
            handle = super().call_soon_threadsafe(callback, *args, context=context)
        else:
            # it only appends to a deque, as asyncio's own version of this method relies on
            handle = self.call_soon(callback, *args, context=context)
        self._wake()
        return handle

    def start_task(self, make: Callable[[], Any], started: Callable[[Any], None]) -> None:
        """Run the coroutine that make() returns as a task. Any thread.

        started(task) is called before the task goes on, if it has anything to wait for.
        Raises RuntimeError when the loop is closed.
        """
        if _EAGER or self.get_debug() or self.is_closed():
            self.call_soon_threadsafe(self._start_task, make, started)
        else:                                     # it saves a turn, and goes as call_soon() does
            self._start_task(make, started)
            self._wake()

    def _wake(self) -> None:
        # whoever registers a socket after this line finds what was appended before it
        self._lock_selector.wake()
        if not self._lock_selector.waits_on_lock:
            with contextlib.suppress(RuntimeError):              # it was closed
                super().call_soon_threadsafe(lambda: None)

    def _start_task(self, make: Callable[[], Any], started: Callable[[Any], None]) -> None:
        task = asyncio.Task(make(), loop=self, **_EAGER)
        if not task.done():
            started(task)


# a task begins at once and not in the next turn of its loop, where Python can do that
_EAGER: Dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}


class LoopThread:
    """An asyncio loop, an ordinary one by default, in a daemon thread of its own."""

    def __init__(self, name: str, loop: Optional[asyncio.AbstractEventLoop] = None) -> None:
        self.loop: Any = loop or asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> "LoopThread":
        """Start the thread; return self."""
        self._thread.start()
        return self

    def stop(self, timeout: float = STOP_S) -> bool:
        """Cancel what runs on the loop, end its thread and join it; False when it is stuck.

        A stuck thread (a handler that blocks) is a daemon, and does not keep the process alive.
        """
        if self._thread.is_alive():
            self.call(self.loop.stop)
            self._thread.join(timeout)
        elif self._thread.ident is None:          # it was never started
            self.loop.close()
        return not self._thread.is_alive()

    def call(self, function: Callable[..., Any], *args: Any) -> bool:
        """Run `function(*args)` on the loop soon; False when the loop is closed: it came too late.
        """
        try:                                      # suppress() would take longer than the call
            self.loop.call_soon_threadsafe(function, *args)
            return True
        except RuntimeError:
            return False

    def submit(self, coroutine: Any) -> "concurrent.futures.Future[Any]":
        """Run a coroutine on the loop; return the future of its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            self._cancel_tasks()
        finally:
            self.loop.close()

    def _cancel_tasks(self) -> None:
        end = time.monotonic() + STOP_S
        cancelled: Set["asyncio.Task[Any]"] = set()
        while time.monotonic() < end:
            self.loop.run_until_complete(asyncio.sleep(0))       # what never begins answers nobody
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks - cancelled:
                task.cancel()
            if not tasks:
                break
            cancelled = tasks                     # others may begin while one of these takes long
            self.loop.run_until_complete(asyncio.wait(tasks, timeout=0.1))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())


def _set_result(future: "asyncio.Future[Any]", result: Any) -> None:
    if not future.done():                         # its waiter may have been cancelled
        future.set_result(result)


def _set_exception(future: "asyncio.Future[Any]", error: BaseException) -> None:
    if isinstance(error, StopIteration):          # which no future takes; see PEP 479
        error = RuntimeError(f"StopIteration: {error}")
    if not future.done():
        future.set_exception(error)


def wait_for(register: Callable[[Callable[[], None]], None]) -> None:
    """Wait until the function that is given to `register` is called. Blocks."""
    called = threading.Event()
    register(called.set)
    called.wait()


async def wait_for_async(register: Callable[[Callable[[], None]], None]) -> None:
    """Wait until the function that is given to `register` is called, by any thread."""
    loop = asyncio.get_running_loop()
    future: "asyncio.Future[None]" = loop.create_future()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):   # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_set_result, future, None)

    register(wake)
    await future


def open_file_room() -> int:
    """Return how many connections the system's limit of open files leaves room for."""
    try:
        import resource                           # not on every platform
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except ImportError:
        return MAX_CONNECTIONS
    if limit == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return limit - min(limit // 2, MAX_OPENING + 128)            # those being opened, and our files


def trim_memory() -> None:
    """Return free memory to the system, where the C library can do that (GNU's)."""
    gc.collect()
    try:
        import ctypes                             # not in every build of Python
        ctypes.CDLL(None).malloc_trim(0)
    except (ImportError, OSError, AttributeError):
        pass


class Workers:
    """Daemon threads that run blocking calls, started when needed, `limit` at the most.

    Unlike those of concurrent.futures, they do not hold up the end of the process, and end when
    they have had nothing to do for IDLE_S.
    """

    IDLE_S = 5.0

    def __init__(self, name: str, limit: int = MAX_WORKERS) -> None:
        self._name, self._limit = name, limit
        self._lock = threading.Condition()
        self._jobs: Deque[Callable[[], None]] = collections.deque()    # guarded by _lock
        self._threads = self._idle = 0            # guarded by _lock
        self._stopped = False                     # guarded by _lock

    def run(self, job: Callable[[], None]) -> None:
        """Run `job` in a thread, now or when one is free. It must not raise.

        Raises Unavailable after stop(), and when there is no thread and none can be had.
        """
        with self._lock:
            if self._stopped:
                raise Unavailable("the plugin is being removed")
            self._jobs.append(job)
            if self._idle >= len(self._jobs):
                self._lock.notify()
                return
            if self._threads >= self._limit:
                return                            # it waits for the next thread that is done
            self._threads += 1
        try:
            threading.Thread(target=self._work, name=f"{self._name}-worker", daemon=True).start()
        except RuntimeError:                      # the system gives us no more threads
            self._on_no_thread(job)

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return what `function(*args)` returns, run in a thread; raise what it raises."""
        return await self.submit(asyncio.get_running_loop(), function, *args)

    def submit(self, loop: asyncio.AbstractEventLoop, function: Callable[..., Any],
               *args: Any) -> "asyncio.Future[Any]":
        """Run `function(*args)` in a thread; return the future of its result. On the loop.

        Raises as run() does.
        """
        future: "asyncio.Future[Any]" = loop.create_future()

        def job() -> None:
            try:
                result, setter = function(*args), _set_result
            except BaseException as error:
                result, setter = error, _set_exception
            with contextlib.suppress(RuntimeError):    # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(setter, future, result)

        self.run(job)
        return future

    def stop(self) -> None:
        """End the idle threads now, the others when their job is done."""
        with self._lock:
            self._stopped = True
            self._lock.notify_all()

    def _on_no_thread(self, job: Callable[[], None]) -> None:
        with self._lock:
            self._threads -= 1
            if self._threads or job not in self._jobs:
                return                            # it waits for the next thread that is done
            self._jobs.remove(job)
        raise Unavailable("the system gives this process no more threads: try again later",
                          headers=_retry_after(10))

    def _work(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
                self._lock.wait_for(lambda: self._jobs or self._stopped, self.IDLE_S)
                self._idle -= 1
                if not self._jobs:
                    self._threads -= 1
                    return
                job = self._jobs.popleft()
            job()
            del job                               # or an idle thread would hold its request


# ---------------------------------------------------------------------------
# 7. Sockets on a loop, and dialling. No HTTP semantics, no frames: bytes move here.
# ---------------------------------------------------------------------------

_WOULD_BLOCK = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Channel:
    """A non-blocking socket, plain or TLS, served by a loop.

    `on_data(bytes)` is called for what arrives, `on_close(reason)` once, at the end; both on the
    loop. send() may be called by any thread: it writes at once when the socket takes it, which
    saves a switch to the loop's thread, and leaves the rest to the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket,
                 on_data: Callable[[bytes], None], on_close: Callable[[str], None]) -> None:
        sock.setblocking(False)
        self._loop, self._sock, self._fd = loop, sock, sock.fileno()
        self._on_data, self._on_close = on_data, on_close
        self._is_tls = isinstance(sock, ssl.SSLSocket)
        # covers every use of the socket: an SSLSocket must not be used by two threads at once
        self._lock = threading.Lock()
        self._unsent: Deque[memoryview] = collections.deque()    # guarded by _lock
        # bytes that wait to be sent; guarded by _lock, and read without it as an estimate
        self.unsent = 0
        self._room_waiters: Deque[Callable[[], None]] = collections.deque()      # likewise
        self.closed = False                       # guarded by _lock; only close() sets it
        self._closing = self._draining = False    # the loop's: see close_when_sent()
        self._reading = self._writing = False     # the loop's: what the selector watches
        self._flushing = False                    # the loop's: see send_soon()
        self.sent = 0                             # bytes in all; guarded by _lock
        self.room = LINK_ROOM                     # unsent bytes up to which has_room; set once

    @property
    def sock(self) -> socket.socket:
        """The socket, for its options alone."""
        return self._sock

    def start(self) -> None:
        """Begin to read. On the loop."""
        self.resume_reading()

    def pause_reading(self) -> None:
        """Leave further bytes in the kernel, which slows the peer down. On the loop."""
        if self._reading:
            self._loop.remove_reader(self._fd)
            self._reading = False

    def resume_reading(self) -> None:
        """Undo pause_reading(). On the loop."""
        if not self._reading and not self.closed:
            self._loop.add_reader(self._fd, self._on_readable)
            self._reading = True
            if self._is_tls:                      # it may hold bytes that select() does not see
                self._loop.call_soon(self._on_readable)

    @property
    def has_room(self) -> bool:
        """Whether what can wait, such as bodies and notifications, may be sent now."""
        return self.unsent < self.room

    def when_room(self, waiter: Callable[[], None]) -> None:
        """Call `waiter` on the loop, once, when has_room is or becomes true, or at the close."""
        with self._lock:
            if self.unsent >= self.room:
                self._room_waiters.append(waiter)
                return
        self._call_on_loop(waiter)

    def send(self, *pieces: Union[bytes, memoryview]) -> None:
        """Send bytes, now or as soon as the socket takes them. Any thread. Lost after the close."""
        with self._lock:
            if self.closed:
                return
            waiting = bool(self._unsent)
            if not waiting and len(pieces) == 1:
                try:
                    sent = self._sock.send(pieces[0])
                except OSError:                   # the next try has it again
                    sent = 0
                self.sent += sent
                if sent == len(pieces[0]):        # nearly always
                    return
                pieces = (memoryview(pieces[0])[sent:],)
            for piece in pieces:
                self._unsent.append(memoryview(piece))
                self.unsent += len(piece)
            if waiting and self.unsent <= 2 * MAX_LINK_BUFFER:
                return                            # the loop is at it; order must be kept
            # a peer that lets us collect so much does not read, or means no good
            error = self._flush_locked() if not waiting else "it does not read what is sent to it"
            done = not self._unsent
        if error:
            self._call_on_loop(self.close, error)
        elif not done:
            self._call_on_loop(self._watch_writable)

    def send_soon(self, data: bytes) -> None:
        """Send `data` together with what else is sent in this turn of the loop. On the loop."""
        with self._lock:
            if self.closed:
                return
            self._unsent.append(memoryview(data))
            self.unsent += len(data)
        if not self._flushing and not self._writing:
            self._flushing = True
            self._loop.call_soon(self._flush_soon)

    def close_when_sent(self) -> None:
        """Close once everything is sent and the peer had time to read it. On the loop.

        What still arrives is read and dropped for LINGER_S: closing with bytes unread would reset
        the connection, and the peer could lose the answer (RFC 9112, section 9.6).
        """
        self._closing = True
        if not self.unsent:
            self._linger()

    def _linger(self) -> None:
        if self._draining or self.closed:
            return
        self._draining = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)   # under TLS: reads raw bytes from now on
        self.resume_reading()
        self._loop.call_later(LINGER_S, self.close, "")

    def close(self, reason: str = "closed") -> None:
        """Close now and drop what is unsent; calls on_close once. On the loop."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self._unsent.clear()
            self.unsent = 0
        self._tell_room()
        self.pause_reading()
        if self._writing:
            self._loop.remove_writer(self._fd)
        with contextlib.suppress(OSError):
            # not unwrap(): TLS's closing handshake would wait for the peer
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._on_close(reason)

    def _call_on_loop(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):   # the loop is closed: so is the process, soon
            self._loop.call_soon_threadsafe(function, *args)

    def _on_readable(self) -> None:
        if self.unsent:
            self._on_writable()                   # TLS may have had to read before it could write
        while self._reading and not self.closed:
            data, reason = self._recv()
            if reason is not None:
                self.close(reason)
            elif data and not self._draining:
                self._on_data(data)
            # what has more becomes readable again, unless TLS has it: of a record that was cut
            if len(data) < READ_SIZE or not self._has_pending():
                return

    def _has_pending(self) -> bool:
        if not self._is_tls or self.closed or self._draining or not self._reading:
            return False
        return self._sock.pending() > 0

    def _recv(self) -> Tuple[bytes, Optional[str]]:
        try:
            with self._lock:
                if self.closed:
                    return b"", None
                data = self._sock.recv(READ_SIZE)
                if self._is_tls and len(data) == MAX_RECORD:
                    data += self._recv_records_locked()
        except _WOULD_BLOCK:
            return b"", None
        except OSError as error:
            return b"", str(error)
        return data, None if data else "the peer closed the connection"

    def _recv_records_locked(self) -> bytes:
        """Return what further full records hold: under TLS, recv() gives one at a time."""
        pieces = []
        with contextlib.suppress(OSError):           # an error comes again
            while len(pieces) < READ_SIZE // MAX_RECORD - 1:
                pieces.append(self._sock.recv(READ_SIZE))
                if len(pieces[-1]) < MAX_RECORD:
                    break
        return b"".join(pieces)

    def _flush_soon(self) -> None:
        self._flushing = False
        self._on_writable()
        self._watch_writable()

    def _watch_writable(self) -> None:
        if not self._writing and not self.closed and self.unsent:
            self._loop.add_writer(self._fd, self._on_writable)
            self._writing = True

    def _on_writable(self) -> None:
        with self._lock:
            error = None if self.closed else self._flush_locked()
            done = not self._unsent
        if error:
            self.close(error)
        elif done and self._writing:
            self._loop.remove_writer(self._fd)
            self._writing = False
        if self._room_waiters and self.has_room:
            self._tell_room()
        if done and self._closing:
            self._linger()

    def _tell_room(self) -> None:
        with self._lock:
            waiters, self._room_waiters = self._room_waiters, collections.deque()
        for waiter in waiters:                    # in the order of their asking: streams take turns
            waiter()

    def _flush_locked(self) -> Optional[str]:
        """Send what the socket takes; return the reason when the connection is broken."""
        try:
            while self._unsent:
                self._drop_sent_locked(self._send_some_locked())
        except _WOULD_BLOCK:
            return None
        except OSError as error:
            return str(error)
        return None

    def _send_some_locked(self) -> int:
        if len(self._unsent) == 1:
            return self._sock.send(self._unsent[0])
        if self._is_tls:
            return self._sock.send(self._join_locked())
        return self._sock.sendmsg(itertools.islice(self._unsent, MAX_PIECES))

    def _drop_sent_locked(self, sent: int) -> None:
        self.unsent -= sent
        self.sent += sent
        while self._unsent and sent >= len(self._unsent[0]):
            sent -= len(self._unsent.popleft())
        if sent:
            self._unsent[0] = self._unsent[0][sent:]

    def _join_locked(self) -> memoryview:
        """Replace the first of the unsent pieces by one of up to twice READ_SIZE; return it.

        Under TLS a call makes a record, and a call that was not done must be made again as it was.
        """
        pieces, size = [], 0
        while self._unsent and size < READ_SIZE and \
                (not size or len(self._unsent[0]) <= READ_SIZE):
            pieces.append(self._unsent.popleft())
            size += len(pieces[-1])
        self._unsent.appendleft(memoryview(b"".join(pieces)) if len(pieces) > 1 else pieces[0])
        return self._unsent[0]


class BridgeURL(NamedTuple):
    """A bridge's URL in parts; `prefix` is the path that a reverse proxy put before ours."""
    tls: bool
    host: str
    port: int
    prefix: str
    token: Optional[str] = None

    @property
    def origin(self) -> str:
        """Return scheme, host and port, without the prefix."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine, by its name or number."""
        return is_loopback(self.host)

    def __str__(self) -> str:
        return self.origin + self.prefix


def parse_bridge_url(text: str) -> BridgeURL:
    """Return the parts of "http(s)://host[:port][/prefix]"; ws(s) and a final /register are taken.

    A password in the URL is taken as the token, for URLs made for other tools. Raises ValueError.
    """
    parts = urllib.parse.urlsplit(text if "://" in text else f"http://{text}")
    tls = {"http": False, "ws": False, "https": True, "wss": True}.get(parts.scheme)
    try:
        port = parts.port
    except ValueError:
        tls = None
    if tls is None or not parts.hostname:
        raise ValueError("a bridge URL is like https://bridge.example.org:8000")
    prefix = parts.path.rstrip("/")
    if prefix.endswith("/register"):
        prefix = prefix[:-len("/register")]
    token = urllib.parse.unquote(parts.password) if parts.password else None
    default = DEFAULT_PORT if "://" not in text else 443 if tls else 80
    return BridgeURL(tls, parts.hostname, port or default, prefix, token)


def is_loopback(host: str) -> bool:
    """Whether `host` names this machine for certain: localhost, 127.0.0.0/8 or ::1."""
    if host.lower() == "localhost":
        return True
    host = host.strip("[]")
    with contextlib.suppress(OSError, ValueError):
        return socket.inet_pton(socket.AF_INET, host)[0] == 127
    with contextlib.suppress(OSError, ValueError):
        return socket.inet_pton(socket.AF_INET6, host) == socket.inet_pton(socket.AF_INET6, "::1")
    return False                                  # a name


def find_proxy(url: BridgeURL) -> Optional[BridgeURL]:
    """Return the HTTP proxy that the environment names for `url` (HTTPS_PROXY, NO_PROXY, ...).

    Never one for this machine itself: sites set a proxy for the world, and tunnels end here.
    Raises ValueError for a proxy that is not http://.
    """
    if url.is_loopback or not any(name.lower().endswith("_proxy") for name in os.environ):
        return None
    import urllib.request
    if urllib.request.proxy_bypass(f"{url.host}:{url.port}"):
        return None
    proxy = urllib.request.getproxies().get("https" if url.tls else "http")
    if not proxy:
        return None
    parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"a proxy must be http://host:port; the environment has {parts.scheme}://")
    user = urllib.parse.unquote(parts.username or "")
    secret = f"{user}:{urllib.parse.unquote(parts.password or '')}" if user else None
    return BridgeURL(False, parts.hostname, parts.port or 80, "", secret)


def client_tls(cert: Optional[str]) -> Tuple[ssl.SSLContext, Optional[bytes]]:
    """Return (context, pinned SHA-256 fingerprint or None) that verify a bridge.

    cert: None for the system's CAs, a file of CA or self-signed certificates (PEM), or
    "sha256:HEX", which pins the bridge's own certificate. Raises ValueError for a bad one.
    """
    if cert and cert.lower().startswith("sha256:"):
        return _pinning_tls(), _parse_fingerprint(cert)
    try:
        context = ssl.create_default_context(cafile=cert or None)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"the certificate file {cert!r} cannot be read: {error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Python 3.13 asks for extensions that the self-made certificates of older tools lack
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    return context, None


def _pinning_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False                # the fingerprint is checked in place of both,
    context.verify_mode = ssl.CERT_NONE           # by check_pin(), before a byte is sent
    return context


def _parse_fingerprint(text: str) -> bytes:
    try:
        digest = bytes.fromhex(text[len("sha256:"):].replace(":", ""))
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise ValueError("a pinned certificate is 'sha256:' and 64 hexadecimal digits")
    return digest


def check_pin(sock: socket.socket, pin: Optional[bytes]) -> None:
    """Raise ssl.SSLCertVerificationError unless the peer's certificate is the pinned one."""
    if pin is None or not isinstance(sock, ssl.SSLSocket):
        return
    found = hashlib.sha256(sock.getpeercert(binary_form=True) or b"").digest()
    if not hmac.compare_digest(found, pin):
        raise ssl.SSLCertVerificationError(
            f"its fingerprint is sha256:{found.hex()}, not the pinned one")


def _recv_response(sock: socket.socket) -> Tuple[int, Dict[str, str], bytes]:
    """Return what parse_response_head() does; the peer has HANDSHAKE_S in all, however it drips."""
    buffer, end = b"", time.monotonic() + HANDSHAKE_S
    while True:
        sock.settimeout(max(0.001, end - time.monotonic()))
        data = sock.recv(READ_SIZE)
        if not data:
            raise ProtocolError("the connection was closed before an answer came")
        buffer += data
        parsed = parse_response_head(buffer)
        if parsed is not None:
            sock.settimeout(HANDSHAKE_S)
            return parsed


def _open_tcp(url: BridgeURL) -> socket.socket:
    # as bytes: text goes through a codec that weighs 0.4 MiB
    host: Any = url.host.encode() if url.host.isascii() else url.host
    sock = socket.create_connection((host, url.port), timeout=HANDSHAKE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return sock


def limit_unacknowledged(sock: socket.socket, seconds: float) -> bool:
    """Let the system end a connection whose peer confirms no byte for so long, where it can.

    Unlike a heartbeat, that is the kernel's answer there: a busy process gives it, a dead host not.
    """
    if not hasattr(socket, "TCP_USER_TIMEOUT"):   # Linux has it
        return False
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
    return True


def limit_unsent(sock: socket.socket) -> None:
    """Keep what is not sent yet in our hands, so that an answer need not queue in the kernel."""
    option = getattr(socket, "TCP_NOTSENT_LOWAT", 25 if sys.platform == "linux" else None)
    if option is not None:
        with contextlib.suppress(OSError):        # a limit more is a favour, not a need
            sock.setsockopt(socket.IPPROTO_TCP, option, LINK_ROOM // 2)


def _open_tunnel(proxy: BridgeURL, url: BridgeURL) -> socket.socket:
    """Ask an HTTP proxy for a connection to `url` (CONNECT; RFC 9110, section 9.3.6)."""
    sock = _open_tcp(proxy)
    try:
        host = f"[{url.host}]" if ":" in url.host else url.host
        lines = [f"CONNECT {host}:{url.port} HTTP/1.1", f"Host: {host}:{url.port}"]
        if proxy.token:
            basic = base64.b64encode(proxy.token.encode()).decode()
            lines.append(f"Proxy-Authorization: Basic {basic}")
        sock.sendall("\r\n".join([*lines, "", ""]).encode())
        status, _, rest = _recv_response(sock)
        if status // 100 != 2 or rest:
            raise ProtocolError(f"the proxy {proxy.host}:{proxy.port} answers {status} to CONNECT")
        return sock
    except BaseException:
        sock.close()
        raise


def open_route(url: BridgeURL) -> socket.socket:
    """Return a socket that leads to where a bridge listens, without TLS as yet. Blocks.

    Through an HTTP proxy where the environment names one. Raises what open_connection() does.
    """
    proxy = find_proxy(url)
    return _open_tunnel(proxy, url) if proxy else _open_tcp(url)


def open_connection(url: BridgeURL, cert: Optional[str],
                    route: Callable[[BridgeURL], socket.socket] = open_route) -> socket.socket:
    """Return a connected socket to a bridge, with the TLS it needs, verified. Blocks.

    route: how to get there. Whatever it is, the certificate must be that of the URL's own host.
    Raises OSError (of which SSL errors are a kind), ProtocolError or ValueError.
    """
    context, pin = client_tls(cert) if url.tls else (None, None)
    sock = route(url)
    try:
        if context is not None:
            # as bytes, if it can be: for text Python loads the codec of IDNA
            host = url.host.encode("ascii") if url.host.isascii() else url.host
            sock = context.wrap_socket(sock, server_hostname=host)
            check_pin(sock, pin)
        return sock
    except BaseException:
        sock.close()
        raise


class Refused(Exception):
    """The upgrade was answered with something else than 101."""

    _ADVICE = {401: "the bridge does not know this token: see --token and RADICAL_BRIDGE_TOKEN",
               403: "the token may not register this edge: it needs the scope 'edge' or 'admin'",
               404: "there is no bridge at this path: check the URL's prefix",
               429: "too many wrong tokens came from here: wait a minute"}

    def __init__(self, status: int, fields: Dict[str, str]) -> None:
        advice = self._ADVICE.get(status, "is this the URL of a Radical Edge bridge?")
        super().__init__(f"HTTP {status}: {advice}")
        self.status = status
        self.retry_after = fields.get("retry-after", "")


def open_websocket(url: BridgeURL, token: Optional[str], cert: Optional[str],
                   route: Callable[[BridgeURL], socket.socket] = open_route
                   ) -> Tuple[socket.socket, bytes]:
    """Return (socket, first bytes) of a WebSocket to a bridge's /register. Blocks.

    Raises what open_connection() raises, and Refused when the bridge answers anything but 101.
    """
    sock = open_connection(url, cert, route)
    try:
        key = base64.b64encode(os.urandom(16)).decode()
        host = url.origin.partition("://")[2]
        lines = [f"GET {url.prefix}/register HTTP/1.1", f"Host: {host}", "Connection: Upgrade",
                 "Upgrade: websocket", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}"]
        if token:
            lines.append(f"Authorization: Bearer {token}")
        sock.sendall("\r\n".join([*lines, "", ""]).encode())
        status, fields, rest = _recv_response(sock)
        if status != HTTPStatus.SWITCHING_PROTOCOLS:
            raise Refused(status, fields)
        if fields.get("sec-websocket-accept") != accept_key(key) or \
                fields.get("upgrade", "").lower() != "websocket" or \
                "sec-websocket-extensions" in fields:            # none was offered
            raise ProtocolError("the upgrade was not answered as RFC 6455, section 4.1, asks")
        return sock, rest
    except BaseException:
        sock.close()
        raise


class NotSent(OSError):
    """The connection could not be made, so that nothing was sent."""


def explain(error: BaseException) -> str:
    """Return what a connection error means and what to do about it, in one line."""
    if isinstance(error, NotSent):
        return str(error)                         # explained when it was made
    if isinstance(error, ssl.SSLCertVerificationError):
        return (f"the bridge's certificate is not trusted ({error.args[-1]}): give its certificate "
                "or its fingerprint with --cert or RADICAL_BRIDGE_CERT")
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({error.reason or error}): is it https there?"
    if isinstance(error, socket.gaierror):
        return f"the bridge's host name is not known here ({error.strerror}): check --url"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there: is the bridge running, and are host and port right?"
    if isinstance(error, (socket.timeout, TimeoutError)):
        return "no answer: a firewall may be in between; is a proxy needed (HTTPS_PROXY)?"
    return str(error) or type(error).__name__


# ---------------------------------------------------------------------------
# 8. Security: who may do what. Tokens and where they are kept, cookies, origins, hosts. No sockets.
# ---------------------------------------------------------------------------

class Scope(str, enum.Enum):
    """What a token is good for: everything; plugins and own sessions; looking; registering."""
    ADMIN, CLIENT, READ, EDGE = "admin", "client", "read", "edge"


# what a route may ask for, and the scopes that have it
_GRANTS = {"look": frozenset((Scope.ADMIN, Scope.CLIENT, Scope.READ)),
           "use": frozenset((Scope.ADMIN, Scope.CLIENT)),
           "register": frozenset((Scope.ADMIN, Scope.EDGE)),
           "manage": frozenset((Scope.ADMIN,))}


class Identity(NamedTuple):
    """Who makes a request: the token's name and scope, and the edge names it may register.

    expires: when the token or the sign-in ends, in seconds since the epoch; None for never.
    """
    name: str
    scope: Scope
    edges: str = "*"
    expires: Optional[float] = None

    @property
    def has_expired(self) -> bool:
        """Whether the token or the sign-in has ended."""
        return self.expires is not None and self.expires <= time.time()

    def may(self, right: str) -> bool:
        """Whether the token's scope grants "look", "use", "register" or "manage"."""
        return self.scope in _GRANTS[right]

    def describe(self) -> Dict[str, Any]:
        """Return {"name", "scope", "rights", "expires"}, as a page that adapts to it needs them."""
        return {"name": self.name, "scope": self.scope.value, "expires": self.expires,
                "rights": [right for right in _GRANTS if self.may(right)]}


ANYONE = Identity("anyone", Scope.ADMIN)          # with --no-auth


def home_dir() -> Path:
    """Return ~/.radical/edge, where tokens, certificates and state are kept."""
    return Path(os.path.expanduser("~")) / ".radical" / "edge"


def write_private(path: Path, text: str) -> None:
    """Replace a file atomically by one that only its owner can read. Safe on NFS."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def read_private(path: Path) -> Optional[str]:
    """Return a file's text without white space around it, None when there is no such file.

    Raises EdgeError when others can read it (as ssh does with its keys) or it cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            known = os.fstat(file.fileno())
            # Python makes room for all that is asked for, which `ulimit -v` may not allow
            size = known.st_size if stat.S_ISREG(known.st_mode) else MAX_HEAD
            text = file.read(min(size, MAX_PRIVATE_FILE))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeError(f"{path} cannot be read: {error}") from None
    if known.st_mode & 0o077:
        raise EdgeError(f"{path} can be read by others: chmod 600 {path}")
    return text.strip()


@contextlib.contextmanager
def must_write(path: Path, otherwise: str) -> Iterator[None]:
    """Make of an OSError, as of a full disk, an InsufficientStorage that says what to do.

    otherwise: what helps where the place cannot be made writable.
    """
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise InsufficientStorage(
            f"{path} cannot be written ({error.strerror or error}): make "
            f"{'room there' if is_full else 'it writable'}, or {otherwise}") from None


class LockFile:
    """A file that one process alone can have, in a way that is safe on NFS: no advisory locks.

    It is made by link(), which either succeeds or does not, and names its owner. On this machine
    the owner's process tells whether it lives; on another one, which may have the same name,
    whether the file was touched of late.
    """

    STALE_S = 30.0             # without a touch, the owner on another host is taken for dead
    POLL_S = 0.02

    def __init__(self, path: Path) -> None:
        self._path = path
        self._owner = {"host": socket.gethostname(), "machine": machine_id(), "pid": os.getpid(),
                       "started": process_start(os.getpid()), "key": secrets.token_hex(8)}
        self._text = encode_json(self._owner)

    def take(self, seconds: float = 0.0) -> Optional[str]:
        """Take the file; return None, or who still has it after so long. Blocks."""
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        deadline = time.monotonic() + seconds
        while True:
            holder = self._take_now()
            if holder is None or time.monotonic() >= deadline:
                return holder
            time.sleep(random.uniform(0.5, 1.5) * self.POLL_S)   # who waits takes turns

    def give_back(self) -> None:
        """Let others have it, unless one has it by now."""
        if self._read() == self._text:
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def _take_now(self) -> Optional[str]:
        for _ in range(3):                        # again when a stale one was cleared away
            if self._try_to_make():
                return None
            holder = self._clear_stale()
            if holder is not None:
                return holder
        return "another process, as of this moment"

    def _try_to_make(self) -> bool:
        temporary = self._path.with_name(f".{self._path.name}.{self._owner['key']}")
        try:
            temporary.write_text(self._text, encoding="utf-8")
            try:
                os.link(temporary, self._path)
                return True
            except FileExistsError:               # ours, when NFS has lost the first answer
                return self._read() == self._text
            except OSError:                       # a file system without hard links
                return self._try_to_create()
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    def _try_to_create(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(self._text)
        except OSError:                           # a full disk: half a lock would be nobody's
            os.unlink(self._path)
            raise
        return True

    def _clear_stale(self) -> Optional[str]:
        """Remove the file of a process that is gone; return who has it when it is not."""
        text = self._read()
        if text is None:
            return None
        try:
            owner = json.loads(text)
            host, pid, started = str(owner["host"]), int(owner["pid"]), int(owner["started"])
            mine = self._owner["machine"]
            is_here = host == self._owner["host"] and owner.get("machine", mine) == mine
        except (ValueError, KeyError, TypeError):
            # half written, by what was killed: age decides
            host, pid, started, is_here = "", 0, 0, False
        if not self._is_dead(is_here, pid, started):
            return f"process {pid} on {host or '?'}"
        # whoever renames it away has cleared it; if it was a new one by now, it is put back
        taken = self._path.with_name(f".{self._path.name}.stale.{self._owner['key']}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._path, taken)
            if taken.read_text(encoding="utf-8", errors="replace") != text:
                with contextlib.suppress(OSError):
                    os.link(taken, self._path)
            os.unlink(taken)
        return None

    def _is_dead(self, is_here: bool, pid: int, started: int) -> bool:
        if not is_here:
            return self._age() > self.STALE_S
        return process_start(pid) != started

    def _age(self) -> float:
        """Return the seconds since the file was touched, by the clock of the file's server."""
        probe = self._path.with_name(f".{self._path.name}.now.{self._owner['key']}")
        try:
            probe.touch()
            return os.stat(probe).st_mtime - os.stat(self._path).st_mtime
        except OSError:
            return 0.0
        finally:
            with contextlib.suppress(OSError):
                os.unlink(probe)

    def _read(self) -> Optional[str]:
        try:
            return self._path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None


def machine_id() -> str:
    """Return what tells this machine and its processes' numbers from others', until it is started
    anew; "" where that cannot be known. Containers and clones may have the same host name.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except (OSError, UnicodeDecodeError):
        return ""


def process_start(pid: int) -> int:
    """Return when a process was started, in clock ticks; 0 when it is gone, 1 if it can't be known.

    With the pid it names a process for good: pids are used again.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        pass
    if os.path.isdir("/proc/self"):
        return 0
    try:                                          # a system without /proc
        os.kill(pid, 0)
        return 1
    except OSError:
        return 0


def _digest(token: str) -> str:
    # tokens are 256 random bits, so a plain hash cannot be searched; no salt, no stretching
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


def is_valid_name(name: Any) -> bool:
    """Whether `name` may name an edge or a plugin instance: it becomes part of URLs and paths."""
    return isinstance(name, str) and NAME_PATTERN.fullmatch(name) is not None


CHILD_TOKEN = "child"          # what a token begins with that an edge made for a child of its own


def make_child_token(token: str, edge_name: str, expires: int) -> str:
    """Return a token that registers one edge alone, as long as `token`, which it is made from.

    No bridge need be asked: like a cookie, it is signed with the hash of the first, which does not
    follow from it. expires: seconds since the epoch. Raises ValueError for a child's own token.
    """
    if token.startswith(CHILD_TOKEN + "~"):
        raise ValueError("this edge has a token for itself alone: to start others, it needs one of "
                         "its own (--token add NAME --scope edge)")
    token_hash = _digest(token)
    signed = f"{CHILD_TOKEN}~{_token_id(token_hash)}~{edge_name}~{expires}"
    return f"{signed}~{_sign_child(token_hash, signed)}"


def _token_id(token_hash: str) -> str:
    return hashlib.sha256(f"id of {token_hash}".encode()).hexdigest()[:16]


def _sign_child(token_hash: str, signed: str) -> str:
    return hmac.new(token_hash.encode(), signed.encode(), hashlib.sha256).hexdigest()


class TokenStore:
    """The tokens that a bridge knows: hashes, in a file that only its owner can read.

    path: a JSON file {"tokens": [{"name", "scope", "hash", "created", "expires", "edges"}]}.
    find() may be called by any thread. refresh() notices changes on disk, so that a token is
    revoked without a restart. Who changes the file has a LockFile beside it; who reads it needs
    none, for the file is replaced as a whole. `table` is what find() looks at, {prefix of a hash:
    [(hash, identity)]}: another object once any token was added or revoked.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # replaced as a whole and never changed, so that readers need no lock
        self._records: List[Dict[str, Any]] = []
        self.table: Dict[str, List[Tuple[str, Identity]]] = {}
        self._stamp: Tuple[int, ...] = (-1,)      # of the file that was read
        self._fixed: List[Dict[str, Any]] = []    # not in the file: RADICAL_BRIDGE_TOKEN
        self.refresh()

    def refresh(self) -> bool:
        """Read the file if it has changed; return whether it had. Raises EdgeError if it is bad."""
        try:
            status = os.stat(self._path)
            stamp: Tuple[int, ...] = (status.st_mtime_ns, status.st_size, status.st_ino)
        except FileNotFoundError:
            stamp = ()
        if stamp == self._stamp:
            return False
        self._set(self._read() if stamp else [])
        self._stamp = stamp
        return True

    def find(self, token: str) -> Optional[Identity]:
        """Return who the token belongs to; None when it is unknown, revoked or expired."""
        if token.startswith(CHILD_TOKEN + "~"):
            return self._find_child(token)
        digest = _digest(token)
        # a hash's prefix tells nothing of the token; the whole is compared in constant time
        for known, identity in self.table.get(digest[:8], ()):
            if hmac.compare_digest(known, digest):
                return None if identity.has_expired else identity
        return None

    def find_named(self, name: str) -> Optional[Tuple[Identity, str]]:
        """Return (identity, hash) of the token with this name, as find() does."""
        for record in self._records + self._fixed:
            if record["name"] == name:
                identity = self._identity(record)
                return None if identity.has_expired else (identity, record["hash"])
        return None

    def is_valid(self, identity: Identity) -> bool:
        """Whether the token of somebody who was let in is still good."""
        return self.find_named(identity.name) is not None

    def add_fixed(self, name: str, token: str) -> None:
        """Accept `token` as admin for as long as this process lives; it is written nowhere."""
        self._fixed.append({"name": name, "scope": "admin", "hash": _digest(token)})
        self._set(self._records)

    def add(self, name: str, scope: str = "client", *, expires: Optional[float] = None,
            edges: str = "*") -> str:
        """Make a token, store its hash, and return the token, which is told only this once.

        expires: seconds since the epoch, None for never. edges: a pattern such as "hpc*".
        Raises Unprocessable for a bad name or scope, Conflict for a name that is taken or when
        another process does not let go of the file, InsufficientStorage. Blocks.
        """
        if not is_valid_name(name):
            raise Unprocessable(f"name: {name!r} is not 1 to 64 letters, digits, '.', '_' or '-'")
        if scope not in [item.value for item in Scope]:
            raise Unprocessable(f"scope: {scope!r} is not admin, client, read or edge")
        token = secrets.token_urlsafe(32)
        with self._changing():
            if any(record["name"] == name for record in self._records):
                raise Conflict(f"there is a token named {name!r}: revoke it, or take another name")
            self._append(token, name, scope, expires, edges)
        return token

    def add_first(self, name: str, keep: Callable[[str], None]) -> bool:
        """Make an admin's token and let keep() write it down, if there is none; return whether.

        Its hash is stored last, so that a full disk leaves no token that nobody knows.
        """
        token = secrets.token_urlsafe(32)
        with self._changing():
            if self._records:                     # another bridge was faster
                return False
            keep(token)
            self._append(token, name, "admin", None, "*")
        return True

    def revoke(self, name: str) -> None:
        """Forget the token with this name. Raises NotFound, and Conflict as add() does. Blocks."""
        with self._changing():
            kept = [record for record in self._records if record["name"] != name]
            if len(kept) == len(self._records):
                raise NotFound(f"there is no token named {name!r}: see --token list")
            self._write(kept)

    def list(self) -> List[Dict[str, Any]]:
        """Return {"name", "scope", "edges", "created", "expires"} of each token in the file."""
        self.refresh()
        return [{key: record.get(key) for key in ("name", "scope", "edges", "created", "expires")}
                for record in self._records]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Keep others from changing the file meanwhile, and begin with what it says now."""
        lock = LockFile(self._path.with_name(f"{self._path.name}.lock"))
        with must_write(self._path, "give a bridge its one token in RADICAL_BRIDGE_TOKEN"):
            holder = lock.take(TOKENS_LOCK_S)
            if holder is not None:
                raise Conflict(f"{self._path} is being changed by {holder}: try again when that is "
                               f"done; if it hangs, end it, and remove {self._path}.lock")
            try:
                self._stamp = (-1,)               # on NFS, only opening a file tells what is new
                self.refresh()
                yield
            finally:
                lock.give_back()

    def _find_child(self, token: str) -> Optional[Identity]:
        """Return who a token of make_child_token() is: its maker, for registering that edge."""
        signed, _, signature = token.rpartition("~")
        _, key, edge_name, expires = [*signed.split("~"), "", "", ""][:4]
        if not is_valid_name(edge_name) or not re.fullmatch("[0-9]{1,12}", expires) or \
                int(expires) <= time.time():
            return None
        for record in self._records + self._fixed:
            if _token_id(record["hash"]) == key and hmac.compare_digest(
                    _sign_child(record["hash"], signed).encode(), signature.encode()):
                maker = self._identity(record)
                if not maker.has_expired and maker.may("register") and \
                        fnmatch.fnmatchcase(edge_name, maker.edges):
                    until = min(int(expires), maker.expires or float("inf"))
                    return Identity(maker.name, Scope.EDGE, edge_name, until)
        return None

    def _set(self, records: List[Dict[str, Any]]) -> None:
        by_prefix: Dict[str, List[Tuple[str, Identity]]] = {}
        for record in records + self._fixed:
            known = record["hash"], self._identity(record)
            by_prefix.setdefault(record["hash"][:8], []).append(known)
        self._records, self.table = records, by_prefix

    def _read(self) -> List[Dict[str, Any]]:
        text = read_private(self._path)
        try:
            records = json.loads(text or "{}").get("tokens", [])
            for record in records:
                self._check_record(record)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise EdgeError(f"{self._path} is damaged: restore it, or delete it and make new tokens"
                            ) from None
        return records

    @staticmethod
    def _check_record(record: Dict[str, Any]) -> None:
        Scope(record["scope"])
        if len(bytes.fromhex(record["hash"])) != 32 or not is_valid_name(record["name"]) or \
                not isinstance(record.get("expires") or 0, (int, float)) or \
                not isinstance(record.get("edges") or "*", str):
            raise ValueError(record["name"])

    def _append(self, token: str, name: str, scope: str, expires: Optional[float], edges: str
                ) -> None:
        self._write([*self._records, {"name": name, "scope": scope, "hash": _digest(token),
                                      "edges": edges, "created": int(time.time()),
                                      "expires": expires}])

    def _write(self, records: List[Dict[str, Any]]) -> None:
        write_private(self._path, json.dumps({"tokens": records}, indent=1) + "\n")
        self.refresh()

    @staticmethod
    def _identity(record: Dict[str, Any]) -> Identity:
        return Identity(record["name"], Scope(record["scope"]), record.get("edges") or "*",
                        record.get("expires"))


def parse_lifetime(text: str) -> float:
    """Return the seconds in "90s", "30m", "12h" or "30d". Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if match is None:
        raise ValueError(f"{text!r} is not a time such as 12h or 30d")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


class LoginLimit:
    """Counts wrong tokens by address. A right token is never refused for others' mistakes.

    Guessing 256 bits is hopeless; the limit keeps the attempts from costing us, and visible.
    """

    MAX_ADDRESSES = 4096

    def __init__(self) -> None:
        # by address: (begin of the window, failures in it)
        self._failures: "collections.OrderedDict[str, Tuple[float, int]]"
        self._failures = collections.OrderedDict()

    def on_failure(self, address: str, now: float) -> None:
        """Count a failure; raise TooManyRequests when the address had too many."""
        since, count = self._failures.pop(address, (now, 0))
        if now - since > LOGIN_WINDOW_S:
            since, count = now, 0
        self._failures[address] = (since, count + 1)
        if len(self._failures) > self.MAX_ADDRESSES:
            self._failures.popitem(last=False)
        if count >= LOGIN_FAILURES:
            wait = LOGIN_WINDOW_S - (now - since)
            raise TooManyRequests(f"too many wrong tokens from this address: wait {wait:.0f} s",
                                  headers=_retry_after(wait), limit="login")


class RateLimit:
    """Counts the requests of each token, second by second. On the loop."""

    def __init__(self) -> None:
        self._second, self._counts = 0, {}        # type: Tuple[int, Dict[str, int]]

    def count(self, name: str, now: float) -> None:
        """Count a request; raise TooManyRequests when the token had MAX_RATE of them this second.
        """
        second = int(now)
        if second != self._second:
            self._second, self._counts = second, {}
        count = self._counts[name] = self._counts.get(name, 0) + 1
        if count > MAX_RATE:
            raise TooManyRequests(f"more than {MAX_RATE} requests a second with the token {name!r}",
                                  headers=_retry_after(1), limit="request-rate")


BODIES_FULL = "the bridge holds as many bodies as it can: try again later"
ANSWERS_FULL = ("the edge has answered, but the bridge holds as many unread answers as it can: "
                "look before you send this again")


class BodyLimit:
    """Counts the bytes of the bodies that a bridge holds whole. On the loop.

    refusal: what somebody is told for whom there is no room.
    """

    def __init__(self, refusal: str) -> None:
        self._refusal = refusal
        self.held = 0

    def add(self, size: int) -> None:
        """Count some; raise Unavailable, and do not count them, when they are more than MAX_BODIES.
        """
        if self.held + size > MAX_BODIES:
            raise Unavailable(self._refusal, headers=_retry_after(1), limit="pending")
        self.held += size

    def remove(self, size: int) -> None:
        """Count some no more."""
        self.held -= size


class Allowance:
    """Lets MAX_NOTIFY_RATE things a second pass, and NOTIFY_BURST at once. On the loop."""

    def __init__(self, now: float) -> None:
        self._left, self._at = float(NOTIFY_BURST), now

    def take(self, now: float) -> bool:
        """Return whether another one may pass now."""
        self._left = min(NOTIFY_BURST, self._left + (now - self._at) * MAX_NOTIFY_RATE)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class ConnectionLimit:
    """Counts the open connections, and those of each address, or network of IPv6 (/64). Any thread.

    This machine's own count only among all: a reverse proxy or a tunnel speaks there for many.
    file_room: how many the system's limit of open files leaves room for.
    """

    EXEMPT = ("127.", "::1", "::ffff:127.")

    def __init__(self, file_room: int) -> None:
        self._file_room = file_room
        self._lock = threading.Lock()
        self._counts: Dict[str, int] = {}         # by address; guarded by _lock
        self.total = 0                            # guarded by _lock; read without it as an estimate

    @property
    def is_full(self) -> bool:
        """Whether there are as many connections as this bridge takes."""
        return self.total >= min(MAX_CONNECTIONS, self._file_room)

    def enter(self, address: str) -> None:
        """Count a connection. Raises, and does not count it, Unavailable when there are too many
        and TooManyRequests when its address has too many.
        """
        key = self._key(address)
        with self._lock:
            if self.is_full:
                raise Unavailable("this bridge has all the connections it takes",
                                  headers=_retry_after(1), limit="connections")
            if key and self._counts.get(key, 0) >= MAX_PER_ADDRESS:
                raise TooManyRequests("your address has all the connections it may have",
                                      headers=_retry_after(1), limit="per-address")
            self.total += 1
            if key:
                self._counts[key] = self._counts.get(key, 0) + 1

    def leave(self, address: str) -> None:
        """Take notice that a connection that was counted has ended."""
        key = self._key(address)
        with self._lock:
            self.total -= 1
            if self._counts.get(key, 0) > 1:
                self._counts[key] -= 1
            else:
                self._counts.pop(key, None)

    def _key(self, address: str) -> str:
        if address.startswith(self.EXEMPT):
            return ""
        if ":" not in address or address.startswith("::ffff:"):
            return address
        return socket.inet_pton(socket.AF_INET6, address.partition("%")[0])[:8].hex()


def cookie_name(host: str) -> str:
    """Return the cookie's name at a bridge that browsers know by this Host.

    Browsers keep cookies apart by path, but not by port (RFC 6265, section 8.5): the name does.
    """
    port = host[len(_without_port(host)) + 1:]
    return f"radical_edge_{port}" if re.fullmatch("[0-9]{1,5}", port) else "radical_edge"


def encode_cookie(name: str, token_hash: str, expires: int) -> str:
    """Return a cookie's value: it proves the sign-in, does not hold the token, and outlives a
    restart of the bridge but not the token's revocation."""
    return f"{name}:{expires}:{_sign_cookie(name, token_hash, expires)}"


def _sign_cookie(name: str, token_hash: str, expires: int) -> str:
    return hmac.new(token_hash.encode(), f"{name}:{expires}".encode(), hashlib.sha256).hexdigest()


def parse_cookies(header: str) -> Dict[str, str]:
    """Return the cookies of a Cookie field (RFC 6265, section 5.4); of equal names the first."""
    cookies: Dict[str, str] = {}
    for pair in header.split(";"):
        name, _, value = pair.strip().partition("=")
        cookies.setdefault(name, value)
    return cookies


class Authenticator:
    """Tells who makes a request, from its fields alone."""

    def __init__(self, tokens: Optional[TokenStore], allowed_hosts: Iterable[str] = ()) -> None:
        self._tokens = tokens                     # None: --no-auth
        # as given, perhaps with a port: what an Origin may say; and the names alone, for Host
        self._origins = {host.lower() for host in allowed_hosts}
        self._hosts = {_without_port(host) for host in self._origins}
        self._limit = LoginLimit()                # the loop's
        self.failures = 0                         # the loop's; for /metrics

    def identify(self, head: RequestHead, address: str) -> Optional[Identity]:
        """Return who makes the request; None for a request without credentials.

        Raises Unauthorized for wrong ones, TooManyRequests after too many of those, and Forbidden
        for a browser that was led here by another site (Host and Origin).
        """
        if "origin" in head.fields:
            self._check_origin(head)
        authorization = head.fields.get("authorization")
        if authorization is not None and self._tokens is not None:
            return self._recall_caller(head, authorization, address)
        self._check_host(head.host)
        if self._tokens is None:
            return ANYONE
        cookie = parse_cookies(head.fields.get("cookie", "")).get(cookie_name(head.host))
        return self._check_cookie(cookie) if cookie else None

    @property
    def needs_token(self) -> bool:
        """Whether a caller has to say who it is; False with --no-auth."""
        return self._tokens is not None

    def sign_in(self, token: str, address: str) -> Tuple[Identity, str]:
        """Return (identity, cookie value) for a browser's token; raises as identify() does."""
        if self._tokens is None:
            return ANYONE, ""
        identity = self._check_token(token, address)
        expires = int(time.time()) + COOKIE_S
        cookie = encode_cookie(identity.name, _digest(token), expires)
        return self._until(identity, expires), cookie

    def _recall_caller(self, head: RequestHead, authorization: str, address: str) -> Identity:
        """Return whose token it is: of an equal head the same, until tokens are added or revoked.
        """
        table, identity = head.caller
        if table is not self._tokens.table or identity.has_expired:
            table = self._tokens.table
            identity = self._check_token(parse_authorization(authorization), address)
            head.caller = table, identity
        return identity

    def _check_token(self, token: str, address: str) -> Identity:
        assert self._tokens is not None
        identity = self._tokens.find(token) if token else None
        if identity is None:
            self.failures += 1
            self._limit.on_failure(address, time.monotonic())
            raise Unauthorized("this token is not known, or was revoked, or has expired",
                               headers={"WWW-Authenticate": 'Bearer realm="radical-edge"'})
        return identity

    def _check_cookie(self, cookie: str) -> Optional[Identity]:
        assert self._tokens is not None
        name, _, rest = cookie.partition(":")
        expires, _, signature = rest.partition(":")
        found = self._tokens.find_named(name) if re.fullmatch("[0-9]{1,11}", expires) else None
        if found is None or int(expires) < time.time():
            return None
        good = hmac.compare_digest(_sign_cookie(name, found[1], int(expires)).encode(),
                                   signature.encode())
        return self._until(found[0], int(expires)) if good else None

    @staticmethod
    def _until(identity: Identity, expires: int) -> Identity:
        """Return who is signed in until then, unless the token expires before."""
        return identity._replace(expires=min(expires, identity.expires or expires))

    def _check_host(self, host: str) -> None:
        """Refuse a name that is not ours: DNS rebinding points any name at this address."""
        name = _without_port(host.lower())
        if host and not is_loopback(name) and name not in self._hosts:
            raise Forbidden(f"Host {host[:80]!r} is not a name of this bridge: start it with "
                            "--allow-host NAME, or send a token in the Authorization field")

    def _check_origin(self, head: RequestHead) -> None:
        if head.method in ("GET", "HEAD") and "upgrade" not in head.fields:
            return
        host = head.fields["origin"].partition("://")[2].lower()
        # with its port: to browsers, whatever runs at another port of this host is the same site,
        # and gets our cookie
        if host != head.host.lower() and host not in self._origins:
            raise Forbidden("the request comes from a page of another site (Origin): if it is "
                            "yours, start the bridge with --allow-host NAME, or NAME:PORT")


def _without_port(host: str) -> str:
    return host if host.endswith("]") else host.rpartition(":")[0] or host


def parse_authorization(value: str) -> str:
    """Return the token of "Bearer TOKEN", or of "Basic", whose password it then is (RFC 7617)."""
    kind, _, credentials = value.partition(" ")
    if kind.lower() == "bearer":
        return credentials.strip()
    if kind.lower() != "basic":
        return ""
    try:
        return base64.b64decode(credentials.strip(), validate=True).decode().partition(":")[2]
    except (ValueError, UnicodeDecodeError):
        return ""


# -- end to end: what a client signs and an edge checks, so that a bridge cannot make it up

class SigningKey(NamedTuple):
    """A secret that a client and edges share, and no bridge knows."""
    key_id: str
    secret: bytes


def make_signing_key(name: str) -> str:
    """Return a new key of 256 random bits as a line of a key file, "NAME KEY"."""
    if not is_valid_name(name):
        raise Unprocessable(f"name: {name!r} is not 1 to 64 letters, digits, '.', '_' or '-'")
    return f"{name} {secrets.token_urlsafe(32)}"


def read_signing_keys(path: Path) -> Dict[str, SigningKey]:
    """Return the keys in a file that only its owner can read, by name; "#" begins a comment.

    Raises EdgeError, which names the line, when it is not there or is not right.
    """
    text = read_private(path)
    if text is None:
        raise EdgeError(f"--client-key: there is no file {path}: make a key with --token keygen")
    keys = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]{1,64}) +([A-Za-z0-9_-]{43})", line.strip())
            if match is None or match[1] in keys:
                raise EdgeError(f"{path}, line {number}: not 'NAME KEY' as --token keygen makes "
                                "it, or a name that was there")
            keys[match[1]] = SigningKey(match[1], base64.urlsafe_b64decode(match[2] + "="))
    if not keys:
        raise EdgeError(f"{path} has no key: make one with --token keygen")
    return keys


def encode_digest(digest: bytes) -> str:
    """Return a SHA-256 digest as a Content-Digest field has it (RFC 9530, section 2)."""
    return f"sha-256=:{base64.b64encode(digest).decode()}:"


def _signature_base(method: str, target: str, fields: Dict[str, str], covered: Iterable[str],
                    params: str) -> bytes:
    """Return what is signed (RFC 9421, section 2.5). Raises KeyError for a field that is missing.

    target: path and query as the client asked for them, without the prefix of a reverse proxy.
    """
    path, _, query = target.partition("?")
    derived = {"@method": method, "@path": path, "@query": "?" + query}
    lines = [f'"{name}": {derived[name] if name.startswith("@") else fields[name].strip()}'
             for name in covered]
    return "\n".join([*lines, f'"@signature-params": {params}']).encode(errors="surrogatepass")


_COVERED = ("@method", "@path", "@query", "content-digest")      # by every signature
_COMPONENT = '"@?[a-z0-9!#$%&\'*+.^_`|~-]{1,64}"'
_SIGNATURE_INPUT = re.compile(
    rf"([a-z][a-z0-9_.*-]{{0,31}})=(\(({_COMPONENT}(?: {_COMPONENT}){{0,63}})\)"
    r'((?:;[a-z]{1,16}=(?:[0-9]{1,15}|"[ !#-\[\]-~]{0,128}"))*))')
# fields that mean the same to a handler whatever a bridge makes of them
_UNSIGNED_FIELDS = frozenset(("accept", "accept-encoding", "content-length", "user-agent",
                              "x-forwarded-scope", "x-forwarded-user", "x-request-id"))


class Signer:
    """Signs a client's requests (RFC 9421, hmac-sha256). Any thread."""

    def __init__(self, key: SigningKey) -> None:
        self._key = key

    def sign(self, method: str, target: str, digest: bytes,
             fields: Dict[str, str]) -> Dict[str, str]:
        """Return the fields to add to a request; each call makes a fresh signature.

        target: path and query, without the prefix of a reverse proxy. digest: SHA-256 of the body.
        fields: those that are sent and that a bridge passes on are covered.
        """
        sent = {name.lower(): value for name, value in fields.items()
                if name.lower() not in NOT_FORWARDED | _UNSIGNED_FIELDS}
        sent["content-digest"] = encode_digest(digest)
        covered = [*_COVERED, *sorted(sent.keys() - set(_COVERED))]
        names = " ".join(f'"{name}"' for name in covered)
        params = (f'({names});created={int(time.time())};nonce="{secrets.token_urlsafe(18)}"'
                  f';keyid="{self._key.key_id}";alg="hmac-sha256"')
        base = _signature_base(method, target, sent, covered, params)
        code = base64.b64encode(hmac.new(self._key.secret, base, hashlib.sha256).digest()).decode()
        return {"Content-Digest": sent["content-digest"], "Signature-Input": f"sig1={params}",
                "Signature": f"sig1=:{code}:"}


class Signature(NamedTuple):
    """A valid signature: whose, when, how it is called, and the fields that it covers."""
    key_id: str
    created: int
    nonce: str
    fields: Dict[str, str]


def check_signature(keys: Dict[str, SigningKey], method: str, target: str,
                    fields: Dict[str, str]) -> Signature:
    """Return the signature of a request. Raises Unauthorized unless it is there and valid.

    Whether it is fresh, and whether the body has the digest, is for the caller to see.
    """
    given, code = fields.get("signature-input"), fields.get("signature")
    if given is None or code is None:
        raise Unauthorized("this edge takes only signed requests that change something: use "
                           "--client-key, with a key that the edge knows")
    match = _SIGNATURE_INPUT.fullmatch(given)
    if match is None:
        raise Unauthorized("Signature-Input: not one signature with plain parameters (RFC 9421)")
    label, params, names, rest = match.groups()
    covered = re.findall('"([^"]+)"', names)
    values = dict(re.findall(r';([a-z]+)="?([^";]*)"?', rest))
    key, created = keys.get(values.get("keyid", "")), values.get("created", "")
    if key is None or values.get("alg", "hmac-sha256") != "hmac-sha256" or \
            not created.isdigit() or not 16 <= len(values.get("nonce", "")) <= 64:
        raise Unauthorized("Signature-Input: created, nonce (16 to 64 characters), keyid of a key "
                           "that this edge knows, and alg hmac-sha256 are needed")
    if len(set(covered)) != len(covered) or not set(_COVERED) <= set(covered):
        raise Unauthorized(f"Signature-Input: it must cover {', '.join(_COVERED)}, each name once")
    try:
        base = _signature_base(method, target, fields, covered, params)
    except KeyError as error:
        raise Unauthorized(f"Signature-Input: it covers {error}, which is not there") from None
    wanted = base64.b64encode(hmac.new(key.secret, base, hashlib.sha256).digest()).decode()
    if not hmac.compare_digest(f"{label}=:{wanted}:".encode(), code.encode(errors="replace")):
        raise Unauthorized("Signature: it does not fit this request: was it changed on its way?")
    kept = {name: value for name, value in fields.items()
            if name in covered or name in _UNSIGNED_FIELDS}
    return Signature(key.key_id, int(created), values["nonce"], kept)


def find_signer(path: Optional[str] = None) -> Optional[Signer]:
    """Return what signs a client's requests: the first key of a file, None without one.

    path: default RADICAL_CLIENT_KEY, then ~/.radical/edge/client.key. Raises EdgeError.
    """
    given = path or os.environ.get("RADICAL_CLIENT_KEY")
    found = Path(given).expanduser() if given else home_dir() / "client.key"
    if not given and not found.exists():
        return None
    return Signer(next(iter(read_signing_keys(found).values())))


def server_tls(cert: str, key: Optional[str]) -> ssl.SSLContext:
    """Return the context of a bridge. Raises ValueError when the files cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"--cert {cert!r} or --key {key!r} cannot be used: {error}") from None
    return context


class Target(NamedTuple):
    """A bridge as edges and clients need it: where it is, what to say to it, what to trust."""
    url: BridgeURL
    token: Optional[str]
    cert: Optional[str]

    @property
    def headers(self) -> Dict[str, str]:
        """The fields that prove who we are."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}


def find_bridge(url: Optional[str] = None, token: Optional[str] = None,
                cert: Optional[str] = None) -> Target:
    """Return the bridge that arguments, environment and ~/.radical/edge name, in that order.

    The files are read anew at each call: a token may have been replaced. Raises ValueError for a
    malformed URL, or one that would send the token in the clear, and EdgeError for a bad file.
    """
    known_url, known_cert = default_bridge()
    known_url = known_url.partition(",")[0].strip()
    parsed = parse_bridge_url(url or known_url)
    if not parsed.tls and not parsed.is_loopback and \
            os.environ.get("RADICAL_BRIDGE_INSECURE") != "1":
        raise ValueError(f"{parsed} would get the token unencrypted: use https://, or --insecure "
                         "(RADICAL_BRIDGE_INSECURE=1) if the network is your own")
    cert = cert or os.environ.get("RADICAL_BRIDGE_CERT") or \
        (known_cert if parsed == parse_bridge_url(known_url) else None)
    return Target(parsed, token or parsed.token or default_token(), cert or None)


def find_bridges(url: Optional[str] = None, token: Optional[str] = None,
                 cert: Optional[str] = None) -> List[Target]:
    """Return what find_bridge() does for each of several URLs, which commas separate."""
    texts = (url or default_bridge()[0]).split(",")
    return [find_bridge(text.strip(), token, cert) for text in texts if text.strip()]


def default_bridge() -> Tuple[str, Optional[str]]:
    """Return (URL, pinned certificate or None) of the bridge to use when none is named.

    That is RADICAL_BRIDGE_URL, what a bridge on this host wrote to ~/.radical/edge/url, what users
    of radical.edge 0.x have in bridge.url and bridge_cert.pem there, or the default port here.
    """
    words = _read_words(home_dir() / "url")[:2]
    if not words:
        words, old_cert = _read_words(home_dir() / "bridge.url")[:1], home_dir() / "bridge_cert.pem"
        if words and old_cert.exists():
            words.append(str(old_cert))
    url, cert = [*words, None, None][:2]
    given = os.environ.get("RADICAL_BRIDGE_URL")
    if given and given != url:
        return given, None
    return url or f"http://127.0.0.1:{DEFAULT_PORT}", cert


def _read_words(path: Path) -> List[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return []


def default_token() -> Optional[str]:
    """Return the token: RADICAL_BRIDGE_TOKEN, or what is in the file RADICAL_BRIDGE_TOKEN_FILE or
    else ~/.radical/edge/token; None without any."""
    path = os.environ.get("RADICAL_BRIDGE_TOKEN_FILE") or home_dir() / "token"
    return os.environ.get("RADICAL_BRIDGE_TOKEN") or read_private(Path(path)) or None


class Uplink:
    """How an edge gets to its bridges, for its own links and for what it starts elsewhere.

    urls: of the bridges; None is what the environment or ~/.radical/edge says at the time.
    token: None to look it up again each time. route: instead of straight on or through a proxy.
    """

    def __init__(self, urls: Iterable[Optional[str]] = (None,), token: Optional[str] = None,
                 cert: Optional[str] = None,
                 route: Optional[Callable[[BridgeURL], socket.socket]] = None) -> None:
        self.urls = list(urls)
        self._token, self._cert, self._route = token, cert, route

    def find(self, text: Optional[str]) -> Target:
        """Return the bridge of this URL, with today's token; raises as find_bridge() does."""
        return find_bridge(text, self._token, self._cert)

    def open_route(self, url: BridgeURL) -> socket.socket:
        """Return a socket that leads to where a bridge listens. Blocks; raises as open_route()."""
        return (self._route or open_route)(url)

    def inherited(self) -> Dict[str, str]:
        """Return the environment that edges which this one starts must have: its own rules."""
        return {name: os.environ[name] for name in ("RADICAL_CLIENT_KEY", "RADICAL_EDGE_POLICY")
                if name in os.environ}

    def is_direct(self, url: BridgeURL) -> bool:
        """Whether other programs of this machine can simply connect to the bridge."""
        return self._route is None and find_proxy(url) is None


# ---------------------------------------------------------------------------
# 9. State that outlives a process, and counters. Files are only ever appended to or replaced, which
#    is safe on NFS and Lustre; nothing here knows of links or requests.
# ---------------------------------------------------------------------------

state_log = logging.getLogger("radical_edge.state")


class Record(NamedTuple):
    """An entry of a journal: its number, a few JSON values, and a body, which is JSON text."""
    number: int
    head: List[Any]
    body: bytes

    @property
    def size(self) -> int:
        """About how many bytes it takes in memory."""
        return len(self.body) + 400


class _Writer:
    """A thread that writes what others have for it, for a disk may be slow. Subclasses are _run().
    """

    def __init__(self, name: str) -> None:
        self._lock = threading.Condition()        # what wakes the thread
        self._closing = False                     # guarded by _lock
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def close(self) -> None:
        """Write what is left and end the thread; a disk that hangs is left alone."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        if self._thread.is_alive():
            self._thread.join(STOP_S)

    def _run(self) -> None:
        raise NotImplementedError


class Journal(_Writer):
    """Numbered records, in memory and in files, for those who come after this process.

    The numbers are consecutive, go on after a restart, and begin at the milliseconds since the
    epoch, so that they do not go back even when the files are lost. The oldest records go when
    there are too many. Any thread may call; a thread of the journal's own writes, for a disk may be
    slow. What was written survives kill -9 of the process, not a power cut: nothing is synced.
    A full disk is logged; records then live in memory alone until there is room again.
    """

    SEGMENT = 1024 * 1024      # bytes; a file is deleted when none of its records is needed
    RETRY_S = 1.0              # between attempts to write to a full disk
    MAX_AHEAD = 1 << 32        # numbers; see outrun()

    def __init__(self, folder: Path, *, max_records: int, max_bytes: int,
                 on_written: Callable[[], None] = lambda: None) -> None:
        super().__init__("journal")
        self._folder, self._on_written = folder, on_written
        self._max_records, self._max_bytes = max_records, max_bytes
        self._records: List[Optional[Record]] = []               # guarded by _lock; None: damaged
        self._first = self._next = time.time_ns() // 1_000_000   # guarded by _lock
        self._fresh = 0                           # guarded by _lock; the first that is our own
        self._size = 0                            # guarded by _lock; of the records
        self._unwritten: Deque[Record] = collections.deque()     # guarded by _lock
        self._waiters: Deque[Tuple[int, Callable[[], None]]] = collections.deque()   # likewise
        self._written = 0                         # guarded by _lock; the last number on disk
        self.dropped = 0                          # records that were too many; guarded by _lock
        # of the journal's thread: the file being written, its size, and all files by first number
        self._descriptor, self._length, self._failing = -1, 0, False
        self._segments: List[Tuple[int, Path]] = []

    def open(self) -> None:
        """Read what earlier processes left, and begin to write. Blocks."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            paths = sorted(path for path in self._folder.glob("*.log") if path.stem.isdecimal())
        except OSError as error:
            state_log.error("%s: cannot be read, so that nothing is kept: %s", self._folder, error)
            paths = []
        for path in paths:
            self._segments.append((int(path.stem), path))
            self._load(path)
        if self._first == self._next:             # go on after any other journal for the same peer
            self._skip_to_locked(max(self._next, time.time_ns() // 1_000_000))
            self._first = self._next
        self._written, self._fresh = self._next - 1, self._next
        self._drop_oldest_locked()
        self._thread.start()

    @property
    def first(self) -> int:
        """The number of the oldest record that is kept."""
        return self._first

    @property
    def last(self) -> int:
        """The number of the newest record."""
        return self._next - 1

    @property
    def written(self) -> int:
        """The number of the newest record on disk, or in memory alone when the disk is full."""
        return self._written

    @property
    def unwritten(self) -> int:
        """How many records are not on disk yet."""
        return max(0, self._next - 1 - self._written)

    @property
    def is_failing(self) -> bool:
        """Whether the disk could not be written when it was last tried."""
        return self._failing

    def append(self, head: List[Any], body: bytes) -> Record:
        """Add a record; it is on disk soon."""
        with self._lock:
            record = Record(self._next, head, body)
            self._add_locked(record)
            self._unwritten.append(record)
            self._drop_oldest_locked()
            self._lock.notify()
        return record

    def get(self, number: int) -> Optional[Record]:
        """Return a record; None when it is gone or not there yet."""
        with self._lock:
            index = number - self._next + len(self._records)
            return self._records[index] if self._first <= number < self._next else None

    def drop_until(self, number: int) -> None:
        """Forget the records up to `number`."""
        with self._lock:
            while self._first <= number and self._first < self._next:
                self._forget_first_locked()
            self._lock.notify()

    def outrun(self, number: int) -> None:
        """Give this process's own records numbers above `number`, which an earlier one has used.

        That one was killed before what it had numbered was on disk. A number that is much too far
        ahead is ignored.
        """
        with self._lock:
            if not self._fresh <= number < self._next + self.MAX_AHEAD:
                return
            count = self._next - max(self._fresh, self._first)
            own = self._records[len(self._records) - count:]
            del self._records[len(self._records) - count:]
            self._next -= count
            self._size -= sum(record.size for record in own)
            self._skip_to_locked(number + 1)
            self._fresh, self._unwritten = self._next, collections.deque()
            for record in own:
                self._unwritten.append(record._replace(number=self._next))
                self._add_locked(self._unwritten[-1])
            self._lock.notify()
        state_log.warning("%s: goes on after %d: an earlier process did not get to write down what "
                          "it had sent", self._folder, number)

    def when_written(self, number: int, waiter: Callable[[], None]) -> None:
        """Call `waiter` once the record is safe, perhaps at once, else on the journal's thread."""
        with self._lock:
            if number > self._written:
                self._waiters.append((number, waiter))
                return
        waiter()

    # -- the records in memory

    def _add_locked(self, record: Record) -> None:
        self._records.append(record)
        self._size += record.size
        self._next = record.number + 1

    def _drop_oldest_locked(self) -> None:
        while self._next - self._first > self._max_records or self._size > self._max_bytes:
            self._forget_first_locked()
            self.dropped += 1
        while self._unwritten and self._unwritten[0].number < self._first:       # the disk hangs
            self._unwritten.popleft()

    def _forget_first_locked(self) -> None:
        index = self._first - self._next + len(self._records)
        record, self._records[index] = self._records[index], None
        self._size -= record.size if record is not None else 0
        self._first += 1
        if index >= 1000 and index * 2 > len(self._records):     # not a move for each record
            del self._records[:index + 1]

    def _skip_to_locked(self, number: int) -> None:
        """Make `number` the next one, although numbers are missing before it."""
        if not self._records or number - self._next > self._max_records:
            self._records.clear()
            self._size, self._first, self._next = 0, number, number
        while self._next < number:
            self._records.append(None)
            self._next += 1

    # -- files

    def _load(self, path: Path) -> None:
        if int(path.stem) > self._next or not self._records:
            self._skip_to_locked(int(path.stem))
        try:
            *lines, half = path.read_bytes().split(b"\n")
            if half:                              # its writer was killed, and we may append here
                os.truncate(path, path.stat().st_size - len(half))
        except OSError as error:
            state_log.error("%s: cannot be read: %s", path, error)
            return
        for line in lines:
            record = self._parse(line)
            if record is None or record.number < self._next:
                state_log.error("%s: a damaged record is left out", path)
                continue
            self._skip_to_locked(record.number)
            self._add_locked(record)

    @staticmethod
    def _parse(line: bytes) -> Optional[Record]:
        head, _, body = line.partition(b"\t")
        try:
            number, *rest = _parse_json(head.decode())
            # no JSON has a NUL, but a file has them where a power cut took what was written
            return Record(int(number), rest, body) if body and b"\0" not in body else None
        except (ValueError, TypeError):
            return None

    @staticmethod
    def _encode(record: Record) -> bytes:
        head = encode_json([record.number, *record.head]).encode(errors="replace")
        return b"%b\t%b\n" % (head, record.body)

    def _run(self) -> None:
        failed: List[Record] = []
        while True:
            with self._lock:
                if not self._unwritten and not self._closing:
                    self._lock.wait(self.RETRY_S if failed else None)
                records, self._unwritten = list(self._unwritten), collections.deque()
                closing, first, fresh = self._closing and not records, self._first, self._fresh
            # of those that failed, some are not wanted any more, or have other numbers by now
            wanted = [item for item in failed if item.number >= max(first, fresh)]
            failed = self._write(wanted + records)
            self._delete_segments(first)
            self._tell(records)
            if closing:
                break
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def _write(self, records: List[Record]) -> List[Record]:
        """Append records to the file; return those that could not be written."""
        if not records:
            return []
        try:
            if self._descriptor < 0 or self._length > self.SEGMENT:
                self._open_segment(records[0].number)
            data = b"".join(map(self._encode, records))
            _write_all(self._descriptor, data)
            self._length += len(data)
            if self._failing:
                state_log.warning("%s: can be written again", self._folder)
            self._failing = False
            return []
        except OSError as error:
            if not self._failing:
                state_log.error("%s: cannot be written, and is lost if this process dies: %s",
                                self._folder, error)
            self._failing = True
            self._undo()
            return records

    def _open_segment(self, number: int) -> None:
        path = self._folder / f"{number:020d}.log"
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)      # it was full at the start
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._length = descriptor, os.fstat(descriptor).st_size
        if not self._segments or self._segments[-1][1] != path:  # of an earlier process, if empty
            self._segments.append((number, path))

    def _undo(self) -> None:
        """Cut off half a record, which would damage the next one."""
        if self._descriptor < 0:
            return
        try:
            os.ftruncate(self._descriptor, self._length)
        except OSError:
            os.close(self._descriptor)            # the next record gets a new file
            self._descriptor = -1

    def _delete_segments(self, first: int) -> None:
        # the last file stays: it tells the numbers that were used
        while len(self._segments) > 1 and self._segments[1][0] <= first:
            with contextlib.suppress(OSError):
                os.unlink(self._segments[0][1])
            del self._segments[0]

    def _tell(self, records: List[Record]) -> None:
        if not records:
            return
        with self._lock:
            self._written = records[-1].number
            ready = []
            while self._waiters and self._waiters[0][0] <= self._written:
                ready.append(self._waiters.popleft()[1])
        for waiter in [*ready, self._on_written]:
            try:
                waiter()
            except Exception:                     # somebody else's; the journal must go on
                state_log.exception("%s: what waited for a record failed", self._folder)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view):]


class AuditLog(_Writer):
    """Writes a JSON line for each request that changes something, in files that only we can read.

    Any thread may write(); a thread of the log's own does the work, for a disk may be slow. What
    does not get on disk in time is dropped, counted and logged, for nothing may wait for it. Each
    file has MAX_BYTES; the last KEPT of them stay, as audit.jsonl.1 and so on.
    """

    MAX_BYTES = 16 * 1024 * 1024
    KEPT = 5
    MAX_WAITING = 10_000       # entries

    def __init__(self, path: Path) -> None:
        super().__init__("audit")
        self._path = path
        self._waiting: List[Dict[str, Any]] = []  # guarded by _lock
        self.dropped = 0                          # guarded by _lock
        self._failing = False                     # whether that was logged; any thread

    @property
    def unwritten(self) -> int:
        """How many entries wait to be written."""
        return len(self._waiting)

    def open(self) -> None:
        """Begin to write."""
        self._thread.start()

    def write(self, entry: Dict[str, Any]) -> None:
        """Add an entry, of JSON values and with no secret in it; the time is put before it."""
        entry = {"time": time.time(), **entry}
        with self._lock:
            is_full = len(self._waiting) >= self.MAX_WAITING
            if not is_full:
                self._waiting.append(entry)
                self._lock.notify()
        if is_full:
            self._on_failure(1, "the disk does not keep up")

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._waiting and not self._closing:
                    self._lock.wait()
                entries, self._waiting = self._waiting, []
            if not entries:
                return
            try:
                self._append("".join(map(self._encode, entries)).encode(errors="replace"))
                self._failing = False
            except OSError as error:
                self._on_failure(len(entries), error)

    def _append(self, data: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._path, flags, 0o600)
        try:
            _write_all(descriptor, data)
            size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        if size >= self.MAX_BYTES:
            self._rotate()

    def _rotate(self) -> None:
        for number in range(self.KEPT, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            newer = self._path.with_name(f"{self._path.name}.{number - 1}" if number > 1
                                         else self._path.name)
            with contextlib.suppress(FileNotFoundError):
                os.replace(newer, older)

    def _on_failure(self, count: int, error: Union[OSError, str]) -> None:
        with self._lock:
            self.dropped += count
        if not self._failing:
            state_log.error("%s: cannot be written; what happens is not recorded: %s", self._path,
                            error)
        self._failing = True

    @staticmethod
    def _encode(entry: Dict[str, Any]) -> str:
        at = entry["time"]
        entry["time"] = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + \
            f".{int(at % 1 * 1000):03}Z"
        return json.dumps(entry, default=str) + "\n"


OTHER_STATE = "keep the state elsewhere with --state DIR"


class StateLock(LockFile):
    """Keeps a state directory to one process, by a file `lock` whose owner touches it every BEAT_S.

    A stopped process (SIGSTOP) of this host is killed: were it to go on later, two would write. An
    owner whose lock was taken finds out at its next touch, and calls `on_lost`.
    """

    BEAT_S = 5.0

    def __init__(self, folder: Path, on_lost: Callable[[], None]) -> None:
        super().__init__(folder / "lock")
        self._on_lost = on_lost
        self._ended = threading.Event()
        self._thread: Optional[threading.Thread] = None

    def acquire(self) -> None:
        """Take the lock. Blocks.

        Raises Conflict when another process has the directory, InsufficientStorage when it cannot
        be written: what a process begins without it would be lost, and perhaps run twice.
        """
        with must_write(self._path.parent, OTHER_STATE):
            holder = self.take()
        if holder is not None:
            raise Conflict(f"{self._path.parent} belongs to {holder}: end that one, or take "
                           "another --name or --state")
        self._thread = threading.Thread(target=self._beat, name="state-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the directory back."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(STOP_S)
            self.give_back()

    def _is_dead(self, is_here: bool, pid: int, started: int) -> bool:
        if super()._is_dead(is_here, pid, started):
            return True
        if not is_here or not is_stopped(pid):
            return False
        state_log.warning("%s belonged to process %d, which is stopped: it is killed", self._path,
                          pid)
        os.kill(pid, signal.SIGKILL)
        return True

    def _beat(self) -> None:
        while not self._ended.wait(self.BEAT_S):
            text = self._read()
            if text is not None and text != self._text:
                state_log.error("%s was taken by another process: this one ends", self._path)
                self._on_lost()
                return
            with contextlib.suppress(OSError):    # a disk that is away may come back
                os.utime(self._path)


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal (SIGSTOP, Ctrl-Z)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] == "T"      # "t" is a debugger
    except (OSError, IndexError):
        return False


class EventLog:
    """Notifications as subscribers get them, numbered and kept in a journal. On the loop.

    An event's number is its id. A record's head is [edge, plugin, topic, instance, number there].
    """

    BATCH = 64 * 1024          # bytes of events that are sent to a subscriber at once
    BATCH_LOOK = 4096          # events looked at for it: few of them may be wanted
    BATCHES = 64               # kept for subscribers that are equally far

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        # the last notification by (edge, instance), so that what is sent again is not told again
        self._seen: "collections.OrderedDict[Tuple[str, str], int]" = collections.OrderedDict()
        self._batches: Dict[Tuple[int, Tuple[str, str, str]], Tuple[int, bytes]] = {}

    def open(self) -> None:
        """Take over what an earlier process has kept. Blocks."""
        self._journal.open()
        for number in range(self._journal.first, self._journal.last + 1):
            record = self._journal.get(number)
            if record is not None and len(record.head) == 5 and isinstance(record.head[4], int):
                edge, _, _, instance, count = record.head
                self._remember(str(edge), str(instance), count)

    @property
    def first_id(self) -> int:
        """The id of the oldest event that is kept."""
        return self._journal.first

    @property
    def last_id(self) -> int:
        """The id of the newest event."""
        return self._journal.last

    @property
    def last_told(self) -> int:
        """The id of the newest event that may be told: after a kill -9 its id is not another's."""
        return min(self._journal.last, self._journal.written)

    def seen(self, edge: str, instance: str) -> int:
        """Return the number of the last notification that came from an instance of an edge."""
        return self._seen.get((edge, instance), 0)

    def append(self, edge: str, plugin_name: str, topic: str, data: Any, *, instance: str = "",
               number: int = 0) -> int:
        """Add a notification; return its id. `number`: what its edge counts it as."""
        value = {"edge": edge, "plugin": plugin_name, "topic": topic, "data": data}
        if number:
            value["number"] = number
            self._remember(edge, instance, number)
        text = encode_json({"topic": "notification", "data": value})
        return self._journal.append([edge, plugin_name, topic, instance, number],
                                    text.encode(errors="replace")).number

    def gap_after(self, event_id: int) -> Optional[Dict[str, int]]:
        """Return {"from", "to"} of the events after `event_id` that are gone, or None."""
        if event_id > self.last_id:               # not a number of ours: all we can say is that
            return {"from": event_id, "to": self.last_id}
        first = self.first_id
        return {"from": event_id + 1, "to": first - 1} if event_id + 1 < first else None

    def batch(self, after: int, wanted: Tuple[str, str, str]) -> Tuple[int, bytes]:
        """Return (id of the last event looked at, encoded events) of some events after an id.

        wanted: edge, plugin and topic, "" for any. Subscribers that are equally far share it.
        """
        key = (after, wanted)
        batch = self._batches.get(key)
        if batch is None:
            batch = self._batches[key] = self._make_batch(after, wanted)
            if len(self._batches) > self.BATCHES:
                del self._batches[next(iter(self._batches))]
        return batch

    def on_written(self) -> None:
        """Take notice that there is more to tell: batches may be longer now."""
        self._batches.clear()

    def _make_batch(self, after: int, wanted: Tuple[str, str, str]) -> Tuple[int, bytes]:
        pieces, size, number = [], 0, after
        last = min(self.last_told, after + self.BATCH_LOOK)
        while number < last and size < self.BATCH:
            number += 1
            record = self._journal.get(number)
            if record is None or any(part and part != found
                                     for part, found in zip(wanted, record.head)):
                continue
            pieces.append(b"id: %d\ndata: %b\n\n" % (number, record.body))
            size += len(pieces[-1])
        return number, b"".join(pieces)

    def _remember(self, edge: str, instance: str, number: int) -> None:
        self._seen[edge, instance] = number
        self._seen.move_to_end((edge, instance))
        if len(self._seen) > MAX_EXPIRED:
            self._seen.popitem(last=False)


class Counters:
    """Counts, gauges and a histogram for /metrics, in the Prometheus text format."""

    _HELP = {
        "notifications_total": "notifications received from edges",
        "notifications_delayed_total": "acknowledgements put off: the edge sends too many",
        "events_dropped_total": "notifications that were too large, or too many of an older edge",
        "subscribers_cut_total": "subscribers cut off because they did not read",
        "links_total": "edges that registered",
        "links_lost_total": "links that ended",
        "links_refused_total": "registrations that were refused",
        "late_responses_total": "responses that came after their request was given up",
        "refused_connections_total": "connections refused because there were too many",
        "limited_total": "requests, connections, notifications refused or delayed, by --limit",
        "reloads_total": "tokens and certificates read again",
    }
    BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0)

    def __init__(self) -> None:
        self._counts: "collections.Counter[Tuple[str, str]]" = collections.Counter()
        self._requests: Dict[Tuple[str, int], int] = {}          # by route and status; the loop's
        self._buckets = [0] * (len(self.BUCKETS) + 1)            # likewise
        self._seconds = 0.0                       # likewise

    def add(self, name: str, value: float = 1, label: str = "") -> None:
        """Add to a counter; label is like 'limit="body"'."""
        self._counts[name, label] += value       # type: ignore[assignment]

    def count_limit(self, name: Optional[str]) -> None:
        """Count what one of LIMITS has refused; other names, which edges may make up, are not."""
        if name in LIMITS:
            self.add("limited_total", 1, f'limit="{name}"')

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count an answer. Routes beyond MAX_COUNTED_ROUTES are "other"."""
        key = (route, status)
        count = self._requests.get(key)
        if count is None:
            count = 0
            if len(self._requests) >= MAX_COUNTED_ROUTES:
                key = ("other", status)
                count = self._requests.get(key, 0)
        self._requests[key] = count + 1
        self._buckets[bisect.bisect_left(self.BUCKETS, seconds)] += 1
        self._seconds += seconds

    def encode(self, gauges: Dict[str, float]) -> str:
        """Return all counters, and `gauges` as they are now (Prometheus text format 0.0.4)."""
        lines = self._encode_requests()
        for name, text in self._HELP.items():
            lines += [f"# HELP radical_edge_{name} {text}", f"# TYPE radical_edge_{name} counter"]
            found = [(label, value) for (key, label), value in self._counts.items() if key == name]
            for label, value in sorted(found) or [("", 0)]:
                lines.append(f"radical_edge_{name}{{{label}}} {value:.15g}" if label else
                             f"radical_edge_{name} {value:.15g}")
        for name, value in gauges.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# TYPE radical_edge_{name} {kind}", f"radical_edge_{name} {value:.15g}"]
        return "\n".join(lines) + "\n"

    def _encode_requests(self) -> List[str]:
        lines = ["# HELP radical_edge_requests_total requests answered, by route and status",
                 "# TYPE radical_edge_requests_total counter"]
        for (route, status), count in sorted(self._requests.items()):
            route = route.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
            labels = f'route="/{route}",status="{status}"'
            lines.append(f"radical_edge_requests_total{{{labels}}} {count}")
        name, total = "radical_edge_request_seconds", 0
        lines += [f"# HELP {name} from a request's last byte of the head to its answer",
                  f"# TYPE {name} histogram"]
        for bound, count in zip((*self.BUCKETS, "+Inf"), self._buckets):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._seconds:.6f}", f"{name}_count {total}"]


# ---------------------------------------------------------------------------
# 10. Routing, requests and responses, for the bridge's own routes and for plugins alike. No I/O.
# ---------------------------------------------------------------------------

class Headers(dict):
    """Fields by name, in any case: {name: value}. The names are kept in lower case."""

    def __init__(self, fields: Optional[Dict[str, str]] = None) -> None:
        if fields:
            super().__init__({name.lower(): value for name, value in fields.items()})

    @classmethod
    def of_lower(cls, fields: Dict[str, str]) -> "Headers":
        """Return a copy of fields whose names are in lower case already."""
        made = dict.__new__(cls)                  # __init__ would look at each name
        made.update(fields)
        return made

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def __setitem__(self, name: str, value: str) -> None:
        super().__setitem__(name.lower(), value)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().__contains__(name.lower())

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field's value, or `default`."""
        return super().get(name.lower(), default)


class BodyReader:
    """A request's body while it arrives: a link feeds it, one handler reads it. Any thread.

    on_read(size) is called on the reader's thread for each piece that it takes.
    """

    def __init__(self, on_read: Callable[[int], None]) -> None:
        self._on_read = on_read
        self._lock = threading.Lock()
        self._pieces: Deque[Union[bytes, memoryview]] = collections.deque()      # guarded by _lock
        self._ended = False                       # guarded by _lock
        self._error: Optional[EdgeError] = None   # guarded by _lock
        self._waiter: Optional[Callable[[], None]] = None        # guarded by _lock
        self._digest: Optional[str] = None        # what Content-Digest says; set before any read
        self._hash = hashlib.sha256()

    def expect(self, digest: str) -> None:
        """Let take() fail in place of the end when the body has another Content-Digest than this.

        Who acts only on a whole body, as all that replaces a file does, then does not act at all.
        """
        self._digest = digest

    def feed(self, piece: Union[bytes, memoryview], *, end: bool = False) -> None:
        """Add a piece; `end` when it is the last."""
        with self._lock:
            if len(piece):
                self._pieces.append(piece)
            self._ended = self._ended or end
        self._wake()

    def fail(self, error: EdgeError) -> None:
        """Let the reader fail, once it has read what came: the rest never will."""
        with self._lock:
            self._error = error
        self._wake()

    def take(self) -> Optional[bytes]:
        """Return the next piece, b"" at the end, None when it has not come yet. Raises EdgeError.
        """
        with self._lock:
            if not self._pieces:
                if self._error is not None and not self._ended:
                    raise self._error
                if self._ended and self._digest not in (None, encode_digest(self._hash.digest())):
                    raise BadRequest("Content-Digest: the body that came is another one")
                return b"" if self._ended else None
            piece = self._pieces.popleft()
        if self._digest is not None:
            self._hash.update(piece)
        self._on_read(len(piece))
        return bytes(piece)

    def when_ready(self, waiter: Callable[[], None]) -> None:
        """Call `waiter` when take() has something, perhaps at once."""
        with self._lock:
            ready = self._pieces or self._ended or self._error is not None
            self._waiter = None if ready else waiter
        if ready:
            waiter()

    def _wake(self) -> None:
        with self._lock:
            waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter()


class Request:
    """A request as a handler sees it.

    method, path; headers (a mapping, any case); path_params ({name: value}); query_params ({name:
    value}, the last of equal names); user: the name of the caller's token, or None; scope: of that
    token; request_id: in every log line; app: of the plugin.
    A body of more than MAX_WHOLE bytes is still arriving when the handler is called.
    """

    __slots__ = ("method", "path", "query", "headers", "path_params", "user", "scope", "request_id",
                 "app", "notes", "_body", "_reader", "_query_params")

    def __init__(self, method: str, target: str, headers: Dict[str, str], body: bytes = b"", *,
                 user: Optional[str] = None, scope: str = "", app: Any = None,
                 reader: Optional[BodyReader] = None) -> None:
        self.method = method
        self.path, _, self.query = target.partition("?")
        self.headers = headers if isinstance(headers, Headers) else Headers(headers)
        self.path_params: Dict[str, str] = {}
        self.user, self.scope, self.app = user, scope, app
        self.request_id = self.headers.get("x-request-id", "-")
        self.notes: Optional[Dict[str, Any]] = None              # for the audit log
        self._body, self._reader = body, reader
        self._query_params: Optional[Dict[str, str]] = None

    @property
    def idempotency_key(self) -> Optional[str]:
        """What the client calls this request, so that a retry of it is known to be one."""
        return self.headers.get("idempotency-key")

    @property
    def query_params(self) -> Dict[str, str]:
        """The query as {name: value}. Raises BadRequest when it is malformed."""
        if self._query_params is None:
            self._query_params = parse_query(self.query)
        return self._query_params

    async def body(self) -> bytes:
        """Return the whole body. Raises ContentTooLarge when it has more than MAX_BODY bytes."""
        if self._reader is not None:
            collected = bytearray()
            self._check_size(int(self.headers.get("content-length", 0)))
            async for piece in self.stream():
                self._check_size(len(collected) + len(piece))
                collected += piece
            self._body = bytes(collected)
        return self._body

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the body in pieces, as they come; only as much as is read is sent.

        Raises EdgeError when the client goes away in between.
        """
        if self._reader is None:
            if self._body:
                yield self._body
            return
        reader, self._reader = self._reader, None
        while True:
            piece = reader.take()
            if piece == b"":
                return
            if piece is None:
                await wait_for_async(reader.when_ready)
            else:
                yield piece

    async def json(self) -> Any:
        """Return the value that the body is, as JSON or, if Content-Type says so, as msgpack.

        Raises BadRequest when it is neither.
        """
        await self.body()
        return self.parse_json()

    async def json_object(self) -> Dict[str, Any]:
        """Return the object that json() does, {} when empty. Raises BadRequest or Unprocessable."""
        value = self.parse_json() if await self.body() else {}
        if not isinstance(value, dict):
            raise Unprocessable("body: must be a JSON object, {...}")
        return value

    # -- the same for plain `def` handlers, whose threads may wait

    @property
    def body_bytes(self) -> bytes:
        """What body() returns."""
        if self._reader is not None:
            collected = bytearray()
            self._check_size(int(self.headers.get("content-length", 0)))
            for piece in self.iter_body():
                self._check_size(len(collected) + len(piece))
                collected += piece
            self._body = bytes(collected)
        return self._body

    def iter_body(self) -> Iterator[bytes]:
        """Yield what stream() does."""
        if self._reader is None:
            if self._body:
                yield self._body
            return
        reader, self._reader = self._reader, None
        while True:
            piece = reader.take()
            if piece == b"":
                return
            if piece is None:
                wait_for(reader.when_ready)
            else:
                yield piece

    def parse_json(self) -> Any:
        """Return what json() does."""
        body = self.body_bytes
        try:
            if "msgpack" in self.headers.get("content-type", ""):    # radical.edge's clients do it
                return parse_msgpack(body)
            return json.loads(body, parse_constant=refuse_constant)
        except ProtocolError as error:
            raise BadRequest(f"the body is not msgpack: {error}") from None
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is not JSON: {error}") from None

    @staticmethod
    def _check_size(size: int) -> None:
        if size > MAX_BODY:
            raise ContentTooLarge(f"the body has more than {MAX_BODY} bytes, which is what this "
                                  "route takes")

    # -- query values

    def query_int(self, name: str, default: int, minimum: int = 0) -> int:
        """Return a query value as a number. Raises Unprocessable when it is none or too small."""
        text = self.query_params.get(name)
        if text is None:
            return default
        if not re.fullmatch(r"-?[0-9]{1,18}", text) or int(text) < minimum:
            raise Unprocessable(f"{name}: {text[:40]!r} is not a whole number of {minimum} or more")
        return int(text)

    def query_bool(self, name: str, default: bool = False) -> bool:
        """Return a query value as a bool. Raises Unprocessable for anything but true and false."""
        text = self.query_params.get(name, str(default)).lower()
        if text not in ("true", "false", "1", "0", "yes", "no"):
            raise Unprocessable(f"{name}: {text[:40]!r} is not true or false")
        return text in ("true", "1", "yes")


class Response:
    """What a handler answers: a body, a status, fields and a media type."""

    media_type: Optional[str] = None

    def __init__(self, content: Any = b"", status_code: int = 200,
                 headers: Optional[Dict[str, str]] = None,
                 media_type: Optional[str] = None) -> None:
        self.status_code = int(status_code)
        self.headers = Headers(headers)
        self.body = self.encode(content)
        media_type = media_type or self.media_type
        if media_type:
            self.headers.setdefault("content-type", media_type)

    def encode(self, content: Any) -> bytes:
        """Return the content as bytes."""
        if content is None:
            return b""
        return content.encode() if isinstance(content, str) else bytes(content)


class JSONResponse(Response):
    """A response whose content is a JSON value. Raises ValueError or TypeError when it is none."""

    media_type = "application/json"

    def encode(self, content: Any) -> bytes:
        # of half a surrogate pair, which UTF-8 has no bytes for, this makes JSON's own \ud800
        return encode_json(content).encode(errors="backslashreplace")


class StreamingResponse(Response):
    """A response whose content is produced while it is sent, as fast as the client reads.

    content: an iterable of bytes, plain (it runs in a worker thread) or async; its close() or
    aclose() is called at the end, whoever ended it. A "content-length" in headers tells the client
    how much will come; without it the answer is chunked.
    """

    def __init__(self, content: Any, status_code: int = 200,
                 headers: Optional[Dict[str, str]] = None,
                 media_type: Optional[str] = "application/octet-stream") -> None:
        super().__init__(b"", status_code, headers, media_type)
        self.content = content


class FileResponse(StreamingResponse):
    """A file, or the range of it that the request asks for (RFC 9110, section 14).

    path: of the file, or a descriptor that has it open, which is closed at the end.

    Answers 206 for a range, 304 when the client has this very version (If-None-Match), and 416 for
    a range outside of the file. Make it in a plain `def` handler, for it opens the file.
    Raises NotFound, Forbidden, Unprocessable for what is not a regular file, and PreconditionFailed
    when the client means another version (If-Match).
    """

    def __init__(self, path: Union[str, Path, int], request: Optional[Request] = None, *,
                 media_type: str = "application/octet-stream",
                 headers: Optional[Dict[str, str]] = None) -> None:
        file = self._open(path)
        try:
            super().__init__((), 200, headers, media_type)
            begin, end = self._choose(os.fstat(file.fileno()),
                                      request.headers if request is not None else Headers())
        except BaseException:
            file.close()
            raise
        self.content = _FilePieces(file, begin, end)

    def _choose(self, status: os.stat_result, wanted: Headers) -> Tuple[int, int]:
        """Set the status and the fields; return which bytes to send, (begin, end)."""
        etag = make_etag(status)
        self.headers.update({"etag": etag, "accept-ranges": "bytes",
                             "last-modified": _http_date(int(status.st_mtime))})
        if wanted.get("if-match", "*") != "*" and etag not in wanted["if-match"]:
            raise PreconditionFailed("the file is not the one that If-Match names: it was changed",
                                     headers={"ETag": etag})
        begin, end = 0, status.st_size
        if etag in wanted.get("if-none-match", ""):
            self.status_code = int(HTTPStatus.NOT_MODIFIED)
            return 0, 0
        if "range" in wanted and wanted.get("if-range", etag) == etag:
            begin, end = self._take_range(wanted["range"], status.st_size)
        self.headers["content-length"] = str(end - begin)
        return begin, end

    @staticmethod
    def _open(path: Union[str, Path, int]) -> Any:
        if isinstance(path, int):
            return os.fdopen(path, "rb", buffering=0)
        try:
            # a FIFO would block the open for ever
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"there is no file {str(path)!r}") from None
        except PermissionError:
            raise Forbidden(f"the file {str(path)!r} may not be read") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise Unprocessable(f"path: {str(path)!r} is not a regular file")
        return os.fdopen(descriptor, "rb", buffering=0)

    def _take_range(self, text: str, size: int) -> Tuple[int, int]:
        """Set the status for a Range field; return (begin, end). Several ranges are ignored."""
        match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", text.replace(" ", ""))
        if match is None or not (match[1] or match[2]):
            return 0, size
        begin = int(match[1]) if match[1] else max(0, size - int(match[2]))
        end = min(size, int(match[2]) + 1) if match[1] and match[2] else size
        if begin >= end:
            raise EdgeError(f"range: the file has {size} bytes",
                            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
                            headers={"Content-Range": f"bytes */{size}"})
        self.status_code = int(HTTPStatus.PARTIAL_CONTENT)
        self.headers["content-range"] = f"bytes {begin}-{end - 1}/{size}"
        return begin, end


def make_etag(status: os.stat_result) -> str:
    """Return the entity tag of a file's version (RFC 9110, section 8.8.3)."""
    return f'"{status.st_mtime_ns:x}-{status.st_size:x}"'


class _FilePieces:
    """Iterates over the bytes of a file from `begin` to `end`, and closes it."""

    def __init__(self, file: Any, begin: int, end: int) -> None:
        self._file, self._left = file, end - begin
        if begin:
            file.seek(begin)

    def __iter__(self) -> "_FilePieces":
        return self

    def __next__(self) -> bytes:
        piece = self._file.read(min(FILE_PIECE, self._left)) if self._left else b""
        if not piece and self._left:
            raise EOFError("the file became shorter while it was read")
        self._left -= len(piece)
        if not piece:
            raise StopIteration
        return piece

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@functools.lru_cache(maxsize=64)
def _http_date(seconds: int) -> str:
    """Return an IMF-fixdate (RFC 9110, section 5.6.7), whatever the locale."""
    now = time.gmtime(seconds)
    day = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[now.tm_wday]
    month = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov",
             "Dec")[now.tm_mon - 1]
    return (f"{day}, {now.tm_mday:02} {month} {now.tm_year} "
            f"{now.tm_hour:02}:{now.tm_min:02}:{now.tm_sec:02} GMT")


def to_response(value: Any) -> Response:
    """Return what a handler returned as a Response: a Response itself, or any JSON value."""
    return value if isinstance(value, Response) else JSONResponse(value)


def error_response(error: EdgeError) -> Response:
    """Return the reply to an error, in the shape that all errors have."""
    return JSONResponse(error.to_dict(), int(error.status), error.headers)


class Route(NamedTuple):
    """A method and a pattern such as "status/{sid}", and what answers it.

    segments: of the pattern. right: what the bridge asks of the caller's scope, None for nothing.
    """
    method: str
    pattern: str
    segments: Tuple[str, ...]
    handler: Callable[..., Any]
    is_async: bool
    right: Optional[str] = None


class Router:
    """Finds the route of a path. Literal segments win over parameters; HEAD is served by GET."""

    def __init__(self) -> None:
        # by number of segments; replaced as a whole, so that other threads may read it
        self._routes: Dict[int, Tuple[Route, ...]] = {}
        # those without parameters, by method and segments; likewise
        self._literal: Dict[Tuple[str, Tuple[str, ...]], Route] = {}

    def add(self, method: str, pattern: str, handler: Callable[..., Any],
            right: Optional[str] = None) -> None:
        """Add a route; one with the same method and pattern is replaced."""
        pattern = pattern.strip("/")
        segments = tuple(pattern.split("/"))
        route = Route(method, pattern, segments, handler, inspect.iscoroutinefunction(handler),
                      right)
        size = len(segments)
        others = [known for known in self._routes.get(size, ())
                  if (known.method, known.pattern) != (method, pattern)]
        ordered = sorted([*others, route], key=lambda known: [part.startswith("{")
                                                              for part in known.segments])
        self._routes = {**self._routes, size: tuple(ordered)}
        if "{" not in pattern:
            self._literal = {**self._literal, (method, segments): route}

    def match(self, method: str, segments: Tuple[str, ...]) -> Tuple[Route, Dict[str, str]]:
        """Return (route, path parameters). Raises NotFound or MethodNotAllowed."""
        wanted = "GET" if method == "HEAD" else method
        literal = self._literal.get((wanted, segments))
        if literal is not None:
            return literal, {}
        allowed = set()
        for route in self._routes.get(len(segments), ()):
            params = self._match_segments(route.segments, segments)
            if params is not None:
                if route.method == wanted:
                    return route, params
                allowed.update((route.method, "HEAD") if route.method == "GET" else (route.method,))
        path = "/".join(segments)[:120]
        if allowed:
            names = ", ".join(sorted(allowed))
            raise MethodNotAllowed(f"{method} is not for {path!r}; it takes {names}",
                                   headers={"Allow": names})
        raise NotFound(f"there is no route {path!r}")

    def list(self) -> List[Route]:
        """Return all routes, by pattern."""
        found = [route for routes in self._routes.values() for route in routes]
        return sorted(found, key=lambda route: (route.pattern, route.method))

    @staticmethod
    def _match_segments(wanted: Tuple[str, ...],
                        found: Tuple[str, ...]) -> Optional[Dict[str, str]]:
        params = {}
        for pattern, value in zip(wanted, found):
            if pattern == value:
                continue
            if not pattern.startswith("{"):
                return None
            name, _, suffix = pattern[1:].partition("}")
            if not value.endswith(suffix) or len(value) <= len(suffix):
                return None
            params[name] = value[:len(value) - len(suffix)]
        return params


# ---------------------------------------------------------------------------
# 11. Plugins: the classes that plugin authors use, and the host that runs plugins on an edge or on
#     the bridge. It knows nothing of links and sockets.
# ---------------------------------------------------------------------------

_current_request: "contextvars.ContextVar[Optional[Request]]" = contextvars.ContextVar(
    "radical_edge_request", default=None)


def note_for_audit(**fields: Any) -> None:
    """Add to what the audit log says of the request at work, such as job="..." or path="...".

    For handlers and what they await or call in the same thread. The values are JSON, and no secret.
    """
    request = _current_request.get()
    if request is not None and request.notes is not None:
        request.notes.update(fields)


def _route_decorator(method: str) -> Callable[[str], Callable[[Any], Any]]:
    def with_path(path: str) -> Callable[[Any], Any]:
        def mark(function: Any) -> Any:
            function.radical_edge_routes = [*getattr(function, "radical_edge_routes", []),
                                            (method, path)]
            return function
        return mark
    with_path.__doc__ = f"Serve {method} requests for `path`, under the plugin's namespace."
    return with_path


get = _route_decorator("GET")
post = _route_decorator("POST")
put = _route_decorator("PUT")
delete = _route_decorator("DELETE")


def repeatable(function: Any) -> Any:
    """Mark a POST handler that may be run again for the same request.idempotency_key.

    It must find out by itself what it did before it was killed, and do only the rest.
    """
    function.radical_edge_repeatable = True
    return function


def plugin(name: str) -> Callable[[Type["Plugin"]], Type["Plugin"]]:
    """Register the decorated Plugin subclass under `name`, which becomes its plugin_name."""
    def register(cls: Type["Plugin"]) -> Type["Plugin"]:
        cls.plugin_name = name
        Plugin._register(cls)
        return cls
    return register


# What a ui_config may have: by kind of object, {key: kind of value}. A "!" ends a key that must be
# there; a tuple lists the only values; [kind] is a list of that kind. See check_ui_config().
UI_SCHEMA: Dict[str, Dict[str, Any]] = {
    "ui_config": {
        "icon": "text", "title": "text", "description": "text", "stub_message": "text",
        "refresh_button": "flag", "custom_template": "flag", "auto_load": "route",
        "forms": ["form"], "monitors": ["monitor"], "notifications": "notifications"},
    "form": {
        "id!": "name", "title": "text", "layout": ("single", "grid2", "grid3"),
        "fields": ["field"], "submit": "submit"},
    "field": {
        "name!": "name", "label": "text", "css_class": "text", "placeholder": "text",
        "type": ("text", "number", "textarea", "select", "checkbox", "hidden",
                 "custom_attributes"),
        "default": "value", "required": "flag", "column": "column", "options": ["option"],
        "options_endpoint": "route", "help": "text"},
    "option": {"value!": "value", "label": "text"},
    "submit": {
        "label": "text", "style": ("success", "primary", "secondary", "danger"),
        "endpoint": "route"},
    "monitor": {
        "id!": "name", "title": "text", "type": ("task_list", "metrics", "table", "raw"),
        "css_class": "text", "empty_text": "text", "auto_load": "route", "refresh": "seconds",
        "detail": "route", "actions": ["action"]},
    "action": {
        "label!": "text", "endpoint!": "route",
        "style": ("success", "primary", "secondary", "danger"), "states": ["text"]},
    "notifications": {"topic!": "text", "id_field!": "name", "state_field": "name"},
}
_UI_VALUES: Dict[str, Tuple[str, Callable[[Any], bool]]] = {
    "text": ("a string of at most 4096 characters",
             lambda value: isinstance(value, str) and len(value) <= 4096),
    "name": ("a string of 1 to 64 letters, digits, '.', '_' or '-'",
             lambda value: isinstance(value, str) and
             re.fullmatch(r"[A-Za-z0-9._-]{1,64}", value) is not None),
    "flag": ("true or false", lambda value: isinstance(value, bool)),
    "column": ("0, 1 or 2", lambda value: type(value) is int and 0 <= value <= 2),
    "seconds": ("a number of seconds, 1 or more", lambda value: type(value) in (int, float) and
                1 <= value < 1e6),
    "value": ("a string, a number, or true or false",
              lambda value: isinstance(value, (str, int, float))),
    "route": ("a route under the plugin's own namespace, such as 'status/{sid}'",
              lambda value: isinstance(value, str) and re.fullmatch(
                  r"(?!.*\.\.)[A-Za-z0-9{][A-Za-z0-9._~{}/?=&%+-]{0,255}", value) is not None),
}


def check_ui_config(config: Any) -> None:
    """Check a plugin's description of its page against UI_SCHEMA.

    Raises ValueError that names the place and what belongs there: "ui_config.forms[0].layout: ...".
    Absent and None are the same. An option may be a value alone, in place of {"value", "label"}.
    """
    _check_ui_value("ui_config", config, "ui_config")
    try:
        size = len(encode_json(config))
    except (ValueError, TypeError) as error:
        raise ValueError(f"ui_config: must hold JSON values only ({error})") from None
    if size > MAX_UI_CONFIG:
        raise ValueError(f"ui_config: has {size} bytes as JSON; at most {MAX_UI_CONFIG} are taken")
    for index, form in enumerate(config.get("forms") or []):
        _check_ui_fields(f"ui_config.forms[{index}]", form.get("fields") or [])


def _check_ui_value(place: str, value: Any, kind: Any) -> None:
    if isinstance(kind, tuple):
        if value not in kind:
            raise ValueError(f"{place}: {value!r:.80} is none of {', '.join(kind)}")
    elif isinstance(kind, list):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{place}: must be a list")
        for index, item in enumerate(value):
            _check_ui_value(f"{place}[{index}]", item, kind[0])
    elif kind == "option" and not isinstance(value, dict):
        _check_ui_value(place, value, "value")
    elif kind in UI_SCHEMA:
        _check_ui_object(place, value, UI_SCHEMA[kind])
    elif not _UI_VALUES[kind][1](value):
        raise ValueError(f"{place}: {value!r:.80} is not {_UI_VALUES[kind][0]}")


def _check_ui_object(place: str, value: Any, keys: Dict[str, Any]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: must be an object")
    kinds = {key.rstrip("!"): kind for key, kind in keys.items()}
    for key, item in value.items():
        if key not in kinds:
            raise ValueError(f"{place}: has no key {key!r:.80}; there are {', '.join(kinds)}")
        if item is not None:
            _check_ui_value(f"{place}.{key}", item, kinds[key])
    for key in keys:
        if key.endswith("!") and value.get(key[:-1]) is None:
            raise ValueError(f"{place}.{key[:-1]}: is missing")


def _check_ui_fields(place: str, fields: List[Dict[str, Any]]) -> None:
    """Check what concerns several keys of a field, or several fields of a form."""
    names = [field["name"] for field in fields]
    for index, field in enumerate(fields):
        if field["name"] in names[:index]:
            raise ValueError(f"{place}.fields[{index}].name: {field['name']!r} is used twice")
        if field.get("type") == "select" and not (field.get("options")
                                                  or field.get("options_endpoint")):
            raise ValueError(f"{place}.fields[{index}].options: a select needs them, or an "
                             "options_endpoint")


# variables by which a program can be made to run another one than it is
_LOADER_VARIABLE = re.compile(r"LD_.*|DYLD_.*|PATH|ENV|BASH_.*|IFS|GCONV_PATH|PYTHON.*|PERL.*"
                              r"|RUBY.*|NODE_.*|JAVA_.*|_JAVA_.*|JDK_.*")


class Policy:
    """What an edge allows, whoever asks: its owner writes it, and the edge itself enforces it.

    text: a JSON object. "plugins", "executors", "executables", "scopes" and "users" are lists of
    patterns (as in a shell) of what is allowed, "roots" is a list of directories; without a list,
    all is allowed. "options" is for plugins: {plugin name: anything}. source: names it in errors.
    Raises ValueError, which names the line to fix.
    """

    LISTS = ("plugins", "executors", "executables", "roots", "scopes", "users")

    def __init__(self, text: str = "{}", source: str = "the policy") -> None:
        self._source = source
        try:
            value = json.loads(text)
        except ValueError as error:
            line = getattr(error, "lineno", 1)
            raise ValueError(f"{source}, line {line}: not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{source}, line 1: must be a JSON object, {{...}}")
        for name, item in value.items():
            self._check_field(name, item, _line_of(text, name))
        self._lists: Dict[str, List[str]] = {name: value[name] for name in self.LISTS
                                             if name in value}
        self.checks_callers = self.restricts("scopes") or self.restricts("users")
        self._options: Dict[str, Any] = value.get("options", {})
        self._programs = [pattern for item in self._lists.get("executables", ())
                          for pattern in _program_patterns(item)]

    @classmethod
    def load(cls, path: Path) -> "Policy":
        """Read a policy file. Raises ValueError, also when others can write it."""
        try:
            with open(path, encoding="utf-8") as file:
                mode = os.fstat(file.fileno()).st_mode
                text = file.read(MAX_DESCRIBED)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--policy {path}: cannot be read: {error}") from None
        if mode & 0o022:
            raise ValueError(f"--policy {path}: can be written by others: chmod go-w {path}")
        return cls(text, str(path))

    @property
    def roots(self) -> Optional[List[str]]:
        """The directories under which files may be touched; None for no limit by this policy."""
        return self._lists.get("roots")

    def options(self, plugin_name: str) -> Any:
        """Return what the file says to one plugin under "options", None for nothing."""
        return self._options.get(plugin_name)

    def restricts(self, kind: str) -> bool:
        """Whether the policy has a list of this kind, such as "executables"."""
        return kind in self._lists

    def allows(self, kind: str, value: Optional[str]) -> bool:
        """Whether `value` is in the list of this kind, or there is no such list."""
        patterns = self._lists.get(kind)
        return patterns is None or any(fnmatch.fnmatchcase(value or "", pattern)
                                       for pattern in patterns)

    def check(self, kind: str, value: Optional[str]) -> None:
        """Raise Forbidden unless `value` is allowed: of "plugins", "executors", "scopes", "users".
        """
        if not self.allows(kind, value):
            raise Forbidden(f"{kind[:-1]}: the policy of this edge does not allow {value!r}")

    def check_program(self, program: str, environment: Iterable[str] = ()) -> str:
        """Return the path of a program that may be run; `program` itself without a list of them.

        A pattern must match what symbolic links lead to. environment: names of variables that are
        set for it. Raises Forbidden, also for a variable that could make it run something else.
        """
        if "executables" not in self._lists:
            return program
        for name in environment:
            if _LOADER_VARIABLE.fullmatch(name):
                raise Forbidden("environment: the policy of this edge does not allow to set "
                                f"{name}")
        found = os.path.expanduser(program)
        if "/" not in found:
            places = [os.path.join(folder, found) for folder in os.get_exec_path()]
            found = next((path for path in places
                          if os.access(path, os.X_OK) and os.path.isfile(path)), found)
        real = os.path.realpath(found)
        if not os.path.isabs(found) or not any(fnmatch.fnmatchcase(real, pattern)
                                               for pattern in self._programs):
            raise Forbidden(f"executable: the policy of this edge does not allow {program!r}"
                            + (f", which is {real}" if os.path.isabs(found) else
                               ": give an absolute path"))
        return found

    def check_job(self, executor: str, spec: Dict[str, Any]) -> None:
        """Check a job: where it is to run, and what; an executable becomes an absolute path.

        spec: with "executable", and perhaps "environment", "pre_launch" and "post_launch".
        """
        self.check("executors", executor)
        environment = spec.get("environment") or ()
        for name in ("executable", "pre_launch", "post_launch"):
            if spec.get(name):
                spec[name] = self.check_program(spec[name], environment)

    def _check_field(self, name: str, value: Any, line: int) -> None:
        where = f"{self._source}, line {line}: {name}"
        if name in self.LISTS:
            if not isinstance(value, list) or not all(isinstance(item, str) and item
                                                      for item in value):
                raise ValueError(f'{where}: must be a list of texts, such as ["a*", "b"]')
            if name == "scopes":
                known = {scope.value for scope in Scope}
                if not all(any(fnmatch.fnmatchcase(scope, item) for scope in known)
                           for item in value):
                    raise ValueError(f"{where}: there are only {', '.join(sorted(known))}")
            if name in ("roots", "executables") and not all(
                    os.path.isabs(os.path.expanduser(item)) for item in value):
                raise ValueError(f"{where}: must be absolute paths, or begin with ~/")
        elif name != "options":
            raise ValueError(f"{where}: there is no such field; there are "
                             f"{', '.join(self.LISTS)} and options")
        elif not isinstance(value, dict):
            raise ValueError(f'{where}: must be an object, {{"plugin": ...}}')


def _line_of(text: str, name: str) -> int:
    """Return the number of the line in which a field's name stands."""
    return text[:max(0, text.find(json.dumps(name)))].count("\n") + 1


def _program_patterns(pattern: str) -> List[str]:
    """Return a pattern of programs, and what it leads to when it names one that is a link."""
    full = os.path.expanduser(pattern)
    return [full] if any(sign in full for sign in "*?[") else [full, os.path.realpath(full)]


class PluginSession:
    """One client's state in a plugin; subclasses add methods and keyword arguments.

    The keyword arguments are what the client sent to register_session. They are stored and given
    again when the edge is restarted, so they must be JSON values.
    """

    def __init__(self, sid: str) -> None:
        self._sid = sid
        self._active = True
        self._plugin: Optional[Plugin] = None     # set by the plugin before start()

    @property
    def sid(self) -> str:
        """The session id."""
        return self._sid

    @property
    def is_active(self) -> bool:
        """False once the session is closed."""
        return self._active

    def notify(self, topic: str, data: Dict[str, Any]) -> None:
        """Send a notification to all subscribers. Any thread; nothing happens without a plugin."""
        if self._plugin is not None:
            self._plugin._dispatch_notify(topic, data)

    async def start(self) -> None:
        """Begin; called once on the plugin's loop, after restore() when the edge was restarted."""

    async def close(self) -> Dict[str, Any]:
        """End the session; it was unregistered or has expired. Returns {}."""
        self._active = False
        return {}

    async def request_echo(self, q: str = "hello") -> Dict[str, Any]:
        """Return {"sid", "echo"}: the simplest check that a session is reached."""
        self._check_active()
        return {"sid": self._sid, "echo": q}

    def is_busy(self) -> bool:
        """Return True while something lives in the session; it does not expire then."""
        return False

    def snapshot(self) -> Any:
        """Return the state to keep over a restart, a JSON value; None for nothing."""
        return None

    def restore(self, state: Any) -> None:
        """Take what snapshot() returned before the edge was restarted."""

    def keep(self) -> None:
        """Ask for snapshot() to be stored now. Any thread."""
        if self._plugin is not None:
            self._plugin._store_soon()

    def _check_active(self) -> None:
        if not self._active:
            raise Conflict("session is closed")

    @staticmethod
    def _check_job_count(count: int) -> None:
        """Raise TooManyRequests when a session that has `count` jobs may have no more."""
        if count >= MAX_JOBS:
            raise TooManyRequests(f"the session has {MAX_JOBS} jobs: register another one",
                                  limit="jobs")


class _SessionRecord:
    """What a plugin knows of a session beside the session itself. The plugin's loop owns it."""

    __slots__ = ("session", "owner", "arguments", "created", "used")

    def __init__(self, session: PluginSession, owner: Optional[str], arguments: Dict[str, Any],
                 created: float, used: float) -> None:
        self.session, self.owner, self.arguments = session, owner, arguments
        self.created, self.used = created, used   # seconds since the epoch: they outlive a restart

    def may_use(self, request: Optional[Request]) -> bool:
        """Whether the caller's token made the session, or is an admin's."""
        if request is None or self.owner is None or request.scope == Scope.ADMIN.value:
            return True
        return request.user == self.owner


class Plugin:
    """Base class of plugins: a URL namespace with routes and sessions.

    plugin_name: names the type; what `-p` and get_plugin() look for. Defining it registers the
    class, and so does @plugin(name).
    instance_name: names the object, and its namespace /{instance_name}/...; the default is
    plugin_name. session_ttl: seconds without use after which a session expires, 0 for never.

    A handler takes a Request and returns a dict, a list or a Response. `async def` handlers run on
    the plugin's own loop, plain `def` ones in a worker thread. What they raise of EdgeError goes to
    the caller with its status; anything else is a bare 500 and a traceback in the edge's log.
    """

    _registry: Dict[str, Type["Plugin"]] = {}
    plugin_name: str = ""
    session_class: Optional[Type[PluginSession]] = None
    client_class: Optional[Type] = None
    version: str = "0.0.1"
    session_ttl: int = 3600
    ui_config: Any = None
    ui_module: Optional[str] = None
    uses_roots = False                            # of app.state.options: begins anew with others
    why_disabled: str = "it is not for this machine"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("plugin_name"):
            Plugin._register(cls)

    def __init__(self, app: Any, instance_name: Optional[str] = None) -> None:
        instance_name = instance_name or self.plugin_name
        if not is_valid_name(instance_name):
            raise ValueError(f"plugin instance name {instance_name!r} is not 1 to 64 letters, "
                             "digits, '.', '_' or '-'")
        self._app = app
        self._instance_name = instance_name
        self._uid = f"{instance_name}.{secrets.token_hex(4)}"
        self._started = time.monotonic()
        self.router = Router()
        self._sessions: Dict[str, _SessionRecord] = {}           # by sid; the plugin's loop's
        self._expired: "collections.OrderedDict[str, None]" = collections.OrderedDict()   # likewise
        self._store: Optional[_SessionStore] = None              # set by _open()
        self._sweeper: Optional["asyncio.Task[None]"] = None
        self._add_routes()

    # -- names and registry

    @classmethod
    def get_plugin_class(cls, name: str) -> Optional[Type["Plugin"]]:
        """Return the class registered under `name`, or None."""
        return cls._registry.get(name)

    @classmethod
    def get_plugin_names(cls) -> List[str]:
        """Return the names of all registered classes."""
        return list(cls._registry)

    @property
    def namespace(self) -> str:
        """The path under which the plugin is served on its edge: "/instance_name"."""
        return f"/{self._instance_name}"

    @property
    def instance_name(self) -> str:
        """The name of this instance."""
        return self._instance_name

    @property
    def uid(self) -> str:
        """A name for this object that no other has."""
        return self._uid

    @property
    def policy(self) -> Policy:
        """What this edge allows; a plugin that runs or opens something asks it first."""
        return self._app.state.policy

    @property
    def state_dir(self) -> Path:
        """A directory of this instance's own, made at the first use; mode 0700."""
        path = Path(self._app.state.state_dir) / self._instance_name
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path

    # -- routes

    def add_route(self, method: str, path: str, handler: Callable[..., Any]) -> None:
        """Serve `method` requests for `path` ("status/{sid}") under the namespace."""
        self.router.add(method, path, handler)

    def add_route_get(self, path: str, method: Callable[..., Any]) -> None:
        """Add a GET route to the namespace."""
        self.add_route("GET", path, method)

    def add_route_post(self, path: str, method: Callable[..., Any]) -> None:
        """Add a POST route to the namespace."""
        self.add_route("POST", path, method)

    # -- what subclasses override

    @classmethod
    def instance_names(cls) -> List[str]:
        """Return the names of the instances that a host makes; the first is the plugin's own."""
        return [cls.plugin_name]

    def is_enabled(self) -> bool:
        """Return whether the plugin is for this machine; if not, set why_disabled."""
        return True

    def remarks(self) -> List[str]:
        """Return what `--check` says beside "ok": what of the plugin does not work here, and why."""
        return []

    async def start(self) -> None:
        """Begin; called once on the plugin's loop, before the first request."""

    async def stop(self) -> None:
        """End; called once on the plugin's loop. Sessions stay: the edge may come back."""

    async def on_topology_change(self, edges: Dict[str, Any]) -> None:
        """Take notice of edges that came or went. edges: {name: {"plugins": [names]}}."""

    def _create_session(self, sid: str, **kwargs: Any) -> PluginSession:
        """Return a new session; override it when sessions need more than the client sent."""
        if self.session_class is None:
            raise NotFound(f"the plugin {self._instance_name!r} has no sessions")
        self._check_arguments(self.session_class, sid, kwargs)
        return self.session_class(sid, **kwargs)

    # -- notifications

    def _dispatch_notify(self, topic: str, data: Dict[str, Any]) -> None:
        """Send a notification to all subscribers. Any thread, and async code; does not block."""
        self._app.state.edge_service.notify(self._instance_name, topic, data)

    async def send_notification(self, topic: str, data: Dict[str, Any]) -> None:
        """Send a notification to all subscribers; return once it will survive this process."""
        when_safe = self._app.state.edge_service.notify(self._instance_name, topic, data)
        if when_safe is not None:
            await wait_for_async(when_safe)

    # -- the routes that every plugin has

    async def register_session(self, request: Request) -> Any:
        """Make a session with the body's fields as its arguments; answer {"sid"}."""
        arguments = await request.json_object()
        self._check_session_count(request.user)
        sid = f"session.{secrets.token_hex(8)}"
        try:
            await self._open_session(sid, request.user, arguments)
        except BaseException:                     # nobody will ever know its sid
            self._sessions.pop(sid, None)
            raise
        await self._store_now()
        return {"sid": sid}

    async def unregister_session(self, request: Request) -> Any:
        """Close the session and forget it; answer {"ok": true}."""
        sid = request.path_params["sid"]
        record = self._find(sid)
        del self._sessions[sid]
        try:
            await record.session.close()
        finally:
            await self._store_now()
        return {"ok": True}

    async def get_version(self, request: Request) -> Any:
        """Answer {"version"}."""
        return {"version": self.version}

    async def get_ui_config(self, request: Request) -> Any:
        """Answer the description from which the Explorer renders the plugin's page."""
        return self.describe_ui()

    async def list_sessions(self, request: Request) -> Any:
        """Answer {"sessions": [sid, ...]}: the caller's own, all of them for an admin."""
        return {"sessions": [sid for sid, record in self._sessions.items()
                             if record.may_use(request)]}

    async def health_check(self, request: Request) -> Any:
        """Answer {"status", "plugin", "version", "uptime" in seconds, "active_sessions"}."""
        return {"status": "healthy", "plugin": self._instance_name, "version": self.version,
                "uptime": time.monotonic() - self._started, "active_sessions": len(self._sessions)}

    async def _forward(self, sid: str, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what `func(session, *args, **kwargs)` returns, awaited if need be.

        Raises NotFound for a session that is not known, Gone for one that has expired, Forbidden
        for one of another token.
        """
        result = func(self._find(sid).session, *args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    def describe(self) -> Dict[str, Any]:
        """Return what the bridge tells clients of this plugin."""
        problem = self.ui_problem()
        return {"type": self.plugin_name or self._instance_name, "namespace": self.namespace,
                "version": self.version, "enabled": True, "ui_config": self.describe_ui(),
                **({"ui_problem": problem} if problem else {})}

    def describe_ui(self) -> Dict[str, Any]:
        """Return ui_config as a dict, {} when check_ui_config() finds something wrong with it.

        Objects with to_dict() or model_dump() are taken too.
        """
        return {} if self.ui_problem() else self._ui_dict()

    def ui_problem(self) -> Optional[str]:
        """Return what is wrong with ui_config, or None. The plugin is served all the same."""
        try:
            check_ui_config(self._ui_dict())
        except ValueError as error:
            return str(error)
        return None

    # -- inside

    def _ui_dict(self) -> Any:
        config = self.ui_config
        for name in ("to_dict", "model_dump"):
            if callable(getattr(config, name, None)):
                return getattr(config, name)()
        return {} if config is None else config

    @staticmethod
    def _register(cls: Type["Plugin"]) -> None:
        known = Plugin._registry.get(cls.plugin_name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            log.warning("plugin %r is registered again: %s takes the place of %s", cls.plugin_name,
                        cls.__qualname__, known.__qualname__)
        Plugin._registry[cls.plugin_name] = cls

    def _add_routes(self) -> None:
        self.add_route_post("register_session", self.register_session)
        self.add_route_post("unregister_session/{sid}", self.unregister_session)
        self.add_route_get("version", self.get_version)
        self.add_route_get("list_sessions", self.list_sessions)
        self.add_route_get("health", self.health_check)
        self.add_route_get("ui_config", self.get_ui_config)
        for name in dir(type(self)):
            function = inspect.getattr_static(type(self), name)
            for method, path in getattr(function, "radical_edge_routes", ()):
                self.add_route(method, path, getattr(self, name))

    @staticmethod
    def _check_arguments(factory: Callable[..., Any], sid: str, arguments: Dict[str, Any]) -> None:
        try:
            inspect.signature(factory).bind(sid, **arguments)
        except TypeError as error:
            raise Unprocessable(f"register_session: {error}") from None

    def _check_session_count(self, owner: Optional[str]) -> None:
        if sum(record.owner == owner for record in self._sessions.values()) >= MAX_SESSIONS:
            raise TooManyRequests(f"this token has {MAX_SESSIONS} sessions in "
                                  f"{self._instance_name!r}: unregister some",
                                  headers=_retry_after(60), limit="sessions")

    async def _open_session(self, sid: str, owner: Optional[str], arguments: Dict[str, Any], *,
                            kept: Optional[Dict[str, Any]] = None) -> None:
        self._check_arguments(self._create_session, sid, arguments)
        session = self._create_session(sid, **arguments)
        session._plugin = self
        kept, now = kept or {}, time.time()
        if kept.get("state") is not None:
            session.restore(kept["state"])
        self._sessions[sid] = _SessionRecord(session, owner, arguments, kept.get("created", now),
                                             kept.get("used", now))
        await session.start()

    def _find(self, sid: str) -> _SessionRecord:
        record = self._sessions.get(sid)
        if record is None and sid in self._expired:
            raise Gone(f"session {sid!r} has expired: register a new one")
        if record is None:
            raise NotFound(f"there is no session {sid[:80]!r}: register one")
        if not record.may_use(_current_request.get()):
            raise Forbidden(f"session {sid!r} belongs to another token")
        record.used = time.time()
        return record

    async def _open(self, store: Optional["_SessionStore"]) -> None:
        """Restore the sessions and start; called by the host, on the plugin's loop."""
        self._store = store
        for sid, kept in (await store.load() if store else {}).items():
            try:
                await self._open_session(sid, kept.get("owner"), kept.get("arguments") or {},
                                         kept=kept)
            except Exception:  # one bad session must not cost the others
                log.exception("%s: session %s could not be restored", self._instance_name, sid)
        await self.start()
        if self.session_ttl > 0:
            self._sweeper = asyncio.ensure_future(self._sweep())

    async def _close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        try:
            await self.stop()
        except (Exception, SystemExit):           # the plugin's own; its sessions are to be kept
            log.exception("plugin %s failed to stop", self._instance_name)
        if self._sessions:
            await self._store_now()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(60.0, self.session_ttl / 4))
            try:
                await self._expire(time.time() - self.session_ttl)
            except Exception:                     # a session's mistake: others must still expire
                log.exception("%s: sessions could not be looked through", self._instance_name)

    async def _expire(self, before: float) -> None:
        old = [sid for sid, record in self._sessions.items()
               if record.used < before and not record.session.is_busy()]
        for sid in old:
            record = self._sessions.get(sid)
            if record is None or record.used >= before:          # while another one was closed
                continue
            del self._sessions[sid]
            self._expired[sid] = None
            if len(self._expired) > MAX_EXPIRED:
                self._expired.popitem(last=False)
            log.info("%s: session %s has expired", self._instance_name, sid)
            try:
                await record.session.close()
            except Exception:
                log.exception("%s: session %s failed to close", self._instance_name, sid)
        if old:
            await self._store_now()

    async def _store_now(self) -> None:
        if self._store is not None:
            await self._store.save(self._session_states)

    def _store_soon(self) -> None:
        if self._store is not None:
            with contextlib.suppress(RuntimeError):    # the loop is closed: it was stored then
                self._store.loop.call_soon_threadsafe(self._store.save_soon, self._session_states)

    def _session_states(self) -> Dict[str, str]:
        """Return {sid: what is stored of it, as JSON}."""
        return {sid: self._encode_session(sid, record) for sid, record in self._sessions.items()}

    def _encode_session(self, sid: str, record: _SessionRecord) -> str:
        kept = {"owner": record.owner, "arguments": record.arguments, "created": record.created,
                "used": record.used}
        try:
            return json.dumps({**kept, "state": record.session.snapshot()})
        except Exception:                         # one bad session must not cost the others
            log.exception("%s: the state of session %s is not kept", self._instance_name, sid)
            return json.dumps(kept)


class _SessionStore:
    """Keeps a plugin's sessions in a file, for the next start. On the plugin's loop."""

    def __init__(self, path: Path, workers: Workers) -> None:
        self.loop = asyncio.get_running_loop()
        self._path = path
        self._workers = workers
        self._lock = asyncio.Lock()               # one writer at a time, so that the last one wins
        self._wanted = self._done = 0             # saves asked for, and covered by a write
        self._saving: Set["asyncio.Task[None]"] = set()

    async def load(self) -> Dict[str, Any]:
        """Return {sid: record}; {} when there is none or it is damaged, which is logged."""
        try:
            text = await self._workers.call(read_private, self._path)
            sessions = json.loads(text or "{}").get("sessions", {})
            return {sid: record for sid, record in sessions.items() if isinstance(record, dict)}
        except (EdgeError, ValueError, AttributeError) as error:
            log.error("sessions are lost: %s: %s", self._path, error)
            return {}

    async def save(self, get_states: Callable[[], Dict[str, str]]) -> None:
        """Write what `get_states()` returns, {sid: JSON}; calls that wait together share a write.

        Who is cancelled does not end the write: a later one could overtake it.
        """
        await asyncio.shield(self.save_soon(get_states))

    def save_soon(self, get_states: Callable[[], Dict[str, str]]) -> "asyncio.Task[None]":
        """Begin to save(); return the task that does it."""
        task = self.loop.create_task(self._save(get_states))
        self._saving.add(task)                    # the loop itself keeps only a weak reference
        task.add_done_callback(self._saving.discard)
        return task

    async def _save(self, get_states: Callable[[], Dict[str, str]]) -> None:
        self._wanted += 1
        mine = self._wanted
        async with self._lock:
            if self._done >= mine:
                return
            covered = self._wanted
            sessions = ", ".join(f"{json.dumps(sid)}: {text}" for sid, text in get_states().items())
            try:
                await self._workers.call(write_private, self._path,
                                         f'{{"sessions": {{{sessions}}}}}')
            except OSError as error:
                log.error("sessions will not outlive this process: %s: %s", self._path, error)
            self._done = covered


class ClientManagedPlugin(Plugin):
    """The older style of plugins: clients in place of sessions.

    Routes: POST register_client -> {"cid"}; POST unregister_client/{cid}; GET echo/{cid}?q= ->
    {"cid", "echo"}; version. A subclass sets session_class, or client_class to a class that is made
    with the client's id.
    """

    async def _forward_client(self, request: Request, func: Callable[..., Any], *args: Any,
                              **kwargs: Any) -> Any:
        return await self._forward(request.path_params["cid"], func, *args, **kwargs)

    @post("register_client")
    async def register_client(self, request: Request) -> Any:
        """Make a client; answer {"cid"}."""
        return {"cid": (await self.register_session(request))["sid"]}

    @post("unregister_client/{cid}")
    async def unregister_client(self, request: Request) -> Any:
        """Close a client and forget it; answer {"ok": true}."""
        request.path_params["sid"] = request.path_params["cid"]
        return await self.unregister_session(request)

    @get("echo/{cid}")
    async def echo(self, request: Request) -> Any:
        """Answer {"cid", "echo"} with the query value `q`, "hello" by default."""
        cid, text = request.path_params["cid"], request.query_params.get("q", "hello")
        answer = await self._forward_client(request, lambda client: client.request_echo(text))
        return {"cid": cid, "echo": answer["echo"]}

    def _create_session(self, sid: str, **kwargs: Any) -> PluginSession:
        factory = self.client_class or self.session_class or PluginSession
        self._check_arguments(factory, sid, kwargs)
        return factory(sid, **kwargs)


def load_module(path: Path, name: str) -> types.ModuleType:
    """Import a Python file under `name`, once; its plugins register themselves."""
    import importlib.util                         # here: a bridge without plugins need not pay
    known = sys.modules.get(name)
    if known is not None:
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


WITHOUT_PLUGINS = "none: put plugins.py beside radical_edge.py, or give --plugin-file"


def load_builtin_plugins() -> None:
    """Import plugins.py, which stands beside this file; without it there are none built in."""
    path = Path(__file__).resolve().with_name("plugins.py")
    imported = sys.modules.get("plugins")         # somebody may have imported it by its own name
    if imported is not None and Path(getattr(imported, "__file__", "") or "").resolve() == path:
        return
    if path.exists():
        load_module(path, "radical_edge_plugins")


def load_plugin_file(path: str) -> None:
    """Import a plugin file given by --plugin-file. Raises ValueError when it cannot be."""
    full = Path(path).expanduser().resolve()
    try:
        load_module(full, f"radical_edge_plugin_file_{_digest(str(full))[:8]}")
    except Exception as error:                    # whatever its author did wrong
        raise ValueError(f"--plugin-file {path}: {type(error).__name__}: {error}") from error


def _has_entry_points(group: str) -> bool:
    """Whether an installed package may have entry points of a group."""
    try:
        return any(group.encode() in file.read_bytes()
                   for folder in map(Path, sys.path) for pattern in ("*-info", "EGG-INFO")
                   for file in folder.glob(f"{pattern}/entry_points.txt")) or \
            any(os.path.isfile(path) for path in sys.path)       # an archive, which may have some
    except OSError:                               # a folder that cannot be read: metadata copes
        return True


def load_entry_points() -> None:
    """Import the plugins of installed packages (entry points of the group radical.edge.plugins)."""
    group = "radical.edge.plugins"
    if not _has_entry_points(group):              # to find out in the other way costs 20 ms, 1 MiB
        return
    from importlib import metadata
    points = metadata.entry_points()
    select = getattr(points, "select", None)      # Python 3.9 returns a dict of groups
    for point in select(group=group) if select else points.get(group, ()):
        try:
            point.load()
        except Exception:                         # somebody else's package
            log.exception("the plugin package %s cannot be loaded", point.value)


def select_plugins(wanted: Optional[Iterable[str]]) -> List[str]:
    """Return the registered names that `wanted` selects, by name or unique prefix; None is all.

    Raises ValueError for a name that fits none or several.
    """
    names = Plugin.get_plugin_names()
    if wanted is None:
        return names
    selected = []
    for part in wanted:
        found = [part] if part in names else [name for name in names if name.startswith(part)]
        if len(found) != 1:
            raise ValueError(f"-p {part}: fits {' and '.join(found) or 'no plugin'}; "
                             f"there are: {', '.join(sorted(names)) or WITHOUT_PLUGINS}")
        selected.append(found[0])
    return list(dict.fromkeys(selected))


WhenSafe = Callable[[Callable[[], None]], None]


class Call:
    """One request at a host: its body comes in, its answer goes out. Any thread.

    Links subclass it. This base answers whole, as wire version 1 needs it: what a handler streams
    is collected first. respond() alone, or begin(), try_write() and finish() or abort().
    """

    max_whole = MAX_BODY                          # bytes of a body that respond() takes
    notes: Optional[Dict[str, Any]] = None        # for the audit log, where there is one

    def __init__(self, incoming: EdgeRequest, reader: Optional[BodyReader] = None) -> None:
        self.incoming, self.reader = incoming, reader
        self.cancelled = False                    # nobody waits for the answer any more
        self._on_cancel: Optional[Callable[[], None]] = None
        self._head: Optional[Response] = None
        self._collected = bytearray()

    def respond(self, response: Response) -> None:
        """Answer, whole."""
        raise NotImplementedError

    def begin(self, response: Response) -> None:
        """Send the status and the fields; the body follows."""
        self._head = response

    def try_write(self, piece: memoryview) -> int:
        """Send some of the body; return how many bytes were taken, 0 when it must wait."""
        self._collected += piece
        if len(self._collected) > MAX_BODY:
            raise ContentTooLarge(f"the answer has more than {MAX_BODY} bytes, which is what an "
                                  "older bridge takes")
        return len(piece)

    def when_ready(self, waiter: Callable[[], None]) -> None:
        """Call `waiter` when try_write() may take something."""
        waiter()

    def finish(self) -> None:
        """End the body."""
        head = self._head
        assert head is not None
        self.respond(Response(bytes(self._collected), head.status_code, head.headers))

    def abort(self, error: EdgeError) -> None:
        """Give up in the middle of the body: the client must see that it is not whole."""
        self.respond(error_response(error))

    def cancel(self) -> None:
        """Take notice that nobody waits for the answer: what reads or writes the body fails."""
        self.cancelled = True
        if self.reader is not None:
            self.reader.fail(Unavailable("the client has gone"))
        if self._on_cancel is not None:
            self._on_cancel()

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call `callback` at cancel(), on any thread."""
        self._on_cancel = callback
        if self.cancelled:
            callback()


class _OuterCall(Call):
    """A call around another one, to which it leaves everything."""

    def __init__(self, call_: Call) -> None:
        super().__init__(call_.incoming, call_.reader)
        self._call, self.max_whole, self.notes = call_, call_.max_whole, call_.notes

    def respond(self, response: Response) -> None:
        """Answer, whole."""
        self._call.respond(response)

    def begin(self, response: Response) -> None:
        """Send the status and the fields; the body follows."""
        self._call.begin(response)

    def try_write(self, piece: memoryview) -> int:
        """Send some of the body."""
        return self._call.try_write(piece)

    def when_ready(self, waiter: Callable[[], None]) -> None:
        """Call `waiter` when try_write() may take something."""
        self._call.when_ready(waiter)

    def finish(self) -> None:
        """End the body."""
        self._call.finish()

    def abort(self, error: EdgeError) -> None:
        """Give up in the middle of the body."""
        self._call.abort(error)


class _OnceCall(_OuterCall):
    """A request with an Idempotency-Key: its answer is recorded before it is sent.

    Nobody can cancel it, for the client may ask for the answer later.
    """

    def __init__(self, call_: Call, record: Callable[[Response, Callable[[], None]], None]) -> None:
        super().__init__(call_)
        self._record = record

    def respond(self, response: Response) -> None:
        """Record the answer, then send it."""
        self._record(response, lambda: self._call.respond(response))

    def begin(self, response: Response) -> None:
        """Begin an answer in pieces, which cannot be recorded: a retry is told so."""
        self._record(OnceStore.too_long(), lambda: None)
        self._call.begin(response)


class _AuditedCall(_OuterCall):
    """A request that changes something: its end is written to the audit log."""

    def __init__(self, call_: Call, edge: str, log_: AuditLog) -> None:
        super().__init__(call_)
        self._edge, self._log, self._status = edge, log_, 0
        self.notes: Dict[str, Any] = {}           # what the handler adds: a job, a path

    def respond(self, response: Response) -> None:
        """Write down the outcome, and answer."""
        replayed = "x-idempotent-replay" in response.headers
        self._write(response.status_code, "replayed" if replayed else "")
        self._call.respond(response)

    def begin(self, response: Response) -> None:
        """Begin an answer in pieces."""
        self._status = response.status_code
        self._call.begin(response)

    def finish(self) -> None:
        """Write down the outcome, and end the body."""
        self._write(self._status)
        self._call.finish()

    def abort(self, error: EdgeError) -> None:
        """Write down that the answer was cut short."""
        self._write(int(error.status), "cut short")
        self._call.abort(error)

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call `callback` when nobody waits for the answer any more."""
        self._call.on_cancel(callback)

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._call.cancelled

    @cancelled.setter
    def cancelled(self, value: bool) -> None:
        """Leave that to the inner call; for the base class's __init__()."""

    def _write(self, status: int, outcome: str = "") -> None:
        fields = self.incoming.headers
        self._log.write({"request": fields.get("x-request-id"), "edge": self._edge,
                         "token": fields.get("x-forwarded-user"),
                         "method": self.incoming.method, **self.notes, "status": status,
                         "outcome": outcome or ("done" if status < 400 else "refused"
                                                if status < 500 else "failed")})


class _OnceEntry:
    """What is known of an Idempotency-Key. OnceStore's lock guards it."""

    __slots__ = ("fingerprint", "number", "response", "waiting")

    def __init__(self, fingerprint: str, number: int) -> None:
        self.fingerprint, self.number = fingerprint, number
        self.response: Optional[Response] = None  # None: not done
        # retries that wait for the answer; None: it was begun by a process that has ended
        self.waiting: Optional[List[Call]] = []


class OnceStore:
    """Runs a request with an Idempotency-Key once, and gives a retry the recorded answer.

    That is kept for ONCE_S, across restarts, MAX_ONCE of them at most. An answer that says "not
    now", by its status or by Retry-After, is not recorded, for a retry is what it asks for. A
    request that a killed process had begun is a 409, as it may have been done, unless its handler
    is @repeatable. (The header field is that of the IETF draft "The Idempotency-Key HTTP Header
    Field".)
    """

    NOT_NOW = frozenset((408, 429, 503))

    def __init__(self, folder: Path) -> None:
        self._journal = Journal(folder, max_records=2 * MAX_ONCE, max_bytes=MAX_ONCE_BYTES)
        self._lock = threading.Lock()
        # by key, the oldest first; guarded by _lock
        self._entries: "collections.OrderedDict[str, _OnceEntry]" = collections.OrderedDict()

    def open(self) -> None:
        """Take over what an earlier process has recorded. Blocks."""
        self._journal.open()
        oldest = time.time() - ONCE_S
        for number in range(self._journal.first, self._journal.last + 1):
            record = self._journal.get(number)
            try:
                if record is not None and len(record.head) == 3 and record.head[2] > oldest:
                    self._restore(record)
            except (ValueError, TypeError):
                state_log.error("a damaged answer is left out: a retry of it will be a conflict")

    def close(self) -> None:
        """Write what is left."""
        self._journal.close()

    def run(self, call_: Call, repeatable: bool, start: Callable[[Call], None]) -> None:
        """Call `start` for a new request; answer one that was answered before.

        Raises Unprocessable when the key was used for another request, and Conflict when nobody
        knows whether the request was done.
        """
        incoming = call_.incoming
        key = _digest(f"{incoming.headers.get('x-forwarded-user')} "
                      f"{incoming.headers['idempotency-key']}")
        fingerprint = _digest(f"{incoming.method} {incoming.target} ") + \
            hashlib.sha256(incoming.body).hexdigest()
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.waiting is None and entry.response is None and repeatable:
                entry = self._begin_locked(key, fingerprint)
            else:
                self._check(entry, fingerprint)
                if entry.response is None:
                    entry.waiting.append(call_)
                    return
        if entry.response is not None:
            call_.respond(self._copy(entry.response))
            return
        outer = _OnceCall(call_, functools.partial(self._record, key, entry))
        self._journal.when_written(entry.number, lambda: start(outer))

    # -- inside

    def _begin_locked(self, key: str, fingerprint: str) -> _OnceEntry:
        number = self._journal.append([key, fingerprint, int(time.time())], b"null").number
        entry = self._entries[key] = _OnceEntry(fingerprint, number)
        self._entries.move_to_end(key)
        self._trim_locked()
        return entry

    def _trim_locked(self) -> None:
        """Forget the oldest: they are too many, or the journal has dropped them."""
        while self._entries:
            number = next(iter(self._entries.values())).number
            if len(self._entries) <= MAX_ONCE and number >= self._journal.first:
                return
            self._entries.popitem(last=False)
            self._journal.drop_until(number)

    @staticmethod
    def _check(entry: _OnceEntry, fingerprint: str) -> None:
        if entry.fingerprint != fingerprint:
            raise Unprocessable("Idempotency-Key: it was used for another request: take a new one")
        if entry.response is None and entry.waiting is None:
            raise Conflict("the edge was restarted while it worked on this: it may have been done; "
                           "look, and send it with a new Idempotency-Key if it was not")

    def _record(self, key: str, entry: _OnceEntry, response: Response,
                done: Callable[[], None]) -> None:
        """Record an answer, call `done`, and answer the retries that came meanwhile."""
        with self._lock:
            waiting, entry.waiting = entry.waiting, []
            self._entries.pop(key, None)
            if response.status_code in self.NOT_NOW or \
                    "retry-after" in map(str.lower, response.headers):
                body = b"false"
            else:
                entry.response = self._shorten(response)
                body = self._encode(entry.response)
                self._entries[key] = entry        # the last one now
            number = self._journal.append([key, entry.fingerprint, int(time.time())], body).number
            entry.number = number
            self._trim_locked()

        def answer() -> None:
            done()
            for call_ in waiting or ():
                call_.respond(self._copy(response))

        self._journal.when_written(number, answer)

    @staticmethod
    def too_long() -> Response:
        """Return what a retry gets when the answer was not kept."""
        return error_response(Conflict("this request was done, but its answer is too long to be "
                                       "kept for a retry"))

    def _shorten(self, response: Response) -> Response:
        return response if len(response.body) <= MAX_NOTIFICATION else self.too_long()

    @staticmethod
    def _copy(response: Response) -> Response:
        return Response(response.body, response.status_code,
                        {**response.headers, "x-idempotent-replay": "true"})

    @staticmethod
    def _encode(response: Response) -> bytes:
        body = base64.b64encode(response.body).decode()
        try:
            return encode_json([response.status_code, response.headers, body]).encode()
        except (TypeError, ValueError):           # fields that are no text: the plugin's mistake
            return b"null"

    def _restore(self, record: Record) -> None:
        key, fingerprint, _ = record.head
        value, response = _parse_json(record.body.decode()), None
        if isinstance(value, list):
            status, headers, body = value
            response = Response(base64.b64decode(body), status, headers)
        self._entries.pop(key, None)
        if value is not False:
            entry = self._entries[key] = _OnceEntry(fingerprint, record.number)
            entry.response, entry.waiting = response, None


class SignatureCheck:
    """Lets only requests pass that a client has signed, each signature once. On one thread.

    path: the file of the keys. folder: where signatures are remembered, for SIGNATURE_S, so that
    none is good again after a restart. edge: its name, which is part of what is signed.
    """

    def __init__(self, path: Path, folder: Path, edge: str) -> None:
        self._path, self._edge = path, edge
        self._keys = read_signing_keys(path)      # replaced as a whole
        self._journal = Journal(folder, max_records=2 * MAX_NONCES, max_bytes=MAX_UNSENT_BYTES)
        # when it was made, by signature, the oldest first
        self._used: "collections.OrderedDict[str, int]" = collections.OrderedDict()

    def open(self) -> None:
        """Take over what an earlier process has seen. Blocks."""
        self._journal.open()
        for number in range(self._journal.first, self._journal.last + 1):
            record = self._journal.get(number)
            if record is not None and len(record.head) == 2 and isinstance(record.head[1], int):
                self._used[str(record.head[0])] = record.head[1]

    def close(self) -> None:
        """Write what is left."""
        self._journal.close()

    def reload(self) -> None:
        """Read the keys again. Blocks. Raises EdgeError, and keeps those that it has."""
        self._keys = read_signing_keys(self._path)

    def run(self, call_: Call, start: Callable[[Call], None]) -> None:
        """Call `start` once the signature is known to be good and is on disk. Raises EdgeError."""
        incoming = call_.incoming
        signature, number = self._take(incoming, f"/{self._edge}{incoming.target}")
        digest = signature.fields["content-digest"]
        if call_.reader is not None:
            call_.reader.expect(digest)           # the body is on its way
        elif digest != encode_digest(hashlib.sha256(incoming.body).digest()):
            raise BadRequest("Content-Digest: the body that came is another one")
        # what is not covered, a bridge may have added
        call_.incoming = incoming._replace(headers=signature.fields)
        if call_.notes is not None:
            call_.notes["key"] = signature.key_id
        self._journal.when_written(number, lambda: self._start(call_, start))

    def check(self, incoming: EdgeRequest) -> None:
        """Take a signature without more. Raises EdgeError; `target` is all of it."""
        self._take(incoming, incoming.target)

    def _start(self, call_: Call, start: Callable[[Call], None]) -> None:
        if self._journal.is_failing:              # a restart would forget it
            call_.respond(error_response(Unavailable(
                "the edge cannot write down the signature: its disk is full or away",
                headers=_retry_after(10))))
        else:
            start(call_)

    def _take(self, incoming: EdgeRequest, target: str) -> Tuple[Signature, int]:
        signature = check_signature(self._keys, incoming.method, target, incoming.headers)
        now = time.time()
        if abs(now - signature.created) > SIGNATURE_S:
            raise Unauthorized(f"Signature: made {now - signature.created:.0f} s ago by our clock; "
                               f"it is good for {SIGNATURE_S:.0f} s",
                               headers={"X-Signature": "stale"})
        self._forget_old(now)
        name = _digest(f"{signature.key_id} {signature.nonce}")
        if name in self._used:
            raise Unauthorized("Signature: it was used before: sign each request anew",
                               headers={"X-Signature": "used"})
        if len(self._used) >= MAX_NONCES:         # none may be forgotten before its time
            raise TooManyRequests("too many signed requests within a few minutes",
                                  headers=_retry_after(30))
        self._used[name] = signature.created
        return signature, self._journal.append([name, signature.created], b"0").number

    def _forget_old(self, now: float) -> None:
        while self._used:
            name, created = next(iter(self._used.items()))
            if created >= now - 2 * SIGNATURE_S:  # made ahead of our clock, it lasts twice as long
                return
            del self._used[name]
            self._journal.drop_until(self._journal.last - len(self._used))


class _Hosted:
    """A plugin with the thread, the loop and the workers that are its own."""

    def __init__(self, name: str) -> None:
        self.workers = Workers(f"plugin-{name}")  # of plain `def` handlers
        # others for what coroutines leave to threads: a handler may wait for one of those
        self._helpers = Workers(f"plugin-{name}-helper", MAX_HELPERS)
        self.thread = LoopThread(f"plugin-{name}", WorkLoop(self._helpers)).start()
        self.plugin: Any = None                   # set once it is made
        self.ui_module: Optional[str] = None      # JavaScript for the plugin's page; likewise
        self.tasks: Set["asyncio.Task[None]"] = set()    # that run; its methods are atomic
        self.topology: Optional[Dict[str, Any]] = None   # not told yet; guarded by the host's lock
        self.telling: Optional[asyncio.Lock] = None      # the plugin's loop's

    def start_task(self, make: Callable[[], Any], call_: Optional[Call] = None) -> bool:
        """Run the coroutine that make() returns on the plugin's loop; False when that is closed.

        call_: the request that it works on; when that is cancelled, so is the task. Any thread.
        """
        def started(task: "asyncio.Task[None]") -> None:
            self.tasks.add(task)                  # the loop itself keeps only a weak reference
            if call_ is not None:
                call_.on_cancel(lambda: self.thread.call(task.cancel))

        try:
            self.thread.loop.start_task(functools.partial(self._run, make), started)
            return True
        except RuntimeError:
            return False

    def stop(self) -> bool:
        """Stop the plugin and its threads; False when something in it blocks."""
        if self.plugin is not None:
            name = self.plugin.instance_name
            try:
                self.thread.submit(self.plugin._close()).result(STOP_S / 2)
            except concurrent.futures.TimeoutError:
                log.error("plugin %s did not stop within %.0f s", name, STOP_S / 2)
            except Exception:
                log.exception("plugin %s was not stopped well", name)
        self.workers.stop()
        is_stopped = self.thread.stop(STOP_S / 2)
        self._helpers.stop()                      # tasks that were cancelled may have used them
        return is_stopped

    async def _run(self, make: Callable[[], Any]) -> None:
        try:
            await make()
        finally:                                  # a done callback would take a turn of the loop
            self.tasks.discard(asyncio.current_task())


def _read_ui_module(plugin_object: Plugin) -> Optional[str]:
    if not plugin_object.ui_module:
        return None
    try:
        text = Path(plugin_object.ui_module).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        log.error("%s: the UI module cannot be read: %s", plugin_object.instance_name, error)
        return None
    if len(text.encode()) > MAX_UI_MODULE:
        log.error("%s: the UI module is left out: it has more than %d bytes",
                  plugin_object.instance_name, MAX_UI_MODULE)
        return None
    return text


class PluginHost:
    """Runs plugins and dispatches requests to them, on an edge or on the bridge.

    name: the edge's name. notify(plugin, topic, data) and changed() are called on any thread; what
    notify() returns is returned by notify() here. once: None to run again what is sent again.
    uplink: the way to the bridge, for plugins that start edges; the default is this machine's own.
    options: what the command line says to plugins, by name; they see it as app.state.options.
    policy: what this edge allows; None for everything.
    """

    def __init__(self, name: str, role: str, state_dir: Path, *, bridge_url: str = "",
                 notify: Callable[[str, str, Any], Optional[WhenSafe]],
                 changed: Callable[[], None], once: Optional[OnceStore] = None,
                 audit: Optional[AuditLog] = None,
                 signatures: Optional[SignatureCheck] = None, uplink: Optional[Uplink] = None,
                 options: Optional[Dict[str, Any]] = None,
                 policy: Optional[Policy] = None) -> None:
        self._policy = policy or Policy()         # replaced as a whole
        self.name, self._once, self._audit, self._signatures = name, once, audit, signatures
        self._notify, self._changed = notify, changed
        self._state_dir = state_dir
        state = types.SimpleNamespace(edge_name=name, role=role, state_dir=state_dir,
                                      bridge_url=bridge_url, edge_service=self,
                                      uplink=uplink or Uplink(), options=dict(options or {}),
                                      policy=self._policy)
        self.app = types.SimpleNamespace(state=state)
        self._lock = threading.Lock()             # guards changes of _hosted
        self._hosted: Dict[str, _Hosted] = {}     # replaced as a whole: readers need no lock
        self._adding: Set[str] = set()            # names of plugins that start; guarded by _lock
        self.disabled: Dict[str, str] = {}        # name to reason, of plugins that were not loaded

    def load(self, names: Iterable[str]) -> List[str]:
        """Make and start the instances of each registered class; return the names of all of them.

        What fails is logged and left, with the reason in `disabled`.
        """
        tried: List[str] = []
        for name in names:
            factory = Plugin.get_plugin_class(name)
            try:
                instances = factory.instance_names()
            except Exception as error:
                instances = []
                self._leave(name, error)
            for instance in instances:
                self._add_or_leave(factory, instance)
            tried += instances or [name]
        return tried

    def add(self, factory: Any, instance_name: Optional[str] = None) -> "Plugin":
        """Make an instance of a plugin class and serve it; return it. The topology follows.

        Raises Unavailable with the reason when the plugin is not for this machine, and Conflict
        when its name is taken.
        """
        name = instance_name or factory.plugin_name
        self._policy.check("plugins", factory.plugin_name or name)
        with self._lock:
            if name in self._hosted or name in self._adding:
                raise Conflict(f"there is a plugin named {name!r} already: give another instance "
                               "name")
            self._adding.add(name)
        hosted = _Hosted(name)
        try:
            making = hosted.thread.submit(self._make(hosted, factory, instance_name))
            making.result(HANDSHAKE_S)
            with self._lock:
                self._hosted = {**self._hosted, name: hosted}
        except BaseException as error:
            hosted.stop()
            if isinstance(error, concurrent.futures.TimeoutError):
                raise Unavailable(f"it took more than {HANDSHAKE_S:.0f} s to start") from None
            raise
        finally:
            with self._lock:
                self._adding.discard(name)
        self.disabled.pop(name, None)
        self._changed()
        return hosted.plugin

    def remove(self, name: str) -> None:
        """Stop a plugin and serve it no more. The topology follows. Raises NotFound."""
        with self._lock:
            if name not in self._hosted:
                raise NotFound(f"there is no plugin named {name!r}")
            hosted = self._hosted[name]
            self._hosted = {key: value for key, value in self._hosted.items() if key != name}
        self._changed()
        hosted.stop()

    def set_policy(self, policy: Policy, options: Dict[str, Any], wanted: Iterable[str]) -> None:
        """Go by another policy and other options from now on. Blocks.

        Plugins that it does not allow are removed, those of `wanted` that it allows again are
        loaded; those to which it says something else than before begin anew, with their sessions.
        """
        state, before = self.app.state, self._policy
        moved = options.get("staging_roots") != state.options.get("staging_roots")
        self._policy = state.policy = policy
        state.options = dict(options)
        for name, hosted in list(self._hosted.items()):
            factory = type(hosted.plugin)
            kind = factory.plugin_name or name
            if not policy.allows("plugins", kind) or moved and factory.uses_roots \
                    or policy.options(kind) != before.options(kind):
                self.remove(name)
                self._add_or_leave(factory, name)                # without leave, it says why
        self.load(name for name in wanted if policy.allows("plugins", name)
                  and not before.allows("plugins", name))

    def stop(self) -> bool:
        """Stop all plugins at once; False when one of them is stuck."""
        hosted, self._hosted = self._hosted, {}
        results: List[bool] = []
        stoppers = [threading.Thread(target=lambda item=item: results.append(item.stop()),
                                     daemon=True) for item in hosted.values()]
        for stopper in stoppers:
            stopper.start()
        for stopper in stoppers:
            stopper.join(STOP_S)
        return len(results) == len(stoppers) and all(results)

    def remarks(self, name: str) -> List[str]:
        """Return what a plugin that works says about what of it does not."""
        return self._hosted[name].plugin.remarks() if name in self._hosted else []

    def describe(self) -> Dict[str, Dict[str, Any]]:
        """Return {instance name: what the plugin tells of itself}."""
        return {name: hosted.plugin.describe() for name, hosted in self._hosted.items()}

    def describe_for_bridge(self) -> Dict[str, Dict[str, Any]]:
        """Return describe() with what only the bridge needs: UI modules and routes."""
        plugins = {}
        for name, hosted in self._hosted.items():
            described = dict(hosted.plugin.describe())
            described["namespace"] = f"/{self.name}{hosted.plugin.namespace}"
            described["ui_module"] = hosted.ui_module
            described["routes"] = [[route.method, route.pattern]
                                   for route in hosted.plugin.router.list()]
            plugins[name] = described
        return plugins

    def ui_module(self, name: str) -> Optional[str]:
        """Return a plugin's UI module; None without one."""
        return self._hosted[name].ui_module if name in self._hosted else None

    def notify(self, plugin_name: str, topic: str, data: Any) -> Optional[WhenSafe]:
        """Pass a plugin's notification on. Any thread.

        Returns what calls a function once the notification is safe; None when that is not told.
        """
        return self._notify(plugin_name, topic, data)

    def on_topology(self, edges: Dict[str, Any]) -> None:
        """Tell every plugin of a changed topology; only of the last when it is slow. Any thread."""
        for hosted in self._hosted.values():
            with self._lock:
                waiting, hosted.topology = hosted.topology is not None, edges
            if not waiting:
                hosted.start_task(functools.partial(self._tell_topology, hosted))

    def dispatch(self, call_: Call) -> None:
        """Answer a request, soon and on any thread. Never raises."""
        changes = call_.incoming.method not in SAFE_METHODS
        if changes and self._audit is not None:
            call_ = _AuditedCall(call_, self.name, self._audit)
        if changes and self._signatures is not None:
            try:
                self._signatures.run(call_, self._dispatch)
            except EdgeError as error:
                call_.respond(error_response(error))
        else:
            self._dispatch(call_)

    def _dispatch(self, call_: Call) -> None:
        try:
            hosted, route, request = self._resolve(call_)
            if request.method == "POST" and self._once is not None and request.idempotency_key:
                repeatable = getattr(route.handler, "radical_edge_repeatable", False)
                self._once.run(call_, repeatable, lambda outer: self._start(hosted, route, request,
                                                                            outer))
            else:
                self._start(hosted, route, request, call_)
        except EdgeError as error:
            call_.respond(error_response(error))

    # -- inside

    def _leave(self, name: str, error: Exception) -> None:
        expected = isinstance(error, EdgeError)
        self.disabled[name] = (error.detail if expected else str(error)) or type(error).__name__
        log.log(logging.INFO if expected else logging.ERROR, "plugin %s is not loaded: %s", name,
                self.disabled[name], exc_info=None if expected else error)

    def _start(self, hosted: _Hosted, route: Route, request: Request, call_: Call) -> None:
        try:
            if route.is_async:
                if not hosted.start_task(lambda: self._run_async(hosted, route.handler, request,
                                                                 call_), call_):
                    raise Unavailable("the plugin was stopped")
            else:
                hosted.workers.run(lambda: self._run_plain(hosted, route.handler, request, call_))
        except EdgeError as error:
            call_.respond(error_response(error))

    async def _make(self, hosted: _Hosted, factory: Any, instance_name: Optional[str]) -> None:
        named = {"instance_name": instance_name} if instance_name else {}
        made = factory(self.app, **named)
        # radical.edge 0.2 has it as a method of the class, which is given the app
        arguments = [self.app] if inspect.signature(made.is_enabled).parameters else []
        enabled = await hosted.workers.call(made.is_enabled, *arguments)    # it may run programs
        if not enabled:
            raise Unavailable(made.why_disabled)
        store = _SessionStore(made.state_dir / "sessions.json", hosted.workers)
        await made._open(store)
        hosted.ui_module = await hosted.workers.call(_read_ui_module, made)
        hosted.plugin = made
        if made.ui_problem():
            log.error("%s: its page is plain, for %s", made.instance_name, made.ui_problem())

    def _resolve(self, call_: Call) -> Tuple[_Hosted, Route, Request]:
        incoming = call_.incoming
        path = incoming.target.partition("?")[0]
        segments = known_paths[path]
        hosted = self._hosted.get(segments[0])
        if hosted is None:
            raise NotFound(self._explain_missing(segments[0]))
        route, params = hosted.plugin.router.match(incoming.method, segments[1:])
        fields = incoming.headers
        request = Request(incoming.method, incoming.target, Headers.of_lower(fields), incoming.body,
                          user=fields.get("x-forwarded-user"),
                          scope=fields.get("x-forwarded-scope", ""), app=self.app,
                          reader=call_.reader)
        policy = self._policy
        if policy.checks_callers:
            policy.check("scopes", request.scope)
            policy.check("users", request.user)
        request.path_params = params
        if call_.notes is not None:
            request.notes = call_.notes
            request.notes.update(params, route=f"{segments[0]}/{route.pattern}")
        return hosted, route, request

    def _add_or_leave(self, factory: Any, name: str) -> None:
        try:
            self.add(factory, name if name != factory.plugin_name else None)
        except Exception as error:                # one plugin must not cost the others
            self._leave(name, error)

    def _explain_missing(self, name: str) -> str:
        if name in self.disabled:
            return f"the plugin {name!r} is not loaded on {self.name!r}: {self.disabled[name]}"
        loaded = ", ".join(sorted(self._hosted)) or "none"
        return f"{self.name!r} has no plugin {name[:80]!r}; it has: {loaded}"

    @staticmethod
    async def _run_async(hosted: _Hosted, handler: Callable[..., Any], request: Request,
                         call_: Call) -> None:
        _current_request.set(request)             # of this task alone
        try:
            response = to_response(await handler(request))
        except asyncio.CancelledError:
            response = error_response(Unavailable("the plugin was stopped"))
        except (Exception, SystemExit) as error:  # exit() in a handler ends its request alone
            response = _failure_response(error, request)
        if _is_whole(response, call_):
            call_.respond(response)
        else:
            await _send_body(hosted, request, response, call_)

    def _run_plain(self, hosted: _Hosted, handler: Callable[..., Any], request: Request,
                   call_: Call) -> None:
        token = _current_request.set(request)     # of this thread
        try:
            response = to_response(handler(request))
        except (Exception, SystemExit) as error:  # exit() in a handler ends its request alone
            response = _failure_response(error, request)
        finally:
            _current_request.reset(token)         # or an idle thread would hold it
        if _is_whole(response, call_):
            call_.respond(response)
        elif not hosted.start_task(lambda: _send_body(hosted, request, response, call_),
                                   call_):        # not here: a client may be slow
            call_.respond(error_response(Unavailable("the plugin was stopped")))

    async def _tell_topology(self, hosted: _Hosted) -> None:
        hosted.telling = hosted.telling or asyncio.Lock()
        async with hosted.telling:                # one after the other
            with self._lock:
                edges, hosted.topology = hosted.topology, None
            try:
                await hosted.plugin.on_topology_change(edges)
            except Exception:
                log.exception("%s: on_topology_change failed", hosted.plugin.instance_name)


def _is_whole(response: Response, call_: Call) -> bool:
    return not isinstance(response, StreamingResponse) and len(response.body) <= call_.max_whole


async def _send_body(hosted: _Hosted, request: Request, response: Response, call_: Call) -> None:
    """Send a response in pieces, as fast as they are taken. On the plugin's loop."""
    content = getattr(response, "content", None)
    try:
        if content is None:
            response.headers["content-length"] = str(len(response.body))
        elif not hasattr(content, "__aiter__"):
            content = _Producer(hosted.workers, content)
        call_.begin(response)
        if call_.reader is not None:              # it would wait for what the bridge does not send
            call_.reader.fail(Conflict("the answer has begun, and what had not come of the "
                                       "request's body by then is not sent: read it before"))
        writer = _BodyWriter(call_)
        if content is None:
            await writer.write(response.body)
        elif request.method != "HEAD":
            async for piece in content:
                await writer.write(piece)
        await writer.flush()
        call_.finish()
    except asyncio.CancelledError:
        call_.abort(Unavailable("the plugin was stopped, or the client has gone"))
    except EdgeError as error:
        log.warning("%s %s: %s gave up its answer: %s", request.request_id, request.method,
                    request.path, error.detail)
        call_.abort(error)
    except (Exception, SystemExit) as error:      # the plugin's, in the middle of its answer
        log.error("%s %s: %s failed while it answered", request.request_id, request.method,
                  request.path, exc_info=error)
        call_.abort(EdgeError(f"internal error; the log has it under {request.request_id}"))
    finally:
        if hasattr(content, "aclose"):
            with contextlib.suppress(Exception):  # it was sent, or else its failure told
                await content.aclose()


class _Producer:
    """Runs a plain iterable in a worker thread, ahead of who sends it, but not far ahead.

    The thread is given back when FILE_PIECE bytes are ready: a slow client must not hold it.
    """

    CLOSE_S = 5.0              # a content that still runs is left alone after so long

    def __init__(self, workers: Workers, content: Iterable[bytes]) -> None:
        self._workers, self._content, self._iterator = workers, content, iter(content)
        self._lock = threading.Lock()
        self._ready: List[bytes] = []             # guarded by _lock
        self._size = 0                            # guarded by _lock
        self._state = "idle"                      # or "running", "ended"; guarded by _lock
        self._error: Optional[BaseException] = None              # guarded by _lock
        self._waiter: Optional[Callable[[], None]] = None        # guarded by _lock
        self._closing = False                     # nothing more is wanted

    async def aclose(self) -> None:
        """Call the content's close(), if it has one."""
        self._closing = True
        if hasattr(self._content, "close"):
            await self._workers.call(self._close)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield what the iterable yields, with small pieces joined; raise what it raises."""
        while True:
            with self._lock:
                ready, self._ready, self._size = self._ready, [], 0
                state, error = self._state, self._error
                if state == "idle":
                    self._state = "running"
            if state == "idle":
                self._workers.run(self._fill)
            if ready:
                yield ready[0] if len(ready) == 1 else b"".join(ready)
            elif error is not None:
                raise error
            elif state == "ended":
                return
            else:
                await wait_for_async(self._when_ready)

    def _fill(self) -> None:
        """Take pieces until enough are ready. In a worker thread."""
        state, error = "ended", None
        try:
            for piece in self._iterator:
                if self._add(piece):
                    state = "idle"
                    break
        except BaseException as caught:           # raised to who iterates
            error = caught
        with self._lock:
            self._state, self._error = state, error
            waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter()

    def _add(self, piece: bytes) -> bool:
        """Add a piece; return whether this is enough for now."""
        with self._lock:
            self._ready.append(piece)
            self._size += len(piece)
            waiter, self._waiter = self._waiter, None
            enough = self._size >= FILE_PIECE or self._closing
        if waiter is not None:
            waiter()
        return enough

    def _close(self) -> None:
        end = time.monotonic() + self.CLOSE_S
        while time.monotonic() < end:
            try:
                self._content.close()
                return
            except ValueError:                    # a generator that runs at this moment
                time.sleep(0.02)

    def _when_ready(self, waiter: Callable[[], None]) -> None:
        with self._lock:
            waits = not self._ready and self._state == "running"
            self._waiter = waiter if waits else None
        if not waits:
            waiter()


class _BodyWriter:
    """Sends the pieces of a body, and small ones together. On the plugin's loop.

    Small pieces wait until the handler waits for something, or until they are enough.
    """

    def __init__(self, call_: Call) -> None:
        self._call, self._loop = call_, asyncio.get_running_loop()
        self._small = bytearray()
        self._scheduled = False                   # that _flush_soon() is to be called

    async def write(self, piece: bytes) -> None:
        """Send a piece; return when the next one may come."""
        if len(piece) < DATA_SIZE // 4:
            self._small += piece
            if len(self._small) >= DATA_SIZE:
                await self.flush()
            elif not self._scheduled:
                self._scheduled = True
                self._loop.call_soon(self._flush_soon)
            return
        await self.flush()
        await self._send(memoryview(piece))

    async def flush(self) -> None:
        """Send what waits."""
        small, self._small = bytes(self._small), bytearray()
        await self._send(memoryview(small))

    async def _send(self, view: memoryview) -> None:
        while view:
            if self._call.cancelled:
                raise asyncio.CancelledError
            taken = self._call.try_write(view)
            view = view[taken:]
            if not taken:
                await wait_for_async(self._call.when_ready)

    def _flush_soon(self) -> None:
        self._scheduled = False
        with contextlib.suppress(EdgeError):      # it is too long: the next write() raises it
            while self._small and not self._call.cancelled:
                taken = self._call.try_write(memoryview(bytes(self._small)))
                del self._small[:taken]
                if not taken:
                    self._scheduled = True
                    self._call.when_ready(self._wake)
                    return

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):   # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._flush_soon)


def _failure_response(error: BaseException, request: Request) -> Response:
    """Return the reply to what a handler raised; what is unexpected stays in the log."""
    if isinstance(error, EdgeError):
        return error_response(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return error_response(Unavailable(f"{error.strerror} on the edge: make room, and try again",
                                          headers=_retry_after(10)))
    log.error("%s %s: %s failed", request.request_id, request.method, request.path, exc_info=error)
    return error_response(EdgeError(f"internal error; the log has it under {request.request_id}"))


# ---------------------------------------------------------------------------
# 12. Edge: dials out, registers, and serves its plugins over the link. The transport loop owns all
#     links; plugins run elsewhere (section 11) and only ever call Channel.send() and notify().
# ---------------------------------------------------------------------------

edge_log = logging.getLogger("radical_edge.edge")


def default_edge_name() -> str:
    """Return this host's short name."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname().partition(".")[0])
    return name if is_valid_name(name) and name not in RESERVED_NAMES else "edge-1"


TUNNEL_MODES = ("none", "reverse", "forward", "relay")
TUNNEL_WAIT_S = 20.0           # one attempt to connect waits so long for the tunnel to be opened
RELAY_NONCE = 32               # bytes that a relay sends first; the answer is as long
SSH_OPTIONS = [                # host keys are checked as the user has configured it
    "-N", "-T", "-a", "-x", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes",
    "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3", "-o", "ConnectTimeout=20",
    "-o", "ControlMaster=no", "-o", "ControlPath=none", "-o", "LogLevel=INFO",
    "-o", "PermitLocalCommand=no", "-o", "StreamLocalBindUnlink=yes"]
_SSH_HOST = re.compile(r"([A-Za-z0-9_][A-Za-z0-9._-]{0,63}@)?"
                       r"([A-Za-z0-9_][A-Za-z0-9._-]{0,254}|[0-9A-Fa-f:]{2,45})")


class PortFile(NamedTuple):
    """What a parent edge tells its child: on which port the tunnel is, and of a relay where."""
    port: int
    secret: str = ""
    hosts: Tuple[str, ...] = ()


def encode_port_file(content: PortFile) -> str:
    """Return the text of a port file: the port, and for a relay its secret and hosts below it."""
    lines = [str(content.port), *([content.secret, *content.hosts] if content.secret else ())]
    return "\n".join(lines) + "\n"


def parse_port_file(text: str) -> PortFile:
    """Return what encode_port_file() was given. Raises ValueError."""
    port, secret, *hosts = [*text.split("\n"), "", ""][:10]
    hosts = [host for host in hosts if host]
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536 or \
            not re.fullmatch("[0-9a-f]{64}|", secret) or not all(map(is_ssh_host, hosts)):
        raise ValueError("this is no port file")
    return PortFile(int(port), secret, tuple(hosts))


def is_ssh_host(text: Any) -> bool:
    """Whether `text` is [user@]host, and nothing that ssh would take for an option."""
    return isinstance(text, str) and _SSH_HOST.fullmatch(text) is not None


def tunnels_dir() -> Path:
    """Return ~/.radical/edge/tunnels, where parents and children find each other's files."""
    return home_dir() / "tunnels"


def answer_relay(secret: str, nonce: bytes) -> bytes:
    """Return what proves to a relay that we know its secret, without telling it."""
    return hmac.new(secret.encode(), b"radical-edge relay " + nonce, hashlib.sha256).digest()


def forward_option(url: BridgeURL) -> str:
    """Return where a tunnel ends, as the last two fields of ssh's -L and -R."""
    return f"[{url.host}]:{url.port}" if ":" in url.host else f"{url.host}:{url.port}"


class Tunnel:
    """A child edge's way to its bridge by way of its parent's host.

    mode: "reverse" (the parent's ssh listens here), "forward" (our ssh to `via`) or "relay" (the
    parent itself listens there). via: [user@]host; the default is where the job was submitted. TLS
    and the token go end to end: what is in between moves bytes. Its methods block; any thread.
    """

    def __init__(self, mode: str, edge_name: str, via: Optional[str],
                 stopping: threading.Event) -> None:
        via = via or os.environ.get("PBS_O_HOST") or os.environ.get("SLURM_SUBMIT_HOST")
        if mode == "forward" and not via:
            raise ValueError("--tunnel forward needs the login node: give --tunnel-via HOST")
        if via and not is_ssh_host(via):
            raise ValueError(f"--tunnel-via {via!r}: give a host, or user@host")
        self._mode, self._via, self._stopping = mode, via, stopping
        self._path = tunnels_dir() / f"{edge_name}.port"
        self._open = {"reverse": self._open_reverse, "forward": self._open_forward,
                      "relay": self._open_relay}[mode]
        self._lock = threading.Lock()
        self._forwards: Dict[str, _SshForward] = {}              # by URL; guarded by _lock

    def check(self, urls: List[BridgeURL]) -> None:
        """Raise ValueError when these bridges cannot be reached in this mode."""
        if self._mode != "forward" and len(urls) > 1:
            raise ValueError(f"--tunnel {self._mode} leads to one bridge: give one --url")
        if self._mode == "relay" and not urls[0].tls and \
                os.environ.get("RADICAL_BRIDGE_INSECURE") != "1":
            raise ValueError("--tunnel relay would carry the token unencrypted: it needs a bridge "
                             "with TLS (https://), or --insecure if the network is your own")

    def open(self, url: BridgeURL) -> socket.socket:
        """Return a socket that leads to where the bridge listens, without TLS as yet.

        Raises OSError when there is no tunnel, also after waiting for it.
        """
        sock = self._open(url)
        sock.settimeout(HANDSHAKE_S)
        return sock

    def close(self) -> None:
        """End our ssh, if there is one."""
        with self._lock:
            forwards, self._forwards = self._forwards, {}
        for forward in forwards.values():
            forward.close()

    def _open_reverse(self, _url: BridgeURL) -> socket.socket:
        return self._connect("127.0.0.1", self._wait_for_port().port)

    def _open_relay(self, _url: BridgeURL) -> socket.socket:
        content = self._wait_for_port()
        hosts = [*content.hosts, self._via.rpartition("@")[2]] if self._via else content.hosts
        error: OSError = NotSent(f"{self._path} names no host: give --tunnel-via HOST")
        for host in dict.fromkeys(hosts):
            try:
                sock = self._connect(host, content.port)
            except OSError as caught:
                error = NotSent(f"the relay at {host}:{content.port}: {explain(caught)}")
                continue
            return _enter_relay(sock, content.secret)
        raise error

    def _open_forward(self, url: BridgeURL) -> socket.socket:
        with self._lock:
            if self._stopping.is_set():
                raise NotSent("the edge ends")
            forward = self._forwards.get(str(url))
            if forward is None:
                forward = self._forwards[str(url)] = _SshForward(self._via or "", url)
        return forward.connect(self._stopping)

    @staticmethod
    def _connect(host: str, port: int) -> socket.socket:
        return _open_tcp(BridgeURL(False, host, port, ""))

    def _wait_for_port(self) -> PortFile:
        """Return the port file's content once the parent has written it."""
        end = time.monotonic() + TUNNEL_WAIT_S
        while time.monotonic() < end and not self._stopping.is_set():
            text = read_private(self._path)
            if text is not None:
                try:
                    return parse_port_file(text)
                except ValueError as error:
                    raise NotSent(f"{self._path}: {error}") from None
            self._stopping.wait(0.2)
        raise NotSent(f"the parent edge has not opened the tunnel yet: there is no {self._path}")


def _enter_relay(sock: socket.socket, secret: str) -> socket.socket:
    """Answer a relay's challenge; return the socket, from now on the bridge's."""
    try:
        nonce = _recv_exactly(sock, RELAY_NONCE)
        sock.sendall(answer_relay(secret, nonce))
        if _recv_exactly(sock, 1) != b"+":
            raise NotSent("the parent edge cannot reach the bridge")
        return sock
    except BaseException:
        sock.close()
        raise


def _recv_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise NotSent("the relay refused us: is there a new port file?")
        data += piece
    return data


class _SshForward:
    """One `ssh -L` to the login node, started anew when it has ended. Any thread."""

    def __init__(self, via: str, url: BridgeURL) -> None:
        self._via, self._url = via, url
        self._lock = threading.Lock()
        import tempfile
        # a socket that only its owner can use, in a directory of this node: no port to race for
        self._folder = Path(tempfile.mkdtemp(prefix="radical-edge-"))
        self._socket = self._folder / "bridge"
        self._process: Optional["subprocess.Popen[bytes]"] = None     # guarded by _lock

    def connect(self, stopping: threading.Event) -> socket.socket:
        """Return a socket into the tunnel. Raises NotSent with ssh's own words."""
        process = self._ensure()
        end = time.monotonic() + TUNNEL_WAIT_S + 5               # ConnectTimeout, and some more
        while process.poll() is None and time.monotonic() < end and not stopping.is_set():
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.settimeout(HANDSHAKE_S)
                sock.connect(str(self._socket))
                return sock
            except OSError:                       # ssh has not signed in yet
                sock.close()
                stopping.wait(0.1)
        said = self._log_tail()
        raise NotSent(f"ssh to {self._via}: {said or 'no connection yet'}")

    def close(self) -> None:
        """End ssh and delete what is left of it."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_S / 2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        import shutil
        shutil.rmtree(self._folder, True)

    def _ensure(self) -> "subprocess.Popen[bytes]":
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                edge_log.info("%s: ssh -L by way of %s", self._url, self._via)
                with contextlib.suppress(FileNotFoundError):
                    self._socket.unlink()
                # of our own process group: it ends with the job
                with open(self._folder / "log", "wb") as trouble:
                    self._process = subprocess.Popen(
                        ["ssh", *SSH_OPTIONS, "-L", f"{self._socket}:{forward_option(self._url)}",
                         "--", self._via],
                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=trouble)
            return self._process

    def _log_tail(self) -> str:
        try:
            lines = (self._folder / "log").read_text(errors="replace")[-2000:].split("\n")
        except OSError:
            return ""
        return "; ".join(line.strip() for line in lines[-4:] if line.strip())


class LinkState(enum.Enum):
    """The states of an edge's link (named as in RFC 6455, with registration in between)."""
    CONNECTING, REGISTERING, OPEN, CLOSED = range(4)


_LINK_TRANSITIONS = {
    (LinkState.CLOSED, "dial"): LinkState.CONNECTING,
    (LinkState.CONNECTING, "upgraded"): LinkState.REGISTERING,
    (LinkState.CONNECTING, "failed"): LinkState.CLOSED,
    (LinkState.REGISTERING, "registered"): LinkState.OPEN,
    (LinkState.REGISTERING, "failed"): LinkState.CLOSED,
    (LinkState.OPEN, "failed"): LinkState.CLOSED,
    (LinkState.OPEN, "registered"): LinkState.OPEN,
}


def _encode_reply(req_id: str, response: Response) -> bytes:
    return encode_response(req_id, response.status_code, response.headers, response.body).encode()


class _Load:
    """What the requests of one link cost an edge: bounded, for a bridge may mean no good.

    Any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: Dict[Call, int] = {}         # bytes of their bodies; guarded by _lock
        self._held = 0                            # the sum; guarded by _lock
        self._streams: Set[Tuple[Call, str]] = set()             # guarded by _lock

    def enter(self, call_: Call, unsent: int) -> None:
        """Count a request; raise Unavailable, and do not count it, when it is one too many.

        unsent: bytes of answers that wait for the bridge to read them. Raises ProtocolError when
        these are so many that it does not seem to read at all.
        """
        if unsent > MAX_LINK_BUFFER:
            raise ProtocolError("answers that are not read", CloseCode.POLICY)
        size = len(call_.incoming.body)
        with self._lock:
            if len(self._calls) >= MAX_PENDING or self._held + size > MAX_HELD or \
                    call_.reader is not None and len(self._streams) >= MAX_STREAMS:
                raise Unavailable("the edge has too much to do", headers=_retry_after(1),
                                  limit="pending")
            self._calls[call_] = size
            self._held += size
            if call_.reader is not None:
                self._streams.add((call_, "body"))

    def begin(self, call_: Call) -> None:
        """Count an answer that comes in pieces; raise Unavailable likewise."""
        with self._lock:
            if len(self._streams) >= MAX_STREAMS:
                raise Unavailable("the edge has too much to send", headers=_retry_after(1),
                                  limit="pending")
            if call_ in self._calls:
                self._streams.add((call_, "answer"))

    def grow(self, call_: Call, size: int) -> None:
        """Count some of an answer that is collected to be sent whole; raises likewise."""
        with self._lock:
            if self._held + size > 4 * MAX_HELD:
                raise Unavailable("the edge collects too many answers for an older bridge",
                                  headers=_retry_after(1), limit="pending")
            if call_ in self._calls:
                self._calls[call_] += size
                self._held += size

    def leave(self, call_: Call) -> None:
        """Take notice that a request is answered, or given up."""
        with self._lock:
            size = self._calls.pop(call_, None)
            if size is not None:
                self._held -= size
                if self._streams:
                    self._streams -= {(call_, "body"), (call_, "answer")}


class _WholeCall(Call):
    """A request over wire version 1, whose answer is one message."""

    def __init__(self, load: "_Load", channel: Channel, incoming: EdgeRequest) -> None:
        super().__init__(incoming)
        self._load = load
        self._channel = channel                   # a later link would not know the req_id

    def begin(self, response: Response) -> None:
        """Begin to collect an answer."""
        self._load.begin(self)
        super().begin(response)

    def try_write(self, piece: memoryview) -> int:
        """Collect some of the body."""
        self._load.grow(self, len(piece))
        return super().try_write(piece)

    def respond(self, response: Response) -> None:
        """Answer, whole; what does not fit is answered by an error."""
        incoming = self.incoming
        self._load.leave(self)
        edge_log.debug("%s: > %d, %d bytes", incoming.req_id, response.status_code,
                       len(response.body))
        try:
            payload = _encode_reply(incoming.req_id, response)
        except (TypeError, ValueError) as error:  # fields that are no text: the plugin's mistake
            payload = _encode_reply(incoming.req_id, _failure_response(
                error, Request(incoming.method, incoming.target, incoming.headers)))
        if len(payload) > MAX_OLD_MESSAGE:
            payload = _encode_reply(incoming.req_id, error_response(ContentTooLarge(
                f"the answer takes {len(payload)} bytes on the wire; a bridge of version 1 takes "
                f"{MAX_OLD_MESSAGE}")))
        self._channel.send(encode_frame(Opcode.TEXT, payload, mask=new_mask()))


class _StreamCall(Call):
    """A request over wire version 2: a stream, whose body and answer may come in pieces."""

    max_whole = MAX_WHOLE

    def __init__(self, link: "_BridgeLink", stream: int, incoming: EdgeRequest,
                 ended: bool) -> None:
        super().__init__(incoming, None if ended else BodyReader(self._on_read))
        self._link, self.stream = link, stream
        self._channel, self.load = link.channel, link.load       # a later link has others
        self._received = None if ended else ReceiveWindow()      # of the request's body
        self._window: Optional[SendWindow] = None                # of the answer's; set by begin()
        self.is_streaming = False                 # set once the answer's body is on its way

    def respond(self, response: Response) -> None:
        """Answer, whole."""
        head = self._encode_head(response, end=True)
        self._link.forget(self)
        if not self.cancelled:
            self._link.send_wire(self._channel, head, response.body)

    def begin(self, response: Response) -> None:
        """Send the status and the fields; the body follows. Raises Unavailable."""
        self.load.begin(self)
        self._window = SendWindow()
        self.is_streaming = True                  # before the next line: see _cancel_calls()
        if self.cancelled:                        # cancel() has looked for the window already
            self._window.close()
        elif self._channel.closed:                # and _cancel_calls() for what is streaming
            self.cancel()
        self._link.send_wire(self._channel, self._encode_head(response, end=False))

    def try_write(self, piece: memoryview) -> int:
        """Send some of the body, when the link has room and the bridge lets this stream."""
        if not self._channel.has_room:
            return 0
        size = self._window.take(min(len(piece), DATA_SIZE))
        if size:
            head = encode_wire(Kind.DATA, self.stream)
            self._link.send_wire(self._channel, head, piece[:size])
        return size

    def when_ready(self, waiter: Callable[[], None]) -> None:
        """Call `waiter` when try_write() may take something."""
        if self._channel.has_room:
            self._window.when_open(waiter)
        else:
            self._channel.when_room(waiter)

    def finish(self) -> None:
        """End the body."""
        self._link.forget(self)
        self._link.send_wire(self._channel, encode_wire(Kind.DATA, self.stream, end=True))

    def abort(self, error: EdgeError) -> None:
        """Give up in the middle of the body."""
        if not self.is_streaming:
            self.respond(error_response(error))
            return
        self._link.forget(self)
        if not self.cancelled:
            self._link.send_wire(self._channel, encode_wire(Kind.CANCEL, self.stream),
                                 error.detail.encode())

    def cancel(self) -> None:
        """Take notice that nobody waits for the answer."""
        super().cancel()
        if self._window is not None:
            self._window.close()

    # -- what arrives; on the transport loop

    def on_data(self, frame: WireFrame) -> None:
        """Take a piece of the request's body. Raises ProtocolError when it came without credit."""
        if self.reader is None:
            raise ProtocolError("body after its end")
        self._received.on_received(len(frame.body))
        self.reader.feed(frame.body, end=frame.end)

    def on_credit(self, credit: int) -> None:
        """Take leave to send more, which makes no sense before the answer has begun."""
        if self._window is not None:
            self._window.add(credit)

    # -- inside

    def _on_read(self, size: int) -> None:
        credit = self._received.on_consumed(size, self._link.streams)
        if credit:
            payload = encode_wire_number(Kind.CREDIT, self.stream, credit)
            self._link.send_wire(self._channel, payload)

    def _encode_head(self, response: Response, *, end: bool) -> bytes:
        incoming = self.incoming
        edge_log.debug("%s: > %d", incoming.req_id, response.status_code)
        try:
            text = encode_wire_answer(response.status_code, response.headers)
            return encode_wire(Kind.RESPONSE, self.stream, text, end=end)
        except (TypeError, ValueError) as error:  # fields that are no text: the plugin's mistake
            failure = _failure_response(error, Request(incoming.method, incoming.target,
                                                       incoming.headers))
            response.body = failure.body
            return encode_wire(Kind.RESPONSE, self.stream,
                               [failure.status_code, failure.headers], end=end)


class _BridgeLink:
    """An edge's link to one bridge, kept up for ever. On the transport loop."""

    def __init__(self, edge: "Edge", text: Optional[str]) -> None:
        self._edge, self._text = edge, text
        self.url = find_bridge(text).url          # found anew for each connection
        self._loop = asyncio.get_running_loop()
        self.state = LinkState.CLOSED             # only _advance() changes it
        self.channel: Optional[Channel] = None
        self._wire = 1                            # the version that the bridge chose
        self._is_masked = True                    # whether frames get masks that hide something
        # by stream; the transport loop adds, any thread takes away: a dict's methods are atomic
        self._calls: Dict[int, _StreamCall] = {}
        self.load = _Load()
        self._parser = FrameParser(masked=False)
        self._closed: "asyncio.Future[str]" = self._loop.create_future()
        self.acked = self._sent = 0               # numbers of notifications: safe there, on the way
        self._pumping = False                     # that the channel has room again
        self._last_received = 0.0
        self._handlers = {"request": self._on_request, "ping": self._on_ping,
                          "error": self._on_error, "shutdown": self._on_shutdown,
                          "topology": self._on_topology, "registered": self._on_registered}

    async def run(self) -> None:
        """Connect, register and serve, again and again, until the edge stops."""
        pause = BACKOFF_S[0]
        while not self._edge.stopping:
            started = time.monotonic()
            try:
                await self._connect_and_serve()
            except Exception:                     # ours; the edge must come back all the same
                edge_log.exception("%s: link failed", self.url)
            if time.monotonic() - started > pause:
                pause = BACKOFF_S[0]              # it was up for a while: this is a new trouble
            await self._edge.wait_stopping(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, BACKOFF_S[1])

    def send_notifications(self) -> None:
        """Send from the journal what this bridge has not got, as fast as it takes them."""
        journal = self._edge.journal
        while self.state is LinkState.OPEN and not self._pumping and not self.channel.closed:
            number = max(self._sent + 1, journal.first)
            if number > journal.last or number > max(self.acked, journal.first) + NOTIFY_WINDOW:
                return
            if not self.channel.has_room:         # answers go first
                self._pumping = True
                self.channel.when_room(self._on_room)
                return
            self._sent, self._edge.sent = number, max(number, self._edge.sent)
            record = journal.get(number)
            if record is not None:
                self._send_notification(record)

    def _on_room(self) -> None:
        self._pumping = False
        self.send_notifications()

    def _send_notification(self, record: Record) -> None:
        if self._wire == 2:
            head = encode_wire(Kind.NOTIFICATION, 0, [record.number, *record.head])
            self.send_wire(self.channel, head, record.body)
            return
        plugin_name, topic = record.head
        names = encode_json({"type": "notification", "edge": self._edge.name,
                             "plugin": plugin_name, "topic": topic})
        self._send(Opcode.TEXT, names[:-1].encode() + b',"data":' + record.body + b"}")
        self._on_acked(record.number)             # a bridge of version 1 does not say so

    def _on_acked(self, number: int) -> None:
        self.acked = max(self.acked, number)
        self._edge.on_acked()

    def send_topology(self) -> None:
        """Tell the bridge that this edge's plugins have changed."""
        if self.state is LinkState.OPEN:
            plugins = self._edge.host.describe_for_bridge()
            message = {"type": "topology", "edges": {self._edge.name: {"plugins": plugins}}}
            self._send(Opcode.TEXT, encode_json(message).encode())

    # -- for calls; any thread

    @property
    def streams(self) -> int:
        """How many requests are under way."""
        return len(self._calls)

    def forget(self, call_: _StreamCall) -> None:
        """Take no more notice of a request, which may be of an earlier connection than this."""
        calls = self._calls
        if calls.get(call_.stream) is call_:
            calls.pop(call_.stream, None)
        call_.load.leave(call_)

    def send_wire(self, channel: Channel, head: bytes,
                  body: Union[bytes, memoryview] = b"") -> None:
        """Send a frame of version 2 to the link that its request came from."""
        if self._is_masked:
            channel.send(encode_frame(Opcode.BINARY, head + body, mask=new_mask()))
            return
        head = encode_frame_head(Opcode.BINARY, len(head) + len(body), mask=NO_MASK) + head
        channel.send(*((head + body,) if len(body) < MAX_RECORD else (head, body)))

    def close(self, reason: str) -> None:
        """Leave the bridge, politely."""
        if self.channel is not None and not self.channel.closed:
            self._leave(CloseCode.GOING_AWAY, reason)

    # -- a connection's life

    async def _connect_and_serve(self) -> None:
        self._advance("dial")
        heartbeat = None
        try:
            self.url, sock, rest = await self._edge.workers.call(self._edge.dial, self._text)
            self._advance("upgraded")
            self._serve(sock, rest)
            heartbeat = asyncio.ensure_future(self._beat())
            edge_log.warning("%s: link lost: %s", self.url, await self._closed)
        except (OSError, ProtocolError, Refused, EdgeError, ValueError) as error:
            edge_log.warning("%s: cannot connect: %s", self.url, explain(error))
        finally:
            if heartbeat is not None:
                heartbeat.cancel()
            self._cancel_calls()
            if self.state is not LinkState.CLOSED:
                self._advance("failed")

    def _serve(self, sock: socket.socket, rest: bytes) -> None:
        self._parser = FrameParser(masked=False)
        self._wire, self._is_masked, self._calls, self.load = 1, True, {}, _Load()
        self._closed = self._loop.create_future()
        closed = self._closed
        limit_unsent(sock)
        self.channel = Channel(self._loop, sock, self._on_data,
                                lambda reason: _set_result(closed, reason))
        self._last_received = time.monotonic()
        self._send(Opcode.TEXT, encode_json(self._edge.registration()).encode())
        self.channel.start()
        if rest:
            self._on_data(rest)

    async def _beat(self) -> None:
        period = self._edge.heartbeat
        while True:
            await asyncio.sleep(period)
            silent = time.monotonic() - self._last_received
            if silent > LINK_DEAD * period:
                self.channel.close(f"nothing was heard for {silent:.0f} s")
                return
            if self.state is LinkState.REGISTERING:
                self._on_registered({})           # a bridge of the older kind never says so
            self._send(Opcode.PING, b"")

    def _cancel_calls(self) -> None:
        """End what depends on the lost link: bodies, and requests that only read."""
        calls, self._calls = self._calls, {}
        for call_ in calls.values():
            if call_.reader is not None or call_.is_streaming or \
                    call_.incoming.method in ("GET", "HEAD"):
                call_.cancel()

    def _leave(self, code: int, reason: str) -> None:
        self.channel.send(encode_close(code, reason, mask=new_mask()))
        self.channel.close(reason)

    def _advance(self, event: str) -> None:
        self.state = _LINK_TRANSITIONS[self.state, event]
        edge_log.debug("%s: %s after %s", self.url, self.state.name, event)

    def _send(self, opcode: Opcode, payload: bytes) -> None:
        mask = new_mask() if self._is_masked else NO_MASK
        self.channel.send(encode_frame(opcode, payload, mask=mask))

    # -- what arrives

    def _on_data(self, data: bytes) -> None:
        self._last_received = time.monotonic()
        self._parser.feed(data)
        try:
            while not self.channel.closed:
                message = self._parser.next_message()
                if message is None:
                    return
                self._on_message(*message)
        except ProtocolError as error:
            edge_log.error("%s: the bridge broke the protocol: %s", self.url, error)
            self._leave(error.code, str(error))
        except Exception:                         # ours; a link half understood is worse than none
            edge_log.exception("%s: message failed", self.url)
            self._leave(CloseCode.INTERNAL, "internal error")

    def _on_message(self, opcode: Opcode, payload: Union[str, bytes]) -> None:
        if opcode is Opcode.PING:
            if self.channel.has_room:             # who does not read gets no more of them
                self._send(Opcode.PONG, payload)
        elif opcode is Opcode.CLOSE:
            code, reason = parse_close(payload)
            self._send(Opcode.CLOSE, payload[:2])
            self.channel.close(f"the bridge closed the link ({code} {reason})")
        elif opcode is Opcode.BINARY and self._wire > 1:
            frame = parse_wire(payload)
            if frame is not None:
                self._on_wire(frame)
        elif opcode is not Opcode.PONG:
            message = parse_message(payload)
            handler = self._handlers.get(message["type"])
            if handler is not None:               # unknown types are for later versions
                handler(message)

    def _on_request(self, message: Dict[str, Any]) -> None:
        incoming = parse_request(message)
        edge_log.debug("%s: < %s %.80r", incoming.req_id, incoming.method, incoming.target)
        self._accept(_WholeCall(self.load, self.channel, incoming))

    def _accept(self, call_: Call) -> None:
        """Serve a request, unless there are too many. Raises ProtocolError for a stuck link."""
        try:
            self.load.enter(call_, self.channel.unsent)
        except EdgeError as error:
            call_.respond(error_response(error))
        else:
            self._edge.host.dispatch(call_)

    def _on_wire(self, frame: WireFrame) -> None:
        if frame.kind is Kind.REQUEST:
            self._on_stream(frame)
            return
        if frame.kind is Kind.ACK:
            self._on_acked(min(frame.number, self._sent))
            self.send_notifications()
            return
        call_ = self._calls.get(frame.stream)     # None: it was answered in the meantime
        if call_ is None:
            return
        if frame.kind is Kind.DATA:
            call_.on_data(frame)
        elif frame.kind is Kind.CREDIT:
            call_.on_credit(frame.number)
        elif frame.kind is Kind.CANCEL:
            self.forget(call_)
            edge_log.debug("%s: cancelled", call_.incoming.req_id)
            call_.cancel()

    def _on_stream(self, frame: WireFrame) -> None:
        incoming = parse_wire_request(frame)
        if frame.stream in self._calls:
            raise ProtocolError("stream that is under way already")
        edge_log.debug("%s: < %s %.80r", incoming.req_id, incoming.method, incoming.target)
        call_ = self._calls[frame.stream] = _StreamCall(self, frame.stream, incoming, frame.end)
        if not frame.end and len(frame.body):
            call_.on_data(frame)
        self._accept(call_)

    def _on_ping(self, _message: Dict[str, Any]) -> None:
        if self.channel.has_room:
            self._send(Opcode.TEXT, b'{"type":"pong"}')

    def _on_registered(self, message: Dict[str, Any]) -> None:
        edge_log.info("%s: registered as %s", self.url, self._edge.name)
        if message.get("wire") == 2:
            self._wire, self._parser.max_message = 2, MAX_FRAME
            if self.url.tls or self.url.is_loopback:
                # masks protect proxies that would take the bytes for HTTP (RFC 6455, section 10.3);
                # there is none inside TLS or between two ends on one machine
                self._is_masked = False
        self._advance("registered")
        acked = message.get("acked")
        if isinstance(acked, int):
            known = message.get("known")
            self._edge.on_known(known if isinstance(known, int) else acked)
            self._on_acked(acked)
        self._sent, self._pumping = self.acked, False            # what was on its way may be lost
        self.send_notifications()
        self._edge.on_registered(self.url)

    def _on_topology(self, message: Dict[str, Any]) -> None:
        if self.state is LinkState.REGISTERING:
            self._on_registered({})               # the first thing that an older bridge sends
        edges = message.get("edges", message.get("endpoints"))   # the latter of radical.orbit
        if isinstance(edges, dict):
            self._edge.host.on_topology(edges)

    def _on_error(self, message: Dict[str, Any]) -> None:
        edge_log.error("%s: the bridge refuses this edge: %.200r", self.url,
                       str(message.get("message")))
        self.channel.close("refused by the bridge")

    def _on_shutdown(self, message: Dict[str, Any]) -> None:
        try:
            self._edge.check_shutdown(message.get("request"))
        except EdgeError as error:                # it goes on, and comes back if it is cut off
            edge_log.warning("%s: told to end, but not by a client of ours: %s", self.url,
                             error.detail)
            return
        edge_log.info("%s: told to end: %.200r", self.url, str(message.get("reason")))
        self._edge.request_stop()


def _narrow(options: Dict[str, Any], policy: Optional[Policy]) -> Dict[str, Any]:
    """Return the options for plugins with only those roots that the policy allows.

    Raises ValueError for a root that lies outside of them.
    """
    if policy is None or policy.roots is None:
        return options
    allowed = [os.path.realpath(os.path.expanduser(root)) for root in policy.roots]
    roots = [os.path.realpath(os.path.expanduser(root))
             for root in options.get("staging_roots") or allowed]
    for root in roots:
        if not any(root == other or root.startswith(other.rstrip("/") + "/") for other in allowed):
            raise ValueError(f"--staging-root {root}: the policy allows only "
                             f"{', '.join(allowed)}")
    return {**options, "staging_roots": roots}


class Edge:
    """An edge: plugins on this machine, served through one or more bridges.

    urls: of the bridges; the default is what the environment or ~/.radical/edge names.
    plugins: names or prefixes, None for all that work here. cert: see client_tls().
    token: None to look it up again at each connect. state_dir: where sessions and jobs are kept.
    tunnel, via: how to reach the bridge where that takes a login node; see Tunnel.
    options: for plugins, as app.state.options. client_key: a file of keys; then only requests that
    are signed with one may change something. policy: what this edge allows; see Policy.
    find_policy: returns the one that reload() goes by, None for no other; it may raise ValueError.
    on_end: called, on any thread, when the bridge tells the edge to end; then call stop().
    """

    def __init__(self, urls: Union[str, Iterable[str], None] = None, name: Optional[str] = None, *,
                 plugins: Optional[Iterable[str]] = None, token: Optional[str] = None,
                 cert: Optional[str] = None, state_dir: Optional[Path] = None,
                 heartbeat: float = HEARTBEAT_S, tunnel: str = "none", via: Optional[str] = None,
                 options: Optional[Dict[str, Any]] = None, client_key: Optional[str] = None,
                 policy: Optional[Policy] = None,
                 find_policy: Callable[[], Optional[Policy]] = lambda: None,
                 on_end: Optional[Callable[[], None]] = None) -> None:
        self.name = name or default_edge_name()
        if not is_valid_name(self.name) or self.name in RESERVED_NAMES:
            raise ValueError(f"--name {self.name!r}: take 1 to 64 letters, digits, '.', '_' or "
                             f"'-', and none of {', '.join(sorted(RESERVED_NAMES))}")
        urls = urls or os.environ.get("RADICAL_BRIDGE_URL") or ()
        texts = urls.split(",") if isinstance(urls, str) else list(urls)
        self.ended = threading.Event()            # set when the edge was told to end, or stop() ran
        self._tunnel = None if tunnel == "none" else Tunnel(tunnel, self.name, via,
                                                            self.ended)
        # None: whatever ~/.radical/edge says at the time, for the bridge may be started later
        self.uplink = Uplink([text.strip() for text in texts] or [None], token, cert,
                             self._tunnel.open if self._tunnel else None)
        known = [self.uplink.find(text) for text in self.uplink.urls]        # mistakes show at once
        if self._tunnel is not None:
            self._tunnel.check([target.url for target in known])
        self.heartbeat = heartbeat
        self._wanted = list(plugins) if plugins is not None else None
        self._options, self._find_policy = options or {}, find_policy
        self._state_dir = Path(state_dir or home_dir() / "state" / self.name)
        self.workers = Workers("edge")            # for dialling
        self._transport = LoopThread("edge-transport")
        self._links: List[_BridgeLink] = []       # the transport loop's
        self._stop: Optional[asyncio.Event] = None               # the transport loop's
        self.sent = 0                             # the transport loop's; the last notification that
        self._on_end = on_end                     # any link has sent
        self.online = threading.Event()           # set after the first registration
        self.journal = Journal(self._state_dir / "notifications", max_records=MAX_UNSENT_EVENTS,
                               max_bytes=MAX_UNSENT_BYTES, on_written=self._on_written)
        self._lock = StateLock(self._state_dir, self.request_stop)
        self._once = OnceStore(self._state_dir / "once")
        self.audit = AuditLog(self._state_dir / "audit.jsonl")
        self.signatures = SignatureCheck(
            Path(client_key).expanduser(), self._state_dir / "signatures",
            self.name) if client_key else None
        self.host = PluginHost(self.name, ROLE_EDGE, self._state_dir, bridge_url=str(known[0].url),
                               notify=self._notify, changed=self._on_plugins_changed,
                               once=self._once, audit=self.audit, signatures=self.signatures,
                               uplink=self.uplink, options=_narrow(self._options, policy),
                               policy=policy)

    @property
    def stopping(self) -> bool:
        """Whether the edge is about to end."""
        return self.ended.is_set()

    def start(self) -> "Edge":
        """Load the plugins, connect in the background, and return self.

        Raises Conflict when another process has the state directory, InsufficientStorage when it
        cannot be written.
        """
        try:
            names = select_plugins(self._wanted)
            self._lock.acquire()
            self._instance = self._read_instance()
        except BaseException:
            self._lock.release()
            self._transport.stop()
            raise
        self.journal.open()
        self._once.open()
        self.audit.open()
        if self.signatures is not None:
            self.signatures.open()
        self.host.load(names)
        self._transport.start()
        self._transport.submit(self._start_links()).result()
        return self

    def stop(self) -> bool:
        """Leave the bridges and stop the plugins; False when a plugin is stuck."""
        self.request_stop()
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self._transport.submit(self._close_links()).result(STOP_S)
        clean = self.host.stop()
        self.workers.stop()
        if self._tunnel is not None:
            self._tunnel.close()
        self.journal.close()
        self._once.close()
        self.audit.close()
        if self.signatures is not None:
            self.signatures.close()
        self._lock.release()
        return self._transport.stop() and clean

    def reload(self) -> None:
        """Read the clients' keys and the policy again. Blocks.

        What is wrong is logged, and changes nothing.
        """
        for read in (self._reload_keys, self._reload_policy):
            try:
                read()
            except (EdgeError, ValueError) as error:
                edge_log.error("not reloaded: %s", getattr(error, "detail", error))

    def request_stop(self) -> None:
        """Ask the edge to end; whoever waits for `ended` then calls stop(). Any thread."""
        self.ended.set()
        self._transport.call(lambda: self._stop and self._stop.set())
        if self._on_end is not None:
            self._on_end()

    # -- for links; on the transport loop

    def registration(self) -> Dict[str, Any]:
        """Return the "register" message."""
        endpoint = {"type": "radical.edge", "hostname": socket.gethostname(),
                    "version": __version__, "idempotency_key": True}
        return {"type": "register", "edge_name": self.name,
                "endpoint_name": self.name,       # what bridges of radical.orbit 0.2 call it
                "endpoint": endpoint,
                "plugins": self.host.describe_for_bridge(), "instance": self._instance,
                "wire": list(WIRE_VERSIONS)}

    def dial(self, text: Optional[str]) -> Tuple[BridgeURL, socket.socket, bytes]:
        """Return the bridge's URL and what open_websocket() does, with today's token. Blocks."""
        target = self.uplink.find(text)
        return (target.url, *open_websocket(*target, self.uplink.open_route))

    async def wait_stopping(self, seconds: float) -> None:
        """Wait, but not longer than until the edge stops."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    def check_shutdown(self, request: Any) -> None:
        """Raise EdgeError when clients must sign, and none has signed that this edge shall end."""
        if self.signatures is None:
            return
        fields = request if isinstance(request, dict) else {}
        self.signatures.check(EdgeRequest("-", "POST", f"/edge/disconnect/{self.name}", {
            name: str(fields[name]) for name in fields if isinstance(name, str)}, b""))

    def on_known(self, number: int) -> None:
        """Take notice of the last of our notifications that a bridge has got, in this life or not.
        """
        if number > self.sent:
            self.journal.outrun(number)

    def on_acked(self) -> None:
        """Forget the notifications that all bridges have got."""
        self.journal.drop_until(min(link.acked for link in self._links))

    def on_registered(self, _url: BridgeURL) -> None:
        """Take notice that a bridge has accepted this edge."""
        self.online.set()

    # -- inside

    async def _start_links(self) -> None:
        self._stop = asyncio.Event()
        self._links = [_BridgeLink(self, url) for url in self.uplink.urls]
        self._tasks = [asyncio.ensure_future(link.run()) for link in self._links]

    async def _close_links(self) -> None:
        for link in self._links:
            link.close("the edge ends")
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    def _reload_keys(self) -> None:
        if self.signatures is not None:
            self.signatures.reload()
            edge_log.info("the clients' keys were read again")

    def _reload_policy(self) -> None:
        policy = self._find_policy()
        if policy is not None:
            self.host.set_policy(policy, _narrow(self._options, policy),
                                 select_plugins(self._wanted))
            edge_log.info("the policy was read again")

    def _read_instance(self) -> str:
        """Return this state directory's id: who comes back with it may take over its own link."""
        path = self._state_dir / "instance"
        instance = read_private(path)
        if not instance:
            instance = secrets.token_hex(16)
            with must_write(self._state_dir, OTHER_STATE):
                write_private(path, instance + "\n")
        return instance

    def _notify(self, plugin_name: str, topic: str, data: Any) -> Optional[WhenSafe]:
        try:
            body = encode_json(data).encode(errors="backslashreplace")   # as in JSONResponse
            if not is_label(topic):               # a bridge would end the link, each time that it
                raise ValueError("a topic is at most 256 printable characters")     # is sent again
        except (TypeError, ValueError, RecursionError) as error:
            edge_log.error("%s: notification %.80r is not JSON and was dropped: %s", plugin_name,
                           topic, error)
            return None
        if len(body) > MAX_NOTIFICATION:
            edge_log.error("%s: notification %r has %d bytes and was dropped; %d are allowed",
                           plugin_name, topic, len(body), MAX_NOTIFICATION)
            return None
        record = self.journal.append([plugin_name, topic], body)
        dropped = self.journal.dropped
        if dropped and dropped & (dropped - 1) == 0:             # 1, 2, 4, ...: not a line for each
            edge_log.error("%d notifications are lost: more than the state directory keeps, and "
                           "not all bridges have got them", dropped)
        return functools.partial(self.journal.when_written, record.number)

    def _on_written(self) -> None:
        self._transport.call(self._send_notifications)

    def _send_notifications(self) -> None:
        for link in self._links:
            link.send_notifications()

    def _on_plugins_changed(self) -> None:
        self._transport.call(self._send_topology)

    def _send_topology(self) -> None:
        for link in self._links:
            link.send_topology()


# ---------------------------------------------------------------------------
# 13. Bridge: clients on one side, edges on the other. Threads open connections; from then on the
#     loop owns every socket, every link, the topology and the events.
# ---------------------------------------------------------------------------

bridge_log = logging.getLogger("radical_edge.bridge")

# fields of an edge's answer that reach the client, beside those that begin with x-
_EDGE_FIELDS = frozenset(("content-type", "content-disposition", "content-encoding",
                          "content-language", "content-range", "accept-ranges", "etag",
                          "last-modified", "retry-after", "allow", "repr-digest"))
_OUR_FIELDS = frozenset(("x-request-id", "x-content-type-options", "x-frame-options"))
_LIMIT_STATUSES = frozenset((408, 413, 414, 429, 431, 503))
# what an edge answers is not ours: no script in it may run with this origin's cookie
_FOREIGN_FIELDS = {"content-security-policy": "sandbox; default-src 'none'"}

# stands in for explorer.html where that is missing
_PLAIN_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Radical Edge</title>
<h1>Radical Edge</h1>
<p>This bridge is up. Its page for browsers, explorer.html, is not beside radical_edge.py. The API
is described in <a href="openapi.json">openapi.json</a>; the command
<code>python3 radical_edge.py --list</code> shows which edges are connected.</p>
</html>
"""
# {scripts} and {styles}: the hashes of what stands in the page itself; nothing else runs, and no
# string becomes markup (trusted-types)
_PAGE_POLICY = ("default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; "
                "img-src data:; frame-src 'self'; base-uri 'none'; form-action 'none'; "
                "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'")
# for the frame in which a plugin's own module runs: an origin of its own, and no network at all
_FRAME_POLICY = ("sandbox allow-scripts; default-src 'none'; script-src {scripts} blob:; "
                 "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; base-uri 'none'; "
                 "form-action 'none'; frame-ancestors 'self'; webrtc 'block'")
_PAGE_FIELDS = {"Cache-Control": "no-cache", "Referrer-Policy": "no-referrer",
                "Cross-Origin-Opener-Policy": "same-origin", "X-DNS-Prefetch-Control": "off",
                "Vary": "Accept-Encoding", "Permissions-Policy":
                "camera=(), display-capture=(), geolocation=(), microphone=(), usb=()"}


class _Document:
    """A page as it is sent: its bytes, compressed too, and its policy. Never changes."""

    def __init__(self, body: bytes, policy: str) -> None:
        self._body = body
        self._etag = hashlib.sha256(self._body).hexdigest()[:16]
        self._policy = policy.format(scripts=self._hashes(b"script", body),
                                     styles=self._hashes(b"style", body))

    def respond(self, fields: Dict[str, str]) -> Response:
        """Return the answer to a request with these fields: 304 for who has it already."""
        zipped = re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))",
                           fields.get("accept-encoding", "")) is not None
        etag = f'"{self._etag}{"-gzip" if zipped else ""}"'
        headers = {**_PAGE_FIELDS, "Content-Security-Policy": self._policy, "ETag": etag}
        if etag in fields.get("if-none-match", ""):
            return Response(b"", HTTPStatus.NOT_MODIFIED, headers)
        if zipped:
            headers["Content-Encoding"] = "gzip"
        return Response(self._compressed if zipped else self._body, headers=headers,
                        media_type="text/html; charset=utf-8")

    @functools.cached_property
    def _compressed(self) -> bytes:               # when somebody first asks: many bridges have none
        import gzip
        return gzip.compress(self._body, 9)

    @staticmethod
    def _hashes(tag: bytes, body: bytes) -> str:
        """Return the sources that allow the page's own elements (CSP 3, section 2.3.1)."""
        digests = [hashlib.sha256(found).digest()
                   for found in re.findall(b"<%b>(.*?)</%b>" % (tag, tag), body, re.DOTALL)]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'"
                        for digest in digests) or "'none'"


def load_explorer(path: Optional[Path] = None) -> Tuple[_Document, _Document]:
    """Return (the page, the frame for plugins' modules) of explorer.html; a plain page without it.

    The frame is the content of <template id="frame"> in the page. All of it stays bytes: as text,
    with its few wide characters, it would weigh four times as much.
    """
    path = path or _find_explorer()
    try:
        page = path.read_bytes() if path else _PLAIN_PAGE.encode()
    except OSError as error:
        bridge_log.error("%s cannot be read, so the page is a plain one: %s", path, error)
        page = _PLAIN_PAGE.encode()
    found = re.search(rb'<template id="frame">\n?(.*?)</template>\n?', page, re.DOTALL)
    frame = found[1] if found else b""
    page = page.replace(found[0], b"") if found else page
    return _Document(page, _PAGE_POLICY), _Document(frame, _FRAME_POLICY)


def _find_explorer() -> Optional[Path]:
    """Return where explorer.html is: beside this file, or where pip has put it."""
    beside = Path(__file__).resolve().with_name("explorer.html")
    if beside.is_file():
        return beside
    import importlib.metadata                     # slow, and not needed beside the file
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("radical-edge") or ():
            if file.name == "explorer.html":
                return Path(str(file.locate()))
    return None


class AnswerHead(NamedTuple):
    """What stands before an answer's body, but for what differs from one answer to the next.

    lines: of its fields. length, limit: what "content-length" and "x-limit" say, "" for nothing.
    It never changes: answers may share it.
    """
    status: int
    lines: str
    length: str
    limit: str


def _make_answer(status: int, fields: Dict[str, str]) -> AnswerHead:
    """Return the head of an answer with these fields, names in lower case, and those that all have.
    """
    lines = [("Cache-Control", fields.get("cache-control", "no-store")),
             ("X-Content-Type-Options", "nosniff"),
             *((name.title(), value) for name, value in fields.items()
               if name not in ("cache-control", "content-length"))]
    return AnswerHead(status, encode_field_lines(lines), fields.get("content-length", ""),
                      fields.get("x-limit", ""))


def _make_foreign_answer(status: int, fields: Dict[str, str]) -> AnswerHead:
    """Return the head of an answer of an edge, without what an edge has no say in."""
    kept = {name: value for name, value in fields.items()
            if name in _EDGE_FIELDS or name.startswith("x-") and name not in _OUR_FIELDS}
    return _make_answer(status, {**kept, **_FOREIGN_FIELDS})


def _read_answer(text: bytes) -> AnswerHead:
    """Return the head of an answer, as a client gets it, from that of a RESPONSE.

    Raises ProtocolError when it makes no sense.
    """
    status, headers = [*parse_wire_head(text), None, None][:2]
    fields = parse_fields_object(headers)
    answer = _make_foreign_answer(check_status(status), fields)
    return answer._replace(length=fields.get("content-length", ""))


_known_answers = _Remembered(_read_answer)


def _encode_date() -> str:
    return f"Date: {_http_date(int(time.time()))}\r\n"


class Exchange:
    """One request of a client and its answer. On the loop.

    respond() is called once, or begin(), send_body() and end_body(); `cancelled` is True when the
    client went away before.
    """

    __slots__ = ("connection", "head", "segments", "identity", "route", "params", "request_id",
                 "body", "received", "upload", "error", "started", "timeout", "deadline", "begun",
                 "cancelled", "wire_id", "link", "own_call", "keep_alive")

    def __init__(self, connection: "HttpConnection", head: RequestHead, request_id: str,
                 started: float) -> None:
        self.connection, self.head = connection, head
        self.request_id, self.started = request_id, started
        self.keep_alive = head.keep_alive         # whether the connection lasts after the answer
        self.segments: Tuple[str, ...] = ()
        self.identity: Optional[Identity] = None
        self.route: Optional[Route] = None        # one of the bridge's own; None: for an edge
        self.params: Dict[str, str] = {}
        self.body = b""
        self.received = False                     # whether the request is here to its last byte
        self.upload: Optional[Upload] = None      # what takes the body while it comes
        self.error: Optional[EdgeError] = None    # known before the body was read
        self.timeout = REQUEST_S
        self.deadline = started + REQUEST_S       # each piece of a body puts it off by `timeout`
        self.begun = self.cancelled = False
        self.link: Optional[EdgeLink] = None      # that works on it, under the id `wire_id`
        self.wire_id: Union[str, int] = ""
        self.own_call: Optional[Call] = None      # where one of the bridge's own plugins answers

    def respond(self, response: Response) -> None:
        """Answer the client."""
        self.answer(_make_answer(response.status_code, response.headers), response.body)

    def answer(self, head: AnswerHead, body: bytes) -> None:
        """Answer the client, with what is encoded already."""
        if not self.cancelled:
            self.connection.respond(self, head, body)

    def answer_whole(self, head: AnswerHead, body: bytes) -> None:
        """Answer with a body that may be large, and that its edge could not be told to hold back.

        Raises Unavailable when the bridge holds too much that clients have not read.
        """
        if len(body) <= LINK_ROOM or self.cancelled:
            self.answer(head, body)
        else:
            self.connection.respond_whole(self, head, body)

    def fail(self, error: EdgeError) -> None:
        """Answer the client with an error, or let it see that the answer is not whole."""
        if self.begun and not self.cancelled:
            bridge_log.warning("%s: answer cut short: %s", self.request_id, error.detail)
            self.connection.channel.close(error.detail)
        else:
            self.respond(error_response(error))

    @property
    def is_repeatable(self) -> bool:
        """Whether it may be forwarded again: it only reads, or the edge will know it by its key."""
        return not self.begun and self.received and self.upload is None and (
            self.head.method in ("GET", "HEAD") or "idempotency-key" in self.head.fields
            and self.link is not None and runs_once(self.link.endpoint))

    @property
    def target(self) -> str:
        """What the edge is asked for: the request's target without the edge's name."""
        return self.head.target[self.head.target.index("/", 1):]

    def fields_for_edge(self) -> Dict[str, str]:
        """Return the fields that the edge gets."""
        headers = self.head.forwarded.copy()
        if self.upload is not None and self.head.length is not None:
            headers["content-length"] = str(self.head.length)
        headers["x-request-id"] = self.request_id
        headers["x-forwarded-user"] = self.identity.name
        headers["x-forwarded-scope"] = self.identity.scope.value
        return headers

    def on_progress(self) -> None:
        """Put the deadline off: something moved."""
        self.deadline = time.monotonic() + self.timeout


class Upload:
    """A request's body on its way to a plugin, as fast as that reads it. On the loop.

    The client's connection is read only when there is nothing left to send.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._backlog: Deque[bytes] = collections.deque()
        self._ended = False
        self._send: Optional[Callable[[bytes, bool], int]] = None
        self._when_ready: Optional[Callable[[Callable[[], None]], None]] = None

    def attach(self, send: Callable[[bytes, bool], int],
               when_ready: Callable[[Callable[[], None]], None]) -> None:
        """Begin to send.

        send(piece, end) returns how many bytes it took, 0 when it must wait; when_ready(waiter)
        calls the waiter, on the loop, when it need not any more.
        """
        self._send, self._when_ready = send, when_ready
        self._pump()

    def feed(self, piece: bytes) -> None:
        """Take what came from the client."""
        self._backlog.append(piece)
        self._exchange.on_progress()
        self._pump()

    def finish(self) -> None:
        """Take notice that this was all."""
        self._ended = True
        self._pump()

    def stop(self) -> None:
        """Drop what is left: nobody reads it."""
        self._send = lambda piece, end: len(piece)
        self._backlog.clear()

    def _pump(self) -> None:
        while self._send is not None and self._backlog:
            last = self._ended and len(self._backlog) == 1
            piece = self._backlog[0]
            sent = self._send(piece, last)
            if sent == len(piece):
                self._backlog.popleft()
                if last:
                    self.stop()
                    return
            elif sent:
                self._backlog[0] = piece[sent:]
            else:
                self._when_ready(self._pump)
                break
        if self._backlog or self._send is None:
            self._exchange.connection.pause_reading()
        elif self._ended:
            self._send(b"", True)
            self.stop()
        else:
            self._exchange.connection.resume_reading()


class Download:
    """An answer's body on its way to the client, as fast as that reads it. On the loop.

    give_credit(size) lets the sender go on; streams() tells how many share the memory for it.
    """

    def __init__(self, exchange: Exchange, streams: Callable[[], int],
                 give_credit: Callable[[int], None]) -> None:
        self._exchange, self._streams, self._give_credit = exchange, streams, give_credit
        self._window = ReceiveWindow()
        self._waiting = 0                         # bytes passed on that the client has not taken

    def on_data(self, piece: Union[bytes, memoryview]) -> None:
        """Pass a piece on. Raises ProtocolError when it came without credit."""
        size, channel = len(piece), self._exchange.connection.channel
        self._window.on_received(size)
        self._exchange.on_progress()
        self._exchange.connection.send_body(piece)
        if not self._waiting and channel.has_room:
            self._on_taken(size)
            return
        if not self._waiting:
            channel.when_room(self._on_room)
        self._waiting += size

    def _on_room(self) -> None:
        size, self._waiting = self._waiting, 0
        self._exchange.on_progress()
        self._on_taken(size)

    def _on_taken(self, size: int) -> None:
        credit = self._window.on_consumed(size, self._streams())
        if credit and not self._exchange.cancelled:
            self._give_credit(credit)


class HttpConnection:
    """A client's connection: requests in, answers out, one at a time and in order. On the loop.

    A thread opens it and reads the first head (see _Opener); then adopt() gives it to the loop.
    """

    def __init__(self, gateway: "Bridge", parser: RequestParser, address: str) -> None:
        self._gateway, self._parser, self.address = gateway, parser, address
        self._loop = gateway.loop
        self.channel: Optional[Channel] = None
        self._exchange: Optional[Exchange] = None                # being read or answered
        self._body = bytearray()
        self._held = 0                            # bytes of a body, counted until the answer
        self._body_left: Optional[int] = 0        # bytes of the answer under way; None: chunked
        self._answering = self._advancing = self._paused = False
        self._taken: Optional[Callable[[bytes], None]] = None    # by a link or a subscriber
        self._taker_lost: Callable[[str], None] = lambda reason: None            # likewise
        self.deadline = time.monotonic() + HEAD_S
        self._sent = 0                            # bytes of answers, at that time
        self._clock: Optional[BodyClock] = None   # of the body being read

    def adopt(self, sock: socket.socket) -> None:
        """Serve the socket, whose first bytes the parser has."""
        self.channel = Channel(self._loop, sock, self._on_data, self._on_lost)
        self._advance()
        if not self.channel.closed:
            self.channel.start()

    def take_over(self, on_data: Callable[[bytes], None], on_lost: Callable[[str], None]) -> bytes:
        """Give the connection to a link or a subscriber; return what was read ahead."""
        self._taken, self._taker_lost = on_data, on_lost
        self.deadline = float("inf")
        return self._parser.take_rest()

    def pause_reading(self) -> None:
        """Leave the rest of the request's body where it is, for now."""
        if not self._paused:
            self._paused, self.deadline = True, float("inf")
            self._clock.pause(time.monotonic())
            self.channel.pause_reading()

    def resume_reading(self) -> None:
        """Go on with the request's body."""
        if self._paused:
            self._clock.resume(time.monotonic())
            self._paused, self.deadline = False, self._clock.deadline
            self.channel.resume_reading()
            if not self._advancing:
                self._advance()

    # -- the answer

    def respond(self, exchange: Exchange, answer: AnswerHead, body: bytes) -> None:
        """Write an answer; then go on with the next request, or close."""
        length: Union[int, str, None] = len(body)
        if answer.status in (204, 304):           # no body, and no length (RFC 9110, section 8.6)
            body, length = b"", None
        elif exchange.head.method == "HEAD" and answer.length:   # as long as it would be for GET
            length = answer.length
        encoded = self._encode_head(exchange, answer, length)
        self.channel.send(encoded if exchange.head.method == "HEAD" else encoded + body)
        if answer.status in _LIMIT_STATUSES:
            self._gateway.records.counters.count_limit(answer.limit)
        self._end(exchange, answer.status)

    def respond_whole(self, exchange: Exchange, answer: AnswerHead, body: bytes) -> None:
        """Write an answer, which is counted until the client has read it. Raises Unavailable."""
        answers, size = self._gateway.answers, len(body)
        answers.add(size)
        self.respond(exchange, answer, body)
        self.channel.when_room(lambda: answers.remove(size))

    def begin(self, exchange: Exchange, answer: AnswerHead) -> None:
        """Write the head of an answer whose body comes in pieces; its length may be known."""
        given = answer.length
        length = int(given) if given.isascii() and given.isdigit() and len(given) < 19 else None
        bare = exchange.head.method == "HEAD" or answer.status in (204, 304)
        encoded = self._encode_head(exchange, answer, length, chunked=not bare)
        self._body_left = 0 if bare else length
        exchange.begun = True
        self._answering, self.deadline = True, time.monotonic() + KEEP_ALIVE_S
        self._sent = self.channel.sent
        self.channel.send(encoded)

    def send_body(self, piece: Union[bytes, memoryview]) -> None:
        """Write some of the body. What is longer than was announced closes the connection."""
        exchange, size = self._exchange, len(piece)
        if self._body_left is not None:
            if size > self._body_left:
                if exchange.head.method != "HEAD":
                    self.channel.close("the answer is longer than announced")
                return
            self._body_left -= size
            self.channel.send(piece)
        elif exchange.head.is_http10:
            self.channel.send(piece)
        elif size:
            self.channel.send(b"%x\r\n" % size, piece, b"\r\n")

    def end_body(self, exchange: Exchange, status: int) -> None:
        """End the body; what is shorter than announced closes the connection."""
        if self._body_left:
            self.channel.close("the answer is shorter than announced")
            return
        if self._body_left is None and not exchange.head.is_http10:
            self.channel.send(encode_chunk(b""))
        self._end(exchange, status)

    def _encode_head(self, exchange: Exchange, answer: AnswerHead, length: Union[int, str, None],
                     *, chunked: bool = False) -> bytes:
        is_http10 = exchange.head.is_http10
        if not exchange.received or self._gateway.stopping:      # its body is not read any more
            exchange.keep_alive = False
        lines = f"{_encode_date()}{answer.lines}X-Request-ID: {exchange.request_id}\r\n"
        if length is not None:
            lines += f"Content-Length: {length}\r\n"
        elif chunked and is_http10:
            exchange.keep_alive = False           # the end of the connection is the body's end
        elif chunked:
            lines += "Transfer-Encoding: chunked\r\n"
        if not exchange.keep_alive:
            lines += "Connection: close\r\n"
        elif is_http10:
            lines += "Connection: keep-alive\r\n"
        return join_response_head(answer.status, lines)

    def _end(self, exchange: Exchange, status: int) -> None:
        keep = exchange.keep_alive
        self._gateway.on_answered(exchange, status)
        if self._held:
            self._release()
        if exchange.upload is not None:
            exchange.upload.stop()
        # the last answer was given: what the client sent after that request is not read any more
        self._exchange, self._answering, self._paused = None, not keep, False
        self.deadline, self._sent = time.monotonic() + KEEP_ALIVE_S, self.channel.sent
        if not keep:
            self.channel.close_when_sent()
        elif not self._advancing:
            self.channel.resume_reading()
            if self._parser.buffered:
                self._advance()

    def on_deadline(self) -> None:
        """Close a connection that is idle, slow to finish its request, or does not read."""
        unsent, exchange = self.channel.unsent, self._exchange
        begun = exchange is not None and exchange.begun
        if unsent and self.channel.sent > self._sent or begun and not unsent:
            self.deadline = time.monotonic() + KEEP_ALIVE_S     # it reads, if slowly
            self._sent = self.channel.sent
        elif begun or exchange is None and (unsent or not self._parser.buffered):
            self.channel.close("idle")
        else:
            limit = "head-time" if exchange is None else self._clock.limit
            self._fail(RequestTimeout("the request did not come fast enough: send it again",
                                      limit=limit))

    # -- the request

    def _on_data(self, data: bytes) -> None:
        if self._taken is not None:
            self._taken(data)
            return
        self._parser.feed(data)
        if self._answering:
            if self._parser.buffered > MAX_PIPELINED:
                self.channel.pause_reading()      # it goes on with the answer
            return
        if self._exchange is None:
            self.deadline = min(self.deadline, time.monotonic() + HEAD_S)
        self._advance()

    def _advance(self) -> None:
        """Read requests until one waits for its answer or bytes are missing."""
        self._advancing = True
        try:
            while not self._answering and not self._paused and self._taken is None \
                    and not self.channel.closed:
                event = self._parser.next_event()
                if event is None:
                    break
                if isinstance(event, RequestHead):
                    self._on_head(event)
                elif event is END:
                    self._on_end()
                else:
                    self._on_body(event)
        except EdgeError as error:                # the framing is broken: out of step for good
            self._fail(error)
        except Exception:                         # ours; it must not leave the client waiting
            bridge_log.exception("%s: request failed", self.address)
            self._fail(EdgeError("internal error; the log has it"))
        finally:
            self._advancing = False

    def _on_head(self, head: RequestHead) -> None:
        self._exchange = exchange = self._gateway.open_exchange(self, head)
        if head.length != 0:
            self._expect_body(exchange, head)

    def _expect_body(self, exchange: Exchange, head: RequestHead) -> None:
        self._clock = BodyClock(time.monotonic())
        self.deadline = self._clock.deadline
        is_long = head.length is None or head.length > MAX_WHOLE
        if exchange.error is None and is_long and exchange.route is None:
            self._gateway.open_upload(exchange)
        if exchange.error is None and exchange.upload is None and head.length is not None:
            exchange.error = self._check_length(head.length)
        if exchange.error is not None and (is_long or head.expects_continue):
            self._answering = True                # the body is not worth reading to stay in step
            exchange.fail(exchange.error)
        elif head.expects_continue:
            self.channel.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _on_body(self, piece: bytes) -> None:
        self._clock.on_data(len(piece), time.monotonic())
        self.deadline = self._clock.deadline
        upload = self._exchange.upload
        if upload is not None:
            upload.feed(piece)
            return
        self._gateway.bodies.add(len(piece))
        self._held += len(piece)
        self._body += piece
        error = self._check_length(len(self._body))
        if error is not None:
            raise error

    def _on_end(self) -> None:
        exchange = self._exchange
        exchange.received = self._answering = True
        self.deadline = float("inf")              # from now on it is the request's own that counts
        if exchange.upload is not None:
            exchange.upload.finish()
            return
        exchange.body, self._body = bytes(self._body), bytearray()
        self._gateway.handle(exchange)

    def _check_length(self, length: int) -> Optional[ContentTooLarge]:
        """Return the error of a body of so many bytes, None when it is not too large."""
        limit = MAX_BODY if self._exchange.route is None else MAX_OWN_BODY
        return ContentTooLarge(f"the body has more than {limit} bytes, which is what this route "
                               "takes") if length > limit else None

    def _fail(self, error: EdgeError) -> None:
        """Answer an error and close, since the requests can no longer be told apart."""
        exchange = self._exchange
        if exchange is None:
            exchange = self._gateway.open_broken_exchange(self)
        else:
            self._gateway.on_client_gone(exchange)
        exchange.keep_alive = False
        self._answering = True
        exchange.fail(error)
        exchange.cancelled = True                 # whatever its handler may still answer

    def _release(self) -> None:
        self._gateway.bodies.remove(self._held)
        self._held = 0

    def _on_lost(self, reason: str) -> None:
        self._release()
        if self._exchange is not None:
            self._exchange.cancelled = True
            self._gateway.on_client_gone(self._exchange)
        self._gateway.on_connection_lost(self)
        self._taker_lost(reason)


class Subscriber:
    """A client that follows the events. On the loop.

    filters: the wanted edge, plugin and topic; "" for any. What it has not got yet stays in the
    event log; at most one batch waits in its channel.
    """

    STUCK_BEATS = 4            # heartbeats without progress that end a subscription

    def __init__(self, connection: HttpConnection, identity: Identity,
                 filters: Tuple[str, str, str], *, position: int, chunked: bool) -> None:
        self.connection, self.identity = connection, identity
        self.filters, self._chunked = filters, chunked
        self.position = position                  # the id of the last event that it was sent
        self.topology = 0                         # the version of the topology that it was sent
        self.is_waiting = False                   # that its channel has room
        self._stuck_beats = self._sent = 0

    def send(self, data: bytes) -> None:
        """Send encoded events."""
        channel = self.connection.channel
        if self._chunked:
            channel.send(b"%x\r\n" % len(data), data, b"\r\n")
        else:
            channel.send(data)                    # HTTP/1.0 has no chunks

    def end(self) -> None:
        """End the stream in the way that tells the client that this was all."""
        if self._chunked:
            self.connection.channel.send(encode_chunk(b""))
        self.connection.channel.close_when_sent()

    def is_stuck(self) -> bool:
        """Whether nothing was read for long; to be called at each heartbeat."""
        channel = self.connection.channel
        stuck = channel.unsent and channel.sent == self._sent
        self._stuck_beats = self._stuck_beats + 1 if stuck else 0
        self._sent = channel.sent
        return self._stuck_beats >= self.STUCK_BEATS


class EventHub:
    """All subscribers and the events that they get. On the loop.

    Subscribers are served in slices, so that ten thousand of them hold up nobody, and each from its
    own place in the log, so that one that does not read costs one batch and no more.
    """

    _COMMENT = b": still here\n\n"

    def __init__(self, loop: asyncio.AbstractEventLoop, counters: Counters, journal: Journal
                 ) -> None:
        self._loop, self._counters = loop, counters
        self.log = EventLog(journal)
        self.subscribers: Set[Subscriber] = set()
        self._queue: Deque[Subscriber] = collections.deque()     # to be served in this round
        self._serving = self._again = False       # a round is under way; another must follow
        self._topology, self._topology_version = b"", 0

    def publish(self, edge: str, plugin_name: str, topic: str, data: Any, *, instance: str = "",
                number: int = 0) -> int:
        """Number a notification, keep it, send it to all who want it, and return its id."""
        event_id = self.log.append(edge, plugin_name, topic, data, instance=instance, number=number)
        self._counters.add("notifications_total")
        return event_id

    def on_written(self) -> None:
        """Send what is in the journal now."""
        self.log.on_written()
        self._serve_soon()

    def publish_topology(self, topology: bytes) -> None:
        """Send the topology, as JSON, to all; who is slow gets only the last one."""
        self._topology = encode_event(f'{{"topic":"topology","data":{topology.decode()}}}')
        self._topology_version += 1
        self._serve_soon()

    def beat(self) -> None:
        """Send everybody a comment, so that proxies see traffic and the dead are noticed."""
        for subscriber in list(self.subscribers):
            if subscriber.is_stuck():
                self._cut(subscriber)
            elif not subscriber.connection.channel.unsent:
                subscriber.send(self._COMMENT)

    def subscribe(self, exchange: Exchange, topology: bytes) -> None:
        """Turn a request into a subscription: topology first, then what was missed, then events."""
        query, connection = parse_query(exchange.head.query), exchange.connection
        chunked = not exchange.head.is_http10
        edge, plugin_name, topic = (query.get(name, "") for name in ("edge", "plugin", "topic"))
        last_id = self._parse_last_id(exchange.head.fields.get("last-event-id")
                                      or query.get("last_event_id"))
        gap = self.log.gap_after(last_id) if last_id is not None else None
        position = self.log.last_id if last_id is None else gap["to"] if gap else last_id
        subscriber = Subscriber(connection, exchange.identity, (edge, plugin_name, topic),
                                position=position, chunked=chunked)
        connection.take_over(lambda _data: None, lambda _reason: self._on_lost(subscriber))
        connection.channel.room = 1               # one batch at a time
        connection.channel.send(self._encode_head(exchange, chunked))
        self.subscribers.add(subscriber)
        subscriber.topology = self._topology_version
        first = encode_event(f'{{"topic":"topology","data":{topology.decode()}}}')
        told = encode_event(encode_json({"topic": "gap", "data": gap}), gap["to"]) if gap else b""
        subscriber.send(first + told)
        self._serve(subscriber)

    def lag(self) -> int:
        """Return how many events the slowest subscriber is behind."""
        last = self.log.last_id
        return max((last - subscriber.position for subscriber in self.subscribers), default=0)

    def close(self) -> None:
        """End all subscriptions."""
        self.close_unless(lambda identity: False)

    def close_unless(self, is_valid: Callable[[Identity], bool]) -> None:
        """End, with the last chunk, the subscriptions of those whose tokens are bad by now."""
        for subscriber in [item for item in self.subscribers if not is_valid(item.identity)]:
            self.subscribers.discard(subscriber)
            subscriber.end()

    @staticmethod
    def _parse_last_id(text: Optional[str]) -> Optional[int]:
        if not text:
            return None
        if not re.fullmatch(r"[0-9]{1,18}", text):
            raise Unprocessable(f"Last-Event-ID: {text[:40]!r} is not the number of an event")
        return int(text)

    @staticmethod
    def _encode_head(exchange: Exchange, chunked: bool) -> bytes:
        answer = _make_answer(200, {"content-type": "text/event-stream", "x-accel-buffering": "no"})
        framing = "Transfer-Encoding: chunked" if chunked else "Connection: close"
        return join_response_head(answer.status, f"{_encode_date()}{answer.lines}X-Request-ID: "
                                                 f"{exchange.request_id}\r\n{framing}\r\n")

    def _serve_soon(self) -> None:
        if self._serving:
            self._again = True
            return
        self._serving, self._again = True, False
        self._queue.extend(self.subscribers)
        self._loop.call_soon(self._serve_slice)

    def _serve_slice(self) -> None:
        for _ in range(min(SUBSCRIBER_SLICE, len(self._queue))):
            subscriber = self._queue.popleft()
            if not subscriber.is_waiting:
                self._serve(subscriber)
            elif subscriber.position + 1 < self.log.first_id:
                self._cut(subscriber)             # it comes back, and is told what is gone
        if self._queue:
            self._loop.call_soon(self._serve_slice)
            return
        self._serving = False
        if self._again:
            self._serve_soon()

    def _serve(self, subscriber: Subscriber) -> None:
        """Send a subscriber what it has not got, until its channel is full."""
        channel = subscriber.connection.channel
        subscriber.is_waiting = False
        while not channel.closed and subscriber in self.subscribers:
            if not channel.has_room:
                subscriber.is_waiting = True
                channel.when_room(lambda: self._serve(subscriber))
                return
            if subscriber.topology != self._topology_version:
                subscriber.topology = self._topology_version
                subscriber.send(self._topology)
            elif subscriber.position >= self.log.last_told:
                return
            elif subscriber.position + 1 < self.log.first_id:
                self._cut(subscriber)
            else:
                subscriber.position, data = self.log.batch(subscriber.position, subscriber.filters)
                if not data:                      # of many it wants none: others first
                    subscriber.is_waiting = True
                    self._loop.call_soon(self._serve, subscriber)
                    return
                subscriber.send(data)

    def _cut(self, subscriber: Subscriber) -> None:
        self._counters.add("subscribers_cut_total")
        bridge_log.warning("subscriber %s does not read and is cut off",
                           subscriber.connection.address)
        subscriber.connection.channel.close("does not read")

    def _on_lost(self, subscriber: Subscriber) -> None:
        self.subscribers.discard(subscriber)


class LinkRequests:
    """The requests that wait for one edge, by their id on the wire. On the loop."""

    takes_uploads = False                         # before all of a request's body is here

    def __init__(self, link: "EdgeLink") -> None:
        self.link, self.channel = link, link.channel
        self.pending: Dict[Any, Exchange] = {}
        self._counter = 0

    def forward(self, exchange: Exchange) -> None:
        """Send a request."""
        raise NotImplementedError

    def on_response(self, message: Dict[str, Any]) -> None:
        """Take a "response" message."""

    def cancel(self, exchange: Exchange) -> None:
        """Stop waiting, and let the edge stop working if it can be told."""
        self.forget(exchange)

    def forget(self, exchange: Exchange) -> None:
        """Stop waiting for the edge's answer to this one."""
        self.pending.pop(exchange.wire_id, None)

    # -- for both versions

    def _add(self, exchange: Exchange, wire_id: Union[str, int], frame: bytes) -> None:
        """Wait for the answer to a request, and send it."""
        exchange.wire_id = wire_id
        self.pending[wire_id] = exchange
        # under load, requests that arrive together go out together; a single one goes at once
        send = self.channel.send if len(self.pending) < 4 else self.channel.send_soon
        send(frame)

    def _count_late(self) -> None:
        self.link.registry.counters.add("late_responses_total")
        bridge_log.debug("%s: answer to a request that was given up", self.link.name)

    def _blame(self, exchange: Exchange, error: Exception) -> None:
        """Answer the exchange when the edge's answer cannot be used: only this request fails."""
        self.cancel(exchange)
        if isinstance(error, ProtocolError):
            exchange.fail(BadGateway(f"edge {self.link.name!r} gave an answer that makes no sense: "
                                     f"{error}"))
            return
        exchange.fail(BadGateway(f"the answer of edge {self.link.name!r} could not be read"))
        raise error                               # ours; the exchange is in no table any more


class WholeRequests(LinkRequests):
    """Requests of wire version 1: a message each, and one for the answer."""

    def forward(self, exchange: Exchange) -> None:
        """Send a request. Raises ContentTooLarge when it does not fit."""
        if exchange.upload is not None:           # begun for an edge that came back as an older one
            raise EdgeOffline("the edge has changed in the meantime: send the request again",
                              headers=_retry_after(1))
        self._counter += 1
        req_id = f"{self._counter:x}"
        opcode, payload = encode_request(req_id, exchange.head.method, exchange.target,
                                         exchange.fields_for_edge(), exchange.body)
        if not exchange.is_repeatable:
            exchange.body = b""
        if len(payload) > MAX_OLD_MESSAGE:        # its link would end, and all that waits with it
            raise ContentTooLarge(f"the request takes {len(payload)} bytes on the wire; an edge of "
                                  f"version 1 takes {MAX_OLD_MESSAGE}")
        self._add(exchange, req_id, encode_frame(opcode, payload))

    def on_response(self, message: Dict[str, Any]) -> None:
        """Take an answer."""
        exchange = self.pending.pop(str(message.get("req_id")), None)
        if exchange is None:
            self._count_late()
            return
        try:
            status, headers, body = parse_response(message)
            exchange.answer_whole(_make_foreign_answer(status, headers), body)
        except Unavailable as error:
            exchange.fail(error)
        except Exception as error:
            self._blame(exchange, error)


class StreamRequests(LinkRequests):
    """Requests of wire version 2: a stream each, whose bodies come in pieces both ways."""

    takes_uploads = True

    def __init__(self, link: "EdgeLink") -> None:
        super().__init__(link)
        self._windows: Dict[int, SendWindow] = {}                # of requests' bodies, by stream
        self._downloads: Dict[int, Tuple[Download, int]] = {}    # and their status, by stream
        self._handlers = {Kind.RESPONSE: self._on_answer, Kind.DATA: self._on_data,
                          Kind.CREDIT: self._on_credit, Kind.CANCEL: self._on_cancel}

    def forward(self, exchange: Exchange) -> None:
        """Send a request; an upload goes on by itself. Raises HeadTooLarge."""
        self._counter += 1
        stream = self._counter
        try:
            head = encode_wire_request(stream, exchange.request_id, self._encode_head(exchange),
                                       end=exchange.received)
        except ValueError as error:
            raise HeadTooLarge(str(error)) from None
        self._add(exchange, stream, encode_frame(Opcode.BINARY, head + exchange.body))
        if exchange.upload is not None:
            window = self._windows[stream] = SendWindow()
            exchange.upload.attach(functools.partial(self._send_data, stream, window),
                                   functools.partial(self._when_ready, window))

    @staticmethod
    def _encode_head(exchange: Exchange) -> bytes:
        """Return the text of a REQUEST's head, which is kept for the next equal request."""
        head, is_upload = exchange.head, exchange.upload is not None
        caller, text = head.told
        if caller != exchange.identity or is_upload:
            fields = exchange.fields_for_edge()
            del fields["x-request-id"]
            text = encode_json([head.method, exchange.target, fields]).encode()
            head.told = (None if is_upload else exchange.identity, text)
        return text

    def on_frame(self, frame: WireFrame) -> None:
        """Take a frame. Raises ProtocolError for a body without credit."""
        handler = self._handlers.get(frame.kind)
        if handler is not None:
            handler(frame)

    def cancel(self, exchange: Exchange) -> None:
        """Stop waiting, and let the edge stop working."""
        waiting = exchange.wire_id in self.pending
        self.forget(exchange)
        if waiting:
            self._send(encode_wire(Kind.CANCEL, exchange.wire_id))

    def forget(self, exchange: Exchange) -> None:
        """Stop waiting for the edge's answer to this one."""
        stream = exchange.wire_id
        self.pending.pop(stream, None)
        if self._downloads.pop(stream, None) is not None:
            self.link.registry.downloads -= 1
        if self._windows.pop(stream, None) is not None:
            exchange.upload.stop()

    # -- requests' bodies

    def _send(self, head: bytes, body: Union[bytes, memoryview] = b"") -> None:
        self.channel.send(encode_frame_head(Opcode.BINARY, len(head) + len(body)) + head, body)

    def _send_data(self, stream: int, window: SendWindow, piece: bytes, end: bool) -> int:
        """Send some of a request's body; return how much the link and the edge had room for.

        An end without a piece always goes: it takes no room, and nobody would try again.
        """
        if piece and not self.channel.has_room:
            return 0
        size = window.take(min(len(piece), DATA_SIZE)) if piece else 0
        if size or not piece:
            head = encode_wire(Kind.DATA, stream, end=end and size == len(piece))
            self._send(head, memoryview(piece)[:size])
        return size

    def _when_ready(self, window: SendWindow, waiter: Callable[[], None]) -> None:
        if self.channel.has_room:
            window.when_open(waiter)
        else:
            self.channel.when_room(waiter)

    def _on_credit(self, frame: WireFrame) -> None:
        window = self._windows.get(frame.stream)
        if window is not None:
            window.add(frame.number)

    # -- answers

    def _on_answer(self, frame: WireFrame) -> None:
        """Take a RESPONSE: whole, or the begin of one."""
        exchange = self.pending.get(frame.stream)
        if exchange is None or exchange.begun:
            self._count_late()
            return
        try:
            answer = _known_answers[frame.text]
            if frame.end and len(frame.body) <= MAX_WHOLE:       # more needs credit, as a stream
                self.forget(exchange)
                exchange.answer(answer, bytes(frame.body))
                return
            self._begin(exchange, frame.stream, answer)
        except Exception as error:
            self._blame(exchange, error)
        if len(frame.body):
            self._on_data(frame)

    def _begin(self, exchange: Exchange, stream: int, answer: AnswerHead) -> None:
        registry = self.link.registry
        exchange.connection.begin(exchange, answer)
        download = Download(exchange, lambda: registry.downloads,
                            functools.partial(self._give_credit, stream))
        self._downloads[stream] = download, answer.status
        registry.downloads += 1

    def _give_credit(self, stream: int, credit: int) -> None:
        self._send(encode_wire_number(Kind.CREDIT, stream, credit))

    def _on_data(self, frame: WireFrame) -> None:
        exchange = self.pending.get(frame.stream)
        download, status = self._downloads.get(frame.stream, (None, 0))
        if exchange is None or download is None:  # its client has gone
            return
        if len(frame.body):
            download.on_data(frame.body)
        if frame.end and frame.stream in self._downloads:
            self.forget(exchange)
            exchange.connection.end_body(exchange, status)

    def _on_cancel(self, frame: WireFrame) -> None:
        exchange = self.pending.get(frame.stream)
        if exchange is not None:
            self.forget(exchange)
            reason = bytes(frame.body[:200]).decode(errors="replace")
            exchange.fail(BadGateway(f"edge {self.link.name!r} gave up in the middle of its "
                                     f"answer: {reason}"))


class EdgeLink:
    """The bridge's end of an edge's link: registration, requests, heartbeat. On the loop."""

    def __init__(self, registry: "EdgeRegistry", connection: HttpConnection,
                 identity: Identity) -> None:
        self.registry, self._connection, self.identity = registry, connection, identity
        self.channel = connection.channel
        self.name = ""                            # until it has registered
        self.instance = ""
        self.is_leaving = False                   # it said so: nobody need wait for it
        self.described = "{}"                     # endpoint and plugins, as JSON
        self.endpoint: Dict[str, Any] = {}
        self.plugins: Dict[str, Dict[str, Any]] = {}
        self.ui_modules: Dict[str, str] = {}
        self.routes: Dict[str, List[Tuple[str, str]]] = {}
        # what /metrics calls a route, by plugin, first segment, and number of segments with edge's
        self.labels: Dict[Tuple[str, str, int], str] = {}
        self._parser = FrameParser(masked=True, max_message=MAX_REGISTER)
        # replaced when both sides turn out to know version 2
        self.requests: LinkRequests = WholeRequests(self)
        self._is_patient = False                  # whether silence may mean a busy edge
        self.opening = 0                          # bytes that came before it has registered
        self.told = 0                             # bytes of what it says of itself
        self.word = "edges"                       # what it calls them: "endpoints" in radical.orbit
        self._to_ack: Deque[Tuple[int, int]] = collections.deque()   # (event id, number there)
        self.opened = self._last_received = time.monotonic()
        self._allowance = Allowance(self.opened)  # of notifications
        self._handlers = {"register": self._on_register,
                          "response": lambda message: self.requests.on_response(message),
                          "notification": self._on_notification, "topology": self._on_topology}

    def describe(self) -> None:
        """Encode what clients are told of this edge. Raises ProtocolError when that cannot be."""
        try:
            described = encode_json({"endpoint": self.endpoint, "plugins": self.plugins})
            size = len(described.encode())
        except (ValueError, RecursionError):      # NaN, half a surrogate pair
            raise ProtocolError("plugins described by what is no JSON or no text",
                                CloseCode.INVALID_DATA) from None
        if size > MAX_DESCRIBED:
            raise ProtocolError(f"{size} bytes of description; {MAX_DESCRIBED} are allowed",
                                CloseCode.TOO_BIG)
        self.described = described

    @property
    def token(self) -> str:
        """The name of the token with which it registers."""
        return self.identity.name

    def is_same(self, instance: str, identity: Identity) -> bool:
        """Whether another link comes from the same edge: the same state and the same token."""
        return bool(self.instance) and self.instance == instance \
            and self.identity.name == identity.name

    @property
    def pending(self) -> int:
        """Requests that wait for this edge."""
        return len(self.requests.pending)

    def on_data(self, data: bytes) -> None:
        """Take bytes from the edge."""
        self._last_received = time.monotonic()
        self._parser.feed(data)
        try:
            if not self.name:
                self.registry.count_opening(self, len(data))
            while not self.channel.closed:
                message = self._parser.next_message()
                if message is None:
                    return
                self._on_message(*message)
        except ProtocolError as error:
            bridge_log.error("%s: the edge broke the protocol: %s", self.name or "?", error)
            self.close(error.code, str(error))
        except Exception:                         # ours; a link half understood is worse than none
            bridge_log.exception("%s: message failed", self.name or "?")
            self.close(CloseCode.INTERNAL, "internal error")

    def send(self, message: Dict[str, Any]) -> None:
        """Send a message."""
        self.channel.send(encode_frame(Opcode.TEXT, encode_json(message).encode()))

    def forward(self, exchange: Exchange) -> None:
        """Send a request to the edge; its answer, or the lack of one, ends the exchange."""
        if len(self.requests.pending) >= MAX_PENDING or self.channel.unsent > MAX_LINK_BUFFER:
            raise Unavailable(f"edge {self.name!r} has too much to do: try again later",
                              headers=_retry_after(1), limit="pending")
        bridge_log.debug("%s: > %s %.80s", exchange.request_id, exchange.head.method,
                         exchange.head.path)
        exchange.link = self
        self.requests.forward(exchange)

    def cancel(self, exchange: Exchange) -> None:
        """Tell the edge that nobody waits for the answer to this one."""
        self.requests.cancel(exchange)

    def sweep(self, now: float, heartbeat: float) -> None:
        """Fail what is past its deadline; end the link when the edge is silent."""
        late = [item for item in self.requests.pending.values() if item.deadline < now]
        for exchange in late:
            self.requests.cancel(exchange)
            exchange.fail(DeadlineExceeded(
                f"edge {self.name!r} did not answer within {now - exchange.started:.0f} s; the "
                "request may still be running there"))
        patience = OLD_LINK_DEAD_S if self._is_patient else LINK_DEAD * heartbeat
        if now - self._last_received > patience:
            self.close(CloseCode.GOING_AWAY, f"nothing was heard for {patience:.0f} s")

    def beat(self) -> None:
        """Ping, in the way that edges of every version answer."""
        self.send({"type": "ping"})

    def close(self, code: int, reason: str) -> None:
        """Leave with a close frame."""
        self.is_leaving = self.is_leaving or code in (CloseCode.NORMAL, CloseCode.POLICY)
        self.channel.send(encode_close(code, reason))
        self.channel.close(reason)

    def on_lost(self, reason: str) -> None:
        """Fail the requests that wait, but those that can be sent again if the edge comes back."""
        self.registry.on_lost(self, reason)
        for exchange in list(self.requests.pending.values()):
            self.requests.forget(exchange)
            waits = exchange.is_repeatable and self.registry.wait(exchange, self.name)
            exchange.link = None
            if not waits:
                exchange.fail(EdgeOffline(
                    f"the link to edge {self.name!r} went down while it worked on this; it may "
                    "have been done: look before you try again", headers=_retry_after(1)))

    # -- what arrives

    def _on_message(self, opcode: Opcode, payload: Union[str, bytes]) -> None:
        if opcode is Opcode.PING:
            if self.channel.has_room:             # who does not read gets no more of them
                self.channel.send(encode_frame(Opcode.PONG, payload))
        elif opcode is Opcode.CLOSE:
            code, reason = parse_close(payload)
            self.is_leaving = True
            self.close(CloseCode.NORMAL, f"the edge closed the link ({code} {reason})")
        elif opcode is Opcode.BINARY and isinstance(self.requests, StreamRequests):
            frame = parse_wire(payload)
            if frame is not None and frame.kind is Kind.NOTIFICATION:
                self._on_numbered(frame)
            elif frame is not None:
                self.requests.on_frame(frame)
        elif opcode is not Opcode.PONG:
            message = parse_message(payload)
            if not self.name and message["type"] != "register":
                raise ProtocolError("the first message must be 'register'", CloseCode.POLICY)
            if message["type"] in ("register", "topology"):
                self.told = len(payload)
            handler = self._handlers.get(message["type"])
            if handler is not None:               # unknown types are for later versions
                handler(message)

    def _on_register(self, message: Dict[str, Any]) -> None:
        name = message.get("edge_name")
        if name is None:                          # radical.orbit 0.2 has renamed edges
            name, self.word = message.get("endpoint_name"), "endpoints"
        error = self.registry.check(self, name, _instance_of(message)) or \
            self.registry.check_share(self, name)
        if error:
            self.registry.counters.add("links_refused_total")
            bridge_log.warning("edge %.80r of token %s is refused: %s", name, self.identity.name,
                               error)
            self.send({"type": "error", "message": error})
            self.close(CloseCode.POLICY, error)
            return
        endpoint = message.get("endpoint")
        self.endpoint = endpoint if isinstance(endpoint, dict) else {}
        self._take_plugins(message.get("plugins"), name)
        self.describe()
        self.instance = _instance_of(message)
        self.registry.add(self, name)
        self._parser.max_message = MAX_MESSAGE
        self._agree(message.get("wire"))

    def _agree(self, offered: Any) -> None:
        """Use the newest version of the wire that both sides know."""
        if not isinstance(offered, list):         # an older edge does not know "registered"
            self._is_patient = limit_unacknowledged(self.channel.sock, LINK_DEAD * HEARTBEAT_S)
            return
        version = 2 if 2 in offered else 1
        events = self.registry.hub.log
        known = events.seen(self.name, self.instance)
        # what may not be on disk yet is sent again, and not told again
        self.send({"type": "registered", "edge_name": self.name, "wire": version, "known": known,
                   "acked": known if events.last_told >= events.last_id else 0})
        if version == 2:
            self.requests, self._parser.max_message = StreamRequests(self), MAX_FRAME

    def _on_topology(self, message: Dict[str, Any]) -> None:
        edges = message.get(self.word)
        mine = edges.get(self.name) if isinstance(edges, dict) else None
        if isinstance(mine, dict):
            error = self.registry.check_share(self, self.name)
            if error:
                raise ProtocolError(error, CloseCode.POLICY)
            self._take_plugins(mine.get("plugins"), self.name)
            self.describe()
            self.registry.on_changed()

    def _on_notification(self, message: Dict[str, Any]) -> None:
        plugin_name, topic = message.get("plugin"), message.get("topic")
        if not (is_label(plugin_name) and is_label(topic)):
            return
        try:
            small = len(encode_json(message.get("data"))) <= MAX_NOTIFICATION
        except (ValueError, RecursionError):      # NaN, which Python reads and nobody else
            raise ProtocolError("notification that is not JSON", CloseCode.INVALID_DATA) from None
        if small and self._allowance.take(self._last_received):
            # the name is the link's own: an edge does not speak for another
            self.registry.hub.publish(self.name, plugin_name, topic, message.get("data"))
        else:                                     # this version has no way to tell the edge
            self.registry.on_dropped(self.name, "rate" if small else "size")

    def _on_numbered(self, frame: WireFrame) -> None:
        """Take a NOTIFICATION; one that was sent before is acknowledged again, and not told."""
        number, plugin_name, topic = [*frame.head, None, None, None][:3]
        try:
            data = _parse_json(bytes(frame.body).decode())
        except (ValueError, RecursionError):
            raise ProtocolError("notification that is not JSON", CloseCode.INVALID_DATA) from None
        if not (type(number) is int and 0 < number < 1 << 63 and is_label(plugin_name)
                and is_label(topic)):
            raise ProtocolError("notification without number, plugin or topic")
        if len(self._to_ack) > 4 * NOTIFY_WINDOW:
            raise ProtocolError("notifications that do not wait for others to be acknowledged",
                                CloseCode.POLICY)
        hub = self.registry.hub
        if len(frame.body) > MAX_NOTIFICATION:    # acknowledged, or it would come again and again
            self.registry.on_dropped(self.name, "size")
            event_id = hub.log.last_id
        elif number > hub.log.seen(self.name, self.instance):
            try:
                event_id = hub.publish(self.name, plugin_name, topic, data,
                                       instance=self.instance, number=number)
            except ValueError:                    # NaN, which Python reads and nobody else
                raise ProtocolError("notification that is not JSON") from None
        else:
            event_id = hub.log.last_id
        self._to_ack.append((event_id, number))
        self.registry.ack_later(self)

    def acknowledge(self, written: int) -> bool:
        """Tell the edge which of its notifications are safe: events up to `written` are.

        Returns whether others still wait.
        """
        number, now = 0, time.monotonic()
        while self._to_ack and self._to_ack[0][0] <= written:
            if not self._allowance.take(now):     # the edge sends no more than fit its window
                self.registry.counters.add("notifications_delayed_total")
                self.registry.counters.count_limit("notification-rate")
                break
            number = self._to_ack.popleft()[1]
        if number and not self.channel.closed:
            payload = encode_wire_number(Kind.ACK, 0, number)
            self.channel.send(encode_frame(Opcode.BINARY, payload))
        return bool(self._to_ack) and not self.channel.closed

    def _take_plugins(self, plugins: Any, edge_name: str) -> None:
        """Take the plugins' descriptions, apart from what clients do not get to see."""
        taken, modules, routes = {}, {}, {}
        for name, described in (plugins if isinstance(plugins, dict) else {}).items():
            if not is_valid_name(name) or not isinstance(described, dict) or \
                    len(taken) >= MAX_EDGE_PLUGINS:
                bridge_log.warning("%s: plugin %.80r is not described well", edge_name, name)
                continue
            described = dict(described)
            module = described.pop("ui_module", None)
            if isinstance(module, str) and len(module) <= MAX_UI_MODULE:
                modules[name] = module.encode(errors="replace").decode()
                described["ui_module"] = f"plugins/{name}.js?edge={edge_name}"
            routes[name] = _parse_routes(described.pop("routes", None))
            described.setdefault("type", name)
            described["namespace"] = f"/{edge_name}/{name}"
            taken[name] = described
        self.plugins, self.ui_modules, self.routes = taken, modules, routes
        self.labels = {(name, *_route_key(pattern)): f"{{edge}}/{name}/{pattern}"
                       for name, pairs in routes.items() for _, pattern in pairs}


def _instance_of(message: Dict[str, Any]) -> str:
    instance = message.get("instance")
    return instance if isinstance(instance, str) and is_valid_name(instance) else ""


_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH")
_SEGMENT = r"(?:\{[A-Za-z_][A-Za-z0-9_]*\})?[A-Za-z0-9._~:@!$&'()*+,;=-]*"
_ROUTE_PATTERN = re.compile(f"{_SEGMENT}(?:/{_SEGMENT})*")


def _parse_routes(value: Any) -> List[Tuple[str, str]]:
    """Return the pairs of method and pattern that can stand in /openapi.json."""
    pairs = value if isinstance(value, list) else []
    return [(pair[0], pair[1]) for pair in pairs[:MAX_FIELDS]
            if isinstance(pair, list) and len(pair) == 2 and pair[0] in _METHODS
            and _is_pattern(pair[1])]


def _is_pattern(value: Any) -> bool:
    if not isinstance(value, str) or len(value) > 256 or not _ROUTE_PATTERN.fullmatch(value):
        return False
    names = re.findall(r"\{(\w+)\}", value)
    return len(set(names)) == len(names)


def _route_key(pattern: str) -> Tuple[str, int]:
    """Return the first segment of a route and the number of all, those of edge and plugin too."""
    return pattern.partition("/")[0], pattern.count("/") + 3


class Absence:
    """An edge whose link was lost a moment ago, and the requests that wait for it to come back."""

    def __init__(self, name: str, instance: str, token: str, described: str, until: float) -> None:
        self.name, self.instance, self.token = name, instance, token
        self.described, self.until, self.told = described, until, len(described)
        self.takes_uploads = bool(instance)       # an older edge has none
        self.plugins: Dict[str, Any] = json.loads(described)["plugins"]
        self.waiting: List[Exchange] = []

    def fail(self, exchanges: List[Exchange]) -> None:
        """Give up waiting: the edge has not come back in time."""
        for exchange in exchanges:
            exchange.fail(EdgeOffline(
                f"edge {self.name!r} has lost its link and has not come back: try again later",
                headers=_retry_after(BACKOFF_S[1])))

    def is_same(self, link: EdgeLink) -> bool:
        """Whether a link is that of this edge: it has its state and its token."""
        return self.instance == link.instance and self.token == link.identity.name


class EdgeRegistry:
    """The edges that are connected, and who is told when that changes. On the loop.

    grace: seconds for which requests wait for an edge that has lost its link.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, hub: EventHub, counters: Counters,
                 grace: float) -> None:
        self._loop, self.hub, self.counters, self._grace = loop, hub, counters, grace
        self.on_told: Callable[[], None] = lambda: None          # called at each change
        self.links: Dict[str, EdgeLink] = {}      # by name
        self.absent: Dict[str, Absence] = {}      # by name
        self.unregistered: Set[EdgeLink] = set()  # connected, but not yet registered
        self.opening: Dict[str, int] = {}         # bytes that these have sent, by token's name
        self.host: Optional[PluginHost] = None    # of the bridge's own plugins
        self.url = ""
        self.downloads = 0                        # answers that are on their way in pieces
        self._unacknowledged: Dict[EdgeLink, None] = {}          # links that wait for the journal
        self._told = False                        # that a change will be told soon
        self._dropped = 0                         # notifications

    def check_room(self) -> None:
        """Raise Unavailable when there are MAX_EDGES already."""
        if len(self.links) + len(self.unregistered) >= MAX_EDGES:
            raise Unavailable(f"this bridge has {MAX_EDGES} edges already",
                              headers=_retry_after(BACKOFF_S[1]), limit="registrations")

    def on_dropped(self, name: str, reason: str) -> None:
        """Count a notification that was too large, or one too many."""
        self.counters.add("events_dropped_total", 1, f'reason="{reason}"')
        self.counters.count_limit("notification" if reason == "size" else "notification-rate")
        self._dropped += 1
        if self._dropped & (self._dropped - 1) == 0:             # 1, 2, 4, ...: not a line for each
            bridge_log.warning("%s: notification dropped (%s); %d in all", name, reason,
                               self._dropped)

    def open(self, connection: HttpConnection, identity: Identity) -> EdgeLink:
        """Return the link of a connection that was upgraded."""
        link = EdgeLink(self, connection, identity)
        self.unregistered.add(link)
        return link

    def count_opening(self, link: EdgeLink, size: int) -> None:
        """Count bytes of a link that has not registered. Raises ProtocolError when such links of
        its token have sent more than MAX_TOLD: a whole "register" is in memory before it is read.
        """
        link.opening += size
        self.opening[link.token] = self.opening.get(link.token, 0) + size
        if self.opening[link.token] > MAX_TOLD:
            self.counters.count_limit("registrations")
            raise ProtocolError(f"links of its token have sent {MAX_TOLD} bytes, and have not "
                                "registered", CloseCode.POLICY)

    def _end_opening(self, link: EdgeLink) -> None:
        self.unregistered.discard(link)
        left = self.opening.pop(link.token, 0) - link.opening
        if left:
            self.opening[link.token] = left
        link.opening = 0

    def close_unless(self, is_valid: Callable[[Identity], bool]) -> None:
        """Close the links of those whose tokens were revoked or have expired."""
        for link in [*self.links.values(), *self.unregistered]:
            if not is_valid(link.identity):
                link.close(CloseCode.POLICY, "the token was revoked or has expired")

    def check(self, link: EdgeLink, name: Any, instance: str) -> Optional[str]:
        """Return why the link may not register under `name`, or None."""
        if link.name:
            return "this link has registered already"
        if not is_valid_name(name) or name in RESERVED_NAMES:
            return f"{str(name)[:80]!r} is not a name for an edge"
        if not fnmatch.fnmatchcase(name, link.identity.edges):
            return f"the token may register {link.identity.edges!r} only, not {name!r}"
        known = self.links.get(name)
        if known is not None and not known.is_same(instance, link.identity):
            return f"Edge '{name}' already used"
        return None

    def check_share(self, link: EdgeLink, name: str) -> Optional[str]:
        """Return why the link's token may not have one more edge, or so much of it; or None.

        Whoever steals one edge's token is not to take all room for edges, or for what they say.
        """
        others = [item for item in self._present().values()
                  if item.token == link.token and item.name != name]
        error = None
        if len(others) >= max(1, MAX_EDGES // 2):
            error = f"its token has {len(others)} edges already: half of all that there may be"
        elif link.told + sum(item.told for item in others) > MAX_TOLD:
            error = f"the edges of its token say more of themselves than {MAX_TOLD} bytes"
        if error:
            self.counters.count_limit("registrations")
        return error

    def add(self, link: EdgeLink, name: str) -> None:
        """Serve a link that passed check(); its own stale predecessor is replaced at once."""
        old = self.links.get(name)
        if old is not None:                       # first: what it worked on waits for the new one
            old.send({"type": "shutdown", "reason": "another process took over this edge's name"})
            old.close(CloseCode.REPLACED, "replaced by a newer link of the same edge")
        link.name = name
        self.links[name] = link
        self._end_opening(link)
        self.counters.add("links_total")
        bridge_log.info("edge %s is here, with %s", name, ", ".join(link.plugins) or "no plugins")
        self._end_absence(link)
        self.on_changed()

    def on_lost(self, link: EdgeLink, reason: str) -> None:
        """Forget a link that ended."""
        self._end_opening(link)
        if link.name and self.links.get(link.name) is link:
            del self.links[link.name]
            self.counters.add("links_lost_total")
            bridge_log.info("edge %s is gone: %s", link.name, reason)
            self.on_changed()
            if self._grace > 0 and not link.is_leaving:
                self.absent[link.name] = Absence(link.name, link.instance, link.identity.name,
                                                 link.described, time.monotonic() + self._grace)

    def wait(self, exchange: Exchange, name: str) -> bool:
        """Let a request wait for an edge that may come back; False when there is none."""
        absence = self.absent.get(name)
        if absence is None or len(absence.waiting) >= MAX_PENDING:
            return False
        absence.waiting.append(exchange)
        return True

    def sweep(self, now: float) -> None:
        """Give up waiting for edges that stay away, and fail what is past its deadline."""
        if self._unacknowledged:                  # those that were put off
            self._acknowledge()
        for name, absence in list(self.absent.items()):
            if absence.until < now:
                del self.absent[name]
                absence.fail(absence.waiting)
                self.on_changed()
            else:
                late = [item for item in absence.waiting if item.deadline < now]
                absence.waiting = [item for item in absence.waiting if item.deadline >= now]
                absence.fail(late)

    def _end_absence(self, link: EdgeLink) -> None:
        absence = self.absent.pop(link.name, None)
        if absence is None:
            return
        # after "registered", which tells the edge what the requests will look like: those that
        # wait, and those that their clients have sent behind them
        if absence.is_same(link):
            self._loop.call_soon(self._forward_waiting, absence.waiting)
        else:                                     # somebody else has this name now
            self._loop.call_soon(absence.fail, absence.waiting)

    def forward(self, exchange: Exchange) -> None:
        """Send a request to its edge. Raises NotFound, EdgeOffline, or what the link raises."""
        self.find(exchange.segments[0]).forward(exchange)

    def _forward_waiting(self, exchanges: List[Exchange]) -> None:
        for exchange in exchanges:
            name = exchange.segments[0]
            gone = name not in self.links         # already again
            if not exchange.cancelled and not (gone and self.wait(exchange, name)):
                try:
                    self.forward(exchange)
                except EdgeError as error:
                    exchange.fail(error)

    def ack_later(self, link: EdgeLink) -> None:
        """Let a link acknowledge its notifications once they are in the journal."""
        if not self._unacknowledged:
            self._loop.call_soon(self._acknowledge)
        self._unacknowledged[link] = None

    def on_written(self) -> None:
        """Take notice that more events are in the journal."""
        self.hub.on_written()
        self._acknowledge()

    def _acknowledge(self) -> None:
        links, self._unacknowledged = self._unacknowledged, {}
        for link in links:
            if link.acknowledge(self.hub.log.last_told):
                self._unacknowledged[link] = None

    def find(self, name: str) -> EdgeLink:
        """Return an edge's link. Raises NotFound."""
        link = self.links.get(name)
        if link is None:
            raise NotFound(f"no edge named {name[:80]!r} is connected: see --list or GET /edges")
        return link

    def find_ui_module(self, name: str, edge: Optional[str]) -> Optional[str]:
        """Return the UI module of a plugin on one edge, or on the first that has one; or None."""
        if edge == BRIDGE_NAME:
            return self.host.ui_module(name) if self.host is not None else None
        links = self.links.values() if edge is None else [self.find(edge)]
        return next((link.ui_modules[name] for link in links if name in link.ui_modules), None)

    def describe_plugins(self) -> Dict[str, Dict[str, Any]]:
        """Return {edge name: {plugin name: description}}, the bridge's own plugins included."""
        described = {name: link.plugins for name, link in self._present().items()}
        if self.host is not None and self.host.describe():
            described[BRIDGE_NAME] = {name: self._describe_own(name, item)
                                      for name, item in self.host.describe().items()}
        return described

    def _describe_own(self, name: str, item: Dict[str, Any]) -> Dict[str, Any]:
        """Return what clients are told of a plugin of the bridge's own."""
        module = {"ui_module": f"plugins/{name}.js?edge={BRIDGE_NAME}"} \
            if self.host.ui_module(name) is not None else {}
        return {**item, "namespace": f"/{BRIDGE_NAME}/{name}", **module}

    def topology(self) -> bytes:
        """Return, as JSON, what POST /edge/list answers and what subscribers are told.

        An edge that may be back in a moment has "connected": false.
        """
        # encoded once for each edge, for there may be a thousand
        parts = [f'"{name}":{link.described}' for name, link in self.links.items()]
        parts += [f'"{name}":{{"connected":false,{absence.described[1:]}'
                  for name, absence in self.absent.items() if name not in self.links]
        own = self.describe_plugins().get(BRIDGE_NAME) if self.host is not None else None
        if own:
            parts.append(f'"{BRIDGE_NAME}":' + encode_json({"endpoint": {}, "plugins": own}))
        bridge = encode_json({"url": self.url})
        return f'{{"bridge":{bridge},"edges":{{{",".join(parts)}}}}}'.encode()

    def on_changed(self) -> None:
        """Tell everybody of the new topology, once for all changes within a while.

        The while is longer when there are many edges to be told, each of every other.
        """
        if not self._told:
            self._told = True
            self._loop.call_later(TOPOLOGY_S * (1 + len(self.links) // 50), self._tell)

    def snapshot(self) -> Dict[str, List[str]]:
        """Return what restore() takes, {name: [instance, token's name, description as JSON]}."""
        absent = {name: [absence.instance, absence.token, absence.described]
                  for name, absence in self.absent.items()}
        return {**absent, **{name: [link.instance, link.identity.name, link.described]
                             for name, link in self.links.items()}}

    def restore(self, edges: Dict[str, List[str]]) -> None:
        """Expect the edges of an earlier process: requests wait for them, but not for long."""
        until = time.monotonic() + self._grace
        for name, (instance, token, described) in edges.items():
            self.absent[name] = Absence(name, instance, token, described, until)

    def _present(self) -> Dict[str, Any]:
        """Return the links by name, those included that may be back in a moment."""
        return {**self.absent, **self.links} if self.absent else self.links

    def _tell(self) -> None:
        self._told = False
        self.on_told()
        self.hub.publish_topology(self.topology())
        names = {name: {"plugins": list(plugins)}
                 for name, plugins in self.describe_plugins().items()}
        links = list(self.links.values())
        messages = {word: encode_json({"type": "topology", word: names})
                    for word in {link.word for link in links}}
        self._tell_some(links, {word: encode_frame(Opcode.TEXT, message.encode())
                                for word, message in messages.items()})
        if self.host is not None:
            self.host.on_topology(names)

    def _tell_some(self, links: List[EdgeLink], frames: Dict[str, bytes]) -> None:
        for link in links[:SUBSCRIBER_SLICE]:
            if link.channel.has_room:             # else it is told of the next change
                link.channel.send(frames[link.word])
        if links[SUBSCRIBER_SLICE:]:
            self._loop.call_soon(self._tell_some, links[SUBSCRIBER_SLICE:], frames)


class EdgeMemory:
    """Writes down which edges are here, so that the next process expects them. On the loop."""

    def __init__(self, registry: EdgeRegistry, path: Path) -> None:
        self._registry, self._path = registry, path

    def restore(self) -> None:
        """Expect the edges that were here when an earlier process ended. Blocks."""
        try:
            self._registry.restore(json.loads(read_private(self._path) or "{}"))
        except (EdgeError, ValueError, TypeError, KeyError, AttributeError) as error:
            bridge_log.error("%s: is left out: %s", self._path, error)

    async def keep(self) -> None:
        """Write down every change, at most one in RELOAD_S; runs until it is cancelled."""
        changed, workers = asyncio.Event(), Workers("bridge-state", 1)
        self._registry.on_told = changed.set
        try:
            while True:
                await changed.wait()
                changed.clear()
                text = encode_json(self._registry.snapshot())
                try:
                    await workers.call(write_private, self._path, text)
                except OSError as error:
                    bridge_log.error("%s: cannot be written: %s", self._path, error)
                await asyncio.sleep(RELOAD_S)
        finally:
            workers.stop()


class _Opener:
    """Opens a client's connection, in a thread: the TLS handshake and the first request's head.

    These are what a slow or hostile client can draw out; the loop never waits for them. It is given
    the socket and the parser, with what was read so far. Mixed into a handler of http.server, see
    _make_listener().
    """

    server: "_Listener"
    request: socket.socket
    client_address: Tuple[Any, ...]

    def setup(self) -> None:
        self.request.settimeout(HANDSHAKE_S)
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def handle(self) -> None:
        gateway = self.server.gateway
        try:
            sock = self._handshake()
        except OSError as error:
            bridge_log.debug("%s: handshake failed: %s", self.client_address[0], error)
            gateway.on_handshake_failed(self.client_address[0], isinstance(error, socket.timeout))
            return
        parser = RequestParser()
        try:
            self._read_first_head(sock, parser)
        except OSError as error:
            bridge_log.debug("%s: gone before its first request: %s", self.client_address[0], error)
            gateway.open.leave(self.client_address[0])
            sock.close()
            return
        gateway.adopt(sock, self.client_address[0], parser)

    def finish(self) -> None:
        """Leave the socket alone: it is the loop's now."""

    def _handshake(self) -> socket.socket:
        if self.server.tls is None:
            # detached, for the server shuts its socket down when this thread is done
            return socket.socket(fileno=self.request.detach())
        # its time limit is for the whole handshake, however the bytes drip
        return self.server.tls.wrap_socket(self.request, server_side=True)

    @staticmethod
    def _read_first_head(sock: socket.socket, parser: RequestParser) -> None:
        sock.settimeout(FIRST_HEAD_S)
        try:
            data = sock.recv(READ_SIZE)
        except socket.timeout:
            return                                # connected ahead of time: the loop can wait
        if not data:
            raise ConnectionError("closed without a request")
        parser.feed(data)


class _Handshake:
    """A TLS handshake without a thread of its own. On the loop; it ends within HANDSHAKE_S."""

    def __init__(self, gateway: "Bridge", sock: ssl.SSLSocket, address: str) -> None:
        self._gateway, self._sock, self._address = gateway, sock, address
        self._timer = gateway.loop.call_later(HANDSHAKE_S, self.end, True)
        gateway.handshakes.add(self)
        self._go_on()

    @classmethod
    def begin(cls, gateway: "Bridge", tls: ssl.SSLContext, sock: socket.socket, address: str
              ) -> None:
        """Let the loop open a connection. Any thread."""
        sock.setblocking(False)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            secure = tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        except OSError:                           # it has gone already
            sock.close()
            gateway.on_handshake_failed(address, False)
            return
        gateway.call_or_close(secure, cls, gateway, secure, address)

    def end(self, too_slow: bool) -> None:
        """Give it up."""
        self._leave()
        self._sock.close()
        self._gateway.on_handshake_failed(self._address, too_slow)

    def _go_on(self) -> None:
        loop, watched = self._gateway.loop, self._sock.fileno()
        loop.remove_reader(watched)
        loop.remove_writer(watched)
        try:
            self._sock.do_handshake()
        except ssl.SSLWantReadError:
            loop.add_reader(watched, self._go_on)
        except ssl.SSLWantWriteError:
            loop.add_writer(watched, self._go_on)
        except OSError as error:
            bridge_log.debug("%s: handshake failed: %s", self._address, error)
            self.end(False)
        else:
            self._leave()
            self._gateway.adopt(self._sock, self._address)

    def _leave(self) -> None:
        self._timer.cancel()
        for remove in (self._gateway.loop.remove_reader, self._gateway.loop.remove_writer):
            remove(self._sock.fileno())
        self._gateway.handshakes.discard(self)


class _Listener:
    """Accepts connections, and starts a thread to open each, MAX_OPENING at a time.

    Mixed into the threading server of http.server, see _make_listener().
    """

    request_queue_size = 1024
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: Tuple[str, int], gateway: "Bridge",
                 tls: Optional[ssl.SSLContext], opener: Type[_Opener]) -> None:
        self.gateway, self.tls = gateway, tls
        self._opening = threading.BoundedSemaphore(MAX_OPENING)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, opener)

    def server_bind(self) -> None:
        import socketserver
        # not HTTPServer's, which asks DNS for the host's name and may hang
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        try:
            self.gateway.open.enter(client_address[0])
        except EdgeError as error:
            self._refuse(request, error)
            return
        if self._opening.acquire(blocking=False):
            try:
                super().process_request(request, client_address)
                return
            except RuntimeError:                  # the system gives us no more threads
                self._opening.release()
        # slow clients have all threads: the loop does it, which costs it time, but shuts nobody out
        if self.tls is None:
            self.gateway.adopt(socket.socket(fileno=request.detach()), client_address[0])
        else:
            _Handshake.begin(self.gateway, self.tls, request, client_address[0])

    def get_request(self) -> Tuple[socket.socket, Any]:
        """Accept a connection. Without free files for it, wait: it would be tried again at once."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                bridge_log.error("no connection can be accepted: %s", error)
                time.sleep(SWEEP_S)
            raise

    def _refuse(self, request: Any, error: EdgeError) -> None:
        """Close a connection, with an answer where there is no TLS in between."""
        self.gateway.records.counters.add("refused_connections_total")
        self.gateway.records.counters.count_limit(error.limit)
        if self.tls is None:
            response = error_response(error)
            answer = _make_answer(response.status_code, {**response.headers, "connection": "close"})
            lines = f"{_encode_date()}{answer.lines}Content-Length: {len(response.body)}\r\n"
            request.setblocking(False)
            with contextlib.suppress(OSError):    # a few hundred bytes always fit a new socket
                request.send(join_response_head(answer.status, lines) + response.body)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._opening.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        bridge_log.exception("%s: connection failed", client_address[0])


def _make_listener(address: Tuple[str, int], gateway: "Bridge", tls: Optional[ssl.SSLContext]
                   ) -> _Listener:
    """Return http.server's threading server, bound, with our ways to accept and to open."""
    import http.server                            # here: an edge has no use for it

    class Opener(_Opener, http.server.BaseHTTPRequestHandler):
        pass

    class Listener(_Listener, http.server.ThreadingHTTPServer):
        pass

    return Listener(address, gateway, tls, Opener)


_OWN_SEGMENTS = frozenset(("", *RESERVED_NAMES - {BRIDGE_NAME}))    # with which they begin


class _Routes:
    """The bridge's own routes: who may ask for what, and the answers. On the loop.

    A handler takes an Exchange, and returns what to_response() takes, or None when the exchange is
    answered otherwise.
    """

    def __init__(self, bridge: "Bridge", authenticator: Authenticator, registry: EdgeRegistry,
                 journal: Journal) -> None:
        self._bridge, self._authenticator = bridge, authenticator
        self._registry, self._hub, self._journal = registry, registry.hub, journal
        self._page, self._frame = load_explorer()
        self.router = Router()
        self._add_routes()

    def _add_routes(self) -> None:
        for method, pattern, right, handler in (
                ("GET", "", None, self._get_page), ("GET", "health", None, self._get_health),
                ("GET", "health/live", None, self._get_live),
                ("GET", "health/ready", None, self._get_ready),
                ("GET", "auth", None, self._get_caller), ("POST", "auth", None, self._sign_in),
                ("POST", "logout", None, self._sign_out),
                ("POST", "edge/list", "look", self._list_topology),
                ("GET", "edges", "look", self._list_edges),
                ("GET", "events", "look", self._subscribe),
                ("GET", "plugins/frame", None, self._get_frame),
                ("GET", "plugins/{name}.js", "look", self._get_ui_module),
                ("GET", "metrics", "look", self._get_metrics),
                ("GET", "openapi.json", "look", self._get_openapi),
                ("GET", "register", "register", self._register),
                ("POST", "edge/disconnect/{name}", "manage", self._disconnect),
                ("POST", "bridge/terminate", "manage", self._terminate)):
            self.router.add(method, pattern, handler, right)

    def find(self, exchange: Exchange) -> None:
        """Set what answers the exchange: a route of ours, or None for an edge.

        Raises NotFound or MethodNotAllowed; Unauthorized or Forbidden when the caller may not.
        """
        segments, method = exchange.segments, exchange.head.method
        first = segments[0]
        if first in _OWN_SEGMENTS or segments == (BRIDGE_NAME, "terminate"):
            exchange.route, exchange.params = self.router.match(method, segments)
            right = exchange.route.right
        else:
            right = "look" if method in ("GET", "HEAD") else "use"
        if right is None:
            return
        if exchange.identity is None:
            raise Unauthorized("a token is needed: send 'Authorization: Bearer TOKEN', or sign in",
                               headers={"WWW-Authenticate": 'Bearer realm="radical-edge"'})
        if not exchange.identity.may(right):
            raise Forbidden(f"a token of scope {exchange.identity.scope.value!r} may not do this")

    def _get_page(self, exchange: Exchange) -> Response:
        """Answer the page for browsers."""
        return self._page.respond(exchange.head.fields)

    def _get_frame(self, exchange: Exchange) -> Response:
        """Answer the frame in which the page runs a plugin's own UI module."""
        return self._frame.respond(exchange.head.fields)

    def _get_health(self, _exchange: Exchange) -> Any:
        """Answer whether the bridge is up and ready, and its version."""
        return {"status": "healthy", "live": True, "ready": not self._bridge.why_not_ready(),
                "version": __version__}

    def _get_live(self, _exchange: Exchange) -> Any:
        """Answer that the process serves; no answer means that it should be started anew."""
        return {"live": True}

    def _get_ready(self, _exchange: Exchange) -> Any:
        """Answer whether new work should be sent here; 503 when not."""
        reason = self._bridge.why_not_ready()
        if reason:
            raise Unavailable(reason, headers=_retry_after(1))
        return {"ready": True}

    def _get_caller(self, exchange: Exchange) -> Any:
        """Answer who the caller is and what it may do; nobody is null, with no rights."""
        nobody = {"name": None, "scope": None, "expires": None, "rights": []}
        identity = exchange.identity
        return {**(identity.describe() if identity else nobody), "version": __version__,
                "needs_token": self._authenticator.needs_token}

    def _sign_in(self, exchange: Exchange) -> Response:
        """Sign a browser in: {"token"} becomes a cookie."""
        request = Request("POST", "/auth", exchange.head.fields, exchange.body)
        value = request.parse_json()
        token = value.get("token") if isinstance(value, dict) else None
        if not isinstance(token, str):
            raise Unprocessable('token: send {"token": "..."}')
        identity, cookie = self._authenticator.sign_in(token, exchange.connection.address)
        return JSONResponse(identity.describe(),
                            headers={"Set-Cookie": self._cookie_field(exchange, cookie, COOKIE_S)})

    def _sign_out(self, exchange: Exchange) -> Response:
        """End a browser's sign-in."""
        return JSONResponse({"status": "signed out"},
                            headers={"Set-Cookie": self._cookie_field(exchange, "", 0)})

    def _cookie_field(self, exchange: Exchange, value: str, age: int) -> str:
        """Return the field; the page's own origin tells when a proxy in front of us has the TLS.

        Without Path, a cookie is for where the page is (RFC 6265, section 5.1.4), which only the
        browser knows: a proxy may have put other bridges beside us.
        """
        page = exchange.head.fields.get("origin", self._registry.url)
        secure = "; Secure" if "https" in (self._registry.url[:5], page[:5]) else ""
        return (f"{cookie_name(exchange.head.host)}={value}; Max-Age={age}; HttpOnly; "
                f"SameSite=Strict{secure}")

    def _list_topology(self, _exchange: Exchange) -> Any:
        """List the edges and all that is known of their plugins."""
        return Response(b'{"data":' + self._registry.topology() + b"}",
                        media_type="application/json")

    def _list_edges(self, _exchange: Exchange) -> Any:
        """List the edges and the names of their plugins."""
        edges = [{"name": name, "plugins": list(plugins),
                  "connected": name not in self._registry.absent, "plugin_count": len(plugins)}
                 for name, plugins in self._registry.describe_plugins().items()]
        return {"edges": edges, "total": len(edges)}

    def _subscribe(self, exchange: Exchange) -> None:
        """Follow the events (text/event-stream)."""
        if exchange.head.method == "HEAD":
            raise MethodNotAllowed("use GET for the event stream", headers={"Allow": "GET"})
        self._hub.subscribe(exchange, self._registry.topology())
        bridge_log.info("%s: %s follows the events", exchange.request_id, exchange.identity.name)

    def _get_ui_module(self, exchange: Exchange) -> Response:
        """Answer a plugin's UI module: that of ?edge=, or the first edge's that has one."""
        name, edge = exchange.params["name"], parse_query(exchange.head.query).get("edge")
        module = self._registry.find_ui_module(name, edge)
        if module is None:
            raise NotFound(f"{edge or 'no connected edge'!r:.80} has no UI module for the plugin "
                           f"{name!r:.80}")
        return Response(module, headers=_FOREIGN_FIELDS,
                        media_type="text/javascript; charset=utf-8")

    def _get_metrics(self, _exchange: Exchange) -> Response:
        """Answer counters and gauges (Prometheus text format)."""
        return Response(self._bridge.records.counters.encode(self._measure()),
                        media_type="text/plain; version=0.0.4; charset=utf-8")

    def _measure(self) -> Dict[str, float]:
        """Return what /metrics shows of the present state."""
        self._bridge.records.flush()
        links, absent = self._registry.links, self._registry.absent
        audit = self._bridge.records.audit
        return {"edges": len(links), "edges_absent": len(absent),
                "subscribers": len(self._hub.subscribers),
                "connections": len(self._bridge.connections),
                "requests_pending": sum(link.pending for link in links.values()),
                "requests_waiting": sum(len(item.waiting) for item in absent.values()),
                "link_unsent_bytes": sum(link.channel.unsent for link in links.values()),
                "journal_unwritten": self._journal.unwritten,
                "events_dropped": self._journal.dropped,
                "last_event_id": self._hub.log.last_id, "event_lag": self._hub.lag(),
                "audit_unwritten": audit.unwritten, "audit_dropped_total": audit.dropped,
                "auth_failures_total": self._authenticator.failures,
                "ready": float(not self._bridge.why_not_ready())}

    def _get_openapi(self, _exchange: Exchange) -> Any:
        """Answer this description."""
        edges = {name: link.routes for name, link in self._registry.links.items()}
        return describe_api(self.router, edges)

    def _disconnect(self, exchange: Exchange) -> Any:
        """Tell an edge to end and not to come back."""
        name = exchange.params["name"]
        if name == BRIDGE_NAME:
            raise BadRequest("the bridge is not an edge: use POST /bridge/terminate to end it")
        link = self._registry.find(name)
        fields = exchange.head.fields             # an edge may want to see that a client signed it
        link.send({"type": "shutdown", "reason": f"disconnected by {exchange.identity.name}",
                   "request": {name: value for name, value in fields.items()
                               if name not in NOT_FORWARDED}})
        link.close(CloseCode.NORMAL, "disconnected by a client")
        return {"status": "shutdown", "edge": name}

    def _terminate(self, _exchange: Exchange) -> Any:
        """End the bridge; the edges stay up."""
        self._bridge.end_soon()
        return {"status": "terminating", "message": "The bridge ends; edges stay up."}

    def _register(self, exchange: Exchange) -> None:
        fields = exchange.head.fields
        if "origin" in fields:
            raise Forbidden("edges are no browsers: a request with Origin cannot register")
        key = fields.get("sec-websocket-key", "")
        wanted = "websocket" in fields.get("upgrade", "").lower() and \
            "upgrade" in connection_options(fields) and len(key) == 24
        # HTTP/1.0 has no upgrade (RFC 9110, section 7.8)
        if not wanted or exchange.head.is_http10 or fields.get("sec-websocket-version") != "13":
            raise EdgeError("this path is for edges: it speaks WebSocket, version 13",
                            HTTPStatus.UPGRADE_REQUIRED,
                            headers={"Upgrade": "websocket", "Connection": "Upgrade",
                                     "Sec-WebSocket-Version": "13"})
        self._registry.check_room()
        connection = exchange.connection
        link = self._registry.open(connection, exchange.identity)
        rest = connection.take_over(link.on_data, link.on_lost)
        limit_unsent(connection.channel.sock)
        connection.channel.send(encode_response_head(HTTPStatus.SWITCHING_PROTOCOLS, [
            ("Upgrade", "websocket"), ("Connection", "Upgrade"),
            ("Sec-WebSocket-Accept", accept_key(key))]))
        self._bridge.records.write_audit(exchange, "register", HTTPStatus.SWITCHING_PROTOCOLS)
        if rest:
            link.on_data(rest)


class _OwnCall(Call):
    """A client's request to a plugin that the bridge itself hosts. The exchange is the loop's."""

    max_whole = MAX_WHOLE

    def __init__(self, thread: LoopThread, exchange: Exchange, incoming: EdgeRequest) -> None:
        super().__init__(incoming, BodyReader(self._on_read) if exchange.upload else None)
        self._thread, self._exchange = thread, exchange
        self._window, self._upload_window = SendWindow(), SendWindow()
        self._download: Optional[Download] = None                # the loop's
        exchange.own_call = self
        if exchange.upload is not None:
            exchange.upload.attach(self._feed, self._when_fed)

    def respond(self, response: Response) -> None:
        """Answer, whole."""
        incoming = self.incoming
        try:
            response = self._protect(response)
        except ProtocolError as error:            # fields that are none: the plugin's mistake
            response = self._protect(_failure_response(
                error, Request(incoming.method, incoming.target, incoming.headers)))
        self._call(self._exchange.respond, response)

    def begin(self, response: Response) -> None:
        """Send the status and the fields; the body follows. Raises ProtocolError for bad ones."""
        self._call(self._begin, self._protect(response))

    def try_write(self, piece: memoryview) -> int:
        """Send some of the body."""
        size = self._window.take(min(len(piece), DATA_SIZE))
        if size:
            self._call(lambda data: self._download.on_data(data), piece[:size])
        return size

    def when_ready(self, waiter: Callable[[], None]) -> None:
        """Call `waiter` when try_write() may take something."""
        self._window.when_open(waiter)

    def finish(self) -> None:
        """End the body."""
        exchange = self._exchange
        self._call(lambda: exchange.connection.end_body(exchange, self._status))

    def abort(self, error: EdgeError) -> None:
        """Give up in the middle of the body."""
        self._call(self._exchange.fail, error)

    def cancel(self) -> None:
        """Take notice that the client has gone."""
        super().cancel()
        self._window.close()

    # -- inside

    def _call(self, function: Callable[..., Any], *args: Any) -> None:
        self._thread.call(lambda: self._exchange.cancelled or function(*args))

    @staticmethod
    def _protect(response: Response) -> Response:
        response.headers = Headers.of_lower(parse_fields_object(response.headers))
        response.headers.update(_FOREIGN_FIELDS)
        response.headers.pop("cache-control", None)
        return response

    def _begin(self, response: Response) -> None:
        self._status = response.status_code
        self._exchange.connection.begin(self._exchange,
                                        _make_answer(response.status_code, response.headers))
        self._download = Download(self._exchange, lambda: 1, self._window.add)

    def _feed(self, piece: bytes, end: bool) -> int:
        size = self._upload_window.take(len(piece))
        if size or not piece:
            self.reader.feed(piece[:size], end=end and size == len(piece))
        return size

    def _when_fed(self, waiter: Callable[[], None]) -> None:
        self._upload_window.when_open(lambda: self._thread.call(waiter))

    def _on_read(self, size: int) -> None:
        self._upload_window.add(size)


def _parse_timeout(text: str) -> float:
    """Return the seconds that a client gives its request with X-Request-Timeout."""
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) or float(text) <= 0:
        raise Unprocessable(f"X-Request-Timeout: {text[:40]!r} is not a number of seconds")
    return float(text)


class _Reloader:
    """Reads tokens and certificate again when their files change, or when asked to. On the loop.

    Files that are wrong change nothing: the bridge goes on with what it has, and says so.
    """

    def __init__(self, registry: EdgeRegistry, tokens: Optional[TokenStore], listener: _Listener,
                 files: Optional[Tuple[str, Optional[str]]], on_certificate: Callable[[], None]
                 ) -> None:
        self._registry, self._tokens = registry, tokens
        self._listener, self._files, self._on_certificate = listener, files, on_certificate
        self._stamps = self._stamp()              # of the certificate in use, or tried last
        self._asked: Optional[asyncio.Event] = None

    def soon(self) -> None:
        """Look at once, and take the certificate again even if its file looks the same."""
        self._stamps = ()
        if self._asked is not None:
            self._asked.set()

    async def run(self) -> None:
        """Look every RELOAD_S, until cancelled."""
        workers = Workers("reload", 1)            # the files may lie on a file system that hangs
        self._asked = asyncio.Event()
        try:
            while True:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._asked.wait(), RELOAD_S)
                self._asked.clear()
                await self._look(workers, self._reload_tokens)
                await self._look(workers, self._reload_certificate)
                if self._tokens is not None:      # some have expired, perhaps
                    self._registry.close_unless(self._tokens.is_valid)
                    self._registry.hub.close_unless(self._tokens.is_valid)
        finally:
            workers.stop()

    async def _look(self, workers: Workers, reload: Callable[[], bool]) -> None:
        try:
            if await workers.call(reload):
                self._registry.counters.add("reloads_total")
        except (EdgeError, OSError, ValueError) as error:
            bridge_log.error("not reloaded: %s", error)

    def _reload_tokens(self) -> bool:
        return self._tokens is not None and self._tokens.refresh()

    def _stamp(self) -> Tuple[Any, ...]:
        """Return what changes when one of the certificate's files does."""
        stamps = []
        for path in self._files or ():
            if path is not None:
                try:
                    status = os.stat(path)
                    stamps.append((status.st_mtime_ns, status.st_size, status.st_ino))
                except OSError:                   # it is being replaced: loading it tells
                    stamps.append(())
        return tuple(stamps)

    def _reload_certificate(self) -> bool:
        if self._files is None or self._stamp() == self._stamps:
            return False
        self._stamps = self._stamp()
        self._listener.tls = server_tls(*self._files)            # for connections from now on
        bridge_log.info("the certificate was read again")
        self._on_certificate()
        return True


class _Records:
    """What is told of the bridge's work: counters, the audit log, a log line for each answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop, audit: AuditLog) -> None:
        self._loop, self.counters, self.audit = loop, Counters(), audit
        self._answers: List[Tuple[Exchange, int, float]] = []    # the loop's; see on_answered()

    def on_answered(self, exchange: Exchange, status: int, seconds: float) -> None:
        """Take notice of an answer. It is counted and logged a moment later, many at once."""
        if not self._answers:
            self._loop.call_later(ANSWER_LOG_S, self.flush)
        self._answers.append((exchange, status, seconds))

    def flush(self) -> None:
        """Count and log the answers of the last moments. On the loop."""
        answers, self._answers = self._answers, []
        for exchange, status, seconds in answers:
            label = self._label_of(exchange)
            self.counters.count_request(label, status, seconds)
            if exchange.head.method not in SAFE_METHODS:
                self.write_audit(exchange, label, status)
            bridge_log.info("%s: %s %s %s %d in %.1f ms", exchange.request_id,
                            exchange.identity.name if exchange.identity else "-",
                            exchange.head.method, exchange.head.path[:120], status, seconds * 1000)

    def write_audit(self, exchange: Exchange, route: str, status: int) -> None:
        """Write down what was done, or not. The query is left out: who knows what is in it."""
        identity, segments = exchange.identity, exchange.segments
        self.audit.write({
            "request": exchange.request_id, "token": identity.name if identity else None,
            "scope": identity.scope.value if identity else None,
            "address": exchange.connection.address,
            "edge": segments[0] if segments and exchange.route is None else BRIDGE_NAME,
            "method": exchange.head.method[:16], "route": route, "path": exchange.head.path[:512],
            "status": status,
            "outcome": "done" if status < 400 else "refused" if status < 500 else "failed"})

    @staticmethod
    def _label_of(exchange: Exchange) -> str:
        """Return the route of an exchange as /metrics shows it."""
        if exchange.route is not None:
            return exchange.route.pattern
        if exchange.link is None:
            return "other"
        segments = exchange.segments
        return exchange.link.labels.get((segments[1], segments[2], len(segments)), "other")


async def _repeat(seconds: float, function: Callable[[], None]) -> None:
    """Call `function` again and again, until cancelled."""
    while True:
        await asyncio.sleep(seconds)
        try:
            function()
        except Exception:                         # ours; without it nothing would ever be too late
            bridge_log.exception("%s failed", function.__name__)


class Bridge:
    """A bridge: the HTTP server that clients use and edges register with.

    tokens: None to let everybody in. cert, key: PEM files, for TLS. plugins: names of plugins that
    the bridge itself hosts. allow_hosts: names besides its own under which browsers may reach it.
    grace: seconds for which requests wait for an edge whose link was lost. state_dir: where events
    are kept. options: for its plugins. on_end: called, on the loop, when a client asks the bridge
    to end; then call stop().
    """

    def __init__(self, host: str = "127.0.0.1", port: int = DEFAULT_PORT, *,
                 tokens: Optional[TokenStore] = None, cert: Optional[str] = None,
                 key: Optional[str] = None, plugins: Iterable[str] = (),
                 allow_hosts: Iterable[str] = (), request_timeout: float = REQUEST_S,
                 heartbeat: float = HEARTBEAT_S, grace: float = GRACE_S,
                 state_dir: Optional[Path] = None, options: Optional[Dict[str, Any]] = None,
                 on_end: Optional[Callable[[], None]] = None,
                 on_certificate: Callable[[], None] = lambda: None) -> None:
        self._on_end = on_end
        self._wanted = list(plugins)
        self._request_timeout, self._heartbeat = request_timeout, heartbeat
        self._thread = LoopThread("bridge-loop")
        self.loop = self._thread.loop
        self._listener = _make_listener((host, port), self,
                                        server_tls(cert, key) if cert else None)
        port = self._listener.server_address[1]
        shown = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
        self.url = str(BridgeURL(bool(cert), shown, port, ""))
        own = {socket.gethostname(), socket.gethostname().partition(".")[0], host, *allow_hosts}
        self._authenticator = Authenticator(tokens, own)
        self.connections: Set[HttpConnection] = set()            # the loop's
        self.handshakes: Set[_Handshake] = set()  # the loop's
        self.open = ConnectionLimit(open_file_room())            # for every connection, first
        self._rates, self.bodies = RateLimit(), BodyLimit(BODIES_FULL)
        self.answers = BodyLimit(ANSWERS_FULL)    # those that edges of version 1 send whole
        self.stopping = False                     # set by stop(), read everywhere
        self._state_dir = Path(state_dir or home_dir() / "state" / BRIDGE_NAME)
        self._journal = Journal(self._state_dir / "events", max_records=MAX_EVENTS,
                                max_bytes=MAX_EVENT_BYTES, on_written=self._on_written)
        self.records = _Records(self.loop, AuditLog(self._state_dir / "audit.jsonl"))
        self._hub = EventHub(self.loop, self.records.counters, self._journal)
        self._registry = EdgeRegistry(self.loop, self._hub, self.records.counters, grace)
        self._registry.url = self.url
        self._reloader = _Reloader(self._registry, tokens, self._listener,
                                   (cert, key) if cert else None, on_certificate)
        self._memory = EdgeMemory(self._registry, self._state_dir / "edges.json")
        self._lock = StateLock(self._state_dir, self._on_end or (lambda: None))
        self._once = OnceStore(self._state_dir / "once")         # used when it hosts plugins
        self._host = PluginHost(BRIDGE_NAME, ROLE_BRIDGE, self._state_dir,
                                bridge_url=self.url, notify=self._on_own_notification,
                                changed=lambda: self._thread.call(self._registry.on_changed),
                                once=self._once, audit=self.records.audit, options=options)
        self._routes = _Routes(self, self._authenticator, self._registry, self._journal)
        self._own_exchanges: Set[Exchange] = set()               # the loop's; for plugins of ours
        self._most_connections = 0                # since memory was given back; the loop's
        self._own_ids = f"{secrets.token_hex(4)}-"
        self._request_count = 0                   # the loop's

    # -- life

    def start(self) -> "Bridge":
        """Serve in the background; return self.

        Raises Conflict when another process has the state directory, InsufficientStorage when it
        cannot be written.
        """
        try:
            names = select_plugins(self._wanted) if self._wanted else []
            self._lock.acquire()
        except BaseException:
            self._listener.server_close()
            self._thread.stop()
            raise
        self._hub.log.open()
        self._once.open()
        self.records.audit.open()
        self._memory.restore()
        self._thread.start()
        self._registry.host = self._host
        self._host.load(names)
        self._thread.submit(self._start_tasks()).result()
        threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.2},
                         name="bridge-listener", daemon=True).start()
        return self

    def stop(self) -> bool:
        """End subscriptions and links, close all sockets; False when a plugin is stuck."""
        self.stopping = True
        self._listener.shutdown()
        self._listener.server_close()
        clean = self._host.stop()
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self._thread.submit(self._close_all()).result(STOP_S)
        self._journal.close()
        self._once.close()
        self.records.audit.close()
        self._lock.release()
        return self._thread.stop() and clean

    def reload(self) -> None:
        """Read tokens and certificate again now; they are looked at every second anyway."""
        self._thread.call(self._reloader.soon)

    def why_not_ready(self) -> str:
        """Return why clients had better use another bridge, "" when they need not."""
        if self.stopping:
            return "the bridge is about to end"
        if self._journal.is_failing:
            return "events cannot be written to the disk of the bridge"
        return "all connections are taken" if self.open.is_full else ""

    def end_soon(self) -> None:
        """Ask whoever started the bridge to stop it, once the answers under way are sent."""
        if self._on_end is not None:
            self.loop.call_later(SWEEP_S, self._on_end)

    def adopt(self, sock: socket.socket, address: str, parser: Optional[RequestParser] = None
              ) -> None:
        """Give an opened connection to the loop, and what has read its first bytes. Any thread."""
        connection = HttpConnection(self, parser or RequestParser(), address)
        self.call_or_close(sock, self._adopt, connection, sock)

    def call_or_close(self, sock: socket.socket, function: Callable[..., Any], *args: Any) -> None:
        """Call a function on the loop; close the socket when that has ended. Any thread."""
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:                      # so has the bridge
            sock.close()

    # -- exchanges; called by connections

    def open_exchange(self, connection: HttpConnection, head: RequestHead) -> Exchange:
        """Return the exchange of a request whose body is still to come, checked and routed."""
        exchange = Exchange(connection, head, self._request_id(head), time.monotonic())
        try:
            exchange.segments = known_paths[head.path]
            exchange.identity = self._authenticator.identify(head, connection.address)
            if exchange.identity is not None:
                self._rates.count(exchange.identity.name, exchange.started)
            self._routes.find(exchange)
        except EdgeError as error:
            exchange.error = error
        return exchange

    def open_broken_exchange(self, connection: HttpConnection) -> Exchange:
        """Return an exchange for a request whose head could not be read."""
        head = RequestHead("GET", "/", 1, {})
        return Exchange(connection, head, self._request_id(head), time.monotonic())

    def open_upload(self, exchange: Exchange) -> None:
        """Let the body of a request go on to its plugin while it comes, where that is possible."""
        try:
            if self._takes_uploads(exchange.segments[0]):
                exchange.upload = Upload(exchange)
                self._proxy(exchange)
        except EdgeError as error:
            exchange.error = error

    def handle(self, exchange: Exchange) -> None:
        """Answer an exchange whose body is here, now or later."""
        try:
            if exchange.error is not None:
                raise exchange.error
            if exchange.route is None:
                self._proxy(exchange)
                return
            response = exchange.route.handler(exchange)
            if response is not None:
                exchange.respond(to_response(response))
        except EdgeError as error:
            exchange.fail(error)
        except Exception as error:
            bridge_log.error("%s: failed", exchange.request_id, exc_info=error)
            exchange.fail(EdgeError(f"internal error; the log has it under {exchange.request_id}"))

    def on_answered(self, exchange: Exchange, status: int) -> None:
        """Take notice that an exchange has its answer."""
        self._own_exchanges.discard(exchange)
        self.records.on_answered(exchange, status, time.monotonic() - exchange.started)

    def on_handshake_failed(self, address: str, too_slow: bool) -> None:
        """Forget a connection that never came to a request. Any thread."""
        self.open.leave(address)
        if too_slow:
            self.records.counters.count_limit("handshake-time")

    def on_connection_lost(self, connection: HttpConnection) -> None:
        """Forget a connection."""
        self.connections.discard(connection)
        self.open.leave(connection.address)

    def on_client_gone(self, exchange: Exchange) -> None:
        """Cancel a request whose client has gone."""
        self._own_exchanges.discard(exchange)
        if exchange.link is not None:
            exchange.link.cancel(exchange)
        elif exchange.own_call is not None:
            exchange.own_call.cancel()

    # -- proxying

    def _proxy(self, exchange: Exchange) -> None:
        name, head = exchange.segments[0], exchange.head
        if len(exchange.segments) < 3:
            raise NotFound("there is no such route; a plugin's are /EDGE/PLUGIN/ROUTE")
        if "x-request-timeout" in head.fields:
            exchange.timeout = _parse_timeout(head.fields["x-request-timeout"])
        else:
            exchange.timeout = self._request_timeout
        exchange.deadline = time.monotonic() + exchange.timeout
        if name == BRIDGE_NAME:
            incoming = EdgeRequest(exchange.request_id, head.method, exchange.target,
                                   exchange.fields_for_edge(), exchange.body)
            self._own_exchanges.add(exchange)
            self._host.dispatch(_OwnCall(self._thread, exchange, incoming))
            return
        link = self._registry.links.get(name)
        if link is not None:
            link.forward(exchange)
        elif not self._registry.wait(exchange, name):
            self._registry.forward(exchange)

    def _takes_uploads(self, name: str) -> bool:
        if name == BRIDGE_NAME:
            return True
        absence = self._registry.absent.get(name)
        if absence is not None:
            return absence.takes_uploads
        return self._registry.find(name).requests.takes_uploads

    def _request_id(self, head: RequestHead) -> str:
        given = head.fields.get("x-request-id")
        if given is not None and REQUEST_ID_PATTERN.fullmatch(given):
            return given
        self._request_count += 1
        return f"{self._own_ids}{self._request_count:x}"

    # -- inside

    def _adopt(self, connection: HttpConnection, sock: socket.socket) -> None:
        self.connections.add(connection)
        connection.adopt(sock)

    def _on_written(self) -> None:
        self._thread.call(self._registry.on_written)

    def _on_own_notification(self, plugin_name: str, topic: str, data: Any) -> None:
        """Publish what one of our own plugins tells. Any thread."""
        try:
            text = encode_json(data)              # now: the plugin may change it later
            if len(text) > MAX_NOTIFICATION or not is_label(topic):
                raise ValueError("it is too large, or its topic is not a short text")
        except (TypeError, ValueError, RecursionError) as error:
            bridge_log.error("%s: notification %.80r was dropped: %s", plugin_name, topic, error)
        else:
            self._thread.call(self._hub.publish, BRIDGE_NAME, plugin_name, topic, _parse_json(text))

    async def _start_tasks(self) -> None:
        self._tasks = [asyncio.ensure_future(task) for task in (
            _repeat(SWEEP_S, self._sweep), _repeat(self._heartbeat, self._beat),
            self._memory.keep(), self._reloader.run())]

    def _sweep(self) -> None:
        now = time.monotonic()
        self._give_back_memory()
        self._end_own_late(now)
        self._registry.sweep(now)
        for link in list(self._registry.links.values()):
            link.sweep(now, self._heartbeat)
        for link in [item for item in self._registry.unregistered
                     if now - item.opened > HANDSHAKE_S]:
            link.close(CloseCode.POLICY, "did not register in time")
        for connection in [item for item in self.connections if item.deadline < now]:
            connection.on_deadline()

    def _end_own_late(self, now: float) -> None:
        """Fail requests to the bridge's own plugins that are past their deadline."""
        for exchange in [item for item in self._own_exchanges if item.deadline < now]:
            exchange.own_call.cancel()
            exchange.fail(DeadlineExceeded("the bridge's own plugin did not answer in time"))
            exchange.cancelled = True             # its plugin may still answer, to nobody

    def _give_back_memory(self) -> None:
        """Return to the system what many connections needed, when most of them are gone."""
        count = len(self.connections)
        if self._most_connections > max(1000, 4 * count):
            self._most_connections = count
            trim_memory()
        self._most_connections = max(self._most_connections, count)

    def _beat(self) -> None:
        self._hub.beat()
        for link in list(self._registry.links.values()):
            link.beat()

    async def _close_all(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._hub.close()
        for link in [*self._registry.links.values(), *self._registry.unregistered]:
            link.close(CloseCode.GOING_AWAY, "the bridge ends")
        for handshake in list(self.handshakes):
            handshake.end(False)
        await asyncio.sleep(0)                    # closing connections write their last bytes
        for connection in list(self.connections):
            connection.channel.close("the bridge ends")
        self.records.flush()


def describe_api(routes: Router, edges: Dict[str, Dict[str, List[Tuple[str, str]]]]
                 ) -> Dict[str, Any]:
    """Return the API as OpenAPI 3.1: the bridge's routes and those of every plugin on every edge.

    edges: {edge name: {plugin name: [(method, pattern), ...]}}.
    """
    paths: Dict[str, Dict[str, Any]] = {}
    for route in routes.list():
        if route.pattern != "register":
            text = (route.handler.__doc__ or "").strip().partition("\n")[0]
            _add_operation(paths, f"/{route.pattern}", route.method, text, route.right)
    for edge, plugins in edges.items():
        for name, pairs in plugins.items():
            for method, pattern in pairs:
                right = "look" if method == "GET" else "use"
                _add_operation(paths, f"/{edge}/{name}/{pattern}", method, "", right)
    error = {"type": "object", "required": ["error", "status_code", "detail"], "properties": {
        "error": {"type": "boolean"}, "status_code": {"type": "integer"},
        "detail": {"type": "string"}}}
    return {"openapi": "3.1.0", "info": {"title": "Radical Edge", "version": __version__},
            "paths": paths, "components": {
                "schemas": {"Error": error},
                "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}}


def _add_operation(paths: Dict[str, Dict[str, Any]], path: str, method: str, summary: str,
                   right: Optional[str]) -> None:
    reference = {"schema": {"$ref": "#/components/schemas/Error"}}
    operation: Dict[str, Any] = {
        "summary": summary or f"{method} {path}",
        "responses": {"200": {"description": "the answer"},
                      "default": {"description": "an error",
                                  "content": {"application/json": reference}}},
        "security": [{"token": []}] if right else []}
    names = re.findall(r"\{(\w+)\}", path)
    if names:
        operation["parameters"] = [{"name": name, "in": "path", "required": True,
                                    "schema": {"type": "string"}} for name in names]
    if method == "POST":
        operation["requestBody"] = {"content": {"application/json": {"schema": {}}}}
    paths.setdefault(path, {})[method.lower()] = operation


# ---------------------------------------------------------------------------
# 14. Client: functions for scripts (urllib), classes for programs. Both find the bridge by
#     themselves: arguments, then the environment, then ~/.radical/edge.
# ---------------------------------------------------------------------------

client_log = logging.getLogger("radical_edge.client")
CLIENT_TIMEOUT_S = REQUEST_S + 30.0    # the bridge gives up first, and says why
RETRY_S = 15.0                 # a dropped connection is tried again so long
EDGE_S = 1800.0                # an edge that is to come, perhaps as a job from a queue

_ERROR_BY_STATUS: Dict[int, Type[EdgeError]] = {
    int(cls.status): cls for cls in (
        BadRequest, Unauthorized, Forbidden, NotFound, MethodNotAllowed, Conflict, Gone,
        LengthRequired, PreconditionFailed, ContentTooLarge, TargetTooLong, Unprocessable,
        TooManyRequests,
        HeadTooLarge, NotInstalled, BadGateway, EdgeOffline, DeadlineExceeded, InsufficientStorage)}


def make_error(status: int, headers: Any, body: bytes) -> EdgeError:
    """Return the error that a reply of 400 or more stands for, of the class with its status."""
    try:
        detail = str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):
        detail = body[:200].decode(errors="replace") or HTTPStatus(status).phrase
    error = _ERROR_BY_STATUS.get(status, EdgeError)(detail, status)
    error.request_id = headers.get("X-Request-ID")
    return error


def connect(target: Target, timeout: float = CLIENT_TIMEOUT_S) -> "http.client.HTTPConnection":
    """Return a connection of http.client, opened as all of ours are: proxy, TLS, pin.

    Raises NotSent when it cannot be, and ValueError for a bad proxy or certificate.
    """
    import http.client
    connection = http.client.HTTPConnection(target.url.host, timeout=timeout, blocksize=FILE_PIECE)
    connection.auto_open = 0                      # or it would open itself again, in its own way
    try:
        connection.sock = open_connection(target.url, target.cert)
    except (OSError, ProtocolError) as error:
        raise NotSent(explain(error)) from error
    connection.sock.settimeout(timeout)
    return connection


def http_troubles() -> Tuple[Type[Exception], ...]:
    """Return the errors of a connection or of what comes over it."""
    import http.client
    return OSError, ProtocolError, http.client.HTTPException


def _make_opener(target: Target) -> "urllib.request.OpenerDirector":
    """Return an opener of urllib that knows no other way than ours to `target`."""
    import urllib.request

    class Handler(urllib.request.AbstractHTTPHandler):
        def http_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(lambda host, timeout: connect(target, timeout), request)

        https_open = http_open
        http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    opener = urllib.request.OpenerDirector()
    opener.add_handler(Handler())
    return opener


class Bridges:
    """The bridges that a client may use: the one in use, and the others when that one fails.

    Any thread. A request that may be repeated is sent again for RETRY_S when a connection drops:
    one that only reads or replaces, or one with an Idempotency-Key.
    """

    def __init__(self, targets: List[Target]) -> None:
        self._targets = targets
        self._index = 0                           # of the one in use; a stale value does no harm
        self._reached = False                     # whether one ever answered; likewise

    @property
    def current(self) -> Target:
        """The bridge in use."""
        return self._targets[self._index % len(self._targets)]

    def fail_over(self, failed: Target) -> bool:
        """Use the next bridge, if `failed` is still in use; return whether there is another."""
        if self.current is failed:
            self._index += 1
        return self.current is not failed

    def run(self, repeatable: bool, send: Callable[[Target], Any], keyed: str = "") -> Any:
        """Return what `send(target)` returns for the first bridge that works.

        keyed: the path of a POST with an Idempotency-Key. Raises Unavailable when no bridge works,
        or when nobody knows whether the request was done.
        """
        end, pause, tried, sent = time.monotonic() + RETRY_S, 0.05, 0, False
        while True:
            target = self.current
            try:
                if sent and keyed:
                    self._check_key(target, keyed)
                result = send(target)
                self._reached = True
                return result
            except http_troubles() as error:
                tried += 1
                sent = sent or not isinstance(error, NotSent)
                if not self._may_repeat(error, sent, repeatable):
                    raise Unavailable(f"{target.url}: {explain(error)}") from None
                self.fail_over(target)
                self._reached = self._reached or sent
                if tried >= len(self._targets) and (not self._reached or time.monotonic() > end):
                    raise Unavailable(f"{target.url}: {explain(error)}") from None
                client_log.info("%s: %s; trying again", target.url, explain(error))
            if tried >= len(self._targets):       # all were tried: give them time to come back
                time.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, 1.0)

    @staticmethod
    def _may_repeat(error: Exception, sent: bool, repeatable: bool) -> bool:
        if isinstance(error.__cause__, ssl.SSLCertVerificationError):
            return False
        return not sent or repeatable and not isinstance(error, (socket.timeout, TimeoutError))

    @staticmethod
    def _check_key(target: Target, path: str) -> None:
        """Raise Unavailable when the edge of `path`, asked again, would do it again.

        Raises NotSent when the edge is not there, or not yet.
        """
        name, *rest = [urllib.parse.unquote(segment) for segment in path[1:].split("/")]
        if len(rest) < 2 or name in RESERVED_NAMES - {BRIDGE_NAME}:
            return                                # one of the bridge's own, which do no harm twice
        connection = connect(target)
        try:
            connection.request("POST", target.url.prefix + "/edge/list", headers=target.headers)
            edges = json.loads(connection.getresponse().read())["data"]["edges"]
            if name not in edges:
                raise NotSent(f"edge {name!r} is not connected")
            known = runs_once(edges[name]["endpoint"])
        except (ValueError, KeyError, TypeError):
            known = False
        finally:
            connection.close()
        if not known:
            raise Unavailable(f"the connection was lost, and edge {name!r} may have done this: "
                              "look before you try again")


def new_key() -> Dict[str, str]:
    """Return the field that makes a POST safe to send again."""
    return {"Idempotency-Key": secrets.token_hex(16)}


def sign_request(signer: Optional[Signer], method: str, path: str, content: Any,
                 fields: Dict[str, str]) -> Dict[str, str]:
    """Return the fields that sign a request; {} for one that only reads, or without a key.

    content: what is sent, bytes or an open file, which is read twice. Raises ValueError for an
    iterable, which can be read only once, unless the fields have its Content-Digest.
    """
    if signer is None or method in SAFE_METHODS:
        return {}
    if "Content-Digest" in fields:                # the caller has read it already
        known = base64.b64decode(fields["Content-Digest"].split(":")[1])
        return signer.sign(method, path, known, fields)
    if hasattr(content, "read") and hasattr(content, "seek"):
        begin, found = content.tell(), hashlib.sha256()
        for piece in iter(lambda: content.read(MAX_WINDOW), b""):
            found.update(piece)
        content.seek(begin)
        return signer.sign(method, path, found.digest(), fields)
    if content is not None and not isinstance(content, (bytes, str)):
        raise ValueError("a signed request needs bytes or a file that can be read twice")
    body = content.encode("latin-1") if isinstance(content, str) else content or b""
    return signer.sign(method, path, hashlib.sha256(body).digest(), fields)


def _urlopen(targets: List[Target], method: str, path: str, body: Any = None,
             timeout: float = CLIENT_TIMEOUT_S, client_key: Optional[str] = None) -> Any:
    """Return the reply's JSON value (None when empty). No redirects: they would carry the token."""
    headers, data = {"Accept": "application/json"}, None
    if body is not None or method == "POST":
        data = encode_json({} if body is None else body).encode()
        headers["Content-Type"] = "application/json"
    if method == "POST":
        headers.update(new_key())
    signer = find_signer(client_key)

    def send(target: Target) -> Tuple[Any, bytes]:
        import urllib.error
        import urllib.request
        signed = sign_request(signer, method, path, data, headers)
        request = urllib.request.Request(str(target.url) + path, data,
                                         {**target.headers, **headers, **signed}, method=method)
        try:
            with _make_opener(target).open(request, timeout=timeout) as reply:
                return reply, reply.read()
        except urllib.error.URLError as error:
            raise error.reason if isinstance(error.reason, OSError) else error

    reply, content = Bridges(targets).run(True, send, path if method == "POST" else "")
    if reply.status >= 400:
        raise make_error(reply.status, reply.headers, content)
    return json.loads(content) if content else None


def list_edges(*, url: Optional[str] = None, token: Optional[str] = None,
               cert: Optional[str] = None) -> List[str]:
    """Return the names of the connected edges. Raises EdgeError."""
    topology = _urlopen(find_bridges(url, token, cert), "POST", "/edge/list")
    return list(topology["data"]["edges"])


def list_plugins(edge: str, *, url: Optional[str] = None, token: Optional[str] = None,
                 cert: Optional[str] = None) -> Dict[str, Dict[str, Any]]:
    """Return {plugin: {"type", "namespace", "version", ...}} of an edge. Raises NotFound."""
    topology = _urlopen(find_bridges(url, token, cert), "POST", "/edge/list")
    edges = topology["data"]["edges"]
    if edge not in edges:
        raise NotFound(f"no edge named {edge!r} is connected; there are: "
                       f"{', '.join(sorted(edges)) or 'none'}")
    return edges[edge]["plugins"]


def call(edge: str, plugin_name: str, route: str, body: Any = None, *,
         method: Optional[str] = None, params: Optional[Dict[str, Any]] = None,
         url: Optional[str] = None, token: Optional[str] = None, cert: Optional[str] = None,
         timeout: float = CLIENT_TIMEOUT_S, client_key: Optional[str] = None) -> Any:
    """Call a plugin's route and return the JSON value it answers.

    method: POST when there is a body, else GET. params: the query. timeout: seconds. client_key: a
    file, to sign what changes something; see find_signer().
    Raises EdgeError, whose status and detail are the reply's.
    """
    path = "/".join(["", _quote(edge), _quote(plugin_name), route.lstrip("/")])
    if params:
        path += "?" + urllib.parse.urlencode(params)
    method = method or ("GET" if body is None else "POST")
    return _urlopen(find_bridges(url, token, cert), method, path, body, timeout, client_key)


def events(*, url: Optional[str] = None, token: Optional[str] = None, cert: Optional[str] = None,
           edge: str = "", plugin_name: str = "", topic: str = "",
           last_id: str = "") -> Iterator[Dict[str, Any]]:
    """Yield {"topic", "data", "id"} for each event, for ever; reconnect and resume by itself.

    The first is the topology: once it came, nothing is missed. edge, plugin_name, topic: filters.
    last_id: the id after which to go on. Raises EdgeError when the bridge refuses, or when its
    certificate is not trusted.
    """
    filters = {"edge": edge, "plugin": plugin_name, "topic": topic}
    with contextlib.closing(EventStream(Bridges(find_bridges(url, token, cert)), filters,
                                        last_id)) as stream:
        yield from stream


def _quote(segment: str) -> str:
    return urllib.parse.quote(segment, safe="")


class EventStream:
    """Iterates over a bridge's events; reconnects with backoff and resumes. close() ends it.

    Any thread may call close(). Duplicates are dropped: by the event's id, and by the number that
    its edge gave a notification, which is the same on all bridges. So the stream goes on without a
    gap at another bridge when one fails.

    longest_pause: seconds between two attempts to reach a bridge, at most. trouble: what went wrong
    last, and where; None while events come.
    """

    def __init__(self, bridges: Bridges, filters: Optional[Dict[str, str]] = None,
                 last_id: str = "", longest_pause: float = BACKOFF_S[1]) -> None:
        self.trouble: Optional[str] = None
        self._bridges, self._longest_pause = bridges, longest_pause
        query = urllib.parse.urlencode({name: value for name, value in (filters or {}).items()
                                        if value})
        self._path = "/events" + (f"?{query}" if query else "")
        self._last_id = last_id
        self._source: Optional[Target] = None     # the bridge that counts as _last_id does
        self._numbers: Dict[str, int] = {}        # of the last notification, by edge
        self._closed = threading.Event()
        self._sock: Optional[socket.socket] = None

    def close(self) -> None:
        """End the iteration, also from another thread."""
        self._closed.set()
        sock = self._sock
        if sock is not None:
            with contextlib.suppress(OSError):
                # the plain method: SSLSocket's would drop its state under the reader's feet
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def __iter__(self) -> Iterator[Dict[str, Any]]:
        pause = BACKOFF_S[0]
        while not self._closed.is_set():
            target = self._bridges.current
            try:
                for event in self._read_once(target):
                    pause, self.trouble = BACKOFF_S[0], None
                    yield event
            except (*http_troubles(), ValueError) as error:
                self._on_trouble(target, error)
            self._closed.wait(min(pause, self._longest_pause) * random.uniform(0.5, 1.5))
            pause = min(pause * 2, BACKOFF_S[1])

    def _on_trouble(self, target: Target, error: Exception) -> None:
        """Keep what went wrong. Raises Unavailable for a certificate that was never trusted."""
        self.trouble = f"{target.url}: {explain(error)}"
        is_untrusted = isinstance(error.__cause__, ssl.SSLCertVerificationError)
        if is_untrusted and self._source is None:
            raise Unavailable(self.trouble) from None
        if not self._closed.is_set():
            client_log.info("event stream: %s; trying again", self.trouble)

    def _read_once(self, target: Target) -> Iterator[Dict[str, Any]]:
        """Yield the events of one connection."""
        elsewhere = self._source not in (None, target)
        with contextlib.ExitStack() as after:
            after.callback(self._bridges.fail_over, target)
            connection = connect(target, (LINK_DEAD + 1) * HEARTBEAT_S)
            after.callback(connection.close)
            self._sock = connection.sock
            after.callback(setattr, self, "_sock", None)
            headers = {**target.headers, "Accept": "text/event-stream"}
            if self._last_id:
                # another bridge counts otherwise: take all it has, and drop what was seen
                headers["Last-Event-ID"] = "0" if elsewhere else self._last_id
            connection.request("GET", target.url.prefix + self._path, headers=headers)
            reply = connection.getresponse()
            if reply.status != 200:
                self._refuse(reply)
            self._source = target
            yield from self._parse(reply, elsewhere)

    def _parse(self, reply: http.client.HTTPResponse, elsewhere: bool) -> Iterator[Dict[str, Any]]:
        parser = EventParser()
        while not self._closed.is_set():
            data = reply.read1(READ_SIZE)
            if not data:
                return
            for event in parser.feed(data):
                value = json.loads(event.data)
                seen = event.id and event.id == self._last_id or self._was_seen(value)
                self._last_id = event.id or self._last_id
                # what is gone at a bridge that was not followed is no gap
                if value["topic"] == "topology" or not (
                        seen or elsewhere and value["topic"] == "gap"):
                    yield {**value, "id": self._last_id}

    def _was_seen(self, value: Dict[str, Any]) -> bool:
        """Whether a notification came before, by the number that its edge gave it."""
        if value["topic"] != "notification" or not value["data"].get("number"):
            return False
        edge, number = value["data"]["edge"], value["data"]["number"]
        if number <= self._numbers.get(edge, 0):
            return True
        self._numbers[edge] = number
        return False

    @staticmethod
    def _refuse(reply: http.client.HTTPResponse) -> None:
        """Raise for good when it is the caller's mistake, and for a new try when it is not."""
        error = make_error(reply.status, reply.headers, reply.read(MAX_HEAD))
        if 400 <= reply.status < 500 and reply.status not in (408, 429):
            raise error
        raise OSError(str(error))


class HttpResponse:
    """A reply, with the names that users of httpx and requests know."""

    def __init__(self, status_code: int, headers: Any, content: bytes) -> None:
        self.status_code, self.headers, self.content = status_code, headers, content

    @property
    def is_error(self) -> bool:
        """Whether the status is 400 or more."""
        return self.status_code >= 400

    @property
    def text(self) -> str:
        """The content as text."""
        return self.content.decode(errors="replace")

    def json(self) -> Any:
        """Return the content as a JSON value. Raises ValueError."""
        return json.loads(self.content)

    def raise_for_status(self) -> "HttpResponse":
        """Return self, or raise EdgeError when the status is 400 or more."""
        if self.is_error:
            raise make_error(self.status_code, self.headers, self.content)
        return self


def _is_readable(sock: socket.socket) -> bool:
    with selectors.DefaultSelector() as selector:                # select() takes only 1024 files
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))


class HttpClient:
    """Sends requests over connections that it keeps alive, to one bridge or, when that fails, to
    another. Any thread may use it.

    A POST gets an Idempotency-Key, so that it may be sent again when a connection drops.
    signer: signs what changes something, anew each time that it is sent.
    """

    MAX_IDLE = 16

    def __init__(self, bridges: Bridges, timeout: float = CLIENT_TIMEOUT_S,
                 signer: Optional[Signer] = None) -> None:
        self._bridges, self._timeout, self._signer = bridges, timeout, signer
        self._lock = threading.Lock()
        # with the bridge of each; guarded by _lock
        self._idle: List[Tuple[Target, http.client.HTTPConnection]] = []

    @property
    def is_signing(self) -> bool:
        """Whether what changes something is signed; its content is read twice then."""
        return self._signer is not None

    def get(self, path: str, *, params: Optional[Dict[str, Any]] = None,
            headers: Optional[Dict[str, str]] = None) -> HttpResponse:
        """Send a GET request."""
        return self.request("GET", path, params=params, headers=headers)

    def post(self, path: str, *, json: Any = None, content: Optional[bytes] = None,
             params: Optional[Dict[str, Any]] = None,
             headers: Optional[Dict[str, str]] = None) -> HttpResponse:
        """Send a POST request with a JSON value or bytes as its body."""
        return self.request("POST", path, json=json, content=content, params=params,
                            headers=headers)

    def request(self, method: str, path: str, *, json: Any = None, content: Any = None,
                params: Optional[Dict[str, Any]] = None,
                headers: Optional[Dict[str, str]] = None,
                timeout: Optional[float] = None) -> HttpResponse:
        """Send a request and return its reply, whatever the status.

        content: bytes, or an open file or an iterable of bytes, which is sent as it is read and
        cannot be sent again. timeout: seconds in which nothing moves; the default is the client's.
        Raises Unavailable when no bridge can be reached, or when a connection drops and nobody
        knows whether the request was done.
        """
        fields = {**new_key(), **(headers or {})} if method == "POST" else dict(headers or {})
        if json is not None:
            content, fields["Content-Type"] = encode_json(json).encode(), "application/json"
        if params:
            path += "?" + urllib.parse.urlencode(params)
        whole = content is None or isinstance(content, (bytes, str))

        def send(target: Target, again: bool = whole) -> HttpResponse:
            connection, reply = self._send(target, method, path, content, fields, timeout)
            response = HttpResponse(reply.status, reply.headers, self._read(connection, reply))
            self._give_back(target, connection, reply)
            if again and reply.headers.get("X-Signature") == "used":
                return send(target, again=False)  # a bridge sent it twice; the key makes it one
            return response

        return self._bridges.run(whole, send, path if method == "POST" else "")

    @contextlib.contextmanager
    def stream(self, method: str, path: str, *, content: Any = None,
               params: Optional[Dict[str, Any]] = None,
               headers: Optional[Dict[str, str]] = None,
               timeout: Optional[float] = None) -> Iterator[http.client.HTTPResponse]:
        """Send a request and give its reply as http.client has it: read(n) reads on.

        Raises as request() does, and EdgeError for a status of 400 or more.
        """
        if params:
            path += "?" + urllib.parse.urlencode(params)
        connection, reply = self._bridges.run(False, lambda target: self._send(
            target, method, path, content, dict(headers or {}), timeout))
        try:
            if reply.status >= 400:
                raise make_error(reply.status, reply.headers, self._read(connection, reply))
            yield reply
        finally:
            connection.close()

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for _, connection in idle:
            connection.close()

    def _send(self, target: Target, method: str, path: str, content: Any,
              fields: Dict[str, str], timeout: Optional[float] = None
              ) -> Tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        signed = sign_request(self._signer, method, path, content, fields)
        connection = self._take(target)
        try:
            connection.sock.settimeout(timeout or self._timeout)
            try:
                connection.request(method, target.url.prefix + path, content,
                                   {**target.headers, **fields, **signed},
                                   encode_chunked="Content-Length" not in fields)
            except (ConnectionError, ssl.SSLEOFError) as error:
                return connection, self._read_early(connection, error)
            return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise

    @staticmethod
    def _read_early(connection: http.client.HTTPConnection, error: OSError
                    ) -> http.client.HTTPResponse:
        """Return the answer that a bridge gave before it had the whole body, and then closed."""
        try:
            reply = connection.getresponse()
        except http_troubles():
            raise error from None
        reply.will_close = True
        return reply

    @staticmethod
    def _read(connection: http.client.HTTPConnection, reply: http.client.HTTPResponse) -> bytes:
        try:
            return reply.read()
        except BaseException:
            connection.close()
            raise

    def _take(self, target: Target) -> http.client.HTTPConnection:
        while True:
            with self._lock:
                if not self._idle:
                    break
                of, connection = self._idle.pop()
            # an idle connection that is readable was closed by the bridge
            if of is target and not _is_readable(connection.sock):
                return connection
            connection.close()
        return connect(target, self._timeout)

    def _give_back(self, target: Target, connection: http.client.HTTPConnection,
                   reply: http.client.HTTPResponse) -> None:
        if reply.will_close or connection.sock is None:
            connection.close()
            return
        with self._lock:
            if len(self._idle) < self.MAX_IDLE:
                self._idle.append((target, connection))
                return
        connection.close()


Callback = Callable[[str, str, str, Any], None]
_CallbackKey = Tuple[Optional[str], Optional[str], Optional[str]]


class _EdgeWatch:
    """Follows which edges are there, in a thread of its own, while somebody waits for one.

    Its stream is not that of the callbacks: a topology comes first, so that nothing old is
    believed, and a callback may wait as well.
    """

    def __init__(self, bridges: Bridges, pause: float) -> None:
        self._bridges = bridges
        self._stream = EventStream(bridges, {"topic": "topology"}, longest_pause=pause)
        self._news = threading.Condition()
        self._there: Optional[List[str]] = None   # the edges' names, once told; guarded by _news
        self._refusal: Optional[EdgeError] = None                # guarded by _news
        self._thread = threading.Thread(target=self._follow, name="client-edges", daemon=True)

    def __enter__(self) -> "_EdgeWatch":
        atexit.register(self._close)              # see BridgeClient.wait_for_listener()
        self._thread.start()
        return self

    def __exit__(self, *_exc: Any) -> None:
        atexit.unregister(self._close)
        self._close()

    def wait(self, names: List[str], timeout: float, interval: float,
             on_heartbeat: Optional[Callable[[], None]]) -> str:
        """Return the first of `names` that is there; see BridgeClient.wait_for_edge()."""
        end = time.monotonic() + timeout
        while True:
            left = end - time.monotonic()
            with self._news:
                found = self._news.wait_for(lambda: self._find_locked(names), min(left, interval))
            if found is not None:
                return found
            if left <= interval:
                raise TimeoutError(f"no edge {' or '.join(map(repr, names))} within {timeout:g} s; "
                                   f"{self._describe()}")
            if on_heartbeat is not None:
                on_heartbeat()

    def _describe(self) -> str:
        """Return what is known of the edges, or why nothing is."""
        there, url = self._there, self._bridges.current.url
        return self._stream.trouble or (
            f"{url} has not answered" if there is None else
            f"{url} has {', '.join(sorted(there)) or 'none'}")

    def _close(self) -> None:
        self._stream.close()
        self._thread.join(STOP_S)

    def _find_locked(self, names: List[str]) -> Optional[str]:
        if self._refusal is not None:
            raise self._refusal
        return next((name for name in names if name in (self._there or ())), None)

    def _follow(self) -> None:
        try:
            for event in self._stream:
                if event["topic"] == "topology":
                    self._take([name for name, edge in event["data"]["edges"].items()
                                if edge.get("connected", True)])
        except EdgeError as error:
            self._take([], error)

    def _take(self, there: List[str], refusal: Optional[EdgeError] = None) -> None:
        with self._news:
            self._there, self._refusal = there, refusal
            self._news.notify_all()


class BridgeClient:
    """A program's connection to a bridge: edges, their plugins, and callbacks for events.

    url: of the bridge, or of several, separated by commas, of which one that works is used.
    client_key: a file, to sign what changes something; see find_signer().

    Callbacks run one after the other, in a thread of the client's own. register_callback() returns
    once the subscription stands: what happens after it is not missed.
    """

    def __init__(self, url: Optional[str] = None, cert: Optional[str] = None,
                 token: Optional[str] = None, timeout: float = CLIENT_TIMEOUT_S,
                 client_key: Optional[str] = None) -> None:
        self._bridges = Bridges(find_bridges(url, token, cert))
        self._http = HttpClient(self._bridges, timeout, find_signer(client_key))
        self._lock = threading.Lock()
        self._callbacks: Dict[_CallbackKey, List[Callback]] = {}                 # guarded by _lock
        self._topology_callbacks: List[Callable[[Dict[str, Any]], None]] = []    # guarded by _lock
        self._stream: Optional[EventStream] = None               # guarded by _lock
        self._listener: Optional[threading.Thread] = None        # guarded by _lock
        self._listening = threading.Event()       # set once the first event, the topology, came
        self._listen_error: Optional[EdgeError] = None           # set before _listening

    def __enter__(self) -> "BridgeClient":
        return self

    def __exit__(self, *_exc: Any) -> None:
        self.close()

    @property
    def http(self) -> HttpClient:
        """What sends the requests."""
        return self._http

    def list_edges(self) -> List[str]:
        """Return the names of the connected edges."""
        return list(self.get_topology()["edges"])

    def get_topology(self) -> Dict[str, Any]:
        """Return {"bridge": {"url"}, "edges": {name: {"endpoint", "plugins"}}}."""
        return self._http.post("/edge/list").raise_for_status().json()["data"]

    def get_edge_client(self, edge_id: str) -> "EdgeClient":
        """Return a client of one edge."""
        return EdgeClient(self, edge_id)

    def wait_for_edge(self, names: Union[str, Iterable[str]], timeout: float = EDGE_S,
                      poll: float = 3.0, on_heartbeat: Optional[Callable[[], None]] = None,
                      heartbeat_interval: float = 10.0) -> str:
        """Return the first of `names`, which is one or several, that is connected; wait for it.

        timeout: seconds, then TimeoutError, which says what is there. The bridge tells when edges
        come; poll: one that does not answer is tried again after so many seconds. on_heartbeat() is
        called every heartbeat_interval seconds meanwhile. Raises EdgeError when it refuses.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        if not wanted:
            raise ValueError("names: name the edge to wait for")
        with _EdgeWatch(self._bridges, poll) as watch:
            return watch.wait(wanted, timeout, heartbeat_interval, on_heartbeat)

    def disconnect_edge(self, edge_id: str) -> None:
        """Tell an edge to end and not to come back. Needs an admin's token."""
        self._http.post(f"/edge/disconnect/{_quote(edge_id)}").raise_for_status()

    def register_callback(self, edge_id: Optional[str] = None, plugin_name: Optional[str] = None,
                          topic: Optional[str] = None,
                          callback: Optional[Callback] = None) -> None:
        """Call `callback(edge, plugin, topic, data)` for notifications; None stands for any."""
        if callback is None:
            raise ValueError("callback: give the function to call")
        with self._lock:
            self._callbacks.setdefault((edge_id, plugin_name, topic), []).append(callback)
        self.wait_for_listener()

    def unregister_callback(self, edge_id: Optional[str] = None, plugin_name: Optional[str] = None,
                            topic: Optional[str] = None,
                            callback: Optional[Callback] = None) -> None:
        """Undo register_callback() with the same arguments."""
        with self._lock:
            found = self._callbacks.get((edge_id, plugin_name, topic), [])
            if callback in found:
                found.remove(callback)

    def register_topology_callback(self, callback: Callable[[Dict[str, Any]], None]) -> None:
        """Call `callback({edge: {"endpoint", "plugins"}})` now and whenever edges come or go."""
        with self._lock:
            self._topology_callbacks.append(callback)
            listening = self._listening.is_set()
        if listening:
            callback(self.get_topology()["edges"])
        self.wait_for_listener()

    def unregister_topology_callback(self, callback: Callable[[Dict[str, Any]], None]) -> None:
        """Undo register_topology_callback()."""
        with self._lock:
            if callback in self._topology_callbacks:
                self._topology_callbacks.remove(callback)

    def wait_for_listener(self, timeout: float = HANDSHAKE_S) -> None:
        """Return once events are being received. Raises EdgeError when that fails or takes longer.

        timeout: seconds.
        """
        with self._lock:
            if self._listener is None:
                self._stream = EventStream(self._bridges)
                self._listener = threading.Thread(target=self._listen, args=(self._stream,),
                                                  name="client-events", daemon=True)
                self._listener.start()
                # a thread that dials by TLS while Python ends crashes: see _end_process()
                atexit.register(self.close)
            if threading.current_thread() is self._listener:
                return                            # a callback that registers another
        if not self._listening.wait(timeout):
            raise Unavailable(f"{self._bridges.current.url}: no event stream within {timeout:.0f} "
                              "s")
        if self._listen_error is not None:
            raise self._listen_error

    def close(self) -> None:
        """Stop listening and close the connections."""
        atexit.unregister(self.close)
        with self._lock:
            stream, listener = self._stream, self._listener
        if stream is not None:
            stream.close()
        if listener is not None and listener is not threading.current_thread():
            listener.join(STOP_S)
        self._http.close()

    def _listen(self, stream: EventStream) -> None:
        try:
            for event in stream:
                self._on_event(event["topic"], event["data"])
                self._listening.set()
        except EdgeError as error:
            client_log.error("event stream: %s", error)
            self._listen_error = error
            self._listening.set()

    def _on_event(self, topic: str, data: Dict[str, Any]) -> None:
        if topic == "topology":
            with self._lock:
                topology_callbacks = list(self._topology_callbacks)
            for callback in topology_callbacks:
                self._run(callback, data["edges"])
        elif topic == "notification":
            found = (data["edge"], data["plugin"], data["topic"])
            for notify in self._find_callbacks(found):
                self._run(notify, *found, data["data"])
        elif topic == "gap":
            client_log.warning("events %s to %s are gone", data["from"], data["to"])

    def _find_callbacks(self, found: Tuple[str, str, str]) -> List[Callback]:
        with self._lock:
            return [callback for key, callbacks in self._callbacks.items() for callback in callbacks
                    if all(wanted in (None, value) for wanted, value in zip(key, found))]

    @staticmethod
    def _run(callback: Callable[..., None], *args: Any) -> None:
        try:
            callback(*args)
        except Exception:                         # the caller's; the others must still be called
            client_log.exception("callback %r failed", callback)


class EdgeClient:
    """A program's access to the plugins of one edge."""

    def __init__(self, bridge_client: BridgeClient, edge_id: str) -> None:
        self._bc, self._edge_id = bridge_client, edge_id

    @property
    def http(self) -> HttpClient:
        """What sends the requests."""
        return self._bc.http

    @property
    def edge_id(self) -> str:
        """The edge's name."""
        return self._edge_id

    def list_plugins(self) -> Dict[str, Dict[str, Any]]:
        """Return {plugin: {"type", "namespace", "version", ...}}; {} when the edge is not there."""
        return self._bc.get_topology()["edges"].get(self._edge_id, {}).get("plugins", {})

    def get_plugin(self, plugin_name: str, **session_kwargs: Any) -> "PluginClient":
        """Return a client of a plugin, of the plugin's own client class, with a session.

        session_kwargs: passed to its register_session(). Raises NotFound.
        """
        plugins = self.list_plugins()
        if plugin_name not in plugins:
            raise NotFound(f"edge {self._edge_id!r} has no plugin {plugin_name!r}; it has: "
                           f"{', '.join(sorted(plugins)) or 'none'}")
        described = plugins[plugin_name]
        cls = Plugin.get_plugin_class(described["type"])
        if cls is None:
            load_builtin_plugins()
            cls = Plugin.get_plugin_class(described["type"])
        factory = getattr(cls, "client_class", None) or PluginClient
        client = factory(self.http, described["namespace"], bridge_client=self._bc,
                         edge_id=self._edge_id, plugin_name=plugin_name)
        client.register_session(**session_kwargs)
        return client


class PluginClient:
    """A program's access to one plugin of one edge; subclasses add a method for each route."""

    def __init__(self, http_client: HttpClient, base_url: str,
                 bridge_client: Optional[BridgeClient] = None, edge_id: Optional[str] = None,
                 plugin_name: Optional[str] = None) -> None:
        self._http = http_client
        self._base_url = base_url.rstrip("/")
        self._bc, self._edge_id, self._plugin_name = bridge_client, edge_id, plugin_name
        self._sid: Optional[str] = None

    def __enter__(self) -> "PluginClient":
        return self

    def __exit__(self, *_exc: Any) -> None:
        self.close()

    @property
    def sid(self) -> Optional[str]:
        """The session id, None without a session."""
        return self._sid

    def register_session(self, **kwargs: Any) -> None:
        """Make a session on the edge, with `kwargs` as its arguments."""
        self._sid = self._post("register_session", kwargs or None)["sid"]

    def unregister_session(self) -> None:
        """Close the session on the edge, if there is one."""
        if self._sid:
            sid, self._sid = self._sid, None
            self._post(f"unregister_session/{_quote(sid)}")

    def close(self) -> None:
        """Close the session; what goes wrong is logged."""
        try:
            self.unregister_session()
        except EdgeError as error:
            client_log.warning("%s: session not closed: %s", self._base_url, error)

    def register_notification_callback(self, callback: Callback,
                                       topic: Optional[str] = None) -> None:
        """Call `callback(edge, plugin, topic, data)` for this plugin's notifications."""
        self._need_bridge().register_callback(self._edge_id, self._plugin_name, topic, callback)

    def unregister_notification_callback(self, callback: Callback,
                                         topic: Optional[str] = None) -> None:
        """Undo register_notification_callback() with the same arguments."""
        self._need_bridge().unregister_callback(self._edge_id, self._plugin_name, topic, callback)

    # -- for subclasses

    def _url(self, path: str) -> str:
        """Return the path of a route on the bridge."""
        return f"{self._base_url}/{path.lstrip('/')}"

    def _get(self, path: str, **params: Any) -> Any:
        """Return what a GET route answers. Parameters that are None are left out."""
        query = {name: value for name, value in params.items() if value is not None}
        return self._http.get(self._url(path), params=query).raise_for_status().json()

    def _post(self, path: str, body: Any = None) -> Any:
        """Return what a POST route answers. Raises EdgeError."""
        return self._http.post(self._url(path), json=body).raise_for_status().json()

    def __getattr__(self, name: str) -> Any:
        hint = "; a plugin's own client class is where the plugin is: import it, or put plugins.py " \
            "beside radical_edge.py" if type(self) is PluginClient else ""
        raise AttributeError(f"{type(self).__name__} has no {name!r}{hint}")

    def _require_session(self) -> str:
        """Return the session id. Raises RuntimeError without one."""
        if not self._sid:
            raise RuntimeError("there is no session: call register_session()")
        return self._sid

    def _need_bridge(self) -> BridgeClient:
        if self._bc is None:
            raise RuntimeError("notifications need a PluginClient made by EdgeClient.get_plugin()")
        return self._bc


# ---------------------------------------------------------------------------
# 15. Command line: flags, then the environment, then files in ~/.radical/edge.
# ---------------------------------------------------------------------------

_HELP = f"""\
Radical Edge {__version__}: reach supercomputers from anywhere, with one Python file.

  python3 radical_edge.py --bridge --edge                  both, to try it on a laptop
  python3 radical_edge.py --edge --url https://HOST:8000   on a login node
  python3 radical_edge.py --call EDGE/sysinfo/homedir      ask an edge something

Run:       --bridge  --edge        the meeting point; plugins on this machine; or both
  --url URL[,URL]                  the bridge's address                  [RADICAL_BRIDGE_URL]
  --cert FILE|sha256:HEX           trust it; of a bridge: its own        [RADICAL_BRIDGE_CERT]
  --key FILE                       a bridge's private key                [RADICAL_BRIDGE_KEY]
  -n, --name NAME                  of the edge                           [this host's name]
  -p, --plugins NAME,...           plugins to serve, by name or prefix   [all that work]
  --plugin-file FILE               load plugins from a file (may be repeated)
  --task-limit N  --allow-pickle   tasks at a time [the CPUs]; take pickles, which are remote code
  --staging-root DIR               where files may be moved (may be repeated) [home, temporary]
  --host HOST  --port PORT         where a bridge listens                [127.0.0.1:{DEFAULT_PORT}]
  --allow-host NAME                another name of the bridge, for browsers (may be repeated)
  --tunnel none|reverse|forward|relay   of an edge that an edge started: how to reach the bridge
  --tunnel-via HOST                ... by way of this login node         [where it was submitted]
  --state DIR                      where sessions and jobs are kept      [~/.radical/edge/state]
  --request-timeout S  --heartbeat S  --grace S    the longest request, pings, waiting for an edge
  --limit NAME=NUMBER              change a limit, such as request-rate=100 (may be repeated)
  --client-key FILE                sign requests; of an edge: demand it  [RADICAL_CLIENT_KEY]
  --policy FILE                    what an edge allows       [~/.radical/edge/policy.json, if there]
  --insecure  --no-auth            allow plain HTTP to other hosts; let everybody in
  --detach                         go on in the background, with files pid and log beside the state
Ask:       --list                  edges and plugins
  --call EDGE/PLUGIN/ROUTE [JSON]  POST with JSON, else GET; {{sid}} in ROUTE opens a session
  --events [EDGE/PLUGIN/TOPIC]     print events, one JSON object a line
  --put LOCAL EDGE:PATH            send a file or directory; the same again goes on after a break
  --get EDGE:PATH LOCAL            fetch one           [--overwrite: replace what is there]
  --check                          say, line by line, what works, and what to do about the rest
Tokens:    --token add NAME [--scope admin|client|read|edge] [--expires 30d] [--edges PATTERN]
           --token list | --token revoke NAME       [RADICAL_BRIDGE_TOKEN, or its file's name in
           --token keygen NAME: a --client-key       RADICAL_BRIDGE_TOKEN_FILE]
Other:     --log-level LEVEL [RADICAL_LOG_LVL]   --log json   --version   -h, --help
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where the help is."""

    def error(self, message: str) -> Any:
        self.exit(2, f"radical_edge: {message}; see --help\n")

    def format_help(self) -> str:
        return _HELP


def _whole_number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _port(text: str) -> int:
    """Return a port to listen at, 0 for any that is free."""
    number = _whole_number(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: take 0 to 65535")
    return number


def _duration(text: str) -> float:
    if not re.fullmatch(r"[0-9]{0,9}(\.[0-9]{1,9})?", text) or not float(text or 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return float(text)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; _HELP must name each of its options."""
    # with a width it need not import shutil to find that of the terminal; the help is _HELP anyway
    parser = _Parser(prog="radical_edge", allow_abbrev=False,
                     formatter_class=functools.partial(argparse.HelpFormatter, width=100))
    for flag in ("--bridge", "--edge", "--list", "--check", "--insecure", "--no-auth",
                 "--allow-pickle", "--detach", "--overwrite"):
        parser.add_argument(flag, action="store_true")
    for flag in ("--url", "--cert", "--key", "--state", "--host", "--scope", "--expires",
                 "--edges", "--log-level", "--tunnel-via", "--client-key", "--policy"):
        parser.add_argument(flag)
    parser.add_argument("-n", "--name")
    # "--tunnel" alone is what edges of radical.edge 0.x give to their children
    parser.add_argument("--tunnel", nargs="?", const="reverse", default="none",
                        choices=TUNNEL_MODES)
    parser.add_argument("--port", type=_port, default=DEFAULT_PORT)
    parser.add_argument("-p", "--plugins")
    for flag in ("--plugin-file", "--allow-host", "--limit", "--staging-root"):
        parser.add_argument(flag, action="append", default=[])
    parser.add_argument("--log", choices=("text", "json"), default="text")
    parser.add_argument("--task-limit", type=_whole_number)
    parser.add_argument("--request-timeout", type=_duration, default=REQUEST_S)
    parser.add_argument("--heartbeat", type=_duration, default=HEARTBEAT_S)
    parser.add_argument("--grace", type=lambda text: 0.0 if text == "0" else _duration(text),
                        default=GRACE_S)
    parser.add_argument("--call", nargs="+", metavar=("EDGE/PLUGIN/ROUTE", "JSON"))
    parser.add_argument("--events", nargs="?", const="", metavar="EDGE/PLUGIN/TOPIC")
    parser.add_argument("--put", nargs=2, metavar=("LOCAL", "EDGE:PATH"))
    parser.add_argument("--get", nargs=2, metavar=("EDGE:PATH", "LOCAL"))
    parser.add_argument("--token", nargs="+", metavar=("add|list|revoke|keygen", "NAME"))
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line; return the exit status: 0, 1 when it failed, 2 for wrong usage.

    Ends the process itself, with that status, when threads are left; see _end_process().
    """
    status = _run_safely(argv)
    if threading.active_count() > 1:
        _end_process(status)
    return status


def _run_safely(argv: Optional[List[str]]) -> int:
    """Run a command; return the exit status. What was expected to fail is one line of text."""
    try:
        try:
            return _run(make_parser().parse_args(argv))      # --help writes, too
        finally:
            sys.stdout.flush()
    except BrokenPipeError:                       # the reader (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # for Python's last flush
        return 0
    except (EdgeError, ValueError, OSError) as error:
        text = error.detail if isinstance(error, EdgeError) else str(error)
        print(f"radical_edge: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace) -> int:
    _configure_logging(options.log_level or os.environ.get("RADICAL_LOG_LVL") or "INFO",
                       serving=options.bridge or options.edge, as_json=options.log == "json")
    for text in options.limit:
        set_limit(text)
    if options.insecure:
        os.environ["RADICAL_BRIDGE_INSECURE"] = "1"
    if options.token:
        return _run_token(options)
    _use_client_key(options)
    if options.check:
        return _run_check(options)
    if options.bridge or options.edge:
        return _serve(options)
    if options.list:
        return _run_list(options)
    if options.call:
        return _run_call(options)
    if options.events is not None:
        return _run_events(options)
    if options.put:
        return _run_put(options)
    if options.get:
        return _run_get(options)
    print(_HELP, end="")
    return 2


class _LogFormatter(logging.Formatter):
    """Formats a record's time once a second, which halves the cost of a line."""

    _second, _text = -1, ""

    def formatTime(self, record: logging.LogRecord, datefmt: Optional[str] = None) -> str:
        second = int(record.created)
        if second != self._second:
            self._text = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
            self._second = second
        return f"{self._text}.{record.msecs:03.0f}"


class _JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: time, level, role, message, and error if there was one.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": record.created, "level": record.levelname, "logger": record.name,
                 "message": record.getMessage()}
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def _configure_logging(level: str, *, serving: bool, as_json: bool = False) -> None:
    number = logging.getLevelName(level.upper())
    if not isinstance(number, int):
        raise ValueError(f"--log-level {level}: take DEBUG, INFO, WARNING or ERROR")
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if as_json else
                         _LogFormatter("%(asctime)s %(levelname).1s %(name)s: %(message)s"))
    logging.basicConfig(level=number if serving else max(number, logging.WARNING),
                        handlers=[handler])
    # a line for every request: spare what the format does not show
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None                       # type: ignore[attr-defined]


# -- serving

def _serve(options: argparse.Namespace) -> int:
    """Run a bridge or an edge until a signal, or until it is told to end; of both, make a pair."""
    _raise_file_limit()
    name = BRIDGE_NAME if options.bridge else options.name or default_edge_name()
    detached = _Detached(_state_dir(options, name)) if options.detach else None
    pair = _Pair() if options.bridge and options.edge else None
    is_edge = options.edge if pair is None else pair.is_edge
    done = _Ending(keeps_terminal=detached is None and os.isatty(0))
    # taken out of the environment, or every program that a plugin runs would inherit it
    token = os.environ.pop("RADICAL_BRIDGE_TOKEN", None)
    service: Any = None
    try:
        if is_edge:
            service = _start_edge(options, token, pair, done)
        else:
            service = _start_bridge(options, token, done)
            if pair is not None:
                pair.start_edge(service.url)
        _settle_memory()
        if detached is not None:
            detached.on_up(leads=pair is None or not is_edge)
        if pair is not None and is_edge:
            pair.tell_up()

        def on_hangup() -> None:
            service.reload()
            if detached is not None:
                detached.reopen_log()
            if pair is not None:
                pair.pass_hangup()

        return done.wait(on_hangup, pair)
    except _OtherFailed:
        return 1                                  # it has said why
    finally:
        if pair is not None:
            pair.end()                            # the edge takes its leave of the bridge
        if service is not None:
            service.stop()
        if detached is not None:
            detached.on_end()


class _OtherFailed(Exception):
    """The other process of a pair could not start."""


class _Pair:
    """The bridge and the edge of one command: two processes, as either of them sees the other.

    The edge is forked off the bridge's process. So what a plugin does to its interpreter, which it
    may block, fill up or crash, does not touch the bridge. Over a socket the bridge says where it
    is, then the edge that it is up; the socket's end says that the other one has ended. Nothing
    may have started a thread before.
    """

    END_S = 5.0                # for the edge's end, before it is killed

    def __init__(self) -> None:
        sys.stdout.flush()                        # or both would write what is in the buffer
        gc.freeze()                               # what both have stays where both have it
        near, far = socket.socketpair()
        self._pid = os.fork()                     # of the edge; 0 in the edge, and when it is gone
        self.is_edge = self._pid == 0
        self._socket, other = (far, near) if self.is_edge else (near, far)
        other.close()

    def fileno(self) -> int:
        """Return what can be read when the other process has ended."""
        return self._socket.fileno()

    def on_other_ended(self) -> Optional[int]:
        """Return the status with which this process ends as well, None when it goes on alone."""
        if self.is_edge:
            return 0
        status = self._reap()
        if status == 0:
            bridge_log.info("the edge of this bridge has ended")
            return None
        bridge_log.error("the edge of this bridge was ended by %s: the bridge ends as well",
                         f"signal {-status}" if status < 0 else f"an error (status {status})")
        return 1

    # -- in the bridge

    def start_edge(self, url: str) -> None:
        """Let the edge dial, and wait until it is up. Raises _OtherFailed."""
        try:
            self._socket.sendall(f"{url}\n".encode())
            is_up = self._socket.recv(1)
        except OSError:                           # it has ended already
            is_up = b""
        if not is_up:
            raise _OtherFailed

    def pass_hangup(self) -> None:
        """Let the edge read its files again, too."""
        if self._pid:
            os.kill(self._pid, signal.SIGHUP)

    def end(self) -> None:
        """Let the edge end, and wait for that."""
        if not self._pid:
            return
        self._socket.settimeout(self.END_S)
        try:
            self._socket.shutdown(socket.SHUT_WR)
            while self._socket.recv(1):           # it may have come up just now
                pass
        except OSError:                           # it is stuck, or has ended already
            os.kill(self._pid, signal.SIGKILL)
        self._reap()

    def _reap(self) -> int:
        """Return the status with which the edge ends, or minus the number of a signal. Blocks."""
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return os.waitstatus_to_exitcode(status)

    # -- in the edge

    def find_bridge(self) -> str:
        """Return the bridge's URL as soon as it serves. Raises _OtherFailed."""
        with self._socket.makefile("r", encoding="utf-8") as file:
            url = file.readline().strip()
        if not url:
            raise _OtherFailed
        return url

    def tell_up(self) -> None:
        """Tell the bridge that its edge is up."""
        with contextlib.suppress(OSError):        # it has ended
            self._socket.sendall(b"1")


class _Ending:
    """What the main thread waits for: SIGTERM, Ctrl-C, or set() by any thread.

    SIGHUP means "read your files again", unless it says that our terminal is closed.
    Not a threading.Event: when the system hands a signal to another thread, the main thread would
    not wake to see it. The byte that Python writes to the wake-up descriptor does wake it.
    """

    def __init__(self, *, keeps_terminal: bool) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._signals = 0
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if not keeps_terminal:
            signal.signal(signal.SIGHUP, lambda number, frame: None)

    def set(self) -> None:
        """End the wait. Any thread."""
        with contextlib.suppress(BlockingIOError):               # full: it was set often enough
            self._writer.send(b"\0")

    def wait(self, on_hangup: Callable[[], None], pair: Optional[_Pair]) -> int:
        """Return the exit status when it is time to end; call `on_hangup` for each SIGHUP before.

        pair: of which this process is one, if any; the other one's end may be the time to end, too.
        """
        sources: List[Any] = [self._reader] if pair is None else [self._reader, pair]
        while True:
            readable, _, _ = select.select(sources, [], [])
            if self._reader not in readable:
                status = pair.on_other_ended()
                if status is not None:
                    return status
                sources.remove(pair)
            elif self._reader.recv(1)[0] == signal.SIGHUP:
                on_hangup()
            else:
                return 0

    def _on_signal(self, _number: int, _frame: Any) -> None:
        self._signals += 1
        if self._signals > 1:
            os._exit(1)                           # asked twice


class _Detached:
    """The process in the background that --detach leaves, with its files `pid` and `log`.

    Making it forks: the first process waits until the new one is up, or has failed and said why on
    the terminal, and ends. Nothing may have started a thread before.
    """

    def __init__(self, folder: Path) -> None:
        self._pid_file, self._log = folder / "pid", folder / "log"
        with must_write(folder, OTHER_STATE):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        reader, self._writer = os.pipe()
        if os.fork():
            os.close(self._writer)
            is_up = os.read(reader, 1)
            os._exit(0 if is_up else 1)
        os.close(reader)
        os.setsid()
        if os.fork():                             # so that it can get no terminal again
            os._exit(0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def on_up(self, *, leads: bool) -> None:
        """Write to the log alone from now on.

        leads: write the process id as well, and let the first process end; of a pair, the bridge's
        process does that.
        """
        with must_write(self._log.parent, OTHER_STATE):
            if leads:
                write_private(self._pid_file, f"{os.getpid()}\n")
            descriptor = self._open_log()
        if leads:
            print(f"detached: process {os.getpid()}, {self._log}", flush=True)
        self._write_to(descriptor)
        if leads:
            os.write(self._writer, b"1")
        os.close(self._writer)

    def reopen_log(self) -> None:
        """Go on in a new file when somebody has renamed the old one, as log rotation does."""
        try:
            self._write_to(self._open_log())
        except OSError as error:
            log.error("%s cannot be opened, and the old file is written on: %s", self._log, error)

    def on_end(self) -> None:
        """Remove the file with the process id, if it is ours."""
        with contextlib.suppress(EdgeError, OSError):
            if read_private(self._pid_file) == str(os.getpid()):
                os.unlink(self._pid_file)

    def _open_log(self) -> int:
        return os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    @staticmethod
    def _write_to(descriptor: int) -> None:
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        os.close(descriptor)


def _end_process(status: int) -> None:
    """End a process that has threads left, after what others want to do at its end.

    A thread may be stuck in a plugin, and Python would wait for it; or be in the midst of a call
    into C, as one that reads the system's CA certificates to dial. exit() frees what OpenSSL
    works on under such a thread: a segmentation fault. So it is not called.
    """
    last = threading.Thread(target=atexit._run_exitfuncs, daemon=True)   # logging's is one of them
    last.start()
    last.join(EXIT_S)                             # plugins register some, which may wait for ever
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):           # nobody reads it, or it is closed
            stream.flush()
    os._exit(status)


def _settle_memory() -> None:
    """Give back what start-up needed."""
    if os.path.exists(getattr(__spec__, "cached", None) or ""):
        gc.collect()
    else:
        trim_memory()                             # compiling this file leaves 10 MB of free pages
    gc.freeze()                                   # what is left stays: no need to look at it again


def _raise_file_limit() -> None:
    """Allow as many open sockets as the system lets us."""
    try:
        import resource                           # not on every platform
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ImportError, ValueError, OSError):
        pass


def _load_plugins(options: argparse.Namespace) -> None:
    load_builtin_plugins()
    for path in options.plugin_file:
        load_plugin_file(path)


def _start_bridge(options: argparse.Namespace, token: Optional[str], done: _Ending) -> Bridge:
    host = options.host or "127.0.0.1"
    cert = options.cert or os.environ.get("RADICAL_BRIDGE_CERT")
    key = options.key or os.environ.get("RADICAL_BRIDGE_KEY")
    if not cert and not is_loopback(host) and not options.insecure:
        raise ValueError(f"--host {host} is public: give --cert and --key for TLS, or --insecure")
    wanted = options.plugins.split(",") if options.plugins and not options.edge else []
    if wanted or options.plugin_file and not options.edge:       # they weigh 3 MiB
        _load_plugins(options)
    tokens = None if options.no_auth else _open_tokens(token)

    def write_url() -> None:
        pin = _pin_of(cert) if cert else ""
        try:
            write_private(home_dir() / "url", f"{bridge.url}\n{pin}\n")
        except OSError as error:                  # it only spares others an option
            bridge_log.warning("%s cannot be written (%s): clients of this machine need --url %s",
                               home_dir() / "url", error.strerror, bridge.url)

    bridge = Bridge(host, options.port, tokens=tokens, cert=cert, key=key, plugins=wanted,
                    allow_hosts=options.allow_host, request_timeout=options.request_timeout,
                    heartbeat=options.heartbeat, grace=options.grace,
                    state_dir=_state_dir(options, BRIDGE_NAME),
                    options=_plugin_options(options), on_end=done.set, on_certificate=write_url)
    write_url()                                   # before it serves: who sees it must find it
    bridge.start()
    if tokens is None:
        bridge_log.warning("--no-auth: everybody who reaches %s can run programs as you",
                           bridge.url)
    shown = f"\nbridge: certificate {_pin_of(cert)}" if cert else ""
    print(f"bridge: {bridge.url}{shown}", flush=True)
    return bridge


def _pin_of(cert: str) -> str:
    der = ssl.PEM_cert_to_DER_cert(_first_certificate(cert))
    return f"sha256:{hashlib.sha256(der).hexdigest()}"


def _first_certificate(path: str) -> str:
    text = Path(path).read_text(encoding="ascii", errors="replace")
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    return text[text.index(begin):text.index(end) + len(end)]


def _open_tokens(given: Optional[str]) -> TokenStore:
    """Return the bridge's tokens, and the one from the environment; a first start makes one."""
    store = TokenStore(home_dir() / "tokens.json")
    if given:
        store.add_fixed("environment", given)
    elif not store.list():
        path = home_dir() / "token"
        if store.add_first("default", lambda token: write_private(path, token + "\n")):
            print(f"bridge: made a first token, in {path}", flush=True)
    return store


def _start_edge(options: argparse.Namespace, token: Optional[str], pair: Optional[_Pair],
                done: _Ending) -> Edge:
    _load_plugins(options)
    load_entry_points()
    url, cert = options.url, options.cert
    if pair is not None:
        own = pair.find_bridge()
        if not url:                               # the certificate is the bridge's own here
            url, cert = own, default_bridge()[1]
    wanted = options.plugins.split(",") if options.plugins else None
    name = options.name or default_edge_name()
    edge = Edge(url, name, plugins=wanted, token=token, cert=cert, heartbeat=options.heartbeat,
                state_dir=_state_dir(options, name), tunnel=options.tunnel,
                via=options.tunnel_via, options=_plugin_options(options),
                client_key=os.environ.get("RADICAL_CLIENT_KEY"), policy=_find_policy(options),
                find_policy=lambda: _find_policy(options), on_end=done.set)
    edge.start()
    known = "no plugins" if Plugin.get_plugin_names() else f"plugins: {WITHOUT_PLUGINS}"
    print(f"edge: {edge.name}, with {', '.join(sorted(edge.host.describe())) or known}", flush=True)
    return edge


def _plugin_options(options: argparse.Namespace) -> Dict[str, Any]:
    """Return what plugins are told of the command line."""
    if options.task_limit is not None and options.task_limit < 1:
        raise ValueError(f"--task-limit {options.task_limit}: take 1 or more")
    return {"allow_pickle": options.allow_pickle, "task_limit": options.task_limit,
            "staging_roots": options.staging_root}


def _find_policy(options: argparse.Namespace) -> Optional[Policy]:
    """Return the policy of --policy, RADICAL_EDGE_POLICY or ~/.radical/edge/policy.json, if any."""
    given = options.policy or os.environ.get("RADICAL_EDGE_POLICY")
    path = Path(given).expanduser().absolute() if given else home_dir() / "policy.json"
    if not given and not path.exists():
        return None
    os.environ["RADICAL_EDGE_POLICY"] = str(path)                # for edges that this one starts
    return Policy.load(path)


def _state_dir(options: argparse.Namespace, name: str) -> Path:
    if not options.state:
        return home_dir() / "state" / name
    path = Path(options.state).expanduser()
    return path / BRIDGE_NAME if name == BRIDGE_NAME else path   # both may have been given it


# -- asking

def _arguments(options: argparse.Namespace) -> Dict[str, Optional[str]]:
    return {"url": options.url, "cert": options.cert}


def _use_client_key(options: argparse.Namespace) -> None:
    """Let this process, and edges that it starts, find --client-key."""
    if options.client_key:
        path = Path(options.client_key).expanduser().absolute()
        os.environ["RADICAL_CLIENT_KEY"] = str(path)


def _run_list(options: argparse.Namespace) -> int:
    targets = find_bridges(**_arguments(options))
    edges = _urlopen(targets, "POST", "/edge/list")["data"]["edges"]
    for name, edge in sorted(edges.items()):
        print(f"{name}: {', '.join(sorted(edge['plugins'])) or 'no plugins'}")
    if not edges:
        print(f"no edge is connected; on the machine to reach, run:\n"
              f"  python3 radical_edge.py --edge --url {targets[0].url}")
    return 0


def _run_call(options: argparse.Namespace) -> int:
    parts = options.call[0].strip("/").split("/", 2)
    if len(parts) < 3 or len(options.call) > 2:
        raise ValueError("--call takes EDGE/PLUGIN/ROUTE and perhaps one JSON value")
    edge, plugin_name, route = parts
    body = None
    if len(options.call) > 1:
        try:
            body = json.loads(options.call[1])
        except ValueError as error:
            raise ValueError(f"--call: the second value is not JSON: {error}") from None
    value = _call_with_session(edge, plugin_name, route, body, _arguments(options))
    print(json.dumps(value, indent=2, ensure_ascii=False))
    return 0


def _call_with_session(edge: str, plugin_name: str, route: str, body: Any,
                       arguments: Dict[str, Any]) -> Any:
    """Call a route; "{sid}" in it stands for a session that is opened for this one call."""
    if "{sid}" not in route:
        return _call_either_way(edge, plugin_name, route, body, arguments)
    sid = call(edge, plugin_name, "register_session", {}, **arguments)["sid"]
    try:
        return _call_either_way(edge, plugin_name, route.replace("{sid}", sid), body, arguments)
    finally:
        call(edge, plugin_name, f"unregister_session/{sid}", {}, **arguments)


def _call_either_way(edge: str, plugin_name: str, route: str, body: Any,
                     arguments: Dict[str, Any]) -> Any:
    try:
        return call(edge, plugin_name, route, body, **arguments)
    except MethodNotAllowed:
        if body is not None:
            raise
        return call(edge, plugin_name, route, {}, **arguments)   # a POST route that needs no body


def _run_events(options: argparse.Namespace) -> int:
    edge, plugin_name, topic = [*options.events.split("/"), "", "", ""][:3]
    for event in events(edge=edge, plugin_name=plugin_name, topic=topic, **_arguments(options)):
        print(json.dumps(event, ensure_ascii=False), flush=True)
    return 0


def _run_put(options: argparse.Namespace) -> int:
    local, remote = options.put
    edge, path = _parse_remote(remote, "--put")
    os.stat(local)                                # what is not there is said before anything else
    with _open_staging(edge, options) as staging, _ProgressBar(local) as progress:
        name = os.path.basename(os.path.abspath(local))
        if path.endswith("/") or not path or not os.path.isdir(local) and _is_dir(staging, path):
            path = os.path.join(path, name)
        done = staging.put(local, path, options.overwrite, progress=progress)
    return _tell_moved(f"{edge}:{done['path']}", done)


def _run_get(options: argparse.Namespace) -> int:
    remote, local = options.get
    edge, path = _parse_remote(remote, "--get")
    with _open_staging(edge, options) as staging, _ProgressBar(remote) as progress:
        if local.endswith("/") or os.path.isdir(local) and not _is_dir(staging, path):
            local = os.path.join(local, os.path.basename(path.rstrip("/")))
        done = staging.get(path, local, options.overwrite, progress=progress)
    return _tell_moved(done["path"], done)


def _parse_remote(text: str, flag: str) -> Tuple[str, str]:
    edge, colon, path = text.partition(":")
    if not colon or not (is_valid_name(edge) or edge == BRIDGE_NAME):
        raise ValueError(f"{flag}: {text!r} is not EDGE:PATH")
    return edge, path


@contextlib.contextmanager
def _open_staging(edge: str, options: argparse.Namespace) -> Iterator[Any]:
    """Give a client of the edge's plugin staging."""
    with BridgeClient(**_arguments(options)) as bridge:
        with bridge.get_edge_client(edge).get_plugin("staging") as staging:
            if type(staging) is PluginClient:
                raise NotFound("the client's part is in plugins.py: put it beside radical_edge.py")
            yield staging


def _is_dir(staging: Any, path: str) -> bool:
    try:
        return staging.stat(path)["type"] == "dir"
    except NotFound:
        return False


def _tell_moved(where: str, done: Dict[str, Any]) -> int:
    """Say what was moved; return 1 when something was left out."""
    if "files" not in done:
        print(f"{where}: {done['size']} bytes, sha256 {done['sha256']}")
        return 0
    print(f"{where}: {done['files']} files, {done['size']} bytes")
    for name in done["skipped"]:
        print(f"radical_edge: skipped, for it is no file: {name!r}", file=sys.stderr)
    return 1 if done["skipped"] else 0


class _ProgressBar:
    """A line on a terminal that says how far a transfer is; nothing where there is no terminal."""

    EVERY_S = 0.1

    def __init__(self, title: str) -> None:
        self._title = os.path.basename(title.rstrip("/"))[:28].encode(errors="replace").decode()
        self._is_shown = sys.stderr.isatty()
        self._begun: Optional[Tuple[float, int]] = None          # time and bytes at the first call
        self._next = 0.0

    def __enter__(self) -> "_ProgressBar":
        return self

    def __exit__(self, *_exc: Any) -> None:
        if self._begun is not None:
            print(file=sys.stderr)

    def __call__(self, done: int, total: int) -> None:
        """Take notice of so many bytes."""
        now = time.monotonic()
        if not self._is_shown or now < self._next and done < total:
            return
        self._begun = self._begun or (now, done)
        self._next = now + self.EVERY_S
        rate = (done - self._begun[1]) / max(now - self._begun[0], 0.001)
        left = f"{(total - done) / rate:6.0f} s left" if rate else ""
        print(f"\r{self._title:28} {100 * done / (total or 1):4.0f}% {format_size(done):>9} "
              f"{format_size(rate):>9}/s{left:14}", end="", file=sys.stderr, flush=True)


def format_size(size: float) -> str:
    """Return a number of bytes for people, such as "1.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _run_token(options: argparse.Namespace) -> int:
    verb, *names = options.token
    store = TokenStore(home_dir() / "tokens.json")
    if verb == "list" and not names:
        for record in store.list():
            until = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["expires"])) \
                if record["expires"] else "never"
            print(f"{record['name']:20} {record['scope']:8} edges {record['edges']:12} "
                  f"expires {until}")
    elif verb == "add" and len(names) == 1:
        expires = time.time() + parse_lifetime(options.expires) if options.expires else None
        print(store.add(names[0], options.scope or "client", expires=expires,
                        edges=options.edges or "*"))
    elif verb == "revoke" and len(names) == 1:
        store.revoke(names[0])
        print(f"revoked: {names[0]}; a running bridge notices within {RELOAD_S:.0f} s")
    elif verb == "keygen" and len(names) == 1:
        path = Path(options.client_key or home_dir() / "client.key").expanduser()
        if path.exists():
            raise Conflict(f"{path} is there already: give another file with --client-key")
        with must_write(path, "give another file with --client-key"):
            write_private(path, make_signing_key(names[0]) + "\n")
        print(f"{path}: a new key; clients sign with it, and an edge that has its line in the file "
              "of its --client-key lets nobody else change anything")
    else:
        raise ValueError("--token takes: add NAME, list, revoke NAME, or keygen NAME")
    return 0


# -- the doctor

def _run_check(options: argparse.Namespace) -> int:
    """Try, one after the other, what an edge and a client need; return 1 when something fails."""
    results = [_check_step("files", lambda: _check_files(options))]
    results += [_check_bridge(target) for target in find_bridges(**_arguments(options))]
    return 0 if _check_plugins(options) and all(results) else 1


def _check_files(options: argparse.Namespace) -> str:
    """Check the files with secrets, the policy, and that state can be written."""
    found = [name for name in ("token", "tokens.json") if read_private(home_dir() / name)]
    if find_signer(options.client_key) is not None:
        found.append("a client's key")
    if _find_policy(options) is not None:
        found.append("a policy")
    folder = _state_dir(options, options.name or default_edge_name())
    probe = folder / f".check.{secrets.token_hex(4)}"
    with must_write(folder, OTHER_STATE):
        write_private(probe, "some bytes")
        os.unlink(probe)
    return f"{folder} can be written; there is {', '.join(found) or 'nothing else'}"


def _check_clock(target: Target) -> str:
    """Compare clocks: expiry dates and signatures depend on them."""
    from email.utils import parsedate_to_datetime
    connection = connect(target, HANDSHAKE_S)
    try:
        connection.request("GET", target.url.prefix + "/health")
        date = connection.getresponse().headers.get("Date", "")
    finally:
        connection.close()
    try:
        ahead = time.time() - parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return "the bridge does not tell its time"
    if abs(ahead) > SIGNATURE_S / 2:
        raise Unavailable(f"differs from the bridge's by {abs(ahead):.0f} s: set it by NTP")
    return f"differs from the bridge's by {abs(ahead):.0f} s"


def _check_bridge(target: Target) -> bool:
    steps: List[Tuple[str, Callable[[], str]]] = [
        ("name", lambda: _check_name(target)), ("route", lambda: _check_route(target)),
        ("TLS", lambda: _check_tls(target)), ("clock", lambda: _check_clock(target)),
        ("token", lambda: _check_token(target)),
        ("upgrade", lambda: _check_upgrade(target))]
    print(f"bridge   {target.url}")
    # after one that fails, what follows would fail for the same reason
    return all(_check_step(name, step) for name, step in steps)


def _check_step(name: str, step: Callable[[], str]) -> bool:
    try:
        print(f"{name:8} ok: {step()}")
        return True
    except (EdgeError, Refused, ProtocolError, ValueError, OSError) as error:
        text = error.detail if isinstance(error, EdgeError) else explain(error)
        print(f"{name:8} FAILED: {text}")
        return False


def _check_name(target: Target) -> str:
    proxy = find_proxy(target.url)
    if proxy is not None:
        return f"left to the proxy {proxy.host}:{proxy.port} (from the environment)"
    found = socket.getaddrinfo(target.url.host, target.url.port, type=socket.SOCK_STREAM)
    return f"{target.url.host} is {found[0][4][0]}"


def _check_route(target: Target) -> str:
    proxy = find_proxy(target.url)
    started = time.monotonic()
    (_open_tunnel(proxy, target.url) if proxy else _open_tcp(target.url)).close()
    way = f"through the proxy {proxy.host}:{proxy.port}" if proxy else "directly"
    return f"connected {way} in {(time.monotonic() - started) * 1000:.0f} ms"


def _check_tls(target: Target) -> str:
    if not target.url.tls:
        return "not used; fine within one machine or a tunnel"
    with open_connection(target.url, target.cert) as sock:
        ends = sock.getpeercert().get("notAfter")                # of a pinned one it is not told
        days = (ssl.cert_time_to_seconds(ends) - time.time()) / 86400 if ends else None
        until = f", for {days:.0f} more days" if days is not None else ""
        return f"{sock.version()}, verified by {target.cert or 'the CAs of this system'}{until}"


def _check_token(target: Target) -> str:
    if not target.token:
        raise Unauthorized(f"there is none: set RADICAL_BRIDGE_TOKEN or write it to "
                           f"{home_dir() / 'token'} (chmod 600)")
    try:
        edges = _urlopen([target], "GET", "/edges", timeout=HANDSHAKE_S)["edges"]
    except Forbidden:                             # an edge's token is for registering alone
        return "accepted, though not for clients"
    return f"accepted; edges: {', '.join(edge['name'] for edge in edges) or 'none yet'}"


def _check_upgrade(target: Target) -> str:
    sock, _ = open_websocket(*target)
    sock.close()
    return "the bridge speaks WebSocket with us"


def _check_plugins(options: argparse.Namespace) -> bool:
    """Load the plugins as an edge would, and say which work here."""
    load_builtin_plugins()
    for path in options.plugin_file:
        load_plugin_file(path)
    load_entry_points()
    import tempfile
    with tempfile.TemporaryDirectory() as scratch:
        host = PluginHost("check", ROLE_EDGE, Path(scratch), notify=lambda *_: None,
                          changed=lambda: None, policy=_find_policy(options))
        names = select_plugins(options.plugins.split(",") if options.plugins else None)
        tried, described = host.load(names), host.describe()
        for name in tried:
            problem = described.get(name, {}).get("ui_problem")
            fine = f"ok, but its page is plain: {problem}" if problem else "ok"
            print(f"plugin   {name}: {host.disabled.get(name, fine)}")
            for remark in host.remarks(name):
                print(f"         {remark}")
        host.stop()
    if not names:
        print(f"plugin   {WITHOUT_PLUGINS}")
    return True


if __name__ == "__main__":
    sys.exit(main())
