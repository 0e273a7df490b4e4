"""uvicorn with limits on what a connection may do before it has said anything.

uvicorn itself waits for a request as long as the client likes (its keep-alive timeout counts only between requests) and
for a reader as long as the connection lasts. Here
    a request has to arrive whole within `receive_seconds`, counted from its first byte or from the connection's start;
    at most `max_connections` are open: a new one takes the place of one whose request is not there yet, silent ones
    before those that send, the one that has been quiet longest first; never of one that is being answered;
    a reader that stands still is cut off by the application (`scope["state"]["abort"]`) or by the kernel (Linux).

中文：在 uvicorn 之上加连接限制：接收期限、连接数上限、断开停滞的读者。
"""

import asyncio
import contextlib
import socket
import time
from typing import ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from trainer.command_line import UserError

KEEP_ALIVE_SECONDS = 75  # clients pool connections; shorter than theirs means resets
STALLED_SECONDS = 30
ARRIVING = (h11.IDLE, h11.SEND_BODY)  # states of a client whose request is not there as a whole


class BoundedProtocol(H11Protocol):
    """One connection. `bounded` makes a class of it with other limits."""

    receive_seconds: ClassVar[float] = 30.0
    max_connections: ClassVar[int] = 1000

    def __init__(self, config, server_state, app_state, _loop=None):
        super().__init__(config, server_state, {**app_state, "abort": self.abort}, _loop)
        self.receive_timer: asyncio.TimerHandle | None = None
        self.quiet_since = time.monotonic()

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            others = (c for c in self.connections if c is not self and not c.transport.is_closing())
            arriving = [c for c in others if c.conn.their_state in ARRIVING]
            order = lambda c: (ARRIVING.index(c.conn.their_state), c.quiet_since)  # noqa: E731
            min(arriving, key=order, default=self).abort()
        self.watch()

    def data_received(self, data: bytes) -> None:
        self.quiet_since = time.monotonic()
        super().data_received(data)
        self.watch()

    def watch(self) -> None:
        """Starts the clock when a request begins to arrive, stops it when it is there."""
        arriving = self.conn.their_state in ARRIVING
        if arriving and self.receive_timer is None and not self.transport.is_closing():
            self.receive_timer = self.loop.call_later(self.receive_seconds, self.abort)
        elif not arriving and self.receive_timer is not None:
            self.receive_timer.cancel()
            self.receive_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self.receive_timer is not None:
            self.receive_timer.cancel()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(STALLED_SECONDS, self.abort)  # closing waits for a reader that may never read

    def abort(self) -> None:
        """Drops the connection now, with whatever stands in its buffers."""
        self.transport.abort()


def bounded(receive_seconds: float, max_connections: int) -> type[BoundedProtocol]:
    limits = {"receive_seconds": receive_seconds, "max_connections": max_connections}
    return type("Bounded", (BoundedProtocol,), limits)


def raise_file_limit(wanted: int) -> int:
    """Connections that the system allows, after asking for `wanted`; a connection is an open file."""
    try:
        import resource
    except ImportError:  # Windows: no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = 128  # for weights, libraries and the rest
    if soft != resource.RLIM_INFINITY and soft < wanted + spare:
        most = wanted + spare if hard == resource.RLIM_INFINITY else min(wanted + spare, hard)
        with contextlib.suppress(ValueError, OSError):  # a system that promises more than it gives: stay as we are
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if soft == resource.RLIM_INFINITY else min(wanted, soft - spare)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, not yet listening; port 0: any free one.  Raises: UserError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {host} --port {port} cannot be used: {error}.") from None
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows, where SO_REUSEADDR would let two servers share the port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_SECONDS * 1000)
        sock.bind(address)
    except OSError as error:
        sock.close()
        reason = f"{error.strerror}; choose another --port, or end the program that uses it"
        raise UserError(f"{host} port {port} cannot be used: {reason}.") from None
    return sock


def make_server(app, *, receive_seconds: float, max_connections: int) -> uvicorn.Server:
    """A server to be run with `run(sockets=[listen(…)])`."""
    config = uvicorn.Config(
        app,
        http=bounded(receive_seconds, max_connections),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="error",  # a line for each malformed request would let anybody fill the disk
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=3,
        backlog=2048,
    )
    return uvicorn.Server(config)
