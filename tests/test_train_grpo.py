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
    assert_balance_is_all_that_is_left,
    flags,
    layout_flags,
    lone_logps,
    material,
    no_pictures,
    question,
    replay,
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
from torch import nn

from dataset.stage_datasets import PromptDataset
from model.weights import load_model, save_weights
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
    assert train(train_grpo, flags(num_generations=10, max_steps=1, beta=0)).status == 0
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
    sizes = dict(batch_size=3, micro_rows=1, max_steps=2, learning_rate=2e-3, grad_clip=1e9)
    result = train(train_grpo, flags(rewards="length:0.7 repetition", **settings, **sizes))
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


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def whole(material, tmp_path_factory) -> SimpleNamespace:
    """An uninterrupted run of two epochs, each with one question in its last update. No test writes into its folder."""
    out_dir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        insight = Insight(patch, train_grpo)
        result = train(train_grpo, rl_flags(material, out_dir))
    assert result.status == 0, result.err
    return SimpleNamespace(out_dir=out_dir, insight=insight, result=result)


def assert_goes_on_like(whole: SimpleNamespace, out_dir: Path, texts: list) -> None:
    """A run that was interrupted, against the one that was not."""
    assert_same_run(out_dir, whole.out_dir, STAGE)
    for name in ("reward", "length", "kl", "clip", "entropy", "answer_tokens", "val_reward"):
        assert curve(metrics(out_dir, STAGE), name) == curve(metrics(whole.out_dir, STAGE), name), name
    assert texts == whole.insight.texts
    assert samples(out_dir, STAGE) == samples(whole.out_dir, STAGE)


def test_a_run_learns_and_tells(whole, material):
    records = metrics(whole.out_dir, STAGE)
    lines = [record for record in records if "loss" in record]
    assert curve(lines, "step") == list(range(1, 17)) and [line["epoch"] for line in lines] == [1] * 8 + [2] * 8
    assert [len(answers) for answers in whole.insight.answers] == ([16] * 7 + [4]) * 2
    rewards, tokens = curve(lines, "reward"), 0
    assert sum(rewards[:4]) / 4 < -0.4 and sum(rewards[-4:]) / 4 > -0.25, rewards
    for line, answers, parts in zip(lines, whole.insight.answers, whole.insight.parts, strict=True):
        tokens += sum(len(answer.prompt) + len(answer.tokens) for answer in answers)
        assert line["tokens"] == tokens
        lengths, ended = zip(*((len(answer.tokens), answer.record["ended"]) for answer in answers), strict=True)
        assert line["answer_tokens"] == pytest.approx(sum(lengths) / len(lengths))
        expected = [min(0.0, 1 - 2 * n / LONGEST) if alone else -1.0 for n, alone in zip(lengths, ended, strict=True)]
        assert line["reward"] == line["length"] == pytest.approx(sum(expected) / len(expected))
        assert parts["reward"] == expected and 0 < line["entropy"] < math.log(6400)
        step = line["step"] - 1
        assert {line["lr"], *whole.insight.rates[step]} == {utils.cosine_lr(step, 16, 1, 5e-4)}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in whole.insight.gradients[step].values()))
        assert norm == pytest.approx(min(1.0, line["grad_norm"]), rel=1e-3)  # logged before clipping
        assert line["drawn_per_second"] > 0 and line["trained_per_second"] > 0
    assert max(curve(lines, "grad_norm")) > 1.2
    kls = curve(lines, "kl")
    assert abs(kls[0]) < 1e-6 and kls[1] > 1e-3 and sum(kls[-3:]) > 10 * kls[1]
    assert all(clip < 0.01 for clip in curve(lines, "clip"))  # one step on fresh answers: every ratio is 1
    out = whole.result.out
    assert "4 questions × 4 answers" in out and "29 prompts" in out and whole.result.err == ""
    assert "grpo | epoch 1/2 | step 1/16 | loss " in out and "| validation reward -" in out
    assert "a curve: ('grpo, grpo_32', 'reward', 'per answer')" in out

    base, insight = load_model(material.base), whole.insight
    (reference,) = insight.frozen
    assert not reference.training
    for name, p in reference.named_parameters():
        assert torch.equal(p, base.state_dict()[name]) and p.grad is None, name
    state, facts = final_state(whole.out_dir, STAGE)
    saved = load_model(whole.out_dir / "grpo_32.pth")
    for name, p in saved.named_parameters():
        assert torch.equal(p, state["model"][name].half().float()), name
        assert not torch.equal(p, base.state_dict()[name]), name
    assert facts["progress"]["finished"]
    assert json.loads((whole.out_dir / "grpo_32.json").read_text(encoding="utf-8"))["stage"] == STAGE


def test_held_out_questions_are_answered_greedily(whole, material, tokenizer):
    records = [record for record in metrics(whole.out_dir, STAGE) if "val_reward" in record]
    assert curve(records, "step") == [0, 4, 8, 12, 16]
    assert records[0]["val_reward"] < -0.7 < -0.3 < records[-1]["val_reward"]
    model = load_model(material.base).eval()
    final = final_state(whole.out_dir, STAGE)[0]["model"]
    held_out = PromptDataset(material.questions, tokenizer, WIDTH, "val", val_ratio=0.15, max_new_tokens=LONGEST)
    assert len(held_out) == QUESTIONS - TRAINED == 5
    end = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for state, record in [(model.state_dict(), records[0]), (final, records[-1])]:
        model.load_state_dict(state)
        rewards = []
        for number in range(5):
            prompt = torch.tensor([held_out[number]["ids"]])
            mask = torch.ones_like(prompt)
            out = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=LONGEST, **end)
            said = out[0, prompt.shape[1] :].tolist()
            ended = said[-1] == tokenizer.eos_token_id
            rewards.append(min(0.0, 1 - 2 * len(said) / LONGEST) if ended else -1.0)
        assert record["val_reward"] == record["val_length"] == pytest.approx(sum(rewards) / 5)


def test_samples_are_written_for_people_to_read(whole):
    lines = samples(whole.out_dir, STAGE)
    assert [line["step"] for line in lines] == sum([[step] * 4 for step in range(1, 17)], [])
    for line, answer, reward in zip(
        lines,
        (answer for answers in whole.insight.answers for answer in answers[:4]),
        (reward for parts in whole.insight.parts for reward in parts["reward"][:4]),
        strict=True,
    ):
        assert line["reply"] == answer.text and line["reward"] == line["length"] == round(reward, 4)
        assert line["question"] == answer.record["question"] and line["truth"] == answer.record["answer"]
    assert len({line["question"] for line in lines[:4]}) == 1  # the answers to one question beside each other


def test_a_cut_run_goes_on_bit_for_bit(whole, flags, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        first = Insight(patch, train_grpo, at={8: cut})
        with pytest.raises(PowerCut):
            train(train_grpo, flags())
    assert samples(tmp_path / "out", STAGE)[-1]["step"] == 7  # two updates more than were saved
    again = Insight(monkeypatch, train_grpo)
    result = resume(tmp_path / "out")
    assert result.status == 0 and "resumed at update 5" in result.out, result.err
    assert_goes_on_like(whole, tmp_path / "out", first.texts[:5] + again.texts)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without asking it")
def test_a_terminated_process_saves_and_goes_on_bit_for_bit(whole, flags, tmp_path, monkeypatch):
    out_dir = tmp_path / "out"
    process, log = start([train_grpo.__file__, *flags()]), run_folder(out_dir, STAGE) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.is_file() and '"step": 3' in log.read_text(encoding="utf-8"):
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert result.status == 128 + signal.SIGTERM, result.err
    assert "stopping after this update, saving first" in result.err and "Traceback" not in result.err
    done = final_state(out_dir, STAGE)[1]["progress"]["step"]
    assert 3 <= done < 16 and curve(metrics(out_dir, STAGE), "step")[-1] == done
    insight = Insight(monkeypatch, train_grpo)
    result = resume(out_dir)
    assert result.status == 0 and f"resumed at update {done}" in result.out, result.err
    assert_goes_on_like(whole, out_dir, whole.insight.texts[:done] + insight.texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "grpo_moe"])
def test_two_ranks_are_one_process(name, material, tmp_path, tmp_path_factory, monkeypatch):
    """Also where an epoch ends with fewer questions than ranks × batch: one rank has fewer than the other, or none."""
    two = two_ranks(tmp_path_factory.getbasetemp()) / name
    (drawn, weights), (other_drawn, other_weights) = (
        torch.load(two / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert all(torch.equal(weights[key], other_weights[key]) for key in weights)
    insight = Insight(monkeypatch, train_grpo)
    same = replay(monkeypatch, [a + b for a, b in zip(drawn, other_drawn, strict=True)])
    result = train(train_grpo, layout_flags(material, tmp_path, name, 1))
    assert result.status == 0, result.err
    assert sum(same) >= 0.97 * len(same)
    steps = RANK_RUNS[name][1]["max_steps"]
    shares = [(len(a) // 4, len(b) // 4) for a, b in zip(drawn, other_drawn, strict=True)]
    assert shares == ([(3, 3)] * 4 + [(3, 2)] + [(3, 3)] * 2 if name == "grpo" else [(14, 14), (1, 0)])
    size = "32_moe" if "moe" in name else "32"
    one_lines, two_lines = metrics(tmp_path, STAGE, size), metrics(two, STAGE, size)
    assert curve(two_lines, "step") == curve(one_lines, "step") and len(curve(two_lines)) == steps
    assert curve(two_lines, "tokens") == curve(one_lines, "tokens")
    assert curve(two_lines, "reward") == pytest.approx(curve(one_lines, "reward"))
    assert curve(two_lines, "val_reward") == pytest.approx(curve(one_lines, "val_reward")) != []
    for figure in ("loss", "grad_norm", "kl", "entropy", "aux_loss"):
        assert curve(two_lines, figure) == pytest.approx(curve(one_lines, figure), rel=1e-3, abs=1e-5), figure
    alone = insight.model.state_dict()
    far = [((weights[key] - alone[key]).abs() > 1e-5).float().mean().item() for key in weights]  # updates: up to 1e-3
    # The balance loss is a mean over rows, and two ranks pack the answers into other rows.
    assert max(far) < (0.05 if "moe" in name else 1e-3)
    assert {line["step"] for line in samples(two, STAGE, size)} == set(range(1, steps + 1))


def test_a_mixture_of_experts_runs(flags, material, tmp_path):
    result = train(train_grpo, flags(from_weight=material.moe, learning_rate=2e-3))
    assert result.status == 0, result.err
    records = metrics(tmp_path / "out", STAGE, "32_moe")
    rewards = curve(records, "reward")
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3, rewards
    assert abs(curve(records, "kl")[0]) < 1e-6
    assert all(0.05 < value < 0.4 for value in curve(records, "aux_loss")) and "| experts " in result.out
    assert load_model(tmp_path / "out" / "grpo_32_moe.pth").config.use_moe


def test_the_balance_of_experts_is_a_mean_over_rows(flags, material, monkeypatch):
    monkeypatch.setitem(reward_rules.RULES, "length", lambda reply, record: 1.0)
    insight = Insight(monkeypatch, train_grpo)
    changes = dict(micro_rows=2, max_steps=1, beta=0, val_ratio=0, batch_size=5, grad_clip=1e9)
    assert train(train_grpo, flags(from_weight=material.moe, **changes)).status == 0
    assert_balance_is_all_that_is_left(insight, material.moe)


def test_without_a_penalty_the_reference_is_not_asked(flags, tmp_path, monkeypatch):
    insight = Insight(monkeypatch, train_grpo)
    result = train(train_grpo, flags(beta=0, max_steps=3, val_ratio=0))
    assert result.status == 0, result.err
    assert insight.frozen == [] and curve(metrics(tmp_path / "out", STAGE), "kl") == [0, 0, 0]
    # And where nothing is held out, nothing is measured on it.
    assert curve(metrics(tmp_path / "out", STAGE), "val_reward") == [] and "validation" not in result.out


def test_updates_left_out_leave_the_figures_alone(flags, tmp_path, monkeypatch):
    """A loss scale of float16 that overflows first: figures are means over the tokens of the updates taken."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, 2.0**20, enabled=enabled))
    changes = dict(dtype="float16", max_steps=8, log_interval=8, val_ratio=0, batch_size=1, micro_rows=2)
    assert train(train_grpo, flags(**changes)).status == 0
    (line,) = metrics(tmp_path / "out", STAGE)
    assert 2 < line["skipped_steps"] < 7
    assert 3 < line["entropy"] < 7 and 0 <= line["clip"] <= 0.2


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_reward_that_is_no_number_ends_the_run_and_keeps_what_was_saved(flags, tmp_path, monkeypatch):
    out_dir, rule = tmp_path / "out", reward_rules.RULES["length"]
    with monkeypatch.context() as patch:
        insight = Insight(patch, train_grpo)
        broken = lambda reply, record: math.nan if len(insight.answers) == 4 else rule(reply, record)  # noqa: E731
        patch.setitem(reward_rules.RULES, "length", broken)
        error = one_error(train(train_grpo, flags(save_interval=2, val_interval=3)))
        assert "the reward length gave nan" in error and "expected a finite number" in error
    assert final_state(out_dir, STAGE)[1]["progress"]["step"] == 4
    assert load_model(out_dir / "grpo_32.pth").config.hidden_size == 32
    result = resume(out_dir)
    assert result.status == 0 and "resumed at update 4" in result.out, result.err
    assert [line["step"] for line in metrics(out_dir, STAGE) if "loss" in line] == list(range(1, 17))


def test_what_would_be_another_run_is_refused(flags, material, tmp_path):
    out_dir, base = tmp_path / "out", tmp_path / "base.pth"
    base.write_bytes(material.base.read_bytes())
    base.with_suffix(".json").write_bytes(material.base.with_suffix(".json").read_bytes())
    assert train(train_grpo, flags(from_weight=base, max_steps=3)).status == 0
    before = tree(out_dir)
    for more, what in [
        (["--rewards", "length", "repetition"], "rewards was ['length'], now it is ['length', 'repetition']"),
        (["--num_generations", "8"], "num_generations was 4, now it is 8"),
        (["--temperature", "0.9"], "temperature was 1.0, now it is 0.9"),
        (["--inner_updates", "2"], "inner_updates was 1, now it is 2"),
        (["--beta", "0"], "beta was 0.02, now it is 0.0"),
        (["--clip_high", "0.5"], "clip_high was 0.28, now it is 0.5"),
        (["--loss", "cispo"], "loss was clip, now it is cispo"),
        (["--scale_rewards", "none"], "scale_rewards was std, now it is none"),
    ]:
        assert what in one_error(resume(out_dir, *more))
    state = torch.load(base, weights_only=True)
    state["model.norm.weight"] += 1
    torch.save(state, base)
    assert "reference weights was" in one_error(resume(out_dir))
    assert tree(out_dir) == before


def test_a_reward_model_belongs_to_the_run(flags, material, tmp_path, monkeypatch):
    """Named by a relative path, found again from another folder, and refused when it is another one by then."""
    judge = load_model(material.base)
    judge.score = nn.Linear(32, 1, bias=False)
    save_weights(judge, tmp_path / "judge.pth", {"stage": "reward"})
    monkeypatch.chdir(tmp_path)
    assert train(train_grpo, flags(rewards="model:judge.pth:0.5 length", max_steps=2)).status == 0
    monkeypatch.chdir(tmp_path.parent)
    result = resume(tmp_path / "out")
    assert result.status == 0 and "this run is finished" in result.out, result.err
    nn.init.zeros_(judge.score.weight)
    save_weights(judge, tmp_path / "judge.pth", {"stage": "reward"})
    assert "reward model 1 weights was" in one_error(resume(tmp_path / "out"))


def test_bad_input_is_named_in_one_line_and_nothing_is_lost(flags, tmp_path):
    out_dir = tmp_path / "out"
    assert train(train_grpo, flags(max_steps=1)).status == 0
    before = tree(out_dir)
    nameless = [question(i) for i in range(QUESTIONS)]
    del nameless[20]["answer"]
    open_question = write_records(tmp_path / "open.jsonl", nameless)
    long = [{"conversations": [{"role": "user", "content": "long " * 50 + str(i)}]} for i in range(12)]
    all_long = write_records(tmp_path / "long.jsonl", long)
    broken = write_records(tmp_path / "broken.jsonl", [question(0), {"text": "no turns"}])
    for changes, *expected in [
        (dict(rewards="speed"), "there is no reward 'speed'"),
        (dict(rewards="length answer", data_path=open_question), "--rewards answer", "'20'", "has the answer None"),
        (dict(max_new_tokens=WIDTH), "--max_new_tokens 64", "--max_seq_len 64", "leaves no room for a prompt"),
        (dict(max_new_tokens=WIDTH - 5), "questions.jsonl: nothing to train on", "--max_new_tokens 59"),
        (dict(data_path=all_long), "long.jsonl: nothing to train on", "--max_new_tokens 10 in --max_seq_len 64"),
        (dict(data_path=broken), "broken.jsonl, line 2"),
        (dict(num_generations=1), "--num_generations 1: GRPO compares the answers to a question"),
        (dict(from_weight="none"), "this stage needs a trained model"),
    ]:
        error = one_error(train(train_grpo, flags(**changes)))
        assert all(words in error for words in expected), error
    assert tree(out_dir) == before
    some_long = write_records(tmp_path / "some.jsonl", [question(i) for i in range(20)] + long[:3])
    result = train(train_grpo, flags(data_path=some_long, max_steps=1, val_ratio=0))
    assert result.status == 0 and "20 prompts; 3 too long for a row are left out" in result.out, result.out + result.err
