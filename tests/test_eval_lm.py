"""Evaluation: every figure against plain logits, numbers counted by hand, or lm-eval on the same items.

Tiny models of large random weights, so that their preferences differ clearly; the oracles call the model on one plain
sequence at a time.

Dimension legend: T tokens.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import unchanged_process
from test_model import llama_twin
from test_trainers import Result, one_error, train, write_records

from dataset.json_lines import DataError
from dataset.lm_dataset import PretrainDataset, encode_conversations
from model.generation import stream_generate
from model.model_lora import LoraConfig, add_lora, load_lora, lora_layers, save_lora
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import WeightsError, load_model, load_tokenizer, save_weights
from scripts import eval_lm
from scripts.chat_text import chat_ids
from scripts.evaluating import generation_tasks as tasks
from scripts.evaluating import language_model as lm
from scripts.evaluating import long_context as long
from scripts.evaluating import multiple_choice as mc
from scripts.evaluating import report, scoring
from trainer.command_line import UserError

BOS, EOS = 1, 2
CAPITALS = [
    ("France", "Paris", "Rome", "Lisbon", "Athens", "A"),
    ("Italy", "Warsaw", "Rome", "Dublin", "Madrid", "B"),
    ("Spain", "the old town of Madrid", "Warsaw", "Oslo", "Athens", "A"),
    ("Norway", "Bern", "Kyiv", "Oslo", "Cairo", "C"),
    ("Poland", "Paris", "Berlin", "Rome", "Warsaw", "D"),
    ("Egypt", "Cairo", "Accra", "Tunis", "Rabat", "A"),
]
OPPOSITES = [
    ("大", "小", "高高的山", "红", "快", "A"),
    ("高", "长", "低", "蓝色", "慢", "B"),
    ("新", "美", "远", "旧", "白", "C"),
    ("冷", "硬", "多", "轻", "热", "D"),
    ("早", "晚", "亮", "深", "甜", "A"),
]
CHOICES = [
    *({"subject": "capital", "question": f"What is the capital of {x}?", **dict(zip("ABCD", o, strict=True)),
       "answer": answer} for x, *o, answer in CAPITALS),
    *({"subject": "opposite", "question": f"“{x}”的反义词是什么？", **dict(zip("ABCD", o, strict=True)),
       "answer": answer} for x, *o, answer in OPPOSITES),
]  # fmt: skip
TEXTS = [
    " ".join(f"Line {i} of {i * i}, and so on." for i in range(30)),  # several windows long
    "你好，世界。这是一个测试！" * 2,
    " a b",
    "12 + 3 = 15",
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def tiny(seed: int = 0, **changes) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"max_position_embeddings": 128, "initializer_range": 0.3}
    return MiniMindForCausalLM(MiniMindConfig(**sizes | changes)).eval()


@pytest.fixture(scope="module")
def material(tokenizer, tmp_path_factory) -> SimpleNamespace:
    """A tiny model as a .pth file and as a folder of transformers' Llama, and files to judge it by."""
    folder = tmp_path_factory.mktemp("eval")
    weights = folder / "out" / "full_sft_32.pth"
    save_weights(tiny(), weights, {"stage": "full_sft"})
    model = load_model(weights)
    llama_twin(model, {"rope_type": "default"}).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    return SimpleNamespace(
        folder=folder, weights=weights, model=model, llama=folder / "llama",
        choice=write_records(folder / "choice.jsonl", CHOICES),
        text=write_records(folder / "text.jsonl", [{"text": text} for text in TEXTS]),
    )  # fmt: skip


@torch.inference_mode()
def plain_logps(model, context: list[int], continuation: list[int]) -> torch.Tensor:
    """log p of each token of the continuation, from the logits of one plain sequence."""
    logits = model(torch.tensor([[*context, *continuation]])).logits[0].double()
    return logits.log_softmax(-1)[range(len(context) - 1, len(context) + len(continuation) - 1), continuation]


def accuracies(result: dict) -> dict[str, float]:
    return {name: result[name]["accuracy"] for name in mc.MEASURES if name in result}


# -------------------------------------------------------------------------------------------------------------- scoring


ITEMS = [
    scoring.Item([1, 50, 60], [[70, 80, 90], [71], [72, 73], [70, 80, 91]]),
    scoring.Item([1], [[300, 301, 302, 303, 304, 305, 306]]),
    scoring.Item(list(range(400, 440)), [[5, 6], [7]]),
    scoring.Item([9, 8], [[11]]),
]


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
@pytest.mark.parametrize("changes", [{}, {"use_moe": True}], ids=["dense", "moe"])
def test_shared_contexts_give_the_log_probabilities_of_plain_sequences(changes, batch_tokens):
    model = tiny(**changes)
    found = scoring.score(model, ITEMS, batch_tokens, "")
    assert [[len(b) for b in branches] for branches in found] == [[3, 1, 2, 3], [7], [2, 1], [1]]
    for item, branches in zip(ITEMS, found, strict=True):
        for branch, logps in zip(item.branches, branches, strict=True):
            torch.testing.assert_close(logps.double(), plain_logps(model, item.context, branch), atol=2e-5, rtol=1e-5)


def test_a_foreign_model_gives_the_same(material):
    folder = load_model(material.llama)
    assert not isinstance(folder, MiniMindForCausalLM)
    ours, theirs = (scoring.score(model, ITEMS, 64, "") for model in (material.model, folder))
    for a, b in zip(sum(ours, []), sum(theirs, []), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_a_row_holds_a_context_once_and_its_branches_side_by_side():
    row = scoring.lay_out([1, 2, 3], [[4, 5, 6], [7], [8, 9]])
    assert row.ids == [1, 2, 3, 4, 5, 8] and row.positions == [0, 1, 2, 3, 4, 3]
    assert row.segments == [0, 0, 0, 1, 1, 3] and row.targets == [4, 5, 6, 7, 8, 9] and row.heads == [2, 3, 4, 2, 2, 5]
    (mask,) = scoring.branch_mask(torch.tensor([row.segments]))[0]
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]
    assert scoring.branch_mask(torch.tensor([[0, 0, 1, 1, scoring.PADDING]])) is None


def test_numbers_that_are_none_are_refused():
    model = tiny()
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(WeightsError, match="not a number"):
        scoring.score(model, ITEMS, 64, "")


def test_pairs_are_split_as_in_lm_eval(tokenizer):
    pairs = [("Answer:", " Paris"), ("Answer: ", "Paris"), ("答案：", "巴黎"), ("It is", "n't\n"), ("a b \n", "c")]
    split = scoring.encode_pairs(tokenizer, pairs)
    assert split[0] == split[1]  # the blank goes to the continuation
    for (context, continuation), (head, rest) in zip(pairs, split, strict=True):
        bare = context.rstrip()
        assert head == tokenizer.encode(bare)
        assert rest == tokenizer.encode(bare + context[len(bare) :] + continuation)[len(head) :]
    merged = next(i for i in range(300, 6385) if tokenizer.decode([i]).isalpha() and len(tokenizer.decode([i])) > 3)
    word = tokenizer.decode([merged])  # one token: behind its beginning nothing would be left
    ((head, rest),) = scoring.encode_pairs(tokenizer, [(word[:-1], word[-1])])
    assert head == tokenizer.encode(word[:-1]) and rest


def test_a_control_token_in_a_text_is_text(tokenizer):
    (ids,) = scoring.encode(tokenizer, ["a<|im_end|>b"])
    assert EOS not in ids and tokenizer.decode(ids) == "a<|im_end|>b"


# ----------------------------------------------------------------------------------------------------------------- text


def test_windows_count_each_token_exactly_once():
    for length in range(1, 30):
        for window in range(1, 12):
            for stride in range(1, window + 1):
                parts = list(lm.windows(length, window, stride))
                assert [t for _, first, end in parts for t in range(first, end)] == list(range(1, length))
                for start, first, end in parts:
                    assert 0 <= start < first < end and end - 1 - start <= window
                    # A token sees all before it, or at least window − stride + 1 tokens.
                    assert start == 0 or first - start >= window - stride + 1
    assert list(lm.windows(12, 4, 4)) == [(0, 1, 5), (4, 5, 9), (7, 9, 12)]
    assert list(lm.windows(12, 4, 2)) == [(0, 1, 5), (2, 5, 7), (4, 7, 9), (6, 9, 11), (7, 11, 12)]


@pytest.mark.parametrize(("window", "stride"), [(96, 96), (20, 5), (7, 7)])
def test_bits_per_byte_are_those_of_plain_logits(material, tokenizer, window, stride):
    documents = lm.read_documents(material.text, tokenizer, None, 0)
    result = lm.evaluate_text(
        material.model, tokenizer, documents, window=window, stride=stride, batch_tokens=64
    )  # a batch holds parts of several documents
    nats = {}
    for text in TEXTS:
        ids, total, passes = [BOS, *tokenizer.encode(text)], 0.0, {}
        for t in range(1, len(ids)):  # one token at a time, by the rule in words
            piece = max(math.ceil((t - window) / stride), 0)
            end = min(window + piece * stride, len(ids) - 1)
            start = max(end - window, 0)
            if end not in passes:
                passes[end] = plain_logps(material.model, ids[start : start + 1], ids[start + 1 : end + 1])
            total -= passes[end][t - start - 1].item()
        nats[text] = total
    sizes = {text: len(text.encode()) for text in TEXTS}
    assert result["bits_per_byte"] == pytest.approx(sum(nats.values()) / math.log(2) / sum(sizes.values()), rel=1e-5)
    tokens = sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert result["perplexity"] == pytest.approx(math.exp(sum(nats.values()) / tokens), rel=1e-4)
    assert result["documents"] == 4 and result["tokens"] == tokens and result["bytes"] == sum(sizes.values())
    chinese = result["by_source"]["text"]["Chinese"]
    assert chinese["documents"] == 1 and chinese["interval95"] is None
    assert chinese["bits_per_byte"] == pytest.approx(nats[TEXTS[1]] / math.log(2) / sizes[TEXTS[1]], rel=1e-5)
    assert set(result["by_source"]["text"]) == {"Chinese", "English", "other"}


def test_figures_by_hand():
    nats = math.log(2) * np.array([10.0, 30.0])
    found = lm.figures(np.stack([nats, [5, 10], [8, 12]], axis=1))
    assert found["bits_per_byte"] == pytest.approx(2.0) and found["tokens"] == 15 and found["bytes"] == 20
    assert found["perplexity"] == pytest.approx(2 ** (40 / 15))
    # Residuals 10 − 2·8 = −6 and 30 − 2·12 = 6: error √((36 + 36)·2/1)/20 = 0.6
    assert found["interval95"] == pytest.approx([2 - 1.959964 * 0.6, 2 + 1.959964 * 0.6])


def test_of_conversations_the_words_of_the_assistant_count(material, tokenizer, tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day"},
             {"role": "user", "content": "And?"}, {"role": "assistant", "content": "没事"}]  # fmt: skip
    path = write_records(tmp_path / "chats.jsonl", [{"conversations": turns, "source": "talk"}])
    documents = lm.read_documents(path, tokenizer, None, 0)
    result = lm.evaluate_text(material.model, tokenizer, documents, window=96, stride=96, batch_tokens=64)
    (ids,), (trained,) = encode_conversations([turns], tokenizer)
    logps = plain_logps(material.model, ids[:1].tolist(), ids[1:].tolist())
    nats = -sum(p.item() for p, t in zip(logps, trained[1:], strict=True) if t)
    assert list(result["by_source"]) == ["talk"] and result["bytes"] == len("Good day没事".encode())
    assert result["tokens"] == trained.sum()  # with the <|im_end|> of both answers
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / result["bytes"], rel=1e-5)


def test_held_out_are_the_records_that_training_held_out(tokenizer, tmp_path):
    path = write_records(
        tmp_path / "texts.jsonl", [{"text": f"Record number {i}, {i * 7919} of it"} for i in range(80)]
    )
    cache = tmp_path / "cache"
    data = PretrainDataset(path, tokenizer, 32, "val", val_ratio=0.1, cache_dir=cache, show_progress=False)
    rows = [data[row] for row in range(len(data))]
    held = {
        tokenizer.decode(row["input_ids"][row["documents"] == d], skip_special_tokens=True)
        for row in rows
        for d in range(int(row["documents"].max()) + 1)
    }
    found = lm.read_documents(path, tokenizer, 0.1, 0, cache)
    assert 2 < len(held) < 20 and {d.value for d in found} == held and len(found) == len(held)
    assert len(lm.read_documents(path, tokenizer, None, 0, cache)) == 80
    assert [d.value for d in lm.read_documents(path, tokenizer, None, 4)] == [
        f"Record number {i}, {i * 7919} of it" for i in (0, 20, 40, 60)
    ]


def test_lines_that_are_not_wanted_are_not_looked_at(tokenizer, tmp_path, monkeypatch):
    """A file of training holds a million records; a few of them are wanted."""
    path = tmp_path / "many.jsonl"
    lines = [json.dumps({"text": f"Record {i}"}) if i % 10 == 0 else "" if i % 10 == 5 else "{cut" for i in range(100)]
    path.write_text("\n".join(lines), encoding="utf-8")
    parsed, parse = [], lm.parse_line
    monkeypatch.setattr(lm, "parse_line", lambda raw: parsed.append(raw) or parse(raw))
    found = lm.read_documents(path, tokenizer, None, 10)  # of 90 lines that are not empty: 0, 9, 18 …
    assert [d.value for d in found] == [f"Record {i}" for i in range(0, 100, 10)] and len(parsed) == 10
    with pytest.raises(DataError, match="line 2:"):
        lm.read_documents(path, tokenizer, None, 0)


def test_files_of_no_text_are_refused(material, tokenizer, tmp_path):
    with pytest.raises(DataError, match="holds choice records"):
        lm.read_documents(material.choice, tokenizer, None, 0)
    path = write_records(tmp_path / "bad.jsonl", [{"text": "good"}, {"text": 3}])
    with pytest.raises(DataError, match="line 2"):
        lm.read_documents(path, tokenizer, None, 0)


# ------------------------------------------------------------------------------------------------------ multiple choice


def test_prompts_to_the_letter(material):
    questions = mc.read_choices(material.choice)
    english, chinese = questions[0], questions[-1]
    assert mc.plain_prompt(english, [], letters=True) == (
        "Question: What is the capital of France?\nA. Paris\nB. Rome\nC. Lisbon\nD. Athens\nAnswer:"
    )
    assert mc.plain_prompt(english, mc.pick_shots(english, questions, 2), letters=False) == (
        "Question: What is the capital of Italy?\nAnswer: Rome\n\n"
        "Question: What is the capital of Spain?\nAnswer: the old town of Madrid\n\n"
        "Question: What is the capital of France?\nAnswer:"
    )
    assert mc.plain_prompt(chinese, mc.pick_shots(chinese, questions, 1), letters=True) == (
        "问题：“大”的反义词是什么？\nA. 小\nB. 高高的山\nC. 红\nD. 快\n答案：A\n\n"
        "问题：“早”的反义词是什么？\nA. 晚\nB. 亮\nC. 深\nD. 甜\n答案："
    )
    assert mc.chat_turns(english, questions[1:2], letters=True) == [
        {"role": "user", "content": "What is the capital of Italy?\nA. Warsaw\nB. Rome\nC. Dublin\nD. Madrid\n"
                                    "Answer with the letter alone."},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "What is the capital of France?\nA. Paris\nB. Rome\nC. Lisbon\nD. Athens\n"
                                    "Answer with the letter alone."},
    ]  # fmt: skip
    assert mc.chat_turns(chinese, [], letters=False) == [{"role": "user", "content": "“早”的反义词是什么？"}]


def test_shots_are_others_of_the_same_subject():
    def question(number: int, subject: str, text: str) -> mc.Question:
        return mc.Question(number, subject, text, {"A": "x", "B": "y"}, "A")

    pool = [question(1, "s", "one"), question(2, "t", "two"), question(3, "s", "three"), question(4, "s", "one"),
            question(5, "s", "five")]  # fmt: skip
    assert [q.line for q in mc.pick_shots(pool[0], pool, 5)] == [3, 5]  # line 4 asks the very same
    assert [q.line for q in mc.pick_shots(pool[2], pool, 2)] == [1, 4]
    assert mc.pick_shots(pool[1], pool, 3) == [] and mc.pick_shots(pool[0], pool, 0) == []


def test_the_form_follows_the_language_of_most_questions(tmp_path):
    records = [dict(CHOICES[0], subject="x"), dict(CHOICES[-1], subject="x"), dict(CHOICES[-2], subject="x")]
    assert [q.form for q in mc.read_choices(write_records(tmp_path / "c.jsonl", records))] == ["zh"] * 3


def test_options_that_are_empty_are_none(tmp_path):
    path = write_records(tmp_path / "three.jsonl", [dict(CHOICES[0], D=" "), CHOICES[1]])
    questions = mc.read_choices(path)
    assert questions[0].options == {"A": "Paris", "B": "Rome", "C": "Lisbon"}
    assert mc.baselines(questions)["random"] == pytest.approx((1 / 3 + 1 / 4) / 2)
    for bad, reason in ((dict(CHOICES[0], A=""), "the answer is A"), (dict(CHOICES[0], answer="E"), '"answer" is "E"')):
        with pytest.raises(DataError, match=f"line 2: {reason}"):
            mc.read_choices(write_records(tmp_path / "bad.jsonl", [CHOICES[1], bad]))


def test_each_measure_divides_by_its_own_length():
    question = mc.Question(1, "", "?", {"A": "ab", "B": "abcdefgh", "C": "巴黎", "D": "x"}, "A")
    assert mc.decide(question, [-4.0, -8.0, -3.0, -2.5]) == {"acc": "D", "acc_norm": "B", "acc_bytes": "C"}
    assert mc.decide(question, [-1.0, -1.0, -1.0, -1.0])["acc"] == "A"  # the first of equal ones, as np.argmax


def test_baselines_and_intervals_by_hand():
    questions = [mc.Question(i, "", "?", dict.fromkeys("ABCD", "x"), a) for i, a in enumerate("AABBBC")]
    assert mc.baselines(questions) == {"random": 0.25, "majority": 0.5}
    found = mc.accuracy([True] * 8 + [False] * 2)
    assert (found["right"], found["total"], found["accuracy"]) == (8, 10, 0.8)
    assert found["interval95"] == pytest.approx((0.49016, 0.94331), abs=1e-5)  # Wilson 1927


@pytest.mark.parametrize(("shots", "chat"), [(0, False), (2, False), (2, True)])
def test_choices_are_those_of_plain_logits(material, tokenizer, shots, chat):
    questions = mc.read_choices(material.choice)
    model = tiny(seed=1, max_position_embeddings=1024)
    result = mc.evaluate_choices(
        model, tokenizer, questions, questions, shots=shots, ways=["letter", "text"], chat=chat, thinking=None,
        front=[BOS], batch_tokens=256, title="",
    )  # fmt: skip
    right = dict.fromkeys(mc.MEASURES, 0)
    for q, row in zip(questions, result["answers"], strict=True):
        examples, texts = mc.pick_shots(q, questions, shots), list(q.options.values())
        for way, said in (("letter", list("ABCD")), ("text", texts)):
            letters, blank = way == "letter", " " if q.form == "en" else ""
            if chat:
                context = chat_ids(tokenizer, mc.chat_turns(q, examples, letters), None)
                branches = [tokenizer.encode(option) for option in said]
            else:
                prompt = mc.plain_prompt(q, examples, letters)
                context = [BOS, *tokenizer.encode(prompt)]
                branches = [tokenizer.encode(prompt + blank + option)[len(context) - 1 :] for option in said]
            logps = [plain_logps(model, context, branch).sum().item() for branch in branches]
            assert row[f"{way}_logps"] == pytest.approx(logps, abs=1e-3)
            scale = {"letter": [1] * 4} if letters else {
                "acc": [1] * 4, "acc_norm": list(map(len, texts)), "acc_bytes": [len(t.encode()) for t in texts]
            }  # fmt: skip
            for name, lengths in scale.items():
                best = max(range(4), key=lambda i: logps[i] / lengths[i])  # noqa: B023
                right[name] += "ABCD"[best] == q.answer
    assert {name: result[name]["right"] for name in mc.MEASURES} == right
    assert result["shots"] == result["fewest_shots"] == shots and result["chat"] == chat and not result["cut_prompts"]
    assert {s: f["questions"] for s, f in result["by_subject"].items()} == {"capital": 6, "opposite": 5}
    for name in mc.MEASURES:
        assert sum(f[name]["right"] for f in result["by_subject"].values()) == right[name]
    assert result["by_subject"]["capital"]["baselines"] == {"random": 0.25, "majority": 0.5}


def test_a_prompt_that_is_too_long_loses_its_beginning(tokenizer):
    model, context = tiny(max_position_embeddings=16), list(range(100, 120))
    pairs = [(context, [5, 6, 7]), (context, [8])]
    items = mc.as_items(pairs, 16)
    assert items == [scoring.Item(context[6:], [[5, 6, 7]]), scoring.Item(context[4:], [[8]])]
    assert mc.as_items(pairs, 22) == [scoring.Item(context, [[5, 6, 7], [8]])]
    (first,), _ = scoring.score(model, items, 64, "")
    torch.testing.assert_close(first.double(), plain_logps(model, context[6:], [5, 6, 7]), atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------- the same as lm-eval


@pytest.fixture(scope="module")
def harness(material, tmp_path_factory) -> dict:
    """lm-eval, offline, on the folder: every option's log-probability, and its figures."""
    with pytest.MonkeyPatch.context() as patch, unchanged_process():
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.setenv(name, "1")
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        folder = tmp_path_factory.mktemp("harness")
        english, chinese = CHOICES[:6], CHOICES[6:]
        files = {
            "english": write_records(folder / "en.jsonl", english),
            "chinese": write_records(folder / "zh.jsonl", chinese),
            "dev": write_records(folder / "dev.jsonl", english[:2]),
        }  # fmt: skip

        def task(name: str, test: Path, **more) -> dict:
            data = {"test": str(test)} | ({"dev": str(files["dev"])} if "num_fewshot" in more else {})
            kwargs = {"data_files": data, "cache_dir": str(folder / "cache")}
            return {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test", **more}

        def choice(name: str, test: Path, text: str, options: str, **more) -> dict:
            metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True}
                       for m in ("acc", "acc_norm", "acc_bytes")]  # fmt: skip
            return task(
                name, test, output_type="multiple_choice", doc_to_text=text, doc_to_choice=options, metric_list=metrics,
                doc_to_target="{{['A', 'B', 'C', 'D'].index(answer)}}", **more,
            )  # fmt: skip

        letters = "A. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n"
        few = {"num_fewshot": 2, "fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}}
        bos = {"description": "<|im_start|>"}
        en, zh, options = "Question: {{question}}\n", "问题：{{question}}\n", "{{[A, B, C, D]}}"
        chinese_text = {"target_delimiter": ""}
        wanted = [
            choice("en_text", files["english"], en + "Answer:", options, **bos),
            choice("en_text_no_bos", files["english"], en + "Answer:", options),
            choice("en_letter", files["english"], en + letters + "Answer:", "{{['A', 'B', 'C', 'D']}}", **bos),
            choice("en_text_2", files["english"], en + "Answer:", options, **bos, **few),
            choice("zh_text", files["chinese"], zh + "答案：", options, **bos, **chinese_text),
            choice("zh_letter", files["chinese"], zh + letters + "答案：", "{{['A', 'B', 'C', 'D']}}", **bos,
                   **chinese_text),
            task("rolling", material.text, output_type="loglikelihood_rolling", doc_to_text="",
                 doc_to_target="{{text}}",
                 metric_list=[{"metric": m} for m in ("bits_per_byte", "byte_perplexity", "word_perplexity")]),
        ]  # fmt: skip
        model = HFLM(pretrained=str(material.llama), device="cpu", dtype="float32", batch_size=3)
        found = lm_eval.simple_evaluate(
            model=model, tasks=wanted, task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
        )
    return {"results": found["results"], "samples": found["samples"], "files": files}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pth", "folder"])
@pytest.mark.parametrize(
    ("name", "file", "way", "shots", "front"),
    [
        ("en_text", "english", "text", 0, [BOS]), ("en_text_no_bos", "english", "text", 0, []),
        ("en_letter", "english", "letter", 0, [BOS]), ("en_text_2", "english", "text", 2, [BOS]),
        ("zh_text", "chinese", "text", 0, [BOS]), ("zh_letter", "chinese", "letter", 0, [BOS]),
    ],
)  # fmt: skip
def test_accuracies_are_those_of_lm_eval(harness, material, tokenizer, name, file, way, shots, front, kind):
    model = load_model(material.weights if kind == "pth" else material.llama)
    questions, dev = (mc.read_choices(harness["files"][n]) for n in (file, "dev"))
    if shots:  # its sampler takes the first two of the file, even where one of them is what is asked
        questions = [q for q in questions if q.text not in {d.text for d in dev}]
    result = mc.evaluate_choices(
        model, tokenizer, questions, dev, shots=shots, ways=[way], chat=False, thinking=None, front=front,
        batch_tokens=128, title="",
    )  # fmt: skip
    theirs = {s["doc"]["question"]: s for s in harness["samples"][name]}
    for q, row in zip(questions, result["answers"], strict=True):
        sample = theirs[q.text]
        logps = [float(response[0][0]) for response in sample["resps"]]
        assert row[f"{way}_logps"] == pytest.approx(logps, abs=1e-4)
        for measure in ("acc", "acc_norm", "acc_bytes"):
            assert (row["letter" if way == "letter" else measure] == q.answer) == bool(sample[measure])
    if not shots:
        figures = harness["results"][name]
        for measure, accuracy in accuracies(result).items():
            assert accuracy == figures[f"{'acc' if measure == 'letter' else measure},none"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pth", "folder"])
def test_bits_per_byte_are_those_of_lm_eval(harness, material, tokenizer, kind):
    model = load_model(material.weights if kind == "pth" else material.llama)
    documents = lm.read_documents(material.text, tokenizer, None, 0)
    result = lm.evaluate_text(model, tokenizer, documents, window=128, stride=128, batch_tokens=300)
    figures = harness["results"]["rolling"]
    assert len(scoring.encode(tokenizer, TEXTS[:1])[0]) > 256  # three windows of the model's 128 positions
    assert result["bits_per_byte"] == pytest.approx(figures["bits_per_byte,none"], rel=1e-6)
    assert 2 ** result["bits_per_byte"] == pytest.approx(figures["byte_perplexity,none"], rel=1e-5)
    words = sum(len(text.split()) + text.startswith(" ") for text in TEXTS)  # re.split counts the blank at the front
    assert math.exp(result["nats"] / words) == pytest.approx(figures["word_perplexity,none"], rel=1e-4)


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
