"""Evaluation: long context and written replies against plain logits, and the script as a user runs it."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_eval_lm import BOS, CHOICES, EOS, accuracies, material, plain_logps, tiny, tokenizer  # noqa: F401 (fixtures)
from test_model import llama_twin
from test_trainers import Result, one_error, train, write_records

from dataset.json_lines import DataError
from model.generation import stream_generate
from model.model_lora import LoraConfig, add_lora, load_lora, lora_layers, save_lora
from model.weights import load_model, load_tokenizer, save_weights
from scripts import eval_lm
from scripts.chat_text import chat_ids
from scripts.evaluating import generation_tasks as tasks
from scripts.evaluating import language_model as lm
from scripts.evaluating import long_context as long
from scripts.evaluating import multiple_choice as mc
from scripts.evaluating import report
from trainer.command_line import UserError

# ruff: noqa: F811 (fixtures as arguments)


# --------------------------------------------------------------------------------------------------------- long context


def test_stretching_changes_only_positions_beyond_training():
    trained, model = 8, tiny()
    rows = torch.randint(3, 6400, (3, 8 * trained + 1), generator=torch.Generator().manual_seed(0)).numpy()
    found = long.position_losses(model, rows, trained, 64)
    assert model.config.rope_scaling is None
    fixed = found.pop("fixed")
    assert set(found) == set(long.WAYS) and set(fixed) == {"linear", "ntk", "yarn"}
    for way, curve in found.items():
        np.testing.assert_array_equal(curve[:, :trained], found["none"][:, :trained])
        for factor, (a, z) in {1: (0, 8), 2: (8, 16), 4: (16, 32), 8: (32, 64)}.items():
            scaling = {"type": way, "factor": float(factor), "original_max_position_embeddings": trained}
            stretched = tiny(rope_scaling=None if way == "none" or factor == 1 else scaling)
            for row, losses in zip(rows.tolist(), curve, strict=True):
                ids = row[: factor * trained + 1]
                expected = -plain_logps(stretched, ids[:1], ids[1:])[a:z]
                torch.testing.assert_close(torch.from_numpy(losses[a:z]), expected, atol=1e-4, rtol=1e-5)
                if factor == 8 and way != "none":
                    head = -plain_logps(stretched, ids[:1], ids[1:])[:trained]
                    index = rows.tolist().index(row)
                    torch.testing.assert_close(torch.from_numpy(fixed[way][index]), head, atol=1e-4, rtol=1e-5)
        if way != "none":
            assert np.abs(curve[:, trained:] - found["none"][:, trained:]).max() > 1e-3
            assert np.abs(fixed[way] - found["none"][:, :trained]).max() > 1e-3


def test_long_rows_are_documents_or_joined_ones(tokenizer):
    words = tokenizer.encode("one two three four five six seven eight nine ten")
    text = tokenizer.decode(words)
    rows, single = long.long_rows([text, "a", "b", "c"], tokenizer, 4, 8)
    a, b, c = (tokenizer.encode(t)[0] for t in "abc")
    whole = [BOS, *words]
    expected = [whole[at : at + 5] for at in range(0, len(whole) - 4, 5)]
    assert single == len(expected) and rows[:single].tolist() == expected
    assert rows[single:].tolist() == [[BOS, a, EOS, BOS, b]]  # EOS BOS c EOS is too short for another
    assert long.long_rows([text, "a", "b", "c"], tokenizer, 4, 1)[0].tolist() == expected[:1]
    with pytest.raises(UserError, match="needs 41"):
        long.long_rows(["a"], tokenizer, 40, 1)


def test_long_context_sums_up_its_curves(tokenizer):
    model = tiny()
    result = long.evaluate_long_context(
        model, tokenizer, [" ".join(map(str, range(400)))], trained=16, most_rows=2, batch_tokens=512
    )
    assert result["trained"] == 16 and result["rows"] == result["rows_of_one_document"] == 2
    assert result["positions"] == [4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128]
    for way in long.WAYS:
        assert list(result["octaves"][way]) == ["0-16", "16-32", "32-64", "64-128"]
        means = np.array(result["curves"][way]).reshape(4, 4).mean(1)  # equal parts of an octave
        assert list(result["octaves"][way].values()) == pytest.approx(means.tolist(), rel=1e-6)
    with pytest.raises(UserError, match="MiniMind models only"):
        llama = llama_twin(model, {"rope_type": "default"})
        long.evaluate_long_context(llama, tokenizer, ["a"], trained=16, most_rows=1, batch_tokens=64)


# ------------------------------------------------------------------------------------------------------ written replies


def test_both_forms_of_question_files_are_read(tmp_path):
    demo = {"kind": "facts", "lang": "en", "conversations": [{"role": "user", "content": "Hi?"}], "answer": "Yes"}
    (task,) = tasks.read_tasks(write_records(tmp_path / "demo.jsonl", [demo]))
    assert task == {**demo, "line": 1, "verifier": "words"}
    records = [{"question": "How many eggs?", "answer": "18", "source": "gsm8k"}, {"question": "几个？", "answer": "3"}]
    found = tasks.read_tasks(write_records(tmp_path / "math.jsonl", records))
    assert [(t["kind"], t["lang"], t["line"], t["verifier"]) for t in found] == [
        ("gsm8k", "en", 1, "number"), ("math", "zh", 2, "number"),
    ]  # fmt: skip
    assert found[0]["conversations"] == [{"role": "user", "content": "How many eggs?"}]
    with pytest.raises(DataError, match='line 2: "answer" is 3'):
        tasks.read_tasks(write_records(tmp_path / "bad.jsonl", [records[0], {"question": "x", "answer": 3}]))


@pytest.mark.parametrize(
    ("verifier", "answer", "reply", "opened", "right"),
    [
        ("words", "Paris", " paris.", False, True), ("words", "Paris", "It is Paris", False, False),
        ("words", "5", "<think>\n4\n</think>\n<answer>\n5\n</answer>", False, True),
        ("words", "5", "no\n</think>\n5", True, True), ("words", "5", "5", True, False),
        ("number", "18", "She makes 18 dollars.", False, True), ("number", "18", "9 or 18", False, False),
        ("number", "18", "2 + 16\n</think>\n<answer>\n$18.0\n</answer>", True, True),
        ("number", "18", "18", True, False),
    ],
)  # fmt: skip
def test_replies_are_judged_without_their_thought(verifier, answer, reply, opened, right):
    assert tasks.judge({"verifier": verifier, "answer": answer}, reply, opened) is right


def test_variety_by_hand():
    found = tasks.variety(["a b a b a b", "你好", ""])
    # Groups of four of the first: abab, baba, abab: 1 of 3 came before; the other two have none.
    assert found["repetition"] == pytest.approx(1 / 9)
    assert found["distinct_1"] == 4 / 8 and found["distinct_2"] == 3 / 6 and found["distinct_3"] == 2 / 4
    assert tasks.variety(["a"])["distinct_2"] is None
    replies = [([5, 6, 7], True), ([8], False), ([], True)]
    about = tasks.written(replies, ["a b a b a b", "你好", ""])
    assert about["ended"] == 2 / 3 and about["mean_tokens"] == 4 / 3 and about["replies"] == 3


@pytest.mark.parametrize("chat", [False, True])
def test_answers_are_the_greedy_ones(material, tokenizer, chat):
    lines = {43, tokenizer.encode("\n")[0]} if not chat else set()
    turns = [
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "So?"},
    ]
    asked = [{"kind": "k", "lang": lang, "conversations": turns[i:], "verifier": "words", "answer": "?", "line": i}
             for i, lang in ((0, "en"), (2, "zh"))]  # fmt: skip
    plain = ["Question: Hi?\nAnswer: Yes\nQuestion: So?\nAnswer:", "问题：So?\n答案："]
    assert [tasks.plain_question(t["conversations"], t["lang"]) for t in asked] == plain
    replies = []
    for task, text in zip(asked, plain, strict=True):
        ids = chat_ids(tokenizer, task["conversations"], None) if chat else [BOS, *tokenizer.encode(text)]
        new = stream_generate(
            material.model, torch.tensor([ids]), temperature=0, max_new_tokens=6, stop_ids={EOS} | lines
        )
        replies.append(tokenizer.decode(list(new), skip_special_tokens=True))
    asked[0]["answer"] = replies[0]
    writer = tasks.Writer(
        material.model, tokenizer, chat=chat, thinking=None, front=[BOS], batch_size=2, max_new_tokens=6
    )
    result = writer.answer_tasks(asked)
    assert [row["reply"] for row in result["answers"]] == replies
    assert result["right"] == 1 and result["total"] == 2 and result["by_lang"]["en"]["right"] == 1
    free = writer.answer_freely(2)
    assert free["replies"] == len(free["answers"]) == 2 * len(tasks.CHAT_PROMPTS if chat else tasks.PRETRAIN_PROMPTS)
    texts = [row["reply"] for row in free["answers"]]
    assert texts[0] != texts[1]  # drawn, each with a seed of its own
    assert free["ended"] == sum(row["ended"] for row in free["answers"]) / len(texts)
    writer.max_new_tokens = 120
    with pytest.raises(UserError, match="128 positions"):
        writer.answer_tasks(asked)


# ----------------------------------------------------------------------------------------------------------- the script


def evaluate(*words: object) -> Result:
    return train(eval_lm, [str(word) for word in (*words, "--device", "cpu")])


@pytest.fixture(scope="module")
def flags(material) -> list[object]:
    """Everything, on small files."""
    asked = [{"kind": "k", "lang": "en", "conversations": [{"role": "user", "content": f"{i}?"}], "answer": "4"}
             for i in range(3)]  # fmt: skip
    questions = write_records(material.folder / "questions.jsonl", asked)
    return ["--text", material.text, "--choice", material.choice, "--questions", questions, "--max_new_tokens", 5,
            "--free_samples", 1, "--train_len", 16, "--long_rows", 2]  # fmt: skip


@pytest.fixture(scope="module")
def full(material, flags) -> SimpleNamespace:
    folder = material.folder / "report"
    result = evaluate("--weights", material.weights, *flags, "--report_dir", folder, "--tasks", *eval_lm.TASKS)
    assert result.status == 0, result.err
    (checkpoint,) = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["checkpoints"]
    return SimpleNamespace(result=result, folder=folder, checkpoint=checkpoint)


def test_one_command_measures_everything(full, material, tokenizer):
    found = full.checkpoint
    assert found["name"] == "full_sft_32" and found["stage"] == "full_sft" and found["chat"] is True
    assert found["parameters"] == sum(p.numel() for p in material.model.parameters()) and found["trained"] == 16
    documents = lm.read_documents(material.text, tokenizer, None, 0)
    alone = lm.evaluate_text(material.model, tokenizer, documents, window=16, stride=16, batch_tokens=4096)
    assert found["text"]["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-6)
    assert found["text"]["window"] == found["text"]["stride"] == 16  # the training length
    assert found["choice"]["choice"]["questions"] == 11 and len(found["choice"]["choice"]["answers"]) == 11
    assert found["questions"]["questions"]["total"] == 3 and found["free"]["replies"] == 10
    assert found["long_context"]["rows"] == 2
    out = full.result.out
    assert f"{alone['bits_per_byte']:.3f}" in out and "choice: random / majority" in out and "25.0% / 45.5%" in out
    assert (
        "[choice: prompts of up to" in out and "trained on 16]" in out and "[long context: 2 rows of 128 tokens" in out
    )
    assert full.result.err == ""


def test_report_files(full):
    text = (full.folder / "eval.md").read_text(encoding="utf-8")
    for title in ("## Figures", "## By subject", "## By kind"):
        assert title in text
    assert "| choice, opposite (5; majority 40.0%) | by letter " in text and "| questions, k, en |" in text
    for name in ("eval.png", "long_context.png"):
        picture = (full.folder / name).read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n" and 5_000 < len(picture) < 200_000
    assert report.read_results(full.folder / "eval.json") == [full.checkpoint]
    assert sorted(path.name for path in full.folder.iterdir()) == [
        "eval.json",
        "eval.md",
        "eval.png",
        "long_context.png",
    ]


def test_several_checkpoints_side_by_side(full, material, flags, tmp_path):
    """A folder of the same weights gives the same figures; earlier results stand before the new ones."""
    common = ["--tasks", "text", "choice", "--text", material.text, "--choice", material.choice, "--window", 16]
    result = evaluate(
        "--weights", material.llama, material.weights, *common, "--beside", full.folder / "eval.json",
        "--report_dir", tmp_path, "--batch_tokens", 100,
    )  # fmt: skip
    assert result.status == 0, result.err
    earlier, folder, pth = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))["checkpoints"]
    assert earlier["name"] == "out/full_sft_32 (1)" and pth["name"] == "out/full_sft_32 (3)"
    assert folder["name"] == "llama" and result.out.count("llama") == 2  # its line, and its column
    for one in (folder, pth):
        assert one["text"]["bits_per_byte"] == pytest.approx(earlier["text"]["bits_per_byte"], rel=1e-6)
        assert accuracies(one["choice"]["choice"]) == accuracies(earlier["choice"]["choice"])
    again = evaluate("--beside", tmp_path / "eval.json", "--report_dir", tmp_path / "again")
    assert again.status == 0 and "full_sft_32 (3)" in again.out
    assert report.read_results(tmp_path / "again" / "eval.json") == [earlier, folder, pth]


def test_an_adapter_is_judged_with_its_base(full, material, tmp_path):
    model = load_model(material.weights)
    add_lora(model, LoraConfig(rank=2))
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        for adapter in layer.adapters.values():
            torch.nn.init.normal_(adapter.B.weight, std=0.5)
    save_lora(model, material.folder / "out" / "lora" / "extra_32.pth", LoraConfig(rank=2))
    with_lora = load_model(material.weights)
    load_lora(with_lora, material.folder / "out" / "lora" / "extra_32.pth")
    documents = lm.read_documents(material.text, load_tokenizer(), None, 0)
    expected = lm.evaluate_text(with_lora, load_tokenizer(), documents, window=16, stride=16, batch_tokens=512)
    assert abs(expected["bits_per_byte"] - full.checkpoint["text"]["bits_per_byte"]) > 0.01
    for name in ("extra", material.folder / "out" / "lora" / "extra_32.pth"):
        common = ["--text", material.text, "--window", 16, "--out_dir", material.folder / "out"]
        result = evaluate("--weights", "full_sft", "--lora", name, *common, "--report_dir", tmp_path)
        assert result.status == 0, result.err
        (found,) = report.read_results(tmp_path / "eval.json")
        assert found["name"] == "full_sft_32 + extra_32"
        assert found["text"]["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-5)


def test_pretrained_weights_are_asked_in_plain_text(material, tokenizer, tmp_path):
    save_weights(tiny(), tmp_path / "pretrain_32.pth", {"stage": "pretrain"})
    questions = mc.read_choices(material.choice)
    model = load_model(tmp_path / "pretrain_32.pth")
    for more, chat, front in (([], False, [BOS]), (["--no-bos"], False, []), (["--chat"], True, [BOS])):
        result = evaluate(
            "--weights", tmp_path / "pretrain_32.pth", "--choice", material.choice, "--ways", "text", *more,
            "--report_dir", tmp_path / "report",
        )  # fmt: skip
        assert result.status == 0, result.err
        (found,) = report.read_results(tmp_path / "report" / "eval.json")
        expected = mc.evaluate_choices(
            model, tokenizer, questions, questions, shots=0, ways=["text"], chat=chat, thinking=None, front=front,
            batch_tokens=4096, title="",
        )  # fmt: skip
        pairs = list(zip(found["choice"]["choice"]["answers"], expected["answers"], strict=True))
        for one, other in pairs:  # another number of threads adds in another order
            assert one.pop("text_logps") == pytest.approx(other.pop("text_logps"), abs=1e-4)
        assert all(one == other for one, other in pairs) and len(pairs) > 1


def test_an_error_in_the_next_model_costs_nothing_of_this_one(material, tmp_path):
    (tmp_path / "damaged.pth").write_bytes(b"no weights")
    words = ["--text", material.text, "--window", 16, "--report_dir", tmp_path / "report"]
    result = evaluate("--weights", material.weights, tmp_path / "damaged.pth", *words)
    assert "damaged" in one_error(result)
    (kept,) = report.read_results(tmp_path / "report" / "eval.json")
    assert kept["name"] == "full_sft_32" and kept["text"]["documents"] == 4


def test_what_a_model_cannot_do_is_left_out_unless_it_is_asked_for(material, tmp_path, monkeypatch):
    """A folder of another family cannot be stretched: that costs none of the other figures, and shows at once."""
    texts = write_records(tmp_path / "p.jsonl", [{"text": f"Record number {i}"} for i in range(40)])
    asked = [{"kind": "k", "lang": "en", "conversations": [{"role": "user", "content": "1?"}], "answer": "4"}]
    demo = dict.fromkeys(("pretrain", "sft"), texts) | {"choice": material.choice}
    demo |= dict.fromkeys(("test", "reason_test"), write_records(tmp_path / "q.jsonl", asked))
    monkeypatch.setattr(eval_lm, "generate", lambda folder: demo)
    flags = ["--weights", material.llama, "--report_dir", tmp_path / "report", "--cache_dir", tmp_path / "cache"]
    flags += ["--val_ratio", 0.3, "--max_new_tokens", 2, "--free_samples", 1, "--ways", "text"]
    result = evaluate(*flags)
    assert result.status == 0 and "[long_context left out: long_context stretches MiniMind models only" in result.out
    (found,) = report.read_results(tmp_path / "report" / "eval.json")
    assert {"text", "choice", "questions", "free"} <= found.keys() and "long_context" not in found
    monkeypatch.setattr(eval_lm, "evaluate_text", lambda *_, **__: pytest.fail("the error came too late"))
    assert "MiniMind models only" in one_error(evaluate(*flags, "--tasks", *eval_lm.TASKS))


def test_without_files_the_held_out_demo_data_is_measured(material, tmp_path, monkeypatch):
    texts = [{"text": f"Record number {i}, {i * 7919} of it"} for i in range(80)]
    chats = [{"conversations": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i * i}!"}]}
             for i in range(60)]  # fmt: skip
    demo = {"pretrain": write_records(tmp_path / "p.jsonl", texts), "sft": write_records(tmp_path / "s.jsonl", chats)}
    monkeypatch.setattr(eval_lm, "generate", lambda folder: demo)
    flags = ["--weights", material.weights, "--cache_dir", tmp_path / "cache", "--report_dir", tmp_path / "report"]
    for more, counts in (
        (["--tasks", "text", "--val_ratio", 0.2], None), (["--tasks", "text", "--no-held_out"], (80, 60)),
        (["--text", demo["pretrain"]], (80,)), (["--text", demo["pretrain"], "--max_documents", 7], (7,)),
    ):  # fmt: skip
        result = evaluate(*flags, *more)
        assert result.status == 0, result.err
        (found,) = report.read_results(tmp_path / "report" / "eval.json")
        sizes = tuple(sum(f["documents"] for f in source.values()) for source in found["text"]["by_source"].values())
        if counts is None:
            wanted = [
                len(lm.read_documents(path, load_tokenizer(), 0.2, 0, tmp_path / "cache")) for path in demo.values()
            ]
            assert sizes == tuple(wanted) and 0 < sizes[0] < 40 and 0 < sizes[1] < 30
        else:
            assert sizes == counts


def test_examples_come_from_their_file(material, tokenizer, tmp_path):
    dev = write_records(tmp_path / "dev.jsonl", CHOICES[:2])
    flags = ["--weights", material.weights, "--choice", material.choice, "--ways", "text", "--report_dir", tmp_path]
    result = evaluate(*flags, "--shots", 2, "--shots_file", dev, "--max_questions", 3)
    assert result.status == 0 and "[choice: some subjects have 0 examples only]" in result.out
    (found,) = report.read_results(tmp_path / "eval.json")
    questions, pool = mc.read_choices(material.choice), mc.read_choices(dev)
    asked = [questions[i] for i in (0, 3, 7)]  # evenly spread
    expected = mc.evaluate_choices(
        material.model, tokenizer, asked, pool, shots=2, ways=["text"], chat=True, thinking=None, front=[BOS],
        batch_tokens=4096, title="",
    )  # fmt: skip
    assert found["choice"]["choice"]["answers"] == expected["answers"]


def test_the_training_length_is_read_from_the_run(tmp_path):
    weights = tmp_path / "pretrain_32.pth"
    assert eval_lm.trained_length(weights) is None
    run = tmp_path / "runs" / "pretrain_32"
    run.mkdir(parents=True)
    for step, text in ((1, '{"args": {"max_seq_len": 64}}'), (2, '{"args": {"max_seq_len": 96}}'), (3, '{"args": {')):
        (run / f"step_{step:08}.json").write_text(text)
    assert eval_lm.trained_length(weights) == 96


def test_files_of_one_name_are_told_apart_by_their_path():
    paths = [Path("a/test.jsonl"), Path("b/test.jsonl"), Path("c/other.jsonl")]
    assert [name for name, _ in eval_lm.named_files(paths)] == [str(paths[0]), str(paths[1]), "other"]


def test_tables_by_hand():
    checkpoints = [
        {"name": "one", "path": "x/one.pth", "text": {"by_source": {"s": {"English": {
            "bits_per_byte": 1.5, "interval95": [1.4, 1.6], "perplexity": 3.25}}}}},
        {"name": "二", "path": "x/two.pth", "choice": {"c": {
            "shots": 5, "baselines": {"random": 0.25, "majority": 0.3}, "by_subject": {},
            "acc": {"accuracy": 0.5, "interval95": [0.4, 0.6]}}}},
    ]  # fmt: skip
    assert report.text_table(checkpoints).splitlines() == [
        "                           one                       二",
        "bits per byte, s, English  1.500 ± 0.100 (ppl 3.25)  –",
        "c: random / majority       –                         25.0% / 30.0%",
        "c, 5 shots, by text, acc   –                         50.0% (40.0%–60.0%)",
    ]
    assert report.markdown(checkpoints).splitlines()[:5] == [
        "## Figures", "", "|  | one | 二 |", "| --- | --- | --- |",
        "| bits per byte, s, English | 1.500 ± 0.100 (ppl 3.25) | – |",
    ]  # fmt: skip


def test_a_picture_tells_its_checkpoints_apart():
    """Also those with no bar in the last panel; and more of them than there are chosen colours."""
    text = {"by_source": {"s": {"English": {"bits_per_byte": 1.5, "interval95": None}}}}
    right = {"accuracy": 0.5, "interval95": [0.4, 0.6]}
    choice = {"c": {"baselines": {"random": 0.25, "majority": 0.3}, "letter": right}}
    pytest.importorskip("matplotlib")
    plt, many = report.pyplot(), len(report.COLOURS) + 3
    for checkpoints in (
        [{"name": "one", "text": text}, {"name": "two", "choice": choice}],
        [{"name": str(n), "text": text, "choice": choice} for n in range(many)],
        [{"name": "one", "text": text}],
    ):
        figure = report.draw_bars(plt, checkpoints)
        (legend,) = figure.legends
        names = [label.get_text() for label in legend.get_texts()]
        guesses = ["guessing"] if "choice" in checkpoints[-1] else []
        assert names == [c["name"] for c in checkpoints] + guesses
        keys = [patch.get_facecolor() for patch in legend.get_patches()]
        assert len(set(keys)) == len(checkpoints)
        for panel, kind in zip(figure.axes, ("text", "choice"), strict=False):
            drawn = [bar.get_facecolor() for bar in panel.patches]
            assert drawn == [key for key, c in zip(keys, checkpoints, strict=True) if kind in c]
        plt.close(figure)
    assert report.draw_bars(plt, [{"name": "one"}]) is None


def test_mistakes_are_told_in_one_line(material, tmp_path):
    bad = write_records(tmp_path / "bad.jsonl", [CHOICES[0], {"question": "x"}])
    other = tmp_path / "other.json"
    other.write_text('{"checkpoints": [{"name": "x", "text": {}}]}')
    short = write_records(tmp_path / "short.jsonl", [{"text": "too short"}])
    weights = ["--weights", material.weights, "--report_dir", tmp_path / "report"]
    for words, what in [
        (["--weights", tmp_path / "none.pth", "--report_dir", tmp_path], "none.pth does not exist"),
        ([*weights[:2], tmp_path / "last.pth", *weights[2:], "--choice", bad], "last.pth does not exist"),
        (["--out_dir", tmp_path, "--report_dir", tmp_path], "There are no weights"),
        ([*weights, "--choice", bad], "bad.jsonl, line 2"),
        ([*weights, "--choice", tmp_path / "gone.jsonl"], "there is no such file"),
        ([*weights, "--questions", bad], "bad.jsonl, line 2"),
        ([*weights, "--text", material.choice], "holds choice records"),
        ([*weights, "--text", material.text, "--window", 8, "--stride", 9], "--stride 9 leaves tokens out"),
        ([*weights, "--text", material.text, "--lora", "absent"], "--lora absent"),
        ([*weights, "--text", short, "--tasks", "long_context"], "one row of 8 training lengths needs 4097"),
        (["--beside", other, "--report_dir", tmp_path], "no eval.json of this script"),
        (["--beside", tmp_path / "gone.json", "--report_dir", tmp_path], "gone.json cannot be read"),
        (["--weights", material.llama, *weights[2:], "--text", material.text, "--lora", "x"], "MiniMind weights"),
        ([*weights[:2], "--text", material.text, "--report_dir", bad], "--report_dir"),
    ]:  # fmt: skip
        assert what in one_error(evaluate(*words)), words
    for words, what in [
        (["--choice", bad, "--tasks", "text"], "--choice names files"),
        (["--choice", bad, "--shots_file", bad], "--shots_file without --shots"),
    ]:
        result = evaluate(*words)
        assert result.status == 2 and what in result.err.splitlines()[-1]
