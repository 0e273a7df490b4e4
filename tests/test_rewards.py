"""The rewards of GRPO and PPO: hand-made replies in both languages, hostile ones, the words of the command line."""

import json
import math
import os
import random
import sys
import time
import types

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataset.make_demo_data import generate, is_right
from model.weights import WeightsError
from trainer import rewards
from trainer.command_line import UserError
from trainer.rewards import Reward, check_rewards, parse_rewards, score, whole_paths

TAGGED = "<think>\n15 + 62 = 77.\n</think>\n<answer>\n77\n</answer>"
PIECES = ["<think>", "</think>", "<answer>", "</answer>", "\n", " ", "46", "-", "1,000", ".", "答案是", "no", "负"]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))


def record(**changes) -> dict:
    return {"answer": "77", "question": "15 + 62?", "ended": True, "tokens": 10, "max_new_tokens": 100, **changes}


@pytest.mark.parametrize(
    ("truth", "reply"),
    [
        ("77", TAGGED),
        ("77", "77"),
        ("77", "The answer is 77."),
        ("77", "答案是77。"),
        ("77", "一共有７７个苹果！"),
        ("77", "<answer>77</answer> and 12 more"),
        ("77", "<think>\n70 + 7\n</think>\n77"),
        ("77", "70 + 7</think>\n77"),  # the prompt had opened the thought
        ("77", "<think>a 1</think><think>b 2</think>77"),
        ("77", "<think><answer>5</answer></think><answer>77</answer>"),
        ("77", "77 <think> or 78?"),
        ("1000", "1,000"),
        ("1,000", "1000.0"),
        ("1000.0", "一共1，000元"),
        ("1,234,567.50", "1234567.5 yuan"),
        ("1000", "+1000"),
        ("0.5", ".5"),
        (".5", "0.50 kg"),
        ("-3", "−3 °C"),
        ("-3", "负3度"),
        ("minus 3", "it is negative 3"),
        ("0", "-0"),
        ("9007199254740993", "9007199254740993"),
        ("Paris", " paris. "),
        ("Paris", "<answer>\n“PARIS”\n</answer>"),
        ("北京", "<think>\n首都\n</think>\n<answer>\n北京。\n</answer>"),
        ("我叫MiniMind。", "我叫ｍｉｎｉｍｉｎｄ"),
        ("6, 7, 9, 13", "<answer>\n6, 7, 9, 13.\n</answer>"),
        ("6、7、9、13", "6、7、9、13"),
        ("1/2", "1/2"),
        ("16元", "16元"),
        ("?", "?"),
        ("77", "想" * 5000 + "77"),
    ],
)
def test_right_answers(truth, reply):
    assert rewards.answer(reply, record(answer=truth)) == 1.0


@pytest.mark.parametrize(
    ("truth", "reply"),
    [
        ("77", ""),
        ("77", "78"),
        ("77", "-77"),
        ("77", "负77"),
        ("77", "minus 77"),
        ("77", "7.7"),
        ("77", "177"),
        ("77", "77 or 78"),  # two numbers: no answer
        ("77", "15+62=77"),
        ("77", "77 77"),
        ("77", "seventy-seven"),
        ("77", "<think>\n77\n</think>"),
        ("77", "<think>\n77"),  # the thought never closes
        ("77", "<think>5</think><think>77"),
        ("77", "77</think>78"),
        ("77", "7<think>or</think>7"),
        ("77", "<answer>\n77"),  # the answer never closes
        ("77", "<answer>78</answer><answer>77</answer>"),  # one guess: the first
        ("77", "<answer></answer>77"),
        ("77", "77 </answer><answer>"),
        ("0.5", "5"),  # a stripped point would make them equal
        ("1000", "1,0000"),
        ("1000", "1, 000"),
        ("9007199254740993", "9007199254740992"),  # the same as floats
        ("Paris", "It is Paris."),
        ("Paris", "Rome"),
        ("北京", "北京在中国"),
        ("6, 7, 9, 13", "6, 7, 13, 9"),
        ("16元", "16"),
        ("1/2", "0.5"),
        ("?", ""),
        ("?", "<answer></answer>"),
        ("?", "!"),
    ],
)
def test_wrong_answers(truth, reply):
    assert rewards.answer(reply, record(answer=truth)) == 0.0


@pytest.mark.parametrize("truth", [None, "", "  \n", 77])
def test_a_record_without_an_answer_is_an_error(truth):
    with pytest.raises(UserError, match=r"rewards answer: .*'15 \+ 62\?'.*give each record .*or leave answer out"):
        rewards.answer("77", record(answer=truth))


def test_the_key_itself_may_be_missing():
    with pytest.raises(UserError, match="has the answer None"):
        rewards.answer("77", {"question": "x"})


def test_the_demo_data_is_judged_as_its_own_rule_judges_it(tmp_path):
    files = {stage: path.read_text(encoding="utf-8").splitlines() for stage, path in generate(tmp_path).items()}
    for stage in ("test", "reason_test", "lora_domain_test", "lora_identity_test"):
        questions = [json.loads(line) for line in files[stage]]
        for question, other in zip(questions, questions[1:] + questions[:1], strict=True):
            for said in (question["answer"], other["answer"], f"<answer>\n{question['answer']}。\n</answer>"):
                assert rewards.answer(said, question) == is_right(said, question)
    for line in files["reason"]:
        assert rewards.format(json.loads(line)["conversations"][-1]["content"], record()) == 1.0


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS.filter(str.strip))
@example("9" * 5000, "46")
@example("1" * 5000, "1" * 5000)
def test_answer_takes_any_text(reply, truth):
    assert rewards.answer(reply, record(answer=truth)) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (TAGGED, 1),
        ("<think>\n先加后减。\n\n再看。\n</think>\n<answer>\n四十六\n</answer>", 1),
        ("", 0),
        ("77", 0),
        (TAGGED + "\n", 0),
        (" " + TAGGED, 0),
        ("Sure! " + TAGGED, 0),
        (TAGGED + TAGGED, 0),
        (TAGGED.replace("\n", ""), 0),
        (TAGGED.replace("</think>\n<answer>", "</think>\n\n<answer>"), 0),
        (TAGGED.replace("15", "<think>"), 0),
        (TAGGED.replace("15", "</answer>"), 0),
        (TAGGED.replace("77\n</answer>", "77"), 0),
        ("<answer>\n77\n</answer>\n<think>\nlate\n</think>", 0),
        ("<think>\n\n</think>\n<answer>\n77\n</answer>", 0),
        ("<think>\n \u3000\n</think>\n<answer>\n77\n</answer>", 0),
        ("<think>\nx\n</think>\n<answer>\n\t\n</answer>", 0),
        ("<think>\nx\n</think>\n<answer>\n</answer>", 0),
    ],
)
def test_format(reply, expected):
    assert rewards.format(reply, record()) == expected


def test_a_format_that_did_not_end_counts_nothing():
    assert rewards.format(TAGGED, record(ended=False)) == 0.0


@pytest.mark.parametrize(
    ("tokens", "ended", "expected"),
    [
        (0, True, 0),
        (50, True, 0),
        (51, True, -0.02),
        (75, True, -0.5),
        (100, True, -1),
        (101, True, -1),
        (3, False, -1),
    ],
)
def test_length(tokens, ended, expected):
    assert rewards.length("x", record(tokens=tokens, ended=ended)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("", 0),
        ("one two three", 0),
        ("The cat sat on the mat.", 0),
        ("小猫坐在垫子上。", 0),
        ("a b c d a b c d", -1 / 5),  # 5 groups, abcd twice
        ("A b, c a B, C", -1 / 5),  # the last group is the first one again, whatever its case
        ("天天天天天天", -2 / 3),  # 3 groups, all equal
        ("我是小猫我是小猫", -1 / 5),
        ("no no no no no no no", -3 / 4),
        ("。。。。。。", -2 / 3),
        ("ha" * 64, -4 / 5),  # 128 letters are 8 units of 16
    ],
)
def test_repetition(reply, expected):
    assert rewards.repetition(reply, {}) == pytest.approx(expected)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_repetition_stays_in_range(reply):
    assert -1 <= rewards.repetition(reply, {}) <= 0


@pytest.mark.parametrize(
    "piece",
    [
        "<think>", "</think>", "<answer>", "</answer>", " ", "\n", "<think>\n", "\n</think>\n<answer>\n", "<", "a",
        "汉", "9", "1,", "1,000", "1.", "-", "负", "minus ", "\u0301\u0323", "\ufdfa", "<think></think>",
        "</think><answer>",
    ],
)  # fmt: skip
def test_hostile_replies_take_linear_time(piece):
    reply = piece * (200_000 // len(piece))
    for text in (reply, f"<answer>{reply}</answer>", f"<think>\n{reply}\n</think>\n<answer>\n77\n</answer>"):
        for rule in rewards.RULES.values():
            started = time.process_time()
            assert -1 <= rule(text, record()) <= 1
            assert time.process_time() - started < 1


def test_scores_by_part_and_their_weighted_sum():
    parts = score(
        parse_rewards(["answer", "format:0.2", "length:0.5", "repetition:0"]),
        [TAGGED, "77", "no no no no no"],
        [record(), record(tokens=75), record(ended=False)],
    )
    assert parts == {
        "answer": [1, 1, 0],
        "format": [1, 0, 0],
        "length": [0, -0.5, -1],
        "repetition": [pytest.approx(rewards.repetition(TAGGED, {})), 0, -0.5],
        "reward": [pytest.approx(1.2), pytest.approx(0.75), -0.5],
    }
    assert list(parts)[-1] == "reward"
    assert score(parse_rewards(["answer"]), [], []) == {"answer": [], "reward": []}


def test_replies_and_records_must_match_in_number():
    for words in (["answer"], ["model:x"]):
        with pytest.raises(ValueError, match="zip"):
            score(parse_rewards(words, load_model=lambda path, device: list), ["77"], [])


def test_the_reward_model_is_loaded_once_and_scores_batches():
    loaded, seen = [], []

    def load(path, device):
        loaded.append((path, device))

        def scorer(conversations):
            seen.append(conversations)
            return [float(len(turns)) for turns in conversations]

        return scorer

    chosen = parse_rewards(["model:out/reward_512.pth:0.5", "answer"], device="cuda:1", load_model=load)
    assert loaded == []
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    records = [record(), record(messages=turns)]
    for _ in range(2):
        parts = score(chosen, ["77", "你好"], records)
        assert parts == {"model:reward_512": [2, 3], "answer": [1, 0], "reward": [2, 1.5]}
    assert loaded == [("out/reward_512.pth", "cuda:1")]
    assert len(seen) == 2
    asked = {"role": "user", "content": "15 + 62?"}
    assert seen[0] == [
        [asked, {"role": "assistant", "content": "77"}],
        [*turns, {"role": "assistant", "content": "你好"}],
    ]
    assert len(turns) == 2  # the record is left as it was


def test_the_loader_of_the_project_is_the_default(monkeypatch):
    fake = types.SimpleNamespace(load_reward_model=lambda path, device: lambda conversations: [3.0])
    monkeypatch.setitem(sys.modules, "trainer.reward_model", fake)
    assert score(parse_rewards(["model:x.pth"]), ["a"], [record()])["reward"] == [3.0]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names, and links only for administrators")
def test_paths_of_models_become_whole(tmp_path, monkeypatch):
    folder = tmp_path / "run:3"
    folder.mkdir()
    (folder / "judge.pth").touch()
    (folder / "link.pth").symlink_to(folder / "judge.pth")
    monkeypatch.chdir(folder)
    whole = whole_paths(["answer:0.5", "model:judge.pth", "model:link.pth:0.25", "model:elsewhere.pth:2"])
    judge, link = f"model:{folder / 'judge.pth'}:1", f"model:{folder / 'link.pth'}:0.25"
    assert whole == ["answer:0.5", judge, link, "model:elsewhere.pth:2"]
    assert whole_paths(whole) == whole
    assert [reward.weight for reward in parse_rewards(whole)] == [0.5, 1, 0.25, 2]


@pytest.mark.parametrize(
    ("word", "name", "weight", "path"),
    [
        ("answer", "answer", 1, None),
        ("answer:2", "answer", 2, None),
        ("format:1e-1", "format", 0.1, None),
        ("model:out/reward_192.pth", "model:reward_192", 1, "out/reward_192.pth"),
        ("model:out/reward_192.pth:0.5", "model:reward_192", 0.5, "out/reward_192.pth"),
        ("model:C:\\models\\r.pth", "model:r", 1, "C:\\models\\r.pth"),
        ("model:C:\\models\\r.pth:0.5", "model:r", 0.5, "C:\\models\\r.pth"),
        ("model:C:/models/r.pth:0.5", "model:r", 0.5, "C:/models/r.pth"),
        ("model:out/a:b.pth:1", "model:a:b", 1, "out/a:b.pth"),
        ("model:judges/Qwen2.5-RM/", "model:Qwen2.5-RM", 1, "judges/Qwen2.5-RM/"),
    ],
)
def test_words_of_the_command_line(word, name, weight, path):
    (reward,) = parse_rewards([word])
    assert (reward.name, reward.weight) == (name, weight)
    assert getattr(reward.rate, "path", None) == path


def test_two_reward_models_of_one_file_name_are_told_apart():
    first, second = parse_rewards(["model:a/r.pth", "model:b/r.pth"])
    assert (first.name, second.name) == ("model:a/r.pth", "model:b/r.pth")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["anwser"], r"no reward 'anwser'; expected answer, format, length, repetition, model:PATH"),
        ([""], r"no reward ''; expected answer"),
        (["answer", "Format:1"], r"--rewards Format:1: there is no reward 'Format'"),
        (["answer:x"], r"--rewards answer:x: the weight: got 'x', expected a number from 0"),
        (["answer:"], r"answer:: the weight: got ''"),
        (["answer:1:2"], r"the weight: got '1:2'"),
        (["answer:nan"], r"the weight: got 'nan'"),
        (["answer:inf"], r"the weight: got 'inf'"),
        (["length:-1"], r"the weight: got '-1', expected a number from 0"),
        (["model:r.pth:nan"], r"the weight: got 'nan'.* as in model:r\.pth:0\.5"),
        (["model:a:b.pth"], r"the weight: got 'b.pth'.*give the weight too: model:a:b.pth:1"),
        (["model"], r"expected model:PATH"),
        (["model:"], r"expected model:PATH"),
        (["model::0.5"], r"expected model:PATH"),
        (["answer", "answer:2"], r"names answer twice"),
        (["model:a:1", "model:a:2"], r"names model:a twice"),
        ([], r"needs a reward with a weight above 0"),
        (["answer:0"], r"needs a reward with a weight above 0"),
    ],
)
def test_errors_of_the_command_line_are_one_line(words, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_rewards(words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, None, "1", 10**400, [1.0], 1j], ids=lambda value: str(value)[:8]
)
def test_what_is_no_finite_number_is_an_error_that_names_the_part(value):
    mine = Reward("mine", 1.0, lambda replies, records: [0.0, value])
    reply = "第二个\n回答 " * 500
    with pytest.raises(
        UserError, match=r"the reward mine gave .* for the reply '第二个 回答 .*…'.*leave it out"
    ) as caught:
        score([mine], ["first", reply], [record()] * 2)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_sum_that_overflows_is_an_error():
    huge = Reward("huge", 1e300, lambda replies, records: [1e300])
    with pytest.raises(UserError, match="the weighted sum gave inf"):
        score([huge], ["a"], [record()])


def test_a_model_that_loses_a_reply_is_an_error():
    chosen = parse_rewards(["model:r.pth"], load_model=lambda path, device: lambda conversations: [1.0])
    with pytest.raises(UserError, match="model:r gave 1 numbers for 2 replies"):
        score(chosen, ["a", "b"], [record()] * 2)


def test_errors_inside_a_reward_come_through():
    def broken(path, device):
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        score(parse_rewards(["model:r.pth"], load_model=broken), ["a"], [record()])
    with pytest.raises(UserError, match="give each record"):
        score(parse_rewards(["answer"]), ["a"], [record(answer=None)])


def test_the_same_replies_get_the_same_numbers_in_any_order():
    replies = [TAGGED, "77", "天天天天天天", "<answer>77"]
    records = [record(tokens=n) for n in (10, 60, 80, 100)]
    chosen = parse_rewards(["answer", "format", "length", "repetition"])
    order = random.Random(0).sample(range(4), 4)
    whole = score(chosen, replies, records)["reward"]
    assert score(chosen, [replies[i] for i in order], [records[i] for i in order])["reward"] == [
        whole[i] for i in order
    ]


def test_rewards_are_checked_before_a_run():
    records = [{"question": "a?", "answer": "1"}, {"question": "b?", "answer": None}]
    with pytest.raises(UserError, match="b\\?"):
        check_rewards(parse_rewards(["answer"]), records)
    check_rewards(parse_rewards(["length"]), records)  # needs no answers
    with pytest.raises(WeightsError, match="nowhere.pth does not exist"):
        check_rewards(parse_rewards(["model:nowhere.pth"]), records)
    loaded = []
    check_rewards(parse_rewards(["model:a.pth"], load_model=lambda path, device: loaded.append(path) or len), records)
    assert loaded == ["a.pth"]
