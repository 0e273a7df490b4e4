"""A person at a terminal: reading a line, showing an answer. It needs neither torch nor a model, and starts at once.

中文：终端界面：读入一行，显示回答；不依赖 torch。
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO


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
