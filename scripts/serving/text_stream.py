"""What an answer says, piece by piece: tokens in; reasoning, content and tool calls out.

Three layers, each of which holds back what the next token could still change:
    TextStream    (scripts/chat_text.py) bytes of one character that came in several tokens
    Splitter      a tag such as </think> or <tool_call> that has begun, and white space in front of one
    StopScanner   the beginning of a stop string

Where tokens end changes no result, only when it comes. A tool call is handed out once it is whole and valid; anything
else between <tool_call> tags is content, tags and all.

中文：把生成的 token 逐段变成思考、正文与工具调用，不拆字符，停止词可跨 token。
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from scripts.chat_text import TextStream
from scripts.terminal import clean

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"


class ToolCall(NamedTuple):
    """A function the model wants called. arguments: a JSON object, as text."""

    name: str
    arguments: str


class Delta(NamedTuple):
    """A piece of an answer. kind: "reasoning", "content" or "call"; text for the first two, else the call."""

    kind: str
    text: str = ""
    call: ToolCall | None = None


@dataclass(frozen=True)
class TextRules:
    """How an answer is read.

    Args:
        stops: strings that end the content; they are not part of it. Thoughts and tool calls are not searched.
        plain: a text completion: no tags, all is content.
        opened: the prompt ended in <think>.
        functions: names that may be called; empty: <tool_call> is a text like any other.
        parallel_calls: False: the answer ends behind its first call.
        begun: the beginning of the answer where the prompt already holds it (a forced tool call).
    """

    stops: tuple[str, ...] = ()
    plain: bool = False
    opened: bool = False
    functions: frozenset[str] = frozenset()
    parallel_calls: bool = True
    begun: str = ""


def overlap(text: str, word: str) -> int:
    """How many characters at the end of the text are a beginning of the word, but not all of it."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)


def strict_json(text: str) -> object:
    """The value of a JSON text.  Raises: ValueError, for NaN and for nesting beyond what Python parses as well."""

    def refuse(word: str):
        raise ValueError(f"{word} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_call(text: str, functions: frozenset[str]) -> ToolCall | None:
    """The call between <tool_call> tags; None where it is no JSON of a known name and an object of arguments."""
    try:
        call = strict_json(text)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or call["name"] not in functions:
            return None
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            arguments = strict_json(arguments)
        if not isinstance(arguments, dict):
            return None
        return ToolCall(call["name"], clean(json.dumps(arguments, ensure_ascii=False)))
    except (ValueError, RecursionError):
        return None


class StopScanner:
    """Passes text on up to the first stop string; of several, the one that is complete first."""

    def __init__(self, stops: Iterable[str]):
        self.stops = tuple(stops)
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What can be shown now. After the stop: nothing."""
        if self.stopped or not self.stops:
            return "" if self.stopped else text
        text, self.held = self.held + text, ""
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        keep = max(overlap(text, stop) for stop in self.stops)
        shown, self.held = text[: len(text) - keep], text[len(text) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        rest, self.held = self.held, ""
        return rest


class Splitter:
    """Text in, deltas out: first a thought, if there is one, then content and tool calls.

    White space between these belongs to none of them.
    """

    def __init__(self, rules: TextRules):
        self.rules = rules
        self.scanner = StopScanner(rules.stops)
        self.state = "content" if rules.plain else "thought" if rules.opened else "start"
        self.text = ""  # not yet decided on
        self.trim = rules.opened  # whether white space at the beginning is to go
        self.gap = ""  # white space in front of a call that is still open
        self.finished = False  # nothing more is wanted

    def push(self, text: str) -> list[Delta]:
        self.text += text
        deltas: list[Delta] = []
        while not self.finished and self.advance(deltas):
            pass
        return deltas

    def flush(self) -> list[Delta]:
        """The rest, at the end of the answer: what is still open stays what it began as."""
        deltas: list[Delta] = []
        if not self.finished:
            rest, self.text = self.text, ""
            if self.state == "thought":
                self.emit(deltas, "reasoning", rest.rstrip())
            else:
                self.content(deltas, (self.gap + CALL if self.state == "call" else "") + rest)
            self.emit(deltas, "content", self.scanner.flush())
        self.finished = True
        return deltas

    def advance(self, deltas: list[Delta]) -> bool:
        """One step of the automaton; False: more text is needed."""
        if self.trim:
            self.text = self.text.lstrip()
            if not self.text:
                return False
        return getattr(self, f"in_{self.state}")(deltas)

    def in_start(self, deltas: list[Delta]) -> bool:
        begin = self.text.lstrip()
        if begin.startswith(THINK):
            self.enter("thought", begin.removeprefix(THINK), trim=True)
        elif THINK.startswith(begin):  # nothing, or the beginning of the tag
            return False
        else:
            self.enter("content", self.text)
        return True

    def in_thought(self, deltas: list[Delta]) -> bool:
        thought, end, rest = self.text.partition(END_THINK)
        if end:
            self.emit(deltas, "reasoning", thought.rstrip())
            self.enter("content", rest, trim=True)
            return True
        self.text = self.release(deltas, "reasoning", END_THINK)
        return False

    def in_content(self, deltas: list[Delta]) -> bool:
        if not self.rules.functions:
            self.content(deltas, self.text)
            self.text = ""
            return False
        before, tag, rest = self.text.partition(CALL)
        if not tag:
            self.text = self.release(deltas, "content", CALL)
            return False
        self.content(deltas, before.rstrip())
        self.gap = before[len(before.rstrip()) :]
        self.enter("call", rest)
        return True

    def in_call(self, deltas: list[Delta]) -> bool:
        body, end, rest = self.text.partition(END_CALL)
        if not end:
            return False
        call = parse_call(body, self.rules.functions)
        if call:
            self.emit(deltas, "content", self.scanner.flush())  # a stop string does not reach across a call
            deltas.append(Delta("call", call=call))
            self.finished = not self.rules.parallel_calls
        else:
            self.content(deltas, f"{self.gap}{CALL}{body}{END_CALL}")
        self.enter("content", rest, trim=call is not None)
        return True

    def enter(self, state: str, rest: str, trim: bool = False) -> None:
        self.state, self.text, self.trim = state, rest, trim

    def release(self, deltas: list[Delta], kind: str, tag: str) -> str:
        """Hands out all but what may belong to the tag or to the white space before it, which is returned."""
        sure = self.text[: len(self.text) - overlap(self.text, tag)].rstrip()
        if sure and kind == "content":
            self.content(deltas, sure)
        else:
            self.emit(deltas, kind, sure)
        self.trim = self.trim and not sure
        return self.text[len(sure) :]

    def content(self, deltas: list[Delta], text: str) -> None:
        self.emit(deltas, "content", self.scanner.push(text))
        self.trim = self.trim and not text
        self.finished = self.finished or self.scanner.stopped

    @staticmethod
    def emit(deltas: list[Delta], kind: str, text: str) -> None:
        if text:
            deltas.append(Delta(kind, text))


class AnswerText:
    """Tokens in, deltas out. `finished`: a stop string was met, or the only call allowed was made."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rules: TextRules):
        self.stream, self.splitter = TextStream(tokenizer), Splitter(rules)
        self.first = self.splitter.push(rules.begun) if rules.begun else []

    @property
    def finished(self) -> bool:
        return self.splitter.finished

    def push(self, token: int) -> list[Delta]:
        deltas, self.first = self.first, []
        return deltas + self.splitter.push(self.stream.push(token))

    def flush(self) -> list[Delta]:
        return self.splitter.push(self.stream.flush()) + self.splitter.flush()


def byte_of_character() -> dict[str, int]:
    """The characters by which a byte-level tokenizer writes bytes: printable ones of Latin-1 themselves, the others,
    in order, from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def is_byte_level(tokenizer: PreTrainedTokenizerFast) -> bool:
    return '"ByteLevel"' in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """The bytes that each token stands for, special tokens by their name. Other tokenizers than byte-level ones are
    asked what a token means by itself."""
    added, letters = tokenizer.added_tokens_decoder, byte_of_character()
    byte_level = is_byte_level(tokenizer)
    out = []
    for i, name in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if i in added:
            out.append(added[i].content.encode())
        elif name is not None and byte_level and all(letter in letters for letter in name):
            out.append(bytes(letters[letter] for letter in name))
        else:
            out.append(clean(tokenizer.decode([i], clean_up_tokenization_spaces=False)).encode())
    return out


def longest_token(pieces: Sequence[bytes]) -> int:
    """Bytes of the longest token: a text of more than n times as many takes more than n tokens."""
    return max(map(len, pieces))
