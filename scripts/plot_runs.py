"""Runs beside each other in one picture: `python scripts/plot_runs.py out/runs/pretrain_512 out/runs/full_sft_512`.

Reads the metrics.jsonl of run folders (all below out/ where none is named). Each figure gets a panel, each run a
colour; what was held out is drawn with dots.

    python scripts/plot_runs.py                                                    # all runs below out/
    python scripts/plot_runs.py out/runs/pretrain_512* --figures loss lr grad_norm --smooth 0.9
    python scripts/plot_runs.py a/runs/pretrain_256 b/runs/pretrain_256 --x tokens --png images/two_runs.png

中文：把多次训练画在同一张图里比较：损失、学习率、梯度范数、速度等。
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.files import atomic_open
from trainer.command_line import UserError, number, run_script
from trainer.run_log import read_metrics

AXES = {"step": "update", "tokens": "tokens seen", "hours": "hours of training"}


def find_runs(named: list[Path], out_dir: Path) -> dict[str, list[dict]]:
    """The records of each run by a name that tells them apart.  Raises: UserError where there is none."""
    folders = [Path(path) for path in named] or sorted(path.parent for path in out_dir.glob("runs/*/metrics.jsonl"))
    runs: dict[Path, list[dict]] = {}
    for folder in folders:
        path = folder if folder.is_file() else folder / "metrics.jsonl"
        if not path.is_file():
            raise UserError(f"{folder} holds no metrics.jsonl; name run folders such as out/runs/pretrain_512.")
        runs[path.parent.resolve()] = read_metrics(path)
    if not runs:
        raise UserError(f"no run below {out_dir}; train something, or name run folders.")
    if len({folder.name for folder in runs}) == len(runs):
        return {folder.name: records for folder, records in runs.items()}
    if len({folder.anchor for folder in runs}) > 1:  # on several drives of Windows
        return {str(folder): records for folder, records in runs.items()}
    above = os.path.commonpath(runs)  # a/runs/pretrain_512 and b/runs/pretrain_512
    return {os.path.relpath(folder, above): records for folder, records in runs.items()}


def points(records: list[dict], figure: str, x: str) -> list[tuple[float, float]]:
    """(x, value) of each record that has the figure. Hours are those of training, counted from the first line."""
    lines = [r for r in records if "time" in r]
    begun = lines[0]["time"] if lines else 0.0
    tokens, hours, found = 0, 0.0, []
    for record in records:  # a validation carries neither: it takes them from the line before
        tokens, hours = record.get("tokens", tokens), (record["time"] - begun) / 3600 if "time" in record else hours
        if record.get(figure) is not None:
            found.append(({"step": record["step"], "tokens": tokens, "hours": hours}[x], record[figure]))
    return found


def smoothed(values: list[float], weight: float) -> list[float]:
    """A running mean that forgets: m ← weight·m + (1 − weight)·value, divided by what its weights sum to so far."""
    mean, total, result = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        result.append(mean / total)
    return result


def draw(runs: dict[str, list[dict]], figures: list[str], x: str, smooth: float, path: Path) -> int:
    """Writes the picture.  Returns: the number of curves in it."""
    import matplotlib

    matplotlib.use("Agg")  # a picture file, no window
    import matplotlib.pyplot as plt

    rows = -(-len(figures) // 2)
    columns = min(2, len(figures))
    picture, axes = plt.subplots(rows, columns, figsize=(6.5 * columns, 3.9 * rows), dpi=120, squeeze=False)
    colours = plt.get_cmap("tab10")
    curves = 0
    for figure, panel in zip(figures, axes.flat, strict=False):
        for i, (name, records) in enumerate(runs.items()):
            colour = colours(i % 10)
            drawn = points(records, figure, x)
            if drawn:
                at, values = zip(*drawn, strict=True)
                panel.plot(at, smoothed(values, smooth), color=colour, linewidth=1.3, label=name)
                curves += 1
            held_out = points(records, f"val_{figure}", x)
            if held_out:
                panel.plot(*zip(*held_out, strict=True), "o--", color=colour, markersize=3.5, linewidth=0.8)
        panel.set(title=figure.replace("_", " "), xlabel=AXES[x])
        panel.grid(alpha=0.3)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    for panel in axes.flat[len(figures) :]:
        panel.set_visible(False)
    if not curves:
        raise UserError(f"none of these runs has {', '.join(figures)}.")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="lower center", ncols=min(4, len(labels)), frameon=False)
    picture.tight_layout(rect=(0, 0.06, 1, 1))
    with atomic_open(path) as f:
        picture.savefig(f, format="png")
    plt.close(picture)
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare runs in one picture.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="run folders; left out: all below --out_dir")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out", help="where runs are looked for")
    names = ["loss", "lr", "grad_norm", "tokens_per_second"]
    parser.add_argument("--figures", nargs="+", default=names, help="names in metrics.jsonl, one panel each")
    parser.add_argument("--x", choices=AXES, default="step", help="what the curves are drawn over")
    share = number(float, 0, high=1)
    parser.add_argument("--smooth", type=share, default=0.0, help="0: as logged; 0.9: a running mean of about ten")
    parser.add_argument("--png", type=Path, help="the picture; default runs.png in --out_dir")
    args = parser.parse_args()
    runs = find_runs(args.runs, args.out_dir)
    path = args.png or args.out_dir / "runs.png"
    curves = draw(runs, args.figures, args.x, args.smooth, path)
    print(f"{curves} curves of {len(runs)} runs: {path}")


if __name__ == "__main__":
    run_script(main)
