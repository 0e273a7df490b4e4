"""The answers of a request on their way: from the engine's updates to a reply, whole or streamed, or to nobody.

A client that hangs up is noticed while its answer is being written, and the answer is taken back.

中文：等待引擎的更新并组成回复；客户端断开即取消。
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi import Request
from fastapi.responses import Response

from scripts.serving.engine import Engine, Job, Update
from scripts.serving.fields import ApiError
from scripts.serving.http_server import STALLED_SECONDS
from scripts.serving.metrics import Metrics
from scripts.serving.replies import ChatReply, Choice

KEEP_ALIVE = b": waiting\n\n"  # a comment, for proxies that end silent connections
KEEP_ALIVE_SECONDS = 15


class Unread(Exception):
    """The client went away before its answer was complete."""


class EventStream(Response):
    """Server-sent events. `finish` runs in any case: at the end, when the client hangs up, or when it reads no more."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes], deadline: float, finish: Callable[[], None], name: str):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", "x-request-id": name})
        del self.headers["content-length"]
        self.chunks, self.deadline, self.finish = chunks, deadline, finish

    async def __call__(self, scope, receive, send) -> None:
        gone = asyncio.create_task(until_gone(receive))
        pump = asyncio.create_task(self.pump(send))
        try:
            # The engine keeps the deadline; a pump that is still at it afterwards has a reader that does not read.
            seconds = self.deadline + STALLED_SECONDS - time.monotonic()
            done, _ = await asyncio.wait({gone, pump}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if pump in done:
                pump.result()
            elif not done:
                scope.get("state", {}).get("abort", lambda: None)()
        finally:
            self.finish()
            for task in (gone, pump):
                task.cancel()
            await asyncio.gather(gone, pump, return_exceptions=True)

    async def pump(self, send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self.chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_gone(receive: Callable[[], Awaitable[dict]]) -> None:
    """Returns when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Awaitable[None]) -> None:
    """Waits for the work.  Raises: Unread when the client hangs up first."""
    gone = asyncio.create_task(until_gone(request.receive))
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Unread
        task.result()
    finally:
        for one in (gone, task):
            one.cancel()
        await asyncio.gather(gone, task, return_exceptions=True)


class Waiting:
    """The answers of one request while they come."""

    def __init__(self, engine: Engine, metrics: Metrics, jobs: list[Job], prompt_tokens: int):
        self.engine, self.metrics, self.jobs, self.prompt_tokens = engine, metrics, jobs, prompt_tokens
        self.model, self.deadline, self.inbox = jobs[0].model, jobs[0].deadline, jobs[0].inbox
        self.choices = [Choice(job.index) for job in jobs]
        self.began, self.first = jobs[0].started, 0.0

    async def updates(self, patience: float | None = None) -> AsyncIterator[Update | None]:
        """Updates until all answers are complete; None whenever there was none for `patience` seconds.

        Raises: ApiError 500, 504.
        """
        left = len(self.jobs)
        while left:
            try:
                update = (
                    await asyncio.wait_for(self.inbox.get(), patience)
                    if self.inbox.empty()
                    else self.inbox.get_nowait()
                )
            except asyncio.TimeoutError:
                yield None
                continue
            self.first = self.first or time.monotonic()
            left -= update.finish is not None
            if update.finish in ("timeout", "error", "cancelled"):
                self.choices[update.index].finish = update.finish
                raise self.failure(update)
            yield update

    def failure(self, update: Update) -> ApiError:
        if update.finish == "timeout":
            seconds = f"{self.deadline - self.began:.0f}"
            return ApiError(504, f"The answer was not complete after {seconds} s.", code="timeout", kind="timeout")
        return ApiError(500, update.error or "The answer was cancelled.")

    async def all(self) -> None:
        async for update in self.updates():
            self.choices[update.index].take(update)

    async def stream(self, reply: ChatReply) -> AsyncIterator[bytes]:
        """The reply as server-sent events; what goes wrong from here on is an event too."""
        try:
            for chunk in reply.begin(self.choices):
                yield chunk
            async for update in self.updates(KEEP_ALIVE_SECONDS):
                if update is None:
                    yield KEEP_ALIVE
                else:
                    for chunk in reply.chunks(self.choices[update.index], update):
                        yield chunk
            for chunk in reply.end(self.choices, self.prompt_tokens):
                yield chunk
        except ApiError as error:
            yield reply.error(error.body())

    def close(self) -> None:
        """Takes back what is not finished, and counts."""
        self.engine.cancel([job for job in self.jobs if self.choices[job.index].finish is None])
        metrics, now = self.metrics, time.monotonic()
        tokens = sum(choice.tokens for choice in self.choices)
        metrics.tokens.add(tokens, self.model)
        for choice in self.choices:
            metrics.finished.add(1, self.model, choice.finish_reason or "cancelled")
        metrics.duration.observe(now - self.began)
        if self.first:
            metrics.first_token.observe(self.first - self.began)
            if tokens > 1:
                metrics.per_token.observe((now - self.first) / tokens)
