"""How speed, memory and cost grow with model size, length and batch: a table, a fit and a picture of measured figures.

Reads the JSON files of scripts/bench_train.py (dense models). The time of an update is fitted by what it consists of,
for P weights, L layers of width D, rows of T tokens, n tokens in the update:

    seconds ≈ a · 6·P·n  +  b · 6·L·D·T·n  +  c · L·D·n  +  d · P                                          (1)
              products      attention         all else      optimiser

with a, b, c, d ≥ 0 of least squared relative error: 1/a and 1/b are FLOP/s. The attention is the fused kernel's: short
rows on a CPU, which calculate it in blocks twice as fast, have none, and what it takes them falls to the other terms.
From an MFU measured on a GPU follow paper estimates for other cards: the same share of their published peak, several
cards without loss.

    python scripts/bench_train.py --sizes 256x4 512x8 768x16 --batch_sizes 8 --json sizes.json
    python scripts/bench_train.py --sizes 512x8 --seq_lens 512 2048 8192 --batch_sizes 2 --json lengths.json
    python scripts/plot_scaling.py sizes.json lengths.json --png images/scaling.png --price 1.5

Dimension legend: R measured settings.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.files import atomic_open
from model.model_minimind import LONGEST_IN_BLOCKS
from scripts.bench_train import read_size
from trainer.command_line import UserError, number, run_script
from trainer.run_log import PEAK_TFLOPS

TERMS = ("products", "attention", "all else", "optimiser")
MACHINES = {"RTX 3090": ("RTX 3090", 1), "RTX 4090": ("RTX 4090", 1), "8 × RTX 4090": ("RTX 4090", 8),
            "8 × H100": ("H100", 8)}  # fmt: skip


def read_rows(paths: list[Path]) -> list[dict]:
    """The measured settings of dense models, once each.  Raises: UserError on a file that holds none."""
    rows = {}
    for path in paths:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            for row in report["rows"]:
                if read_size(row["size"]).use_moe:
                    continue
                key = tuple(row[name] for name in ("size", "dtype", "compile", "batch_size", "seq_len", "optimizer"))
                key += (report["machine"]["device"],)
                rows[key] = row | {"machine": report["machine"]["device"]}
                row["tokens_per_second"], row["seconds_per_update"], row["parameters"]  # must be there
        except FileNotFoundError:
            raise UserError(f"{path}: there is no such file; make one with scripts/bench_train.py --json.") from None
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: no report of scripts/bench_train.py ({type(error).__name__}: {error}).") from None
    if not rows:
        raise UserError("no dense model among the rows of these files.")
    kinds = {(row["machine"], row["dtype"], row["compile"], row["optimizer"]) for row in rows.values()}
    if len(kinds) > 1:
        raise UserError(f"these files mix machines or settings, which one fit cannot hold: {sorted(kinds)}.")
    return sorted(rows.values(), key=lambda row: (row["parameters"], row["seq_len"], row["batch_size"]))


def features(row: dict) -> list[float]:
    """The four amounts of equation (1)."""
    config = read_size(row["size"])
    n, width = row["batch_size"] * row["seq_len"], config.num_hidden_layers * config.hidden_size
    in_blocks = row.get("machine", "").startswith("cpu") and row["seq_len"] <= LONGEST_IN_BLOCKS
    attention = 0 if in_blocks else 6 * width * row["seq_len"] * n
    return [6 * row["parameters"] * n, attention, width * n, row["parameters"]]


def fit(rows: list[dict]) -> np.ndarray:
    """a, b, c, d ≥ 0 of equation (1) with the least squared relative error.  Shape: R rows → (4,).

    That solution is the plain one of some terms with the others at 0, so all 15 choices of terms are tried.
    """
    seconds = np.array([row["seconds_per_update"] for row in rows])
    relative = np.array([features(row) for row in rows]) / seconds[:, None]  # (R, 4): errors count in per cent
    scale = np.abs(relative).max(0)
    best, coefficients = np.inf, np.zeros(len(TERMS))
    for kept in (list(c) for n in range(1, len(TERMS) + 1) for c in itertools.combinations(range(len(TERMS)), n)):
        found = np.linalg.lstsq((relative / scale)[:, kept], np.ones(len(rows)), rcond=None)[0]
        error = np.square((relative / scale)[:, kept] @ found - 1).sum()
        if (found >= 0).all() and error < best:
            best, coefficients = error, np.zeros(len(TERMS))
            coefficients[kept] = found / scale[kept]
    return coefficients


def table(rows: list[dict], coefficients: np.ndarray, price: float | None) -> str:
    """The measured figures, and how far the fit is off, in Markdown."""
    lines = [
        "| model | parameters | rows × tokens | tokens/s | MFU | peak GiB | hours per 1B tokens | its price | fit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        hours = 1e9 / row["tokens_per_second"] / 3600
        off = coefficients @ features(row) / row["seconds_per_update"] - 1
        shape = f"{row['batch_size']} × {row['seq_len']}"
        lines.append(
            f"| {row['size'].replace('x', ' × ')} | {row['parameters'] / 1e6:.1f}M | {shape} "
            f"| {row['tokens_per_second']:,.0f} | {percent(row.get('mfu'))} | {figure(row.get('memory_gib'))} "
            f"| {hours:,.1f} | {f'{price * hours:,.2f}' if price else '–'} | {off:+.0%} |"
        )
    return "\n".join(lines)


def percent(share: float | None) -> str:
    return f"{share:.1%}" if share is not None else "–"


def figure(value: float | None) -> str:
    return f"{value:.2f}" if value is not None else "–"


def explain(coefficients: np.ndarray) -> str:
    """Equation (1) in words."""
    a, b, c, d = coefficients
    speeds = [f"{name} {1e-9 / x:,.0f} GFLOP/s" for name, x in (("products", a), ("attention", b)) if x]
    others = [f"{c * 1e9:.2f} ns per token, layer and channel", f"{d * 1e9:.1f} ns per weight and update (optimiser)"]
    return "fit: " + ", ".join(speeds + others)


def estimates(rows: list[dict], tokens: float) -> str:
    """Paper estimates for other machines from the best measured MFU of each size; nothing without one."""
    best: dict[str, dict] = {}
    for row in rows:
        if row.get("mfu") and row["mfu"] > best.get(row["size"], {"mfu": 0})["mfu"]:
            best[row["size"]] = row
    if not best:
        return "no estimate for other cards: no MFU was measured (it needs a known GPU)."
    lines = [
        f"ESTIMATE, not measured: the MFU of {next(iter(best.values()))['machine']} times the published peak.",
        "",
        f"| model | machine | tokens/s | hours for {tokens / 1e9:g}B tokens |",
        "|---|---|---|---|",
    ]
    for size, row in best.items():
        flops = sum(features(row)[:2]) / (row["batch_size"] * row["seq_len"])  # per token, as MFU counts them
        for name, (card, cards) in MACHINES.items():
            rate = cards * PEAK_TFLOPS[card] * 1e12 * row["mfu"] / flops
            lines.append(f"| {size.replace('x', ' × ')} | {name} | {rate:,.0f} | {tokens / rate / 3600:,.2f} |")
    return "\n".join(lines)


def draw(rows: list[dict], coefficients: np.ndarray, path: Path) -> None:
    """Three panels: tokens per second over size, length and batch, measured and fitted.  Raises: UserError."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("no picture without matplotlib: pip install matplotlib.") from None
    matplotlib.use("Agg")  # a picture file, no window
    import matplotlib.pyplot as plt

    figure_, panels = plt.subplots(1, 3, figsize=(12, 4), dpi=120)
    sweeps = (("parameters", "parameters"), ("seq_len", "tokens per row"), ("batch_size", "rows per update"))
    for axes, (name, label) in zip(panels, sweeps, strict=True):
        lines: dict[tuple, list[dict]] = {}  # settings that differ in this one point only
        for row in rows:
            others = [row[other] for other, _ in sweeps if other != name]
            lines.setdefault(tuple(others), []).append(row)
        points = max(lines.values(), key=lambda group: len({row[name] for row in group}))
        points = sorted(points, key=lambda row: row[name])
        x, y = [row[name] for row in points], [row["tokens_per_second"] for row in points]
        fitted = [r["batch_size"] * r["seq_len"] / (coefficients @ features(r)) for r in points]
        axes.plot(x, fitted, color="#c8553d", linewidth=1.2, label="fit")
        axes.plot(x, y, color="#3b6ea5", marker="o", linestyle="", label="measured")
        held = points[0]
        fixed = {
            "parameters": f"{held['batch_size']} × {held['seq_len']} tokens",
            "seq_len": f"{held['parameters'] / 1e6:.1f}M, {held['batch_size']} row{'s' * (held['batch_size'] > 1)}",
            "batch_size": f"{held['parameters'] / 1e6:.1f}M, rows of {held['seq_len']}",
        }[name]
        axes.set(xscale="log", yscale="log", xlabel=label, title=fixed)
        axes.set_xticks(x, [f"{v / 1e6:.0f}M" if v >= 1e6 else f"{v:,}" for v in x])
        axes.minorticks_off()
        low, high = min(y + fitted), max(y + fitted)
        ticks = [t * 10**e for e in range(0, 9) for t in (1, 2, 5) if low / 1.5 <= t * 10**e <= high * 1.5]
        axes.set_yticks(ticks, [f"{t:,}" for t in ticks])
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylabel("tokens per second")
    panels[0].legend(frameon=False)
    figure_.tight_layout()
    with atomic_open(path) as f:
        figure_.savefig(f, format="png")
    plt.close(figure_)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Table, fit and picture of measured training speed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    positive = number(float, 0, excluded=True)
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of scripts/bench_train.py")
    parser.add_argument("--png", type=Path, help="draw the picture here, for example images/scaling.png")
    parser.add_argument("--price", type=positive, help="of the machine per hour, in any currency")
    parser.add_argument("--tokens", type=positive, default=1e9, help="of the run that is estimated for other cards")
    args = parser.parse_args()
    rows = read_rows(args.files)
    if len(rows) <= len(TERMS):
        raise UserError(f"{len(rows)} settings are too few for a fit of {len(TERMS)} terms; measure more of them.")
    coefficients = fit(rows)
    print(table(rows, coefficients, args.price), explain(coefficients), estimates(rows, args.tokens), sep="\n\n")
    if args.png:
        draw(rows, coefficients, args.png)
        print(f"\npicture: {args.png}")


if __name__ == "__main__":
    run_script(main)
