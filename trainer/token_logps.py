"""Log-probabilities of given tokens, through the head a piece at a time: what preference and policy losses are made of.

    log p_i = z_i[y_i] − logsumexp(z_i),   z_i = W·h_i / temperature                                         (1)
    H_i     = − Σ_v p_i[v] · log p_i[v]                                                                      (2)

Unlike the summed loss of `chunked_nll`, each log-probability gets a factor of its own on the way back, which nobody
knows on the way forward. So the logits of a piece are forgotten and computed again when their gradient is due
(Chen et al. 2016, arXiv:1604.06174): one product more, and never the logits of a whole batch.

Dimension legend: N positions · n positions of one piece · D hidden size · V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.model_minimind import IGNORE
from trainer.chunked_nll import PIECE, PIECE_ON_CPU


def _piece(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Equations (1) and (2) of one piece.  Shape: (n, D), (V, D), (n,) → (n,) and (n,) float32."""
    logits = (hidden @ weight.T).float() / temperature  # (n, V)
    logps = -F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    with torch.no_grad():
        log_probs = logits.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1) * (targets != IGNORE)
    return logps, entropy


def token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy of the distribution it is from (without a gradient).

    Both are 0 where the target is IGNORE.  Args: size, positions per piece.
    Shape: hidden (N, D), weight (V, D) of the head, targets (N,) → (N,) and (N,) float32.
    """
    size = size or (PIECE_ON_CPU if hidden.device.type == "cpu" else PIECE)
    pieces = [
        checkpoint(_piece, h, weight, t, temperature, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else _piece(h, weight, t, temperature)
        for h, t in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    logps, entropies = zip(*pieces, strict=True)
    return torch.cat(logps), torch.cat(entropies)
