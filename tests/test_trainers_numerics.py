"""The two trainers off the plain path: half precision, no label, losses that are not finite, layouts and ranks."""

import functools
import math
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_trainers import (  # noqa: F401 (fixtures)
    ADAMW,
    SCRIPTS,
    Watch,
    assert_same_run,
    cpu_is_the_best_device,
    curve,
    files,
    final_state,
    flags,
    metrics,
    one_error,
    reference,
    run_folder,
    tiny_flags,
    torchrun,
    train,
)

from dataset.lm_dataset import IGNORE
from trainer import run_log, train_pretrain
from trainer import trainer_utils as utils

# ruff: noqa: F811 (fixtures as arguments)


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("stage", SCRIPTS)
def test_half_precision_learns(stage, dtype, reference, flags, tmp_path, monkeypatch):
    if stage == "full_sft":
        shutil.copy(reference.out_dir / "pretrain_32.pth", tmp_path)
        shutil.copy(reference.out_dir / "pretrain_32.json", tmp_path)
    watch = Watch(monkeypatch)
    result = train(SCRIPTS[stage], flags(stage, dtype=dtype, max_steps=14, val_interval=0))
    assert result.status == 0, result.err
    lines = metrics(tmp_path, stage)
    losses = [loss for loss in curve(lines) if loss is not None]
    assert len(losses) >= 10  # the first loss scale of float16 may overflow
    assert losses[-1] < losses[0] - (0.5 if stage == "pretrain" else 0.3)
    if stage == "pretrain":  # the same first update as the float32 run, rounded
        full = metrics(reference.out_dir)[0]
        for name, tolerance in [("loss", 1e-3), ("grad_norm", 0.02)]:
            assert lines[0][name] == pytest.approx(full[name], rel=tolerance)
            assert lines[0][name] != full[name]
    assert all(p.dtype is torch.float32 for p in watch.model.parameters())  # master weights
    assert all(not torch.equal(p, watch.first[name]) for name, p in watch.model.named_parameters())
    state, facts = final_state(tmp_path, stage)
    assert bool(state["scaler"]) == (dtype == "float16")
    assert f"machine cpu, {dtype}, compile off" in result.out


def test_a_loss_scale_that_overflows_is_lowered_until_it_fits(flags, tmp_path, monkeypatch):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**30)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    watch = Watch(monkeypatch)
    assert train(train_pretrain, flags(dtype="float16", epochs=2, max_steps=30, val_interval=0)).status == 0
    lines = metrics(tmp_path)
    skipped = lines[-1 if "loss" in lines[-1] else -2]["skipped_steps"]
    assert 0 < skipped < 20
    for name, p in watch.weights[0].items():
        assert torch.equal(p, watch.first[name])  # the first update overflowed and was left out
    state, _ = final_state(tmp_path)
    assert state["scaler"]["scale"] < 2.0**30
    losses = [loss for loss in curve(lines) if loss is not None]
    assert len(losses) == 30 - skipped and losses[-1] < losses[0] - 0.5


# ----------------------------------------------------------------------------------------------------------------- data


def test_a_first_update_without_a_label_changes_nothing_but_by_decay(flags, tmp_path, monkeypatch):
    read_updates = utils.read_updates

    def first_without_labels(*args):
        for i, (rows, counts, micros) in enumerate(read_updates(*args)):
            if i == 0:
                counts = (0, counts[1])
                micros = [{**micro, "labels": torch.full_like(micro["labels"], IGNORE)} for micro in micros]
            yield rows, counts, micros

    monkeypatch.setattr(utils, "read_updates", first_without_labels)
    watch = Watch(monkeypatch)
    assert train(train_pretrain, flags(max_steps=8, warmup_iters=1, val_interval=0)).status == 0
    for name, p in watch.weights[0].items():
        shrunk = 1 - 5e-3 * 0.1 if p.ndim >= 2 else 1
        assert torch.allclose(p, watch.first[name] * shrunk, rtol=1e-6, atol=0), name
    losses = curve(metrics(tmp_path))
    assert losses[0] is None and metrics(tmp_path)[0]["skipped_steps"] == 0
    assert losses[-1] < losses[1] and all(torch.isfinite(p).all() for p in watch.weights[-1].values())


def test_loader_processes_change_nothing(flags, tmp_path):
    for workers in (0, 2):
        result = train(train_pretrain, flags(out_dir=tmp_path / str(workers), max_steps=4, num_workers=workers))
        assert result.status == 0, result.err
    assert_same_run(tmp_path / "0", tmp_path / "2")


# --------------------------------------------------------------------------------------------- one update in any layout


LAYOUTS = {"1 x 32": (32, 1), "8 x 4": (4, 8), "2 ranks x 16": (16, 1)}
MODELS = {"dense": ADAMW, "experts": ADAMW | dict(use_moe=True), "muon": dict(optimizer="muon")}


@pytest.fixture(scope="module")
def layout_run(files, tmp_path_factory):
    """Runs a layout of a global batch of 32 rows, once per kind of model."""

    @functools.cache
    def run(kind: str, layout: str) -> Path:
        out_dir = tmp_path_factory.mktemp("layout")
        batch, accumulation = LAYOUTS[layout]
        changes = dict(epochs=2, max_steps=6, warmup_iters=1, learning_rate=1e-3)
        changes |= dict(batch_size=batch, accumulation_steps=accumulation, **MODELS[kind])
        result = (torchrun if "ranks" in layout else train)(train_pretrain, tiny_flags(files, out_dir, **changes))
        assert result.status == 0, result.err
        return out_dir

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, layout",
    [
        ("dense", "8 x 4"),
        ("dense", "2 ranks x 16"),
        ("experts", "8 x 4"),
        ("experts", "2 ranks x 16"),
        ("muon", "8 x 4"),
        ("muon", "2 ranks x 16"),
    ],
)
def test_any_layout_of_the_batch_is_the_same_update(kind, layout, layout_run, reference):
    assert len(reference.data) % 4 and len(reference.data) < 5 * 32  # both epochs are reached, their ends are ragged
    size = "32_moe" if kind == "experts" else "32"
    one_dir, other_dir = layout_run(kind, "1 x 32"), layout_run(kind, layout)
    one, other = metrics(one_dir, size=size), metrics(other_dir, size=size)
    assert curve(one, "step") == curve(other, "step")
    assert curve(one, "tokens") == curve(other, "tokens") and len(curve(one, "tokens")) == 6
    # Rounding is amplified where a router's choice flips, and by Muon, which evens out large and small directions.
    close = functools.partial(pytest.approx, rel={"dense": 1e-6, "experts": 1e-5, "muon": 1e-4}[kind])
    assert curve(other) == close(curve(one))
    if kind != "muon":  # the optimisers do not see a wrong scale of the gradient, its norm does
        assert curve(other, "grad_norm") == close(curve(one, "grad_norm"))
    assert curve(other, "aux_loss") == close(curve(one, "aux_loss"))
    assert bool(curve(one, "aux_loss")) == (kind == "experts")
    for name in ("val_loss", "val_bpb"):
        assert curve(other, name) == close(curve(one, name)) and len(curve(one, name)) == 1
    (a, facts), (b, other_facts) = final_state(one_dir, size=size), final_state(other_dir, size=size)
    assert facts["progress"] == other_facts["progress"]
    worst = max(float((a["model"][name] - b["model"][name]).abs().max()) for name in a["model"])
    assert worst < {"dense": 2e-6, "experts": 2e-5, "muon": 5e-4}[kind], worst  # six updates of up to 1e-3 each


# ----------------------------------------------------------------------------------------------------------- non-finite


def spoil(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Makes the loss NaN at the given calls (one per micro-batch and validation batch)."""
    seen, summed_nll = [0], train_pretrain.summed_nll

    def spoiled(*args, **kwargs):
        seen[0] += 1
        return summed_nll(*args, **kwargs) * (math.nan if seen[0] in calls else 1.0)

    monkeypatch.setattr(train_pretrain, "summed_nll", spoiled)


def test_a_non_finite_loss_costs_one_update(flags, tmp_path, monkeypatch):
    spoil(monkeypatch, {6})  # the second micro-batch of the third update
    watch = Watch(monkeypatch)
    result = train(train_pretrain, flags(epochs=2, max_steps=12, accumulation_steps=2, val_interval=0))
    assert result.status == 0, result.err
    for name, p in watch.weights[2].items():
        assert torch.equal(p, watch.weights[1][name]), name
        assert not torch.equal(watch.weights[3][name], p) and torch.isfinite(watch.weights[-1][name]).all()
    records = [record for record in metrics(tmp_path) if "loss" in record]
    assert [record["skipped_steps"] for record in records] == [0, 0] + [1] * 10
    assert records[2]["loss"] is None and records[2]["grad_norm"] is None
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert "| skipped 1 |" in result.out
    assert run_log.plot_loss(run_folder(tmp_path), "with a gap") is not None


def test_non_finite_losses_without_end_stop_the_run_with_advice(flags, tmp_path, monkeypatch):
    spoil(monkeypatch, set(range(4, 100)))
    watch = Watch(monkeypatch)
    result = train(train_pretrain, flags(save_interval=2, val_interval=0))
    message = one_error(result)
    assert "6 updates in a row, up to update 9" in message and "smaller --learning_rate" in message
    state, facts = final_state(tmp_path)
    assert facts["progress"]["step"] == 8
    assert all(torch.equal(state["model"][name], p) for name, p in watch.weights[2].items())


# ---------------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_job(files, tmp_path):
    """Rank 1 fails while rank 0 waits for it in a collective."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from trainer import command_line, run_log, train_pretrain
count = run_log.RunLog.count
def failing(log, *args):
    count(log, *args)
    if os.environ["RANK"] == "1" and log.steps == 2:
        print("failing at", time.time(), flush=True)
        raise command_line.UserError("the plug was pulled.")
run_log.RunLog.count = failing
command_line.run_script(train_pretrain.main)
""",
        encoding="utf-8",
    )
    result = torchrun(driver, tiny_flags(files, tmp_path / "out", log_interval=100))
    ended = time.time()
    assert result.status != 0
    assert result.err.count("error (rank 1): the plug was pulled.") == 1
    assert ended - float(re.search(r"failing at ([\d.]+)", result.out)[1]) < 45
