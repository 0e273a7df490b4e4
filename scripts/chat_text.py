"""Between text and a model's tokens: a conversation becomes a prompt, tokens become text again, piece by piece.

Reading order: the prompt's tokens → tokens back to text → the thought and the reply in it.

中文：文字与模型 token 之间的转换：对话拼成提示，生成的 token 逐段还原为文字。
"""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from dataset.lm_dataset import encode_prompt
from dataset.token_cache import encoding_lock, has_markers
from scripts.terminal import clean
from trainer.command_line import UserError


def text_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """A text to continue, as pretraining saw it: bos, then the text."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    with encoding_lock:
        return bos + tokenizer.encode(clean(text), add_special_tokens=False)


def chat_ids(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict],
    enable_thinking: bool | None,
    tools: list[dict] | None = None,
) -> list[int]:
    """The chat template's prompt, up to where the assistant begins to write. None leaves thinking to the template.

    A control token that is typed out stays text, as in training: it cannot end the user's turn.

    Raises: UserError when the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise UserError("This tokenizer has no chat template: continue text instead, with --model_mode 0.")
    messages = [{**turn, "content": clean(turn["content"])} for turn in messages]
    options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    if has_markers(tokenizer.chat_template):
        return encode_prompt(messages, tools, tokenizer, **options)
    # The template of another family.
    options |= {"add_generation_prompt": True, "return_dict": False}
    with encoding_lock:
        return tokenizer.apply_chat_template(messages, tools=tools, **options)


def decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of the tokens, special ones left out."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """Token ids in, text out, piece by piece, never half a character: the pieces joined are the text of all ids.

    One character may take several tokens (byte-level BPE) and decodes to U+FFFD until its last byte is there, so U+FFFD
    at the end is held back. Tokens are decoded behind those of the piece before, because some tokenizers drop the blank
    in front of the first word.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.before: list[int] = []  # tokens of the last whole piece
        self.pending: list[int] = []
        self.shown = 0  # characters of `pending` already handed out

    def push(self, token: int) -> str:
        """The text that this token completes, often empty."""
        self.pending.append(token)
        text = self._text()
        whole = text.rstrip("\ufffd")
        piece = whole[self.shown :]
        self.shown = len(whole)
        if whole == text:
            self.before, self.pending, self.shown = self.pending, [], 0
        return piece

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character."""
        rest = self._text()[self.shown :] if self.pending else ""
        self.before, self.pending, self.shown = [], [], 0
        return rest

    def _text(self) -> str:
        return decode(self.tokenizer, self.before + self.pending)[len(decode(self.tokenizer, self.before)) :]


def split_thinking(text: str, opened: bool = False) -> tuple[str, str]:
    """(thought, reply) of an answer. `opened`: the prompt ended in `<think>`. What never closes is all thought."""
    match = re.match(r"\s*<think>(.*?)(?:</think>(.*))?\Z", ("<think>" if opened else "") + text, re.DOTALL)
    return (match[1].strip(), (match[2] or "").strip()) if match else ("", text.strip())
