"""Tokens to deltas: whole characters, stop strings, thoughts and tool calls, wherever the tokens end."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.weights import load_tokenizer
from scripts.serving.text_stream import (
    AnswerText,
    Delta,
    Splitter,
    StopScanner,
    TextRules,
    ToolCall,
    overlap,
    parse_call,
    strict_json,
    token_bytes,
)

TOOLS = frozenset({"add", "天气"})
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def merged(deltas: list[Delta]) -> list[tuple]:
    """Deltas of one kind that follow each other, as one."""
    out: list[list] = []
    for kind, text, call in deltas:
        if out and out[-1][0] == kind != "call":
            out[-1][1] += text
        else:
            out.append([kind, call or text])
    return [tuple(one) for one in out]


def split(text: str, rules: TextRules, cuts: list[int] = ()) -> list[tuple]:
    """What a splitter makes of a text that comes in pieces, cut at these places."""
    splitter, deltas = Splitter(rules), []
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    for a, z in zip(edges, edges[1:], strict=False):
        deltas += splitter.push(text[a:z])
    return merged(deltas + splitter.flush())


@pytest.mark.parametrize(
    ("text", "rules", "expected"),
    [
        ("Hello\n", {}, [("content", "Hello\n")]),
        ("<think>\nhm\n</think>\n\nYes", {}, [("reasoning", "hm"), ("content", "Yes")]),
        (" \n<think>hm</think>Yes", {}, [("reasoning", "hm"), ("content", "Yes")]),
        ("hm\n</think>\n\nYes", {"opened": True}, [("reasoning", "hm"), ("content", "Yes")]),
        ("<think>\n\n</think>\n\nYes", {}, [("content", "Yes")]),
        ("<think>\nnever closed\n", {}, [("reasoning", "never closed")]),
        ("<think>a < b and </thin", {}, [("reasoning", "a < b and </thin")]),
        ("Not <think>at the start</think>", {}, [("content", "Not <think>at the start</think>")]),
        ("<think>raw</think>", {"plain": True}, [("content", "<think>raw</think>")]),
        (CALL, {}, [("content", CALL)]),  # no tools were offered
        (CALL, {"functions": TOOLS}, [("call", ToolCall("add", '{"a": 1, "b": [2]}'))]),
        (
            f"Let me see.\n{CALL}\n{CALL}\n", {"functions": TOOLS},
            [("content", "Let me see."), ("call", ToolCall("add", '{"a": 1, "b": [2]}')),
             ("call", ToolCall("add", '{"a": 1, "b": [2]}'))],
        ),
        (f"{CALL}\nand more", {"functions": TOOLS, "parallel_calls": False},
         [("call", ToolCall("add", '{"a": 1, "b": [2]}'))]),
        ("x \n<tool_call>oops</tool_call> y", {"functions": TOOLS}, [("content", "x \n<tool_call>oops</tool_call> y")]),
        ('ok <tool_call>{"name": "add"', {"functions": TOOLS}, [("content", 'ok <tool_call>{"name": "add"')]),
        ('{"b": 1}}\n</tool_call>', {"functions": TOOLS, "begun": '<tool_call>\n{"name": "add", "arguments": '},
         [("call", ToolCall("add", '{"b": 1}'))]),
        ("a, b. c", {"stops": (". ", ",x")}, [("content", "a, b")]),
        ("<think>stop here</think>go on stop", {"stops": ("stop",)},
         [("reasoning", "stop here"), ("content", "go on ")]),
        (f"stay{CALL}", {"functions": TOOLS, "stops": ("stay!",)},
         [("content", "stay"), ("call", ToolCall("add", '{"a": 1, "b": [2]}'))]),
    ],
)  # fmt: skip
def test_what_an_answer_consists_of(text, rules, expected):
    rules = dict(rules)
    begun = rules.pop("begun", "")
    rules = TextRules(**rules)
    assert split(begun + text, rules) == expected
    assert split(begun + text, rules, list(range(200))) == expected  # character by character


PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<", "</", ">", "stop", "st", "op", " ", "\n", "a",
          "界", '{"name": "add", "arguments": {}}', '{"name": "nope"}', "tool_call", "ab", "abc"]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=14).map("".join),
    st.lists(st.integers(0, 300), max_size=12),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(), ("stop",), ("abc", "b"), ("\n\n", "a <")]),
)
def test_where_pieces_end_changes_nothing(text, cuts, opened, tools, stops):
    rules = TextRules(stops, opened=opened, functions=TOOLS if tools else frozenset())
    assert split(text, rules, cuts) == split(text, rules)


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="ab\n界", max_size=30),
    st.lists(st.text(alphabet="ab\n界", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30), max_size=8),
)
def test_stop_strings_against_a_plain_search(text, stops, cuts):
    ends = [(end, end - len(s)) for s in stops for end in range(len(text) + 1) if text[:end].endswith(s)]
    expected = text[: min(ends)[1]] if ends else text
    scanner, shown = StopScanner(stops), ""
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    for a, z in zip(edges, edges[1:], strict=False):
        shown += scanner.push(text[a:z])
        assert expected.startswith(shown)  # nothing is shown that would have to be taken back
    assert shown + scanner.flush() == expected or (scanner.stopped and shown == expected)
    assert scanner.stopped == bool(ends)


def test_overlap_is_the_longest_beginning_at_the_end():
    assert overlap("abc</th", "</think>") == 4 and overlap("abc", "</think>") == 0
    assert overlap("</think>", "</think>") == 0 and overlap("aab", "aabaab!") == 3


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"name": 3}', '{"name": "other", "arguments": {}}', '{"name": "add", "arguments": []}',
     '{"name": "add", "arguments": "[]"}', '{"name": "add", "arguments": {"a": NaN}}', "[" * 100_000,
     '{"name": "add"} trailing', '{"name": ["add"]}'],
)  # fmt: skip
def test_a_bad_call_is_none(text):
    assert parse_call(text, TOOLS) is None


def test_good_calls():
    assert parse_call('{"name": "add"}', TOOLS) == ToolCall("add", "{}")
    assert parse_call('{"name": "add", "arguments": "{\\"a\\": 1}"}', TOOLS) == ToolCall("add", '{"a": 1}')
    call = parse_call('{"name": "天气", "arguments": {"市": "\\ud800"}}', TOOLS)
    assert json.loads(call.arguments.encode().decode()) == {"市": "?"}  # a lone surrogate would break the reply


def test_strict_json_refuses_what_is_none():
    for text in ("NaN", '{"a": -Infinity}', "{", "[" * 200_000):
        with pytest.raises(ValueError):
            strict_json(text)
    assert strict_json("[1, null]") == [1, None]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.lists(st.integers(3, 6399), max_size=20))
def test_no_delta_splits_a_character(tokenizer, text, junk):
    """Ids of a text, and ids at random, half of which are broken UTF-8: the pieces joined are the whole decoded."""
    for ids in (tokenizer.encode(text, add_special_tokens=False), junk):
        answer, shown = AnswerText(tokenizer, TextRules(plain=True)), ""
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for token in ids:
            shown += "".join(delta.text for delta in answer.push(token))
            assert whole.startswith(shown)
        assert shown + "".join(delta.text for delta in answer.flush()) == whole


def test_a_stop_string_across_tokens(tokenizer):
    ids = tokenizer.encode("The answer is forty-two, I think. 结束了", add_special_tokens=False)
    for stop in ("forty-two", "wer is f", "束", "think. 结"):
        answer, shown, used = AnswerText(tokenizer, TextRules((stop,))), "", 0
        for token in ids:
            used += 1
            shown += "".join(delta.text for delta in answer.push(token))
            if answer.finished:
                break
        whole = "The answer is forty-two, I think. 结束了"
        assert shown == whole[: whole.index(stop)]
        assert stop in tokenizer.decode(ids[:used]) and stop not in tokenizer.decode(ids[: used - 1])


def test_bytes_of_tokens(tokenizer):
    pieces = token_bytes(tokenizer)
    assert len(pieces) == len(tokenizer) and pieces[2] == b"<|im_end|>"
    assert pieces[tokenizer.convert_tokens_to_ids("<think>")] == b"<think>"
    for text in ("Hello, world", "  你好 🙂\t\n", "é\x00\x7f"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(pieces[i] for i in ids) == text.encode()
    assert sorted(piece for piece in pieces if len(piece) == 1) == [bytes([b]) for b in range(256)]
