"""The trainers' plumbing, part by part, against hand-made oracles: schedule, order of rows, validation, states on disk.

Dimension legend: B batch · T tokens · V vocabulary.
"""

import argparse
import contextlib
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import unchanged_process
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dataset.lm_dataset import PackedDataset, SFTDataset
from model.model_minimind import IGNORE, MiniMindConfig, MiniMindForCausalLM
from trainer import checkpoint, run_log, train_full_sft, train_pretrain
from trainer import trainer_utils as utils
from trainer.checkpoint import Progress
from trainer.chunked_nll import chunked_nll, nll_and_gradient
from trainer.command_line import UserError, run_script
from trainer.trainer_utils import RowOrder, cosine_lr

V = 61


def tiny(**fields) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=V)
    return MiniMindForCausalLM(MiniMindConfig(**{**sizes, **fields}))


def one_process(rank: int = 0, world_size: int = 1, seed: int = 0) -> SimpleNamespace:
    """What the plumbing reads of a Run, without starting one."""
    run = SimpleNamespace(rank=rank, world_size=world_size, seed=seed, device=torch.device("cpu"), memory_note="")
    run.autocast = lambda: torch.autocast("cpu", enabled=False)
    run.sum_ranks = lambda value: value
    return run


# ------------------------------------------------------------------------------------------------------------ schedule


def test_learning_rate_warms_up_peaks_and_ends_at_the_floor():
    rates = [cosine_lr(step, 100, 10, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)  # the first update moves
    assert rates[:10] == pytest.approx([0.2 * k for k in range(1, 11)])
    assert max(rates) == rates[9] == pytest.approx(2.0)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[-1] == pytest.approx(0.2)
    assert cosine_lr(50, 91, 10, 2.0) == pytest.approx(2.0 * 0.55)  # half way down: the mean of peak and floor


def test_learning_rate_at_the_edges():
    assert cosine_lr(0, 10, 1, 3.0) == 3.0
    assert cosine_lr(9, 10, 1, 3.0) == pytest.approx(0.3)
    assert cosine_lr(0, 1, 1, 3.0) == cosine_lr(0, 1, 0, 3.0) == 3.0
    assert cosine_lr(1, 2, 1, 3.0) == 3.0  # a single update after the warm-up
    assert cosine_lr(99, 100, 10, 1.0, floor=0.0) == pytest.approx(0.0)


# --------------------------------------------------------------------------------------------------------------- data


def test_the_file_to_train_on(tmp_path, monkeypatch):
    from dataset import make_demo_data

    run = one_process()
    run.main_first = contextlib.nullcontext
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    monkeypatch.setattr(make_demo_data, "generate", lambda folder: {"sft": folder / "sft.jsonl"})
    (tmp_path / "dataset").mkdir()
    names = ("a.jsonl", "b.jsonl")
    assert utils.find_data("own.jsonl", names, "sft", run) == Path("own.jsonl")
    assert utils.find_data(None, names, "sft", run) == tmp_path / "dataset" / "demo" / "sft.jsonl"
    (tmp_path / "dataset" / "b.jsonl").write_text("{}", encoding="utf-8")
    assert utils.find_data(None, names, "sft", run) == tmp_path / "dataset" / "b.jsonl"
    (tmp_path / "dataset" / "a.jsonl").write_text("{}", encoding="utf-8")
    assert utils.find_data(None, names, "sft", run) == tmp_path / "dataset" / "a.jsonl"


@pytest.mark.parametrize("script, name", [(train_pretrain, "pretrain"), (train_full_sft, "sft")])
def test_the_demo_data_has_the_stages_name(script, name, tmp_path, monkeypatch):
    """Each script asks for demo data by the name the generator gives it."""
    from dataset.make_demo_data import STAGES

    asked = []
    monkeypatch.setattr(utils, "find_data", lambda *args: asked.append(args) or sys.exit(0))
    words = ["--device", "cpu", "--hidden_size", "32", "--from_weight", "none", "--out_dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["x", *words])
    with unchanged_process(), pytest.raises(SystemExit):
        script.main()
    given, known, demo, _ = asked[0]
    assert given is None and demo == name and name in STAGES
    assert all(known_name.endswith(".jsonl") for known_name in known)


# ---------------------------------------------------------------------------------------------------------- row order


def orders(rows: int, batch: int, accumulation: int, world: int, epoch: int = 0, rows_done: int = 0, seed: int = 0):
    """The updates of every rank: ranks × updates × (rows, micro-batches)."""
    args = argparse.Namespace(batch_size=batch, accumulation_steps=accumulation)
    return [
        list(RowOrder(rows, args, one_process(rank, world, seed), epoch, rows_done).updates()) for rank in range(world)
    ]


def rows_of(ranks: list) -> list[list[int]]:
    """Per update the real rows of all ranks, sorted."""
    return [
        sorted(row for _, micros in update for micro in micros for row in micro if row >= 0)
        for update in zip(*ranks, strict=True)
    ]


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 150), batch=st.integers(1, 7), accumulation=st.integers(1, 5), world=st.integers(1, 4),
    epoch=st.integers(0, 3),
)  # fmt: skip
def test_every_row_once_and_filler_only_where_needed(rows, batch, accumulation, world, epoch):
    ranks = orders(rows, batch, accumulation, world, epoch)
    updates = rows_of(ranks)
    assert sorted(sum(updates, [])) == list(range(rows))
    assert [len(update) for update in updates] == [done for done, _ in ranks[0]]  # what `rows_done` advances by
    full = batch * accumulation * world
    assert all(len(update) == full for update in updates[:-1])
    for update in zip(*ranks, strict=True):
        shapes = {tuple(len(micro) for micro in micros) for _, micros in update}
        assert len(shapes) == 1  # else some rank would wait for ever in a collective
        assert set(shapes.pop()) == {batch}
        filler = sum(row == -1 for _, micros in update for micro in micros for row in micro)
        assert filler < batch * world  # never a whole micro-batch of padding on all ranks


@pytest.mark.parametrize("rows", [32, 77, 96, 100, 5])
def test_an_update_has_the_same_rows_in_any_layout(rows):
    one = rows_of(orders(rows, 32, 1, 1))
    assert len(one) == math.ceil(rows / 32)
    for batch, accumulation, world in [(4, 8, 1), (16, 1, 2), (4, 4, 2), (1, 32, 1), (2, 4, 4)]:
        assert rows_of(orders(rows, batch, accumulation, world)) == one


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 150), done=st.integers(0, 30), layout=st.sampled_from([(6, 1, 1), (2, 3, 1), (3, 1, 2)]))
def test_resuming_gives_exactly_the_rest_with_any_number_of_ranks(rows, done, layout):
    whole = rows_of(orders(rows, 3, 2, 1, epoch=2))
    done = min(done, len(whole))
    rows_done = sum(len(update) for update in whole[:done])
    assert rows_of(orders(rows, *layout, epoch=2, rows_done=rows_done)) == whole[done:]


def test_order_is_a_function_of_seed_and_epoch():
    assert orders(50, 4, 2, 1) == orders(50, 4, 2, 1)
    different = [orders(50, 4, 2, 1, epoch=epoch, seed=seed) for epoch, seed in [(0, 0), (1, 0), (0, 1), (1, 1)]]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])
    assert rows_of(orders(50, 50, 1, 1))[0] != [r for m in orders(50, 50, 1, 1)[0][0][1] for r in m]  # shuffled


def test_the_loader_reads_what_the_updates_say():
    args = argparse.Namespace(batch_size=3, accumulation_steps=2)
    order = RowOrder(11, args, one_process(1, 2), epoch=1)
    rows = [{name: torch.tensor([row] * 3) for name in ("labels", "documents")} for row in [*range(11), -1]]
    rows[4]["labels"][2] = IGNORE
    dataset = Rows(rows)  # the last one answers to -1
    assert len(order) == len(list(order)) == sum(len(micros) for _, micros in order.updates())
    before = torch.get_rng_state()
    read = []
    for rows, (trained, tokens), micros in utils.read_updates(dataset, order, torch.device("cpu"), None):
        numbers = [micro["documents"][:, 0].tolist() for micro in micros]
        read.append((rows, numbers))
        flat = sum(numbers, [])
        # Two labels of each row's three are predicted, one of row 4; the padding row -1 has no real token.
        assert trained == 2 * len(flat) - flat.count(4) and tokens == 3 * (len(flat) - flat.count(-1))
    assert read == list(order.updates()) and any(4 in micro for _, micros in read for micro in micros)
    assert torch.equal(torch.get_rng_state(), before)  # reading leaves the run's random numbers alone


# ---------------------------------------------------------------------------------------------------------------- flags


def shared_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    utils.add_shared_flags(parser, epochs=1, batch_size=4, learning_rate=1e-3, max_seq_len=64)
    return parser


@pytest.mark.parametrize(
    "words, expected",
    [
        ("", None), ("--use_moe", True), ("--no-use_moe", False),
        ("--use_moe True", True), ("--use_moe true", True), ("--use_moe 1", True), ("--use_moe yes", True),
        ("--use_moe False", False), ("--use_moe false", False), ("--use_moe 0", False), ("--use_moe no", False),
        ("--use_moe --hidden_size 64", True), ("--use_moe --no-use_moe", False),
    ],
)  # fmt: skip
def test_spellings_of_a_boolean_flag(words, expected):
    assert shared_parser().parse_args(words.split()).use_moe is expected


def test_a_boolean_flag_refuses_another_word(capsys):
    with pytest.raises(SystemExit) as stop:
        shared_parser().parse_args(["--use_moe", "maybe"])
    assert stop.value.code == 2
    assert "--use_moe takes True or False, got 'maybe'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "--batch_size 0", "--batch_size -1", "--accumulation_steps 0", "--epochs 0", "--log_interval 0",
        "--save_interval 0", "--max_steps 0", "--val_interval -1", "--warmup_iters -1", "--hidden_size 0", "--seed -1",
        "--batch_size 2.5", "--learning_rate fast", "--learning_rate -1", "--grad_clip 0", "--weight_decay -0.1",
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_refused_with_the_flags_name(words, capsys):
    with pytest.raises(SystemExit) as stop:
        shared_parser().parse_args(words.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words.split()[0] in error and words.split()[1] in error


@pytest.mark.parametrize("script", [train_pretrain, train_full_sft])
def test_help(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "--help"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    text = capsys.readouterr().out
    assert stop.value.code == 0
    contract = (
        "out_dir epochs batch_size learning_rate device dtype use_wandb wandb_project num_workers accumulation_steps "
        "grad_clip warmup_iters log_interval save_interval hidden_size num_hidden_layers max_seq_len use_moe data_path"
    )
    for name in contract.split():
        assert f"--{name}" in text


# ------------------------------------------------------------------------------------------------------ plan


def plan(rows: int, world: int = 1, **given) -> argparse.Namespace:
    args = argparse.Namespace(
        batch_size=32, accumulation_steps=None, epochs=1, max_steps=None, warmup_iters=None, data_path="d.jsonl",
        max_seq_len=512, saved_rows=None,
    )  # fmt: skip
    vars(args).update(given)
    utils.plan_updates(args, rows, one_process(world_size=world))
    return args


def test_plan_counts_the_ragged_last_update():
    assert plan(100, accumulation_steps=2).total_steps == 2
    assert plan(128, accumulation_steps=2).total_steps == 2
    assert plan(129, accumulation_steps=2).total_steps == 3
    assert plan(129, accumulation_steps=2, epochs=3).total_steps == 9  # each epoch ends with its own
    assert plan(129, accumulation_steps=1, world=2).total_steps == 3
    assert plan(5).total_steps == 1


def test_plan_fills_in_the_batch_and_warm_up():
    """16,384 tokens an update for 40M tokens, half of it for a quarter: in rows of 512, powers of two."""
    one = plan(40_000_000 // 512, batch_size=None)
    assert (one.batch_size, one.accumulation_steps, one.total_steps, one.warmup_iters) == (8, 4, 2442, 48)
    assert plan(40_000_000 // 512).accumulation_steps == 1  # 32 rows given
    quarter = plan(10_000_000 // 512, batch_size=None)
    assert (quarter.batch_size, quarter.accumulation_steps) == (8, 2)
    tiny = plan(20, batch_size=None)
    assert (tiny.batch_size, tiny.accumulation_steps, tiny.total_steps, tiny.warmup_iters) == (1, 1, 20, 1)
    assert plan(20, batch_size=None, epochs=1, accumulation_steps=3).batch_size == 1
    large = plan(32 * 20_000, batch_size=None, epochs=10, warmup_iters=None)
    assert (large.batch_size, large.accumulation_steps, large.warmup_iters) == (8, 32, 200)
    short = plan(32 * 20_000, batch_size=None, max_steps=300)  # 300 updates: 2,013 tokens each, four rows
    assert (short.batch_size, short.accumulation_steps, short.total_steps) == (4, 1, 300)
    two = plan(32 * 20_000, batch_size=None, epochs=10, world=2)
    assert (two.batch_size, two.accumulation_steps, two.total_steps) == (8, 16, large.total_steps)
    given = plan(32 * 8 * 20_000, accumulation_steps=2, warmup_iters=7, max_steps=100)
    assert (given.accumulation_steps, given.total_steps, given.warmup_iters) == (2, 100, 7)
    assert plan(64, max_steps=100).total_steps == 2


def test_plan_without_rows_says_so():
    with pytest.raises(UserError, match="d.jsonl: nothing to train on"):
        plan(0)


# ------------------------------------------------------------------------------------------------------ random numbers


def test_random_numbers_are_a_function_of_seed_step_and_rank(restored_process):
    def draw(seed: int, step: int, rank: int) -> tuple:
        run = utils.Run("cpu", "float32", seed)
        run.rank = rank
        run.seed_step(step)
        return float(torch.rand(())), random.random(), float(np.random.rand())

    assert draw(1, 2, 0) == draw(1, 2, 0)
    drawn = [draw(seed, step, rank) for seed in (1, 2) for step in (0, 1, 2) for rank in (0, 1)]
    for kind in zip(*drawn, strict=True):
        assert len(set(kind)) == len(drawn)


def test_precision_of_a_run(restored_process):
    half, brain, full = (utils.Run("cpu", dtype, 0) for dtype in ("float16", "bfloat16", "float32"))
    a = torch.randn(4, 4)
    for run, dtype in [(half, torch.float16), (brain, torch.bfloat16), (full, torch.float32)]:
        with run.autocast():
            assert (a @ a).dtype is dtype
    assert half.scaler.is_enabled() and not brain.scaler.is_enabled() and not full.scaler.is_enabled()
    assert half.skips_allowed > brain.skips_allowed


# ---------------------------------------------------------------------------------------------------------------- loss


def test_loss_of_a_hand_computed_example():
    # One row of three tokens over two words; the head is the identity, so hidden states are logits, which favour word 1
    # by 0, ln 3 and (unused) 5 nats.
    hidden, head = torch.tensor([[[0.0, 0.0], [0.0, math.log(3)], [0.0, 5.0]]]), torch.eye(2)
    # Position 0 predicts label 0 of two equal words: ln 2. Position 1 predicts label 1 with probability 3/4.
    nats = train_pretrain.summed_nll(hidden, head, {"labels": torch.tensor([[1, 0, 1]])})
    assert nats.item() == pytest.approx(math.log(2) + math.log(4 / 3))
    # The trainer of conversations picks the positions before each trained token; -100 fills up and counts nothing.
    picked = {"head_positions": torch.tensor([1, 0]), "targets": torch.tensor([1, IGNORE])}
    assert train_full_sft.summed_nll(hidden, head, picked).item() == pytest.approx(math.log(4 / 3))


def test_loss_over_picked_positions_equals_the_loss_over_all():
    model = tiny(initializer_range=0.2)
    rows = packed_rows(6)
    rows[2]["labels"].fill_(IGNORE)
    batch = SFTDataset.collate(rows)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "documents")}
    everywhere = train_pretrain.summed_nll(model(**inputs).hidden_states, model.lm_head.weight, batch)
    everywhere.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    picked = train_full_sft.summed_nll(model(**inputs).hidden_states, model.lm_head.weight, batch)
    picked.backward()
    assert picked.item() == pytest.approx(everywhere.item(), rel=1e-6)
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


def float64_nll(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Σ −log p of the targets, written as a loop in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for h, target in zip(hidden.double(), targets.tolist(), strict=True):
        if target != IGNORE:
            total = total - (weight.double() @ h).log_softmax(0)[target]
    return total


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_loss_and_gradients_in_pieces_against_float64(dtype, tolerance, size):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 16, generator=generator, requires_grad=True)
    weight = torch.randn(V, 16, generator=generator, requires_grad=True)
    targets = torch.randint(V, (23,), generator=generator)
    targets[torch.rand(23, generator=generator) < 0.4] = IGNORE
    assert 0 < (targets == IGNORE).sum() < 23
    (expected := float64_nll(hidden, weight, targets) * 0.3).backward()
    wanted = [hidden.grad.clone(), weight.grad.clone()]
    hidden.grad = weight.grad = None
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        nats = chunked_nll(hidden, weight, targets, size)
    assert nats.dtype is torch.float32  # a half-precision sum over thousands of tokens would be worth nothing
    (nats * 0.3).backward()
    assert nats.item() * 0.3 == pytest.approx(expected.item(), rel=tolerance)
    for found, grad in zip((hidden.grad, weight.grad), wanted, strict=True):
        assert found.dtype is torch.float32
        assert (found - grad).norm() < tolerance * grad.norm()
    assert not hidden.grad[targets == IGNORE].any()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        assert chunked_nll(hidden, weight, targets, size).item() == pytest.approx(nats.item(), rel=1e-4)


def test_gradient_of_a_sure_token_keeps_its_digits():
    """p = 0.9989: in bfloat16 p rounds to 1 and p − 1 to nothing; taken before rounding it keeps two digits."""
    hidden, weight = torch.tensor([[6.8]]), torch.tensor([[0.5], [-0.5]])
    logits = (hidden @ weight.T).bfloat16()
    sure = torch.softmax(logits.double(), -1)[0]
    _, gradient = nll_and_gradient(logits, torch.tensor([0]))
    assert gradient.dtype is torch.bfloat16
    assert gradient[0].tolist() == pytest.approx([float(sure[0] - 1), float(sure[1])], rel=1e-2)


def test_a_frozen_head_gets_no_gradient_and_changes_nothing_else():
    weight, targets = torch.randn(V, 8), torch.arange(20)
    grads = []
    for head in (weight.clone().requires_grad_(), weight.clone()):
        hidden = torch.linspace(-1, 1, 160).view(20, 8).requires_grad_()
        chunked_nll(hidden, head, targets, 6).backward()
        grads.append(hidden.grad)
        assert (head.grad is not None) == head.requires_grad
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_loss_never_holds_all_logits():
    seen = []

    def piece(logits, targets):
        seen.append(tuple(logits.shape))
        return nll_and_gradient(logits, targets)

    hidden = torch.randn(70, 8, requires_grad=True)
    chunked_nll(hidden, torch.randn(V, 8), torch.zeros(70, dtype=torch.long), 32, piece).backward()
    assert seen == [(32, V), (32, V), (6, V)] and hidden.grad.abs().sum() > 0


def test_loss_of_ignored_labels_is_zero_and_so_is_its_gradient():
    hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    nats = train_pretrain.summed_nll(hidden, weight, {"labels": torch.full((2, 5), IGNORE)})
    nats.backward()
    assert nats.item() == 0.0 and not hidden.grad.any() and not weight.grad.any()


# ---------------------------------------------------------------------------------------------------------- validation


class Rows(list):
    """A dataset of ready-made rows."""

    collate = staticmethod(PackedDataset.collate)
    count_terms = staticmethod(PackedDataset.count_terms)
    describe = PackedDataset.describe
    stats = {"fill": 0.5}  # noqa: RUF012


def packed_rows(n: int, width: int = 12) -> Rows:
    """Rows of two documents and some padding; about half of the labels are ignored."""
    generator = torch.Generator().manual_seed(5)
    rows = Rows()
    for _ in range(n):
        first = int(torch.randint(2, 6, (), generator=generator))
        second = int(torch.randint(2, 6, (), generator=generator))
        rest = width - first - second
        ids = torch.randint(3, V, (width,), generator=generator)
        labels = ids.masked_fill(torch.rand(width, generator=generator) < 0.4, IGNORE)
        labels[[0, first]] = IGNORE
        labels[first + second :] = IGNORE
        parts = [first, second, rest]
        rows.append({
            "input_ids": ids,
            "labels": labels,
            "position_ids": torch.cat([torch.arange(part) for part in parts]),
            "documents": torch.cat([torch.full((part,), d) for part, d in zip(parts, (0, 1, -1), strict=True)]),
        })  # fmt: skip
    return rows


def test_validation_against_a_naive_loop():
    model = tiny(dropout=0.5, initializer_range=0.2).train()
    rows = packed_rows(7)
    bytes_of = torch.arange(V) % 5
    nats = tokens = text_bytes = 0
    model.eval()
    for row in rows[:5]:
        for document in (0, 1):  # each document alone, in its own forward pass
            here = row["documents"] == document
            with torch.no_grad():
                log_probs = model(row["input_ids"][here][None]).logits[0].double().log_softmax(-1)
            for t, label in enumerate(row["labels"][here][1:].tolist()):
                if label != IGNORE:
                    nats -= float(log_probs[t, label])
                    tokens += 1
                    text_bytes += label % 5
    model.train()
    picking = Rows(rows)
    picking.collate = SFTDataset.collate
    for dataset, script in ((rows, train_pretrain), (picking, train_full_sft)):
        result = utils.validate(model, dataset, script.summed_nll, one_process(), 2, 5, bytes_of)
        assert result["val_loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert result["val_bpb"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    assert model.training and all(p.grad is None for p in model.parameters())


class RowsAndPadding(Rows):
    """Row -1 is padding, as in a packed data set."""

    def __getitem__(self, row: int) -> dict:
        found = super().__getitem__(row)
        if row >= 0:
            return found
        return {name: torch.full_like(tensor, IGNORE if name == "labels" else 0) for name, tensor in found.items()} | {
            "documents": torch.full_like(found["documents"], -1)
        }


def test_validation_shares_the_rows_among_ranks():
    model, rows, bytes_of = tiny(), RowsAndPadding(packed_rows(5)), torch.ones(V, dtype=torch.long)
    parts = []
    for rank in range(3):
        run = one_process(rank, 3)
        run.sum_ranks = lambda value: parts.append(value) or value
        utils.validate(model, rows, train_pretrain.summed_nll, run, 2, 100, bytes_of)
    alone = one_process()
    alone.sum_ranks = lambda value: parts.append(value) or value
    utils.validate(model, rows, train_pretrain.summed_nll, alone, 2, 100, bytes_of)
    assert torch.allclose(sum(parts[:3]), parts[3], rtol=1e-5)


def test_validation_without_rows_and_without_labels():
    model, bytes_of = tiny(), torch.ones(V)
    assert utils.validate(model, Rows(), train_pretrain.summed_nll, one_process(), 2, 5, bytes_of) is None
    rows = Rows({**row, "labels": torch.full_like(row["labels"], IGNORE)} for row in packed_rows(2))
    result = utils.validate(model, rows, train_pretrain.summed_nll, one_process(), 2, 5, bytes_of)
    assert result == {"val_loss": 0.0, "val_bpb": 0.0}


# ------------------------------------------------------------------------------------------------------------- run log


@pytest.mark.parametrize("moe", [{}, {"use_moe": True, "n_routed_experts": 5, "num_experts_per_tok": 2}])
def test_flops_against_the_sizes_of_the_layers(moe):
    model = tiny(**moe)
    products = model.lm_head.weight.numel()
    for layer in model.model.layers:
        used = [m for name, m in layer.named_modules() if isinstance(m, nn.Linear) and ".experts." not in name]
        products += sum(linear.weight.numel() for linear in used)
        if moe:
            one_expert = sum(m.weight.numel() for m in layer.mlp.experts[0].modules() if isinstance(m, nn.Linear))
            products += 2 * one_expert + layer.mlp.gate.weight.numel()
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)  # the PaLM count takes them along
    # Scores and weighted sum of T/2 tokens on average: 2 products of D · T/2, forward and twice backward.
    T, D, layers = 100, 32, 2
    attention = layers * 2 * (2 * D * T / 2) * 3
    assert run_log.flops_per_token(model, T) == 6 * (products + norms) + attention


@pytest.mark.parametrize(
    "name, tera",
    [
        ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A10", 125), ("NVIDIA A40", 150),
        ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA RTX 6000 Ada Generation", 364), ("NVIDIA RTX A6000", 155),
        ("NVIDIA GeForce GTX 1080", None), ("NVIDIA RTX A4000", None), ("NVIDIA T400 4GB", None), ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 3080 Ti", None), ("NVIDIA GB200", None),
    ],
)  # fmt: skip
def test_peak_of_known_cards_only(name, tera, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert run_log.peak_flops(torch.device("cuda", 0)) == (tera and tera * 1e12)
    assert run_log.peak_flops(torch.device("cpu")) is None


def test_a_log_line_adds_up_what_happened_since_the_last_one(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(run_log, "time", SimpleNamespace(perf_counter=lambda: now[0], time=lambda: 1e9))
    monkeypatch.setattr(run_log, "peak_flops", lambda device: 1e6)
    model, args = tiny(), shared_parser().parse_args([])
    vars(args).update(total_steps=20, accumulation_steps=2, warmup_iters=1, data_path="d.jsonl", compile=False)
    run = one_process(world_size=2)
    run.is_main, run.dtype = True, torch.float32
    run.sum_ranks = lambda value: value * 2  # the other rank has the same
    data = packed_rows(3)
    progress = Progress(step=4, epoch=1, tokens=900)
    keeper = SimpleNamespace(folder=tmp_path, progress=Progress(), wandb_id=None)
    log = run_log.RunLog(run, "pretrain", keeper, args, model, data)
    assert "4 rows × 2 micro-batches × 2 ranks = 16 rows, 1,024 tokens per update" in capsys.readouterr().out

    log.count(torch.tensor(6.0), 12, 100, waited_seconds=1.0)
    with log.pause():  # saving and validating take nothing from tokens/s
        now[0] += 50
    log.count(torch.tensor(10.0), 4, 300, waited_seconds=1.0)
    now[0] += 8
    log.line(progress, 1e-3, torch.tensor(0.5))
    first = run_log.read_metrics(tmp_path / "metrics.jsonl")[0]
    assert first["loss"] == 2 * (6 + 10) / (12 + 4)  # over tokens, not a mean of means
    assert (first["tokens_per_second"], first["data_wait"], first["tokens"], first["epoch"]) == (50.0, 0.25, 900, 2)
    assert first["eta_seconds"] == 4.0 * (20 - 4)
    assert first["mfu"] == pytest.approx(50 * run_log.flops_per_token(model, 64) / 2 / 1e6)
    assert "aux_loss" not in first
    expected = "pretrain | epoch 2/1 | step 4/20 | loss 2.0000 | lr 1.00e-03 | gnorm 0.50 | 0.1k tok/s | mfu "
    line = capsys.readouterr().out
    assert line.startswith(expected) and line.endswith("| data 25.0% | eta 0:01:04\n")

    now[0] += 2
    log.count(torch.tensor(0.0), 0, 10, waited_seconds=0.0)  # an update that was skipped, or had no label
    log.count_experts(torch.tensor([[6, 2], [0, 0]]))
    log.count_experts(torch.tensor([[6, 2], [4, 4]]))
    log.line(progress, 1e-3, torch.tensor(math.nan), aux_loss=0.25)
    second = run_log.read_metrics(tmp_path / "metrics.jsonl")[1]
    assert second["loss"] is None and second["grad_norm"] is None and second["aux_loss"] == 0.25
    assert second["expert_load"] == [[0.75, 0.25], [0.5, 0.5]] and "| experts 25%–75% |" in capsys.readouterr().out
    assert second["tokens_per_second"] == 5.0


def write_metrics(folder, *lines: str) -> None:
    (folder / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_metrics_with_a_torn_last_line(tmp_path):
    write_metrics(tmp_path, '{"step": 1, "loss": 3.0}', '{"step": 2, "loss": 2.5}', '{"step": 3, "lo')
    assert run_log.read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]


def test_loss_curve_is_a_picture(tmp_path):
    assert run_log.plot_loss(tmp_path, "nothing yet") is None
    write_metrics(tmp_path, '{"step": 1, "val_loss": 3.0}')
    assert run_log.plot_loss(tmp_path, "no training loss yet") is None
    lines = [json.dumps({"step": step, "loss": 5.0 - step}) for step in range(1, 4)]
    write_metrics(tmp_path, *lines, '{"step": 4, "loss": null}')
    first = run_log.plot_loss(tmp_path, "demo")
    pictures = [first.read_bytes()]
    write_metrics(tmp_path, *lines, '{"step": 3, "val_loss": 2.5, "val_bpb": 1.0}')
    pictures.append(run_log.plot_loss(tmp_path, "demo").read_bytes())
    for picture in pictures:
        assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture.endswith(b"IEND\xaeB`\x82")
    assert pictures[0] != pictures[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_clock_and_finite():
    assert [run_log.clock(s) for s in (0, 59.9, 3600, 7384)] == ["0:00:00", "0:00:59", "1:00:00", "2:03:04"]
    values = [1, 2.5, float("nan"), float("inf"), -float("inf"), "x", None]
    assert [run_log.finite(v) for v in values] == [1, 2.5, None, None, None, "x", None]


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_skipped_updates_are_counted_and_too_many_in_a_row_end_the_run():
    progress = Progress(step=7)
    for finite in (False, False, True, False, False):
        progress.step += 1
        progress.count_skip(torch.tensor(finite), 2)
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (3, 1)  # the last one is not read yet
    progress.read_skip()
    progress.read_skip()  # counted once
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (4, 2)
    assert not any(isinstance(value, (torch.Tensor, tuple)) for value in vars(progress).values())  # goes into JSON
    progress.step += 1
    progress.count_skip(torch.tensor(False), 2)
    with pytest.raises(UserError, match=r"NaN or infinite in 3 updates in a row, up to update 13\..*--learning_rate"):
        progress.read_skip()


def state(step: int) -> dict:
    return {"model": {"w": torch.arange(4000.0) + step}, "step": step}


def test_only_the_newest_states_are_kept(tmp_path):
    for step in (2, 4, 6, 10):
        checkpoint.save_state(tmp_path, state(step), {"progress": step}, step)
    names = [f"step_{step:08d}{kind}" for step in (6, 10) for kind in (".json", ".pt")]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    path, facts = checkpoint.newest_state(tmp_path)
    assert path.name == "step_00000010.pt" and facts["progress"] == 10
    assert torch.equal(torch.load(path, weights_only=True)["model"]["w"], state(10)["model"]["w"])


def flip_a_bit(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda pt, about: pt.write_bytes(pt.read_bytes()[:-100]),
        lambda pt, about: pt.write_bytes(b""),
        lambda pt, about: flip_a_bit(pt),
        lambda pt, about: about.unlink(),
        lambda pt, about: about.write_bytes(b""),
        lambda pt, about: about.write_bytes(about.read_bytes()[:-30]),
        lambda pt, about: about.write_text("{}"),
        lambda pt, about: about.write_text("null"),
    ],
    ids=["truncated", "empty", "bit flip", "no json", "empty json", "torn json", "json without sum", "other json"],
)
def test_a_damaged_newest_state_is_named_and_passed_over(damage, tmp_path, capsys):
    assert checkpoint.newest_state(tmp_path) is None
    checkpoint.save_state(tmp_path, state(2), {"progress": 2}, 2)
    checkpoint.save_state(tmp_path, state(4), {"progress": 4}, 4)
    damage(tmp_path / "step_00000004.pt", tmp_path / "step_00000004.json")
    path, facts = checkpoint.newest_state(tmp_path)
    assert path.name == "step_00000002.pt" and facts["progress"] == 2
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "warning" in warning and "step_00000004.pt" in warning
    flip_a_bit(tmp_path / "step_00000002.pt")
    assert checkpoint.newest_state(tmp_path) is None


def make_run(out_dir, name: str, age: float) -> None:
    folder = out_dir / "runs" / name
    checkpoint.save_state(folder, state(1), {}, 1)
    os.utime(folder / "step_00000001.pt", (1e9 - age, 1e9 - age))


def test_the_run_written_last_is_found(tmp_path):
    with pytest.raises(UserError, match="no saved state of pretrain.*start without --resume"):
        checkpoint.find_run(tmp_path, "pretrain")
    for name, age in [
        ("pretrain_512", 30), ("pretrain_64", 20), ("pretrain_64_moe", 40), ("full_sft_64", 0),
        ("pretrain_64.previous", 0), ("pretrain_64_old", 0), ("pretrain_x", 0),
    ]:  # fmt: skip
        make_run(tmp_path, name, age)
    (tmp_path / "runs" / "pretrain_128").mkdir()  # begun, nothing saved
    found = [
        checkpoint.find_run(tmp_path, "pretrain", *size).name for size in [(), (512,), (64,), (None, True), (64, False)]
    ]
    assert found == ["pretrain_64", "pretrain_512", "pretrain_64", "pretrain_64_moe", "pretrain_64"]
    assert checkpoint.find_run(str(tmp_path), "full_sft").name == "full_sft_64"
    for size in [(128,), (512, True)]:
        with pytest.raises(UserError, match="no saved state of pretrain"):
            checkpoint.find_run(tmp_path, "pretrain", *size)


def test_signature_names_what_differs():
    saved = {"seed": 1, "epochs": 2, "data": "abc"}
    checkpoint.check_signature(saved, dict(saved))
    with pytest.raises(UserError, match="epochs was 2, now it is 3") as error:
        checkpoint.check_signature(saved, {**saved, "epochs": 3})
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="extra was None, now it is 5"):
        checkpoint.check_signature(saved, {**saved, "extra": 5})


def test_an_earlier_run_is_kept_aside(tmp_path, capsys):
    folder, previous = tmp_path / "runs" / "pretrain_64", tmp_path / "runs" / "pretrain_64.previous"
    weights = tmp_path / "pretrain_64.pth"
    checkpoint.start_folder(folder, weights)
    assert folder.is_dir() and not previous.exists()
    checkpoint.start_folder(folder, weights)
    assert not previous.exists() and capsys.readouterr().out == ""  # an empty folder is no earlier run
    for step in (1, 2):
        checkpoint.save_state(folder, state(step), {"progress": {"step": step, "finished": True}}, step)
        weights.write_bytes(bytes([step]))
        checkpoint.start_folder(folder, weights)
        # Stopped before it saved anything, twice: what is kept stays the run that was worth it.
        for _ in range(2):
            (folder / "metrics.jsonl").write_text("{}")
            checkpoint.start_folder(folder, weights)
        assert weights.read_bytes() == (previous / "pretrain_64.pth").read_bytes() == bytes([step])
        assert list(folder.iterdir()) == []
        assert "an earlier run was here" in capsys.readouterr().out
        path, facts = checkpoint.newest_state(previous)
        assert (path.name, facts["progress"]["step"]) == (f"step_{step:08d}.pt", step)  # only the last one is kept


def test_false_starts_do_not_push_out_a_longer_run(tmp_path, capsys):
    """Ctrl-C saves, so a run stopped after two updates has a state; it is not worth the one of 300 kept aside."""
    folder, weights = tmp_path / "runs" / "pretrain_64", tmp_path / "pretrain_64.pth"
    for step, finished in ((300, True), (2, False), (1, False)):
        checkpoint.start_folder(folder, weights)
        checkpoint.save_state(folder, state(step), {"progress": {"step": step, "finished": finished}}, step)
        weights.write_bytes(b"good" if finished else b"bad")
    checkpoint.start_folder(folder, weights)
    previous = folder.with_name("pretrain_64.previous")
    assert checkpoint.newest_state(previous)[1]["progress"]["step"] == 300
    assert (previous / "pretrain_64.pth").read_bytes() == b"good" and list(folder.iterdir()) == []
    assert "the unfinished run of 1 updates is dropped; one of 300 is kept in" in capsys.readouterr().out
    # A longer one takes its place, and so does a finished one.
    checkpoint.save_state(folder, state(400), {"progress": {"step": 400, "finished": False}}, 400)
    checkpoint.start_folder(folder, weights)
    assert checkpoint.newest_state(previous)[1]["progress"]["step"] == 400
    with pytest.raises(UserError, match=r"an earlier run is kept in .*pretrain_64\.previous: rename it"):
        checkpoint.find_run(tmp_path, "pretrain")


def test_resumed_flags_are_those_of_the_run_unless_given_again(tmp_path):
    def parse(*words: str) -> argparse.Namespace:
        return checkpoint.parse_flags(shared_parser(), "pretrain", ["--out_dir", str(tmp_path), *words])

    first = parse("--hidden_size", "64", "--batch_size", "7", "--use_moe", "--device", "cpu", "--data_path", "a.jsonl")
    assert first.given["batch_size"] == 7
    facts = {"args": first.given, "config": {"hidden_size": 64}}
    checkpoint.save_state(tmp_path / "runs" / "pretrain_64_moe", state(1), facts, 1)
    again = parse("--resume", "--batch_size", "9")
    assert (again.hidden_size, again.use_moe, again.data_path) == (64, True, str(Path("a.jsonl").resolve()))
    assert again.batch_size == 9 and again.device is None and again.resume is True
    assert again.out_dir == str(tmp_path) and again.saved_config == {"hidden_size": 64}


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "error, status, line",
    [
        (UserError("nothing to eat."), 2, "error: nothing to eat.\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_of_the_user_are_one_line(error, status, line, capsys, monkeypatch):
    monkeypatch.delenv("MINIMIND_TRACEBACK", raising=False)

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == status and capsys.readouterr().err == line


def test_errors_carry_the_rank_and_a_bug_shows_its_traceback(capsys, monkeypatch):
    def main() -> None:
        raise UserError("nothing to eat.")

    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        run_script(main)
    assert capsys.readouterr().err == "error (rank 3): nothing to eat.\n"
    monkeypatch.setenv("MINIMIND_TRACEBACK", "1")
    with pytest.raises(UserError):
        run_script(main)
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's ways, Linux's count of page faults")
def test_kept_memory_costs_no_page_faults_when_used_again():
    code = """
import resource, sys, torch
from trainer import trainer_utils
if sys.argv[1] == "keep":
    trainer_utils.keep_freed_memory()
for _ in range(8):  # 128 MiB each; where the first few come to lie is chance
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**25)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", code, way], cwd=utils.ROOT, capture_output=True, check=True).stdout)
        for way in ("keep", "default")
    )
    assert kept < given_back / 4, (kept, given_back)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:x", "toaster", "cpu:1", ""])
def test_a_device_that_is_not_there(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"--device {device}: .*use --device cpu"):
        utils.Run(device, "float32", 0)


def test_devices_that_are_there(monkeypatch):
    assert utils.find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert utils.find_device("cuda:1") == torch.device("cuda", 1)
    assert utils.find_device(None) == utils.find_device("cuda") == torch.device("cuda")


@pytest.mark.parametrize("given, rank, world, index", [(None, 0, 1, 0), ("cuda:1", 0, 1, 1), ("cuda", 1, 2, 1)])
def test_a_run_on_a_card_names_the_card(given, rank, world, index, monkeypatch):
    """torch.cuda.set_device refuses a device without a number; a driver is not needed to see that."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(utils.dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(utils.dist, "new_group", lambda **kwargs: None)
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.setenv(name, str(value))
    run = utils.Run(given, "auto", 0)
    assert chosen == [index] and run.device == torch.device("cuda", index) and run.dtype is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if index:
        with pytest.raises(UserError, match="no such device|no more processes than there are cards"):
            utils.Run(given, "auto", 0)


def test_where_compiling_pays(monkeypatch):
    cpu, card = (SimpleNamespace(device=torch.device(name), dtype=torch.bfloat16) for name in ("cpu", "cuda:0"))
    monkeypatch.setattr(utils.sys, "platform", "linux")
    monkeypatch.setattr(utils.shutil, "which", lambda name: name)
    monkeypatch.setattr(utils.Path, "is_file", lambda path: path.name == "Python.h")
    assert utils.compile_pays(cpu, 1_000_000, False)
    assert not utils.compile_pays(cpu, 999_999, False) and not utils.compile_pays(cpu, 10**9, True)
    assert not utils.compile_pays(SimpleNamespace(device=cpu.device, dtype=torch.float32), 10**9, False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert utils.compile_pays(card, 1, False) and not utils.compile_pays(card, 10**9, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not utils.compile_pays(card, 10**9, False)
    assert not utils.compile_pays(SimpleNamespace(device=torch.device("mps")), 10**9, False)
    monkeypatch.setattr(utils.Path, "is_file", lambda path: False)  # no python3-dev
    assert not utils.compile_pays(cpu, 10**9, False)
    monkeypatch.setattr(utils.Path, "is_file", lambda path: True)
    monkeypatch.setattr(utils.shutil, "which", lambda name: None)
    assert not utils.compile_pays(cpu, 10**9, False)
    monkeypatch.setattr(utils.shutil, "which", lambda name: name)
    monkeypatch.setattr(utils.sys, "platform", "win32")
    assert not utils.compile_pays(cpu, 10**9, False) and not utils.compile_pays(card, 10**9, False)


def test_out_of_memory_is_one_line_of_advice(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--batch_size" in error and "--accumulation_steps" in error


def test_a_cuda_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="use --device cuda"):
        utils.find_device("cuda:2")
