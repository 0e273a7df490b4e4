"""The reward model: its loss by formula, whole runs, and scores of the saved file against one conversation at a time.

Sizes are tiny: hidden 32, one layer, rows of 128 tokens, one thread.

Dimension legend: P pairs · D hidden size.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from test_stage_datasets import ANSWERS, PROMPTS, alone, assistant, user
from test_train_dpo import (  # noqa: F401 (fixtures)
    LAYOUT,
    PAIRS,
    at_update,
    dpo_flags,
    first_rows,
    flags,
    material,
    no_pictures,
    overflow_in,
    pairs_of,
    preferences,
    records_of,
    same_updates,
    tiny_model,
    tokenizer,
)
from test_trainers import (  # noqa: F401 (fixtures)
    PowerCut,
    assert_same_run,
    cpu_is_the_best_device,
    curve,
    cut,
    final_state,
    metrics,
    torchrun,
    train,
)
from tokenizers.processors import TemplateProcessing
from torch import nn

from dataset.record_formats import parse_conversation
from model.weights import WeightsError, load_model, load_tokenizer, save_weights
from trainer import reward_model, train_dpo, train_reward
from trainer.optimizer import make_optimizer
from trainer.reward_model import load_reward_model

# ruff: noqa: F811 (fixtures as arguments)


def score_alone(model, turns: list[dict], tokenizer) -> torch.Tensor:
    """Equation (1) for one conversation by itself, in float64: w · h at the <|im_end|> of the last answer."""
    ids, trained = alone(turns, tokenizer)
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0, trained.stop - 1].double()
    return (hidden * model.score.weight[0].double()).sum()


def with_score(model, scale: float = 0.5):
    torch.manual_seed(3)
    model.score = nn.Linear(32, 1, bias=False)
    nn.init.normal_(model.score.weight, std=scale)
    return model


@pytest.fixture(scope="module")
def scoring(tmp_path_factory) -> SimpleNamespace:
    """Files of reward models whose row of weights is not 0, dense and with experts."""
    folder = tmp_path_factory.mktemp("scoring")
    for name, experts in [("reward_32", False), ("reward_32_moe", True)]:
        save_weights(with_score(tiny_model(use_moe=experts)), folder / f"{name}.pth", {"stage": "reward"})
    return SimpleNamespace(dense=folder / "reward_32.pth", experts=folder / "reward_32_moe.pth")


# ----------------------------------------------------------------------------------------------------------------- runs


LEARNS = dict(learning_rate=1e-2, max_steps=16, val_interval=5)


@pytest.fixture(scope="module")
def plain_run(material, tmp_path_factory) -> SimpleNamespace:
    """An uninterrupted run. Tests read its folder, none writes into it."""
    out_dir = tmp_path_factory.mktemp("plain")
    result = train(train_reward, dpo_flags(material, out_dir, "reward", **LEARNS))
    assert result.status == 0, result.err
    return SimpleNamespace(out_dir=out_dir, result=result)


def test_a_run_learns_which_answer_is_better(plain_run, material, tokenizer):
    records = metrics(plain_run.out_dir, "reward")
    lines = [record for record in records if "loss" in record]
    assert curve(lines, "step") == list(range(1, 17))
    assert lines[0]["loss"] == pytest.approx(math.log(2)) and lines[0]["accuracy"] == lines[0]["chosen_score"] == 0
    assert lines[-1]["loss"] < 0.3 and lines[-1]["accuracy"] > 0.9
    for line in lines:
        assert line["margin"] == pytest.approx(line["chosen_score"] - line["rejected_score"], abs=1e-5)
    held_out = [record for record in records if "val_loss" in record]
    assert curve(held_out, "step") == [5, 10, 15, 16]
    assert held_out[-1]["val_loss"] < 0.4 < held_out[0]["val_loss"]
    assert held_out[0]["val_accuracy"] < 0.8 < 0.9 < held_out[-1]["val_accuracy"]
    assert "reward | epoch 1/4 | step 1/16 | loss 0.6931 | chosen score 0.000 | " in plain_run.result.out

    state, _ = final_state(plain_run.out_dir, "reward")
    model = with_score(tiny_model().eval())
    model.load_state_dict(state["model"])
    data, losses, margins = pairs_of(material, tokenizer, "val"), [], []
    with torch.no_grad():
        for record in records_of([data[row] for row in range(len(data))], preferences(PAIRS), tokenizer):
            margins.append(float(score_alone(model, record["chosen"], tokenizer)))
            margins[-1] -= float(score_alone(model, record["rejected"], tokenizer))
            losses.append(math.log1p(math.exp(-margins[-1])))
    by_hand = {"val_loss": losses, "val_margin": margins, "val_accuracy": [margin > 0 for margin in margins]}
    for name, values in by_hand.items():
        assert held_out[-1][name] == pytest.approx(sum(values) / len(losses), rel=1e-4), name


def test_the_file_holds_the_score_and_loads_as_it_was(plain_run, material):
    path = plain_run.out_dir / "reward_32.pth"
    weights = torch.load(path, weights_only=True)
    state, _ = final_state(plain_run.out_dir, "reward")
    assert weights.keys() == state["model"].keys()
    assert weights["score.weight"].shape == (1, 32) and weights["score.weight"].any()
    base = load_model(material.folder / "full_sft_32.pth").state_dict()
    for name, tensor in weights.items():
        assert torch.equal(tensor, state["model"][name].half()), name
        assert name == "score.weight" or not torch.equal(tensor.float(), base[name]), name  # all of it was trained
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["stage"] == "reward"
    model = load_model(path)
    assert isinstance(model.score, nn.Linear) and torch.equal(model.score.weight, weights["score.weight"].float())


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_first_update_against_a_naive_one(kind, flags, scoring, material, tokenizer, tmp_path):
    """On a model that scores already: the loss over pairs of unequal micro-batches, and the norm of its gradient."""
    changes = dict(stage="reward", from_weight=getattr(scoring, kind), batch_size=2, accumulation_steps=3, max_steps=1)
    assert train(train_reward, flags(**changes)).status == 0
    rows = first_rows(material, tokenizer, 6)
    counts = [len(records_of(rows[i : i + 2], preferences(PAIRS), tokenizer)) for i in (0, 2, 4)]
    assert len(set(counts)) > 1
    model, losses, scores = load_model(getattr(scoring, kind)), [], []
    for record in records_of(rows, preferences(PAIRS), tokenizer):
        scores.append([score_alone(model, record[key], tokenizer) for key in ("chosen", "rejected")])
        losses.append(torch.log1p(torch.exp(scores[-1][1] - scores[-1][0])))
    loss = sum(losses) / len(losses)
    line = metrics(tmp_path, "reward", "32" if kind == "dense" else "32_moe")[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    means = [sum(s[side].item() for s in scores) / len(scores) for side in range(2)]
    assert [line["chosen_score"], line["rejected_score"]] == pytest.approx(means, rel=1e-4)
    assert line["accuracy"] == pytest.approx(sum(bool(s[0] > s[1]) for s in scores) / len(scores))
    if kind == "dense":  # with experts the balance loss adds a gradient of its own
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)
    else:
        assert 0.05 < line["aux_loss"] < 0.4


@pytest.fixture(scope="module")
def one_process(material, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("layout")
    assert train(train_reward, dpo_flags(material, out_dir, "reward", batch_size=4, **LAYOUT)).status == 0
    return out_dir


def test_accumulation_is_the_same_update(one_process, flags, tmp_path):
    assert train(train_reward, flags(stage="reward", batch_size=2, accumulation_steps=2, **LAYOUT)).status == 0
    same_updates(one_process, tmp_path, "reward")


@pytest.mark.slow
def test_two_ranks_are_one_process(one_process, flags, tmp_path):
    result = torchrun(train_reward, flags(stage="reward", batch_size=2, **LAYOUT))
    assert result.status == 0, result.err
    same_updates(one_process, tmp_path, "reward")


def test_a_cut_run_goes_on_bit_for_bit(plain_run, flags, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_update(patch, 8, cut)
        with pytest.raises(PowerCut):
            train(train_reward, flags(stage="reward", **LEARNS))
    result = train(train_reward, ["--resume", "--out_dir", str(tmp_path)])
    assert result.status == 0 and "resumed at update 5" in result.out, result.err
    assert_same_run(tmp_path, plain_run.out_dir, "reward")
    for name in ("margin", "accuracy", "val_accuracy"):
        assert curve(metrics(tmp_path, "reward"), name) == curve(metrics(plain_run.out_dir, "reward"), name)


def test_an_update_left_out_leaves_the_figures_alone(flags, tmp_path, monkeypatch):
    """What is logged are means over the pairs of the updates that were taken."""
    overflow_in(monkeypatch, {14, 15})
    assert train(train_reward, flags(stage="reward", log_interval=4, **LEARNS)).status == 0
    lines = [line for line in metrics(tmp_path, "reward") if "loss" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 2]
    assert 0.9 < lines[-1]["accuracy"] <= 1 and 0 < lines[-1]["loss"] < 0.4
    assert lines[-1]["margin"] == pytest.approx(lines[-1]["chosen_score"] - lines[-1]["rejected_score"], abs=1e-4)


# ------------------------------------------------------------------------------------------------------ scores in use

CONVERSATIONS = [[*prompt, assistant(answer)] for prompt in PROMPTS.values() for pair in ANSWERS for answer in pair]


@pytest.mark.parametrize("kind", ["dense", "experts", "trained"])
def test_scores_are_those_of_each_conversation_alone(kind, scoring, plain_run, tokenizer, monkeypatch):
    path = plain_run.out_dir / "reward_32.pth" if kind == "trained" else getattr(scoring, kind)
    model = load_model(path)
    with torch.no_grad():
        expected = [float(score_alone(model, turns, tokenizer)) for turns in CONVERSATIONS]
    assert len(expected) == 40 > reward_model.BATCH and max(expected) - min(expected) > 0.1
    score = load_reward_model(str(path), torch.device("cpu"))
    found = score(CONVERSATIONS)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5) and all(type(one) is float for one in found)
    monkeypatch.setattr(reward_model, "BATCH", 3)
    assert score(CONVERSATIONS[::-1]) == pytest.approx(expected[::-1], rel=1e-4, abs=1e-5)
    assert score([]) == []


def test_a_trained_file_prefers_what_it_was_taught(plain_run):
    score = load_reward_model(plain_run.out_dir / "reward_32.pth", torch.device("cpu"))
    unseen = [
        (request, answer)
        for request in ("Sing 99 songs.", "Steal 99 songs.")
        for answer in ("Yes, of course", "No, never")
    ]
    yes, no, bad_yes, good_no = score([[user(request), assistant(answer)] for request, answer in unseen])
    assert yes > no and good_no > bad_yes


def refusal(path) -> str:
    with pytest.raises(WeightsError) as error:
        load_reward_model(path, torch.device("cpu"))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_what_is_no_reward_model_is_refused_in_one_line(material, tmp_path):
    message = refusal(material.folder / "full_sft_32.pth")
    assert "has no score head" in message and "trainer/train_reward.py" in message
    assert "does not exist" in refusal(tmp_path / "nothing.pth")
    assert "could not be loaded" in refusal(tmp_path)


@pytest.fixture(scope="module")
def classifier():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6400, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        initializer_range=0.3, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_a_classifier_of_transformers_scores_as_there(padding, classifier, tmp_path, monkeypatch):
    """Batches of unequal lengths against the library itself on one conversation without padding."""
    tokenizer = load_tokenizer()
    # As of the Llama family: called with a text, it would put a token in front, which a chat template writes itself.
    front = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = front
    if padding == "none":
        tokenizer.pad_token = None
    else:
        tokenizer.padding_side = padding
    classifier.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = []
    conversations = [parse_conversation(turns)[0] for turns in CONVERSATIONS if not turns[0].get("tools")]
    for turns in conversations:
        ids = load_tokenizer().apply_chat_template(turns, return_dict=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected.append(classifier(ids).logits.item())
    assert max(expected) - min(expected) > 0.1
    monkeypatch.setattr(reward_model, "BATCH", 5)
    score = load_reward_model(tmp_path, torch.device("cpu"))
    assert score(conversations) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_folder_that_is_no_reward_model_is_refused_in_one_line(classifier, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    tokenizer = load_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    config = LlamaConfig.from_dict(classifier.config.to_dict())
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "is no reward model" in (message := refusal(tmp_path)) and "missing: score.weight" in message
    config.num_labels = 3
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    assert "labels: 3, missing: nothing" in refusal(tmp_path)
    tokenizer.chat_template = None
    classifier.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path)
    assert "is no reward model" in refusal(tmp_path)


def test_other_stages_start_without_the_score_head(scoring, flags, tmp_path):
    result = train(train_dpo, flags(from_weight=scoring.dense, max_steps=2))
    assert result.status == 0, result.err
    assert "score.weight" not in torch.load(tmp_path / "rlhf_32.pth", weights_only=True)


def test_the_score_head_is_no_matter_for_muon():
    """Orthogonalised, its one row would move by a constant length whatever the gradient."""
    model = with_score(tiny_model())
    muon, adamw = make_optimizer(model, 0.1, torch.device("cpu")).parts
    listed = [{id(p) for group in part.param_groups for p in group["params"]} for part in (muon, adamw)]
    assert id(model.score.weight) not in listed[0] and id(model.score.weight) in listed[1]
