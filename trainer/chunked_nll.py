"""Cross-entropy through the head, a piece of the positions at a time: the logits are never held whole.

    Σ −log p(y_i),   p = softmax(W·h_i)                                                                     (1)
    ∂/∂(W·h_i) = p − onehot(y_i)                                                                            (2)

The vocabulary is the widest thing in a small model: at 32 rows of 512 its logits in float32, their softmax and their
gradient would each take 400 MB. As the sum (1) only gets scaled later, the gradient (2) of each piece is taken at once,
turned into gradients of h and W, and forgotten: no product more than usual (Hsu et al. 2024, arXiv:2410.10989).

Dimension legend: N positions · n positions of one piece · D hidden size · V vocabulary.
"""

from collections.abc import Callable

import torch
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


class SummedNLL(torch.autograd.Function):
    """Equation (1) with both gradients computed on the way forward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, size: int, piece: Callable) -> Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        head = weight.to(dtype)
        total = torch.zeros((), device=hidden.device)
        hidden_grad = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
        weight_grad = torch.zeros(weight.shape, device=weight.device)  # float32: a sum over pieces
        for start in range(0, len(hidden), size):
            h = hidden[start : start + size].to(dtype)  # (n, D)
            nats, gradient = piece(h @ head.T, targets[start : start + size])
            total += nats
            hidden_grad[start : start + size] = gradient @ head
            weight_grad += gradient.T @ h
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, factor: Tensor) -> tuple[Tensor | None, ...]:
        """`factor`, the gradient of the sum, scales both in float32: a loss scaler's 65,536 overflows nothing here."""
        scaled = (grad.float() * factor for grad in ctx.saved_tensors)
        return *(grad.to(dtype) for grad, dtype in zip(scaled, ctx.dtypes, strict=True)), None, None, None


def chunked_nll(
    hidden: Tensor, weight: Tensor, targets: Tensor, size: int | None = None, piece: Callable = nll_and_gradient
) -> Tensor:
    """Σ −log p of the targets in nats, equation (1); products run in autocast's dtype, all else in float32.

    Args: size, positions per piece; piece, `nll_and_gradient` or its compiled form.
    Shape: hidden (N, D), weight (V, D) of the head, targets (N,), IGNORE where nothing is trained on → () float32.
    """
    size = size or (PIECE_ON_CPU if hidden.device.type == "cpu" else PIECE)
    if torch.is_grad_enabled():
        return SummedNLL.apply(hidden, weight, targets, size, piece)
    pieces = zip(hidden.split(size), targets.split(size), strict=True)
    return sum((piece(h @ weight.T, t)[0] for h, t in pieces), start=torch.zeros((), device=hidden.device))
