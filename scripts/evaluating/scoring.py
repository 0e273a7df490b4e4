"""Log-probabilities of given tokens in batches: what perplexity, multiple choice and loss by position are made of.

    log p(y_1 … y_n | context) = Σ_t log softmax(z_t)[y_t],   z_t the logits behind context and y_1 … y_{t-1}

Several texts may follow one context, as the options of a question do. Our own model reads the context once: its options
stand in one row behind it, each with the positions it would have alone, and a mask keeps them from seeing each other.

    row        C C C C  a a  b        positions  0 1 2 3  4 5  4        a, b see C and themselves, not one another

Other models get a row for each option.

Dimension legend: B rows · T tokens of a row · D hidden size · N scored tokens · V vocabulary.

中文：批量计算给定 token 的对数概率；同一题的多个选项共享一次前缀计算。
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dataset.token_cache import plain_backend
from model.generation import NOT_A_NUMBER
from model.model_minimind import MiniMindForCausalLM
from model.weights import WeightsError

PIECE = 1024  # positions that go through the head at a time
LOGITS_AT_ONCE = 1 << 28  # numbers, of a foreign model, whose logits are held whole
PADDING = -1  # segment of what fills up a row


class Item(NamedTuple):
    """A context of at least one token, which is only read, and what may follow it, each of at least one token."""

    context: Sequence[int]
    branches: Sequence[Sequence[int]]


@dataclass
class Row:
    """One row of a batch. Segment 0 is the context, 1, 2 … the branches; heads[i] is where targets[i] is predicted."""

    ids: list[int]
    segments: list[int]
    positions: list[int]
    heads: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)


def lay_out(context: Sequence[int], branches: Sequence[Sequence[int]]) -> Row:
    """The row of a context and its branches. The last token of a branch is predicted and never read."""
    C = len(context)
    row = Row([*context], [0] * C, [*range(C)])
    for number, branch in enumerate(branches, start=1):
        begin = len(row.ids)
        row.heads += [C - 1, *range(begin, begin + len(branch) - 1)]
        row.targets += branch
        row.ids += branch[:-1]
        row.segments += [number] * (len(branch) - 1)
        row.positions += range(C, C + len(branch) - 1)
    return row


def branch_mask(segments: Tensor) -> Tensor | None:
    """Who may look at whom: what came before, in the context or in the same branch. None where causal says the same.

    Shape: (B, T) → (B, 1, T, T) bool.
    """
    if not (segments > 1).any():
        return None
    query, key = segments[:, :, None], segments[:, None, :]
    seen = (key == 0) | (key == query)
    return (seen & torch.ones(seen.shape[1:], dtype=torch.bool, device=seen.device).tril())[:, None]


@torch.inference_mode()
def row_logps(model: PreTrainedModel, rows: Sequence[Row]) -> Tensor:
    """Log-probability of each target, row after row.  Shape: B rows → (N,) float32 on the CPU."""
    width = max(len(row.ids) for row in rows)

    def padded(name: str, filler: int) -> Tensor:
        values = [getattr(row, name) for row in rows]
        return torch.tensor([v + [filler] * (width - len(v)) for v in values], device=model.device)  # (B, T)

    ids = padded("ids", 0)
    heads = torch.tensor([r * width + head for r, row in enumerate(rows) for head in row.heads], device=model.device)
    targets = torch.tensor([target for row in rows for target in row.targets], device=model.device)
    if not isinstance(model, MiniMindForCausalLM):
        logits = model(ids, use_cache=False).logits.flatten(0, 1)[heads]  # (N, V); padding on the right reaches nobody
        return -F.cross_entropy(logits.float(), targets, reduction="none").cpu()
    mask = branch_mask(padded("segments", PADDING))
    out = model(ids, attention_mask=mask, position_ids=padded("positions", 0), need_logits=False)
    hidden = out.hidden_states.flatten(0, 1)[heads]  # (N, D)
    pieces = zip(hidden.split(PIECE), targets.split(PIECE), strict=True)
    logps = [-F.cross_entropy(model.lm_head(h).float(), t, reduction="none") for h, t in pieces]
    return torch.cat(logps).cpu()


def score(model: PreTrainedModel, items: Sequence[Item], batch_tokens: int, title: str) -> list[list[Tensor]]:
    """The log-probability of each token of each branch, (tokens,) float32, in the order of the items.

    Args: batch_tokens: tokens of a batch, padding included (a longer row goes alone); title: of the progress bar.
    Raises: WeightsError when the model's output is not a number.
    """
    shares = isinstance(model, MiniMindForCausalLM)
    if not shares:
        batch_tokens = min(batch_tokens, LOGITS_AT_ONCE // model.config.vocab_size)
    rows: list[tuple[Row, list[tuple[int, int]]]] = []  # with the (item, branch) of each branch in it
    for number, (context, branches) in enumerate(items):
        if shares:
            rows.append((lay_out(context, branches), [(number, b) for b in range(len(branches))]))
        else:
            rows += [(lay_out(context, [branch]), [(number, b)]) for b, branch in enumerate(branches)]
    rows.sort(key=lambda row: -len(row[0].ids))  # like lengths share a batch; the longest first, should memory not do
    results = [[torch.empty(0)] * len(item.branches) for item in items]
    with tqdm(total=len(rows), desc=title, unit="row", disable=None, leave=False) as bar:  # None: only on a terminal
        at = 0
        while at < len(rows):
            batch = rows[at : at + max(batch_tokens // len(rows[at][0].ids), 1)]
            logps = row_logps(model, [row for row, _ in batch])
            if logps.isnan().any():
                raise WeightsError(NOT_A_NUMBER)
            places = [place for _, owners in batch for place in owners]
            sizes = [len(items[number].branches[branch]) for number, branch in places]
            for (number, branch), part in zip(places, logps.split(sizes), strict=True):
                results[number][branch] = part
            at += len(batch)
            bar.update(len(batch))
    return results


# --- Text to tokens ---------------------------------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, nothing added. A control token written out in a text stays text, as in training."""
    with plain_backend(tokenizer, controls_as_text=True) as backend:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def first_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """What the first token of a document is predicted from: bos, or eos where there is none."""
    return next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)


def encode_pairs(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) as texts → as tokens, by the rule of lm-eval (`TemplateLM._encode_pair`).

    Blanks at the end of the context belong to the continuation, which begins with them in most vocabularies; both are
    tokenised together, and what goes beyond the tokens of the context is the continuation.
    """
    contexts = [context.rstrip() for context, _ in pairs]
    heads = encode(tokenizer, contexts)
    wholes = encode(tokenizer, [context + continuation for context, continuation in pairs])
    split = [(head, whole[len(head) :]) for head, whole in zip(heads, wholes, strict=True)]
    for i, (_, rest) in enumerate(split):
        if not rest:  # all of it merged with the context: tokens of its own
            context, continuation = pairs[i]
            split[i] = heads[i], encode(tokenizer, [context[len(contexts[i]) :] + continuation])[0]
    return split
