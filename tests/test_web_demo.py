"""The web page as Streamlit runs it, without a browser: what a visitor does, and what stands on the page then."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("streamlit", reason="streamlit is not installed: pip install streamlit")

from streamlit.testing.v1 import AppTest

from model.model_lora import LoraConfig, add_lora, save_lora
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_tokenizer, save_weights
from scripts.web import chat_page, models, options
from scripts.web.backends import LocalBackend
from scripts.web.chat_state import Chat, ChatSettings, Message
from tests.test_web_parts import HOSTILE, RECORDS, tokens_of, wait_until, write_run

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "web_demo.py"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def out_dir(tmp_path) -> Path:
    torch.manual_seed(0)
    config = MiniMindConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    save_weights(MiniMindForCausalLM(config), tmp_path / "full_sft_32.pth", {"stage": "full_sft"})
    return tmp_path


@pytest.fixture
def open_page(monkeypatch):
    """Opens the page on a folder, as a browser with this address would."""
    monkeypatch.setattr(options, "OWN_SERVER", "http://127.0.0.1:9/v1")  # nobody answers there

    def open_(folder: Path, *flags: str, **address: str) -> AppTest:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out_dir", str(folder), "--device", "cpu", *flags])
        app = AppTest.from_file(str(SCRIPT), default_timeout=30)
        app.query_params.update({"lang": "en", **address})
        app.run()
        assert not app.exception
        return app

    return open_


@pytest.fixture
def says(monkeypatch, tokenizer):
    """Makes every model say these texts, one after the other; the samplings it was asked with come back."""

    def say(*texts: str, gate: threading.Event | None = None) -> list:
        asked, left = [], list(texts)

        def draw(self, ids, sampling):
            asked.append(sampling)
            tokens = tokenizer.encode(left.pop(0), add_special_tokens=False)
            for i, token in enumerate(tokens[: sampling.max_new_tokens]):
                if gate and i == 2:
                    gate.wait(10)
                yield token

        monkeypatch.setattr(LocalBackend, "draw", draw)
        return asked

    return say


def chat_of(app: AppTest) -> Chat:
    return chat_page.all_chats().get(app.session_state["chat"])[1]


def finished(app: AppTest) -> AppTest:
    chat_of(app).job.thread.join(30)
    app.run()
    assert not app.exception
    return app


def ask(app: AppTest, question: str) -> AppTest:
    app.chat_input[0].set_value(question).run()
    return finished(app)


# --- Chat -------------------------------------------------------------------------------------------------------------


def test_a_turn_with_a_model(open_page, out_dir, tokenizer):
    app = open_page(out_dir)
    assert app.selectbox(key="model").value == "full_sft_32.pth"
    assert "full_sft" in app.caption[0].value
    app.slider(key="temperature").set_value(1.0)
    app.number_input(key="seed").set_value(3)
    app.number_input(key="max_new_tokens").set_value(12).run()
    ask(app, "Hello <b>you</b>")
    message = chat_of(app).messages[-1]
    (choice,) = models.find_models(out_dir)
    alone = models.load(choice, None, "cpu", 2048)
    settings = ChatSettings(temperature=1.0, max_new_tokens=12, seed=3)
    *_, expected = alone.stream([Message("user", "Hello <b>you</b>")], settings, None)
    assert message.text and (message.text, message.tokens, message.finish) == (
        expected.text,
        expected.tokens,
        expected.finish,
    )
    assert [bubble.name for bubble in app.chat_message] == ["user", "assistant"]
    assert app.chat_message[0].text[0].value == "Hello <b>you</b>"
    assert f"{message.tokens} tokens" in app.chat_message[1].caption[0].value


def test_thinking_is_shown_apart(open_page, out_dir, says):
    says("<think>\nhm [x](y)\n</think>\n\n<answer>\nYes.\n</answer>")
    app = ask(open_page(out_dir), "Well?")
    (thought,) = [block for block in app.chat_message[1].expander if block.label == "Thought"]
    assert thought.text[0].value == "hm [x](y)" and not thought.markdown
    assert [e.value for e in app.chat_message[1].markdown] == ["Yes."]


def test_stop_keeps_what_was_said(open_page, out_dir, says):
    gate = threading.Event()
    says("one two three four five six", gate=gate)
    app = open_page(out_dir)
    app.chat_input[0].set_value("Count").run()
    wait_until(lambda: chat_of(app).messages[-1].tokens == 2)
    app.run()
    app.button(key="stop").click().run()
    gate.set()
    finished(app)
    message = chat_of(app).messages[-1]
    assert message.finish == "stopped" and 0 < len(message.text) < len("one two three four five six")
    assert "stopped" in app.chat_message[1].caption[0].value
    with pytest.raises(KeyError):
        app.button(key="stop")


def test_new_chat_regenerate_edit_delete(open_page, out_dir, says):
    says("first", "second", "third", "fourth", "fifth")
    app = ask(open_page(out_dir), "Q1")
    finished(app.button(key="regenerate").click().run())
    assert [m.text for m in chat_of(app).messages] == ["Q1", "second"]
    app.button(key="edit_0").click().run()
    app.text_area(key="editor_0").set_value("Q2").run()
    finished(app.button(key="save").click().run())
    assert [m.text for m in chat_of(app).messages] == ["Q2", "third"]
    ask(app, "Q3")
    app.button(key="delete_0").click().run()
    assert [m.text for m in chat_of(app).messages] == ["Q3", "fourth"] and len(app.chat_message) == 2
    app.button(key="edit_0").click().run()
    app.button(key="new_chat").click().run()
    assert not app.chat_message and chat_of(app).messages == []
    finished(app.button(key="suggestion_0").click().run())
    assert [m.text for m in chat_of(app).messages] == ["Who are you?", "fifth"]
    assert [area.key for area in app.text_area] == ["system"]  # the editor that was open is gone


def test_the_settings_reach_the_sampler_and_the_prompt(open_page, out_dir, says, monkeypatch):
    asked = says("yes")
    prompts = []
    prompt = LocalBackend.prompt
    monkeypatch.setattr(
        LocalBackend, "prompt", lambda self, turns, settings, tools: prompts.append((settings, tools))
        or prompt(self, turns, settings, tools)
    )  # fmt: skip
    app = open_page(out_dir)
    for name, value in (
        ("temperature", 0.3),
        ("top_p", 0.5),
        ("top_k", 7),
        ("min_p", 0.1),
        ("repetition_penalty", 1.2),
    ):
        app.slider(key=name).set_value(value)
    app.number_input(key="max_new_tokens").set_value(33)
    app.number_input(key="seed").set_value(5)
    app.slider(key="exchanges").set_value(1)
    app.text_area(key="system").set_value("Be brief.")
    app.toggle(key="tools").set_value(True)
    app.segmented_control(key="thinking").set_value("on").run()
    ask(app, "Hi")
    s = asked[0]
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty) == (0.3, 0.5, 7, 0.1, 1.2)
    assert (s.max_new_tokens, s.seed) == (33, 5)
    settings, tools = prompts[0]
    assert (settings.system, settings.thinking, settings.exchanges) == ("Be brief.", True, 1)
    assert [tool["function"]["name"] for tool in tools] == ["calculate", "current_time", "days_between"]


def test_hostile_text_of_a_model_stays_text(open_page, out_dir, says):
    text = "\n\n".join(HOSTILE)
    says(f"<think>{HOSTILE[0]}<script></think>{text}")
    app = ask(open_page(out_dir), "![me](https://evil.example) <script>")
    assert app.chat_message[1].markdown and app.chat_message[0].text[0].value == "![me](https://evil.example) <script>"
    for element in [*app.markdown, *app.caption]:
        kinds = {token.type for token in tokens_of(element.value)}
        assert not kinds & {"image", "link_open", "html_inline", "html_block"}, element.value
        assert element.allow_html is False
    for thought in app.chat_message[1].expander:
        assert not thought.markdown


def test_what_stands_beside_the_weights_stays_text(open_page, out_dir):
    about = json.loads((out_dir / "full_sft_32.json").read_text())
    (out_dir / "full_sft_32.json").write_text(json.dumps({**about, "stage": HOSTILE[0]}))
    app = open_page(out_dir)
    kinds = {token.type for token in tokens_of(app.caption[0].value)}
    assert "image" not in kinds and "evil" in app.caption[0].value


def test_code_is_shown_as_code(open_page, out_dir, says):
    says("So:\n```python\na[0] = '<b>'\n```")
    app = ask(open_page(out_dir), "Code?")
    (code,) = app.chat_message[1].code
    assert (code.value, code.language) == ("a[0] = '<b>'", "python")


def test_tool_calls_are_steps(open_page, out_dir, says):
    says('<tool_call>\n{"name": "calculate", "arguments": {"expression": "123 + 456"}}\n</tool_call>',
         '<tool_call>\n{"name": "__import__(\'os\')", "arguments": {}}\n</tool_call>', "It is 579.")  # fmt: skip
    app = open_page(out_dir)
    app.toggle(key="tools").set_value(True).run()
    ask(app, "123 + 456?")
    first, second = app.chat_message[1].expander
    assert first.label == "Tool: `calculate`" and second.label == "Tool: `?` (failed)"
    assert [code.value for code in first.code] == ['{"expression": "123 + 456"}', "579"]
    assert "there is no tool" in second.code[1].value
    assert [e.value for e in app.chat_message[1].markdown] == ["It is 579."]


def test_a_reload_finds_the_chat_again_and_others_do_not(open_page, out_dir, says):
    says("Hello!")
    app = ask(open_page(out_dir), "Hi")
    (name,) = app.query_params["chat"] if isinstance(app.query_params["chat"], list) else [app.query_params["chat"]]
    again = open_page(out_dir, chat=name)
    assert [m.text for m in chat_of(again).messages] == ["Hi", "Hello!"] and len(again.chat_message) == 2
    other = open_page(out_dir, chat="guess")
    assert not other.chat_message and other.session_state["chat"] != "guess"


def test_another_model_and_an_adapter_are_chosen(open_page, out_dir, says):
    torch.manual_seed(1)
    config = MiniMindConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = MiniMindForCausalLM(config)
    save_weights(model, out_dir / "pretrain_32.pth", {"stage": "pretrain"})
    add_lora(model, LoraConfig(rank=2))
    save_lora(model, out_dir / "lora" / "mine_32.pth", LoraConfig(rank=2))
    says("three", "four")
    app = open_page(out_dir)
    app.selectbox(key="model").set_value("full_sft_32.pth").run()
    app.text_area(key="system").set_value("Be brief.")
    app.toggle(key="tools").set_value(True).run()
    app.selectbox(key="model").set_value("pretrain_32.pth").run()
    assert not app.exception and "pretrain" in app.caption[0].value and not app.toggle
    ask(app, "One, two, ")
    assert app.chat_message[1].markdown[0].value == "One, two, three"
    app.selectbox(key="model").set_value("full_sft_32.pth").run()
    app.selectbox(key="adapter").set_value("mine_32").run()
    assert app.text_area(key="system").value == "Be brief." and app.toggle(key="tools").value is True  # still
    assert not app.exception and "mine_32" not in app.main.markdown and chat_of(app).adapter == "mine_32"


def test_nothing_to_talk_to_says_what_to_do(open_page, tmp_path):
    app = open_page(tmp_path)
    assert app.header[0].value == "There is no model to talk to yet" and str(tmp_path) in app.text[0].value
    assert "python scripts/quick_start.py" in [code.value for code in app.code] and not app.chat_input


def test_damaged_weights_and_wrong_flags_say_what_is_wrong(open_page, out_dir, monkeypatch):
    (out_dir / "full_sft_32.pth").write_bytes(b"PK\x03\x04 half")
    app = open_page(out_dir)
    assert app.error[0].value == "This model cannot be loaded." and "cut off" in app.text[0].value
    assert not app.chat_input
    app = open_page(out_dir, "--nonsense")
    assert "--nonsense" in app.text[0].value and "streamlit run" in app.text[0].value


def test_a_server_that_was_named_and_is_silent_is_told(open_page, out_dir):
    pytest.importorskip("openai", reason="the openai package is not installed")
    app = open_page(out_dir, "--api_url", "http://127.0.0.1:9/v1")
    assert app.warning[0].value == "http://127.0.0.1:9/v1 does not answer."


def test_an_error_while_answering_is_told(open_page, out_dir, monkeypatch):
    def fail(self, ids, sampling):
        raise RuntimeError("<b>no more memory</b>")
        yield

    monkeypatch.setattr(LocalBackend, "draw", fail)
    app = ask(open_page(out_dir), "Hi")
    assert app.error[0].value == "The answer could not be written."
    assert app.chat_message[1].text[0].value == "<b>no more memory</b>"


def test_chinese(open_page, out_dir):
    app = open_page(out_dir, lang="zh")
    assert app.selectbox(key="model").label == "模型"
    app.segmented_control(key="language").set_value("en").run()
    assert app.selectbox(key="model").label == "Model"


# --- Dashboard --------------------------------------------------------------------------------------------------------


def training_page(folder: str) -> None:
    from pathlib import Path

    from scripts.web import dashboard_page
    from scripts.web.options import Options

    dashboard_page.show(Options(Path(folder)), "en")


def open_training(folder: Path) -> AppTest:
    app = AppTest.from_function(training_page, default_timeout=30, kwargs={"folder": str(folder)}).run()
    assert not app.exception
    return app


def charts(app: AppTest) -> dict[str, tuple[dict, "object"]]:
    """Title → (specification, data) of the charts on the page."""
    import pyarrow as pa

    titles = [e.value.strip("*") for e in app.markdown if e.value.startswith("**")]
    found = app.get("vega_lite_chart")
    assert len(titles) == len(found)
    read = {}
    for title, chart in zip(titles, found, strict=True):
        proto = chart.proto
        data = proto.data.data or proto.datasets[0].data.data
        read[title] = (json.loads(proto.spec), pa.ipc.open_stream(data).read_pandas())
    return read


def test_curves_of_a_run(tmp_path):
    write_run(tmp_path / "runs" / "pretrain_32", RECORDS)
    app = open_training(tmp_path)
    drawn = charts(app)
    assert list(drawn)[:3] == ["Loss, nats per token", "Bits per byte, held out", "Accuracy"]
    _, data = drawn["Loss, nats per token"]
    assert data[["part", "x", "value"]].values.tolist() == [
        ["training", 10, 4.0], ["training", 20, 2.0], ["held_out", 10, 3.5], ["held_out", 20, 2.5],
    ]  # fmt: skip
    tiles = {metric.label: metric.value for metric in app.metric}
    assert tiles["Loss"] == "2.0000" and tiles["Held out"] == "2.5000" and tiles["Bits per byte"] == "1.5000"
    app.slider(key="smoothing").set_value(0.5).run()
    app.segmented_control(key="x_axis").set_value("tokens").run()
    _, data = charts(app)["Loss, nats per token"]
    smooth = data[data.part == "training"]
    assert smooth.x.tolist() == [100, 200] and smooth.value.tolist() == pytest.approx([4.0, 8 / 3])
    app.toggle(key="log_scale").set_value(True).run()
    spec, _ = charts(app)["Loss, nats per token"]
    assert {layer["encoding"]["y"]["scale"].get("type") for layer in spec["layer"]} == {"log"}


def test_runs_side_by_side(tmp_path):
    facts = {
        "progress": {"step": 20, "finished": True},
        "config": {"hidden_size": 32},
        "args": {"seed": 1, "epochs": 2},
    }
    write_run(tmp_path / "runs" / "a_32", RECORDS, facts)
    write_run(tmp_path / "runs" / "b_32", RECORDS[:2], {**facts, "args": {"seed": 7, "epochs": 2}})
    app = open_training(tmp_path)
    app.multiselect(key="runs").set_value(["a_32", "b_32"]).run()
    spec, data = charts(app)["Loss, nats per token"]
    assert data.groupby("run").size().to_dict() == {"a_32": 4, "b_32": 2}
    assert spec["layer"][0]["encoding"]["color"]["scale"]["domain"] == ["a_32", "b_32"]
    table, settings = (frame.value for frame in app.dataframe)
    assert table["Run"].tolist() == ["a_32", "b_32"] and table["State"].tolist() == ["finished", "finished"]
    assert table["Loss"].tolist() == [2.0, 4.0]
    assert settings.values.tolist() == [["seed", "1", "7"]]  # only what differs
    app.multiselect(key="runs").set_value([]).run()
    assert app.info[0].value == "Choose one or more runs above."


def test_a_run_that_is_being_written(tmp_path):
    folder = write_run(tmp_path / "runs" / "a_32", RECORDS[:1])
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 20, "loss": 2')
    app = open_training(tmp_path)
    assert charts(app)["Loss, nats per token"][1]["x"].tolist() == [10]
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(".5}\n")
    app.run()
    data = charts(app)["Loss, nats per token"][1]
    assert data["x"].tolist() == [10, 20] and data["value"].tolist() == [4.0, 2.5]
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    app.run()
    assert not app.exception and app.info[0].value == "Nothing is logged yet."


def test_no_runs_then_one(tmp_path):
    app = open_training(tmp_path)
    assert app.header[0].value == "There are no training runs yet"
    assert [code.value for code in app.code] == ["python trainer/train_pretrain.py"]
    write_run(tmp_path / "runs" / "a_32", RECORDS)
    app.run()
    assert not app.exception and "Accuracy" in charts(app)


def test_samples_are_plain_text(tmp_path):
    folder = write_run(tmp_path / "runs" / "grpo_32", RECORDS)
    samples = [
        {"step": step, "question": f"Q{step} <b>", "reply": f"<think>{HOSTILE[0]}</think><answer>{HOSTILE[4]}</answer>",
         "reward": 0.5, "truth": "7"}
        for step in (1, 2, 2)
    ]  # fmt: skip
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (folder / "samples.jsonl").write_text(lines + '{"step": 3, "ques', encoding="utf-8")
    app = open_training(tmp_path)
    (table,) = (frame.value for frame in app.dataframe)
    assert table["Question"].tolist() == ["Q2 <b>", "Q2 <b>"] and table["reward"].tolist() == [0.5, 0.5]
    texts = [element.value for element in app.text]
    assert "Q2 <b>" in texts and HOSTILE[0] in texts and HOSTILE[4] in texts
    assert not any("evil" in element.value for element in [*app.markdown, *app.caption])
    app.select_slider(key="samples_step_grpo_32").set_value(1).run()
    assert app.dataframe[0].value["Question"].tolist() == ["Q1 <b>"]


# --- How it is started ------------------------------------------------------------------------------------------------


def test_plain_python_says_how_to_start_it():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "streamlit run scripts/web_demo.py" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_server_is_for_this_machine_and_asks_nobody():
    try:
        import tomllib
    except ImportError:  # Python 3.10
        tomllib = pytest.importorskip("tomli")
    config = tomllib.loads((ROOT / "scripts" / ".streamlit" / "config.toml").read_text(encoding="utf-8"))
    assert config["server"]["address"] == "127.0.0.1" and config["browser"]["gatherUsageStats"] is False
