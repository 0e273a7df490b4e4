"""The figures of several checkpoints side by side: a table, the JSON they are kept in, and pictures.

`eval.json` holds `{"checkpoints": [...]}`, each with its name and what was measured: text, choice, questions, free,
long_context; scripts/evaluating says what stands in each. Earlier files can be put beside new figures.

中文：把多个检查点的结果并排成表格、JSON 和图片。
"""

import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from model.files import atomic_open
from scripts.evaluating.long_context import WAYS
from scripts.evaluating.multiple_choice import MEASURES
from trainer.command_line import UserError

Row = tuple[str, str]  # what is measured, and the figure in words
COLOURS = ("#3b6ea5", "#c8553d", "#6a994e", "#8e6c8a", "#d4a373", "#5c7c8a")
INK = "#222222"
MEASURE_NAMES = {"letter": "by letter", "acc": "by text, acc", "acc_norm": "by text, acc_norm",
                 "acc_bytes": "by text, acc_bytes"}  # fmt: skip
DRAWN = ("letter", "acc_norm")


# --- Table ------------------------------------------------------------------------------------------------------------


def with_interval(figure: dict) -> str:
    low, high = figure["interval95"]
    return f"{figure['accuracy']:.1%} ({low:.1%}–{high:.1%})"


def plain(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def text_rows(text: dict) -> list[Row]:
    def cell(figure: dict) -> str:
        low, high = figure["interval95"] or (None, None)
        half = "" if low is None else f" ± {(high - low) / 2:.3f}"
        return f"{figure['bits_per_byte']:.3f}{half} (ppl {figure['perplexity']:.2f})"

    languages = [
        (f"bits per byte, {source}, {language}", cell(figure))
        for source, by_language in text["by_source"].items()
        for language, figure in by_language.items()
    ]
    return [*languages, ("bits per byte, all", cell(text))] if len(languages) > 1 else languages


def choice_rows(name: str, result: dict) -> list[Row]:
    shots = f"{result['shots']} shots"
    guess = result["baselines"]
    rows = [(f"{name}: random / majority", f"{guess['random']:.1%} / {guess['majority']:.1%}")]
    rows += [(f"{name}, {shots}, {MEASURE_NAMES[m]}", with_interval(result[m])) for m in MEASURES if m in result]
    return rows


def written_rows(name: str, result: dict) -> list[Row]:
    distinct = " / ".join(plain(result[f"distinct_{n}"], 2) for n in (1, 2, 3))
    return [
        (f"{name}: ended by themselves / repetition", f"{result['ended']:.1%} / {result['repetition']:.1%}"),
        (f"{name}: distinct 1 / 2 / 3, tokens", f"{distinct}, {result['mean_tokens']:.1f}"),
    ]


def question_rows(name: str, result: dict) -> list[Row]:
    by_language = [(f"{name}, {lang}: right", with_interval(figure)) for lang, figure in result["by_lang"].items()]
    by_language = by_language if len(by_language) > 1 else []
    return [(f"{name}: right", with_interval(result)), *by_language, *written_rows(name, result["written"])]


def long_rows(result: dict) -> list[Row]:
    ends = "nats per token up to " + " / ".join(span.partition("-")[2] for span in result["octaves"]["none"])
    rows = [(f"{ends}, {way}", " / ".join(map(plain, result["octaves"][way].values()))) for way in WAYS]
    fixed = [plain(result["fixed_8"][way]) for way in WAYS[1:]]
    return [*rows, (f"the first {result['trained']} at factor 8: {', '.join(WAYS[1:])}", " / ".join(fixed))]


def rows_of(checkpoint: dict) -> list[Row]:
    """Every figure of a checkpoint, in reading order."""
    rows = text_rows(checkpoint["text"]) if "text" in checkpoint else []
    for name, result in checkpoint.get("choice", {}).items():
        rows += choice_rows(name, result)
    for name, result in checkpoint.get("questions", {}).items():
        rows += question_rows(name, result)
    rows += written_rows("free answers", checkpoint["free"]) if "free" in checkpoint else []
    return rows + (long_rows(checkpoint["long_context"]) if "long_context" in checkpoint else [])


def subject_rows(checkpoint: dict) -> list[Row]:
    """The measures that are drawn; eval.json holds all of them."""
    rows = []
    for name, result in checkpoint.get("choice", {}).items():
        for subject, figures in result["by_subject"].items():
            label = f"{name}, {subject} ({figures['questions']}; majority {figures['baselines']['majority']:.1%})"
            found = [f"{MEASURE_NAMES[m]} {with_interval(figures[m])}" for m in DRAWN if m in figures]
            rows.append((label, "; ".join(found)))
    return rows


def kind_rows(checkpoint: dict) -> list[Row]:
    return [
        (f"{name}, {kind}, {lang}", f"{with_interval(figure)} of {figure['total']}")
        for name, result in checkpoint.get("questions", {}).items()
        for kind, by_lang in result["by_kind"].items()
        for lang, figure in by_lang.items()
    ]


def merged(checkpoints: Sequence[dict], rows: Callable[[dict], list[Row]]) -> list[list[str]]:
    """[what, figure of each checkpoint …], in the order in which the checkpoints first name them."""
    columns = [dict(rows(checkpoint)) for checkpoint in checkpoints]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return [[name, *(column.get(name, "–") for column in columns)] for name in names]


def width(text: str) -> int:
    """Columns on a terminal: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def text_table(checkpoints: Sequence[dict]) -> str:
    """The figures in aligned columns."""
    table = [["", *(c["name"] for c in checkpoints)], *merged(checkpoints, rows_of)]
    widths = [max(width(row[i]) for row in table) + 2 for i in range(len(table[0]))]
    lines = (
        "".join(cell + " " * (w - width(cell)) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table
    )
    return "\n".join(lines)


def markdown(checkpoints: Sequence[dict]) -> str:
    """All tables: the figures, then multiple choice by subject and questions by kind."""
    names = [c["name"] for c in checkpoints]
    parts = []
    for title, rows in (("Figures", rows_of), ("By subject", subject_rows), ("By kind", kind_rows)):
        found = merged(checkpoints, rows)
        if found:
            lines = [["", *names], ["---"] * (len(names) + 1), *found]
            cells = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
            parts.append(f"## {title}\n\n" + "\n".join(cells))
    return "\n\n".join(parts) + "\n"


# --- Files ------------------------------------------------------------------------------------------------------------


def read_results(path: Path) -> list[dict]:
    """The checkpoints of an earlier `eval.json`.  Raises: UserError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["checkpoints"]
        for checkpoint in found:
            checkpoint["name"] + ""
            rows_of(checkpoint), subject_rows(checkpoint), kind_rows(checkpoint)  # whatever is missing shows now
    except OSError as error:
        raise UserError(
            f"--beside {path} cannot be read ({error.strerror}); name an eval.json of this script."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        kind = type(error).__name__
        raise UserError(f"--beside {path}: no eval.json of this script ({kind}: {error}).") from None
    return found


def name_all(checkpoints: Sequence[dict]) -> None:
    """Makes the names different: two of one name get the folder in front, and a number if that does not tell either."""
    for tell in (lambda c, n: f"{Path(c['path']).parent.name}/{c['name']}", lambda c, n: f"{c['name']} ({n})"):
        count: dict[str, int] = {}
        for checkpoint in checkpoints:
            count[checkpoint["name"]] = count.get(checkpoint["name"], 0) + 1
        for number, checkpoint in enumerate(checkpoints, start=1):
            if count[checkpoint["name"]] > 1:
                checkpoint["name"] = tell(checkpoint, number)


def write_results(checkpoints: Sequence[dict], folder: Path) -> None:
    """Writes eval.json.  Raises: OSError."""
    with atomic_open(folder / "eval.json", "w") as f:
        json.dump({"checkpoints": list(checkpoints)}, f, ensure_ascii=False, indent=1)


def write_report(checkpoints: Sequence[dict], folder: Path) -> list[Path]:
    """Writes eval.json, eval.md and the pictures there is something for.  Returns: their paths.  Raises: OSError."""
    write_results(checkpoints, folder)
    with atomic_open(folder / "eval.md", "w") as f:
        f.write(markdown(checkpoints))
    paths = [folder / "eval.json", folder / "eval.md"]
    plt = pyplot()
    if plt is None:
        print("no pictures: pip install matplotlib")
        return paths
    for name, draw in (("eval.png", draw_bars), ("long_context.png", draw_long_context)):
        figure = draw(plt, checkpoints)
        if figure is not None:
            with atomic_open(folder / name) as f:
                figure.savefig(f, format="png")
            plt.close(figure)
            paths.append(folder / name)
    return paths


# --- Pictures ---------------------------------------------------------------------------------------------------------


def pyplot() -> Any | None:
    """matplotlib, with a font for Chinese where the machine has one; None when it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")  # a picture file, no window
    import matplotlib.pyplot as plt
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    chinese = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Microsoft YaHei", "PingFang SC", "WenQuanYi Zen Hei")
    plt.rcParams["font.family"] = ["DejaVu Sans", *(name for name in chinese if name in known)]
    plt.rcParams["text.parse_math"] = False  # a $ in a file's name is a $
    return plt


Bar = tuple[str, float, Sequence[float] | None, float | None]  # label, value, interval, guess


def bars_of(checkpoint: dict) -> dict[str, list[Bar]]:
    """The bars of each panel."""
    panels: dict[str, list[Bar]] = {"bits per byte, less is better": [], "right answers, %": []}
    for source, by_language in checkpoint.get("text", {}).get("by_source", {}).items():
        for language, figure in by_language.items():
            panels["bits per byte, less is better"].append(
                (f"{source}\n{language}", figure["bits_per_byte"], figure["interval95"], None)
            )
    right = panels["right answers, %"]
    for name, result in checkpoint.get("choice", {}).items():
        guess = 100 * result["baselines"]["random"]
        right += [(f"{name}\n{MEASURE_NAMES[m]}", *in_percent(result[m]), guess) for m in DRAWN if m in result]
    for name, result in checkpoint.get("questions", {}).items():
        right.append((f"{name}\nanswered", *in_percent(result), None))
    return {title: bars for title, bars in panels.items() if bars}


def in_percent(figure: dict) -> tuple[float, list[float]]:
    return 100 * figure["accuracy"], [100 * end for end in figure["interval95"]]


def colours_of(plt: Any, count: int) -> list:
    """A colour for each checkpoint, no two the same."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [plt.get_cmap("turbo")(0.1 + 0.8 * i / count) for i in range(count)]  # its ends are near black


def draw_panel(
    panel: Any, title: str, checkpoints: Sequence[dict], found: Sequence[dict[str, list[Bar]]], colours: list
) -> None:
    """One group of bars for each label, a bar for each checkpoint that has the figure.  Args: found as `bars_of`."""
    labels = list(dict.fromkeys(bar[0] for panels in found for bar in panels.get(title, [])))
    size = 0.8 / len(checkpoints)
    for number, (panels, colour) in enumerate(zip(found, colours, strict=True)):
        for label, value, interval, guess in panels.get(title, []):
            y = labels.index(label) + (number + 0.5) * size - 0.4
            panel.barh(y, value, height=size * 0.92, color=colour)
            if interval:
                panel.plot(interval, [y, y], color=INK, linewidth=1)
            if guess is not None:
                panel.plot([guess, guess], [y - size / 2, y + size / 2], color=INK, linewidth=1.2, ls=":")
            panel.text(max([value, *(interval or [])]), y, f" {value:.3g}", va="center", fontsize=7)
    panel.set_yticks(range(len(labels)), labels, fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.set_xlim(left=0)
    panel.set_title(title, fontsize=10)
    tidy(panel)


def draw_bars(plt: Any, checkpoints: Sequence[dict]) -> Any | None:
    """Grouped bars, a colour for each checkpoint, 95 % intervals, a mark where guessing is; None without figures."""
    found = [bars_of(checkpoint) for checkpoint in checkpoints]
    titles = list(dict.fromkeys(title for panels in found for title in panels))
    if not titles:
        return None
    colours = colours_of(plt, len(checkpoints))
    groups = max(len({bar[0] for panels in found for bar in panels.get(title, [])}) for title in titles)
    columns = min(len(checkpoints) + 1, 2 * len(titles))  # of the legend: names may be long
    lines = -(-(len(checkpoints) + 1) // columns)
    height = max(groups * (0.24 * len(checkpoints) + 0.22) + 1.0, 2.7) + 0.25 * lines
    figure, axes = plt.subplots(1, len(titles), figsize=(5.6 * len(titles), height), dpi=120, squeeze=False)
    for panel, title in zip(axes[0], titles, strict=True):
        draw_panel(panel, title, checkpoints, found, colours)
    # Made by hand: a panel knows the colours of those checkpoints only that have a bar in it.
    keys = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    names = [checkpoint["name"] for checkpoint in checkpoints]
    if any(bar[3] is not None for panels in found for bars in panels.values() for bar in bars):
        keys.append(plt.Line2D([], [], color=INK, linewidth=1.2, ls=":"))
        names.append("guessing")
    figure.legend(keys, names, frameon=False, fontsize=8, loc="lower center", ncols=columns)
    figure.tight_layout(rect=(0, 0.25 * lines / height, 1, 1))  # the legend below, where no bar can be under it
    return figure


def draw_long_context(plt: Any, checkpoints: Sequence[dict]) -> Any | None:
    """Loss over position, a panel for each checkpoint, a line for each way of stretching; None without figures."""
    measured = [c for c in checkpoints if "long_context" in c]
    if not measured:
        return None
    columns = min(len(measured), 3)
    rows = -(-len(measured) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.6 * columns, 4 * rows), dpi=120, squeeze=False)
    for panel in axes.flat[len(measured) :]:
        panel.set_visible(False)
    for panel, checkpoint in zip(axes.flat, measured, strict=False):
        result = checkpoint["long_context"]
        trained, ends = result["trained"], result["positions"]
        middles = [(a + z) / 2 for a, z in zip([0, *ends], ends, strict=False)]
        for way, colour in zip(WAYS, COLOURS, strict=False):
            style = {"linewidth": 2.4, "alpha": 0.55} if way == "none" else {"linewidth": 1.2}
            panel.plot(middles, result["curves"][way], color=colour, label=way, **style)
        panel.axvline(trained, color=INK, linewidth=0.8, ls=":")
        panel.set_xscale("log", base=2)
        ticks = [trained // 2, *(trained * factor for factor in (1, 2, 4, 8))]
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.set(xlabel=f"position (trained up to {trained})", ylabel="nats per token")
        panel.set_title(checkpoint["name"], fontsize=10)
        panel.legend(frameon=False, fontsize=8)
        panel.grid(alpha=0.3)
        tidy(panel)
    figure.tight_layout()
    return figure


def tidy(panel: Any) -> None:
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
