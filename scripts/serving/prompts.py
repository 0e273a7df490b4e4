"""From a checked request to the tokens of a prompt, on a thread of its own.

A long text takes the tokenizer and the chat template many milliseconds, in which the event loop answers others. One
thread, with a tokenizer that no one else uses: encoding changes a tokenizer's settings for its duration.

中文：在单独的线程里套用聊天模板并分词，超长时给出准确的计数。
"""

import asyncio
import copy
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from jinja2 import TemplateError

from dataset.token_cache import has_markers, plain_backend
from scripts.chat_text import chat_ids, decode, text_ids
from scripts.serving.fields import ApiError
from scripts.serving.models import ServedModels
from scripts.serving.protocol import ChatRequest
from scripts.serving.text_stream import CALL, END_THINK, THINK, longest_token, token_bytes


class Prompt(NamedTuple):
    """ids: of the whole prompt. opened: it ends in <think>. begun: the part of the answer that it already holds.
    behind: the token that ends the thought, where it is opened."""

    ids: list[int]
    opened: bool = False
    begun: str = ""
    behind: int | None = None


def forced_call(forced: str) -> str:
    """How an answer begins that has to be a tool call: of this function, or of any one for "*"."""
    name = '"' if forced == "*" else f'{json.dumps(forced, ensure_ascii=False)}, "arguments": '
    return f'{CALL}\n{{"name": {name}'


class PromptMaker:
    """Makes prompts, one after the other.  Coroutines here raise ApiError 400 when the prompt is impossible."""

    def __init__(self, served: ServedModels):
        self.tokenizer = copy.deepcopy(served.tokenizer)  # of the thread below
        self.shower = served.tokenizer  # reading tokens changes nothing: any thread may
        self.max_seq_len, self.bos = served.max_seq_len, served.tokenizer.bos_token_id
        self.longest = longest_token(token_bytes(served.tokenizer))
        self.thread = ThreadPoolExecutor(1, "prompts")

    async def chat(self, request: ChatRequest) -> Prompt:
        self.check_characters(self.characters(request), "messages")  # here, so that nothing long waits for the thread
        return await asyncio.get_running_loop().run_in_executor(self.thread, self.make_chat, request)

    async def texts(self, prompts: Sequence[str | list[int]]) -> list[Prompt]:
        for prompt in prompts:
            self.check_characters(len(prompt) if isinstance(prompt, str) else 0, "prompt")
        return await asyncio.get_running_loop().run_in_executor(self.thread, self.make_texts, prompts)

    def shown(self, prompt: str | list[int]) -> str:
        """A prompt as text, for an echo."""
        return prompt if isinstance(prompt, str) else decode(self.shower, prompt)

    def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)

    # -- on the thread

    def make_chat(self, request: ChatRequest) -> Prompt:
        """The chat template's prompt, control tokens in contents as text where the template says who writes what."""
        if not self.tokenizer.chat_template:
            raise ApiError(400, "This model's tokenizer has no chat template: use /v1/completions.", code="no_template")
        thinking, tools = request.thinking, list(request.tools.signatures) or None
        if request.tools.forced and thinking:
            thinking = False  # the answer begins with the call
        try:
            ids = chat_ids(self.tokenizer, request.messages, thinking, tools)
        except (ValueError, TypeError, TemplateError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ApiError(400, f"The messages do not fit the chat template: {reason}", param="messages") from None
        opened, begun = decode(self.tokenizer, ids[-8:]).rstrip().endswith(THINK), ""
        if request.tools.forced:
            closing = f"\n{END_THINK}\n\n" if opened else ""
            begun, opened = forced_call(request.tools.forced), False
            with plain_backend(self.tokenizer) as backend:
                ids = ids + backend.encode(closing + begun, add_special_tokens=False).ids
        self.check_tokens(len(ids), "messages")
        behind = self.tokenizer.get_vocab().get(END_THINK) if opened else None
        if opened and behind is None and request.json_object:
            raise ApiError(400, "A JSON object behind a thought is not possible here: leave out enable_thinking.")
        return Prompt(ids, opened, begun, behind)

    def make_texts(self, prompts: Sequence[str | list[int]]) -> list[Prompt]:
        """Texts to continue, as pretraining saw them; ids are taken as they are."""
        made = []
        for prompt in prompts:
            if isinstance(prompt, str):
                ids = text_ids(self.tokenizer, prompt)
            else:
                ids = prompt
            if not ids:
                raise ApiError(400, "The prompt is empty: expected at least one token.", param="prompt")
            self.check_tokens(len(ids), "prompt")
            made.append(Prompt(ids))
        return made

    def characters(self, request: ChatRequest) -> int:
        """So many the prompt has at least. Of another family's template only contents are known to be in it."""
        total = sum(len(turn["content"]) for turn in request.messages)
        if has_markers(self.tokenizer.chat_template):
            total += sum(len(turn.get("reasoning_content", "")) for turn in request.messages)
            listed = [*request.tools.signatures, *(turn.get("tool_calls", []) for turn in request.messages)]
            total += sum(len(json.dumps(one, ensure_ascii=False, separators=(",", ":"))) for one in listed if one)
        return total

    def check_characters(self, characters: int, param: str) -> None:
        """Refuses what is too long in any case without tokenising it."""
        if (least := characters // self.longest) >= self.max_seq_len:
            raise self.too_long(f"at least {least}", param)

    def check_tokens(self, tokens: int, param: str) -> None:
        if tokens >= self.max_seq_len:
            raise self.too_long(str(tokens), param)

    def too_long(self, tokens: str, param: str) -> ApiError:
        message = (
            f"This model's maximum context length is {self.max_seq_len} tokens and the answer needs at least one of "
            f"them, but the prompt takes {tokens} tokens. Please shorten it."
        )
        return ApiError(400, message, param=param, code="context_length_exceeded")
