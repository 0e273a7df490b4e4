"""A model as one GGUF file, which llama.cpp and what is built on it (Ollama, LM Studio, …) run.

    dense, or experts without shared ones   architecture `llama`
    experts with shared ones                architecture `granitemoe`, its four scales set to leave ours as it is

llama.cpp rotates channel 2i against 2i + 1 in both, we rotate i against i + C/2: the rows of q and k are put in its
order. Rotary scaling: linear and YaRN have keys of their own; NTK is a larger base; a YaRN with other than the usual
limits, for which these architectures read no keys, becomes a table of factors on the frequencies (`rope_freqs.weight`,
which Llama 3 brought).

Dimension legend: H query heads · K key/value heads · C channels of one head · D hidden size · E experts.

中文：把模型写成 GGUF 文件（f32、f16、bf16、q8_0），含分词器与对话模板，供 llama.cpp 与 Ollama 使用。
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, RopeScalingType, TokenType
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from model.model_minimind import MiniMindConfig, rope_frequencies
from scripts.converting.stock_architectures import PROJECTIONS, rope_parameters, stacked, stock_type
from scripts.converting.verify import BadExport
from trainer.command_line import UserError

TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
YARN_LIMITS = (32.0, 1.0)  # beta_fast, beta_slow: fixed in llama.cpp for these architectures
# Pre-tokenizers of a byte-level BPE, and the name under which llama.cpp knows each.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
PRE_TYPES = {"gpt-2": [BYTE_LEVEL], "smollm": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}


def architecture(config: MiniMindConfig) -> str:
    """The architecture's name in GGUF.  Raises: UserError on a model that llama.cpp cannot express."""
    if config.hidden_act not in ("silu", "swish"):
        raise UserError(f"hidden_act {config.hidden_act!r} cannot be exported: llama.cpp computes silu here.")
    return "granitemoe" if stock_type(config) == "granitemoeshared" else "llama"


# --- Tensors ----------------------------------------------------------------------------------------------------------


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k in llama.cpp's order: channel i and i + C/2 become neighbours.  Shape: (heads · C, D) → same."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def halved(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    return weight.view(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def gguf_tensors(config: MiniMindConfig, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by their names in GGUF."""
    yield "token_embd.weight", state["model.embed_tokens.weight"]
    yield "output_norm.weight", state["model.norm.weight"]
    if not config.tie_word_embeddings:
        yield "output.weight", state["lm_head.weight"]
    if (factors := frequency_factors(config)) is not None:
        yield "rope_freqs.weight", factors
    for i in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{i}.", f"blk.{i}."
        yield theirs + "attn_norm.weight", state[ours + "input_layernorm.weight"]
        q, k, v, o = (state[f"{ours}self_attn.{part}_proj.weight"] for part in "qkvo")
        yield theirs + "attn_q.weight", interleaved(q, config.num_attention_heads)
        yield theirs + "attn_k.weight", interleaved(k, config.num_key_value_heads)
        yield theirs + "attn_v.weight", v
        yield theirs + "attn_output.weight", o
        yield theirs + "ffn_norm.weight", state[ours + "post_attention_layernorm.weight"]
        if not config.use_moe:
            for part in PROJECTIONS:
                yield f"{theirs}ffn_{part}.weight", state[f"{ours}mlp.{part}_proj.weight"]
            continue
        yield theirs + "ffn_gate_inp.weight", state[ours + "mlp.gate.weight"]
        for part in PROJECTIONS:
            routed = stacked(state, ours + "mlp.", "experts", part, config.n_routed_experts)
            yield f"{theirs}ffn_{part}_exps.weight", routed  # (E, out, in)
            if config.n_shared_experts:
                shared = stacked(state, ours + "mlp.", "shared_experts", part, config.n_shared_experts)
                joined = torch.cat(tuple(shared), dim=1) if part == "down" else shared.flatten(0, 1)
                yield f"{theirs}ffn_{part}_shexp.weight", joined


def packed(name: str, tensor: Tensor, kind: str, joined: int = 1) -> tuple[np.ndarray, GGMLQuantizationType]:
    """The bytes of a tensor and their type. Vectors and routers stay float32: they are small, and rounding hurts them.

    A row that is no multiple of a q8_0 block becomes f16.  Args: joined, experts side by side in a row.
    """
    array, wanted = tensor.float().numpy(), TYPES[kind][0]
    if tensor.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
        wanted = GGMLQuantizationType.F32
    elif wanted == GGMLQuantizationType.Q8_0 and tensor.shape[-1] // joined % 32:
        wanted = GGMLQuantizationType.F16
    return gguf.quants.quantize(array, wanted), wanted


def round_as_gguf(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Our tensors as a file of this kind rounds them, float32.

    Raises: UserError when one is too large for it.
    """
    result = {}
    for name, tensor in state.items():
        router = name.endswith("mlp.gate.weight")
        array, wanted = packed("ffn_gate_inp.weight" if router else name, tensor, kind)
        result[name] = torch.from_numpy(gguf.quants.dequantize(array, wanted).astype(np.float32))
        if not result[name].isfinite().all():
            raise UserError(f"some weights do not fit {kind}: try --dtype bf16 or f32.")
    return result


# --- Rotary embedding -------------------------------------------------------------------------------------------------


def usual_yarn(rope: dict) -> bool:
    return rope["rope_type"] == "yarn" and (rope["beta_fast"], rope["beta_slow"]) == YARN_LIMITS


def frequency_factors(config: MiniMindConfig) -> Tensor | None:
    """What llama.cpp divides the unscaled frequencies by, for a YaRN that it has no keys for.  Shape: (C/2,)."""
    rope = rope_parameters(config)
    if rope["rope_type"] != "yarn" or usual_yarn(rope):
        return None
    plain = MiniMindConfig(**{**config.to_diff_dict(), "rope_scaling": None})
    return rope_frequencies(plain)[0] / rope_frequencies(config)[0]


def write_rope(writer: GGUFWriter, config: MiniMindConfig) -> None:
    rope = rope_parameters(config)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    attention = rope_frequencies(config)[1]  # on cos and sin
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif usual_yarn(rope):
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        attention /= 0.1 * np.log(rope["factor"]) + 1.0  # llama.cpp multiplies by this itself
    else:
        writer.add_rope_scaling_type(RopeScalingType.NONE)
    if abs(attention - 1) > 1e-9:
        writer.add_rope_scaling_attn_factors(float(attention))


def file_frequencies(fields: dict, factors: np.ndarray | None, arch: str, channels: int) -> tuple[np.ndarray, float]:
    """Frequencies and the factor on cos and sin, as llama.cpp computes them from a file (ggml's `rope_yarn`).

    Written from its formulas, not from ours, so that the two can be compared.  Shape: (C/2,) float64, scalar.
    """
    get = lambda key, default=None: fields.get(f"{arch}.rope.{key}", default)  # noqa: E731
    pairs = np.arange(channels // 2)
    base = get("freq_base", 10000.0)
    extrapolated = base ** (-2.0 * pairs / channels) / (1.0 if factors is None else factors)
    kind, factor = get("scaling.type", "linear"), get("scaling.factor", 1.0)
    scale = 1.0 if kind == "none" else 1.0 / factor
    attention = get("scaling.attn_factor", 1.0)
    if kind != "yarn":
        return extrapolated * scale, attention

    trained = get("scaling.original_context_length", fields[f"{arch}.context_length"])
    low, high = (channels * np.log(trained / (b * 2 * np.pi)) / (2 * np.log(base)) for b in YARN_LIMITS)
    low, high = max(0.0, np.floor(low)), min(channels - 1.0, np.ceil(high))
    mix = 1 - np.clip((pairs - low) / max(0.001, high - low), 0, 1)  # 1: extrapolated, 0: interpolated
    return extrapolated * (scale * (1 - mix) + mix), attention * (1 + 0.1 * np.log(factor))


# --- Tokenizer --------------------------------------------------------------------------------------------------------


def pre_type(tokenizer: PreTrainedTokenizerFast) -> str:
    """llama.cpp's name of a tokenizer's pre-tokenizer.  Raises: UserError when it would tokenise otherwise."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    splitter, model = backend["pre_tokenizer"] or {}, backend["model"]
    steps = splitter.get("pretokenizers", [splitter])
    names = [
        name
        for name, wanted in PRE_TYPES.items()
        if len(steps) == len(wanted) and all(w.items() <= s.items() for w, s in zip(wanted, steps, strict=True))
    ]
    if not names:
        kinds = [step.get("type") for step in steps]
        raise UserError(f"the pre-tokenizer {kinds} has no name in llama.cpp that is known here: tokens would differ.")
    plain = model["type"] == "BPE" and not model.get("byte_fallback") and not model.get("ignore_merges")
    odd = [t for t in backend["added_tokens"] if t["lstrip"] or t["rstrip"] or t["single_word"] or t["normalized"]]
    adds = tokenizer.encode("a") != tokenizer.encode("a", add_special_tokens=False)
    if backend["normalizer"] is not None or not plain or adds or odd:
        raise UserError("this tokenizer normalises, adds tokens or falls back in ways that llama.cpp does not know.")
    return names[0]


def plain_template(template: str) -> str:
    """The chat template without transformers' own tag `generation`, which only marks what is trained on.

    Plain Jinja knows no such tag. A condition that always holds keeps the white space as it is.
    """
    template = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", template)


def vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> tuple[list[str], list[int], list[str]]:
    """(tokens, their types, merges) by the rules of GGUF; ids beyond the tokenizer's get names and no use."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [f"[unused{i}]" for i in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for token, i in backend["model"]["vocab"].items():
        tokens[i], types[i] = token, int(TokenType.NORMAL)
    for added in backend["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    return tokens, types, [m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"]]


def write_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Vocabulary, merges, special tokens, chat template.  Raises: UserError as `pre_type`."""
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(pre_type(tokenizer))
    tokens, types, merges = vocabulary(tokenizer, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "unk", "pad"):
        if (i := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    writer.add_add_bos_token(False)  # the template writes it
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(plain_template(tokenizer.chat_template))


# --- The file ---------------------------------------------------------------------------------------------------------


def write_gguf(
    path: Path,
    config: MiniMindConfig,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    kind: str,
    name: str,
) -> None:
    """Raises: UserError when something cannot be expressed, OSError when the file cannot be written."""
    arch = architecture(config)
    writer = GGUFWriter(path, arch)
    writer.add_name(name)
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    write_rope(writer, config)
    if config.use_moe:
        writer.add_expert_count(config.n_routed_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if arch == "granitemoe":
        writer.add_expert_shared_feed_forward_length(config.n_shared_experts * config.intermediate_size)
        writer.add_attention_scale(config.head_dim**-0.5)
        writer.add_embedding_scale(1.0)
        writer.add_residual_scale(1.0)
        writer.add_logit_scale(1.0)
    write_tokenizer(writer, tokenizer, config.vocab_size)
    try:
        bar = tqdm(list(gguf_tensors(config, state)), desc="writing", unit="tensor", disable=None, leave=False)
        for tensor_name, tensor in bar:
            joined = config.n_shared_experts if tensor_name.endswith("ffn_down_shexp.weight") else 1
            array, dtype = packed(tensor_name, tensor, kind, joined)
            writer.add_tensor(tensor_name, array, raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def open_gguf(path: Path) -> tuple[GGUFReader, str]:
    """A file and its kind.  Raises: UserError when it is damaged, or of a type not in TYPES."""
    try:
        reader = GGUFReader(path)
        number = reader.fields["general.file_type"].contents()
    except (ValueError, IndexError, KeyError) as error:  # each a form of cut off
        raise UserError(f"{path} is cut off, damaged or no GGUF file ({error}).") from error
    kinds = {int(file_type): kind for kind, (_, file_type) in TYPES.items()}
    if number not in kinds:
        raise UserError(f"{path} is of GGUF file type {number}; compared here: {', '.join(TYPES)}.")
    return reader, kinds[number]


def read_gguf(
    path: Path, config: MiniMindConfig, tokenizer: PreTrainedTokenizerFast | None = None
) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file by our names, float32, and its kind, after a look at its sizes, its rotary settings and,
    where one is given, its tokenizer.

    Raises: BadExport when the file does not describe this model; UserError as `open_gguf`.
    """
    reader, kind = open_gguf(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    arch = fields["general.architecture"]
    there = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    sizes = {
        "embedding_length": config.hidden_size, "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size, "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads, "expert_count": config.n_routed_experts * config.use_moe,
        "expert_used_count": config.num_experts_per_tok * config.use_moe,
    }  # fmt: skip
    for key, wanted in sizes.items():
        if fields.get(f"{arch}.{key}", 0) != wanted:
            raise BadExport(f"{path.name} says {key} {fields.get(f'{arch}.{key}')}, the model has {wanted}.")
    frequencies, attention = file_frequencies(fields, there.pop("rope_freqs.weight", None), arch, config.head_dim)
    wanted, factor = rope_frequencies(config)
    if not np.allclose(frequencies, wanted.numpy(), rtol=1e-5, atol=0) or abs(attention - factor) > 1e-5:
        raise BadExport(
            f"{path.name} rotates by {frequencies} · {attention}, the model by {wanted.numpy()} · {factor}."
        )
    if tokenizer is not None:
        written = zip(("tokens", "token_type", "merges"), vocabulary(tokenizer, config.vocab_size), strict=True)
        wanted = {f"ggml.{key}": values for key, values in (*written, ("pre", pre_type(tokenizer)))}
        wanted["chat_template"] = plain_template(tokenizer.chat_template) if tokenizer.chat_template else None
        if other := [key for key, values in wanted.items() if fields.get(f"tokenizer.{key}") != values]:
            raise BadExport(f"{path.name} holds another tokenizer than the model's: {', '.join(other)} differ.")
    return our_names(config, {name: torch.from_numpy(array) for name, array in there.items()}, path), kind


def our_names(config: MiniMindConfig, there: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The inverse of `gguf_tensors`.  Raises: BadExport when a tensor is missing or too many."""
    state, there = {}, dict(there)
    try:
        state["model.embed_tokens.weight"] = there.pop("token_embd.weight")
        state["model.norm.weight"] = there.pop("output_norm.weight")
        state["lm_head.weight"] = (
            state["model.embed_tokens.weight"] if config.tie_word_embeddings else there.pop("output.weight")
        )
        for i in range(config.num_hidden_layers):
            ours, theirs = f"model.layers.{i}.", f"blk.{i}."
            attention = {"q": "q", "k": "k", "v": "v", "o": "output"}
            q, k, v, o = (there.pop(f"{theirs}attn_{name}.weight") for name in attention.values())
            parts = (halved(q, config.num_attention_heads), halved(k, config.num_key_value_heads), v, o)
            for part, tensor in zip(attention, parts, strict=True):
                state[f"{ours}self_attn.{part}_proj.weight"] = tensor
            state[ours + "input_layernorm.weight"] = there.pop(theirs + "attn_norm.weight")
            state[ours + "post_attention_layernorm.weight"] = there.pop(theirs + "ffn_norm.weight")
            if config.use_moe:
                state[ours + "mlp.gate.weight"] = there.pop(theirs + "ffn_gate_inp.weight")
            for part in PROJECTIONS:
                if not config.use_moe:
                    state[f"{ours}mlp.{part}_proj.weight"] = there.pop(f"{theirs}ffn_{part}.weight")
                    continue
                for e, tensor in enumerate(there.pop(f"{theirs}ffn_{part}_exps.weight")):
                    state[f"{ours}mlp.experts.{e}.{part}_proj.weight"] = tensor
                if config.n_shared_experts:
                    joined, axis = there.pop(f"{theirs}ffn_{part}_shexp.weight"), int(part == "down")
                    for s, tensor in enumerate(joined.chunk(config.n_shared_experts, axis)):
                        state[f"{ours}mlp.shared_experts.{s}.{part}_proj.weight"] = tensor
    except KeyError as error:
        raise BadExport(f"{path.name} lacks the tensor {error}.") from error
    if there:
        raise BadExport(f"{path.name} also holds {sorted(there)[0]}, which is none of the model's.")
    return {name: tensor.contiguous() for name, tensor in state.items()}
