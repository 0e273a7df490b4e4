"""Is my data file right? Counts, lengths, truncation, packing, duplicates, languages; which tokens are trained on.

    python dataset/check_data.py dataset/sft_mini_512.jsonl --stage sft
    python dataset/check_data.py my.jsonl --max_seq_len 1024 --preview 5      (the stage is guessed from the keys)

Pretraining and SFT files are tokenised into the cache that training then uses, so nothing is done twice. Exit status:
0 all records are fine, 1 bad records were found, 2 the file or the command line cannot be used.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset import json_lines, record_formats
from dataset import lm_dataset as lm
from dataset import stage_datasets as stages
from dataset import token_cache as tc

STAGES = {
    "pretrain": '{"text": "…"}',
    "sft": '{"conversations": [turns…]}, for SFT, LoRA and distillation',
    "reason": "as sft; answers are <think>…</think><answer>…</answer>",
    "dpo": '{"chosen": [turns…], "rejected": [turns…]}',
    "rl": '{"conversations": [turns…], "answer": "…"}, for GRPO and PPO',
    "choice": '{"question", "A", "B", "C", "D", "answer"}',
}
PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
BAD_SHOWN = 5
PREVIEW_BEYOND = 40  # tokens shown of what --max_seq_len cuts off


@dataclass
class Sequence:
    """One token sequence of a record, for the preview."""

    title: str
    ids: np.ndarray  # (T,)
    trained: np.ndarray  # (T,) bool


@dataclass
class Report:
    """What was found. Lengths are in tokens; a DPO record has two sequences."""

    records: int = 0
    n_bad: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    trained_tokens: int = 0
    duplicates: int = 0
    rows: dict[str, Any] | None = None  # the stats of the packed rows
    truncated: int = 0


# ---- reading a record of each stage --------------------------------------------------------------


def _rl_reader(tokenizer: Any) -> Callable[[dict], list[lm.Rendered]]:
    render = lm.ChatRenderer(tokenizer)

    def read(record: dict) -> list[lm.Rendered]:
        messages, tools, _ = record_formats.parse_rl(record)
        return [render(messages, tools)._replace(spans=[])]  # the model writes the answers itself: nothing is trained

    return read


def _choice_reader(tokenizer: Any) -> Callable[[dict], list[lm.Rendered]]:
    def read(record: dict) -> list[lm.Rendered]:
        r = record_formats.parse_choice(record)
        text = r["question"] + "".join(f"\n{k}. {r[k]}" for k in "ABCD") + f"\n{r['answer']}"
        return [lm.Rendered(text, [])]

    return read


def _encode_groups(items: list[list], tokenizer: Any) -> tuple[list, list]:
    """Items of one sequence each → per item a list of ids and a list of masks."""
    ids, trained = lm.encode_rendered([rendered for item in items for rendered in item], tokenizer)
    ends = np.cumsum([len(item) for item in items])
    return [[lst[e - len(item) : e] for e, item in zip(ends, items, strict=True)] for lst in (ids, trained)]


FORMATS = {
    "pretrain": lm.PRETRAIN,
    "sft": lm.SFT,
    "reason": stages.REASON,
    "dpo": dataclasses.replace(stages.PairDataset.format, encode=stages.encode_pairs),
    "rl": tc.RecordFormat("rl", _rl_reader, _encode_groups, masked=True),
    "choice": tc.RecordFormat("choice", _choice_reader, _encode_groups, masked=True),
}
TITLES = {"dpo": ("chosen", "rejected"), "rl": ("prompt",), "choice": ("question",)}


def guess_stage(path: Path) -> str:
    """The stage whose keys the first readable record has.

    Raises:
        DataError: no line tells.
    """
    seen = "no line holds a whole JSON object; expected one record per line, not spread over several"
    for _, raw in json_lines.read_lines(path):
        try:
            record = json_lines.parse_line(raw)
        except ValueError:
            continue
        if "text" in record:
            return "pretrain"
        if "chosen" in record or "rejected" in record:
            return "dpo"
        if "question" in record and "A" in record:
            return "choice"
        turns = record.get("conversations")
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            last = turns[-1].get("content")
            if "answer" in record or last == "" or turns[-1].get("role") == "user":
                return "rl"
            return "reason" if isinstance(last, str) and record_formats.REASONED.fullmatch(last.strip()) else "sft"
        if "conversations" in record:
            return "sft"
        keys = ", ".join(record) or "none"
        choices = ",".join(STAGES)
        seen = f"the keys of the first record are {keys}, no stage's format; name it with --stage {{{choices}}}"
        break
    raise json_lines.DataError(f"{path}: {seen}")


# ---- the checks ----------------------------------------------------------------------------------


def check_packed(path: Path, stage: str, tokenizer: Any, max_seq_len: int, cache_dir: str | None, show: bool) -> Report:
    """Pretraining and SFT: the very cache and rows that training uses."""
    cache = tc.load_or_build(path, tokenizer, FORMATS[stage], cache_dir, True, show)
    meta = cache.meta
    report = Report(len(cache), meta["skipped"], [tuple(b) for b in meta["bad"]], np.diff(cache.offsets.array))
    report.duplicates = len(cache) - len(np.unique(cache.hashes.array))
    if len(cache):
        dataset = lm.PretrainDataset if stage == "pretrain" else lm.SFTDataset
        report.rows = dataset(path, tokenizer, max_seq_len, "all", cache_dir=cache_dir, skip_bad_records=True).stats
        report.trained_tokens = report.rows["trained_tokens"]
        report.truncated = report.rows["truncated"]
    return report


def check_streamed(path: Path, stage: str, tokenizer: Any, max_seq_len: int, show: bool) -> Report:
    """The other stages: batch by batch, nothing is written."""
    report, lengths, hashes = Report(), [], []
    for items, bad in _batches(path, stage, tokenizer, show):
        report.n_bad += len(bad)
        report.bad += bad[: tc.BAD_KEPT - len(report.bad)]
        report.records += len(items)
        ids, trained = FORMATS[stage].encode(items, tokenizer) if items else ([], [])
        for i, t in zip(ids, trained, strict=True):
            group = [(i, t)] if isinstance(i, np.ndarray) else list(zip(i, t, strict=True))
            lengths += [len(one) for one, _ in group]
            report.truncated += any(len(one) > max_seq_len for one, _ in group)
            report.trained_tokens += sum(int(mask[:max_seq_len].sum()) for _, mask in group)
            hashes.append(tc.token_hash(np.concatenate([one for one, _ in group])))
    report.lengths = np.array(lengths, np.int64)
    report.duplicates = len(hashes) - len(set(hashes))
    return report


def _batches(path: Path, stage: str, tokenizer: Any, show: bool) -> Iterator[tuple[list, list[tuple[int, str]]]]:
    from tqdm import tqdm

    hidden = not (show and sys.stderr.isatty())
    with tqdm(
        total=path.stat().st_size, unit="B", unit_scale=True, desc="checking", leave=False, disable=hidden
    ) as bar:
        for _, items, bad, n_bytes in tc.read_batches(path, None, FORMATS[stage], tokenizer):
            yield items, bad
            bar.update(n_bytes)


def language_of(text: str) -> str:
    """Chinese when the Han characters outnumber the Latin words, taken as five letters each; other when neither script
    makes up half of the letters (Russian …, digits only); else English."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    han = int(((codes >= 0x4E00) & (codes <= 0x9FFF) | (codes >= 0x3400) & (codes <= 0x4DBF)).sum())
    latin = int((((codes | 32) >= 97) & ((codes | 32) <= 122) | (codes >= 0xC0) & (codes <= 0x24F)).sum())
    beyond = int((codes >= 0x250).sum() - ((codes >= 0x2000) & (codes <= 0x303F) | (codes >= 0xFF00)).sum()) - han
    return "other" if han + latin <= beyond else "Chinese" if han > latin / 5 else "English"


def language_share(path: Path) -> dict[str, tuple[int, int]]:
    """{language: (records, characters)}"""
    records, chars = Counter(), Counter()
    for _, raw in json_lines.read_lines(path):
        try:
            text = "\n".join(_strings(json_lines.parse_line(raw)))
        except ValueError:
            continue
        language = language_of(text)
        records[language] += 1
        chars[language] += len(text)
    return {k: (records[k], chars[k]) for k in ("Chinese", "English", "other") if records[k]}


def _strings(value: Any, key: str = "") -> Iterator[str]:
    """The texts of a record: not its keys, not its roles, not the JSON of tools."""
    if isinstance(value, str):
        if key not in ("role", "tools", "tool_calls", "subject"):
            yield value
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from _strings(v, k)
    elif isinstance(value, list):
        for v in value:
            yield from _strings(v, key)


# ---- showing it ----------------------------------------------------------------------------------


def preview_sequences(path: Path, stage: str, tokenizer: Any, n: int) -> Iterator[tuple[int, list[Sequence]]]:
    """The first n good records: (line number, token sequences with what is trained on)."""
    fmt = FORMATS[stage]
    read = fmt.reader(tokenizer)
    for number, raw in json_lines.read_lines(path):
        if n <= 0:
            return
        try:
            item = read(json_lines.parse_line(raw))
        except ValueError:
            continue
        n -= 1
        ids, trained = fmt.encode([item], tokenizer)
        if trained is None:  # plain text: everything but the first token, which nothing predicts
            trained = [np.arange(len(ids[0])) > 0]
        if isinstance(ids[0], np.ndarray):
            yield number, [Sequence("", ids[0], trained[0])]
        else:
            names = zip(TITLES[stage], ids[0], trained[0], strict=True)
            yield number, [Sequence(title, i, t) for title, i, t in names]


def token_cells(ids: np.ndarray, trained: np.ndarray, tokenizer: Any) -> list[tuple[str, bool]]:
    """(text, trained) cells, one per token. Tokens that are parts of one character share a cell."""
    cells, pending = [], []
    for k, (i, t) in enumerate(zip(ids.tolist(), trained.tolist(), strict=True)):
        pending.append(i)
        text = tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        last = k + 1 == len(ids) or bool(trained[k + 1]) != t
        if "\ufffd" not in text or last or len(pending) == 4:
            cells.append((text, t))
            pending = []
    return cells


def render_plain(cells: list[tuple[str, bool]], cut: int | None) -> str:
    """Without colour: trained stretches stand in « », tokens are separated by │."""
    out, inside = [], False
    for k, (text, trained) in enumerate(cells):
        if k == cut:
            out.append("✂")
        if trained != inside:
            out.append("«" if trained else "»")
        elif k:
            out.append("│")
        inside = trained
        out.append(text.replace("\n", "⏎\n"))
    return "".join(out) + ("»" if inside else "")


def render_rich(cells: list[tuple[str, bool]], cut: int | None) -> Any:
    """In colour: trained tokens black on two greens by turns, the others grey and dark grey by turns."""
    from rich.text import Text

    styles = {True: ("black on green", "black on bright_green"), False: ("bright_black", "white")}
    out = Text()
    for k, (text, trained) in enumerate(cells):
        if k == cut:
            out.append("✂", "bold red")
        shown = text.replace("\n", "⏎\n")
        out.append(shown, styles[trained][k % 2] if cut is None or k < cut else "red strike")
    return out


def show_report(report: Report, path: Path, stage: str, args: argparse.Namespace, languages: dict) -> list[str]:
    """The lines of the report."""
    total = report.records + report.n_bad
    size = path.stat().st_size / 1e6
    lines = [f"{path}: {size:,.1f} MB, read as {stage}: {STAGES[stage]}", ""]
    lines.append(
        f"records      {report.records:,} good" + (f", {report.n_bad:,} BAD of {total:,}" if report.n_bad else "")
    )
    for line, reason in report.bad[:BAD_SHOWN]:
        lines.append(f"  line {line}: {reason}")
    if report.n_bad > BAD_SHOWN:
        lines.append(f"  … and {report.n_bad - BAD_SHOWN:,} more; --skip_bad_records trains without them")
    if not report.records:
        return [*lines, f"nothing can be used; is it a file for another stage? --stage {{{','.join(STAGES)}}}"]
    tokens = int(report.lengths.sum())
    lines.append(f"tokens       {tokens:,} ({tokens / len(report.lengths):,.0f} per sequence)")
    if report.rows:
        kept = report.rows["tokens"]
        share = _share(report.trained_tokens, kept)
        lines.append(f"trained on   {report.trained_tokens:,} of {kept:,} tokens in the rows ({share})")
    elif stage in ("reason", "dpo"):
        lines.append(f"trained on   {report.trained_tokens:,} ({_share(report.trained_tokens, tokens)})")
    shares = np.percentile(report.lengths, PERCENTILES)
    names = ["median" if p == 50 else "longest" if p == 100 else f"p{p}" for p in PERCENTILES]
    lines.append("length       " + ", ".join(f"{n} {v:,.0f}" for n, v in zip(names, shares, strict=True)) + " tokens")
    if stage == "pretrain":
        lines.append(f"longer than  {args.max_seq_len}: {report.rows['split']:,} documents are split, nothing is lost")
    elif stage != "choice":
        cut = report.truncated + (report.rows["dropped"] if report.rows else 0)
        share = _share(cut, report.records)
        lines.append(f"longer than  {args.max_seq_len}: {cut:,} ({share}) lose their end")
    if report.rows and report.rows["dropped"]:
        lines.append(
            f"dropped      {report.rows['dropped']:,} of them: nothing to train on within {args.max_seq_len} tokens; "
            "try a larger --max_seq_len"
        )
    if report.rows:
        fill = 100 * report.rows["fill"]
        lines.append(
            f"packed       {report.rows['rows']:,} rows of {args.max_seq_len}, {fill:.1f} % of them real tokens"
        )
    lines.append(
        f"duplicates   {report.duplicates:,} records equal an earlier one ({_share(report.duplicates, report.records)})"
    )
    all_records, all_chars = (sum(v[i] for v in languages.values()) for i in (0, 1))
    parts = [
        f"{k} {_share(r, all_records)} of records, {_share(c, all_chars)} of characters"
        for k, (r, c) in languages.items()
    ]
    lines.append("language     " + "; ".join(parts))
    return lines


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"


def show_preview(path: Path, stage: str, tokenizer: Any, args: argparse.Namespace) -> None:
    console = None
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        try:
            from rich.console import Console

            console = Console(highlight=False, soft_wrap=True)
        except ImportError:
            pass  # the plain form says the same
    legend = [("trained on", True), ("only read", False)]
    for number, sequences in preview_sequences(path, stage, tokenizer, args.preview):
        for s in sequences:
            print(f"\n── line {number} {s.title}".rstrip(), end=": ")
            print(f"{len(s.ids)} tokens, {int(s.trained.sum())} trained on", end="   legend: ", flush=True)
            shown = args.max_seq_len + PREVIEW_BEYOND
            cells = token_cells(s.ids[:shown], s.trained[:shown], tokenizer)
            cut = None
            if stage not in ("pretrain", "choice") and len(s.ids) > args.max_seq_len:
                cut = len(token_cells(s.ids[: args.max_seq_len], s.trained[: args.max_seq_len], tokenizer))
            scissors = ", ✂ cut here by --max_seq_len" if cut is not None else ""
            if console:
                console.print(render_rich(legend, None), end=f"{scissors}\n")
                console.print(render_rich(cells, cut))
            else:
                print(f"«trained on», │ between tokens, ⏎ newline{scissors}")
                print(render_plain(cells, cut))
            if len(s.ids) > shown:
                print(f"… {len(s.ids) - shown:,} more tokens")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    stages = "; ".join(f"{k}: {v}" for k, v in STAGES.items())
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=stages)
    parser.add_argument("file", type=Path, help="a JSON Lines file, for example dataset/sft_mini_512.jsonl")
    parser.add_argument(
        "--stage", choices=list(STAGES), help="which stage is to read it; guessed from the keys if left out"
    )
    parser.add_argument(
        "--max_seq_len", type=int, default=512, help="tokens per row in training, for example 1024 (512)"
    )
    parser.add_argument("--preview", type=int, default=3, help="records whose tokens are shown, 0 for none (3)")
    parser.add_argument("--tokenizer", type=Path, help="folder of another tokenizer (model/)")
    parser.add_argument("--cache_dir", help="where token caches are kept (dataset/.cache)")
    args = parser.parse_args(argv)
    if args.max_seq_len < 2 or args.preview < 0:
        parser.error("--max_seq_len must be at least 2 and --preview at least 0")
    return args


def check(args: argparse.Namespace) -> int:
    """Prints report and preview. Returns the exit status: 0, or 1 when records are bad or none can be trained on.

    Raises: DataError, WeightsError, OSError when nothing can be checked.
    """
    from model.weights import load_tokenizer

    path = json_lines.check_file(args.file)
    stage = args.stage or guess_stage(path)
    tokenizer = load_tokenizer(args.tokenizer)
    if stage in ("pretrain", "sft"):
        report = check_packed(path, stage, tokenizer, args.max_seq_len, args.cache_dir, True)
    else:
        report = check_streamed(path, stage, tokenizer, args.max_seq_len, True)
    print("\n".join(show_report(report, path, stage, args, language_share(path))))
    show_preview(path, stage, tokenizer, args)
    return 1 if report.n_bad or (report.rows and not report.rows["rows"]) else 0


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    from trainer.command_line import run_script  # after the flags: --help need not wait for torch

    run_script(lambda: sys.exit(check(args)))


if __name__ == "__main__":
    main()
