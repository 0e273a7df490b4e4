"""The server as its clients see it: the official `openai` client and raw HTTP against uvicorn on a loopback port."""

import base64
import concurrent.futures
import io
import json
import re
import struct
import time

import openai
import pytest
import torch

from eval_model import Chat, Settings
from model.generation import Decoder, Sampling
from model.weights import load_tokenizer
from scripts.chat_openai_api import ApiChat
from scripts.chat_text import chat_ids
from scripts.serving.protocol import Defaults
from tests.serving_server import EOS, HARD_LIMIT, events, greedy, running_server, serve_script, serve_tiny, tiny_model

USER = [{"role": "user", "content": "Hello, who are you?"}]
QUESTIONS = ["你是谁？", "Why is the sky blue?", "1", "Tell me about the sea and the stars.", "🙂🙂", "a b c d e f g"]
ADD = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
SCRIPT = {
    "greet": "Hello 你好 🙂!",
    "ponder": "<think>\nLet me see.\n</think>\n\nForty-two.",
    "sum": f"I add.\n{CALL}",
    "broken": "<tool_call>\nnot json\n</tool_call>",
    "long": "word " * 800,
    '"a": 2': "never",
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tiny(model):
    with running_server(serve_tiny(model)) as running:
        yield running


@pytest.fixture(scope="module")
def scripted():
    with running_server(serve_script(SCRIPT)) as running:
        yield running


def ask(running, text: str, **fields):
    options = {"model": running.serving.served.base, "messages": [{"role": "user", "content": text}]}
    return running.client().chat.completions.create(**options | fields)


def streamed(running, text: str, **fields) -> tuple[str, str, list[dict], str | None]:
    """(reasoning, content, tool calls, finish_reason) of a stream, its deltas put together as clients do it."""
    reasoning = content = ""
    calls: list[dict] = []
    finish = None
    for chunk in ask(running, text, stream=True, **fields):
        for choice in chunk.choices:
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            content += choice.delta.content or ""
            finish = choice.finish_reason or finish
            for call in choice.delta.tool_calls or ():
                if call.index == len(calls):
                    calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
                calls[call.index]["arguments"] += call.function.arguments or ""
    return reasoning, content, calls, finish


# --- Answers ----------------------------------------------------------------------------------------------------------


def shown(text: str) -> str:
    """As the terminal shows it: eval_model puts U+FFFD where a control character would garble it."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def test_greedy_text_is_that_of_eval_model_and_of_generate(tiny, model, tokenizer):
    """Twelve requests at once, streamed and whole."""
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        whole = {q: pool.submit(ask, tiny, q, temperature=0, max_tokens=24) for q in QUESTIONS}
        parts = {q: pool.submit(streamed, tiny, q, temperature=0, max_tokens=24) for q in QUESTIONS}
    for question in QUESTIONS:
        out, settings = io.StringIO(), Settings(temperature=0.0, top_p=1.0, max_new_tokens=24, max_seq_len=512)
        Chat(model, tokenizer, settings, out=out, notes=io.StringIO()).ask(question)
        ids = chat_ids(tokenizer, [{"role": "user", "content": question}], None)
        tokens = greedy(model, ids, 24)
        reply = whole[question].result()
        text = reply.choices[0].message.content
        assert text == tokenizer.decode([t for t in tokens if t != EOS], skip_special_tokens=True)
        assert shown(text) + "\n" == out.getvalue()
        assert reply.choices[0].finish_reason == ("stop" if tokens[-1] == EOS else "length")
        usage = reply.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), len(tokens))
        assert usage.total_tokens == len(ids) + len(tokens)
        assert parts[question].result() == ("", text, [], reply.choices[0].finish_reason)


def test_a_seed_means_the_same_text_alone_and_in_a_crowd(tiny):
    fields = {"temperature": 1.2, "top_p": 1, "max_tokens": 30}

    def text(seed: int) -> str:
        return ask(tiny, "Tell me a story.", seed=seed, **fields).choices[0].message.content

    alone = [text(seed) for seed in range(6)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        noise = [pool.submit(ask, tiny, q, temperature=2.0, max_tokens=40) for q in QUESTIONS]
        crowd = list(pool.map(text, range(6)))
        assert all(one.result().choices for one in noise)
    assert crowd == alone and len(set(alone)) == 6
    several = ask(tiny, "Tell me a story.", seed=0, n=3, **fields)  # answer i is drawn with seed + i
    assert [c.message.content for c in several.choices] == alone[:3] and [c.index for c in several.choices] == [0, 1, 2]
    assert text(-1) == text(-1)


def test_each_prompt_of_a_request_is_drawn_as_if_alone(tiny):
    def texts(prompt, **more) -> list[str]:
        reply = tiny.client().completions.create(
            model="tiny", prompt=prompt, seed=5, temperature=1.2, top_p=1, max_tokens=20, **more
        )
        return [choice.text for choice in reply.choices]

    prompts = ["Once upon", "The sea"]
    assert texts(prompts) == texts(prompts[0]) + texts(prompts[1])
    assert texts(prompts, n=2)[2] == texts(prompts[1])[0] and len(set(texts(prompts, n=2))) == 4


def test_log_probabilities_are_those_of_a_plain_forward(tiny, model, tokenizer):
    fields = {"temperature": 1.0, "seed": 3, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    reply = ask(tiny, "Hello", **fields).choices[0]
    ids = chat_ids(tokenizer, [{"role": "user", "content": "Hello"}], None)
    sampling = Sampling(temperature=1.0, top_p=0.85, seed=3, max_new_tokens=12, stop_ids={EOS})
    (request,) = Decoder(model, 1, 256).generate([ids], sampling)
    with torch.no_grad():
        logps = model(torch.tensor([ids + request.tokens])).logits[0, len(ids) - 1 : -1].log_softmax(-1)  # (T, V)
    content = reply.logprobs.content
    assert len(content) == len(request.answer)
    for entry, token, row in zip(content, request.answer, logps, strict=False):
        assert abs(entry.logprob - row[token].item()) < 2e-3
        values, best = row.topk(3)
        for top, value, i in zip(entry.top_logprobs, values.tolist(), best.tolist(), strict=True):
            assert abs(top.logprob - value) < 2e-3 and top.token == tokenizer.decode([i])
    joined = b"".join(bytes(entry.bytes) for entry in content)
    assert joined.decode("utf-8", "replace") == reply.message.content
    chunks = list(ask(tiny, "Hello", stream=True, **fields))
    listed = [e for c in chunks for choice in c.choices if choice.logprobs for e in choice.logprobs.content]
    assert [e.bytes for e in listed] == [e.bytes for e in content]


def test_logit_bias_and_penalties(tiny, tokenizer):
    token = tokenizer.encode("sea", add_special_tokens=False)[0]
    forced = ask(tiny, "Hello", temperature=0, max_tokens=4, logit_bias={str(token): 100})
    assert forced.choices[0].message.content == tokenizer.decode([token] * 4)
    free = ask(tiny, "Hello", temperature=0, max_tokens=8, logprobs=True).choices[0].logprobs.content
    first = next(i for i, piece in enumerate(tiny.serving.vocabulary.pieces) if list(piece) == free[0].bytes)
    banned = ask(tiny, "Hello", temperature=0, max_tokens=8, logit_bias={str(first): -100}, logprobs=True)
    assert banned.choices[0].logprobs.content[0].bytes != free[0].bytes
    fields = {"temperature": 0, "max_tokens": 60, "logprobs": True, "logit_bias": {str(EOS): -100}}
    penalties = {"presence_penalty": 2, "frequency_penalty": 2, "extra_body": {"repetition_penalty": 10}}
    each_once = ask(tiny, "Hello", **penalties, **fields)
    said = [tuple(e.bytes) for e in each_once.choices[0].logprobs.content]
    assert len(said) == 60 > len({tuple(e.bytes) for e in ask(tiny, "Hello", **fields).choices[0].logprobs.content})
    assert len(set(said)) > 50


def test_a_json_object(tiny):
    """Constrained: whatever the model would rather say."""
    pieces, done = tiny.serving.vocabulary.pieces, 0
    bias = {str(i): 6 for i, piece in enumerate(pieces) if piece in (b"}", b'"')}
    for seed in range(3):
        fields = {"seed": seed, "temperature": 1.5, "max_tokens": 120, "logit_bias": bias}
        reply = ask(tiny, "JSON!", response_format={"type": "json_object"}, **fields)
        choice = reply.choices[0]
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
            done += 1
    assert done


def test_text_completions(tiny, model, tokenizer):
    client = tiny.client()
    ids = [tokenizer.bos_token_id, *tokenizer.encode("Once upon", add_special_tokens=False)]
    expected = tokenizer.decode([t for t in greedy(model, ids, 10) if t != EOS])
    for prompt in ("Once upon", ids):
        reply = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=10)
        assert reply.choices[0].text == expected and reply.usage.prompt_tokens == len(ids)
    stream = client.completions.create(
        model="tiny", prompt=["Once upon", "The sea"], temperature=0, max_tokens=10, stream=True, echo=True, n=2
    )
    texts = ["", "", "", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts[0] == texts[1] == "Once upon" + expected and texts[2] == texts[3] and texts[2].startswith("The sea")
    reply = client.completions.create(model="tiny", prompt="Once upon", temperature=0, max_tokens=10, logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert "".join(logprobs.tokens) == expected and len(logprobs.top_logprobs[0]) == 2
    assert max(logprobs.top_logprobs[0].values()) == logprobs.token_logprobs[0]
    assert logprobs.text_offset[1] == len(logprobs.tokens[0])


def test_embeddings(tiny):
    reply = tiny.client().embeddings.create(model="tiny", input=["sea", "stars"])
    assert [len(one.embedding) for one in reply.data] == [32, 32] and reply.usage.prompt_tokens >= 4
    assert abs(sum(x * x for x in reply.data[0].embedding) - 1) < 1e-4
    plain = tiny.post("/v1/embeddings", {"model": "tiny", "input": "sea"}).json()["data"][0]["embedding"]
    packed = tiny.post("/v1/embeddings", {"model": "tiny", "input": "sea", "encoding_format": "base64"}).json()
    values = struct.unpack("<32f", base64.b64decode(packed["data"][0]["embedding"]))
    assert values == pytest.approx(plain, abs=1e-6) and values == pytest.approx(reply.data[0].embedding, abs=1e-6)


# --- Thoughts, tools, stops -------------------------------------------------------------------------------------------


def test_the_shape_of_a_stream(scripted):
    body = {"model": "scripted", "messages": [{"role": "user", "content": "greet"}], "stream": True}
    body["stream_options"] = {"include_usage": True}
    reply = scripted.post("/v1/chat/completions", body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    got = events(reply.text)
    assert got[-1] == "[DONE]" and len({e["id"] for e in got[:-1]}) == len({e["created"] for e in got[:-1]}) == 1
    assert reply.headers["x-request-id"] == got[0]["id"] and got[0]["id"].startswith("chatcmpl-")
    assert all(e["object"] == "chat.completion.chunk" and e["model"] == "scripted" for e in got[:-1])
    assert got[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [e["choices"][0]["finish_reason"] for e in got[:-2]] == [None] * (len(got) - 3) + ["stop"]
    assert got[-2]["choices"] == [] and got[-2]["usage"]["completion_tokens"] > 5
    assert all(e["usage"] is None for e in got[:-2])
    deltas = [e["choices"][0]["delta"].get("content", "") for e in got[:-2]]
    assert "".join(deltas) == "Hello 你好 🙂!" and not any("\ufffd" in d for d in deltas)
    del body["stream_options"]
    assert all("usage" not in e for e in events(scripted.post("/v1/chat/completions", body).text)[:-1])


def test_thoughts_stand_apart(scripted):
    message = ask(scripted, "ponder").choices[0].message
    assert (message.reasoning_content, message.content) == ("Let me see.", "Forty-two.")
    assert streamed(scripted, "ponder") == ("Let me see.", "Forty-two.", [], "stop")


def test_whether_to_think_reaches_the_template(tiny, tokenizer):
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    for fields, thinking in (({"extra_body": {"enable_thinking": True}}, True), ({"reasoning_effort": "none"}, False),
                             ({"extra_body": kwargs}, False), ({}, None)):  # fmt: skip
        expected = len(chat_ids(tokenizer, USER, thinking))
        reply = tiny.client().chat.completions.create(model="tiny", messages=USER, max_tokens=1, **fields)
        assert reply.usage.prompt_tokens == expected


def test_a_round_of_tools(scripted, tokenizer):
    choice = ask(scripted, "sum", tools=[ADD]).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I add."
    assert call.function.name == "add" and json.loads(call.function.arguments) == {"a": 2, "b": 3}
    reasoning, content, calls, finish = streamed(scripted, "sum", tools=[ADD])
    assert (reasoning, content, finish) == ("", "I add.", "tool_calls")
    assert calls == [{"id": calls[0]["id"], "name": "add", "arguments": '{"a": 2, "b": 3}'}] and calls[0]["id"]
    # The way back: the call and its result are rendered by the chat template, signatures and all.
    messages = [
        {"role": "user", "content": "sum"},
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "5"},
        {"role": "user", "content": "greet"},
    ]
    reply = scripted.client().chat.completions.create(model="scripted", messages=messages, tools=[ADD])
    turns = [messages[0], {"role": "assistant", "content": "I add.", "tool_calls": [
        {"name": "add", "arguments": {"a": 2, "b": 3}}]}, {"role": "tool", "content": "5"}, messages[3]]  # fmt: skip
    expected = tokenizer.apply_chat_template(turns, tools=[ADD], add_generation_prompt=True, return_dict=False)
    assert reply.usage.prompt_tokens == len(expected)
    prompt = list(scripted.serving.served.decoders["scripted"].plans)[-1].prompt
    assert tokenizer.decode(prompt) == tokenizer.decode(expected)


def test_a_bad_call_and_an_unasked_one_stay_text(scripted):
    choice = ask(scripted, "broken", tools=[ADD]).choices[0]
    assert choice.finish_reason == "stop" and choice.message.content == SCRIPT["broken"]
    assert choice.message.tool_calls is None
    assert ask(scripted, "sum").choices[0].message.content == SCRIPT["sum"]
    assert ask(scripted, "sum", tools=[ADD], tool_choice="none").choices[0].message.content == SCRIPT["sum"]


def test_a_forced_call_is_begun_for_the_model(tokenizer):
    named = {"type": "function", "function": {"name": "add"}}
    answers = {'"name": "add", "arguments": ': '{"a": 1}}\n</tool_call>and more', '{"name": "': 'add"}\n</tool_call>'}
    with running_server(serve_script(answers)) as running:
        for choice, arguments in ((named, {"a": 1}), ("required", {})):
            reply = ask(running, "now", tools=[ADD], tool_choice=choice, extra_body={"enable_thinking": True})
            (call,) = reply.choices[0].message.tool_calls
            assert json.loads(call.function.arguments) == arguments and call.function.name == "add"
            assert reply.choices[0].finish_reason == "tool_calls" and not reply.choices[0].message.content


def test_stop_strings(scripted):
    for stop, expected in (("好", "Hello 你"), ("lo 你", "Hel"), (["zzz", "!"], "Hello 你好 🙂"), ("Hello", "")):
        choice = ask(scripted, "greet", stop=stop).choices[0]
        assert choice.message.content == expected and choice.finish_reason == "stop"
        assert streamed(scripted, "greet", stop=stop)[1] == expected
    assert ask(scripted, "greet", max_tokens=2).choices[0].finish_reason == "length"


# --- Errors and limits ------------------------------------------------------------------------------------------------


def test_errors_have_openais_shape(tiny):
    client = tiny.client()
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4", messages=USER)
    assert error.value.body["code"] == "model_not_found" and "tiny" in error.value.body["message"]
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=USER, temperature=3)
    assert error.value.body["param"] == "temperature"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "long word " * 600}])
    assert error.value.body["code"] == "context_length_exceeded"
    assert re.search(r"512 tokens .* takes (\d{3,}|at least \d+) tokens", error.value.body["message"])
    with pytest.raises(openai.BadRequestError, match="chat template"):
        client.chat.completions.create(model="tiny", messages=[*USER, {"role": "system", "content": "late"}])
    for method, path, status in (("GET", "/", 404), ("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405),
                                 ("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("GET", "/v1/models/x", 404),
                                 ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404)):  # fmt: skip
        reply = tiny.request(method, path)
        assert reply.status_code == status and set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert tiny.post("/v1/chat/completions", {"messages": USER}).json()["error"]["param"] == "model"


def test_models(tiny):
    assert [m.id for m in tiny.client().models.list()] == ["tiny"]
    assert tiny.client().models.retrieve("tiny").id == "tiny"


def test_keys():
    with running_server(serve_script(SCRIPT), api_keys=("sesame", "other", "芝麻")) as running:
        headers = {"authorization": "Bearer 芝麻".encode()}
        assert running.get("/v1/models", headers=headers).status_code == 200
        for key in ("sesame", "other"):
            assert running.client(api_key=key).chat.completions.create(model="scripted", messages=USER).choices
        for value in (None, "Bearer sesam", "Bearer sesame2", "sesame", "Bearer", "Basic sesame", "Bearer \xff\xfe"):
            headers = {"authorization": value.encode("latin-1")} if value else {}
            for path in ("/v1/models", "/metrics"):
                assert running.get(path, headers=headers).status_code == 401
            reply = running.post("/v1/chat/completions", {"model": "scripted"}, headers=headers)
            assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
        assert running.get("/health").json()["status"] == "ok"
        with pytest.raises(openai.AuthenticationError):
            running.client().models.list()


def test_without_a_key_a_local_server_has_only_local_names():
    """DNS rebinding: a page of evil.example, whose name leads to 127.0.0.1, is of the same origin for the browser."""
    with running_server(serve_script(SCRIPT), local=True) as running:
        for host in ("evil.example", "evil.example:8998", "127.0.0.1.evil.example", "x", "[::1", "localhost.evil"):
            reply = running.get("/v1/models", headers={"host": host})
            assert reply.status_code == 403 and "API key" in reply.json()["error"]["message"], host
            body = {"model": "scripted", "messages": USER}
            assert running.post("/v1/chat/completions", body, headers={"host": host}).status_code == 403
        for host in ("localhost:1", "127.0.0.1", "[::1]:8998", "host.docker.internal:8998", "192.168.0.7", "LOCALHOST"):
            assert running.get("/v1/models", headers={"host": host}).status_code == 200, host
        assert running.client().models.list().data
    with running_server(serve_script(SCRIPT), local=True, api_keys=("sesame",)) as running:
        headers = {"host": "api.example", "authorization": "Bearer sesame"}
        assert running.get("/v1/models", headers=headers).status_code == 200


def test_cors_is_off_unless_asked_for(tiny):
    ask_first = {"origin": "http://ui.example", "access-control-request-method": "POST",
                 "access-control-request-headers": "content-type,authorization"}  # fmt: skip
    reply = tiny.request("OPTIONS", "/v1/chat/completions", headers=ask_first)
    assert "access-control-allow-origin" not in reply.headers
    with running_server(serve_script(SCRIPT), origins=("http://ui.example",)) as running:
        reply = running.request("OPTIONS", "/v1/chat/completions", headers=ask_first)
        assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == "http://ui.example"
        other = running.get("/v1/models", headers={"origin": "http://evil.example"})
        assert other.headers.get("access-control-allow-origin") is None


def test_a_full_queue_and_a_slow_answer():
    served = serve_script(SCRIPT, slots=1, pause=0.02)
    with running_server(served, max_queue=1, timeout=1.0) as running, concurrent.futures.ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(running.chat, "long", stream=i == 0) for i in range(2)]
        running.wait(lambda: running.open_jobs() == 2)
        refused = running.chat("greet")
        assert refused.status_code == 429 and refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        refused = running.chat("word " * 100_000)
        assert refused.status_code == 429  # though it is too long: its prompt was not looked at
        too_many = running.chat("greet", n=3)
        assert too_many.status_code == 400 and too_many.json()["error"]["param"] == "n"
        last = events(slow[0].result(HARD_LIMIT).text)[-1]  # had begun: the error is an event
        assert last["error"]["code"] == "timeout"
        reply = slow[1].result(HARD_LIMIT)
        assert reply.status_code == 504 and reply.json()["error"]["code"] == "timeout"
        running.wait(lambda: running.open_jobs() == 0)
        assert running.chat("greet").status_code == 200


def test_a_client_that_hangs_up_frees_its_slot():
    served = serve_script(SCRIPT, slots=1, pause=0.01)
    decoder = served.decoders["scripted"]
    with running_server(served) as running:
        for stream in (True, False):
            body = {"model": "scripted", "messages": [{"role": "user", "content": "long"}], "stream": stream}
            data = json.dumps(body).encode()
            connection = running.connect()
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                               b"content-length: %d\r\n\r\n%s" % (len(data), data))  # fmt: skip
            running.wait(lambda: decoder.running)
            if stream:
                assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            running.wait(lambda: len(decoder.running[0].tokens) > 3)
            request, steps = decoder.running[0], decoder.steps
            connection.close()
            running.wait(lambda: not decoder.busy)
            assert request.finish_reason == "cancelled" and len(request.tokens) < 700
            # the step under way, one more if it had begun by the time the news came, and a loaded machine's delay
            assert decoder.steps - steps < 30
            assert running.chat("greet").json()["choices"][0]["message"]["content"] == SCRIPT["greet"]
        figures = running.get("/metrics").text
        assert 'minimind_answers_total{model="scripted",finish_reason="cancelled"} 2' in figures


def test_figures_add_up():
    with running_server(serve_script(SCRIPT)) as running:
        tokens = [running.chat("greet").json()["usage"]["completion_tokens"] for _ in range(3)]
        list(ask(running, "ponder", stream=True))
        running.chat("x", temperature=9)
        figures = running.get("/metrics")
        assert figures.headers["content-type"].startswith("text/plain; version=0.0.4")
        values = dict(line.rsplit(" ", 1) for line in figures.text.splitlines() if not line.startswith("#"))
        assert values['minimind_requests_total{endpoint="/v1/chat/completions",status="200"}'] == "4"
        assert values['minimind_requests_total{endpoint="/v1/chat/completions",status="400"}'] == "1"
        assert float(values['minimind_generated_tokens_total{model="scripted"}']) > sum(tokens)
        assert values['minimind_answers_total{model="scripted",finish_reason="stop"}'] == "4"
        assert values["minimind_request_seconds_count"] == values["minimind_time_to_first_token_seconds_count"] == "4"
        assert values['minimind_request_seconds_bucket{le="+Inf"}'] == "4" and values["minimind_running"] == "0"


def test_a_failing_model_is_a_500_with_a_message(caplog):
    served = serve_script(SCRIPT)
    decoder = served.decoders["scripted"]
    step, broken = decoder.step, [True]

    def failing():
        if broken[0]:
            raise RuntimeError("no memory")
        return step()

    decoder.step = failing
    with running_server(served) as running:
        reply = running.chat("greet")
        assert reply.status_code == 500 and "no memory" in reply.json()["error"]["message"]
        with pytest.raises(openai.APIError, match="no memory"):
            list(ask(running, "greet", stream=True))
        broken[0] = False
        assert running.chat("greet").status_code == 200 and running.get("/health").status_code == 200


# --- The terminal client ----------------------------------------------------------------------------------------------


def api_chat(running, **options) -> tuple[ApiChat, io.StringIO, io.StringIO]:
    out, notes = io.StringIO(), io.StringIO()
    name = running.serving.served.base
    return ApiChat(running.client(), name, {"temperature": 0}, out=out, notes=notes, **options), out, notes


@pytest.mark.parametrize("stream", [True, False])
def test_the_client_shows_thoughts_apart_and_keeps_the_history(scripted, stream):
    chat, out, notes = api_chat(scripted, stream=stream, history_cnt=2, system="Be kind.")
    assert chat.handle("ponder") and chat.handle("greet")
    assert out.getvalue() == "<think>\nLet me see.\n</think>\n\nForty-two.\nHello 你好 🙂!\n"
    assert chat.history[1] == {"role": "assistant", "content": "Forty-two."}
    turns = chat.messages("next")
    assert [t["content"] for t in turns] == ["Be kind.", "greet", "Hello 你好 🙂!", "next"]
    assert re.search(r"\[\d+ tokens, [\d.]+ s\]", notes.getvalue())


def test_the_client_takes_commands_and_reports_errors(scripted):
    chat, _, notes = api_chat(scripted)
    for line in (
        "/help",
        "/model",
        "/think on",
        "/think maybe",
        "/system Be brief.",
        "/nonsense",
        "/model gpt-4",
        "hi",
    ):
        assert chat.handle(line)
    said = notes.getvalue()
    assert "there is scripted" in said and "expected one of on, off, auto" in said and "no command" in said
    assert "error: The model 'gpt-4' does not exist here" in said and chat.thinking is True
    assert chat.handle("/clear") and chat.history == [] and not chat.handle("/exit")


def test_the_client_survives_a_server_that_goes(tokenizer):
    with running_server(serve_script(SCRIPT)) as running:
        chat, out, notes = api_chat(running)
        chat.handle("greet")
    assert chat.handle("greet") and "error: " in notes.getvalue() and out.getvalue() == "Hello 你好 🙂!\n"


def test_an_answer_that_breaks_off_is_reported_on_a_line_of_its_own():
    served = serve_script({"count": "one two three four five six seven eight"})
    decoder = served.decoders["scripted"]
    step = decoder.step

    def failing():
        if decoder.steps == 4:
            raise RuntimeError("no \x1b[31mmemory")
        return step()

    decoder.step = failing
    with running_server(served) as running:
        chat, out, notes = api_chat(running)
        assert chat.handle("count")
        assert out.getvalue().startswith("one") and out.getvalue().endswith("\n") and chat.history == []
        assert "error: The model failed" in notes.getvalue() and "\x1b" not in notes.getvalue()


def test_many_requests_leave_nothing_behind(scripted):
    """A short soak: 120 requests of all kinds, a third of them given up."""
    decoder = scripted.serving.served.decoders["scripted"]

    def one(i: int) -> None:
        if i % 3 == 0:
            with ask(scripted, "long", stream=True) as stream:
                next(iter(stream))
        elif i % 3 == 1:
            assert ask(scripted, "greet").choices[0].message.content == SCRIPT["greet"]
        else:
            assert streamed(scripted, "ponder")[1] == "Forty-two."

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        start = time.monotonic()
        list(pool.map(one, range(120)))
        assert time.monotonic() - start < 4 * HARD_LIMIT
    scripted.wait(lambda: scripted.open_jobs() == 0)
    engine = scripted.serving.engine
    assert not engine.jobs and not engine.updates and not decoder.busy and scripted.serving.bytes_in_memory == 0


def test_the_defaults_are_the_servers(model):
    defaults = Defaults(temperature=0.0, top_p=1.0, max_new_tokens=5)
    with running_server(serve_tiny(model), defaults=defaults) as running:
        first, second = (ask(running, "Hello") for _ in range(2))
        assert first.choices[0].message.content == second.choices[0].message.content
        assert first.usage.completion_tokens <= 5
