"""What a request asks for: JSON from anybody becomes typed values, or an error in OpenAI's shape.

Every field is checked before it is used; whatever is wrong is answered with status 400, the field's name and what was
expected. Fields that change nothing here (user, metadata, store …) are ignored; fields that would change the answer and
are not supported are refused. `null` means the same as leaving a field out.

Reading order: messages → tools → what all requests share → the three requests. Single fields: fields.py.

中文：把请求的 JSON 校验为有类型的字段；错误一律按 OpenAI 的格式返回。
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from scripts.serving.fields import ApiError, Fields, bad
from scripts.serving.text_stream import strict_json
from scripts.terminal import clean

MOST_MESSAGES = 2048
MOST_STOPS, LONGEST_STOP = 16, 256
MOST_TOOLS = 128
MOST_TOP_LOGPROBS = 20  # as OpenAI has it
MOST_BIASES = 1024
MOST_PROMPTS = 64
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
EFFORTS = {"none": False, "minimal": False, "low": True, "medium": True, "high": True, "xhigh": True, "max": True}


# --- Messages ---------------------------------------------------------------------------------------------------------


def parse_content(content: object, where: str) -> str:
    """A string, or the text parts of a list, one below the other."""
    if isinstance(content, str):
        return clean(content)
    if not isinstance(content, list):
        raise bad(where, content, 'a string or a list of parts like {"type": "text", "text": "…"}')
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise bad(f"{where}[{i}]", kind, 'a part like {"type": "text", "text": "…"}: the model reads text only')
        texts.append(clean(part["text"]))
    return "\n".join(texts)


def parse_past_calls(calls: object, where: str) -> list[dict]:
    """The tool calls of an earlier assistant turn, as the chat template takes them."""
    if not isinstance(calls, list):
        raise bad(where, calls, "a list of tool calls")
    parsed = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad(f"{where}[{i}]", call, 'a call like {"function": {"name": "…", "arguments": "{…}"}}')
        arguments = function.get("arguments")
        try:
            arguments = strict_json(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise bad(f"{where}[{i}].function.arguments", function.get("arguments"), "a JSON object, as a string")
        parsed.append({"name": clean(function["name"]), "arguments": cleaned(arguments)})
    return parsed


def cleaned(value: object) -> object:
    """The same JSON value without lone surrogates, which no tokenizer takes."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(k): cleaned(v) for k, v in value.items()}
    return [cleaned(v) for v in value] if isinstance(value, list) else value


def parse_messages(messages: object) -> list[dict]:
    """The conversation as plain turns: role, content, and where there are some reasoning_content and tool_calls."""
    if not isinstance(messages, list) or not 0 < len(messages) <= MOST_MESSAGES:
        shown = f"of {len(messages)}" if isinstance(messages, list) else messages
        raise bad("messages", shown, f"a list of 1 to {MOST_MESSAGES} messages")
    turns = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = message.get("role") if isinstance(message, dict) else message
        if not isinstance(message, dict) or not isinstance(role, str) or role not in ROLES:
            raise bad(f"{where}.role", role, f"one of {', '.join(ROLES)}")
        turn: dict = {"role": ROLES[role]}
        calls = message.get("tool_calls")
        if message.get("content") is None and role == "assistant":  # beside tool calls
            turn["content"] = ""
        else:
            turn["content"] = parse_content(message.get("content"), f"{where}.content")
        if role == "assistant" and calls:
            turn["tool_calls"] = parse_past_calls(calls, f"{where}.tool_calls")
        if role == "assistant" and isinstance(message.get("reasoning_content"), str) and message["reasoning_content"]:
            turn["reasoning_content"] = clean(message["reasoning_content"])
        turns.append(turn)
    return turns


# --- Tools ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tools:
    """signatures: as the template lists them. forced: "" no call is forced, "*" any one, else the function's name."""

    signatures: tuple[dict, ...] = ()
    forced: str = ""
    parallel: bool = True

    @property
    def names(self) -> frozenset[str]:
        return frozenset(s["function"]["name"] for s in self.signatures)


def parse_tools(fields: Fields) -> Tools:
    """tools, tool_choice and parallel_tool_calls.  Raises: ApiError."""
    fields.refuse("functions", "send tools instead")
    fields.refuse("function_call", "send tool_choice instead")
    tools, choice = fields.get("tools"), fields.get("tool_choice")
    if tools is not None and (not isinstance(tools, list) or len(tools) > MOST_TOOLS):
        raise bad("tools", tools, f"a list of at most {MOST_TOOLS} tools")
    for i, tool in enumerate(tools or ()):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name or clean(name) != name:
            raise bad(f"tools[{i}]", tool, 'a tool like {"type": "function", "function": {"name": "…", …}}')
        if not isinstance(function.get("parameters", {}), dict | None):
            raise bad(f"tools[{i}].function.parameters", function["parameters"], "a JSON schema, an object")
    forced = ""
    if isinstance(choice, dict):
        function = choice.get("function")
        forced = function.get("name") if isinstance(function, dict) else None
        if choice.get("type") != "function" or not isinstance(forced, str) or not forced:
            raise bad("tool_choice", choice, 'an object like {"type": "function", "function": {"name": "…"}}')
    elif choice == "required":
        forced = "*"
    elif choice not in (None, "auto", "none"):
        raise bad("tool_choice", choice, "none, auto, required or an object that names a function")
    parallel = fields.switch("parallel_tool_calls", True)
    if choice == "none" or not tools:
        if forced:
            raise bad("tool_choice", choice, "tools to choose from, in `tools`")
        return Tools()
    parsed = Tools(tuple(cleaned(tools)), forced, parallel and not forced)
    if forced not in ("", "*") and forced not in parsed.names:
        raise bad("tool_choice", forced, f"one of the functions in tools: {', '.join(sorted(parsed.names))[:200]}")
    return parsed


# --- What all requests share ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Defaults:
    """What a request that names no value gets, and how much it may ask for. max_new_tokens: longest answer in tokens;
    choices: answers per request."""

    temperature: float = 0.85
    top_p: float = 0.85
    max_new_tokens: int = 1024
    choices: int = 16


@dataclass(frozen=True)
class Generation:
    """How to answer.

    settings: those of `model.generation.Sampling` that the client chose. max_tokens: None: as many as the server gives.
    top_logprobs: None: no log-probabilities.
    """

    settings: dict
    stops: tuple[str, ...]
    max_tokens: int | None
    seed: int | None
    n: int
    stream: bool
    include_usage: bool
    top_logprobs: int | None


def parse_stops(stop: object) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    expected = f"a string of at most {LONGEST_STOP} characters, or up to {MOST_STOPS} of them"
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise bad("stop", stop, expected)
    for one in stops:
        if not isinstance(one, str) or len(one) > LONGEST_STOP:
            raise bad("stop", one, expected)
    return tuple(clean(one) for one in stops if one)  # some clients send "" for none


def parse_logit_bias(bias: object, vocab_size: int) -> dict[int, float]:
    if bias is None:
        return {}
    if not isinstance(bias, dict) or len(bias) > MOST_BIASES:
        raise bad("logit_bias", bias, f"an object of at most {MOST_BIASES} token ids and numbers")
    parsed = {}
    for token, value in bias.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab_size):
            raise bad("logit_bias", token, f"token ids from 0 to {vocab_size - 1}, as strings")
        if not isinstance(value, int | float) or isinstance(value, bool) or not -100 <= value <= 100:
            raise bad("logit_bias", value, "numbers from -100 to 100")
        parsed[int(token)] = float(value)
    return parsed


def parse_generation(fields: Fields, defaults: Defaults, vocab_size: int, top_logprobs: int | None) -> Generation:
    """The fields that chat and text completions have in common.  Raises: ApiError."""
    settings = {
        "temperature": fields.number("temperature", defaults.temperature, 0, 2),
        "top_p": fields.number("top_p", defaults.top_p, 0, 1),
        "top_k": max(fields.whole("top_k", 0, -1), 0),  # some clients send -1 for off
        "min_p": fields.number("min_p", 0.0, 0, 1),
        "presence_penalty": fields.number("presence_penalty", 0.0, -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", 0.0, -2, 2),
        "repetition_penalty": fields.number("repetition_penalty", 1.0, 0.01, 10),
        "logit_bias": parse_logit_bias(fields.get("logit_bias"), vocab_size),
    }
    most = fields.whole("max_completion_tokens", None, 1)
    most = fields.whole("max_tokens", None, 1) if most is None else most
    seed = fields.whole("seed", None, -(2**63), 2**63 - 1)
    stream = fields.switch("stream", False)
    return Generation(
        settings=settings,
        stops=parse_stops(fields.get("stop")),
        max_tokens=most,
        seed=None if seed is None else seed % 2**64,
        n=fields.whole("n", 1, 1, defaults.choices),
        stream=stream,
        include_usage=stream and fields.object("stream_options").switch("include_usage", False),
        top_logprobs=top_logprobs,
    )


# --- The three requests -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatRequest:
    """thinking: None leaves it to the chat template. json_object: the content has to be a JSON object."""

    generation: Generation
    messages: list[dict]
    tools: Tools = field(default_factory=Tools)
    thinking: bool | None = None
    json_object: bool = False


def parse_thinking(fields: Fields) -> bool | None:
    """enable_thinking, else that of chat_template_kwargs, else reasoning_effort: none and minimal mean no thought."""
    options = fields.object("chat_template_kwargs")
    if unknown := sorted(set(options.values) - {"enable_thinking"}):
        raise bad("chat_template_kwargs", unknown[0], "enable_thinking only")
    effort = fields.get("reasoning_effort")
    if effort is not None and (not isinstance(effort, str) or effort not in EFFORTS):
        raise bad("reasoning_effort", effort, f"one of {', '.join(EFFORTS)}")
    return fields.switch("enable_thinking", options.switch("enable_thinking", EFFORTS.get(effort)))


def parse_response_format(fields: Fields) -> bool:
    """Whether a JSON object is asked for.  Raises: ApiError."""
    kind = fields.object("response_format").get("type")
    if kind not in (None, "text", "json_object"):
        raise bad("response_format", kind, "type text or json_object; JSON schemas are not enforced here")
    return kind == "json_object"


def parse_chat(fields: Fields, defaults: Defaults, vocab_size: int) -> ChatRequest:
    """The body of /v1/chat/completions.  Raises: ApiError."""
    fields.refuse("audio", "the model writes text only")
    fields.refuse("modalities", "the model writes text only", (["text"],))
    wanted = fields.switch("logprobs", False)
    top = fields.whole("top_logprobs", None, 0, MOST_TOP_LOGPROBS)
    if top is not None and not wanted:
        raise bad("top_logprobs", top, "logprobs true beside it")
    request = ChatRequest(
        generation=parse_generation(fields, defaults, vocab_size, (top or 0) if wanted else None),
        messages=parse_messages(fields.get("messages")),
        tools=parse_tools(fields),
        thinking=parse_thinking(fields),
        json_object=parse_response_format(fields),
    )
    if request.json_object and request.tools.signatures:
        raise ApiError(
            400, "response_format json_object and tools exclude each other here: a tool call is no such object.",
            param="response_format", code="unsupported_parameter",
        )  # fmt: skip
    return request


@dataclass(frozen=True)
class CompletionRequest:
    """prompts: texts or token ids. echo: the prompt is part of the answer."""

    generation: Generation
    prompts: list[str | list[int]]
    echo: bool = False


def parse_prompts(prompt: object, param: str, vocab_size: int) -> list[str | list[int]]:
    """A string, token ids, or a list of either."""

    def ids(value: object) -> bool:
        return isinstance(value, list) and bool(value) and all(type(i) is int and 0 <= i < vocab_size for i in value)

    expected = f"a string, token ids from 0 to {vocab_size - 1}, or a list of up to {MOST_PROMPTS} of either"
    prompts = [prompt] if isinstance(prompt, str) or ids(prompt) else prompt
    if not isinstance(prompts, list) or not 0 < len(prompts) <= MOST_PROMPTS:
        raise bad(param, prompt, expected)
    for one in prompts:
        if not isinstance(one, str) and not ids(one):
            raise bad(param, one, expected)
    return [clean(one) if isinstance(one, str) else one for one in prompts]


def parse_completion(fields: Fields, defaults: Defaults, vocab_size: int) -> CompletionRequest:
    """The body of /v1/completions.  Raises: ApiError."""
    fields.refuse("suffix", "the model writes on from a prompt, not between two texts", ("",))
    top = fields.whole("logprobs", None, 0, MOST_TOP_LOGPROBS)
    request = CompletionRequest(
        generation=parse_generation(fields, defaults, vocab_size, top),
        prompts=parse_prompts(fields.get("prompt"), "prompt", vocab_size),
        echo=fields.switch("echo", False),
    )
    fields.refuse("best_of", "ask for n answers instead", (1, request.generation.n))
    if request.echo and top is not None:
        raise ApiError(400, "echo and logprobs exclude each other here.", param="echo", code="unsupported_parameter")
    if len(request.prompts) * request.generation.n > defaults.choices:
        asked = f"{len(request.prompts)} prompts × n {request.generation.n}"
        raise ApiError(400, f"{asked} is more than {defaults.choices} answers at a time.", param="n")
    return request


@dataclass(frozen=True)
class EmbeddingRequest:
    """base64: numbers as base64 of little-endian float32, what the openai client asks for."""

    inputs: Sequence[str | list[int]]
    base64: bool


def parse_embedding(fields: Fields, vocab_size: int) -> EmbeddingRequest:
    """The body of /v1/embeddings.  Raises: ApiError."""
    fields.refuse("dimensions", "the model has one size")
    encoding = fields.text("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise bad("encoding_format", encoding, "float or base64")
    return EmbeddingRequest(parse_prompts(fields.get("input"), "input", vocab_size), encoding == "base64")
