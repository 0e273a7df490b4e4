"""Cleaner texts, and reasons to leave a record out. Works on the texts of any record, not on its keys or calls.

中文：清洗文本（Unicode、控制字符、空白），并按长度、符号、重复行、语言决定是否去掉一条记录。
"""

import argparse
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

from dataset.check_data import language_of

# Control characters but newline and tab, marks of byte order and direction, invisible blanks, lone surrogates. What
# joins letters (U+200C, U+200D: emoji, Persian, Hindi) stays.
UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060-\u2064\u2066-\u2069"
    "\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
BLANK_LINES = re.compile(r"\n{3,}")
SYMBOLS = re.compile(r"[^\w\s]")
LANGUAGES = {"zh": "Chinese", "en": "English", "other": "other"}
TEXT_KEYS = ("text", "content", "reasoning_content")


def clean_text(text: str, form: str) -> str:
    """Args: form: NFC, NFKC or none, of Unicode. Indentation stays, as in code."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n\n")
    text = UNSEEN.sub("", text)
    if form != "none":
        text = unicodedata.normalize(form, text)
    return BLANK_LINES.sub("\n\n", "\n".join(map(str.rstrip, text.split("\n")))).strip("\n")


def map_texts(value: Any, change: Callable[[str], str], key: str = "") -> Any:
    """The record with every text changed; roles, tools, calls and answers stay as they are."""
    if isinstance(value, dict):
        return {k: map_texts(v, change, k) for k, v in value.items()}
    if isinstance(value, list):
        return [map_texts(v, change, key) for v in value]
    return change(value) if isinstance(value, str) and key in TEXT_KEYS else value


def texts(record: Any, key: str = "") -> Iterator[str]:
    """The texts of a record, in their order."""
    if isinstance(record, dict):
        for k, v in record.items():
            yield from texts(v, k)
    elif isinstance(record, list):
        for v in record:
            yield from texts(v, key)
    elif isinstance(record, str) and key in TEXT_KEYS:
        yield record


def repeated_share(text: str) -> float:
    """The share of the characters that stand in lines which equal an earlier line."""
    seen, repeated, total = set(), 0, 0
    for line in filter(None, map(str.strip, text.split("\n"))):
        total += len(line)
        repeated += len(line) if line in seen else 0
        seen.add(line)
    return repeated / max(total, 1)


def symbol_share(text: str) -> float:
    """The share of the characters, blanks apart, that are neither letters nor digits of any script."""
    return len(SYMBOLS.findall(text)) / max(len("".join(text.split())), 1)


def unwanted(parts: list[str], args: argparse.Namespace) -> str | None:
    """Why a record with these texts is left out, None if it is not.

    Args: args: min_chars, max_chars (0: no limit) of all of them; max_symbols; max_repeated, in one text, as an answer
        may well repeat its question; languages.
    """
    text = "\n".join(parts)
    if len(text) < args.min_chars:
        return "too short"
    if args.max_chars and len(text) > args.max_chars:
        return "too long"
    if symbol_share(text) > args.max_symbols:
        return "symbols"
    if any(repeated_share(part) > args.max_repeated for part in parts):
        return "repeated lines"
    if args.languages and language_of(text) not in {LANGUAGES[name] for name in args.languages}:
        return "language"
    return None
