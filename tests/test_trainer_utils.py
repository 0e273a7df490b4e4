"""The trainers' plumbing, part by part, against hand-made oracles: schedule, order of rows, flags, errors.

Dimension legend: B batch · T tokens · V vocabulary.
"""

import argparse
import contextlib
import math
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

from dataset.lm_dataset import PackedDataset
from model.model_minimind import IGNORE, MiniMindConfig, MiniMindForCausalLM
from trainer import train_full_sft, train_pretrain
from trainer import trainer_utils as utils
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


class Rows(list):
    """A dataset of ready-made rows."""

    collate = staticmethod(PackedDataset.collate)
    count_terms = staticmethod(PackedDataset.count_terms)
    describe = PackedDataset.describe
    stats = {"fill": 0.5}  # noqa: RUF012


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
    assert utils.compile_pays(cpu, 1_500_000, False)
    assert not utils.compile_pays(cpu, 1_499_999, False) and not utils.compile_pays(cpu, 10**9, True)
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
