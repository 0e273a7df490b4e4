"""How well and how fast does `prepare_data.py clean` find near duplicates? Copies with typing errors are hidden.

Of `--records` records of the file, drawn at random, `--copies` get a copy behind them in which 0.2 to 2 % of the
characters are replaced, left out or doubled. Whether a copy nearly equals its original is decided here, with plain
sets of five characters: recall is the share of those copies that were left out, precision the share of all left-out
records whose similarity to the record they were left out for is at least the threshold. Memory is the growth of the
process by the index, per record.

    python scripts/bench_clean.py dataset/pretrain_hq.jsonl
    python scripts/bench_clean.py dataset/sft_512.jsonl --records 20000 --copies 500

中文：把带错字的副本藏进文件，测量近似去重的召回率、精确率、速度与内存。
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset import json_lines
from scripts import prepare_data
from scripts.preparing import cleaning
from trainer import run_log
from trainer.command_line import UserError, number, run_script

SHARES = (0.002, 0.005, 0.01, 0.02)  # of the characters that differ in a copy
SHORTEST = 60  # characters of a record that is copied


def with_errors(text: str, share: float, rng: random.Random) -> str:
    """The text with that share of its characters, at least one, replaced, left out or doubled."""
    letters = list(text)
    for i in rng.sample(range(len(letters)), min(max(1, round(share * len(text))), len(letters))):
        letters[i] = rng.choice([rng.choice(text), "", letters[i] * 2])
    return "".join(letters)


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of the sets of five letters and digits in a row."""
    sets = []
    for text in (a, b):
        letters = "".join(c for c in text.casefold() if c.isalnum())
        sets.append({letters[i : i + 5] for i in range(max(len(letters) - 4, 1))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def text_of(record: dict) -> str:
    return "\n".join(cleaning.texts(record))


def draw(path: Path, n: int, rng: random.Random) -> list[dict]:
    """n records of the file, all equally likely (reservoir sampling, so the file may be of any size)."""
    kept = []
    for i, (_, raw) in enumerate(json_lines.read_lines(json_lines.check_file(path))):
        if i < n:
            kept.append(raw)
        elif (j := rng.randrange(i + 1)) < n:
            kept[j] = raw
    rng.shuffle(kept)
    return [json_lines.parse_line(raw) for raw in kept]


def measure(path: Path, n_records: int, n_copies: int, threshold: float, folder: Path) -> dict[str, float]:
    rng = random.Random(0)
    records = draw(path, n_records, rng)
    long_ones = [r for r in records if len(text_of(r)) >= SHORTEST]
    if len(long_ones) < n_copies:
        raise UserError(f"{path} has {len(long_ones)} records of {SHORTEST} characters; ask for fewer --copies.")
    originals = rng.sample(long_ones, n_copies)
    copies = [cleaning.map_texts(r, lambda text: with_errors(text, rng.choice(SHARES), rng)) for r in originals]
    everything, source, to = [*records, *copies], folder / "source.jsonl", folder / "clean.jsonl"
    with open(source, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in everything)
    growth, reports = {}, {}
    for near in (0, threshold):  # without the index first: memory only ever grows
        before = run_log.process_memory_gib()
        flags = ["--near_threshold", near, "--overwrite", "--skip_bad_records", "--examples", len(everything)]
        prepare_data.main(["clean", str(source), "--to", str(to), *map(str, flags)])
        growth[near] = (run_log.process_memory_gib() or 0) - (before or 0)
        reports[near] = json.loads(to.with_suffix(".report.json").read_text(encoding="utf-8"))
    written = [json.loads(line) for line in to.read_text(encoding="utf-8").splitlines()]
    return figures(originals, copies, everything, written, threshold, reports[threshold]) | {
        "index, KB per record": growth[threshold] * 2**30 / 1e3 / reports[threshold]["records"]["written"],
    }


def figures(
    originals: list, copies: list, everything: list, written: list, threshold: float, report: dict
) -> dict[str, float]:
    """What the report of one run says, judged by `similarity`."""
    left_out = {why: {int(e["where"].split()[-1]): e for e in shown} for why, shown in report["examples"].items()}
    near = left_out.pop("near duplicate", {})  # by line of the source
    other = {line for shown in left_out.values() for line in shown}  # for other reasons, which are no matter here
    right = sum(
        similarity(text_of(everything[line - 1]), text_of(written[e["line_of_output"] - 1])) >= threshold
        for line, e in near.items()
    )
    first = len(everything) - len(copies) + 1
    alike = {
        line
        for line, (a, b) in enumerate(zip(originals, copies, strict=True), start=first)
        if line not in other and similarity(text_of(a), text_of(b)) >= threshold
    }
    return {
        "MB": report["bytes_read"] / 1e6,
        "MB per CPU second": report["bytes_read"] / 1e6 / report["cpu_seconds"],
        "copies": len(copies),
        "copies above the threshold": len(alike),
        "of them found": len(alike & near.keys()),
        "recall, %": 100 * len(alike & near.keys()) / max(len(alike), 1),
        "precision, %": 100 * right / max(len(near), 1),
        "near duplicates the file had itself": sum(line < first for line in near),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure near-duplicate removal. Defaults stand in brackets.")
    parser.add_argument("file", type=Path, help="JSON Lines file in our format")
    parser.add_argument("--records", type=number(int, 1), default=20000, help="records drawn from it (20000)")
    parser.add_argument("--copies", type=number(int, 1), default=500, help="copies with errors (500)")
    parser.add_argument("--threshold", type=number(float, 0, excluded=True, most=1), default=0.8, help="(0.8)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_clean_") as folder:
        row = measure(args.file, args.records, args.copies, args.threshold, Path(folder))
    for name, value in row.items():
        print(f"{name:40}{value:,.1f}" if isinstance(value, float) else f"{name:40}{value:,}")


if __name__ == "__main__":
    run_script(main)
