"""How fast does a model write here? Tokens per second of transformers' `generate` and of the decoder, side by side.

All methods continue the same random prompts with the same model, greedily and without a stop token. They take turns
and the median turn counts, so that a machine that slows down slows all of them. The weights are random, rounded to
float16 as saved weights are. Prefill counts; compilation and the first turn do not.

    python scripts/bench_generate.py                                        # 26M on the best device
    python scripts/bench_generate.py --dtypes float32 bfloat16 --batch_sizes 1 32 256 --json out/generate.json
    python scripts/bench_generate.py --gguf model-f16.gguf                  # and llama.cpp, if llama_cpp is installed
"""

import argparse
import importlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from model.files import atomic_open
from model.generation import Decoder, Sampling
from model.model_minimind import MiniMindForCausalLM
from scripts.bench_train import machine, read_size
from trainer import trainer_utils as utils
from trainer.command_line import UserError, check_writable, run_script

COMPILE = [0] if sys.platform == "win32" else [0, 1]  # the compiler wants more than a Windows machine has as a rule


def make_model(size: str, dtype: torch.dtype, device: torch.device) -> MiniMindForCausalLM:
    """A model of random weights for a size like 512x8 or 640x8moe.  Raises: UserError."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(read_size(size)).half().to(device, dtype).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.model.norm.weight.mul_(8)  # as sure of the next token as a trained model: the cuts of top-p depend on it
    return model


def by_generate(model: MiniMindForCausalLM, prompts: torch.Tensor, new_tokens: int) -> Callable[[], None]:
    """A turn of transformers' `generate`.  Args: prompts (B, T)."""
    prompts = prompts.to(model.device)
    mask = torch.ones_like(prompts)

    def turn() -> None:
        out = model.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)
        assert out.shape[1] == prompts.shape[1] + new_tokens

    return turn


def by_decoder(
    model: MiniMindForCausalLM, prompts: torch.Tensor, new_tokens: int, compile: bool, sampling: Sampling
) -> Callable[[], None]:
    """A turn of the decoder.  Args: prompts (B, T)."""
    decoder = Decoder(model, len(prompts), prompts.shape[1] + new_tokens, compile=compile)
    rows = prompts.tolist()

    def turn() -> None:
        requests = decoder.generate(rows, sampling)
        assert all(len(request.tokens) == new_tokens for request in requests)

    return turn


def by_llama_cpp(path: str, prompts: torch.Tensor, new_tokens: int) -> Callable[[], None]:
    """A turn of llama.cpp on one prompt, with as many threads as torch.  Raises: UserError."""
    if not Path(path).is_file():
        raise UserError(f"--gguf {path} does not exist; give a GGUF file of the same size of model.")
    try:
        llama_cpp = importlib.import_module("llama_cpp")  # no requirement of the project
    except ImportError as error:
        raise UserError("--gguf needs the package llama-cpp-python: pip install llama-cpp-python") from error
    llama = llama_cpp.Llama(path, n_ctx=prompts.shape[1] + new_tokens, n_threads=torch.get_num_threads(), verbose=False)
    (row,) = prompts.tolist()

    def turn() -> None:
        llama.reset()
        for n, _ in enumerate(llama.generate(row, temp=0.0), start=1):
            if n == new_tokens:
                break

    return turn


def measure(case: dict, repeats: int, compile: list[int], gguf: str | None) -> list[dict]:
    """One row per method: the setting, tokens per second (median), its quartiles, and how many times `generate`'s."""
    device = utils.find_device(case["device"])
    model = make_model(case["size"], utils.DTYPES[case["dtype"]], device)
    shape, new_tokens = (case["batch_size"], case["prompt_tokens"]), case["new_tokens"]
    prompts = torch.randint(3, model.config.vocab_size, shape)
    greedy = Sampling(temperature=0, max_new_tokens=new_tokens)
    turns = {"generate": by_generate(model, prompts, new_tokens)}
    for on in compile:
        turns["decoder, compiled" if on else "decoder"] = by_decoder(model, prompts, new_tokens, bool(on), greedy)
    nucleus = Sampling(temperature=0.85, top_p=0.85, seed=0, max_new_tokens=new_tokens)
    last = bool(compile[-1])
    turns["the same, top-p 0.85"] = by_decoder(model, prompts, new_tokens, last, nucleus)
    if gguf and case["batch_size"] == 1:
        turns["llama.cpp"] = by_llama_cpp(gguf, prompts, new_tokens)

    for turn in turns.values():  # compiles and allocates
        turn()
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(repeats):
        for name, turn in turns.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            turn()  # ends with tokens on the CPU, that is, with a synchronisation
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            **case,
            "method": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens_per_second": case["batch_size"] * new_tokens / middle[name],
            "times_generate": middle["generate"] / middle[name],
            "seconds": seconds[name],
        }
        for name in turns
    ]


def table(rows: list[dict]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| size | parameters | dtype | batch | prompt + new | method | tokens/s | × generate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['size']} | {r['parameters'] / 1e6:.1f}M | {r['dtype']} | {r['batch_size']} "
            f"| {r['prompt_tokens']} + {r['new_tokens']} | {r['method']} | {r['tokens_per_second']:,.0f} "
            f"| {r['times_generate']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure generation speed.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["512x8"], help="HIDDENxLAYERS, with moe behind for experts")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=utils.DTYPES, help="of the weights")
    parser.add_argument("--compile", nargs="+", type=int, default=COMPILE, choices=[0, 1], help="1 on, 0 off")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 32], help="texts at a time")
    parser.add_argument("--prompt_tokens", type=int, default=32, help="tokens per prompt")
    parser.add_argument("--new_tokens", type=int, default=128, help="tokens per answer")
    parser.add_argument("--repeats", type=int, default=5, help="turns timed; the median counts")
    parser.add_argument("--device", help="cuda, mps or cpu; default the best there is")
    parser.add_argument("--gguf", help="also time llama.cpp on this file, one text at a time")
    parser.add_argument("--json", help="write the figures here, for example scripts/bench/results/generate.json")
    args = parser.parse_args()
    for name in ("prompt_tokens", "new_tokens", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} is impossible: expected 1 or more.")
    if args.json:
        check_writable(Path(args.json).parent, "--json")

    rows = []
    for size, dtype, batch_size in itertools.product(args.sizes, args.dtypes, args.batch_sizes):
        case = {
            "size": size,
            "dtype": dtype,
            "batch_size": batch_size,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "device": args.device,
        }
        new = measure(case, args.repeats, args.compile, args.gguf)
        print("\n".join(table(new).splitlines()[2:]), flush=True)
        rows += new
    print("\n" + table(rows))
    if args.json:
        with atomic_open(Path(args.json), "w") as f:
            json.dump({"machine": machine(args.device), "command": " ".join(sys.argv[1:]), "rows": rows}, f, indent=2)


if __name__ == "__main__":
    run_script(main)
