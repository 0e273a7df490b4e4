"""The HTTP side: endpoints, keys, limits, and what happens when somebody hangs up.

Reading order: settings → reading a request → handing it to the engine → the endpoints. Replies: waiting.py.

中文：HTTP 层：各端点、密钥校验、请求体与队列限制、断开即取消、流式返回。
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import re
import struct
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from model.generation import Sampling
from scripts.serving.engine import Engine, EngineDown, Job, QueueFull
from scripts.serving.fields import ApiError, Fields, parse_body
from scripts.serving.json_guide import JsonGuide, JsonTables
from scripts.serving.metrics import Metrics
from scripts.serving.models import ServedModels
from scripts.serving.prompts import Prompt, PromptMaker
from scripts.serving.protocol import (
    Defaults,
    EmbeddingRequest,
    Generation,
    parse_chat,
    parse_completion,
    parse_embedding,
)
from scripts.serving.replies import ChatReply, TextReply, Vocabulary, usage
from scripts.serving.text_stream import AnswerText, TextRules, is_byte_level, token_bytes
from scripts.serving.waiting import EventStream, Unread, Waiting, unless_gone

BODIES_IN_MEMORY = 64  # bodies of the largest size that may be read at a time


@dataclass(frozen=True)
class ServerSettings:
    """api_keys: any of them opens /v1 and /metrics; empty: no key is asked for. local: who has no key has to call this
    machine by a name of its own. origins: websites that may call (CORS). max_body: bytes. max_queue: answers per model
    that may wait. timeout: seconds for one request."""

    api_keys: tuple[str, ...] = ()
    local: bool = False
    origins: tuple[str, ...] = ()
    max_body: int = 1 << 20
    max_queue: int = 64
    timeout: float = 300.0
    defaults: Defaults = field(default_factory=Defaults)


class Arrived(NamedTuple):
    """A request that is there as a whole: its fields, the model it names, and when, on time.monotonic's clock."""

    fields: Fields
    model: str
    began: float


class Serving:
    """What the endpoints share. Made before the server starts, runs between `start` and `stop`."""

    def __init__(self, served: ServedModels, settings: ServerSettings):
        self.served, self.settings = served, settings
        self.metrics, self.prompts = Metrics(), PromptMaker(served)
        self.vocabulary = Vocabulary(token_bytes(served.tokenizer))
        added = served.tokenizer.added_tokens_decoder
        pieces = [b"" if i in added else piece for i, piece in enumerate(self.vocabulary.pieces[: served.vocab_size])]
        self.json_tables = None
        if served.stop_ids and is_byte_level(served.tokenizer):  # else nobody knows what a token adds, or how to end
            self.json_tables = JsonTables(pieces, served.model.config.vocab_size, served.stop_ids)
        self.key_hashes = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]
        self.bytes_in_memory = 0
        self.engine: Engine | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        embed = self.served.embed if self.served.ours else None
        loop = asyncio.get_running_loop()
        self.engine = Engine(self.served.decoders, loop, self.settings.max_queue, embed)
        self.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.engine.stop)
            self.prompts.close()

    # -- reading a request

    async def read(self, request: Request) -> Arrived:
        """A request for an answer, other fields not looked at.  Raises: ApiError 400, 401, 403, 404, 413, 415, 429."""
        self.check_key(request)
        fields = await self.read_fields(request)
        return Arrived(fields, self.model_of(fields), time.monotonic())

    def check_key(self, request: Request) -> None:
        """Raises: ApiError 401, 403. Takes as long for any wrong key, since it is hashes that are compared."""
        if not self.key_hashes:
            # A website whose name was made to point to this machine is no stranger to the browser, CORS or not.
            if self.settings.local and not is_local(host := request.headers.get("host", "")):
                message = f"Host {host[:60]!r} is no name of this machine: to be called by it, set an API key."
                raise ApiError(403, message, code="unknown_host")
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1")).digest()  # a header's bytes as they were sent
        known = [hmac.compare_digest(given, one) for one in self.key_hashes]
        if scheme.lower() != "bearer" or not any(known):
            raise ApiError(
                401, "The API key is missing or wrong: send it as `Authorization: Bearer KEY`.", code="invalid_api_key",
                kind="authentication_error", headers={"www-authenticate": "Bearer"},
            )  # fmt: skip

    async def read_fields(self, request: Request) -> Fields:
        """The checked JSON object of a request.  Raises: ApiError 400, 413, 415, 429."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # besides, no other website's form can send it without asking (CORS)
            raise ApiError(415, f"content-type is {kind or 'missing'}: expected application/json.")
        most, body = self.settings.max_body, bytearray()
        declared = request.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > most:
            raise self.too_large()
        try:
            async for chunk in request.stream():
                body += chunk
                self.bytes_in_memory += len(chunk)
                if len(body) > most:
                    raise self.too_large()
                if self.bytes_in_memory > BODIES_IN_MEMORY * most:
                    raise self.busy("Too many large requests at a time.", 1)
            return Fields(parse_body(bytes(body)))
        except ClientDisconnect:
            raise Unread from None
        finally:
            self.bytes_in_memory -= len(body)

    def too_large(self) -> ApiError:
        return ApiError(413, f"The request is larger than {self.settings.max_body} bytes.", code="request_too_large")

    @staticmethod
    def busy(message: str, seconds: int) -> ApiError:
        headers = {"retry-after": str(seconds)}
        return ApiError(429, message, code="rate_limit_exceeded", kind="rate_limit_error", headers=headers)

    def model_of(self, fields: Fields) -> str:
        """The name of the model asked for.  Raises: ApiError 400, 404."""
        if fields.get("model") is None:
            raise ApiError(400, f"model is missing: expected one of {self.names()}.", param="model")
        return self.known(fields.text("model"))

    def known(self, name: str) -> str:
        if name not in self.served.decoders:
            shown = name if len(name) <= 60 else f"{name[:57]}..."
            raise ApiError(
                404, f"The model {shown!r} does not exist here: there is {self.names()}.", param="model",
                code="model_not_found",
            )  # fmt: skip
        return name

    def names(self) -> str:
        return ", ".join(self.served.decoders)

    # -- handing it to the engine

    def check_room(self, model: str, answers: int, param: str) -> None:
        """Before a prompt is tokenised for nothing.  Raises: ApiError 400, 429."""
        if answers > (most := self.engine.capacity(model)):
            message = f"{answers} answers at a time are more than the {most} that find a place."
            raise ApiError(400, message, param=param)
        if seconds := self.engine.retry_after(model, answers):
            raise self.busy(str(QueueFull(seconds)), seconds)

    def submit(
        self, arrived: Arrived, prompts: Sequence[Prompt], asked: Generation, json_object: bool = False, **rules
    ) -> Waiting:
        """Hands `n` answers per prompt to the engine; those of a prompt are drawn with seed, seed + 1, …

        Raises: ApiError 400, 429, 503.
        """
        if asked.top_logprobs is not None and not self.served.ours:
            raise ApiError(400, "logprobs are not available with this model.", param="logprobs")
        if json_object and self.json_tables is None:
            raise ApiError(400, "json_object is not available with this model.", param="response_format")
        texts = []
        for prompt in prompts:
            most = min(
                asked.max_tokens or self.settings.defaults.max_new_tokens, self.served.max_seq_len - len(prompt.ids)
            )
            for i in range(asked.n):
                sampling = Sampling(
                    **asked.settings,
                    max_new_tokens=most,
                    stop_ids=self.served.stop_ids,
                    seed=None if asked.seed is None else asked.seed + i,
                    guide=JsonGuide(self.json_tables, prompt.behind) if json_object else None,
                    logps=asked.top_logprobs is not None,
                    top_logps=asked.top_logprobs or 0,
                )
                reader = TextRules(asked.stops, opened=prompt.opened, begun=prompt.begun, **rules)
                texts.append((prompt.ids, sampling, AnswerText(self.served.tokenizer, reader)))
        return self.hand_over(arrived, texts, sum(len(prompt.ids) for prompt in prompts))

    def hand_over(
        self, arrived: Arrived, texts: Sequence[tuple[list[int], Sampling, AnswerText | None]], prompt_tokens: int
    ) -> Waiting:
        """Makes jobs of (prompt, settings, reader of the answer) and submits them.  Raises: ApiError 429, 503."""
        deadline, inbox = arrived.began + self.settings.timeout, asyncio.Queue()
        jobs = [
            Job(arrived.model, i, ids, sampling, text, deadline, inbox, arrived.began)
            for i, (ids, sampling, text) in enumerate(texts)
        ]
        try:
            self.engine.submit(jobs)
        except QueueFull as error:
            raise self.busy(str(error), error.retry_after) from None
        except EngineDown as error:
            raise ApiError(503, f"No answers at present: {error}.") from None
        self.metrics.prompt_tokens.add(prompt_tokens, arrived.model)
        return Waiting(self.engine, self.metrics, jobs, prompt_tokens)

    async def answer(self, request: Request, waiting: Waiting, reply: ChatReply, stream: bool) -> Response:
        """The reply to a request whose jobs are with the engine: a stream, or an object once all is there."""
        if stream:
            return EventStream(waiting.stream(reply), waiting.deadline, waiting.close, reply.id)
        try:
            await unless_gone(request, waiting.all())
            return JSONResponse(reply.whole(waiting.choices, waiting.prompt_tokens), headers={"x-request-id": reply.id})
        finally:
            waiting.close()

    async def embed(self, request: Request, arrived: Arrived, wanted: EmbeddingRequest) -> Response:
        """A vector for each input, all or none."""
        self.check_room(arrived.model, len(wanted.inputs), "input")
        prompts = await self.prompts.texts(wanted.inputs)
        texts = [(prompt.ids, Sampling(), None) for prompt in prompts]
        waiting = self.hand_over(arrived, texts, sum(len(prompt.ids) for prompt in prompts))
        vectors: dict[int, list[float]] = {}

        async def collect() -> None:
            async for update in waiting.updates():
                vectors[update.index] = update.vector

        try:
            await unless_gone(request, collect())
        finally:
            self.engine.cancel([job for job in waiting.jobs if job.index not in vectors])
        data = [
            {"object": "embedding", "index": i, "embedding": packed(vectors[i]) if wanted.base64 else vectors[i]}
            for i in range(len(prompts))
        ]
        total = usage(waiting.prompt_tokens, 0)
        del total["completion_tokens"]
        return JSONResponse({"object": "list", "model": arrived.model, "data": data, "usage": total})


def is_local(host: str) -> bool:
    """Whether a Host header is one that no website has: an address, or a name that only this machine gives."""
    name = re.sub(r":\d*$", "", host.strip()).strip("[]").lower()
    if name == "localhost" or name.endswith((".localhost", ".local", ".internal")):
        return True
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False


def packed(vector: Sequence[float]) -> str:
    """Little-endian float32 as base64."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


def make_app(serving: Serving) -> FastAPI:
    """The endpoints. No documentation pages: they would load scripts from elsewhere."""
    app = FastAPI(title="MiniMind", docs_url=None, redoc_url=None, openapi_url=None, lifespan=serving.lifespan)
    served, settings, metrics = serving.served, serving.settings, serving.metrics
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )

    def count(request: Request, status: int) -> None:
        route = request.scope.get("route")  # the pattern: a name from a request would make a new series
        metrics.requests.add(1, getattr(route, "path", "other"), str(status))

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        count(request, error.status)
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        count(request, error.status_code)
        message = f"{request.method} {request.url.path[:100]}: {error.detail}. The API is under /v1."
        return error_response(ApiError(error.status_code, message, headers=error.headers))

    @app.exception_handler(Unread)
    async def on_unread(request: Request, error: Unread) -> Response:
        count(request, 499)
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        count(request, 500)
        return error_response(ApiError(500, "The server made a mistake; its log says which."))

    def describe(name: str) -> dict:
        about = {"id": name, "object": "model", "created": served.created, "owned_by": "minimind"}
        return about | {"root": served.base, "parent": None if name == served.base else served.base,
                        "max_model_len": served.max_seq_len}  # fmt: skip

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        serving.check_key(request)
        count(request, 200)
        return JSONResponse({"object": "list", "data": [describe(name) for name in served.decoders]})

    @app.get("/v1/models/{name:path}")
    async def one_model(request: Request, name: str) -> Response:
        serving.check_key(request)
        about = describe(serving.known(name))
        count(request, 200)
        return JSONResponse(about)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        arrived = await serving.read(request)
        wanted = parse_chat(arrived.fields, settings.defaults, served.vocab_size)
        asked = wanted.generation
        serving.check_room(arrived.model, asked.n, "n")
        prompt = await serving.prompts.chat(wanted)
        rules = {"functions": wanted.tools.names, "parallel_calls": wanted.tools.parallel}
        waiting = serving.submit(arrived, [prompt], asked, wanted.json_object, **rules)
        reply = ChatReply(arrived.model, serving.vocabulary, asked.top_logprobs is not None, asked.include_usage)
        response = await serving.answer(request, waiting, reply, asked.stream)
        count(request, 200)
        return response

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        arrived = await serving.read(request)
        wanted = parse_completion(arrived.fields, settings.defaults, served.vocab_size)
        asked = wanted.generation
        serving.check_room(arrived.model, len(wanted.prompts) * asked.n, "n")
        prompts = await serving.prompts.texts(wanted.prompts)
        echoes = [serving.prompts.shown(p) if wanted.echo else "" for p in wanted.prompts for _ in range(asked.n)]
        waiting = serving.submit(arrived, prompts, asked, plain=True)
        logprobs = asked.top_logprobs is not None
        reply = TextReply(arrived.model, serving.vocabulary, logprobs, asked.include_usage, echoes)
        response = await serving.answer(request, waiting, reply, asked.stream)
        count(request, 200)
        return response

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        arrived = await serving.read(request)
        if not served.ours:
            raise ApiError(400, "Embeddings are not available with this model.", param="model")
        response = await serving.embed(request, arrived, parse_embedding(arrived.fields, served.vocab_size))
        count(request, 200)
        return response

    @app.get("/health")
    async def health() -> Response:
        down = serving.engine.down
        running, waiting = serving.engine.counts()
        about = {"status": "ok" if down is None else down, "models": list(served.decoders)}
        return JSONResponse(about | {"running": running, "waiting": waiting}, 200 if down is None else 503)

    @app.get("/metrics")
    async def figures(request: Request) -> Response:
        serving.check_key(request)
        slots = sum(decoder.slots for decoder in served.decoders.values())
        return PlainTextResponse(
            metrics.text(*serving.engine.counts(), slots), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    return app
