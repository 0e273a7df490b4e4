"""The tokenizer and its files: control tokens, tags and the chat template; built, written whole, read again.

中文：分词器及其文件：控制 token、标签与对话模板；构建、保存、读取。
"""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models

from model.files import replace_file
from scripts.tokenizing.byte_pairs import BYTE_SYMBOLS, byte_token, pre_tokenizer
from scripts.tokenizing.corpus import TokenizerError

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2; stripped by skip_special_tokens
TAGS = (
    "<think>", "</think>", "<answer>", "</answer>",
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # single tokens too, but they belong to the text: never stripped
MODEL_MAX_LENGTH = 32768

# Written for transformers, and plain enough for the small Jinja engines of llama.cpp and others. What stands between
# `generation` and `endgeneration` is what the assistant writes: the training mask. Contents are rendered as they are,
# so a content that spells <|im_end|> would become the control token when the text is tokenised: whoever tokenises text
# of strangers has to encode such contents as plain text, as dataset/lm_dataset.py does.
CHAT_TEMPLATE = r"""
{#- ChatML: <|im_start|>ROLE, newline, CONTENT, <|im_end|>, newline. No system turn is made up. -#}
{%- set first_is_system = messages and messages[0].role == 'system' %}
{%- if tools or first_is_system %}
    {{- '<|im_start|>system\n' }}
    {%- if first_is_system and messages[0].content %}
        {{- messages[0].content }}
        {%- if tools %}
            {{- '\n\n' }}
        {%- endif %}
    {%- endif %}
    {%- if tools %}
        {{- 'Functions you can call, one JSON signature per line:\n<tools>\n' }}
        {%- for tool in tools %}
            {{- tool | tojson }}
            {{- '\n' }}
        {%- endfor %}
        {{- '</tools>\nTo call one, give its name and arguments as JSON:\n' }}
        {{- '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>' }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = '' %}
    {%- if message.content is defined and message.content is not none %}
        {%- set content = message.content %}
    {%- endif %}
    {%- if content is not string and message.role == 'tool' %}
        {%- set content = content | tojson %}
    {%- endif %}
    {%- if content is not string %}
        {{- raise_exception('The content of a message is not a string.') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>tool\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
            {%- if message.reasoning_content %}
                {{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
            {%- endif %}
            {{- content }}
            {%- if message.tool_calls %}
                {%- for tool_call in message.tool_calls %}
                    {%- set call = tool_call %}
                    {%- if tool_call.function %}
                        {%- set call = tool_call.function %}
                    {%- endif %}
                    {%- if content or not loop.first %}
                        {{- '\n' }}
                    {%- endif %}
                    {{- '<tool_call>\n{"name": ' }}
                    {{- call.name | tojson }}
                    {{- ', "arguments": ' }}
                    {%- if call.arguments is not defined or call.arguments is none %}
                        {{- '{}' }}
                    {%- elif call.arguments is string %}
                        {{- call.arguments }}
                    {%- else %}
                        {{- call.arguments | tojson }}
                    {%- endif %}
                    {{- '}\n</tool_call>' }}
                {%- endfor %}
            {%- endif %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role != 'system' %}
        {{- raise_exception('The role of a message must be system, user, assistant or tool.') }}
    {%- elif not loop.first %}
        {{- raise_exception('A system message must come first.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is not none %}
        {%- if enable_thinking %}
            {{- '<think>\n' }}
        {%- else %}
            {{- '<think>\n\n</think>\n\n' }}
        {%- endif %}
    {%- endif %}
{%- endif %}
""".strip()


def build_tokenizer(merges: Iterable[tuple[bytes, bytes]]) -> Tokenizer:
    """The tokenizer: control tokens, tags, bytes, then one token per merge, in this order."""
    pairs = [(byte_token(left), byte_token(right)) for left, right in merges]
    tokens = dict.fromkeys((*CONTROL_TOKENS, *TAGS, *BYTE_SYMBOLS, *(left + right for left, right in pairs)))
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    """What transformers needs besides tokenizer.json."""
    pad, bos, eos = CONTROL_TOKENS
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": pad,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL_MAX_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }


def save_tokenizer(tokenizer: Tokenizer, out_dir: Path) -> list[Path]:
    """Writes tokenizer.json and tokenizer_config.json; each is replaced in one go, never left half-written.

    Raises:
        OSError: the folder cannot be written.
    """
    contents = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(tokenizer_config(), ensure_ascii=False, indent=2) + "\n",
    }
    paths = [out_dir / name for name in contents]
    parts = [out_dir / f"{name}.part" for name in contents]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for part, content in zip(parts, contents.values(), strict=True):
            with open(part, "w", encoding="utf-8", newline="\n") as file:
                file.write(content)
        for part, path in zip(parts, paths, strict=True):
            replace_file(part, path)
    except OSError as e:
        for part in parts:
            with contextlib.suppress(OSError):  # the error worth reporting is the first one
                part.unlink()
        raise OSError(f"Cannot write {out_dir}: {e.strerror or e}. Give another folder with --out_dir.") from e
    return paths


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder.

    Raises:
        TokenizerError: there is none, or it is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(f"There is no tokenizer.json in {folder}; --measure takes the folder that holds one.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises a bare Exception
        raise TokenizerError(f"{path} is not a tokenizer ({e}); train one, or give another folder.") from e
