"""Answers of a teacher as an SFT file: what is asked, what is written, who may be the teacher, what is refused.

The teacher is a tiny model that knows a few answers by heart, so it ends them by itself.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, unchanged_process
from test_model import llama_twin
from test_stage_datasets import TOOLS, assistant, user
from test_trainers import finish, one_error, start, train, tree, write_records

from dataset.lm_dataset import SFTDataset, encode_conversations, encode_prompt, parse_conversation
from model.generation import Decoder, stream_generate
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_model, load_tokenizer, save_weights
from scripts import write_answers
from trainer.optimizer import make_optimizer
from trainer.train_full_sft import summed_nll

SYSTEM = {"role": "system", "content": "Be brief.", "tools": TOOLS}
KNOWN = [
    [user("One?"), assistant("un")],
    [user("Two?"), assistant("deux, or 两个")],
    [user("Count!"), assistant("1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16")],
    [user("One?"), assistant("un"), user("And then?"), assistant("\ndeux")],
    [SYSTEM, user("Three?"), assistant("<think>\nhm</think>trois")],
    [user("Four?"), assistant("quatre")],
    [user("Four?"), assistant("four")],
]
COUNTING = 2  # number of the record whose answer is longer than 16 tokens
ASKED = [  # the same questions in every form that a file may have; what stands as last answer is never looked at
    {"conversations": KNOWN[0]},
    {"conversations": KNOWN[1][:1], "answer": "2"},
    {"conversations": [*KNOWN[2][:1], assistant("")]},
    {"conversations": [{"content": turn["content"]} for turn in KNOWN[3]]},
    {"conversations": [*KNOWN[4][:2], assistant("another answer")]},
    {"conversations": KNOWN[5], "answer": 4},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def material(tokenizer, tmp_path_factory) -> SimpleNamespace:
    """The teacher as a .pth file and as a folder of transformers, and questions."""
    folder = tmp_path_factory.mktemp("teacher")
    path = write_records(folder / "known.jsonl", [{"conversations": turns} for turns in KNOWN])
    data = SFTDataset(path, tokenizer, 256, "all", cache_dir=folder / "cache", show_progress=False)
    batch = data.collate([data[row] for row in range(len(data))])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "documents")}
    with unchanged_process():
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=1, max_position_embeddings=256))
        optimizer = make_optimizer(model, 0.0, torch.device("cpu"), "muon", torch.float32)
        for step in range(60):
            for group in optimizer.param_groups:
                group["lr"] = 2e-2 * min(1, (step + 1) / 5)
            hidden = model(**inputs, need_logits=False).hidden_states
            (summed_nll(hidden, model.lm_head.weight, batch) / data.count_terms(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
    weights = folder / "out" / "full_sft_64.pth"
    save_weights(model, weights, {"stage": "full_sft"})
    twin = llama_twin(load_model(weights), {"rope_type": "default"})
    twin.save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    questions = write_records(folder / "questions.jsonl", ASKED)
    return SimpleNamespace(folder=folder, weights=weights, foreign=folder / "llama", questions=questions)


@pytest.fixture
def write(material, tmp_path):
    """The script in this process: flags in, result out; what it reads must stay as it is."""
    before = tree(material.folder)

    def call(*more: object, out: str = "answers.jsonl", model: Path | None = None, data: Path | None = None):
        common = ["--model", model or material.weights, "--data_path", data or material.questions, "--device", "cpu"]
        common += ["--out_path", tmp_path / out, "--max_new_tokens", 16]
        return train(write_answers, [str(word) for word in (*common, *more)])

    yield call
    assert tree(material.folder) == before


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(path: Path) -> list[str]:
    return [record["conversations"][-1]["content"] for record in records(path)]


def greedy(model, tokenizer, turns: list[dict], **options) -> str:
    """What the chat would say to these turns."""
    messages, tools = parse_conversation(turns)
    ids = torch.tensor([encode_prompt(messages, tools, tokenizer, **options)])
    settings = dict(temperature=0, max_new_tokens=16, stop_ids={tokenizer.eos_token_id})
    return tokenizer.decode(list(stream_generate(model, ids, **settings)))


# -------------------------------------------------------------------------------------------------- what is written


def test_greedy_answers_are_those_of_the_chat_and_an_sft_file(write, material, tokenizer, tmp_path):
    result = write("--temperature", 0)
    assert result.status == 0 and result.err == ""
    path = tmp_path / "answers.jsonl"
    assert result.out == f"{path}: of 6 answers 1 unfinished, 5 written; 0 questions too long\n"
    kept = [turns for number, turns in enumerate(KNOWN[:6]) if number != COUNTING]
    written = [record["conversations"] for record in records(path)]
    assert [turns[:-1] for turns in written] == [
        [{**turn, "tools": TOOLS} if "tools" in turn else turn for turn in turns[:-1]] for turns in kept
    ]
    model = load_model(material.weights)
    assert answers(path) == [greedy(model, tokenizer, turns[:-1]) for turns in kept]
    assert answers(path)[:4] == [turns[-1]["content"] for turns in kept[:4]]  # learnt by heart
    assert answers(path)[4] in ("quatre", "four")

    data = SFTDataset(path, tokenizer, 256, "all", cache_dir=tmp_path / "cache", show_progress=False)
    assert data.stats["used"] == 5 and data.stats["skipped"] == data.stats["dropped"] == 0
    for mine, his in zip(*(encode_conversations(turns[:4], tokenizer) for turns in (written, kept)), strict=True):
        assert [a.tolist() for a in mine] == [b.tolist() for b in his]


def test_unfinished_answers_are_kept_on_request(write, material, tokenizer, tmp_path):
    result = write("--temperature", 0, "--keep_unfinished")
    assert "of 6 answers 1 unfinished, 6 written" in result.out, result.err
    cut = answers(tmp_path / "answers.jsonl")[COUNTING]
    assert cut and KNOWN[COUNTING][-1]["content"].startswith(cut)
    assert write("--temperature", 0, "--max_new_tokens", 64, out="longer.jsonl").status == 0
    assert answers(tmp_path / "longer.jsonl")[COUNTING] == KNOWN[COUNTING][-1]["content"]


@pytest.mark.parametrize("kind", ["ours", "foreign"])
def test_drawn_answers_follow_the_seed(kind, write, material, tmp_path):
    data = write_records(tmp_path / "four.jsonl", [ASKED[5], ASKED[0]])
    teacher = {"data": data, "model": material.weights if kind == "ours" else material.foreign}
    drawn = ("--num_answers", 8, "--temperature", 1.0)
    for name, more in [("a", []), ("again", []), ("other", ["--seed", 7]), ("cold", ["--temperature", 0.01])]:
        assert write(*drawn, *more, out=name, **teacher).status == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "again").read_bytes() != (tmp_path / "other").read_bytes()
    turns = [record["conversations"] for record in records(tmp_path / "a")]
    assert {t[-1]["content"] for t in turns if t[0] == user("Four?")} >= {"quatre", "four"}
    assert [t[0]["content"] for t in turns] == sorted(t[0]["content"] for t in turns)  # the answers to one side by side
    assert len(set(answers(tmp_path / "cold"))) == 2
    assert write(*drawn, "--top_p", 0, out="cut", **teacher).status == 0
    assert answers(tmp_path / "cut") == answers(tmp_path / "cold")
    if kind == "ours":  # each draw depends on nothing beside it
        assert write(*drawn, "--batch_size", 3, out="narrow", **teacher).status == 0
        assert (tmp_path / "narrow").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_system_turn_is_put_before_conversations_without_one(write, material, tokenizer, tmp_path):
    assert write("--temperature", 0, "--system", "Sei kurz.", "--keep_unfinished").status == 0
    model = load_model(material.weights)
    firsts = []
    for record in records(tmp_path / "answers.jsonl"):
        first, *turns, last = record["conversations"]
        firsts.append(first)
        assert first == (SYSTEM if turns == KNOWN[4][1:-1] else {"role": "system", "content": "Sei kurz."})
        assert "system" not in [turn["role"] for turn in turns]
        assert last["content"] == greedy(model, tokenizer, [first, *turns])
    assert SYSTEM in firsts and len(firsts) > 3


def test_a_thought_that_the_template_began_is_part_of_the_answer(write, material, tokenizer, tmp_path):
    model = load_model(material.weights)
    for flag, thinking, before in (("--enable_thinking", True, "<think>\n"), ("--no-enable_thinking", False, "")):
        assert write("--temperature", 0, "--keep_unfinished", flag, out=flag).status == 0
        said = [greedy(model, tokenizer, turns[:-1], enable_thinking=thinking) for turns in KNOWN[:6]]
        assert answers(tmp_path / flag) == [before + text for text in said if text.strip()]
    assert KNOWN[4][-1]["content"] in answers(tmp_path / "--enable_thinking")


def test_empty_answers_are_left_out(write, tokenizer, tmp_path, monkeypatch):
    said = [tokenizer.encode(text, add_special_tokens=False) for text in ("yes", "", " \n", "no", "", "so")]
    monkeypatch.setattr(write_answers, "draw_answers", lambda *about: [(ids, True) for ids in said])
    result = write()
    assert "of 6 answers 0 unfinished, 3 written" in result.out, result.err
    assert answers(tmp_path / "answers.jsonl") == ["yes", "no", "so"]


# ---------------------------------------------------------------------------------------------- who may be the teacher


@pytest.mark.parametrize("template", ["ours", "of another family"])
def test_a_transformers_folder_writes_what_the_same_weights_of_ours_write(template, write, material, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(material.foreign, folder)
    if template != "ours":
        path = folder / "chat_template.jinja"
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("{%- generation %}", "").replace("{%- endgeneration %}", ""), encoding="utf-8")
        assert "generation %" not in path.read_text(encoding="utf-8")
    assert write("--temperature", 0, "--keep_unfinished", out="ours").status == 0
    result = write("--temperature", 0, "--keep_unfinished", "--batch_size", 4, out="theirs", model=folder)
    assert "of 6 answers 1 unfinished, 6 written" in result.out and result.err == "", result.err
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_stage_is_found_from_another_folder(material, tmp_path):
    shutil.copy(material.questions, tmp_path / "questions.jsonl")
    script = ROOT / "scripts" / "write_answers.py"
    flags = ["--model", "full_sft", "--out_dir", material.weights.parent, "--temperature", 0, "--max_new_tokens", 16]
    places = ["--data_path", "questions.jsonl", "--out_path", "new/answers.jsonl", "--device", "cpu"]
    result = finish(start([script, *flags, *places], cwd=tmp_path))
    assert result.status == 0 and "5 written" in result.out and result.err == "", result.err
    assert answers(tmp_path / "new" / "answers.jsonl")[0] == "un"


# ------------------------------------------------------------------------------------------------------ what is refused


def test_questions_without_room_are_left_out_and_counted(write, tmp_path):
    result = write("--temperature", 0, "--max_seq_len", 64)
    assert "of 5 answers 1 unfinished, 4 written; 1 questions too long" in result.out, result.err
    result = write("--temperature", 0, "--max_new_tokens", 140, out="fits")  # the model has 256 positions
    assert "; 1 questions too long" in result.out, result.err
    result = write("--num_answers", 3, "--max_seq_len", 64, "--keep_unfinished", out="thrice")
    assert "of 15 answers " in result.out and "; 1 questions too long" in result.out, result.err
    assert "no question leaves room" in one_error(write("--max_new_tokens", 256, out="none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "record, what",
    [
        ({"text": "one"}, 'key "conversations" is missing'),
        ({"conversations": [assistant("first")]}, "nothing to answer"),
        ({"conversations": [user("a"), assistant(""), user("b")]}, "turn 2: the assistant's content is empty"),
        ("nonsense", "a JSON string"),
    ],
    ids=["key", "no question", "empty turn", "no object"],
)
def test_a_bad_line_is_named_and_the_old_file_stays(record, what, write, tmp_path):
    (tmp_path / "answers.jsonl").write_text("old", encoding="utf-8")
    error = one_error(write(data=write_records(tmp_path / "bad.jsonl", [ASKED[0], record])))
    assert f"bad.jsonl, line 2: {what}" in error
    assert (tmp_path / "answers.jsonl").read_text(encoding="utf-8") == "old"


def test_wrong_flags_are_one_line(write, material, tmp_path):
    lame = tmp_path / "lame" / "full_sft_64.pth"
    lame.parent.mkdir()
    shutil.copy(material.weights.with_suffix(".json"), lame.parent)
    state = torch.load(material.weights, weights_only=True)
    torch.save({name: tensor * float("nan") for name, tensor in state.items()}, lame)
    (tmp_path / "empty.jsonl").touch()
    before = tree(tmp_path)
    for more, changes, what in [
        (["--data_path", "nowhere.jsonl"], {}, "nowhere.jsonl: there is no such file"),
        (["--data_path", tmp_path / "empty.jsonl"], {}, "is empty"),
        (["--out_path", material.questions], {}, "holds the questions themselves"),
        (["--out_path", material.questions / "deeper"], {}, "--out_path"),
        (["--temperature", 0, "--num_answers", 3], {}, "3 times the same answer"),
        (["--model", "nowhere.pth"], {}, "nowhere.pth does not exist"),
        (["--model", "grpo", "--out_dir", material.weights.parent], {}, "no grpo weights"),
        (["--device", "toaster"], {}, "toaster"),
        (["--max_new_tokens", 1], {}, "of 6 answers 6 unfinished, 0 written"),
        ([], {"model": lame}, "not a number"),
    ]:
        assert what in one_error(write(*more, **changes))
    for flag, value in [("--temperature", -1), ("--top_p", 1.5), ("--num_answers", 0), ("--seed", -1)]:
        result = write(flag, value)
        assert result.status == 2 and f"argument {flag}" in result.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("moment", ["while answering", "while writing"])
def test_an_interruption_leaves_the_old_file(moment, write, tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    path.write_text("old", encoding="utf-8")
    calls = [0]
    owner, name = (Decoder, "step") if moment == "while answering" else (json, "dumps")
    real = getattr(owner, name)

    def interrupted(*args, **options):
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        result = write("--temperature", 0)
    assert result.status == 130 and calls == [4]
    assert tree(tmp_path) == {"answers.jsonl": b"old"}
    assert write("--temperature", 0).status == 0 and len(answers(path)) == 5
