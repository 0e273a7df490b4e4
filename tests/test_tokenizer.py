"""The shipped tokenizer, its chat template and mask, and the script that trains one."""

from __future__ import annotations

import itertools
import json
import os
import random
import string
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from scripts import train_tokenizer as script
from scripts.tokenizing import byte_pairs, files
from scripts.tokenizing import corpus as reading

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "model"
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>", "<tool_response>",
        "</tool_response>"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def vocabulary(tokenizer) -> dict[str, bytes]:
    """Token → bytes, of all tokens but the added ones; the byte alphabet is GPT-2's, written out here once more."""
    letters = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    byte_of = {chr(b): b for b in letters}
    byte_of.update({chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in letters)})
    return {t: bytes(byte_of[c] for c in t) for t in tokenizer.get_vocab() if t not in CONTROLS + TAGS}


# ---- the shipped files ---------------------------------------------------------------------------


def test_ids_and_sizes(tokenizer, vocabulary):
    assert tokenizer.convert_ids_to_tokens(list(range(11))) == CONTROLS + TAGS
    assert len(tokenizer) == tokenizer.vocab_size == 6400
    assert sorted(tokenizer.get_vocab().values()) == list(range(6400))
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 0)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert sum(len(data) == 1 for data in vocabulary.values()) == 256
    assert tokenizer.model_max_length == 32768
    assert tokenizer.clean_up_tokenization_spaces is False


def test_form_that_llama_cpp_knows():
    data = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    digits, byte_level = data["pre_tokenizer"]["pretokenizers"]
    assert data["pre_tokenizer"]["type"] == "Sequence"
    assert digits == {"type": "Digits", "individual_digits": True}
    assert (byte_level["type"], byte_level["add_prefix_space"], byte_level["use_regex"]) == ("ByteLevel", False, True)
    assert data["decoder"]["type"] == "ByteLevel"
    assert data["normalizer"] is None and data["post_processor"] is None
    assert data["model"]["type"] == "BPE" and not data["model"]["ignore_merges"] and not data["model"]["byte_fallback"]
    assert {t["content"]: t["special"] for t in data["added_tokens"]} == dict.fromkeys(CONTROLS, True) | dict.fromkeys(
        TAGS, False
    )
    vocab = data["model"]["vocab"]
    assert all(left in vocab and right in vocab and left + right in vocab for left, right in data["model"]["merges"])


def test_config_is_what_the_script_writes():
    """The shipped template is the one of the script: a change to one needs the other."""
    config = json.loads((MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config == files.tokenizer_config()


def test_nothing_is_added_to_a_text(tokenizer):
    assert tokenizer("a").input_ids == tokenizer.encode("a", add_special_tokens=False)
    assert len(tokenizer("a").input_ids) == 1


@pytest.mark.parametrize("tag", TAGS)
def test_tags_are_single_tokens_that_stay(tokenizer, tag):
    ids = tokenizer.encode(f"a{tag}b")
    assert ids[1] == tokenizer.convert_tokens_to_ids(tag) and len(ids) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"a{tag}b"


def test_control_tokens_are_skipped_on_request(tokenizer):
    text = "<|im_start|>a<|im_end|><|endoftext|>"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == "a"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_stand_alone(tokenizer, vocabulary):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("2024年 3.14159 x12"))
    assert [t for t in tokens if any(c in string.digits for c in t)] == list("202431415912")
    for token, data in vocabulary.items():
        text = data.decode("utf-8", "replace")
        assert len(text) == 1 or not any(unicodedata.category(c).startswith("N") for c in text), token


def test_no_token_holds_a_newline_and_more(tokenizer, vocabulary):
    assert [data for data in vocabulary.values() if b"\n" in data] == [b"\n"]
    newline = tokenizer.encode("\n")
    assert tokenizer.encode("\n\n\n    x") == newline * 3 + tokenizer.encode("    x")


def test_no_token_ends_inside_a_character_that_it_does_not_begin_with(vocabulary):
    for token, data in vocabulary.items():
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:
            lead = data[0]
            size = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2
            starts_one_character = lead >= 0xC0 and len(data) < size and all(0x80 <= b < 0xC0 for b in data[1:])
            assert starts_one_character or len(data) == 1, token


def test_every_token_is_reachable(tokenizer, vocabulary):
    """Each whole-text token is what its own text becomes: no entry is wasted."""
    wasted = []
    for token, data in vocabulary.items():
        text = data.decode("utf-8", "ignore")
        if text.encode("utf-8") == data and tokenizer.tokenize(text) != [token]:
            wasted.append(token)
    assert not wasted


# Our own sentences; the bounds leave room for another training run, not for one language starving.
SENTENCES = {
    "zh": (3.0, [
        "今天天气很好，我们打算下午去公园散步，然后在湖边的小店里喝一杯热茶。",
        "学习一门新的语言需要耐心，每天坚持练习半个小时，几个月以后你会看到明显的进步。",
        "请用三句话介绍一下这座城市的历史，并说明它为什么吸引了那么多游客。",
        "如果水的温度降到零度以下，它就会结成冰，体积也会变大。",
    ]),
    "en": (3.0, [
        "The old lighthouse keeper climbed the stairs every evening, because the ships trusted his lamp.",
        "To bake good bread you need flour, water, salt and time; the dough should rest in a warm place.",
        "Please explain in three sentences why the sky looks blue during the day and red in the evening.",
        "A computer program is a list of instructions that tells a machine what to do with the data it is given.",
    ]),
}


@pytest.mark.parametrize("lang", SENTENCES)
def test_compression_of_own_sentences(tokenizer, lang):
    bound, sentences = SENTENCES[lang]
    n_bytes = sum(len(s.encode("utf-8")) for s in sentences)
    n_tokens = sum(len(tokenizer.encode(s)) for s in sentences)
    assert n_bytes / n_tokens >= bound


# ---- round trip ----------------------------------------------------------------------------------

ANY_CHARACTER = st.characters(exclude_categories=["Cs"])  # all planes and control characters; halves of pairs are none
PIECES = st.one_of(
    st.text(ANY_CHARACTER, max_size=20),
    st.text(st.sampled_from(" \n\r\t\u3000\u200d\ufe0f\u0000"), max_size=6),
    st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), max_size=12),
    st.text(st.characters(min_codepoint=0x1F300, max_codepoint=0x1FAFF), max_size=6),
    st.text(st.characters(min_codepoint=0xE000, max_codepoint=0x10FFFF, exclude_categories=["Cs"]), max_size=6),
    st.sampled_from(CONTROLS + TAGS + ["don't", " 'll", "e\u0301", "½²①Ⅳ٣"]),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=6).map("".join))
@example("")
@example(" leading,  double and trailing ")
@example("can 't , they 're . what ?")  # what a clean-up of blanks would spoil
@example("👩‍👩‍👧‍👦🏳️‍🌈\U0010ffff\ufeff\x00\x7f\u0085\u2028")
@example("<|im_start|><|im_end|><think></think> <answer>\n")
def test_any_unicode_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < 6400 for i in ids)


def test_every_code_point_comes_back(tokenizer):
    """Of the planes that hold characters, and of a private one (the planes between are empty)."""
    backend = tokenizer.backend_tokenizer
    for plane in (0x0, 0x10000, 0x20000, 0xE0000, 0x100000):
        rows = [range(start, start + 64) for start in range(plane, plane + 0x10000, 64)]
        texts = ["".join(chr(c) for c in row if not 0xD800 <= c < 0xE000) for row in rows]
        ids = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        assert backend.decode_batch(ids, skip_special_tokens=False) == texts


# ---- chat template -------------------------------------------------------------------------------

USER = {"role": "user", "content": "你好"}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "天气 <now>", "parameters": {}}}


def render(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_plain_chat_of_several_turns(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "您好！\n\n很高兴。 "},
        {"role": "user", "content": " 1+1? "},
    ]
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
        "<|im_start|>assistant\n您好！\n\n很高兴。 <|im_end|>\n<|im_start|>user\n 1+1? <|im_end|>\n"
    )
    assert render(tokenizer, messages) == text
    assert render(tokenizer, messages, add_generation_prompt=True) == text + "<|im_start|>assistant\n"


def test_no_system_turn_is_made_up(tokenizer):
    assert render(tokenizer, [USER]) == "<|im_start|>user\n你好<|im_end|>\n"


def test_an_empty_system_turn_stays(tokenizer):
    messages = [{"role": "system", "content": ""}, USER]
    assert render(tokenizer, messages) == "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"


TOOLS_TEXT = (
    "Functions you can call, one JSON signature per line:\n<tools>\n"
    '{"type": "function", "function": {"name": "weather", "description": "天气 <now>", "parameters": {}}}\n'
    '{"name": "bare"}\n</tools>\nTo call one, give its name and arguments as JSON:\n'
    '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call><|im_end|>\n'
)


@pytest.mark.parametrize("system, start", [
    ([], "<|im_start|>system\n"),
    ([{"role": "system", "content": ""}], "<|im_start|>system\n"),
    ([{"role": "system", "content": "Be brief."}], "<|im_start|>system\nBe brief.\n\n"),
])
def test_tools_stand_in_the_system_turn(tokenizer, system, start):
    text = render(tokenizer, [*system, USER], tools=[WEATHER, {"name": "bare"}])
    assert text == start + TOOLS_TEXT + "<|im_start|>user\n你好<|im_end|>\n"


CALLS = [
    {"name": "weather", "arguments": {"city": "北京", "days": 2}},
    {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"city": "上海"}}},
    {"type": "function", "function": {"name": "weather", "arguments": '{"city":"广州"}'}},
    {"name": "now"},
]
CALLS_TEXT = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "北京", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "上海"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"city":"广州"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


@pytest.mark.parametrize("content, before", [("", ""), (None, ""), ("我查一下。", "我查一下。\n")])
def test_calls_and_results(tokenizer, content, before):
    messages = [
        USER,
        {"role": "assistant", "content": content, "tool_calls": CALLS},
        {"role": "tool", "content": '{"degrees": 21}'},
        {"role": "tool", "content": {"天气": "晴"}},
        {"role": "assistant", "content": "21 度。"},
    ]
    assert render(tokenizer, messages) == (
        "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n" + before + CALLS_TEXT + "<|im_end|>\n"
        '<|im_start|>tool\n<tool_response>\n{"degrees": 21}\n</tool_response><|im_end|>\n'
        '<|im_start|>tool\n<tool_response>\n{"天气": "晴"}\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\n21 度。<|im_end|>\n"
    )


def test_a_call_reads_back_as_json(tokenizer):
    text = render(tokenizer, [USER, {"role": "assistant", "content": "", "tool_calls": CALLS[:3]}])
    calls = [json.loads(part.split("\n</tool_call>")[0]) for part in text.split("<tool_call>\n")[1:]]
    assert [call["arguments"]["city"] for call in calls] == ["北京", "上海", "广州"]


def test_thoughts_stand_before_the_content_in_every_turn(tokenizer):
    turn = {"role": "assistant", "content": "2", "reasoning_content": "1+1\n=2"}
    turn_text = "<|im_start|>assistant\n<think>\n1+1\n=2\n</think>\n\n2<|im_end|>\n"
    user_text = "<|im_start|>user\n你好<|im_end|>\n"
    assert render(tokenizer, [USER, turn, USER, turn]) == (user_text + turn_text) * 2
    assert render(tokenizer, [{**turn, "reasoning_content": ""}]) == "<|im_start|>assistant\n2<|im_end|>\n"
    with_call = render(tokenizer, [{**turn, "content": "", "tool_calls": CALLS[3:]}])
    assert with_call == (
        "<|im_start|>assistant\n<think>\n1+1\n=2\n</think>\n\n"
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n'
    )


@pytest.mark.parametrize("options, opened", [
    ({}, ""), ({"enable_thinking": None}, ""), ({"enable_thinking": True}, "<think>\n"),
    ({"enable_thinking": False}, "<think>\n\n</think>\n\n"),
])
def test_thinking_switch(tokenizer, options, opened):
    text = "<|im_start|>user\n你好<|im_end|>\n"
    prompt = render(tokenizer, [USER], add_generation_prompt=True, **options)
    assert prompt == text + "<|im_start|>assistant\n" + opened
    assert render(tokenizer, [USER], **options) == text  # only the prompt of an answer opens a thought


@pytest.mark.parametrize("messages, reason", [
    ([{"role": "robot", "content": "hi"}], "role"),
    ([USER, {"role": "system", "content": "late"}], "first"),
    ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "not a string"),
])
def test_template_refuses(tokenizer, messages, reason):
    with pytest.raises(Exception, match=reason):
        render(tokenizer, messages)


def masked(tokenizer, messages, **options):
    out = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    return out["input_ids"], out["assistant_masks"]


def test_mask_against_literal_tokens(tokenizer):
    messages = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
        {"role": "assistant", "content": "b", "reasoning_content": "t", "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": "r"}, {"role": "assistant", "content": "c"},
    ]
    start, end, nl = "<|im_start|>", "<|im_end|>", "Ċ"
    roles = {role: tokenizer.tokenize(role) for role in ("system", "user", "assistant", "tool")}
    call = tokenizer.tokenize('{"name": "f", "arguments": {}}')
    expected = [
        *((t, 0) for t in (start, *roles["system"], nl, "s", end, nl)),
        *((t, 0) for t in (start, *roles["user"], nl, "u", end, nl)),
        *((t, 0) for t in (start, *roles["assistant"], nl)), ("a", 1), (end, 1), (nl, 0),
        *((t, 0) for t in (start, *roles["user"], nl, "v", end, nl)),
        *((t, 0) for t in (start, *roles["assistant"], nl)),
        *((t, 1) for t in ("<think>", nl, "t", nl, "</think>", nl, nl, "b", nl)),
        *((t, 1) for t in ("<tool_call>", nl, *call, nl, "</tool_call>", end)), (nl, 0),
        *((t, 0) for t in (start, *roles["tool"], nl, "<tool_response>", nl, "r", nl, "</tool_response>", end, nl)),
        *((t, 0) for t in (start, *roles["assistant"], nl)), ("c", 1), (end, 1), (nl, 0),
    ]
    ids, mask = masked(tokenizer, messages)
    assert list(zip(tokenizer.convert_ids_to_tokens(ids), mask, strict=True)) == expected


CONTENTS = st.text(st.one_of(ANY_CHARACTER, st.sampled_from(" \n\t😀的a1")), max_size=12).filter(
    lambda text: not any(c in text for c in CONTROLS)
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(CONTENTS, CONTENTS, CONTENTS), min_size=1, max_size=3))
@example([("", "", "")])
@example([("u", "\n\n  code", ""), ("u", " 🙂", "\n🙂\n")])
def test_mask_is_what_the_assistant_writes(tokenizer, turns):
    """Whatever the contents: blank, line breaks at the edges, characters of several tokens."""
    messages, written = [], ""
    for user, content, thought in turns:
        messages += [{"role": "user", "content": user}]
        messages += [{"role": "assistant", "content": content, "reasoning_content": thought}]
        written += (f"<think>\n{thought}\n</think>\n\n" if thought else "") + content + "<|im_end|>"
    ids, mask = masked(tokenizer, messages)
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == written


@settings(max_examples=150, deadline=None)
@given(CONTENTS, CONTENTS, st.sampled_from([{}, {"enable_thinking": True}, {"enable_thinking": False}]))
@example("u", "\n\n x", {})
@example("u", "\n", {"enable_thinking": False})
def test_generation_prompt_is_a_prefix_of_the_trained_tokens(tokenizer, user, content, thinking):
    """A reply continues exactly the tokens that training showed before it: no token spans the border."""
    messages = [{"role": "user", "content": user}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **thinking)
    opened = {None: "", True: "<think>\n", False: "<think>\n\n</think>\n\n"}[thinking.get("enable_thinking")]
    whole = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": opened + content}], return_dict=False
    )
    assert whole[: len(prompt)] == prompt


# ---- training ------------------------------------------------------------------------------------

ZH_WORDS = "小猫 喜欢 吃鱼 今天 下雨 老师 学生 学校 山上 花开 河边 月亮 苹果 香蕉 火车 早上".split()
EN_WORDS = "kitten likes fresh fish today rainy teacher student school mountain flower river moonlight apple".split()


def write_corpus(folder: Path, n_records: int = 200, seed: int = 0) -> list[Path]:
    """Made-up text and chats in both languages; the Chinese files are three times as long."""
    rng = random.Random(seed)
    pretrain, sft = folder / "pretrain.jsonl", folder / "sft.jsonl"

    def sentence(words: list[str], gap: str, end: str) -> str:
        return gap.join(rng.choices(words, k=6)) + end

    with open(pretrain, "w", encoding="utf-8", newline="\n") as file:
        for _ in range(n_records):
            text = " ".join(sentence(EN_WORDS, " ", ".") for _ in range(2))
            file.write(json.dumps({"text": text}) + "\n")
            text = "".join(sentence(ZH_WORDS, "", "。") for _ in range(6))
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    with open(sft, "w", encoding="utf-8", newline="\n") as file:
        for index in range(n_records):
            words, gap, end = [(ZH_WORDS, "", "？"), (EN_WORDS, " ", "?")][index % 2]
            turns = [{"role": role, "content": sentence(words, gap, end)} for role in ("user", "assistant")]
            file.write(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")
    return [pretrain, sft]


def command(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train_tokenizer.py"), *map(str, args)],
        capture_output=True, text=True, encoding="utf-8", timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **env},
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[Path]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_command_trains_a_tokenizer(corpus, tmp_path):
    done = command("--data", *corpus, "--vocab_size", 420, "--out_dir", tmp_path / "t")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    trained = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert len(trained) == 420
    assert trained.convert_ids_to_tokens(list(range(11))) == CONTROLS + TAGS
    for text in ("小猫喜欢吃鱼。 kitten 🙂\n", "\U0010ffff\x00 12"):
        assert trained.decode(trained.encode(text)) == text
    assert trained.tokenize("kitten likes") == ["kitten", "Ġlikes"]  # a word that fills the text is one token
    assert render(trained, [USER]) == "<|im_start|>user\n你好<|im_end|>\n"


def test_report_is_right(corpus, tmp_path, capsys):
    script.main(["--data", *map(str, corpus), "--vocab_size", "400", "--out_dir", str(tmp_path), "--held_out", "0.2"])
    printed = capsys.readouterr().out
    trained = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rows = {}
    for line in printed.splitlines():
        numbers = line.split()[-3:]
        if len(numbers) == 3 and line.startswith("  ") and "." in numbers[2] and numbers[0][0].isdigit():
            rows[" ".join(line.split()[:-3])] = [float(number.replace(",", "")) for number in numbers]
    assert rows.keys() == {
        "zh text", "zh chat", "zh all", "en text", "en chat", "en all", "pretrain.jsonl", "sft.jsonl"
    }
    for n_bytes, n_tokens, ratio in rows.values():
        assert ratio == pytest.approx(n_bytes / n_tokens, abs=5e-4)
    held_out = [r for r in reading.read_records(corpus, "") if r.draw < 0.2]
    assert 0.1 < len(held_out) / 600 < 0.3
    chats = ["".join(r.parts) for r in held_out if r.group == "zh_chat"]
    assert rows["zh chat"][0] == sum(len(text.encode("utf-8")) for text in chats)
    texts = [r.parts[0] for r in held_out if r.group == "en_text"]
    assert rows["en text"][1] == sum(len(trained.encode(text).ids) for text in texts)
    assert rows["zh all"][:2] == [rows["zh text"][i] + rows["zh chat"][i] for i in (0, 1)]
    counts = [int(line.split()[0].replace(",", "")) for line in printed.splitlines() if line[:8].strip().isdigit()]
    assert sum(counts) == 400 and {11, 256} <= set(counts)

    script.main(["--data", *map(str, corpus), "--measure", str(tmp_path), "--held_out", "0.2"])
    assert capsys.readouterr().out.split("\n\n")[1].strip() in printed


def test_same_input_same_files(corpus, tmp_path):
    """Whatever the hash seed, and in whatever order the files are named."""
    for name, paths, seed in (("a", corpus, "1"), ("b", corpus, "2"), ("c", corpus[::-1], "3")):
        done = command("--data", *paths, "--vocab_size", 380, "--out_dir", tmp_path / name, PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr
    for file in ("tokenizer.json", "tokenizer_config.json"):
        first, *others = [(tmp_path / name / file).read_bytes() for name in "abc"]
        assert others == [first, first]


def test_held_out_records_are_not_trained_on(corpus):
    trained_on = reading.read_corpus(corpus, held_out=0.3, max_mb=0)
    everything = reading.read_corpus(corpus, held_out=0, max_mb=0)
    assert not everything.held_out
    for group in reading.GROUPS:
        kept = sum(r.n_bytes for r in trained_on.held_out if r.group == group)
        assert 0 < kept < everything.n_bytes[group]
        assert kept + trained_on.n_bytes[group] == everything.n_bytes[group]


def test_max_mb_samples_each_group(corpus):
    everything = reading.read_corpus(corpus, held_out=0.1, max_mb=0)
    limit = everything.n_bytes["zh_text"] / 2
    sampled = reading.read_corpus(corpus, held_out=0.1, max_mb=limit / 1e6)
    assert sampled.held_out == everything.held_out
    assert 0.35 < sampled.n_bytes["zh_text"] / everything.n_bytes["zh_text"] < 0.65
    assert sampled.n_bytes["en_chat"] == everything.n_bytes["en_chat"]  # smaller than the limit: untouched


def test_shares_are_shares_of_the_weighted_bytes(corpus):
    read = reading.read_corpus(corpus, held_out=0, max_mb=0)
    shares = {"zh_text": 1.0, "en_text": 2.0, "zh_chat": 3.0, "en_chat": 4.0}
    weights, _ = reading.word_weights(read, shares)
    weighted = Counter()
    for word, weight in weights.items():
        weighted[reading.language(word) if word.strip(" 。.？?") else "none"] += weight * len(word.encode("utf-8"))
    assert weighted["zh"] / (weighted["zh"] + weighted["en"]) == pytest.approx(0.4, abs=0.03)


def test_shares_move_tokens_between_the_languages(corpus):
    read = reading.read_corpus(corpus, held_out=0, max_mb=0)

    def han(zh: float, en: float) -> int:
        shares = {"zh_text": zh, "zh_chat": zh, "en_text": en, "en_chat": en}
        tokens = [t for t in script.train(read, shares, 330).get_vocab() if t not in CONTROLS + TAGS]
        return sum(bool(reading.HAN.search(byte_pairs.token_bytes(t).decode("utf-8", "ignore"))) for t in tokens)

    assert han(0, 1) == 0
    assert han(0.1, 0.9) < han(0.5, 0.5) < han(0.9, 0.1)


def test_repeated_long_lines_count_once(tmp_path):
    boiler = "All rights reserved by the owners of this very long notice."
    path = tmp_path / "x.jsonl"
    records = [{"text": f"{boiler}\nstory {word}"} for word in EN_WORDS]
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    words = reading.read_corpus([path], held_out=0, max_mb=0).words["en_text"]
    assert words[" reserved"] == 1
    assert words["story"] == len(EN_WORDS)  # short lines are language, not boilerplate


@pytest.mark.parametrize("seed", range(4))
def test_merges_are_the_heaviest_at_each_step(seed):
    """Against a naive count over all words at each step, characters being whole when pairs are counted."""
    rng = random.Random(seed)
    weights = {
        "".join(rng.choices("abcab猫狗鱼é😀", k=rng.randint(1, 9))): rng.randint(1, 50) for _ in range(120)
    }
    merges = byte_pairs.learn_merges(weights, n_tokens=60, min_weight=1)
    assert len({left + right for left, right in merges}) == 60
    words = {word: [c.encode("utf-8") for c in word] for word in weights}
    single = Counter()
    for word, weight in weights.items():
        for c in word:
            data = c.encode("utf-8")
            for end in range(2, len(data) + 1):
                single[data[:end]] += weight
    made = {bytes([b]) for b in range(256)}
    for left, right in merges:
        assert left in made and right in made
        pairs = Counter()
        for word, parts in words.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += weights[word]
        pending = {data: weight for data, weight in single.items() if data not in made}
        heaviest = max([*pairs.values(), *pending.values()])
        if (left, right) in pairs:
            assert pairs[left, right] == heaviest
            for word, parts in words.items():
                merged = []
                for part in parts:
                    if merged and (merged[-1], part) == (left, right):
                        merged[-1] = left + right
                    else:
                        merged.append(part)
                words[word] = merged
        else:
            assert single[left + right] == heaviest
        made.add(left + right)


def test_the_library_applies_the_merges_as_they_were_learnt(corpus):
    """A word of the training text becomes the symbols that training left it with."""
    read = reading.read_corpus(corpus, held_out=0, max_mb=0)
    weights, _ = reading.word_weights(read, reading.SHARES)
    merges = byte_pairs.learn_merges(weights, 90, min_weight=1)
    tokenizer = files.build_tokenizer(merges)
    for word in list(weights)[:300]:
        parts = [bytes([b]) for b in word.encode("utf-8")]
        for pair in merges:
            merged = []
            for part in parts:
                if merged and (merged[-1], part) == pair:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged
        assert [byte_pairs.token_bytes(t) for t in tokenizer.encode(word).tokens] == parts


def test_language():
    assert reading.language("今天 is Monday") == "en"
    assert reading.language("今天是星期一 OK") == "zh"
    assert reading.language("123 !?") == "en"
    assert reading.language("𠮷野家") == "zh"


def test_broken_escapes_and_other_fields():
    record = reading.parse_record('{"text": "a\\ud83d"}', "f")
    assert record.parts == ("a\ufffd",)
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "", "tool_calls": "[1]"}]
    record = reading.parse_record(json.dumps({"conversations": turns}), "f")
    assert record == reading.Record("f", "zh_chat", ("你好", "[1]"))
    assert reading.parse_record('{"text": ""}', "f") is None


@pytest.mark.parametrize("content, reason", [
    ("", "no text"),
    ('{"text": ""}\n', "no text"),
    ('[{"text": "a"}]\n', "line 1: neither"),
    ('{"text": "a"}\n{"title": "b"}\n', "line 2: neither"),
    ('{"text": "a"}\n{"text": \n', "line 2: not JSON"),
    ('{"conversations": ["hi"]}\n', "line 1"),
    (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: 'utf-8'"),
    (None, "There is no file"),
])
def test_bad_files_end_in_one_line(tmp_path, content, reason, capsys):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    with pytest.raises(SystemExit) as exit_:
        script.main(["--data", str(path), "--out_dir", str(tmp_path / "t")])
    printed = capsys.readouterr().err
    assert exit_.value.code == 2
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert reason in printed and str(path) in printed
    assert not (tmp_path / "t").exists()


def test_too_little_text(corpus, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        script.main(["--data", str(corpus[0]), "--vocab_size", "6400", "--out_dir", str(tmp_path / "t")])
    printed = capsys.readouterr().err
    assert exit_.value.code == 2 and "not 6,400" in printed and printed.count("\n") == 1
    possible = printed.split("--vocab_size ")[1].rstrip(".\n")
    script.main(["--data", str(corpus[0]), "--vocab_size", possible, "--out_dir", str(tmp_path / "t")])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "t")) == int(possible)
    capsys.readouterr()
    script.main(["--data", str(corpus[0]), "--out_dir", str(tmp_path / "u")])  # no size asked for: takes what it gets
    assert "note: " in capsys.readouterr().out
    assert len(AutoTokenizer.from_pretrained(tmp_path / "u")) == int(possible)


@pytest.mark.parametrize("args, reason", [
    (["--shares", "de_text=1"], "the names are"),
    (["--shares", "zh_text"], "NAME=NUMBER"),
    (["--shares", "zh_text=-1"], "from 0 up"),
    (["--vocab_size", "200"], "267"),
    (["--held_out", "1"], "--held_out"),
    (["--max_mb", "-1"], "--max_mb"),
])
def test_bad_flags(args, reason, capsys):
    with pytest.raises(SystemExit) as exit_:
        script.main(args)
    assert exit_.value.code == 2 and reason in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(corpus, tmp_path, capsys):
    (tmp_path / "taken").write_text("a file", encoding="utf-8")
    with pytest.raises(SystemExit) as exit_:
        script.main(["--data", str(corpus[1]), "--vocab_size", "300", "--out_dir", str(tmp_path / "taken")])
    assert exit_.value.code == 2 and "--out_dir" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "a file"


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    tokenizer = files.build_tokenizer([(b"a", b"b")])
    paths = files.save_tokenizer(tokenizer, tmp_path)
    before = [path.read_bytes() for path in paths]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "replace_file", full)
    with pytest.raises(OSError, match="No space left"):
        files.save_tokenizer(files.build_tokenizer([(b"x", b"y")]), tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert [path.read_bytes() for path in paths] == before


def test_default_data(tmp_path, monkeypatch):
    """Corpora in dataset/ come first, files of other formats are passed over, the demo data is the last resort."""
    monkeypatch.setattr(reading, "ROOT", tmp_path)
    (tmp_path / "dataset").mkdir()
    made = {"pretrain": tmp_path / "p.jsonl", "sft": tmp_path / "s.jsonl", "dpo": tmp_path / "d.jsonl"}
    from dataset import make_demo_data

    monkeypatch.setattr(make_demo_data, "generate", lambda: made)
    (tmp_path / "dataset" / "dpo.jsonl").write_text('{"chosen": [], "rejected": []}\n', encoding="utf-8")
    assert reading.find_data() == [made["pretrain"], made["sft"]]
    for name, line in (("sft_512", '{"conversations": []}'), ("pretrain_hq", '{"text": "a"}')):
        (tmp_path / "dataset" / f"{name}.jsonl").write_text(line + "\n", encoding="utf-8")
    assert [path.stem for path in reading.find_data()] == ["pretrain_hq", "sft_512"]


def test_measure_needs_a_tokenizer(corpus, tmp_path, capsys):
    for content, reason in ((None, "no tokenizer.json"), ("{}", "not a tokenizer")):
        if content:
            (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
        with pytest.raises(SystemExit):
            script.main(["--data", str(corpus[0]), "--measure", str(tmp_path)])
        assert reason in capsys.readouterr().err
