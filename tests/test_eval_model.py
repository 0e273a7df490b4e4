"""The terminal chat: streaming, history, commands."""

import io
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import eval_model
from eval_model import Chat, Settings
from model.generation import stream_generate
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import WeightsError, load_tokenizer
from scripts.chat_text import TextStream, chat_ids, decode, split_thinking
from scripts.terminal import Painter, line_reader

ROOT = Path(__file__).resolve().parents[1]
EOS = 2
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined %}<think>\n{% if not enable_thinking %}\n</think>\n\n{% endif %}"
    "{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A throw-away byte-level tokenizer: all bytes, the special tokens, a few merges that cut through characters."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(
        ["你是谁？我是一个语言模型。", "Who are you? I am a language model.", "user assistant"], trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


def tiny_model(tokenizer, seed: int = 0, **config) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    } | config
    model = MiniMindForCausalLM(MiniMindConfig(vocab_size=len(tokenizer), **sizes)).eval()
    with torch.no_grad():  # sharper than a fresh model: varied text, and a greedy choice that is no matter of rounding
        for weight in model.parameters():
            weight.mul_(20 if weight.ndim == 2 else 1)
    return model


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(tokenizer)


def scripted(tokenizer, *texts: str, interrupt_after: int | None = None):
    """A decoder that says the given texts one after another, and remembers what it was asked with."""
    calls: list[dict] = []

    def generate(model, input_ids, *, max_new_tokens, stop_ids, generator, **sampling):
        calls.append({"prompt": tokenizer.decode(input_ids[0]), "limit": max_new_tokens, **sampling})
        ids = tokenizer.encode(texts[min(len(calls), len(texts)) - 1], add_special_tokens=False)[:max_new_tokens]
        for count, token in enumerate(ids):
            if count == interrupt_after:
                raise KeyboardInterrupt
            yield token

    generate.calls = calls
    return generate


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def make_chat(model, tokenizer, generate, **options) -> tuple[Chat, io.StringIO, io.StringIO]:
    out, notes = io.StringIO(), io.StringIO()
    values = {name: options.pop(name) for name in list(options) if name in eval_model.SETTING_TYPES}
    config = Settings(**{"max_seq_len": 400, "max_new_tokens": 100} | values)
    return Chat(model, tokenizer, config, out=out, notes=notes, generate=generate, **options), out, notes


# --- Streaming text ---


def stream(tokenizer, ids) -> list[str]:
    text = TextStream(tokenizer)
    return [*(text.push(i) for i in ids), text.flush()]


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=30))
def test_stream_gives_back_any_unicode_without_broken_characters(tokenizer, text):
    pieces = stream(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text
    assert "\ufffd" in text or "\ufffd" not in "".join(pieces)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 329), max_size=25))
def test_stream_of_any_tokens_is_their_text(tokenizer, ids):
    assert "".join(stream(tokenizer, ids)) == decode(tokenizer, ids)


def test_shipped_tokenizer_streams_mixed_scripts():
    if not (ROOT / "model" / "tokenizer.json").is_file():
        pytest.skip("no shipped tokenizer")
    tokenizer = load_tokenizer()
    text = "龘 😀👨‍👩‍👧 naïve ру́сский العربية 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 <think>\n好</think> end"
    pieces = stream(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 10  # and piece by piece, not all at the end
    assert "".join(stream(tokenizer, [tokenizer.bos_token_id, tokenizer.eos_token_id])) == ""


def test_stream_keeps_blanks_of_tokenizers_that_drop_the_first():
    """Like sentencepiece: a lone `▁world` decodes to `world`, half a character to several U+FFFD."""
    vocab = {"▁Hello": 0, "▁world": 1, "<0xE4>": 2, "<0xBD>": 3, "<0xA0>": 4}
    fallback = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    fallback.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fallback)
    assert stream(tokenizer, [0, 1, 2, 3, 4, 1]) == ["Hello", " world", "", "", "你", " world", ""]


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("Paris", False, ("", "Paris")),
        ("<think>\nhm\n</think>\n\nParis\n", False, ("hm", "Paris")),
        ("hm\n</think>\nParis", True, ("hm", "Paris")),
        ("<think>never ends", False, ("never ends", "")),
        ("a <think> in the middle", False, ("", "a <think> in the middle")),
    ],
)
def test_split_thinking(text, opened, expected):
    assert split_thinking(text, opened) == expected


def test_thoughts_are_dimmed_with_colour_only():
    for colour, expected in (
        (True, "\033[2m<think>\033[0m\033[2mhm\033[0m\033[2m</think>\033[0mo\ufffdk"),
        (False, "<think>hm</think>o\ufffdk"),
    ):
        out = io.StringIO()
        painter = Painter(out, colour, thinking=False)
        for piece in ("<think>", "hm", "</think>", "o\x1bk"):
            painter.write(piece)
        assert out.getvalue() == expected


# --- The chat ---


def test_history_goes_into_the_prompt_without_thoughts(model, tokenizer):
    generate = scripted(tokenizer, "<think>\nhm\n</think>\n\nParis", "Rome")
    chat, out, _ = make_chat(model, tokenizer, generate, system="Be brief.")
    chat.handle("France?")
    chat.handle("Italy?")
    assert generate.calls[1]["prompt"] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nFrance?<|im_end|>\n"
        "<|im_start|>assistant\nParis<|im_end|>\n"
        "<|im_start|>user\nItaly?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert out.getvalue() == "<think>\nhm\n</think>\n\nParis\nRome\n"


@pytest.mark.parametrize(
    ("history_cnt", "kept"), [(0, []), (2, ["q3"]), (4, ["q2", "q3"]), (20, ["q0", "q1", "q2", "q3"])]
)
def test_history_cnt_keeps_the_newest_turns(model, tokenizer, history_cnt, kept):
    chat, _, _ = make_chat(model, tokenizer, scripted(tokenizer, "ok"), history_cnt=history_cnt)
    for i in range(4):
        chat.handle(f"q{i}")
    ids, dropped = chat.prompt_ids("now")
    assert [q for q in ("q0", "q1", "q2", "q3") if q in tokenizer.decode(ids)] == kept
    assert dropped == 0


@pytest.mark.parametrize("max_seq_len", range(60, 400, 20))
def test_old_exchanges_leave_whole_and_no_sooner_than_needed(model, tokenizer, max_seq_len):
    chat, _, notes = make_chat(
        model,
        tokenizer,
        scripted(tokenizer, "fine"),
        max_seq_len=max_seq_len,
        max_new_tokens=40,
        history_cnt=20,
        system="Sys.",
    )
    chat.history = turns(*(text for i in range(6) for text in (f"question {i} 你", f"answer {i} 好")))
    before = list(chat.history)
    ids, dropped = chat.prompt_ids("last one")
    room = max_seq_len - min(40, max_seq_len // 2)
    assert ids == chat_ids(tokenizer, chat.messages(before[2 * dropped :], "last one"), None)
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nSys.<|im_end|>")
    assert len(ids) <= room or dropped == 6
    if dropped:
        longer = chat_ids(tokenizer, chat.messages(before[2 * dropped - 2 :], "last one"), None)
        assert len(longer) > room
    assert chat.history == before  # left out of the prompt, not of the conversation
    if len(ids) < max_seq_len:
        chat.handle("last one")
        assert ("left out" in notes.getvalue()) == bool(dropped)


def test_question_that_cannot_fit_is_refused_and_the_chat_goes_on(model, tokenizer):
    generate = scripted(tokenizer, "ok")
    chat, _, notes = make_chat(model, tokenizer, generate, max_seq_len=64)
    assert chat.handle("long " * 100)
    assert "error: The prompt takes" in notes.getvalue() and not generate.calls and not chat.history
    assert chat.handle("short") and chat.history == turns("short", "ok")


def test_answer_never_exceeds_max_seq_len(model, tokenizer):
    chat, _, notes = make_chat(model, tokenizer, scripted(tokenizer, "word " * 200), max_seq_len=60, max_new_tokens=50)
    chat.handle("question")
    ids, _ = chat.prompt_ids("question")
    assert f"[{60 - len(chat_ids(tokenizer, chat.messages([], 'question'), None))} tokens" in notes.getvalue()
    assert "cut at max_seq_len 60" in notes.getvalue()
    assert len(ids) < 60
    chat, _, notes = make_chat(model, tokenizer, scripted(tokenizer, "word " * 200), max_new_tokens=5)
    chat.handle("question")
    assert "[5 tokens, " in notes.getvalue() and "cut at max_new_tokens 5" in notes.getvalue()


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(model, tokenizer):
    chat, out, notes = make_chat(model, tokenizer, scripted(tokenizer, "abcdef", interrupt_after=3))
    assert chat.handle("go")
    assert "stopped" in notes.getvalue() and "[3 tokens" in notes.getvalue()
    assert chat.history[1]["content"] == out.getvalue().strip() != "abcdef"


def test_pretrained_model_continues_text(model, tokenizer):
    generate = scripted(tokenizer, " a model")
    chat, out, notes = make_chat(model, tokenizer, generate, continues_text=True)
    chat.handle("I am")
    chat.handle("You are")
    assert [call["prompt"] for call in generate.calls] == ["<|im_start|>I am", "<|im_start|>You are"]
    assert out.getvalue() == "I am a model\nYou are a model\n"
    chat.handle("/system no")
    assert "no system turn" in notes.getvalue() and not chat.system


def test_thinking_flag_reaches_the_template_and_the_thought_is_kept_apart(model, tokenizer):
    generate = scripted(tokenizer, "hm</think>yes")
    chat, out, _ = make_chat(model, tokenizer, generate, enable_thinking=True, colour=True)
    chat.handle("q")
    assert generate.calls[0]["prompt"].endswith("<think>\n")
    assert out.getvalue().startswith("\033[2m") and out.getvalue().endswith("</think>\033[0myes\n")
    assert chat.history == turns("q", "yes")
    chat.handle("/set enable_thinking off")
    chat.handle("q")
    assert generate.calls[1]["prompt"].endswith("</think>\n\n")


def test_commands(model, tokenizer):
    generate = scripted(tokenizer, "one", "two", "three")
    chat, _, notes = make_chat(model, tokenizer, generate)

    def said(line: str) -> str:
        notes.seek(0)
        notes.truncate()
        assert chat.handle(line)
        return notes.getvalue()

    assert all(name in said("/help") for name in ("/clear", "/exit", "/set", "/system"))
    said("first")
    assert "temperature = 0.3" in said("/set temperature 0.3") and chat.settings.temperature == 0.3
    assert "top_k = 7" in said("/set top_k=7")
    said("second")
    assert generate.calls[1]["temperature"] == 0.3 and generate.calls[1]["top_k"] == 7
    assert said("/set").count(" = ") == len(eval_model.SETTING_TYPES)
    before = chat.settings
    wrong = ["temperature hot", "temperature nan", "temperature", "warmth 1", "top_p 2", "history_cnt 3"]
    for setting in [*wrong, "max_seq_len 9999", "enable_thinking perhaps"]:
        assert "error: " in said(f"/set {setting}") and chat.settings == before, setting

    assert "no command" in said("/what") and len(generate.calls) == 2
    assert said(" /what is this?").startswith("[")  # a blank in front: text
    assert chat.history == turns("first", "one", "second", "two", "/what is this?", "three")
    said("/system Be kind.")
    assert chat.messages([], "q")[0] == {"role": "system", "content": "Be kind."}
    said("/clear")
    assert not chat.history and said("   ") == ""
    assert chat.handle("/exit") is False


def test_a_model_that_fails_is_reported_and_the_chat_goes_on(model, tokenizer):
    def generate(*_, **__):
        raise WeightsError("not a number")
        yield

    chat, _, notes = make_chat(model, tokenizer, generate)
    assert chat.handle("q") and notes.getvalue() == "error: not a number\n" and not chat.history


def test_set_seed_repeats_an_answer(model, tokenizer):
    chat, out, _ = make_chat(
        model, tokenizer, stream_generate, temperature=1.5, top_p=1.0, history_cnt=0, max_new_tokens=30
    )
    for line in ("/set seed 3", "q", "q", "/set seed 3", "q"):
        chat.handle(line)
    answers = [turn["content"] for turn in chat.history[1::2]]
    assert answers[0] == answers[2] != answers[1]


def test_line_editor_has_history_and_ends_with_ctrl_d(monkeypatch, tmp_path):
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(sys, name, types.SimpleNamespace(isatty=lambda: True))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        read = line_reader(["/help"])
        keys.send_text("你好 world\r")
        assert read() == "你好 world"
        keys.send_text("\x1b[A again\r")  # arrow up brings the last line back
        assert read() == "你好 world again"
        keys.send_text("/he\t\r")
        assert read().strip() == "/help"
        keys.send_text("\x03")
        with pytest.raises(KeyboardInterrupt):
            read()
        keys.send_text("\x04")
        with pytest.raises(EOFError):
            read()
    assert "你好 world" in (tmp_path / ".minimind_history").read_text(encoding="utf-8")


def test_ctrl_c_at_the_prompt_does_not_leave(model, tokenizer):
    chat, _, notes = make_chat(model, tokenizer, scripted(tokenizer, "ok"))
    inputs = iter([KeyboardInterrupt, "hello", EOFError])

    def read():
        item = next(inputs)
        if isinstance(item, str):
            return item
        raise item

    eval_model.run_manual(chat, read)
    assert "Ctrl-D" in notes.getvalue() and chat.history == turns("hello", "ok")
