"""prepare_data on records of ours: dirt and duplicates go, mixtures have the shares that were asked for."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_prepare_data import chat, run, turns, write  # noqa: F401 (fixtures)

from dataset import record_formats
from scripts import bench_clean, prepare_data
from scripts.preparing import cleaning, mixing, near_duplicates
from trainer.command_line import UserError

# ruff: noqa: F811 (fixtures as arguments)


# ---- cleaning --------------------------------------------------------------------------------------------------------


def test_texts_are_cleaned():
    dirty = "\ufeffe\u0301t\u00e9\x00\u200b  \r\n\tcode  \r\n\r\n\r\n\r\nend\u2028line \u202e"
    assert cleaning.clean_text(dirty, "NFC") == "\u00e9t\u00e9\n\tcode\n\nend\nline"
    assert cleaning.clean_text("e\u0301，", "none") == "e\u0301，"
    assert cleaning.clean_text("ﬁ，", "NFKC") == "fi,"
    family = "👩\u200d👧 می\u200cخواهم"  # joiners belong to the letters
    assert cleaning.clean_text(family, "NFC") == family


def test_only_texts_of_a_record_are_cleaned(run, tmp_path):
    record = {
        "conversations": [
            {"role": "system", "content": "S \x07", "tools": json.dumps([{"name": "a\u200b  "}])},
            {"role": "user", "content": "q  "},
            {"role": "assistant", "content": "a\r\nb", "reasoning_content": "r\x00"},
        ],
        "id": "keep  ",
    }
    _, records, report, _ = run("clean", write(tmp_path / "a.jsonl", [record, chat("clean", "already")]))
    said = [turn["content"] for turn in records[0]["conversations"]]
    assert said == ["S", "q", "a\nb"] and records[0]["conversations"][2]["reasoning_content"] == "r"
    assert (
        records[0]["conversations"][0]["tools"] == record["conversations"][0]["tools"] and records[0]["id"] == "keep  "
    )
    assert report["records"] == {"read": 2, "written": 2, "changed": 1}


GOOD = "The tea house at the corner sells green tea from morning until late in the evening."


@pytest.mark.parametrize(
    ("text", "flags", "reason"),
    [
        ("short", [], "too short"),
        (GOOD, ["--max_chars", "60"], "too long"),
        ("=-=-=-=-=-=- #### $$$ %%% word", [], "symbols"),
        ("line one is here\n" * 5, [], "repeated lines"),
        ("街角的茶馆从早到晚卖绿茶和红茶，客人们坐在窗边慢慢地喝。", ["--languages", "en"], "language"),
        ("Чайная на углу продаёт зелёный чай с утра до позднего вечера", ["--languages", "zh", "en"], "language"),
    ],
)
def test_reasons_to_leave_a_text_out(text, flags, reason, run, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a green tea house, " + "tea " * 3}, {"text": text}])
    _, records, report, _ = run("clean", path, *flags)
    assert len(records) == 1 and report["left_out"] == {reason: 1}
    assert report["examples"][reason][0]["where"] == f"{path} line 2"
    loose = [
        "--min_chars",
        0,
        "--max_chars",
        0,
        "--max_symbols",
        1,
        "--max_repeated",
        1,
        "--languages",
        "zh",
        "en",
        "other",
    ]
    assert len(run("clean", path, *loose, "--overwrite")[1]) == 2


def test_an_answer_may_repeat_its_question(run, tmp_path):
    text = "a first line of some length\na second line of some length\n"
    _, records, _, _ = run("clean", write(tmp_path / "a.jsonl", [chat("Correct this: \n" + text, text)]))
    assert len(records) == 1


def test_a_record_that_cleaning_empties_goes(run, tmp_path):
    path = write(tmp_path / "a.jsonl", [chat("\u200b", "hello"), chat("q", "a")])
    status, records, report, _ = run("clean", path)
    assert (status, records, report["left_out"]) == (0, [chat("q", "a")], {"nothing left": 1})


def test_bad_records_stop_cleaning_too(run, tmp_path):
    path = write(tmp_path / "a.jsonl", [chat("q", "a"), {"conversations": []}])
    status, records, _, err = run("clean", path)
    assert status == 2 and records is None and err.startswith(f'error: {path} line 2: "conversations" has no turns')
    assert run("clean", path, "--skip_bad_records")[1] == [chat("q", "a")]


# ---- duplicates ------------------------------------------------------------------------------------------------------


def some_text(rng, chinese, length=120):
    if chinese:
        return "".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(length))
    return " ".join(
        "".join(rng.choice("abcdefghijklmnop") for _ in range(rng.randint(2, 9))) for _ in range(length // 4)
    )


def mutated(rng, text, n):
    """n characters replaced by others."""
    out = list(text)
    for i in rng.sample(range(len(out)), n):
        out[i] = "字" if out[i] > "\u3000" else "z"
    return "".join(out)


def naive_jaccard(a, b, length=5):
    sets = []
    for text in (a, b):
        letters = "".join(c for c in text.casefold() if c.isalnum())
        sets.append({letters[i : i + length] for i in range(max(1, len(letters) - length + 1))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_similarity_is_the_naive_one():
    rng = random.Random(1)
    for chinese in (False, True):
        for n in (0, 1, 3, 10, 40):
            a = some_text(rng, chinese)
            b = mutated(rng, a, n)
            found = near_duplicates.jaccard(near_duplicates.shingles(a, 5), near_duplicates.shingles(b, 5))
            assert found == pytest.approx(naive_jaccard(a, b), abs=1e-12)
    assert len(near_duplicates.shingles("ab", 5)) == 1 and len(near_duplicates.shingles("!?", 5)) == 1
    same = [near_duplicates.shingles(t, 5).tolist() for t in ("Tea, at FIVE o'clock!", "teaatfiveoclock")]
    assert same[0] == same[1]


def test_signatures_estimate_the_similarity():
    """The share of equal values is an unbiased estimate; over 40 pairs of 60 values its error is 3 standard ones."""
    rng = random.Random(6)
    near, errors = near_duplicates.NearDuplicates(0.8, 5, str), []
    for i in range(40):
        a = some_text(rng, bool(i % 2))
        b = mutated(rng, a, i % 12)
        shingles = [near_duplicates.shingles(text, 5) for text in (a, b)]
        signatures = [near.signature(s) for s in shingles]
        errors.append(signatures[0].jaccard(signatures[1]) - near_duplicates.jaccard(*shingles))
    assert abs(np.mean(errors)) < 3 * 0.5 / np.sqrt(60 * 40) and np.std(errors) < 0.1


@pytest.mark.parametrize("chinese", [False, True])
def test_near_duplicates_are_those_of_the_naive_search(chinese):
    """No pair below the threshold is taken; of those above it almost all are found (bands: 95 % at 0.8, more above)."""
    rng = random.Random(2)
    texts = [some_text(rng, chinese) for _ in range(40)]
    texts += [mutated(rng, rng.choice(texts[:40]), rng.choice([0, 1, 2, 3, 6, 10])) for _ in range(120)]
    kept, wrong, missed, right = [], 0, 0, 0
    near = near_duplicates.NearDuplicates(0.8, 5, lambda key: kept[key])
    for text in texts:
        best = max((naive_jaccard(text, other) for other in kept), default=0)
        if found := near.find_or_add(len(kept), text):
            right += 1
            wrong += found[1] < 0.8 or found[1] != pytest.approx(naive_jaccard(text, kept[found[0]]))
        else:
            missed += best >= 0.8
            kept.append(text)
    assert wrong == 0 and right > 40 and missed <= 0.05 * right


def test_duplicates_are_left_out_and_shown(run, tmp_path):
    rng = random.Random(3)
    first, second = some_text(rng, False), some_text(rng, True)
    near = mutated(rng, first, 2)
    assert naive_jaccard(first, near) > 0.8
    path = write(tmp_path / "a.jsonl", [{"text": t} for t in (first, second, first + "  ", near, second)])
    _, records, report, _ = run("clean", path)
    assert [r["text"] for r in records] == [first, second]
    assert report["left_out"] == {"exact duplicate": 2, "near duplicate": 1}
    (shown,) = report["examples"]["near duplicate"]
    assert (
        shown["where"] == f"{path} line 4"
        and shown["line_of_output"] == 1
        and shown["similarity"] == round(naive_jaccard(first, near), 3)
    )
    assert first.startswith(shown["like"].rstrip("…"))
    assert len(run("clean", path, "--near_threshold", 0, "--overwrite")[1]) == 3
    assert len(run("clean", path, "--near_threshold", 0, "--no-exact", "--overwrite")[1]) == 5


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_duplicates_of_chats_and_pairs(stage, run, tmp_path):
    rng = random.Random(4)
    question, answer, other = (some_text(rng, False) for _ in range(3))
    near = mutated(rng, answer, 1)

    def record(a):
        if stage == "sft":
            return chat(question, a)
        return {"chosen": turns(question, a), "rejected": turns(question, "no")}

    path = write(tmp_path / "a.jsonl", [record(answer), record(near), record(other)])
    _, records, report, _ = run("clean", path)
    assert records == [record(answer), record(other)] and report["settings"]["stage"] == stage


def test_records_of_the_test_set_stay_out(run, tmp_path):
    rng = random.Random(5)
    test, mine = [some_text(rng, False) for _ in range(3)], some_text(rng, False)
    against = write(tmp_path / "test.jsonl", ["broken\n", *({"text": t} for t in test)])
    path = write(tmp_path / "a.jsonl", [{"text": mutated(rng, test[1], 1)}, {"text": test[2]}, {"text": mine}])
    _, records, report, _ = run("clean", path, "--against", against)
    assert records == [{"text": mine}]
    assert report["left_out"] == {"in --against": 2} and report["records"]["read"] == 3
    against = write(tmp_path / "none.jsonl", [{"question": "?"}])
    status, _, _, err = run("clean", path, "--against", against, to="b.jsonl")
    assert status == 2 and "no record with a text" in err


# ---- mixing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path):
    """90 short records, 30 records four times as long."""
    a = write(tmp_path / "a.jsonl", [{"text": f"a{i:03} " + "x" * 11} for i in range(90)])
    b = write(tmp_path / "b.jsonl", ["\n", *({"text": f"b{i:03} " + "y" * 86} for i in range(30)), "\n"])
    return a, b


def counts(records):
    return Counter(r["text"][0] for r in records)


def test_a_mixture_has_the_shares_of_its_weights(run, sources):
    _, records, report, _ = run("mix", *sources, "--weights", 3, 2)
    assert counts(records) == {"a": 45, "b": 30} and len({r["text"] for r in records}) == 75
    assert [s["percent of records"] for s in report["sources"].values()] == [60, 40]
    letters = "".join(r["text"][0] for r in records)
    assert "aaaaaaaaaaaaaaa" not in letters and letters != "".join(sorted(letters))
    _, records, _, _ = run("mix", *sources, "--overwrite")
    assert counts(records) == {"a": 30, "b": 30}


def test_shares_of_bytes(run, sources):
    _, records, report, _ = run("mix", *sources, "--by", "bytes", "--weights", 1, 1)
    sizes = Counter()
    for r in records:
        sizes[r["text"][0]] += len(json.dumps(r))
    assert sizes["a"] / sizes["b"] == pytest.approx(1, rel=0.02) and counts(records)["a"] == 90
    assert [s["percent of bytes"] for s in report["sources"].values()] == pytest.approx([50, 50], abs=0.5)


def test_a_long_mixture_repeats_evenly(run, sources):
    _, records, _, _ = run("mix", *sources, "--weights", 1, 3, "--records", 100)
    assert counts(records) == {"a": 25, "b": 75}
    times = Counter(r["text"] for r in records if r["text"][0] == "b")
    assert len(times) == 30 and set(times.values()) == {2, 3}


def test_the_seed_decides(run, sources):
    first, again, other = (run("mix", *sources, "--seed", s, to=f"{i}.jsonl")[1] for i, s in enumerate([1, 1, 2]))
    assert first == again and first != other and sorted(map(str, first)) != sorted(map(str, other))


def test_what_cannot_be_mixed(run, sources, tmp_path):
    a, b = sources
    assert "2 files" in run("mix", a, b, "--weights", 1)[3]
    assert "too few" in run("mix", a, b, "--weights", 1, 100, "--records", 3)[3]
    chats = write(tmp_path / "c.jsonl", [chat("q", "a"), {"conversations": 3}])
    assert "looks like sft" in run("mix", a, chats)[3]
    status, records, _, err = run("mix", chats)
    assert status == 2 and records is None and f"{chats} line 2" in err
    assert run("mix", chats, "--skip_bad_records")[1] == [chat("q", "a")]
    bad = write(tmp_path / "d.jsonl", ['{"text": ""}\n'])
    assert "no good record" in run("mix", bad, "--skip_bad_records", to="d2.jsonl")[3]


def test_places_are_those_of_the_lines(tmp_path):
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\n  {"text": "\xe4\xbd\xa0"} \nbad\n{"text": "c"}'
    (tmp_path / "a.jsonl").write_bytes(content)
    reasons = []
    places = mixing.find_places(
        tmp_path / "a.jsonl", record_formats.parse_text, lambda where, why: reasons.append(where)
    )
    lines = [content[s : s + n] for s, n in zip(places.starts, places.sizes, strict=True)]
    assert [json.loads(line) for line in lines] == [{"text": "a"}, {"text": "你"}, {"text": "c"}]
    assert reasons == [f"{tmp_path / 'a.jsonl'} line 4"]


def test_shares_add_up():
    class Source:
        path = Path("a")
        starts = range(1000)

    for n in (3, 10, 997):
        assert sum(mixing.share_out([Source] * 3, [1, 1, 1], n, "records")) == n
    with pytest.raises(UserError, match="too few"):
        mixing.share_out([Source] * 3, [1, 1, 1], 2, "records")
    owners, records = mixing.draw_order([5, 7], [12, 7], 0)
    assert Counter(records[owners == 0].tolist()).most_common()[-1][1] == 2
    assert sorted(records[owners == 1].tolist()) == list(range(7)) and len(np.unique(owners)) == 2


def test_the_report_tells_languages_and_lengths(run, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": "x" * 70}, {"text": "街角的茶馆" * 5}, {"text": GOOD}])
    _, _, report, _ = run("clean", path)
    assert report["languages"]["records"] == {"English": 2, "Chinese": 1}
    assert report["lengths_in_characters"] == {"16-31": 1, "64-127": 2}
    assert report["settings"]["min_chars"] == 20 and report["settings"]["inputs"] == [str(path)]


@pytest.mark.parametrize("script", ["get_data.py", "prepare_data.py"])
def test_the_scripts_start_in_any_folder(script, tmp_path):
    path = Path(prepare_data.__file__).with_name(script)
    done = subprocess.run(
        [sys.executable, path, "--help"], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=250
    )
    assert (done.returncode, done.stderr) == (0, "") and "stand in brackets" in " ".join(done.stdout.split())


def test_the_measurement_of_near_duplicates(tmp_path, capsys, monkeypatch):
    rng = random.Random(7)
    path = write(tmp_path / "a.jsonl", [{"text": some_text(rng, bool(i % 2))} for i in range(120)])
    monkeypatch.setattr(sys, "argv", ["bench_clean.py", str(path), "--records", "100", "--copies", "20"])
    bench_clean.main()
    found = dict(re.findall(r"^([a-zA-Z, %]+?)  +([\d.,]+)$", capsys.readouterr().out, flags=re.M))
    assert found["copies"] == "20" and found["precision, %"] == "100.0" and float(found["recall, %"]) > 80
    assert int(found["of them found"]) <= int(found["copies above the threshold"]) <= 20
    a, b = some_text(rng, False), some_text(rng, True)
    assert bench_clean.similarity(a, a) == 1 and bench_clean.similarity(a, b) == 0
    assert bench_clean.with_errors(a, 0.01, rng) != a
