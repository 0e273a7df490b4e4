"""Trains the tokenizer: a byte-level BPE for Chinese and English, with the ChatML template of the project.

The vocabulary holds, in this order, 3 control tokens, 8 tags, the 256 bytes and the merges. BPE (Sennrich et al. 2016,
https://arxiv.org/abs/1508.07909) starts from small units and keeps joining the pair that occurs most. Here

- every word counts with a weight, so that Chinese and English, books and chats get the shares of `--shares`, however
  large their files are;
- a merge never ends inside a character. Plain byte-level BPE likes pairs such as 的 + the first byte of the next
  character; those steal bytes from that character, which then falls apart. Chinese chats need 1 % fewer tokens so;
- text is counted line by line, so a newline is always a token of its own. `<|im_start|>assistant\\n` therefore has the
  same tokens with and without an answer behind it: what generation starts from is what training saw.

What comes out is an ordinary tokenizer.json: any Unicode text decodes back to itself, digits stand one by one, and the
pre-tokenizer is the form that llama.cpp knows as "smollm".

What it is made of stands in scripts/tokenizing/: corpus.py counts the words, byte_pairs.py learns the merges, files.py
holds the template and writes the two files, report.py measures.

    python scripts/train_tokenizer.py                                          # dataset/*.jsonl, or the demo data
    python scripts/train_tokenizer.py --data pretrain.jsonl sft.jsonl --out_dir out/tokenizer
    python scripts/train_tokenizer.py --data sft.jsonl --measure model         # only measure a tokenizer

中文：训练中英双语的字节级 BPE 分词器；按份额给每个词加权，合并不会截断汉字，换行总是独立的一个 token。
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tokenizers import Tokenizer

from scripts.tokenizing.byte_pairs import learn_merges
from scripts.tokenizing.corpus import (
    GROUPS,
    SHARES,
    Corpus,
    TokenizerError,
    find_data,
    read_corpus,
    read_records,
    word_weights,
)
from scripts.tokenizing.files import CONTROL_TOKENS, TAGS, build_tokenizer, load_tokenizer, save_tokenizer
from scripts.tokenizing.report import compression_report, vocabulary_report

VOCAB_SIZE = 6400


def parse_shares(value: str) -> dict[str, float]:
    """`zh_text=0.1,en_chat=0.5` → shares; groups that are not named keep their default."""
    shares = dict(SHARES)
    for item in value.split(","):
        name, _, number = item.partition("=")
        try:
            shares[name.strip()] = float(number)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{item!r} is not NAME=NUMBER, for instance zh_text=0.1") from None
    if set(shares) != set(GROUPS):
        raise argparse.ArgumentTypeError(f"the names are {', '.join(GROUPS)}; got {value!r}")
    if min(shares.values()) < 0 or max(shares.values()) <= 0:
        raise argparse.ArgumentTypeError(f"shares are numbers from 0 up, one of them above 0; got {value!r}")
    return shares


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer and report its compression.")
    add = parser.add_argument
    add("--data", nargs="+", type=Path, metavar="FILE",
        help='JSON Lines files with {"text": …} or {"conversations": […]} (default: those in dataset/, else demo data)')
    add("--out_dir", type=Path, default=ROOT / "out" / "tokenizer", help="folder for the two files (%(default)s)")
    add("--vocab_size", type=int, help=f"entries in all, control tokens and bytes included (default: {VOCAB_SIZE})")
    add("--shares", type=parse_shares, default=SHARES, metavar="NAME=NUMBER,…",
        help="weight of Chinese (zh) and English (en) text and chat, in relation to each other (default: "
        + ",".join(f"{name}={share}" for name, share in SHARES.items()) + ")")
    add("--max_mb", type=float, default=24, help="sample a group down to this many MB, 0 for no limit (%(default)s)")
    add("--held_out", type=float, default=0.02, help="share of the records kept for the report (%(default)s)")
    add("--measure", type=Path, metavar="DIR",
        help="train nothing: report on the tokenizer of this folder, on the held-out records of --data")
    args = parser.parse_args(argv)
    if not 0 <= args.held_out < 1 and not (args.measure and args.held_out == 1):
        parser.error(f"--held_out is a share from 0 to below 1 (up to 1 with --measure); got {args.held_out}")
    if args.measure and args.held_out == 0:
        parser.error("--measure needs records to measure on; type --held_out 0.02, or 1 for all")
    if args.max_mb < 0:
        parser.error(f"--max_mb is a number of megabytes from 0 up; got {args.max_mb}")
    smallest = len(CONTROL_TOKENS) + len(TAGS) + 256
    if args.vocab_size is not None and args.vocab_size < smallest:
        parser.error(f"--vocab_size counts {smallest} control tokens, tags and bytes; got {args.vocab_size}")
    return args


def train(corpus: Corpus, shares: dict[str, float], vocab_size: int) -> Tokenizer:
    """Learns the merges and builds the tokenizer; smaller than asked for when the text gives no more."""
    weights, heaviest_occurrence = word_weights(corpus, shares)
    # A pair that occurs only once would be learnt by heart; the text is used up before that.
    n_tokens = vocab_size - len(CONTROL_TOKENS) - len(TAGS) - 256
    return build_tokenizer(learn_merges(weights, n_tokens, min_weight=2 * heaviest_occurrence))


def run(args: argparse.Namespace) -> None:
    paths = args.data or find_data()
    for path in paths:
        if not path.is_file():
            raise TokenizerError(f"There is no file {path}; give JSON Lines files with --data.")
    if args.measure:
        tokenizer = load_tokenizer(args.measure)
        held_out = (record for record in read_records(paths, "measuring") if record.draw < args.held_out)
        print(f"{vocabulary_report(tokenizer)}\n\n{compression_report(tokenizer, held_out)}")
        return
    corpus = read_corpus(paths, args.held_out, args.max_mb)
    print("trained on " + ", ".join(f"{corpus.n_bytes[g] / 1e6:.1f} MB {g}" for g in GROUPS if corpus.n_bytes[g]))
    asked = args.vocab_size or VOCAB_SIZE
    tokenizer = train(corpus, args.shares, asked)
    size = tokenizer.get_vocab_size()
    if size < asked:
        few = f"The text is enough for a vocabulary of {size:,d} entries, not {asked:,d}"
        if args.vocab_size:
            raise TokenizerError(f"{few}; add files to --data, or type --vocab_size {size}.")
        print(f"note: {few}; for more, add files to --data.")
    print(f"{vocabulary_report(tokenizer)}\n\n{compression_report(tokenizer, corpus.held_out)}\n")
    for path in save_tokenizer(tokenizer, args.out_dir):
        print(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from trainer.command_line import run_script  # after the flags: --help need not wait for torch

    run_script(lambda: run(args))


if __name__ == "__main__":
    main()
