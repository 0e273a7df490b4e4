"""Answers drawn while training: packed rows, log-probabilities and policy losses against naive renditions in float64.

What the tests of GRPO and PPO share stands here too. Sizes are tiny: hidden 32, one layer, rows of 64 tokens, one
thread.

Dimension legend: B rows · T tokens · N answer tokens of a micro-batch · A answers · V vocabulary.
"""

import functools
import json
import math
import random
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_trainers import torchrun, tree, words, write_records

from dataset.lm_dataset import IGNORE
from dataset.stage_datasets import PromptDataset
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_model, load_tokenizer, save_weights
from trainer import run_log
from trainer import trainer_utils as utils
from trainer.rewards import Reward, parse_rewards
from trainer.rollout import (
    Answer,
    Roller,
    forget_samples,
    kl_estimate,
    pack_answers,
    policy_loss,
    rewarded,
    write_samples,
)
from trainer.train_grpo import answer_logps

WIDTH, LONGEST = 64, 10  # tokens of a row, of an answer
QUESTIONS = 34  # 29 of them to train on


# ------------------------------------------------------------------------------------ what GRPO's and PPO's tests share


def question(i: int) -> dict:
    turns = [{"role": "user", "content": "say " * (i % 5) + str(i)}]
    if i % 7 == 0:
        turns = [*turns, {"role": "assistant", "content": "What?"}, {"role": "user", "content": f"{i}!"}]
    return {"conversations": turns, "answer": str(i)}


def tiny_model(**config) -> MiniMindForCausalLM:
    """A policy that likes a few words, the end of the answer among them, and says everything else now and then.

    What all embeddings have in common reaches every hidden state; the embeddings of those words have more of it.
    """
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=32, num_hidden_layers=1, initializer_range=0.2, **config))
    tokenizer = load_tokenizer()
    liked = [tokenizer.encode(word)[0] for word in (" no", " maybe", "是", "不")] + [tokenizer.eos_token_id]
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table[:, 0] += 2
        table[liked, 0] += 5 if model.config.use_moe else 2.5
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def make_material(folder: Path) -> SimpleNamespace:
    """A file of questions and weights to begin with."""
    save_weights(tiny_model(), folder / "reason_32.pth", {"stage": "reason"})
    save_weights(tiny_model(use_moe=True), folder / "reason_32_moe.pth", {"stage": "reason"})
    path = write_records(folder / "questions.jsonl", [question(i) for i in range(QUESTIONS)])
    return SimpleNamespace(
        questions=path, base=folder / "reason_32.pth", moe=folder / "reason_32_moe.pth", folder=folder
    )


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> SimpleNamespace:
    return make_material(tmp_path_factory.mktemp("questions"))


@pytest.fixture
def flags(material, tmp_path):
    """The flags of a tiny run on the base weights, which no test may change."""
    before = tree(material.folder)
    yield lambda out_dir=tmp_path / "out", **changes: rl_flags(material, out_dir, **changes)
    assert tree(material.folder) == before


def rl_flags(material: SimpleNamespace, out_dir: Path, rewards: str = "length", **changes) -> list[str]:
    flags = dict(
        out_dir=out_dir, data_path=material.questions, device="cpu", dtype="float32", from_weight=material.base,
        max_seq_len=WIDTH, max_new_tokens=LONGEST, batch_size=4, accumulation_steps=1, num_generations=4, micro_rows=4,
        rollout_slots=64, temperature=1.0, inner_updates=1, beta=0.02, clip_low=0.2, clip_high=0.28, epochs=2,
        learning_rate=5e-4, warmup_iters=1, weight_decay=0.0, grad_clip=1.0, optimizer="adamw", log_interval=1,
        save_interval=5, val_interval=4, val_ratio=0.15, val_rows=64, max_steps=16,
    )  # fmt: skip
    return [*words(flags | changes), "--no-compile", "--rewards", *rewards.split()]


def lone_logits(model, answer: Answer, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities (n, V), float64, from which each token of an answer is drawn: the sequence by itself."""
    ids = torch.tensor([answer.prompt + answer.tokens])
    log_probs = (model(ids).logits[0].double() / temperature).log_softmax(-1)
    return log_probs[len(answer.prompt) - 1 : -1]


def lone_logps(model, answer: Answer, temperature: float = 1.0) -> torch.Tensor:
    return lone_logits(model, answer, temperature)[torch.arange(len(answer.tokens)), torch.tensor(answer.tokens)]


class Insight:
    """Follows a run from inside: per update the answers and their rewards, per step weights, gradients and rates."""

    def __init__(self, patch: pytest.MonkeyPatch, script: ModuleType, at: dict | None = None):
        """at: number of an update → function called right after it, before it is logged or saved."""
        self.answers, self.parts, self.weights, self.gradients, self.rates = [], [], [], [], []
        self.micros = []  # per update
        self.frozen = []  # modules without a gradient that log-probabilities were asked of
        outputs = "answer_logps" if hasattr(script, "answer_logps") else "answer_outputs"
        make_optimizer, rate, pack, step_if, ask = (
            getattr(script, name) for name in ("make_optimizer", "rewarded", "pack_answers", "step_if", outputs)
        )
        count, parts, at, done = run_log.RunLog.count, [], at or {}, []

        def made(model, *args):
            self.model = model
            return make_optimizer(model, *args)

        def rated(*args):
            parts.append(rate(*args))
            return parts[-1]

        def packed(answers, *args):  # in training alone, a validation packs nothing
            self.answers.append(answers)
            self.parts.append(parts[-1])
            micros, held = pack(answers, *args)
            self.micros.append(micros)
            return micros, held

        def stepped(finite, optimizer):
            named = dict(self.model.named_parameters())
            self.weights.append({name: p.detach().clone() for name, p in named.items()})
            self.gradients.append({name: p.grad.clone() for name, p in named.items()})
            self.rates.append([group["lr"] for group in optimizer.param_groups])
            step_if(finite, optimizer)

        def asked(model, *args):
            if not any(p.requires_grad for p in model.parameters()) and model not in self.frozen:
                self.frozen.append(model)
            return ask(model, *args)

        def counted(log, *args, **sums):
            count(log, *args, **sums)
            done.append(1)
            at.get(len(done), lambda: None)()

        functions = {"make_optimizer": made, "rewarded": rated, "pack_answers": packed, "step_if": stepped}
        for name, function in (functions | {outputs: asked}).items():
            patch.setattr(script, name, function)
        patch.setattr(run_log.RunLog, "count", counted)

    @property
    def texts(self) -> list[list[str]]:
        return [[answer.text for answer in answers] for answers in self.answers]


def assert_balance_is_all_that_is_left(insight: Insight, moe: Path) -> None:
    """The first gradient is that of the balance loss: its mean over all rows of the update, taken in one batch."""
    model = load_model(moe).train()
    names = ("input_ids", "position_ids", "documents")
    rows = {name: torch.cat([micro[name] for micro in insight.micros[0]]) for name in names}
    real = rows["documents"][:, 0] >= 0
    assert len(insight.micros[0]) > 2 and not real.all()  # the last micro-batch holds fewer rows
    model(**{name: tensor[real] for name, tensor in rows.items()}, need_logits=False).aux_loss.backward()
    gate = dict(model.named_parameters())["model.layers.0.mlp.gate.weight"].grad
    found = insight.gradients[0]["model.layers.0.mlp.gate.weight"]
    torch.testing.assert_close(found, gate, rtol=1e-3, atol=1e-3 * float(gate.abs().max()))


def samples(out_dir: Path, stage: str, size: str = "32") -> list[dict]:
    text = (out_dir / "runs" / f"{stage}_{size}" / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.rstrip("\n").split("\n")]


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Drawing the curve takes as long as a run of this size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_log, "plot_loss", lambda folder, *about: print(f"a curve: {about}"))
        yield


# Two ranks: one launch for the tests of both trainers, as a launch takes longer than they do.

SEVERAL_RUNS = """
import importlib, json, os, sys
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
from trainer import run_log
from trainer.command_line import leave
from trainer.trainer_utils import Run

make_group = dist.init_process_group
dist.init_process_group = lambda *args, **named: dist.is_initialized() or make_group(*args, **named)
Run.close = lambda run, status=0: dist.barrier()
run_log.plot_loss = lambda *about: None
torch.set_num_threads(1)
for name, out_dir, arguments in json.loads(sys.argv[1]):
    script, drawn, models = importlib.import_module("trainer." + name), [], []
    make, pack = script.make_optimizer, script.pack_answers
    script.make_optimizer = lambda model, *args: models.append(model) or make(model, *args)
    script.pack_answers = lambda answers, *args: drawn.append([vars(a) for a in answers]) or pack(answers, *args)
    sys.argv = [name, *arguments]
    script.main()
    script.make_optimizer, script.pack_answers = make, pack
    torch.save((drawn, models[0].state_dict()), out_dir + "/rank" + os.environ["RANK"] + ".pt")
leave(0)
"""
# 29 questions: with 6 per update, the last one of an epoch has 3 and 2 on the two ranks; with 28 it has 1 and none.
LAYOUT = dict(max_steps=7, learning_rate=1e-3, save_interval=7, val_interval=7, val_ratio=0.15)
RANK_RUNS = {
    "grpo": ("train_grpo", dict(batch_size=6, inner_updates=2) | LAYOUT),
    "grpo_moe": ("train_grpo", dict(batch_size=28, inner_updates=1) | LAYOUT | dict(max_steps=2)),
    "ppo": ("train_ppo", dict(batch_size=6, value_coef=0.3, critic_learning_rate=1e-2) | LAYOUT),
}


def layout_flags(material, out_dir: Path, name: str, ranks: int) -> list[str]:
    changes = dict(RANK_RUNS[name][1])
    changes["batch_size"] //= ranks
    return rl_flags(material, out_dir, **changes, **({"from_weight": material.moe} if "moe" in name else {}))


@functools.cache
def two_ranks(folder: Path) -> Path:
    """The folder in which each of `RANK_RUNS` has its out_dir, and in it rank0.pt and rank1.pt: (drawn, weights).

    Args: folder of this session of pytest, below which they lie.
    """
    folder = folder / "two_ranks"
    folder.mkdir()
    material = make_material(folder)
    runs = [(script, str(folder / n), layout_flags(material, folder / n, n, 2)) for n, (script, _) in RANK_RUNS.items()]
    path = folder / "several_runs.py"
    path.write_text(SEVERAL_RUNS.format(root=str(ROOT)), encoding="utf-8")
    result = torchrun(path, [json.dumps(runs)])
    assert result.status == 0, result.err
    return folder


def replay(patch: pytest.MonkeyPatch, drawn: list[list[dict]]) -> list[bool]:
    """Lets a run take these answers, update by update, for its own. Returns whether its own were the same ones.

    Where the weights agree to the last bits but one, now and then a draw falls between two tokens.
    """
    own_call, same = Roller.__call__, []

    def called(roller, data, numbers, each, temperature, step):
        own = own_call(roller, data, numbers, each, temperature, step)
        if temperature == 0:  # a validation
            return own
        answers = [Answer(**facts) for facts in drawn[step]]
        assert [(answer.question, answer.prompt) for answer in answers] == [(a.question, a.prompt) for a in own]
        same.extend(a.tokens == b.tokens for a, b in zip(answers, own, strict=True))
        return answers

    patch.setattr(Roller, "__call__", called)
    return same


# ------------------------------------------------------------------------------------------------------ drawing answers


@pytest.fixture
def run(restored_process):
    return utils.Run("cpu", "float32", 7, keep_memory=False)


@pytest.fixture(scope="module")
def data(material, tokenizer):
    return PromptDataset(material.questions, tokenizer, WIDTH, split="all", max_new_tokens=LONGEST)


ASKED = [3, 0, 9, 7, 11]  # prompts of five lengths


def roll(model, tokenizer, run, data, slots=64, each=4, temperature=1.0, step=5, asked=ASKED) -> list[Answer]:
    return Roller(model, tokenizer, run, slots, WIDTH, LONGEST)(data, asked, each, temperature, step)


def test_an_answer_is_what_was_drawn(tokenizer, run, data):
    answers = roll(tiny_model(), tokenizer, run, data, each=8)
    assert [answer.question for answer in answers] == sum([[number] * 8 for number in ASKED], [])
    assert len({len(answer.prompt) for answer in answers}) == len(ASKED)
    ended = [answer.record["ended"] for answer in answers]
    assert 8 < sum(ended) < 32
    for answer in answers:
        record = answer.record
        assert answer.prompt == data[answer.question]["ids"] and len(answer.tokens) == len(answer.logps)
        assert record | data[answer.question]["record"] == record
        assert (record["tokens"], record["max_new_tokens"]) == (len(answer.tokens), LONGEST)
        # The end of an answer is one of its tokens, and no part of its text.
        assert (answer.tokens[-1] == tokenizer.eos_token_id) == record["ended"]
        assert record["ended"] or len(answer.tokens) == LONGEST
        spoken = answer.tokens[:-1] if record["ended"] else answer.tokens
        assert tokenizer.eos_token_id not in spoken
        assert answer.text == tokenizer.decode(spoken) and "<|im_end|>" not in answer.text


def test_draws_depend_on_seed_step_and_question_alone(tokenizer, run, data):
    model = tiny_model()
    tokens = {
        name: [answer.tokens for answer in roll(model, tokenizer, run, data, **changes)]
        for name, changes in {
            "once": {}, "again": {}, "few slots": {"slots": 3}, "another step": {"step": 6},
            "another order": {"asked": ASKED[::-1]}, "fewer": {"each": 2},
        }.items()
    }  # fmt: skip
    once = tokens["once"]
    assert len({tuple(t) for t in once}) > 15  # the answers to one question differ
    assert once == tokens["again"] == tokens["few slots"]
    assert all(a != b for a, b in zip(once, tokens["another step"], strict=True) if len(a) > 3 < len(b))
    in_groups = [once[start : start + 4] for start in range(0, len(once), 4)]
    assert sum(in_groups[::-1], []) == tokens["another order"]
    assert sum([group[:2] for group in in_groups], []) == tokens["fewer"]
    run.seed += 1
    assert [answer.tokens for answer in roll(model, tokenizer, run, data)] != once


def test_temperature_0_says_the_likeliest(tokenizer, run, data):
    model = tiny_model().eval()
    for answer in roll(model, tokenizer, run, data, each=1, temperature=0.0):
        prompt = torch.tensor([answer.prompt])
        end = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        mask = torch.ones_like(prompt)
        out = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=LONGEST, **end)
        assert out[0].tolist() == answer.prompt + answer.tokens


def test_weights_are_taken_over_before_each_drawing(tokenizer, run, data):
    model = tiny_model()
    roller = Roller(model, tokenizer, run, 64, WIDTH, LONGEST)
    before = [answer.tokens for answer in roller(data, ASKED, 2, 1.0, 0)]
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.3 * torch.randn_like(model.model.embed_tokens.weight)
    after = [answer.tokens for answer in roller(data, ASKED, 2, 1.0, 0)]
    assert before != after == [a.tokens for a in roll(model, tokenizer, run, data, each=2, step=0)]


# ------------------------------------------------------------------------------------------------------- packed answers

FIRST_ANSWER_TOKEN = 1000  # in made-up answers, tokens of prompts are below


def made_up_answers(lengths: list[tuple[int, int]]) -> list[Answer]:
    rng = random.Random(0)
    return [
        Answer(
            prompt=[rng.randint(1, FIRST_ANSWER_TOKEN - 1) for _ in range(prompt)],
            tokens=[rng.randint(FIRST_ANSWER_TOKEN, 6399) for _ in range(tokens)],
            logps=[-rng.random() for _ in range(tokens)],
            text="", record={}, question=0,
        )
        for prompt, tokens in lengths
    ]  # fmt: skip


def other_ranks(*needed: int) -> SimpleNamespace:
    """This rank, the first, among others that need so many micro-batches."""
    return SimpleNamespace(
        rank=0,
        world_size=1 + len(needed),
        device=torch.device("cpu"),
        sum_ranks=lambda n: n + torch.tensor([0, *needed]),
    )


LENGTHS = [(5, 3), (12, 12), (1, 1), (9, 1), (2, 20), (20, 4), (7, 7), (3, 2), (1, 23), (6, 6), (10, 9)]


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_packed_answers_are_the_naive_rows(rows):
    answers = made_up_answers(LENGTHS)
    micros, held = pack_answers(answers, 24, rows, pad=0, run=other_ranks())
    assert sorted(sum(held, [])) == list(range(len(answers)))
    # No fewer rows than the tokens need, and little more.
    used = sum(int((micro["documents"][:, 0] >= 0).sum()) for micro in micros)
    assert math.ceil(sum(map(sum, LENGTHS)) / 24) <= used <= 9 and len(micros) == math.ceil(used / rows)
    for micro, numbers in zip(micros, held, strict=True):
        assert all(micro[name].shape == (rows, 24) for name in ("input_ids", "position_ids", "documents"))
        scored, found = [], []
        for b, (ids, positions, documents) in enumerate(
            zip(*(micro[name].tolist() for name in ("input_ids", "position_ids", "documents")), strict=True)
        ):
            at = 0
            while at < 24 and documents[at] >= 0:
                number = numbers[len(found)]
                whole = answers[number].prompt + answers[number].tokens
                here = slice(at, at + len(whole))
                assert ids[here] == whole and positions[here] == list(range(len(whole)))
                assert len(set(documents[here])) == 1 and documents.count(documents[at]) == len(whole)
                for i, token in enumerate(answers[number].tokens):  # each from the position before it
                    place = b * 24 + at + len(answers[number].prompt) + i - 1
                    scored.append((place, token, number, answers[number].logps[i]))
                found.append(number)
                at += len(whole)
            assert set(ids[at:]) <= {0} and set(documents[at:]) <= {-1}
        assert found == numbers
        columns = [micro[name].tolist() for name in ("head_positions", "targets", "answers", "old_logps")]
        assert [place for place, *_ in scored] == columns[0]
        assert [token for _, token, *_ in scored] == columns[1]
        assert [number for *_, number, _ in scored] == columns[2]
        assert [logp for *_, logp in scored] == pytest.approx(columns[3], rel=1e-6)
        assert min(columns[1]) >= FIRST_ANSWER_TOKEN  # no token of a prompt is ever scored


def test_all_ranks_get_the_same_number_of_micro_batches(run):
    answers = made_up_answers(LENGTHS[:4])
    alone, held = pack_answers(answers, 24, 2, 0, other_ranks())
    micros, filled = pack_answers(answers, 24, 2, 0, other_ranks(len(alone) + 2, 1))
    assert len(micros) == len(alone) + 2 and filled == [*held, [], []]
    for micro, expected in zip(micros, alone, strict=False):
        assert all(torch.equal(micro[name], expected[name]) for name in expected)
    nothing, nobody = pack_answers([], 24, 2, 0, other_ranks(1))
    assert nobody == [[]] and len(nothing) == 1
    model = tiny_model()
    for micro in [*micros[len(alone) :], *nothing]:  # padding: counts nothing, yet moves gradients to all weights
        assert (micro["documents"] == -1).all() and micro["targets"].tolist() == [IGNORE]
        logps, entropy, _ = answer_logps(model, run, micro, 1.0)
        assert logps.tolist() == entropy.tolist() == [0.0]
        loss, clipped = policy_loss(logps, micro["old_logps"], torch.zeros(1), "clip", 0.2, 0.2)
        assert loss.tolist() == [0.0] and not clipped.any()
        model.zero_grad()
        (loss * (micro["targets"] >= 0)).sum().backward()
        assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampling_and_training_agree_on_every_token(moe, temperature, tokenizer, run, data):
    """And both with the plain model on each sequence alone, so that the first ratio of an update is 1."""
    model = tiny_model(use_moe=moe)
    answers = roll(model, tokenizer, run, data, slots=6, temperature=temperature)
    micros, held = pack_answers(answers, WIDTH, 2, tokenizer.pad_token_id, run)
    assert len(micros) > 2
    for micro, numbers in zip(micros, held, strict=True):
        with torch.no_grad():
            logps, entropy, _ = answer_logps(model, run, micro, temperature)
            log_probs = torch.cat([lone_logits(model, answers[number], temperature) for number in numbers])
        tokens = torch.tensor(sum([answers[number].tokens for number in numbers], []))
        expected = log_probs[torch.arange(len(tokens)), tokens]
        assert expected.std() > 0.5  # some were likely, some were not
        assert ((logps - micro["old_logps"]).exp() - 1).abs().max() < 2e-4
        assert (logps - expected).abs().max() < 1e-4
        assert (entropy + (log_probs.exp() * log_probs).sum(-1)).abs().max() < 1e-3
        loss, clipped = policy_loss(logps, micro["old_logps"], torch.ones(len(logps)), "clip", 0.01, 0.01)
        assert (loss + 1).abs().max() < 2e-4 and not clipped.any()


# ----------------------------------------------------------------------------------------------------------- the losses


def loss_by_hand(kind: str, logp: float, old: float, advantage: float, low: float, high: float):
    """(loss, its derivative by logp, whether clipping acts), in Python's floats, case by case."""
    ratio = math.exp(logp - old)
    if kind == "cispo":
        weight = min(ratio, 1 + high)
        return -weight * advantage * logp, -weight * advantage, ratio > 1 + high and advantage != 0
    if advantage > 0 and ratio > 1 + high:
        return -(1 + high) * advantage, 0.0, True
    if advantage < 0 and ratio < 1 - low:
        return -(1 - low) * advantage, 0.0, True
    return -ratio * advantage, -ratio * advantage, False


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.2, 0.5), (0.0, 0.1), (1.0, 3.0)])
@pytest.mark.parametrize("kind", ["clip", "cispo"])
def test_policy_loss_by_hand(kind, low, high):
    """Ratios inside and outside of the bounds, each with advantages of both signs and none."""
    ratios = [0.01, 0.5, 0.79, 0.81, 1.0, 1.09, 1.11, 1.19, 1.21, 1.49, 1.51, 2.0, 3.9, 4.1]
    cases = [
        (old + math.log(ratio), old, advantage)
        for ratio in ratios
        for old in (-6.5, -0.3)
        for advantage in (1.3, 0.2, 0.0, -0.4, -2.0)
    ]
    logps, old_logps, advantages = torch.tensor(cases, dtype=torch.float64).unbind(1)
    logps = logps.clone().requires_grad_()
    loss, clipped = policy_loss(logps, old_logps, advantages, kind, low, high)
    loss.sum().backward()
    expected = [loss_by_hand(kind, *case, low, high) for case in cases]
    assert loss.tolist() == pytest.approx([e[0] for e in expected], rel=1e-12, abs=1e-12)
    assert logps.grad.tolist() == pytest.approx([e[1] for e in expected], rel=1e-12, abs=1e-12)
    assert clipped.tolist() == [e[2] for e in expected] and 0 < int(clipped.sum()) < len(cases)


def test_kl_estimate_against_the_exact_kl():
    torch.manual_seed(0)
    policy, base = (torch.randn(8, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    exact = float((policy.exp() * (policy - base)).sum())
    drawn = torch.multinomial(policy.exp(), 40_000, replacement=True)
    estimates = kl_estimate(policy[drawn], base[drawn])
    deviation = float(estimates.std()) / math.sqrt(len(drawn))
    assert exact > 0.3 and deviation < 0.02 * exact
    assert float(estimates.mean()) == pytest.approx(exact, abs=4 * deviation)
    assert (estimates >= 0).all() and (estimates > 0).any()
    assert kl_estimate(policy, policy).tolist() == [0.0] * 8
    small = kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.001])).item()  # d²/2, in float32
    assert small == pytest.approx(0.5e-6, rel=1e-2)
    logps = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    kl_estimate(logps, torch.tensor([-1.5, -1.0, -0.5])).sum().backward()
    assert logps.grad.tolist() == pytest.approx([1 - math.exp(-0.5), 1 - math.exp(1), 0.0], rel=1e-12)


# -------------------------------------------------------------------------------------------------- rewards and samples


def test_rewards_see_reply_and_record_and_a_rank_without_answers_asks_nobody(tokenizer, run, data):
    answers, seen = roll(tiny_model(), tokenizer, run, data, each=2), []

    def rate(replies, records):
        seen.extend(zip(replies, records, strict=True))
        return [float(record["tokens"]) for record in records]

    rewards = [*parse_rewards(["length:0.5"]), Reward("seen", 2.0, rate)]
    parts = rewarded(rewards, answers)
    assert seen == [(answer.text, answer.record) for answer in answers]
    assert parts["seen"] == [len(answer.tokens) for answer in answers]
    assert parts["reward"] == [0.5 * a + 2 * b for a, b in zip(parts["length"], parts["seen"], strict=True)]
    seen.clear()
    nobody = [Reward("model:x", 1.0, lambda replies, records: 1 / 0)]
    assert rewarded([*rewards, *nobody], []) == {"length": [], "seen": [], "model:x": [], "reward": []}


def test_samples_after_a_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "samples.jsonl"
    forget_samples(tmp_path, 0)
    assert not path.exists()
    text = "一\u2028two\x85\nthree"  # more line ends than JSON Lines has
    answers = [Answer([1], [2], [0.0], text, {"question": "q", "answer": None}, 0) for _ in range(3)]
    for step in (2, 4, 6):
        write_samples(tmp_path, step, answers, {"reward": [1 / 3, 0.0, 1.0]}, 2)
    whole = path.read_bytes()
    assert whole.count(b"\n") == 6 and "一" in whole.decode("utf-8")
    with open(path, "ab") as f:
        f.write(b'{"step": 6, "quest')  # a power cut
    forget_samples(tmp_path, 4)
    kept = path.read_bytes()
    assert whole.startswith(kept) and kept.count(b"\n") == 4
    first = json.loads(kept.split(b"\n")[0])
    assert first == {"step": 2, "question": "q", "reply": text, "reward": 0.3333, "truth": None}
