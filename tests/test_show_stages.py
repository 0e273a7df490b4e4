"""The script that repeats the stages: what it counts and which records the half-taught model sees."""

import json

import pytest

from scripts import show_stages


def test_half_of_the_sums_and_every_sorting_are_learnt(tmp_path):
    path = show_stages.half_learnt(tmp_path / "new")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    answers = [row["conversations"][-1]["content"].split("<answer>\n")[1].split("\n")[0] for row in rows]
    sums = [answer for answer in answers if answer.lstrip("-").isdigit()]
    source = show_stages.DEMO["reason"].read_text(encoding="utf-8").splitlines()
    of_source = [json.loads(line)["conversations"][-1]["content"].split("<answer>\n")[1] for line in source]
    assert len(sums) == 600 and len(answers) - 600 == sum("、" in a or "," in a for a in of_source)
    assert len({json.dumps(row) for row in rows} - {json.dumps(json.loads(line)) for line in source}) == 0


def test_three_answers_in_ten_are_swapped_and_nothing_else(tmp_path):
    rows, source = (show_stages.read_records(p) for p in (show_stages.partly_wrong(tmp_path), show_stages.DEMO["sft"]))
    turns, whole = ([turn for row in part for turn in row["conversations"]] for part in (rows, source))
    assert len(rows) == len(source) and [t["role"] for t in turns] == [t["role"] for t in whole]
    assert all(a == b for a, b in zip(turns, whole, strict=True) if a["role"] != "assistant")
    pairs = [(a["content"], b["content"]) for a, b in zip(turns, whole, strict=True) if a["role"] == "assistant"]
    assert sum(a != b for a, b in pairs) / len(pairs) == pytest.approx(0.3, abs=0.02)  # some drew themselves
    assert {a for a, _ in pairs} <= {b for _, b in pairs}


def test_shares_and_their_table():
    rows = [{"right": True}] * 3 + [{"right": False}]
    figure = show_stages.share(rows)
    assert figure["share"] == 0.75 and figure["total"] == 4
    assert figure["interval95"] == pytest.approx((0.3006, 0.9544), abs=1e-3)  # Wilson, by hand
    assert "| dpo | held-out pairs | 75.0% (30.1% to 95.4% of 4) |" in show_stages.table(
        {"dpo": {"held-out_pairs": figure}}
    )
