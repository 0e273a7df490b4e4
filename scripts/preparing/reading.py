"""Records out of whatever holds them: JSON Lines, a JSON array, Parquet, folders of text or web pages.

Every reader goes through its file piece by piece. What it gives is still in the words of its source; formats.py turns
it into ours.

中文：从各种来源读出记录：JSON Lines、JSON 数组、Parquet、文本文件夹、网页文件夹；逐块读取。
"""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dataset import json_lines
from dataset.json_lines import DataError
from trainer.command_line import UserError

TEXT, HTML, TABLES = (".txt", ".md"), (".html", ".htm", ".xhtml"), (".jsonl", ".json", ".parquet")
CHUNK_CHARS = 1 << 20  # of a JSON array, read at once
BATCH_ROWS = 1024  # of a Parquet file, decoded at once
BLANKS = re.compile(r"\s*")
PARAGRAPHS = re.compile(r"\n[^\S\n]*\n\s*")  # what lies between two of them


class Raw(NamedTuple):
    """One record as its source has it, or why it is none."""

    where: str  # "train.json record 3"
    record: dict | None
    reason: str = ""


@dataclass(frozen=True)
class Options:
    """`columns`: our name → theirs. `split`: "file" or "paragraph", of texts."""

    columns: dict[str, str]
    split: str = "file"
    encoding: str = "utf-8"


def find_files(inputs: list[Path]) -> list[Path]:
    """The files behind the arguments; a folder stands for what can be read in it, sorted, whatever is hidden left out.

    Raises: UserError when there is nothing.
    """
    files = []
    for path in inputs:
        if not path.exists():
            raise UserError(f"{path}: there is no such file or folder.")
        if path.is_file():
            files.append(path)
            continue
        inside = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in (*TEXT, *HTML, *TABLES))
        inside = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not inside:
            raise UserError(f"{path} holds no {', '.join((*TABLES, *TEXT, *HTML))} file.")
        files += inside
    return files


def read_any(path: Path, options: Options) -> Iterator[Raw]:
    """The records of one file, their columns renamed.  Raises: DataError, UserError, OSError."""
    suffix = path.suffix.lower()
    if suffix in HTML:
        return read_html(path, options)
    if suffix in TEXT:
        return read_text(path, options)
    with open(path, "rb") as f:
        head = f.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    read = read_parquet if head.startswith(b"PAR1") else read_array if head.startswith(b"[") else read_lines
    return (rename(raw, options.columns) for raw in read(path))


def rename(raw: Raw, columns: dict[str, str]) -> Raw:
    if raw.record is None:
        return raw
    record = dict(raw.record)
    for ours, theirs in columns.items():
        if theirs not in record:
            there = ", ".join(map(str, list(raw.record)[:12]))
            return Raw(raw.where, None, f'column "{theirs}" of --columns is missing (there are: {there})')
        record[ours] = raw.record[theirs]
        if theirs not in columns:
            record.pop(theirs, None)
    return Raw(raw.where, record)


def read_lines(path: Path) -> Iterator[Raw]:
    json_lines.check_file(path)
    for number, line in json_lines.read_lines(path):
        try:
            yield Raw(f"{path} line {number}", json_lines.parse_line(line))
        except ValueError as error:
            yield Raw(f"{path} line {number}", None, str(error))


def read_array(path: Path) -> Iterator[Raw]:
    """A file that is one JSON array of records, without holding all of it.

    Raises: DataError where it is no JSON any more: nothing behind that place can be read.
    """
    decoder, number = json.JSONDecoder(), 0
    with open(path, encoding="utf-8-sig") as f:
        text = ""
        while not text:
            text = f.read(CHUNK_CHARS).lstrip()
        at = 1  # behind the bracket
        while True:
            at = BLANKS.match(text, at).end()
            if text[at : at + 1] == "]":
                return
            try:
                value, end = decoder.raw_decode(text, at)
                end = BLANKS.match(text, end).end()
                if text[end : end + 1] not in (",", "]"):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
            except (json.JSONDecodeError, RecursionError) as error:
                deep = isinstance(error, RecursionError)
                cut_off = not deep and (error.msg.startswith("Unterminated") or error.pos >= len(text) - 16)
                more = f.read(max(CHUNK_CHARS, len(text) - at)) if cut_off else ""  # doubles, for one long record
                if not more:
                    reason = "nested too deeply" if deep else error.msg
                    raise DataError(f"{path} record {number + 1}: not JSON ({reason}); save the file again") from None
                text, at = text[at:] + more, 0
                continue
            number += 1
            where = f"{path} record {number}"
            yield Raw(where, value) if isinstance(value, dict) else Raw(where, None, "not an object")
            at = end + (text[end] == ",")


def read_parquet(path: Path) -> Iterator[Raw]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            binary = pyarrow.types.is_binary, pyarrow.types.is_large_binary  # pictures and the like
            columns = [f.name for f in file.schema_arrow if not any(is_one(f.type) for is_one in binary)]
            number = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield Raw(f"{path} row {number}", record)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: damaged Parquet ({' '.join(str(error).split())[:160]}); copy it again") from error


def read_text(path: Path, options: Options) -> Iterator[Raw]:
    try:
        text = path.read_text(encoding=options.encoding.replace("utf-8", "utf-8-sig"))
    except UnicodeDecodeError as error:
        reason = f"not {options.encoding} at byte {error.start}; older Chinese files often are --encoding gb18030"
        yield Raw(str(path), None, reason)
        return
    yield from pieces(path, text, options.split)


def read_html(path: Path, options: Options) -> Iterator[Raw]:
    """The main text of a web page, without menus, scripts and footers."""
    try:
        import lxml_html_clean  # noqa: F401 - trafilatura needs it, and an older pip does not bring it along
        import trafilatura
    except ImportError:
        raise UserError("web pages need the package trafilatura: pip install trafilatura lxml_html_clean") from None
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # what it cannot read is told here, in one line
    text = trafilatura.extract(path.read_bytes(), include_comments=False, include_tables=True)
    if text:
        yield from pieces(path, text, options.split)
    else:
        yield Raw(str(path), None, "no main text was found in this page")


def pieces(path: Path, text: str, split: str) -> Iterator[Raw]:
    text = text.replace("\r\n", "\n")
    if split == "file":
        yield Raw(str(path), {"text": text.strip()})
        return
    for number, piece in enumerate(filter(None, (p.strip() for p in PARAGRAPHS.split(text))), start=1):
        yield Raw(f"{path} paragraph {number}", {"text": piece})
