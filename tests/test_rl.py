"""GRPO and PPO: log-probabilities, losses and advantages against formulas, and whole runs.

Sizes are tiny: hidden 32, one layer, rows of 64 tokens, one thread.

Dimension legend: N answer tokens · A answers · L longest of them.
"""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from test_trainers import (  # noqa: F401 (fixtures)
    PowerCut,
    assert_same_run,
    cpu_is_the_best_device,
    curve,
    cut,
    files,
    final_state,
    metrics,
    reference,
    run_folder,
    torchrun,
    train,
    words,
    write_records,
)

from dataset.lm_dataset import IGNORE
from dataset.stage_datasets import PromptDataset
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_model, load_tokenizer, save_weights
from trainer import rewards as reward_module
from trainer import rollout, run_log, train_grpo, train_ppo
from trainer import trainer_utils as utils
from trainer.rollout import Roller, kl_estimate, pack_answers, policy_loss
from trainer.train_grpo import answer_logps, group_advantages
from trainer.train_ppo import advantages_of

# ruff: noqa: F811 (fixtures as arguments)

SCRIPTS = {"grpo": train_grpo, "ppo_actor": train_ppo}


# ------------------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("kind", ["clip", "cispo"])
def test_policy_loss_is_its_formula(kind):
    torch.manual_seed(0)
    old = -torch.rand(400, dtype=torch.float64) * 3
    logps = (old + torch.randn(400, dtype=torch.float64) * 0.4).requires_grad_()
    advantages = torch.randn(400, dtype=torch.float64)
    loss, clipped = policy_loss(logps, old, advantages, kind, 0.2, 0.3)
    loss.sum().backward()
    for i in range(400):
        x = logps[i].item()
        ratio, a = math.exp(x - old[i].item()), advantages[i].item()
        if kind == "clip":
            bounded = min(max(ratio, 0.8), 1.3)
            expected, binding = -min(ratio * a, bounded * a), (ratio > 1.3 and a > 0) or (ratio < 0.8 and a < 0)
            gradient = 0.0 if binding else -ratio * a
        else:
            binding = ratio > 1.3
            expected, gradient = -min(ratio, 1.3) * a * x, -min(ratio, 1.3) * a
        assert loss[i].item() == pytest.approx(expected, rel=1e-9)
        assert logps.grad[i].item() == pytest.approx(gradient, rel=1e-9, abs=1e-12)
        assert bool(clipped[i]) == binding
    assert 10 < int(clipped.sum()) < 390


def test_the_kl_estimate_is_unbiased_and_never_negative():
    torch.manual_seed(0)
    policy, base = (torch.randn(5, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    exact = (policy.exp() * (policy - base)).sum().item()
    estimates = kl_estimate(policy, base)  # of each token
    assert (estimates >= 0).all() and (policy.exp() * estimates).sum().item() == pytest.approx(exact, rel=1e-9)
    assert kl_estimate(policy, policy).abs().max() == 0


def test_advantages_compare_within_a_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [3.0, 1.0, 1.0, 1.0]])
    plain = group_advantages(rewards, "none")
    assert plain.tolist() == [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0], [1.5, -0.5, -0.5, -0.5]]
    scaled = group_advantages(rewards, "std")
    assert scaled[1].abs().max() == 0 and torch.allclose(scaled[0].std(), torch.tensor(1.0), atol=1e-3)
    assert torch.allclose(scaled[2], plain[2] / (plain[2].std() + 1e-4))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.7), (1.0, 0.0)])
def test_generalised_advantages_are_the_naive_sum(gamma, lam):
    torch.manual_seed(0)
    lengths = [5, 1, 8, 3]
    real = torch.arange(8) < torch.tensor(lengths)[:, None]
    rewards, values = (torch.randn(4, 8, dtype=torch.float64) * real for _ in range(2))
    found = advantages_of(rewards, values, real, gamma, lam)
    for a, n in enumerate(lengths):
        deltas = [rewards[a, t] + (gamma * values[a, t + 1] if t + 1 < n else 0.0) - values[a, t] for t in range(n)]
        for t in range(n):
            naive = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n))
            assert found[a, t].item() == pytest.approx(float(naive), abs=1e-12)
        assert (found[a, n:] == 0).all()
        if gamma == lam == 1:
            assert found[a, 0].item() == pytest.approx(float(rewards[a, :n].sum() - values[a, 0]), abs=1e-12)


# -------------------------------------------------------------------------------------------------------------- rollout


@pytest.fixture
def questions(tmp_path):
    rng = random.Random(0)
    records = [
        {"conversations": [{"role": "user", "content": "say " * rng.randint(1, 6) + str(i)}], "answer": str(i)}
        for i in range(40)
    ]
    return write_records(tmp_path / "questions.jsonl", records)


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampling_and_training_agree_on_every_token(questions, moe, temperature, restored_process):
    torch.manual_seed(1)
    config = MiniMindConfig(hidden_size=32, num_hidden_layers=2, initializer_range=0.3, use_moe=moe)
    model, tokenizer = MiniMindForCausalLM(config).eval(), load_tokenizer()
    run = utils.Run("cpu", "float32", 7, keep_memory=False)
    data = PromptDataset(questions, tokenizer, 64, split="all", max_new_tokens=20)
    answers = Roller(model, tokenizer, run, 8, 64, 20)(data, [3, 0, 9], 3, temperature, step=5)
    again = Roller(model, tokenizer, run, 4, 64, 20)(data, [3, 0, 9], 3, temperature, step=5)
    other = Roller(model, tokenizer, run, 8, 64, 20)(data, [3, 0, 9], 3, temperature, step=6)
    assert [a.tokens for a in answers] == [a.tokens for a in again] != [a.tokens for a in other]
    assert [a.question for a in answers] == [3, 3, 3, 0, 0, 0, 9, 9, 9] and len({tuple(a.tokens) for a in answers}) > 6

    micros, held = pack_answers(answers, 64, 2, 0, run)
    assert sorted(sum(held, [])) == list(range(9))
    seen = torch.zeros(9, dtype=torch.long)
    for micro, numbers in zip(micros, held, strict=True):
        with torch.no_grad():
            logps, entropy, _ = answer_logps(model, run, micro, temperature)
        assert (logps - micro["old_logps"]).abs().max() < 2e-4  # the first ratio is 1
        assert (entropy > 0).all()
        flat = micro["input_ids"].flatten()
        # What is scored is the very next token of the row, and exactly the tokens that the model drew.
        assert torch.equal(flat[micro["head_positions"] + 1], micro["targets"])
        at = 0
        for number in numbers:
            tokens = answers[number].tokens
            here = slice(at, at + len(tokens))
            assert micro["targets"][here].tolist() == tokens and set(micro["answers"][here].tolist()) == {number}
            ids = torch.tensor([answers[number].prompt + tokens])
            with torch.no_grad():
                alone = (model(ids).logits[0] / temperature).double().log_softmax(-1)
            start = len(answers[number].prompt)
            naive = alone[start - 1 : -1].gather(-1, ids[0, start:, None])[:, 0]
            assert (naive - logps[here]).abs().max() < 2e-4
            seen[number] += len(tokens)
            at += len(tokens)
    assert seen.tolist() == [len(a.tokens) for a in answers]


def test_no_answers_are_a_batch_of_padding(restored_process):
    run = SimpleNamespace(world_size=1, rank=0, device=torch.device("cpu"), sum_ranks=lambda value: value + 1)
    micros, held = pack_answers([], 16, 2, 0, run)  # as on a rank for which no question is left
    assert held == [[]] and micros[0]["targets"].tolist() == [IGNORE] and (micros[0]["documents"] == -1).all()


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def rl_flags(questions, reference, files, tmp_path):
    def make(**changes) -> list[str]:
        flags = dict(
            out_dir=tmp_path / "out", data_path=questions, cache_dir=files.cache, device="cpu", dtype="float32",
            from_weight=reference.out_dir / "pretrain_32.pth", max_seq_len=64, max_new_tokens=12, batch_size=4,
            num_generations=4, micro_rows=4, learning_rate=5e-3, warmup_iters=1, log_interval=1, save_interval=3,
            val_interval=0, val_ratio=0.1, optimizer="adamw", rewards="length", beta=0.02, epochs=4, max_steps=8,
        )  # fmt: skip
        flags |= changes
        flags["out_dir"].mkdir(parents=True, exist_ok=True)
        return [*words({k: v for k, v in flags.items() if k != "rewards"}), "--rewards", *flags["rewards"].split()]

    return make


@pytest.mark.parametrize("stage", SCRIPTS)
def test_the_reward_rises(stage, rl_flags, tmp_path, monkeypatch):
    monkeypatch.setitem(reward_module.RULES, "length", lambda reply, record: min(1.0, reply.count("e") / 12))
    extra = {"value_coef": 0.1, "critic_learning_rate": 1e-2} if stage == "ppo_actor" else {}
    result = train(
        SCRIPTS[stage],
        rl_flags(max_steps=16, inner_updates=2, num_generations=8, optimizer="muon", learning_rate=1e-2, **extra),
    )
    assert result.status == 0, result.err
    records = metrics(tmp_path / "out", stage)
    rewards = curve(records, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1, rewards
    kls = curve(records, "kl")
    assert len(kls) == 16 and kls[-1] > kls[0] >= 0
    held_out = curve(records, "val_reward")
    assert len(held_out) == 2 and held_out[-1] > held_out[0]
    samples = (run_folder(tmp_path / "out", stage) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert {"question", "reply", "reward", "step", "truth"} <= json.loads(samples[0]).keys()
    path = tmp_path / "out" / f"{stage}_32.pth"
    names = torch.load(path, weights_only=True).keys()
    assert load_model(path).config.hidden_size == 32 and not any("value_head" in name for name in names)
    if stage == "ppo_actor":
        state, _ = final_state(tmp_path / "out", stage)
        assert "value_head.0.weight" in state["model"] and state["model"]["value_head.2.bias"].abs() > 1e-3
        losses = curve(records, "value_loss")
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_cut_run_goes_on_bit_for_bit(stage, rl_flags, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(SCRIPTS[stage], rl_flags(out_dir=whole)).status == 0
    with monkeypatch.context() as patch:
        count, done = run_log.RunLog.count, []
        patch.setattr(
            run_log.RunLog, "count", lambda *a, **k: (count(*a, **k), done.append(1), len(done) == 5 and cut())
        )
        with pytest.raises(PowerCut):
            train(SCRIPTS[stage], rl_flags(out_dir=broken))
    result = train(SCRIPTS[stage], ["--resume", "--out_dir", str(broken)])
    assert result.status == 0 and "resumed at update 3" in result.out, result.err
    assert_same_run(whole, broken, stage)
    for name in ("reward", "loss", "kl"):
        assert curve(metrics(whole, stage), name) == curve(metrics(broken, stage), name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", SCRIPTS)
def test_two_ranks_are_one_process(stage, rl_flags, tmp_path):
    """Also at the end of an epoch, where one rank has fewer questions than the other."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(SCRIPTS[stage], rl_flags(out_dir=one, batch_size=14, max_steps=4, learning_rate=1e-3)).status == 0
    result = torchrun(SCRIPTS[stage], rl_flags(out_dir=two, batch_size=7, max_steps=4, learning_rate=1e-3))
    assert result.status == 0, result.err
    first, second = (metrics(folder, stage) for folder in (one, two))
    assert curve(second, "reward")[:1] == pytest.approx(curve(first, "reward")[:1])
    assert curve(second, "loss")[0] == pytest.approx(curve(first, "loss")[0], abs=1e-4)
    assert len(curve(second, "reward")) == 4
    a, b = (torch.load(folder / f"{stage}_32.pth", weights_only=True) for folder in (one, two))
    assert max(float((a[name].float() - b[name].float()).abs().max()) for name in a) < 5e-3


@pytest.mark.parametrize("stage", SCRIPTS)
def test_experts_run_too(stage, rl_flags, tmp_path):
    torch.manual_seed(0)
    base = tmp_path / "moe.pth"
    save_weights(MiniMindForCausalLM(MiniMindConfig(hidden_size=32, num_hidden_layers=1, use_moe=True)), base)
    result = train(SCRIPTS[stage], rl_flags(from_weight=base, max_steps=2))
    assert result.status == 0 and "experts" in result.out, result.err
    assert (tmp_path / "out" / f"{stage}_32_moe.pth").is_file()


@pytest.mark.parametrize("stage", SCRIPTS)
def test_without_a_penalty(stage, rl_flags, tmp_path):
    result = train(SCRIPTS[stage], rl_flags(beta=0, max_steps=2))
    assert result.status == 0, result.err


def test_bad_input_ends_in_one_line(rl_flags, tmp_path, monkeypatch):
    def refused(words_wanted: str, **changes) -> None:
        result = train(train_grpo, rl_flags(**changes))
        assert result.status == 2 and words_wanted in result.err and result.err.count("\n") == 1, result.err

    refused("there is no reward 'speed'", rewards="speed")
    refused("leaves no room for a prompt", max_new_tokens=64)
    refused("this stage needs a trained model", from_weight="none")
    nameless = write_records(
        tmp_path / "open.jsonl", [{"conversations": [{"role": "user", "content": f"{i}?"}]} for i in range(9)]
    )
    refused("--rewards answer", rewards="answer", data_path=nameless)
    assert not list((tmp_path / "out").glob("*.pth"))
    monkeypatch.setitem(reward_module.RULES, "length", lambda reply, record: math.nan)
    refused("the reward length gave nan")


def test_another_reference_is_refused(rl_flags, reference, tmp_path):
    base = tmp_path / "base.pth"
    save_weights(load_model(reference.out_dir / "pretrain_32.pth"), base)
    assert train(train_grpo, rl_flags(from_weight=base, max_steps=3)).status == 0
    model = load_model(base)
    model.model.norm.weight.data += 1
    save_weights(model, base)
    result = train(train_grpo, ["--resume", "--out_dir", str(tmp_path / "out")])
    assert result.status == 2 and "reference weights was" in result.err


def test_prompt_tokens_never_get_a_gradient_of_their_own(questions, restored_process, monkeypatch):
    """The targets of a whole update hold what was drawn, token for token, and nothing else."""
    assert rollout.IGNORE == IGNORE
    model, tokenizer = MiniMindForCausalLM(MiniMindConfig(hidden_size=32, num_hidden_layers=1)), load_tokenizer()
    run = utils.Run("cpu", "float32", 7, keep_memory=False)
    data = PromptDataset(questions, tokenizer, 64, split="all", max_new_tokens=8)
    answers = Roller(model, tokenizer, run, 16, 64, 8)(data, range(10), 2, 1.0, 0)
    micros, _ = pack_answers(answers, 64, 3, 0, run)
    scored = sorted(t for micro in micros for t in micro["targets"].tolist())
    assert scored == sorted(t for answer in answers for t in answer.tokens)
