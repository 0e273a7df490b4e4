"""The LoRA trainer: what it learns, what it leaves alone, resuming, two ranks, and what it refuses."""

import json
import shutil

import pytest
import torch
from test_trainers import (  # noqa: F401 (fixtures)
    PowerCut,
    Watch,
    cpu_is_the_best_device,
    curve,
    cut,
    differences,
    files,
    final_state,
    flags,
    metrics,
    reference,
    torchrun,
    train,
    tree,
)

from dataset.lm_dataset import SFTDataset, token_bytes
from model.model_lora import load_lora, lora_layers
from model.weights import load_model, load_tokenizer
from trainer import train_lora
from trainer import trainer_utils as utils
from trainer.train_full_sft import summed_nll

# ruff: noqa: F811 (fixtures as arguments)


@pytest.fixture
def lora_flags(files, flags, reference):
    """A tiny run on the weights of the reference run, which no test may change."""
    base = reference.out_dir / "pretrain_32.pth"
    before = base.read_bytes()
    yield lambda **changes: flags(
        "full_sft", **{"from_weight": base, "lora_name": "tea", "epochs": 2, "rank": 4, "max_steps": 14, **changes}
    )
    assert base.read_bytes() == before


def test_an_adapter_learns_beside_a_frozen_base(lora_flags, reference, files, tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    result = train(train_lora, lora_flags(learning_rate=2e-2))
    assert result.status == 0, result.err
    assert len(watch.first) == 1 + 7 + 3 and len(watch.weights) == 14  # seen before the adapter came: the base alone
    moved = [name for name, p in watch.first.items() if not torch.equal(p, watch.weights[-1][name])]
    assert moved == [] and len(watch.weights[-1]) > len(watch.first)
    losses = curve(metrics(tmp_path, "lora_tea"))
    assert losses[-1] < losses[0] - 0.5
    path = tmp_path / "lora" / "tea_32.pth"
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert about["stage"] == "lora_tea" and about["lora"]["rank"] == 4 and about["config"]["hidden_size"] == 32
    assert not list(tmp_path.glob("*.pth"))  # the base is not copied

    base = reference.out_dir / "pretrain_32.pth"
    adapted = load_model(base)
    load_lora(adapted, path)
    assert path.stat().st_size < base.stat().st_size / 5 and len(lora_layers(adapted)) == 7
    validated = curve(metrics(tmp_path, "lora_tea"), "val_loss")
    assert validated[-1] < validated[0]
    # The file, put onto the base, says what the trained model said (float16 in between).
    held_out = SFTDataset(files.full_sft, load_tokenizer(), 64, "val", val_ratio=0.05, cache_dir=files.cache)
    run = utils.Run("cpu", "float32", 42)
    bytes_of = token_bytes(load_tokenizer())
    plain, again = (
        utils.validate(model, held_out, summed_nll, run, 4, 8, bytes_of)["val_loss"]
        for model in (load_model(base), adapted)
    )
    assert again == pytest.approx(validated[-1], rel=1e-3) and plain > again + 0.5
    state, _ = final_state(tmp_path, "lora_tea")
    assert set(state["model"]) == {f"{layer}.lora.{part}.weight" for layer in lora_layers(adapted) for part in "AB"}


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3, "target_modules": "q_proj"}])
def test_a_cut_run_goes_on_bit_for_bit(changes, lora_flags, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(train_lora, lora_flags(out_dir=whole, **changes)).status == 0
    with monkeypatch.context() as patch:
        Watch(patch, at={8: cut})
        with pytest.raises(PowerCut):
            train(train_lora, lora_flags(out_dir=broken, **changes))
    result = train(train_lora, ["--resume", "--out_dir", str(broken), "--lora_name", "tea"])
    assert result.status == 0 and "resumed at update 5" in result.out, result.err
    (state, facts), (other, other_facts) = final_state(whole, "lora_tea"), final_state(broken, "lora_tea")
    assert differences(state, other) == [] and facts["progress"] == other_facts["progress"]
    assert curve(metrics(whole, "lora_tea")) == curve(metrics(broken, "lora_tea"))
    files = [torch.load(folder / "lora" / "tea_32.pth", weights_only=True) for folder in (whole, broken)]
    assert differences(*files) == []


@pytest.mark.slow
def test_two_ranks_are_one_process(lora_flags, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    common = dict(max_steps=5, warmup_iters=1)
    assert train(train_lora, lora_flags(out_dir=one, batch_size=8, **common)).status == 0
    result = torchrun(train_lora, lora_flags(out_dir=two, batch_size=4, **common))
    assert result.status == 0, result.err
    assert curve(metrics(two, "lora_tea")) == pytest.approx(curve(metrics(one, "lora_tea")), rel=1e-6)
    a, b = (final_state(folder, "lora_tea")[0]["model"] for folder in (one, two))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 2e-6
    assert max(float(a[name].abs().max()) for name in a if ".B." in name) > 1e-3  # it did move


def test_another_base_or_rank_is_refused(lora_flags, reference, tmp_path):
    base = tmp_path / "base" / "full_sft_32.pth"
    base.parent.mkdir()
    for suffix in (".pth", ".json"):
        shutil.copy(reference.out_dir / f"pretrain_32{suffix}", base.with_suffix(suffix))
    assert train(train_lora, lora_flags(from_weight=base, max_steps=6)).status == 0
    before = tree(tmp_path)
    again = ["--resume", "--out_dir", str(tmp_path), "--lora_name", "tea"]
    result = train(train_lora, [*again, "--rank", "2"])
    assert result.status == 2 and "rank was 4, now it is 2" in result.err and result.err.count("\n") == 1
    result = train(train_lora, ["--resume", "--out_dir", str(tmp_path), "--lora_name", "other"])
    assert result.status == 2 and "found no saved state of lora_other" in result.err
    result = train(train_lora, lora_flags(from_weight="none"))
    assert result.status == 2 and "this stage needs a trained model" in result.err
    result = train(train_lora, lora_flags(lora_name="../x"))
    assert result.status == 2 and "--lora_name" in result.err and "letters, digits" in result.err
    assert tree(tmp_path) == before
    state = torch.load(base, weights_only=True)
    state["model.norm.weight"] += 1
    torch.save(state, base)
    result = train(train_lora, again)
    assert result.status == 2 and "base weights was" in result.err and result.err.count("\n") == 1
