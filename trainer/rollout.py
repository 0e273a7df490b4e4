"""Answers that the model writes while it is trained, for GRPO and PPO: sampled on the lean decoder, packed into rows.

A token that was drawn is an action: the `<|im_end|>` that ends an answer included, nothing of the prompt. What
sampling and training call its log-probability is the same number: log softmax(logits / temperature), no cuts, no
penalties; the first ratio of an update is 1 within rounding.

Legend: B rows of a micro-batch · T tokens of a row · N answer tokens of a micro-batch · A answers of this rank.

中文：训练过程中由模型自己写出的回答：批量采样，再装箱成满行；只对回答部分的词元计分。
"""

import argparse
import functools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dataset.lm_dataset import IGNORE
from dataset.packing import pack_best_fit
from dataset.stage_datasets import PromptDataset
from model.files import atomic_open
from model.generation import Decoder, Sampling, stop_ids
from trainer.command_line import UserError
from trainer.rewards import Reward, score
from trainer.trainer_utils import Run, load_splits


def load_prompts(args: argparse.Namespace, tokenizer, run: Run) -> tuple[PromptDataset, PromptDataset]:
    """Questions to train on and held-out ones, as far as they leave room for an answer.  Raises: UserError."""
    lengths = f"--max_new_tokens {args.max_new_tokens} in --max_seq_len {args.max_seq_len}"
    cure = "lower the one or raise the other"
    if args.max_new_tokens >= args.max_seq_len:
        raise UserError(f"{lengths} leaves no room for a prompt: {cure}.")
    data, held_out = load_splits(
        functools.partial(PromptDataset, max_new_tokens=args.max_new_tokens), args, tokenizer, run
    )
    if len(data) == 0 and data.stats["dropped"]:
        raise UserError(f"{args.data_path}: nothing to train on. {lengths} leaves no prompt enough room: {cure}.")
    return data, held_out


@dataclass
class Answer:
    """One answer to a prompt. logps: of each token, as it was drawn; ended: by itself, not by the limit."""

    prompt: list[int]
    tokens: list[int]
    logps: list[float]
    text: str
    record: dict  # what the rewards see
    question: int  # number of the prompt in the data


class Roller:
    """Samples answers to prompts with the weights as they are now.

    Same seed, step, prompt and number, same random draws: an interrupted run goes on as it would have.
    """

    def __init__(self, model: nn.Module, tokenizer, run: Run, slots: int, max_seq_len: int, max_new_tokens: int):
        # On a CPU in float32: bfloat16 would save a tenth of a run's time and was not shown to learn as well (LOG.md).
        dtype = torch.float32 if run.device.type == "cpu" else run.dtype
        self.decoder = Decoder(model, slots, max_seq_len, dtype=dtype)
        self.tokenizer, self.seed, self.max_new_tokens = tokenizer, run.seed, max_new_tokens
        self.stop, self.pad = frozenset(stop_ids(model, tokenizer)), tokenizer.pad_token_id

    def __call__(
        self, data: Sequence[dict], numbers: Sequence[int], each: int, temperature: float, step: int
    ) -> list[Answer]:
        """`each` answers to every prompt, those to one prompt side by side.

        Args: numbers of prompts in the data; temperature 0: the likeliest tokens.
        Raises: WeightsError when the model's output is not a number.
        """
        self.decoder.refresh()
        asked = [(number, i) for number in numbers for i in range(each)]
        samplings = [
            Sampling(
                temperature=temperature,
                max_new_tokens=self.max_new_tokens,
                stop_ids=self.stop,
                seed=random.Random(f"{self.seed} {step} {number} {i}").getrandbits(62),
                logps=True,
            )
            for number, i in asked
        ]
        requests = self.decoder.generate([data[number]["ids"] for number, _ in asked], samplings)
        answers = []
        for (number, _), request in zip(asked, requests, strict=True):
            text = self.tokenizer.decode(request.answer, skip_special_tokens=False)
            facts = {
                "ended": request.finish_reason == "stop",
                "tokens": len(request.tokens),
                "max_new_tokens": self.max_new_tokens,
            }
            record = {**data[number]["record"], **facts}
            answers.append(Answer(request.prompt, request.tokens, request.tempered_logps, text, record, number))
        return answers


def rewarded(rewards: Sequence[Reward], answers: Sequence[Answer]) -> dict[str, list[float]]:
    """The parts of the reward and, under "reward", their weighted sum, for each answer.  Raises: UserError."""
    if not answers:  # a rank for which no question is left; a reward model may not know what to do with nothing
        return {name: [] for name in (*(reward.name for reward in rewards), "reward")}
    return score(rewards, [answer.text for answer in answers], [answer.record for answer in answers])


def pack_answers(
    answers: Sequence[Answer], width: int, rows: int, pad: int, run: Run
) -> tuple[list[dict[str, Tensor]], list[list[int]]]:
    """Micro-batches of `rows` rows of `width` tokens that hold all answers behind their prompts, and which those are.

    Each holds input_ids, position_ids, documents (B, T) as a data set's rows do; head_positions (N,), the positions b·T
    + t from which an answer's tokens are predicted, the tokens themselves in `targets` (N,), their log-probabilities
    when drawn in `old_logps` (N,); `answers` (N,), the number of the answer each belongs to, in 0 … A − 1. An answer's
    tokens stand together, in order. All ranks get the same number of micro-batches, the last ones may be padding.

    Returns: micro-batches, and for each the numbers of its answers in the order of their tokens.
    """
    order, borders = pack_best_fit(
        np.array([len(a.prompt) + len(a.tokens) for a in answers], dtype=np.int64), width, np.random.default_rng(0)
    )
    needed = torch.tensor([0] * run.world_size)
    needed[run.rank] = -(-(len(borders) - 1) // rows)
    micros, held = [], []
    for m in range(int(run.sum_ranks(needed).max())):
        ids = np.full((rows, width), pad, dtype=np.int64)
        positions, documents = np.zeros_like(ids), np.full_like(ids, -1)
        heads, targets, logps, owners, here = [], [], [], [], []
        for b in range(min(rows, len(borders) - 1 - m * rows)):
            first, last = borders[m * rows + b : m * rows + b + 2]
            at = 0
            for document, number in enumerate(order[first:last].tolist()):
                answer = answers[number]
                start, end = at + len(answer.prompt), at + len(answer.prompt) + len(answer.tokens)
                ids[b, at:end] = answer.prompt + answer.tokens
                positions[b, at:end] = np.arange(end - at)
                documents[b, at:end] = document
                heads.append(np.arange(start - 1, end - 1) + b * width)
                targets += answer.tokens
                logps += answer.logps
                owners += [number] * len(answer.tokens)
                here.append(number)
                at = end
        if not heads:  # padding: one position that counts nothing
            heads, targets, logps, owners = [np.zeros(1, np.int64)], [IGNORE], [0.0], [0]
        micro = {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(positions),
            "documents": torch.from_numpy(documents),
            "head_positions": torch.from_numpy(np.concatenate(heads)),
            "targets": torch.tensor(targets),
            "answers": torch.tensor(owners),
            "old_logps": torch.tensor(logps, dtype=torch.float32),
        }
        micros.append({name: tensor.to(run.device) for name, tensor in micro.items()})
        held.append(here)
    return micros, held


def policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, kind: str, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """The loss of each token, and 1 where clipping took its gradient or its weight; ρ = exp(logps − old_logps).

        clip:   − min(ρ·A, clamp(ρ, 1 − low, 1 + high)·A)                (Schulman et al. 2017, arXiv:1707.06347)
        cispo:  − stop_gradient(min(ρ, 1 + high))·A·log π                (MiniMax 2025, arXiv:2506.13585)

    high > low is "clip-higher" (Yu et al. 2025, arXiv:2503.14476).  Shape: (N,) each → (N,), (N,).
    """
    ratio = (logps - old_logps).exp()
    if kind == "cispo":
        clipped = (ratio > 1 + clip_high) & (advantages != 0)
        return -ratio.clamp(max=1 + clip_high).detach() * advantages * logps, clipped
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    clipped = torch.where(advantages > 0, ratio > 1 + clip_high, (ratio < 1 - clip_low) & (advantages < 0))
    return -torch.minimum(ratio * advantages, bounded * advantages), clipped


def kl_estimate(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """KL(π ‖ π_ref) of each token from the one that was drawn: e^d − d − 1 with d = log π_ref − log π.

    Unbiased, never negative, of little variance (Schulman 2020, "Approximating KL divergence", k3).  Shape: (N,).
    """
    difference = reference_logps - logps
    return torch.expm1(difference) - difference  # e^d − 1 by itself would round a small d away


def write_samples(
    folder: Path, step: int, answers: Sequence[Answer], parts: dict[str, list[float]], count: int
) -> None:
    """Appends the first answers of an update to samples.jsonl in the run folder, for people to read."""
    with open(folder / "samples.jsonl", "a", encoding="utf-8", newline="\n") as f:
        for i, answer in enumerate(answers[:count]):
            figures = {name: round(values[i], 4) for name, values in parts.items()}
            line = {"step": step, "question": answer.record["question"], "reply": answer.text, **figures}
            f.write(json.dumps(line | {"truth": answer.record["answer"]}, ensure_ascii=False) + "\n")


def forget_samples(folder: Path, step: int) -> None:
    """Drops the samples after the resumed step, so that the file tells one uninterrupted run."""
    path = folder / "samples.jsonl"
    if not path.is_file():
        return
    with open(path, encoding="utf-8", newline="\n") as f:
        lines = [line for line in f if line.endswith("\n")]  # the last one may have been cut off
    with atomic_open(path, "w") as f:
        f.writelines(line for line in lines if json.loads(line)["step"] <= step)
