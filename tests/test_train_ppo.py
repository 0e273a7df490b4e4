"""PPO: advantages and gradient against naive renditions, the value head, whole runs, interruption, two ranks.

Sizes are tiny: hidden 32, one layer, rows of 64 tokens, one thread.

Dimension legend: A answers · L longest of them.
"""

import copy
import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_rollout import (  # noqa: F401 (fixtures)
    LENGTHS,
    LONGEST,
    RANK_RUNS,
    WIDTH,
    Insight,
    assert_balance_is_all_that_is_left,
    data,
    flags,
    layout_flags,
    lone_logps,
    made_up_answers,
    material,
    no_pictures,
    other_ranks,
    replay,
    rl_flags,
    roll,
    run,
    samples,
    tiny_model,
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
    metrics,
    one_error,
    train,
    tree,
)

from model.weights import load_model
from trainer import rewards as reward_rules
from trainer import train_ppo
from trainer import trainer_utils as utils
from trainer.rollout import Answer, pack_answers
from trainer.train_ppo import advantages_of, answer_outputs, judge, make_value_head

# ruff: noqa: F811 (fixtures as arguments)

STAGE = "ppo_actor"
VALUES = dict(value_coef=0.3, critic_learning_rate=1e-2, gamma=1.0, gae_lambda=0.95)
MUON = dict(optimizer="muon", learning_rate=4e-3, **VALUES)


def resume(out_dir: Path, *more: str):
    return train(train_ppo, ["--resume", "--out_dir", str(out_dir), *more])


# ------------------------------------------------------------------------------------------------------- the equations


def naive_advantages(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Equation (2) as a sum over all that follows, in Python's floats."""
    n = len(rewards)
    deltas = [rewards[t] + (gamma * values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.7), (1.0, 0.0), (0.0, 0.5)])
def test_advantages_are_the_naive_sum(gamma, lam):
    torch.manual_seed(0)
    lengths = [5, 1, 8, 3]
    real = torch.arange(8) < torch.tensor(lengths)[:, None]
    rewards, values = torch.randn(2, 4, 8, dtype=torch.float64)
    found = advantages_of(rewards, values, real, gamma, lam)  # what stands behind the ends is nobody's
    for a, n in enumerate(lengths):
        r, v = rewards[a, :n].tolist(), values[a, :n].tolist()
        assert found[a, :n].tolist() == pytest.approx(naive_advantages(r, v, gamma, lam), abs=1e-12)
        assert found[a, n:].tolist() == [0.0] * (8 - n)
        if gamma == lam == 1:  # return − value
            assert found[a, :n].tolist() == pytest.approx([sum(r[t:]) - v[t] for t in range(n)], abs=1e-12)
        if lam == 0:  # of one step
            assert found[a, n - 1].item() == pytest.approx(r[-1] - v[-1])


def critic_of(hidden_size: int = 32):
    """A value head that says something, unlike a new one."""
    head = make_value_head(hidden_size, torch.device("cpu"))
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return head


def lone_values(model, answer: Answer) -> torch.Tensor:
    """V of each token of an answer, float64, from the hidden states of the sequence by itself."""
    hidden = model(torch.tensor([answer.prompt + answer.tokens])).hidden_states[0]
    return model.value_head(hidden[len(answer.prompt) - 1 : -1])[:, 0].double()


def naive_judgement(model, base, answers, rewards, settings) -> tuple[list[list[float]], list[list[float]]]:
    """Equations (1) and (2): (advantages with mean 0 and variance 1, returns) of each answer."""
    advantages, returns = [], []
    for answer, reward in zip(answers, rewards, strict=True):
        with torch.no_grad():
            old, frozen = (lone_logps(m, answer, settings.temperature) for m in (model, base))
            values = lone_values(model, answer).tolist()
        token_rewards = [-settings.beta * (p - q) for p, q in zip(old.tolist(), frozen.tolist(), strict=True)]
        token_rewards[-1] += reward
        advantages.append(naive_advantages(token_rewards, values, settings.gamma, settings.gae_lambda))
        returns.append([a + v for a, v in zip(advantages[-1], values, strict=True)])
    every = sum(advantages, [])
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in every) / len(every))
    return [[(a - mean) / deviation for a in row] for row in advantages], returns


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_judging_packed_answers_is_the_naive_judgement(temperature, tokenizer, run, data):
    """However they are packed, and beside any padding."""
    base = tiny_model().eval().requires_grad_(False)
    torch.manual_seed(1)
    model = copy.deepcopy(base).requires_grad_(True)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    model.value_head = critic_of()
    settings = SimpleNamespace(beta=0.3, gamma=0.97, gae_lambda=0.8, temperature=temperature)
    answers = roll(model, tokenizer, run, data, temperature=temperature)
    assert len({len(answer.tokens) for answer in answers}) > 3
    rewards = torch.randn(len(answers)).tolist()
    advantages, returns = naive_judgement(model, base, answers, rewards, settings)
    for rows, padding in [(1, False), (8, False), (3, True)]:
        micros, held = pack_answers(answers, WIDTH, rows, 0, run)
        if padding:  # as on a rank that waits for another one
            nothing, nobody = pack_answers([], WIDTH, rows, 0, other_ranks(2))
            micros, held = [*micros, *nothing], [*held, *nobody]
        judge(micros, held, answers, rewards, model, base, run, settings)
        for micro, numbers in zip(micros, held, strict=True):
            if numbers:
                for name, expected in (("advantages", advantages), ("returns", returns)):
                    wanted = torch.tensor(sum([expected[number] for number in numbers], []))
                    assert not micro[name].requires_grad and micro[name].dtype == torch.float32
                    torch.testing.assert_close(micro[name], wanted, rtol=1e-3, atol=1e-3)
            assert all(torch.isfinite(micro[name]).all() for name in ("advantages", "returns"))
        every = torch.cat([micro["advantages"][micro["targets"] >= 0] for micro in micros]).double()
        assert len(every) == sum(len(answer.tokens) for answer in answers)
        assert abs(float(every.mean())) < 1e-5 and float(every.var(correction=0)) == pytest.approx(1, abs=1e-4)


def test_only_the_last_token_of_an_answer_gets_its_reward(run):
    """Without a penalty, values or discount there is one reward, and λ says how far back it reaches."""
    model, answers = tiny_model(), made_up_answers(LENGTHS)
    base = copy.deepcopy(model)
    model.value_head = make_value_head(32, torch.device("cpu"))
    settings = SimpleNamespace(beta=0.0, gamma=1.0, gae_lambda=0.5, temperature=1.0)
    micros, held = pack_answers(answers, 24, 2, 0, run)
    judge(micros, held, answers, [float(number + 1) for number in range(len(answers))], model, base, run, settings)
    for micro, numbers in zip(micros, held, strict=True):
        expected = [(n + 1) * 0.5 ** (len(answers[n].tokens) - 1 - t) for n in numbers for t in range(LENGTHS[n][1])]
        assert micro["returns"].tolist() == pytest.approx(expected, rel=1e-6)


def test_a_new_value_head_says_0_and_learns(run):
    head = make_value_head(32, torch.device("cpu"))
    hidden = torch.randn(9, 32)
    assert head(hidden).tolist() == [[0.0]] * 9
    model, answers = tiny_model(), made_up_answers(LENGTHS)
    model.value_head = critic_of()
    (micro,), _ = pack_answers(answers, 24, 8, 0, run)
    values = answer_outputs(model, model, run, micro, 1.0)[2]
    alone = torch.cat([lone_values(model, answers[number]) for number in dict.fromkeys(micro["answers"].tolist())])
    torch.testing.assert_close(values.double(), alone, rtol=1e-4, atol=1e-4)
    values.square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in model.value_head.parameters())
    assert float(model.model.norm.weight.grad.abs().max()) > 0  # policy and value share the rest of the model
    assert answer_outputs(tiny_model(), tiny_model(), run, micro, 1.0)[2] is None  # a reference has none


def naive_update(model, answers, advantages, returns, old, settings):
    """Equation (3) of the script's docstring, token by token: (loss, value loss, share of clipped tokens)."""
    count = sum(len(answer.tokens) for answer in answers)
    loss, value_loss, clipped = 0.0, 0.0, 0
    low, high = 1 - settings.clip_low, 1 + settings.clip_high
    for answer, A, R, before in zip(answers, advantages, returns, old, strict=True):
        logps, values = lone_logps(model, answer, settings.temperature), lone_values(model, answer)
        for t in range(len(answer.tokens)):
            ratio = (logps[t] - before[t]).exp()
            beyond = (ratio.item() > high and A[t] > 0) or (ratio.item() < low and A[t] < 0)
            policy = -A[t] * (ratio if not beyond else high if A[t] > 0 else low)
            error = (values[t] - R[t]) ** 2 / 2
            loss = loss + (policy + settings.value_coef * error) / count
            value_loss += error.item() / count
            clipped += beyond
    return loss, value_loss, clipped / count


def test_each_step_follows_equation_3(flags, material, tmp_path, monkeypatch):
    """Several micro-batches, two updates of two steps each: values, penalty and clipping act in the second."""
    settings = dict(value_coef=0.4, critic_learning_rate=5e-3, gamma=0.97, gae_lambda=0.8, beta=0.3, clip_low=0.05)
    settings |= dict(clip_high=0.1, num_generations=5, inner_updates=2, temperature=0.9, learning_rate=2e-3)
    insight = Insight(monkeypatch, train_ppo)
    sizes = dict(batch_size=3, micro_rows=1, max_steps=2, grad_clip=1e9)
    result = train(train_ppo, flags(rewards="length:0.7 repetition", **settings, **sizes))
    assert result.status == 0, result.err
    lines = [record for record in metrics(tmp_path / "out", STAGE) if "loss" in record]
    settings = SimpleNamespace(**settings)
    base, model = load_model(material.base), load_model(material.base)
    model.value_head = make_value_head(32, torch.device("cpu"))
    assert len(insight.answers) == 2 and len(insight.weights) == 4
    for update, (answers, parts) in enumerate(zip(insight.answers, insight.parts, strict=True)):
        model.load_state_dict(insight.weights[2 * update], strict=False)
        advantages, returns = naive_judgement(model, base, answers, parts["reward"], settings)
        with torch.no_grad():
            old = [lone_logps(model, answer, settings.temperature) for answer in answers]
        for step in (2 * update, 2 * update + 1):
            model.load_state_dict(insight.weights[step], strict=False)
            model.zero_grad()
            loss, value_loss, clipped = naive_update(model, answers, advantages, returns, old, settings)
            loss.backward()
            for name, p in model.named_parameters():
                largest = float(p.grad.abs().max())
                assert largest > 0 or (step == 0 and name.startswith("value_head.0")), name  # behind a layer of zeros
                assert float((insight.gradients[step][name] - p.grad).abs().max()) <= 2e-3 * largest, (step, name)
        line = lines[update]  # of the last step
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
        assert line["value_loss"] == pytest.approx(value_loss, rel=1e-3)
        assert line["clip"] == pytest.approx(clipped, abs=1e-9) and 0.05 < clipped < 0.95


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def whole(material, tmp_path_factory) -> SimpleNamespace:
    """An uninterrupted run of two epochs, with Muon beside AdamW. No test writes into its folder."""
    out_dir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        insight = Insight(patch, train_ppo)
        result = train(train_ppo, rl_flags(material, out_dir, **MUON))
    assert result.status == 0, result.err
    return SimpleNamespace(out_dir=out_dir, insight=insight, result=result)


def assert_goes_on_like(whole: SimpleNamespace, out_dir: Path, texts: list) -> None:
    """A run that was interrupted, against the one that was not."""
    assert_same_run(out_dir, whole.out_dir, STAGE)
    for name in ("reward", "kl", "clip", "entropy", "value_loss", "answer_tokens", "val_reward"):
        assert curve(metrics(out_dir, STAGE), name) == curve(metrics(whole.out_dir, STAGE), name), name
    assert texts == whole.insight.texts
    assert samples(out_dir, STAGE) == samples(whole.out_dir, STAGE)


def test_a_run_learns_and_tells(whole, material):
    records = metrics(whole.out_dir, STAGE)
    lines = [record for record in records if "loss" in record]
    assert curve(lines, "step") == list(range(1, 17)) and [line["epoch"] for line in lines] == [1] * 8 + [2] * 8
    rewards, kls, errors = (curve(lines, name) for name in ("reward", "kl", "value_loss"))
    assert sum(rewards[:3]) / 3 < -0.4 and sum(rewards[-4:]) / 4 > -0.25, rewards
    assert abs(kls[0]) < 1e-6 and kls[1] > 1e-4 and sum(kls[-3:]) > 10 * kls[1]
    assert sum(errors[-3:]) < 0.6 * sum(errors[:3])
    for line, answers, parts in zip(lines, whole.insight.answers, whole.insight.parts, strict=True):
        assert line["reward"] == pytest.approx(sum(parts["reward"]) / len(answers))
        assert 0 < line["entropy"] < math.log(6400) and line["clip"] < 0.01
        gradients = whole.insight.gradients[line["step"] - 1].values()
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        assert norm == pytest.approx(min(1.0, line["grad_norm"]), rel=1e-3)  # logged before clipping
    assert max(curve(lines, "grad_norm")) > 1.2
    held_out = [record for record in records if "val_reward" in record]
    assert curve(held_out, "step") == [0, 4, 8, 12, 16]
    assert held_out[0]["val_reward"] < -0.7 < -0.3 < held_out[-1]["val_reward"]
    assert "| value loss " in whole.result.out and "a curve: ('ppo_actor, ppo_actor_32'" in whole.result.out
    assert {"step", "question", "reply", "truth", "reward", "length"} == samples(whole.out_dir, STAGE)[0].keys()

    base = load_model(material.base)
    (reference,) = whole.insight.frozen
    assert not reference.training and not hasattr(reference, "value_head")
    assert all(torch.equal(p, base.state_dict()[name]) for name, p in reference.named_parameters())


def test_the_weights_are_a_model_and_the_state_holds_the_value_head(whole, material):
    path = whole.out_dir / "ppo_actor_32.pth"
    names, base = torch.load(path, weights_only=True).keys(), load_model(material.base)
    assert names == torch.load(material.base, weights_only=True).keys()
    state, _ = final_state(whole.out_dir, STAGE)
    added = {name for name in state["model"] if name not in base.state_dict()}
    assert added == {f"value_head.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    for name, p in load_model(path).named_parameters():  # strict
        assert torch.equal(p, state["model"][name].half().float()), name
        assert not torch.equal(p, base.state_dict()[name]), name
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["stage"] == STAGE


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_value_head_has_a_learning_rate_of_its_own(optimizer, whole, flags, monkeypatch):
    if optimizer == "muon":
        rates = whole.insight.rates
    else:
        insight = Insight(monkeypatch, train_ppo)
        assert train(train_ppo, flags(max_steps=4, **VALUES)).status == 0
        rates = insight.rates
    for step, rates_now in enumerate(rates):
        peaks = [4e-3] * 3 if optimizer == "muon" else [5e-4] * 2
        expected = [utils.cosine_lr(step, len(rates), 1, peak) for peak in (*peaks, 1e-2)]
        assert rates_now == pytest.approx(expected, rel=1e-12)


def test_the_value_head_learns_what_to_expect(flags, tmp_path, monkeypatch):
    """A reward that is always 1, a policy that hardly moves: each return is 1, and the value goes there from 0."""
    monkeypatch.setitem(reward_rules.RULES, "length", lambda reply, record: 1.0)
    changes = dict(beta=0, gamma=1, gae_lambda=1, value_coef=1, critic_learning_rate=2e-2, learning_rate=1e-9)
    insight = Insight(monkeypatch, train_ppo)
    assert train(train_ppo, flags(inner_updates=2, max_steps=10, **changes)).status == 0
    errors = curve(metrics(tmp_path / "out", STAGE), "value_loss")
    assert 0.2 < errors[0] < 0.5  # after a first step from (0 − 1)² / 2
    assert errors[-1] < 0.02 * errors[0] and errors[2] < errors[0]
    values = torch.cat([lone_values(insight.model, answer) for answer in insight.answers[-1]])
    assert values.mean().item() == pytest.approx(1, abs=0.1)


def test_a_cut_run_goes_on_bit_for_bit(whole, flags, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        first = Insight(patch, train_ppo, at={8: cut})
        with pytest.raises(PowerCut):
            train(train_ppo, flags(**MUON))
    again = Insight(monkeypatch, train_ppo)
    result = resume(tmp_path / "out")
    assert result.status == 0 and "resumed at update 5" in result.out, result.err
    assert_goes_on_like(whole, tmp_path / "out", first.texts[:5] + again.texts)
    assert again.rates == whole.insight.rates[5:]


def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(whole, flags, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        first = Insight(patch, train_ppo, at={7: lambda: signal.raise_signal(signal.SIGTERM)})
        result = train(train_ppo, flags(**MUON))
    assert result.status == 128 + signal.SIGTERM and "stopping after this update" in result.err
    assert final_state(tmp_path / "out", STAGE)[1]["progress"]["step"] == 8  # the update in hand was finished
    again = Insight(monkeypatch, train_ppo)
    assert resume(tmp_path / "out").status == 0
    assert_goes_on_like(whole, tmp_path / "out", first.texts + again.texts)


@pytest.mark.slow
def test_two_ranks_are_one_process(material, tmp_path, tmp_path_factory, monkeypatch):
    """Also where an epoch ends with fewer questions than ranks × batch."""
    two = two_ranks(tmp_path_factory.getbasetemp()) / "ppo"
    (drawn, weights), (other_drawn, other_weights) = (
        torch.load(two / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert all(torch.equal(weights[key], other_weights[key]) for key in weights)
    assert "value_head.2.bias" in weights and weights["value_head.2.bias"].abs() > 1e-3
    insight = Insight(monkeypatch, train_ppo)
    same = replay(monkeypatch, [a + b for a, b in zip(drawn, other_drawn, strict=True)])
    result = train(train_ppo, layout_flags(material, tmp_path, "ppo", 1))
    assert result.status == 0, result.err
    assert sum(same) >= 0.97 * len(same)
    one_lines, two_lines = metrics(tmp_path, STAGE), metrics(two, STAGE)
    assert len(curve(two_lines)) == RANK_RUNS["ppo"][1]["max_steps"]
    assert curve(two_lines, "tokens") == curve(one_lines, "tokens")
    for figure in ("reward", "val_reward", "loss", "value_loss", "grad_norm", "kl", "entropy"):
        assert curve(two_lines, figure) == pytest.approx(curve(one_lines, figure), rel=1e-3, abs=1e-5), figure
    alone = insight.model.state_dict()
    far = [((weights[key] - alone[key]).abs() > 2e-5).float().mean().item() for key in weights]  # updates: up to 1e-3
    assert max(far) < 1e-2


def test_a_mixture_of_experts_runs(flags, material, tmp_path):
    result = train(train_ppo, flags(from_weight=material.moe, learning_rate=2e-3, **VALUES))
    assert result.status == 0, result.err
    records = metrics(tmp_path / "out", STAGE, "32_moe")
    rewards = curve(records, "reward")
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3, rewards
    assert all(0.05 < value < 0.4 for value in curve(records, "aux_loss")) and "| experts " in result.out
    assert load_model(tmp_path / "out" / "ppo_actor_32_moe.pth").config.use_moe


def test_the_balance_of_experts_is_a_mean_over_rows(flags, material, monkeypatch):
    monkeypatch.setitem(reward_rules.RULES, "length", lambda reply, record: 1.0)
    insight = Insight(monkeypatch, train_ppo)
    changes = dict(micro_rows=2, max_steps=1, beta=0, val_ratio=0, batch_size=5, grad_clip=1e9, gamma=1, gae_lambda=1)
    assert train(train_ppo, flags(from_weight=material.moe, value_coef=0, **changes)).status == 0
    assert_balance_is_all_that_is_left(insight, material.moe)


def test_updates_left_out_leave_the_figures_alone(flags, tmp_path, monkeypatch):
    """A loss scale of float16 that overflows first: figures are means over the tokens of the updates taken."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, 2.0**20, enabled=enabled))
    changes = dict(dtype="float16", max_steps=8, log_interval=8, val_ratio=0, batch_size=1, micro_rows=2)
    assert train(train_ppo, flags(**changes, **VALUES)).status == 0
    (line,) = metrics(tmp_path / "out", STAGE)
    assert 2 < line["skipped_steps"] < 7
    assert 3 < line["entropy"] < 7 and 0 <= line["clip"] <= 0.2 and line["value_loss"] < 0.5


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_reward_that_is_no_number_ends_the_run_and_keeps_what_was_saved(flags, tmp_path, monkeypatch):
    out_dir, rule = tmp_path / "out", reward_rules.RULES["length"]
    with monkeypatch.context() as patch:
        insight = Insight(patch, train_ppo)
        broken = lambda reply, record: math.nan if len(insight.answers) == 4 else rule(reply, record)  # noqa: E731
        patch.setitem(reward_rules.RULES, "length", broken)
        error = one_error(train(train_ppo, flags(save_interval=2, val_interval=3, max_steps=6, **VALUES)))
    assert "the reward length gave nan" in error
    assert final_state(out_dir, STAGE)[1]["progress"]["step"] == 4
    assert load_model(out_dir / "ppo_actor_32.pth").config.hidden_size == 32
    assert resume(out_dir).status == 0
    assert [line["step"] for line in metrics(out_dir, STAGE) if "loss" in line] == list(range(1, 7))


def test_what_would_be_another_run_is_refused(flags, material, tmp_path):
    out_dir, base = tmp_path / "out", tmp_path / "base.pth"
    base.write_bytes(material.base.read_bytes())
    base.with_suffix(".json").write_bytes(material.base.with_suffix(".json").read_bytes())
    assert train(train_ppo, flags(from_weight=base, max_steps=1, **VALUES)).status == 0
    before = tree(out_dir)
    for more, what in [
        (["--critic_learning_rate", "0.5"], "critic_learning_rate was 0.01, now it is 0.5"),
        (["--value_coef", "1"], "value_coef was 0.3, now it is 1.0"),
        (["--gamma", "0.9"], "gamma was 1.0, now it is 0.9"),
        (["--gae_lambda", "1"], "gae_lambda was 0.95, now it is 1.0"),
        (["--clip_low", "0.1"], "clip_low was 0.2, now it is 0.1"),
    ]:
        assert what in one_error(resume(out_dir, *more))
    state = torch.load(base, weights_only=True)
    state["model.norm.weight"] += 1
    torch.save(state, base)
    assert "reference weights was" in one_error(resume(out_dir))
    assert "leaves no room for a prompt" in one_error(train(train_ppo, flags(max_new_tokens=WIDTH)))
    assert "--gamma" in train(train_ppo, flags(gamma=1.5)).err
    assert tree(out_dir) == before


def test_one_answer_to_each_question_is_enough(flags, tmp_path):
    """There is no group to compare within; nothing held out, and no penalty."""
    result = train(train_ppo, flags(num_generations=1, val_ratio=0, beta=0, max_steps=3, **VALUES))
    assert result.status == 0, result.err
    assert curve(metrics(tmp_path / "out", STAGE), "val_reward") == []
    assert all(0 < n <= LONGEST for n in curve(metrics(tmp_path / "out", STAGE), "answer_tokens"))
