"""The training page: runs below out/, their curves side by side, the answers they drew, their settings; live.

Reading order: the page → choosing → what refreshes itself: how the runs stand, curves, samples, settings.

中文：训练面板：列出 out/ 下的训练，比较曲线、样本与设置，训练进行时自动刷新。
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
import streamlit as st

from scripts.chat_text import split_thinking
from scripts.web.charts import spec
from scripts.web.options import Options
from scripts.web.runs import SHARES, Run, Runs, Standing, duration, figures, rows, standing
from scripts.web.safe_text import safe_markdown, visible
from scripts.web.texts import figure_title, text

REFRESH_SECONDS = 3.0
MOST_SAMPLES = 200  # rows of the table, of one update


@dataclass(frozen=True)
class View:
    """How the curves are drawn. axis: step, tokens or hours; smoothing: 0 (off) to below 1."""

    axis: str = "step"
    smoothing: float = 0.0
    log: bool = False


def show(options: Options, language: str) -> None:
    """The whole page."""
    say, runs = partial(text, language), all_runs(options.out_dir)
    found = runs.find()
    with st.sidebar:
        live = st.toggle(say("live"), True, key="live")
        view = choose_view(say)
    refreshed = partial(st.fragment, run_every=REFRESH_SECONDS if live else None)
    if not found:
        refreshed(show_no_runs)(runs, options, say)
        return
    chosen = choose_runs(found, say)
    if not chosen:
        st.info(say("choose_runs"))
        return
    refreshed(show_runs)(runs, set(found), chosen, view, language)


@st.cache_resource
def all_runs(out_dir) -> Runs:
    return Runs(out_dir)


def show_no_runs(runs: Runs, options: Options, say) -> None:
    """What to do; looks again by itself."""
    if runs.find():
        st.rerun()
    st.header(say("no_runs_title"))
    st.text(say("no_runs", folder=options.out_dir))
    st.code("python trainer/train_pretrain.py", language="bash")


# --- Choosing ---------------------------------------------------------------------------------------------------------


def choose_view(say) -> View:
    axis = st.segmented_control(
        say("x_axis"), ["step", "tokens", "hours"], default="step", key="x_axis", required=True,
        format_func=lambda name: say(f"x_{name}"),
    )  # fmt: skip
    smoothing = st.slider(say("smoothing"), 0.0, 0.98, 0.0, 0.02, key="smoothing", help=say("smoothing_help"))
    return View(axis or "step", smoothing, st.toggle(say("log_scale"), key="log_scale"))


def choose_runs(found: dict[str, Run], say) -> list[Run]:
    """The runs to draw, at first the newest one; the choice outlives a visit of the other page."""
    before = [name for name in st.session_state.get("chosen_runs", []) if name in found]
    names = st.multiselect(say("runs"), list(found), default=before or [next(iter(found))], key="runs")
    st.session_state["chosen_runs"] = names
    return [found[name] for name in names if name in found]


# --- What refreshes itself --------------------------------------------------------------------------------------------


def show_runs(runs: Runs, known: set[str], chosen: Sequence[Run], view: View, language: str) -> None:
    """Everything below the choice. A run that is new or gone refreshes the whole page."""
    say = partial(text, language)
    if set(runs.find()) != known:
        st.rerun()
    now = time.time()
    standings = {run.name: standing(run, now) for run in chosen}
    if len(chosen) == 1:
        show_standing(standings[chosen[0].name], say)
    else:
        show_table(standings, say)
    curves, samples, details = st.tabs([say("curves"), say("samples"), say("details")])
    with curves:
        show_curves(chosen, view, language)
    with samples:
        show_samples(chosen, say)
    with details:
        show_details(chosen, say)


def steps(stands: Standing) -> str:
    return f"{stands.step:,} / {stands.total:,}" if stands.total else f"{stands.step:,}"


def show_standing(stands: Standing, say) -> None:
    """The newest figures of one run as tiles."""
    tiles = [
        (say("state"), say(f"state_{stands.state}")),
        (say("progress"), steps(stands)),
        (say("loss_short"), decimals(stands.loss)),
        (say("val_loss_short"), decimals(stands.val_loss)),
        (say("bpb_short"), decimals(stands.bpb)),
        (say("speed_short"), "" if stands.tokens_per_second is None else f"{stands.tokens_per_second:,.0f}"),
        (say("eta"), duration(stands.eta)) if stands.eta else (say("elapsed"), duration(stands.elapsed)),
    ]
    with st.container(horizontal=True, gap="small"):
        for label, value in tiles:
            if value:
                st.metric(label, value, width="content")


def decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def show_table(standings: dict[str, Standing], say) -> None:
    """The newest figures of several runs, a row each."""
    table = pd.DataFrame(
        {
            say("run"): name,
            say("state"): say(f"state_{stands.state}"),
            say("progress"): steps(stands),
            say("loss_short"): stands.loss,
            say("val_loss_short"): stands.val_loss,
            say("bpb_short"): stands.bpb,
            say("speed_short"): stands.tokens_per_second,
            say("eta"): duration(stands.eta),
            say("elapsed"): duration(stands.elapsed),
            say("size"): stands.size,
        }
        for name, stands in standings.items()
    )
    formats = {say(key): "%.4f" for key in ("loss_short", "val_loss_short", "bpb_short")} | {say("speed_short"): "%d"}
    columns = {name: st.column_config.NumberColumn(format=form) for name, form in formats.items()}
    st.dataframe(table, hide_index=True, column_config=columns, key="standings", placeholder="–")


def show_curves(chosen: Sequence[Run], view: View, language: str) -> None:
    """A chart for each figure that any of the runs has, two beside each other where there is room."""
    say = partial(text, language)
    records = {run.name: run.metrics.read() for run in chosen}
    names = figures(list(records.values()))
    if not names:
        st.info(say("no_records"))
        return
    parts = {"training": say("training_part"), "held_out": say("held_out_part")}
    of_answers = bool({"reward", "margin"} & set(names))  # the loss is none per token there
    for i, name in enumerate(names):
        if i % 2 == 0:  # row by row: on a phone the charts keep their order
            columns = st.columns(2, gap="medium")
        found = [row for run, lines in records.items() for row in rows(run, lines, name, view.axis, view.smoothing)]
        log = view.log and "loss" in name and all(row["value"] > 0 and row["raw"] > 0 for row in found)
        chart = spec(
            say(f"x_{view.axis}"), parts, list(records), say("run"),
            log=log, share=name in SHARES, faint=view.smoothing > 0,
        )  # fmt: skip
        with columns[i % 2]:
            title = say("figure_loss_answers") if name == "loss" and of_answers else figure_title(language, name)
            st.markdown(f"**{safe_markdown(title)}**")
            st.vega_lite_chart(pd.DataFrame(found), chart, key=f"chart_{name}", width="stretch")


def show_samples(chosen: Sequence[Run], say) -> None:
    """Answers drawn in training (GRPO, PPO), update by update: as a table, and one to read. All of it as plain text."""
    records = {run.name: samples for run in chosen if (samples := run.samples.read())}
    if not records:
        st.info(say("no_samples"))
        return
    name = next(iter(records))
    if len(records) > 1:
        name = st.selectbox(say("run"), list(records), key="samples_run", required=True)
    updates = sorted({record["step"] for record in records[name]})
    step = updates[-1]
    if len(updates) > 1:
        step = st.select_slider(say("samples_update"), updates, updates[-1], key=f"samples_step_{name}")
    found = [record for record in records[name] if record["step"] == step][:MOST_SAMPLES]
    shown = {"question": say("sample_question"), "reply": say("sample_reply"), "truth": say("sample_truth")}
    table = pd.DataFrame(
        {
            **{title: visible(str(record.get(key, ""))) for key, title in shown.items()},
            **{key: value for key, value in record.items() if key not in shown and isinstance(value, float)},
        }
        for record in found
    )
    texts = {title: st.column_config.TextColumn(width="medium") for title in shown.values()}
    st.dataframe(table, hide_index=True, column_config=texts, key="samples_table")
    for i, record in enumerate(found[:4]):
        thought, reply = split_thinking(visible(str(record.get("reply", ""))))
        with st.container(border=True, key=f"sample_{i}"):
            st.text(visible(str(record.get("question", ""))))
            if thought:
                with st.expander(say("thought"), icon=":material/psychology:", key=f"sample_thought_{i}"):
                    st.text(thought)
            st.text(reply.replace("<answer>", "").replace("</answer>", "").strip())
            st.caption(figures_of(record, shown))


def figures_of(record: dict, others: dict) -> str:
    numbers = {key: value for key, value in record.items() if key not in others and isinstance(value, float)}
    return " · ".join(f"{key} {value:g}" for key, value in numbers.items())


def show_details(chosen: Sequence[Run], say) -> None:
    """Flags and configuration of the runs, side by side."""
    facts = {run.name: {**run.facts().get("config", {}), **run.facts().get("args", {})} for run in chosen}
    names = sorted({key for values in facts.values() for key in values})
    if not names:
        st.info(say("no_details"))
        return
    table = pd.DataFrame({run: [plain(values.get(name)) for name in names] for run, values in facts.items()})
    table.insert(0, say("setting"), names)
    if len(chosen) > 1 and st.toggle(say("only_differences"), True, key="only_differences"):
        table = table[table.iloc[:, 1:].nunique(axis=1) > 1]
    st.dataframe(table, hide_index=True, key="settings_table", height="content")


def plain(value: object) -> str:
    return "" if value is None else visible(str(value))
