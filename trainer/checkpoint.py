"""The full training state on disk: what `--resume` needs to go on bit for bit.

A run folder `out/runs/{stage}_{hidden_size}[_moe]/` holds `step_00000120.pt` (float32 weights, optimiser, scaler,
progress) and beside it `step_00000120.json` with its SHA-256. The JSON is written last: a state without it, or with
another checksum, was cut off, and the one before is used.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerFast

from model.files import atomic_open, replace_file
from model.model_lora import LoraConfig, lora_state_dict, save_lora
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import (
    STAGES,
    WeightsError,
    find_weights,
    load_model,
    load_tokenizer,
    read_about,
    save_weights,
    weight_path,
)
from trainer import zero
from trainer.command_line import UserError, check_writable
from trainer.trainer_utils import Run

# flags that a resumed run does not take over
PER_START = ("resume", "out_dir", "device", "force", "local_rank", "rank_timeout", "max_memory")


@dataclass
class Progress:
    """Where a run stands. Rows count over all ranks, so another number of ranks can go on from here."""

    step: int = 0  # updates done
    epoch: int = 0  # epochs done
    rows_done: int = 0  # rows of the current epoch that were trained on
    tokens: int = 0  # real tokens seen
    skipped_steps: int = 0  # updates left out because of a non-finite gradient
    skipped_in_a_row: int = 0
    finished: bool = False
    _unread = None  # of the last update: whether it was taken, still on the device; no field, so never saved

    def advance(self, rows: int, tokens: int) -> None:
        self.step += 1
        self.rows_done += rows
        self.tokens += tokens

    def next_epoch(self) -> None:
        self.epoch, self.rows_done = self.epoch + 1, 0

    def count_skip(self, finite: Tensor, allowed_in_a_row: int) -> None:
        """Notes whether the update just done was taken, a bool () on the device; the one before is read now.

        Raises: UserError with advice when too many in a row were not.
        """
        self.read_skip()
        self._unread = finite, allowed_in_a_row, self.step

    def read_skip(self) -> None:
        """Counts the update noted last: waits for the device, so only where the count is wanted."""
        if self._unread is None:
            return
        (finite, allowed_in_a_row, step), self._unread = self._unread, None
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.skipped_steps += int(not finite)
        if self.skipped_in_a_row > allowed_in_a_row:
            raise UserError(
                f"the gradient was NaN or infinite in {self.skipped_in_a_row} updates in a row, up to update "
                f"{step}. What was saved before is whole. Start again with a smaller --learning_rate, more "
                "--warmup_iters or --dtype float32, and check the data with `python dataset/check_data.py FILE`."
            )


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_weights(path: Path) -> list[str]:
    """Of a weight file, or of the weight files in a transformers folder."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin"))
    return [sha256_of(file) for file in files]


def save_state(folder: Path, state: dict, facts: dict, step: int, keep: int = 2) -> None:
    """Writes one state atomically and keeps the newest `keep` of them.

    Raises: OSError when the disk is full or read-only; the older states stay.
    """
    path = folder / f"step_{step:08d}.pt"
    with atomic_open(path) as f:
        torch.save(state, f)
    with atomic_open(path.with_suffix(".json"), "w") as f:
        json.dump({"sha256": sha256_of(path), **facts}, f, ensure_ascii=False, indent=2)
    for old in sorted(folder.glob("step_*.pt"))[:-keep]:
        old.unlink()
        old.with_suffix(".json").unlink(missing_ok=True)


def newest_state(folder: Path) -> tuple[Path, dict] | None:
    """The newest whole state of a run folder and its facts, or None. A damaged one is named and passed over."""
    for path in sorted(folder.glob("step_*.pt"), reverse=True):
        try:
            facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            whole = facts["sha256"] == sha256_of(path)
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if whole:
            return path, facts
        print(f"warning: {path} is incomplete or damaged, trying the state before it", file=sys.stderr)
    return None


def find_run(out_dir: str | Path, stage: str, hidden_size: int | None = None, use_moe: bool | None = None) -> Path:
    """The run folder of a stage that was written to last, among those of the given size.

    Raises: UserError when there is nothing to resume.
    """
    found = []
    for folder in (Path(out_dir) / "runs").glob(f"{stage}_*"):
        name = re.fullmatch(rf"{re.escape(stage)}_(\d+)(_moe)?", folder.name)
        states = list(folder.glob("step_*.pt"))
        if name and states and hidden_size in (None, int(name[1])) and use_moe in (None, bool(name[2])):
            found.append((max(state.stat().st_mtime for state in states), folder))
    if not found:
        folder = Path(out_dir) / "runs"
        kept = ", ".join(str(path) for path in sorted(folder.glob(f"{stage}_*.previous")))
        hint = f" (an earlier run is kept in {kept}: rename it to resume it)" if kept else ""
        raise UserError(f"--resume found no saved state of {stage} in {folder}{hint}; start without --resume.")
    return max(found)[1]


def restarted(args: argparse.Namespace, stage: str) -> bool:
    """Whether torchrun (`--max-restarts`) started this process again after a failure, with a state to go on from."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    with contextlib.suppress(UserError):
        newest = newest_state(find_run(args.out_dir, stage, args.hidden_size, args.use_moe))
        launch = os.environ.get("TORCHELASTIC_RUN_ID")
        return newest is not None and newest[1].get("launch") == launch and not newest[1]["progress"]["finished"]
    return False


def parse_flags(parser: argparse.ArgumentParser, stage: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; with `--resume` those of the interrupted run, where the command line does not name them again.

    The name of a stage may hold flags, as in "lora_{lora_name}".

    Raises: UserError when there is nothing to resume, or the output folder cannot be written.
    """
    args = parser.parse_args(argv)
    stage = stage.format(**vars(args))
    args.resume = args.resume or restarted(args, stage)
    if args.resume:
        newest = newest_state(find_run(args.out_dir, stage, args.hidden_size, args.use_moe))
        if newest is None:
            raise UserError(f"--resume found only damaged states of {stage} in {args.out_dir}; start without --resume.")
        kept = {name: value for name, value in newest[1]["args"].items() if name not in PER_START}
        parser.set_defaults(**kept, resume=True)
        args = parser.parse_args(argv)
    zero.settle(args)
    # Whole paths: the run may be resumed from another folder.
    for name in ("data_path", "mix_path", "cache_dir", "from_weight", "teacher", "deepspeed"):
        value = getattr(args, name, None)
        is_stage = name in ("from_weight", "teacher") and value in STAGES
        if value and not is_stage and (name in ("data_path", "mix_path", "cache_dir") or Path(value).is_file()):
            setattr(args, name, str(Path(value).resolve()))
    if args.use_wandb and importlib.util.find_spec("wandb") is None:  # before an earlier run is moved aside
        raise UserError("--use_wandb needs the wandb package: pip install wandb, or leave the flag out.")
    if args.use_tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--use_tensorboard needs the package: pip install tensorboard, or leave the flag out.")
    args.given = dict(vars(args))
    args.saved_config = newest[1]["config"] if args.resume else None
    # Another number of ranks spreads the rows of an update anew, unless the command line says how.
    as_saved = args.resume and all(getattr(args, name) == kept[name] for name in ("batch_size", "accumulation_steps"))
    args.saved_rows = newest[1]["signature"]["rows per update"] if as_saved else None
    check_writable(args.out_dir, "--out_dir")
    return args


def check_signature(saved: dict, now: dict, forced: bool = False) -> None:
    """Raises: UserError naming what differs, when the run could not go on as the same run; `forced`: warns of it."""
    for name in {**saved, **now}:
        if saved.get(name) == now.get(name):
            continue
        differs = f"{name} was {saved.get(name)}, now it is {now.get(name)}"
        if not forced:
            raise UserError(
                f"--resume cannot go on: {differs}. Use the old value, start a new run without --resume, or go on all "
                "the same with --force."
            )
        print(f"warning: {differs}; --force goes on, and it will not be the same run", file=sys.stderr)


def last_progress(folder: Path) -> dict | None:
    """The progress of the newest state of a run folder, None where there is none."""
    for path in sorted(folder.glob("step_*.json"), reverse=True):  # written last: a state is whole
        with contextlib.suppress(OSError, ValueError, KeyError):
            return json.loads(path.read_text(encoding="utf-8"))["progress"]
    return None


def start_folder(folder: Path, weights: Path) -> None:
    """Makes an empty run folder. An earlier run that saved something moves to `NAME.previous`, its weights with it.

    One run is kept there. One that was stopped before it saved is dropped: it must not push out a run that is worth it.
    """
    previous = folder.with_name(folder.name + ".previous")
    here, there = last_progress(folder), last_progress(previous)
    if here and there and not here["finished"] and here["step"] < there["step"]:
        shutil.rmtree(folder)
        print(f"the unfinished run of {here['step']} updates is dropped; one of {there['step']} is kept in {previous}")
    elif any(folder.glob("step_*.json")):
        if previous.exists():
            shutil.rmtree(previous)
        replace_file(folder, previous)
        for path in (weights, weights.with_suffix(".json")):  # copied: until the new run saves, the chat needs them
            if path.is_file():
                shutil.copy2(path, previous)
        print(f"an earlier run was here; it is kept in {previous} (use --resume to continue a run instead)")
    elif folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def lock_folder(folder: Path) -> FileLock:
    """Keeps other processes out of a run folder, until this one ends in whatever way.

    Raises: UserError when another run is writing there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(folder.name + ".lock"), blocking=False, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another run is writing to {folder}. Wait for it or stop it, or give this one another --out_dir."
        ) from None
    return lock


def start_weights(args: argparse.Namespace) -> Path | None:
    """The weights named by `--from_weight`, a stage or a file; None for a new model.  Raises: WeightsError."""
    if args.from_weight in (None, "none"):
        return None
    if args.from_weight in STAGES:
        return find_weights(args.out_dir, args.from_weight, args.hidden_size, args.use_moe)
    return Path(args.from_weight)


def start_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerFast:
    """The tokenizer of `--tokenizer`, else of the weights to start from, else the shipped one. Later stages inherit it.

    Raises: WeightsError when it is not there.
    """
    if args.tokenizer is None and not args.resume:
        weights = start_weights(args)
        args.tokenizer = read_about(weights).get("tokenizer") if weights else None
    if args.tokenizer is not None:
        args.tokenizer = str(Path(args.tokenizer).resolve())
    args.given["tokenizer"] = args.tokenizer
    return load_tokenizer(args.tokenizer)


def start_model(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, run: Run, keep_score: bool = False
) -> MiniMindForCausalLM:
    """The model a stage starts from: the weights named by `--from_weight` (a stage or a file), or a new one.

    Weights know their configuration; a size given on the command line must agree with it. A resumed run knows it too:
    the weights that it began with may be gone by then.
    Raises: WeightsError when weights are missing, of another size, or do not fit the tokenizer; UserError when a size
    given to a resumed run is not its own.
    """
    given = {name: getattr(args, name) for name in ("hidden_size", "num_hidden_layers", "use_moe")}
    if args.resume:
        config = MiniMindConfig(**args.saved_config)
        asked = {name: value for name, value in given.items() if value is not None}
        check_signature({name: getattr(config, name) for name in asked}, asked)
        return MiniMindForCausalLM(config).to(run.device).train()
    path = start_weights(args)
    if path is None:
        config = MiniMindConfig(
            hidden_size=args.hidden_size or 512,
            num_hidden_layers=args.num_hidden_layers or 8,
            use_moe=bool(args.use_moe),
            vocab_size=len(tokenizer),
        )
        return MiniMindForCausalLM(config).to(run.device).train()
    model = load_model(path, run.device, **given)
    if hasattr(model, "score") and not keep_score:  # of a reward model, of no use to any other stage
        del model.score
    if model.config.vocab_size != len(tokenizer):
        raise WeightsError(f"{path} has {model.config.vocab_size} tokens, the tokenizer {len(tokenizer)}: they differ.")
    if run.is_main:
        print(f"starting from {path}")
    return model.train()


def start_base(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, run: Run) -> MiniMindForCausalLM:
    """The model of `--from_weight` as it is on disk, also in a resumed run, whose states do not hold it: the frozen
    base of an adapter, the reference of a policy.

    Raises: WeightsError as `start_model`; UserError without weights.
    """
    path = start_weights(args)
    if path is None:
        raise UserError("--from_weight none: this stage needs a trained model; give a stage or a file.")
    args.from_weight = args.given["from_weight"] = str(path.resolve())  # "the newest" may be another one by then
    asked, args.resume = args.resume, False
    try:
        return start_model(args, tokenizer, run)
    finally:
        args.resume = asked


class Keeper:
    """Saves a run and brings it back: weights for users, full states for `--resume`. Only rank 0 writes."""

    def __init__(self, run: Run, stage: str, args: argparse.Namespace, model: nn.Module, optimizer: Optimizer):
        self.run, self.stage, self.args, self.model, self.optimizer = run, stage, args, model, optimizer
        self.weights = weight_path(args.out_dir, stage, model.config)
        self.folder = Path(args.out_dir) / "runs" / self.weights.stem
        self.progress = Progress()
        self.wandb_id: str | None = None
        self.also_same: dict[str, object] = {}  # what else a resumed run must share with the interrupted one

    def depends_on(self, what: str, path: Path) -> None:
        """Notes weights that the run compares itself with; a resumed run must find the same.

        Raises: UserError where the run would write over them.
        """
        if path.resolve() == self.weights.resolve():
            raise UserError(
                f"the {what} {path} is what this run would write over, and then it could not be resumed. Name another "
                "--out_dir, and the weights by their path."
            )
        self.also_same[f"{what} weights"] = sha256_of_weights(path)

    def restore_or_start(self, data_key: str) -> Progress:
        """With `--resume` the newest whole state, else an empty run folder.

        Raises: UserError when data, global batch or schedule are not those of the saved run.
        """
        args = self.args
        same = "epochs optimizer total_steps warmup_iters learning_rate weight_decay grad_clip".split()
        # In the order in which a difference is named: the causes before what follows from them.
        self.signature = {
            "rows per update": args.batch_size * args.accumulation_steps * self.run.world_size,
            **{name: getattr(args, name) for name in ("seed", "max_seq_len", "val_ratio")},
            "data (content, tokenizer, settings)": data_key,
            **{name: getattr(args, name) for name in same},
            **self.also_same,
        }
        if self.run.is_main:
            self.lock = lock_folder(self.folder)
        if not self.args.resume:
            if self.run.is_main:
                start_folder(self.folder, self.weights)
            return self.progress
        newest = newest_state(self.folder)
        if newest is None:
            raise UserError(f"--resume found no whole state in {self.folder}; start without --resume.")
        path, facts = newest
        check_signature(facts["signature"], self.signature, self.args.force)
        if self.run.is_main:  # what a killed process left half written
            for part in [*self.folder.glob("*.part"), *self.weights.parent.glob(f"{self.weights.stem}.*.part")]:
                part.unlink(missing_ok=True)
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.load_model_state(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.run.scaler.is_enabled() and state["scaler"]:
            self.run.scaler.load_state_dict(state["scaler"])
        if self.run.is_main and facts["dtype"] != str(self.run.dtype):
            print(f"note: the run began in {facts['dtype']} and goes on in {self.run.dtype}")
        self.wandb_id = facts.get("wandb_id")
        self.progress = Progress(**facts["progress"])
        if self.progress.finished and self.run.is_main:
            print(f"this run is finished ({self.progress.step} updates); its weights are in {self.weights}")
        elif self.run.is_main:
            print(f"resumed at update {self.progress.step}, epoch {self.progress.epoch + 1}, from {path}")
        return self.progress

    def save(self) -> None:
        """Weights and full state of this moment.  Raises: OSError, with what was saved before still whole."""
        self.progress.read_skip()
        model, optimizer = self.run.engine.collect() if self.run.zero_stage else (self.model, None)
        if not self.run.is_main:
            return
        state = {
            "model": self.model_state(model),
            "optimizer": optimizer or self.optimizer.state_dict(),
            "scaler": self.run.scaler.state_dict(),
        }
        facts = {
            "progress": asdict(self.progress),
            "args": self.args.given,
            "config": self.model.config.to_diff_dict(),
            "signature": self.signature,
            "dtype": str(self.run.dtype),
            "wandb_id": self.wandb_id,
            "launch": os.environ.get("TORCHELASTIC_RUN_ID"),
        }
        try:
            # Weights first: once a state says that the run is finished, its weights are there.
            about = {"stage": self.stage, "step": self.progress.step, "tokenizer": self.args.tokenizer}
            self.save_weights(model, about)
            save_state(self.folder, state, facts, self.progress.step)
        except RuntimeError as error:  # torch reports a full disk from its archive writer
            message = f"could not save to {self.folder} ({error}). Is the disk full? Older states are whole."
            raise OSError(message) from error

    def model_state(self, model: nn.Module) -> dict[str, Tensor]:
        return model.state_dict()

    def load_model_state(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state, strict=True)

    def save_weights(self, model: nn.Module, about: dict) -> None:
        save_weights(model, self.weights, about)


class ActorKeeper(Keeper):
    """Keeps policy and value head for `--resume`; the weights for users are the policy alone."""

    def save_weights(self, model: nn.Module, about: dict) -> None:
        save_weights(model, self.weights, about, leave_out="value_head.")


class LoraKeeper(Keeper):
    """Keeps the adapter alone; its states go on with the same base only."""

    def __init__(
        self,
        run: Run,
        stage: str,
        args: argparse.Namespace,
        model: nn.Module,
        optimizer: Optimizer,
        config: LoraConfig,
    ):
        super().__init__(run, stage.format(**vars(args)), args, model, optimizer)
        self.weights = weight_path(Path(args.out_dir) / "lora", args.lora_name, model.config)
        self.config = config
        adapter = asdict(config) | {"target_modules": list(config.target_modules)}  # as JSON gives it back
        self.depends_on("base", Path(args.from_weight))
        self.also_same |= adapter

    def model_state(self, model: nn.Module) -> dict[str, Tensor]:
        return lora_state_dict(model)

    def load_model_state(self, state: dict[str, Tensor]) -> None:
        for name, tensor in lora_state_dict(self.model).items():
            tensor.copy_(state[name])

    def save_weights(self, model: nn.Module, about: dict) -> None:
        save_lora(model, self.weights, self.config, extra=about)
