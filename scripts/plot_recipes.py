"""Training recipes in one picture: the held-out figure over the seconds of training, from scripts/bench_recipe.py.

    python scripts/plot_recipes.py scripts/bench/results/recipe_pretrain_cpu.json
    python scripts/plot_recipes.py recipe.json seeds.json --png images/time_to_quality.png
    python scripts/plot_recipes.py recipe.json --recipes reference ours --png two.png

Prints the table over all files and how many times faster each recipe is where the better reference ends. A line is the
mean over seeds, the band behind it their spread.

中文：把不同训练配方的验证指标按训练秒数画在一张图里，并给出达到参考配方终点所需的时间。
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from model.files import atomic_open
from scripts.bench_recipe import METRIC, REFERENCES, table, verdicts
from trainer.command_line import UserError, run_script

LABELS = {"val_bpb": "held-out bits per byte", "val_loss": "held-out loss, nats per trained token"}


def read_results(paths: list[Path]) -> tuple[str, list[dict]]:
    """The stage and all runs of these files.  Raises: UserError on anything that is no such report, or a mixture."""
    kinds, results = set(), {}
    for path in paths:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            stage = report["stage"]
            kinds.add((stage, report["file"], report["device"], report["threads"]))
            for run in report["results"]:
                run["updates"], run["tokens_per_second"], run["curve"][-1][METRIC[stage]]  # must be there
                results[run["recipe"], run["budget_seconds"], run["seed"]] = run
        except FileNotFoundError:
            raise UserError(f"{path}: there is no such file; make one with scripts/bench_recipe.py --json.") from None
        except (ValueError, KeyError, IndexError, TypeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: no report of bench_recipe.py ({type(error).__name__}: {error}).") from None
    if len(kinds) != 1 or not results:
        raise UserError(f"these files mix stages, data or machines, or hold no run: {sorted(kinds)}.")
    return kinds.pop()[0], list(results.values())


def draw(results: list[dict], name: str, path: Path) -> None:
    """Writes the picture; seconds on a logarithmic axis, as the reference runs several times longer."""
    import matplotlib

    matplotlib.use("Agg")  # a picture file, no window
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(figsize=(8, 4.6), dpi=120)
    colours = plt.get_cmap("tab10")
    ends = []
    for i, kind in enumerate(dict.fromkeys((run["recipe"], run["budget_seconds"]) for run in results)):
        recipe = kind[0]
        curves = [run["curve"] for run in results if (run["recipe"], run["budget_seconds"]) == kind]
        points = min(map(len, curves))
        seconds = np.mean([[point["seconds"] for point in curve[:points]] for curve in curves], axis=0)
        values = np.array([[point[name] for point in curve[:points]] for curve in curves])  # (seeds, points)
        slow = recipe in REFERENCES
        label = recipe + (f" ({len(curves)} seeds)" if len(curves) > 1 else "")
        line = {"color": "black" if recipe == "reference" else colours(i % 10), "linestyle": "--" if slow else "-"}
        axes.plot(seconds, values.mean(0), marker="o", markersize=3, linewidth=1.4, label=label, **line)
        axes.fill_between(seconds, values.min(0), values.max(0), color=line["color"], alpha=0.15, linewidth=0)
        ends += [values.mean(0)[-1]] if slow else []
    if ends:
        axes.axhline(min(ends), color="black", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="seconds of training", ylabel=LABELS[name])
    low, high = axes.get_xlim()
    ticks = [t for t in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 3600, 7200, 36000) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    picture.tight_layout()
    with atomic_open(path) as f:
        picture.savefig(f, format="png")
    plt.close(picture)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Table and picture of training recipes.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of scripts/bench_recipe.py")
    parser.add_argument("--recipes", nargs="+", help="only these, for example reference ours; default all")
    parser.add_argument("--png", type=Path, help="draw the picture here, for example images/time_to_quality.png")
    args = parser.parse_args()
    stage, results = read_results(args.files)
    if args.recipes:
        results = [run for run in results if run["recipe"] in args.recipes]
        if missing := set(args.recipes) - {run["recipe"] for run in results}:
            raise UserError(f"these files hold no run of {', '.join(sorted(missing))}.")
    print(table(results, METRIC[stage]), *verdicts(results, METRIC[stage]), sep="\n")
    if args.png:
        draw(results, METRIC[stage], args.png)
        print(f"picture: {args.png}")


if __name__ == "__main__":
    run_script(main)
