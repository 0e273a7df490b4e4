"""Evaluation of text and choices: figures against plain logits, numbers by hand, or lm-eval on the same items.

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
from test_trainers import write_records

from dataset.json_lines import DataError
from dataset.lm_dataset import PretrainDataset, encode_conversations
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import WeightsError, load_model, load_tokenizer, save_weights
from scripts.chat_text import chat_ids
from scripts.evaluating import language_model as lm
from scripts.evaluating import multiple_choice as mc
from scripts.evaluating import scoring

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
