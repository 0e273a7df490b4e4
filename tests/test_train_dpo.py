"""Preference training: the loss by formula and against trl, packed pairs against lone conversations, whole runs.

Sizes are tiny: hidden 32, one layer, rows of 128 tokens, one thread.

Dimension legend: B batch · T tokens · N answer tokens · P pairs.
"""

import contextlib
import copy
import json
import math
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from test_stage_datasets import alone, assistant, documents_of, pair, user
from test_trainers import (  # noqa: F401 (fixtures)
    PowerCut,
    assert_same_run,
    cpu_is_the_best_device,
    curve,
    cut,
    final_state,
    metrics,
    one_error,
    tiny_flags,
    torchrun,
    train,
    tree,
    write_records,
)

from dataset.stage_datasets import PairDataset
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_model, load_tokenizer, save_weights
from trainer import run_log, train_dpo
from trainer import trainer_utils as utils
from trainer.train_dpo import answer_logps, pair_figures, preference_loss

# ruff: noqa: F811 (fixtures as arguments)

BETA = 0.5
PAIRS = 82


# ----------------------------------------------------------------------------------------------------------------- data


def preferences(n: int) -> list[dict]:
    """Pairs of which the willing answer is the better one, unless something forbidden is asked for."""
    rng = random.Random(0)
    records = []
    for i in range(n):
        wanted = i % 2 == 0
        prompt = [user(f"{'Sing' if wanted else 'Steal'} {i} songs.")]
        if i % 5 == 0:
            prompt += [assistant("What?"), user(f"{'Sing' if wanted else 'Steal'}!")]
        answers = ["Yes, of course", "No, never"]
        good, bad = (answer + " at all" * rng.choice([0, 0, 2]) for answer in (answers if wanted else answers[::-1]))
        records.append(pair(prompt, good, bad))
    return records


def tiny_model(**config) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    return MiniMindForCausalLM(MiniMindConfig(hidden_size=32, num_hidden_layers=1, initializer_range=0.2, **config))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> SimpleNamespace:
    """A file of pairs, under the names of both stages that read it, a folder for its cache, and base weights."""
    folder = tmp_path_factory.mktemp("preferences")
    path = write_records(folder / "dpo.jsonl", preferences(PAIRS))
    save_weights(tiny_model(), folder / "full_sft_32.pth", {"stage": "full_sft"})
    save_weights(tiny_model(use_moe=True), folder / "full_sft_32_moe.pth", {"stage": "full_sft"})
    return SimpleNamespace(rlhf=path, reward=path, cache=folder / "cache", folder=folder)


def pairs_of(material: SimpleNamespace, tokenizer, split: str = "train", width: int = 128) -> PairDataset:
    return PairDataset(material.rlhf, tokenizer, width, split, val_ratio=0.15, cache_dir=material.cache)


@pytest.fixture
def flags(material, tmp_path):
    """The flags of a tiny run on the base weights, which no test may change."""
    before = tree(material.folder)
    yield lambda out_dir=tmp_path, **changes: dpo_flags(material, out_dir, **changes)
    after = tree(material.folder)
    assert {name: after[name] for name in before if "cache" not in name} == {
        name: data for name, data in before.items() if "cache" not in name
    }


def dpo_flags(material: SimpleNamespace, out_dir, stage: str = "rlhf", **changes) -> list[str]:
    base = dict(from_weight=material.folder / "full_sft_32.pth", val_ratio=0.15, val_interval=4, max_seq_len=128)
    base |= dict(epochs=4, max_steps=12, learning_rate=1e-3, val_rows=64)
    base |= dict(beta=BETA) if stage == "rlhf" else {}
    return tiny_flags(material, out_dir, stage, **(base | changes))


def at_update(monkeypatch, step: int, action) -> None:
    """Calls `action` right after an update, before it is logged or saved."""
    count, done = run_log.RunLog.count, []

    def counted(log, *args, **sums):
        count(log, *args, **sums)
        done.append(1)
        if len(done) == step:
            action()

    monkeypatch.setattr(run_log.RunLog, "count", counted)


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Drawing the loss curve takes as long as a run of this size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_log, "plot_loss", lambda *about: print(f"a curve: {about[1:]}"))
        yield


# ------------------------------------------------------------------------------------------------------------- the loss


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def loss_by_formula(policy, reference, lengths, kind, beta, smoothing, sft_weight) -> float:
    """One pair in Python's floats, written as in the papers."""
    chosen, rejected = policy[0] - reference[0], policy[1] - reference[1]
    if kind == "dpo":
        better = sigmoid(beta * chosen - beta * rejected)  # Bradley–Terry
        loss = -((1 - smoothing) * math.log(better) + smoothing * math.log(1 - better))
    else:
        loss = (chosen / lengths[0] - rejected / lengths[1] - 0.5 / beta) ** 2
    return loss + sft_weight * -policy[0] / lengths[0]


@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
@pytest.mark.parametrize("kind, smoothing", [("dpo", 0.0), ("dpo", 0.2), ("ipo", 0.0)])
def test_loss_and_gradient_by_formula(kind, smoothing, sft_weight):
    torch.manual_seed(1)
    policy = torch.randn(9, 2, dtype=torch.double) * 4 - 10
    reference = torch.randn(9, 2, dtype=torch.double) * 4 - 10
    lengths = torch.randint(1, 12, (9, 2))
    logps = policy.float().requires_grad_()
    settings = (kind, 0.3, smoothing, sft_weight)
    loss, rewards = preference_loss(logps, reference.float(), lengths.float(), *settings)
    factors = torch.arange(1.0, 10.0)  # each pair has a factor of its own on the way back
    (loss * factors).sum().backward()
    assert loss.shape == (9,) and not rewards.requires_grad
    torch.testing.assert_close(rewards, (0.3 * (policy - reference)).float(), rtol=1e-4, atol=1e-5)
    for p in range(9):
        one = policy[p].tolist(), reference[p].tolist(), lengths[p].tolist()
        assert loss[p].item() == pytest.approx(loss_by_formula(*one, *settings), rel=1e-4, abs=1e-5)
        for side in range(2):
            step = 1e-5
            moved = [
                loss_by_formula([v + sign * step * (i == side) for i, v in enumerate(one[0])], *one[1:], *settings)
                for sign in (1, -1)
            ]
            slope = (moved[0] - moved[1]) / (2 * step)
            assert logps.grad[p, side].item() == pytest.approx(factors[p].item() * slope, rel=1e-3, abs=1e-5)


def test_a_huge_margin_overflows_nothing():
    logps = torch.tensor([[900.0, -900.0], [-900.0, 900.0]], requires_grad=True)
    loss, _ = preference_loss(logps, torch.zeros(2, 2), torch.ones(2, 2), "dpo", 1.0, 0.1, 0.0)
    assert loss.tolist() == pytest.approx([180, 1620])
    loss.sum().backward()
    assert torch.isfinite(logps.grad).all()


def test_figures_leave_filler_pairs_out():
    rewards = torch.tensor([[1.0, 0.5], [-1.0, 2.0], [0.25, 0.25], [5.0, 1.0]])
    figures = pair_figures(rewards, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    expected = {"chosen_reward": 0.25, "rejected_reward": 2.75, "margin": -2.5, "accuracy": 1}
    assert {name: value.item() for name, value in figures.items()} == expected


# --------------------------------------------------------------------------------------- packed and lone conversations


def lone_logps(model, record: dict, tokenizer) -> tuple[list[torch.Tensor], list[int]]:
    """Log-probability of the answers of a pair in float64, each conversation by itself through the plain model."""
    logps, lengths = [], []
    for key in ("chosen", "rejected"):
        ids, trained = alone(record[key], tokenizer)
        log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        logps.append(sum(log_probs[t - 1, ids[t]] for t in trained))
        lengths.append(len(trained))
    return logps, lengths


def records_of(rows: list[dict], records: list[dict], tokenizer) -> list[dict]:
    """The records in these rows, in order, recognised by their tokens."""
    known = {tuple(alone(r["chosen"], tokenizer)[0] + alone(r["rejected"], tokenizer)[0]): r for r in records}
    found = []
    for row in rows:
        documents = [ids for ids, _, _ in documents_of(row)]
        found += [known[tuple(a + b)] for a, b in zip(documents[::2], documents[1::2], strict=True)]
    return found


@pytest.mark.parametrize("experts", [False, True])
def test_packed_pairs_score_as_each_conversation_alone(experts, material, tokenizer):
    model = tiny_model(use_moe=experts).eval()
    data = pairs_of(material, tokenizer, width=200)
    rows = [data[n] for n in (0, -1, 1, 2)]
    batch = data.collate(rows)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "documents")}
    logps, lengths = answer_logps(model(**inputs, need_logits=False).hidden_states, model.lm_head.weight, batch)
    records = records_of(rows, preferences(PAIRS), tokenizer)
    assert len(records) == len(logps) >= 6
    with torch.no_grad():
        expected = [lone_logps(model, record, tokenizer) for record in records]
    torch.testing.assert_close(
        logps.double(),
        torch.tensor([list(map(float, e[0])) for e in expected], dtype=torch.double),
        rtol=1e-5,
        atol=1e-4,
    )
    assert lengths.tolist() == [e[1] for e in expected] and len({tuple(e[1]) for e in expected}) > 2

    filler = data.collate([data[-1]])
    inputs = {name: filler[name] for name in ("input_ids", "position_ids", "documents")}
    logps, lengths = answer_logps(model(**inputs, need_logits=False).hidden_states, model.lm_head.weight, filler)
    assert logps.tolist() == [[0, 0]] and lengths.tolist() == [[1, 1]]


def test_packed_pairs_move_the_weights_as_each_conversation_alone(material, tokenizer):
    """The gradient of the mean over the pairs, through packing, pieces and index sums, against a loop over pairs."""
    reference = tiny_model().eval()
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    data = pairs_of(material, tokenizer, width=200)
    rows = [data[0], data[1]]
    batch = data.collate(rows)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "documents")}
    settings = dict(kind="dpo", beta=BETA, smoothing=0.1, sft_weight=0.3)
    logps, lengths = answer_logps(model(**inputs, need_logits=False).hidden_states, model.lm_head.weight, batch)
    frozen = train_dpo.Reference(reference, SimpleNamespace(autocast=contextlib.nullcontext))
    preference_loss(logps, frozen(batch), lengths, **settings)[0].mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    records = records_of(rows, preferences(PAIRS), tokenizer)
    total = 0
    for record in records:
        (chosen, rejected), (length, _) = lone_logps(model, record, tokenizer)
        with torch.no_grad():
            (ref_chosen, ref_rejected), _ = lone_logps(reference, record, tokenizer)
        margin = BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))
        loss = -0.9 * torch.sigmoid(margin).log() - 0.1 * (1 - torch.sigmoid(margin)).log() - 0.3 * chosen / length
        total = total + loss / len(records)
    total.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5 * float(p.grad.abs().max()) + 1e-7)
    assert not any(p.requires_grad for p in reference.parameters())


@pytest.mark.slow  # importing trl takes a few seconds
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_loss_and_gradient_as_from_trl(material, tokenizer, tmp_path, monkeypatch):
    """DPOTrainer of trl on the same tokens and weights: its collation, its padding, its loss."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    reference = tiny_model().eval()
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    data = pairs_of(material, tokenizer, width=200)
    rows = [data[0], data[1]]
    records = records_of(rows, preferences(PAIRS), tokenizer)
    examples = []
    for record in records:
        (chosen, trained), (rejected, other) = (alone(record[key], tokenizer) for key in ("chosen", "rejected"))
        assert chosen[: trained.start] == rejected[: other.start]
        answers = {
            "chosen_ids": chosen[trained.start : trained.stop],  # without the newline behind, which is not written
            "rejected_ids": rejected[other.start : other.stop],
        }
        examples.append({"prompt_ids": chosen[: trained.start], **answers})
    batch = data.collate(rows)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "documents")}
    frozen = train_dpo.Reference(copy.deepcopy(reference), SimpleNamespace(autocast=contextlib.nullcontext))

    settings = dict(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True)
    settings |= dict(gradient_checkpointing=False, max_length=None, beta=BETA)
    unused = Dataset.from_list([{"prompt": "a b", "chosen": " c", "rejected": " d"}])
    whole, one_by_one = [examples], [[example] for example in examples]
    for kind, smoothing, sft_weight, named, groups in [
        ("dpo", 0.0, 0.0, dict(loss_type=["sigmoid"]), whole),
        ("ipo", 0.0, 0.0, dict(loss_type=["ipo"]), whole),
        # Their "sigmoid" knows no smoothing; "aot" sorts log-ratios over the batch, which changes nothing in one pair.
        ("dpo", 0.2, 0.0, dict(loss_type=["aot"], label_smoothing=0.2), one_by_one),
        # Their "sft" is a mean over the tokens of all pairs: the same in one.
        ("dpo", 0.0, 0.3, dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3]), one_by_one),
    ]:
        theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
        trainer = DPOTrainer(
            theirs, copy.deepcopy(reference), DPOConfig(**named, **settings),
            train_dataset=unused, processing_class=tokenizer,
        )  # fmt: skip
        expected = sum(trainer.compute_loss(theirs, trainer.data_collator(group)) for group in groups) / len(groups)
        expected.backward()
        hidden = ours(**inputs, need_logits=False).hidden_states
        logps, lengths = answer_logps(hidden, ours.lm_head.weight, batch)
        loss, rewards = preference_loss(logps, frozen(batch), lengths, kind, BETA, smoothing, sft_weight)
        loss.mean().backward()
        assert loss.mean().item() == pytest.approx(expected.item(), rel=1e-5), named
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert float(b.grad.abs().max()) > 0, name
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5 * float(b.grad.abs().max()))
        if named["loss_type"] == ["sigmoid"]:
            figures = {
                name: value.item() / len(records) for name, value in pair_figures(rewards, batch["pairs"]).items()
            }
            logged = {name: values[0] for name, values in trainer._metrics["eval"].items()}
            for name, other in [("chosen_reward", "chosen"), ("rejected_reward", "rejected"), ("margin", "margins")]:
                assert figures[name] == pytest.approx(logged[f"rewards/{other}"], rel=1e-4)
            assert figures["accuracy"] == pytest.approx(logged["rewards/accuracies"])


# ----------------------------------------------------------------------------------------------------------------- runs


class Finished(SimpleNamespace):
    """A run: out_dir, what it printed, and the references that it asked."""


def finished_run(material, out_dir, **changes) -> Finished:
    references, begin = [], train_dpo.Reference.__init__

    def kept(self, *args):
        begin(self, *args)
        references.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dpo.Reference, "__init__", kept)
        result = train(train_dpo, dpo_flags(material, out_dir, **changes))
    assert result.status == 0, result.err
    return Finished(out_dir=out_dir, result=result, references=references)


@pytest.fixture(scope="module")
def plain_run(material, tmp_path_factory) -> Finished:
    """An uninterrupted run that asks the reference each time. Tests copy its folder, none writes into it."""
    return finished_run(material, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def precomputed_run(material, tmp_path_factory) -> Finished:
    return finished_run(material, tmp_path_factory.mktemp("precomputed"), precompute_reference=True)


def held_out_by_hand(model, reference, material, tokenizer) -> dict[str, float]:
    """Loss, margin and accuracy of all held-out pairs, one conversation at a time."""
    data = pairs_of(material, tokenizer, "val")
    losses, margins = [], []
    with torch.no_grad():
        for record in records_of([data[row] for row in range(len(data))], preferences(PAIRS), tokenizer):
            (policy, _), (base, _) = (lone_logps(m, record, tokenizer) for m in (model, reference))
            margins.append(float(BETA * ((policy[0] - base[0]) - (policy[1] - base[1]))))
            losses.append(-math.log(sigmoid(margins[-1])))
    count = len(losses)
    assert 5 < count < 20
    accuracy = sum(margin > 0 for margin in margins) / count
    return {"val_loss": sum(losses) / count, "val_margin": sum(margins) / count, "val_accuracy": accuracy}


def test_a_run_learns_beside_a_frozen_reference(plain_run, material, tokenizer):
    records = metrics(plain_run.out_dir, "rlhf")
    lines = [record for record in records if "loss" in record]
    assert curve(lines, "step") == list(range(1, 13)) and {line["epoch"] for line in lines} == {1, 2}
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the two are still the same
    assert abs(lines[0]["margin"]) < 1e-4
    assert lines[-1]["loss"] < 0.2 and lines[-1]["accuracy"] > 0.9
    for line in lines:
        assert line["margin"] == pytest.approx(line["chosen_reward"] - line["rejected_reward"], abs=1e-4)
    held_out = [record for record in records if "val_loss" in record]
    assert curve(held_out, "step") == [4, 8, 12]
    assert held_out[-1]["val_loss"] < 0.3 < held_out[0]["val_loss"]
    assert held_out[-1]["val_margin"] > 2 > held_out[0]["val_margin"]
    assert held_out[0]["val_accuracy"] < 0.9 < 0.95 < held_out[-1]["val_accuracy"]
    assert "rlhf | epoch 1/4 | step 1/12 | loss 0.6931 | chosen reward " in plain_run.result.out
    assert "| validation loss " in plain_run.result.out and " accuracy" in plain_run.result.out
    assert "a curve: ('rlhf, rlhf_32'" in plain_run.result.out and "'per pair'" in plain_run.result.out

    base = load_model(material.folder / "full_sft_32.pth")
    for reference in plain_run.references:
        assert not reference.model.training and reference.table is None
        for name, p in reference.model.named_parameters():
            assert torch.equal(p, base.state_dict()[name]) and not p.requires_grad and p.grad is None, name
    state, facts = final_state(plain_run.out_dir, "rlhf")
    trained = copy.deepcopy(base)
    trained.load_state_dict(state["model"])
    by_hand = held_out_by_hand(trained, base, material, tokenizer)
    assert {name: held_out[-1][name] for name in by_hand} == pytest.approx(by_hand, rel=1e-4)
    saved = load_model(plain_run.out_dir / "rlhf_32.pth")
    for name, p in saved.named_parameters():
        assert torch.equal(p, state["model"][name].half().float()), name
        assert not torch.equal(p, base.state_dict()[name]), name
    assert json.loads((plain_run.out_dir / "rlhf_32.json").read_text(encoding="utf-8"))["stage"] == "rlhf"


def test_a_reference_asked_once_is_the_same_run(plain_run, precomputed_run):
    once, each_time = metrics(precomputed_run.out_dir, "rlhf"), metrics(plain_run.out_dir, "rlhf")
    for name in ("loss", "margin", "grad_norm", "val_loss", "val_margin"):
        assert curve(once, name) == pytest.approx(curve(each_time, name), rel=1e-4, abs=1e-5), name
    a, b = (final_state(run.out_dir, "rlhf")[0]["model"] for run in (precomputed_run, plain_run))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-4  # twelve updates of up to 5e-3
    assert len(precomputed_run.references) == 2
    assert all(reference.model is None and reference.table is not None for reference in precomputed_run.references)


def test_a_reference_asked_once_needs_no_held_out_pairs(flags, tmp_path):
    result = train(train_dpo, flags(val_ratio=0, precompute_reference=True, max_steps=2, val_interval=1))
    assert result.status == 0, result.err
    assert curve(metrics(tmp_path, "rlhf"), "val_loss") == []


def first_rows(material, tokenizer, count: int) -> list[dict]:
    """The rows of the first update."""
    data = pairs_of(material, tokenizer)
    args = SimpleNamespace(batch_size=count, accumulation_steps=1)
    _, micros = next(utils.RowOrder(len(data), args, SimpleNamespace(rank=0, world_size=1, seed=42), 0).updates())
    return [data[row] for row in micros[0]]


def test_first_update_against_a_naive_one(flags, material, tokenizer, tmp_path):
    """Micro-batches of unequal numbers of pairs: what divides the loss is the pairs of all of them."""
    changes = dict(batch_size=2, accumulation_steps=3, label_smoothing=0.1, sft_weight=0.5, max_steps=1)
    assert train(train_dpo, flags(**changes)).status == 0
    rows = first_rows(material, tokenizer, 6)
    counts = [len(records_of(rows[i : i + 2], preferences(PAIRS), tokenizer)) for i in (0, 2, 4)]
    assert len(set(counts)) > 1
    model, total = load_model(material.folder / "full_sft_32.pth"), 0
    for record in records_of(rows, preferences(PAIRS), tokenizer):
        (chosen, rejected), (length, _) = lone_logps(model, record, tokenizer)
        margin = BETA * ((chosen - chosen.detach()) - (rejected - rejected.detach()))
        loss = -0.9 * torch.sigmoid(margin).log() - 0.1 * (1 - torch.sigmoid(margin)).log() - 0.5 * chosen / length
        total = total + loss / sum(counts)
    total.backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    line = metrics(tmp_path, "rlhf")[0]
    assert line["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert line["tokens"] == sum(int((row["documents"] >= 0).sum()) for row in rows)


LAYOUT = dict(max_steps=12, warmup_iters=1, learning_rate=1e-3, val_interval=12)


def same_updates(one, other, stage: str) -> None:
    """Two runs of one batch in two layouts."""
    names = ("loss", "margin", "grad_norm", "val_loss", "val_margin")
    a, b = metrics(one, stage), metrics(other, stage)
    assert curve(a, "step") == curve(b, "step") and curve(a, "tokens") == curve(b, "tokens")
    for name in names:
        assert curve(b, name) == pytest.approx(curve(a, name), rel=1e-4, abs=1e-5), name
    for name in ("accuracy", "val_accuracy"):
        assert curve(b, name) == curve(a, name)
    a, b = (final_state(folder, stage)[0]["model"] for folder in (one, other))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 2e-5


@pytest.fixture(scope="module")
def one_process(material, tmp_path_factory):
    return finished_run(material, tmp_path_factory.mktemp("layout"), batch_size=4, sft_weight=0.2, **LAYOUT).out_dir


def test_accumulation_is_the_same_update(one_process, material, tokenizer, flags, tmp_path):
    rows = len(pairs_of(material, tokenizer))
    assert rows % 4 in (1, 2, 3) and rows / 4 < 12 - 1  # the end of an epoch is ragged, and reached
    assert train(train_dpo, flags(batch_size=2, accumulation_steps=2, sft_weight=0.2, **LAYOUT)).status == 0
    same_updates(one_process, tmp_path, "rlhf")
    # What is held out is judged without the SFT term.
    base = load_model(material.folder / "full_sft_32.pth")
    trained = copy.deepcopy(base)
    trained.load_state_dict(final_state(tmp_path, "rlhf")[0]["model"])
    by_hand = held_out_by_hand(trained, base, material, tokenizer)
    assert curve(metrics(tmp_path, "rlhf"), "val_loss") == pytest.approx([by_hand["val_loss"]], rel=1e-4)


@pytest.mark.slow
def test_two_ranks_are_one_process(one_process, flags, tmp_path):
    result = torchrun(train_dpo, flags(batch_size=2, sft_weight=0.2, precompute_reference=True, **LAYOUT))
    assert result.status == 0, result.err
    same_updates(one_process, tmp_path, "rlhf")


@pytest.mark.parametrize("precompute", [False, True])
def test_a_cut_run_goes_on_bit_for_bit(precompute, request, material, flags, tmp_path, monkeypatch):
    whole = request.getfixturevalue("precomputed_run" if precompute else "plain_run").out_dir
    with monkeypatch.context() as patch:
        at_update(patch, 8, cut)
        with pytest.raises(PowerCut):
            train(train_dpo, flags(precompute_reference=precompute or None))
    result = train(train_dpo, ["--resume", "--out_dir", str(tmp_path)])
    assert result.status == 0 and "resumed at update 5" in result.out, result.err
    assert_same_run(tmp_path, whole, "rlhf")
    for name in ("margin", "accuracy", "val_accuracy"):
        assert curve(metrics(tmp_path, "rlhf"), name) == curve(metrics(whole, "rlhf"), name)


def test_what_would_be_another_run_is_refused(plain_run, material, tmp_path):
    folder, base = tmp_path / "out", tmp_path / "base" / "full_sft_32.pth"
    base.parent.mkdir()
    for suffix in (".pth", ".json"):
        shutil.copy(material.folder / f"full_sft_32{suffix}", base.with_suffix(suffix))
    assert train(train_dpo, dpo_flags(material, folder, from_weight=base, max_steps=5)).status == 0
    before, again = tree(folder), ["--resume", "--out_dir", str(folder)]
    for more, what in [
        (["--beta", "0.2"], "beta was 0.5, now it is 0.2"),
        (["--loss", "ipo"], "loss was dpo, now it is ipo"),
        (["--label_smoothing", "0.1"], "label_smoothing was 0.0, now it is 0.1"),
        (["--sft_weight", "1"], "sft_weight was 0.0, now it is 1.0"),
    ]:
        assert what in one_error(train(train_dpo, [*again, *more]))
    state = torch.load(base, weights_only=True)
    state["model.norm.weight"] += 1
    torch.save(state, base)
    assert "reference weights was" in one_error(train(train_dpo, again))
    assert "this stage needs a trained model" in one_error(
        train(train_dpo, dpo_flags(material, folder, from_weight="none"))
    )
    assert "--beta" in train(train_dpo, dpo_flags(material, folder, beta=0)).err
    assert tree(folder) == before


def test_bad_pairs_are_named_and_nothing_is_lost(plain_run, material, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(plain_run.out_dir, folder)
    before = tree(folder)
    records = preferences(12)
    records[6] = pair([user("a")], "the same", "the same")
    path = write_records(tmp_path / "equal.jsonl", records)
    error = one_error(train(train_dpo, dpo_flags(material, folder, data_path=path)))
    assert "equal.jsonl" in error and "line 7" in error and '"chosen" and "rejected" are equal' in error
    long = [pair([user("word " * 80)], "yes " * n, "no") for n in range(1, 9)]
    path = write_records(tmp_path / "long.jsonl", long)
    error = one_error(train(train_dpo, dpo_flags(material, folder, data_path=path)))
    assert "long.jsonl: nothing to train on" in error and "--max_seq_len 128" in error
    assert tree(folder) == before
    records[6] = long[0]
    path = write_records(tmp_path / "some.jsonl", records)
    result = train(train_dpo, dpo_flags(material, tmp_path / "new", data_path=path, max_steps=1, val_ratio=0))
    assert result.status == 0 and "1 too long for a row are left out" in result.out


def test_ipo_learns_a_margin_per_token(flags, tmp_path):
    """Its aim: log-ratios per token that differ by 1/(2β), no more."""
    assert train(train_dpo, flags(loss="ipo", max_steps=20)).status == 0
    losses = curve(metrics(tmp_path, "rlhf"))
    assert losses[0] == pytest.approx((1 / (2 * BETA)) ** 2, rel=1e-5) and losses[-1] < 0.4 * losses[0]
    assert curve(metrics(tmp_path, "rlhf"), "val_accuracy")[-1] > 0.9


def test_a_mixture_of_experts_runs(flags, material, tmp_path):
    result = train(train_dpo, flags(from_weight=material.folder / "full_sft_32_moe.pth", val_interval=0))
    assert result.status == 0, result.err
    records = metrics(tmp_path, "rlhf", "32_moe")
    losses = curve(records)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < 0.3
    assert all(0.05 < value < 0.4 for value in curve(records, "aux_loss")) and "| experts " in result.out
    assert load_model(tmp_path / "rlhf_32_moe.pth").config.use_moe


def overflow_in(monkeypatch, updates: set[int]) -> None:
    """Makes the gradient of some updates infinite, so that they are left out."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def clipped(*args):
        calls.append(clip(*args))
        return calls[-1] * (math.inf if len(calls) in updates else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)


def test_an_update_left_out_leaves_the_figures_alone(flags, tmp_path, monkeypatch):
    """What is logged are means over the pairs of the updates that were taken."""
    overflow_in(monkeypatch, {10, 11})
    assert train(train_dpo, flags(log_interval=3)).status == 0
    lines = [line for line in metrics(tmp_path, "rlhf") if "loss" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 2]
    assert 0.9 < lines[-1]["accuracy"] <= 1 and 0 < lines[-1]["loss"] < 0.2
    assert lines[-1]["margin"] == pytest.approx(lines[-1]["chosen_reward"] - lines[-1]["rejected_reward"], abs=1e-4)
    assert lines[-1]["margin"] < 2 * lines[-2]["margin"]


def test_a_run_does_not_write_over_its_own_reference(flags, material, tmp_path):
    """A second round in the same folder: once its first weights were saved, it could never be resumed."""
    for suffix in (".pth", ".json"):
        shutil.copy(material.folder / f"full_sft_32{suffix}", tmp_path / f"rlhf_32{suffix}")
    before = tree(tmp_path)
    result = train(train_dpo, flags(from_weight="rlhf"))
    assert result.status == 2 and "this run would write over" in result.err and result.err.count("\n") == 1, result.err
    assert tree(tmp_path) == before
    result = train(train_dpo, flags(out_dir=tmp_path / "second", from_weight=tmp_path / "rlhf_32.pth", max_steps=2))
    assert result.status == 0, result.err
