"""prepare_data: other formats, arrays, Parquet, texts and web pages become our records; bad ones are named."""

import gzip
import json
import re
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset import record_formats
from scripts import prepare_data
from scripts.preparing import formats, reading
from trainer.command_line import run_script


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
