"""The model against oracles that are not the model: transformers' Llama, formulas, names, greedy choice step by step.

Legend as in model_minimind.py: B batch, T tokens, C channels of one head, V vocabulary. Most tests use weights ten
times larger than the initialisation: with small ones attention is nearly uniform, and a wrong mask would hide in the
tolerance.
"""

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
from transformers import LlamaConfig, LlamaForCausalLM

from model.model_minimind import (
    MiniMindConfig,
    MiniMindForCausalLM,
    RMSNorm,
    apply_rotary,
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
