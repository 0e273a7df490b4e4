"""Training runs on disk, as the dashboard reads them: `metrics.jsonl`, `samples.jsonl` and `step_*.json` of a folder
(trainer/run_log.py and trainer/checkpoint.py write them).

Files are read while a trainer writes them: only lines that have ended count, and of a file that grew only what is new
is read.

中文：读取训练记录文件夹：指标、样本与状态；训练进行中也能读，不完整的末行会被忽略。
"""

import json
import math
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.run_log import clock

DEEPEST = 4  # folders below out/ that are looked into
MOST_POINTS = 1200  # of a curve on the screen
# Figures of a record that are no curves.
NOT_CURVES = {"step", "epoch", "time", "tokens", "eta_seconds", "expert_load"}
# First those that all runs are judged by; what a stage has besides follows; then the machine's.
FIRST = ("loss", "bpb", "reward", "accuracy", "answer", "format")
LAST = ("lr", "grad_norm", "tokens_per_second", "memory_gib", "mfu", "data_wait", "skipped_steps")
SHARES = {"accuracy", "answer", "format", "mfu", "data_wait", "clip"}


class Tail:
    """The JSON objects of a growing file of lines."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        self._restart(None)

    def _restart(self, inode: int | None) -> None:
        self.inode, self.offset, self.records = inode, 0, []

    def read(self) -> list[dict]:
        """All records so far; lines that are no JSON object are passed over. A file that was replaced is read anew."""
        with self.lock:
            try:
                with open(self.path, "rb") as file:
                    now = os.fstat(file.fileno())
                    if now.st_ino != self.inode or now.st_size < self.offset:
                        self._restart(now.st_ino)
                    file.seek(self.offset)
                    data = file.read()
            except OSError:  # gone: an old run may be moved aside at any time
                self._restart(None)
                return []
            whole = data.rfind(b"\n") + 1
            if whole:
                self.offset += whole
                self.records = [*self.records, *objects(data[:whole])]  # readers may still hold the old list
            return self.records


def objects(data: bytes) -> Iterator[dict]:
    for line in data.splitlines():
        try:
            record = json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


@dataclass
class Run:
    """A run folder. name: its path below out/ without "runs/"."""

    name: str
    folder: Path
    metrics: Tail = field(repr=False)
    samples: Tail = field(repr=False)
    _facts: tuple[str, dict] = field(default=("", {}), repr=False)

    def facts(self) -> dict:
        """What the newest state says: progress, args, config, signature; empty where there is none."""
        newest = max((path.name for path in self.folder.glob("step_*.json")), default="")
        if newest != self._facts[0]:
            try:
                facts = json.loads((self.folder / newest).read_text(encoding="utf-8"))
                self._facts = (newest, facts if isinstance(facts, dict) else {})
            except (OSError, ValueError):  # the one before is deleted while a new one is written
                return self._facts[1]
        return self._facts[1]


class Runs:
    """The runs below a folder; what was read of them is kept."""

    def __init__(self, out_dir: Path):
        self.out_dir, self.known, self.lock = out_dir, {}, threading.Lock()

    def find(self) -> dict[str, Run]:
        """By name, the one written to last first."""
        found = []
        for here, folders, files in os.walk(self.out_dir):
            inside = Path(here).relative_to(self.out_dir)
            folders[:] = [name for name in folders if not name.startswith(".")] if len(inside.parts) < DEEPEST else []
            if "metrics.jsonl" in files:
                path = Path(here) / "metrics.jsonl"
                name = "/".join(part for part in inside.parts if part != "runs") or here
                found.append((modified(path), name, Path(here)))
        with self.lock:
            for _, name, folder in found:
                if name not in self.known:
                    self.known[name] = Run(name, folder, Tail(folder / "metrics.jsonl"), Tail(folder / "samples.jsonl"))
            return {name: self.known[name] for _, name, _ in sorted(found, reverse=True)}


def modified(path: Path) -> float:
    """Seconds, 0 where the file is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


# --- Curves -----------------------------------------------------------------------------------------------------------


def number(value: object) -> float | None:
    """A finite number, else None."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def value_of(record: dict, name: str) -> float | None:
    """A figure of a record, the share of the least and most used expert among them."""
    if name in ("experts_least", "experts_most"):
        layers = record.get("expert_load")
        if not isinstance(layers, list):
            return None
        shares = [share for layer in layers if isinstance(layer, list) for share in map(number, layer)]
        shares = [share for share in shares if share is not None]
        return (min(shares) if name == "experts_least" else max(shares)) if shares else None
    return number(record.get(name))


def figures(all_records: Sequence[Sequence[dict]]) -> list[str]:
    """The curves there are to draw, without `val_`, in the order of the page."""
    seen = {}
    for records in all_records:
        for record in records:
            for key in record:
                if key not in NOT_CURVES and number(record[key]) is not None:
                    seen[key.removeprefix("val_")] = True
            if "expert_load" in record:
                seen["experts_least"] = seen["experts_most"] = True
    if not any(record.get("skipped_steps") for records in all_records for record in records):
        seen.pop("skipped_steps", None)
    middle = [name for name in seen if name not in FIRST + LAST]
    return [name for name in (*FIRST, *middle, *LAST) if name in seen]


def curve(records: Sequence[dict], name: str, axis: str) -> list[tuple[float, float]]:
    """(x, value) in order. axis: "step", "tokens" or "hours"; a validation stands where training had got to."""
    points, tokens, hours, first = [], 0.0, 0.0, None
    for record in records:
        tokens = number(record.get("tokens")) or tokens
        time = number(record.get("time"))
        if time is not None:
            first = time if first is None else first
            hours = (time - first) / 3600
        value = value_of(record, name)
        if value is not None:
            points.append(({"step": float(record["step"]), "tokens": tokens, "hours": hours}[axis], value))
    return points


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential mean, s ← w·s + (1 − w)·x, divided by 1 − wⁿ so that it does not begin at 0 (Kingma and Ba 2014,
    arXiv:1412.6980, section 3). weight: 0 (off) to below 1."""
    mean, out = 0.0, []
    for n, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**n))
    return out


def thinned(points: Sequence[tuple], most: int = MOST_POINTS) -> list[tuple]:
    """At most so many points, evenly chosen, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def rows(run: str, records: Sequence[dict], name: str, axis: str, weight: float) -> list[dict]:
    """The points of one figure of one run as a chart takes them: run, part (training, held_out), x, value, raw."""
    found = []
    for part, key in (("training", name), ("held_out", f"val_{name}")):
        points = curve(records, key, axis)
        values = [value for _, value in points]
        shown = smoothed(values, weight) if part == "training" else values
        for x, value, raw in thinned([(x, v, raw) for (x, raw), v in zip(points, shown, strict=True)]):
            found.append({"run": run, "part": part, "x": x, "value": value, "raw": raw})
    return found


# --- How a run stands -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """state: running, finished or stopped. Figures are the newest ones, None where there are none; times in seconds."""

    state: str
    step: int = 0
    total: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    bpb: float | None = None
    tokens_per_second: float | None = None
    eta: float | None = None
    elapsed: float | None = None
    size: str = ""


def standing(run: Run, now: float) -> Standing:
    """Args: now: the time in seconds."""
    records, facts = run.metrics.read(), run.facts()
    progress, signature, config = (facts.get(key) or {} for key in ("progress", "signature", "config"))
    newest = {key: value for record in records for key, value in record.items() if value is not None}
    logged = [record for record in records if number(record.get("time")) is not None]
    eta = number(newest.get("eta_seconds"))
    step = max(newest.get("step", 0), progress.get("step", 0))
    total = signature.get("total_steps") or estimated_total(logged)
    elapsed = logged[-1]["time"] - logged[0]["time"] if logged else None
    finished = bool(progress.get("finished")) and progress.get("step") == step
    pace = elapsed / max(len(logged) - 1, 1) if elapsed else 0.0
    alive = now - modified(run.metrics.path) < max(90.0, 4 * pace)
    state = "finished" if finished else "running" if alive else "stopped"
    shape = f"{config['hidden_size']} × {config.get('num_hidden_layers', '?')}" if "hidden_size" in config else ""
    return Standing(
        state, step, total, number(newest.get("loss")), number(newest.get("val_loss")), number(newest.get("val_bpb")),
        number(newest.get("tokens_per_second")), eta if state == "running" else None, elapsed, shape,
    )  # fmt: skip


def estimated_total(logged: Sequence[dict]) -> int | None:
    """The last update, before a state tells it: time left × pace of the newest log line, which its own speed tells."""
    if len(logged) < 2:
        return None
    before, last = logged[-2], logged[-1]
    values = [number(r.get(key)) for r, key in ((last, "eta_seconds"), (last, "tokens_per_second"),
                                                (last, "tokens"), (before, "tokens"))]  # fmt: skip
    if None in values or values[2] <= values[3]:
        return None
    eta, speed, tokens, earlier = values
    return last["step"] + round(eta * speed * (last["step"] - before["step"]) / (tokens - earlier))


def duration(seconds: float | None) -> str:
    return "" if seconds is None else clock(seconds)
