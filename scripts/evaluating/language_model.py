"""Held-out text: bits per byte and perplexity by source and language.

    bits per byte = − Σ log2 p(token) / Σ UTF-8 bytes         perplexity = exp(− Σ ln p(token) / Σ tokens)        (1)

Bits per byte compare across tokenizers, perplexity does not. `{"text"}` records: every token of the text counts, the
first predicted from <|im_start|>, the <|im_end|> behind the text left out: lm-eval's rule. `{"conversations"}` records:
what the assistant writes counts, each turn's closing <|im_end|> included (it costs bits and spells no bytes): the rule
of the trainers' held-out loss.

A document longer than the window of W tokens is read in windows, so that each token is scored once: the first window
scores W tokens, each other the next S (the stride), and reads as much before them as fills the window. S = W: pieces of
which each sees one token before it (lm-eval's rule); S < W: every token sees at least W − S, at W / S times the cost.

中文：在留出文本上按来源和语言计算 bits per byte 与困惑度；超长文档按滑动窗口评分，每个 token 只计一次。
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dataset.check_data import FORMATS, guess_stage, language_of
from dataset.json_lines import DataError, check_file, parse_line, read_lines
from dataset.lm_dataset import encode_conversations, token_bytes
from dataset.packing import split_records
from dataset.token_cache import open_cache
from scripts.evaluating.scoring import Item, encode, first_token, score

KINDS = ("pretrain", "sft", "reason")  # files that can be scored, by the names of check_data
MOST_HELD_OUT = 2000  # as in training
Z = 1.959964  # of a 95 % interval


class Document(NamedTuple):
    """A record of a file, not tokenised yet: `value` is its text or its turns."""

    source: str
    language: str
    value: str | list[dict]


class Encoded(NamedTuple):
    """ids: the tokens, of which the first is only read; scored: which of ids[1:] count.  Shape: (T,), (T−1,) bool."""

    ids: list[int]
    scored: np.ndarray
    n_bytes: int


# --- Which documents --------------------------------------------------------------------------------------------------


def held_out_numbers(path: Path, tokenizer: PreTrainedTokenizerFast, ratio: float, cache_dir: Path | None) -> list[int]:
    """Which records of a training file, counted from 0 among the good ones, its training did not see.

    Raises: DataError when the file is not one of training, or holds none out.
    """
    cache = open_cache(path, tokenizer, FORMATS[guess_stage(path)], cache_dir, skip_bad_records=True)
    numbers = np.flatnonzero(split_records(cache.hashes.array, ratio, MOST_HELD_OUT)).tolist()
    if not numbers:
        raise DataError(
            f"{path}: none of {len(cache)} records is held out at --val_ratio {ratio}; leave out --held_out"
        )
    return numbers


def records_of(path: Path, read: Callable[[dict], object], wanted: set[int], skip_bad: bool) -> Iterator[dict]:
    """The records with these numbers, counted from 0; with `skip_bad` among the good ones, as training counts.

    Without it, lines that are not wanted are not looked at: a file of training may hold a million.
    Raises: DataError with file, line and reason.
    """
    number = -1
    for line, raw in read_lines(path):
        number += 1
        if not skip_bad and number not in wanted:
            continue
        try:
            record = parse_line(raw)
            read(record)
        except ValueError as error:
            if not skip_bad:
                raise DataError(f"{path}, line {line}: {error}") from None
            number -= 1
            continue
        if number in wanted:
            yield record


def read_documents(
    path: Path, tokenizer: PreTrainedTokenizerFast, held_out: float | None, most: int, cache_dir: Path | None = None
) -> list[Document]:
    """The documents of a file; its source is the record's "source", else the file's name.

    Args: held_out: the val_ratio of a training whose held-out part is wanted, None for the whole file; most: at most so
    many, spread evenly over the file, 0 for all.
    Raises: DataError with file, line and reason.
    """
    stage = guess_stage(check_file(path))
    if stage not in KINDS:
        raise DataError(
            f'{path} holds {stage} records; expected {{"text": "…"}} or {{"conversations": […]}} with answers'
        )
    if held_out is None:
        numbers = range(sum(1 for _ in read_lines(path)))
    else:
        numbers = held_out_numbers(path, tokenizer, held_out, cache_dir)
    documents = []
    read = FORMATS[stage].reader(tokenizer)
    for record in records_of(path, read, set(evenly(numbers, most)), skip_bad=held_out is not None):
        value = record["text"] if stage == "pretrain" else record["conversations"]
        text = value if isinstance(value, str) else "\n".join(turn.get("content") or "" for turn in value)
        source = record.get("source")
        named = source if isinstance(source, str) and source.strip() else path.stem
        documents.append(Document(named, language_of(text), value))
    return documents


def evenly(records: Sequence, most: int) -> Sequence:
    """At most so many of them, spread evenly; all for 0."""
    if not most or len(records) <= most:
        return records
    return [records[i * len(records) // most] for i in range(most)]


def encode_documents(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """Tokens, and what of them counts.  Raises: DataError when a conversation needs a template that is not there."""
    texts = [d.value for d in documents if isinstance(d.value, str)]
    chats = [d.value for d in documents if not isinstance(d.value, str)]
    plain, first = iter(encode(tokenizer, texts)), first_token(tokenizer)
    talks = iter(zip(*encode_conversations(chats, tokenizer), strict=True) if chats else ())
    bytes_of = token_bytes(tokenizer).numpy() if chats else None
    encoded = []
    for document in documents:
        if isinstance(document.value, str):
            ids = next(plain)
            encoded.append(Encoded([first, *ids], np.ones(len(ids), bool), len(document.value.encode())))
        else:
            ids, trained = next(talks)
            encoded.append(Encoded(ids.tolist(), trained[1:], int(bytes_of[ids[1:][trained[1:]]].sum())))
    return encoded


# --- Scoring ----------------------------------------------------------------------------------------------------------


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, end): read ids[start:first], then score ids[first:end], for a document of `length` tokens.

    Every token but the first is scored once, and at most `window` tokens are read for it.

    Args: stride: 1 to `window`.
    """
    done = 1
    while done < length:
        end = min(done + (window if done == 1 else stride), length)
        yield max(end - 1 - window, 0), done, end
        done = end


def score_documents(
    model: PreTrainedModel, documents: Sequence[Encoded], window: int, stride: int, batch_tokens: int, title: str
) -> list[np.ndarray]:
    """Log-probability of every token but the first of each document.  Shape: (T−1,) each, float64."""
    parts = [(n, *part) for n, d in enumerate(documents) for part in windows(len(d.ids), window, stride)]
    items = [Item(documents[n].ids[start:first], [documents[n].ids[first:end]]) for n, start, first, end in parts]
    logps = [np.zeros(len(d.ids) - 1) for d in documents]
    for (n, _, first, end), (found,) in zip(parts, score(model, items, batch_tokens, title), strict=True):
        logps[n][first - 1 : end - 1] = found.numpy()
    return logps


def figures(sums: np.ndarray) -> dict:
    """Equation (1) over documents, with a 95 % interval of bits per byte: that of a ratio over drawn documents.

    Shape: sums (documents, 3): nats, scored tokens, bytes.
    """
    nats, tokens, n_bytes = sums.sum(0).tolist()
    bpb = nats / math.log(2) / max(n_bytes, 1)
    interval = None
    if len(sums) > 1 and n_bytes:
        off = sums[:, 0] / math.log(2) - bpb * sums[:, 2]
        error = math.sqrt((off**2).sum() * len(sums) / (len(sums) - 1)) / n_bytes
        interval = [bpb - Z * error, bpb + Z * error]
    counts = {"documents": len(sums), "tokens": int(tokens), "bytes": int(n_bytes), "nats": nats}
    return {**counts, "bits_per_byte": bpb, "interval95": interval, "perplexity": math.exp(nats / max(tokens, 1))}


def evaluate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    *,
    window: int,
    stride: int,
    batch_tokens: int,
) -> dict:
    """{"window", "stride", figures of all, "by_source": {source: {language: figures}}}."""
    encoded = encode_documents(documents, tokenizer)
    logps = score_documents(model, encoded, window, stride, batch_tokens, "text")
    sums = np.array(
        [(-lp[e.scored].sum(), e.scored.sum(), e.n_bytes) for lp, e in zip(logps, encoded, strict=True)], np.float64
    )
    by_source: dict[str, dict[str, dict]] = {}
    for source, language in sorted({(d.source, d.language) for d in documents}):
        rows = [i for i, d in enumerate(documents) if (d.source, d.language) == (source, language)]
        by_source.setdefault(source, {})[language] = figures(sums[rows])
    return {"window": window, "stride": stride, **figures(sums), "by_source": by_source}
