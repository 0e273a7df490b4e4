"""What a run tells: a line on the terminal, a JSON line in the run folder, wandb on request, the loss curve as a
picture."""

import json
import math
import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from model.files import atomic_open
from trainer.checkpoint import Keeper
from trainer.trainer_utils import Run

# Dense bf16 (fp16 before Ampere) tensor-core peaks in TFLOP/s from the vendor's data sheets, without sparsity. The
# first name found in the device name counts. GeForce cards: with float32 accumulation, half their headline figure.
PEAK_TFLOPS = {
    "H200": 989, "H100 PCIe": 756, "H100": 989, "H800": 989, "B200": 2250, "A100": 312, "A800": 312, "A40": 150,
    "A10": 125, "L40S": 362, "L40": 181, "L4": 121, "RTX 6000 Ada": 364, "A6000": 155, "V100": 125,
    "T4": 65, "RTX 5090": 210, "RTX 4090": 165, "RTX 4080": 98, "RTX 4070": 58, "RTX 3090": 71, "RTX 3080": 60,
    "RTX 3060": 25,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """Peak of the card in FLOP/s, None where it is not known (and no MFU is shown)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    other_card = r"(?! (?:Ti|SUPER|D|NVL|Laptop))"  # same name, another chip
    return next((tera * 1e12 for key, tera in PEAK_TFLOPS.items() if re.search(rf"\b{key}\b{other_card}", name)), None)


def flops_per_token(model: nn.Module, seq_len: int) -> float:
    """FLOPs of forward and backward for one token: 6 per weight that takes part (4 where it is frozen), plus attention.

    The PaLM count (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): the tied embedding counts once, as the output
    head; of the routed experts only the k that a token visits count. Attention adds 12·L·D·T for a full row, halved as
    it is causal.
    """
    config = model.config
    weights = sum(p.numel() for p in model.parameters())
    if config.use_moe:
        expert = 3 * config.hidden_size * config.intermediate_size
        weights -= config.num_hidden_layers * (config.n_routed_experts - config.num_experts_per_tok) * expert
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = weights if not frozen else sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 4 * weights + 2 * trained + 6 * config.num_hidden_layers * config.hidden_size * seq_len


def peak_memory_gib(device: torch.device) -> float | None:
    """Largest memory so far: on the card, or of the process (None on Windows)."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else process_memory_gib()


def process_memory_gib(children: bool = False) -> float | None:
    """Largest resident memory so far of this process, or of the largest one it started and waited for."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def progress_bar(steps: Iterable, title: str, run: Run) -> Iterable:
    """A bar over preparations, on the terminal of rank 0."""
    return tqdm(steps, desc=title, leave=False, disable=not (run.is_main and sys.stderr.isatty()))


class RunLog:
    """Collects the figures of a run between two log lines. Only rank 0 writes."""

    def __init__(
        self,
        run: Run,
        stage: str,
        keeper: Keeper,
        args: Namespace,
        model: nn.Module,
        data: Dataset,
        unit: str = "nats per token",
        curve: str = "loss",
        batch: str | None = None,
    ):
        """Args: curve, the figure of the picture, which has this unit; batch, what an update works on, in words."""
        self.unit, self.curve = unit, curve
        self.run, self.stage, self.folder, self.epochs = run, stage, keeper.folder, args.epochs
        self.total_steps = args.total_steps
        self.flops = flops_per_token(model, args.max_seq_len)
        self.peak = peak_flops(run.device)
        self.wandb = start_wandb(args, stage, keeper.wandb_id) if args.use_wandb and run.is_main else None
        keeper.wandb_id = self.wandb.id if self.wandb else None
        self.tensorboard = None
        if args.use_tensorboard and run.is_main:
            from torch.utils.tensorboard import SummaryWriter

            # Of an interrupted run TensorBoard forgets what lies after the step it goes on from.
            self.tensorboard = SummaryWriter(self.folder, purge_step=keeper.progress.step + 1)
        if run.is_main:
            self._announce(args, model, data, batch)
        self._forget_after(keeper.progress.step)
        terminal = run.is_main and sys.stderr.isatty()
        done = keeper.progress.step
        self.bar = tqdm(total=args.total_steps, initial=done, unit="step", disable=not terminal, leave=False)
        self._restart()

    def _announce(self, args: Namespace, model: nn.Module, data: Dataset, batch: str | None) -> None:
        """The resolved settings and the arithmetic of a batch, once, before training."""
        config, run = model.config, self.run
        rows = args.batch_size * args.accumulation_steps * run.world_size
        ranks = f" × {run.world_size} ranks" if run.world_size > 1 else ""
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        kind = ", mixture of experts" if config.use_moe else ""
        left_out = data.stats.get("dropped", 0)
        lines = [
            f"model   {parameters:.2f}M parameters, {config.hidden_size} × {config.num_hidden_layers} layers{kind}",
            f"data    {args.data_path}: {data.describe(args.max_seq_len)}"
            + (f"; {left_out} too long for a row are left out" if left_out else ""),
            "batch   "
            + (batch or f"{args.batch_size} rows × {args.accumulation_steps} micro-batches")
            + ranks
            + ("" if batch else f" = {rows} rows, {rows * args.max_seq_len:,} tokens per update"),
            f"plan    {args.total_steps} updates in {args.epochs} epoch{'s' * (args.epochs > 1)}, "
            f"learning rate {args.learning_rate:g} after {args.warmup_iters} updates of warm-up",
            f"machine {run.device}, {str(run.dtype).removeprefix('torch.')}, compile {'on' if args.compile else 'off'}",
            f"memory  {run.memory_note}",
            f"output  {self.folder}",
        ]
        print("\n".join(lines), flush=True)

    def _restart(self) -> None:
        self.started, self.wait, self.tokens, self.steps = time.perf_counter(), 0.0, 0, 0
        self.nats = torch.zeros((), device=self.run.device)
        self.trained = 0
        self.expert_load: Tensor | None = None
        self.sums: dict[str, Tensor] = {}
        self.means: dict[str, list[float]] = {}

    def _forget_after(self, step: int) -> None:
        """Drops the records after the resumed step, so that the file tells one uninterrupted run."""
        path = self.folder / "metrics.jsonl"
        if self.run.is_main and path.is_file():
            kept = [record for record in read_metrics(path) if record.get("step", 0) <= step]
            with atomic_open(path, "w") as f:
                f.writelines(json.dumps(record) + "\n" for record in kept)

    def count(self, nats: Tensor, trained: Tensor, tokens: int, waited_seconds: float, **sums: Tensor) -> None:
        """One update done: summed loss of this rank, terms of the loss (trained tokens) and real tokens of all ranks.

        Other figures of this rank, summed like the loss, are shown like it: as means over the terms. Tensors stay on
        the device until a line is due.
        """
        self.nats += nats.detach()
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.trained += trained
        self.tokens += tokens
        self.wait += waited_seconds
        self.steps += 1
        self.bar.update(1)

    def count_experts(self, load: Tensor | None) -> None:
        """Slots that each expert of each layer got in one micro-batch, (L, E); None without experts."""
        if load is not None:
            self.expert_load = load.detach() if self.expert_load is None else self.expert_load + load.detach()

    def count_means(self, count: float, **totals: float) -> None:
        """Figures of this rank with a count of their own, for example rewards over answers, or tokens over seconds."""
        for name, total in totals.items():
            before = self.means.get(name, [0.0, 0.0])
            self.means[name] = [before[0] + total, before[1] + count]

    def line(self, progress, lr: float, grad_norm: Tensor, aux_loss: float | None = None) -> None:
        """Prints and stores the figures since the last line. Every rank must call it: the loss is summed over ranks."""
        progress.read_skip()
        nats, trained = self.run.sum_ranks(self.nats.clone()).item(), int(self.trained)
        means = torch.tensor(list(self.means.values()), dtype=torch.float64).reshape(-1, 2)
        totals, counts = self.run.sum_ranks(means).unbind(1)
        means = dict(zip(self.means, (totals / counts.clamp(min=1e-9)).tolist(), strict=True))
        elapsed = time.perf_counter() - self.started
        rate = self.tokens / elapsed
        record = {
            "step": progress.step,
            "epoch": progress.epoch + 1,
            "loss": nats / trained if trained else math.nan,
            **{name: self.run.sum_ranks(total.clone()).item() / max(trained, 1) for name, total in self.sums.items()},
            **means,
            "lr": lr,
            "grad_norm": float(grad_norm),
            "tokens": progress.tokens,
            "tokens_per_second": rate,
            "mfu": rate * self.flops / self.run.world_size / self.peak if self.peak else None,
            "memory_gib": peak_memory_gib(self.run.device),
            "data_wait": self.wait / elapsed,
            "skipped_steps": progress.skipped_steps,
            "eta_seconds": elapsed / max(self.steps, 1) * (self.total_steps - progress.step),
            "time": time.time(),
        }
        if aux_loss is not None:
            record["aux_loss"] = aux_loss
        if self.expert_load is not None:  # share of the slots, layer by layer: 1/E each when the load is even
            load = self.run.sum_ranks(self.expert_load.float())
            load = load / load.sum(1, keepdim=True).clamp(min=1)
            record["expert_load"] = [[round(share, 4) for share in layer] for layer in load.tolist()]
        parts = [
            self.stage,
            f"epoch {record['epoch']}/{self.epochs}",
            f"step {progress.step}/{self.total_steps}",
            f"loss {record['loss']:.4f}",
            *(f"{name.replace('_', ' ')} {record[name]:.3f}" for name in (*self.sums, *means)),
            f"lr {lr:.2e}",
            f"gnorm {record['grad_norm']:.2f}",
            f"{rate / 1000:.1f}k tok/s",
            f"mfu {record['mfu']:.0%}" if record["mfu"] is not None else None,
            f"{record['memory_gib']:.1f} GiB" if record["memory_gib"] is not None else None,
            f"data {record['data_wait']:.1%}",
            f"aux {aux_loss:.3f}" if aux_loss is not None else None,
            f"experts {load.min():.0%}–{load.max():.0%}" if self.expert_load is not None else None,
            f"skipped {progress.skipped_steps}" if progress.skipped_steps else None,
            f"eta {clock(record['eta_seconds'])}",
        ]
        self.write(record, " | ".join(part for part in parts if part))
        self._restart()

    def write(self, record: dict, text: str) -> None:
        """One record into the JSON Lines file and wandb, one line onto the terminal."""
        if not self.run.is_main:
            return
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8", newline="\n") as f:
                f.write(json.dumps({k: finite(v) for k, v in record.items()}) + "\n")
        except OSError as error:  # a full disk shows when the file is flushed, and then without a name
            raise OSError(error.errno, error.strerror, str(path)) from error
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float))}
        if self.wandb:
            self.wandb.log(numbers, step=record["step"])
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, record["step"])

    def validation(self, progress, result: dict[str, float] | None) -> None:
        """A validation result; the time it took does not count as training time."""
        if result is not None:
            text = f"{self.stage} | step {progress.step}/{self.total_steps}"
            for name, value in result.items():
                what = name.removeprefix("val_").replace("_", " ")
                text += f" | {value:.4f} bits per byte" if what == "bpb" else f" | validation {what} {value:.4f}"
            self.write({"step": progress.step, **result}, text)

    def pause(self) -> "Pause":
        """`with log.pause():` keeps saving and validating out of tokens/s."""
        return Pause(self)

    def close(self) -> None:
        """Closes the bar and wandb, and draws the loss curve."""
        self.bar.close()
        try:
            if self.run.is_main and (
                picture := plot_loss(self.folder, f"{self.stage}, {self.folder.name}", self.curve, self.unit)
            ):
                print(f"loss curve: {picture}")
        except OSError as error:  # the weights are saved: a picture less is no failed run
            print(f"warning: no loss curve ({error})", file=sys.stderr)
        if self.wandb:
            self.wandb.finish()
        if self.tensorboard:
            self.tensorboard.close()


class Pause:
    def __init__(self, log: RunLog):
        self.log = log

    def __enter__(self) -> None:
        self.entered = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.log.started += time.perf_counter() - self.entered


def finite(value: object) -> object:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def start_wandb(args, stage: str, run_id: str | None):
    import wandb  # it is there: checkpoint.parse_flags has looked

    return wandb.init(project=args.wandb_project, name=stage, id=run_id, resume="allow", config=vars(args))


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line that a power cut left half written is passed over."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def plot_loss(folder: Path, title: str, curve: str = "loss", unit: str = "nats per token") -> Path | None:
    """Draws the loss, or another figure, in training and held out into `loss.png`; None when there is none to draw."""
    records = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    train, val = (
        [(r["step"], r[name]) for r in records if r.get(name) is not None] for name in (curve, f"val_{curve}")
    )
    if not train:
        return None
    try:
        import matplotlib
    except ImportError:
        print("no loss curve: pip install matplotlib")
        return None
    matplotlib.use("Agg")  # a picture file, no window
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(*zip(*train, strict=True), color="#3b6ea5", linewidth=1.2, label="training")
    if val:
        axes.plot(*zip(*val, strict=True), color="#c8553d", marker="o", markersize=3.5, linewidth=1.2, label="held out")
        axes.annotate(f"{val[-1][1]:.3f}", val[-1], textcoords="offset points", xytext=(4, 6), color="#c8553d")
    axes.set(title=title, xlabel="update", ylabel=f"{curve} ({unit})")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    path = folder / "loss.png"
    with atomic_open(path) as f:
        figure.savefig(f, format="png")
    plt.close(figure)
    return path
