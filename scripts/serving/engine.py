"""One thread that owns the decoders; everybody else talks to it through a queue.

    event loop ── submit, cancel ──> SimpleQueue ──> engine thread: commands → one step of a decoder → updates
    event loop <── call_soon_threadsafe, once per step ────────────────────────────────────────────────┘

Nothing of a decoder, a request or an answer's text is touched by two threads: a job's inputs are handed over whole, and
updates are immutable. What both sides read, the counters of jobs, stands behind a lock.

Several models (a base and its LoRA adapters) have a decoder each, since merged weights cannot share a batch. Busy ones
take turns, a step each: nobody waits for another model's answers to end, nor longer for a turn than the others' steps
take. Within a decoder requests are admitted and their prompts taken in in the order they came.

中文：推理引擎线程：独占解码器，通过线程安全队列与事件循环通信；支持排队、取消、超时。
"""

import asyncio
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from model.generation import NOT_A_NUMBER, Event, Request, Sampling
from scripts.serving.text_stream import AnswerText, Delta

log = logging.getLogger("minimind.serving")


class AnyDecoder(Protocol):
    """What the engine needs of a decoder: `model.generation.Decoder`, or one with the same methods."""

    slots: int
    max_seq_len: int
    running: Sequence[Request]

    @property
    def busy(self) -> bool: ...
    def add(self, prompt_ids: Sequence[int], sampling: Sampling) -> Request: ...
    def cancel(self, request: Request) -> None: ...
    def step(self) -> list[Event]: ...


class QueueFull(Exception):
    """No place is free. retry_after: seconds until one probably is."""

    def __init__(self, retry_after: int):
        super().__init__(f"The server is busy: try again in {retry_after} s.")
        self.retry_after = retry_after


class EngineDown(Exception):
    """The engine has stopped, or never worked."""


class TokenLogp(NamedTuple):
    """A drawn token, its log-probability, and the likeliest tokens at its place with theirs."""

    token: int
    logp: float
    top: list[tuple[int, float]]


class Update(NamedTuple):
    """What became of a job in one step.

    index: which job of its group; deltas: new pieces of its text; tokens: drawn so far, the stop token included;
    logps: of the tokens of this step, where asked for; finish: None, "stop", "length", "timeout", "cancelled" or
    "error", the latter with a message; vector: the result of an embedding.
    """

    index: int
    deltas: list[Delta] = []
    tokens: int = 0
    logps: list[TokenLogp] = []
    finish: str | None = None
    error: str = ""
    vector: list[float] | None = None


@dataclass(eq=False)
class Job:
    """One answer to be written. Belongs to the engine from `submit` on.

    Args: text: reads the answer; None: an embedding of the prompt is wanted. deadline, started (when the request was
    there): on time.monotonic's clock.
    """

    model: str
    index: int
    prompt: list[int]
    sampling: Sampling
    text: AnswerText | None
    deadline: float
    inbox: "asyncio.Queue[Update]"
    started: float = field(default_factory=time.monotonic)
    request: Request | None = None
    over: bool = False


Embed = Callable[[str, list[int]], Iterator[list[float] | None]]


class Engine:
    """Answers jobs on a thread of its own.

    Args:
        decoders: by model name.
        loop: where updates are delivered.
        max_queue: jobs per model that may wait beside those that run.
        embed: (model, prompt) → an iterator that yields None after each share of the work, and the vector at the end.
    """

    def __init__(
        self,
        decoders: Mapping[str, AnyDecoder],
        loop: asyncio.AbstractEventLoop,
        max_queue: int = 64,
        embed: Embed | None = None,
    ):
        self.decoders, self.loop, self.max_queue, self.embed = dict(decoders), loop, max_queue, embed
        self.commands: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self.lock = threading.Lock()  # guards `open`, `mean_seconds` and `down`
        self.open = dict.fromkeys(self.decoders, 0)  # jobs submitted and not over, by model
        self.mean_seconds = 1.0
        self.down: str | None = "not started"
        # Below: the thread's own.
        self.turns = list(self.decoders)  # whose step is next: the first that is busy
        self.jobs: dict[Request, Job] = {}
        self.embeddings: deque[tuple[Job, Iterator[list[float] | None]]] = deque()
        self.updates: list[tuple[Job, Update]] = []
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- called from the event loop

    def start(self) -> None:
        self.down = None
        self.thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """Ends the thread; open jobs get a last update. Blocks up to `timeout` seconds."""
        self.commands.put(("stop", None))
        self.thread.join(timeout)

    def capacity(self, model: str) -> int:
        return self.decoders[model].slots + self.max_queue

    def retry_after(self, model: str, jobs: int) -> int:
        """Seconds until so many jobs probably find a place; 0: now."""
        with self.lock:
            return self._retry_after(model, jobs)

    def _retry_after(self, model: str, jobs: int) -> int:
        ahead = self.open[model] + jobs - self.capacity(model)
        seconds = self.mean_seconds * ahead / self.decoders[model].slots
        return min(max(math.ceil(seconds), 1), 60) if ahead > 0 else 0

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hands over the jobs of one model, all or none.  Raises: QueueFull, EngineDown."""
        model = jobs[0].model
        with self.lock:
            if self.down:
                raise EngineDown(self.down)
            if seconds := self._retry_after(model, len(jobs)):
                raise QueueFull(seconds)
            self.open[model] += len(jobs)
            for job in jobs:  # inside the lock: a failing engine sees either none of them or all
                self.commands.put(("add", job))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Takes jobs back before the next step; those that are over stay as they are."""
        for job in jobs:
            self.commands.put(("cancel", job))

    def counts(self) -> tuple[int, int]:
        """(running, waiting) jobs."""
        with self.lock:
            running = sum(min(n, self.decoders[model].slots) for model, n in self.open.items())
            return running, sum(self.open.values()) - running

    # -- on the engine thread

    def _run(self) -> None:
        try:
            while self._take_commands(block=not self._busy()):
                self._expire()
                if (name := next((name for name in self.turns if self.decoders[name].busy), None)) is not None:
                    self.turns.remove(name)  # to the end of the line
                    self.turns.append(name)
                    self._step(name)
                if self.embeddings:
                    self._embed_some()
                self._publish()
            self._end("the server is shutting down")
        except BaseException as error:  # a decoder that cannot even drop its requests: say so to all, now and later
            log.exception("the engine stopped")
            self._end(f"the engine stopped: {error}")

    def _busy(self) -> bool:
        return bool(self.embeddings) or any(decoder.busy for decoder in self.decoders.values())

    def _take_commands(self, block: bool) -> bool:
        """Carries out what has been asked for; waits for something where there is nothing else to do. False: stop."""
        while True:
            try:
                command, job = self.commands.get(block)
            except queue.Empty:
                return True
            if command == "stop":
                return False
            if command == "add":
                self._add(job)
            elif not job.over:
                self._drop(job, "cancelled")
            block = block and not self._busy() and not self.updates

    def _add(self, job: Job) -> None:
        try:
            if job.text is None:
                self.embeddings.append((job, self.embed(job.model, job.prompt)))
            else:
                job.request = self.decoders[job.model].add(job.prompt, job.sampling)
                self.jobs[job.request] = job
        except ValueError as error:
            self._finish(job, Update(job.index, finish="error", error=str(error)))

    def _expire(self) -> None:
        now = time.monotonic()
        for job in [*self.jobs.values(), *(job for job, _ in self.embeddings)]:
            if now > job.deadline:
                self._drop(job, "timeout")

    def _drop(self, job: Job, finish: str, error: str = "") -> None:
        """Ends a job from outside; what its text held back still comes out, unless it failed."""
        if job.text is None:
            self.embeddings = deque(entry for entry in self.embeddings if entry[0] is not job)
            self._finish(job, Update(job.index, finish=finish, error=error))
            return
        self.decoders[job.model].cancel(job.request)
        deltas = [] if finish == "error" else job.text.flush()
        self._finish(job, Update(job.index, deltas, len(job.request.tokens), finish=finish, error=error))

    def _step(self, name: str) -> None:
        decoder = self.decoders[name]
        try:
            events = decoder.step()
        except Exception as error:  # out of memory, for example: these requests fail, later ones may not
            log.exception("a step of %s failed", name)
            for job in [job for job in self.jobs.values() if job.model == name]:
                self._drop(job, "error", f"The model failed: {' '.join(str(error).split())[:200]}")
            return
        for request, token, reason in events:
            job = self.jobs[request]
            try:
                self._record(job, token, reason)
            except Exception as error:  # its text, not the model: no reason to let the others down
                log.exception("an answer could not be read")
                self._drop(job, "error", f"The answer could not be read: {error}")

    def _record(self, job: Job, token: int | None, reason: str | None) -> None:
        """One token of a job, or its failure, becomes an update."""
        request, deltas, logps = job.request, [], []
        if token is not None and reason != "stop":
            deltas = job.text.push(token)
            if request.logps:
                logps = [TokenLogp(token, request.logps[-1], request.top_logps[-1])]
            if job.text.finished:
                self.decoders[job.model].cancel(request)
                reason = "stop"
        if reason:
            deltas = deltas + job.text.flush()
        error = NOT_A_NUMBER if reason == "error" else ""
        update = Update(job.index, deltas, len(request.tokens), logps, reason, error)
        if reason:
            self._finish(job, update)
        elif deltas or logps:
            self.updates.append((job, update))

    def _embed_some(self) -> None:
        """A share of the oldest embedding."""
        job, work = self.embeddings[0]
        try:
            vector = next(work)
        except Exception as error:
            log.exception("an embedding failed")
            self._drop(job, "error", f"The model failed: {' '.join(str(error).split())[:200]}")
            return
        if vector is not None:
            self.embeddings.popleft()
            self._finish(job, Update(job.index, tokens=len(job.prompt), finish="stop", vector=vector))

    def _finish(self, job: Job, last: Update) -> None:
        job.over = True
        self.jobs.pop(job.request, None)
        with self.lock:
            self.open[job.model] -= 1
            if last.finish in ("stop", "length"):
                self.mean_seconds += 0.1 * (time.monotonic() - job.started - self.mean_seconds)
        self.updates.append((job, last))

    def _publish(self) -> None:
        """Wakes the event loop, once for all updates of a step."""
        if self.updates:
            batch, self.updates = self.updates, []
            self.loop.call_soon_threadsafe(self._deliver, batch)

    @staticmethod
    def _deliver(batch: list[tuple[Job, Update]]) -> None:
        for job, update in batch:
            job.inbox.put_nowait(update)

    def _end(self, reason: str) -> None:
        """Nothing is accepted any more; what is open fails."""
        with self.lock:
            self.down = reason
        while True:  # `submit` cannot add to the queue from here on
            try:
                command, job = self.commands.get(block=False)
            except queue.Empty:
                break
            if command == "add":
                self._finish(job, Update(job.index, finish="error", error=reason))
        for job in [*self.jobs.values(), *(job for job, _ in self.embeddings)]:
            self._finish(job, Update(job.index, finish="error", error=reason))
        if not self.loop.is_closed():
            self._publish()
