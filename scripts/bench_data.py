"""How fast and how lean is the data path? Tokenising rate, fill of rows, memory, reading rate for one JSON Lines file.

The file is tokenised into a fresh cache and its rows are read once in random order, in a new process, as a trainer does
it. Rates of tokenising are per second of the wall clock and per second of CPU time over all processes, so that a
machine with more cores can be compared. Then a null model takes the batches of one epoch as the trainers get them
(`read_updates`: order, loading processes, collation) and does nothing with them: the fastest device that reading never
holds back. Memory is the growth of the main process from its imports to its peak, and the peak of the largest helper
process. `--repeat_to_mb` measures a larger file, made of the given one over and over.

    python scripts/bench_data.py dataset/pretrain_hq.jsonl --stage pretrain
    python scripts/bench_data.py dataset/sft_512.jsonl --stage sft --json scripts/bench/results/sft.json
    python scripts/bench_data.py dataset/pretrain_hq.jsonl --stage pretrain --repeat_to_mb 1000      # flat memory?
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from dataset.lm_dataset import PackedDataset, PretrainDataset, SFTDataset
from model.files import atomic_open
from model.weights import load_tokenizer
from scripts.bench_train import machine
from trainer import run_log, trainer_utils
from trainer.command_line import UserError, number, run_script

DATASETS = {"pretrain": PretrainDataset, "sft": SFTDataset}
BATCH_SIZE = 32  # rows of a micro-batch of the null model
LOADING_PROCESSES = (0, 2)  # --num_workers of the trainers: their defaults on a CPU and on a GPU


def null_model_rate(data: PackedDataset, num_workers: int, batch_size: int = BATCH_SIZE) -> float | None:
    """Real tokens per second that reach a model which does nothing; None when one update takes all rows.

    Of one epoch, from the first update on: the loading processes have started then.
    """
    settings = SimpleNamespace(batch_size=batch_size, accumulation_steps=1)
    order = trainer_utils.RowOrder(len(data), settings, SimpleNamespace(rank=0, world_size=1, seed=0), epoch=0)
    updates = trainer_utils.read_updates(data, order, torch.device("cpu"), num_workers)
    next(updates)
    started = time.perf_counter()
    rows = sum(new_rows for new_rows, _, _ in updates)
    seconds = time.perf_counter() - started
    return rows / seconds * data.stats["tokens"] / len(data) if rows else None


def measure(path: Path, stage: str, max_seq_len: int, cache_dir: Path) -> dict:
    """Tokenises and reads the file once, with an empty `cache_dir`."""
    tokenizer = load_tokenizer()
    tokenizer.encode("warm up")
    cpu = torch.device("cpu")
    before = run_log.peak_memory_gib(cpu)
    used, started = sum(os.times()[:4]), time.perf_counter()
    data = DATASETS[stage](path, tokenizer, max_seq_len, cache_dir=cache_dir, show_progress=True)
    seconds, cpu_seconds = time.perf_counter() - started, sum(os.times()[:4]) - used
    if len(data) == 0:
        raise UserError(f"{path}: nothing to train on; check it with `python dataset/check_data.py`.")

    started, real = time.perf_counter(), 0
    for row in np.random.default_rng(0).permutation(len(data)):
        real += int((data[int(row)]["documents"] >= 0).sum())
    read_seconds = time.perf_counter() - started
    after, helper = run_log.peak_memory_gib(cpu), run_log.process_memory_gib(children=True)
    null_model = {f"null_model_tokens_per_second_{n}_workers": null_model_rate(data, n) for n in LOADING_PROCESSES}
    megabytes = path.stat().st_size / 1e6
    return {
        "file": path.name,
        "stage": stage,
        "max_seq_len": max_seq_len,
        "megabytes": megabytes,
        "rows": len(data),
        "real_tokens": real,
        "fill": real / (len(data) * max_seq_len),
        "tokenise_mb_per_second": megabytes / seconds,
        "tokenise_mb_per_cpu_second": megabytes / cpu_seconds,
        "read_tokens_per_second": real / read_seconds,
        **null_model,
        "main_growth_mib": (after - before) * 1024 if before is not None else None,
        "largest_helper_mib": helper * 1024 if helper is not None else None,
    }


def repeat(path: Path, megabytes: int, target: Path) -> Path:
    """Writes the lines of `path` into `target` over and over, up to the given size."""
    with open(path, "rb") as source, open(target, "wb") as out:
        while out.tell() < megabytes * 1e6:
            line = source.readline()
            if not line:
                source.seek(0)
            out.write(line if line.endswith(b"\n") or not line else line + b"\n")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure the data path.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("file", type=Path, help="JSON Lines file")
    parser.add_argument("--stage", choices=DATASETS, required=True, help="format of the file")
    parser.add_argument("--max_seq_len", type=number(int, 2), default=512, help="tokens per row")
    parser.add_argument("--repeat_to_mb", type=number(int, 1), help="measure a file of this many megabytes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if not args.file.is_file() or not args.file.stat().st_size:
        raise UserError(f"{args.file}: no such file, or an empty one; give a JSON Lines file.")
    with tempfile.TemporaryDirectory(prefix="bench_data_") as folder:
        path = repeat(args.file, args.repeat_to_mb, Path(folder) / "big.jsonl") if args.repeat_to_mb else args.file
        row = measure(path, args.stage, args.max_seq_len, Path(folder) / "cache")
    for name, value in row.items():
        print(f"{name:40}{value:,.3f}" if isinstance(value, float) else f"{name:40}{value}")
    if args.json:
        with atomic_open(args.json, "w") as f:
            json.dump({"machine": machine("cpu"), "command": " ".join(sys.argv[1:]), "rows": [row]}, f, indent=2)


if __name__ == "__main__":
    run_script(main)
