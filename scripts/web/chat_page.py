"""The chat page: choosing a model, its settings, the conversation.

Reading order: the page → choosing a model → settings → the conversation → one exchange.

中文：对话页面：选择模型、设置、对话与单轮显示。
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import streamlit as st

from model.weights import WeightsError
from scripts.web.backends import ApiBackend, LocalBackend, served_models
from scripts.web.chat_state import Chat, Chats, ChatSettings, Message, as_markdown, as_record
from scripts.web.copy_button import copy_button
from scripts.web.models import Choice, find_adapters, find_models, load
from scripts.web.options import Options
from scripts.web.safe_text import parts, safe_markdown, visible
from trainer.command_line import UserError

Say = Callable[..., str]
REFRESH_SECONDS = 0.2  # while an answer is written
SUGGESTIONS = ("Who are you?", "你是谁？", "What is 23 + 45?", "把3、12、7按从小到大的顺序排好。")
BEGINNINGS = ("The capital of France is", "中国的首都是", "Once upon a time", "很久很久以前，")


def show(options: Options, say: Say) -> None:
    """The whole page."""
    chat = this_chat()
    with st.sidebar:
        chosen = choose_model(options, chat, say)
    if chosen is None:
        show_no_models(options, say)
        return
    backend = open_model(chosen, options, say)
    if backend is None:
        return
    with st.sidebar:
        chat.settings = choose_settings(chat.settings, backend, say)
    show_header(chosen, backend, chat, say)
    placeholder = "placeholder_text" if backend.continues_text else "placeholder"
    if question := st.chat_input(say(placeholder), key="question"):
        if question.strip():
            chat.send(question, backend)
            st.session_state.pop("editing", None)
    show_conversation(chat, backend, say)


@st.cache_resource
def all_chats() -> Chats:
    return Chats()


def this_chat() -> Chat:
    """The visitor's conversation, found again after a reload by the name in the page's address."""
    name, chat = all_chats().get(st.session_state.get("chat") or st.query_params.get("chat"))
    st.session_state["chat"] = name
    if st.query_params.get("chat") != name:
        st.query_params["chat"] = name
    return chat


# --- Choosing a model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """Local weights, with or without an adapter, or a model of a server."""

    label: str
    choice: Choice | None = None
    adapter: Choice | None = None
    url: str = ""


@st.cache_resource(max_entries=3, show_spinner=False)
def loaded(choice: Choice, adapter: Choice | None, device: str | None, max_seq_len: int) -> LocalBackend:
    return load(choice, adapter, device, max_seq_len)


@st.cache_data(ttl=20, show_spinner=False)
def models_of(url: str, _key: str | None) -> tuple[list[str], str]:
    """(names, what went wrong)."""
    try:
        return served_models(url, _key), ""
    except UserError as error:
        return [], str(error)


def choose_model(options: Options, chat: Chat, say: Say) -> Chosen | None:
    """None when there is nothing to choose."""
    found = {choice.name: Chosen(choice.name, choice) for choice in find_models(options.out_dir, options.models)}
    for url in options.servers:
        names, problem = models_of(url, options.key)
        for name in names:
            label = say("server_model", name=name)
            label = f"{label} {url}" if label in found else label
            found[label] = Chosen(name, url=url)
        if problem and options.servers_named:
            st.warning(say("server_silent", url=url))
            st.text(visible(problem))
    if not found:
        return None
    labels = list(found)
    index = labels.index(chat.model) if chat.model in labels else 0
    label = st.selectbox(
        say("model"), labels, index=index, key="model", help=say("model_help", folder=f"`{options.out_dir}`")
    )
    chosen = found.get(label) or found[labels[0]]
    chat.model = label
    if chosen.choice is None:
        return chosen
    adapters = {adapter.name: adapter for adapter in find_adapters(options.out_dir, chosen.choice)}
    if adapters:
        names = ["", *adapters]
        index = names.index(chat.adapter) if chat.adapter in names else 0
        chat.adapter = st.selectbox(
            say("adapter"), names, index=index, key="adapter", format_func=lambda name: name or say("none")
        )
    return Chosen(label, chosen.choice, adapters.get(chat.adapter))


def open_model(chosen: Chosen, options: Options, say: Say) -> LocalBackend | ApiBackend | None:
    """Loads the model; says what is wrong and returns None when it cannot be."""
    try:
        if chosen.choice is None:
            return ApiBackend(chosen.url, chosen.label, options.key)
        with st.spinner(say("loading")):
            return loaded(chosen.choice, chosen.adapter, options.device, options.max_seq_len)
    except (UserError, WeightsError, OSError) as error:
        st.error(say("load_failed"), icon=":material/error:")
        st.text(visible(str(error)))
        return None


def show_no_models(options: Options, say: Say) -> None:
    """What to do when there is nothing to talk to."""
    st.header(say("no_models_title"))
    st.text(say("no_models", folder=options.out_dir))
    st.code("python scripts/quick_start.py", language="bash")
    st.text(say("no_models_folder"))
    st.code("streamlit run scripts/web_demo.py -- --out_dir FOLDER", language="bash")
    st.text(say("no_models_server"))
    st.code("streamlit run scripts/web_demo.py -- --api_url http://127.0.0.1:8998/v1", language="bash")


# --- Settings ---------------------------------------------------------------------------------------------------------


def choose_settings(now: ChatSettings, backend: LocalBackend | ApiBackend, say: Say) -> ChatSettings:
    """The controls of the sidebar, beginning with the settings as they are; those without a control stay."""
    values: dict[str, object] = {}
    if not backend.continues_text:
        thinking = {"auto": None, "on": True, "off": False}
        picked = st.segmented_control(
            say("thinking"), list(thinking), key="thinking", help=say("thinking_help"), required=True,
            default=next(name for name, value in thinking.items() if value is now.thinking),
            format_func=lambda name: say(f"thinking_{name}"),
        )  # fmt: skip
        values["thinking"] = thinking[picked or "auto"]
        values["tools"] = st.toggle(say("tools"), now.tools, key="tools", help=say("tools_help"))
        values["system"] = st.text_area(
            say("system"), now.system, key="system", height=90, max_chars=20_000,
            placeholder=say("system_placeholder"),
        )  # fmt: skip
    with st.expander(say("sampling"), icon=":material/tune:"):
        for name, low, high, step in (
            ("temperature", 0.0, 2.0, 0.05), ("top_p", 0.05, 1.0, 0.05), ("top_k", 0, 200, 1),
            ("min_p", 0.0, 0.5, 0.01), ("repetition_penalty", 1.0, 2.0, 0.05),
        ):  # fmt: skip
            values[name] = st.slider(say(name), low, high, getattr(now, name), step, key=name, help=say(f"{name}_help"))
        most = backend.max_seq_len // 2 if isinstance(backend, LocalBackend) else 4096
        values["max_new_tokens"] = st.number_input(
            say("max_new_tokens"), 1, most, min(now.max_new_tokens, most), 32, key="max_new_tokens"
        )
        if not backend.continues_text:
            values["exchanges"] = st.slider(
                say("exchanges"), 0, 20, now.exchanges, key="exchanges", help=say("exchanges_help")
            )
        values["seed"] = st.number_input(
            say("seed"), 0, 2**31 - 1, now.seed, 1, key="seed", help=say("seed_help"), placeholder=say("none")
        )
    return replace(now, **values)


# --- The conversation -------------------------------------------------------------------------------------------------


def show_header(chosen: Chosen, backend: LocalBackend | ApiBackend, chat: Chat, say: Say) -> None:
    """What answers, and what can be done with the conversation as a whole."""
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        with st.container(gap=None, width="stretch"):
            st.caption(facts(chosen, backend, say))
        if not chat.messages:
            return
        with st.popover(say("export"), icon=":material/download:", type="tertiary"):
            for key, make, ending, mime in (
                ("export_markdown", lambda: as_markdown(chat, chosen.label), "md", "text/markdown"),
                ("export_record", lambda: as_record(chat), "jsonl", "application/jsonl"),
            ):
                st.download_button(
                    say(key), make, f"chat.{ending}", mime, key=key, on_click="ignore", type="tertiary",
                    icon=":material/description:",
                )  # fmt: skip
        st.button(say("new_chat"), icon=":material/edit_square:", key="new_chat", type="tertiary",
                  on_click=leave_editor, args=(chat.clear,))  # fmt: skip


def facts(chosen: Chosen, backend: LocalBackend | ApiBackend, say: Say) -> str:
    if isinstance(backend, ApiBackend):
        return say("facts_server", url=chosen.url)
    count = backend.parameters
    size = f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}K"
    stage = safe_markdown(visible(str(backend.stage or "chat")))  # as the JSON beside the weights says
    return say("facts_local", parameters=size, stage=stage, device=backend.model.device)


def show_conversation(chat: Chat, backend: LocalBackend | ApiBackend, say: Say) -> None:
    """All exchanges; the one being written refreshes itself."""
    if not chat.messages:
        show_empty(chat, backend, say)
        return
    starts = [i for i, turn in enumerate(chat.messages) if turn.role == "user"]
    for start, end in zip(starts, [*starts[1:], len(chat.messages)], strict=True):
        last = start == starts[-1]
        show_question(chat, start, backend, say)
        if last and chat.busy:
            show_live(chat, start, backend, say)
        else:
            show_answer(chat, start, end, backend, say, last)


def show_empty(chat: Chat, backend: LocalBackend | ApiBackend, say: Say) -> None:
    st.space("large")
    st.subheader(say("empty_text_title" if backend.continues_text else "empty_title"), text_alignment="center")
    with st.container(horizontal=True, horizontal_alignment="center"):
        for i, question in enumerate(BEGINNINGS if backend.continues_text else SUGGESTIONS):
            st.button(question, key=f"suggestion_{i}", on_click=chat.send, args=(question, backend))


def show_question(chat: Chat, index: int, backend: LocalBackend | ApiBackend, say: Say) -> None:
    """The user's words as they are, and what can be done with them."""
    message = chat.messages[index]
    with st.chat_message("user", avatar=":material/person:"):
        if st.session_state.get("editing") == index:
            show_editor(chat, index, backend, say)
            return
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.text(visible(message.text), width="stretch")
            copy_button(message.text, say("copy"), f"copy_{index}")
            st.button("", icon=":material/edit:", key=f"edit_{index}", type="tertiary", help=say("edit"),
                      on_click=st.session_state.__setitem__, args=("editing", index))  # fmt: skip
            st.button("", icon=":material/delete:", key=f"delete_{index}", type="tertiary", help=say("delete"),
                      on_click=leave_editor, args=(chat.delete, index))  # fmt: skip


def leave_editor(action: Callable[..., None], *args: object) -> None:
    """Carries out what was clicked. An open editor closes: the question it belongs to may have moved."""
    st.session_state.pop("editing", None)
    action(*args)


def show_editor(chat: Chat, index: int, backend: LocalBackend | ApiBackend, say: Say) -> None:
    text = st.text_area(say("edit"), chat.messages[index].text, key=f"editor_{index}", label_visibility="collapsed")
    with st.container(horizontal=True):
        if st.button(say("save"), key="save", type="primary") and text.strip():
            st.session_state.pop("editing")
            chat.edit(index, text, backend)
            st.rerun()
        if st.button(say("cancel"), key="cancel"):
            st.session_state.pop("editing")
            st.rerun()


@st.fragment(run_every=REFRESH_SECONDS)
def show_live(chat: Chat, start: int, backend: LocalBackend | ApiBackend, say: Say) -> None:
    """The answer being written. The rest of the page stays as it is, until the answer is done."""
    chat.watch()
    if not chat.busy:
        st.rerun()
    show_answer(chat, start, len(chat.messages), backend, say, last=True)
    st.button(say("stop"), icon=":material/stop_circle:", key="stop", on_click=chat.stop)


def show_answer(chat: Chat, start: int, end: int, backend: LocalBackend | ApiBackend, say: Say, last: bool) -> None:
    """What followed a question: thoughts, tool steps and words of one or several turns of the model."""
    turns = [turn for turn in chat.messages[start + 1 : end] if turn.role == "assistant"]
    with st.chat_message("assistant", avatar=":material/smart_toy:"):
        if not turns:
            st.caption(say("waiting"))
            return
        for i, turn in enumerate(turns):
            begins = chat.messages[start].text if turn.continues else ""
            show_turn(turn, begins, f"{start}_{i}", say)
        if not turns[-1].finish:
            return
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.caption(note(turns, say))
            copy_button(turns[-1].spoken, say("copy"), f"copy_answer_{start}")
            if last:
                st.button("", icon=":material/refresh:", key="regenerate", type="tertiary", help=say("regenerate"),
                          on_click=chat.regenerate, args=(backend,))  # fmt: skip


def show_turn(turn: Message, begins: str, key: str, say: Say) -> None:
    """One turn of the model. Everything it wrote passes `safe_text` or is plain text."""
    if turn.thought:
        writing = not turn.finish and not turn.spoken and not turn.calls
        label = say("thinking_now", tokens=turn.tokens) if writing else say("thought")
        with st.expander(label, icon=":material/psychology:", key=f"thought_{key}"):
            st.text(visible(turn.thought))
    for part in parts(begins + turn.text if begins else turn.spoken):
        if part.language is None:
            st.markdown(part.text)
        else:
            st.code(part.text, language=part.language or None, wrap_lines=True)
    for i, call in enumerate(turn.calls):
        name = visible(call.name)[:40] if call.name.isidentifier() else "?"
        label = say("step_failed" if call.failed else "step", name=f"`{name}`")
        with st.expander(label, icon=":material/error:" if call.failed else ":material/build:", key=f"step_{key}_{i}"):
            st.code(visible(call.arguments), language="json", wrap_lines=True)
            if call.result is not None:
                st.code(visible(call.result), language=None, wrap_lines=True)
    if turn.error:
        st.error(say("answer_failed"), icon=":material/error:")
        st.text(visible(turn.error))
    elif not turn.finish and not turn.tokens:
        st.caption(say("waiting"))
    elif turn.finish and not (turn.spoken or turn.calls or turn.thought):
        st.caption(say("no_answer"))


def note(turns: Sequence[Message], say: Say) -> str:
    """How the answer came about, in a line."""
    last, tokens = turns[-1], sum(turn.tokens for turn in turns)
    said = []
    if tokens:
        said.append(say("note_tokens", tokens=tokens, rate=last.tokens_per_second, first=turns[0].first_seconds))
    if last.finish in ("stopped", "length"):
        said.append(say(f"note_{last.finish}"))
    if last.forgotten:
        said.append(say("note_forgotten", count=last.forgotten))
    return " · ".join(said)
