"""Our model as an architecture that transformers ships, and back: no code of ours is needed to run it then.

    dense                 LlamaForCausalLM              the same names and the same arithmetic
    experts, shared       GraniteMoeSharedForCausalLM   shared experts concatenated into one, gate and up stacked
    experts, none shared  MixtralForCausalLM            w1 gate, w3 up, w2 down

Both expert architectures take the top k of the router's logits and the softmax over these k, which equals our softmax
over all experts divided by the sum of the k chosen: exp(l_e) / Σ_k exp(l). Concatenated shared experts equal their sum,
because every one is a sum over its own hidden channels. State dicts here have the names of files, not those of modules
in memory, which changed between versions of transformers.

Dimension legend: D hidden size · F feed-forward size · E routed experts · S shared experts.

中文：把我们的模型写成 transformers 自带的架构（Llama、GraniteMoeShared、Mixtral），以及反向转换。
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, GraniteMoeSharedConfig, LlamaConfig, MixtralConfig, PretrainedConfig

from model.model_minimind import MiniMindConfig
from model.weights import WeightsError
from trainer.command_line import UserError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
PROJECTIONS = ("gate", "up", "down")
MIXTRAL_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


def stock_type(config: MiniMindConfig) -> str:
    """The `model_type` of the stock form.  Raises: UserError naming what no stock form can express."""
    if not config.use_moe:
        return "llama"
    if config.num_experts_per_tok == 1:
        raise UserError(
            "num_experts_per_tok 1 cannot be exported exactly: here one chosen expert keeps its softmax probability as "
            "its weight, stock architectures give it the weight 1. Use to-transformers."
        )
    if not config.norm_topk_prob:
        raise UserError(
            "norm_topk_prob False cannot be exported exactly: stock architectures divide the weights of the chosen "
            "experts by their sum. Use to-transformers."
        )
    return "granitemoeshared" if config.n_shared_experts else "mixtral"


def rope_parameters(config: MiniMindConfig) -> dict:
    """Rotary settings as transformers 5 writes them. NTK becomes a larger base, which is all it does."""
    scaling = config.rope_scaling
    if not scaling:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    kind, factor, C = scaling.get("rope_type", scaling.get("type")), float(scaling["factor"]), config.head_dim
    if kind == "ntk":
        return {"rope_type": "default", "rope_theta": config.rope_theta * factor ** (C / (C - 2))}
    written = {"rope_type": kind, "rope_theta": config.rope_theta, "factor": factor}
    if kind == "yarn":  # in full: not every reader has the same defaults
        trained = scaling.get("original_max_position_embeddings", config.max_position_embeddings)
        written |= {
            "original_max_position_embeddings": trained,
            "beta_fast": float(scaling.get("beta_fast", 32)),
            "beta_slow": float(scaling.get("beta_slow", 1)),
        }
        if scaling.get("attention_factor"):
            written["attention_factor"] = float(scaling["attention_factor"])
    return written


def stock_config(config: MiniMindConfig) -> PretrainedConfig:
    """The configuration of the stock form.  Raises: UserError as `stock_type`."""
    kind = stock_type(config)
    same = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    same += " hidden_act max_position_embeddings rms_norm_eps initializer_range bos_token_id eos_token_id pad_token_id"
    fields = {name: getattr(config, name) for name in f"{same} tie_word_embeddings".split()}
    rope = rope_parameters(config)
    fields |= {"rope_parameters": rope, "architectures": [ARCHITECTURES[kind]]}
    if rope["rope_type"] == "yarn":
        # Their rule for YaRN: positions are the trained ones times the factor. Some releases of transformers 4 take the
        # factor from this quotient and not from the key; the others warn where the two differ.
        fields["max_position_embeddings"] = round(rope["original_max_position_embeddings"] * rope["factor"])
    if kind == "llama":
        return LlamaConfig(**fields, head_dim=config.head_dim, attention_bias=False, mlp_bias=False)
    fields |= {"num_local_experts": config.n_routed_experts, "num_experts_per_tok": config.num_experts_per_tok}
    fields["router_aux_loss_coef"] = config.aux_loss_alpha
    if kind == "mixtral":
        return MixtralConfig(**fields, head_dim=config.head_dim, sliding_window=None)
    return GraniteMoeSharedConfig(
        **fields,
        shared_intermediate_size=config.n_shared_experts * config.intermediate_size,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
        attention_multiplier=config.head_dim**-0.5,
        attention_bias=False,
    )


def config_json(config: PretrainedConfig) -> dict:
    """What goes into config.json. The older keys stand beside `rope_parameters`: transformers 4 knows only those, and
    would silently rotate with its default base."""
    fields = config.to_diff_dict()
    fields |= {"model_type": config.model_type, "architectures": config.architectures}
    if isinstance(rope := fields.get("rope_parameters"), dict):
        fields["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            fields["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return fields


def to_stock(config: MiniMindConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by the names of the stock form's files. No number is changed.  Raises: UserError as `stock_type`."""
    kind, renamed = stock_type(config), {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if kind == "llama" or ".mlp." not in name:
            renamed[name] = tensor
    if kind == "llama":
        return renamed
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.block_sparse_moe."
        if kind == "mixtral":
            renamed[theirs + "gate.weight"] = state[ours + "gate.weight"]
            for e in range(config.n_routed_experts):
                for part in PROJECTIONS:
                    name = f"{theirs}experts.{e}.{MIXTRAL_NAMES[part]}.weight"
                    renamed[name] = state[f"{ours}experts.{e}.{part}_proj.weight"]
            continue
        renamed[theirs + "router.layer.weight"] = state[ours + "gate.weight"]
        gate, up, down = (stacked(state, ours, "experts", part, config.n_routed_experts) for part in PROJECTIONS)
        renamed[theirs + "input_linear.weight"] = torch.cat((gate, up), dim=1)  # (E, 2·F, D)
        renamed[theirs + "output_linear.weight"] = down  # (E, D, F)
        gate, up, down = (stacked(state, ours, "shared_experts", part, config.n_shared_experts) for part in PROJECTIONS)
        shared = f"model.layers.{layer}.shared_mlp."
        renamed[shared + "input_linear.weight"] = torch.cat((gate.flatten(0, 1), up.flatten(0, 1)))  # (2·S·F, D)
        renamed[shared + "output_linear.weight"] = torch.cat(tuple(down), dim=1)  # (D, S·F)
    return renamed


def stacked(state: dict[str, Tensor], prefix: str, group: str, part: str, count: int) -> Tensor:
    """One projection of all experts of a layer.  Shape: (count, out, in)."""
    return torch.stack([state[f"{prefix}{group}.{e}.{part}_proj.weight"] for e in range(count)])


def read_stock_config(folder: Path) -> PretrainedConfig:
    """The configuration of a folder.  Raises: WeightsError when it is damaged or of an architecture not read here."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        if kind not in ARCHITECTURES:
            names = ", ".join(["MiniMindForCausalLM", *ARCHITECTURES.values()])
            raise WeightsError(f"{folder} holds a model of type {kind!r}; read here: {names}.")
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except WeightsError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{folder}/config.json cannot be read: {' '.join(str(error).split())[:300]}") from error


def our_rope(config: PretrainedConfig) -> tuple[float, dict | None]:
    """(rope_theta, rope_scaling) of ours.  Raises: WeightsError on a scaling we do not have."""
    rope = dict(config.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    rope = {name: value for name, value in rope.items() if value is not None and name != "type"}
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise WeightsError("this model rotates only a part of each head, which ours cannot.")
    if kind == "default":
        return theta, None
    known = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"}
    if kind not in ("linear", "yarn") or rope.keys() - known:
        raise WeightsError(f"rotary scaling {kind!r} with {sorted(rope)} is not read here; expected linear or yarn.")
    return theta, {"type": kind, **rope}


def from_stock(config: PretrainedConfig, state: dict[str, Tensor]) -> tuple[MiniMindConfig, dict[str, Tensor]]:
    """Our configuration and our names for a stock model.  Raises: WeightsError when ours cannot express it exactly."""
    kind, theta_and_scaling = config.model_type, our_rope(config)
    D, H = config.hidden_size, config.num_attention_heads
    wanted = {"attention_bias": False, "mlp_bias": False, "head_dim": D // H, "sliding_window": None}
    if kind == "granitemoeshared":
        wanted |= dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0)
    for name, value in wanted.items():
        if getattr(config, name, value) not in (value, None):
            raise WeightsError(f"a model with {name} {getattr(config, name)} cannot be ours, which has {value}.")
    if kind == "granitemoeshared" and abs(config.attention_multiplier * (D // H) ** 0.5 - 1) > 1e-6:
        scale = config.attention_multiplier
        raise WeightsError(f"a model with attention_multiplier {scale} cannot be ours: expected {(D // H) ** -0.5}.")
    fields, shared = {}, 0
    if kind != "llama":
        if config.num_experts_per_tok < 2:
            raise WeightsError("a model with one expert per token cannot be ours: it would be weighted differently.")
        if kind == "granitemoeshared":
            shared, rest = divmod(config.shared_intermediate_size, config.intermediate_size)
            if rest:
                raise WeightsError(
                    f"shared_intermediate_size {config.shared_intermediate_size} is no multiple of intermediate_size "
                    f"{config.intermediate_size}: our shared experts all have the size of the others."
                )
        fields = {
            "use_moe": True, "n_routed_experts": config.num_local_experts, "n_shared_experts": shared,
            "num_experts_per_tok": config.num_experts_per_tok, "aux_loss_alpha": config.router_aux_loss_coef,
        }  # fmt: skip
    same = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    same += " hidden_act max_position_embeddings rms_norm_eps initializer_range tie_word_embeddings"
    fields |= {name: getattr(config, name) for name in same.split()}
    fields |= {"rope_theta": theta_and_scaling[0], "rope_scaling": theta_and_scaling[1]}
    # A chat model may list several; the first is the one the others stand beside.
    ids = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields |= {name: i[0] if isinstance(i, list) else i for name, i in ids.items() if i is not None}
    try:
        ours = MiniMindConfig(**fields)
        return ours, our_names(kind, ours, state)
    except (ValueError, KeyError) as error:
        raise WeightsError(f"this {ARCHITECTURES[kind]} cannot be ours: {error}.") from error


def our_names(kind: str, config: MiniMindConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a stock model by our names.  Raises: WeightsError on names it should not have, KeyError on a gap."""
    renamed, used = {}, set()

    def take(name: str) -> Tensor:
        used.add(name)
        return state[name]

    for name in state:
        inside = ".block_sparse_moe." in name or ".shared_mlp." in name
        if not inside and not name.endswith("rotary_emb.inv_freq"):  # a buffer that old files hold
            renamed[name] = take(name)
        elif not inside:
            used.add(name)
    for layer in range(config.num_hidden_layers if kind != "llama" else 0):
        ours, theirs = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.block_sparse_moe."
        if kind == "mixtral":
            renamed[ours + "gate.weight"] = take(theirs + "gate.weight")
            for e in range(config.n_routed_experts):
                for part in PROJECTIONS:
                    name = f"{theirs}experts.{e}.{MIXTRAL_NAMES[part]}.weight"
                    renamed[f"{ours}experts.{e}.{part}_proj.weight"] = take(name)
            continue
        renamed[ours + "gate.weight"] = take(theirs + "router.layer.weight")
        F, S = config.intermediate_size, config.n_shared_experts
        both, down = take(theirs + "input_linear.weight"), take(theirs + "output_linear.weight")
        for e in range(config.n_routed_experts):
            for part, tensor in zip(PROJECTIONS, (both[e, :F], both[e, F:], down[e]), strict=True):
                renamed[f"{ours}experts.{e}.{part}_proj.weight"] = tensor
        if S:
            shared = f"model.layers.{layer}.shared_mlp."
            gates, ups = take(shared + "input_linear.weight").chunk(2)  # (S·F, D) each
            downs = take(shared + "output_linear.weight")  # (D, S·F)
            for s in range(S):
                rows = slice(s * F, (s + 1) * F)
                for part, tensor in zip(PROJECTIONS, (gates[rows], ups[rows], downs[:, rows]), strict=True):
                    renamed[f"{ours}shared_experts.{s}.{part}_proj.weight"] = tensor
    if beyond := sorted(state.keys() - used):
        raise WeightsError(f"{beyond[0]} ({len(beyond)} tensors in all) has no place in our model.")
    if any(re.search(r"\.bias$", name) for name in renamed):
        raise WeightsError("a model with biases cannot be ours, which has none.")
    return {name: tensor.contiguous() for name, tensor in renamed.items()}
