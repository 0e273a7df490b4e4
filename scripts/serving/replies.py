"""What goes back: OpenAI's objects, whole or as chunks of a stream.

中文：OpenAI 格式的回复：完整对象与流式分块。
"""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from scripts.serving.engine import TokenLogp, Update

UNLIKELY = -9999.0  # OpenAI's figure for what has no finite log-probability worth naming


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def sse(value: dict | str) -> bytes:
    """A server-sent event."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class Vocabulary:
    """Tokens as text and bytes."""

    def __init__(self, pieces: Sequence[bytes]):
        self.pieces = pieces

    def bytes(self, token: int) -> bytes:
        return self.pieces[token] if token < len(self.pieces) else b""  # a model may have more rows than tokens

    def text(self, token: int) -> str:
        return self.bytes(token).decode("utf-8", "replace")

    def entry(self, token: int, logp: float) -> dict:
        return {"token": self.text(token), "logprob": max(logp, UNLIKELY), "bytes": list(self.bytes(token))}

    def chat_logprobs(self, logps: Sequence[TokenLogp]) -> dict:
        content = [
            {**self.entry(one.token, one.logp), "top_logprobs": [self.entry(*pair) for pair in one.top]}
            for one in logps
        ]
        return {"content": content, "refusal": None}

    def text_logprobs(self, logps: Sequence[TokenLogp], offset: int) -> dict:
        """The older form. offset: characters of the answer before these tokens."""
        offsets = []
        for one in logps:
            offsets.append(offset)
            offset += len(self.text(one.token))
        tops = [{self.text(token): max(logp, UNLIKELY) for token, logp in reversed(one.top)} for one in logps]
        return {
            "tokens": [self.text(one.token) for one in logps],
            "token_logprobs": [max(one.logp, UNLIKELY) for one in logps],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


@dataclass
class Choice:
    """One answer as it grows."""

    index: int
    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    calls: list[dict] = field(default_factory=list)
    logps: list[TokenLogp] = field(default_factory=list)
    characters: int = 0  # of the tokens in `logps`
    tokens: int = 0
    finish: str | None = None

    def take(self, update: Update) -> list[dict]:
        """Adds an update; returns what it adds as the deltas of a chat stream."""
        out = []
        for kind, text, call in update.deltas:
            if kind == "call":
                place = {"index": len(self.calls), "id": new_id("call"), "type": "function"}
                function = {"name": call.name, "arguments": call.arguments}
                self.calls.append({"id": place["id"], "type": "function", "function": function})
                # As OpenAI streams them: first which function, then what it is called with.
                out.append({"tool_calls": [{**place, "function": {"name": call.name, "arguments": ""}}]})
                out.append({"tool_calls": [{"index": place["index"], "function": {"arguments": call.arguments}}]})
            else:
                getattr(self, kind).append(text)
                out.append({"content" if kind == "content" else "reasoning_content": text})
        self.logps += update.logps
        self.tokens = max(self.tokens, update.tokens)
        self.finish = update.finish or self.finish
        return out

    @property
    def finish_reason(self) -> str:
        return "tool_calls" if self.calls and self.finish == "stop" else self.finish

    def message(self) -> dict:
        """The assistant's turn."""
        message: dict = {"role": "assistant", "content": "".join(self.content) or (None if self.calls else "")}
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            message["tool_calls"] = self.calls
        return message | {"refusal": None}


def usage(prompt_tokens: int, completion_tokens: int) -> dict:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class ChatReply:
    """Builds the objects of one chat completion."""

    def __init__(self, model: str, vocabulary: Vocabulary, logprobs: bool, include_usage: bool):
        self.id, self.model, self.created = new_id("chatcmpl"), model, int(time.time())
        self.vocabulary, self.logprobs, self.include_usage = vocabulary, logprobs, include_usage

    def head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, choices: Sequence[Choice], prompt_tokens: int) -> dict:
        listed = [
            {
                "index": choice.index,
                "message": choice.message(),
                "logprobs": self.vocabulary.chat_logprobs(choice.logps) if self.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        total = usage(prompt_tokens, sum(choice.tokens for choice in choices))
        return self.head("chat.completion") | {"choices": listed, "usage": total}

    def chunk(self, index: int, delta: dict, logprobs: dict | None = None, finish: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self.wrap([choice])

    def wrap(self, choices: list[dict], total: dict | None = None) -> bytes:
        usage_field = {"usage": total} if self.include_usage else {}
        return sse(self.head("chat.completion.chunk") | {"choices": choices} | usage_field)

    def begin(self, choices: Sequence[Choice]) -> list[bytes]:
        return [self.chunk(choice.index, {"role": "assistant", "content": ""}) for choice in choices]

    def chunks(self, choice: Choice, update: Update) -> list[bytes]:
        """The chunks for an update that is no error."""
        deltas = choice.take(update)
        logprobs = self.vocabulary.chat_logprobs(update.logps) if self.logprobs and update.logps else None
        if logprobs and not deltas:
            deltas = [{}]
        out = [self.chunk(choice.index, delta, logprobs if i == 0 else None) for i, delta in enumerate(deltas)]
        if update.finish:
            out.append(self.chunk(choice.index, {}, finish=choice.finish_reason))
        return out

    def error(self, body: dict) -> bytes:
        """What ends a stream that has already begun; the openai client raises it."""
        return sse(body)

    def end(self, choices: Sequence[Choice], prompt_tokens: int) -> list[bytes]:
        total = usage(prompt_tokens, sum(choice.tokens for choice in choices))
        return ([self.wrap([], total)] if self.include_usage else []) + [sse("[DONE]")]


class TextReply(ChatReply):
    """Builds the objects of one text completion. echoes: the text in front of each answer."""

    def __init__(self, model: str, vocabulary: Vocabulary, logprobs: bool, include_usage: bool, echoes: Sequence[str]):
        super().__init__(model, vocabulary, logprobs, include_usage)
        self.id, self.echoes = new_id("cmpl"), echoes

    def whole(self, choices: Sequence[Choice], prompt_tokens: int) -> dict:
        listed = [
            {
                "index": choice.index,
                "text": self.echoes[choice.index] + "".join(choice.content),
                "logprobs": self.vocabulary.text_logprobs(choice.logps, 0) if self.logprobs else None,
                "finish_reason": choice.finish,
            }
            for choice in choices
        ]
        total = usage(prompt_tokens, sum(choice.tokens for choice in choices))
        return self.head("text_completion") | {"choices": listed, "usage": total}

    def wrap(self, choices: list[dict], total: dict | None = None) -> bytes:
        usage_field = {"usage": total} if self.include_usage else {}
        return sse(self.head("text_completion") | {"choices": choices} | usage_field)

    def piece(self, index: int, text: str, logprobs: dict | None = None, finish: str | None = None) -> bytes:
        return self.wrap([{"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}])

    def begin(self, choices: Sequence[Choice]) -> list[bytes]:
        return [self.piece(c.index, self.echoes[c.index]) for c in choices if self.echoes[c.index]]

    def chunks(self, choice: Choice, update: Update) -> list[bytes]:
        text = "".join(delta["content"] for delta in choice.take(update))
        logprobs = None
        if self.logprobs and update.logps:
            logprobs = self.vocabulary.text_logprobs(update.logps, choice.characters)
            choice.characters += sum(len(self.vocabulary.text(one.token)) for one in update.logps)
        out = [self.piece(choice.index, text, logprobs)] if text or logprobs else []
        return out + ([self.piece(choice.index, "", finish=choice.finish)] if update.finish else [])
