"""What the tokenizer learns from: records with their language and kind, and how often each word occurs in each group.

Files are read line by line, twice: for the sizes of the groups, then for their words. Whole records are held out for
the report.

中文：读取训练语料：每条记录的语言与类型，各组中每个词的次数与权重；留出一部分记录用于报告。
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from scripts.tokenizing.byte_pairs import pre_tokenizer

ROOT = Path(__file__).resolve().parents[2]

# Share of each group in the weighted text, tuned on held-out text so that no group's compression falls behind. Chats
# weigh most: their words (today's Chinese and English) also serve books, the reverse holds less.
SHARES = {"zh_text": 0.054, "en_text": 0.04, "zh_chat": 0.483, "en_chat": 0.423}
GROUPS = tuple(SHARES)
CHAT_KEYS = ("content", "reasoning_content", "tools", "tool_calls")

HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
ZH_SHARE = 0.3  # a record is Chinese when at least this share of its letters are Han characters
SURROGATES = re.compile("[\ud800-\udfff]")  # half a character, from a broken \u escape: no Unicode text
LONG_LINE = 40  # a line of this many characters that was seen before is boilerplate: counted once


class TokenizerError(ValueError):
    """Something the user can put right; the message is a full sentence that says how."""


@dataclass(frozen=True)
class Record:
    """One line of a file: `group` is one of GROUPS, `parts` the text or the contents of the turns."""

    file: str
    group: str
    parts: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        return sum(len(part.encode("utf-8")) for part in self.parts)

    @property
    def draw(self) -> float:
        """A number in [0, 1) made from the text: equal records draw alike, so none is on both sides of a split."""
        digest = hashlib.blake2b("\0".join(self.parts).encode("utf-8"), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64


def language(text: str) -> str:
    """`zh` when enough letters are Han characters, else `en`, which stands for everything else."""
    letters = sum(map(str.isalpha, text))
    return "zh" if letters and len(HAN.findall(text)) >= ZH_SHARE * letters else "en"


def parse_record(line: str, file: str) -> Record | None:
    """The record of a JSON line; None when it holds no text at all.

    Raises:
        TokenizerError: not JSON, or neither of the two formats.
    """
    try:
        data = json.loads(line)
    except ValueError as e:
        raise TokenizerError(f"not JSON ({e})") from None
    if isinstance(data, dict) and isinstance(data.get("text"), str):
        kind, parts = "text", [data["text"]]
    elif isinstance(data, dict) and isinstance(data.get("conversations"), list):
        turns = data["conversations"]
        if not all(isinstance(turn, dict) for turn in turns):
            raise TokenizerError('"conversations" holds something else than {"role": "…", "content": "…"} turns')
        kind, parts = "chat", [turn[key] for turn in turns for key in CHAT_KEYS if isinstance(turn.get(key), str)]
    else:
        raise TokenizerError('neither {"text": "…"} nor {"conversations": [{"role": "…", "content": "…"}]}')
    parts = tuple(SURROGATES.sub("\ufffd", part) for part in parts if part)
    return Record(file, f"{language(''.join(parts))}_{kind}", parts) if parts else None


def read_records(paths: Sequence[Path], what: str) -> Iterator[Record]:
    """All records of the files, with a progress bar.

    Raises:
        TokenizerError: a malformed line, with file and line number.
        OSError: a file cannot be read.
    """
    total = sum(path.stat().st_size for path in paths)
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None) as bar:
        for path in paths:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    bar.update(len(line))
                    try:
                        text = line.decode("utf-8-sig")
                        record = parse_record(text, path.name) if text.strip() else None
                    except (UnicodeDecodeError, TokenizerError) as e:
                        advice = "Correct the line, or leave the file out of --data."
                        raise TokenizerError(f"{path}, line {number}: {e}. {advice}") from None
                    if record:
                        yield record


def find_data() -> list[Path]:
    """The text and chat files in dataset/, else the demo data (generated when it is not there yet)."""
    found = []
    for path in sorted((ROOT / "dataset").glob("*.jsonl")):
        with open(path, "rb") as file:
            first = file.readline()
        if b'"text"' in first or b'"conversations"' in first:  # preference and multiple-choice files have neither
            found.append(path)
    if found:
        return found
    from dataset.make_demo_data import generate

    demo = generate()
    return [demo["pretrain"], demo["sft"]]


@dataclass
class Corpus:
    """What is trained on: how often each word (pre-token) occurs per group. What is held out: whole records."""

    words: dict[str, Counter[str]] = field(default_factory=lambda: {group: Counter() for group in GROUPS})
    n_bytes: Counter[str] = field(default_factory=Counter)
    held_out: list[Record] = field(default_factory=list)


def read_corpus(paths: Sequence[Path], held_out: float, max_mb: float) -> Corpus:
    """Counts the words of the files; a share of the records is kept aside for the report.

    Args:
        held_out: share of the records, 0 for none.
        max_mb: a group with more megabytes than this is sampled, 0 for no limit.

    Raises:
        TokenizerError: a malformed line, or no text at all.
    """
    n_bytes: Counter[str] = Counter()
    for record in read_records(paths, "reading"):
        n_bytes[record.group] += record.n_bytes
    if not n_bytes:
        raise TokenizerError(f"There is no text in {', '.join(map(str, paths))}; give files with text with --data.")
    keep = {group: min(1.0, max_mb * 1e6 / n_bytes[group]) if max_mb else 1.0 for group in n_bytes}

    corpus = Corpus()
    splitter = pre_tokenizer()
    seen: set[bytes] = set()
    for record in read_records(paths, "counting words"):
        if record.draw < held_out:
            corpus.held_out.append(record)
            continue
        # The upper end of the draw decides on sampling, the lower end on holding out: the two do not touch.
        if (1 - record.draw) / (1 - held_out) > keep[record.group]:
            continue
        counter = corpus.words[record.group]
        for line in (line for part in record.parts for line in part.split("\n")):
            if len(line) >= LONG_LINE:
                digest = hashlib.blake2b(line.encode("utf-8"), digest_size=8).digest()
                if digest in seen:
                    continue
                seen.add(digest)
            # Offsets count characters: the words are kept as text, not in the byte alphabet.
            counter.update(line[start:end] for _, (start, end) in splitter.pre_tokenize_str(line))
            corpus.n_bytes[record.group] += len(line.encode("utf-8"))
    if not corpus.n_bytes:
        raise TokenizerError("All records fell into the held-out part; give more text, or type --held_out 0.")
    return corpus


def word_weights(corpus: Corpus, shares: dict[str, float]) -> tuple[dict[str, int], int]:
    """Weight of each word, such that a group's share of the weighted bytes is its share of `shares`.

    Returns:
        text of the word → weight; and the weight of one occurrence in the group that weighs most per byte.
        Weights are integers, so that sums are exact in any order and the same input gives the same file everywhere.
    """
    present = [group for group in GROUPS if corpus.n_bytes[group] and shares[group] > 0]
    if not present:
        raise TokenizerError(f"No text has a share above 0; the text is {', '.join(sorted(corpus.n_bytes))}.")
    total = sum(shares[group] for group in present)
    scale = {group: max(1, round(1e12 * shares[group] / total / corpus.n_bytes[group])) for group in present}
    weights: Counter[str] = Counter()
    for group in present:
        for word, count in corpus.words[group].items():
            weights[word] += scale[group] * count
    return weights, max(scale.values())
