"""Plumbing shared by the trainers: flags, processes, precision, schedule, the order of rows, validation.

The mathematics stays in the scripts; what a learner would skip stands here. Saving and resuming: `checkpoint.py`; log
lines, JSON Lines, wandb and the loss curve: `run_log.py`.

Dimension legend: B batch · T tokens · V vocabulary.
"""

import argparse
import contextlib
import ctypes
import functools
import math
import os
import random
import shutil
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from dataset.stage_datasets import MixedDataset
from model.decode_step import fast_dtype
from model.files import as_typed
from model.model_minimind import MOEFeedForward, grouped_mm_works
from trainer import memory, zero
from trainer.chunked_nll import compiled_piece
from trainer.command_line import BoolFlag, UserError, leave, number
from trainer.optimizer import OPTIMIZERS

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


# ---------------------------------------------------------------------------------------------------------------- flags


def add_shared_flags(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """Flags that every trainer takes; `defaults` are the stage's own values."""
    count, natural, amount, positive = number(int, 1), number(int, 0), number(float, 0), number(float, 0, excluded=True)
    shape = parser.add_argument_group("model (left out: taken from the starting weights, else 512 × 8)")
    shape.add_argument("--hidden_size", type=count, help="width, for example 768")
    shape.add_argument("--num_hidden_layers", type=count, help="depth, for example 16")
    shape.add_argument("--use_moe", action=BoolFlag, help="mixture of experts instead of the dense feed-forward")
    data = parser.add_argument_group("data")
    data.add_argument("--data_path", help="JSON Lines file; left out: a known name in dataset/, else the demo data")
    data.add_argument("--tokenizer", help="folder of another tokenizer; default that of the starting weights")
    data.add_argument("--max_seq_len", type=count, help="tokens per row; documents are packed into rows")
    data.add_argument("--val_ratio", type=amount, default=0.01, help="share of the records held out for validation")
    data.add_argument("--skip_bad_records", action=BoolFlag, default=False, help="count malformed lines, do not stop")
    data.add_argument("--cache_dir", help="where tokenised files are kept; default dataset/.cache; not in GRPO and PPO")
    workers = "processes that read rows; default 2 on CUDA but not Windows; not in GRPO and PPO"
    data.add_argument("--num_workers", type=natural, help=workers)
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--epochs", type=count, help="passes over the data")
    rows = "rows per micro-batch on each device, for example 32; default fitted to the data, at most 32 (on a CPU 8)"
    optim.add_argument("--batch_size", type=count, help=rows)
    optim.add_argument("--accumulation_steps", type=count, help="micro-batches per update; default fitted to the data")
    optim.add_argument("--learning_rate", type=amount, help="peak, reached after the warm-up; falls to a tenth of it")
    optim.add_argument(
        "--warmup_iters", type=natural, help="updates of linear warm-up; default 2%% of all, at most 200"
    )
    optim.add_argument("--optimizer", choices=OPTIMIZERS, default="muon", help="muon leaves to AdamW what is no matrix")
    optim.add_argument("--weight_decay", type=amount, default=0.1, help="on matrices only")
    optim.add_argument("--grad_clip", type=positive, default=1.0, help="largest gradient norm")
    optim.add_argument("--max_steps", type=count, help="stop after this many updates; the schedule is fitted to it")
    seed = number(int, 0, high=2**32)
    optim.add_argument("--seed", type=seed, default=42, help="fixes initialisation, order of rows and dropout")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cuda, cuda:1, mps or cpu; default the best there is")
    machine.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="arithmetic under autocast")
    machine.add_argument("--compile", action=BoolFlag, help="torch.compile; default on where it pays")
    activations = "keep each block's input only and compute the rest again on the way back: less memory, slower"
    wait = "seconds after which a rank that waits for another gives up; torchrun --max-restarts then starts anew"
    machine.add_argument("--rank_timeout", type=positive, default=600, help=wait)
    limit = "GiB that the run may take; more stops it before it starts, with flags that need less"
    machine.add_argument("--max_memory", type=positive, help=limit + "; default what the device has: only a note")
    machine.add_argument("--checkpoint_activations", action=BoolFlag, default=False, help=activations)
    output = parser.add_argument_group("output")
    output.add_argument("--out_dir", default=str(ROOT / "out"), help="weights and run folders, for example out")
    output.add_argument("--log_interval", type=count, default=10, help="updates between log lines")
    output.add_argument("--save_interval", type=count, default=100, help="updates between saves")
    output.add_argument(
        "--val_interval", type=natural, default=100, help="updates between validations; 0: only the last"
    )
    output.add_argument("--val_rows", type=count, default=128, help="held-out rows that a validation reads")
    output.add_argument("--resume", action=BoolFlag, default=False, help="go on where the last run stopped")
    output.add_argument(
        "--force", action=BoolFlag, default=False, help="with --resume: go on although the data or a setting changed"
    )
    output.add_argument("--use_tensorboard", action=BoolFlag, default=False, help="log to TensorBoard too (out/runs)")
    output.add_argument("--use_wandb", action=BoolFlag, default=False, help="log to wandb too (offline: WANDB_MODE)")
    output.add_argument("--wandb_project", default="MiniMind", help="name of the wandb project")
    zero.add_flags(parser)
    parser.set_defaults(**defaults)


# ------------------------------------------------------------------------------------------------ process and precision


class Run:
    """One training process among `world_size`: its device, its arithmetic, its share in collectives.

    Started with `python` there is one process; under torchrun one per device (nccl between cards, gloo between hosts).
    """

    def __init__(self, device: str | None, dtype: str, seed: int, rank_timeout: float = 600, keep_memory: bool = True):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.seed = seed
        self.device = find_device(device)
        if self.device.type == "cuda":
            index = local_rank if self.world_size > 1 else self.device.index or 0
            if index >= torch.cuda.device_count():
                raise UserError(f"rank {self.rank} has no card: start no more processes than there are cards here.")
            self.device = torch.device("cuda", index)
            torch.cuda.set_device(self.device)
        else:
            if keep_memory:
                keep_freed_memory()
            # Sums in a fixed order, so that an interrupted run continues bit for bit.
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        self.dtype = DTYPES[dtype] if dtype != "auto" else best_dtype(self.device)
        if self.world_size > 1:
            # Counts are summed between the hosts, by gloo: nccl would wait for all that the device has in hand.
            nccl = self.device.type == "cuda" and dist.is_nccl_available()  # Windows has none
            backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=rank_timeout))
            self.patient = dist.new_group(timeout=timedelta(hours=4))  # while rank 0 tokenises a large file
        # float16 starts with a scale that overflows a few times until it fits
        self.skips_allowed = 25 if self.dtype == torch.float16 else 5
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.engine: zero.ZeroEngine | None = None  # with --deepspeed, once the model is wrapped
        self.memory_note = ""  # what the run will need, once the model is wrapped
        self.seed_step(0)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matrix products in the run's dtype, reductions and weights in float32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def seed_step(self, step: int) -> None:
        """Dropout is a function of (seed, step, rank): a resumed run needs no saved generator state."""
        value = (self.seed * 1_000_003 + step) * 4099 + self.rank
        torch.manual_seed(value)
        random.seed(value)
        np.random.seed(value % 2**32)

    def sum_ranks(self, value: Tensor) -> Tensor:
        """The sum over all ranks, on every rank."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 goes through the block before the others, which then find its work done."""
        if self.world_size > 1 and not self.is_main:
            dist.barrier(self.patient)
        yield
        if self.world_size > 1 and self.is_main:
            dist.barrier(self.patient)

    @property
    def zero_stage(self) -> int:
        """From 1 on DeepSpeed holds the optimiser, and steps itself."""
        return self.engine.stage if self.engine else 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module whose forward gets a gradient: DDP averages the gradients over the ranks."""
        if self.world_size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def sync_only_if(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Ranks exchange gradients only in the last micro-batch of an update."""
        if self.engine:
            self.engine.exchange_only_if(last)
            return contextlib.nullcontext()
        return contextlib.nullcontext() if last or self.world_size == 1 else model.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of the loss, scaled where float16 needs it."""
        loss = self.scaler.scale(loss)
        if self.engine:
            self.engine.engine.backward(loss, scale_wrt_gas=False)
        else:
            loss.backward()

    def whole(self) -> contextlib.AbstractContextManager:
        """Within it the weights are in one piece on every rank, which ZeRO 3 does not leave them in."""
        return self.engine.whole() if self.engine else contextlib.nullcontext()

    def close(self, status: int = 0) -> None:
        """The end of a run: all ranks leave together."""
        if self.world_size > 1:
            dist.barrier()
        if self.engine:
            self.engine.close()
        if status or dist.is_initialized():
            leave(status)


def keep_freed_memory() -> None:
    """Tells the C library (glibc) to keep freed memory for the next update instead of giving it back to the system.

    By default every tensor of more than 32 MiB is mapped anew, and each of its pages costs a fault when first written:
    a quarter of the time of a training step on a CPU (trainer/LOG.md). The price: memory stays at its peak.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library: it keeps its own ways
        library = ctypes.CDLL(None)
        trim_threshold, mmap_max = -1, -4  # names of the parameters in <malloc.h>
        library.mallopt(mmap_max, 0)
        library.mallopt(trim_threshold, 2**31 - 1)


def find_device(given: str | None) -> torch.device:
    """The device asked for, else the best there is.  Raises: UserError when torch has no such device."""
    if given is None:
        return torch.device(best_device())
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = {"cuda": cards, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    kind, _, index = given.partition(":")
    if not (index or "0").isdigit() or int(index or 0) >= there.get(kind, 0):
        found = " or ".join(kind for kind, number in there.items() if number)
        raise UserError(f"--device {given}: torch sees no such device here; use --device {found}.")
    return torch.device(given)


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, float16 on older CUDA cards, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return fast_dtype(torch.bfloat16, device) if device.type == "cpu" else torch.float32


def compile_pays(run: Run, planned_tokens: int, loops_over_experts: bool) -> bool:
    """Whether compiling can work here, and is worth a minute. A loop over experts would recompile for ever.

    On a CPU it brings a factor of 1.2 to 1.5 in bfloat16 and next to nothing in float32 (README.md, training speed).
    """
    if sys.platform == "win32" or loops_over_experts:
        return False
    if run.device.type == "cuda":
        return torch.cuda.get_device_capability(run.device) >= (7, 0)
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    headers = Path(sysconfig.get_path("include"), "Python.h")  # a package of its own on Debian: python3-dev
    possible = run.device.type == "cpu" and compiler and headers.is_file()
    return bool(possible and run.dtype == torch.bfloat16 and planned_tokens >= 1_500_000)


def checkpoint_activations(model: nn.Module) -> None:
    """Of each block only the input is kept for the way back (Chen et al. 2016, arXiv:1604.06174)."""
    newer = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.2x on
    (newer or model.gradient_checkpointing_enable)()


def compile_and_wrap(
    raw_model: nn.Module, optimizer: Optimizer, nll: Callable | None, run: Run, args: argparse.Namespace
) -> tuple[nn.Module, Callable[..., Tensor] | None]:
    """The module to train through, and the loss function, compiled where it pays and wrapped for several ranks.

    Rows have one shape, so the model is compiled once. Of the loss what lies between its matrix products is compiled,
    for pieces of any size, and then never holds float32 logits.
    """
    if args.checkpoint_activations:
        checkpoint_activations(raw_model)
    looping = False
    for module in raw_model.modules():
        if isinstance(module, MOEFeedForward):  # settled here: the compiler cannot follow questions about the device
            module.grouped = grouped_mm_works(run.device, run.dtype, module.experts[0].gate_proj.weight)
            looping = not module.grouped
    if args.compile is None and args.deepspeed:
        args.compile = False
    if args.compile is None:
        tokens = args.total_steps * args.batch_size * args.accumulation_steps * args.max_seq_len
        args.compile = compile_pays(run, tokens, looping)
    run.memory_note = memory.advise(raw_model, optimizer, run, args)
    model = torch.compile(raw_model, dynamic=False) if args.compile else raw_model
    if args.compile and nll is not None:
        nll = functools.partial(nll, piece=compiled_piece())
    if args.deepspeed:
        run.engine = zero.ZeroEngine(model, raw_model, optimizer, run, args)
        return run.engine.engine, nll
    return run.wrap(model), nll


def head_weight(model: nn.Module) -> Tensor:
    """The weight (V, D) of the unwrapped model's head, for losses that take hidden states through it in pieces.

    ZeRO 3 leaves each rank a part of it, and gathers a weight only for the forward pass of its own layer.
    """
    weight = model.lm_head.weight
    if hasattr(weight, "ds_id"):
        weight.all_gather()  # cut up again behind the backward pass of the embedding, which shares it
    return weight


class StopRequest:
    """Ctrl-C and SIGTERM finish the update in hand, save, and leave; a second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for name in ("SIGINT", "SIGTERM"):
            signal.signal(getattr(signal, name), self._note)

    def _note(self, number: int, frame: object) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        print("\nstopping after this update, saving first (once more to leave at once)", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------ schedule


def cosine_lr(step: int, total_steps: int, warmup_steps: int, peak: float, floor: float = 0.1) -> float:
    """Learning rate of update `step` (0 … total_steps − 1): linear to the peak, then half a cosine to floor·peak.

    The first update already moves (1/warmup of the peak), the last one runs at the floor. Loshchilov & Hutter 2017,
    arXiv:1608.03983, without restarts.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def fitted_rows(tokens: float, max_steps: int | None, max_seq_len: int) -> int:
    """Rows per update for a run over so many tokens, or so many updates if they come first; a power of two.

    The largest batch that does not waste tokens grows with the square root of the tokens of a run (Zhang et al. 2024,
    arXiv:2410.21676); the constant was measured (trainer/LOG.md): 16,384 tokens per update for 40 million.
    """
    per_update = 16_384 * math.sqrt(tokens / 40e6)
    if max_steps:  # tokens = max_steps · per_update, put into the line above
        per_update = min(per_update, 16_384**2 / 40e6 * max_steps)
    return 2 ** max(0, round(math.log2(max(per_update, 1) / max_seq_len)))


def plan_updates(args: argparse.Namespace, rows: int, run: Run) -> None:
    """Fills in what the flags left open: rows per update and their micro-batches, number of updates, warm-up.

    Raises: UserError when the data gives no row.
    """
    if rows == 0:
        raise UserError(
            f"{args.data_path}: nothing to train on. Every record is longer than --max_seq_len {args.max_seq_len} "
            f"before its first answer, or held out; see `python dataset/check_data.py {as_typed(args.data_path)}`."
        )
    wanted = fitted_rows(args.epochs * rows * args.max_seq_len, args.max_steps, args.max_seq_len)  # over all ranks
    if args.batch_size is None:
        largest = 8 if run.device.type == "cpu" else 32
        args.batch_size = max(1, min(largest, wanted // (run.world_size * (args.accumulation_steps or 1))))
    if args.accumulation_steps is None:
        args.accumulation_steps = max(1, wanted // (args.batch_size * run.world_size))
    if args.saved_rows and args.saved_rows != args.batch_size * args.accumulation_steps * run.world_size:
        fit_layout(args, run)
    updates = args.epochs * math.ceil(rows / (args.batch_size * args.accumulation_steps * run.world_size))
    args.total_steps = min(updates, args.max_steps or updates)
    if args.warmup_iters is None:
        args.warmup_iters = min(200, max(1, args.total_steps // 50))


def fit_layout(args: argparse.Namespace, run: Run) -> None:
    """Spreads the rows that the updates of a resumed run hold over the ranks that there are now.

    Raises: UserError when their number does not divide them.
    """
    each, left = divmod(args.saved_rows, run.world_size)
    if left:
        raise UserError(
            f"--resume: an update of this run holds {args.saved_rows} rows, which {run.world_size} ranks cannot share "
            "evenly; start another number of processes."
        )
    args.batch_size = max(size for size in range(1, min(args.batch_size, each) + 1) if each % size == 0)
    args.accumulation_steps = each // args.batch_size
    if run.is_main:
        print(f"note: an update of this run holds {args.saved_rows} rows; they are spread anew over the ranks")


# --------------------------------------------------------------------------------------------------------------- data


def find_data(given: str | None, known_names: Iterable[str], demo_name: str, run: Run) -> Path:
    """The file to train on: the given one, else the first known name in dataset/, else the generated demo data."""
    if given:
        return Path(given)
    for name in known_names:
        if (ROOT / "dataset" / name).is_file():
            return ROOT / "dataset" / name
    from dataset.make_demo_data import generate

    try:
        with run.main_first():
            return generate(ROOT / "dataset" / "demo")[demo_name]
    except OSError as error:
        raise UserError(f"the demo data cannot be written ({error}); give a file with --data_path.") from error


def load_splits(
    dataset_class: type[Dataset], args: argparse.Namespace, tokenizer: object, run: Run, path: str | None = None
) -> list[Dataset]:
    """Training part and held-out part of a file, `--data_path` by default; rank 0 tokenises, others read its cache."""
    with run.main_first():
        return [
            dataset_class(
                path or args.data_path,
                tokenizer,
                args.max_seq_len,
                split=split,
                val_ratio=args.val_ratio,
                seed=args.seed,
                cache_dir=args.cache_dir,
                skip_bad_records=args.skip_bad_records,
                show_progress=run.is_main,
            )
            for split in ("train", "val")
        ]


def add_mix_flags(parser: argparse.ArgumentParser, share: float) -> None:
    """Flags of stages that learn something new beside what the model can already do."""
    mix = parser.add_argument_group("what is not to be forgotten")
    mix.add_argument("--mix_path", help="an SFT file to mix in; default: with the demo data its SFT file, else none")
    below_one = number(float, 0, excluded=True, high=1)
    mix.add_argument("--mix_ratio", type=below_one, default=share, help="their share of the rows")


def add_rollout_flags(parser: argparse.ArgumentParser, generations: int, beta: float) -> None:
    """Flags of the stages that learn from answers of their own, GRPO and PPO."""
    natural, positive, share = number(int, 1), number(float, 0, excluded=True), number(float, 0)
    rollout = parser.add_argument_group("answers (--batch_size counts questions)")
    rollout.add_argument(
        "--rewards", nargs="+", default=["answer", "format:0.2"], help="NAME or NAME:WEIGHT, see trainer/rewards.py"
    )
    rollout.add_argument("--num_generations", type=natural, default=generations, help="answers to each question")
    rollout.add_argument("--max_new_tokens", type=natural, default=256, help="longest answer, within --max_seq_len")
    rollout.add_argument("--temperature", type=positive, default=1.0, help="of the policy, in drawing and training")
    rollout.add_argument("--rollout_slots", type=natural, default=64, help="answers drawn at a time")
    policy = parser.add_argument_group("policy")
    policy.add_argument("--inner_updates", type=natural, default=1, help="steps on the same answers")
    policy.add_argument("--micro_rows", type=natural, default=8, help="rows of --max_seq_len trained on at a time")
    policy.add_argument("--beta", type=share, default=beta, help="weight of the KL to the model before; 0: none")
    policy.add_argument("--clip_low", type=number(float, 0, most=1), default=0.2, help="ε_low")
    policy.add_argument("--clip_high", type=share, default=0.28, help="ε_high, larger: rare tokens may grow faster")


def load_mixed(
    data: Dataset, mix_class: type[Dataset], args: argparse.Namespace, tokenizer: object, run: Run
) -> tuple[Dataset, Dataset | None]:
    """The data with the rows of `--mix_path` mixed in, and the held-out part of that file; (data, None) without one."""
    demo = Path(args.data_path).resolve().parent == ROOT / "dataset" / "demo"
    if args.mix_path is None and demo:
        args.mix_path = str(ROOT / "dataset" / "demo" / "demo_sft.jsonl")
    if args.mix_path is None:
        return data, None
    other, held_out = load_splits(mix_class, args, tokenizer, run, args.mix_path)
    return MixedDataset(data, other, args.mix_ratio), held_out


# ---------------------------------------------------------------------------------------------------------- row order


class RowOrder(Sampler):
    """Which rows form each micro-batch of this rank in one epoch.

    The epoch is one permutation of all rows, drawn from (seed, epoch), cut into global batches of batch_size ×
    accumulation_steps × world_size consecutive rows. So the rows of an update do not depend on how the global batch is
    spread over micro-batches and ranks, and "rows done" is all that a resumed run needs to know. The last global batch
    holds what is left; where it does not fill the micro-batches, -1 asks the dataset for a row of padding.
    """

    def __init__(self, rows: int, args: argparse.Namespace, run: Run, epoch: int, rows_done: int = 0):
        self.rows, self.batch_size, self.accumulation_steps = rows, args.batch_size, args.accumulation_steps
        self.rank, self.world_size = run.rank, run.world_size
        self.seed, self.rows_done = (run.seed, epoch), rows_done

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulation_steps * self.world_size

    def updates(self) -> Iterator[tuple[int, list[list[int]]]]:
        """Yields (rows in the global batch, this rank's micro-batches of row numbers)."""
        order = np.random.default_rng(self.seed).permutation(self.rows)
        across_ranks = self.batch_size * self.world_size  # rows of one micro-batch over all ranks
        for start in range(self.rows_done, self.rows, self.global_batch):
            chunk = order[start : start + self.global_batch]
            micros = -(-len(chunk) // across_ranks)
            padded = np.full(micros * across_ranks, -1, dtype=np.int64)
            padded[: len(chunk)] = chunk
            mine = padded.reshape(micros, self.world_size, self.batch_size)[:, self.rank]
            yield len(chunk), mine.tolist()

    def __iter__(self) -> Iterator[list[int]]:
        for _, micros in self.updates():
            yield from micros

    def __len__(self) -> int:
        return sum(len(micros) for _, micros in self.updates())


def read_updates(
    dataset: Dataset, order: RowOrder, device: torch.device, num_workers: int | None
) -> Iterator[tuple[int, tuple[int, int], list[dict[str, Tensor]]]]:
    """Yields, per update, the number of new rows, this rank's (terms of the loss, real tokens) and its micro-batches.

    The micro-batches are on the device, the counts on the host: asking the device for them would let it run dry.
    """
    if num_workers is None:  # on Windows each would import torch anew in every epoch
        num_workers = 2 if device.type == "cuda" and sys.platform != "win32" else 0
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=dataset.collate,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # its own, so that reading leaves the random numbers of the run alone
    )
    batches = iter(loader)
    for rows, micros in order.updates():
        batch = [next(batches) for _ in micros]
        terms = sum(dataset.count_terms(micro) for micro in batch)  # trained tokens, or pairs of answers
        tokens = sum(int((micro["documents"] >= 0).sum()) for micro in batch)
        on_device = [{k: v.to(device, non_blocking=True) for k, v in micro.items()} for micro in batch]
        yield rows, (terms, tokens), on_device


def ignore_signals(worker: int) -> None:
    """Ctrl-C reaches a loader process too; it has to feed the update in hand. It ends when the main process lets go."""
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


# --------------------------------------------------------------------------------------------------------- validation


def rows_of_rank(rows: int, run: Run) -> list[int]:
    """The held-out rows that this rank reads; -1, a row of padding, where others have one more.

    Under ZeRO 3 a forward pass is a collective, so all ranks make the same number.
    """
    mine = list(range(run.rank, rows, run.world_size))
    return mine + [-1] * (-(-rows // run.world_size) - len(mine))


@torch.no_grad()
def validate(
    model: nn.Module,
    dataset: Dataset,
    nll: Callable[..., Tensor],
    run: Run,
    batch_size: int,
    max_rows: int,
    bytes_of: Tensor,
) -> dict[str, float] | None:
    """Held-out loss in nats per trained token, and bits per byte of the text those tokens spell; None without rows.

    Bits per byte do not depend on the tokenizer: log2 of the model's probability over UTF-8 bytes (special tokens cost
    bits but spell no bytes).  Args: nll, the trainer's `summed_nll`; bytes_of (V,) bytes of each token.
    """
    rows = min(len(dataset), max_rows)
    if rows == 0:
        return None
    was_training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    mine = rows_of_rank(rows, run)
    for start in range(0, len(mine), batch_size):
        batch = dataset.collate([dataset[row] for row in mine[start : start + batch_size]])
        batch = {name: tensor.to(run.device) for name, tensor in batch.items()}
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "documents")}
        with run.autocast():
            nats = nll(model(**inputs, need_logits=False).hidden_states, head_weight(model), batch)
        trained = batch["labels"][:, 1:][batch["labels"][:, 1:] >= 0].cpu()
        totals += torch.tensor([nats.item(), trained.numel(), bytes_of[trained].sum().item()], dtype=totals.dtype)
    model.train(was_training)
    nats, tokens, text_bytes = run.sum_ranks(totals.to(run.device) if run.world_size > 1 else totals).tolist()
    return {"val_loss": nats / max(tokens, 1), "val_bpb": nats / math.log(2) / max(text_bytes, 1)}
