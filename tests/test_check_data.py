"""check_data: what it counts, what it refuses, and that the preview shows exactly the trained tokens."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataset import check_data
from dataset.lm_dataset import encode_conversations
from model.weights import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def write(path, records):
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    return path


def chat(question, answer):
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def check(tmp_path, capsys):
    def run(records, *flags):
        path = write(tmp_path / "a.jsonl", records)
        with pytest.raises(SystemExit) as stop:
            check_data.main([str(path), "--cache_dir", str(tmp_path / "cache"), *flags])
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def number(name, out):
    """The first number on the report's line `name`."""
    return int(re.search(rf"^{name} +([\d,]+)", out, re.MULTILINE)[1].replace(",", ""))


def test_a_good_sft_file(check, tokenizer):
    records = [chat("Hi", "Hello"), chat("你好吗？", "我很好。"), chat("Hi", "Hello"), chat("why", "so " * 100)]
    rc, out, err = check(records, "--stage", "sft", "--max_seq_len", "64")
    ids, trained = encode_conversations([r["conversations"] for r in records], tokenizer)
    assert (rc, err) == (0, "")
    assert number("records", out) == 4 and number("duplicates", out) == 1
    assert number("tokens", out) == sum(map(len, ids))
    assert number("trained on", out) == sum(int(t[:64].sum()) for t in trained)
    assert f"longest {max(map(len, ids))}" in out and "longer than  64: 1 (25.0 %) lose their end" in out
    assert re.search(r"packed +\d+ rows of 64, \d+\.\d % of them real tokens", out)
    assert "Chinese 25.0 % of records" in out and "English 75.0 % of records" in out


def test_a_file_without_a_row_to_train_on_is_status_1(check):
    rc, out, err = check([chat("x " * 50, "y")], "--stage", "sft", "--max_seq_len", "8")
    assert (rc, err) == (1, "") and number("records", out) == 1


@pytest.mark.skipif(os.name == "nt", reason="needs a shell's pipe")
def test_a_reader_that_leaves_is_no_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [chat(f"Hi {n}", "Hello") for n in range(50)])
    flags = ["--stage", "sft", "--preview", "50", "--cache_dir", str(tmp_path / "cache")]
    command = [sys.executable, str(Path(check_data.__file__)), str(path), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=120) == 1 and "Traceback" not in error


def test_the_preview_marks_exactly_the_trained_tokens(check, tokenizer):
    records = [chat("What is 1+1?", "它是 2。🙂"), chat("a", "b"), chat("c", "d")]
    _, out, _ = check(records, "--preview", "2")
    assert out.count("── line") == 2 and "«trained on»" in out
    shown = out.split("newline\n")[1].split("\n\n──")[0]
    plain = shown.replace("⏎\n", "\n").replace("│", "")
    assert plain.rstrip("\n") == (
        "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n«它是 2。🙂<|im_end|>»"
    ), "the trained stretch is the answer with its end, no more and no less"
    (ids,), (trained,) = encode_conversations([records[0]["conversations"]], tokenizer)
    cells = check_data.token_cells(ids, trained, tokenizer)
    assert "".join(text for text, _ in cells) == tokenizer.decode(ids)
    assert f"{len(ids)} tokens, {int(trained.sum())} trained on" in out
    assert shown.count("│") + shown.count("«") + shown.count("»") == len(cells) - 1


def test_the_preview_in_colour_has_the_same_tokens(tokenizer):
    pytest.importorskip("rich")
    cells = [("a\n", False), ("b", True), ("c", True), ("d", True)]
    text = check_data.render_rich(cells, cut=3)
    assert text.plain == "a⏎\nbc✂d"
    styles = [str(s.style) for s in text.spans]
    assert ["green" in s for s in styles] == [False, True, True, False, False]
    assert ["red" in s for s in styles] == [False, False, False, True, True], "the scissors and what they cut off"
    assert styles[1] != styles[2], "neighbours differ: the borders of tokens are visible"


def test_the_preview_shows_the_cut(check):
    _, out, _ = check([chat("a", "word " * 300)], "--max_seq_len", "32")
    assert out.count("✂") == 2 and re.search(r"… \d+ more tokens", out)


def test_bad_records_are_shown_with_line_and_reason(check):
    records = [chat("a", "b"), "{oops\n", {"conversations": []}, *[{"x": i} for i in range(5)]]
    rc, out, err = check(records, "--stage", "sft")
    assert rc == 1 and err == ""
    assert "1 good, 7 BAD of 8" in out
    assert "  line 2: not JSON" in out and '  line 3: "conversations" has no turns' in out
    assert out.count("  line ") == 5 and "… and 2 more" in out


def test_a_file_of_another_stage(check):
    rc, out, _ = check([chat("a", "b")] * 3, "--stage", "pretrain")
    assert rc == 1 and "0 good, 3 BAD of 3" in out and "--stage {pretrain,sft" in out


TURNS = [{"role": "user", "content": "a"}]
SIDES = [[*TURNS, {"role": "assistant", "content": c}] for c in "bc"]
CHOICE = {"question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"}


@pytest.mark.parametrize(
    ("record", "stage"),
    [
        ({"text": "hello"}, "pretrain"),
        (chat("a", "b"), "sft"),
        (chat("a", "<think>\nb\n</think>\n<answer>\nc\n</answer>"), "reason"),
        ({"chosen": SIDES[0], "rejected": SIDES[1]}, "dpo"),
        (chat("a", ""), "rl"),
        ({**chat("a", "4"), "answer": "4"}, "rl"),
        (CHOICE, "choice"),
    ],
)
def test_the_stage_is_guessed(record, stage, check):
    rc, out, err = check(["\n", "not json\n", record, record])
    assert rc == 1 and f"read as {stage}:" in out, err
    assert "2 good, 1 BAD of 3" in out and number("duplicates", out) == 1


@pytest.mark.parametrize(
    ("record", "stage", "reason"),
    [
        ({"chosen": SIDES[0], "rejected": SIDES[0]}, "dpo", "are equal"),
        ({"chosen": SIDES[0], "rejected": [{"role": "user", "content": "z"}, SIDES[1][1]]}, "dpo", "same prompt"),
        ({"conversations": [{"role": "assistant", "content": "x"}]}, "rl", "nothing to answer"),
        ({**CHOICE, "answer": "5"}, "choice", "expected A, B, C or D"),
        (chat("a", "b"), "reason", "expected the form"),
    ],
)
def test_other_stages_are_checked(record, stage, reason, check):
    rc, out, _ = check([record], "--stage", stage)
    assert rc == 1 and reason in out


def test_dpo_previews_both_sides_and_compares_last_answers(check):
    turns = [TURNS[0], {"role": "assistant", "content": "first"}, {"role": "user", "content": "again"}]
    pair = {k: [*turns, {"role": "assistant", "content": k.upper()}] for k in ("chosen", "rejected")}
    rc, out, _ = check([pair])
    assert rc == 0 and "── line 1 chosen" in out and "── line 1 rejected" in out
    marked = re.findall("«([^«»]*)»", out.replace("│", "").replace("«trained on»", ""))
    assert marked == ["CHOSEN<|im_end|>", "REJECTED<|im_end|>"]


def test_pretraining_documents_are_split_not_cut(check):
    rc, out, _ = check([{"text": "word " * 200}, {"text": "天气"}], "--max_seq_len", "16", "--preview", "1")
    assert rc == 0 and "longer than  16: 1 documents are split, nothing is lost" in out
    assert "<|im_start|>«word" in out.replace("│", "") and "✂" not in out


@pytest.mark.parametrize("content", [b"", b'[{"text": "a"}]', b'{"unknown": 1}\n'])
def test_unusable_files_exit_with_2_and_one_line(content, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        check_data.main([str(path), "--cache_dir", str(tmp_path / "cache")])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.out == ""


def test_languages(tmp_path):
    lines = ("Hello world", "你好 world", "12 34", "Привет мир", "naïve café")
    path = write(tmp_path / "a.jsonl", [{"text": t} for t in lines])
    shares = check_data.language_share(path)
    assert {k: n for k, (n, _) in shares.items()} == {"Chinese": 1, "English": 2, "other": 2}
    assert shares["Chinese"][1] == len("你好 world")


def test_parts_of_one_character_share_a_cell(tokenizer):
    ids = np.array(tokenizer.encode("𓂀a", add_special_tokens=False))
    cells = check_data.token_cells(ids, np.ones(len(ids), bool), tokenizer)
    assert [text for text, _ in cells] == ["𓂀", "a"] and len(ids) > 2


@pytest.mark.slow
def test_as_a_command_from_another_folder(tmp_path):
    path = write(tmp_path / "a.jsonl", [chat("a", "b")])
    command = [sys.executable, str(ROOT / "dataset" / "check_data.py"), str(path), "--cache_dir", str(tmp_path / "c")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert "«b" in done.stdout.decode("utf-8").replace("│", "") and done.stderr == b""
    usage = subprocess.run([*command, "--stage", "nonsense"], capture_output=True, timeout=120)
    assert usage.returncode == 2 and b"Traceback" not in usage.stderr
