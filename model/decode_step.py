"""The MiniMind model as the decoder runs it: many requests, each with a fixed place in one key/value cache.

The arithmetic is that of `MiniMindForCausalLM`; what differs is what each token costs:
    fused matrices   q, k and v are one product, gate and up another
    static cache     allocated once; row r belongs to one request, a token of position p is written to slot p
    static shapes    a step depends on nothing the device computes: on CUDA it is replayed as one graph
    narrow weights   on a CPU one row of activations costs what reading the weights costs. The compiled step of one row
                     reads 16-bit weights where that loses nothing, as saved ones are 16 bit wide, and calculates in
                     float32, which is free then. All else runs in the dtype of the arithmetic.

Reading order: the matrices of one kind → all kinds → attention → experts → the pass over all layers → compilation.

Dimension legend: B rows (requests) · T new tokens · S cache slots read · D hidden size · H query heads · K key/value
heads · G = H / K · C channels of one head · F feed-forward size · E routed experts · k experts per token · N = B·T ·
V vocabulary.

中文：解码器使用的模型形式：融合权重、静态 KV 缓存、可编译的单步计算。
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType, MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.model_minimind import MiniMindForCausalLM, MOEFeedForward, rotary_tables


@dataclass
class Matrix:
    """The matrices (out, in) of one kind, stacked over the layers (L, out, in), in up to two widths; or one of them.

    One tensor for all layers: each input of a compiled step costs a microsecond, as the weights that stream by have
    driven its description out of the caches.

    Args: wide: in the dtype of the arithmetic; narrow: the same values in 16 bits, for a single row of activations, and
    for all rows where that is the dtype of the arithmetic.
    """

    wide: Tensor | None = None
    narrow: Tensor | None = None

    def __getitem__(self, layer: int) -> "Matrix":
        return Matrix(*(None if weights is None else weights[layer] for weights in (self.wide, self.narrow)))

    def full(self, dtype: torch.dtype) -> Tensor:
        return self.wide if self.wide is not None else self.narrow.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Shape: (…, in) → (…, out)."""
        if self.narrow is None or x.numel() > x.shape[-1] or not torch.compiler.is_compiling():
            return F.linear(x, self.full(x.dtype))
        # The compiler turns this into one loop that widens each weight in a register.
        return (self.narrow.to(x.dtype) * x.reshape(1, -1)).sum(-1).view(*x.shape[:-1], -1)

    def store(self, weights: Sequence[Tensor], dtype: torch.dtype, narrow: torch.dtype | None, keep_wide: bool) -> None:
        """Copies in place where it can: compiled code and captured graphs remember addresses."""
        for name, wanted in (("wide", dtype if keep_wide else None), ("narrow", narrow)):
            stack = getattr(self, name)
            if wanted is None:
                setattr(self, name, None)
                continue
            if stack is None or stack.dtype != wanted:
                stack = weights[0].new_empty((len(weights), *weights[0].shape), dtype=wanted)
                setattr(self, name, stack)
            for place, weight in zip(stack, weights, strict=True):
                place.copy_(weight)


@dataclass
class Kinds:
    """The matrices of all layers, kind by kind."""

    qkv: Matrix = field(default_factory=Matrix)  # (L, (H + 2K)·C, D)
    out: Matrix = field(default_factory=Matrix)
    gate_up: Matrix = field(default_factory=Matrix)  # (L, 2F, D), of all shared experts together in a mixture
    down: Matrix = field(default_factory=Matrix)  # (L, D, F)
    expert_gate_up: Matrix = field(default_factory=Matrix)  # (L, E, 2F, D)
    expert_down: Matrix = field(default_factory=Matrix)  # (L, E, D, F)


def weight_of(linear: nn.Module) -> Tensor:
    """The matrix a layer multiplies with, the adapter included where one is attached (LoRA).  Shape: (out, in)."""
    if type(linear) is nn.Linear and "forward" not in vars(linear):
        return linear.weight
    identity = torch.eye(linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device)
    return linear(identity).T


def qkv_of(attn: nn.Module) -> Tensor:
    """Shape: → ((H + 2K)·C, D)."""
    return torch.cat([weight_of(part) for part in (attn.q_proj, attn.k_proj, attn.v_proj)])


def gate_up_of(parts: Sequence[nn.Module]) -> Tensor:
    """All gates, then all ups, of feed-forward layers side by side.  Shape: → (2F, D)."""
    return torch.cat([weight_of(getattr(m, name)) for name in ("gate_proj", "up_proj") for m in parts])


def down_of(parts: Sequence[nn.Module]) -> Tensor:
    """Shape: → (D, F)."""
    return torch.cat([weight_of(m.down_proj) for m in parts], dim=1)


def lossless_16_bit(weights: Sequence[Tensor]) -> torch.dtype | None:
    """The 16-bit type that holds all these numbers exactly, if there is one. bfloat16 first: it is widened faster."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(weight.to(dtype).to(weight.dtype), weight) for weight in weights):
            return dtype
    return None


def fast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type itself, but float32 on a CPU that has no instructions for it. For float16 we use none."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    slow = device.type == "cpu" and not (dtype == torch.bfloat16 and native)
    return torch.float32 if slow else dtype


class DecodeStep:
    """Runs the model for the rows of a static cache.

    Args:
        slots: rows of the cache; max_seq_len: tokens per row. One more slot per row takes what nobody may read: the
            writes of padding and of idle rows.
        dtype: of the cache and, but for a compiled step of one row, of the arithmetic; None: the model's own where the
            device multiplies it fast, else float32.
        compile: whether a decode step is compiled. On CUDA it is captured as a graph in any case.
    """

    def __init__(
        self, model: MiniMindForCausalLM, slots: int, max_seq_len: int, dtype: torch.dtype | None, compile: bool
    ):
        config, device = model.config, model.device
        self.model, self.slots, self.max_seq_len, self.compiled = model, slots, max_seq_len, compile
        self.captured = device.type == "cuda"
        self.dtype = dtype or fast_dtype(model.dtype, device)
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        shape = (slots, self.kv_heads, max_seq_len + 1, self.head_dim)
        # The cache, one tensor per layer
        self.keys = [torch.zeros(shape, dtype=self.dtype, device=device) for _ in model.model.layers]
        self.values = [torch.zeros(shape, dtype=self.dtype, device=device) for _ in model.model.layers]
        self.kinds, self.head = Kinds(), Matrix()  # the head is a stack of one
        # Of the norms before attention and before the feed-forward part, always in float32
        self.norms = torch.empty(len(self.keys), 2, config.hidden_size, dtype=torch.float32, device=device)
        self.rows = torch.arange(slots, device=device)
        self.positions = torch.arange(max_seq_len + 1, device=device)
        cos, sin = rotary_tables(config, self.positions[None])
        signs = torch.ones_like(sin).view(-1, 2, self.head_dim // 2)
        signs[:, 0] = -1
        self.cos, self.sin = cos[0, 0].contiguous(), (sin[0, 0] * signs.flatten(1))  # (max_seq_len + 1, C) float32
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}
        self.addresses: list[int] = []
        self.dtypes: list[torch.dtype | None] = []
        self.refresh()

    def own_program(self) -> Callable[..., Tensor]:
        """`forward`, to be compiled for this object alone.

        Only the inputs change from step to step; to check the weights before each, as the compiler would (guards, and
        sizes of all inputs), would cost as much as a layer. Without these checks no other object may share the program,
        hence a copy of the function; `refresh` makes a new one where the dtype of a weight has changed.
        """
        own = FunctionType(DecodeStep.forward.__code__.replace(), globals(), "forward", DecodeStep.forward.__defaults__)
        options = {
            "guard_filter_fn": lambda guards: [guard.name in ("tokens", "keys") for guard in guards],
            "size_asserts": False,
        }
        return torch.compile(MethodType(own, self), dynamic=False, options=options)

    @torch.inference_mode()
    def refresh(self) -> None:
        """Takes over the model's weights as they are now, into the memory of the last ones where it can."""
        blocks, kinds = self.model.model.layers, self.kinds
        found: list[tuple[Matrix, list[Tensor]]] = [(self.head, [weight_of(self.model.lm_head)])]
        found.append((kinds.qkv, [qkv_of(block.self_attn) for block in blocks]))
        found.append((kinds.out, [weight_of(block.self_attn.o_proj) for block in blocks]))
        always = [[block.mlp] for block in blocks]
        if self.model.config.use_moe:
            always = [list(block.mlp.shared_experts) for block in blocks]
            for matrix, weights_of in ((kinds.expert_gate_up, gate_up_of), (kinds.expert_down, down_of)):
                found.append((matrix, [torch.stack([weights_of([e]) for e in block.mlp.experts]) for block in blocks]))
        if always[0]:  # shared experts side by side are one wide feed-forward layer
            found.append((kinds.gate_up, [gate_up_of(parts) for parts in always]))
            found.append((kinds.down, [down_of(parts) for parts in always]))
        narrow = None
        if self.compiled and self.model.device.type == "cpu":
            narrow = lossless_16_bit([weight for _, weights in found for weight in weights])
        dtypes = [narrow, *(weight.dtype for weight in self.model.parameters())]
        if dtypes != self.dtypes:
            self.dtypes = dtypes
            self.graphs.clear()
            self.run = self.own_program() if self.compiled else self.forward
        keep_wide = narrow is None or (self.slots > 1 and narrow != self.dtype)
        for matrix, weights in found:
            matrix.store(weights, self.dtype, narrow, keep_wide)
        norms = [(block.input_layernorm.weight, block.post_attention_layernorm.weight) for block in blocks]
        for place, weights in zip(self.norms, norms, strict=True):
            place.copy_(torch.stack(weights))
        addresses = [weight.data_ptr() for weight in self.model.parameters()]  # some are read where they are
        if addresses != self.addresses:
            self.addresses = addresses
            self.graphs.clear()

    def forward(
        self, tokens: Tensor, positions: Tensor, keys: Tensor, rows: Tensor | None = None, last: Tensor | None = None
    ) -> Tensor:
        """Logits of one token per row; the keys and values of all tokens go to the cache.

        Args: tokens and positions (B, T); position max_seq_len marks padding. keys (S,): 0 to S − 1, the slots that are
        read. rows (B,): their places in the cache, None: the first B. last (B,): which of the T tokens to answer.
        Shape: → (B, V), float32 from a compiled step of one row, else in the dtype of the arithmetic.
        """
        B, T = tokens.shape
        visible = keys <= positions[..., None]  # (B, T, S)
        mask = torch.zeros_like(visible, dtype=self.dtype).masked_fill(~visible, -torch.inf)[:, None]
        mask = mask.repeat(1, 1, self.heads // self.kv_heads, 1)  # (B, 1, G·T, S)
        rotary = self.cos[positions][:, None], self.sin[positions][:, None]  # (B, 1, T, C)
        places = (self.rows[:B] if rows is None else rows)[:, None]  # (B, 1)
        wider = self.single(tokens) and self.head.narrow is not None
        dtype = torch.promote_types(self.dtype, torch.float32) if wider else self.dtype
        x = F.embedding(tokens, self.model.model.embed_tokens.weight).to(dtype)  # (B, T, D)
        for layer, block in enumerate(self.model.model.layers):
            x = x + self.attention(layer, self.norm(x, layer, 0), rotary, mask, places, positions, rows)
            x = x + self.feed_forward(layer, block.mlp, self.norm(x, layer, 1))
        x = x[:, -1] if last is None else x[torch.arange(B, device=x.device), last]  # (B, D)
        return self.head[0](self.model.model.norm(x))

    def single(self, tokens: Tensor) -> bool:
        """Whether this is the compiled step of one row, not on CUDA.  Args: tokens (B, T, …)."""
        return torch.compiler.is_compiling() and not self.captured and tokens.shape[:2] == (1, 1)

    def norm(self, x: Tensor, layer: int, which: int) -> Tensor:
        """The norm before attention (0) or before the feed-forward part (1), in float32.  Shape: (…, D) → (…, D)."""
        eps = self.model.config.rms_norm_eps
        return F.rms_norm(x.float(), x.shape[-1:], self.norms[layer, which], eps).to(x.dtype)

    def attention(
        self,
        layer: int,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor,
        places: Tensor,
        positions: Tensor,
        rows: Tensor | None,
    ) -> Tensor:
        """Shape: x (B, T, D) → (B, T, D)."""
        B, T, _ = x.shape
        H, K, C, S = self.heads, self.kv_heads, self.head_dim, mask.shape[-1]
        qk, v = self.kinds.qkv[layer](x).view(B, T, H + 2 * K, C).split((H + K, K), dim=2)
        q, k = turn(qk.transpose(1, 2), *rotary).split((H, K), dim=1)  # (B, H, T, C), (B, K, T, C)
        self.keys[layer][places, :, positions] = k.transpose(1, 2).to(self.dtype)
        self.values[layer][places, :, positions] = v.to(self.dtype)
        keys, values = self.keys[layer][:, :, :S], self.values[layer][:, :, :S]
        keys, values = (keys[:B], values[:B]) if rows is None else (keys[rows], values[rows])  # (B, K, S, C)
        # The G query heads that share a key head stand in the place of G·T queries: nothing is repeated.
        q = q.reshape(B, K, -1, C)
        if self.single(x):  # for one row the kernel's start costs more than its work
            scores = (q[:, :, :, None] * keys[:, :, None]).sum(-1) / C**0.5 + mask  # (B, K, G, S)
            out = (scores.softmax(-1)[..., None] * values[:, :, None]).sum(-2)
        else:
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)  # (B, K, G·T, C)
        return self.kinds.out[layer](out.reshape(B, H, T, C).transpose(1, 2).reshape(B, T, -1))

    def feed_forward(self, layer: int, mlp: nn.Module, x: Tensor) -> Tensor:
        """SwiGLU, and in a mixture the routed experts.  Shape: x (B, T, D) → (B, T, D)."""
        kinds = self.kinds
        if not isinstance(mlp, MOEFeedForward):
            return swiglu(x, kinds.gate_up[layer], kinds.down[layer], mlp.act)
        act = mlp.experts[0].act
        chosen, weights, _ = mlp.gate(x, None)  # (B, T, k)
        rows, chosen, weights = x.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1).to(x.dtype)
        gate_up, down = kinds.expert_gate_up[layer], kinds.expert_down[layer]
        if not (self.compiled or self.captured) or x.shape[1] > 1:
            out = each_expert(rows, chosen, weights, gate_up.full(x.dtype), down.full(x.dtype), act)
        elif len(rows) == 1 and gate_up.narrow is not None:
            out = chosen_experts(rows, chosen, weights, gate_up.narrow, down.narrow, act)
        else:
            out = all_experts(rows, chosen, weights, gate_up.full(x.dtype), down.full(x.dtype), act)
        out = out.view_as(x)
        return out + swiglu(x, kinds.gate_up[layer], kinds.down[layer], act) if mlp.shared_experts else out

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Row `source` of the cache goes to row `target`."""
        for cache in (*self.keys, *self.values):
            cache[target].copy_(cache[source])

    @torch.inference_mode()
    def copy(self, rows: dict[int, int], length: int) -> None:
        """The first `length` slots of the cache go to other rows.  Args: rows: to which row → from which."""
        targets, sources = torch.tensor([list(rows), list(rows.values())]).to(self.positions.device)
        for cache in (*self.keys, *self.values):
            cache[targets, :, :length] = cache[sources, :, :length]

    @torch.inference_mode()
    def clear(self, row: int) -> None:
        for cache in (*self.keys, *self.values):
            cache[row].zero_()

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, positions: Tensor, length: int, rows: Tensor, last: Tensor) -> Tensor:
        """`forward` on chunks of prompts, T tokens for each of `rows`, `length` slots read.  Shape: → (B, V)."""
        return self.forward(tokens, positions, self.positions[:length], rows, last)

    @torch.inference_mode()
    def decode(self, tokens: list[int], positions: list[int], length: int) -> Tensor:
        """One token for each of the first rows, reading `length` slots.  Shape: (B,), (B,) → (B, V)."""
        device = self.positions.device
        inputs = torch.tensor((tokens, positions))[..., None]  # (2, B, 1)
        if self.captured:
            return self.replay(inputs, length)
        tokens, positions = inputs.to(device)
        return self.run(*self.any_size(tokens, positions, self.positions[:length]))

    def any_size(self, tokens: Tensor, positions: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lets the compiler make two programs in all: for one row and for any number of rows, each for any length."""
        if self.compiled:
            for sized in (keys, tokens, positions) if len(tokens) > 1 else (keys,):
                torch._dynamo.mark_dynamic(sized, 0)
        return tokens, positions, keys

    def replay(self, inputs: Tensor, length: int) -> Tensor:
        """`decode` as a CUDA graph, captured at the first use of a shape: one launch for all kernels of a step."""
        key = (inputs.shape[1], length)
        if key not in self.graphs:
            tokens, positions = inputs.to(self.positions.device).unbind()
            tokens, positions, keys = self.any_size(tokens.clone(), positions.clone(), self.positions[:length])
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles and allocates outside the capture
                for _ in range(2):
                    self.run(tokens, positions, keys)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self.run(tokens, positions, keys)
            self.graphs[key] = graph, tokens, positions, logits
        graph, tokens, positions, logits = self.graphs[key]
        tokens.copy_(inputs[0], non_blocking=True)
        positions.copy_(inputs[1], non_blocking=True)
        graph.replay()
        return logits


def turn(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """`apply_rotary` with its minus sign in the sines: nothing is concatenated.  Shape: x (B, heads, T, C) → same."""
    halves_swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return (x * cos + halves_swapped * signed_sin).to(x.dtype)


def swiglu(x: Tensor, gate_up: Matrix, down: Matrix, act: nn.Module) -> Tensor:
    """down(act(gate(x)) · up(x)).  Shape: (…, D) → (…, D)."""
    gate, up = gate_up(x).chunk(2, dim=-1)
    return down(act(gate) * up)


def each_expert(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: nn.Module) -> Tensor:
    """One expert after another on its own tokens: the least work, but the device has to tell how many they are.

    Shape: x (N, D), chosen and weights (N, k), gate_up (E, 2F, D), down (E, D, F) → (N, D).
    """
    out = torch.zeros_like(x)
    for e in range(len(gate_up)):
        token, slot = (chosen == e).nonzero(as_tuple=True)
        if len(token):
            rows = swiglu(x[token], Matrix(gate_up[e]), Matrix(down[e]), act)
            out.index_add_(0, token, rows * weights[token, slot, None])
    return out


def all_experts(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: nn.Module) -> Tensor:
    """Every expert on every token, most weights zero: fixed shapes. With many rows all weights are read anyway.

    Shape: as `each_expert`.
    """
    gate, up = (x @ gate_up.transpose(1, 2)).chunk(2, dim=-1)  # (E, N, F)
    rows = (act(gate) * up) @ down.transpose(1, 2)  # (E, N, D)
    share = x.new_zeros(len(x), len(gate_up)).scatter(1, chosen, weights)  # (N, E)
    return (rows * share.T[..., None]).sum(0)


def chosen_experts(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: nn.Module) -> Tensor:
    """The experts of a single token, of whose weights nothing else is read when compiled.

    Shape: as `each_expert`, N = 1, gate_up and down narrow.
    """
    hidden = (gate_up[chosen[0]].to(x.dtype) * x).sum(-1)  # (k, 2F)
    gate, up = hidden.chunk(2, dim=-1)
    rows = (down[chosen[0]].to(x.dtype) * (act(gate) * up)[:, None]).sum(-1)  # (k, D)
    return (rows * weights[0, :, None]).sum(0, keepdim=True)
