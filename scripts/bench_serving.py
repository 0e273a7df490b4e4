"""How many does the server serve, how soon, and does its memory stay flat? Measured from outside, over HTTP.

Starts scripts/serve_openai_api.py on a free port and asks it in three rounds: one stream after the other, many streams
at a time, and many short requests while its memory is watched. The answers have a fixed length: the end token is biased
away. The clients run on the same machine and take their share of it.

    python scripts/bench_serving.py                                           # a 26M model of random weights
    python scripts/bench_serving.py --weights out/full_sft_512.pth --json out/serving.json
    python scripts/bench_serving.py --size 64x2 --requests 100 --new_tokens 32          # a quick look

Targets for 26M on two CPU cores: 16 streams ≥ 4 × the tokens per second of one, p95 of the time to the first token
≤ 2 s, memory flat over 2,000 requests.

中文：API 服务器的压测：总吞吐、首字延迟（p95）与内存是否平稳。
"""

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from model.files import atomic_open
from model.weights import load_tokenizer, save_weights
from scripts.bench_generate import make_model
from scripts.bench_train import machine
from trainer.command_line import BoolFlag, UserError, check_writable, number, run_script

START_SECONDS = 300
REQUEST_SECONDS = 600
WORDS = "The sea and the stars, the wind and the rain, a road over the hills and a house by the river. "


class Server(NamedTuple):
    """A server under test: its process, address, and the name of its model."""

    process: subprocess.Popen
    port: int
    model: str

    def resident_mib(self) -> float | None:
        """Its memory in RAM; None where there is no /proc."""
        path = Path(f"/proc/{self.process.pid}/statm")
        return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if path.exists() else None


class Stream(NamedTuple):
    """One answer: seconds to its first piece, seconds in all, tokens."""

    first: float
    seconds: float
    tokens: int


@contextlib.contextmanager
def running_server(weights: Path, flags: list[str]) -> Iterator[Server]:
    """The server as a process, ended in any case.  Raises: UserError when it does not start."""
    script = [sys.executable, str(ROOT / "scripts" / "serve_openai_api.py")]
    command = [*script, "--weights", str(weights), "--model_name", "bench", "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        deadline, lines = time.monotonic() + START_SECONDS, []
        while not lines or not lines[-1].startswith("listening on"):
            lines.append(process.stdout.readline())
            if not lines[-1] or time.monotonic() > deadline:
                raise UserError(f"the server did not start: {' '.join(command)}")
        yield Server(process, int(lines[-1].split("/v1")[0].rpartition(":")[2]), "bench")
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def one_stream(server: Server, prompt: str, new_tokens: int, end: list[int]) -> Stream:
    """Asks for one answer of `new_tokens` tokens and reads it as it comes.  Raises: UserError."""
    body = {
        "model": server.model, "prompt": prompt, "max_tokens": new_tokens, "stream": True,
        "stream_options": {"include_usage": True}, "logit_bias": {str(token): -100 for token in end},
    }  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=REQUEST_SECONDS)
    start, first, tokens = time.perf_counter(), 0.0, 0
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise UserError(f"the server answered {reply.status}: {reply.read(300).decode()}")
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise UserError(f"the server failed: {event['error']['message']}")
            if event["choices"] and event["choices"][0]["text"] and not first:
                first = time.perf_counter() - start
            tokens = event["usage"]["completion_tokens"] if event["usage"] else tokens
    finally:
        connection.close()
    seconds = time.perf_counter() - start
    return Stream(first or seconds, seconds, tokens)


def measure_streams(server: Server, prompts: list[str], at_a_time: int, new_tokens: int, end: list[int]) -> dict:
    """A round of streams, so many at a time."""
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
        streams = list(pool.map(lambda prompt: one_stream(server, prompt, new_tokens, end), prompts))
    seconds = time.perf_counter() - start
    firsts = sorted(stream.first for stream in streams)
    return {
        "streams": at_a_time,
        "requests": len(streams),
        "tokens": sum(stream.tokens for stream in streams),
        "tokens_per_second": sum(stream.tokens for stream in streams) / seconds,
        "first_token_p50_seconds": statistics.median(firsts),
        "first_token_p95_seconds": firsts[min(int(0.95 * len(firsts)), len(firsts) - 1)],
        "seconds": seconds,
    }


def measure_memory(server: Server, requests: int, prompts: list[str], end: list[int]) -> dict:
    """Memory after each tenth of many short requests, 16 at a time, of 1 to 16 tokens."""
    rounds, start, samples = max(requests // 10, 1), time.perf_counter(), [server.resident_mib()]
    for done in range(0, requests, rounds):
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            jobs = range(done, min(done + rounds, requests))
            list(pool.map(lambda i: one_stream(server, prompts[i % len(prompts)], 1 + i % 16, end), jobs))
        samples.append(server.resident_mib())
    known = None not in samples
    return {
        "requests": requests,
        "requests_per_second": requests / (time.perf_counter() - start),
        "resident_mib": samples,
        # After the first tenth: by then every buffer has been needed once.
        "growth_mib": samples[-1] - samples[1] if known else None,
    }


def make_prompts(count: int, tokens: int) -> list[str]:
    """Different texts of about so many tokens."""
    tokenizer = load_tokenizer()
    ids = tokenizer.encode(WORDS * (tokens // 10 + 2), add_special_tokens=False)
    return [f"{i} {tokenizer.decode(ids[i % 20 : i % 20 + tokens])}" for i in range(count)]


def table(rows: list[dict], memory: dict) -> str:
    """The results as Markdown."""
    alone = rows[0]["tokens_per_second"]
    lines = ["| streams | requests | tokens/s | × one | first token p50 | p95 |", "|---|---|---|---|---|---|"]
    for r in rows:
        speed = r["tokens_per_second"]
        lines.append(
            f"| {r['streams']} | {r['requests']} | {speed:,.0f} | {speed / alone:.2f} "
            f"| {r['first_token_p50_seconds']:.3f} s | {r['first_token_p95_seconds']:.3f} s |"
        )
    if memory["growth_mib"] is not None:
        first, last = memory["resident_mib"][1], memory["resident_mib"][-1]
        grown = f"{first:,.0f} MiB after a tenth, {last:,.0f} MiB at the end ({memory['growth_mib']:+.1f})"
        lines += ["", f"{memory['requests']} requests, {memory['requests_per_second']:.1f} per second: memory {grown}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the API server. Defaults stand in brackets.")
    add, natural = parser.add_argument, number(int, 1)
    add("--weights", type=Path, help="a .pth file or a transformers folder (random weights of --size)")
    add("--size", default="512x8", help="HIDDENxLAYERS of a model of random weights (512x8, 26M)")
    add("--streams", type=natural, nargs="+", default=[16], help="streams at a time, beside one (16)")
    add("--rounds", type=natural, default=2, help="requests per stream; one stream alone makes four as many (2)")
    add("--prompt_tokens", type=natural, default=64, help="tokens per prompt, about (64)")
    add("--new_tokens", type=natural, default=128, help="tokens per answer (128)")
    add("--requests", type=natural, default=2000, help="short requests while memory is watched (2000)")
    add("--slots", type=natural, default=16, help="answers the server writes at a time (16)")
    add("--compile", action=BoolFlag, default=False, help="let the server compile its step (off)")
    add("--device", help="cpu, cuda or mps; default the best there is")
    add("--json", type=Path, help="write the figures here, for example scripts/bench/results/serving.json")
    args = parser.parse_args()
    if args.json:
        check_writable(args.json.parent, "--json")
    flags = ["--slots", str(args.slots), "--max_queue", str(max(args.streams) + 16)]
    flags += ["--compile"] if args.compile else []
    flags += ["--device", args.device] if args.device else []
    with tempfile.TemporaryDirectory() as folder:
        weights = args.weights
        if weights is None:
            weights = Path(folder) / "random.pth"
            save_weights(make_model(args.size, torch.float32, torch.device("cpu")), weights)
        end = sorted({0, load_tokenizer().eos_token_id}) if not (args.weights and args.weights.is_dir()) else []
        prompts = make_prompts(max(args.streams) * args.rounds, args.prompt_tokens)
        with running_server(weights, flags) as server:
            one_stream(server, prompts[0], 4, end)
            rows = [measure_streams(server, prompts[: 4 * args.rounds], 1, args.new_tokens, end)]
            for streams in args.streams:
                rows.append(measure_streams(server, prompts[: streams * args.rounds], streams, args.new_tokens, end))
            memory = measure_memory(server, args.requests, prompts, end)
    print(table(rows, memory))
    if args.json:
        about = {"machine": machine(args.device), "command": " ".join(sys.argv[1:])}
        with atomic_open(args.json, "w") as f:
            json.dump(about | {"rows": rows, "memory": memory}, f, indent=2)


if __name__ == "__main__":
    run_script(main)
