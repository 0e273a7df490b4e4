"""What requests may say: typed values, or a 400 in OpenAI's shape that names the field."""

import json

import pytest

from scripts.serving.fields import DEEPEST, ApiError, Fields, depth, parse_body
from scripts.serving.protocol import (
    Defaults,
    Generation,
    parse_chat,
    parse_completion,
    parse_embedding,
    parse_messages,
)

V = 6400
USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def chat(**fields):
    return parse_chat(Fields({"messages": USER} | fields), Defaults(), V)


def error_of(call, *args, **kwargs) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(*args, **kwargs)
    json.dumps(caught.value.body(), ensure_ascii=False).encode()  # can be sent
    return caught.value


def test_what_is_left_out_or_null_gets_the_default():
    names = ("temperature", "top_p", "top_k", "seed", "n", "stop", "max_tokens", "stream", "logprobs", "tools", "user",
             "logit_bias", "presence_penalty", "response_format", "chat_template_kwargs", "stream_options")  # fmt: skip
    assert chat() == chat(**dict.fromkeys(names))
    request = chat()
    assert request.messages == USER and request.thinking is None and not request.json_object
    settings = {"temperature": 0.85, "top_p": 0.85, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0,
                "frequency_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": {}}  # fmt: skip
    assert request.generation == Generation(settings, (), None, None, 1, False, False, None)


def test_every_field_arrives():
    request = chat(
        temperature=0, top_p=0.5, top_k=-1, min_p=0.1, presence_penalty=-2, frequency_penalty=2, repetition_penalty=1.2,
        logit_bias={"7": -100, "6399": 3}, stop=["a", "", "b"], max_tokens=5, max_completion_tokens=9.0, seed=-1, n=3,
        stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=20, user="me", store=False,
    )  # fmt: skip
    settings = {"temperature": 0.0, "top_p": 0.5, "top_k": 0, "min_p": 0.1, "presence_penalty": -2.0,
                "frequency_penalty": 2.0, "repetition_penalty": 1.2, "logit_bias": {7: -100.0, 6399: 3.0}}  # fmt: skip
    assert request.generation == Generation(settings, ("a", "b"), 9, 2**64 - 1, 3, True, True, 20)
    assert chat(stop="x", logprobs=True).generation.stops == ("x",)
    assert chat(logprobs=True).generation.top_logprobs == 0
    assert not chat(stream_options={"include_usage": True}).generation.include_usage  # without stream: nothing to add


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("temperature", True),
        ("temperature", float("nan")), ("temperature", float("inf")), ("top_p", -1), ("top_p", 1.01), ("top_k", -2),
        ("top_k", 1.5), ("top_k", 10**400), ("min_p", 2), ("presence_penalty", 2.5),
        ("frequency_penalty", float("nan")),
        ("repetition_penalty", 0), ("repetition_penalty", -1), ("n", 0), ("n", 17), ("n", -1), ("n", True),
        ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", "8"), ("max_completion_tokens", float("inf")),
        ("seed", 2**64), ("seed", 0.5), ("stop", 5), ("stop", ["a"] * 17), ("stop", ["x" * 257]), ("stop", [None]),
        ("stream", 1), ("stream", "yes"), ("logprobs", 2), ("top_logprobs", 5), ("logit_bias", {"-1": 1}),
        ("logit_bias", {"6400": 1}), ("logit_bias", {"x": 1}), ("logit_bias", {"1": 101}), ("logit_bias", {"²": 1}),
        ("logit_bias", {"1": float("nan")}), ("logit_bias", [1]), ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("tools", "add"), ("tools", [{}]), ("tools", [{"type": "function", "function": {"name": ""}}]),
        ("tools", [TOOL] * 129), ("tool_choice", "required"), ("tool_choice", {"type": "function"}), ("tool_choice", 3),
        ("functions", [TOOL]), ("function_call", "auto"), ("enable_thinking", "on"),
        ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}), ("chat_template_kwargs", 1),
        ("reasoning_effort", "huge"), ("reasoning_effort", ["low"]), ("response_format", {"type": "json_schema"}),
        ("response_format", "json"), ("audio", {}), ("modalities", ["audio"]), ("parallel_tool_calls", "no"),
        ("stream_options", [1]), ("messages", []), ("messages", "hi"), ("messages", None), ("messages", USER * 2049),
    ],
)  # fmt: skip
def test_an_impossible_value_is_a_400_that_names_the_field(field, value):
    extra = {"stream": True} if field == "stream_options" else {}
    error = error_of(chat, **extra | {field: value})
    assert error.status == 400 and error.kind == "invalid_request_error"
    assert error.param.partition("[")[0] == field and field in error.message and len(error.message) < 300


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hi", "messages[0].role"), ({"content": "x"}, "messages[0].role"),
        ({"role": "wizard", "content": "x"}, "messages[0].role"),
        ({"role": ["user"], "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"), ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0]"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]"),
        ({"role": "assistant", "tool_calls": "x"}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages[0].tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]},
         "messages[0].tool_calls[0].function.arguments"),
    ],
)  # fmt: skip
def test_an_impossible_message(message, param):
    assert error_of(parse_messages, [message]).param == param


def test_messages_become_plain_turns():
    calls = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b\ud800"}]
    assert parse_messages(
        [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": parts, "name": "me"},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
            {"role": "assistant", "content": "2", "reasoning_content": "sum"},
        ]
    ) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2", "reasoning_content": "sum"},
    ]


def test_tools_and_how_they_are_chosen():
    assert not chat(tools=[TOOL], tool_choice="none").tools.signatures
    assert chat(tools=[TOOL]).tools.names == {"add"} and chat(tools=[TOOL]).tools.parallel
    assert not chat(tools=[TOOL], parallel_tool_calls=False).tools.parallel
    forced = chat(tools=[TOOL], tool_choice="required").tools
    assert forced.forced == "*" and not forced.parallel
    named = {"type": "function", "function": {"name": "add"}}
    assert chat(tools=[TOOL], tool_choice=named).tools.forced == "add"
    named["function"]["name"] = "nope"
    assert error_of(chat, tools=[TOOL], tool_choice=named).param == "tool_choice"
    assert error_of(chat, tools=[TOOL], response_format={"type": "json_object"}).param == "response_format"


def test_whether_to_think():
    assert chat(reasoning_effort="none").thinking is False and chat(reasoning_effort="high").thinking is True
    assert chat(chat_template_kwargs={"enable_thinking": True}, reasoning_effort="none").thinking is True
    assert chat(enable_thinking=False, chat_template_kwargs={"enable_thinking": True}).thinking is False


def test_text_completions():
    def parse(**fields):
        return parse_completion(Fields(fields), Defaults(), V)

    assert parse(prompt="x").prompts == ["x"] and parse(prompt=[3, 4]).prompts == [[3, 4]]
    assert parse(prompt=["x", [3]], n=2, logprobs=3).generation.top_logprobs == 3
    for fields, param in (({}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [6400]}, "prompt"),
                          ({"prompt": [True]}, "prompt"), ({"prompt": "x", "suffix": "y"}, "suffix"),
                          ({"prompt": "x", "best_of": 2}, "best_of"), ({"prompt": ["x"] * 9, "n": 2}, "n"),
                          ({"prompt": "x", "echo": True, "logprobs": 1}, "echo")):  # fmt: skip
        assert error_of(parse, **fields).param == param


def test_embeddings():
    request = parse_embedding(Fields({"input": ["a", "b"], "encoding_format": "base64"}), V)
    assert request.inputs == ["a", "b"] and request.base64
    assert error_of(parse_embedding, Fields({"input": 5}), V).param == "input"
    assert error_of(parse_embedding, Fields({"input": "a", "dimensions": 3}), V).param == "dimensions"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"a": "\xc3"}', b'{"a": NaN}', b'{"a": -Infinity}',
     b"[" * 500_000, b'{"a":' * 200_000, b'{"a": ' + b"9" * 5000 + b"}",
     b'{"a": ' + b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1) + b"}"],
)  # fmt: skip
def test_what_is_no_request(body):
    error = error_of(parse_body, body)
    assert error.status == 400 and error.code == "invalid_json" and len(error.message) < 400


def test_depth():
    assert depth(1) == 0 and depth([]) == 1 and depth({"a": [{"b": []}]}) == 4
    assert parse_body(b'{"a": ' + b"[" * (DEEPEST - 1) + b"]" * (DEEPEST - 1) + b"}")
