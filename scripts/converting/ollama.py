"""An Ollama Modelfile beside a GGUF file: where the weights are, the chat template, the words that end an answer.

Ollama's templates are Go's (https://pkg.go.dev/text/template), ours is Jinja. The pieces around each turn are read off
what our template renders, put together as Go wants them, and a whole conversation made of the pieces is compared with
the original: a template of another form gives no TEMPLATE, and a line that says so.

中文：生成 Ollama 的 Modelfile：由我们的对话模板推导出 Go 模板与停止词。
"""

import json
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

MARK = "\u27e6{}\u27e7"  # ⟦name⟧ stands for a content while the pieces are cut


@dataclass(frozen=True)
class Pieces:
    """What the chat template writes before and behind each kind of content."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str  # where the assistant begins
    tool: tuple[str, str] | None = None
    tools: tuple[str, str, str] | None = None  # between a system text and the list, before it, behind it
    call: tuple[str, str, str] | None = None  # before the name, before the arguments, behind them
    next_call: str = ""  # between a text or a call and the next call


def cut(text: str, *names: str) -> tuple[str, ...]:
    """The parts of a text between marks.  Raises: ValueError when one is not there exactly once, in this order."""
    parts = []
    for name in names:
        before, found, text = text.partition(MARK.format(name))
        if not found:
            raise ValueError(f"the template does not write the {name}")
        parts.append(before)
    return (*parts, text)


def turn(role: str, name: str = "", **more) -> dict:
    return {"role": role, "content": MARK.format(name) if name else "", **more}


def read_pieces(tokenizer: PreTrainedTokenizerFast) -> Pieces:
    """Cuts the chat template into pieces.

    Raises: ValueError when it is not made of pieces that each depend on one turn alone; jinja2.TemplateError.
    """

    def render(*turns: dict, prompt: bool = False, tools: list | None = None) -> str:
        return tokenizer.apply_chat_template(list(turns), tools=tools, add_generation_prompt=prompt, tokenize=False)

    def rest(text: str, start: str) -> str:
        if not text.startswith(start):
            raise ValueError("the template changes earlier turns")
        return text[len(start) :]

    first = render(turn("user", "u"))
    user = cut(first, "u")
    system = cut(render(turn("system", "s"), turn("user", "u")).removesuffix(first), "s")
    assistant = cut(rest(render(turn("user", "u"), turn("assistant", "a")), first), "a")
    pieces = Pieces(system, user, assistant, rest(render(turn("user", "u"), prompt=True), first))
    listed = {"type": "function", "function": {"name": MARK.format("n")}}
    shown = render(turn("user", "u"), tools=[listed]).removesuffix(first)
    if MARK.format("n") in shown:
        as_json = json.dumps(listed, ensure_ascii=False)
        before, _, behind = shown.partition(as_json)
        before, behind = rest(before, system[0]), behind.removeprefix("\n").removesuffix(system[1])
        both = render(turn("system", "s"), turn("user", "u"), tools=[listed]).removesuffix(first)
        joint = cut(both, "s")[1].partition(before + as_json)[0]
        calls = [{"function": {"name": MARK.format(n), "arguments": MARK.format(n + "a")}} for n in "cd"]
        said = rest(render(turn("user", "u"), turn("assistant", tool_calls=calls)), first)
        opening, middle, between, _, closing = cut(said, "c", "ca", "d", "da")
        opening, closing = rest(opening, assistant[0]), closing.removesuffix(assistant[1])
        pieces = Pieces(
            system, user, assistant, pieces.prompt, tools=(joint, before, behind), call=(opening, middle, closing),
            next_call=between.removeprefix(closing).removesuffix(opening),
            tool=cut(rest(render(turn("user", "u"), turn("tool", "t")), first), "t"),
        )  # fmt: skip
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "一加一？"},
        {"role": "assistant", "content": "2"}, {"role": "user", "content": "weather"},
    ]  # fmt: skip
    tools = None
    if pieces.call:
        name = {"function": {"name": "look", "arguments": {"city": "Rome"}}}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [name, name]},
            {"role": "tool", "content": "dry"},
        ]
        tools = [{"type": "function", "function": {"name": "look"}}] * 2
    for part, given in ((messages, tools), (messages, None), (messages[1:], tools), (messages[1:2], None)):
        if put_together(pieces, part, given) != render(*part, prompt=True, tools=given):
            raise ValueError("the template is not made of one piece for each turn")
    return pieces


def put_together(pieces: Pieces, messages: list[dict], tools: list[dict] | None) -> str:
    """A conversation out of pieces, as the Modelfile's template writes it."""
    text, system = "", next((m["content"] for m in messages if m["role"] == "system"), "")
    if system or tools:
        text += pieces.system[0] + system
        if tools:
            joint, before, behind = pieces.tools
            lines = "".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools)
            text += (joint if system else "") + before + lines + behind
        text += pieces.system[1]
    for message in messages:
        if message["role"] == "user":
            text += pieces.user[0] + message["content"] + pieces.user[1]
        elif message["role"] == "assistant":
            calls = []
            for call in message.get("tool_calls", ()):
                name, arguments = call["function"]["name"], call["function"]["arguments"]
                arguments = json.dumps(arguments, ensure_ascii=False)
                calls.append(pieces.call[0] + name + pieces.call[1] + arguments + pieces.call[2])
            said = [message["content"]] if message["content"] else []
            text += pieces.assistant[0] + pieces.next_call.join(said + calls) + pieces.assistant[1]
        elif message["role"] == "tool":
            text += pieces.tool[0] + message["content"] + pieces.tool[1]
    return text + pieces.prompt


def go_template(pieces: Pieces) -> str:
    """The pieces as a template of Ollama."""
    p = Pieces(**{name: escaped(value) for name, value in vars(pieces).items()})
    system = "{{- if or .System .Tools }}" if p.tools else "{{- if .System }}"
    system += p.system[0] + "{{ .System }}"
    if p.tools:
        joint, before, behind = p.tools
        system += "{{ if .Tools }}{{ if .System }}" + joint + "{{ end }}" + before
        system += "{{ range .Tools }}{{ . }}\n{{ end }}" + behind + "{{ end }}"
    system += p.system[1] + "{{ end }}"
    turns = '{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}' + p.user[0] + "{{ $m.Content }}" + p.user[1]
    turns += '{{ else if eq $m.Role "assistant" }}' + p.assistant[0] + "{{ $m.Content }}"
    if p.call:
        # Ollama knows a call in an answer by the first text inside `if .ToolCalls`, up to a brace. With `$m.ToolCalls`,
        # or a line break as the first text, it would look for bare JSON and leave every call in the text.
        turns += "{{ if .ToolCalls }}{{ range $j, $c := .ToolCalls }}"
        turns += "{{ if or $m.Content $j }}" + p.next_call + p.call[0] + "{{ else }}" + p.call[0] + "{{ end }}"
        turns += "{{ $c.Function.Name }}" + p.call[1] + "{{ $c.Function.Arguments }}" + p.call[2] + "{{ end }}{{ end }}"
    turns += p.assistant[1]
    if p.tool:
        turns += '{{ else if eq $m.Role "tool" }}' + p.tool[0] + "{{ $m.Content }}" + p.tool[1]
    return system + turns + "{{ end }}{{ end }}" + p.prompt


def escaped(value: object) -> object:
    """Text that Go would take for an action, as an action that writes it."""
    if isinstance(value, str):
        return value.replace("{{", '{{ "{{" }}')
    return tuple(map(escaped, value)) if isinstance(value, tuple) else value


def modelfile(gguf_name: str, tokenizer: PreTrainedTokenizerFast, continues_text: bool) -> str:
    """The text of the Modelfile.  Args: continues_text, a pretrained model, which has seen no chat."""
    lines = [f"FROM ./{gguf_name}"]
    if continues_text:
        lines += [
            "",
            "# A pretrained model: it continues text.",
            f'TEMPLATE """{tokenizer.bos_token or ""}{{{{ .Prompt }}}}"""',
        ]
    else:
        try:
            template = go_template(read_pieces(tokenizer))
            if '"""' in template:
                raise ValueError("the template holds three quotes")
            lines += ["", f'TEMPLATE """{template}"""']
        except (ValueError, TypeError, TemplateError) as error:
            lines += ["", f"# No TEMPLATE: {' '.join(str(error).split())[:200]}."]
    stops = dict.fromkeys(token for token in (tokenizer.eos_token, tokenizer.bos_token) if token)
    lines += ["", *(f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}" for token in stops)]
    lines += ["PARAMETER temperature 0.85", "PARAMETER top_p 0.85", "PARAMETER repeat_penalty 1"]
    return "\n".join(lines) + "\n"
