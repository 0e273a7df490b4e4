"""Time to quality: how fast training recipes reach a held-out loss, side by side.

Every recipe trains the same model, with the same tokenizer, on the same records, for a given number of seconds, and is
judged on the same held-out rows: bits per byte (pretraining) or nats per trained token (SFT). The first recipe is the
reference's: one padded record per row, AdamW falling from 5e-4 to a tenth without warm-up, torch's initialisation.
Each further one adds one step on the way to the trainers' defaults. The learning rate follows the clock, so that every
recipe gets its whole schedule; validation stops the clock, compiling does not.

    python scripts/bench_recipe.py pretrain.jsonl --seconds 150 --reference_seconds 1200
    python scripts/bench_recipe.py sft.jsonl --stage full_sft --from_weight out/pretrain_256.pth --seconds 150
    python scripts/bench_recipe.py pretrain.jsonl --recipes reference ours --seeds 0 1 2 --json recipe.json

Dimension legend: B batch · T tokens.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.lm_dataset import IGNORE, PretrainDataset, SFTDataset, token_bytes
from model.files import atomic_open
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_model, load_tokenizer
from scripts.bench_train import machine
from trainer import train_full_sft, train_pretrain
from trainer import trainer_utils as utils
from trainer.command_line import UserError, number, run_script
from trainer.optimizer import make_optimizer

DATASETS = {"pretrain": PretrainDataset, "full_sft": SFTDataset}
METRIC = {"pretrain": "val_bpb", "full_sft": "val_loss"}
REFERENCE_ROWS = {"pretrain": 32, "full_sft": 16}
OUR_RATE = {"pretrain": 2e-3, "full_sft": 1e-3}  # the defaults of the trainers
NLL = {"pretrain": train_pretrain.summed_nll, "full_sft": train_full_sft.summed_nll}


def whole_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The reference's loss, summed: every position goes through the head at once.  Shape: (B, T, V), (B, T) → ()."""
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )


@dataclass(frozen=True)
class Recipe:
    """What distinguishes one way of training from another. The defaults are the reference's."""

    packed: bool = False  # full rows of several records, or one padded record per row
    plumbing: bool = False  # the trainers' arithmetic: precision, compiler, memory kept, head and attention in pieces
    our_start: bool = False  # initialisation: 0.02 and scaled residual outputs, or what torch.nn.Linear does
    max_seq_len: int = 512
    batch_size: int | None = None  # None: the reference's in this stage
    ramp: tuple[float, ...] = (1,)  # factors on the batch size, one after another over equal parts of the time
    accumulation: int = 1
    optimizer: str = "adamw"
    learning_rate: float | None = 5e-4  # None: ours in this stage
    warmup: float = 0.0  # share of the schedule
    floor: float = 0.1  # of the peak, at the end
    weight_decay: float = 0.01


REFERENCE = Recipe()
PACKED = replace(REFERENCE, packed=True)
PLUMBING = replace(PACKED, plumbing=True)
START = replace(PLUMBING, our_start=True)
SCHEDULE = replace(START, warmup=0.02, learning_rate=None, weight_decay=0.1)
SMALL = replace(SCHEDULE, batch_size=8)
MUON = replace(SMALL, optimizer="muon")
OURS = replace(MUON, batch_size=4)  # what `fitted_rows` gives for half a million tokens; --our_rows for more
RECIPES = {
    "reference": REFERENCE,
    "accumulation 8": replace(REFERENCE, accumulation=8),
    "packed": PACKED,
    "plumbing": PLUMBING,
    "initialisation": START,
    "schedule": SCHEDULE,
    "small updates": SMALL,
    "muon": MUON,
    "ours": OURS,
    "batch ramp": replace(OURS, ramp=(0.5, 1, 2)),
}
REFERENCES = ("reference", "accumulation 8")


def for_stage(recipe: Recipe, stage: str) -> Recipe:
    """The recipe with what depends on the stage filled in."""
    rows = REFERENCE_ROWS[stage] if recipe.batch_size is None else recipe.batch_size
    rate = OUR_RATE[stage] if recipe.learning_rate is None else recipe.learning_rate
    return replace(recipe, batch_size=rows, learning_rate=rate)


class PaddedRows(torch.utils.data.Dataset):
    """One record per row, its head where it is too long, filled up with padding: how the reference reads its data."""

    def __init__(self, data: PretrainDataset | SFTDataset):
        self.cache, self.max_seq_len, self.pad = data.cache, data.max_seq_len, data.pad_token_id
        self.collate, self.count_terms = data.collate, data.count_terms
        offsets = self.cache.offsets.array
        rows = data._rows.array
        # the records of the training part, by where they start; pieces of one record begin inside it and fall away
        starts = np.unique(data._starts.array[: rows[-1]])
        self.records = np.flatnonzero(np.isin(offsets[:-1], starts))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        start, end = self.cache.offsets.array[self.records[row] : self.records[row] + 2].tolist()
        length = min(end - start, self.max_seq_len)
        ids = np.full(self.max_seq_len, self.pad, dtype=np.int64)
        labels = np.full(self.max_seq_len, IGNORE, dtype=np.int64)
        ids[:length] = self.cache.tokens.array[start : start + length]
        trained = np.ones(length, bool) if self.cache.trained is None else self.cache.trained.array[start:][:length]
        labels[1:length] = np.where(trained, ids[:length], IGNORE)[1:]
        documents = np.where(np.arange(self.max_seq_len) < length, 0, -1)  # only counted: the model does not get them
        arrays = {"input_ids": ids, "labels": labels, "documents": documents}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def torch_start(model: nn.Module) -> None:
    """The initialisation of torch.nn.Linear (uniform up to 1/√fan-in), the tied embedding included."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))


def train(recipe: Recipe, args: argparse.Namespace, seconds: float, seed: int) -> dict:
    """Trains one recipe for so many seconds.  Returns: held-out figures over time, tokens and updates."""
    recipe = for_stage(recipe, args.stage)
    dtype = "auto" if recipe.plumbing or utils.find_device(args.device).type == "cuda" else "float32"
    run = utils.Run(args.device, dtype, seed, keep_memory=recipe.plumbing)
    tokenizer = load_tokenizer(args.tokenizer)
    common = {"cache_dir": args.cache_dir, "show_progress": False}
    data = DATASETS[args.stage](args.file, tokenizer, recipe.max_seq_len, seed=seed, **common)
    held_out = DATASETS[args.stage](args.file, tokenizer, args.max_seq_len, split="val", seed=0, **common)  # same rows
    if not len(data) or not len(held_out):
        raise UserError(f"{args.file}: nothing to train on or to hold out.")
    rows = data if recipe.packed else PaddedRows(data)

    if args.from_weight:
        raw_model = load_model(args.from_weight, run.device).train()
    else:
        sizes = {"hidden_size": args.hidden_size, "num_hidden_layers": args.num_hidden_layers}
        raw_model = MiniMindForCausalLM(MiniMindConfig(**sizes, vocab_size=len(tokenizer))).to(run.device).train()
        if not recipe.our_start:
            torch_start(raw_model)
    for block in raw_model.model.layers:
        block.self_attn.in_blocks = recipe.plumbing
    optimizer = make_optimizer(raw_model, recipe.weight_decay, run.device, recipe.optimizer, run.dtype)
    nll, bytes_of = NLL[args.stage], token_bytes(tokenizer)
    compiles = recipe.plumbing and args.compile
    plain = argparse.Namespace(
        compile=compiles, deepspeed=None, checkpoint_activations=False, max_memory=None, max_seq_len=recipe.max_seq_len,
        batch_size=recipe.batch_size, accumulation_steps=recipe.accumulation,
    )  # fmt: skip
    model, fast_nll = utils.compile_and_wrap(raw_model, optimizer, nll, run, plain)

    order = argparse.Namespace(batch_size=recipe.batch_size, accumulation_steps=recipe.accumulation)
    names = ("input_ids", "position_ids", "documents") if recipe.packed else ("input_ids",)
    curve, clock, epoch, tokens, updates = [], 0.0, 0, 0, 0
    marks = [seconds * part / args.checks for part in range(1, args.checks + 1)]
    batches = iter(())
    while clock < seconds:
        started = time.perf_counter()
        factor = recipe.ramp[int(clock / seconds * len(recipe.ramp))]
        if (size := max(1, round(recipe.batch_size * factor))) != order.batch_size:
            order.batch_size, batches = size, iter(())
        batch = next(batches, None)
        if batch is None:
            batches = utils.read_updates(rows, utils.RowOrder(len(rows), order, run, epoch), run.device, None)
            epoch, batch = epoch + 1, next(batches)
        _, (trained, _), micros = batch
        milliseconds = [round(1000 * t) for t in (clock, seconds, recipe.warmup * seconds)]
        lr = utils.cosine_lr(*milliseconds, recipe.learning_rate, recipe.floor)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for micro in micros:
            inputs = {name: micro[name] for name in names}
            with run.autocast():
                if recipe.plumbing:
                    hidden = model(**inputs, need_logits=False).hidden_states
                    nats = fast_nll(hidden, raw_model.lm_head.weight, micro)
                else:
                    nats = whole_nll(model(**inputs).logits, micro["labels"])
                run.scaler.scale(nats / max(trained, 1)).backward()
        run.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        updates += 1
        tokens += trained
        if run.device.type == "cuda":
            torch.cuda.synchronize()  # so that the clock is true
        clock += time.perf_counter() - started
        if clock >= marks[0]:
            result = utils.validate(raw_model, held_out, nll, run, 8, args.val_rows, bytes_of)
            curve.append({"seconds": clock, "updates": updates, "tokens": tokens, **result})
            marks = [mark for mark in marks if mark > clock] or [math.inf]
    return {"seed": seed, "updates": updates, "tokens": tokens, "tokens_per_second": tokens / clock, "curve": curve}


def seconds_to(curve: list[dict], name: str, target: float) -> float | None:
    """When a curve first is at or below a figure, between two points along the straight line; None if it never is."""
    before = None
    for point in curve:
        if point[name] <= target:
            if before is None:
                return point["seconds"]
            share = (before[name] - target) / (before[name] - point[name])
            return before["seconds"] + share * (point["seconds"] - before["seconds"])
        before = point
    return None


def verdicts(results: list[dict], name: str) -> list[str]:
    """One line per run that gets to where the better reference ends: after how many seconds, in what part of its time.

    Empty where no reference was run.
    """
    references = [r for r in results if r["recipe"] in REFERENCES]
    if not references:
        return []
    best = min(references, key=lambda r: r["curve"][-1][name])
    target, whole = best["curve"][-1][name], best["curve"][-1]["seconds"]
    lines = []
    for r in results:
        reached = seconds_to(r["curve"], name, target)
        if reached is not None and r not in references:
            run = f"{r['recipe']} (seed {r['seed']})"
            faster = f"{whole / reached:.1f} × faster"
            lines.append(f"{run} is where the better reference ends after {reached:.0f} s: {faster}")
    return lines


def table(results: list[dict], name: str) -> str:
    """A row per recipe: its last held-out figure (mean over seeds and spread) and what it took."""
    lines = [
        f"| recipe | seconds | updates | trained tokens/s | {name} | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for recipe, seconds in dict.fromkeys((r["recipe"], r["budget_seconds"]) for r in results):
        runs = [r for r in results if (r["recipe"], r["budget_seconds"]) == (recipe, seconds)]
        ends = [r["curve"][-1][name] for r in runs]
        spread = f" ± {np.std(ends, ddof=1):.3f}" if len(ends) > 1 else ""
        updates, rate = (np.mean([r[key] for r in runs]) for key in ("updates", "tokens_per_second"))
        lines.append(
            f"| {recipe} | {seconds:g} | {updates:.0f} | {rate:,.0f} | {np.mean(ends):.4f}{spread} | {len(runs)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare training recipes by time to quality.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    positive, count = number(float, 0, excluded=True), number(int, 1)
    parser.add_argument("file", type=Path, help="JSON Lines file")
    parser.add_argument("--stage", choices=DATASETS, default="pretrain", help="format of the file, and what is trained")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="which to run, in order")
    parser.add_argument("--seconds", type=positive, default=150.0, help="training time of each recipe")
    parser.add_argument("--reference_seconds", type=positive, help="of the reference; default as the others")
    parser.add_argument("--our_rows", type=count, help="per update in 'ours'; default 4, for half a million tokens")
    parser.add_argument("--seeds", nargs="+", type=number(int, 0), default=[0], help="one run for each")
    parser.add_argument("--hidden_size", type=count, default=256, help="width")
    parser.add_argument("--num_hidden_layers", type=count, default=4, help="depth")
    parser.add_argument("--max_seq_len", type=count, default=512, help="tokens per held-out row")
    parser.add_argument("--from_weight", type=Path, help="weights to start from, for SFT")
    parser.add_argument("--tokenizer", help="folder of another tokenizer")
    parser.add_argument("--checks", type=count, default=5, help="validations, evenly over the time")
    parser.add_argument("--val_rows", type=count, default=128, help="held-out rows that a validation reads")
    parser.add_argument("--device", help="cuda, mps or cpu; default the best there is")
    parser.add_argument("--compile", type=int, choices=[0, 1], default=int(torch.cuda.is_available()), help="1 on")
    parser.add_argument("--cache_dir", help="where tokenised files are kept; default dataset/.cache")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one run in a process of its own
    args = parser.parse_args()
    if args.case:
        case = json.loads(args.case)
        recipe = RECIPES[case["recipe"]]
        if args.our_rows and case["recipe"] in ("ours", "batch ramp"):
            recipe = replace(recipe, batch_size=args.our_rows)
        print(json.dumps(case | train(recipe, args, case["budget_seconds"], case["seed"])))
        return

    results = []
    for seed in args.seeds:
        for name in args.recipes:
            slow = args.reference_seconds if name in REFERENCES else None
            case = {"recipe": name, "budget_seconds": slow or args.seconds, "seed": seed}
            command = [sys.executable, __file__, *sys.argv[1:], "--case", json.dumps(case)]
            with tempfile.TemporaryDirectory() as compiled:  # empty: each run pays for its compilation
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": compiled}
                done = subprocess.run(
                    command, env=environment, stdout=subprocess.PIPE, encoding="utf-8", errors="replace"
                )
            if done.returncode:
                raise UserError(f"recipe {name!r} failed; see the lines above.")
            results.append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(table(results[-1:], METRIC[args.stage]).splitlines()[-1], flush=True)
            if args.json:  # after each run: hours may lie before the last
                with atomic_open(args.json, "w") as f:
                    words = [Path(word).name if Path(word).exists() else word for word in sys.argv[1:]]
                    command = shlex.join(words)
                    report = {**machine(args.device), "stage": args.stage, "file": args.file.name, "command": command}
                    json.dump(report | {"results": results}, f, indent=1)
    print("\n" + table(results, METRIC[args.stage]), *verdicts(results, METRIC[args.stage]), sep="\n")


if __name__ == "__main__":
    run_script(main)
