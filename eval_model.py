"""Talk to a trained model in the terminal, or score it on a file of test questions.

    python eval_model.py                                # newest weights in out/; [0] built-in prompts, [1] manual chat
    python eval_model.py --model_mode 0                 # 0 pretrain, 1 full_sft, 2 rlhf, 3 reason, 4 grpo
    python eval_model.py --prompt "你是谁？" --temperature 0         # one question, the answer on standard output
    python eval_model.py --questions dataset/demo/demo_test.jsonl   # accuracy by kind and language
    python eval_model.py --load 1 --model_path ./MiniMind2          # a transformers folder

A pretrained model continues text; all later stages answer in the chat template. `/help` lists the commands of the chat.
Reading order: sampling → text → settings → chat → scoring → command line.

Dimension legend: B batch · T tokens · V vocabulary.

中文：在终端与训练好的模型对话，或用测试题给模型打分。
"""

import argparse
import dataclasses
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from model.weights import (  # noqa: E402
    STAGES,
    WeightsError,
    atomic_open,
    find_weights,
    load_model,
    load_tokenizer,
    weight_path,
)
from trainer.trainer_utils import DTYPES, BoolFlag, UserError, best_device  # noqa: E402

MODE_STAGES = ("pretrain", "full_sft", "rlhf", "reason", "grpo")  # --model_mode N
CHAT_PROMPTS = (
    "Who are you?",
    "你是谁？",
    "What is the capital of France?",
    "中国的首都是哪里？",
    "What is 7 plus 5?",
    "“大”的反义词是什么？",
    "Which day comes after Monday?",
    "“苹果”用英语怎么说？",
    "Why is the sky blue?",
    "请介绍一下你自己。",
)
PRETRAIN_PROMPTS = (
    "The capital of France is",
    "中国的首都是",
    "Monday, Tuesday,",
    "“大”的反义词是",
    "Once upon a time",
    "很久很久以前，",
    "12 plus 3 is",
    "人工智能是",
)


# --- Sampling ---------------------------------------------------------------------------------------------------------


def penalised(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Makes tokens that occurred before less likely: l / penalty where l > 0, l · penalty where l < 0.

    CTRL, Keskar et al. 2019, arXiv:1909.05858, section 4.1.  Shape: (V,) → (V,).
    """
    if penalty == 1.0 or not seen:
        return logits
    ids = torch.tensor(sorted(set(seen)))
    old = logits[ids]
    return logits.index_copy(0, ids, torch.where(old < 0, old * penalty, old / penalty))


def next_probs(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """softmax(logits / temperature), cut to the k likeliest tokens and then to the nucleus.

    The nucleus is the smallest set of likeliest tokens that reaches probability top_p (Holtzman et al. 2019,
    arXiv:1904.09751).

    Args: temperature > 0; top_k 0 = off; top_p 1 = off.  Shape: (V,) → (V,), sums to 1.
    """
    logits = logits / temperature
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probs = logits.softmax(-1)
    if top_p < 1.0:
        ranked, order = probs.sort(descending=True)
        cut = ranked.cumsum(-1) - ranked >= top_p  # what stands before this token is the nucleus already
        cut[0] = False
        probs = probs.index_fill(0, order[cut], 0.0)
        probs = probs / probs.sum()
    return probs


def sample_next(
    logits: Tensor,
    generated: Sequence[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> int:
    """Draws the next token: repetition penalty, temperature, top-k, top-p, in this order. Temperature 0: the likeliest.

    Args: logits (V,) on the CPU; generated: ids of the prompt and the answer so far, for the penalty.
    """
    logits = penalised(logits.float(), generated, repetition_penalty)
    if temperature < 1e-5:  # as good as 0, and a quotient could overflow
        return int(logits.argmax())
    return int(torch.multinomial(next_probs(logits, temperature, top_k, top_p), 1, generator=generator))


@torch.inference_mode()
def stream_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yields the tokens of the continuation one by one; a stop token ends it and is not yielded.

    The prompt runs through the model once, later steps feed one token to the key/value cache. Tokens are drawn on the
    CPU, so that a seed means the same text on every device, as far as their arithmetic agrees.

    Args: input_ids (1, T).  Raises: UserError when the model's output is not a number.
    """
    cache = DynamicCache(config=model.config)
    seen, new = input_ids[0].tolist(), input_ids
    for _ in range(max_new_tokens):
        logits = model(new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].float().cpu()  # (V,)
        if logits.isnan().any():
            raise UserError("The model's output is not a number: try --dtype float32, else the weights are damaged.")
        token = sample_next(logits, seen, temperature, top_k, top_p, repetition_penalty, generator)
        if token in stop_ids:
            return
        yield token
        seen.append(token)
        new = input_ids.new_tensor([[token]])


# --- Text -------------------------------------------------------------------------------------------------------------


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


def decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def split_thinking(text: str, opened: bool = False) -> tuple[str, str]:
    """(thought, reply) of an answer. `opened`: the prompt ended in `<think>`. What never closes is all thought."""
    match = re.match(r"\s*<think>(.*?)(?:</think>(.*))?\Z", ("<think>" if opened else "") + text, re.DOTALL)
    return (match[1].strip(), (match[2] or "").strip()) if match else ("", text.strip())


class Painter:
    """Writes an answer as it comes; with colour, a thought (`<think>…</think>`) is dimmed.

    Control characters, which an untrained model may well say, would garble the terminal and are shown as U+FFFD.
    """

    CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

    def __init__(self, out: TextIO, colour: bool, thinking: bool):
        self.out, self.colour, self.thinking = out, colour, thinking

    def write(self, text: str) -> None:
        for part in re.split(r"(</?think>)", self.CONTROL.sub("\ufffd", text)):
            self.thinking = self.thinking or part == "<think>"
            if part:
                self.out.write(f"\033[2m{part}\033[0m" if self.colour and self.thinking else part)
            self.thinking = self.thinking and part != "</think>"
        self.out.flush()


# --- Settings ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `/set` may change. Raises: UserError when a value is impossible."""

    temperature: float = 0.85
    top_p: float = 0.85
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    max_seq_len: int = 2048
    history_cnt: int = 6
    seed: int = 0
    enable_thinking: bool | None = None

    def __post_init__(self):
        for name, good, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (the likeliest token, always) or more, as in 0.7"),
            ("top_p", 0 <= self.top_p <= 1, "a share between 0 and 1 (1 = off)"),
            ("top_k", self.top_k >= 0, "a whole number, 0 or more (0 = off)"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a factor above 0 (1 = off, 1.1 = mild)"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 token or more"),
            ("max_seq_len", self.max_seq_len >= 8, "8 tokens or more"),
            ("history_cnt", self.history_cnt >= 0 and self.history_cnt % 2 == 0,
             "an even number, a question and its answer are two (0 = no memory)"),
            ("seed", 0 <= self.seed < 2**63, "a whole number, 0 or more"),
        ):
            if not good:
                raise UserError(f"{name} {getattr(self, name)} is impossible: expected {expected}.")

    def changed(self, name: str, value: str) -> "Settings":
        """A copy with one value read from text. Raises: UserError on an unknown name or a bad value."""
        if name not in SETTING_TYPES:
            raise UserError(f"There is no setting {name!r}: expected one of {', '.join(SETTING_TYPES)}.")
        try:
            parsed = SETTING_TYPES[name](value)
        except ValueError as error:
            raise UserError(f"{name} {value!r} cannot be read ({error}); for example: /set temperature 0.7") from error
        return dataclasses.replace(self, **{name: parsed})

    def sampling(self) -> dict[str, float | int]:
        return {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")}


def parse_switch(text: str) -> bool | None:
    """on, off or auto.  Raises: ValueError."""
    switches = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False, "auto": None}
    if text.lower() not in switches:
        raise ValueError("expected on, off or auto")
    return switches[text.lower()]


SETTING_TYPES: dict[str, Callable[[str], object]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "repetition_penalty": float,
    "max_new_tokens": int,
    "max_seq_len": int,
    "history_cnt": int,
    "seed": int,
    "enable_thinking": parse_switch,
}


# --- Chat -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Exchange:
    """One question and what came of it."""

    question: str
    thought: str
    reply: str


class Chat:
    """A conversation: the model, the settings, the exchanges so far, and the commands.

    Args:
        continues_text: True for a pretrained model: no template, no history, the prompt is simply continued.
        out: where answers go; notes: where remarks about them go; colour: dim thoughts and remarks.
        generate: `stream_generate` or a decoder with the same signature.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        settings: Settings,
        *,
        continues_text: bool = False,
        system: str = "",
        out: TextIO | None = None,
        notes: TextIO | None = None,
        colour: bool = False,
        generate: Callable[..., Iterator[int]] = stream_generate,
    ):
        self.model, self.tokenizer, self.generate = model, tokenizer, generate
        self.continues_text, self.system = continues_text, system
        self.out, self.notes, self.colour = out or sys.stdout, notes or sys.stdout, colour
        self.stop_ids = stop_ids(model, tokenizer)
        self.exchanges: list[Exchange] = []
        self.settings = settings
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.commands: dict[str, tuple[Callable[[str], bool], str]] = {
            "/help": (self._help, "this list"),
            "/clear": (self._clear, "forget the conversation"),
            "/retry": (self._retry, "ask the last question again"),
            "/system": (self._system, "TEXT  put a system turn in front (empty: none)"),
            "/set": (self._set, "NAME VALUE  for example /set temperature 0.7; alone: show all"),
            "/save": (self._save, "FILE  write the conversation as one SFT record (JSON Lines)"),
            "/exit": (lambda _: False, "leave (Ctrl-D too); Ctrl-C stops an answer"),
        }

    def note(self, text: str) -> None:
        print(f"\033[2m{text}\033[0m" if self.colour else text, file=self.notes, flush=True)

    def messages(self, exchanges: Sequence[Exchange], question: str) -> list[dict[str, str]]:
        """The turns of the prompt. Earlier thoughts are left out: the reply holds what they led to."""
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for exchange in exchanges:
            turns.append({"role": "user", "content": exchange.question})
            turns.append({"role": "assistant", "content": exchange.reply})
        return [*turns, {"role": "user", "content": question}]

    def prompt_ids(self, question: str) -> tuple[list[int], int]:
        """The prompt's token ids and how many old exchanges were left out because the prompt would not fit.

        The newest `history_cnt` turns are taken; then the oldest exchange goes, question and answer together, until the
        prompt leaves room for the answer: `max_new_tokens`, but at most half of `max_seq_len`. No turn is ever cut.

        Raises: UserError when the question alone does not fit `max_seq_len`.
        """
        settings = self.settings
        if self.continues_text:
            ids, kept, dropped = text_ids(self.tokenizer, question), [], 0
        else:
            room = settings.max_seq_len - min(settings.max_new_tokens, settings.max_seq_len // 2)
            kept = self.exchanges[max(len(self.exchanges) - settings.history_cnt // 2, 0) :]
            dropped = 0
            ids = chat_ids(self.tokenizer, self.messages(kept, question), settings.enable_thinking)
            while len(ids) > room and dropped < len(kept):
                dropped += 1
                ids = chat_ids(self.tokenizer, self.messages(kept[dropped:], question), settings.enable_thinking)
        if len(ids) >= settings.max_seq_len:
            raise UserError(
                f"The prompt takes {len(ids)} tokens and the answer needs room too, but max_seq_len is "
                f"{settings.max_seq_len}: shorten the prompt, or raise max_seq_len."
            )
        return ids, dropped

    def ask(self, question: str) -> bool:
        """Streams one answer and keeps the exchange. Returns False when Ctrl-C stopped it; what was said is kept.

        Raises: UserError when the question does not fit.
        """
        settings = self.settings
        ids, dropped = self.prompt_ids(question)
        if dropped:
            what = "1 old exchange" if dropped == 1 else f"{dropped} old exchanges"
            self.note(f"[{what} left out: the prompt has to fit max_seq_len {settings.max_seq_len}]")
        limit = min(settings.max_new_tokens, settings.max_seq_len - len(ids))
        opened = not self.continues_text and decode(self.tokenizer, ids[-8:]).rstrip().endswith("<think>")
        text, painter = TextStream(self.tokenizer), Painter(self.out, self.colour, opened)
        answer: list[str] = []
        tokens, finished, start = 0, True, time.perf_counter()
        if self.continues_text:
            self.out.write(question)  # the whole text reads on from the prompt

        def show(piece: str) -> None:
            answer.append(piece)
            painter.write(piece)

        try:
            input_ids = torch.tensor([ids], device=self.model.device)  # (1, T)
            for token in self.generate(
                self.model, input_ids, max_new_tokens=limit, stop_ids=self.stop_ids, generator=self.generator,
                **settings.sampling(),
            ):
                tokens += 1
                show(text.push(token))
        except KeyboardInterrupt:
            finished = False
        seconds = time.perf_counter() - start
        show(text.flush() + "\n")

        remark = f"{tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s"
        if not finished:
            remark += ", stopped"
        elif tokens == limit:
            name = "max_new_tokens" if limit == settings.max_new_tokens else "max_seq_len"
            remark += f", cut at {name} {getattr(settings, name)}"
        self.note(f"[{remark}]")
        self.exchanges.append(Exchange(question, *split_thinking("".join(answer), opened)))
        return finished

    def handle(self, line: str) -> bool:
        """One line from the user: a command or a question. Returns False when the chat is over.

        A problem with the line is reported and the chat goes on.
        """
        name, _, rest = line.strip().partition(" ")
        try:
            if not line.startswith("/"):
                if line.strip():
                    self.ask(line.strip())
                return True
            if name not in self.commands:
                raise UserError(f"{name} is no command: /help lists them. To send it as text, put a blank in front.")
            return self.commands[name][0](rest.strip())
        except (UserError, OSError) as error:
            self.note(f"error: {error}")
            return True

    def _help(self, _: str) -> bool:
        self.note("\n".join(f"{name:8}  {text}" for name, (_, text) in self.commands.items()))
        return True

    def _clear(self, _: str) -> bool:
        self.exchanges.clear()
        self.note("[the conversation is forgotten]")
        return True

    def _retry(self, _: str) -> bool:
        if not self.exchanges:
            raise UserError("There is no question to ask again yet.")
        last = self.exchanges.pop()
        try:
            self.ask(last.question)
        except UserError:  # it no longer fits, after /set for example: keep the old answer
            self.exchanges.append(last)
            raise
        return True

    def _system(self, text: str) -> bool:
        if self.continues_text:
            raise UserError("A pretrained model continues text and knows no system turn.")
        self.system = text
        self.note(f"[system turn: {text}]" if text else "[no system turn]")
        return True

    def _set(self, rest: str) -> bool:
        name, _, value = rest.replace("=", " ", 1).partition(" ")
        if name:
            settings = self.settings.changed(name, value.strip())
            check_length(settings, self.model)
            self.settings = settings
            if name == "seed":
                self.generator.manual_seed(settings.seed)
        values = dataclasses.asdict(self.settings)
        for shown in [name] if name else values:
            self.note(f"{shown} = {'auto' if values[shown] is None else values[shown]}")
        return True

    def _save(self, rest: str) -> bool:
        if not rest:
            raise UserError("/save needs a file name, for example: /save chat.jsonl")
        if not self.exchanges:
            raise UserError("There is nothing to save yet.")
        path = Path(rest).expanduser()
        if path.exists():
            raise UserError(f"{path} exists already: name another file.")
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for exchange in self.exchanges:
            turns.append({"role": "user", "content": exchange.question})
            thought = {"reasoning_content": exchange.thought} if exchange.thought else {}
            turns.append({"role": "assistant", "content": exchange.reply, **thought})
        with atomic_open(path, "w") as file:
            file.write(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")
        self.note(f"[saved to {path}]")
        return True


def text_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """A text to continue, as pretraining saw it: bos, then the text."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer.encode(clean(text), add_special_tokens=False)


def chat_ids(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], enable_thinking: bool | None
) -> list[int]:
    """The chat template's prompt, up to where the assistant begins to write. None leaves thinking to the template."""
    if not tokenizer.chat_template:
        raise UserError("This tokenizer has no chat template: continue text instead, with --model_mode 0.")
    messages = [{**turn, "content": clean(turn["content"])} for turn in messages]
    options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)


def clean(text: str) -> str:
    """Bytes of the terminal that were no UTF-8 arrive as lone surrogates, which no tokenizer takes: `?` instead."""
    return text.encode("utf-8", "replace").decode("utf-8")


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """The tokens that end an answer: what the tokenizer and the model's generation settings call eos."""
    eos = model.generation_config.eos_token_id
    ids = [*eos] if isinstance(eos, list) else [eos]
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}


def check_length(settings: Settings, model: PreTrainedModel) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and settings.max_seq_len > limit:
        raise UserError(f"max_seq_len {settings.max_seq_len} is impossible: the model has {limit} positions.")


def line_reader(commands: Sequence[str] = ()) -> Callable[[], str]:
    """A function that reads one line and raises EOFError at the end of the input.

    On a terminal it is a line editor with history; lines from a pipe are read as they are, and echoed.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):

        def read_piped() -> str:
            line = input("> ")
            print(line)
            return line

        return read_piped
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.shortcuts import CompleteStyle
    except ImportError:
        return lambda: input("> ")
    path = Path.home() / ".minimind_history"
    try:
        path.touch()
        history = FileHistory(str(path))
    except OSError:  # a read-only home: the history lasts as long as the chat
        history = InMemoryHistory()
    session = PromptSession(
        history=history, completer=WordCompleter(list(commands), sentence=True), complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,  # a menu would keep eight empty lines under the prompt
    )
    return lambda: session.prompt("> ")


def run_manual(chat: Chat, read: Callable[[], str], first: str = "") -> None:
    """Reads and answers until /exit or the end of the input. `first`: a line that was read already."""
    going = chat.handle(first) if first else True
    while going:
        try:
            line = read()
        except EOFError:
            print(file=chat.out)
            break
        except KeyboardInterrupt:
            chat.note("[Ctrl-D or /exit leaves]")
            continue
        going = chat.handle(line)


def run_prompts(chat: Chat, prompts: Sequence[str]) -> int:
    """Answers each prompt on its own, without history. Ctrl-C ends the run; the return value is the exit status."""
    for prompt in prompts:
        if not chat.continues_text:
            print(f"> {prompt}", file=chat.out)
        finished = chat.ask(prompt)
        chat.exchanges.clear()
        print(file=chat.out)
        if not finished:
            return 130
    return 0


# --- Scoring ----------------------------------------------------------------------------------------------------------


def read_questions(path: Path) -> list[dict]:
    """The records of a test file, each with its line number under "line".

    A record: {"kind": "addition", "lang": "en", "conversations": [turns up to the last user turn], "answer": "12"}.
    Raises: UserError with file, line and reason; OSError when the file cannot be read.
    """
    questions = []
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                record = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: this is not UTF-8 text ({error.reason}).") from error
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: expected one JSON object per line ({error}).") from error
            if reason := question_fault(record):
                raise UserError(f"{path}, line {number}: {reason}.")
            questions.append({**record, "line": number})
    if not questions:
        raise UserError(f"{path} holds no questions; `python dataset/make_demo_data.py` writes some.")
    return questions


def question_fault(record: object) -> str:
    """What is wrong with a record of a test file; empty when it is right."""
    if not isinstance(record, dict):
        return f"expected a JSON object, got {type(record).__name__}"
    for key in ("kind", "lang", "answer"):
        if not isinstance(record.get(key), str) or not record[key]:
            return f'expected a text under "{key}", got {record.get(key)!r}'
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        return f'expected a list of turns under "conversations", got {turns!r}'[:200]
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            return f'expected turns like {{"role": "user", "content": "…"}}, got {turn!r}'[:200]
        if turn.get("role") not in ("system", "user", "assistant"):
            return f"expected the role system, user or assistant, got {turn.get('role')!r}"
    if turns[-1]["role"] != "user":
        return f"the last turn has to be the user's question, got role {turns[-1]['role']!r}"
    return ""


def greedy_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The greedy answer to each prompt, in the order given. Prompts of like length share a left-padded batch.

    Args: progress: called with the number of prompts just answered.
    """
    stop = stop_ids(model, tokenizer)
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    replies = [""] * len(prompts)
    # The longest first: if memory does not suffice, it shows at once.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        T = max(len(prompts[i]) for i in batch)
        input_ids = torch.tensor([[pad] * (T - len(prompts[i])) + prompts[i] for i in batch])  # (B, T)
        real = torch.tensor([[0] * (T - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])  # (B, T)
        with torch.inference_mode():
            out = model.generate(
                input_ids.to(model.device), attention_mask=real.to(model.device), max_new_tokens=max_new_tokens,
                do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, pad_token_id=pad,
                eos_token_id=sorted(stop) or None,
            )  # (B, T + new)
        for i, ids in zip(batch, out[:, T:].tolist(), strict=True):
            end = next((n for n, token in enumerate(ids) if token in stop), len(ids))
            replies[i] = decode(tokenizer, ids[:end])
        progress(len(batch))
    return replies


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share, from right answers out of total ≥ 1 (Wilson 1927, JASA 22, 209–212)."""
    z = 1.959964
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def tally(results: Sequence[dict]) -> dict:
    """Accuracy in all, by language, and by kind and language, with counts and 95 % intervals."""

    def figures(rows: list[dict]) -> dict:
        right, total = sum(row["right"] for row in rows), len(rows)
        return {"right": right, "total": total, "accuracy": right / total, "interval95": wilson(right, total)}

    by_lang: dict[str, list[dict]] = {lang: [] for lang in sorted({row["lang"] for row in results})}
    by_kind: dict[str, dict[str, list[dict]]] = {}
    for row in results:
        by_lang[row["lang"]].append(row)
        by_kind.setdefault(row["kind"], {}).setdefault(row["lang"], []).append(row)
    return {
        **figures(list(results)),
        "by_lang": {lang: figures(rows) for lang, rows in by_lang.items()},
        "by_kind": {kind: {lang: figures(rows) for lang, rows in cells.items()} for kind, cells in by_kind.items()},
    }


def score_table(scores: dict) -> str:
    """The tally as text: a row per kind, a column per language."""
    langs = list(scores["by_lang"])

    def cell(figures: dict | None) -> str:
        return f"{figures['accuracy']:6.1%} ({figures['right']}/{figures['total']})" if figures else "–"

    def interval(figures: dict) -> str:
        return "{:.1%} to {:.1%}".format(*figures["interval95"])

    rows = [["kind", *langs, "all"]]
    for kind, cells in scores["by_kind"].items():
        right, total = (sum(c[key] for c in cells.values()) for key in ("right", "total"))
        rows.append([kind, *(cell(cells.get(lang)) for lang in langs)])
        rows[-1].append(cell({"accuracy": right / total, "right": right, "total": total}))
    rows.append(["total", *(cell(scores["by_lang"][lang]) for lang in langs), cell(scores)])
    rows.append(["95% interval", *(interval(scores["by_lang"][lang]) for lang in langs), interval(scores)])
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(rows[0]))]
    return "\n".join("".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def run_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    settings: Settings,
    *,
    system: str,
    batch_size: int,
    show_wrong: int,
) -> dict:
    """Scores a test file, prints the table and some wrong answers, and returns the figures with every reply.

    The prompt ends as training had it, in the bare assistant header, unless `enable_thinking` says otherwise: the empty
    think block of "off" is something a model without reasoning data has never seen.
    """
    from tqdm import tqdm

    from dataset.make_demo_data import is_right

    questions = read_questions(path)
    front = [{"role": "system", "content": system}] if system else []
    prompts = []
    for q in questions:
        ids = chat_ids(tokenizer, front + q["conversations"], settings.enable_thinking)
        if len(ids) + settings.max_new_tokens > settings.max_seq_len:
            raise UserError(
                f"{path}, line {q['line']}: the question takes {len(ids)} tokens; with max_new_tokens "
                f"{settings.max_new_tokens} that is more than max_seq_len {settings.max_seq_len}."
            )
        prompts.append(ids)
    start = time.perf_counter()
    with tqdm(total=len(prompts), unit="question", disable=not sys.stderr.isatty(), leave=False) as bar:
        replies = greedy_replies(
            model, tokenizer, prompts, max_new_tokens=settings.max_new_tokens, batch_size=batch_size,
            progress=bar.update,
        )
    seconds = time.perf_counter() - start

    results = []
    for q, reply in zip(questions, replies, strict=True):
        _, said = split_thinking(reply, opened=settings.enable_thinking is True)
        results.append({**q, "reply": reply, "right": is_right(said, q)})
    scores = tally(results)
    print(score_table(scores))
    wrong = [row for row in results if not row["right"]]
    picked = random.Random(0).sample(wrong, min(show_wrong, len(wrong)))  # over all kinds, the same ones every time
    for row in sorted(picked, key=lambda row: row["line"]):
        question, reply = (" ".join(t.split())[:160] for t in (row["conversations"][-1]["content"], row["reply"]))
        print(f"  line {row['line']} ({row['kind']}, {row['lang']}): {question}")
        print(f"    expected {row['answer']!r}, got {reply!r}")
    print(f"{len(questions)} questions in {seconds:.1f} s")
    return {"file": str(path), "seconds": seconds, **scores, "answers": results}


# --- Command line -----------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Chat with a trained model, or score it on test questions. Defaults stand in brackets.",
        allow_abbrev=False,
    )
    modes = ", ".join(f"{i} {stage}" for i, stage in enumerate(MODE_STAGES))

    add = parser.add_argument_group("which weights").add_argument
    add("--load", type=int, choices=(0, 1), default=0, help="0: own weights in --out_dir, 1: transformers folder (0)")
    add("--model_mode", type=int, choices=range(len(MODE_STAGES)), help=f"{modes} (the newest in --out_dir)")
    add("--weights", type=Path, metavar="PATH", help="a .pth file or a transformers folder, wherever it is")
    add("--model_path", type=Path, default=Path("MiniMind2"), help="the folder for --load 1 (./MiniMind2)")
    add("--tokenizer", type=Path, metavar="FOLDER", help="another tokenizer than the shipped one")
    add("--lora_name", metavar="NAME", help="adapter to apply, OUT_DIR/lora/NAME_512.pth (none)")
    add("--out_dir", type=Path, default=ROOT / "out", help="folder of the weights (out/ of the project)")
    add("--hidden_size", type=int, help="take only weights of this width, for example 512 (any)")
    add("--num_hidden_layers", type=int, help="insist on this many layers (as saved)")
    add("--use_moe", action=BoolFlag, help="take only mixture-of-experts weights, or only dense ones (any)")
    add("--device", help="cpu, cuda, cuda:1 or mps (the best there is)")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="arithmetic (half precision on CUDA, else float32)")

    group = parser.add_argument_group("what to do")
    add = group.add_mutually_exclusive_group().add_argument
    add("--mode", choices=("auto", "manual"), help="auto: built-in prompts, manual: chat (asks)")
    add("--prompt", metavar="TEXT", help="answer this and leave; remarks go to standard error")
    add("--questions", type=Path, metavar="FILE", help="score a test file: greedy, a thought does not count")
    add = group.add_argument
    add("--system", default="", metavar="TEXT", help="system turn in front of every conversation (none)")
    add("--batch_size", type=int, default=64, help="questions scored at a time (64)")
    add("--show_wrong", type=int, default=5, metavar="N", help="wrong answers shown after scoring (5)")
    add("--json", type=Path, metavar="FILE", help="write the scores and every reply, with --questions")

    add = parser.add_argument_group("how to answer (in the chat: /set NAME VALUE)").add_argument
    add("--temperature", type=float, default=Settings.temperature, help="0: always the likeliest token (0.85)")
    add("--top_p", type=float, default=Settings.top_p, help="draw from the likeliest tokens up to this share (0.85)")
    add("--top_k", type=int, default=Settings.top_k, help="draw from the k likeliest tokens, 0: off (0)")
    add("--repetition_penalty", type=float, default=Settings.repetition_penalty, help="1.1: fewer repetitions (1: off)")
    add("--max_new_tokens", type=int, help="longest answer in tokens (512, with --questions 48)")
    add("--max_seq_len", type=int, help="prompt and answer together in tokens (2048, or what the model has)")
    add("--history_cnt", type=int, default=Settings.history_cnt,
        help="earlier turns in the prompt, a question and its answer are two; 0: no memory (6)")
    add("--seed", type=int, help="same seed, same text (a new one each time; it is printed)")
    add("--enable_thinking", action=BoolFlag, help="ask for a thought first, or for none (as the chat template has it)")
    args = parser.parse_args(argv)
    for name, low in (("batch_size", 1), ("show_wrong", 0)):
        if getattr(args, name) < low:
            parser.error(f"--{name} {getattr(args, name)} is impossible: expected {low} or more")
    if args.json and not args.questions:
        parser.error("--json writes the scores of --questions FILE: give both")
    return args


def pick_device(name: str | None) -> torch.device:
    """The device named, or the best there is. Raises: UserError when it is not there."""
    name = name or best_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is unknown: expected cpu, cuda, cuda:1 or mps.") from error
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise UserError(f"--device {name}: torch sees no such device here. Leave --device out, or give cpu.")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def stage_of(path: Path) -> str | None:
    """The stage of a weight file, from its name or from the JSON beside it; None for a folder or an unknown name."""
    for stage in STAGES:
        if path.name.startswith(f"{stage}_") and path.suffix == ".pth":
            return stage
    sidecar = path.with_suffix(".json")
    if path.is_file() and sidecar.is_file():
        try:
            stage = json.loads(sidecar.read_text(encoding="utf-8")).get("stage")
        except (ValueError, AttributeError) as error:
            raise WeightsError(f"{sidecar} is damaged ({error}): delete it, and give --model_mode.") from error
        return stage if stage in STAGES else None
    return None


def find_model(args: argparse.Namespace) -> tuple[Path, str | None]:
    """(weights to load, their stage if known).  Raises: WeightsError, UserError."""
    stage = None if args.model_mode is None else MODE_STAGES[args.model_mode]
    if args.weights:
        return args.weights, stage or stage_of(args.weights)
    if args.load == 1:
        if not args.model_path.is_dir():
            raise UserError(f"--load 1: there is no folder {args.model_path}; name one with --model_path FOLDER.")
        return args.model_path, stage
    path = find_weights(args.out_dir, stage, args.hidden_size, args.use_moe)
    return path, stage or stage_of(path)


def load_all(
    args: argparse.Namespace, path: Path, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model, adapter and tokenizer.  Raises: WeightsError, UserError."""
    model = load_model(
        path, device, pick_dtype(args.dtype, device),
        hidden_size=args.hidden_size, num_hidden_layers=args.num_hidden_layers, use_moe=args.use_moe,
    )
    ours = model.config.model_type == "minimind"
    folder = args.tokenizer
    if folder is None and path.is_dir() and not (ours and not (path / "tokenizer.json").is_file()):
        folder = path  # a foreign model needs its own; ours may rely on the shipped one
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"The tokenizer has {len(tokenizer)} entries, but {path} was trained with {model.config.vocab_size}: "
            "name the tokenizer it was trained with, --tokenizer FOLDER."
        )
    if args.lora_name:
        if not ours:
            raise UserError("--lora_name works with MiniMind weights only.")
        try:
            from model.model_lora import load_lora
        except ModuleNotFoundError as error:
            if error.name != "model.model_lora":
                raise
            raise UserError("--lora_name: this version cannot apply LoRA yet (no model/model_lora.py).") from error
        adapter = weight_path(args.out_dir / "lora", args.lora_name, model.config)
        if not adapter.is_file():
            raise UserError(f"{adapter} does not exist: check --lora_name and --out_dir, or train it first.")
        load_lora(model, adapter)
    return model, tokenizer


def run(args: argparse.Namespace) -> int:
    settings = Settings(
        **{name: getattr(args, name) for name in
           ("temperature", "top_p", "top_k", "repetition_penalty", "history_cnt", "enable_thinking")},
        max_new_tokens=args.max_new_tokens if args.max_new_tokens is not None else 48 if args.questions else 512,
        max_seq_len=args.max_seq_len if args.max_seq_len is not None else Settings.max_seq_len,
        seed=args.seed if args.seed is not None else random.randrange(2**31),
    )
    if args.questions and not args.questions.is_file():  # before minutes of loading
        raise UserError(f"{args.questions} does not exist; `python dataset/make_demo_data.py` writes test questions.")
    path, stage = find_model(args)
    device = pick_device(args.device)
    continues_text = stage == "pretrain"
    if continues_text and args.system:
        raise UserError("--system needs a model that chats; these are pretrained weights, which continue text.")
    model, tokenizer = load_all(args, path, device)
    if args.max_seq_len is None:
        limit = getattr(model.config, "max_position_embeddings", None) or settings.max_seq_len
        settings = dataclasses.replace(settings, max_seq_len=min(settings.max_seq_len, limit))
    check_length(settings, model)

    one_shot = args.prompt is not None
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if colour and os.name == "nt":
        os.system("")  # switches the escape codes of old Windows consoles on
    chat = Chat(
        model, tokenizer, settings, continues_text=continues_text, system=args.system, colour=colour,
        notes=sys.stderr if one_shot else sys.stdout,
    )
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    size = sum(p.numel() for p in model.parameters()) / 1e6
    facts = [
        f"{shown} + LoRA {args.lora_name}" if args.lora_name else str(shown),
        stage or "chat",
        f"{size:.2f}M parameters",
        f"{device} {str(model.dtype).removeprefix('torch.')}",
    ]
    chat.note(" · ".join(facts if args.questions else [*facts, f"seed {settings.seed}"]))
    if args.questions:
        if continues_text:
            chat.note("[pretrained weights have not seen the chat format: expect little of the scores]")
        scores = run_questions(
            model, tokenizer, args.questions, settings, system=args.system, batch_size=args.batch_size,
            show_wrong=args.show_wrong,
        )
        if args.json:
            with atomic_open(args.json, "w") as file:
                json.dump({"weights": str(path), "stage": stage, **scores}, file, ensure_ascii=False, indent=2)
        return 0
    if one_shot:
        return 0 if chat.ask(args.prompt) else 130

    read, first = line_reader(list(chat.commands)), ""
    mode = args.mode
    if mode is None:
        print("[0] built-in prompts  [1] manual chat  (or just type your first message)")
        try:
            first = read().strip()
        except (EOFError, KeyboardInterrupt):
            return 0
        mode, first = ("auto", "") if first == "0" else ("manual", "" if first == "1" else first)
    if mode == "auto":
        return run_prompts(chat, PRETRAIN_PROMPTS if continues_text else CHAT_PROMPTS)
    chat.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.")
    run_manual(chat, read, first)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, 2 after an error, 130 after Ctrl-C."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # a pipe or a Windows console may have another encoding
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    args = parse_args(argv)
    transformers_logging.disable_progress_bar()
    try:
        return run(args)
    except BrokenPipeError:  # the reader of our output went away (`| head`): nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, WeightsError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
