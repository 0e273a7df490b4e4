"""How much memory a run will need, from its sizes alone, told before it starts.

    held now      weights, a reference or teacher, on a CPU the libraries too: measured
  + optimiser     Muon keeps one float32 value per weight, AdamW two
  + the larger of
      way back    gradients of earlier micro-batches, what the blocks keep for the way back, the head's pieces
      the step    gradients, and Muon's copies of the largest group of equal matrices

What a block keeps is counted from what autograd saves (`kept_per_token`; tests/test_memory.py counts it anew). Measured
peaks beside these figures: scripts/bench_train.py.

中文：训练开始前，按尺寸估算峰值显存，并给出能放下的参数。
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from model.model_minimind import LONGEST_IN_BLOCKS, MiniMindConfig, query_blocks
from trainer import zero
from trainer.chunked_nll import PIECE, PIECE_ON_CPU
from trainer.command_line import UserError
from trainer.optimizer import Muon, MuonWithAdamW

if TYPE_CHECKING:
    from trainer.trainer_utils import Run

GIB = 2**30
# On a CPU the peak is that of the process: the first update loads more of the libraries, and beside living tensors the
# heap of the C library holds freed pieces that fit nothing. The compiler leaves some behind for each layer. All three
# fitted to measured peaks, scripts/bench_train.py.
LOADED, HEAP, COMPILER = 0.1 * GIB, 1.25, 0.015 * GIB
# Where Linux tells a process the limit of its control group, in the newer and the older version.
CONTAINER = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"


@dataclass(frozen=True)
class Need:
    """Bytes on one device at the peak of an update."""

    held: float
    optimizer: float
    gradients: float  # at the peak
    activations: float
    working: float  # the head's pieces on the way back, or Muon's copies in the step

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in asdict(self).items() if size >= GIB / 200)
        return f"about {self.total / GIB:.1f} GiB ({parts})"


def kept_per_token(config: MiniMindConfig, seq_len: int, width: int, compiled: bool, fused: bool) -> float:
    """Bytes that one block keeps of each token for the way back.

    Args: width: bytes of the products' dtype, 4 or 2; compiled: element-wise steps are computed again on the way back;
    fused: attention keeps one number per query and head instead of its scores.

    D hidden, F inner size: the norms keep their input and, not compiled, what they make of it, in float32; the rest is
    inputs of matrix products (autocast copies one for each product that reads it), queries, keys and values repeated
    for all heads, and the attention mask of packed rows.
    """
    D, F, H = config.hidden_size, config.intermediate_size, config.num_attention_heads
    half = width < 4
    if compiled:
        stream, copies, inner = 2 * 4 * D, 6 * width * D, 3 * width * F
    else:
        stream, copies, inner = 4 * 4 * D, (9 if half else 6) * width * D, 4 * width * F
    if fused:
        scores = 4 * H + (0 if compiled else width * seq_len)  # a normaliser per head; the mask, one for all heads
    else:
        blocks = query_blocks(seq_len) if config.flash_attn else [(0, seq_len)]
        keys = sum((end - start) * end for start, end in blocks) / seq_len  # that a query has scores with, on average
        scores = (4 + width * half) * H * keys + keys  # and the mask
    if config.use_moe:
        slots = config.num_experts_per_tok
        inner = (slots + config.n_shared_experts) * inner + slots * 12 * D
    return stream + copies + inner + scores + 8  # 8: both norms' 1 / rms


def copies_of_step(optimizer: Optimizer) -> float:
    """Bytes that Muon's step holds for a moment: what it makes of the largest group of matrices of one shape."""
    muon = optimizer.parts[0] if isinstance(optimizer, MuonWithAdamW) else None
    if not isinstance(muon, Muon):
        return 0.0
    groups = Counter()
    for group in muon.param_groups:
        for p in group["params"]:
            groups[p.shape] += p.numel()
    width = torch.finfo(muon.dtype).bits // 8
    return max(groups.values()) * (2 * 4 + 3 * width + 4)


def held_now(device: torch.device) -> float:
    """Bytes that this process has taken on the device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    import psutil

    return psutil.Process().memory_info().rss


def available(device: torch.device) -> float:
    """Bytes that this process may have on the device, those it has taken among them."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    import psutil

    return min(psutil.virtual_memory().available + held_now(device), container_limit())


def container_limit() -> float:
    """Bytes that a container (Docker, Kubernetes) allows its processes together; infinite without a limit."""
    for path in CONTAINER:
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word "max"
            return float(Path(path).read_text(encoding="ascii"))
    return math.inf


@dataclass(frozen=True)
class Plan:
    """What a run asks of the memory of a device; `need` takes the sizes that a user may change.

    Args: held: bytes taken before training.
    """

    model: nn.Module
    optimizer: Optimizer
    run: Run
    args: argparse.Namespace
    held: float

    def need(self, rows: int, more_micros: bool, checkpointed: bool) -> Need:
        """
        Args:
            rows: of a micro-batch.
            more_micros: gradients of earlier micro-batches of the update lie beside what the next one keeps.
            checkpointed: only the input of each block is kept, and one block at a time.
        """
        config, device, seq_len = self.model.config, self.run.device, self.args.max_seq_len
        compiled, width, tokens = bool(self.args.compile), self.width, rows * seq_len
        fused = config.flash_attn and not (device.type == "cpu" and seq_len <= LONGEST_IN_BLOCKS)
        block, layers = tokens * kept_per_token(config, seq_len, width, compiled, fused), config.num_hidden_layers
        kept = block + layers * tokens * 4 * config.hidden_size if checkpointed else layers * block
        kept += tokens * (2 * 4 * config.hidden_size + 8 * config.head_dim)  # embeddings, last norm, rotary tables
        kept += tokens * seq_len  # the mask of packed rows, once for all layers
        kept += tokens * seq_len * width * (fused and compiled)  # and in the form that the kernel takes
        if width < 4:
            kept += width * sum(p.numel() for p in self.model.parameters() if p.ndim == 2)  # autocast's copies

        piece = min(tokens, PIECE_ON_CPU if device.type == "cpu" else PIECE)
        logits = 2 * width if compiled else 2 * width + (8 if width < 4 else 0)  # themselves, their gradient, float32
        head = config.vocab_size * (piece * logits + 4 * config.hidden_size) + tokens * width * config.hidden_size

        weights, state, gradients = self.fixed()
        back = kept + head + (gradients if more_micros else 0.0)
        step = gradients + copies_of_step(self.optimizer)
        if step > back:
            parts = state, gradients, 0.0, step - gradients
        else:
            parts = state, back - kept - head, kept, head
        loaded, spread = (LOADED + COMPILER * layers * compiled, HEAP) if device.type == "cpu" else (0.0, 1.0)
        return Need(self.held + loaded + weights, *(spread * part for part in parts))

    @property
    def width(self) -> int:
        return 4 if self.run.dtype == torch.float32 else 2

    def fixed(self) -> tuple[float, float, float]:
        """Bytes for further weights, the optimiser's state and the gradients, whatever the batch."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if not self.args.deepspeed or (stage := zero.zero_stage(zero.read_config(self.args.deepspeed))) == 0:
            missing = [(p, g) for g in self.optimizer.param_groups for p in g["params"] if not self.has_state(p)]
            state = sum(4 * (1 if "momentum" in group else 2) * p.numel() for p, group in missing)
            return 0.0, state, 4.0 * trained
        # ZeRO keeps weights in the run's dtype and cuts what steps on them, float32 weights and AdamW's means, into
        # pieces of the ranks: from stage 2 on the gradients too, in stage 3 the weights.
        ranks, section = self.run.world_size, zero.read_config(self.args.deepspeed)["zero_optimization"]
        offloaded = (section.get("offload_optimizer") or {}).get("device") == "cpu" and self.run.device.type != "cpu"
        weights = (self.width / (ranks if stage == 3 else 1) - 4) * trained
        state = 0.0 if offloaded else 12 * trained / ranks
        return weights, state, self.width * trained / (ranks if stage >= 2 else 1)

    def has_state(self, p: nn.Parameter) -> bool:
        parts = getattr(self.optimizer, "parts", (self.optimizer,))
        return any(part.state.get(p) for part in parts)

    def fitting(self, limit: float, rows: int, micros: int) -> str | None:
        """Flags with which the same update needs no more than `limit` bytes; None when there are none."""
        for checkpointed in (bool(self.args.checkpoint_activations), True):
            for size in (size for size in range(rows, 0, -1) if micros * rows % size == 0):  # the same rows per update
                need = self.need(size, micros * rows // size > 1, checkpointed)
                if need.total <= limit:
                    more = " --checkpoint_activations" if checkpointed and not self.args.checkpoint_activations else ""
                    if hasattr(self.args, "micro_rows"):
                        return f"--micro_rows {size}{more} needs {need.total / GIB:.1f} GiB"
                    flags = f"--batch_size {size} --accumulation_steps {micros * rows // size}{more}"
                    return f"{flags} needs {need.total / GIB:.1f} GiB"
        return None


def advise(model: nn.Module, optimizer: Optimizer, run: Run, args: argparse.Namespace) -> str:
    """What the run will need, in words, beside what there is; where it is too much, which flags need less.

    Raises: UserError when it is more than `--max_memory` allows.
    """
    plan = Plan(model, optimizer, run, args, held_now(run.device))
    rows, micros = getattr(args, "micro_rows", args.batch_size), args.accumulation_steps
    need = plan.need(rows, micros > 1 or hasattr(args, "micro_rows"), bool(args.checkpoint_activations))
    there = args.max_memory * GIB if args.max_memory else available(run.device)
    if need.total <= there:
        return f"{need} of {there / GIB:.1f} GiB"
    instead = plan.fitting(there, rows, micros)
    hint = instead or "no batch fits: take a shorter --max_seq_len or a smaller model"
    if args.max_memory:
        raise UserError(f"--max_memory {args.max_memory:g}: the run needs {need}. {hint}.")
    return f"{need}, MORE than the {there / GIB:.1f} GiB there are; {hint}"
