"""What answers in the web page: weights in this process, or a server with the OpenAI API.

All visitors of the page share the slots of one decoder (model/generation.py): whoever wants his next token takes a step
for everybody. A text that two ask for at once is the text that each would get alone.

中文：网页的回答来源：本进程中的权重（共享同一个连续批处理解码器），或兼容 OpenAI 的服务器。
"""

import random
import threading
import time
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from model.generation import NOT_A_NUMBER, Decoder, Sampling, stop_ids, stream_generate
from model.model_minimind import MiniMindForCausalLM
from model.weights import WeightsError
from scripts.chat_openai_api import explain
from scripts.chat_text import TextStream, chat_ids, decode, split_thinking, text_ids
from scripts.web.chat_state import ChatSettings, Message, fitted, newest_exchanges, template_turns
from scripts.web.tools import ToolCall, split_calls
from trainer.command_line import UserError

SLOTS = 4  # answers written at the same time; more wait


class LocalBackend:
    """A model in this process.

    Args: stage: of the weights, None where it is not known; max_seq_len: tokens of prompt and answer together.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stage: str | None, max_seq_len: int = 2048
    ):
        self.model, self.tokenizer, self.stage = model, tokenizer, stage
        self.continues_text = stage == "pretrain" or not tokenizer.chat_template
        limit = getattr(model.config, "max_position_embeddings", None) or max_seq_len
        self.max_seq_len = min(max_seq_len, limit)
        self.stop_ids = stop_ids(model, tokenizer)
        self.lock = threading.Lock()
        ours = isinstance(model, MiniMindForCausalLM)
        self.decoder = Decoder(model, SLOTS, self.max_seq_len) if ours else None
        self.parameters = sum(p.numel() for p in model.parameters())

    def stream(self, turns: Sequence[Message], settings: ChatSettings, tools: list[dict] | None) -> Iterator[Message]:
        """See `Backend`.

        Raises: UserError when the question does not fit; WeightsError when the model's output is not a number.
        """
        start = time.perf_counter()
        ids, forgotten = self.prompt(turns, settings, tools)
        opened = not self.continues_text and decode(self.tokenizer, ids[-8:]).rstrip().endswith("<think>")
        limit = min(settings.max_new_tokens, self.max_seq_len - len(ids))
        text, written, tokens, first = TextStream(self.tokenizer), "", 0, 0.0
        finish = "length"
        draw = self.draw if self.decoder else self.draw_foreign
        sampling = Sampling(
            **settings.sampling(), max_new_tokens=limit, stop_ids=self.stop_ids,
            seed=random.randrange(2**62) if settings.seed is None else settings.seed,
        )  # fmt: skip

        def message(done: str = "") -> Message:
            thought, reply = ("", written) if self.continues_text else split_thinking(written, opened)
            said, calls = split_calls(reply) if tools else (reply, [])
            seconds = time.perf_counter() - start
            return Message("assistant", said, thought, calls, done, "", tokens, seconds, first, forgotten)

        for token in draw(ids, sampling):
            tokens += 1
            first = first or time.perf_counter() - start
            written += text.push(token)
            yield message()
        if tokens < limit:
            finish = "stop"
        written += text.flush()
        yield message(finish)

    def prompt(self, turns: Sequence[Message], settings: ChatSettings, tools: list[dict] | None) -> tuple[list, int]:
        """(token ids, exchanges left out).  Raises: UserError."""
        if self.continues_text:
            ids, forgotten = text_ids(self.tokenizer, turns[-1].text), 0
            if len(ids) < self.max_seq_len:
                return ids, forgotten
            raise UserError(f"The text takes {len(ids)} tokens, {self.max_seq_len} fit with the answer: shorten it.")
        try:
            encode = lambda messages: chat_ids(self.tokenizer, messages, settings.thinking, tools)  # noqa: E731
            return fitted(turns, settings, encode, self.max_seq_len)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"This cannot be asked ({error}): shorten the question or the system prompt.") from error

    def draw(self, ids: list[int], sampling: Sampling) -> Iterator[int]:
        """Tokens of the answer without the stop token, from the shared decoder."""
        with self.lock:
            request = self.decoder.add(ids, sampling)
        taken = 0
        try:
            while True:
                with self.lock:  # others' steps may have written for this visitor too
                    if request.finish_reason is None and len(request.tokens) == taken:
                        self.decoder.step()
                    reason, new = request.finish_reason, request.answer[taken:]
                taken += len(new)
                yield from new
                if reason == "error":
                    raise WeightsError(NOT_A_NUMBER)
                if reason:
                    return
        finally:
            with self.lock:
                self.decoder.cancel(request)

    def draw_foreign(self, ids: list[int], sampling: Sampling) -> Iterator[int]:
        """The same for a model of another family, each visitor with a cache of his own."""
        generator = torch.Generator().manual_seed(sampling.seed)
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "stop_ids")
        settings = {name: getattr(sampling, name) for name in names}
        prompt = torch.tensor([ids], device=self.model.device)  # (1, T)
        return stream_generate(self.model, prompt, generator=generator, **settings)


class ApiBackend:
    """A model behind an OpenAI API. The address comes from the command line, never from the page."""

    continues_text = False
    stage = None

    def __init__(self, url: str, model: str, key: str | None = None, timeout: float = 60.0):
        self.model, self.client = model, make_client(url, key, timeout)

    def stream(self, turns: Sequence[Message], settings: ChatSettings, tools: list[dict] | None) -> Iterator[Message]:
        """See `Backend`.  Raises: UserError when the server refuses or cannot be reached."""
        from openai import OpenAIError

        start, tokens, first, finish = time.perf_counter(), 0, 0.0, ""
        thought, said, calls = "", "", {}

        def message(done: str = "") -> Message:
            inner, reply = split_thinking(said)  # servers that leave the thought in the text
            made = [ToolCall(name, arguments or "{}") for name, arguments in calls.values()]
            seconds = time.perf_counter() - start
            return Message("assistant", reply, thought or inner, made, done, "", tokens, seconds, first)

        try:
            with self.client.chat.completions.create(**self.request(turns, settings, tools)) as answer:
                for chunk in answer:
                    if chunk.usage:
                        tokens = chunk.usage.completion_tokens
                    for choice in chunk.choices[:1]:
                        delta = choice.delta
                        thought += getattr(delta, "reasoning_content", None) or ""
                        said += delta.content or ""
                        for part in delta.tool_calls or []:
                            name, arguments = calls.get(part.index, ("", ""))
                            function = part.function
                            calls[part.index] = (
                                name + (function.name or "" if function else ""),
                                arguments + (function.arguments or "" if function else ""),
                            )
                        finish = choice.finish_reason or finish
                        tokens += not chunk.usage
                        first = first or time.perf_counter() - start
                        yield message()
        except OpenAIError as error:
            raise UserError(f"The server at {self.client.base_url} says: {explain(error)}") from error
        yield message("length" if finish == "length" else "stop")

    def request(self, turns: Sequence[Message], settings: ChatSettings, tools: list[dict] | None) -> dict:
        """What is sent. Settings that the OpenAI API does not know go along only where they differ from "off"."""
        extra: dict[str, object] = {}
        for name, off in (("top_k", 0), ("min_p", 0), ("repetition_penalty", 1)):
            if getattr(settings, name) != off:
                extra[name] = getattr(settings, name)
        if settings.thinking is not None:
            extra["chat_template_kwargs"] = {"enable_thinking": settings.thinking}
        kept = newest_exchanges(turns, settings.exchanges)
        body = {
            "model": self.model,
            "messages": openai_turns(template_turns(kept, settings.system)),
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_new_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        optional = {"tools": tools, "seed": settings.seed, "extra_body": extra or None}
        return body | {name: value for name, value in optional.items() if value is not None}


def openai_turns(turns: list[dict]) -> list[dict]:
    """Calls get the ids by which the OpenAI API ties results to them, in their order."""
    turned, waiting = [], []
    for i, turn in enumerate(turns):
        if calls := turn.get("tool_calls"):
            waiting = [f"call_{i}_{j}" for j in range(len(calls))]
            named = zip(waiting, calls, strict=True)
            turn = {**turn, "tool_calls": [{"id": key, "type": "function", "function": call} for key, call in named]}
        elif turn["role"] == "tool":
            turn = {**turn, "tool_call_id": waiting.pop(0) if waiting else "call"}
        turned.append(turn)
    return turned


def make_client(url: str, key: str | None, timeout: float) -> object:
    """Raises: UserError without the openai package."""
    try:
        import openai
    except ImportError:
        raise UserError("A server needs the openai package: pip install openai") from None
    return openai.OpenAI(base_url=url, api_key=key or "none", timeout=timeout, max_retries=0)


def served_models(url: str, key: str | None, timeout: float = 3.0) -> list[str]:
    """The names of the models of a server.  Raises: UserError when it cannot be asked."""
    client = make_client(url, key, timeout)
    from openai import OpenAIError  # it is there, or the line above has said so

    try:
        return sorted(model.id for model in client.models.list().data)
    except OpenAIError as error:
        raise UserError(f"{url} does not answer as hoped: {explain(error)}") from error
