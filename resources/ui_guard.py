"""A guard in front of Dagster's UI, which itself asks nobody who they are and takes requests from any web page.

A page that a user happens to visit can send requests to a port of this machine. After DNS rebinding it does so even
under its own name. The guard lets through what carries the UI's own host, comes from the UI's own pages (or from no
browser at all), and changes nothing unless it is a POST of JSON.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from graphql import GraphQLError, OperationDefinitionNode, OperationType, parse

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

GRAPHQL = "/graphql"
#: Paths, beside GraphQL, that a POST may reach: reports of events from outside. All of them write.
REPORTS = ("/report_asset_materialization", "/report_asset_check", "/report_asset_observation")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SCHEMES = {"http": 80, "https": 443, "ws": 80, "wss": 443}
#: Largest body that is read in order to look for mutations.
LIMIT = 16 * 2**20
_HOST = re.compile(r"[A-Za-z0-9._-]+(:\d+)?|\[[0-9A-Fa-f:.]+\](:\d+)?")
_log = logging.getLogger("compression_dags.ui")


@dataclass(frozen=True)
class Address:
    """A host name (lower case, or an IP address in its shortest form) and a port; None: any port."""

    host: str
    port: int | None

    @classmethod
    def of(cls, text: str, default: int | None = None) -> Address | None:
        """`name`, `name:port`, `[v6]:port`; None for anything else."""
        try:
            parts = urlsplit(f"//{text}")
            host, port = parts.hostname, parts.port
        except ValueError:
            return None
        if not host or text != parts.netloc or text.endswith(":") or not _HOST.fullmatch(text):
            return None
        return cls(plain_host(host), default if port is None else port)

    def covers(self, other: Address) -> bool:
        return self.host == other.host and self.port in (None, other.port)


def plain_host(host: str) -> str:
    """A host in one spelling: brackets, a final dot, upper case and long forms of an address gone."""
    host = host.strip("[]").rstrip(".").lower()
    try:
        return ipaddress.ip_address(host).compressed
    except ValueError:
        return host


class Refused(Exception):
    """Why a request does not pass, and the status that says so."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


@dataclass
class Guard:
    """ASGI middleware; see the module.

    Attributes:
        host, port: what the server listens on.
        allowed: further names, `NAME` or `NAME:PORT`, e.g. of a reverse proxy.
        read_only: refuse everything that changes something.
    """

    app: App
    host: str
    port: int
    allowed: Iterable[Address] = ()
    read_only: bool = False
    _own: tuple[Address, ...] = field(init=False)

    def __post_init__(self) -> None:
        names = dict.fromkeys((plain_host(self.host), *LOOPBACK))
        self._own = (*(Address(name, self.port) for name in names), *self.allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            await self.app(scope, receive, send)
            return
        try:
            self._check_origin(scope)
            if scope["type"] == "websocket":
                await self.app(scope, self._listened(receive, send) if self.read_only else receive, send)
                return
            receive = await self._checked_request(scope, receive)
        except Refused as refused:
            _log.warning("refused %s %s: %s", scope.get("method", "WEBSOCKET"), ascii(scope["path"])[:200], refused)
            await (_close(send) if scope["type"] == "websocket" else _answer(send, refused))
            return
        await self.app(scope, receive, _unframed(send))

    # -- who asks ------------------------------------------------------------------------------------------------------

    def _check_origin(self, scope: Scope) -> None:
        """Host, Origin and what the browser says of the page that sends the request."""
        host = self._own_host(scope)
        origin = _header(scope, b"origin")
        if origin is not None and not _same(origin, host):
            raise Refused(403, f"the request comes from {ascii(origin)[:120]}, which is not a page of this UI")
        site = _header(scope, b"sec-fetch-site")
        if site not in (None, "same-origin", "none") and not _opens_page(scope):
            raise Refused(403, f"the request comes from another site ({ascii(site)[:40]})")

    def _own_host(self, scope: Scope) -> str:
        text = _header(scope, b"host")
        address = Address.of(text, 80) if text else None
        if text is None or address is None:
            raise Refused(400, "the request has no host that can be read")
        here = scope.get("server") or (None, None)
        bound = Address(plain_host(str(here[0])), self.port)  # of a wildcard, the address the client came to
        if not any(own.covers(address) for own in (*self._own, bound)):
            raise Refused(
                403, f"{ascii(text)[:120]} is not a name of this UI; --allow-host {ascii(text)[:120]} adds it"
            )
        return text

    # -- what is asked -------------------------------------------------------------------------------------------------

    async def _checked_request(self, scope: Scope, receive: Receive) -> Receive:
        method, path = scope["method"], scope["path"].rstrip("/") or "/"
        if not path.startswith("/"):
            raise Refused(400, "the request has no path")
        if method in {"GET", "HEAD"}:
            if path == GRAPHQL:
                _check_queries(_queries_of(scope), "GET changes nothing; send mutations by POST")
            elif path.startswith(REPORTS):
                raise Refused(405, "reports are sent by POST")
            return receive
        if method != "POST" or not (path == GRAPHQL or path.startswith(REPORTS)):
            raise Refused(405, f"{ascii(method)[:20]} is not allowed here")
        kind = (_header(scope, b"content-type") or "").split(";")[0].strip().lower()
        if kind != "application/json":  # what any page can send unasked: forms, plain text, nothing
            raise Refused(415, "a POST must be application/json")
        if not self.read_only:
            return receive
        if path != GRAPHQL:
            raise Refused(403, "this UI is read-only")
        body = await _body(receive)
        _check_queries(_queries_in(body), "this UI is read-only")
        return _replayed(body, receive)

    def _listened(self, receive: Receive, send: Send) -> Receive:
        """A websocket that closes once its client asks for a mutation."""

        async def heard() -> Message:
            message = await receive()
            if message["type"] == "websocket.receive":
                try:
                    text = message.get("text") or message.get("bytes") or ""
                    _check_queries(_queries_in(text), "this UI is read-only")
                except Refused as refused:
                    _log.warning("closed a websocket: %s", refused)
                    await _close(send)
                    return {"type": "websocket.disconnect", "code": 1008}
            return message

        return heard


def _header(scope: Scope, name: bytes) -> str | None:
    """The value of a header; None if it is absent.

    Raises:
        Refused: it is there twice.
    """
    found = [value for key, value in scope["headers"] if key.lower() == name]
    if len(found) > 1:
        raise Refused(400, f"{name.decode()} is there {len(found)} times")
    return found[0].decode("latin-1").strip() if found else None


def _same(origin: str, host: str) -> bool:
    """Whether an Origin is the host that was asked."""
    scheme, separator, rest = origin.partition("://")
    port = _SCHEMES.get(scheme.lower())
    own, asked = (Address.of(text, port) for text in (rest, host))
    return bool(separator) and port is not None and own is not None and own == asked


def _opens_page(scope: Scope) -> bool:
    """Whether the browser opens a page in a tab, as after a click on a link: the page that links cannot read it."""
    asked = (_header(scope, b"sec-fetch-mode"), _header(scope, b"sec-fetch-dest"))
    return scope.get("method") in {"GET", "HEAD"} and asked == ("navigate", "document")


def _queries_of(scope: Scope) -> list[Any]:
    pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    return [value for key, value in pairs if key == "query"]


def _queries_in(body: str | bytes) -> list[Any]:
    """All GraphQL documents in a JSON body: one request, a batch, or a message of a websocket."""
    try:
        parsed = json.loads(body or "null")
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    requests = parsed if isinstance(parsed, list) else [parsed]
    found = []
    for request in requests:
        if isinstance(request, dict):
            payload = request.get("payload")
            found += [r["query"] for r in (request, payload) if isinstance(r, dict) and "query" in r]
    return found


def _check_queries(queries: Iterable[Any], reason: str) -> None:
    """
    Raises:
        Refused: a document that cannot be read, or with an operation that may change something.
    """
    for query in queries:
        try:
            document = parse(query, no_location=True)
        except (GraphQLError, TypeError, RecursionError):
            raise Refused(400, "the query is not GraphQL") from None
        for operation in document.definitions:
            if isinstance(operation, OperationDefinitionNode) and operation.operation is OperationType.MUTATION:
                raise Refused(403, reason)


async def _body(receive: Receive) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise Refused(400, "the client is gone")
        part = message.get("body", b"")
        parts.append(part)
        size, more = size + len(part), message.get("more_body", False)
        if size > LIMIT:
            raise Refused(413, f"the body is larger than {LIMIT} bytes")
    return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def _unframed(send: Send) -> Send:
    """Responses that no foreign page may show in a frame."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"x-frame-options", b"SAMEORIGIN")]
        await send(message)

    return sent


async def _answer(send: Send, refused: Refused) -> None:
    body = f"refused: {refused}\n".encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"x-content-type-options", b"nosniff"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _close(send: Send) -> None:
    await send({"type": "websocket.close", "code": 1008})
