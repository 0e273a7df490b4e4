r"""The rewards of GRPO and PPO: small functions of a reply and its record, chosen and weighed on the command line.

    --rewards answer format:0.2 length:0.1 model:out/reward_512.pth:0.5        NAME or NAME:WEIGHT, weight 1 if none

| name       | range   | what it rewards                                                                         |
|------------|---------|-----------------------------------------------------------------------------------------|
| answer     | 0 or 1  | the answer is the truth of the record: the right number, or the same words              |
| format     | 0 or 1  | exactly <think>\n…\n</think>\n<answer>\n…\n</answer>, ended by the model itself         |
| length     | −1 … 0  | falls from half of max_new_tokens on; −1 for a reply that the limit cut off             |
| repetition | −1 … 0  | minus the share of groups of four words (in Chinese, characters) that came before       |
| model:PATH | any     | the score of a reward model: a file of train_reward.py or a transformers folder         |

A reply is the text the model wrote, with tags such as <think>, without <|im_end|>. A prompt that already opened the
thought has to lend its <think> to the reply. A record holds

    answer   str | None   the truth                 ended           bool  the model itself wrote <|im_end|>
    question str          the last user turn        tokens          int   length of the reply
    messages list         optional: all turns of    max_new_tokens  int   the limit it was sampled under
                          the prompt, for a model

Replies are written by a policy that looks for the cheapest reward. So what is doubtful counts nothing (two numbers for
one, an answer that never closes, an <answer> after the first), and no pattern takes more than linear time.

中文：GRPO 和 PPO 的奖励函数，在命令行上按名字和权重选用；凡有歧义的回答一律不给分。
"""

import argparse
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property, partial
from pathlib import Path

from dataset.make_demo_data import ENDS, normalise
from trainer.command_line import UserError, number

Rule = Callable[[str, dict], float]  # (reply, record) → reward
BatchRule = Callable[[Sequence[str], Sequence[dict]], Sequence[float]]
Scorer = Callable[[list[list[dict]]], list[float]]  # conversations → scores

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)  # what never closes is all thought
TAGGED = re.compile(r"<think>\n(.+?)\n</think>\n<answer>\n(.+?)\n</answer>", re.DOTALL)
WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"  # 1,000 or 1000
NUMBER = re.compile(rf"[-+]?(?:{WHOLE}(?:\.[0-9]+)?|\.[0-9]+)")
MINUS = re.compile(r"(?:−|(?:负|minus|negative) ?)(?=[0-9.])")
LONGEST_ANSWER = 10_000  # characters; NFKC takes quadratic time on piled-up accents

# A word is cut after 16 letters, so that `hahahaha…` repeats itself too; Han and kana have no blanks between words.
HAN = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
UNIT = re.compile(rf"[{HAN}]|[^\W{HAN}]{{1,16}}|[^\w\s]")
GRAM = 4
CURE = "Correct the function or the model behind it, or leave it out of --rewards."


def said(reply: str) -> str:
    """The answer in a reply: its first <answer> block or, where none opens, all that is outside of the thought."""
    spoken = THOUGHT.sub(" ", reply).rpartition("</think>")[2]
    _, opened, rest = spoken.partition("<answer>")
    text, closed, _ = rest.partition("</answer>")  # str.partition, as `<answer>(.*?)</answer>` can take quadratic time
    if opened:
        return text.strip() if closed else ""
    return spoken.strip()


def numbers(text: str) -> tuple[list[Decimal], str]:
    """(the numbers of a text, exact at any length; what is left of the text without them)."""
    flat = MINUS.sub("-", unicodedata.normalize("NFKC", text).lower())
    return [Decimal(found.replace(",", "")) for found in NUMBER.findall(flat)], NUMBER.sub(" ", flat)


def answer(reply: str, record: dict) -> float:
    """1 for the truth, else 0. Against a number: the one number in the answer, whatever stands around it
    (`1,000 yuan` = `1000.0`). Against any other text: equal by the demo data's `normalise`.

    Raises: UserError for a record without an answer.
    """
    truth = record.get("answer")
    if not isinstance(truth, str) or not truth.strip():
        asked = shortened(record.get("question") or "")
        raise UserError(
            f"--rewards answer: the record with the question {asked} has the answer {truth!r}; give each record of the "
            'data an "answer" to compare with, or leave answer out of --rewards.'
        )
    text = said(reply)
    if len(text) > LONGEST_ANSWER + 10 * len(truth):
        return 0.0
    expected, around = numbers(truth)
    if len(expected) == 1 and not around.strip(ENDS):
        return float(numbers(text)[0] == expected)
    # A truth of nothing but punctuation keeps it: no empty reply equals it.
    return float((normalise(text) or text) == (normalise(truth) or truth.strip()))


def format(reply: str, record: dict) -> float:
    """1 for the form of the reasoning data to the letter, with something in both blocks, ended by the model; else 0."""
    if not record["ended"] or any(reply.count(tag) != 1 for tag in TAGS):  # each tag once: TAGGED takes linear time
        return 0.0
    match = TAGGED.fullmatch(reply)
    return float(match is not None and all(block.strip() for block in match.groups()))


def length(reply: str, record: dict) -> float:
    """min(0, 1 − 2·tokens/max_new_tokens), −1 when cut off: the overlong penalty of DAPO (Yu et al. 2025,
    arXiv:2503.14476, "Soft Overlong Punishment") with half of the limit as its buffer."""
    if not record["ended"]:
        return -1.0
    return max(-1.0, min(0.0, 1 - 2 * record["tokens"] / record["max_new_tokens"]))


def repetition(reply: str, record: dict) -> float:
    """Distinct groups of four units / all of them − 1. A unit: a Chinese character, another word, a mark."""
    units = UNIT.findall(reply.lower())
    grams = list(zip(*(units[start:] for start in range(GRAM)), strict=False))
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


RULES: dict[str, Rule] = {"answer": answer, "format": format, "length": length, "repetition": repetition}


@dataclass(frozen=True)
class Reward:
    """One part of the reward: `rate` gives a number per reply, for a whole batch at once."""

    name: str
    weight: float
    rate: BatchRule


def one_by_one(rule: Rule, replies: Sequence[str], records: Sequence[dict]) -> list[float]:
    return [rule(reply, record) for reply, record in zip(replies, records, strict=True)]


def our_loader(path: str, device: str) -> Scorer:
    from trainer.reward_model import load_reward_model

    return load_reward_model(path, device)


class LazyModel:
    """A reward model as a BatchRule, loaded when it first scores: wrong flags show before gigabytes are read."""

    def __init__(self, path: str, device: str, load: Callable[[str, str], Scorer]):
        self.path, self.device, self.load = path, device, load

    @cached_property
    def scorer(self) -> Scorer:
        return self.load(self.path, self.device)

    def __call__(self, replies: Sequence[str], records: Sequence[dict]) -> list[float]:
        conversations = []
        for reply, record in zip(replies, records, strict=True):
            prompt = record.get("messages") or [{"role": "user", "content": record["question"]}]
            conversations.append([*prompt, {"role": "assistant", "content": reply}])
        return self.scorer(conversations)


def path_and_weight(rest: str) -> tuple[str, str, str]:
    """What follows `model:`, as (path, ":" or nothing, weight or nothing)."""
    path, colon, weight = rest.rpartition(":")
    if not colon or weight.startswith(("\\", "/")):  # no weight; the colon is that of C:\models
        return rest, "", ""
    return path, colon, weight


def short_name(reward: Reward) -> str:
    """Of a model the file alone: `out/reward_512.pth`, `C:\\out\\reward_512.pth` → `model:reward_512`."""
    if not isinstance(reward.rate, LazyModel):
        return reward.name
    return "model:" + re.split(r"[\\/]", reward.rate.path.rstrip("\\/"))[-1].removesuffix(".pth")


def whole_paths(words: Sequence[str]) -> list[str]:
    """The words after --rewards with whole paths of models, for a run that is resumed from another folder."""
    whole = []
    for word in words:
        kind, _, rest = word.partition(":")
        path, _, weight = path_and_weight(rest)
        found = kind == "model" and path and Path(path).exists()
        # With a weight in any case: a folder above may have a colon in its name.
        whole.append(f"model:{Path(path).absolute()}:{weight or 1}" if found else word)
    return whole


def parse_rewards(
    words: Sequence[str], device: str = "cpu", load_model: Callable[[str, str], Scorer] = our_loader
) -> list[Reward]:
    """The words after --rewards as rewards. A weight of 0 is allowed: such a part is only logged.

    Raises: UserError naming the word.
    """
    rewards: list[Reward] = []
    for word in words:
        name, colon, rest = word.partition(":")
        if name == "model":
            path, colon, weight = path_and_weight(rest)
            if not path:
                raise UserError(f"--rewards {word}: expected model:PATH, for example model:out/reward_512.pth:0.5.")
            name, rate = f"model:{path}", LazyModel(path, device, load_model)
        elif name in RULES:
            weight, rate = rest, partial(one_by_one, RULES[name])
        else:
            raise UserError(f"--rewards {word}: there is no reward {name!r}; expected {', '.join(RULES)}, model:PATH.")
        try:
            value = number(float, 0)(weight) if colon else 1.0
        except argparse.ArgumentTypeError as error:
            hint = f" (after a path with a colon, give the weight too: {word}:1)" if isinstance(rate, LazyModel) else ""
            raise UserError(f"--rewards {word}: the weight: {error}, as in {name}:0.5{hint}.") from error
        if any(name == other.name for other in rewards):
            raise UserError(f"--rewards names {name} twice; give it once, with the weight it should have.")
        rewards.append(Reward(name, value, rate))
    if not any(reward.weight for reward in rewards):
        raise UserError("--rewards needs a reward with a weight above 0, for example --rewards answer format:0.2.")
    short = Counter(map(short_name, rewards))  # files of one name keep their paths
    return [replace(r, name=short_name(r)) if short[short_name(r)] == 1 else r for r in rewards]


def check_rewards(rewards: Sequence[Reward], records: Iterable[dict]) -> None:
    """Loads the reward models and looks at the records of the data, now and not in the middle of a run.

    Raises: UserError, WeightsError.
    """
    for reward in rewards:
        if isinstance(reward.rate, LazyModel):
            reward.rate.scorer  # noqa: B018 - read once, it is loaded
        elif reward.name == "answer":
            for record in records:
                answer("", record)


def model_paths(rewards: Sequence[Reward]) -> list[Path]:
    return [Path(reward.rate.path) for reward in rewards if isinstance(reward.rate, LazyModel)]


def shortened(text: str) -> str:
    line = " ".join(text[:300].split())
    return repr(line if len(line) <= 80 and len(text) <= 300 else line[:80] + "…")


def finite(value: object, what: str, reply: str) -> float:
    # Compared with the largest float, as isfinite() itself fails on an int beyond it.
    if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max:
        return float(value)
    got = f"{value!r} ({type(value).__name__})"[:80]
    raise UserError(f"{what} gave {got} for the reply {shortened(reply)}; expected a finite number. {CURE}")


def score(rewards: Sequence[Reward], replies: Sequence[str], records: Sequence[dict]) -> dict[str, list[float]]:
    """Each reward's numbers by its name, unweighted, and under "reward" Σ weight · number; in the order of the replies.

    Raises: UserError when a reward gives anything but one finite number per reply.
    """
    parts: dict[str, list[float]] = {}
    total = [0.0] * len(replies)
    for reward in rewards:
        values = list(reward.rate(replies, records))
        if len(values) != len(replies):
            raise UserError(f"the reward {reward.name} gave {len(values)} numbers for {len(replies)} replies. {CURE}")
        part = [finite(value, f"the reward {reward.name}", reply) for value, reply in zip(values, replies, strict=True)]
        total = [before + reward.weight * value for before, value in zip(total, part, strict=True)]
        parts[reward.name] = part
    return {
        **parts,
        "reward": [finite(value, "the weighted sum", reply) for value, reply in zip(total, replies, strict=True)],
    }
