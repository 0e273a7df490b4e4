"""The optimiser of the trainers: Muon for the matrices inside the blocks, AdamW for everything else, or AdamW alone.

Muon (Jordan et al. 2024; scaling: Liu et al. 2025, arXiv:2502.16982) replaces the momentum matrix M of a weight by the
nearest matrix with all singular values near 1 (a few Newton–Schulz products), so that no direction of the matrix lags
behind:

    M ← μ·M + G,    W ← W − lr · (0.2·√max(rows, columns) · orthogonal(G + μ·M) + decay · W)

The factor 0.2·√max gives its updates the size of AdamW's, so both share one learning rate. Embedding, norms and
routers have no two-sided geometry and stay with AdamW (arXiv:1711.05101), β = (0.9, 0.95). Decay pulls on matrices
only.
"""

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

OPTIMIZERS = ("muon", "adamw")


class MuonWithAdamW(Optimizer):
    """Two optimisers that look like one to the loop, the gradient scaler and the checkpoint.

    Args: matrices: two-dimensional weights for Muon; others: parameter groups for AdamW.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[dict], weight_decay: float, fused: bool):
        muon = Muon(matrices, lr=0.0, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        self.parts = (muon, AdamW(others, lr=0.0, betas=(0.9, 0.95), fused=fused))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        # The very dictionaries of the parts: a learning rate set here is the one they step with.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def make_optimizer(model: nn.Module, weight_decay: float, device: torch.device, kind: str = "muon") -> Optimizer:
    """The optimiser over all trainable parameters, its learning rate to be set by the loop.

    Args: kind: "muon" (Muon and AdamW) or "adamw".
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    fused = device.type in ("cuda", "cpu")
    inner = [p for name, p in named if p.ndim == 2 and "embed_tokens" not in name and "mlp.gate.weight" not in name]
    if kind == "adamw" or not inner:
        inner = []
    taken = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    if not inner:
        return AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=fused)
    return MuonWithAdamW(inner, groups, weight_decay, fused)
