"""Curves as Vega-Lite specifications. A specification holds no data: it stays the same while a run goes on, and the
browser only takes in the new points.

中文：曲线图的 Vega-Lite 描述，不含数据，训练进行时浏览器只需更新数据点。
"""

from collections.abc import Sequence


def spec(
    x_title: str, parts: dict[str, str], runs: Sequence[str], run_title: str, *, log: bool, share: bool, faint: bool
) -> dict:
    """A chart of rows as `runs.rows` gives them, one colour a run, in the order of `runs`.

    Args: parts: training and held_out in the reader's language; log: logarithmic; share: per cent; faint: with the raw
    values behind the smooth ones.
    """
    y = {
        "type": "quantitative",
        "axis": {"title": None, "format": ".4~%" if share else ",.4~r"},
        "scale": {"type": "log", "nice": False} if log else {"zero": False, "nice": True},
    }
    axis = {"title": x_title, "format": "~s", "tickCount": 6, "titlePadding": 4}
    x = {"field": "x", "type": "quantitative", "axis": axis, "scale": {"nice": False, "zero": False}}
    several = len(runs) > 1
    legend = {"title": None, "orient": "top", "columns": 3, "labelLimit": 150, "offset": 2, "padding": 0,
              "rowPadding": 0, "symbolSize": 60}  # fmt: skip
    colour = {
        "field": "run",
        "type": "nominal",
        "scale": {"domain": list(runs)},
        "legend": legend if several else None,
    }
    tooltip = [
        {"field": "run", "type": "nominal", "title": run_title},
        {"field": "said", "type": "nominal", "title": " "},
        {"field": "x", "type": "quantitative", "title": x_title, "format": ",.4~r"},
        {"field": "raw", "type": "quantitative", "title": "=", "format": ".1%" if share else ",.4~r"},
    ]
    named = " : ".join(f"datum.part == '{part}' ? {said!r}" for part, said in parts.items()) + " : ''"
    base = {"x": x, "color": colour, "detail": {"field": "run"}}
    training, held_out = ({"filter": f"datum.part == '{part}'"} for part in ("training", "held_out"))
    layers = []
    if faint:
        layers.append({
            "transform": [training],
            "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.25},
            "encoding": {**base, "y": {**y, "field": "raw"}},
        })  # fmt: skip
    layers += [
        {
            "transform": [training],
            "mark": {"type": "line", "strokeWidth": 1.8},
            "encoding": {**base, "y": {**y, "field": "value"}},
        },
        {
            "transform": [held_out],
            "mark": {"type": "line", "strokeWidth": 1.5, "strokeDash": [4, 3],
                     "point": {"size": 36, "filled": True}},
            "encoding": {**base, "y": {**y, "field": "value"}},
        },
        {
            "mark": {"type": "point", "size": 90, "opacity": 0, "filled": True},  # something to point at
            "encoding": {**base, "y": {**y, "field": "value"}, "tooltip": tooltip},
        },
    ]  # fmt: skip
    return {
        "transform": [{"calculate": named, "as": "said"}],
        "layer": layers,
        "height": 240 + 30 * (-(-len(runs) // 3)) * several,
        "autosize": {"type": "fit", "contains": "padding"},
    }
