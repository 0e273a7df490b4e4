"""Reasoning: the weighted loss by formula, what is mixed in, whole runs, and what they refuse.

Sizes are tiny: hidden 32, one layer, rows of 96 tokens, one thread.

Dimension legend: B batch · T tokens · V vocabulary · N trained positions · D hidden size.
"""

import json
import math
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_stage_datasets import assistant, user
from test_trainers import (  # noqa: F401 (fixtures)
    PowerCut,
    Watch,
    assert_same_run,
    cpu_is_the_best_device,
    curve,
    cut,
    final_state,
    metrics,
    one_error,
    source_of,
    tiny_flags,
    torchrun,
    train,
    tree,
    write_records,
)

from dataset import make_demo_data
from dataset.lm_dataset import IGNORE
from dataset.stage_datasets import DialogueDataset, MixedDataset, ReasonDataset
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_model, load_tokenizer, save_weights
from trainer import run_log, train_distill_reason, train_full_sft
from trainer import trainer_utils as utils
from trainer.chunked_nll import chunked_nll, nll_and_gradient
from trainer.train_distill_reason import TAGS, weighted_nll, weighted_piece

# ruff: noqa: F811 (fixtures as arguments)

STAGE = "reason"
WEIGHT = 3.0  # of a tag, the default
WIDTH = 96


# ----------------------------------------------------------------------------------------------------------------- data


def thought(i: int) -> dict:
    rng = random.Random(i)
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    answer = f"<think>\n{a} and {b}\n</think>\n<answer>\n{a + b}\n</answer>"
    return {"conversations": [user(f"{i}: {a} + {b} = ?"), assistant(answer)]}


def dialogue(i: int) -> dict:
    rng = random.Random(i)
    turns = [user(f"Hello number {i}"), assistant("Hello, my friend" + "!" * rng.randint(1, 3))]
    return {"conversations": turns + [user("And now?"), assistant("Now we sing.")] * (i % 3 == 0)}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> SimpleNamespace:
    """Reasoning, ordinary conversations, and weights that have seen neither."""
    folder = tmp_path_factory.mktemp("reason")
    reason = write_records(folder / "reason.jsonl", [thought(i) for i in range(90)])
    mixed = write_records(folder / "sft.jsonl", [dialogue(i) for i in range(60)])
    torch.manual_seed(0)
    base = folder / "full_sft_32.pth"
    save_weights(MiniMindForCausalLM(MiniMindConfig(hidden_size=32, num_hidden_layers=1)), base, {"stage": "full_sft"})
    return SimpleNamespace(reason=reason, mixed=mixed, base=base, cache=folder / "cache")


@pytest.fixture
def flags(material, tmp_path):
    before = material.base.read_bytes()
    yield lambda out_dir=tmp_path, **changes: reason_flags(material, out_dir, **changes)
    assert material.base.read_bytes() == before


def reason_flags(material, out_dir, **changes) -> list[str]:
    base = dict(from_weight=material.base, mix_path=material.mixed, mix_ratio=0.25, val_ratio=0.15, max_seq_len=WIDTH)
    base |= dict(epochs=2, max_steps=14, warmup_iters=2, val_interval=5, learning_rate=1e-2, val_rows=64)
    return tiny_flags(material, out_dir, STAGE, **(base | changes))


def data_of(kind: type, path: Path, material, tokenizer, split: str = "train"):
    return kind(path, tokenizer, WIDTH, split, val_ratio=0.15, cache_dir=material.cache, show_progress=False)


def mixture(material, tokenizer, share: float = 0.25) -> MixedDataset:
    reason = data_of(ReasonDataset, material.reason, material, tokenizer)
    return MixedDataset(reason, data_of(DialogueDataset, material.mixed, material, tokenizer), share)


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Drawing the loss curve takes as long as a run of this size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_log, "plot_loss", lambda *about: None)
        yield


# ------------------------------------------------------------------------------------------------------------- the loss


def test_the_tags_are_single_tokens_of_the_tokenizer(tokenizer):
    assert TAGS == ("<think>", "</think>", "<answer>", "</answer>")
    assert tokenizer.convert_tokens_to_ids(TAGS) == [3, 4, 5, 6]
    text = "a<think>\nb</think>\n<answer>\n12\n</answer>"
    assert [i for i in tokenizer.encode(text, add_special_tokens=False) if i in (3, 4, 5, 6)] == [3, 4, 5, 6]


def test_loss_and_gradient_by_formula():
    torch.manual_seed(1)
    logits, weights = torch.randn(9, 17) * 3, torch.rand(9) * 4 + 0.5
    targets = torch.tensor([3, IGNORE, 0, 16, IGNORE, 5, 5, 8, IGNORE])
    loss, gradient = weighted_piece(logits, targets, weights)
    z = logits.double().requires_grad_()
    expected = sum(
        -weights[n].double() * torch.log(z[n].exp()[target] / z[n].exp().sum())
        for n, target in enumerate(targets.tolist())
        if target != IGNORE
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and loss > 10
    torch.testing.assert_close(gradient.double(), z.grad, rtol=1e-4, atol=1e-6)
    assert gradient[targets == IGNORE].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_weight_one_it_is_the_loss_of_sft(dtype):
    torch.manual_seed(2)
    logits, targets = (torch.randn(50, 31) * 3).to(dtype), torch.randint(0, 31, (50,))
    targets[::5] = IGNORE
    found, expected = weighted_piece(logits, targets, torch.ones(50)), nll_and_gradient(logits, targets)
    assert found[1].dtype == dtype
    for mine, his in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("tag_weight", [1.0, WEIGHT])
def test_gradients_of_hidden_states_and_head(tag_weight):
    """Positions picked out of rows, more of them than a piece takes, against autograd of the naive loss."""
    torch.manual_seed(3)
    hidden, head = torch.randn(3, 500, 6), torch.randn(23, 6)
    positions, targets = torch.randperm(1500)[:1200], torch.randint(0, 23, (1200,))
    targets[::7] = IGNORE
    tags = torch.tensor([3, 4, 5, 6])
    batch = {"head_positions": positions, "targets": targets}
    ours = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    loss = weighted_nll(*ours, batch, tags, tag_weight)
    (loss / 7).backward()
    naive = [hidden.double().requires_grad_(), head.double().requires_grad_()]
    log_p = (naive[0].reshape(1500, 6)[positions] @ naive[1].T).log_softmax(-1)
    expected = 0
    for n, target in enumerate(targets.tolist()):
        if target != IGNORE:
            expected = expected - log_p[n, target] * (tag_weight if target in (3, 4, 5, 6) else 1)
    (expected / 7).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, his in zip(ours, naive, strict=True):
        torch.testing.assert_close(mine.grad.double(), his.grad, rtol=1e-4, atol=1e-4)
    if tag_weight == 1:
        sft = chunked_nll(hidden.flatten(0, 1)[positions], head, targets)
        assert loss.item() == pytest.approx(sft.item(), rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------- runs


def test_the_loop_is_that_of_sft():
    assert source_of(train_distill_reason, "train_epoch") == source_of(train_full_sft, "train_epoch")


@pytest.fixture(scope="module")
def plain_run(material, tmp_path_factory) -> SimpleNamespace:
    """An uninterrupted run. Tests copy its folder, none writes into it."""
    out_dir = tmp_path_factory.mktemp("plain")
    result = train(train_distill_reason, reason_flags(material, out_dir))
    assert result.status == 0, result.err
    return SimpleNamespace(out_dir=out_dir, result=result)


def documents_of(rows: list[dict]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, labels) of each conversation in these rows."""
    return [
        (row["input_ids"][row["documents"] == n], row["labels"][row["documents"] == n])
        for row in rows
        for n in range(int(row["documents"].max()) + 1)
    ]


def nats_alone(model, rows: list[dict], tag_weight: float) -> tuple[torch.Tensor, int]:
    """(loss summed over the trained tokens, their number), each conversation by itself, in float64."""
    total, count = 0, 0
    for ids, labels in documents_of(rows):
        log_probs = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        for t, target in enumerate(labels[1:].tolist()):
            if target != IGNORE:
                total = total - log_probs[t, target] * (tag_weight if target in (3, 4, 5, 6) else 1)
                count += 1
    return total, count


def test_a_run_learns_to_think_and_forgets_nothing(plain_run, material, tokenizer):
    records = metrics(plain_run.out_dir, STAGE)
    lines = [record for record in records if "loss" in record]
    assert curve(lines, "step") == list(range(1, 15)) and {line["epoch"] for line in lines} == {1, 2}
    assert lines[-1]["loss"] < lines[0]["loss"] - 3
    held_out = [record for record in records if "val_loss" in record]
    assert curve(held_out, "step") == [5, 10, 14]
    for name in ("val_loss", "val_mix_loss"):
        values = curve(held_out, name)
        assert len(values) == 3 and values[2] < values[1] < values[0], name
    assert "reason | epoch 1/2 | step 1/14 | loss " in plain_run.result.out
    assert " | validation mix loss " in plain_run.result.out

    state, facts = final_state(plain_run.out_dir, STAGE)
    model = load_model(material.base)
    first = {name: p.clone() for name, p in model.named_parameters()}
    model.load_state_dict(state["model"])
    for kind, path, name in [
        (ReasonDataset, material.reason, "val_loss"),
        (DialogueDataset, material.mixed, "val_mix_loss"),
    ]:
        data = data_of(kind, path, material, tokenizer, "val")
        with torch.no_grad():
            total, count = nats_alone(model, [data[row] for row in range(len(data))], 1.0)  # unweighted
        assert held_out[-1][name] == pytest.approx(total.item() / count, rel=1e-4), name
        assert count > 20
    saved = load_model(plain_run.out_dir / "reason_32.pth")
    for name, p in saved.named_parameters():
        assert torch.equal(p, state["model"][name].half().float()) and not torch.equal(p, first[name]), name
    assert json.loads((plain_run.out_dir / "reason_32.json").read_text(encoding="utf-8"))["stage"] == STAGE


def test_first_update_against_a_naive_one(flags, material, tokenizer, tmp_path):
    """Tags weigh more, but what divides the loss is the number of trained tokens, of all micro-batches."""
    changes = dict(batch_size=2, accumulation_steps=3, max_steps=1, mix_ratio=0.5, tag_weight=5)
    assert train(train_distill_reason, flags(**changes)).status == 0
    data, args = mixture(material, tokenizer, 0.5), SimpleNamespace(batch_size=2, accumulation_steps=3)
    _, micros = next(utils.RowOrder(len(data), args, SimpleNamespace(rank=0, world_size=1, seed=42), 0).updates())
    assert len({row < len(data.main) for row in sum(micros, [])}) == 2  # rows of both files
    model = load_model(material.base)
    parts = [nats_alone(model, [data[row] for row in micro], 5.0) for micro in micros]
    assert len({count for _, count in parts}) > 1
    loss = sum(total for total, _ in parts) / sum(count for _, count in parts)
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    line = metrics(tmp_path, STAGE)[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_the_mixed_rows_are_the_share_that_was_asked_for(flags, material, tokenizer, tmp_path, monkeypatch):
    reason = data_of(ReasonDataset, material.reason, material, tokenizer)
    seen, read = Counter(), MixedDataset.__getitem__
    monkeypatch.setattr(
        MixedDataset, "__getitem__", lambda data, row: (seen.update([row]) if row >= 0 else None) or read(data, row)
    )
    for share, added in [(0.25, round(len(reason) / 3)), (0.6, round(len(reason) * 1.5))]:
        seen.clear()
        changes = dict(mix_ratio=share, epochs=1, max_steps=None, val_interval=0)
        result = train(train_distill_reason, flags(tmp_path / str(share), **changes))
        assert f"{len(reason) + added} rows of {WIDTH} tokens" in result.out, result.err
        assert f", {added} of them mixed in" in result.out
        assert seen == Counter(range(len(reason) + added))  # each row once
        assert added / len(seen) == pytest.approx(share, abs=0.03)


def test_a_file_of_ones_own_gets_nothing_mixed_in_unasked(flags, material, tokenizer, tmp_path):
    result = train(train_distill_reason, flags(mix_path=None, mix_ratio=None, max_steps=2, val_interval=1))
    assert result.status == 0 and "mixed in" not in result.out, result.err
    rows = len(data_of(ReasonDataset, material.reason, material, tokenizer))
    assert f"{rows} rows of {WIDTH} tokens" in result.out
    records = metrics(tmp_path, STAGE)
    assert curve(records, "val_mix_loss") == [] and len(curve(records, "val_loss")) == 2


def test_without_a_file_the_demo_is_found_with_its_conversations(flags, tmp_path, monkeypatch):
    """The demo folder stands for the generated one, whose files have the names that are looked for."""
    assert {"reason", "sft"} <= set(make_demo_data.STAGES)
    demo = tmp_path / "dataset" / "demo"
    demo.mkdir(parents=True)
    write_records(demo / "demo_reason.jsonl", [thought(i) for i in range(40)])
    write_records(demo / "demo_sft.jsonl", [dialogue(i) for i in range(40)])

    def generate(folder: Path) -> dict[str, Path]:
        assert folder == demo
        return {stage: folder / f"demo_{stage}.jsonl" for stage in make_demo_data.STAGES}

    monkeypatch.setattr(make_demo_data, "generate", generate)
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    out_dir = tmp_path / "out"
    default = flags(out_dir, data_path=None, mix_path=None, mix_ratio=None, max_steps=4, save_interval=2)
    result = train(train_distill_reason, default)
    assert result.status == 0 and f"{demo / 'demo_reason.jsonl'}: " in result.out, result.err
    rows, added = re.search(rf": (\d+) rows of {WIDTH} tokens, .*, (\d+) of them mixed in", result.out).groups()
    assert int(rows) == 2 * int(added) > 0  # half of them, by default
    assert len(curve(metrics(out_dir, STAGE), "val_mix_loss")) == 1
    for path in (out_dir / "runs").rglob("step_00000004.*"):
        path.unlink()
    result = train(train_distill_reason, ["--resume", "--out_dir", str(out_dir)])
    assert result.status == 0 and "resumed at update 2" in result.out, result.err
    assert len(curve(metrics(out_dir, STAGE), "val_mix_loss")) == 1
    # A known name in dataset/ goes before the demo, and is a file of one's own.
    shutil.copy(demo / "demo_reason.jsonl", demo.parent / "r1_mix_1024.jsonl")
    result = train(train_distill_reason, default)
    assert result.status == 0 and "r1_mix_1024.jsonl: " in result.out and "mixed in" not in result.out, result.err


# ------------------------------------------------------------------------------------------------- layouts and resuming

LAYOUT = dict(optimizer="adamw", learning_rate=1e-3, max_steps=6, val_interval=0)


@pytest.mark.slow
def test_two_ranks_and_accumulation_are_one_process(flags, material, tokenizer, tmp_path):
    rows = len(mixture(material, tokenizer))
    assert 48 < rows <= 60  # two epochs, at whose end one rank gets nothing but padding
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert train(train_distill_reason, flags(one, batch_size=24, **LAYOUT)).status == 0
    assert train(train_distill_reason, flags(two, batch_size=6, accumulation_steps=4, **LAYOUT)).status == 0
    result = torchrun(train_distill_reason, flags(three, batch_size=12, **LAYOUT))
    assert result.status == 0, result.err
    expected, state = metrics(one, STAGE), final_state(one, STAGE)[0]["model"]
    for other in (two, three):
        records = metrics(other, STAGE)
        for name in ("step", "tokens", "loss", "grad_norm", "val_loss", "val_mix_loss"):
            assert curve(records, name) == pytest.approx(curve(expected, name), rel=1e-5), (other.name, name)
        weights = final_state(other, STAGE)[0]["model"]
        assert max(float((state[name] - weights[name]).abs().max()) for name in state) < 2e-5


def test_a_cut_run_goes_on_bit_for_bit(plain_run, flags, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        Watch(patch, at={8: cut})
        with pytest.raises(PowerCut):
            train(train_distill_reason, flags())
    result = train(train_distill_reason, ["--resume", "--out_dir", str(tmp_path)])
    assert result.status == 0 and "resumed at update 5" in result.out, result.err
    assert_same_run(tmp_path, plain_run.out_dir, STAGE)
    name = "val_mix_loss"
    assert curve(metrics(tmp_path, STAGE), name) == curve(metrics(plain_run.out_dir, STAGE), name)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_what_would_be_another_run_is_refused(flags, material, tmp_path):
    out_dir = tmp_path / "out"
    assert train(train_distill_reason, flags(out_dir, max_steps=5, val_interval=0)).status == 0
    before, again = tree(out_dir), ["--resume", "--out_dir", str(out_dir)]
    other = write_records(tmp_path / "other.jsonl", [dialogue(i) for i in range(100, 160)])
    for more, what in [
        (["--tag_weight", "1"], "tag_weight was 3.0, now it is 1.0"),
        (["--mix_ratio", "0.5"], "data (content, tokenizer, settings) was"),
        (["--mix_path", str(other)], "data (content, tokenizer, settings) was"),
    ]:
        assert what in one_error(train(train_distill_reason, [*again, *more]))
    assert tree(out_dir) == before


@pytest.mark.parametrize("where", ["reason", "mixed"])
def test_a_bad_record_is_named_and_destroys_nothing(where, plain_run, flags, material, tmp_path):
    out_dir = tmp_path / "out"
    shutil.copytree(plain_run.out_dir, out_dir)
    before = tree(out_dir)
    records, wrong = [thought(i) for i in range(8)], dialogue(1)
    if where == "mixed":
        records, wrong = [dialogue(i) for i in range(8)], {"conversations": [user("nobody answers")]}
    path = write_records(tmp_path / "bad.jsonl", [*records[:5], wrong, *records[5:]])
    key = "data_path" if where == "reason" else "mix_path"
    error = one_error(train(train_distill_reason, flags(out_dir, **{key: path})))
    assert "bad.jsonl, line 6: " in error
    assert ("<think>" in error and "Hello, my" in error) if where == "reason" else "no assistant turn" in error
    missing = one_error(train(train_distill_reason, flags(out_dir, **{key: tmp_path / "nowhere.jsonl"})))
    assert "nowhere.jsonl: there is no such file" in missing
    assert tree(out_dir) == before
    for changes in (dict(mix_ratio=0), dict(mix_ratio=1), dict(tag_weight=0)):
        result = train(train_distill_reason, flags(out_dir, **changes))
        assert result.status == 2 and f"argument --{next(iter(changes))}" in result.err
    assert tree(out_dir) == before
    more = {key: path, "skip_bad_records": True, "max_steps": 1, "val_interval": 0, "val_ratio": 0.2}
    assert train(train_distill_reason, flags(tmp_path / "new", **more)).status == 0


def test_a_tokenizer_without_the_tags_is_refused(flags, monkeypatch):
    monkeypatch.setattr(train_distill_reason, "TAGS", ("<think>", "<other>"))
    result = train(train_distill_reason, flags())
    assert result.status == 2 and "the tokenizer has no <think>, <other>" in result.err and result.err.count("\n") == 1
