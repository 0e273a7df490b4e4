"""The optimiser of the trainers: Muon for the matrices inside the blocks, AdamW for everything else, or AdamW alone.

Muon (Jordan et al. 2024; scaling: Liu et al. 2025, arXiv:2502.16982) replaces the momentum matrix M of a weight by the
nearest matrix with all singular values near 1 (a few Newton–Schulz products), so that no direction of the matrix lags
behind:

    M ← μ·M + G,    W ← W − lr · (0.2·√max(rows, columns) · orthogonal(G + μ·M) + decay · W)

The factor 0.2·√max gives its updates the size of AdamW's, so both share one learning rate. Embedding, norms and
routers have no two-sided geometry and stay with AdamW (arXiv:1711.05101), β = (0.9, 0.95). Decay pulls on matrices
only.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

OPTIMIZERS = ("muon", "adamw")


def orthogonal(matrices: Tensor, dtype: torch.dtype, iterations: int = 5) -> Tensor:
    """The matrices with their singular values moved to between about 0.7 and 1.2, singular vectors kept.

    Newton–Schulz: X ← a·X + (b·A + c·A²)·X with A = X·Xᵀ raises every singular value of a matrix of norm ≤ 1 towards 1;
    the coefficients trade accuracy for steepness near 0 (Jordan et al. 2024). Only products: fit for half precision.

    Shape: (N, rows, columns) → (N, rows, columns) in `dtype`.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    X = matrices.mT if tall else matrices  # A is the smaller of the two Gram matrices
    X = (X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(iterations):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


class Muon(Optimizer):
    """Muon over matrices. Those of one shape are handled as one batch: a few large products instead of many small ones.

    Args: matrices: two-dimensional weights; dtype: of the Newton–Schulz products.
    """

    def __init__(self, matrices: list[nn.Parameter], weight_decay: float, dtype: torch.dtype, momentum: float = 0.95):
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; none at all where `found_inf`, a tensor on the device (`step_if`), is 1."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, weights in by_shape.items():
                self.update(weights, group["lr"] * 0.2 * math.sqrt(max(shape)), group)

    def update(self, weights: list[nn.Parameter], step_size: float, group: dict) -> None:
        """One step for weights of one shape."""
        for p in weights:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads, buffers = [p.grad for p in weights], [self.state[p]["momentum_buffer"] for p in weights]
        taken = 1.0
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            taken = 1 - found_inf  # everything below then moves by nothing
            grads = [torch.where(found_inf > 0, m, g) for m, g in zip(buffers, grads, strict=True)]
        # Running means instead of sums: `orthogonal` takes no notice of a factor.
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov: where the momentum will be
        directions = orthogonal(torch.stack(ahead), self.dtype).float()
        torch._foreach_mul_(weights, 1 - taken * group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list((directions * (taken * -step_size)).unbind()))


class MuonWithAdamW(Optimizer):
    """Two optimisers that look like one to the loop, the gradient scaler and the checkpoint."""

    def __init__(self, muon: Muon, adamw: AdamW):
        self.parts = (muon, adamw)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        # The very dictionaries of the parts: a learning rate set here is the one they step with.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.found_inf = getattr(self, "found_inf", None)
            part.step()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def make_optimizer(
    model: nn.Module,
    weight_decay: float,
    device: torch.device,
    kind: str = "muon",
    dtype: torch.dtype = torch.float32,
) -> Optimizer:
    """The optimiser over all trainable parameters, its learning rate to be set by the loop.

    Args: kind: "muon" (Muon and AdamW) or "adamw"; dtype: of Muon's products, as a rule the run's.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    not_inner = ("embed_tokens", "mlp.gate.weight", "score.weight")  # embedding, router, the one row of a reward model
    inner = [p for name, p in named if p.ndim == 2 and not any(part in name for part in not_inner)]
    if kind == "adamw":
        inner = []
    taken = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device.type in ("cuda", "cpu"))
    return MuonWithAdamW(Muon(inner, weight_decay, dtype), adamw) if inner else adamw


def add_group(optimizer: Optimizer, parameters: Iterable[nn.Parameter], lr_factor: float) -> None:
    """Hands AdamW a new network, without decay; `lr_factor` of its group is for the loop to multiply with."""
    adamw = optimizer.parts[1] if isinstance(optimizer, MuonWithAdamW) else optimizer
    adamw.add_param_group({"params": list(parameters), "weight_decay": 0.0, "lr_factor": lr_factor})
    if adamw is not optimizer:
        optimizer.param_groups.append(adamw.param_groups[-1])


def step_if(finite: Tensor, optimizer: Optimizer) -> None:
    """One step, or none at all: weights and state stay as they are when the gradient is not finite.

    Decided on the device (torch's fused kernels know `found_inf` from the gradient scaler): reading `finite` here would
    let the device run dry in every update.  Shape: finite () bool, on the device of the weights.
    """
    if finite.device.type == "mps":  # no fused kernels
        if finite:
            optimizer.step()
        return
    optimizer.found_inf = (~finite).float()
    optimizer.step()
    del optimizer.found_inf
