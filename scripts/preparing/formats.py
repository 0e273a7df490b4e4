"""Records of other projects in our words: Alpaca, ShareGPT, OpenAI messages, preference pairs, plain text.

Each converter takes one record apart or says what is wrong; what comes out has passed the parsers the trainers use
(dataset/record_formats.py), so a converted file trains.

中文：把其他项目的记录格式转换为本项目的格式，并用训练时的同一套解析器校验。
"""

import json
import re
from typing import Any

from dataset import record_formats

ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
CALLS = ("function_call", "tool_call")  # roles whose content is the JSON of a call
QUESTION, EXTRA, REPLY = (
    ("instruction", "prompt", "question", "query"),
    ("input", "context"),
    ("output", "response", "completion", "answer"),
)
TURNS = ("conversations", "messages", "conversation")
SIDES = ("chosen", "rejected")
SPOKEN = re.compile(r"\n\n(Human|Assistant):")  # the transcripts of Anthropic's hh-rlhf


def find_format(record: dict) -> str | None:
    """The format whose keys the record has."""
    if all(record.get(side) is not None for side in SIDES):
        return "preference"
    for key in TURNS:
        turns = record.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            return "sharegpt" if "from" in turns[0] and "role" not in turns[0] else "openai"
    if isinstance(record.get("text"), str):
        return "text"
    choice = "A" in record and "B" in record  # options would be lost
    return "alpaca" if not choice and first(record, QUESTION) is not None and first(record, REPLY) is not None else None


def convert(record: dict, name: str) -> dict:
    """One record in our format: {"text"}, {"conversations"[, "answer"]} or {"chosen", "rejected"}.

    Raises: ValueError with the reason.
    """
    if name == "text":
        return {"text": record_formats.parse_text(record)}
    if name == "preference":
        return preference(record)
    found = alpaca(record) if name == "alpaca" else conversation(record, "from" if name == "sharegpt" else "role")
    answer = record.get("answer")
    if isinstance(answer, (str, int, float)) and not isinstance(answer, bool):  # for GRPO and PPO
        record_formats.parse_rl({"conversations": found})
        return {"conversations": written(*record_formats.parse_conversation(found)), "answer": answer}
    return {"conversations": written(*record_formats.parse_sft({"conversations": found}))}


def written(messages: list[dict], tools: list[dict] | None) -> list[dict]:
    """What a parser made of the turns, as it stands in a file: tools and calls are JSON strings."""
    turns = [dict(m) for m in messages]
    for turn in turns:
        if "tool_calls" in turn:
            turn["tool_calls"] = json.dumps(turn["tool_calls"], ensure_ascii=False)
    if tools:
        turns[0]["tools"] = json.dumps(tools, ensure_ascii=False)
    return turns


def first(record: dict, keys: tuple[str, ...]) -> Any:
    """The value of the first of these keys that has one."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


# ---- the formats -----------------------------------------------------------------------------------------------------


def alpaca(record: dict) -> list[dict]:
    """`instruction`, `input`, `output`, `system`, `history` (pairs), or question and answer under like names."""
    turns = []
    for pair in record.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError('"history" holds something else than pairs; expected [["question", "answer"], …]')
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    reply = first(record, REPLY)
    if reply is None:
        raise ValueError(f"there is none of {', '.join(REPLY)} (keys: {', '.join(map(str, record))})")
    reply = reply if isinstance(reply, str) else json.dumps(reply, ensure_ascii=False)  # a number
    turns += [{"role": "user", "content": asked(record)}, {"role": "assistant", "content": reply}]
    return with_system(turns, record)


def asked(record: dict) -> str:
    """Instruction and input, one above the other."""
    question, extra = first(record, QUESTION), first(record, EXTRA)
    if question is None:
        raise ValueError(f"there is none of {', '.join(QUESTION)} (keys: {', '.join(map(str, record))})")
    if not isinstance(question, str) or not isinstance(extra, (str, type(None))):
        raise ValueError("instruction or input is no string")
    return "\n".join(part for part in (question, extra) if part and part.strip())


def conversation(record: dict, role_key: str) -> list[dict]:
    """Turns with `from` and `value` (ShareGPT), or `role` and `content` (OpenAI)."""
    turns = first(record, TURNS)
    if not isinstance(turns, list):
        raise ValueError(f"there is no list {' or '.join(TURNS)} (keys: {', '.join(map(str, record))})")
    return with_system(read_turns(turns, role_key), record)


def read_turns(turns: list, role_key: str | None = None) -> list[dict]:
    """Turns in our words.  `role_key` None: found out. Turns without any role alternate."""
    if not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("a turn is no object")
    if role_key is None:
        role_key = "from" if any("from" in turn for turn in turns) else "role"
    if role_key == "role" and not any("role" in turn for turn in turns):
        turns = [{**turn, "role": ("user", "assistant")[i % 2]} for i, turn in enumerate(turns)]
    return [read_turn(turn, role_key, f"turn {i}") for i, turn in enumerate(turns, start=1)]


def read_turn(turn: dict, role_key: str, where: str) -> dict:
    said = turn.get(role_key)
    if said not in ROLES:
        raise ValueError(f"{where}: the role is {json.dumps(said)}; expected one of {', '.join(ROLES)}")
    role, content = ROLES[said], text_of(turn.get("value" if role_key == "from" else "content"), where)
    if turn.get("weight") == 0:  # of OpenAI's fine-tuning files
        raise ValueError(f"{where}: weight 0 (not to be trained on), which our format cannot say")
    out = {"role": role, "content": content}
    if said in CALLS:
        out = {"role": role, "content": "", "tool_calls": content}
    if calls := turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None):
        out["tool_calls"] = calls
    if thought := turn.get("reasoning_content") or turn.get("reasoning"):
        out["reasoning_content"] = thought
    if turn.get("tools"):
        out["tools"] = turn["tools"]
    return out


def text_of(content: Any, where: str) -> str:
    """The text of a content: a string, or a list of text parts.  Raises: ValueError on pictures and the like."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where}: the content is neither a string nor a list of parts")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{where}: a part of type {kind}; expected text only")
        texts.append(text)
    return "\n".join(texts)


def with_system(turns: list[dict], record: dict) -> list[dict]:
    """The turns behind one system turn that holds what the record and its first turns say, and the tools."""
    said = [record[key] for key in ("system", "system_prompt") if isinstance(record.get(key), str) and record[key]]
    tools = record.get("tools") or None
    while turns and turns[0]["role"] == "system":
        said.append(turns[0]["content"])
        tools, turns = turns[0].get("tools") or tools, turns[1:]
    if tools and not isinstance(tools, str):
        tools = json.dumps(tools, ensure_ascii=False)
    if not said and not tools:
        return turns
    system = {"role": "system", "content": "\n\n".join(filter(None, said))}
    return [system | ({"tools": tools} if tools else {}), *turns]


def preference(record: dict) -> dict:
    """`chosen` and `rejected` as turns or strings; the prompt in them, or beside them as text or turns."""
    sides = {key: side_turns(record[key], key) for key in SIDES}
    if all(len(turns) == 1 for turns in sides.values()):  # answers alone
        context = first(record, ("prompt", *TURNS))
        prompt = read_turns(context) if isinstance(context, list) else [{"role": "user", "content": asked(record)}]
        sides = {key: prompt + turns for key, turns in sides.items()}
    sides = {key: with_system(turns, record) for key, turns in sides.items()}
    chosen, rejected, tools = record_formats.parse_dpo(sides)
    return {"chosen": written(chosen, tools), "rejected": written(rejected, tools)}


def side_turns(side: Any, key: str) -> list[dict]:
    if isinstance(side, dict):
        return read_turns([side])
    if isinstance(side, list):
        return read_turns(side)
    if not isinstance(side, str):
        raise ValueError(f'"{key}" is neither text nor turns')
    if not side.lstrip().startswith("Human:"):
        return [{"role": "assistant", "content": side}]
    spoken = SPOKEN.split("\n\n" + side.strip())[1:]
    names = [{"Human": "user", "Assistant": "assistant"}[name] for name in spoken[::2]]
    return [{"role": n, "content": text.strip()} for n, text in zip(names, spoken[1::2], strict=True)]
