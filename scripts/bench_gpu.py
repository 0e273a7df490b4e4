"""All figures that need a GPU, in one call of under nine minutes: speed of training and decoding, MFU, time to quality.

Runs the other measuring scripts one after another, each into a JSON file of its own, the most wanted first. A step for
which too little time is left is passed over, and one that fails does not end the rest; both are named at the end.

    python scripts/bench_gpu.py --pretrain dataset/pretrain_hq.jsonl --sft dataset/sft_512.jsonl
    python scripts/bench_gpu.py --only train scaling --limit 300
    python scripts/bench_gpu.py --small --device cpu --out_dir /tmp/gpu     # the same steps on tiny models, as a trial

中文：一次调用（九分钟以内）测量所有需要 GPU 的数字，每一步写一个 JSON 文件。
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainer.command_line import BoolFlag, UserError, check_writable, number, run_script


@dataclass(frozen=True)
class Step:
    """One measurement: how long it takes at most as a rule, what is run, and what it reads."""

    seconds: int
    command: str
    data: str | None = None  # flag that names the file


SIZES = "512x8 768x16"
STEPS = {
    # MFU and memory of both sizes; what compiling and each precision bring
    "train": Step(100, f"bench_train.py --sizes {SIZES} --dtypes bfloat16 --compile 1 0"),
    # Time to quality: the reference gets five times the seconds of the others; 8 rows are what `fitted_rows` gives for
    # 2 to 8 million tokens
    "recipe": Step(130, "bench_recipe.py {data} --hidden_size 512 --num_hidden_layers 8 --recipes reference ours "
                        "--seconds 15 --reference_seconds 75 --our_rows 8", "pretrain"),
    "moe": Step(50, "bench_train.py --sizes 640x8moe 640x8wide --dtypes bfloat16"),
    "generate": Step(90, "bench_generate.py --dtypes bfloat16 --compile 0 --batch_sizes 1 32 256 --repeats 3"),
    "precision": Step(50, "bench_train.py --sizes 512x8 --dtypes float16 float32"),
    "scaling": Step(120, "bench_train.py --sizes 256x4 1024x12 1536x20 2048x20 --dtypes bfloat16 --batch_sizes 8"),
    "length": Step(60, "bench_train.py --sizes 512x8 --dtypes bfloat16 --batch_sizes 4 --seq_lens 2048 8192"),
    "sft": Step(60, "bench_recipe.py {data} --stage full_sft --hidden_size 512 --num_hidden_layers 8 "
                    "--recipes reference ours --seconds 10 --reference_seconds 30 --our_rows 8", "sft"),
}  # fmt: skip
# For --small: what is put in the place of sizes, lengths and times
TINY = {
    "512x8": "64x1", "768x16": "64x2", "640x8moe": "64x1moe", "640x8wide": "64x1wide", "256x4": "32x1",
    "1024x12": "32x2", "1536x20": "32x3", "2048x20": "32x4", "bfloat16": "float32", "float16": "float32",
    "--hidden_size 512 --num_hidden_layers 8": "--hidden_size 32 --num_hidden_layers 1 --max_seq_len 64",
    "--seconds 15 --reference_seconds 75": "--seconds 1", "--seconds 10 --reference_seconds 30": "--seconds 1",
    "--seq_lens 2048 8192": "--seq_lens 32 64", "--batch_sizes 1 32 256": "--batch_sizes 1 2 --new_tokens 4",
}  # fmt: skip


def arguments_of(name: str, args: argparse.Namespace) -> list[str]:
    """The command of a step, to be run with this Python."""
    step = STEPS[name]
    text = step.command
    if args.small:
        for large, tiny in TINY.items():
            text = text.replace(large, tiny)
    words = [str(getattr(args, step.data)) if word == "{data}" else word for word in text.split()]
    words += ["--json", str(args.out_dir / f"gpu_{name}.json")]
    if args.device:
        words += ["--device", args.device]
    if args.small and words[0] == "bench_train.py":
        words += ["--compile", "0", "--updates", "1", "--warmup", "1"]
        words += [] if "--seq_lens" in words else ["--seq_lens", "32"]
        words += [] if "--batch_sizes" in words else ["--batch_sizes", "2"]
    return [sys.executable, str(ROOT / "scripts" / words[0]), *words[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure all that needs a GPU.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pretrain", type=Path, help="JSON Lines file of texts, for the recipe step")
    parser.add_argument("--sft", type=Path, help="JSON Lines file of conversations, for the sft step")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="steps to run, in this order")
    parser.add_argument("--limit", type=number(float, 0, excluded=True), default=520.0, help="seconds in all")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "scripts/bench/results", help="where the JSON files go")
    parser.add_argument("--device", help="cuda or cpu; default the best there is")
    parser.add_argument("--small", action=BoolFlag, default=False, help="tiny models, to try the steps on a CPU")
    args = parser.parse_args()
    for name in ("pretrain", "sft"):
        path = getattr(args, name)
        if path and not path.is_file():
            raise UserError(f"--{name} {path} does not exist; give a JSON Lines file, or leave the flag out.")
    check_writable(args.out_dir, "--out_dir")

    started, missed = time.perf_counter(), []
    for name in args.only:
        step, left = STEPS[name], args.limit - (time.perf_counter() - started)
        if step.data and not getattr(args, step.data):
            missed.append(f"{name}: needs --{step.data}")
            continue
        if left < (5 if args.small else step.seconds):
            missed.append(f"{name}: takes about {step.seconds} s, {left:.0f} s were left")
            continue
        print(f"\n── {name} ({args.limit - left:.0f} s so far)", flush=True)
        try:
            status = subprocess.run(arguments_of(name, args), timeout=left).returncode
            if status:
                missed.append(f"{name}: ended with status {status}; see the lines above")
        except subprocess.TimeoutExpired:
            missed.append(f"{name}: was cut off, the time was up")
    print(f"\nmeasured {len(args.only) - len(missed)} of {len(args.only)} steps into {args.out_dir}")
    if missed:
        raise UserError("not measured: " + "; ".join(missed))


if __name__ == "__main__":
    run_script(main)
