"""GRPO: its gradient against a naive rendition in float64, whole runs, interruption, two ranks, what it refuses.

Sizes are tiny: hidden 32, one layer, rows of 64 tokens, one thread.

Dimension legend: G answers to a question.
"""

import json
import math
import os
import signal
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_rollout import (  # noqa: F401 (fixtures)
    LONGEST,
    QUESTIONS,
    RANK_RUNS,
    WIDTH,
    Insight,
    flags,
    layout_flags,
    lone_logps,
    material,
    no_pictures,
    question,
    rl_flags,
    samples,
    tokenizer,
    two_ranks,
)
from test_trainers import (  # noqa: F401 (fixtures)
    PowerCut,
    assert_same_run,
    cpu_is_the_best_device,
    curve,
    cut,
    final_state,
    finish,
    metrics,
    one_error,
    run_folder,
    start,
    train,
    tree,
    write_records,
)

from dataset.stage_datasets import PromptDataset
from model.weights import load_model
from trainer import rewards as reward_rules
from trainer import train_grpo
from trainer import trainer_utils as utils
from trainer.train_grpo import group_advantages

# ruff: noqa: F811 (fixtures as arguments)

STAGE = "grpo"
TRAINED = 29  # of the questions, 5 are held out


def resume(out_dir: Path, *more: str):
    return train(train_grpo, ["--resume", "--out_dir", str(out_dir), *more])


# ------------------------------------------------------------------------------------------------------- the equations


def naive_advantages(rewards: list[float], scale: str) -> list[float]:
    mean = sum(rewards) / len(rewards)
    return [(r - mean) / (statistics.stdev(rewards) + 1e-4 if scale == "std" else 1) for r in rewards]


@pytest.mark.parametrize("scale", ["std", "none"])
def test_advantages_compare_the_answers_to_one_question(scale):
    rewards = [[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.25, -7.0], [-50.0, 0.5, 0.5, 0.5]]
    found = group_advantages(torch.tensor(rewards, dtype=torch.float64), scale)
    for row, group in zip(found.tolist(), rewards, strict=True):
        assert row == pytest.approx(naive_advantages(group, scale), rel=1e-12)
        assert sum(row) == pytest.approx(0, abs=1e-12)
    if scale == "std":
        assert found.std(1).tolist() == pytest.approx([1, 1, 1], rel=1e-3)
    else:
        assert found[0].tolist() == [0.5, -0.5, -0.5, 0.5]
    assert group_advantages(torch.full((2, 8), 0.25), scale).abs().max() == 0


def test_equal_rewards_of_any_size_teach_nothing(flags, tmp_path, monkeypatch):
    """Thirds of a thousand are no sums of powers of two: their mean is not quite their own value in float32."""
    monkeypatch.setitem(reward_rules.RULES, "length", lambda reply, record: 1000 / 3)
    insight = Insight(monkeypatch, train_grpo)
    assert train(train_grpo, flags(num_generations=6, max_steps=1, beta=0)).status == 0
    assert max(float(gradient.abs().max()) for gradient in insight.gradients[0].values()) < 1e-7
    assert curve(metrics(tmp_path / "out", STAGE), "reward") == pytest.approx([1000 / 3])


def naive_update(model, base, answers, rewards, old, settings: dict):
    """Equation (3) of the script's docstring, one answer after another, (loss, mean KL, share of clipped tokens)."""
    each, T = settings["num_generations"], settings["temperature"]
    groups = [rewards[i : i + each] for i in range(0, len(rewards), each)]
    advantages = sum([naive_advantages(group, settings["scale_rewards"]) for group in groups], [])
    loss, kl, clipped = 0.0, 0.0, 0
    count = sum(len(answer.tokens) for answer in answers)
    low, high = 1 - settings["clip_low"], 1 + settings["clip_high"]
    for answer, A, before in zip(answers, advantages, old, strict=True):
        logps = lone_logps(model, answer, T)
        with torch.no_grad():
            frozen = lone_logps(base, answer, T)
        for t in range(len(answer.tokens)):
            ratio = (logps[t] - before[t]).exp()
            if settings["loss"] == "cispo":
                policy = -min(ratio.item(), high) * A * logps[t]
                clipped += ratio.item() > high and A != 0
            else:
                beyond = (ratio.item() > high and A > 0) or (ratio.item() < low and A < 0)
                policy = -A * (ratio if not beyond else high if A > 0 else low)
                clipped += beyond
            d = frozen[t] - logps[t]
            token_kl = d.exp() - d - 1
            loss = loss + (policy + settings["beta"] * token_kl) / count
            kl += token_kl.item() / count
    return loss, kl, clipped / count


@pytest.mark.parametrize(
    "changes",
    [
        dict(loss="clip", scale_rewards="std", inner_updates=1, temperature=1.0, beta=0.3),
        dict(loss="clip", scale_rewards="none", inner_updates=2, temperature=0.8, beta=0.3),
        dict(loss="cispo", scale_rewards="std", inner_updates=2, temperature=1.0, beta=0.0),
    ],
)
def test_each_step_follows_equation_3(changes, flags, material, tmp_path, monkeypatch):
    """Several micro-batches of unequal numbers of answers, two updates; with two steps each, clipping acts."""
    settings = dict(num_generations=5, clip_low=0.05, clip_high=0.1) | changes
    insight = Insight(monkeypatch, train_grpo)
    run = dict(batch_size=3, micro_rows=1, max_steps=2, learning_rate=2e-3, grad_clip=1e9)
    result = train(train_grpo, flags(rewards="length:0.7 repetition", **settings, **run))
    assert result.status == 0, result.err
    lines = [record for record in metrics(tmp_path / "out", STAGE) if "loss" in record]
    base, model, steps = load_model(material.base), load_model(material.base), settings["inner_updates"]
    assert len(insight.answers) == 2 and len(insight.weights) == 2 * steps
    for update, (answers, parts) in enumerate(zip(insight.answers, insight.parts, strict=True)):
        assert parts["reward"] == [0.7 * a + b for a, b in zip(parts["length"], parts["repetition"], strict=True)]
        assert len(answers) == 15 and len({answer.question for answer in answers}) == 3
        model.load_state_dict(insight.weights[update * steps], strict=False)
        with torch.no_grad():
            old = [lone_logps(model, answer, settings["temperature"]) for answer in answers]
        for step in range(update * steps, (update + 1) * steps):
            model.load_state_dict(insight.weights[step], strict=False)
            model.zero_grad()
            loss, kl, clipped = naive_update(model, base, answers, parts["reward"], old, settings)
            loss.backward()
            for name, p in model.named_parameters():
                assert float(p.grad.abs().max()) > 0, name
                worst = float((insight.gradients[step][name] - p.grad).abs().max() / p.grad.abs().max())
                assert worst < 2e-3, (step, name, worst)
        line = lines[update]  # of the last step
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert line["clip"] == pytest.approx(clipped, abs=1e-9) and (clipped > 0.05) == (steps > 1)
        assert line["kl"] == pytest.approx(kl if settings["beta"] else 0.0, rel=1e-3, abs=1e-6)
        assert kl > 1e-3 or step == 0
