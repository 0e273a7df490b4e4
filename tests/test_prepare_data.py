"""prepare_data: other formats become ours, dirt and duplicates go, mixtures have the shares that were asked for."""

import gzip
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset import record_formats
from scripts import bench_clean, prepare_data
from scripts.preparing import cleaning, formats, mixing, near_duplicates, reading
from trainer.command_line import UserError, run_script


@pytest.fixture
def run(tmp_path, capsys):
    """(status, records written, report, stderr) of the script, with --to out.jsonl."""

    def call(*flags, to="out.jsonl"):
        capsys.readouterr()
        try:
            run_script(lambda: prepare_data.main([*map(str, flags), "--to", str(tmp_path / to)]))
            status = 0
        except SystemExit as stop:
            status = stop.code
        err, out, report = capsys.readouterr().err, tmp_path / to, (tmp_path / to).with_suffix(".report.json")
        records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else None
        return status, records, json.loads(report.read_text("utf-8")) if report.exists() else None, err

    return call


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    return path


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def chat(*contents):
    return {"conversations": turns(*contents)}


# ---- converting ------------------------------------------------------------------------------------------------------

WEATHER = {"name": "weather", "arguments": {"city": "Rome"}}
SIGNATURE = {"type": "function", "function": {"name": "weather", "parameters": {}}}
CALLED = [
    {"role": "system", "content": "Be brief.", "tools": json.dumps([SIGNATURE])},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": json.dumps([WEATHER])},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "Sunny."},
]


@pytest.mark.parametrize(
    ("record", "kind", "expected"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca", chat("Add.\n1 2", "3")),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "alpaca", chat("Hi", "Hello")),
        ({"prompt": "Hi", "response": "Hello", "id": 7}, "alpaca", chat("Hi", "Hello")),
        ({"instruction": "c", "output": "d", "history": [["a", "b"]]}, "alpaca", chat("a", "b", "c", "d")),
        (
            {"instruction": "Hi", "output": "Hello", "system": "S"},
            "alpaca",
            {"conversations": [{"role": "system", "content": "S"}, *turns("Hi", "Hello")]},
        ),
        ({"question": "1+1?", "answer": "2"}, "alpaca", chat("1+1?", "2") | {"answer": "2"}),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            "sharegpt",
            chat("Hi", "Hello"),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Weather?"},
                    {"from": "function_call", "value": json.dumps(WEATHER)},
                    {"from": "observation", "value": "sunny"},
                    {"from": "gpt", "value": "Sunny."},
                ],
                "system": "Be brief.",
                "tools": json.dumps([SIGNATURE]),
            },
            "sharegpt",
            {"conversations": CALLED},
        ),
        (
            {
                "messages": [
                    {"role": "developer", "content": "Be brief."},
                    {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {
                                "id": "c1",
                                "type": "function",
                                "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
                            }
                        ],
                    },
                    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
                    {"role": "assistant", "content": "Sunny."},
                ],
                "tools": [SIGNATURE],
            },
            "openai",
            {"conversations": CALLED},
        ),
        (
            {"messages": [*turns("2+2?"), {"role": "assistant", "content": "4", "reasoning_content": "Two twos."}]},
            "openai",
            {
                "conversations": [
                    *turns("2+2?"),
                    {"role": "assistant", "content": "4", "reasoning_content": "Two twos."},
                ]
            },
        ),
        ({"conversations": [{"content": "Hi"}, {"content": "Hello"}]}, "openai", chat("Hi", "Hello")),
        ({"messages": turns("1+1?"), "answer": 2}, "openai", {"conversations": turns("1+1?"), "answer": 2}),
        ({"text": " 你好 \n", "source": "x"}, "text", {"text": " 你好 \n"}),
        (
            {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
            "preference",
            {"chosen": turns("Hi", "Hello!"), "rejected": turns("Hi", "What?")},
        ),
        (
            {"prompt": "Hi", "chosen": turns("Hi", "Hello!"), "rejected": turns("Hi", "What?")},
            "preference",
            {"chosen": turns("Hi", "Hello!"), "rejected": turns("Hi", "What?")},
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Hello!"},
                "rejected": {"from": "gpt", "value": "What?"},
            },
            "preference",
            {"chosen": turns("Hi", "Hello!"), "rejected": turns("Hi", "What?")},
        ),
        (
            {
                "prompt": [{"role": "system", "content": "S"}, *turns("Hi")],
                "chosen": [{"role": "assistant", "content": "Hello!"}],
                "rejected": [{"role": "assistant", "content": "What?"}],
            },
            "preference",
            {
                "chosen": [{"role": "system", "content": "S"}, *turns("Hi", "Hello!")],
                "rejected": [{"role": "system", "content": "S"}, *turns("Hi", "What?")],
            },
        ),
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: a\n\nb\n\nAssistant: c",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: a\n\nb\n\nAssistant: d",
            },
            "preference",
            {"chosen": turns("Hi", "Hello!", "a\n\nb", "c"), "rejected": turns("Hi", "Hello!", "a\n\nb", "d")},
        ),
    ],
)
def test_records_of_each_format(record, kind, expected):
    assert formats.find_format(record) == kind
    assert formats.convert(record, kind) == expected
    again = formats.find_format(expected)  # what comes out is a format of ours, and stays what it is
    assert formats.convert(expected, again) == expected
    if "chosen" in expected:
        record_formats.parse_dpo(expected)
    elif "text" not in expected and "answer" not in expected:
        record_formats.parse_sft(expected)


@pytest.mark.parametrize(
    ("record", "kind", "reason"),
    [
        ({"instruction": "Hi", "output": ""}, "alpaca", "assistant's content is empty"),
        ({"instruction": "Hi"}, "alpaca", "none of output, response"),
        ({"instruction": "Hi", "output": "a", "history": ["b"]}, "alpaca", "pairs"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "sharegpt", 'role is "narrator"'),
        ({"conversations": "x"}, "sharegpt", "no list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, *turns("a", "b")[1:]]},
            "openai",
            "image_url",
        ),
        ({"messages": [*turns("a"), {"role": "assistant", "content": "b", "weight": 0}]}, "openai", "weight 0"),
        ({"messages": [*turns("a", "b"), {"role": "system", "content": "c"}]}, "openai", "system turn"),
        ({"messages": [*turns("a"), {"role": "assistant", "tool_calls": "{"}]}, "openai", "not JSON"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "preference", "are equal"),
        ({"prompt": "a", "chosen": 1, "rejected": "b"}, "preference", "neither text nor turns"),
        ({"text": " "}, "text", "empty"),
    ],
)
def test_what_cannot_be_converted_says_why(record, kind, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        formats.convert(record, kind)


def test_a_multiple_choice_question_is_not_taken_for_a_chat():
    assert formats.find_format({"question": "?", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "A"}) is None


def test_convert_files_of_several_kinds_into_one(run, tmp_path):
    write(
        tmp_path / "in" / "a.json",
        [json.dumps([{"instruction": f"q{i}", "output": f"a{i}"} for i in range(3)], indent=1)],
    )
    write(
        tmp_path / "in" / "b.jsonl",
        [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}],
    )
    write(tmp_path / "in" / ".hidden.jsonl", ["broken"])
    status, records, report, err = run("convert", tmp_path / "in")
    assert (status, err) == (0, "")
    assert records == [*(chat(f"q{i}", f"a{i}") for i in range(3)), chat("q", "a")]
    assert report["records"] == {"read": 4, "written": 4, "changed": 0}
    assert [s["written"] for s in report["sources"].values()] == [3, 1]


def test_a_bad_record_stops_unless_it_is_to_be_skipped(run, tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        [
            {"instruction": "q", "output": "a"},
            "no json\n",
            {"instruction": "q", "output": ""},
            {"instruction": "q2", "output": ""},
        ],
    )
    status, records, report, err = run("convert", path)
    assert status == 2 and records is None and report is None
    assert err.startswith(f"error: {path} line 2: not JSON") and "--skip_bad_records" in err and err.count("\n") == 1
    assert not list(tmp_path.glob("*.part"))
    status, records, report, err = run("convert", path, "--skip_bad_records")
    assert (status, records, report["records"]["read"]) == (0, [chat("q", "a")], 4)
    assert sorted(report["left_out"].values()) == [1, 2] and all(k.startswith("bad: ") for k in report["left_out"])
    shown = report["examples"]["bad: turn N: the assistant's content is empty"]
    assert [e["where"] for e in shown] == [f"{path} line {n}" for n in (3, 4)]


def test_nothing_good_writes_nothing(run, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "q", "output": ""}])
    status, records, _, err = run("convert", path, "--skip_bad_records")
    assert status == 2 and records is None and "nothing to write: 1 records" in err


def test_unknown_keys_are_named_with_a_remedy(run, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"title": "q", "body": "a"}])
    status, _, _, err = run("convert", path)
    assert status == 2 and "title, body" in err and "--columns" in err
    assert run("convert", path, "--columns", "instruction=title", "output=body")[1] == [chat("q", "a")]
    status, _, _, err = run("convert", path, "--columns", "text=content", to="b.jsonl")
    assert status == 2 and 'column "content"' in err and "title, body" in err


def test_a_format_can_be_forced(run, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "t", "instruction": "q", "output": "a"}])
    assert run("convert", path)[1] == [{"text": "t"}]
    assert run("convert", path, "--format", "alpaca", "--overwrite")[1] == [chat("q", "a")]


def test_one_file_holds_one_kind(run, tmp_path):
    a = write(tmp_path / "a.jsonl", [{"text": "t"}])
    b = write(tmp_path / "b.jsonl", [{"instruction": "q", "output": "a"}])
    status, records, _, err = run("convert", a, b)
    assert status == 2 and records is None and "conversations, earlier ones have text" in err


def test_a_json_array_is_read_piece_by_piece(tmp_path, monkeypatch):
    records = [{"text": "x" * n, "more": [n, {"a": "]},["}]} for n in (0, 5, 300, 2, 80)]
    path = tmp_path / "a.json"
    path.write_text("\ufeff \n" + json.dumps(records, indent=2), encoding="utf-8")
    for chunk in (1, 7, 64, 10_000):
        monkeypatch.setattr(reading, "CHUNK_CHARS", chunk)
        assert [raw.record for raw in reading.read_array(path)] == records
    path.write_text("[]", encoding="utf-8")
    assert list(reading.read_array(path)) == []
    path.write_text('[{"a": 1}, 5, {"a": 2}]', encoding="utf-8")
    assert [raw.record for raw in reading.read_array(path)] == [{"a": 1}, None, {"a": 2}]
    for broken in (
        '[{"a": 1} {"a": 2}]',
        '[{"a": 1}, {"a": ',
        '[{"a": 1}, {"a" 2}]' + " " * 100,
        '[{"a": 1},',
        "[" * 9000,
    ):
        path.write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match="a.json record"):
            list(reading.read_array(path))


def test_parquet_is_what_pyarrow_and_datasets_say(run, tmp_path):
    from datasets import Dataset

    rows = [{"content": f"Text {i}, 第{i}篇", "n": i, "picture": b"\x00\xff"} for i in range(2500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=700)
    status, records, report, _ = run("convert", tmp_path / "a.parquet", "--columns", "text=content")
    assert status == 0 and report["records"]["written"] == 2500
    assert records == [
        {"text": t} for t in Dataset.from_parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "c"))["content"]
    ]
    chats = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a{i}", "name": None}]}
        for i in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(chats), tmp_path / "b.parquet")
    assert run("convert", tmp_path / "b.parquet", to="b.jsonl")[1] == [chat("q", f"a{i}") for i in range(3)]
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-40])
    status, _, _, err = run("convert", tmp_path / "b.parquet", to="c.jsonl")
    assert status == 2 and "damaged Parquet" in err and err.count("\n") == 1


def test_folders_of_texts(run, tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_bytes("\ufeffFirst\r\nline\r\n\r\n \r\nSecond.\r\n".encode())
    (tmp_path / "in" / "sub" / "b.md").write_text("三\n\n\n\n四\n", encoding="utf-8")
    (tmp_path / "in" / "c.csv").write_text("not text")
    assert run("convert", tmp_path / "in")[1] == [{"text": "First\nline\n\n \nSecond."}, {"text": "三\n\n\n\n四"}]
    _, records, report, _ = run("convert", tmp_path / "in", "--split", "paragraph", "--overwrite")
    assert [r["text"] for r in records] == ["First\nline", "Second.", "三", "四"]
    (tmp_path / "in" / "d.txt").write_bytes("旧文件".encode("gb18030"))
    status, _, _, err = run("convert", tmp_path / "in", to="d.jsonl")
    assert status == 2 and "d.txt: not utf-8" in err and "--encoding gb18030" in err
    assert run("convert", tmp_path / "in" / "d.txt", "--encoding", "gb18030", to="d.jsonl")[1] == [{"text": "旧文件"}]


PAGE = """<!DOCTYPE html><html><head><title>T</title><script>alert("script text")</script><style>p {{}}</style></head>
<body><nav><ul><li><a href="/">Home of the menu</a></li></ul></nav>
<article><h1>{title}</h1><p>{first}</p><p>{second}</p></article>
<footer>All rights of the footer reserved</footer></body></html>"""


def test_folders_of_web_pages(run, tmp_path):
    pytest.importorskip("trafilatura")
    first = "The tea house at the corner sells green tea and black tea from morning until late in the evening. " * 3
    second = "街角的茶馆从早到晚卖绿茶和红茶，客人们坐在窗边慢慢地喝，聊着一天里发生的事情。" * 3
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.html").write_text(PAGE.format(title="Tea", first=first, second=second), encoding="utf-8")
    (tmp_path / "in" / "b.htm").write_text("<html><body><script>menu</script></body></html>", encoding="utf-8")
    status, records, report, err = run("convert", tmp_path / "in", "--skip_bad_records")
    assert (status, len(records)) == (0, 1) and report["left_out"] == {"bad: no main text was found in this page": 1}
    text = records[0]["text"]
    assert first.strip() in text and second in text
    assert not any(word in text for word in ("script text", "menu", "footer", "<p>"))


@pytest.mark.parametrize("package", ["trafilatura", "datasketch"])
def test_a_missing_package_is_one_line(package, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.html").write_text("<p>x</p>")
    write(tmp_path / "a.jsonl", [{"text": "x" * 30}])
    command = ("convert", tmp_path / "a.html") if package == "trafilatura" else ("clean", tmp_path / "a.jsonl")
    status, _, _, err = run(*command)
    assert status == 2 and f"pip install {package}" in err and err.count("\n") == 1
    if package == "datasketch":
        assert run(*command, "--near_threshold", "0")[0] == 0


def test_the_output_is_no_source_and_replaces_only_when_told(run, tmp_path):
    path = write(tmp_path / "out.jsonl", [{"text": "x" * 30}])
    for command in ("convert", "clean", "mix"):
        status, _, _, err = run(command, path, "--overwrite")
        assert status == 2 and "is a source" in err
    other = write(tmp_path / "a.jsonl", [{"text": "y" * 30}])
    status, records, _, err = run("clean", other)
    assert status == 2 and "--overwrite" in err and records == [{"text": "x" * 30}]
    assert run("clean", other, "--overwrite")[1] == [{"text": "y" * 30}]


@pytest.mark.parametrize("command", ["convert", "clean", "mix"])
def test_files_that_are_none(command, run, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"text": "x"}\n'))
    (tmp_path / "b.jsonl").write_bytes(b"")
    for name, word in (("a", "compressed"), ("b", "empty"), ("c", "no such file")):
        status, _, _, err = run(command, tmp_path / f"{name}.jsonl")
        assert status == 2 and word in err and err.count("\n") == 1


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
