"""The command line of the web page: `streamlit run scripts/web_demo.py -- --out_dir out`.

What the page may read and whom it may ask is said here and nowhere else: a visitor chooses from lists, and no path and
no address that he sends reaches the file system or the network.

中文：网页的命令行参数：可读的文件夹与可访问的服务器只能在此指定。
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from trainer.command_line import UserError, number

ROOT = Path(__file__).resolve().parents[2]
OWN_SERVER = "http://127.0.0.1:8998/v1"  # of scripts/serve_openai_api.py
KEY_VARIABLE = "MINIMIND_API_KEY"


@dataclass(frozen=True)
class Options:
    """out_dir: weights, adapters and runs; models: further weight files or transformers folders; servers: their `/v1`
    addresses, servers_named: whether they were given; key: for these servers; max_seq_len: tokens of prompt and answer
    together."""

    out_dir: Path = ROOT / "out"
    models: tuple[Path, ...] = ()
    servers: tuple[str, ...] = (OWN_SERVER,)
    servers_named: bool = False
    key: str | None = None
    device: str | None = None
    max_seq_len: int = 2048


class Parser(argparse.ArgumentParser):
    """Raises instead of leaving: the page shows what is wrong."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. Start it as in: streamlit run scripts/web_demo.py -- --out_dir out")


def parse_options(argv: Sequence[str]) -> Options:
    """Raises: UserError on an unknown flag or a bad value."""
    parser = Parser(prog="web_demo.py", description="Chat with trained models and watch runs.", allow_abbrev=False)
    add = parser.add_argument
    add("--out_dir", type=Path, default=ROOT / "out", help="folder of weights, adapters and runs (out/ of the project)")
    add("--model", type=Path, action="append", metavar="PATH", help="one more .pth file or transformers folder")
    add("--api_url", action="append", metavar="URL", help=f"a server with the OpenAI API ({OWN_SERVER})")
    add("--device", help="cpu, cuda, cuda:1 or mps (the best there is)")
    add("--max_seq_len", type=number(int, 64), default=2048, help="prompt and answer together in tokens (2048)")
    args = parser.parse_args(argv)
    servers = tuple(args.api_url or (OWN_SERVER,))
    for url in servers:
        if not url.startswith(("http://", "https://")):
            parser.error(f"--api_url {url} is no address; expected http://…/v1")
    for path in args.model or ():
        if not path.exists():
            parser.error(f"--model {path} does not exist")
    return Options(
        args.out_dir, tuple(args.model or ()), servers, bool(args.api_url), os.environ.get(KEY_VARIABLE), args.device,
        args.max_seq_len,
    )  # fmt: skip
