"""The model against oracles that are not the model: transformers' Llama, formulas, names, one sequence at a time.

Legend as in model_minimind.py: B batch, T tokens, D hidden size, C channels of one head, V vocabulary. Most tests use
weights ten times larger than the initialisation: with small ones attention is nearly uniform, and a wrong mask would
hide in the tolerance.
"""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from model.model_minimind import (
    IGNORE,
    MiniMindConfig,
    MiniMindForCausalLM,
    RMSNorm,
    apply_rotary,
    attention_mask_4d,
    rope_frequencies,
    rotary_tables,
)

V = 61
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=V)


def tiny(seed: int = 0, **fields) -> MiniMindForCausalLM:
    """A small model in eval mode whose every parameter matters (norm weights are random too)."""
    torch.manual_seed(seed)
    model = MiniMindForCausalLM(MiniMindConfig(**{**TINY, "initializer_range": 0.2, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.generation_config.eos_token_id = None  # random weights: let every generation run to its full length
    return model


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, check_dtype=False)


def same_gradients(model: torch.nn.Module, oracle: torch.nn.Module) -> None:
    for name, p in model.named_parameters():
        expected = oracle.get_parameter(name).grad
        assert (p.grad - expected).abs().max() <= 1e-4 * expected.abs().max(), name


def same_model(model: torch.nn.Module, oracle: torch.nn.Module) -> None:
    """Bitwise the same weights. The logits only nearly: weights mapped from a file lie at addresses that SIMD code sums
    in another order."""
    mine, its = model.state_dict(), oracle.state_dict()
    assert mine.keys() == its.keys() and all(torch.equal(tensor, its[name]) for name, tensor in mine.items())
    close(model(ids(2, 9)).logits, oracle(ids(2, 9)).logits, 1e-5)


def pad_batch(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of unequal length → ids and mask (B, T), padding (id 0) on the given side."""
    T = max(map(len, rows))
    batch, mask = torch.zeros(len(rows), T, dtype=torch.long), torch.zeros(len(rows), T, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        batch[i, place], mask[i, place] = row, 1
    return batch, mask


BOTH = pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])


# Size and names


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        (dict(hidden_size=512, num_hidden_layers=8), 25_829_888),
        (dict(hidden_size=768, num_hidden_layers=16), 104_030_976),
        (dict(hidden_size=640, num_hidden_layers=8, use_moe=True), 145_029_760),
    ],
    ids=["small", "base", "moe"],
)
def test_parameter_count(fields, parameters):
    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig(**fields))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.num_parameters() == parameters


ATTENTION_SHAPES = {
    "input_layernorm.weight": (32,),
    "post_attention_layernorm.weight": (32,),
    "self_attn.q_proj.weight": (32, 32),
    "self_attn.k_proj.weight": (16, 32),
    "self_attn.v_proj.weight": (16, 32),
    "self_attn.o_proj.weight": (32, 32),
}
DENSE_SHAPES = {
    "mlp.gate_proj.weight": (128, 32),
    "mlp.up_proj.weight": (128, 32),
    "mlp.down_proj.weight": (32, 128),
}
MOE_SHAPES = {
    "mlp.gate.weight": (3, 32),
    "mlp.experts.0.gate_proj.weight": (128, 32),
    "mlp.experts.0.up_proj.weight": (128, 32),
    "mlp.experts.0.down_proj.weight": (32, 128),
    "mlp.experts.1.gate_proj.weight": (128, 32),
    "mlp.experts.1.up_proj.weight": (128, 32),
    "mlp.experts.1.down_proj.weight": (32, 128),
    "mlp.experts.2.gate_proj.weight": (128, 32),
    "mlp.experts.2.up_proj.weight": (128, 32),
    "mlp.experts.2.down_proj.weight": (32, 128),
    "mlp.shared_experts.0.gate_proj.weight": (128, 32),
    "mlp.shared_experts.0.up_proj.weight": (128, 32),
    "mlp.shared_experts.0.down_proj.weight": (32, 128),
    "mlp.shared_experts.1.gate_proj.weight": (128, 32),
    "mlp.shared_experts.1.up_proj.weight": (128, 32),
    "mlp.shared_experts.1.down_proj.weight": (32, 128),
}


@BOTH
def test_state_dict_names_and_shapes(moe):
    model = tiny(use_moe=moe, n_routed_experts=3, n_shared_experts=2)
    expected = {
        "model.embed_tokens.weight": (V, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (V, 32),
        **{
            f"model.layers.{layer}.{name}": shape
            for layer in (0, 1)
            for name, shape in {**ATTENTION_SHAPES, **(MOE_SHAPES if moe else DENSE_SHAPES)}.items()
        },
    }
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    other = tiny(seed=5, use_moe=moe, n_routed_experts=3, n_shared_experts=2)
    other.load_state_dict(model.state_dict(), strict=True)
    x = ids(1, 7)
    assert torch.equal(other(x).logits, model(x).logits)


def test_defaults_of_the_contract():
    config = MiniMindConfig()
    expected = dict(
        dropout=0.0, bos_token_id=1, eos_token_id=2, hidden_act="silu", hidden_size=512, intermediate_size=1408,
        max_position_embeddings=32768, num_attention_heads=8, num_hidden_layers=8, num_key_value_heads=2,
        rms_norm_eps=1e-5, flash_attn=True, use_moe=False, num_experts_per_tok=2, n_routed_experts=4,
        n_shared_experts=1, scoring_func="softmax", aux_loss_alpha=0.1, seq_aux=True, norm_topk_prob=True,
        vocab_size=6400, rope_theta=1e6, rope_scaling=None, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.model_type == "minimind"
    # 64·⌈⌊8h/3⌋/64⌉ worked out by hand
    assert [MiniMindConfig(hidden_size=h).intermediate_size for h in (640, 768, 96)] == [1728, 2048, 256]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(hidden_size=100), "num_attention_heads 8"),
        (dict(hidden_size=24, num_attention_heads=8), "even multiple"),
        (dict(num_key_value_heads=3), "num_key_value_heads 3"),
        (dict(scoring_func="sigmoid"), "'sigmoid'"),
        (dict(use_moe=True, num_experts_per_tok=5), "n_routed_experts 4"),
        (dict(rope_scaling={"type": "longrope", "factor": 2.0}), "'longrope'"),
        (dict(rope_scaling={"type": "yarn"}), "factor"),
        (dict(rope_scaling={"type": "linear", "factor": 0.5}), "0.5"),
    ],
)
def test_config_refuses_what_it_cannot_build(fields, words):
    with pytest.raises(ValueError, match=words):
        MiniMindConfig(**fields)


def test_head_is_tied_and_counted_once():
    model = tiny()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        model.model.embed_tokens.weight[7] += 1.0
    assert torch.equal(model.lm_head.weight[7], model.model.embed_tokens.weight[7])
    x = ids(1, 5)
    hidden = model(x).hidden_states
    close(model(x).logits, hidden @ model.model.embed_tokens.weight.T)


# Dense model = Llama of transformers


def llama_twin(model: MiniMindForCausalLM, rope: dict) -> LlamaForCausalLM:
    """transformers' Llama with the same weights."""
    c = model.config
    config = LlamaConfig(
        hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads, vocab_size=c.vocab_size,
        rms_norm_eps=c.rms_norm_eps, max_position_embeddings=c.max_position_embeddings, tie_word_embeddings=True,
        rope_parameters={"rope_theta": c.rope_theta, **rope}, attn_implementation="eager",
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    missing, unexpected = llama.load_state_dict(model.state_dict(), strict=False)
    assert not missing and not unexpected
    return llama


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (None, {"rope_type": "default"}),
        ({"type": "linear", "factor": 3.0}, {"rope_type": "linear", "factor": 3.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        (
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "beta_fast": 4.0,
             "beta_slow": 1.0, "attention_factor": 0.7},
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "beta_fast": 4.0,
             "beta_slow": 1.0, "attention_factor": 0.7},
        ),
    ],
    ids=["default", "linear", "yarn", "yarn-attention-factor"],
)  # fmt: skip
@pytest.mark.parametrize("flash", [True, False], ids=["sdpa", "plain"])
def test_dense_equals_llama(ours, theirs, flash):
    """Logits, loss and every gradient; a head of 16 channels, so that YaRN has pairs of all three kinds."""
    model = tiny(
        hidden_size=64, rope_theta=1e4, rope_scaling=ours, flash_attn=flash, rms_norm_eps=1e-4,
        max_position_embeddings=4096,
    )  # fmt: skip
    llama = llama_twin(model, theirs)
    x = ids(2, 40)
    mine, his = model(x, labels=x), llama(x, labels=x)
    close(mine.logits, his.logits, 5e-5)
    close(mine.loss, his.loss)
    mine.loss.backward()
    his.loss.backward()
    same_gradients(model, llama)


def test_scaling_changes_the_logits():
    """Guards the test above against a scaling that is ignored on both sides."""
    x = ids(1, 40)
    plain = tiny(rope_theta=1e4)(x).logits
    for scaling in ({"type": "linear"}, {"type": "ntk"}, {"type": "yarn", "original_max_position_embeddings": 16}):
        scaled = tiny(rope_theta=1e4, rope_scaling={**scaling, "factor": 4.0})(x).logits
        assert (scaled - plain).abs().max() > 0.05, scaling


# Rotary embedding


def test_rotary_rotates_first_half_against_second_half():
    """Channel i and i + C/2 as one complex number, multiplied by e^(i·position·θ_i)."""
    config = MiniMindConfig(**TINY, rope_theta=1e4)
    x = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 1000, 30000]])
    rotated = apply_rotary(x, *rotary_tables(config, positions)).double()
    theta = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)  # 10000^(−2i/8)
    turned = torch.complex(x[..., :4].double(), x[..., 4:].double()) * torch.exp(
        1j * positions[0, :, None].double() * theta
    )
    # Angles up to 30,000 rad carry a float32 rounding of about 1e-3 rad; small positions are exact to 1e-6.
    close(rotated[..., :4, :], torch.cat((turned.real, turned.imag), -1)[..., :4, :], 1e-6)
    close(rotated, torch.cat((turned.real, turned.imag), -1), 5e-3)


def test_ntk_formula():
    """base' = base·s^(C/(C−2)): the fastest pair unchanged, the slowest exactly s times slower."""
    plain = MiniMindConfig(**{**TINY, "hidden_size": 64}, rope_theta=1e4)
    scaled = MiniMindConfig(**{**TINY, "hidden_size": 64}, rope_theta=1e4, rope_scaling={"type": "ntk", "factor": 4.0})
    before, (after, factor) = rope_frequencies(plain)[0], rope_frequencies(scaled)
    by_hand = [(1e4 * 4.0 ** (16 / 14)) ** (-2 * i / 16) for i in range(8)]
    close(after, torch.tensor(by_hand), 1e-6)
    assert after[0] == before[0] == 1.0
    assert float(before[-1] / after[-1]) == pytest.approx(4.0, rel=1e-5)
    assert factor == 1.0


def test_logits_depend_on_relative_positions_only():
    model, x = tiny(), ids(1, 9)
    shifted = model(x, position_ids=torch.arange(9)[None] + 100).logits
    close(shifted, model(x).logits, 1e-4)
    stretched = model(x, position_ids=3 * torch.arange(9)[None]).logits
    assert (stretched - model(x).logits).abs().max() > 0.05


def test_rmsnorm_computes_in_float32():
    """Squares of 1e4 overflow half precision; the formula in float64 is the oracle."""
    norm = RMSNorm(64, eps=1e-5)
    x = 1e4 * torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        rounded, weight = x.to(dtype).double(), norm.weight.double()
        expected = rounded / (rounded.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        out = norm(x.to(dtype))
        assert out.dtype == dtype
        close(out.double(), expected, tolerance)
    small = norm(torch.full((1, 64), 1e-4))  # mean square 1e-8: eps is added under the root, before dividing
    close(small, (1e-4 / math.sqrt(1e-8 + 1e-5)) * norm.weight[None], 1e-6)


# Cache, padding, packing: every way to feed a sequence gives the logits of the plain one


@BOTH
@pytest.mark.parametrize("flash", [True, False], ids=["sdpa", "plain"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("chunks", [(12,), (1,) * 12, (5, 7), (3, 1, 4, 1, 3)], ids=str)
def test_cached_and_chunked_equal_plain(moe, flash, static, chunks):
    model, x = tiny(use_moe=moe, flash_attn=flash), ids(2, 12)
    expected = model(x).logits
    cache = StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    logits = []
    with torch.no_grad():
        for part in x.split(chunks, dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            assert out.past_key_values is cache
            logits.append(out.logits)
    close(torch.cat(logits, 1), expected)


def test_use_cache_makes_a_cache():
    model, x = tiny(), ids(1, 6)
    assert model(x).past_key_values is None
    first = model(x[:, :4], use_cache=True)
    assert first.past_key_values.get_seq_length() == 4
    close(model(x[:, 4:], past_key_values=first.past_key_values).logits, model(x).logits[:, 4:])


@BOTH
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("flash", [True, False], ids=["sdpa", "plain"])
def test_padded_batch_equals_each_alone(moe, side, flash):
    model = tiny(use_moe=moe, flash_attn=flash)
    rows = [ids(n, seed=n) for n in (9, 4, 7, 1)]
    batch, mask = pad_batch(rows, side)
    logits = model(batch, attention_mask=mask).logits
    assert logits.isfinite().all()
    for i, row in enumerate(rows):
        close(logits[i][mask[i].bool()], model(row[None]).logits[0])


@pytest.mark.parametrize("cache_kind", ["dynamic", "static", "static with a mask of its full size"])
@pytest.mark.parametrize("flash", [True, False], ids=["sdpa", "plain"])
def test_left_padded_batch_in_cached_chunks(cache_kind, flash):
    model = tiny(flash_attn=flash)
    rows = [ids(n, seed=n) for n in (9, 4)]
    batch, mask = pad_batch(rows, "left")
    static = cache_kind != "dynamic"
    cache = StaticCache(config=model.config, max_cache_len=11) if static else DynamicCache(config=model.config)
    logits, done = [], 0
    with torch.no_grad():
        for n in (3, 4, 1, 1):
            done += n
            seen = F.pad(mask[:, :done], (0, 11 - done if cache_kind.endswith("size") else 0))
            part = batch[:, done - n : done]
            logits.append(model(part, attention_mask=seen, past_key_values=cache, use_cache=True).logits)
    logits = torch.cat(logits, 1)
    for i, row in enumerate(rows):
        close(logits[i][mask[i].bool()], model(row[None]).logits[0])


def test_masks_drawn_out():
    """1 where query t (row) may look at slot s (column), written down by hand."""

    def drawn(*rows: str) -> Tensor:
        return torch.tensor([[c == "1" for c in row] for row in rows])

    def built(tokens, past, slots, attention_mask=None, documents=None, growing=True):
        given = None if attention_mask is None else torch.tensor([attention_mask])
        packed_in = None if documents is None else torch.tensor([documents])
        mask = attention_mask_4d(tokens, past, slots, torch.device("cpu"), given, packed_in, growing)
        return None if mask is None else mask[0, 0]

    assert built(4, 0, 4) is None and built(1, 5, 6) is None  # the kernel's own causal mode
    assert torch.equal(built(2, 2, 4), drawn("1110", "1111"))  # a chunk after two cached tokens
    assert torch.equal(built(2, 1, 5, growing=False), drawn("11000", "11100"))  # a static cache of five slots
    # Padding sees itself only, so that no softmax runs over nothing; nobody else sees it.
    assert torch.equal(built(4, 0, 4, [0, 0, 1, 1]), drawn("1000", "0100", "0010", "0011"))
    assert torch.equal(built(4, 0, 4, [1, 1, 0, 0]), drawn("1000", "1100", "1110", "1101"))
    assert torch.equal(built(1, 2, 5, [0, 1, 1], growing=False), drawn("01100"))
    assert torch.equal(built(5, 0, 5, documents=[0, 0, 1, -1, -1]), drawn("10000", "11000", "00100", "00010", "00011"))
    assert torch.equal(built(3, 0, 3, [0, 1, 1], documents=[0, 0, 1]), drawn("100", "010", "001"))


def test_mask_must_cover_the_cached_tokens():
    model, x = tiny(), ids(1, 6)
    cache = model(x, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="attention_mask has 1 .* 7"):
        model(x[:, :1], attention_mask=torch.ones(1, 1), past_key_values=cache)


@pytest.mark.parametrize("flash", [True, False], ids=["sdpa", "plain"])
def test_row_of_padding_gives_no_nan(flash):
    """Forward and backward: a row of nothing but padding, and one with holes on both sides."""
    model = tiny(flash_attn=flash).train()
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0]])
    x = ids(3, 5)
    out = model(x, attention_mask=mask, labels=x.masked_fill(mask == 0, IGNORE))
    out.loss.backward()
    assert out.logits.isfinite().all() and out.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    close(out.logits[2, 1:4], model(x[2:, 1:4]).logits[0])


def packed(lengths: list[int], width: int, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """One row of packed documents: ids, documents (−1 on the padding behind them), positions, each (1, width)."""
    documents = torch.full((1, width), -1)
    positions = torch.zeros(1, width, dtype=torch.long)
    start = 0
    for d, n in enumerate(lengths):
        documents[0, start : start + n] = d
        positions[0, start : start + n] = torch.arange(n)
        start += n
    return ids(1, width, seed=seed), documents, positions


@BOTH
@pytest.mark.parametrize("flash", [True, False], ids=["sdpa", "plain"])
def test_packed_documents_equal_each_alone(moe, flash):
    model = tiny(use_moe=moe, flash_attn=flash)
    rows = [packed([5, 1, 7], 15), packed([15], 15, seed=4), packed([], 15, seed=5)]
    x, documents, positions = (torch.cat(parts) for parts in zip(*rows, strict=True))
    logits = model(x, documents=documents, position_ids=positions).logits
    assert logits.isfinite().all()  # padding included
    for b, first, last in [(0, 0, 5), (0, 5, 6), (0, 6, 13), (1, 0, 15)]:
        close(logits[b, first:last], model(x[b : b + 1, first:last]).logits[0])


@BOTH
def test_no_gradient_crosses_documents(moe):
    model = tiny(use_moe=moe)
    x, documents, positions = packed([5, 6], 13)
    embeddings = model.model.embed_tokens(x).detach().requires_grad_()
    labels = x.masked_fill(documents != 1, IGNORE)
    labels[0, 5] = IGNORE  # the first token of a document is predicted by nobody
    out = model(inputs_embeds=embeddings, documents=documents, position_ids=positions, labels=labels)
    out.loss.backward()
    seen = embeddings.grad[0].abs().sum(-1)
    assert (seen[:5] == 0).all() and (seen[11:] == 0).all()
    assert (seen[5:10] > 0).all() and seen[10] == 0  # the last token of the document predicts nothing


def test_documents_cannot_be_cached():
    x, documents, positions = packed([4], 4)
    with pytest.raises(ValueError, match="documents"):
        tiny()(x, documents=documents, position_ids=positions, use_cache=True)


def test_documents_and_mask_together():
    """A mask on top of documents hides tokens inside them."""
    model = tiny()
    x, documents, positions = packed([6, 4], 10)
    mask = torch.ones(1, 10, dtype=torch.long)
    mask[0, 0] = 0
    logits = model(x, attention_mask=mask, documents=documents, position_ids=positions).logits
    close(logits[0, 1:6], model(x[:, 1:6]).logits[0])
    close(logits[0, 6:], model(x[:, 6:]).logits[0])


def test_future_tokens_change_nothing():
    model, x = tiny(), ids(1, 10)
    changed = x.clone()
    changed[0, 6:] = (x[0, 6:] + 1) % V
    assert torch.equal(model(changed).logits[0, :6], model(x).logits[0, :6])


def test_flash_equals_plain_for_ready_made_masks():
    """4D masks, boolean and additive, with a query that may see nothing: finite, and equal where something is seen."""
    x = ids(1, 6)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    allowed[:, 0] = False  # token 0 is hidden, from itself too
    allowed[4, 2] = False
    mask = allowed[None, None]
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    reference = tiny(flash_attn=True)(x, attention_mask=mask).logits
    for flash in (True, False):
        for given in (mask, additive):
            logits = tiny(flash_attn=flash)(x, attention_mask=given).logits
            assert logits.isfinite().all()
            close(logits[:, 1:], reference[:, 1:])
    full = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    close(tiny()(x, attention_mask=full).logits, tiny()(x).logits)


# Outputs


def test_logits_to_keep():
    model, x = tiny(), ids(2, 8)
    full = model(x).logits
    close(model(x, logits_to_keep=1).logits, full[:, -1:])
    close(model(x, logits_to_keep=3).logits, full[:, -3:])
    close(model(x, logits_to_keep=0).logits, full)
    close(model(x, logits_to_keep=torch.tensor([1, 4, 7])).logits, full[:, [1, 4, 7]])
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(x, labels=x, logits_to_keep=1)


def test_hidden_states_without_the_head():
    model, x = tiny(), ids(3, 9)
    out = model(x, need_logits=False)
    assert out.logits is None
    close(out.hidden_states @ model.lm_head.weight.T, model(x).logits)
    with pytest.raises(ValueError, match="need_logits"):
        model(x, labels=x, need_logits=False)


def test_inputs_embeds():
    model, x = tiny(), ids(2, 8)
    close(model(inputs_embeds=model.model.embed_tokens(x)).logits, model(x).logits)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(x, inputs_embeds=model.model.embed_tokens(x))


def test_hidden_states():
    model, x = tiny(), ids(2, 8)
    states = model(x, output_hidden_states=True).hidden_states
    assert len(states) == 3
    close(states[0], model.model.embed_tokens(x))
    close(states[2], model(x).hidden_states)
    close(model.lm_head(states[2]), model(x).logits)
    close(model.model.norm(model.model.layers[1](states[1], *layer_inputs(model, 8))[0]), states[2])


def layer_inputs(model: MiniMindForCausalLM, T: int) -> tuple:
    """rotary, mask, cache, valid of a plain causal call."""
    return rotary_tables(model.config, torch.arange(T)[None]), None, None, None


@BOTH
def test_forward_leaves_everything_as_it_was(moe):
    """No shared output object, no change of configuration, default dtype, random state or weights."""
    model = tiny(use_moe=moe)
    before = copy.deepcopy(model.config.to_dict()), torch.get_rng_state(), torch.get_default_dtype()
    weights = copy.deepcopy(model.state_dict())
    first = model(ids(1, 6), use_cache=True)
    kept = first.logits.clone()
    second = model(ids(1, 6, seed=9), use_cache=True)
    assert first is not second and first.past_key_values is not second.past_key_values
    assert torch.equal(first.logits, kept) and not torch.equal(second.logits, kept)
    assert model.config.to_dict() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1]) and torch.get_default_dtype() == before[2]
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())


# Loss


def test_loss_shifts_once():
    """nll of token t + 1 under the distribution after token t, written as a loop in float64."""
    model, x = tiny(), ids(2, 7)
    labels = x.clone()
    labels[0, 2] = labels[0, 0] = labels[1, 5:] = IGNORE
    out = model(x, labels=labels)
    logps = out.logits.double().log_softmax(-1)
    picked = [logps[b, t, labels[b, t + 1]] for b in range(2) for t in range(6) if labels[b, t + 1] != IGNORE]
    assert len(picked) == 9
    close(out.loss.double(), -sum(picked) / 9, 1e-6)
    for count in (36, torch.tensor(36)):  # Trainer passes the number of labels of all micro-batches
        batch = {"input_ids": x, "labels": labels, "attention_mask": torch.ones_like(x)}
        close(model(**batch, num_items_in_batch=count).loss.double(), -sum(picked) / 36, 1e-6)


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)], ids=str)
def test_nothing_to_train_on_is_zero_not_nan(count):
    model, x = tiny().train(), ids(2, 6)
    loss = model(x, labels=torch.full_like(x, IGNORE), num_items_in_batch=count).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_single_token_has_no_loss():
    assert tiny()(ids(2, 1), labels=ids(2, 1)).loss.item() == 0.0


@BOTH
def test_gradient_reaches_every_parameter(moe):
    model = tiny(use_moe=moe, n_shared_experts=2, seed=2).train()
    x = ids(4, 16)
    out = model(x, labels=x)
    (out.loss + out.aux_loss).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_dropout_only_in_training():
    model, x = tiny(dropout=0.5), ids(1, 8)
    assert torch.equal(model(x).logits, model(x).logits)
    close(model(x).logits, tiny(dropout=0.0)(x).logits)
    model.train()
    assert not torch.equal(model(x).logits, model(x).logits)
    close(tiny().train()(x).logits, tiny()(x).logits)


def test_short_and_long_rows_in_training_agree():
    """Rows of up to 256 tokens take another attention path on a CPU; a causal model must not notice."""
    model, x = tiny().train(), ids(1, 257)
    documents = (torch.arange(257) // 100)[None]
    close(model(x).logits[:, :256], model(x[:, :256]).logits)
    packed = model(x, documents=documents).logits[:, :256]
    close(packed, model(x[:, :256], documents=documents[:, :256]).logits)


def test_dropout_on_embedding_attention_and_feed_forward():
    """Half of the channels vanish at each of the three places, the others double."""
    model, x = tiny(dropout=0.5).train(), ids(8, 32)
    seen = {}
    block = model.model.layers[0]
    block.register_forward_hook(lambda module, args, out: seen.update(start=args[0], end=out[0]))
    block.self_attn.register_forward_hook(lambda module, args, out: seen.update(attention=out))
    model(x)
    embedded = model.model.embed_tokens(x)
    kept = seen["start"] != 0
    close(seen["start"][kept], 2 * embedded[kept])
    between = seen["start"] + seen["attention"]
    for dropped in (~kept, seen["attention"] == 0, seen["end"] == between):
        assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("flash", [True, False], ids=["sdpa", "plain"])
def test_dropout_keeps_the_mean(flash):
    """Attention probabilities are dropped and rescaled: the average over many draws is the eval output."""
    attention = tiny(dropout=0.2, flash_attn=flash).model.layers[0].self_attn
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    rotary = rotary_tables(MiniMindConfig(**TINY), torch.arange(5)[None])
    with torch.no_grad():
        expected = attention(x, rotary, None, None)
        attention.train()
        many = attention(x.expand(8000, -1, -1), rotary, None, None)
    deviation = (many.mean(0) - expected[0]).abs().max()
    assert deviation < 6 * many.std(0).max() / math.sqrt(8000)
    assert many.std() > 0.1 * expected.std()


# Initialisation


def test_initialisation_statistics():
    """Normal weights of 0.02, 0.02/√(2L) where a layer writes into the residual stream, norms at one."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=128, num_hidden_layers=4, use_moe=True, vocab_size=1000))
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
            continue
        residual = "o_proj" in name or "down_proj" in name
        expected = 0.02 / math.sqrt(8) if residual else 0.02
        spread = 5 / math.sqrt(2 * p.numel())  # five standard errors of a sample standard deviation
        assert p.std().item() == pytest.approx(expected, rel=spread), name
        assert abs(p.mean().item()) < 5 * expected / math.sqrt(p.numel()), name


def test_first_loss_is_that_of_a_uniform_guess():
    """Near ln V. Logits of variance D·0.02² cost half of it: 0.10 nats for the 26M model, 0.006 for a tiny one."""
    torch.manual_seed(0)
    small = MiniMindForCausalLM(MiniMindConfig()).eval()
    for model, vocabulary, excess in ((small, 6400, 0.102), (tiny(initializer_range=0.02), V, 0.006)):
        x = torch.randint(3, vocabulary, (2, 128))
        with torch.no_grad():
            assert model(x, labels=x).loss.item() == pytest.approx(math.log(vocabulary) + excess, abs=0.05)


# Precision


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_weights(moe, dtype):
    """Cast weights follow the float32 logits; activations near 1e4 neither overflow nor turn into NaN."""
    model, x = tiny(use_moe=moe, initializer_range=0.05), ids(2, 16)
    expected = model(x).logits
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    half = copy.deepcopy(model).to(dtype)
    assert half(x).logits.dtype == dtype
    scale = expected.abs().max()
    assert (half(x).logits.float() - expected).abs().max() < (0.01 if dtype == torch.float16 else 0.06) * scale
    large = half.model.embed_tokens(x) * (1e4 / half.model.embed_tokens(x).abs().max())
    out = half(inputs_embeds=large, attention_mask=mask, labels=x)
    assert out.logits.isfinite().all() and out.loss.isfinite()
    assert out.loss.dtype == torch.float32


@BOTH
@pytest.mark.parametrize("flash", [True, False], ids=["sdpa", "plain"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_autocast(moe, flash, dtype):
    model, x = tiny(use_moe=moe, flash_attn=flash, initializer_range=0.05).train(), ids(2, 16)
    reference = model(x, labels=x)
    _, documents, positions = packed([7, 9], 16)
    with torch.autocast("cpu", dtype):
        out = model(x, labels=x)
        more = model(x, labels=x, documents=documents.expand(2, -1), position_ids=positions.expand(2, -1))
        large = model(inputs_embeds=model.model.embed_tokens(x) * 1e5, labels=x)
    assert out.loss.dtype == torch.float32 and out.aux_loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(reference.loss.item(), rel=0.01)
    (out.loss + more.loss + large.loss + large.aux_loss).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_dense_compiles_without_graph_breaks(backend):
    """Forward and backward against the eager model: capture in every case, generated code once (it takes long)."""
    torch._dynamo.reset()
    eager = tiny(num_hidden_layers=1 if backend == "inductor" else 2).train()
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x, documents, positions = packed([6, 8], 16)
    cases = [{"documents": documents, "position_ids": positions}]
    if backend == "aot_eager":
        cases += [{}, {"attention_mask": (documents >= 0).long()}]
    for extra in cases:
        eager.zero_grad()
        model.zero_grad()
        expected, out = eager(x, labels=x, **extra), compiled(x, labels=x, **extra)
        close(out.logits, expected.logits)
        expected.loss.backward()
        out.loss.backward()
        same_gradients(model, eager)


# Generation


def greedy(model: MiniMindForCausalLM, prompt: Tensor, n: int) -> list[int]:
    """Argmax of a plain forward, again and again."""
    x = prompt[None]
    with torch.no_grad():
        for _ in range(n):
            x = torch.cat((x, model(x).logits[:, -1:].argmax(-1)), 1)
    return x[0, len(prompt) :].tolist()


@BOTH
def test_generate_greedy(moe):
    model, prompt = tiny(use_moe=moe), ids(5)
    expected = greedy(model, prompt, 8)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}):
        out = model.generate(prompt[None], max_new_tokens=8, do_sample=False, **options)
        assert out[0, 5:].tolist() == expected, options


@pytest.mark.parametrize("flash", [True, False], ids=["sdpa", "plain"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_generate_from_a_left_padded_batch(flash, options):
    model = tiny(flash_attn=flash)
    rows = [ids(n, seed=n) for n in (6, 2, 4)]
    batch, mask = pad_batch(rows, "left")
    out = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)
    assert out[:, 6:].tolist() == [greedy(model, row, 6) for row in rows]


def test_generate_samples_and_beams_do_not_depend_on_the_cache():
    model = tiny()
    batch, mask = pad_batch([ids(5), ids(3, seed=2)], "left")
    for options in ({"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8}, {"num_beams": 2}):
        drawn = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            drawn.append(
                model.generate(batch, attention_mask=mask, max_new_tokens=6, use_cache=use_cache, **options).tolist()
            )
        assert drawn[0] == drawn[1], options


def test_beam_search_finds_a_likelier_text_than_chance():
    """With as many beams as tokens the best two-token continuation is found; brute force over V² is the oracle."""
    model, prompt = tiny(), ids(4)
    with torch.no_grad():
        first = model(prompt[None]).logits[0, -1].log_softmax(-1)
        pairs = torch.cat((prompt.expand(V, -1), torch.arange(V)[:, None]), 1)
        second = model(pairs).logits[:, -1].log_softmax(-1)
    best = (first[:, None] + second).flatten().argmax().item()
    out = model.generate(prompt[None], max_new_tokens=2, num_beams=V, do_sample=False)
    assert out[0, 4:].tolist() == [best // V, best % V]


def test_generate_stops_at_eos():
    model, prompt = tiny(), ids(5)
    expected = greedy(model, prompt, 8)
    stop = expected[3]
    out = model.generate(prompt[None], max_new_tokens=8, do_sample=False, eos_token_id=stop)
    assert out[0, 5:].tolist() == expected[: expected.index(stop) + 1]


# transformers folder


@BOTH
def test_save_and_from_pretrained(moe, tmp_path):
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    model = tiny(use_moe=moe, rope_scaling=scaling, rope_theta=1e4)
    model.save_pretrained(tmp_path)
    again = MiniMindForCausalLM.from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.config.rope_scaling == scaling and again.config.rope_theta == 1e4
    same_model(again, model)
    assert again.config.to_diff_dict().keys() <= model.config.to_diff_dict().keys() | {"architectures", "dtype"}


REMOTE = """
import importlib.util, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
assert importlib.util.find_spec("model") is None, "the repository must not be importable here"
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).rope_scaling == {"type": "linear", "factor": 2.0}
assert model.lm_head.weight is model.model.embed_tokens.weight
x, mask = torch.load(sys.argv[2])
model.generation_config.eos_token_id = None
torch.manual_seed(0)
out = {"logits": model(x).logits.detach(), "state": model.state_dict()}
for name, options in {
    "greedy": {}, "static": {"cache_implementation": "static"}, "beams": {"num_beams": 2},
    "sample": {"do_sample": True, "top_k": 10},
}.items():
    out[name] = model.generate(x, attention_mask=mask, max_new_tokens=5, **{"do_sample": False, **options})
model.save_pretrained(folder + "_again")
torch.save(out, sys.argv[3])
"""


@pytest.mark.slow
@BOTH
def test_folder_works_without_the_repository(moe, tmp_path):
    """AutoModelForCausalLM with trust_remote_code, in a process that cannot import this project."""
    model = tiny(use_moe=moe, rope_scaling={"type": "linear", "factor": 2.0})
    x, mask = pad_batch([ids(6), ids(3, seed=2)], "left")
    model.save_pretrained(tmp_path / "folder")
    torch.save((x, mask), tmp_path / "batch.pt")
    python_path = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p).resolve() != ROOT]
    (tmp_path / "empty").mkdir()
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(python_path),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(tmp_path / "folder"), str(tmp_path / "batch.pt"), str(tmp_path / "out.pt")],
        cwd=tmp_path / "empty", env=env, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    out = torch.load(tmp_path / "out.pt")
    close(out["logits"], model(x).logits.detach(), 1e-5)
    assert out["state"].keys() == model.state_dict().keys()
    assert all(torch.equal(out["state"][name], tensor) for name, tensor in model.state_dict().items())
    torch.manual_seed(0)
    for name, options in {
        "greedy": {}, "static": {}, "beams": {"num_beams": 2}, "sample": {"do_sample": True, "top_k": 10},
    }.items():  # fmt: skip
        mine = model.generate(x, attention_mask=mask, max_new_tokens=5, **{"do_sample": False, **options})
        assert out[name].tolist() == mine.tolist(), name
    assert (tmp_path / "folder_again" / "model_minimind.py").is_file()


def test_positions_beyond_the_table_work():
    """Rotary tables are computed for the positions at hand: nothing is outgrown, nothing is saved."""
    model, x = tiny(max_position_embeddings=8), ids(1, 20)
    assert model(x).logits.isfinite().all()
    assert not list(model.buffers())
    assert F.cosine_similarity(model(x).logits, model(x, position_ids=torch.arange(20)[None]).logits, -1).min() > 0.999
