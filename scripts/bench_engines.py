"""What several processes cost, and what saving costs: `python scripts/bench_engines.py`.

Pretraining with the same global batch in one process with all threads, and split over ranks with DDP and DeepSpeed's
ZeRO 0 to 3: real tokens per second, and the overhead over one process. Then the seconds that a state takes to be saved,
and to be found, checked and loaded again.

    python scripts/bench_engines.py                                        # 256 × 4 layers, two ranks; saving of 104M
    python scripts/bench_engines.py --size 512x8 --ranks 4 --json scripts/bench/results/engines.json

中文：同样的全局批量下，比较单进程、DDP 与 ZeRO 0–3 的速度；再测保存与恢复训练状态所需的秒数。
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from dataset.make_demo_data import generate
from model.files import atomic_open
from scripts.bench_train import machine, read_size
from trainer import checkpoint
from trainer import trainer_utils as utils
from trainer.command_line import UserError, number, run_script
from trainer.optimizer import make_optimizer
from trainer.run_log import read_metrics

ENGINES = ("one process", "DDP", "ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3")


def speed(engine: str, args: argparse.Namespace, folder: Path) -> float:
    """Real tokens per second over all ranks, the median of the updates behind the first five.

    Raises: UserError with the last lines of a run that fails.
    """
    ranks = 1 if engine == "one process" else args.ranks
    config = read_size(args.size)
    out = folder / engine.replace(" ", "_")
    words = [ROOT / "trainer" / "train_pretrain.py", "--hidden_size", config.hidden_size]
    words += ["--num_hidden_layers", config.num_hidden_layers, "--data_path", generate(folder / "demo")["pretrain"]]
    words += ["--cache_dir", folder / "cache", "--out_dir", out, "--max_seq_len", args.seq_len, "--no-compile"]
    words += ["--batch_size", args.rows // ranks, "--accumulation_steps", 1, "--max_steps", args.updates + 5]
    words += ["--optimizer", "adamw", "--log_interval", 1, "--val_interval", 0, "--device", args.device]
    if engine.startswith("ZeRO"):
        words += ["--deepspeed", ROOT / "trainer" / "deepspeed" / f"zero{engine[-1]}.json"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks] if ranks > 1 else []
    threads = max(1, (os.cpu_count() or 1) // ranks)
    done = subprocess.run(
        [sys.executable, *map(str, launch + words)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, encoding="utf-8",
        errors="replace", check=False,
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"{engine} ended with status {done.returncode}: {done.stderr[-400:]}")
    (metrics,) = out.glob("runs/*/metrics.jsonl")
    rates = [record["tokens_per_second"] for record in read_metrics(metrics) if "tokens_per_second" in record]
    return statistics.median(rates[5:])


def saving(size: str, device: str, folder: Path) -> dict[str, float]:
    """Seconds to save a state of this size with Muon's and AdamW's means, and to find, check and load it again."""
    parser = argparse.ArgumentParser()
    utils.add_shared_flags(parser, epochs=1, learning_rate=1e-3, max_seq_len=512)
    config = read_size(size)
    flags = f"--hidden_size {config.hidden_size} --num_hidden_layers {config.num_hidden_layers} --device {device}"
    flags = [*flags.split(), "--out_dir", str(folder / "saving"), "--batch_size", "1", "--accumulation_steps", "1"]
    seconds = {}
    for moment in ("save", "resume"):
        started = time.perf_counter()
        args = checkpoint.parse_flags(parser, "pretrain", [*flags, *(["--resume"] if moment == "resume" else [])])
        run = utils.Run(args.device, args.dtype, args.seed)
        args.from_weight = None
        model = checkpoint.start_model(args, checkpoint.start_tokenizer(args), run)
        optimizer = make_optimizer(model, args.weight_decay, run.device, args.optimizer, run.dtype)
        args.total_steps, args.warmup_iters = 1, 1
        keeper = checkpoint.Keeper(run, "pretrain", args, model, optimizer)
        keeper.restore_or_start("none")
        if moment == "save":
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            started = time.perf_counter()
            keeper.save()
            seconds["state_bytes"] = sum(path.stat().st_size for path in keeper.folder.glob("*.pt"))
        keeper.lock.release()
        seconds[moment] = time.perf_counter() - started
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure what several processes cost.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="which to measure")
    parser.add_argument("--size", default="256x4", help="HIDDENxLAYERS of the speed measurement")
    parser.add_argument("--seq_len", type=number(int, 1), default=256, help="tokens per row")
    parser.add_argument("--rows", type=number(int, 1), default=16, help="rows per update, over all ranks")
    parser.add_argument("--ranks", type=number(int, 1), default=2, help="processes")
    parser.add_argument("--updates", type=number(int, 1), default=20, help="updates that count")
    parser.add_argument("--save_size", default="768x16", help="HIDDENxLAYERS of the model that is saved")
    parser.add_argument("--device", default=utils.best_device(), help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.rows % args.ranks:
        raise UserError(f"--rows {args.rows} cannot be shared by {args.ranks} ranks evenly.")
    report = {"machine": machine(args.device), "size": args.size, "ranks": args.ranks, "rows": args.rows, "engines": {}}
    lines = ["| engine | tokens/s | of one process |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as temporary:
        for engine in args.engines:
            rate = speed(engine, args, Path(temporary))
            report["engines"][engine] = rate
            first = report["engines"][args.engines[0]]
            lines.append(f"| {engine} | {rate:,.0f} | {rate / first:.2f} |")
            print(lines[-1], flush=True)
        report["saving"] = {"size": args.save_size, **saving(args.save_size, args.device, Path(temporary))}
    figures = report["saving"]
    print("\n".join(lines))
    print(
        f"{args.save_size}: saved in {figures['save']:.1f} s ({figures['state_bytes'] / 2**30:.2f} GiB), "
        f"resumed in {figures['resume']:.1f} s"
    )
    if args.json:
        with atomic_open(args.json, "w") as f:
            json.dump(report, f, indent=1)


if __name__ == "__main__":
    run_script(main)
