"""How fast does training run here? Tokens per second, MFU and peak memory for given sizes and settings.

Each row of the table is measured in a process of its own, on full rows of random tokens, with the model, the loss, the
optimiser and the compilation of trainer/train_pretrain.py. The first updates (compilation, allocation) do not count.

    python scripts/bench_train.py                                          # 26M on the best device
    python scripts/bench_train.py --sizes 256x4 512x8 --dtypes bfloat16 float32 --compile 1 0 --batch_sizes 8 32
    python scripts/bench_train.py --sizes 640x8moe --seq_lens 512 2048 --json scripts/bench/results/train.json
"""

import argparse
import itertools
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from model.files import atomic_open
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer import memory, run_log
from trainer import trainer_utils as utils
from trainer.command_line import UserError, run_script
from trainer.optimizer import OPTIMIZERS, make_optimizer
from trainer.train_pretrain import summed_nll


def read_size(text: str) -> MiniMindConfig:
    """The configuration of `512x8`, `640x8moe`, or `640x8wide`: dense, with the weights that a token meets in the MoE.

    Raises: UserError when it is written otherwise.
    """
    found = re.fullmatch(r"(\d+)x(\d+)(moe|wide)?", text)
    if not found:
        raise UserError(f"size {text!r}; expected HIDDENxLAYERS, for example 512x8, 640x8moe or 640x8wide.")
    sizes = {"hidden_size": int(found[1]), "num_hidden_layers": int(found[2])}
    config = MiniMindConfig(**sizes, use_moe=found[3] == "moe")
    if found[3] == "wide":
        met = config.num_experts_per_tok + config.n_shared_experts
        config = MiniMindConfig(**sizes, intermediate_size=met * config.intermediate_size)
    return config


def measure(case: dict) -> dict:
    """Times `updates` updates of one setting in this process.

    Returns: real tokens per second, seconds per update, MFU (None on unknown devices), peak memory in GiB.
    """
    run = utils.Run(case["device"], case["dtype"], seed=0)
    config = read_size(case["size"])
    raw_model = MiniMindForCausalLM(config).to(run.device).train()
    optimizer = make_optimizer(raw_model, 0.1, run.device, case["optimizer"], run.dtype)
    args = argparse.Namespace(
        compile=case["compile"], deepspeed=None, checkpoint_activations=False, max_memory=None,
        batch_size=case["batch_size"], accumulation_steps=1, max_seq_len=case["seq_len"],
    )  # fmt: skip
    planned = memory.Plan(raw_model, optimizer, run, args, memory.held_now(run.device))
    planned = planned.need(case["batch_size"], more_micros=False, checkpointed=False)
    model, nll = utils.compile_and_wrap(raw_model, optimizer, summed_nll, run, args)
    shape = (case["batch_size"], case["seq_len"])
    input_ids = torch.randint(3, config.vocab_size, shape, device=run.device)
    # Two documents a row, so that the attention mask of packed rows is paid for.
    position_ids = torch.arange(shape[1], device=run.device).remainder(-(-shape[1] // 2)).expand(shape).contiguous()
    documents = (position_ids == 0).long().cumsum(-1) - 1

    def update() -> None:
        with run.autocast():
            out = model(input_ids, position_ids=position_ids, documents=documents, need_logits=False)
            nats = nll(out.hidden_states, raw_model.lm_head.weight, {"labels": input_ids})
            loss = nats / input_ids.numel() + out.aux_loss
        run.scaler.scale(loss).backward()
        run.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if run.device.type == "cuda":
            torch.cuda.synchronize()

    started = time.perf_counter()
    for _ in range(case["warmup"]):
        update()
    warm = time.perf_counter() - started
    seconds = []
    for _ in range(case["updates"]):
        started = time.perf_counter()
        update()
        seconds.append(time.perf_counter() - started)
    per_update = sorted(seconds)[len(seconds) // 2]
    rate = input_ids.numel() / per_update
    peak = run_log.peak_flops(run.device)
    return {
        **case,
        "dtype": str(run.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in raw_model.parameters()),
        "tokens_per_second": rate,
        "seconds_per_update": per_update,
        "first_updates_seconds": warm,
        "mfu": rate * run_log.flops_per_token(raw_model, shape[1]) / peak if peak else None,
        "memory_gib": run_log.peak_memory_gib(run.device),
        "planned_gib": planned.total / memory.GIB,
        "planned": str(planned),
    }


def machine(device: str | None = None) -> dict:
    """What was measured on; enough to read the figures, nothing that names the owner."""
    kind = utils.find_device(device)
    cuda = kind.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(kind) if cuda else f"{kind.type} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def table(rows: list[dict]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| size | parameters | dtype | compile | batch × length | tokens/s | ms/update | MFU | GiB at peak | planned |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        mfu = f"{r['mfu']:.1%}" if r["mfu"] is not None else "–"
        peak = f"{r['memory_gib']:.2f}" if r["memory_gib"] is not None else "–"
        lines.append(
            f"| {r['size']} | {r['parameters'] / 1e6:.1f}M | {r['dtype']} | {'on' if r['compile'] else 'off'} "
            f"| {r['batch_size']} × {r['seq_len']} | {r['tokens_per_second']:,.0f} "
            f"| {r['seconds_per_update'] * 1000:,.0f} | {mfu} | {peak} | {r['planned_gib']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure training speed.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["512x8"], help="HIDDENxLAYERS, with moe or wide behind it")
    parser.add_argument("--dtypes", nargs="+", default=["auto"], choices=["auto", *utils.DTYPES])
    compiler = int(sys.platform != "win32")  # a Windows machine has none as a rule
    parser.add_argument("--compile", nargs="+", type=int, default=[compiler], choices=[0, 1], help="1 on, 0 off")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[32], help="rows per update")
    parser.add_argument("--seq_lens", nargs="+", type=int, default=[512], help="tokens per row")
    parser.add_argument("--optimizer", default="muon", choices=OPTIMIZERS, help="as in the trainers")
    parser.add_argument("--updates", type=int, default=5, help="updates timed; the median counts")
    parser.add_argument("--warmup", type=int, default=2, help="updates before them")
    parser.add_argument("--device", help="cuda, mps or cpu; default the best there is")
    parser.add_argument("--json", help="write the figures here, for example scripts/bench/results/train.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one setting as JSON: how this script calls itself
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(json.loads(args.case))))
        return

    rows = []
    settings = itertools.product(args.sizes, args.dtypes, args.compile, args.batch_sizes, args.seq_lens)
    for size, dtype, compiled, batch_size, seq_len in settings:
        case = {
            "size": size,
            "dtype": dtype,
            "compile": bool(compiled),
            "batch_size": batch_size,
            "seq_len": seq_len,
            "device": args.device,
            "optimizer": args.optimizer,
            "updates": args.updates,
            "warmup": args.warmup,
        }
        # A process each: peak memory is a mark that never falls, and one setting out of memory does not end the rest.
        command = [sys.executable, __file__, "--case", json.dumps(case)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"{size} {dtype} batch {batch_size} × {seq_len}: failed ({last})", file=sys.stderr)
            continue
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    if not rows:
        raise UserError("no setting could be measured; see the lines above")
    print("\n" + table(rows))
    if args.json:
        with atomic_open(Path(args.json), "w") as f:
            json.dump({"machine": machine(args.device), "command": " ".join(sys.argv[1:]), "rows": rows}, f, indent=2)


if __name__ == "__main__":
    run_script(main)
