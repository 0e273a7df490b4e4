"""What a record of each stage looks like: one function per format takes a parsed record apart or says what is wrong.

`ValueError("reason")` names the key or the turn; the caller adds file and line. Formats: dataset/README.md.

中文：每个阶段的记录格式；每种格式一个函数，要么拆出内容，要么说明哪里不对。
"""

from __future__ import annotations

import json
import re
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
REASONED = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.DOTALL)


def parse_text(record: dict) -> str:
    """The text of a pretraining record `{"text": "…"}`.

    Raises:
        ValueError: with the reason.
    """
    if "text" not in record:
        raise ValueError(f'key "text" is missing (keys: {_keys(record)}); expected {{"text": "…"}}')
    text = record["text"]
    if not isinstance(text, str):
        raise ValueError(f'"text" is {_kind(text)}; expected a string')
    if not text.strip():
        raise ValueError('"text" is empty; expected some text')
    return text


def parse_conversation(turns: Any, key: str = "conversations") -> tuple[list[dict], list[dict] | None]:
    """Checks the turns of one record and gives (messages, tools) as the chat template takes them.

    Turns without any `role` alternate user / assistant. `tools` (first system turn) and `tool_calls` (assistant turns)
    may be JSON strings; they come out parsed. Keys the format does not know are left out.

    Raises:
        ValueError: with the reason.
    """
    shape = f'{{"{key}": [{{"role": "user", "content": "…"}}, {{"role": "assistant", "content": "…"}}]}}'
    if not isinstance(turns, list):
        raise ValueError(f'"{key}" is {_kind(turns)}; expected a list of turns: {shape}')
    if not turns:
        raise ValueError(f'"{key}" has no turns; expected {shape}')
    if not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(
            f'"{key}" holds {_kind(next(t for t in turns if not isinstance(t, dict)))}; expected turns: {shape}'
        )
    roleless = all("role" not in turn for turn in turns)
    messages, tools = [], None
    for i, turn in enumerate(turns):
        where = f"turn {i + 1}"
        if not roleless and "role" not in turn:
            raise ValueError(f'{where}: key "role" is missing (keys: {_keys(turn)}) while other turns have one')
        role = ("user", "assistant")[i % 2] if roleless else turn["role"]
        if role not in ROLES:
            renamed = {"human": "user", "gpt": "assistant"}.get(role) if isinstance(role, str) else None
            hint = f"; rename {role} to {renamed}" if renamed else ""
            raise ValueError(f"{where}: the role is {_quote(role)}; expected one of {', '.join(ROLES)}{hint}")
        if role == "system" and i:
            raise ValueError(f"{where}: a system turn; expected it first or not at all")
        if "content" not in turn and not turn.get("tool_calls"):
            raise ValueError(
                f'{where}: key "content" is missing (keys: {_keys(turn)}); '
                f'expected {{"role": "{role}", "content": "…"}}'
            )
        content = turn.get("content")
        if content is None and turn.get("tool_calls"):
            content = ""  # the form of the OpenAI API
        if not isinstance(content, str):
            raise ValueError(f'{where}: "content" is {_kind(content)}; expected a string')
        message = {"role": role, "content": content}
        if turn.get("tools"):
            if i or role != "system":
                raise ValueError(f'{where}: "tools" on a {role} turn; expected it on a system turn that comes first')
            tools = _json_list(turn["tools"], f'{where}: "tools"') or None
        if turn.get("tool_calls"):
            if role != "assistant":
                raise ValueError(f'{where}: "tool_calls" on a {role} turn; expected it on an assistant turn')
            message["tool_calls"] = [
                _tool_call(c, where) for c in _json_list(turn["tool_calls"], f'{where}: "tool_calls"')
            ]
        if turn.get("reasoning_content"):
            if role != "assistant" or not isinstance(turn["reasoning_content"], str):
                raise ValueError(f'{where}: "reasoning_content"; expected a string on an assistant turn')
            message["reasoning_content"] = turn["reasoning_content"]
        if role == "user" and not content.strip():
            raise ValueError(f"{where}: the user's content is empty; expected some text")
        messages.append(message)
    return messages, tools


def parse_sft(record: dict) -> tuple[list[dict], list[dict] | None]:
    """(messages, tools) of a record whose assistant turns are to be trained on.

    Raises:
        ValueError: with the reason.
    """
    if "conversations" not in record:
        raise ValueError(
            f'key "conversations" is missing (keys: {_keys(record)}); expected '
            '{"conversations": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
        )
    messages, tools = parse_conversation(record["conversations"])
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise ValueError("no assistant turn; expected at least one, it is what the model learns from")
    for m in answers:
        if not (m["content"].strip() or m.get("tool_calls") or m.get("reasoning_content")):
            raise ValueError(f"turn {messages.index(m) + 1}: the assistant's content is empty; expected some text")
    return messages, tools


def parse_reason(record: dict) -> tuple[list[dict], list[dict] | None]:
    """As parse_sft; each answer is `<think>…</think>` and `<answer>…</answer>`, or carries `reasoning_content`.

    Raises:
        ValueError: with the reason.
    """
    messages, tools = parse_sft(record)
    for i, m in enumerate(messages):
        if m["role"] == "assistant" and not m.get("reasoning_content") and not REASONED.fullmatch(m["content"].strip()):
            raise ValueError(
                f"turn {i + 1}: the answer begins {_quote(m['content'][:40])}; expected the form "
                "<think>\\n…\\n</think>\\n<answer>\\n…\\n</answer>"
            )
    return messages, tools


def parse_dpo(record: dict) -> tuple[list[dict], list[dict], list[dict] | None]:
    """(chosen, rejected, tools) of a preference record: the same turns up to two different last answers.

    Raises:
        ValueError: with the reason.
    """
    for key in ("chosen", "rejected"):
        if key not in record:
            raise ValueError(
                f'key "{key}" is missing (keys: {_keys(record)}); expected {{"chosen": […], "rejected": […]}}'
            )
    sides = []
    for key in ("chosen", "rejected"):
        try:
            messages, tools = parse_conversation(record[key], key)
        except ValueError as e:
            raise ValueError(f'"{key}": {e}') from None
        if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
            raise ValueError(f'"{key}" ends with {_quote(messages[-1])}; expected an assistant turn with a content')
        sides.append((messages, tools))
    (chosen, tools), (rejected, other_tools) = sides
    if chosen[:-1] != rejected[:-1] or tools != other_tools:
        raise ValueError('"chosen" and "rejected" differ before the last answer; expected the same prompt in both')
    if len(chosen) < 2:
        raise ValueError('"chosen" has no prompt; expected a user turn before the answer')
    if chosen[-1] == rejected[-1]:
        raise ValueError('"chosen" and "rejected" are equal; expected two different answers')
    return chosen, rejected, tools


def parse_rl(record: dict) -> tuple[list[dict], list[dict] | None, str | None]:
    """(prompt messages, tools, answer) for GRPO and PPO: the last assistant turn, empty or not, is left out.

    Raises:
        ValueError: with the reason.
    """
    if "conversations" not in record:
        raise ValueError(
            f'key "conversations" is missing (keys: {_keys(record)}); expected '
            '{"conversations": [{"role": "user", "content": "…"}], "answer": "…"}'
        )
    messages, tools = parse_conversation(record["conversations"])
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise ValueError("nothing to answer: expected a user turn before the last assistant turn")
    answer = record.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float, type(None))):
        raise ValueError(f'"answer" is {_kind(answer)}; expected a string or a number')
    return messages, tools, None if answer is None else str(answer)


def parse_choice(record: dict) -> dict[str, str]:
    """The six strings of a multiple-choice question, `subject` too when it is there.

    Raises:
        ValueError: with the reason.
    """
    for key in ("question", "A", "B", "C", "D", "answer"):
        if key not in record:
            raise ValueError(f'key "{key}" is missing (keys: {_keys(record)}); expected question, A, B, C, D, answer')
        if not isinstance(record[key], str) or (key in ("question", "answer") and not record[key].strip()):
            raise ValueError(f'"{key}" is {_quote(record[key])}; expected a string that is not empty')
    if record["answer"].strip() not in ("A", "B", "C", "D"):
        raise ValueError(f'"answer" is {_quote(record["answer"])}; expected A, B, C or D')
    return {k: record[k] for k in ("subject", "question", "A", "B", "C", "D", "answer") if k in record}


def _json_list(value: Any, what: str) -> list[dict]:
    """A list of objects, given as such or as a JSON string."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{what} is not JSON ({e}); expected a JSON list") from None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise ValueError(f"{what} is {_kind(value)}; expected a JSON list of objects")
    return value


def _tool_call(call: dict, where: str) -> dict:
    """`{"name", "arguments"}` of a call in that form or in the `{"function": {…}}` form of the OpenAI API."""
    inner = call["function"] if isinstance(call.get("function"), dict) else call
    name, arguments = inner.get("name"), inner.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise ValueError(f'{where}: the "arguments" of a tool call are not JSON; expected an object') from None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError(f'{where}: a tool call with keys {_keys(inner)}; expected {{"name": "…", "arguments": {{…}}}}')
    return {"name": name, "arguments": arguments}


def _quote(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "…"


def _keys(record: dict) -> str:
    keys = list(record)
    return ", ".join(map(str, keys[:8])) + (", …" if len(keys) > 8 else "") if keys else "none"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
