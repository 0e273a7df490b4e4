"""Rows: packing against a naive oracle, every token predicted once, and the part kept for validation."""

import json
import random
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lm_dataset import (  # noqa: F401 (fixtures)
    chat,
    chat_file,
    data_rows,
    here,
    text_file,
    texts,
    tokenizer,
    write,
)

from dataset import packing
from dataset.lm_dataset import IGNORE, PretrainDataset, SFTDataset, encode_conversations, encode_texts, pack_best_fit

# ruff: noqa: F811 (fixtures as arguments)


# ---- packing -------------------------------------------------------------------------------------


def naive_best_fit(lengths, width):
    """Row fills of best-fit decreasing, as a textbook has it."""
    rooms = []
    for n in sorted(lengths, reverse=True):
        fitting = [r for r in rooms if r >= n]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - n)
        else:
            rooms.append(width - n)
    return Counter(width - r for r in rooms)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(1, w), max_size=80))))
def test_packing_is_best_fit_decreasing(case):
    width, lengths = case
    order, rows = pack_best_fit(np.array(lengths, int), width, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(len(lengths)))
    fills = [int(np.array(lengths)[order[a:b]].sum()) for a, b in zip(rows[:-1], rows[1:], strict=True)]
    assert all(0 < f <= width for f in fills)
    assert Counter(fills) == naive_best_fit(lengths, width)


def test_packing_a_million_documents_is_full_and_quick():
    lengths = np.clip(np.random.default_rng(0).lognormal(4.8, 0.8, 1_000_000), 3, 512).astype(int)
    start = time.perf_counter()
    order, rows = pack_best_fit(lengths, 512, np.random.default_rng(0))
    assert time.perf_counter() - start < 20  # about one second on an idle core
    assert lengths.sum() / ((len(rows) - 1) * 512) > 0.99
    assert len(np.unique(order)) == len(lengths)


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="expected 1 … 8"):
        pack_best_fit(np.array([9]), 8, np.random.default_rng(0))


def unpack(dataset):
    """Segments of all rows: (ids, labels, positions) lists. Checks what must hold in every row."""
    out = []
    for r in range(len(dataset)):
        row = dataset[r]
        assert set(row) == {"input_ids", "labels", "position_ids", "documents"}
        assert all(v.shape == (dataset.max_seq_len,) and v.dtype == torch.int64 for v in row.values())
        docs = row["documents"].tolist()
        real = [d for d in docs if d >= 0]
        assert docs == real + [-1] * (len(docs) - len(real)), "padding only at the end"
        assert real == sorted(real) and set(real) == set(range(len(set(real)))), "one contiguous stretch per document"
        pad = row["documents"] < 0
        assert (row["labels"][pad] == IGNORE).all() and (row["input_ids"][pad] == 0).all()
        assert (row["position_ids"][pad] == 0).all()
        for d in range(len(set(real))):
            here = row["documents"] == d
            ids, labels, positions = (row[k][here].tolist() for k in ("input_ids", "labels", "position_ids"))
            assert positions == list(range(len(ids))) and labels[0] == IGNORE
            assert all(x in (i, IGNORE) for i, x in zip(ids, labels, strict=True))
            out.append((ids, labels))
    return out


def test_every_token_of_every_document_is_predicted_once(tokenizer, tmp_path, here):
    docs = texts(120, longest=90)
    path = write(tmp_path / "a.jsonl", [{"text": t} for t in docs])
    data = PretrainDataset(path, tokenizer, 32, split="all", **here)
    predicted = Counter()
    for ids, labels in unpack(data):
        assert labels[1:] == ids[1:]
        predicted.update(zip(ids[:-1], labels[1:], strict=True))
    wanted = Counter()
    for ids in encode_texts(docs, tokenizer):
        wanted.update(zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True))
    assert predicted == wanted
    assert data.stats["split"] > 10, "long documents are part of the test"
    assert data.stats["trained_tokens"] == sum(wanted.values())
    assert data.stats["tokens"] == data.stats["fill"] * 32 * len(data)


def test_a_long_document_is_cut_into_pieces_that_share_one_token(tokenizer, tmp_path, here):
    path = write(tmp_path / "a.jsonl", [{"text": "one two three four five six seven eight nine ten eleven"}])
    (ids,) = encode_texts([json.loads(path.read_text(encoding="utf-8"))["text"]], tokenizer)
    data = PretrainDataset(path, tokenizer, 6, **here)
    got = sorted((ids for ids, _ in unpack(data)), key=lambda s: (len(s) < 6, s != ids[:6].tolist()))
    expected = [ids[k : k + 6].tolist() for k in range(0, len(ids) - 1, 5)]
    assert sorted(map(tuple, got)) == sorted(map(tuple, expected))


def test_trained_tokens_of_conversations_appear_once(tokenizer, tmp_path, here):
    records = [chat(f"{i} {'why ' * (i % 5)}?", t) for i, t in enumerate(texts(120, longest=60))]
    path = write(tmp_path / "a.jsonl", records)
    width = 48
    data = SFTDataset(path, tokenizer, width, split="all", **here)
    ids, trained = encode_conversations([r["conversations"] for r in records], tokenizer)
    heads = [(i[:width], t[:width]) for i, t in zip(ids, trained, strict=True)]
    wanted = Counter((tuple(i.tolist()), tuple(np.where(t, i, IGNORE).tolist())) for i, t in heads if t.any())
    assert Counter((tuple(i), tuple(x)) for i, x in unpack(data)) == wanted
    assert data.stats["truncated"] == sum(len(i) > width for i in ids) > 10
    assert data.stats["trained_tokens"] == sum(int(t.sum()) for _, t in heads)


def test_a_conversation_whose_head_holds_no_answer_is_dropped_and_counted(tokenizer, tmp_path, here):
    path = write(tmp_path / "a.jsonl", [chat("why " * 100, "because"), chat("a", "b")])
    data = SFTDataset(path, tokenizer, 32, split="all", **here)
    assert data.stats["dropped"] == 1 and data.stats["used"] == 1 and data.stats["truncated"] == 0
    assert len(unpack(data)) == 1


def test_a_batch_of_conversations_names_its_trained_positions(tokenizer, tmp_path, here):
    path = write(tmp_path / "sft.jsonl", [chat(f"question {n}", "so" + " so" * (n % 9)) for n in range(60)])
    data = SFTDataset(path, tokenizer, 48, split="all", **here)
    batch = SFTDataset.collate([data[0], data[-1], data[1], data[2]])
    naive = [
        (b * 48 + t, int(batch["labels"][b, t + 1]))
        for b in range(4)
        for t in range(47)
        if batch["labels"][b, t + 1] != IGNORE
    ]
    pairs = list(zip(batch["head_positions"].tolist(), batch["targets"].tolist(), strict=True))
    assert pairs[: len(naive)] == naive and len(naive) > 20
    assert set(pairs[len(naive) :]) <= {(0, IGNORE)} and len(pairs) % 64 == 0 and len(pairs) - len(naive) < 64
    nothing = SFTDataset.collate([data[-1]])
    assert nothing["targets"].tolist() == [IGNORE] * 64


def test_a_loading_process_hands_over_the_rows_in_one_piece(tokenizer, tmp_path, here):
    data = PretrainDataset(text_file(tmp_path / "a.jsonl"), tokenizer, 32, **here)
    rows = [data[0], data[-1], data[2]]
    batch = PretrainDataset.collate(rows)
    assert list(batch) == list(rows[0])
    assert all(torch.equal(batch[name], torch.stack([row[name] for row in rows])) for name in batch)
    assert len({tensor.untyped_storage().data_ptr() for tensor in batch.values()}) == 1


def test_filler_row_trains_on_nothing(tokenizer, tmp_path, here):
    data = SFTDataset(chat_file(tmp_path / "a.jsonl", 5), tokenizer, 32, **here)
    row = data[-1]
    assert (row["labels"] == IGNORE).all() and (row["documents"] == -1).all() and row["input_ids"].shape == (32,)
    for wrong in (-2, len(data)):
        with pytest.raises(IndexError):
            data[wrong]


def test_rows_depend_on_the_seed_alone(tokenizer, tmp_path, here):
    path = text_file(tmp_path / "a.jsonl")
    first = [data_rows(PretrainDataset(path, tokenizer, 64, seed=s, **here)) for s in (1, 2)]
    again = data_rows(PretrainDataset(path, tokenizer, 64, seed=1, cache_dir=tmp_path / "other", show_progress=False))
    assert first[0] == again != first[1]
    assert sorted(sum(first[0], [])) == sorted(sum(first[1], [])), "the same tokens in another order"


# ---- the validation part -------------------------------------------------------------------------


def documents_of(dataset):
    return Counter(tuple(ids) for ids, _ in unpack(dataset))


def test_split_covers_everything_and_never_overlaps(tokenizer, tmp_path, here):
    path = write(tmp_path / "a.jsonl", [{"text": t} for t in texts(300) + texts(100)])  # 100 appear twice
    parts = [documents_of(PretrainDataset(path, tokenizer, 400, s, 0.1, **here)) for s in ("train", "val", "all")]
    train, val, everything = parts
    assert train and val and not set(train) & set(val)
    assert train + val == everything
    assert 10 < sum(val.values()) < 90
    assert max(val.values()) == 2, "duplicates are on one side"


def test_split_ignores_order_and_seed(tokenizer, tmp_path, here):
    lines = [{"text": t} for t in texts(200)]
    path = write(tmp_path / "a.jsonl", lines)
    mixed = write(tmp_path / "b.jsonl", random.Random(1).sample(lines, len(lines)))
    one = PretrainDataset(path, tokenizer, 400, "val", 0.1, seed=1, **here)
    other = PretrainDataset(mixed, tokenizer, 400, "val", 0.1, seed=2, **here)
    assert documents_of(one) == documents_of(other)


SPLIT_SIZES = [(1, 0.01, 9, 0), (2, 0.01, 9, 1), (5, 0.0, 9, 0), (200, 0.5, 7, 7)]


@pytest.mark.parametrize(("n", "ratio", "cap", "expected"), SPLIT_SIZES)
def test_split_sizes(n, ratio, cap, expected, tokenizer, tmp_path, here):
    path = text_file(tmp_path / "a.jsonl", n)
    data = PretrainDataset(path, tokenizer, 400, "val", ratio, max_val_records=cap, **here)
    assert data.stats["used"] == expected and (len(data) > 0) == (expected > 0)
    assert len(PretrainDataset(path, tokenizer, 400, "train", ratio, max_val_records=cap, **here)) > 0


def test_a_file_of_equal_records_keeps_them_for_training():
    assert not packing.split_records(np.full(10, 7, np.uint64), 0.5, 5).any()
