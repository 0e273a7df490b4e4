"""The chat of the web page without Streamlit: prompts, answers of local weights and of a server, the conversation."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from test_web_parts import tiny_model, wait_until

from model.generation import Sampling, stream_generate
from model.weights import WeightsError, load_tokenizer
from scripts.chat_text import chat_ids
from scripts.web import chat_state
from scripts.web.backends import ApiBackend, LocalBackend, openai_turns, served_models
from scripts.web.chat_state import Chat, Chats, ChatSettings, Message, fitted, newest_exchanges
from scripts.web.tools import ToolCall, signatures, split_calls
from trainer.command_line import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def backend(tokenizer):
    return LocalBackend(tiny_model(), tokenizer, "full_sft", 256)


# --- What the model is shown ------------------------------------------------------------------------------------------


def talk(*texts: str) -> list[Message]:
    return [Message("user" if i % 2 == 0 else "assistant", said, finish="stop") for i, said in enumerate(texts)]


def test_newest_exchanges_never_cut_one():
    turns = [*talk("a", "b", "c"), Message("assistant", "", calls=[ToolCall("t", "{}")]), Message("tool", "1")]
    assert [turn.text for turn in newest_exchanges(turns, 0)] == ["c", "", "1"]
    assert [turn.text for turn in newest_exchanges(turns, 1)] == ["a", "b", "c", "", "1"]
    assert [turn.text for turn in newest_exchanges(turns, 9)] == ["a", "b", "c", "", "1"]


def test_old_exchanges_go_where_they_do_not_fit():
    encode = lambda messages: list(range(sum(len(m["content"]) for m in messages)))  # noqa: E731
    turns = talk("a" * 20, "b" * 20, "c" * 20, "d" * 20, "e" * 10)
    settings = ChatSettings(system="s" * 10, max_new_tokens=30, exchanges=5)
    assert [len(ids) for ids in (fitted(turns, settings, encode, 200)[0],)] == [100]
    ids, forgotten = fitted(turns, settings, encode, 100)  # 70 are left for the prompt: one exchange goes
    assert (len(ids), forgotten) == (60, 1)
    with pytest.raises(ValueError, match="20 tokens, and 20 fit"):
        fitted(turns, settings, encode, 20)


def test_the_prompt_is_that_of_the_chat_template(backend, tokenizer):
    settings = ChatSettings(system="Be brief.", thinking=False, tools=True)
    call = ToolCall("calculate", '{"expression": "1 + 2"}', "3")
    turns = [Message("user", "1 + 2?"), Message("assistant", "", calls=[call]), Message("tool", "3")]
    ids, forgotten = LocalBackend(backend.model, tokenizer, "full_sft", 2048).prompt(turns, settings, signatures())
    expected = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 2?"},
         {"role": "assistant", "content": "", "tool_calls": [{"name": "calculate",
                                                              "arguments": {"expression": "1 + 2"}}]},
         {"role": "tool", "content": "3"}],
        tools=signatures(), add_generation_prompt=True, enable_thinking=False, return_dict=False,
    )  # fmt: skip
    assert (ids, forgotten) == (expected, 0)


# --- Answers of local weights -----------------------------------------------------------------------------------------


def answer(backend, question: str, settings: ChatSettings) -> Message:
    return list(backend.stream([Message("user", question)], settings, None))[-1]


def test_an_answer_is_that_of_the_decoder_alone_and_in_company(backend, tokenizer):
    settings = ChatSettings(max_new_tokens=24, temperature=0)
    questions = ["Hello", "你好", "What is 2 + 2?", "x", "春天", "long " * 20]
    expected = []
    for question in questions:
        ids = torch.tensor([chat_ids(tokenizer, [{"role": "user", "content": question}], None)])
        drawn = stream_generate(
            backend.model, ids, temperature=0.0, max_new_tokens=24, stop_ids=frozenset(backend.stop_ids)
        )
        expected.append(len(list(drawn)))
    alone = [answer(backend, question, settings) for question in questions]
    assert [message.tokens for message in alone] == expected
    together: dict[str, Message] = {}
    threads = [
        threading.Thread(target=lambda q=q: together.update({q: answer(backend, q, settings)}), daemon=True)
        for q in questions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [together[q].text for q in questions] == [message.text for message in alone]
    assert not backend.decoder.busy


def test_steps_of_others_lose_no_token(backend, tokenizer):
    """A visitor who is slow to take his tokens, while another's steps write on for both."""
    ids = chat_ids(tokenizer, [{"role": "user", "content": "Hello"}], None)
    sampling = Sampling(temperature=0, max_new_tokens=24, stop_ids=backend.stop_ids)
    alone = list(backend.draw(ids, sampling))
    slow = backend.draw(ids, sampling)
    taken = [next(slow)]
    assert list(backend.draw(ids, sampling)) == alone
    assert taken + list(slow) == alone and not backend.decoder.busy


def test_the_settings_reach_the_sampler(backend, monkeypatch):
    seen = []
    add = backend.decoder.add
    monkeypatch.setattr(backend.decoder, "add", lambda ids, sampling: seen.append(sampling) or add(ids, sampling))
    settings = ChatSettings(
        temperature=0.3, top_p=0.5, top_k=7, min_p=0.1, repetition_penalty=1.2, max_new_tokens=3, seed=5
    )
    first, again = answer(backend, "Hi", settings), answer(backend, "Hi", settings)
    sampling = seen[0]
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.3, 0.5, 7, 0.1)
    assert (sampling.repetition_penalty, sampling.max_new_tokens, sampling.seed) == (1.2, 3, 5)
    assert first.text == again.text and first.finish == "length" and first.tokens == 3
    answer(backend, "Hi", ChatSettings(max_new_tokens=1))
    answer(backend, "Hi", ChatSettings(max_new_tokens=1))
    assert seen[2].seed != seen[3].seed


def test_closing_an_answer_frees_its_place(backend):
    stream = backend.stream([Message("user", "Hi")], ChatSettings(max_new_tokens=200), None)
    next(stream)
    assert backend.decoder.busy
    stream.close()
    assert not backend.decoder.busy


def test_a_question_that_is_too_long_says_so(backend):
    with pytest.raises(UserError, match="tokens, and 256 fit"):
        answer(backend, "word " * 500, ChatSettings())


def test_a_pretrained_model_continues_the_text(tokenizer):
    backend = LocalBackend(tiny_model(), tokenizer, "pretrain", 64)
    assert backend.continues_text
    ids, _ = backend.prompt([*talk("a", "b"), Message("user", "Once")], ChatSettings(system="x"), None)
    assert ids == [tokenizer.bos_token_id, *tokenizer.encode("Once", add_special_tokens=False)]
    with pytest.raises(UserError, match="64 fit"):
        backend.prompt([Message("user", "word " * 99)], ChatSettings(), None)


def test_weights_that_are_not_numbers_end_in_an_error(tokenizer):
    model = tiny_model()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(WeightsError, match="not a number"):
        answer(LocalBackend(model, tokenizer, "full_sft", 64), "Hi", ChatSettings())


# --- The conversation -------------------------------------------------------------------------------------------------


class Script:
    """A backend that says what it was told to, and waits where a gate is given."""

    continues_text = False

    def __init__(self, *answers: str, gate: threading.Event | None = None):
        self.answers, self.gate, self.asked, self.closed = list(answers), gate, [], 0

    def stream(self, turns, settings, tools):
        self.asked.append((list(turns), settings, tools))
        said = self.answers.pop(0)
        try:
            if said == "FAIL":
                raise RuntimeError("no more memory")
            for end in range(1, len(said) + 1):
                text, calls = split_calls(said[:end])
                yield Message("assistant", text, calls=calls, tokens=end)
                if self.gate and end == 3:
                    self.gate.wait(10)
            text, calls = split_calls(said)
            yield Message("assistant", text, calls=calls, tokens=len(said), finish="stop")
        finally:
            self.closed += 1


def finish(chat: Chat) -> Chat:
    chat.job.thread.join(20)
    assert not chat.job.thread.is_alive()
    return chat


def said(chat: Chat) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in chat.messages]


def test_a_question_is_answered_and_remembered():
    chat, backend = Chat(), Script("one", "two")
    chat.send("a", backend)
    finish(chat).send("b", backend)
    assert said(finish(chat)) == [("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two")]
    assert [turn.text for turn in backend.asked[1][0]] == ["a", "one", "b"]
    assert not chat.busy and chat.messages[-1].finish == "stop"


def test_an_answer_remembers_whether_it_continues_its_question():
    """So an old one is shown as it was, whatever model is chosen by then."""
    chat, pretrained = Chat(), Script(" upon a time", "FAIL")
    pretrained.continues_text = True
    chat.send("Once", pretrained)
    finish(chat).send("Hi", Script("Hello"))
    finish(chat).send("Once", pretrained)
    answers = [turn for turn in finish(chat).messages if turn.role == "assistant"]
    assert [turn.continues for turn in answers] == [True, False, True]


def test_regenerate_edit_delete_clear():
    chat, backend = Chat(), Script("one", "two", "three", "four")
    chat.send("a", backend)
    finish(chat).regenerate(backend)
    assert said(finish(chat)) == [("user", "a"), ("assistant", "two")]
    chat.send("b", backend)
    finish(chat).edit(0, "c", backend)
    assert said(finish(chat)) == [("user", "c"), ("assistant", "four")]
    chat.messages += talk("d", "e")
    chat.delete(0)
    assert said(chat) == [("user", "d"), ("assistant", "e")]
    chat.clear()
    assert chat.messages == [] and not chat.busy


def test_stop_keeps_what_was_said_and_nothing_changes_after():
    gate = threading.Event()
    chat, backend = Chat(), Script("abcdef", gate=gate)
    chat.send("a", backend)
    wait_until(lambda: said(chat)[-1] == ("assistant", "abc"))
    assert chat.busy
    chat.stop()
    assert not chat.busy
    gate.set()
    finish(chat)
    assert said(chat)[-1] == ("assistant", "abc") and chat.messages[-1].finish == "stopped" and backend.closed == 1


def test_a_new_question_ends_the_answer_before():
    gate = threading.Event()
    chat, backend = Chat(), Script("abcdef", "two", gate=gate)
    chat.send("a", backend)
    wait_until(lambda: said(chat)[-1] == ("assistant", "abc"))
    old = chat.job
    backend.gate = None
    chat.send("b", backend)
    gate.set()
    old.thread.join(20)
    assert said(finish(chat)) == [("user", "a"), ("assistant", "abc"), ("user", "b"), ("assistant", "two")]


def test_an_answer_that_nobody_watches_ends(monkeypatch):
    monkeypatch.setattr(chat_state, "UNWATCHED_SECONDS", -1.0)
    chat = Chat()
    chat.send("a", Script("abcdef"))
    assert finish(chat).messages[-1].finish == "stopped" and said(chat)[-1][1] == "a"


def test_an_error_is_told_and_the_next_question_works(capsys):
    chat, backend = Chat(), Script("FAIL", "fine")
    chat.send("a", backend)
    assert (finish(chat).messages[-1].finish, chat.messages[-1].error) == ("error", "no more memory")
    assert "RuntimeError" in capsys.readouterr().err
    chat.send("b", backend)
    assert said(finish(chat))[-1] == ("assistant", "fine")


CALL = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "123 + 456"}}\n</tool_call>'


def test_tools_are_called_and_the_model_goes_on():
    chat, backend = Chat(), Script(CALL, "It is 579.")
    chat.settings = ChatSettings(tools=True)
    chat.send("123 + 456?", backend)
    assert [role for role, _ in said(finish(chat))] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[1].calls[0].result == "579" == chat.messages[2].text
    assert backend.asked[1][2] == signatures() and [turn.role for turn in backend.asked[1][0]][-1] == "tool"


def test_tools_end_after_some_rounds_and_do_nothing_when_off():
    chat, backend = Chat(), Script(*[CALL] * 20)
    chat.settings = ChatSettings(tools=True)
    chat.send("a", backend)
    finish(chat)
    assert len(backend.asked) == chat_state.MOST_ROUNDS
    chat, backend = Chat(), Script(CALL)
    chat.send("a", backend)
    finish(chat)
    assert [role for role, _ in said(chat)] == ["user", "assistant"] and backend.asked[0][2] is None


def test_chats_are_found_by_an_unguessable_name_only():
    chats = Chats(most=2)
    name, chat = chats.get(None)
    assert len(name) >= 20 and chats.get(name) == (name, chat)
    other, another = chats.get("../../etc/passwd")
    assert other != "../../etc/passwd" and another is not chat
    chats.get(name)
    chats.get(None)  # the one used longest ago goes
    assert chats.get(name)[1] is chat and chats.get(other)[0] != other


def test_export_to_read_and_to_train_on(tmp_path, tokenizer):
    from dataset.record_formats import parse_sft

    chat = Chat()
    chat.settings = ChatSettings(system="Be brief.", tools=True)
    call = ToolCall("calculate", '{"expression": "1 + 2"}', "3")
    chat.messages = [Message("user", "1 + 2?"), Message("assistant", "", "Let me see.", [call]), Message("tool", "3"),
                     Message("assistant", "<answer>\n3\n</answer>")]  # fmt: skip
    messages, tools = parse_sft(json.loads(chat_state.as_record(chat)))
    assert [m["role"] for m in messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ] and tools == signatures()
    assert messages[2]["reasoning_content"] == "Let me see."
    assert messages[2]["tool_calls"][0]["arguments"] in ({"expression": "1 + 2"}, '{"expression": "1 + 2"}')
    readable = chat_state.as_markdown(chat, "m.pth")
    assert all(part in readable for part in ("# m.pth", "1 + 2?", "> Let me see.", "calculate(", "\n3\n", "Be brief."))
    assert "<answer>" not in readable


# --- A server ---------------------------------------------------------------------------------------------------------


class FakeServer(BaseHTTPRequestHandler):
    """An OpenAI API that streams a thought, a call and words; it keeps the bodies it was sent."""

    bodies: list[dict] = []
    status = 200

    def log_message(self, *args):
        pass

    def reply(self, kind: str, body: bytes) -> None:
        self.send_response(self.status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply(
            "application/json", json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}).encode()
        )

    def do_POST(self):
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self.status != 200:
            return self.reply("application/json", b'{"error": {"message": "the queue is full"}}')
        deltas = [
            {"reasoning_content": "Hm"}, {"content": "It "},
            {"tool_calls": [{"index": 0, "id": "c", "type": "function",
                             "function": {"name": "calculate", "arguments": '{"expr'}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": 'ession": "1"}'}}]}, {"content": "is 1."},
        ]  # fmt: skip
        choices = [[{"index": 0, "delta": delta, "finish_reason": None}] for delta in deltas]
        choices.append([{"index": 0, "delta": {}, "finish_reason": "stop"}])
        about = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        chunks = [{**about, "choices": choice} for choice in choices]
        usage = {"prompt_tokens": 5, "completion_tokens": 42, "total_tokens": 47}
        chunks.append({**about, "choices": [], "usage": usage})
        self.reply(
            "text/event-stream", "".join(f"data: {json.dumps(c)}\n\n" for c in chunks).encode() + b"data: [DONE]\n\n"
        )


@pytest.fixture
def server():
    pytest.importorskip("openai", reason="the openai package is not installed")
    handler = type("Handler", (FakeServer,), {"bodies": []})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1", handler
    httpd.shutdown()
    httpd.server_close()
    thread.join(10)


def test_an_answer_of_a_server(server):
    url, handler = server
    assert served_models(url, None) == ["m"]
    settings = ChatSettings(system="S", temperature=0.5, max_new_tokens=9, top_k=4, thinking=True, seed=3, exchanges=0)
    turns = [*talk("old", "older"), Message("user", "1?")]
    last = list(ApiBackend(url, "m").stream(turns, settings, signatures()))[-1]
    assert (last.thought, last.text, last.finish, last.tokens) == ("Hm", "It is 1.", "stop", 42)
    assert [(call.name, call.arguments) for call in last.calls] == [("calculate", '{"expression": "1"}')]
    body = handler.bodies[0]
    assert [(m["role"], m["content"]) for m in body["messages"]] == [("system", "S"), ("user", "1?")]
    assert (body["temperature"], body["max_tokens"], body["seed"], body["top_k"]) == (0.5, 9, 3, 4)
    assert body["chat_template_kwargs"] == {"enable_thinking": True} and body["tools"] == signatures()
    assert "min_p" not in body and "repetition_penalty" not in body


def test_a_server_that_refuses_or_is_silent(server):
    url, handler = server
    handler.status = 429
    with pytest.raises(UserError, match="says: the queue is full$"):
        answer(ApiBackend(url, "m"), "Hi", ChatSettings())
    with pytest.raises(UserError, match="does not answer"):
        served_models("http://127.0.0.1:9/v1", None)


def test_a_server_without_the_openai_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)  # importing it fails
    with pytest.raises(UserError, match="pip install openai"):
        served_models("http://127.0.0.1:9/v1", None)


def test_results_of_tools_name_their_calls():
    turns = chat_state.template_turns(
        [Message("user", "q"), Message("assistant", "", calls=[ToolCall("a", "{}"), ToolCall("b", "{}")]),
         Message("tool", "1"), Message("tool", "2")], "")  # fmt: skip
    made = openai_turns(turns)
    ids = [call["id"] for call in made[1]["tool_calls"]]
    assert [made[2]["tool_call_id"], made[3]["tool_call_id"]] == ids and len(set(ids)) == 2
    assert made[1]["tool_calls"][0]["function"] == {"name": "a", "arguments": "{}"}
