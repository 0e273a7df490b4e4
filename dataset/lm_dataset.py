"""The data of pretraining and of supervised fine-tuning: records → tokens and mask → full rows.

Reading order: the ONE assistant mask → the datasets → bytes per token. What a record looks like stands in
record_formats.py, how records fill rows in packing.py; tokenising once and caching is plumbing and lives in
token_cache.py and cache_folder.py.

Legend: T tokens of a row, N records, S segments, R rows, V vocabulary. A segment is what one record (or one piece of an
over-long document) contributes to a row; no token attends to another segment of its row.

中文：记录 → 分词与掩码 → 装箱成满行。掩码只有一处实现，来自对话模板里的 {% generation %} 标记。
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from dataset.cache_folder import CacheError, MappedArray, build_folder, read_meta, user_errors
from dataset.json_lines import DataError
from dataset.packing import pack_best_fit, write_plan
from dataset.record_formats import parse_conversation, parse_sft, parse_text
from dataset.token_cache import RecordFormat, encoding_lock, open_cache, plain_backend, require_markers

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
TRAINED = 1  # mark of a token that is trained on, in a cache
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
    render = ChatRenderer(tokenizer)
    return encode_rendered([render(*parse_conversation(turns)) for turns in conversations], tokenizer)


class Rendered(NamedTuple):
    """A conversation as the chat template writes it."""

    text: str
    spans: list[tuple[int, int]]  # character ranges that the assistant writes
    mark: str = ""  # the character on both sides of each control token that stood in a content; "" when there is none


class ChatRenderer:
    """The chat template of a tokenizer, compiled once: `render(messages, tools)` gives a conversation's `Rendered`.

    It is the template that `apply_chat_template` of transformers runs; what that prepares anew for each call, half of
    its time, is prepared here once.

    Raises:
        DataError: the template has no generation markers.
    """

    def __init__(self, tokenizer: Any):
        from transformers.utils.chat_template_utils import _compile_jinja_template

        require_markers(tokenizer.chat_template)
        self.template = _compile_jinja_template(tokenizer.chat_template)
        # What every call sees: the environment's functions, bos_token and its like, and the options left out.
        self.names = dict(self.template.globals) | {"documents": None, "add_generation_prompt": False}
        self.names |= tokenizer.special_tokens_map
        self.controls = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]

    def __call__(self, messages: list[dict], tools: list[dict] | None, **options: Any) -> Rendered:
        """
        Args:
            messages, tools: plain JSON values, as parse_conversation gives them.
            options: of the chat template, for example add_generation_prompt=True or enable_thinking=False.
        Raises:
            ValueError: the template refuses the conversation.
        """
        from jinja2 import TemplateError

        mark, values = "", [value for m in messages for value in m.values()]
        plain = not tools and all(isinstance(value, str) for value in values)
        said = "\n".join(values) if plain else json.dumps([messages, tools], ensure_ascii=False)
        if any(control in said for control in self.controls):
            mark = next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in said)
            messages, tools = _guard(messages, self.controls, mark), _guard(tools, self.controls, mark)
        # Some templates call it `thinking`: they get both names, as from transformers.
        messages = [
            m if m.get("reasoning_content") is None else {"thinking": m["reasoning_content"], **m} for m in messages
        ]
        context = self.template.new_context(self.names | options | {"messages": messages, "tools": tools}, shared=True)
        blocks: list[str] = []  # the tracker reads in it how much has been written when the assistant begins
        spans: list[tuple[int, int]] = []
        try:
            with encoding_lock, self.template.environment.activate_tracker(blocks, spans):
                for block in self.template.root_render_func(context):
                    blocks.append(block)
        except (TemplateError, TypeError) as e:
            raise ValueError(f"the chat template refuses the conversation: {e}") from None
        return Rendered("".join(blocks), spans, mark)


def encode_rendered(rendered: Sequence[Rendered], tokenizer: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rendered conversations → (ids, trained), as encode_conversations gives them.

    What the assistant writes is tokenised apart from the header before it, as it is when the model generates: else an
    answer that begins with a newline would share a token with the header. All pieces of a batch are tokenised together.
    """
    pieces = [_pieces(*one) for one in rendered]
    encodings = {}
    for as_text in (False, True):
        texts = [text for ps in pieces for _, text, literal in ps if literal == as_text]
        with plain_backend(tokenizer, controls_as_text=as_text) as backend:
            encodings[as_text] = iter(backend.encode_batch_fast(texts, add_special_tokens=False))
    borders = _sure_borders(tokenizer)
    all_ids, all_trained = [], []
    for ps, (_, spans, _) in zip(pieces, rendered, strict=True):
        ids: list[int] = []
        ranges = []  # of trained tokens
        for start, text, literal in ps:
            piece_ids = next(encodings[literal]).ids
            for a, z in spans:
                if a <= start < z:  # pieces begin where spans begin, so a span covers a piece from its first token on
                    n = _tokens_before(z - start, text, piece_ids, borders)
                    if n is None:
                        n = _tokens_before_by_offsets(z - start, text, tokenizer, literal)
                    ranges.append((len(ids), len(ids) + n))
            ids += piece_ids
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


def _sure_borders(tokenizer: Any) -> dict[str, int]:
    """Text → id of the added tokens that take exactly their own characters out of a text, wherever these stand."""
    return {
        token.content: i
        for i, token in tokenizer.added_tokens_decoder.items()
        if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
    }


def _tokens_before(cut: int, text: str, ids: list[int], borders: dict[str, int]) -> int | None:
    """Number of tokens that hold something of the first `cut` characters; None where the ids alone do not tell.

    What the assistant writes ends, in nearly every template, beside a control token. When the text has as many of these
    as the ids, counting them finds the border; offsets would cost the tokenizer a quarter more time.
    """
    if cut >= len(text):
        return len(ids)
    for content, i in borders.items():
        ends, begins = text.endswith(content, 0, cut), text.startswith(content, cut)
        if (ends or begins) and ids.count(i) == text.count(content):  # else a longer added token has swallowed one
            at = -1
            for _ in range(text.count(content, 0, cut) + (not ends)):
                at = ids.index(i, at + 1)
            return at + 1 if ends else at
    return None


def _tokens_before_by_offsets(cut: int, text: str, tokenizer: Any, literal: bool) -> int:
    """The same number from the tokenizer's own account of where each character went."""
    with plain_backend(tokenizer, controls_as_text=literal) as backend:
        encoding = backend.encode(text, add_special_tokens=False)
    # A token may hold characters on both sides of the cut, and the character before it may be spread over several
    # tokens, of which char_to_token gives the first: hence both.
    return max(encoding.char_to_token(cut), encoding.char_to_token(cut - 1) + 1)


def encode_prompt(messages: list[dict], tools: list[dict] | None, tokenizer: Any, **options: Any) -> list[int]:
    """The ids of a conversation up to where the assistant begins to write, tokenised exactly as in training.

    What a user types cannot forge a turn here either.  Raises: ValueError as `encode_conversations`.
    """
    rendered = ChatRenderer(tokenizer)(messages, tools, add_generation_prompt=True, **options)
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


def _text_reader(tokenizer: Any) -> Callable[[dict], str]:
    return parse_text


def _encode_parsed_texts(texts: list[str], tokenizer: Any) -> tuple[list[np.ndarray], None]:
    return encode_texts(texts, tokenizer), None


def _sft_reader(tokenizer: Any) -> Callable[[dict], Rendered]:
    render = ChatRenderer(tokenizer)
    return lambda record: render(*parse_sft(record))


PRETRAIN = RecordFormat("pretrain", _text_reader, _encode_parsed_texts, masked=False)
SFT = RecordFormat("sft", _sft_reader, encode_rendered, masked=True)


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
        if self.format.whole:
            settings["whole"] = True
        if split == "all":
            settings |= {"val_ratio": 0, "max_val_records": 0}
        self.data_key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:20]
        folder = self.cache.folder / f"rows-{self.data_key}"
        meta = read_meta(folder)
        if meta is None:
            cache_dir = self.cache.folder.parent
            with user_errors(cache_dir), build_folder(folder, cache_dir, f"packing {path}") as tmp:
                if tmp is not None:
                    write_plan(tmp, self.cache, settings)
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
        ids, marks, positions, documents = self.read_row(row)
        labels = np.where(marks == TRAINED, ids, IGNORE)
        arrays = {"input_ids": ids, "labels": labels, "position_ids": positions, "documents": documents}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def read_row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(ids, marks of the cache, positions, documents) of one row, (T,) each; the first mark of a segment is 0."""
        width = self.max_seq_len
        ids = np.full(width, self.pad_token_id, dtype=np.int64)
        marks = np.zeros(width, dtype=np.uint8)
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
                marks[at + 1 : end] = TRAINED if mask is None else mask[start + 1 : start + length]
                positions[at:end] = count[:length]
                documents[at:end] = document
                at = end
            self._unreleased += at
            if self._unreleased >= RELEASE_TOKENS:
                self._unreleased = 0
                self.cache.tokens.release()
                if self.cache.trained:
                    self.cache.trained.release()
        return ids, marks, positions, documents

    def describe(self, width: int) -> str:
        return f"{len(self)} rows of {width} tokens, {self.stats['fill']:.1%} filled"

    @staticmethod
    def count_terms(batch: dict[str, torch.Tensor]) -> int:
        """Of how many terms the loss of a batch is the sum: its trained tokens."""
        return int((batch["labels"][:, 1:] != IGNORE).sum())

    @staticmethod
    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Rows of this dataset, stacked into a batch of tensors (B, T).

        They share one block of memory: a loading process hands over each block by a file and a connection of its own,
        which costs more than filling it. In numpy, which wakes no threads that the training step keeps busy.
        """
        names = list(rows[0])
        block = torch.from_numpy(np.stack([row[name].numpy() for name in names for row in rows]))  # (4 · B, T)
        return dict(zip(names, block.chunk(len(names)), strict=True))


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
        labels = batch["labels"].numpy()
        following = np.full_like(labels, IGNORE)
        following[:, :-1] = labels[:, 1:]
        following = following.ravel()
        positions = np.flatnonzero(following != IGNORE)
        size = max(64, -(-len(positions) // 64) * 64)
        head_positions, targets = np.zeros(size, np.int64), np.full(size, IGNORE, np.int64)
        head_positions[: len(positions)], targets[: len(positions)] = positions, following[positions]
        return batch | {"head_positions": torch.from_numpy(head_positions), "targets": torch.from_numpy(targets)}


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
