"""The MiniMind language model in one module, in reading order.

config → RMSNorm → rotary embedding → attention (GQA) → feed-forward (SwiGLU) → mixture of experts → block → model → LM.

Dimension legend (used in every shape comment):
    B batch · T new tokens · S key/value slots (cached + new) · D hidden size · H query heads · K key/value heads
    C channels of one head (D / H) · F feed-forward size · E routed experts · N = B·T flattened tokens · V vocabulary

A pre-norm decoder in the Llama layout (Touvron et al. 2023, arXiv:2302.13971): no biases, input embedding and output
head share one matrix. The module imports nothing from this repository: an exported folder can carry it as remote code.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeCausalLMOutputWithPast

IGNORE = -100  # label of a position that is not trained on


class MiniMindConfig(PretrainedConfig):
    """Everything that fixes the shape and the arithmetic of a model.

    `intermediate_size=None` becomes 64·⌈⌊8·hidden_size/3⌋/64⌉: SwiGLU has three matrices instead of two, so 8/3 instead
    of 4 keeps the parameter count of a classic feed-forward layer (Shazeer 2020, arXiv:2002.05202).

    `rope_scaling` stretches the context at inference: `{"type": "linear" | "ntk" | "yarn", "factor": 4.0,
    "original_max_position_embeddings": 512}`; see `rope_frequencies`.

    Raises: ValueError when sizes do not divide or a name is unknown.
    """

    model_type = "minimind"
    keys_to_ignore_at_inference = ["past_key_values", "hidden_states", "aux_loss"]
    # A plain attribute here: the base class would fold it into `rope_parameters`, and published configs use this name.
    rope_scaling = None

    def __init__(
        self,
        dropout: float = 0.0,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        hidden_act: str = "silu",
        hidden_size: int = 512,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 32768,
        num_attention_heads: int = 8,
        num_hidden_layers: int = 8,
        num_key_value_heads: int = 2,
        vocab_size: int = 6400,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 1e6,
        rope_scaling: dict | None = None,
        flash_attn: bool = True,
        initializer_range: float = 0.02,
        # Mixture of experts, used when `use_moe`
        use_moe: bool = False,
        num_experts_per_tok: int = 2,
        n_routed_experts: int = 4,
        n_shared_experts: int = 1,
        scoring_func: str = "softmax",
        aux_loss_alpha: float = 0.1,
        seq_aux: bool = True,
        norm_topk_prob: bool = True,
        **kwargs,
    ):
        self.dropout = dropout
        self.hidden_act = hidden_act
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size or 64 * math.ceil(int(8 * hidden_size / 3) / 64)
        self.max_position_embeddings = max_position_embeddings
        self.num_attention_heads = num_attention_heads
        self.num_hidden_layers = num_hidden_layers
        self.num_key_value_heads = num_key_value_heads
        self.vocab_size = vocab_size
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.flash_attn = flash_attn
        self.initializer_range = initializer_range
        self.use_moe = use_moe
        self.num_experts_per_tok = num_experts_per_tok
        self.n_routed_experts = n_routed_experts
        self.n_shared_experts = n_shared_experts
        self.scoring_func = scoring_func
        self.aux_loss_alpha = aux_loss_alpha
        self.seq_aux = seq_aux
        self.norm_topk_prob = norm_topk_prob

        if hidden_size % num_attention_heads or (hidden_size // num_attention_heads) % 2:
            raise ValueError(
                f"hidden_size {hidden_size} must be an even multiple of num_attention_heads {num_attention_heads}"
            )
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {num_attention_heads} must be a multiple of "
                f"num_key_value_heads {num_key_value_heads}"
            )
        if scoring_func != "softmax":
            raise ValueError(f"scoring_func {scoring_func!r} is unknown; expected 'softmax'")
        if use_moe and not 1 <= num_experts_per_tok <= n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok {num_experts_per_tok} must lie in 1..n_routed_experts {n_routed_experts}"
            )
        rope_frequencies(self)  # refuses unknown scaling early

        kwargs.setdefault("pad_token_id", 0)
        kwargs.setdefault("tie_word_embeddings", True)
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight, computed in float32 (Zhang & Sennrich 2019, arXiv:1910.07467).

    Shape: (…, D) → (…, D), in the dtype of x.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x32 * self.weight.float()).to(x.dtype)


def rope_frequencies(config: MiniMindConfig, device: torch.device | str | None = None) -> tuple[Tensor, float]:
    """Angular frequency of each rotary channel pair, and the factor on cos and sin.

    Without scaling θ_i = base^(−2i/C) (Su et al. 2021, arXiv:2104.09864). With `rope_scaling` and its factor s:
      linear  θ_i / s: positions are squeezed back into the trained range (Chen et al. 2023, arXiv:2306.15595);
      ntk     base → base · s^(C/(C−2)): the slowest pair is slowed by exactly s, the fastest stays as it was;
      yarn    pairs that turn often within the trained length stay, pairs that turn less than once are divided by s, a
              ramp between; cos and sin grow by 0.1·ln(s) + 1 (Peng et al. 2023, arXiv:2309.00071, equations 23 to 25).

    Shape: ((C/2,) float32, scalar).  Raises: ValueError on an unknown type or a missing or impossible factor.
    """
    dim = config.head_dim
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    scaling = config.rope_scaling
    if not scaling:
        return config.rope_theta**-exponent, 1.0

    kind = scaling.get("rope_type", scaling.get("type"))
    factor = scaling.get("factor")
    if kind not in ("linear", "ntk", "yarn"):
        raise ValueError(f"rope_scaling type {kind!r} is unknown; expected 'linear', 'ntk' or 'yarn'")
    if not isinstance(factor, (int, float)) or factor < 1:
        raise ValueError(f"rope_scaling needs a factor ≥ 1, as in {{'type': {kind!r}, 'factor': 4.0}}; got {factor!r}")

    if kind == "linear":
        return config.rope_theta**-exponent / factor, 1.0
    if kind == "ntk":
        return (config.rope_theta * factor ** (dim / (dim - 2))) ** -exponent, 1.0

    trained = scaling.get("original_max_position_embeddings", config.max_position_embeddings)

    def pair_that_turns(rotations: float) -> float:
        """Index i of the pair that makes this many full turns within the trained length."""
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_turns(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(pair_that_turns(scaling.get("beta_slow", 1))), dim - 1)
    index = torch.arange(dim // 2, dtype=torch.float32, device=device)
    interpolated = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)  # 0: keep the frequency, 1: divide it by s
    frequencies = config.rope_theta**-exponent
    frequencies = frequencies / factor * interpolated + frequencies * (1 - interpolated)
    return frequencies, scaling.get("attention_factor") or 0.1 * math.log(factor) + 1.0


def rotary_tables(config: MiniMindConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for the given positions, computed on the fly: no buffer to save, to load or to outgrow.

    Shape: (B, T) or (1, T) → two float32 tensors (B, 1, T, C), the middle axis broadcast over heads.
    """
    frequencies, scale = rope_frequencies(config, position_ids.device)
    angles = position_ids[:, None, :, None].float() * frequencies  # (B, 1, T, C/2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * scale, angles.sin() * scale


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel i against channel i + C/2 (the Llama way: first half against second half).

    Shape: x (B, heads, T, C) → same, in the dtype of x.
    """
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)


def attention_mask_4d(
    tokens: int,
    past: int | Tensor,
    slots: int,
    device: torch.device,
    attention_mask: Tensor | None,
    documents: Tensor | None,
    growing_cache: bool,
) -> Tensor | None:
    """Who may look at whom: True where query t may attend to key slot s. None means "causal, nothing else".

    Args: tokens T; past tokens already cached; slots S in the cache after this call (more than past + T in a static
    cache); attention_mask (B, ≥ past + T), 1 = real token, or a ready-made 4D mask; documents (B, T), the ids of packed
    documents.
    Shape: None or (B or 1, 1, T, S) bool.  Raises: ValueError when attention_mask leaves out cached or new tokens.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    if attention_mask is not None and growing_cache and attention_mask.shape[1] != slots:
        raise ValueError(f"attention_mask has {attention_mask.shape[1]} columns; expected {slots}, cached + new tokens")
    if attention_mask is None and documents is None and growing_cache and (tokens == 1 or slots == tokens):
        return None  # the kernel's own causal mode, or one new token that sees everything before it

    query = past + torch.arange(tokens, device=device)  # slot of each query
    key = torch.arange(slots, device=device)
    allowed = (key <= query[:, None])[None, None]  # (1, 1, T, S)
    if attention_mask is not None:
        real = attention_mask.bool()
        if real.shape[1] < slots:  # a static cache has empty slots behind the last token
            real = F.pad(real, (0, slots - real.shape[1]))
        # A padding query may see itself: a row of the softmax with nothing allowed would be NaN.
        allowed = allowed & (real[:, None, None, :slots] | (key == query[:, None]))
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    return allowed


class Attention(nn.Module):
    """Causal self-attention, fewer key/value heads than query heads (GQA, Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.dropout, self.flash = config.dropout, config.flash_attn
        self.in_blocks = True  # scripts/bench_recipe.py turns it off for the reference
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.o_proj.writes_to_residual = True

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
        looks_ahead: bool,
    ) -> Tensor:
        """Args: mask as `attention_mask_4d`; looks_ahead: it may allow later tokens.  Shape: (B, T, D) → same."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)  # (B, H, T, C)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, C)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # (B, K, S, C)

        causal = mask is None and T > 1
        dropout = self.dropout if self.training else 0.0
        if not self.flash:
            attend = plain_attention
        elif self.training and self.in_blocks and x.device.type == "cpu" and T <= LONGEST_IN_BLOCKS and cache is None:
            attend = plain_attention if looks_ahead else attention_in_blocks  # faster there (trainer/LOG.md)
        else:
            attend = F.scaled_dot_product_attention
        # The memory-efficient CUDA kernel takes a mask but knows no GQA: with a mask, key/value heads are repeated.
        share_kv = mask is None and attend is F.scaled_dot_product_attention
        if not share_kv:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        out = attend(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=share_kv)
        return F.dropout(self.o_proj(out.transpose(1, 2).reshape(B, T, -1)), dropout, self.training)


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q·kᵀ / √C)·v written out, for `flash_attn=False` and for reading; scores in float32.

    Shape: q (B, H, T, C), k and v (B, H, S, C), mask bool or additive, broadcast to (B, H, T, S) → (B, H, T, C).
    """
    scores = ((q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)).float()  # divided first: float16 ends at 65,504
    if is_causal:
        T, S = scores.shape[-2:]
        attn_mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    # Finite, not −∞: a padding query that may see nothing would divide 0 by 0, and its NaN would spread from the cache.
    lowest = torch.finfo(scores.dtype).min
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, lowest)
    elif attn_mask is not None:
        scores = (scores + attn_mask).clamp(min=lowest)
    return F.dropout(scores.softmax(-1), dropout_p).to(v.dtype) @ v


LONGEST_IN_BLOCKS = 1024  # tokens; longer rows gain little, and their scores take much memory


def query_blocks(T: int) -> list[tuple[int, int]]:
    """Start and end of each block of `attention_in_blocks`: a quarter of the T queries, 128 at least."""
    size = max(128, -(-T // 4))
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def attention_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool = False,
) -> Tensor:
    """`plain_attention` of T tokens among themselves, some queries at a time, with the keys up to the last of them: of
    four blocks three quarters of what lies in the future are not calculated.

    Shape: as `plain_attention`, S = T, a mask with all of its T rows.
    """
    parts = []
    for start, end in query_blocks(q.shape[2]):
        mask = None if attn_mask is None else attn_mask[:, :, start:end, :end]
        parts.append(plain_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], mask, dropout_p, is_causal))
    return torch.cat(parts, dim=2)


class FeedForward(nn.Module):
    """SwiGLU: down(act(gate(x)) · up(x)).  Shape: (…, D) → (…, D)."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down_proj.writes_to_residual = True
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class MoEGate(nn.Module):
    """The router: which experts each token goes to, with which weight, and how uneven the load is."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.top_k, self.experts = config.num_experts_per_tok, config.n_routed_experts
        self.alpha, self.seq_aux, self.norm_topk_prob = config.aux_loss_alpha, config.seq_aux, config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(self.experts, config.hidden_size))

    def forward(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Shape: x (B, T, D), valid (B, T) bool → expert ids (B, T, k), weights (B, T, k) float32, balance loss ().

        Routing runs in float32, also under autocast: a rounded score would send tokens elsewhere.
        """
        with torch.autocast(x.device.type, enabled=False):
            probs = F.linear(x.float(), self.weight.float()).softmax(-1)  # (B, T, E)
        weights, chosen = probs.topk(self.top_k, dim=-1)
        if self.norm_topk_prob and self.top_k > 1:  # one weight normalised is 1, and the router would learn nothing
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights, self.balance_loss(probs, chosen, valid)

    def balance_loss(self, probs: Tensor, chosen: Tensor, valid: Tensor | None) -> Tensor:
        """α·Σ_e f_e·P_e: f_e = share of the routed slots that went to expert e × E, P_e = mean router probability.

        1·α when the load is even, more when it is not (Switch Transformer, arXiv:2101.03961, equation 4, with top-k).
        `seq_aux` balances each sequence and then averages; otherwise all tokens count as one sequence. Padding does not
        count.
        """
        if not self.training or self.alpha == 0:
            return probs.new_zeros(())
        hits = F.one_hot(chosen, self.experts).sum(2).float()  # (B, T, E), how many of a token's slots went to expert e
        valid = probs.new_ones(probs.shape[:2]) if valid is None else valid.float()
        if not self.seq_aux:
            probs, hits, valid = probs.flatten(0, 1)[None], hits.flatten(0, 1)[None], valid.flatten()[None]
        tokens = valid.sum(1, keepdim=True)  # (B, 1)
        load = (hits * valid[..., None]).sum(1) / tokens.clamp(min=1) / self.top_k * self.experts  # f_e, (B, E)
        mean_prob = (probs * valid[..., None]).sum(1) / tokens.clamp(min=1)  # P_e, (B, E)
        per_sequence = (load * mean_prob).sum(-1)  # (B,), 0 for a row of padding
        return self.alpha * per_sequence.sum() / (tokens > 0).sum().clamp(min=1)


def full_weight(linear: nn.Linear) -> Tensor:
    """The matrix of a layer, with what an adapter adds to it (model_lora.py).  Shape: (out, in)."""
    return linear.full_weight() if hasattr(linear, "full_weight") else linear.weight


def grouped_mm_works(device: torch.device, dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether torch has grouped matrix products for this: bfloat16 on Ampere or newer, rows of whole 16 bytes.

    One kernel on Hopper and newer; on Ampere and Ada torch runs a product per expert and waits for the counts.
    """
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and all(size % 8 == 0 for size in weight.shape)
    )


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product with x runs: autocast's, where it is on."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class MOEFeedForward(nn.Module):
    """Σ over the top-k routed experts of (weight · expert(x)) + Σ shared experts(x), ungated.

    Shared experts see every token and keep what all tokens need (DeepSeekMoE, Dai et al. 2024, arXiv:2401.06066).
    """

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.gate = MoEGate(config)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_routed_experts))
        self.shared_experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_shared_experts))
        self.grouped: bool | None = None  # True / False picks the path, None lets the platform decide

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Shape: x (B, T, D), valid (B, T) bool → (B, T, D), balance loss (), slots that went to each expert (E,)."""
        chosen, weights, aux_loss = self.gate(x, valid)
        slots = F.one_hot(chosen, len(self.experts)).sum(2)  # (B, T, E)
        load = (slots if valid is None else slots * valid[..., None]).sum((0, 1))
        tokens = x.reshape(-1, x.shape[-1])  # (N, D)
        grouped = self.grouped
        if grouped is None:
            grouped = grouped_mm_works(x.device, product_dtype(x), self.experts[0].gate_proj.weight)
        route = self.routed_grouped if grouped else self.routed_plain
        out = route(tokens, chosen.flatten(0, 1), weights.flatten(0, 1).to(x.dtype)).view_as(x)
        for expert in self.shared_experts:
            out = out + expert(x)
        return out, aux_loss, load

    def routed_plain(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """One expert after another on its own tokens. `nonzero` waits for the device, which costs nothing on a CPU.

        An idle expert runs on zero rows, so its gradient is zero and never missing.

        Shape: (N, D), (N, k), (N, k) → (N, D).
        """
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            out = out.index_add(0, token, (expert(x[token]) * weights[token, slot, None]).to(out.dtype))
        return out

    def routed_grouped(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Slots sorted by expert, then one grouped matrix product per projection; nothing here asks for the counts.

        Shape: (N, D), (N, k), (N, k) → (N, D).
        """
        dtype = product_dtype(x)
        N, k = chosen.shape
        order = chosen.flatten().argsort(stable=True)  # (N·k,) slots, expert by expert
        counts = F.one_hot(chosen.flatten(), len(self.experts)).sum(0)
        ends = counts.cumsum(0).to(torch.int32)  # (E,) end row of each expert's block
        # Stacking copies the weights once per call, small beside the products, and keeps one plain Linear per name.
        # `where` writes the zero gradient of an idle expert: some GPUs leave that block of memory as it was
        # (pytorch issue 172439).
        busy = (counts > 0)[:, None, None]
        gate, up, down = (
            torch.stack([full_weight(getattr(e, name)) for e in self.experts]).to(dtype).where(busy, 0).transpose(1, 2)
            for name in ("gate_proj", "up_proj", "down_proj")
        )  # (E, in, out)
        rows = x.to(dtype)[order // k]  # (N·k, D)
        hidden = self.experts[0].act(F.grouped_mm(rows, gate, offs=ends)) * F.grouped_mm(rows, up, offs=ends)
        rows = F.grouped_mm(hidden, down, offs=ends)  # (N·k, D)
        rows = rows[order.argsort()].view(N, k, -1)  # back to token order
        return (rows * weights[..., None]).sum(1).to(x.dtype)


class MiniMindBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MOEFeedForward(config) if config.use_moe else FeedForward(config)
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
        looks_ahead: bool,
        valid: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Shape: x (B, T, D) → (B, T, D), balance loss (), load of the experts (E,) or None."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache, looks_ahead)
        h = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MOEFeedForward):
            h, aux_loss, load = self.mlp(h, valid)
        else:
            h, aux_loss, load = self.mlp(h), x.new_zeros(()), None
        return x + F.dropout(h, self.dropout, self.training), aux_loss, load


class MiniMindPreTrainedModel(PreTrainedModel):
    config_class = MiniMindConfig
    base_model_prefix = "model"
    _no_split_modules = ["MiniMindBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights of standard deviation 0.02; layers that write into the residual stream are scaled by 1/√(2L).

        The 2L additions then sum to the same spread at any depth (GPT-2, Radford et al. 2019). Small tied embeddings
        behind the final norm start the loss near ln V, a uniform guess: 0.10 nats above it at 26M, 0.18 at 104M.
        """
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            scale = (2 * self.config.num_hidden_layers) ** -0.5 if getattr(module, "writes_to_residual", False) else 1.0
            nn.init.normal_(module.weight, std=std * scale)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Embedding, MoEGate)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


@dataclass
class MiniMindModelOutput(BaseModelOutputWithPast):
    """Final hidden states, cache, the balance loss summed over layers, and the load of the experts in each layer."""

    aux_loss: Tensor | None = None
    expert_load: Tensor | None = None


class MiniMindModel(MiniMindPreTrainedModel):
    """Embedding → blocks → final norm."""

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MiniMindBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False  # set by `gradient_checkpointing_enable()`
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        inputs_embeds: Tensor | None = None,
        documents: Tensor | None = None,
        output_hidden_states: bool = False,
        **kwargs,
    ) -> MiniMindModelOutput:
        """One pass over T new tokens; see `MiniMindForCausalLM.forward` for the arguments."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, not both and not neither")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        x = F.dropout(x, self.config.dropout, self.training)
        T = x.shape[1]

        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        slots = past_key_values.get_mask_sizes(T, 0)[0] if past_key_values is not None else T
        growing = past_key_values is None or not past_key_values.is_compileable
        if documents is not None and past_key_values is not None:
            raise ValueError("packed documents cannot be combined with a key/value cache; run them without use_cache")

        mask = attention_mask_4d(T, past, slots, x.device, attention_mask, documents, growing)
        padded = attention_mask is not None and attention_mask.ndim == 2
        looks_ahead = attention_mask is not None and attention_mask.ndim == 4  # it may: it comes from elsewhere
        new = past + torch.arange(T, device=x.device)  # slots of the new tokens
        if position_ids is None and padded:  # a left-padded sequence starts counting at its first real token
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, new]
        elif position_ids is None:
            position_ids = new[None]
        rotary = rotary_tables(self.config, position_ids)
        valid = documents >= 0 if documents is not None else attention_mask[:, new].bool() if padded else None

        aux_loss = x.new_zeros((), dtype=torch.float32)
        hidden_states, loads = (), []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states += (x,)
            if self.gradient_checkpointing and self.training:  # keeps x alone, computes the rest again when it is due
                x, layer_aux, load = self._gradient_checkpointing_func(layer, x, rotary, mask, None, looks_ahead, valid)
            else:
                x, layer_aux, load = layer(x, rotary, mask, past_key_values, looks_ahead, valid)
            aux_loss = aux_loss + layer_aux
            loads.append(load)
        x = self.norm(x)
        return MiniMindModelOutput(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            aux_loss=aux_loss,
            expert_load=torch.stack(loads) if self.config.use_moe else None,
        )


@dataclass
class MiniMindOutput(MoeCausalLMOutputWithPast):
    """What `MiniMindForCausalLM` returns; see its `forward`."""

    expert_load: Tensor | None = None


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    """The language model: predicts the next token at each position."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # initialises and ties lm_head to the embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        need_logits: bool = True,
        documents: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool = False,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs,
    ) -> MiniMindOutput:
        """Logits for the given tokens.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, cached + T), 1 = real token, 0 = padding on either side; or a 4D mask.
            position_ids: (B, T); counted from the mask or the cache when absent.
            past_key_values: a transformers cache; one is made when `use_cache` and none is given.
            labels: (B, T) aligned with input_ids; the loss shifts them by one; -100 is ignored.
            logits_to_keep: only the last n positions (0: all) or the positions of an index tensor go through the head.
            need_logits: False leaves out the head, for losses that take `.hidden_states` through it in pieces.
            documents: (B, T) ids of packed documents; attention stays inside a document, -1 marks padding.
            num_items_in_batch: divides the summed loss instead of the number of labels here (transformers' Trainer).

        Returns: .loss (mean nats per label, without the balance loss), .logits (B, T or n, V) or None, .aux_loss (),
        .expert_load (L, E), the slots that each expert got (None without experts), .past_key_values, .hidden_states:
        the final normed states (B, T, D), or with `output_hidden_states` the tuple of all L + 1 states.
        """
        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            inputs_embeds=inputs_embeds,
            documents=documents,
            output_hidden_states=output_hidden_states,
        )
        hidden = out.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept]) if need_logits else None  # slice(-0, None) keeps all

        loss = None
        if labels is not None:
            if logits is None or logits.shape[:-1] != labels.shape:
                raise ValueError("labels need the logits of every position: no logits_to_keep, no need_logits=False")
            targets = labels[:, 1:].flatten()
            nll = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORE, reduction="sum")
            count = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORE).sum()
            loss = nll / torch.as_tensor(count).clamp(min=1)  # nothing to train on: 0, not 0 / 0
        return MiniMindOutput(
            loss=loss,
            aux_loss=out.aux_loss,
            expert_load=out.expert_load,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states if output_hidden_states else hidden,
        )


MiniMindConfig.register_for_auto_class()
MiniMindForCausalLM.register_for_auto_class("AutoModelForCausalLM")
