"""The data of pretraining and of supervised fine-tuning: records → tokens and mask → full rows.

Reading order: the ONE assistant mask → packing → the datasets → bytes per token. What a record looks like stands in
record_formats.py; tokenising once and caching is plumbing and lives in token_cache.py.

Legend: T tokens of a row, N records, S segments, R rows, V vocabulary. A segment is what one record (or one piece of an
over-long document) contributes to a row; no token attends to another segment of its row.

中文：记录 → 分词与掩码 → 装箱成满行。掩码只有一处实现，来自对话模板里的 {% generation %} 标记。
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from dataset.json_lines import DataError
from dataset.record_formats import parse_conversation, parse_sft, parse_text
from dataset.token_cache import (
    CacheError,
    MappedArray,
    RecordFormat,
    TokenCache,
    build_folder,
    open_cache,
    plain_backend,
    read_meta,
    require_markers,
    user_errors,
    write_meta,
)

__all__ = [
    "IGNORE",
    "CacheError",
    "DataError",
    "PackedDataset",
    "PretrainDataset",
    "SFTDataset",
    "encode_conversations",
    "encode_texts",
    "parse_conversation",
    "pack_best_fit",
    "token_bytes",
]

IGNORE = -100  # label of a token that is not trained on (the default ignore_index of cross entropy)
PACK_VERSION = 1
RELEASE_TOKENS = 1 << 18  # read so many tokens, then hand the mapped pages back: each row read maps some 64 KiB

# ---- tokens and the mask -------------------------------------------------------------------------


def encode_texts(texts: Sequence[str], tokenizer: Any) -> list[np.ndarray]:
    """Pretraining documents: <|im_start|> + text + <|im_end|>, one int array each.

    A control token written out in a text stays text: only the two of ours delimit a document.
    """
    head, tail = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    with plain_backend(tokenizer, controls_as_text=True) as backend:
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(head + e.ids + tail, dtype=np.int64) for e in encodings]


def encode_conversations(conversations: Sequence[Any], tokenizer: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens of whole conversations and which of them are trained on: THE assistant mask of the project.

    Each conversation is a list of turns as it stands in a file. The chat template renders it; what the template puts
    between `{% generation %}` and `{% endgeneration %}` is trained on: all that the assistant writes, its closing
    <|im_end|> included.

    A control token (<|im_start|>, <|im_end|>, <|endoftext|>) written out inside a content is encoded as ordinary text,
    so that no content can forge a turn. <think> and the other marks of the format are allowed in contents and stay
    single tokens.

    Returns:
        ids: per conversation an int64 array (T_i,); trained: per conversation a bool array (T_i,).
    Raises:
        ValueError: a malformed conversation, or a template without generation markers.
    """
    return encode_rendered(
        [render_conversation(*parse_conversation(turns), tokenizer) for turns in conversations], tokenizer
    )


def render_conversation(
    messages: list[dict], tools: list[dict] | None, tokenizer: Any, **options: Any
) -> tuple[str, list[tuple[int, int]], str]:
    """(text, character spans the assistant wrote, mark). A control token out of a content stands between two marks.

    Args: options of the chat template, for example add_generation_prompt=True or enable_thinking=False.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    require_markers(tokenizer.chat_template)
    mark = ""
    controls = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    said = json.dumps([messages, tools], ensure_ascii=False)
    if any(control in said for control in controls):
        mark = next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in said)
        messages, tools = _guard(messages, controls, mark), _guard(tools, controls, mark)
    try:
        texts, spans = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
            **options,
        )
    except (TemplateError, TypeError) as e:
        raise ValueError(f"the chat template refuses the conversation: {e}") from None
    return texts[0], spans[0], mark


def encode_rendered(
    rendered: Sequence[tuple[str, list[tuple[int, int]], str]], tokenizer: Any
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rendered conversations → (ids, trained), as encode_conversations gives them.

    What the assistant writes is tokenised apart from the header before it, as it is when the model generates: else an
    answer that begins with a newline would share a token with the header. All pieces of a batch are tokenised together.
    """
    pieces = [_pieces(*one) for one in rendered]
    encodings = {}
    for as_text in (False, True):
        texts = [text for ps in pieces for _, text, literal in ps if literal == as_text]
        with plain_backend(tokenizer, controls_as_text=as_text) as backend:
            encodings[as_text] = iter(backend.encode_batch(texts, add_special_tokens=False))
    all_ids, all_trained = [], []
    for ps, (_, spans, _) in zip(pieces, rendered, strict=True):
        ids: list[int] = []
        ranges = []  # of trained tokens
        for start, text, literal in ps:
            encoding = next(encodings[literal])
            for a, z in spans:
                if a <= start < z:  # pieces begin where spans begin, so a span covers a piece from its first token on
                    ranges.append((len(ids), len(ids) + _tokens_before(encoding, z - start, len(text))))
            ids += encoding.ids
        trained = np.zeros(len(ids), dtype=bool)
        for a, z in ranges:
            trained[a:z] = True
        all_ids.append(np.array(ids, dtype=np.int64))
        all_trained.append(trained)
    return all_ids, all_trained


def _pieces(text: str, spans: list[tuple[int, int]], mark: str) -> list[tuple[int, str, bool]]:
    """(start, text, literal): what is tokenised apart. Literal pieces are control tokens written out in a content."""
    starts = sorted({0, *(a for a, _ in spans)})
    out = []
    for at, end in zip(starts, [*starts[1:], len(text)], strict=True):
        for i, part in enumerate(text[at:end].split(mark) if mark else [text[at:end]]):
            if part:
                out.append((at, part, i % 2 == 1))
            at += len(part) + len(mark)
    return out


def _tokens_before(encoding: Any, z: int, n_chars: int) -> int:
    """Number of tokens that hold something of the first z characters."""
    if z >= n_chars:
        return len(encoding.ids)
    # A token may hold characters on both sides of z, and character z - 1 may be spread over several tokens, of which
    # char_to_token gives the first: hence both.
    return max(encoding.char_to_token(z), encoding.char_to_token(z - 1) + 1)


def encode_prompt(messages: list[dict], tools: list[dict] | None, tokenizer: Any, **options: Any) -> list[int]:
    """The ids of a conversation up to where the assistant begins to write, tokenised exactly as in training.

    What a user types cannot forge a turn here either.  Raises: ValueError as `encode_conversations`.
    """
    rendered = render_conversation(messages, tools, tokenizer, add_generation_prompt=True, **options)
    return encode_rendered([rendered], tokenizer)[0][0].tolist()


def _guard(value: Any, controls: list[str], mark: str) -> Any:
    """Puts the mark on both sides of every control token inside strings, in keys too."""
    if isinstance(value, str):
        for control in controls:
            value = value.replace(control, f"{mark}{control}{mark}")
        return value
    if isinstance(value, dict):
        return {_guard(k, controls, mark): _guard(v, controls, mark) for k, v in value.items()}
    if isinstance(value, list):
        return [_guard(v, controls, mark) for v in value]
    return value


def _prepare_text(record: dict, tokenizer: Any) -> str:
    return parse_text(record)


def _encode_prepared_texts(texts: list[str], tokenizer: Any) -> tuple[list[np.ndarray], None]:
    return encode_texts(texts, tokenizer), None


def _prepare_sft(record: dict, tokenizer: Any) -> tuple[str, list[tuple[int, int]], str]:
    return render_conversation(*parse_sft(record), tokenizer)


PRETRAIN = RecordFormat("pretrain", _prepare_text, _encode_prepared_texts, masked=False)
SFT = RecordFormat("sft", _prepare_sft, encode_rendered, masked=True)


# ---- packing -------------------------------------------------------------------------------------


def pack_best_fit(lengths: np.ndarray, max_seq_len: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing bin packing: longest segment first, each into the fullest row that still has room for it.

    Segments of one length are interchangeable, so they are placed together: the work grows with the number of distinct
    lengths, not of segments. For rows of a language model: Ding et al. 2024, arXiv:2404.10830.

    Args:
        lengths: (S,) tokens per segment, each in 1 … max_seq_len.
        rng: mixes segments of equal length, and the rows.
    Returns:
        order: (S,) segment numbers, row by row; rows: (R + 1,) row r holds order[rows[r]:rows[r + 1]].
    """
    lengths = np.asarray(lengths)
    if not len(lengths):
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    if not 1 <= lengths.min() <= lengths.max() <= max_seq_len:
        raise ValueError(f"segment lengths {lengths.min()} … {lengths.max()}; expected 1 … {max_seq_len}")
    by_length = rng.permutation(len(lengths))
    by_length = by_length[np.argsort(-lengths[by_length], kind="stable")]
    room_rows: list[list[np.ndarray]] = [[] for _ in range(max_seq_len + 1)]  # rows by the room they have left
    rooms = 0  # bit r is set when room_rows[r] has rows
    row_of = np.empty(len(lengths), dtype=np.int64)  # aligned with by_length
    n_rows = 0

    def keep(rows: np.ndarray, room: int) -> None:
        nonlocal rooms
        if room and len(rows):
            room_rows[room].append(rows)
            rooms |= 1 << room

    distinct, starts = np.unique(-lengths[by_length], return_index=True)
    for length, at, end in zip(
        (-distinct).tolist(), starts.tolist(), [*starts[1:].tolist(), len(lengths)], strict=True
    ):
        while at < end:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1  # the least room that suffices
                rows = room_rows[room].pop()
                if not room_rows[room]:
                    rooms ^= 1 << room
            else:
                room = max_seq_len
                rows = np.arange(n_rows, n_rows + -(-(end - at) // (room // length)))
                n_rows += len(rows)
            each = room // length  # best fit puts the next equal segment into the row just used, as long as it fits
            n_full, rest = divmod(min(end - at, each * len(rows)), each)
            row_of[at : at + n_full * each] = np.repeat(rows[:n_full], each)
            keep(rows[:n_full], room - each * length)
            at += n_full * each
            used = n_full
            if rest:  # the last segments of this length fill one row in part
                row_of[at : at + rest] = rows[n_full]
                keep(rows[n_full : n_full + 1], room - rest * length)
                at += rest
                used += 1
            keep(rows[used:], room)
    row_of = rng.permutation(n_rows)[row_of]  # neighbours in length are not neighbours in order
    by_row = np.argsort(row_of, kind="stable")
    return by_length[by_row], np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=n_rows))]).astype(np.int64)


def split_records(hashes: np.ndarray, val_ratio: float, max_val_records: int) -> np.ndarray:
    """(N,) bool, True for the validation part: a function of the record's own tokens, not of order or seed.

    Equal records share a hash and so a side. At least one record is set aside when there are two different ones, and at
    most `max_val_records` (more only when the first hash alone has more equal records).
    """
    if val_ratio <= 0 or len(hashes) < 2 or max_val_records < 1:
        return np.zeros(len(hashes), dtype=bool)
    distinct, counts = np.unique(hashes, return_counts=True)  # ascending hashes: a random but fixed order
    if len(distinct) < 2:
        return np.zeros(len(hashes), dtype=bool)
    below = int(np.searchsorted(distinct, np.uint64(min(val_ratio * 2.0**64, 2.0**64 - 2048)), side="right"))
    n = min(below, int(np.searchsorted(np.cumsum(counts), max_val_records, side="right")), len(distinct) - 1)
    return hashes <= distinct[max(n, 1) - 1]


# ---- datasets ------------------------------------------------------------------------------------


class PackedDataset(torch.utils.data.Dataset):
    """Rows of `max_seq_len` tokens packed from whole records, read from a memory-mapped cache.

    `dataset[row]` gives int64 tensors, all of shape (T,):
        input_ids     tokens, the pad token after the last segment
        labels        input_ids where the token is trained on; IGNORE elsewhere, on the first token of each segment
                      (nothing before it predicts it) and on padding. Aligned with input_ids: the loss shifts once
        position_ids  0, 1, 2 … within each segment; 0 on padding
        documents     0, 1, 2 … number of the segment in the row; -1 on padding
    Row -1 is all padding with every label IGNORE: filler for a sampler that has to complete its last batch.

    Attributes:
        stats: records and skipped of the whole file; of this part: used (records), dropped, truncated (conversations),
            split (documents), segments, tokens, trained_tokens, rows, fill (share of real tokens in the rows).
        data_key: changes when data, tokenizer, template, format, max_seq_len, seed or split change.
    """

    format: RecordFormat

    def __init__(
        self,
        path: str | os.PathLike,
        tokenizer: Any,
        max_seq_len: int,
        split: str = "train",
        val_ratio: float = 0.01,
        seed: int = 42,
        cache_dir: str | os.PathLike | None = None,
        skip_bad_records: bool = False,
        show_progress: bool = True,
        max_val_records: int = 2000,
    ):
        """
        Args:
            path: a JSON Lines file.
            tokenizer: a fast tokenizer with a chat template.
            max_seq_len: tokens per row, at least 2.
            split: "train", "val", or "all" (no split).
            val_ratio: share of the records set aside for validation. A file with one record has no validation part.
            seed: mixes rows and equally long segments; the split does not depend on it.
            cache_dir: where token caches are kept; dataset/.cache when None.
            skip_bad_records: count bad records and leave them out instead of raising.
            show_progress: a bar while tokenising, on a terminal; ranks other than the first pass False.
            max_val_records: at most so many records are set aside.
        Raises:
            DataError: the file is not what the stage reads. CacheError: the cache cannot be written.
        """
        if max_seq_len < 2:
            raise DataError(f"max_seq_len is {max_seq_len}; expected at least 2: a token and the one that follows it")
        if split not in ("train", "val", "all"):
            raise DataError(f"split is {split!r}; expected 'train', 'val' or 'all'")
        if not 0 <= val_ratio < 1:
            raise DataError(f"val_ratio is {val_ratio}; expected a share in 0 … 1, for example 0.01")
        self.max_seq_len = max_seq_len
        self.pad_token_id = tokenizer.pad_token_id
        self.cache = open_cache(path, tokenizer, self.format, cache_dir, skip_bad_records, show_progress)
        settings = {"version": PACK_VERSION, "cache": self.cache.folder.name, "max_seq_len": max_seq_len, "seed": seed}
        settings |= {"val_ratio": val_ratio, "max_val_records": max_val_records}
        if split == "all":
            settings |= {"val_ratio": 0, "max_val_records": 0}
        self.data_key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:20]
        folder = self.cache.folder / f"rows-{self.data_key}"
        meta = read_meta(folder)
        if meta is None:
            cache_dir = self.cache.folder.parent
            with user_errors(cache_dir), build_folder(folder, cache_dir, f"packing {path}") as tmp:
                if tmp is not None:
                    _write_plan(tmp, self.cache, settings)
            meta = read_meta(folder)
        part = "val" if split == "val" else "train"
        self.stats: dict[str, Any] = {"records": len(self.cache), "skipped": self.cache.meta["skipped"], **meta[part]}
        self._rows, self._starts, self._lengths = (
            MappedArray(folder / f"{part}_{n}.npy") for n in ("rows", "starts", "lengths")
        )
        self._n_rows = self.stats["rows"]
        self._unreleased = 0

    def __len__(self) -> int:
        return self._n_rows

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        if not -1 <= row < self._n_rows:
            raise IndexError(f"row {row} of {self._n_rows}")
        width = self.max_seq_len
        ids = np.full(width, self.pad_token_id, dtype=np.int64)
        trained = np.zeros(width, dtype=bool)
        positions = np.zeros(width, dtype=np.int64)
        documents = np.full(width, -1, dtype=np.int64)
        if row >= 0:
            tokens = self.cache.tokens.array
            mask = self.cache.trained.array if self.cache.trained else None
            first, last = self._rows.array[row : row + 2].tolist()
            starts, lengths = self._starts.array[first:last].tolist(), self._lengths.array[first:last].tolist()
            count = np.arange(width)
            at = 0
            for document, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                end = at + length
                ids[at:end] = tokens[start : start + length]
                trained[at + 1 : end] = True if mask is None else mask[start + 1 : start + length]
                positions[at:end] = count[:length]
                documents[at:end] = document
                at = end
            self._unreleased += at
            if self._unreleased >= RELEASE_TOKENS:
                self._unreleased = 0
                self.cache.tokens.release()
                if self.cache.trained:
                    self.cache.trained.release()
        labels = np.where(trained, ids, IGNORE)
        arrays = {"input_ids": ids, "labels": labels, "position_ids": positions, "documents": documents}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    @staticmethod
    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Rows of this dataset, stacked into a batch of tensors (B, T)."""
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class PretrainDataset(PackedDataset):
    """`{"text": "…"}` records. A document longer than a row is split: piece k + 1 begins with the last token of piece
    k, so that every token but the document's first is predicted exactly once."""

    format = PRETRAIN


class SFTDataset(PackedDataset):
    """`{"conversations": […]}` records: SFT, LoRA, reasoning, distillation. A conversation longer than a row keeps its
    head; one whose head holds nothing to train on is dropped."""

    format = SFT

    @staticmethod
    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """A batch, and beside its tensors (B, T) what the loss needs: often most of a conversation is not trained on.

        head_positions (N,) are the positions b·T + t whose next token is trained on, targets (N,) those tokens. N is
        filled up to whole 64s with position 0 and target IGNORE, so that few sizes occur and none is empty.
        """
        batch = PackedDataset.collate(rows)
        following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE).flatten()
        positions = (following != IGNORE).nonzero().flatten()
        size = max(64, -(-len(positions) // 64) * 64)
        batch["head_positions"] = torch.zeros(size, dtype=torch.long)
        batch["head_positions"][: len(positions)] = positions
        batch["targets"] = torch.full((size,), IGNORE)
        batch["targets"][: len(positions)] = following[positions]
        return batch


def _write_plan(tmp: Path, cache: TokenCache, settings: dict) -> None:
    """Which tokens make up which row, of both parts: {train,val}_{rows,starts,lengths}.npy and meta.json."""
    width = settings["max_seq_len"]
    offsets = cache.offsets.array
    lengths = np.diff(offsets)
    is_val = split_records(cache.hashes.array, settings["val_ratio"], settings["max_val_records"])
    dropped = np.zeros(len(lengths), dtype=bool)
    if cache.first_trained is not None:
        # The first token of a segment is never predicted, so a mask that begins there begins at the second.
        dropped = np.maximum(cache.first_trained.array, 1) >= np.minimum(lengths, width)
    stats = {}
    for part, here in (("train", ~is_val), ("val", is_val)):
        mine = np.flatnonzero(here & ~dropped)
        starts, sizes = offsets[mine], lengths[mine]
        long = int((sizes > width).sum())
        if cache.trained is not None:
            sizes = np.minimum(sizes, width)
            trained_tokens = _count_trained(cache, starts, sizes)
        else:
            trained_tokens = int((sizes - 1).sum())
            pieces = np.maximum(
                1, -(-(sizes - 1) // (width - 1))
            )  # a piece begins with the last token of the one before
            skip = (np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * (width - 1)
            starts, sizes = np.repeat(starts, pieces) + skip, np.minimum(np.repeat(sizes, pieces) - skip, width)
        order, rows = pack_best_fit(sizes, width, np.random.default_rng(settings["seed"]))
        np.save(tmp / f"{part}_starts.npy", starts[order].astype(np.int64))
        np.save(tmp / f"{part}_lengths.npy", sizes[order].astype(np.int32))
        np.save(tmp / f"{part}_rows.npy", rows)
        n_rows, tokens = len(rows) - 1, int(sizes.sum())
        stats[part] = {
            "used": len(mine),
            "dropped": int((here & dropped).sum()),
            "truncated": long if cache.trained is not None else 0,
            "split": long if cache.trained is None else 0,
            "segments": len(sizes),
            "tokens": tokens,
            "trained_tokens": trained_tokens,
            "rows": n_rows,
            "fill": tokens / (n_rows * width) if n_rows else 0.0,
        }
    write_meta(tmp, {"settings": settings, **stats})


def _count_trained(cache: TokenCache, starts: np.ndarray, lengths: np.ndarray, block: int = 1 << 16) -> int:
    """Trained tokens of record heads but for the first token of each; `starts` ascend. Blockwise, in little memory."""
    total = 0
    for i in range(0, len(starts), block):
        s, n = starts[i : i + block], lengths[i : i + block]
        base = int(s[0])
        sums = np.concatenate([[0], np.cumsum(cache.trained.array[base : int(s[-1] + n[-1])], dtype=np.int64)])
        total += int((sums[s + n - base] - sums[s + 1 - base]).sum())
        cache.trained.release()
    return total


# ---- bytes per token -----------------------------------------------------------------------------


def token_bytes(tokenizer: Any) -> torch.Tensor:
    """How many UTF-8 bytes each id stands for, 0 for the control tokens: turns nats per token into bits per byte.

    Shape: (V,) int64. The sum over the ids of a text is the text's length in bytes: figures compare across tokenizers.
    """
    added = tokenizer.added_tokens_decoder
    counts = []
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if i in added:
            counts.append(0 if added[i].special else len(added[i].content.encode()))
        else:
            counts.append(len(token))  # the byte-level alphabet writes each byte as one character
    return torch.tensor(counts, dtype=torch.int64)
