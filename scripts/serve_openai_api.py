"""Serve a trained model to many at once as OpenAI's API: for Open WebUI, FastGPT, Dify, IDE plug-ins, `openai`.

    python scripts/serve_openai_api.py                                       # newest weights in out/, this machine only
    python scripts/serve_openai_api.py --model_mode 3 --max_seq_len 4096     # 0 pretrain … 3 reason, 4 grpo
    python scripts/serve_openai_api.py --lora lora_medical --lora me=out/lora/lora_identity_512.pth   # as model names
    MINIMIND_API_KEY=secret python scripts/serve_openai_api.py --host 0.0.0.0                         # for a network
    curl http://127.0.0.1:8998/v1/chat/completions -H 'Content-Type: application/json' \
        -d '{"model": "full_sft_512", "messages": [{"role": "user", "content": "Who are you?"}]}'

Endpoints: /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models, /health, /metrics. /v1/models lists the
names to ask for: the checkpoint's, and one per --lora.

Reading order: this file (flags, loading) → serving/app.py (HTTP) → fields.py, protocol.py (what a request may say) →
prompts.py (its tokens) → engine.py (the thread that runs the decoder) → text_stream.py (tokens to reasoning, content
and tool calls) → json_guide.py (JSON objects only) → waiting.py, replies.py (the way back) → models.py (adapters, other
families) → http_server.py, metrics.py.

中文：OpenAI 兼容的 API 服务器：连续批处理、流式输出、思考与工具调用、LoRA 按模型名切换。
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from transformers.utils import logging as transformers_logging

from eval_model import add_weight_flags, find_model, load_all
from trainer.command_line import BoolFlag, UserError, number, run_script
from trainer.trainer_utils import find_device

KEY_VARIABLE = "MINIMIND_API_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Serve a model in the form of OpenAI's API. Defaults stand in brackets.", allow_abbrev=False
    )
    natural, seconds = number(int, 1), number(float, 0, excluded=True)

    add = add_weight_flags(parser)
    add("--model_name", metavar="NAME", help="what clients call the model (the name of its file or folder)")
    add("--lora", action="append", default=[], metavar="NAME[=PATH]",
        help="an adapter as a model NAME; alone: OUT_DIR/lora/NAME_512.pth; may be given several times")  # fmt: skip
    add("--compile", action=BoolFlag, default=False, help="start a minute later, then write faster (off)")

    add = parser.add_argument_group("how many at once").add_argument
    add("--slots", type=natural, default=16, help="answers written at a time, per model (16)")
    add("--max_seq_len", type=number(int, 8), help="prompt and answer together in tokens (2048, or what the model has)")
    add("--prefill_tokens", type=natural, default=256, help="prompt tokens taken in between two steps (256)")
    add("--max_queue", type=number(int, 0), default=64, help="answers per model that may wait; beyond: 429 (64)")
    add("--timeout", type=seconds, default=300.0, help="seconds that one request may take (300)")
    add("--max_body_kib", type=natural, default=1024, help="largest request in KiB (1024)")
    add("--max_connections", type=number(int, 8), default=1000, help="open connections (1000)")
    add("--receive_timeout", type=seconds, default=30.0, help="seconds in which a request has to arrive (30)")

    add = parser.add_argument_group("what a request that does not say gets").add_argument
    add("--temperature", type=number(float, 0, most=2), default=0.85, help="0: always the likeliest token (0.85)")
    add("--top_p", type=number(float, 0, most=1), default=0.85, help="draw from the likeliest up to this share (0.85)")
    add("--max_new_tokens", type=natural, default=1024, help="longest answer in tokens (1024)")

    add = parser.add_argument_group("who may call").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: every network (127.0.0.1)")
    add("--port", type=number(int, 0, most=65535), default=8998, help="0: any free one (8998)")
    add("--api_key", action="append", default=[], metavar="KEY",
        help=f"callers have to send one of these; better in the environment, {KEY_VARIABLE} (none)")  # fmt: skip
    add("--cors", action="append", default=[], metavar="ORIGIN",
        help="a website that may call from a browser, for example http://localhost:3000, or * (none)")  # fmt: skip
    parser.set_defaults(lora_name=None)
    return parser.parse_args(argv)


def load(args: argparse.Namespace):
    """The models to serve.  Raises: WeightsError, UserError."""
    from scripts.serving.models import cache_bytes, parse_lora, serve_models

    path, _ = find_model(args)
    device = find_device(args.device)
    model, tokenizer = load_all(args, path, device)
    name = args.model_name or (path.resolve().name if path.is_dir() else path.stem)
    loras = dict(parse_lora(text, args.out_dir, model) for text in args.lora)
    if len(loras) < len(args.lora):
        raise UserError(f"--lora names must differ, got {', '.join(args.lora)}; name them with --lora NAME=PATH.")
    limit = getattr(model.config, "max_position_embeddings", None) or 2048
    served = serve_models(
        model, tokenizer, name, loras, slots=args.slots, max_seq_len=args.max_seq_len or min(2048, limit),
        prefill_tokens=args.prefill_tokens, compile=args.compile,
    )  # fmt: skip
    facts = [
        ", ".join(served.decoders),
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters",
        f"{device} {str(model.dtype).removeprefix('torch.')}",
        f"{args.slots} slots × {served.max_seq_len} tokens",
    ]
    if served.ours:
        size = cache_bytes(model, args.slots, served.max_seq_len) * len(served.decoders)
        facts.append(f"cache {size / 2**20:,.0f} MiB")
    print(" · ".join(facts), flush=True)
    return served


def main(argv: Sequence[str] | None = None) -> None:
    """Loads, listens and serves until Ctrl-C or SIGTERM."""
    args = parse_args(argv)
    try:
        from scripts.serving.app import ServerSettings, Serving, make_app
        from scripts.serving.http_server import listen, make_server, raise_file_limit
    except ImportError as error:
        raise UserError(f"The server needs fastapi and uvicorn ({error}): pip install fastapi uvicorn") from error
    from scripts.serving.protocol import Defaults

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    transformers_logging.disable_progress_bar()
    keys = [key.strip() for key in (*args.api_key, os.environ.get(KEY_VARIABLE, ""))]  # a file's key ends in a newline
    if "" in keys[:-1]:
        raise UserError("--api_key is empty; give a key, or leave it out.")
    keys = [key for key in keys if key]
    sock = listen(args.host, args.port)  # before minutes of loading
    settings = ServerSettings(
        api_keys=tuple(keys), local=args.host in LOOPBACK, origins=tuple(args.cors), max_body=args.max_body_kib << 10,
        max_queue=args.max_queue, timeout=args.timeout,
        defaults=Defaults(args.temperature, args.top_p, args.max_new_tokens, min(16, args.slots + args.max_queue)),
    )  # fmt: skip
    serving = Serving(load(args), settings)
    server = make_server(
        make_app(serving),
        receive_seconds=args.receive_timeout,
        max_connections=raise_file_limit(args.max_connections),
    )
    host, port = sock.getsockname()[:2]
    if args.host not in LOOPBACK and not keys:
        print(f"note: anybody who reaches {host} may call; set {KEY_VARIABLE} to ask for a key.", file=sys.stderr)
    shown = f"[{host}]" if ":" in host else host
    sock.listen(server.config.backlog)  # from here on a connection waits instead of being refused
    print(f"listening on http://{shown}:{port}/v1 (Ctrl-C ends)", flush=True)
    server.run(sockets=[sock])


if __name__ == "__main__":
    run_script(main)
