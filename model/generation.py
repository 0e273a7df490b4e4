"""How a model writes: logits become probabilities, one token is drawn, and it is fed back in.

    p(next token | text so far) = softmax(logits / temperature), cut by top-k and top-p

Reading order: repetition penalty → temperature, top-k, top-p → drawing one token → the loop over tokens → its end.
The functions up to `sample_next` see the logits of one position and know nothing of models; `stream_generate` is the
loop, with a key/value cache, for one text at a time.

Dimension legend: T tokens · V vocabulary.

中文：模型如何逐个生成 token：重复惩罚、温度、top-k、top-p 采样，以及带 KV 缓存的生成循环。
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from model.weights import WeightsError


def penalised(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Makes tokens that occurred before less likely: l / penalty where l > 0, l · penalty where l < 0.

    CTRL, Keskar et al. 2019, arXiv:1909.05858, section 4.1.  Shape: (V,) → (V,).
    """
    if penalty == 1.0 or not seen:
        return logits
    ids = torch.tensor(sorted(set(seen)))
    old = logits[ids]
    return logits.index_copy(0, ids, torch.where(old < 0, old * penalty, old / penalty))


def next_probs(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """softmax(logits / temperature), cut to the k likeliest tokens and then to the nucleus.

    The nucleus is the smallest set of likeliest tokens that reaches probability top_p (Holtzman et al. 2019,
    arXiv:1904.09751).

    Args: temperature > 0; top_k 0 = off; top_p 1 = off.  Shape: (V,) → (V,), sums to 1.
    """
    logits = logits / temperature
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probs = logits.softmax(-1)
    if top_p < 1.0:
        ranked, order = probs.sort(descending=True)
        cut = ranked.cumsum(-1) - ranked >= top_p  # what stands before this token is the nucleus already
        cut[0] = False
        probs = probs.index_fill(0, order[cut], 0.0)
        probs = probs / probs.sum()
    return probs


def sample_next(
    logits: Tensor,
    seen: Sequence[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> int:
    """Draws the next token: repetition penalty, temperature, top-k, top-p, in this order. Temperature 0: the likeliest.

    Args: logits (V,) on the CPU; seen: ids of the prompt and the answer so far, for the penalty.
    """
    logits = penalised(logits.float(), seen, repetition_penalty)
    if temperature < 1e-5:  # as good as 0, and a quotient could overflow
        return int(logits.argmax())
    return int(torch.multinomial(next_probs(logits, temperature, top_k, top_p), 1, generator=generator))


@torch.inference_mode()
def stream_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yields the tokens of the continuation one by one; a stop token ends it and is not yielded.

    The prompt runs through the model once, later steps feed one token to the key/value cache. Tokens are drawn on the
    CPU, so that a seed means the same text on every device, as far as their arithmetic agrees.

    Args: input_ids (1, T).  Raises: WeightsError when the model's output is not a number.
    """
    cache = DynamicCache(config=model.config)
    seen, new = input_ids[0].tolist(), input_ids
    for _ in range(max_new_tokens):
        logits = model(new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].float().cpu()  # (V,)
        if logits.isnan().any():
            raise WeightsError("The model's output is not a number: try --dtype float32, else the weights are damaged.")
        token = sample_next(logits, seen, temperature, top_k, top_p, repetition_penalty, generator)
        if token in stop_ids:
            return
        yield token
        seen.append(token)
        new = input_ids.new_tensor([[token]])  # (1, 1)


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """The tokens that end an answer: what the tokenizer and the model's generation settings call eos."""
    eos = model.generation_config.eos_token_id
    ids = eos if isinstance(eos, list) else [eos]
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}
