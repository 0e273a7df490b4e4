"""Between a person at a terminal and a model: a line becomes the tokens of a prompt, tokens become text on the screen.

Reading order: reading a line → the prompt's tokens → tokens back to text, piece by piece → showing it.

中文：终端与模型之间的转换：读入一行、拼成提示 token、把生成的 token 逐段还原为文字并显示。
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from transformers import PreTrainedTokenizerFast

from dataset.lm_dataset import encode_prompt
from dataset.token_cache import encoding_lock, has_markers
from trainer.command_line import UserError


def line_reader(commands: Sequence[str]) -> Callable[[], str]:
    """A function that reads one line and raises EOFError at the end of the input.

    On a terminal it is a line editor with history, and Tab completes `commands`; lines from a pipe are read as they
    are, and echoed.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):

        def read_piped() -> str:
            line = input("> ")
            print(line)
            return line

        return read_piped
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.shortcuts import CompleteStyle
    except ImportError:
        return lambda: input("> ")
    path = Path.home() / ".minimind_history"
    try:
        path.touch()
        history = FileHistory(str(path))
    except OSError:  # a read-only home: the history lasts as long as the chat
        history = InMemoryHistory()
    session = PromptSession(
        history=history, completer=WordCompleter(list(commands), sentence=True), complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,  # a menu would keep eight empty lines under the prompt
    )  # fmt: skip
    return lambda: session.prompt("> ")


def clean(text: str) -> str:
    """Bytes of the terminal that were no UTF-8 arrive as lone surrogates, which no tokenizer takes: `?` instead."""
    return text.encode("utf-8", "replace").decode("utf-8")


def text_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """A text to continue, as pretraining saw it: bos, then the text."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    with encoding_lock:
        return bos + tokenizer.encode(clean(text), add_special_tokens=False)


def chat_ids(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict],
    enable_thinking: bool | None,
    tools: list[dict] | None = None,
) -> list[int]:
    """The chat template's prompt, up to where the assistant begins to write. None leaves thinking to the template.

    A control token that is typed out stays text, as in training: it cannot end the user's turn.

    Raises: UserError when the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise UserError("This tokenizer has no chat template: continue text instead, with --model_mode 0.")
    messages = [{**turn, "content": clean(turn["content"])} for turn in messages]
    options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    if has_markers(tokenizer.chat_template):
        return encode_prompt(messages, tools, tokenizer, **options)
    # The template of another family.
    options |= {"add_generation_prompt": True, "return_dict": False}
    with encoding_lock:
        return tokenizer.apply_chat_template(messages, tools=tools, **options)


def decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of the tokens, special ones left out."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """Token ids in, text out, piece by piece, never half a character: the pieces joined are the text of all ids.

    One character may take several tokens (byte-level BPE) and decodes to U+FFFD until its last byte is there, so U+FFFD
    at the end is held back. Tokens are decoded behind those of the piece before, because some tokenizers drop the blank
    in front of the first word.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.before: list[int] = []  # tokens of the last whole piece
        self.pending: list[int] = []
        self.shown = 0  # characters of `pending` already handed out

    def push(self, token: int) -> str:
        """The text that this token completes, often empty."""
        self.pending.append(token)
        text = self._text()
        whole = text.rstrip("\ufffd")
        piece = whole[self.shown :]
        self.shown = len(whole)
        if whole == text:
            self.before, self.pending, self.shown = self.pending, [], 0
        return piece

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character."""
        rest = self._text()[self.shown :] if self.pending else ""
        self.before, self.pending, self.shown = [], [], 0
        return rest

    def _text(self) -> str:
        return decode(self.tokenizer, self.before + self.pending)[len(decode(self.tokenizer, self.before)) :]


def split_thinking(text: str, opened: bool = False) -> tuple[str, str]:
    """(thought, reply) of an answer. `opened`: the prompt ended in `<think>`. What never closes is all thought."""
    match = re.match(r"\s*<think>(.*?)(?:</think>(.*))?\Z", ("<think>" if opened else "") + text, re.DOTALL)
    return (match[1].strip(), (match[2] or "").strip()) if match else ("", text.strip())


class Painter:
    """Writes an answer as it comes; with colour, a thought (`<think>…</think>`) is dimmed.

    Control characters, which an untrained model may well say, would garble the terminal and are shown as U+FFFD.
    """

    CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

    def __init__(self, out: TextIO, colour: bool, thinking: bool):
        self.out, self.colour, self.thinking = out, colour, thinking

    def write(self, text: str) -> None:
        for part in re.split(r"(</?think>)", self.CONTROL.sub("\ufffd", text)):
            self.thinking = self.thinking or part == "<think>"
            if part:
                self.out.write(dim(part) if self.colour and self.thinking else part)
            self.thinking = self.thinking and part != "</think>"
        self.out.flush()


def dim(text: str) -> str:
    return f"\033[2m{text}\033[0m"


def shows_colour() -> bool:
    """Whether standard output is a terminal whose user wants colours (https://no-color.org)."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return False
    if os.name == "nt":
        os.system("")  # switches the escape codes of old Windows consoles on
    return True
