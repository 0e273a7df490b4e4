"""A conversation of the web page, without the page: its turns, its settings, and the thread that writes an answer.

Reading order: settings → turns → what the model is shown of them → the conversation → the answer being written → the
conversations of all visitors → export.

The page only shows this state and calls its methods, so a reload, a second tab or a moved slider do not disturb an
answer that is being written.

中文：网页对话的纯逻辑部分：设置、轮次、历史裁剪、生成线程、导出，不依赖 Streamlit。
"""

import json
import secrets
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from scripts.web.tools import ToolCall, signatures

MOST_ROUNDS = 5  # answers in a row that may call tools
# An answer that nobody has looked at for so long is stopped. Browsers let the page in a hidden tab look once a minute.
UNWATCHED_SECONDS = 90.0


@dataclass(frozen=True)
class ChatSettings:
    """How to answer. exchanges: earlier questions and answers that are remembered; thinking: None as the model is used
    to; seed: None for another text each time."""

    system: str = ""
    temperature: float = 0.85
    top_p: float = 0.85
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    exchanges: int = 3
    thinking: bool | None = None
    tools: bool = False
    seed: int | None = None

    def sampling(self) -> dict[str, float | int]:
        return {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}


@dataclass
class Message:
    """A turn. role: user, assistant or tool; tool results stand in the calls of the assistant's turn as well.

    finish: "" while it is written, then stop, length, stopped (by the reader) or error. forgotten: old exchanges that
    were left out of the prompt because they did not fit. continues: a pretrained model wrote it: the text of the
    question goes on in it.
    """

    role: str
    text: str = ""
    thought: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    finish: str = ""
    error: str = ""
    tokens: int = 0
    seconds: float = 0.0
    first_seconds: float = 0.0
    forgotten: int = 0
    continues: bool = False

    @property
    def spoken(self) -> str:
        """What there is to read: reasoning models wrap it in `<answer>`."""
        return self.text.replace("<answer>", "").replace("</answer>", "").strip()

    @property
    def tokens_per_second(self) -> float:
        """Of writing: the wait for the first token, in which the prompt is read, does not count."""
        return (self.tokens - 1) / (self.seconds - self.first_seconds) if self.seconds > self.first_seconds else 0.0


class Backend(Protocol):
    """Whatever answers: weights in this process, or a server."""

    continues_text: bool  # a pretrained model: no roles, the text goes on

    def stream(self, turns: Sequence[Message], settings: ChatSettings, tools: list[dict] | None) -> Iterator[Message]:
        """Yields the answer again and again as it grows; `finish` is set in the last one. Closing it ends the work."""
        ...


# --- What the model is shown ------------------------------------------------------------------------------------------


def template_turns(turns: Sequence[Message], system: str) -> list[dict]:
    """The turns as a chat template takes them, thoughts left out: the answer holds what they led to."""
    shown = [{"role": "system", "content": system}] if system.strip() else []
    for turn in turns:
        message = {"role": turn.role, "content": turn.text}
        if turn.calls:
            message["tool_calls"] = [{"name": call.name, "arguments": call.arguments} for call in turn.calls]
        shown.append(message)
    return shown


def newest_exchanges(turns: Sequence[Message], exchanges: int) -> list[Message]:
    """The question being answered with what followed it, and up to so many exchanges before. No exchange is cut."""
    starts = [i for i, turn in enumerate(turns) if turn.role == "user"]
    return list(turns[starts[max(len(starts) - 1 - exchanges, 0)] :]) if starts else list(turns)


def fitted(
    turns: Sequence[Message], settings: ChatSettings, encode: Callable[[list[dict]], list[int]], max_seq_len: int
) -> tuple[list[int], int]:
    """(prompt ids, exchanges left out): the oldest go until there is room for the answer, at most half of the length.

    Raises: ValueError when the question alone is too long.
    """
    room = max_seq_len - min(settings.max_new_tokens, max_seq_len // 2)
    kept, forgotten = newest_exchanges(turns, settings.exchanges), 0
    while True:
        ids = encode(template_turns(kept, settings.system))
        questions = sum(turn.role == "user" for turn in kept)
        if len(ids) <= room or questions <= 1:
            break
        kept, forgotten = newest_exchanges(kept, questions - 2), forgotten + 1
    if len(ids) >= max_seq_len:
        raise ValueError(f"too long: {len(ids)} tokens, and {max_seq_len} fit with the answer")
    return ids, forgotten


# --- The conversation -------------------------------------------------------------------------------------------------


class Chat:
    """The turns of one visitor, and at most one answer being written."""

    def __init__(self):
        self.messages: list[Message] = []
        self.settings = ChatSettings()
        self.model: str | None = None  # the choices of the page, kept over a reload
        self.adapter = ""
        self.job: Job | None = None
        self.used = time.monotonic()

    @property
    def busy(self) -> bool:
        return self.job is not None and self.job.running

    def send(self, text: str, backend: Backend) -> None:
        """A new question, answered from now on; an answer still being written ends."""
        self.stop()
        self.messages = [*self.messages, Message("user", text)]
        self._answer(backend)

    def regenerate(self, backend: Backend) -> None:
        """Another answer to the last question."""
        self.stop()
        last = max((i for i, turn in enumerate(self.messages) if turn.role == "user"), default=None)
        if last is not None:
            self.messages = self.messages[: last + 1]
            self._answer(backend)

    def edit(self, index: int, text: str, backend: Backend) -> None:
        """Puts a question in other words; what came after it is dropped, and it is answered anew."""
        self.stop()
        self.messages = [*self.messages[:index], Message("user", text)]
        self._answer(backend)

    def delete(self, index: int) -> None:
        """Takes out a question with its answer, tool calls and all."""
        self.stop()
        end = index + 1
        while end < len(self.messages) and self.messages[end].role != "user":
            end += 1
        self.messages = self.messages[:index] + self.messages[end:]

    def clear(self) -> None:
        self.stop()
        self.messages, self.job = [], None

    def stop(self) -> None:
        """Ends the answer being written within a token; what was said stays, and is not changed from now on."""
        if self.job is not None:
            self.job.stop()

    def watch(self) -> None:
        """Notes that somebody looks: an unwatched answer ends by itself."""
        self.used = time.monotonic()

    def _answer(self, backend: Backend) -> None:
        self.watch()
        self.job = Job(self, backend, self.settings)
        self.job.start()


class Job:
    """Writes one answer, tools included, in a thread of its own."""

    def __init__(self, chat: Chat, backend: Backend, settings: ChatSettings):
        tools = settings.tools and not backend.continues_text
        self.chat, self.backend, self.settings = chat, backend, replace(settings, tools=tools)
        self.lock = threading.Lock()  # after `stop` returns, this job changes nothing any more
        self.stopped = False
        self.thread = threading.Thread(target=self._run, name="answer", daemon=True)

    def start(self) -> None:
        self.thread.start()

    @property
    def running(self) -> bool:
        return self.thread.is_alive() and not self.stopped

    def stop(self) -> None:
        with self.lock:
            if self.stopped or not self.thread.is_alive():
                return
            self.stopped = True
            last = self.chat.messages[-1]
            if last.role == "assistant" and not last.finish:
                last.finish = "stopped"
            elif last.role != "assistant":
                self._add(Message("assistant", finish="stopped"))

    def _add(self, message: Message) -> None:
        self.chat.messages = [*self.chat.messages, message]

    def _run(self) -> None:
        try:
            for _ in range(MOST_ROUNDS):
                if not self._write() or not self._call_tools():
                    return
        except Exception as error:  # whatever it is, the reader is told, and the next question works again
            traceback.print_exc()
            with self.lock:
                if not self.stopped:
                    last = self.chat.messages[-1]
                    if last.role != "assistant" or last.finish:
                        last = Message("assistant")
                        self._add(last)
                    last.finish, last.error = "error", str(error) or type(error).__name__

    def _write(self) -> bool:
        """One answer of the model. Returns False when the reader stopped it or went away."""
        turns = self.chat.messages
        with self.lock:
            if self.stopped:
                return False
            self._add(Message("assistant", continues=self.backend.continues_text))
        tools = signatures() if self.settings.tools else None
        answer = self.backend.stream(turns, self.settings, tools)
        try:
            for message in answer:
                unwatched = time.monotonic() - self.chat.used > UNWATCHED_SECONDS
                with self.lock:
                    if self.stopped:
                        return False
                    if unwatched:
                        message.finish = "stopped"
                    message.continues = self.backend.continues_text
                    self.chat.messages = [*self.chat.messages[:-1], message]
                if unwatched:
                    return False
        finally:
            answer.close()
        return True

    def _call_tools(self) -> bool:
        """Runs the tools of the last answer. Returns whether the model has to go on with their results."""
        message = self.chat.messages[-1]
        if not self.settings.tools or message.finish != "stop":
            return False
        for call in message.calls:
            call.run()
            with self.lock:
                if self.stopped:
                    return False
                self._add(Message("tool", call.result or ""))
        return bool(message.calls)


class Chats:
    """The conversations of all visitors, by an unguessable name that stands in the page's address: a reload finds its
    own again. They live in memory; the oldest go when there are too many."""

    def __init__(self, most: int = 200):
        self.most, self.lock = most, threading.Lock()
        self.chats: OrderedDict[str, Chat] = OrderedDict()

    def get(self, name: str | None) -> tuple[str, Chat]:
        """(name, conversation): a new one under a new name when there is none of this name."""
        with self.lock:
            if name not in self.chats:
                name = secrets.token_urlsafe(16)
                self.chats[name] = Chat()
                while len(self.chats) > self.most:
                    _, gone = self.chats.popitem(last=False)
                    gone.stop()
            self.chats.move_to_end(name)
            return name, self.chats[name]


# --- Export -----------------------------------------------------------------------------------------------------------


def as_markdown(chat: Chat, model: str) -> str:
    """The conversation for people to read."""
    lines = [f"# {model}", ""]
    if chat.settings.system.strip():
        lines += [f"**system:** {chat.settings.system}", ""]
    for turn in chat.messages:
        lines += [f"## {turn.role}", ""]
        if turn.thought:
            lines += [*(f"> {line}" for line in turn.thought.splitlines()), ""]
        for call in turn.calls:
            lines += [f"`{call.name}({call.arguments})`", ""]
        if turn.spoken:
            lines += [turn.spoken, ""]
    return "\n".join(lines)


def as_record(chat: Chat) -> str:
    """The conversation as one line of the SFT format: `python trainer/train_full_sft.py` can learn from it."""
    turns = [{"role": "system", "content": chat.settings.system}] if chat.settings.system.strip() else []
    if chat.settings.tools:
        tools = json.dumps(signatures(), ensure_ascii=False)
        turns = [{**(turns[0] if turns else {"role": "system", "content": ""}), "tools": tools}]
    for turn in chat.messages:
        record = {"role": turn.role, "content": turn.text}
        if turn.thought:
            record["reasoning_content"] = turn.thought
        if turn.calls:
            calls = [{"name": call.name, "arguments": call.arguments} for call in turn.calls]
            record["tool_calls"] = json.dumps(calls, ensure_ascii=False)
        turns.append(record)
    return json.dumps({"conversations": turns}, ensure_ascii=False) + "\n"
