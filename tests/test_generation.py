"""Sampling against transformers' own processors, and the decoder against `generate` and a plain forward."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model import generation
from model.decode_step import fast_dtype, lossless_16_bit, turn
from model.generation import Decoder, Request, Sampler, Sampling, draw, penalised, ranked, stop_ids, stream_generate
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, apply_rotary, rotary_tables
from model.weights import WeightsError, load_tokenizer

EOS = 2
PROMPT = torch.tensor([[1, 40, 41, 7]])
PROMPTS = [[1, 40, 41, 7], [1, 9], [1, 300, 12, 250, 99, 31, 7], [5], [1, 77, 78, 79, 80], [1, 40, 41, 8]]
CPU = torch.device("cpu")


def tiny_model(**options) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
    model = MiniMindForCausalLM(MiniMindConfig(vocab_size=330, **sizes, **options)).eval()
    with torch.no_grad():  # sharper than a fresh model: varied text, and a greedy choice that is no matter of rounding
        for weight in model.parameters():
            weight.mul_(20 if weight.ndim == 2 else 1)
    return model


@pytest.fixture(scope="module")
def model() -> MiniMindForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module", params=["dense", "moe", "no shared expert"])
def any_model(request) -> MiniMindForCausalLM:
    options = {} if request.param == "dense" else {"use_moe": True, "intermediate_size": 64}
    return tiny_model(**options, **({"n_shared_experts": 0} if request.param == "no shared expert" else {}))


def generated(model, prompt: list[int], new: int, **options) -> list[int]:
    """The greedy continuation by transformers, the stop token included."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, **options)
    return out[0, len(prompt) :].tolist()


def logps_of(model, request: Request, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities (tokens, V) of the positions of an answer, from one plain forward."""
    with torch.no_grad():
        logits = model(torch.tensor([request.prompt + request.tokens])).logits[0, len(request.prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


# --- From logits to a token -------------------------------------------------------------------------------------------


def kept(logits: torch.Tensor, sampling: Sampling, width: int) -> torch.Tensor:
    """Probabilities (V,) behind the cuts of this module."""
    numbers = (torch.tensor([[float(n)]]) for n in (sampling.top_k, sampling.top_p, sampling.min_p))
    probs, ids, enough = ranked(logits[None] / sampling.temperature, *numbers, width)
    assert enough.item()
    return torch.zeros_like(logits).scatter(0, ids[0], probs[0] / probs.sum())


@pytest.mark.parametrize("temperature", [0.3, 0.85, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0), (7, 1.0, 0), (0, 0.8, 0), (20, 0.6, 0), (1, 0.9, 0), (500, 0.0, 0), (0, 1.0, 0.1), (30, 0.9, 0.3)],
)
def test_cuts_are_those_of_the_transformers_processors(temperature, top_k, top_p, min_p):
    torch.manual_seed(1)
    logits = torch.randn(100) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(kept(logits, sampling, 100), warpers(None, logits[None].clone()).softmax(-1)[0])


def test_too_few_candidates_are_noticed():
    cases = (0, 0.3, 0, 31, True), (0, 0.3, 0, 29, False), (5, 1, 0, 6, True), (0, 1, 0.5, 50, False)
    for top_k, top_p, min_p, width, enough in (*cases, (0, 1, 0.5, 100, True)):
        numbers = (torch.tensor([[float(n)]]) for n in (top_k, top_p, min_p))
        assert ranked(torch.zeros(1, 100), *numbers, width)[2].item() is enough


def test_penalties():
    logits = torch.tensor([[2.0, -2.0, 4.0, -4.0, 1.0]])
    seen, counts = torch.tensor([[True, True, False, False, False]]), torch.tensor([[0.0, 0, 1, 3, 0]])
    one = torch.ones(1, 1)
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[0, 1, 2, 3, 3, 3]]), logits.clone())
    torch.testing.assert_close(penalised(logits, seen, counts, one * 1.5, one * 0, one * 0), expected)
    # OpenAI: only what the answer holds, once or per occurrence
    out = penalised(logits, seen, counts, one, one * 0.5, one * 0.25)
    torch.testing.assert_close(out, torch.tensor([[2.0, -2.0, 4.0 - 0.75, -4.0 - 1.25, 1.0]]))


def test_draw_takes_the_interval_its_number_falls_into():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0]).expand(6, -1) * 3
    uniform = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2**-24])[:, None]
    assert draw(probs, uniform).tolist() == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("candidates", [4, 256])
def test_frequencies_are_those_of_the_distribution(monkeypatch, candidates):
    """Rows of different settings side by side: χ² of each stays below its 99.99 % quantile."""
    monkeypatch.setattr(generation, "CANDIDATES", candidates)
    torch.manual_seed(3)
    V, copies, calls = 12, 100, 30
    logits = torch.randn(V) * 1.5
    settings = [
        Sampling(temperature=0.7), Sampling(temperature=1.3, top_k=6), Sampling(top_p=0.8), Sampling(min_p=0.1),
        Sampling(temperature=2.0, top_k=9, top_p=0.9), Sampling(temperature=0),
    ]  # fmt: skip
    rows = range(len(settings) * copies)
    sampler = Sampler(len(rows), V, CPU)
    for row in rows:
        sampler.place(row, dataclasses.replace(settings[row % len(settings)], seed=row), [0])
    drawn = torch.tensor([sampler.sample(logits.expand(len(rows), V), rows).tokens for _ in range(calls)])
    drawn, draws = drawn.view(-1, len(settings)), copies * calls
    assert (drawn[:, 5] == logits.argmax()).all()
    for row, sampling in enumerate(settings[:5]):
        expected = kept(logits, sampling, V) * draws
        counts = drawn[:, row].bincount(minlength=V)
        assert counts[expected == 0].sum() == 0
        some = expected > 0
        chi2 = ((counts - expected)[some] ** 2 / expected[some]).sum().item()
        freedom = int(some.sum()) - 1
        quantile = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson-Hilferty
        assert chi2 < quantile, (row, chi2, quantile)


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_temperature_zero_is_the_likeliest_token_after_bias_and_penalty(temperature):
    logits = torch.tensor([[5.0, 4.0, -1.0]])

    def likeliest(**options) -> int:
        sampler = Sampler(1, 3, CPU)
        sampler.place(0, Sampling(temperature=temperature, **options), [0])
        return sampler.sample(logits, [0]).tokens[0]

    assert likeliest() == likeliest(frequency_penalty=9) == 0  # the prompt does not count
    assert likeliest(repetition_penalty=2.0) == 1
    assert likeliest(logit_bias={2: 7}) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("temperature", math.nan), ("top_k", -1), ("top_p", 1.1), ("min_p", -0.1),
     ("repetition_penalty", 0), ("presence_penalty", math.inf), ("frequency_penalty", math.nan),
     ("logit_bias", {3: 101}), ("max_new_tokens", 0), ("top_logps", -1)],
)  # fmt: skip
def test_impossible_settings(name, value):
    with pytest.raises(ValueError, match=f"^{name} .* is impossible: expected "):
        Sampling(**{name: value})


# --- The decoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_crowd_equals_generate(any_model, penalty):
    """Prompts of different lengths, two slots for six requests: they wait, join, leave and move."""
    lengths = [30, 3, 17, 40, 1, 22]
    decoder = Decoder(any_model, slots=2, max_seq_len=64)
    requests = [
        decoder.add(p, Sampling(temperature=0, repetition_penalty=penalty, max_new_tokens=n, stop_ids={EOS}))
        for p, n in zip(PROMPTS, lengths, strict=True)
    ]
    most = 0
    while decoder.busy:
        decoder.step()
        most = max(most, len(decoder.running))
    assert most == 2
    for request, prompt, new in zip(requests, PROMPTS, lengths, strict=True):
        assert request.tokens == generated(any_model, prompt, new, repetition_penalty=penalty)
        assert request.finish_reason == ("stop" if request.tokens[-1] == EOS else "length")


@pytest.mark.parametrize("prefill_tokens", [1, 5, 8192])
def test_long_prompts_in_chunks_hold_back_nobody(model, prefill_tokens):
    long = list(range(3, 43))
    decoder = Decoder(model, slots=4, max_seq_len=80, prefill_tokens=prefill_tokens)
    first = decoder.add(PROMPTS[3], Sampling(temperature=0, max_new_tokens=60))
    decoder.step()
    others = [decoder.add(prompt, Sampling(temperature=0, max_new_tokens=9)) for prompt in (long, PROMPTS[2])]
    while not others[0].tokens:
        before = len(first.tokens)
        decoder.step()
        assert len(first.tokens) == before + 1
    assert len(first.tokens) >= min(1 + len(long) // prefill_tokens, 60)
    while decoder.busy:
        decoder.step()
    for request in (first, *others):
        assert request.tokens == generated(model, request.prompt, len(request.tokens), eos_token_id=None)


def test_log_probabilities_are_those_of_a_plain_forward(any_model):
    sampling = Sampling(temperature=1.6, top_p=0.9, logps=True, top_logps=3, max_new_tokens=12, repetition_penalty=1.2)
    settings = [dataclasses.replace(sampling, seed=i, top_logps=i) for i in range(len(PROMPTS))]
    for request in Decoder(any_model, slots=4, max_seq_len=64).generate(PROMPTS, settings):
        tokens = torch.tensor(request.tokens)[:, None]
        logps = logps_of(any_model, request)
        torch.testing.assert_close(torch.tensor(request.logps), logps.gather(1, tokens)[:, 0], atol=2e-4, rtol=1e-4)
        tempered = logps_of(any_model, request, 1.6).gather(1, tokens)[:, 0]
        torch.testing.assert_close(torch.tensor(request.tempered_logps), tempered, atol=2e-4, rtol=1e-4)
        values, ids = logps.topk(request.sampling.top_logps)
        assert [[i for i, _ in pairs] for pairs in request.top_logps] == ids.tolist()
        listed = torch.tensor([[logp for _, logp in pairs] for pairs in request.top_logps])
        torch.testing.assert_close(listed, values, atol=2e-4, rtol=1e-4)
    (silent,) = Decoder(any_model, 1, 64).generate(PROMPTS[:1], Sampling(max_new_tokens=2))
    assert silent.logps == silent.top_logps == []


def test_a_seed_means_the_same_text_alone_and_in_a_crowd(any_model):
    settings = [
        Sampling(seed=1), Sampling(seed=2, top_p=0.8), Sampling(seed=3, top_k=5, frequency_penalty=1.5),
        Sampling(temperature=0), Sampling(seed=4, min_p=0.05, logit_bias={7: 5, 8: -100}),
        Sampling(seed=5, temperature=3.0, repetition_penalty=1.5, top_k=290),
    ]  # fmt: skip
    settings = [dataclasses.replace(s, max_new_tokens=10 + 5 * i) for i, s in enumerate(settings)]
    decoder = Decoder(any_model, slots=6, max_seq_len=64, prefill_tokens=6)
    crowd = [request.tokens for request in decoder.generate(PROMPTS, settings)]
    for prompt, sampling, tokens in zip(PROMPTS, settings, crowd, strict=True):
        (alone,) = Decoder(any_model, slots=1, max_seq_len=64).generate([prompt], sampling)
        assert alone.tokens == tokens
    # the same decoder again, in another order: nothing of the last requests is left
    again = decoder.generate(PROMPTS[::-1], settings[::-1])
    assert [request.tokens for request in again] == crowd[::-1]
    other = decoder.generate(PROMPTS[:1], dataclasses.replace(settings[0], seed=9))
    assert other[0].tokens != crowd[0]


@pytest.mark.parametrize("prefill_tokens", [2, 8192])
def test_several_answers_to_a_prompt_take_it_in_once(any_model, prefill_tokens, monkeypatch):
    prompts = [PROMPTS[2]] * 3 + [PROMPTS[0]] + [PROMPTS[2]] * 2 + [PROMPTS[0]]
    settings = [Sampling(seed=i, max_new_tokens=4 + i, logps=True) for i in range(len(prompts))]
    decoder = Decoder(any_model, slots=5, max_seq_len=64, prefill_tokens=prefill_tokens)  # two of them wait
    real, taken = decoder.model.prefill, []

    def counted(tokens, positions, *rest):
        taken.append(int((positions < 64).sum()))
        return real(tokens, positions, *rest)

    monkeypatch.setattr(decoder.model, "prefill", counted)
    together = decoder.generate(prompts, settings)
    for prompt, sampling, request in zip(prompts, settings, together, strict=True):
        (alone,) = Decoder(any_model, slots=1, max_seq_len=64).generate([prompt], sampling)
        assert request.tokens == alone.tokens and request.logps == pytest.approx(alone.logps, abs=1e-4)
    assert len({tuple(request.tokens) for request in together}) == len(prompts)
    if prefill_tokens == 8192:  # the first five and, one by one as rows fall free, the other two
        assert taken == [len(PROMPTS[2]) + len(PROMPTS[0]), len(PROMPTS[2]), len(PROMPTS[0])]


def test_penalties_count_the_answer_as_it_grows(model):
    (request,) = Decoder(model, 1, 400).generate(
        PROMPTS[:1], Sampling(temperature=0, presence_penalty=1000, max_new_tokens=300)
    )
    assert len(set(request.tokens)) == 300  # each token once


def test_cancelled_requests_free_their_slot(model):
    decoder = Decoder(model, slots=2, max_seq_len=64)
    sampling = Sampling(temperature=0, max_new_tokens=20)
    a, b, c = (decoder.add(prompt, sampling) for prompt in PROMPTS[:3])
    for _ in range(3):
        decoder.step()
    decoder.cancel(a)
    assert a.finish_reason == "cancelled" and len(a.tokens) == 3 and not c.tokens
    decoder.step()
    assert c.tokens
    waiting = decoder.add(PROMPTS[3], sampling)
    decoder.cancel(waiting)
    while decoder.busy:
        decoder.step()
    decoder.cancel(b)  # is over: stays as it is
    assert b.finish_reason == c.finish_reason == "length" and waiting.finish_reason == "cancelled"
    for request in (b, c):
        assert request.tokens == generated(model, request.prompt, 20, eos_token_id=None)


def test_a_full_cache_ends_an_answer(model):
    (request,) = Decoder(model, 1, 16).generate([PROMPTS[0]], Sampling(temperature=0, max_new_tokens=50))
    assert request.finish_reason == "length"
    assert request.tokens == generated(model, PROMPTS[0], 12, eos_token_id=None)


def test_impossible_requests_and_sizes(model):
    decoder = Decoder(model, 1, 16)
    for prompt, message in (([], "prompt is empty"), ([1] * 16, "takes 16 tokens .* max_seq_len 16"),
                            ([1, 330], "Token 330 in prompt .* 0 to 329"), ([-1], "Token -1")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            decoder.add(prompt, Sampling())
    with pytest.raises(ValueError, match="Token 400 in logit_bias"):
        decoder.add([1], Sampling(logit_bias={400: 1}))
    for sizes, options in (((0, 16), {}), ((1, 1), {}), ((1, 513), {}), ((1, 16), {"prefill_tokens": 0})):
        with pytest.raises(ValueError, match="is impossible: expected"):
            Decoder(model, *sizes, **options)
    assert not decoder.busy


def test_more_slots_than_positions(model):
    requests = Decoder(model, slots=12, max_seq_len=6).generate([[1, i] for i in range(3, 15)], Sampling(temperature=0))
    for request in requests:
        assert request.tokens == generated(model, request.prompt, 4, eos_token_id=None)


def test_refresh_takes_over_new_weights_and_adapters():
    model = tiny_model()
    decoder = Decoder(model, 2, 64)
    sampling = Sampling(temperature=0, max_new_tokens=10)
    old = decoder.generate(PROMPTS[:1], sampling)[0].tokens
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    decoder.refresh()
    new = decoder.generate(PROMPTS[:1], sampling)[0].tokens
    assert new == generated(model, PROMPTS[0], 10, eos_token_id=None) != old

    adapted = model.model.layers[0].self_attn.v_proj  # an adapter in the two ways they come: in place and wrapped
    delta, plain = torch.randn_like(adapted.weight), adapted.forward
    adapted.forward = lambda x: plain(x) + x @ delta.T
    decoder.add(PROMPTS[0], sampling)
    decoder.step()
    with pytest.raises(ValueError, match="1 requests are running"):
        decoder.refresh()
    while decoder.busy:
        decoder.step()
    decoder.refresh()
    newest = decoder.generate(PROMPTS[:1], sampling)[0].tokens
    assert newest == generated(model, PROMPTS[0], 10, eos_token_id=None) != new


@pytest.mark.parametrize("name", ["input_layernorm", "post_attention_layernorm", "model.norm", "embed_tokens"])
def test_refresh_takes_over_each_kind_of_small_weight(name):
    model, sampling = tiny_model(), Sampling(temperature=0, max_new_tokens=10)
    decoder = Decoder(model, 1, 64)
    old = decoder.generate(PROMPTS[:1], sampling)[0].tokens
    with torch.no_grad():
        for full_name, weight in model.named_parameters():
            if name in full_name:
                weight.mul_(1 + torch.rand_like(weight) * 3)
    decoder.refresh()
    new = decoder.generate(PROMPTS[:1], sampling)[0].tokens
    assert new == generated(model, PROMPTS[0], 10, eos_token_id=None) != old


@pytest.mark.parametrize("scaling", [None, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}])
def test_turning_with_signed_sines_is_the_rotary_embedding(scaling):
    step = Decoder(tiny_model(rope_scaling=scaling), 1, 200).model
    positions = torch.tensor([[0, 5, 199]])
    x = torch.randn(1, 3, 6, 8).transpose(1, 2)  # (1, heads, T, C), not contiguous
    turned = turn(x, step.cos[positions][:, None], step.sin[positions][:, None])
    assert torch.equal(turned, apply_rotary(x, *rotary_tables(step.model.config, positions)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_arithmetic(dtype):
    half, full = tiny_model().to(dtype), tiny_model().to(dtype).float()
    prompts, sampling = PROMPTS[:3], Sampling(temperature=0, max_new_tokens=8, logps=True)
    for request, same in zip(
        Decoder(half, 3, 64).generate(prompts, sampling), Decoder(full, 3, 64).generate(prompts, sampling), strict=True
    ):
        if fast_dtype(dtype, CPU) == torch.float32:  # whatever the weights
            assert request.tokens == same.tokens and request.logps == same.logps
    for request in Decoder(half, 3, 64, dtype=dtype).generate(prompts, sampling):
        expected = logps_of(full, request).gather(1, torch.tensor(request.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(request.logps), expected, atol=1.5, rtol=0.1)


@pytest.mark.parametrize("native", [False, True])
def test_a_cpu_calculates_in_16_bits_only_where_it_can(native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert fast_dtype(torch.bfloat16, CPU) == (torch.bfloat16 if native else torch.float32)
    assert fast_dtype(torch.float16, CPU) == fast_dtype(torch.float32, CPU) == torch.float32
    assert fast_dtype(torch.float16, torch.device("cuda")) == torch.float16


def test_16_bits_are_used_only_where_they_lose_nothing():
    exact = torch.tensor([1.0, 0.5, -3.0])
    assert lossless_16_bit([exact]) == torch.bfloat16
    assert lossless_16_bit([exact, torch.tensor([1 + 2**-10])]) == torch.float16
    assert lossless_16_bit([exact, torch.tensor([1 + 2**-10, 1e30])]) is None
    assert lossless_16_bit([exact.to(torch.bfloat16)]) == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_moe": True, "intermediate_size": 64}], ids=["dense", "moe"])
def test_the_compiled_step_gives_the_same_tokens(options):
    """From three rows down to one, over two lengths, of one model and then of another."""
    model = tiny_model(**options)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.half())
    decoder = Decoder(model, 3, 300, compile=True)
    assert decoder.model.head.narrow.dtype == torch.float16
    sampling = Sampling(temperature=0, max_new_tokens=12)
    for request in decoder.generate(
        PROMPTS[:3], [dataclasses.replace(sampling, max_new_tokens=n) for n in (5, 160, 9)]
    ):
        assert request.tokens == generated(model, request.prompt, len(request.tokens), eos_token_id=None)
    if not options:
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + 1e-3)  # 16 bits do not hold these
        decoder.refresh()
        assert decoder.model.head.narrow is None
        other = tiny_model()
        for m, d in ((model, decoder), (other, Decoder(other, 1, 300, compile=True))):
            (request,) = d.generate(PROMPTS[:1], sampling)
            assert request.tokens == generated(m, PROMPTS[0], 12, eos_token_id=None)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_moe": True, "intermediate_size": 64}], ids=["dense", "moe"])
def test_the_compiled_step_of_a_bfloat16_model(options):
    """One row: float32 between bfloat16 weights and cache, closer to float32 than bfloat16 throughout. One copy."""
    model, full = tiny_model(**options).bfloat16(), tiny_model(**options).bfloat16().float()
    sampling = Sampling(temperature=0, max_new_tokens=16, logps=True)

    def error(decoder: Decoder) -> float:
        (request,) = decoder.generate(PROMPTS[:1], sampling)
        expected = logps_of(full, request).gather(1, torch.tensor(request.tokens)[:, None])[:, 0]
        return (torch.tensor(request.logps) - expected)[1:].abs().mean().item()  # the first comes from the prompt

    decoder = Decoder(model, 1, 64, dtype=torch.bfloat16, compile=True)
    step = decoder.model
    assert step.keys[0].dtype == step.kinds.qkv.narrow.dtype == torch.bfloat16 and step.kinds.qkv.wide is None
    assert error(decoder) < error(Decoder(model, 1, 64, dtype=torch.bfloat16)) / 2
    assert step.decode([5], [20], 64).dtype == torch.float32
    several = Decoder(model, 3, 64, dtype=torch.bfloat16, compile=True)
    assert several.model.kinds.qkv.wide is None and several.model.head.narrow.dtype == torch.bfloat16
    if not options:
        for request in several.generate(PROMPTS[:3], sampling):
            expected = logps_of(full, request).gather(1, torch.tensor(request.tokens)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(request.logps), expected, atol=1.5, rtol=0.1)

        run, memory = step.run, step.kinds.qkv.narrow.data_ptr()
        decoder.refresh()
        assert step.run is run and step.kinds.qkv.narrow.data_ptr() == memory
        model.float()  # the same values: the narrow copies stay bfloat16, but the embedding is read in another width
        decoder.refresh()
        assert step.run is not run
        assert error(decoder) < error(Decoder(model, 1, 64, dtype=torch.bfloat16)) / 2


# --- One text as a stream ---------------------------------------------------------------------------------------------


def foreign_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=330, **sizes, pad_token_id=0)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(20 if weight.ndim == 2 else 1)
    return model


@pytest.mark.parametrize("make", [tiny_model, foreign_model])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_stream_equals_generate(make, penalty):
    model, options = make(), {"max_new_tokens": 60, "repetition_penalty": penalty}
    streamed = list(stream_generate(model, PROMPT, stop_ids={EOS}, temperature=0, **options))
    expected = generated(model, PROMPT[0].tolist(), 60, repetition_penalty=penalty)
    assert [token for token in expected if token != EOS] == streamed
    assert len(streamed) > 5


@pytest.mark.parametrize("make", [tiny_model, foreign_model])
def test_sampled_stream_follows_seed_and_settings(make):
    model = make()

    def streamed(seed: int, **options) -> list[int]:
        rng = torch.Generator().manual_seed(seed)
        return list(stream_generate(model, PROMPT, max_new_tokens=20, temperature=2.0, generator=rng, **options))

    assert streamed(3) == streamed(3) != streamed(4)
    greedy = list(stream_generate(model, PROMPT, max_new_tokens=20, temperature=0))
    assert streamed(3, top_k=1) == streamed(4, top_p=0.0) == greedy != streamed(3)


@pytest.mark.parametrize("make", [tiny_model, foreign_model])
def test_stream_stops_before_the_stop_token(make):
    model = make()
    tokens = list(stream_generate(model, PROMPT, max_new_tokens=20, temperature=0))
    stop = tokens[8]
    cut = list(stream_generate(model, PROMPT, max_new_tokens=20, stop_ids={stop}, temperature=0))
    assert len(tokens) == 20 and cut == tokens[: tokens.index(stop)]


def test_a_stream_left_early_frees_its_decoder(model):
    decoder = Decoder(model, 1, 64)
    stream = stream_generate(model, PROMPT, max_new_tokens=20, temperature=0, decoder=decoder)
    first = [next(stream), next(stream)]
    assert decoder.busy
    stream.close()
    assert not decoder.busy
    again = list(stream_generate(model, PROMPT, max_new_tokens=20, temperature=0, decoder=decoder))
    longer = list(stream_generate(model, PROMPT, max_new_tokens=100, temperature=0, decoder=decoder))  # outgrows it
    assert again[:2] == first and len(again) == 20 and longer[:20] == again and len(longer) == 100


def test_output_that_is_no_number_is_reported():
    for broken in (tiny_model(), foreign_model()):
        with torch.no_grad():
            broken.model.norm.weight.fill_(torch.nan)
        with pytest.raises(WeightsError, match="not a number"):
            next(stream_generate(broken, torch.tensor([[1]]), max_new_tokens=3))


@pytest.mark.parametrize("bad", [1, 3])
def test_rows_of_failed_requests_serve_the_next_ones(bad):
    """Several fail in one step, as answers to one prompt do: no NaN stays in the cache."""
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens = nn.Embedding.from_pretrained(model.model.embed_tokens.weight.detach().clone())
        model.model.embed_tokens.weight[98] = torch.nan  # one token of the input is damaged
    decoder = Decoder(model, slots=4, max_seq_len=64)
    sampling = Sampling(temperature=0, max_new_tokens=5)
    broken = [decoder.add([1, 98, 7], sampling) for _ in range(bad)]
    while decoder.busy:
        decoder.step()
    assert [request.finish_reason for request in broken] == ["error"] * bad
    for request in decoder.generate(PROMPTS[:4], sampling):
        assert request.finish_reason == "length"
        (alone,) = Decoder(model, 1, 64).generate([request.prompt], sampling)
        assert request.tokens == alone.tokens


def test_a_request_that_fails_leaves_the_others_alone():
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens = nn.Embedding.from_pretrained(model.model.embed_tokens.weight.detach().clone())
        model.model.embed_tokens.weight[99] = torch.nan  # one token of the input is damaged
    decoder = Decoder(model, 2, 64)
    sampling = Sampling(temperature=0, max_new_tokens=12)
    bad, good, next_one = (decoder.add(p, sampling) for p in ([1, 99, 4], [1, 40, 41], [1, 8, 9, 10, 11]))
    while decoder.busy:
        decoder.step()
    assert bad.finish_reason == "error" and not bad.tokens
    for request in (good, next_one):  # next_one took the place of the failed one
        assert request.tokens == generated(model, request.prompt, 12, eos_token_id=None)
    with pytest.raises(WeightsError, match="not a number"):
        decoder.generate([[1, 4], [99]], sampling)
    assert not decoder.busy


@pytest.mark.parametrize(("eos", "expected"), [(None, {EOS}), (5, {EOS, 5}), ([5, 6], {EOS, 5, 6})])
def test_an_answer_ends_at_the_eos_of_model_and_tokenizer(eos, expected):
    model = tiny_model()
    model.generation_config.eos_token_id = eos
    assert stop_ids(model, load_tokenizer()) == expected
