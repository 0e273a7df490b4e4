"""A JSON Lines file: is it one, where do its lines begin, what does a line hold. Errors name file, line and remedy.

中文：读取 JSON Lines 文件：检查、按整行切分、逐行解析。
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.files import as_typed

ROOT = Path(__file__).resolve().parents[1]
SCAN_BYTES = 1 << 22  # of the first pass, at once


class DataError(ValueError):
    """The data file is not what the stage reads. The message names file, line, what came and what was expected."""


@dataclass(frozen=True)
class Shard:
    """A range of whole lines: bytes [start, end), the first one being line `first_line` (counted from 1)."""

    index: int
    start: int
    end: int
    first_line: int


def check_file(path: str | os.PathLike) -> Path:
    """The path of a readable, non-empty file that is not obviously something else than JSON Lines.

    Raises:
        DataError: missing, a folder, empty, a JSON array, UTF-16, compressed.
    """
    path = Path(path)
    if not path.exists():
        folder = path.parent if path.parent.is_dir() else ROOT / "dataset"
        there = sorted(p.name for p in folder.glob("*.jsonl"))
        lies = (
            f"{folder} holds {', '.join(there[:8])}{' …' if len(there) > 8 else ''}"
            if there
            else f"{folder} holds none"
        )
        raise DataError(
            f"{path}: there is no such file; expected a JSON Lines file ({lies}). "
            "`python dataset/make_demo_data.py` writes demo data into dataset/demo/"
        )
    if path.is_dir():
        raise DataError(f"{path} is a folder; expected a JSON Lines file, for example {path / 'data.jsonl'}")
    try:
        with open(path, "rb") as f:
            head = f.read(1 << 16)
            while head and not head.removeprefix(codecs.BOM_UTF8).strip():
                head = f.read(1 << 16)
    except PermissionError as e:
        raise DataError(f"{path} cannot be read (no permission); expected a readable JSON Lines file") from e
    if not head:
        raise DataError(f'{path} is empty; expected one JSON record per line, for example {{"text": "…"}}')
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path} is UTF-16; expected UTF-8: save it again with the encoding UTF-8")
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf")):
        raise DataError(f"{path} is a compressed file; expected JSON Lines text: unpack it first")
    if head.startswith(b"PAR1"):
        raise DataError(f"{path} is a Parquet file; expected JSON Lines: {converts(path)}")
    if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        raise DataError(f"{path} holds one JSON array; expected one record per line: {converts(path)}")
    return path


def converts(path: Path) -> str:
    """The command that makes our JSON Lines of a file."""
    out = path.with_suffix(".jsonl") if path.suffix != ".jsonl" else path.with_name(f"{path.stem}_lines.jsonl")
    return f"`python scripts/prepare_data.py convert {as_typed(path)} --to {as_typed(out)}` converts it"


def scan_jsonl(path: Path, n_shards: int) -> tuple[str, list[Shard]]:
    """One pass over the raw bytes: (sha256 of the content, at most `n_shards` shards of whole lines that cover it)."""
    digest, shards = hashlib.sha256(), []
    size = path.stat().st_size
    want = -(-size // max(1, n_shards))
    start, first_line, at, newlines = 0, 1, 0, 0  # newlines: seen since the start of the shard
    with open(path, "rb") as f:
        while block := f.read(SCAN_BYTES):
            digest.update(block)
            cut = block.rfind(b"\n") + 1
            if cut and at + cut - start >= want:
                lines = newlines + block.count(b"\n", 0, cut)
                shards.append(Shard(len(shards), start, at + cut, first_line))
                start, first_line, newlines = at + cut, first_line + lines, 0
            else:
                newlines += block.count(b"\n")
            at += len(block)
    if at > start:
        shards.append(Shard(len(shards), start, at, first_line))
    return digest.hexdigest(), shards


def read_lines(path: Path, shard: Shard | None = None) -> Iterator[tuple[int, bytes]]:
    """(line number, raw bytes) of every line that is not blank. Only b"\\n" ends a line: U+2028 in a text is text."""
    start, end, number = (shard.start, shard.end, shard.first_line) if shard else (0, None, 1)
    with open(path, "rb") as f:
        f.seek(start)
        at = start
        while (end is None or at < end) and (raw := f.readline()):
            if at == 0:
                at, raw = len(raw), raw.removeprefix(codecs.BOM_UTF8)
            else:
                at += len(raw)
            raw = raw.strip()
            if raw:
                yield number, raw
            number += 1


def parse_line(raw: bytes) -> dict:
    """The record on one line.

    Raises:
        ValueError: not UTF-8, not JSON, not an object, half a surrogate pair. The message is the reason alone.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(
            f"not UTF-8 (byte {raw[e.start]:#04x} at position {e.start}); expected UTF-8: save it in that encoding"
        ) from None
    try:
        record = json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply; expected a flat record") from None
    except ValueError as e:  # JSONDecodeError, or a number with thousands of digits
        raise ValueError(f"not JSON ({e}); it starts with {_short(text)}") from None
    if not isinstance(record, dict):
        raise ValueError(f'a JSON {_kind(record)}, {_short(text)}; expected an object like {{"text": "…"}}')
    if b"\\ud" in raw or b"\\uD" in raw:  # only an escape can smuggle one in
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as e:
            half = e.object[e.start]
            raise ValueError(
                f"half of a surrogate pair (\\u{ord(half):04x}), which is no character; remove it"
            ) from None
    return record


def _kind(value: Any) -> str:
    names = {
        dict: "object",
        list: "array",
        str: "string",
        bool: "boolean",
        int: "number",
        float: "number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def _short(text: str, n: int = 60) -> str:
    return json.dumps(text if len(text) <= n else text[:n] + "…", ensure_ascii=False)
