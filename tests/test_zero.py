# ruff: noqa: F811 (fixtures as arguments)
"""DeepSpeed behind the trainers: equal to data parallelism, saved as any other run, clear when it cannot work."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from test_trainers import (  # noqa: F401 - `files` is a fixture
    ROOT,
    curve,
    files,
    final_state,
    finish,
    metrics,
    start,
    tiny_flags,
    torchrun,
    torchrun_all,
    train,
)

from dataset.make_demo_data import generate
from model.weights import read_state_dict
from trainer import train_pretrain, zero
from trainer.command_line import UserError
from trainer.run_log import read_metrics

CONFIGS = ROOT / "trainer" / "deepspeed"
STEPS = 50


EXACT = [(config, "float32") for config in (None, "zero0", "zero1", "zero2", "zero3", "zero2_offload")]
HALF = [("zero3", "bfloat16"), ("zero0", "float16")]
GOES_ON = [("zero3", None), (None, "zero3"), ("zero2", "zero1")]


@pytest.fixture(scope="module")
def parallel(files, tmp_path_factory):
    """Trains on two ranks, once per configuration, for 50 updates of two micro-batches; gives the output folders."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero")
    outs = {(config, dtype): folder / f"{config}_{dtype}" for config, dtype in EXACT + HALF}
    shape = dict(epochs=20, max_steps=STEPS, batch_size=2, accumulation_steps=2, learning_rate=1e-3)
    shape |= dict(optimizer="adamw", save_interval=20, val_interval=0)
    runs = []
    for (config, dtype), out_dir in outs.items():
        deepspeed = CONFIGS / f"{config}.json" if config else None
        runs.append(("pretrain", tiny_flags(files, out_dir, **shape, dtype=dtype, deepspeed=deepspeed)))
    result = torchrun_all(folder, runs)
    assert result.status == 0, result.err[-3000:]
    return lambda config, dtype="float32": outs[config, dtype]


@pytest.mark.slow
@pytest.mark.parametrize("config", [config for config, _ in EXACT if config])
def test_fifty_updates_of_each_stage_are_those_of_data_parallelism(config, parallel):
    plain, sharded = parallel(None), parallel(config)
    one, other = metrics(plain), metrics(sharded)
    assert len(curve(one)) == STEPS and curve(one)[-1] < curve(one)[0] - 1
    assert curve(other) == pytest.approx(curve(one), rel=2e-5)
    assert curve(other, "grad_norm") == pytest.approx(curve(one, "grad_norm"), rel=1e-3)
    assert curve(other, "val_loss") == pytest.approx(curve(one, "val_loss"), rel=2e-5)
    (a, facts), (b, other_facts) = final_state(plain), final_state(sharded)
    assert facts["progress"] == other_facts["progress"]
    assert a["model"].keys() == b["model"].keys()
    for name, weight in a["model"].items():
        assert b["model"][name].dtype == torch.float32 and b["model"][name].shape == weight.shape
        assert torch.allclose(weight, b["model"][name], atol=2e-5), name
    # AdamW's means, by the number of the weight as a run without DeepSpeed numbers them.
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
    for number, mean in a["optimizer"]["state"].items():
        same = b["optimizer"]["state"][number]
        assert float(same["step"]) == float(mean["step"]) == STEPS
        for name in ("exp_avg", "exp_avg_sq"):
            assert same[name].shape == mean[name].shape
            assert torch.allclose(same[name], mean[name], rtol=1e-2, atol=1e-6), (number, name)


def interrupted(whole: Path, to: Path, step: int = 40) -> Path:
    """The folder as it was when the run of 50 updates had saved the given one."""
    shutil.copytree(whole, to, dirs_exist_ok=True)
    for path in (to / "runs" / "pretrain_32").glob("step_*"):
        if int(path.stem[5:]) > step:
            path.unlink()
    return to


@pytest.fixture(scope="module")
def resumed(parallel, tmp_path_factory):
    """Runs saved at update 40 on two ranks; the rest on one (no engine) or on two ranks with another stage."""
    folder = tmp_path_factory.mktemp("resumed")
    outs = {pair: interrupted(parallel(pair[0]), folder / "_".join(map(str, pair))) for pair in GOES_ON}
    again = {pair: ["--resume", "--out_dir", str(out_dir), "--deepspeed"] for pair, out_dir in outs.items()}
    results = []
    for pair, flags in again.items():
        if pair[1]:  # launched by itself: two ranks under DeepSpeed draw the curve and leave as they do for a user
            results.append(torchrun(train_pretrain, [*flags, str(CONFIGS / f"{pair[1]}.json")]))
            assert (outs[pair] / "runs" / "pretrain_32" / "loss.png").is_file()
        else:
            results.append(train(train_pretrain, [*flags, "none", "--batch_size", "4"]))
    assert all(result.status == 0 for result in results), [result.err[-3000:] for result in results]
    assert sum(result.out.count("resumed at update 40") for result in results) == len(GOES_ON)
    return outs


@pytest.mark.slow
@pytest.mark.parametrize("began, goes_on", GOES_ON)
def test_a_run_goes_on_with_another_engine_and_layout(began, goes_on, parallel, resumed):
    one, other = metrics(parallel(None)), metrics(resumed[began, goes_on])
    assert curve(other, "step") == curve(one, "step")
    assert curve(other) == pytest.approx(curve(one), rel=2e-5)
    assert curve(other, "val_loss") == pytest.approx(curve(one, "val_loss"), rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config, dtype", HALF)
def test_half_precision_learns_and_keeps_float32_weights(config, dtype, parallel):
    exact, half = metrics(parallel(None)), parallel(config, dtype)
    assert curve(metrics(half))[-1] == pytest.approx(curve(exact)[-1], rel=0.05)
    state, _ = final_state(half)
    rounded = getattr(torch, dtype)
    assert all(weight.dtype == torch.float32 for weight in state["model"].values())
    assert any(not torch.equal(w, w.to(rounded).float()) for w in state["model"].values())  # not rounded ones
    assert metrics(half)[-1]["val_loss"] == pytest.approx(metrics(parallel(None))[-1]["val_loss"], rel=0.05)


# ------------------------------------------------------------------------------------------------------------ one rank


@pytest.fixture
def alone(files, tmp_path):
    """A run of one process as `python trainer/….py --deepspeed CONFIG` starts it, in a process of its own."""

    def run(script, stage: str = "pretrain", config: str | Path = "zero2", **changes):
        path = CONFIGS / f"{config}.json" if isinstance(config, str) else config
        shape = dict(epochs=20, max_steps=6, save_interval=3, val_interval=0, deepspeed=path) | changes
        return finish(start([script.__file__, *tiny_flags(files, tmp_path, stage, **shape)]))

    return run


@pytest.mark.slow
def test_a_batch_that_is_not_a_number_is_left_out(files, tmp_path):
    pytest.importorskip("deepspeed")
    code = """
from trainer import train_pretrain
real, calls = train_pretrain.summed_nll, [0]
def spoiled(hidden, *rest, **more):
    calls[0] += 1
    return real(hidden * (float("nan") if calls[0] == 3 else 1.0), *rest, **more)
train_pretrain.summed_nll = spoiled
train_pretrain.run_script(train_pretrain.main)
"""
    flags = tiny_flags(
        files, tmp_path, epochs=20, max_steps=6, val_interval=0, deepspeed=CONFIGS / "zero2.json", save_interval=6
    )
    result = finish(start(["-c", code, *flags], cwd=ROOT))
    assert result.status == 0, result.err[-2000:]
    state, facts = final_state(tmp_path)
    assert facts["progress"]["skipped_steps"] == 1
    assert all(bool(weight.isfinite().all()) for weight in state["model"].values())
    assert float(state["optimizer"]["state"][0]["step"]) == 5


@pytest.mark.slow
def test_muon_gives_way_to_adamw_and_says_so(alone, tmp_path):
    pytest.importorskip("deepspeed")
    result = alone(train_pretrain, config="zero1", max_steps=2)
    assert result.status == 0, result.err[-2000:]
    assert "AdamW is the optimiser, as ZeRO 1 cuts weights into pieces" in result.out
    assert final_state(tmp_path)[1]["signature"]["optimizer"] == "adamw"


BAD = {
    '{"zero_optimization": {"stage": 4}}': "expected 0, 1, 2 or 3",
    '{"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}': "optimizer is decided by --optimizer",
    '{"bf16": {"enabled": true}}': "bf16 is decided by --dtype bfloat16",
    "[1]": "expected a JSON object",
    "{": "expected a JSON file like",
}


@pytest.mark.parametrize("text", BAD)
def test_a_configuration_that_cannot_be_is_refused(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=BAD[text]):
        zero.read_config(str(path))


def test_what_transformers_leaves_to_us_is_filled_in(tmp_path):
    path = tmp_path / "config.json"
    ours = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
    path.write_text(json.dumps({**ours, "bf16": {"enabled": "auto"}, "train_batch_size": "auto"}), encoding="utf-8")
    assert zero.read_config(str(path)) == ours


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_the_shipped_configurations_are_read(path):
    assert zero.zero_stage(zero.read_config(str(path))) == int(path.stem[4])


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="pip install deepspeed, or leave the flag out"):
        zero.import_deepspeed()


# ---------------------------------------------------------------------------------------------------------- all stages


STAGES = ["lora", "dpo", "grpo", "ppo", "reward", "distillation", "distill_reason"]


def stage_flags(stage: str, weights: Path, files, folder: Path) -> dict:
    demo = ROOT / "dataset" / "demo"
    data = {"lora": "sft", "dpo": "dpo", "reward": "dpo", "grpo": "rl", "ppo": "rl", "distillation": "sft"}
    data = demo / f"demo_{data.get(stage, 'reason')}.jsonl"
    small = folder / f"{stage}.jsonl"
    lines = generate(demo) and data.read_text(encoding="utf-8").splitlines(keepends=True)[:60]
    small.write_text("".join(lines), encoding="utf-8")
    changes = dict(data_path=small, max_seq_len=128, max_steps=3, val_ratio=0.1, optimizer="adamw", batch_size=2)
    changes |= dict(val_interval=0, accumulation_steps=None if stage in ("grpo", "ppo") else 2)
    if stage == "distillation":
        changes |= dict(teacher=weights, hidden_size=32, num_hidden_layers=1)
    else:
        changes |= dict(from_weight=weights)
    if stage in ("grpo", "ppo"):
        changes |= dict(max_new_tokens=16, num_generations=2, rewards="length")
    if stage in ("lora", "distill_reason"):
        changes |= dict(mix_path=files.full_sft)
    return changes


@pytest.fixture(scope="module")
def staged(parallel, files, tmp_path_factory) -> Path:
    """Each stage without and with ZeRO 3, in STAGE/plain and STAGE/zero3."""
    folder, runs = tmp_path_factory.mktemp("staged"), []
    for stage in STAGES:
        changes = stage_flags(stage, parallel(None) / "pretrain_32.pth", files, folder)
        for name, config in (("plain", None), ("zero3", CONFIGS / "zero3.json")):
            flags = tiny_flags(files, folder / stage / name, "full_sft", **changes, deepspeed=config)
            runs.append((stage, flags))
    result = torchrun_all(folder, runs)
    assert result.status == 0, result.err[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_under_zero_3_and_saves(stage, staged):
    """Losses are those of a run without DeepSpeed; what is saved loads."""
    curves = []
    for name in ("plain", "zero3"):
        out_dir = staged / stage / name
        path = next((out_dir / "runs").glob("*/metrics.jsonl"))
        curves.append([record["loss"] for record in read_metrics(path) if "loss" in record])
        saved = [p for p in out_dir.rglob("*.pth") if "runs" not in p.parts]
        assert len(saved) == 1 and read_state_dict(saved[0])
    assert len(curves[0]) == 3
    assert curves[1] == pytest.approx(curves[0], rel=1e-3, abs=1e-5)
