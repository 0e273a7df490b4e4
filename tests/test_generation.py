"""Sampling against transformers' own processors, and the token-by-token decoder against `generate`."""

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.generation import next_probs, penalised, sample_next, stop_ids, stream_generate
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import WeightsError, load_tokenizer

EOS = 2
PROMPT = torch.tensor([[1, 40, 41, 7]])


def tiny_model() -> MiniMindForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
    model = MiniMindForCausalLM(MiniMindConfig(vocab_size=330, **sizes)).eval()
    with torch.no_grad():  # sharper than a fresh model: varied text, and a greedy choice that is no matter of rounding
        for weight in model.parameters():
            weight.mul_(20 if weight.ndim == 2 else 1)
    return model


@pytest.fixture(scope="module")
def model() -> MiniMindForCausalLM:
    return tiny_model()


@pytest.mark.parametrize("temperature", [0.3, 0.85, 1.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.8), (20, 0.6), (1, 0.9), (500, 0.0)])
@pytest.mark.parametrize("penalty", [1.0, 1.4, 0.7])
def test_distribution_is_that_of_the_transformers_processors(temperature, top_k, top_p, penalty):
    torch.manual_seed(1)
    logits, seen = torch.randn(100) * 3, [3, 3, 50, 99, 0]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits[None].clone())
    expected = TemperatureLogitsWarper(temperature)(None, expected)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    probs = next_probs(penalised(logits, seen, penalty), temperature, top_k, top_p)
    torch.testing.assert_close(probs, expected.softmax(-1)[0])


def test_sample_next_draws_from_the_distribution_and_follows_the_seed():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    rng = torch.Generator().manual_seed(5)
    drawn = torch.tensor([sample_next(logits, generator=rng) for _ in range(4000)])
    torch.testing.assert_close(drawn.bincount(minlength=4) / 4000, logits.softmax(-1), atol=0.03, rtol=0)
    rng.manual_seed(5)
    assert [sample_next(logits, generator=rng) for _ in range(50)] == drawn[:50].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_temperature_zero_is_the_likeliest_token_after_the_penalty(temperature):
    logits = torch.tensor([5.0, 4.0, -1.0])
    assert sample_next(logits, [0], temperature) == 0
    assert sample_next(logits, [0], temperature, repetition_penalty=2.0) == 1


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_stream_equals_generate(model, penalty):
    options = {"max_new_tokens": 60, "repetition_penalty": penalty}
    streamed = list(stream_generate(model, PROMPT, stop_ids={EOS}, temperature=0, **options))
    out = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, **options)
    assert [token for token in out[0, PROMPT.shape[1] :].tolist() if token != EOS] == streamed
    assert len(streamed) > 5


def test_sampled_stream_follows_seed_and_settings(model):
    def streamed(seed: int, **options) -> list[int]:
        rng = torch.Generator().manual_seed(seed)
        return list(stream_generate(model, PROMPT, max_new_tokens=20, temperature=2.0, generator=rng, **options))

    assert streamed(3) == streamed(3) != streamed(4)
    greedy = list(stream_generate(model, PROMPT, max_new_tokens=20, temperature=0))
    assert streamed(3, top_k=1) == streamed(4, top_p=0.0) == greedy != streamed(3)


def test_stream_stops_before_the_stop_token_and_uses_the_cache(model):
    tokens = list(stream_generate(model, PROMPT, max_new_tokens=20, temperature=0))
    stop = tokens[8]
    lengths = []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(args[0].shape[1]), with_kwargs=True
    )
    try:
        cut = list(stream_generate(model, PROMPT, max_new_tokens=20, stop_ids={stop}, temperature=0))
    finally:
        hook.remove()
    assert len(tokens) == 20 and cut == tokens[: tokens.index(stop)]
    assert lengths == [4] + [1] * len(cut)


def test_output_that_is_no_number_is_reported():
    broken = tiny_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(WeightsError, match="not a number"):
        next(stream_generate(broken, torch.tensor([[1]]), max_new_tokens=3))


@pytest.mark.parametrize(("eos", "expected"), [(None, {EOS}), (5, {EOS, 5}), ([5, 6], {EOS, 5, 6})])
def test_an_answer_ends_at_the_eos_of_model_and_tokenizer(eos, expected):
    model = tiny_model()
    model.generation_config.eos_token_id = eos
    assert stop_ids(model, load_tokenizer()) == expected
