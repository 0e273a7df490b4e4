"""Downloads the published data files and weights of the MiniMind family from Hugging Face or ModelScope.

    python scripts/get_data.py                                             # lists the names
    python scripts/get_data.py pretrain_hq.jsonl sft_mini_512.jsonl        # into dataset/, where the trainers look
    python scripts/get_data.py MiniMind2-Small --source modelscope         # a folder: config, tokenizer, weights
    python scripts/get_data.py full_sft_512.pth                            # into out/
    python scripts/get_data.py pretrain_t2t_mini.jsonl --mirror https://hf-mirror.com
    python scripts/get_data.py --repo OWNER/NAME train.parquet --to data   # any other repository of data

What was interrupted goes on where it stopped. A file gets its name when it is whole and its checksum is the one that
the hub (or `--sha256`) says. Nothing that is downloaded is executed; code in a repository is left out.

中文：从 Hugging Face 或 ModelScope 下载已发布的数据与权重；断点续传，核对校验和，可设镜像。
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.fetching import catalogue, hubs, transfer
from scripts.fetching.catalogue import WANTED, Wish
from trainer.command_line import BoolFlag, UserError, check_writable, run_script


def wishes(args: argparse.Namespace, source: str) -> list[Wish]:
    """What the names on the command line mean at this hub.  Raises: UserError for a name that nothing has."""
    if args.repo:
        folder = args.to or (ROOT / "dataset" if args.kind == "dataset" else ROOT / args.repo.split("/")[-1])
        return [Wish(args.repo, args.kind, name, folder) for name in args.names or [None]]
    found = {name: catalogue.find(name, source) for name in args.names}
    if unknown := [name for name, wish in found.items() if wish is None]:
        known = ", ".join([*catalogue.DATA, *catalogue.FOLDERS])
        raise UserError(f"nothing is published as {unknown[0]}; expected {known} or STAGE_512.pth (or a --repo).")
    return [Wish(w.repo, w.kind, w.path, args.to or w.folder) for w in found.values()]


def choose(wish: Wish, there: list[hubs.RemoteFile]) -> list[hubs.RemoteFile]:
    """The files of the repository that the wish is about.  Raises: UserError when it is not there, with what is."""
    if wish.path is None:
        found = [f for f in there if PurePosixPath(f.path).suffix.lower() in WANTED]
        if left := sorted({f.path for f in there} - {f.path for f in found}):
            print(f"left out of {wish.repo}: {', '.join(left[:6])}{' …' if len(left) > 6 else ''}")
    else:
        found = [f for f in there if f.path == wish.path]
    if not found:
        names = sorted(f.path for f in there if PurePosixPath(f.path).suffix.lower() in WANTED)
        lies = f"{', '.join(names[:20])}{' …' if len(names) > 20 else ''}" if names else "nothing of use"
        raise UserError(
            f"{wish.repo} holds no {wish.path or 'data or weights'}; it holds {lies}. Older files may be in an earlier "
            "--revision."
        )
    return found


def download(args: argparse.Namespace, source: str) -> None:
    """Everything that was asked for, from one hub.  Raises: NoAnswer, UserError, OSError."""
    hub, listed, jobs = hubs.HUBS[source](args.mirror, args.revision), {}, []
    for wish in wishes(args, source):
        if wish.repo not in listed:
            listed[wish.repo] = hub.files(wish.repo, wish.kind)
        for file in choose(wish, listed[wish.repo]):
            if args.sha256:
                file = hubs.RemoteFile(file.path, file.size, f"sha256:{args.sha256.lower()}")
            jobs.append((wish, file, transfer.place(wish.folder, file.path)))
    if args.sha256 and len(jobs) != 1:
        raise UserError(f"--sha256 is the checksum of one file, {len(jobs)} were asked for.")
    missing = []
    for wish, file, target in jobs:
        if transfer.is_whole(target, file):
            print(f"{target} is there already" + (", its checksum is right" if file.checksum else ""))
        elif target.exists() and not args.overwrite:
            raise UserError(f"{target} exists and is another file; --overwrite replaces it, --to names another folder.")
        else:
            missing.append((wish, file, target))
    for folder in sorted({wish.folder for wish, _, _ in missing}):
        check_writable(folder, "--to")
        transfer.check_room(folder, [(file, target) for wish, file, target in missing if wish.folder == folder])
    for wish, file, target in missing:
        print(f"{file.path}, {file.size / 1e6:,.1f} MB, from {hub.endpoint}", flush=True)
        transfer.fetch(hub, wish.repo, wish.kind, file, target)
        print(f"{target} is ready, its {'checksum' if file.checksum else 'size (no checksum is known)'} is right")
    if not args.repo and missing:
        print(f"Licence and origin stand on the card of each repository: {', '.join(sorted(listed))}.")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Download published data and weights. Without a name: list them. Defaults stand in brackets.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="for example pretrain_hq.jsonl, MiniMind2, full_sft_512.pth")
    add("--source", choices=["auto", *hubs.HUBS], default="auto", help="which hub (auto: the first that answers)")
    mirrors = " or ".join(hub.setting for hub in hubs.HUBS.values())
    add("--mirror", metavar="URL", help=f"another address of the hub, for example https://hf-mirror.com ({mirrors})")
    add("--to", type=Path, metavar="FOLDER", help="where to (dataset/, out/ for .pth files, ./NAME for folders)")
    add("--sha256", metavar="HEX", help="the checksum that the one file must have (what the hub says)")
    add("--revision", help="a branch, tag or commit (main; master at ModelScope)")
    add("--repo", metavar="OWNER/NAME", help="another repository; names are its files then (all that are data)")
    add("--kind", choices=["dataset", "model"], default="dataset", help="what --repo is (dataset)")
    add("--overwrite", action=BoolFlag, default=False, help="replace a file of the same name that differs (off)")
    args = parser.parse_args(argv)
    if args.sha256 and not re.fullmatch("[0-9a-fA-F]{64}", args.sha256):
        parser.error("--sha256 takes 64 hexadecimal digits")
    if args.repo and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo):
        parser.error(f"--repo takes OWNER/NAME, got {args.repo!r}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if not (args.names or args.repo):
        print(catalogue.listing())
        return
    if args.source != "auto" or args.mirror or os.environ.get("HF_ENDPOINT"):  # a mirror is one of Hugging Face
        return download(args, "huggingface" if args.source == "auto" else args.source)
    try:
        download(args, "huggingface")
    except hubs.NoAnswer as first:
        print(f"{hubs.HuggingFace.home} gives no answer, trying {hubs.ModelScope.home}", flush=True)
        try:
            download(args, "modelscope")
        except hubs.NoAnswer:
            raise first from None  # its advice holds for both


if __name__ == "__main__":
    run_script(main)
