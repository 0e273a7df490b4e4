"""What the model writes: right answers by a verifier, repetition, variety, and whether answers end by themselves.

Questions are answered greedily. Demo records (`kind`, `lang`, `conversations`, `answer`) are judged by the demo data's
`is_right`, as in eval_model.py; `{"question", "answer"}` records (GSM8K and its like) by the reward `answer`: the one
number in the answer, or the same words. A thought does not count. Free answers, to the chat's built-in prompts at its
own temperature, show loops that greedy answers to short questions hide. Of all replies, thoughts included:

    ended        share that ended by itself, before --max_new_tokens
    repetition   share of groups of four units that came before in the same reply, mean over replies (seq-rep-4,
                 Welleck et al. 2019, arXiv:1908.04319); a unit is a word, a Chinese character or a mark
    distinct_n   different groups of n units / all of them, over all replies (Li et al. 2016, arXiv:1510.03055); it
                 falls with the amount of text: compare it on the same prompts only

A pretrained model is asked in plain text, "Question: … Answer:", and its answer ends with the line.

中文：生成式评测：用可验证答案判分，并统计重复率、distinct-n 以及自行结束的比例。
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dataset.check_data import language_of
from dataset.json_lines import DataError, check_file, parse_line, read_lines
from dataset.make_demo_data import is_right
from eval_model import CHAT_PROMPTS, PRETRAIN_PROMPTS, Settings
from model.generation import Sampling, stop_ids
from scripts.chat_text import chat_ids, decode, split_thinking
from scripts.evaluating.multiple_choice import FORMS
from scripts.evaluating.scoring import encode
from scripts.score_questions import read_questions, tally
from scripts.write_answers import draw_answers
from trainer import rewards
from trainer.command_line import UserError

CODES = {"Chinese": "zh", "English": "en", "other": "other"}


def read_tasks(path: Path) -> list[dict]:
    """The questions of a file in the form of `read_questions`, with the verifier that judges them.

    Raises: UserError, DataError with file, line and reason.
    """
    first = next(raw for _, raw in read_lines(check_file(path)))
    try:
        plain = "question" in parse_line(first)
    except ValueError as error:
        raise DataError(f"{path}, line 1: {error}") from None
    if not plain:
        return [{**question, "verifier": "words"} for question in read_questions(path)]
    tasks = []
    for line, raw in read_lines(path):
        try:
            record = parse_line(raw)
            question, answer = (record.get(key) for key in ("question", "answer"))
            for key, value in (("question", question), ("answer", answer)):
                if not isinstance(value, str) or not value.strip():
                    raise ValueError(f'"{key}" is {json.dumps(value)[:60]}; expected a string that is not empty')
        except ValueError as error:
            raise DataError(f"{path}, line {line}: {error}") from None
        turns = [{"role": "user", "content": question}]
        kind = str(record.get("source") or record.get("kind") or path.stem)
        tasks.append({"kind": kind, "lang": CODES[language_of(question)], "conversations": turns, "answer": answer,
                      "line": line, "verifier": "number"})  # fmt: skip
    return tasks


def judge(task: dict, reply: str, opened: bool) -> bool:
    """Whether a reply is right. `opened`: the prompt ended in <think>."""
    if task["verifier"] == "number":
        return rewards.answer(("<think>" if opened else "") + reply, task) == 1
    return is_right(split_thinking(reply, opened)[1], task)


def plain_question(turns: Sequence[dict], lang: str) -> str:
    """A conversation in plain text up to where the answer begins."""
    form, text = FORMS["zh" if lang == "zh" else "en"], ""
    for turn in turns:
        if turn["role"] == "assistant":
            text += f"{form.answer}{form.blank}{turn['content']}\n"
        else:
            text += form.question.format(turn["content"]) if turn["role"] == "user" else turn["content"] + "\n"
    return text + form.answer


def variety(replies: Sequence[str]) -> dict[str, float | None]:
    """repetition and distinct_1 … distinct_3 of the replies; None where they hold no such group."""
    units = [rewards.UNIT.findall(reply.lower()) for reply in replies]
    repeated = sum(abs(rewards.repetition(reply, {})) for reply in replies)
    found: dict[str, float | None] = {"repetition": repeated / len(replies)}
    for n in (1, 2, 3):
        grams = [gram for u in units for gram in zip(*(u[start:] for start in range(n)), strict=False)]
        found[f"distinct_{n}"] = len(set(grams)) / len(grams) if grams else None
    return found


def written(replies: Sequence[tuple[list[int], bool]], texts: Sequence[str]) -> dict:
    """How long the replies are, whether they ended, how they vary."""
    count = len(replies)
    return {
        "replies": count,
        "ended": sum(ended for _, ended in replies) / count,
        "mean_tokens": sum(len(ids) for ids, _ in replies) / count,
        **variety(texts),
    }


class Writer:
    """A model with what its prompts look like. chat: template or plain text; front: tokens before a plain prompt."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        chat: bool,
        thinking: bool | None,
        front: Sequence[int],
        batch_size: int,
        max_new_tokens: int,
    ):
        self.model, self.tokenizer, self.chat, self.thinking = model, tokenizer, chat, thinking
        self.front, self.batch_size, self.max_new_tokens = list(front), batch_size, max_new_tokens

    def prompt(self, turns: Sequence[dict], lang: str) -> list[int]:
        """The tokens of a conversation that is to be answered."""
        if self.chat:
            return chat_ids(self.tokenizer, list(turns), self.thinking)
        return self.front + encode(self.tokenizer, [plain_question(turns, lang)])[0]

    def write(self, prompts: list[list[int]], line: bool = False, **sampling) -> list[tuple[list[int], bool]]:
        """(tokens, whether it ended by itself) of each reply. `line`: a line break ends it too.

        Raises: UserError when a prompt leaves no room; WeightsError when the model's output is not a number.
        """
        limit = getattr(self.model.config, "max_position_embeddings", None)
        longest = max(map(len, prompts)) + self.max_new_tokens
        if limit is not None and longest > limit:
            raise UserError(
                f"the longest prompt and --max_new_tokens {self.max_new_tokens} take {longest} tokens, but the model "
                f"has {limit} positions: shorten --max_new_tokens, or leave the question out."
            )
        stop = stop_ids(self.model, self.tokenizer)
        if line:
            stop |= {ids[0] for ids in encode(self.tokenizer, ["\n", "\n\n"]) if len(ids) == 1}
        samplings = [
            Sampling(max_new_tokens=self.max_new_tokens, stop_ids=frozenset(stop), seed=seed, **sampling)
            for seed in range(len(prompts))
        ]
        pad = self.tokenizer.pad_token_id or 0
        return draw_answers(self.model, prompts, samplings, self.batch_size, pad)

    def opened(self, prompt: list[int]) -> bool:
        return self.chat and decode(self.tokenizer, prompt[-8:]).rstrip().endswith("<think>")

    def answer_tasks(self, tasks: Sequence[dict]) -> dict:
        """Accuracy of all, by kind and language (as `tally`), how the replies are written, and every reply."""
        prompts = [self.prompt(task["conversations"], task["lang"]) for task in tasks]
        found = self.write(prompts, line=not self.chat, temperature=0)
        texts = [decode(self.tokenizer, ids) for ids, _ in found]
        rows = [
            {**task, "reply": text, "ended": ended, "right": judge(task, text, self.opened(prompt))}
            for task, prompt, text, (_, ended) in zip(tasks, prompts, texts, found, strict=True)
        ]
        return {**tally(rows), "written": written(found, texts), "answers": rows}

    def answer_freely(self, samples: int) -> dict:
        """How replies to the chat's built-in prompts are written, `samples` to each, at the chat's temperature."""
        asked = CHAT_PROMPTS if self.chat else PRETRAIN_PROMPTS
        if self.chat:
            prompts = [self.prompt([{"role": "user", "content": text}], "") for text in asked]
        else:
            prompts = [self.front + ids for ids in encode(self.tokenizer, asked)]
        prompts = list(itertools.chain.from_iterable([prompt] * samples for prompt in prompts))
        found = self.write(prompts, temperature=Settings.temperature, top_p=Settings.top_p)
        texts = [decode(self.tokenizer, ids) for ids, _ in found]
        rows = [
            {"prompt": asked[n // samples], "reply": text, "ended": ended}
            for n, (text, (_, ended)) in enumerate(zip(texts, found, strict=True))
        ]
        return {**written(found, texts), "answers": rows}
