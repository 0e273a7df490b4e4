"""Trains the tokenizer: a byte-level BPE for Chinese and English, with the ChatML template of the project.

The vocabulary holds, in this order, 3 control tokens, 8 tags, the 256 bytes and the merges. BPE (Sennrich et al. 2016,
https://arxiv.org/abs/1508.07909) starts from small units and keeps joining the pair that occurs most. Here

- every word counts with a weight, so that Chinese and English, books and chats get the shares of `--shares`, however
  large their files are;
- a merge never ends inside a character. Plain byte-level BPE likes pairs such as 的 + the first byte of the next
  character; those steal bytes from that character, which then falls apart. Chinese chats need 1 % fewer tokens so;
- text is counted line by line, so a newline is always a token of its own. `<|im_start|>assistant\\n` therefore has the
  same tokens with and without an answer behind it: what generation starts from is what training saw.

What comes out is an ordinary tokenizer.json: any Unicode text decodes back to itself, digits stand one by one, and the
pre-tokenizer is the form that llama.cpp knows as "smollm".

    python scripts/train_tokenizer.py                                          # dataset/*.jsonl, or the demo data
    python scripts/train_tokenizer.py --data pretrain.jsonl sft.jsonl --out_dir out/tokenizer
    python scripts/train_tokenizer.py --data sft.jsonl --measure model         # only measure a tokenizer

中文：训练中英双语的字节级 BPE 分词器；按份额给每个词加权，合并不会截断汉字，换行总是独立的一个 token。
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import heapq
import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2; stripped by skip_special_tokens
TAGS = (
    "<think>", "</think>", "<answer>", "</answer>",
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # single tokens too, but they belong to the text: never stripped
VOCAB_SIZE = 6400
MODEL_MAX_LENGTH = 32768

# Share of each group in the weighted text, tuned on held-out text so that no group's compression falls behind. Chats
# weigh most: their words (today's Chinese and English) also serve books, the reverse holds less.
SHARES = {"zh_text": 0.054, "en_text": 0.04, "zh_chat": 0.483, "en_chat": 0.423}
GROUPS = tuple(SHARES)
CHAT_KEYS = ("content", "reasoning_content", "tools", "tool_calls")

HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
ZH_SHARE = 0.3  # a record is Chinese when at least this share of its letters are Han characters
SURROGATES = re.compile("[\ud800-\udfff]")  # half a character, from a broken \u escape: no Unicode text
LONG_LINE = 40  # a line of this many characters that was seen before is boilerplate: counted once

# Written for transformers, and plain enough for the small Jinja engines of llama.cpp and others. What stands between
# `generation` and `endgeneration` is what the assistant writes: the training mask. Contents are rendered as they are,
# so a content that spells <|im_end|> would become the control token when the text is tokenised: whoever tokenises text
# of strangers has to encode such contents as plain text, as dataset/lm_dataset.py does.
CHAT_TEMPLATE = r"""
{#- ChatML: <|im_start|>ROLE, newline, CONTENT, <|im_end|>, newline. No system turn is made up. -#}
{%- set first_is_system = messages and messages[0].role == 'system' %}
{%- if tools or first_is_system %}
    {{- '<|im_start|>system\n' }}
    {%- if first_is_system and messages[0].content %}
        {{- messages[0].content }}
        {%- if tools %}
            {{- '\n\n' }}
        {%- endif %}
    {%- endif %}
    {%- if tools %}
        {{- 'Functions you can call, one JSON signature per line:\n<tools>\n' }}
        {%- for tool in tools %}
            {{- tool | tojson }}
            {{- '\n' }}
        {%- endfor %}
        {{- '</tools>\nTo call one, give its name and arguments as JSON:\n' }}
        {{- '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>' }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = '' %}
    {%- if message.content is defined and message.content is not none %}
        {%- set content = message.content %}
    {%- endif %}
    {%- if content is not string and message.role == 'tool' %}
        {%- set content = content | tojson %}
    {%- endif %}
    {%- if content is not string %}
        {{- raise_exception('The content of a message is not a string.') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>tool\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
            {%- if message.reasoning_content %}
                {{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
            {%- endif %}
            {{- content }}
            {%- if message.tool_calls %}
                {%- for tool_call in message.tool_calls %}
                    {%- set call = tool_call %}
                    {%- if tool_call.function %}
                        {%- set call = tool_call.function %}
                    {%- endif %}
                    {%- if content or not loop.first %}
                        {{- '\n' }}
                    {%- endif %}
                    {{- '<tool_call>\n{"name": ' }}
                    {{- call.name | tojson }}
                    {{- ', "arguments": ' }}
                    {%- if call.arguments is not defined or call.arguments is none %}
                        {{- '{}' }}
                    {%- elif call.arguments is string %}
                        {{- call.arguments }}
                    {%- else %}
                        {{- call.arguments | tojson }}
                    {%- endif %}
                    {{- '}\n</tool_call>' }}
                {%- endfor %}
            {%- endif %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role != 'system' %}
        {{- raise_exception('The role of a message must be system, user, assistant or tool.') }}
    {%- elif not loop.first %}
        {{- raise_exception('A system message must come first.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is not none %}
        {%- if enable_thinking %}
            {{- '<think>\n' }}
        {%- else %}
            {{- '<think>\n\n</think>\n\n' }}
        {%- endif %}
    {%- endif %}
{%- endif %}
""".strip()


class TokenizerError(ValueError):
    """Something the user can put right; the message is a full sentence that says how."""


# ---- reading -------------------------------------------------------------------------------------


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


# ---- byte-pair encoding --------------------------------------------------------------------------


def byte_symbols() -> list[str]:
    """How byte-level BPE writes the bytes 0..255: printable ones as themselves, the others from U+0100 on (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    symbols, others = [], 0
    for byte in range(256):
        symbols.append(chr(byte) if byte in printable else chr(256 + others))
        others += byte not in printable
    return symbols


BYTE_SYMBOLS = byte_symbols()
SYMBOL_BYTES = {symbol: byte for byte, symbol in enumerate(BYTE_SYMBOLS)}


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """One digit at a time, then the GPT-2 pattern: exactly what llama.cpp calls "smollm"."""
    return pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])


def token_bytes(token: str) -> bytes:
    """The bytes behind a byte-level token."""
    return bytes(SYMBOL_BYTES[symbol] for symbol in token)


def byte_token(data: bytes) -> str:
    """How bytes are written in the vocabulary."""
    return "".join(BYTE_SYMBOLS[byte] for byte in data)


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


def character_merges(characters: Counter[str]) -> list[tuple[int, bytes, bytes]]:
    """Merges inside characters of more than one byte, from left to right: (weight, left, right), heaviest first.

    A prefix weighs what all characters that begin with it weigh, so it always comes before them.
    """
    weights: Counter[bytes] = Counter()
    for character, weight in characters.items():
        data = character.encode("utf-8")
        for end in range(2, len(data) + 1):
            weights[data[:end]] += weight
    ranked = sorted(weights.items(), key=lambda item: (-item[1], len(item[0]), item[0]))
    return [(weight, data[:-1], data[-1:]) for data, weight in ranked]


def learn_merges(weights: dict[str, int], n_tokens: int, min_weight: int) -> list[tuple[bytes, bytes]]:
    """The heaviest merges, in the order in which they are applied, until they make `n_tokens` tokens.

    Two lists of candidates run side by side, and the heavier head wins: merges that put one character together from
    its bytes, and merges of neighbouring characters (or of what earlier merges made of them). No pair is heavier than
    one of its characters, so both are whole by the time their pair is taken.

    Args:
        weights: text of a word → weight.
        min_weight: a lighter pair is not worth a token.

    Returns:
        (left, right) in bytes. Fewer than asked for when the text gives no more; a few more than `n_tokens` when two
        pairs make the same token (`a` + `bc`, `ab` + `c`).
    """
    characters: Counter[str] = Counter()
    for word, weight in weights.items():
        for character in word:
            characters[character] += weight
    inside = [merge for merge in character_merges(characters) if merge[0] >= min_weight]
    pairs = PairCounts(weights, sorted(characters), min_weight)
    merges: dict[tuple[bytes, bytes], None] = {}
    made: set[bytes] = set()
    next_inside = 0
    with tqdm(total=n_tokens, desc="merging", disable=None) as bar:
        while len(made) < n_tokens:
            heaviest = pairs.heaviest()
            if next_inside < len(inside) and (heaviest is None or inside[next_inside][0] >= heaviest[0]):
                _, left, right = inside[next_inside]
                next_inside += 1
            elif heaviest is not None:
                left, right = pairs.merge(*heaviest[1:])
            else:
                break
            merges[left, right] = None
            made.add(left + right)
            bar.update(len(made) - bar.n)
    return list(merges)


class PairCounts:
    """The words as lists of symbols, with the weight of every pair of neighbours kept up to date while pairs merge.

    A symbol is a number; `symbols[number]` are its bytes. A pair (a, b) is stored as the one number a · 2^24 + b.
    """

    SHIFT = 24

    def __init__(self, weights: dict[str, int], characters: Sequence[str], min_weight: int):
        self.min_weight = min_weight
        self.symbols = [character.encode("utf-8") for character in characters]
        self.number = {data: index for index, data in enumerate(self.symbols)}
        number = {character: index for index, character in enumerate(characters)}
        self.words = [[number[character] for character in word] for word in weights]
        self.word_weights = list(weights.values())
        self.weight: dict[int, int] = {}
        self.places: dict[int, list[int]] = {}  # pair → words that hold it, or held it once
        for index, word in enumerate(tqdm(self.words, desc="counting pairs", disable=None)):
            for left, right in itertools.pairwise(word):
                self._add(left << self.SHIFT | right, self.word_weights[index], index)
        self.heap = [(-weight, pair) for pair, weight in self.weight.items() if weight >= min_weight]
        heapq.heapify(self.heap)

    def _add(self, pair: int, weight: int, index: int) -> None:
        if pair in self.weight:
            self.weight[pair] += weight
            self.places[pair].append(index)
        else:
            self.weight[pair] = weight
            self.places[pair] = [index]

    def heaviest(self) -> tuple[int, int, int] | None:
        """(weight, left, right) of the heaviest pair, None when all are too light."""
        while self.heap:
            weight, pair = self.heap[0]
            now = self.weight.get(pair, 0)
            if -weight == now:
                return now, pair >> self.SHIFT, pair & ((1 << self.SHIFT) - 1)
            # Out of date: the pair lost weight where a merge took one of its two. (What gains weight is pushed anew.)
            if now >= self.min_weight:
                heapq.heapreplace(self.heap, (-now, pair))
            else:
                heapq.heappop(self.heap)
        return None

    def merge(self, left: int, right: int) -> tuple[bytes, bytes]:
        """Makes one symbol of the pair wherever it stands; returns the bytes of the two."""
        data = self.symbols[left] + self.symbols[right]
        new = self.number.setdefault(data, len(self.symbols))
        if new == len(self.symbols):
            self.symbols.append(data)
        shift, weights = self.SHIFT, self.weight
        gained = set()
        for index in dict.fromkeys(self.places.pop(left << shift | right)):
            word, weight = self.words[index], self.word_weights[index]
            i = 0
            while i < len(word) - 1:
                if word[i] == left and word[i + 1] == right:
                    if i > 0:
                        weights[word[i - 1] << shift | left] -= weight
                        self._add(word[i - 1] << shift | new, weight, index)
                        gained.add(word[i - 1] << shift | new)
                    if i + 2 < len(word):
                        weights[right << shift | word[i + 2]] -= weight
                        self._add(new << shift | word[i + 2], weight, index)
                        gained.add(new << shift | word[i + 2])
                    word[i : i + 2] = [new]
                i += 1
        del weights[left << shift | right]
        for pair in gained:
            if weights.get(pair, 0) >= self.min_weight:
                heapq.heappush(self.heap, (-weights[pair], pair))
        return self.symbols[left], self.symbols[right]


# ---- the tokenizer and its files -----------------------------------------------------------------


def build_tokenizer(merges: Iterable[tuple[bytes, bytes]]) -> Tokenizer:
    """The tokenizer: control tokens, tags, bytes, then one token per merge, in this order."""
    pairs = [(byte_token(left), byte_token(right)) for left, right in merges]
    tokens = dict.fromkeys((*CONTROL_TOKENS, *TAGS, *BYTE_SYMBOLS, *(left + right for left, right in pairs)))
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    """What transformers needs besides tokenizer.json."""
    pad, bos, eos = CONTROL_TOKENS
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": pad,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL_MAX_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }


def save_tokenizer(tokenizer: Tokenizer, out_dir: Path) -> list[Path]:
    """Writes tokenizer.json and tokenizer_config.json; each is replaced in one go, never left half-written.

    Raises:
        OSError: the folder cannot be written.
    """
    contents = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(tokenizer_config(), ensure_ascii=False, indent=2) + "\n",
    }
    paths = [out_dir / name for name in contents]
    parts = [out_dir / f"{name}.part" for name in contents]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for part, content in zip(parts, contents.values(), strict=True):
            with open(part, "w", encoding="utf-8", newline="\n") as file:
                file.write(content)
        for part, path in zip(parts, paths, strict=True):
            os.replace(part, path)
    except OSError as e:
        for part in parts:
            with contextlib.suppress(OSError):  # the error worth reporting is the first one
                part.unlink()
        raise OSError(f"Cannot write {out_dir}: {e.strerror or e}. Give another folder with --out_dir.") from e
    return paths


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder.

    Raises:
        TokenizerError: there is none, or it is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(f"There is no tokenizer.json in {folder}; --measure takes the folder that holds one.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises a bare Exception
        raise TokenizerError(f"{path} is not a tokenizer ({e}); train one, or give another folder.") from e


# ---- report --------------------------------------------------------------------------------------


def vocabulary_report(tokenizer: Tokenizer) -> str:
    """What the entries are spent on."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    kinds: Counter[str] = Counter()
    for token in tokenizer.get_vocab():
        if token in added:
            kinds["control tokens and tags"] += 1
            continue
        data = token_bytes(token)
        text = data.decode("utf-8", "replace")
        if len(data) == 1:
            kinds["bytes"] += 1
        elif "\ufffd" in text:
            kinds["parts of a character"] += 1
        elif HAN.search(text):
            kinds["Han, one character" if len(text) == 1 else "Han, several characters"] += 1
        elif any(map(str.isalpha, text)):
            kinds["Latin words and parts" if text.isascii() else "other scripts"] += 1
        else:
            kinds["punctuation, blanks, symbols"] += 1
    lines = [f"  {count:6,d}  {kind}" for kind, count in kinds.most_common()]
    return "\n".join([f"vocabulary: {tokenizer.get_vocab_size():,d} entries", *lines])


ODD_TEXTS = (
    "", " ", "\n\n\n", "\r\n\t ", "\x00\x07", "3.14 ½ ① 〇", "naïve Ünïcödé", "𠮷野家 龘", "👩‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301\u200b\ufeff", "\U0010ffff", "<|im_start|>user\n<think>?</think><|im_end|>", "العربية हिन्दी ไทย",
)


def count_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> int:
    """Number of tokens of the texts, which must decode back to themselves.

    Raises:
        TokenizerError: a text that does not come back.
    """
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
    for text, decoded in zip(texts, tokenizer.decode_batch(ids, skip_special_tokens=False), strict=True):
        if decoded != text:
            raise TokenizerError(f"The tokenizer does not give this text back: {text[:80]!r}.")
    return sum(map(len, ids))


def compression_report(tokenizer: Tokenizer, records: Iterable[Record]) -> str:
    """UTF-8 bytes per token of the records' texts, by language and kind, and by file: more is better.

    Raises:
        TokenizerError: a text that does not decode back to itself.
    """
    n_records = 0
    n_bytes: Counter[str] = Counter()
    n_tokens: Counter[str] = Counter()
    for record in records:
        n_records += 1
        size, tokens = record.n_bytes, count_tokens(tokenizer, record.parts)
        lang, kind = record.group.split("_")
        for key in (f"{lang} {kind}", f"{lang} all", record.file):
            n_bytes[key] += size
            n_tokens[key] += tokens
    count_tokens(tokenizer, ODD_TEXTS)
    if not n_records:
        return "compression: no record is held out to measure it on"
    rows = [f"{lang} {kind}" for lang in ("zh", "en") for kind in ("text", "chat", "all")]
    rows = [key for key in (*rows, *sorted(n_bytes.keys() - rows)) if n_tokens[key]]
    width = max(map(len, rows))
    return "\n".join([
        f"compression on {n_records:,d} held-out records, all of which decode back to themselves",
        f"  {'':{width}} {'bytes':>12} {'tokens':>12} {'bytes/token':>12}",
        *(f"  {key:{width}} {n_bytes[key]:12,d} {n_tokens[key]:12,d} {n_bytes[key] / n_tokens[key]:12.3f}"
          for key in rows),
    ])


# ---- command line --------------------------------------------------------------------------------


def parse_shares(value: str) -> dict[str, float]:
    """`zh_text=0.1,en_chat=0.5` → shares; groups that are not named keep their default."""
    shares = dict(SHARES)
    for item in value.split(","):
        name, _, number = item.partition("=")
        try:
            shares[name.strip()] = float(number)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{item!r} is not NAME=NUMBER, for instance zh_text=0.1") from None
    if set(shares) != set(GROUPS):
        raise argparse.ArgumentTypeError(f"the names are {', '.join(GROUPS)}; got {value!r}")
    if min(shares.values()) < 0 or max(shares.values()) <= 0:
        raise argparse.ArgumentTypeError(f"shares are numbers from 0 up, one of them above 0; got {value!r}")
    return shares


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer and report its compression.")
    add = parser.add_argument
    add("--data", nargs="+", type=Path, metavar="FILE",
        help='JSON Lines files with {"text": …} or {"conversations": […]} (default: those in dataset/, else demo data)')
    add("--out_dir", type=Path, default=ROOT / "out" / "tokenizer", help="folder for the two files (%(default)s)")
    add("--vocab_size", type=int, help=f"entries in all, control tokens and bytes included (default: {VOCAB_SIZE})")
    add("--shares", type=parse_shares, default=SHARES, metavar="NAME=NUMBER,…",
        help="weight of Chinese (zh) and English (en) text and chat, in relation to each other (default: "
        + ",".join(f"{name}={share}" for name, share in SHARES.items()) + ")")
    add("--max_mb", type=float, default=24, help="sample a group down to this many MB, 0 for no limit (%(default)s)")
    add("--held_out", type=float, default=0.02, help="share of the records kept for the report (%(default)s)")
    add("--measure", type=Path, metavar="DIR",
        help="train nothing: report on the tokenizer of this folder, on the held-out records of --data")
    args = parser.parse_args(argv)
    if not 0 <= args.held_out < 1 and not (args.measure and args.held_out == 1):
        parser.error(f"--held_out is a share from 0 to below 1 (up to 1 with --measure); got {args.held_out}")
    if args.measure and args.held_out == 0:
        parser.error("--measure needs records to measure on; type --held_out 0.02, or 1 for all")
    if args.max_mb < 0:
        parser.error(f"--max_mb is a number of megabytes from 0 up; got {args.max_mb}")
    smallest = len(CONTROL_TOKENS) + len(TAGS) + 256
    if args.vocab_size is not None and args.vocab_size < smallest:
        parser.error(f"--vocab_size counts {smallest} control tokens, tags and bytes; got {args.vocab_size}")
    return args


def train(corpus: Corpus, shares: dict[str, float], vocab_size: int) -> Tokenizer:
    """Learns the merges and builds the tokenizer; smaller than asked for when the text gives no more."""
    weights, heaviest_occurrence = word_weights(corpus, shares)
    # A pair that occurs only once would be learnt by heart; the text is used up before that.
    n_tokens = vocab_size - len(CONTROL_TOKENS) - len(TAGS) - 256
    return build_tokenizer(learn_merges(weights, n_tokens, min_weight=2 * heaviest_occurrence))


def run(args: argparse.Namespace) -> None:
    paths = args.data or find_data()
    for path in paths:
        if not path.is_file():
            raise TokenizerError(f"There is no file {path}; give JSON Lines files with --data.")
    if args.measure:
        tokenizer = load_tokenizer(args.measure)
        held_out = (record for record in read_records(paths, "measuring") if record.draw < args.held_out)
        print(f"{vocabulary_report(tokenizer)}\n\n{compression_report(tokenizer, held_out)}")
        return
    corpus = read_corpus(paths, args.held_out, args.max_mb)
    print("trained on " + ", ".join(f"{corpus.n_bytes[g] / 1e6:.1f} MB {g}" for g in GROUPS if corpus.n_bytes[g]))
    asked = args.vocab_size or VOCAB_SIZE
    tokenizer = train(corpus, args.shares, asked)
    size = tokenizer.get_vocab_size()
    if size < asked:
        few = f"The text is enough for a vocabulary of {size:,d} entries, not {asked:,d}"
        if args.vocab_size:
            raise TokenizerError(f"{few}; add files to --data, or type --vocab_size {size}.")
        print(f"note: {few}; for more, add files to --data.")
    print(f"{vocabulary_report(tokenizer)}\n\n{compression_report(tokenizer, corpus.held_out)}\n")
    for path in save_tokenizer(tokenizer, args.out_dir):
        print(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from trainer.command_line import run_script  # after the flags: --help need not wait for torch

    run_script(lambda: run(args))


if __name__ == "__main__":
    main()
