"""Cross-entropy through the head, a piece of the positions at a time: the logits are never held whole.

    Σ −log p(y_i),   p = softmax(W·h_i)                                                                     (1)
    ∂/∂(W·h_i) = p − onehot(y_i)                                                                            (2)

The vocabulary is the widest thing in a small model: at 32 rows of 512 its logits in float32, their softmax and their
gradient would each take 400 MB. As the sum (1) only gets scaled later, the gradient (2) of each piece is taken at once,
turned into gradients of h and W, and forgotten: no product more than usual (Hsu et al. 2024, arXiv:2410.10989). Any
other loss that is a sum over positions goes the same way, given its own (1) and (2); distillation is one.

Dimension legend: N positions · n positions of one piece · D hidden size · V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.model_minimind import IGNORE

PIECE_ON_CPU, PIECE = 1024, 4096  # positions; larger ones bring no speed


def nll_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Equations (1) and (2) for one piece, computed in float32; an ignored target counts nothing and gets no gradient.

    Shape: logits (n, V), targets (n,) → sum in nats () float32, gradient (n, V) in the dtype of the logits.
    """
    trained = (targets != IGNORE)[:, None]
    place = targets.clamp(min=0)[:, None]
    log_probs = logits.float().log_softmax(-1)
    log_p = log_probs.gather(-1, place) * trained
    gradient = log_probs.exp_().mul_(trained).to(logits.dtype)
    # p − 1 is taken before it is rounded: near p = 1 bfloat16 would lose most of it.
    gradient.scatter_(-1, place, ((log_p.exp() - 1) * trained).to(logits.dtype))
    return -log_p.sum(), gradient


def compiled_piece() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`nll_and_gradient` compiled for any number of positions at once.

    Left to find out by itself, the compiler would make code of its own for the first number it sees; a resumed run may
    see another one first, and would then round its loss differently.
    """
    compiled = torch.compile(nll_and_gradient)

    def piece(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        for tensor in (logits, targets):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(logits, targets)

    return piece


class SummedLoss(torch.autograd.Function):
    """A loss summed over positions, with its gradients computed on the way forward; none for a frozen head (LoRA)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, size: int, piece: Callable, *targets: Tensor) -> Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        head = weight.to(dtype)
        total = torch.zeros((), device=hidden.device)
        hidden_grad = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
        trains_head = ctx.needs_input_grad[1]
        weight_grad = torch.zeros(weight.shape, device=weight.device) if trains_head else None  # float32: many sums
        for start in range(0, len(hidden), size):
            h = hidden[start : start + size].to(dtype)  # (n, D)
            loss, gradient = piece(h @ head.T, *(t[start : start + size] for t in targets))
            total += loss
            hidden_grad[start : start + size] = gradient @ head
            if trains_head:
                weight_grad += gradient.T @ h
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtypes, ctx.others = (hidden.dtype, weight.dtype), 2 + len(targets)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, factor: Tensor) -> tuple[Tensor | None, ...]:
        """`factor`, the gradient of the sum, scales both in float32: a loss scaler's 65,536 overflows nothing here."""
        grads = [
            None if grad is None else (grad.float() * factor).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *grads, *[None] * ctx.others


def summed_through_head(
    hidden: Tensor, weight: Tensor, targets: tuple[Tensor, ...], piece: Callable, size: int | None = None
) -> Tensor:
    """Σ of a loss over positions, differentiable in the hidden states and the head.

    Args: targets, tensors of N rows; piece(logits (n, V), *their n rows) → (sum (), its gradient (n, V)); size,
    positions per piece.  Shape: hidden (N, D), weight (V, D) → () float32.
    """
    size = size or (PIECE_ON_CPU if hidden.device.type == "cpu" else PIECE)
    return SummedLoss.apply(hidden, weight, size, piece, *targets)


def chunked_nll(
    hidden: Tensor, weight: Tensor, targets: Tensor, size: int | None = None, piece: Callable = nll_and_gradient
) -> Tensor:
    """Σ −log p of the targets in nats, equation (1); products run in autocast's dtype, all else in float32.

    Args: size, positions per piece; piece, `nll_and_gradient` or `compiled_piece()`.
    Shape: hidden (N, D), weight (V, D) of the head, targets (N,), IGNORE where nothing is trained on → () float32.
    """
    if torch.is_grad_enabled():
        return summed_through_head(hidden, weight, (targets,), piece, size)
    size = size or (PIECE_ON_CPU if hidden.device.type == "cpu" else PIECE)
    pieces = zip(hidden.split(size), targets.split(size), strict=True)
    nats = (F.cross_entropy((h @ weight.T).float(), t, ignore_index=IGNORE, reduction="sum") for h, t in pieces)
    return sum(nats, start=torch.zeros((), device=hidden.device))
