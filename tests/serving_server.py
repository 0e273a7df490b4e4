"""What the serving tests share: a tiny model, a scripted one, and a server on a free port of the loopback address."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import httpx2
import torch

from model.generation import Event, Request
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_tokenizer
from scripts.serving.app import ServerSettings, Serving, make_app
from scripts.serving.http_server import listen, make_server
from scripts.serving.models import ServedModels, serve_models

EOS = 2
HARD_LIMIT = 30.0  # seconds for anything that waits


def tiny_model(seed: int = 0, **config) -> MiniMindForCausalLM:
    """Two layers, the shipped vocabulary; sharper than a fresh model: a greedy choice is no matter of rounding."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 1024}
    model = MiniMindForCausalLM(MiniMindConfig(vocab_size=6400, **sizes | config)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(20 if weight.ndim == 2 else 1)
    return model


def serve_tiny(model=None, *, slots=4, max_seq_len=512, prefill_tokens=64, **loras) -> ServedModels:
    return serve_models(
        model or tiny_model(), load_tokenizer(), "tiny", loras, slots=slots, max_seq_len=max_seq_len,
        prefill_tokens=prefill_tokens,
    )  # fmt: skip


def greedy(model, prompt: list[int], new: int) -> list[int]:
    """The greedy continuation by transformers' own `generate`, the stop token included."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
    return out[0, len(prompt) :].tolist()


class ScriptedDecoder:
    """Says what it is told: `script` maps the text of the prompt to the answer's token ids. A step takes `pause` s."""

    def __init__(self, script: Callable[[list[int]], list[int]], slots: int = 4, pause: float = 0.0):
        self.script, self.slots, self.max_seq_len, self.pause = script, slots, 4096, pause
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.plans: dict[Request, deque[int]] = {}
        self.steps = 0

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, prompt_ids, sampling) -> Request:
        request = Request(list(prompt_ids), sampling)
        self.plans[request] = deque(self.script(request.prompt))
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        for place in (self.waiting, self.running):
            if request in place:
                place.remove(request)
                request.finish_reason = "cancelled"

    def step(self) -> list[Event]:
        time.sleep(self.pause)
        self.steps += 1
        while self.waiting and len(self.running) < self.slots:
            self.running.append(self.waiting.popleft())
        events = []
        for request in list(self.running):
            plan = self.plans[request]
            token = plan.popleft() if plan else EOS
            request.tokens.append(token)
            reason = "stop" if token == EOS else None
            if not reason and len(request.tokens) == request.sampling.max_new_tokens:
                reason = "length"
            if reason:
                request.finish_reason = reason
                self.running.remove(request)
            events.append(Event(request, token, reason))
        return events


def serve_script(answers: dict[str, str], slots: int = 4, pause: float = 0.0) -> ServedModels:
    """A model that answers a prompt holding a key of `answers` with its value."""
    tokenizer = load_tokenizer()

    def script(prompt: list[int]) -> list[int]:
        text = tokenizer.decode(prompt)
        answer = next((value for key, value in answers.items() if key in text), "?")
        return tokenizer.encode(answer, add_special_tokens=False)

    decoder = ScriptedDecoder(script, slots, pause)
    return ServedModels("scripted", {"scripted": decoder}, tiny_model(), tokenizer, 4096, True, 64)


class Running:
    """A server that runs: its address, and what it is made of."""

    def __init__(self, host: str, port: int, serving: Serving):
        self.host, self.port, self.serving = host, port, serving
        self.connections: set = set()  # uvicorn's own
        self.http, self.plain = httpx2.Client(timeout=HARD_LIMIT), None
        self.url = f"http://{host}:{port}"

    def client(self, **options):
        """An `openai` client; the plain one is made once, for it takes a while."""
        from openai import OpenAI

        if not options and self.plain is None:
            self.plain = OpenAI(base_url=f"{self.url}/v1", timeout=HARD_LIMIT, api_key="none", max_retries=0)
        made = {"timeout": HARD_LIMIT, "api_key": "none", "max_retries": 0} | options
        return OpenAI(base_url=f"{self.url}/v1", **made) if options else self.plain

    def request(self, method: str, path: str, **options) -> httpx2.Response:
        return self.http.request(method, f"{self.url}{path}", **options)

    def get(self, path: str, **options) -> httpx2.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: object = None, **options) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | options.pop("headers", {})
        return self.request("POST", path, content=content, headers=headers, **options)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=HARD_LIMIT)

    def chat(self, text: str = "hi", **fields) -> httpx2.Response:
        body = {"model": self.serving.served.base, "messages": [{"role": "user", "content": text}]} | fields
        return self.post("/v1/chat/completions", body)

    def wait(self, condition: Callable[[], bool], seconds: float = HARD_LIMIT) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.005)

    def open_jobs(self) -> int:
        return sum(self.serving.engine.counts())


@contextlib.contextmanager
def running_server(
    served: ServedModels, *, receive_seconds=HARD_LIMIT, max_connections=1000, send_buffer=0, **settings
) -> Iterator[Running]:
    """uvicorn on a thread of its own, ended in any case. send_buffer: bytes that the kernel takes from the server."""
    serving = Serving(served, ServerSettings(**settings))
    server = make_server(make_app(serving), receive_seconds=receive_seconds, max_connections=max_connections)
    server.install_signal_handlers = lambda: None
    sock = listen("127.0.0.1", 0)
    if send_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), daemon=True)
    thread.start()
    running = Running(*sock.getsockname()[:2], serving)
    running.connections = server.server_state.connections
    try:
        running.wait(lambda: server.started)
        yield running
    finally:
        running.http.close()
        server.should_exit = True
        thread.join(HARD_LIMIT)
        assert not thread.is_alive()


def events(text: str) -> list[dict | str]:
    """What a stream of server-sent events holds."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
