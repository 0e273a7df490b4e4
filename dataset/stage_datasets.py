"""The data of the stages after SFT: pairs of answers, reasoning beside ordinary dialogue, prompts to be answered.

Reading order: pairs of answers (DPO, reward model) → reasoning and dialogue without thinking → mixing two files →
prompts (GRPO, PPO). All of it is packed, cached and read as in lm_dataset.py.

Legend: B rows of a batch · T tokens of a row · N trained positions · P pairs.

中文：SFT 之后各阶段的数据：成对的回答（DPO、奖励模型）、推理与普通对话的混合、强化学习的提示词。
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dataset.json_lines import DataError, check_file, parse_line, read_lines
from dataset.lm_dataset import (
    IGNORE,
    TRAINED,
    ChatRenderer,
    PackedDataset,
    Rendered,
    SFTDataset,
    encode_rendered,
)
from dataset.packing import split_records
from dataset.record_formats import parse_dpo, parse_reason, parse_rl, parse_sft
from dataset.token_cache import RecordFormat, token_hash

REJECTED = 2  # mark of the token with which the second conversation of a pair begins
NO_THOUGHT = "<think>\n\n</think>\n\n"  # what the chat template opens an answer with when thinking is off


# ---- pairs of answers ----------------------------------------------------------------------------


def _pair_reader(tokenizer: Any) -> Callable[[dict], tuple[Rendered, Rendered]]:
    render = ChatRenderer(tokenizer)

    def read(record: dict) -> tuple[Rendered, Rendered]:
        chosen, rejected, tools = parse_dpo(record)
        return render(chosen, tools), render(rejected, tools)

    return read


def encode_pairs(pairs: list[tuple[Rendered, Rendered]], tokenizer: Any) -> tuple[list, list]:
    """Per pair [ids of chosen, ids of rejected] and which tokens are compared: those of the last answers."""
    ids, trained = encode_rendered([rendered for pair in pairs for rendered in pair], tokenizer)
    for mask in trained:
        places = np.flatnonzero(mask)
        before = places[np.flatnonzero(np.diff(places) > 1)]  # where the earlier answers end
        mask[: before[-1] + 1 if len(before) else 0] = False
    return [list(both) for both in zip(ids[::2], ids[1::2], strict=True)], [
        list(both) for both in zip(trained[::2], trained[1::2], strict=True)
    ]


def _encode_joined_pairs(pairs: list, tokenizer: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A pair as one record, chosen first: tokens, and marks 0, `TRAINED` or `REJECTED`."""
    all_ids, all_marks = encode_pairs(pairs, tokenizer)
    marks = [np.concatenate([chosen, rejected]).astype(np.uint8) for chosen, rejected in all_marks]
    for joined, (chosen, _) in zip(marks, all_marks, strict=True):
        joined[len(chosen)] = REJECTED
    return [np.concatenate(both) for both in all_ids], marks


class PairDataset(PackedDataset):
    """`{"chosen": […], "rejected": […]}` records. A row holds whole pairs; longer ones are left out, and counted in
    `dropped`.

    In a row the two conversations of pair p are the documents 2p (chosen) and 2p + 1 (rejected): neither sees the
    other. Labels are set on the last answers.
    """

    format = RecordFormat("dpo", _pair_reader, _encode_joined_pairs, masked=True, whole=True)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        if not -1 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        ids, marks, _, documents = self.read_row(row)
        begins = marks == REJECTED
        documents = np.where(documents >= 0, documents + np.cumsum(begins), -1)
        starts = np.flatnonzero(np.diff(documents, prepend=-2))  # of each document, and of the padding
        positions = np.arange(len(ids)) - np.repeat(starts, np.diff(starts, append=len(ids)))
        positions[documents < 0] = 0
        labels = np.where(marks == TRAINED, ids, IGNORE)
        arrays = {"input_ids": ids, "labels": labels, "position_ids": positions, "documents": documents}
        return {name: torch.from_numpy(array) for name, array in arrays.items()} | {"row": torch.tensor(row)}

    @staticmethod
    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """As of SFTDataset; besides `answers` (N,), to which of the 2P answers of the batch a position belongs, 2p and
        2p + 1 being a pair; `last` (2P,), the positions b·T + t of the tokens that end them; `places` (2P, 2), the row
        of the data set they are in and their number in it; and `pairs` (P,), 1 each.

        A batch of padding has one pair, with a 0.
        """
        numbers = np.array([int(row["row"]) for row in rows])
        batch = SFTDataset.collate([{name: t for name, t in row.items() if name != "row"} for row in rows])
        documents = batch["documents"].numpy()
        answers_of_row = documents.max(axis=1) + 1  # 0 where all is padding
        offsets = np.cumsum(answers_of_row) - answers_of_row
        positions = batch["head_positions"].numpy()
        answers = documents.ravel()[positions] + offsets[positions // documents.shape[1]]
        total = int(answers_of_row.sum())
        real = batch["targets"].numpy() != IGNORE
        answers = np.where(real, answers, 0)
        last = np.zeros(max(total, 2), np.int64)
        last[answers[real]] = positions[real] + 1  # ascending: the last assignment stays
        places = np.zeros((max(total, 2), 2), np.int64)
        places[:total, 0] = np.repeat(numbers, answers_of_row)
        places[:total, 1] = np.arange(total) - np.repeat(offsets, answers_of_row)
        pairs = np.ones(total // 2, np.float32) if total else np.zeros(1, np.float32)
        added = {"answers": answers.astype(np.int64), "last": last, "places": places, "pairs": pairs}
        return batch | {name: torch.from_numpy(array) for name, array in added.items()}

    @staticmethod
    def count_terms(batch: dict[str, torch.Tensor]) -> int:
        return int(batch["pairs"].sum())


# ---- reasoning, and dialogue without thinking ----------------------------------------------------


def _reason_reader(tokenizer: Any) -> Callable[[dict], Rendered]:
    render = ChatRenderer(tokenizer)
    return lambda record: render(*parse_reason(record))


def _dialogue_reader(tokenizer: Any) -> Callable[[dict], Rendered]:
    render = ChatRenderer(tokenizer)

    def read(record: dict) -> Rendered:
        rendered = render(*parse_sft(record))
        if zlib.crc32(rendered.text.encode()) % 2 or "<think>" in rendered.text:
            return rendered
        (start, end), text = rendered.spans[-1], rendered.text
        shifted = (start + len(NO_THOUGHT), end + len(NO_THOUGHT))
        text = text[:start] + NO_THOUGHT + text[start:]
        return rendered._replace(text=text, spans=[*rendered.spans[:-1], shifted])

    return read


REASON = RecordFormat("reason", _reason_reader, encode_rendered, masked=True)


class ReasonDataset(SFTDataset):
    """Conversations whose answers are `<think>…</think><answer>…</answer>`."""

    format = REASON


class DialogueDataset(SFTDataset):
    """Ordinary conversations beside reasoning: in every second one the last answer follows the empty thought with which
    the chat template switches thinking off. The thought is given, not trained on; earlier answers have none, as in a
    chat."""

    format = RecordFormat("dialogue", _dialogue_reader, encode_rendered, masked=True)


# ---- two files, one data set ---------------------------------------------------------------------


class MixedDataset(torch.utils.data.Dataset):
    """All rows of one data set and, beside them, so many of another that these make up `share` of the whole.

    Of a larger other one the first rows are taken (rows are in random order), of a smaller one all, again and again.
    """

    def __init__(self, main: PackedDataset, other: PackedDataset, share: float):
        if not 0 < share < 1:
            raise DataError(f"the share of mixed-in rows is {share}; expected a number between 0 and 1")
        self.main, self.other = main, other
        self.added = round(len(main) * share / (1 - share)) if len(other) else 0
        self.data_key = f"{main.data_key}+{self.added} of {other.data_key}"
        filled = main.stats["fill"] * len(main) + other.stats["fill"] * self.added
        self.stats = {**main.stats, "fill": filled / max(len(self), 1)}
        self.collate, self.count_terms = main.collate, main.count_terms

    def __len__(self) -> int:
        return len(self.main) + self.added

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        if row < len(self.main):
            return self.main[row]
        if row >= len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.other[(row - len(self.main)) % len(self.other)]

    def describe(self, width: int) -> str:
        return f"{len(self)} rows of {width} tokens, {self.stats['fill']:.1%} filled, {self.added} of them mixed in"


# ---- prompts -------------------------------------------------------------------------------------


class PromptDataset(torch.utils.data.Dataset):
    """`{"conversations": […], "answer": …}` records as prompts for a model that writes the answers itself.

    `data[i]` is {"ids": tokens up to where the assistant begins, "record": {"messages", "tools", "question",
    "answer"}}. Prompts are few and short beside what is written to them, so they stay in memory.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        tokenizer: Any,
        max_seq_len: int,
        split: str = "train",
        val_ratio: float = 0.05,
        seed: int = 42,
        cache_dir: str | os.PathLike | None = None,
        skip_bad_records: bool = False,
        show_progress: bool = True,
        max_val_records: int = 2000,
        max_new_tokens: int = 1,
        **options: Any,
    ):
        """
        Args: as of PackedDataset (nothing is cached); prompts that leave no room for max_new_tokens in max_seq_len are
        left out and counted; options, of the chat template.
        Raises: DataError with file, line and reason.
        """
        path = check_file(path)
        skipped, render, rendered, records = 0, ChatRenderer(tokenizer), [], []
        for number, raw in read_lines(path):
            try:
                messages, tools, answer = parse_rl(parse_line(raw))
                rendered.append(render(messages, tools, add_generation_prompt=True, **options))
            except ValueError as error:
                if not skip_bad_records:
                    advice = "--skip_bad_records leaves such lines out"
                    raise DataError(f"{path}, line {number}: {error} ({advice})") from None
                skipped += 1
                continue
            question = messages[-1]["content"]
            records.append({"messages": messages, "tools": tools, "question": question, "answer": answer})
        all_ids = encode_rendered(rendered, tokenizer)[0] if rendered else []
        hashes = np.array([token_hash(ids) for ids in all_ids], np.uint64)
        held_out = split_records(hashes, 0 if split == "all" else val_ratio, max_val_records)
        pairs = [
            {"ids": ids.tolist(), "record": record}
            for ids, record, is_val in zip(all_ids, records, held_out, strict=True)
            if is_val == (split == "val")
        ]
        self.prompts = [pair for pair in pairs if len(pair["ids"]) + max_new_tokens <= max_seq_len]
        self.stats = {"records": len(records), "skipped": skipped, "dropped": len(pairs) - len(self.prompts)}
        said = [(pair["ids"], pair["record"]["answer"]) for pair in self.prompts]
        self.data_key = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:20]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict:
        return self.prompts[index]

    def describe(self, width: int) -> str:
        return f"{len(self)} prompts"
