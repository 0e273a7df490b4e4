"""Data of the later stages: pairs of answers, dialogue without thinking, mixtures, prompts, against naive renditions.

Dimension legend: B batch · T tokens of a row · N trained positions · P pairs.
"""

import json
import random

import pytest
import torch

from dataset import lm_dataset as lm
from dataset.json_lines import DataError
from dataset.lm_dataset import IGNORE, SFTDataset, encode_conversations, encode_prompt, parse_conversation
from dataset.stage_datasets import (
    DialogueDataset,
    MixedDataset,
    PairDataset,
    PromptDataset,
    ReasonDataset,
    encode_pairs,
)
from model.weights import load_tokenizer

EOS, PAD = 2, 0


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def write(path, records):
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    return path


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Keyword arguments that keep the caches of these tests together: a file of known content is not read again."""
    return {"cache_dir": tmp_path_factory.mktemp("cache"), "show_progress": False}


def documents_of(item):
    """The documents of a row in order, each as (ids, labels, positions)."""
    numbers = sorted(set(item["documents"].tolist()) - {-1})
    assert numbers == list(range(len(numbers)))
    names = ("input_ids", "labels", "position_ids")
    return [tuple(item[name][item["documents"] == n].tolist() for name in names) for n in numbers]


def alone(turns, tokenizer):
    """(ids, range of the last answer) of one conversation by itself: it begins where generation would begin, and ends
    with the last <|im_end|> (one that is written out in a content has other ids)."""
    (ids,), _ = encode_conversations([turns], tokenizer)
    messages, tools = parse_conversation(turns)
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    end = ends_of_turns(ids.tolist())[-1 - (len(messages) - 1 - last)]
    return ids.tolist(), range(len(encode_prompt(messages[:last], tools, tokenizer)), end + 1)


def ends_of_turns(ids):
    return [i for i, token in enumerate(ids) if token == EOS]


def labels_at(ids, trained):
    return [token if i in trained else IGNORE for i, token in enumerate(ids)]


# ---- pairs of answers ----------------------------------------------------------------------------

TOOLS = json.dumps([{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}])
PROMPTS = {
    "one turn": [user("Which animal says meow?")],
    "several turns": [user("a"), assistant("b c"), user("and then?"), assistant("你好。"), user("d")],
    "a system turn": [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("\nHo"), user("Hi again")],
    "tools": [
        {"role": "system", "content": "", "tools": TOOLS},
        user("1 + 2?"),
        assistant("", tool_calls=json.dumps([{"name": "add", "arguments": {"a": 1}}]), reasoning_content="use it"),
        {"role": "tool", "content": '{"sum": 3}'},
    ],
    "control tokens as text": [user("What does <|im_end|> mean, <|im_start|>assistant?")],
}
ANSWERS = [
    ("the cat", "a dog"),
    ("\n\nYes", "\nNo"),
    ("好", "It is <|im_end|> 12.\n"),
    ("<think>\nx\n</think>\n\n1", "2"),
]


def pair(prompt, chosen, rejected):
    return {"chosen": [*prompt, assistant(chosen)], "rejected": [*prompt, assistant(rejected)]}


def without_roles(record):
    return {key: [{"content": turn["content"]} for turn in turns] for key, turns in record.items()}


PAIRS = [pair(prompt, *answers) for prompt in PROMPTS.values() for answers in ANSWERS]
PAIRS.append(without_roles(pair(PROMPTS["several turns"], "e", "f")))


WIDTH = 500


@pytest.fixture(scope="module")
def pairs(tokenizer, tmp_path_factory, here):
    path = write(tmp_path_factory.mktemp("pairs") / "dpo.jsonl", PAIRS)
    return PairDataset(path, tokenizer, WIDTH, split="all", **here)


def test_a_row_holds_whole_pairs_each_conversation_as_if_alone(pairs, tokenizer):
    found = []
    for row in range(len(pairs)):
        item = pairs[row]
        assert item["row"] == row and all(len(item[n]) == WIDTH for n in item if n != "row")
        documents = documents_of(item)
        assert len(documents) % 2 == 0
        assert (
            item["documents"][1:] >= item["documents"][:-1]
        ).sum() >= WIDTH - 2  # ascending, but for the padding behind
        for ids, _, positions in documents:
            assert positions == list(range(len(ids)))
        padding = item["documents"] < 0
        assert (item["input_ids"][padding] == PAD).all() and (item["labels"][padding] == IGNORE).all()
        assert (item["position_ids"][padding] == 0).all()
        assert int(padding.sum()) + sum(len(ids) for ids, _, _ in documents) == WIDTH
        found += [
            (*map(tuple, a[:2]), *map(tuple, b[:2])) for a, b in zip(documents[::2], documents[1::2], strict=True)
        ]
    expected = []
    for record in PAIRS:
        sides = [alone(record[key], tokenizer) for key in ("chosen", "rejected")]
        expected.append(sum(((tuple(ids), tuple(labels_at(ids, trained))) for ids, trained in sides), ()))
    assert len(pairs) < len(PAIRS) and sorted(found) == sorted(expected)
    assert pairs.stats["dropped"] == 0 and pairs.stats["used"] == len(PAIRS)
    assert pairs.stats["trained_tokens"] == sum(label >= 0 for _, a, _, b in expected for label in a + b)


def test_the_tokens_of_a_pair_say_what_transformers_renders(pairs, tokenizer):
    """The library's own rendering, as text; what is trained on is the last answer and its end, nothing of the rest."""
    documents = [document for row in range(len(pairs)) for document in documents_of(pairs[row])]
    said = sorted(tokenizer.decode(ids) for ids, _, _ in documents)
    learned = sorted(tokenizer.decode([label for label in labels if label >= 0]) for _, labels, _ in documents)
    conversations = [parse_conversation(record[key]) for record in PAIRS for key in ("chosen", "rejected")]
    assert said == sorted(
        tokenizer.apply_chat_template(messages, tools=tools, tokenize=False) for messages, tools in conversations
    )
    assert learned == sorted(messages[-1]["content"] + "<|im_end|>" for messages, _ in conversations)


def test_encoded_pairs_are_the_same_tokens(tokenizer):
    render = lm.ChatRenderer(tokenizer)
    rendered = [tuple(render(*parse_conversation(r[key])) for key in ("chosen", "rejected")) for r in PAIRS]
    all_ids, all_compared = encode_pairs(rendered, tokenizer)
    for record, ids, compared in zip(PAIRS, all_ids, all_compared, strict=True):
        for key, one, mask in zip(("chosen", "rejected"), ids, compared, strict=True):
            expected, trained = alone(record[key], tokenizer)
            assert one.tolist() == expected and mask.nonzero()[0].tolist() == list(trained)


def test_a_pair_that_is_longer_than_a_row_is_left_out_whole(tokenizer, tmp_path, here):
    records = [pair([user("w " * n)], "yes", "no " * m) for n, m in [(2, 1), (9, 2), (3, 30), (30, 1), (12, 3)]]
    lengths = [sum(len(alone(r[key], tokenizer)[0]) for key in r) for r in records]
    path = write(tmp_path / "dpo.jsonl", records)
    for width in (lengths[4], lengths[4] - 1):  # the longest that fits is kept
        data = PairDataset(path, tokenizer, width, split="all", **here)
        kept = [n for n in lengths if n <= width]
        assert data.stats["dropped"] == len(records) - len(kept) and data.stats["used"] == len(kept)
        assert data.stats["truncated"] == 0 and data.stats["tokens"] == sum(kept)
        here_now = [len(ids) for row in range(len(data)) for ids, _, _ in documents_of(data[row])]
        assert sorted(map(sum, zip(here_now[::2], here_now[1::2], strict=True))) == sorted(kept)
    assert len(kept) == 2 and len(lengths) == 5


def test_row_minus_one_is_padding_and_counts_nothing(pairs):
    item = pairs[-1]
    assert item.keys() == pairs[0].keys() and item["row"] == -1
    for name, value in {"input_ids": PAD, "labels": IGNORE, "position_ids": 0, "documents": -1}.items():
        assert item[name].dtype == torch.int64 and item[name].tolist() == [value] * WIDTH, name
    batch = pairs.collate([item, item])
    assert batch["pairs"].tolist() == [0] and pairs.count_terms(batch) == 0
    assert batch["last"].tolist() == [0, 0] and batch["places"].tolist() == [[0, 0], [0, 0]]
    assert batch["targets"].tolist() == [IGNORE] * 64 and batch["answers"].tolist() == [0] * 64
    with pytest.raises(IndexError):
        pairs[len(pairs)]


def test_collate_against_a_naive_rendition(pairs, tokenizer):
    numbers = [1, -1, 0, 2, -1]
    rows = [pairs[n] for n in numbers]
    batch = pairs.collate(rows)
    for name in ("input_ids", "labels", "position_ids", "documents"):
        assert torch.equal(batch[name], torch.stack([row[name] for row in rows])), name
    positions, targets, answers, last, places, seen = [], [], [], [], [], 0
    for b, row in enumerate(rows):
        documents = row["documents"].tolist()
        for d in range(max(documents) + 1):
            labelled = [t for t in range(WIDTH) if documents[t] == d and row["labels"][t] != IGNORE]
            positions += [b * WIDTH + t - 1 for t in labelled]
            targets += [int(row["input_ids"][t]) for t in labelled]
            answers += [seen] * len(labelled)
            last.append(b * WIDTH + labelled[-1])
            places.append([numbers[b], d])
            seen += 1
    count = len(positions)
    assert seen >= 6 and len(set(answers)) == seen
    assert batch["head_positions"].tolist()[:count] == positions and batch["targets"].tolist()[:count] == targets
    assert batch["answers"].tolist()[:count] == answers
    rest = batch["targets"][count:].tolist()
    assert rest == [IGNORE] * (-count % 64) and not batch["answers"][count:].any()
    assert batch["last"].tolist() == last and batch["places"].tolist() == places
    assert (batch["input_ids"].flatten()[batch["last"]] == EOS).all()
    assert batch["pairs"].tolist() == [1] * (seen // 2) and batch["pairs"].dtype == torch.float32
    assert pairs.count_terms(batch) == seen // 2
    every = [pairs.collate([pairs[row]]) for row in range(len(pairs))]
    assert sum(map(pairs.count_terms, every)) == len(PAIRS)


def test_pairs_are_split_and_found_again(tokenizer, tmp_path, here):
    records = [pair([user(f"{i}?")], f"yes {i}", f"no {i}") for i in range(60)]
    path = write(tmp_path / "dpo.jsonl", records)
    parts = [PairDataset(path, tokenizer, 64, split=split, val_ratio=0.1, **here) for split in ("train", "val")]
    texts = [{tokenizer.decode(d[0]) for row in range(len(p)) for d in documents_of(p[row])} for p in parts]
    assert not texts[0] & texts[1] and len(texts[0] | texts[1]) == 120 and 0 < len(texts[1]) < 40
    assert parts[0].data_key == parts[1].data_key
    assert parts[0].data_key != PairDataset(path, tokenizer, 65, val_ratio=0.1, **here).data_key


def test_equal_answers_are_refused_with_file_and_line(tokenizer, tmp_path, here):
    path = write(tmp_path / "dpo.jsonl", [PAIRS[0], PAIRS[1], pair([user("a")], "same", "same"), PAIRS[2]])
    with pytest.raises(DataError, match=r'dpo\.jsonl.*line 3.*"chosen" and "rejected" are equal'):
        PairDataset(path, tokenizer, 300, **here)
    data = PairDataset(path, tokenizer, 300, split="all", skip_bad_records=True, **here)
    assert data.stats["skipped"] == 1 and data.stats["used"] == 3


# ---- reasoning, and dialogue without thinking ----------------------------------------------------


def reasoned(thought, answer):
    return f"<think>\n{thought}\n</think>\n<answer>\n{answer}\n</answer>"


REASONS = [{"conversations": [user(f"{i} + 1?"), assistant(reasoned(f"one more than {i}", i + 1))]} for i in range(40)]


def test_reasoning_is_trained_on_thought_and_answer(tokenizer, tmp_path, here):
    records = [
        *REASONS[:3],
        {
            "conversations": [
                user("2?"),
                assistant("\nfour", reasoning_content="double it"),
                *REASONS[3]["conversations"],
            ]
        },
    ]
    data = ReasonDataset(write(tmp_path / "reason.jsonl", records), tokenizer, 128, split="all", **here)
    found = sorted(
        documents_of(data[row])[d][:2] for row in range(len(data)) for d in range(len(documents_of(data[row])))
    )
    ids, trained = encode_conversations([r["conversations"] for r in records], tokenizer)
    assert found == sorted(
        (one.tolist(), labels_at(one.tolist(), set(mask.nonzero()[0].tolist())))
        for one, mask in zip(ids, trained, strict=True)
    )
    text = tokenizer.decode([label for _, labels in found for label in labels if label >= 0])
    assert text.count("<think>") == text.count("</think>") == text.count("<|im_end|>") == 5
    bad = write(tmp_path / "bad.jsonl", [REASONS[0], {"conversations": [user("a"), assistant("no thought")]}])
    with pytest.raises(DataError, match=r"bad\.jsonl.*line 2.*turn 2: the answer begins"):
        ReasonDataset(bad, tokenizer, 128, **here)


def dialogues(n):
    rng = random.Random(0)
    records = []
    for i in range(n):
        turns = [user(f"{i} is?"), assistant(rng.choice(["a number", "\n\nmore"])), user("And?"), assistant(f"\n{i}!")]
        turns = turns[: rng.choice([2, 4])]
        if i % 3 == 0:
            turns.insert(0, {"role": "system", "content": "Be brief."})
        if i % 11 == 0:
            turns.append(user("Thank you."))  # the last turn is no answer
        if i % 7 == 0:
            turns[-1]["content"] += " It said <|im_end|>."
        records.append({"conversations": turns})
    return records


def test_every_second_dialogue_is_given_the_empty_thought(tokenizer, tmp_path, here):
    records = dialogues(120)
    thinking = [{"conversations": [user("q"), assistant(f"<think>\n{i}\n</think>\n\nr")]} for i in range(20)]
    path = write(tmp_path / "sft.jsonl", records + thinking)
    data = DialogueDataset(path, tokenizer, 128, split="all", **here)
    found = {}
    for row in range(len(data)):
        for ids, labels, positions in documents_of(data[row]):
            assert positions == list(range(len(ids)))
            found[tuple(ids)] = labels
    assert len(found) == 140
    given = 0
    for record in records + thinking:
        turns = record["conversations"]
        (ids,), (mask,) = encode_conversations([turns], tokenizer)
        ids, plain = ids.tolist(), labels_at(ids.tolist(), set(mask.nonzero()[0].tolist()))
        if tuple(ids) in found:
            assert found[tuple(ids)] == plain
            continue
        given += 1
        assert record in records
        # What the model sees when it answers with thinking switched off, then the answer as it always is.
        messages, tools = parse_conversation(turns)
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        ordinary = len(encode_prompt(messages[:last], tools, tokenizer))
        prompt = encode_prompt(messages[:last], tools, tokenizer, enable_thinking=False)
        assert len(prompt) > ordinary
        labels = found[tuple(prompt + ids[ordinary:])]
        assert labels[len(prompt) :] == plain[ordinary:] and labels[len(prompt)] >= 0
        assert labels[:ordinary] == plain[:ordinary]  # earlier answers are trained on as ever
        assert labels[ordinary : len(prompt)] == [IGNORE] * (len(prompt) - ordinary)
    assert 0.35 < given / len(records) < 0.65
    plain = SFTDataset(path, tokenizer, 128, split="all", **here)
    assert plain.stats["tokens"] < data.stats["tokens"]
    assert plain.stats["trained_tokens"] == data.stats["trained_tokens"]


# ---- two files, one data set ---------------------------------------------------------------------


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_mixing_takes_a_share_and_begins_again_where_rows_run_out(tokenizer, tmp_path, here):
    reason = ReasonDataset(write(tmp_path / "reason.jsonl", REASONS), tokenizer, 96, split="all", **here)
    path = write(tmp_path / "sft.jsonl", dialogues(16))
    dialogue = DialogueDataset(path, tokenizer, 96, split="all", **here)
    n, m = len(reason), len(dialogue)
    assert 5 <= m < n
    keys = {reason.data_key}
    for share in (0.1, 0.3, 0.5, 0.8):
        mixed = MixedDataset(reason, dialogue, share)
        added = len(mixed) - n
        assert added >= 1 and abs(added / len(mixed) - share) < 0.5 / n
        assert all(same(mixed[i], reason[i]) for i in range(n))
        assert all(same(mixed[n + i], dialogue[i % m]) for i in range(added))
        real = sum(int((mixed[i]["documents"] >= 0).sum()) for i in range(len(mixed)))
        assert mixed.stats["fill"] == pytest.approx(real / len(mixed) / 96, abs=0.03) and mixed.stats["records"] == 40
        keys.add(mixed.data_key)
        assert (mixed[-1]["documents"] == -1).all()
        with pytest.raises(IndexError):
            mixed[len(mixed)]
    assert added > m  # the last one went round
    batch = mixed.collate([mixed[0], mixed[n], mixed[-1]])
    assert same(batch, SFTDataset.collate([reason[0], dialogue[0], reason[-1]]))
    assert mixed.count_terms(batch) == int((batch["targets"] >= 0).sum()) > 0
    keys.add(MixedDataset(reason, DialogueDataset(path, tokenizer, 96, split="all", seed=1, **here), 0.8).data_key)
    assert len(keys) == 6
    nothing = DialogueDataset(path, tokenizer, 96, split="val", val_ratio=0, **here)
    assert len(nothing) == 0 and len(MixedDataset(reason, nothing, 0.5)) == n
    assert len(MixedDataset(nothing, dialogue, 0.5)) == 0
    for share in (0, 1, -0.5, 1.5):
        with pytest.raises(DataError, match="between 0 and 1"):
            MixedDataset(reason, dialogue, share)


# ---- prompts -------------------------------------------------------------------------------------


def test_prompts_are_what_the_model_is_asked_with(tokenizer, tmp_path):
    records = [
        {"conversations": [user("a?"), assistant("")], "answer": 7},
        {"conversations": [*PROMPTS["tools"], assistant("this is left out")], "answer": "3"},
        {"conversations": PROMPTS["a system turn"]},
        {"conversations": PROMPTS["control tokens as text"], "answer": None},
        {"conversations": [{"content": "no roles"}, {"content": "b"}, {"content": "c"}], "answer": 1.5},
    ]
    path = write(tmp_path / "rl.jsonl", records)
    data = PromptDataset(path, tokenizer, 300, split="all")
    assert len(data) == 5 and data.stats == {"records": 5, "skipped": 0, "dropped": 0}
    for i, record in enumerate(records):
        messages, tools = parse_conversation(record["conversations"])
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        answer = None if record.get("answer") is None else str(record["answer"])
        question = messages[-1]["content"]
        assert data[i]["ids"] == encode_prompt(messages, tools, tokenizer) and type(data[i]["ids"]) is list
        assert data[i]["record"] == {"messages": messages, "tools": tools, "question": question, "answer": answer}
    assert "this is left out" not in tokenizer.decode(data[1]["ids"]) and '"add"' in tokenizer.decode(data[1]["ids"])
    for thinking in (True, False):
        asked = PromptDataset(path, tokenizer, 300, split="all", enable_thinking=thinking)
        assert asked[0]["ids"] == encode_prompt([user("a?")], None, tokenizer, enable_thinking=thinking)
        assert asked.data_key != data.data_key
    assert "5" in data.describe(300)


def test_prompts_that_leave_no_room_for_an_answer_are_left_out_and_counted(tokenizer, tmp_path):
    records = [{"conversations": [user("w " * n)], "answer": str(n)} for n in (1, 40, 5, 12)]
    longest = len(encode_prompt(records[3]["conversations"], None, tokenizer))
    path = write(tmp_path / "rl.jsonl", records)
    for width, kept in [(longest + 20, ["1", "5", "12"]), (longest + 19, ["1", "5"]), (3, [])]:
        data = PromptDataset(path, tokenizer, width, split="all", max_new_tokens=20)
        assert [data[i]["record"]["answer"] for i in range(len(data))] == kept
        assert data.stats["dropped"] == 4 - len(kept)


def test_prompts_are_split_by_what_they_say(tokenizer, tmp_path):
    records = [{"conversations": [user(f"{i}?")], "answer": i} for i in range(80)] * 2
    path = write(tmp_path / "rl.jsonl", records)
    train, val = (PromptDataset(path, tokenizer, 64, split=split, val_ratio=0.1) for split in ("train", "val"))
    questions = [[data[i]["record"]["question"] for i in range(len(data))] for data in (train, val)]
    assert sorted(sum(questions, [])) == sorted(r["conversations"][0]["content"] for r in records)
    assert not set(questions[0]) & set(questions[1]) and 4 <= len(questions[1]) <= 40
    turned = PromptDataset(write(tmp_path / "other.jsonl", records[::-1]), tokenizer, 64, split="val", val_ratio=0.1)
    assert sorted(questions[1]) == sorted(turned[i]["record"]["question"] for i in range(len(turned)))
    again = PromptDataset(path, tokenizer, 99, val_ratio=0.1)
    assert again.data_key == train.data_key and len({train.data_key, val.data_key, turned.data_key}) == 3
    records[0]["answer"] = "another"
    assert PromptDataset(write(path, records), tokenizer, 64, val_ratio=0.1).data_key != train.data_key


def test_a_bad_prompt_is_named_or_skipped(tokenizer, tmp_path):
    good = {"conversations": [user("a")], "answer": "b"}
    for bad, reason in [
        ({"conversations": [assistant("b")]}, "nothing to answer"),
        ({"conversations": [user("a")], "answer": [1]}, '"answer" is a list'),
        ("{not json\n", "not JSON"),
        ({"text": "a"}, 'key "conversations" is missing'),
    ]:
        path = write(tmp_path / "rl.jsonl", [good, "\n", bad, good])
        with pytest.raises(DataError, match=r"rl\.jsonl, line 3: .*--skip_bad_records") as error:
            PromptDataset(path, tokenizer, 64)
        assert reason in str(error.value)
        data = PromptDataset(path, tokenizer, 64, split="all", skip_bad_records=True)
        assert len(data) == 2 and data.stats == {"records": 2, "skipped": 1, "dropped": 0}
    none = PromptDataset(write(tmp_path / "bad.jsonl", [bad]), tokenizer, 64, skip_bad_records=True)
    assert len(none) == 0 and none.stats["skipped"] == 1
    for content in ([], ["\n", "  \n"]):
        with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
            PromptDataset(write(tmp_path / "empty.jsonl", content), tokenizer, 64)
