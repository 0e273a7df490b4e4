"""Texts longer than those of training: loss by position, with and without stretched rotary positions.

Rows of 8 × the training length L are read as the weights are, and with each way of `rope_scaling` (linear, NTK, YaRN;
model/model_minimind.py has the equations). Stretching costs something on short texts, so it is switched on only where
a text is longer: tokens of the positions up to L are scored without it, those up to 2L with factor 2, up to 4L with
factor 4, up to 8L with factor 8. Within the training length all ways agree by construction. What a factor of 8 for all
texts would cost there is given apart ("fixed").

A document of 8L + 1 tokens or more is cut into rows; shorter ones are joined, <|im_end|><|im_start|> between them, as
many as it takes. A row of joined ones tells how the model bears distance, not whether it uses it.

中文：长上下文评测：按位置统计损失，比较不缩放与 linear、NTK、YaRN 三种 RoPE 缩放，直到训练长度的 8 倍。
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from model.model_minimind import MiniMindForCausalLM
from scripts.evaluating.scoring import Item, encode, first_token, score
from trainer.command_line import UserError

WAYS = ("none", "linear", "ntk", "yarn")
FACTORS = (1, 2, 4, 8)
BINS = 4  # points of the curve within the training length, and within each doubling beyond


@contextlib.contextmanager
def stretched(model: MiniMindForCausalLM, way: str, factor: int, trained: int) -> Iterator[None]:
    """The model with `rope_scaling` for the time being: its rotary tables are computed anew in every pass."""
    before = model.config.rope_scaling
    if way != "none" and factor > 1:
        scaling = {"type": way, "factor": float(factor), "original_max_position_embeddings": trained}
        model.config.rope_scaling = scaling
    try:
        yield
    finally:
        model.config.rope_scaling = before


def long_rows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, length: int, most: int
) -> tuple[np.ndarray, int]:
    """(rows of tokens, how many of them are from one document). Documents long enough come first.

    Shape: (rows, length + 1) int64.  Raises: UserError when the texts do not fill one row.
    """
    first = first_token(tokenizer)
    last = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else first
    size, rows, joined = length + 1, [], []
    short = []
    for ids in encode(tokenizer, texts):
        ids = [first, *ids]
        if len(ids) < size:
            short.append(ids)
        rows += [ids[at : at + size] for at in range(0, len(ids) - size + 1, size)][: most - len(rows)]
    single = len(rows)
    for ids in short:
        if len(rows) == most:
            break
        joined += [*ids, last]
        while len(joined) >= size and len(rows) < most:
            rows.append(joined[:size])
            joined = joined[size:]
    if not rows:
        raise UserError(
            f"the texts hold {len(joined)} tokens, one row of 8 training lengths needs {size}: name longer ones with "
            "--text, leave out --held_out, or give a smaller --train_len."
        )
    return np.array(rows), single


def losses(model: MiniMindForCausalLM, rows: np.ndarray, batch_tokens: int, title: str) -> np.ndarray:
    """−log p of each token but the first, in nats.  Shape: (rows, n + 1) → (rows, n) float64."""
    items = [Item(row[:1], [row[1:]]) for row in rows.tolist()]
    return np.array([-found.numpy().astype(np.float64) for (found,) in score(model, items, batch_tokens, title)])


def position_losses(model: MiniMindForCausalLM, rows: np.ndarray, trained: int, batch_tokens: int) -> dict:
    """By way: (rows, 8L) losses, each octave under its own factor; and under "fixed" (rows, L) ones under factor 8."""
    found, fixed = {"none": losses(model, rows, batch_tokens, "long context, none")}, {}
    for way in WAYS[1:]:
        curve = found["none"].copy()
        for factor in FACTORS[1:]:
            with stretched(model, way, factor, trained):
                part = losses(model, rows[:, : factor * trained + 1], batch_tokens, f"long context, {way} × {factor}")
            octave = slice(factor // 2 * trained, factor * trained)
            curve[:, octave] = part[:, octave]
        found[way], fixed[way] = curve, part[:, :trained]
    return {**found, "fixed": fixed}


def evaluate_long_context(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    trained: int,
    most_rows: int,
    batch_tokens: int,
) -> dict:
    """Loss in nats per token by position: curves, means of each octave, and what a fixed factor costs.

    Raises: UserError when the model cannot be stretched, or the texts are too few.
    """
    length = FACTORS[-1] * trained
    if not isinstance(model, MiniMindForCausalLM):
        raise UserError("long_context stretches MiniMind models only: leave it out of --tasks for other folders.")
    rows, single = long_rows(texts, tokenizer, length, most_rows)
    found = position_losses(model, rows, trained, batch_tokens)
    fixed = found.pop("fixed")
    octaves = [(0, trained), *((factor // 2 * trained, factor * trained) for factor in FACTORS[1:])]
    ends = sorted({a + (z - a) * part // BINS for a, z in octaves for part in range(1, BINS + 1)} - {0})
    return {
        "trained": trained, "rows": len(rows), "rows_of_one_document": single, "positions": ends,
        "curves": {way: [float(v[:, a:z].mean()) for a, z in zip([0, *ends], ends, strict=False)]
                   for way, v in found.items()},
        "octaves": {way: {f"{a}-{z}": float(v[:, a:z].mean()) for a, z in octaves} for way, v in found.items()},
        "fixed_8": {way: float(v.mean()) for way, v in fixed.items()},
        "uniform": math.log(model.config.vocab_size),
    }  # fmt: skip
