"""What happened to the records: counts by reason, examples, languages, lengths; as a table and as JSON.

中文：处理报告：按原因计数、被去掉的例子、语言、长度分布；打印表格，并在输出旁写出 JSON。
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from dataset.check_data import language_of
from model.files import atomic_open
from scripts.preparing.cleaning import texts

SHOWN = 160  # characters of an example


class Report:
    """Filled record by record. Lengths are in characters of all texts of a record."""

    def __init__(self, args: argparse.Namespace, examples: int = 3):
        """Args: examples: how many left-out records are kept of each reason."""
        self.settings = {k: v for k, v in vars(args).items() if k != "run"}
        self.kept_examples = examples
        self.read = self.written = self.changed = self.bytes = 0
        self.left_out: Counter[str] = Counter()
        self.examples: dict[str, list[dict]] = {}
        self.languages: dict[str, Counter] = {"records": Counter(), "characters": Counter()}
        self.lengths: Counter[int] = Counter()  # by the power of two they reach
        self.sources: dict[str, dict] = {}
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def leave_out(self, reason: str, where: str, text: str, **more: Any) -> None:
        self.left_out[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < self.kept_examples:
            shown.append({"where": where, "text": shorten(text), **more})

    def keep(self, record: dict) -> None:
        text = "\n".join(texts(record))
        self.written += 1
        language = language_of(text)
        self.languages["records"][language] += 1
        self.languages["characters"][language] += len(text)
        self.lengths[1 << max(len(text).bit_length() - 1, 0)] += 1

    def as_dict(self) -> dict:
        return {
            "settings": self.settings,
            "records": {"read": self.read, "written": self.written, "changed": self.changed},
            "left_out": dict(self.left_out.most_common()),
            "examples": self.examples,
            "sources": self.sources,
            "languages": {k: dict(v.most_common()) for k, v in self.languages.items()},
            "lengths_in_characters": {f"{n}-{2 * n - 1}": self.lengths[n] for n in sorted(self.lengths)},
            "bytes_read": self.bytes,
            "seconds": round(time.perf_counter() - self.start, 2),
            "cpu_seconds": round(time.process_time() - self.cpu_start, 2),
        }

    def write(self, output: Path) -> Path:
        """Writes OUTPUT.report.json and gives its path."""
        path = output.with_name(f"{output.stem}.report.json")
        with atomic_open(path, "w") as f:
            json.dump(self.as_dict(), f, ensure_ascii=False, indent=2, default=str)
        return path

    def table(self) -> str:
        facts = self.as_dict()
        rows = [("read", self.read, ""), ("written", self.written, share(self.written, self.read))]
        if self.changed:
            rows.append(("of them changed", self.changed, share(self.changed, self.read)))
        rows += [(f"left out: {why}", n, share(n, self.read)) for why, n in facts["left_out"].items()]
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{name:{width}}  {n:>12,}  {part:>7}" for name, n, part in rows]
        for name, source in self.sources.items():
            lines.append(f"{name}: {', '.join(f'{k} {v:,}' for k, v in source.items())}")
        for why, shown in self.examples.items():
            lines += [f"  {why}, {e['where']}: {shorten(e['text'], 60)}" for e in shown[:1]]
        records, characters = facts["languages"]["records"], facts["languages"]["characters"]
        total = sum(characters.values())
        parts = [
            f"{k} {share(n, self.written)}, {share(characters[k], total)} of characters" for k, n in records.items()
        ]
        lines.append(f"language: {'; '.join(parts) or '–'}")
        most = max(self.lengths.values(), default=1)
        for n in sorted(self.lengths):
            bar = "█" * max(1, round(30 * self.lengths[n] / most))
            lines.append(f"{n:>9,} characters on  {self.lengths[n]:>10,}  {bar}")
        size, seconds, cpu = self.bytes / 1e6, facts["seconds"], facts["cpu_seconds"]
        rates = [size / max(s, 0.01) for s in (seconds, cpu)]
        lines.append(f"{size:,.1f} MB in {seconds:,.1f} s: {rates[0]:,.1f} MB/s, {rates[1]:,.1f} MB per CPU second")
        return "\n".join(lines)


def shorten(text: str, n: int = SHOWN) -> str:
    text = " ".join(text.split())
    return text if len(text) <= n else text[:n] + "…"


def share(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"
