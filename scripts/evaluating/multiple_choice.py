"""Multiple choice (C-Eval, CMMLU, MMLU, ARC, OpenBookQA): which option does the model find likeliest?

Two ways to ask, both by log-probability, nothing is generated:

    letter   the question with its options, then "Answer:"; the likeliest of " A", " B", " C", " D"
    text     the question alone, then "Answer:"; the likeliest of the options' own texts
                 acc        by log p(option)
                 acc_norm   by log p(option) / characters, as lm-eval 0.4.13 calls it
                 acc_bytes  by log p(option) / UTF-8 bytes

A small model that knows an answer often cannot name its letter yet, so look at the text first. Beside each accuracy
stand two baselines that know nothing: random (1 / options) and majority (the letter that is right most often, known
beforehand). The form is plain text or the chat template, in the language of most questions of a subject; examples
("shots") come from another file or are the first other questions of the same subject, never the question itself.

Tokens of the plain form are those of lm-eval. In the chat form they are those of training, the option apart from the
header before it; lm-eval counts the header's line break to the option, so there its numbers differ a little.

中文：选择题评测：按选项字母或选项文本的对数概率作答，按学科统计，附 95% 区间与随机、多数类基线。
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dataset.check_data import language_of
from dataset.json_lines import DataError, check_file, parse_line, read_lines
from dataset.record_formats import parse_choice
from scripts.chat_text import chat_ids
from scripts.evaluating.scoring import Item, encode, encode_pairs, first_token, score
from scripts.score_questions import wilson

LETTERS = "ABCD"
MEASURES = ("letter", "acc", "acc_norm", "acc_bytes")


class Form(NamedTuple):
    """How a question is written in one language; blank: between "Answer:" and the answer."""

    question: str
    option: str
    answer: str
    blank: str
    ask_letter: str


FORMS = {
    "en": Form("Question: {}\n", "{}. {}\n", "Answer:", " ", "Answer with the letter alone."),
    "zh": Form("问题：{}\n", "{}. {}\n", "答案：", "", "只回答选项的字母。"),
}


class Question(NamedTuple):
    """options: text by letter, the empty ones left out; form: key of FORMS, the same for all of a subject."""

    line: int
    subject: str
    text: str
    options: dict[str, str]
    answer: str
    form: str = "en"


def read_choices(path: Path) -> list[Question]:
    """The questions of a file.  Raises: DataError with file, line and reason."""
    questions = []
    for line, raw in read_lines(check_file(path)):
        try:
            record = parse_choice(parse_line(raw))
            options = {letter: record[letter].strip() for letter in LETTERS if record[letter].strip()}
            if (answer := record["answer"].strip()) not in options or len(options) < 2:
                raise ValueError(f"the answer is {answer}, the options are {', '.join(options)}; expected two or more")
        except ValueError as error:
            raise DataError(f"{path}, line {line}: {error}") from None
        subject = str(record.get("subject") or path.stem)
        questions.append(Question(line, subject, record["question"].strip(), options, answer))
    chinese: dict[str, list[bool]] = {}
    for q in questions:
        chinese.setdefault(q.subject, []).append(language_of(" ".join((q.text, *q.options.values()))) == "Chinese")
    forms = {subject: "zh" if sum(votes) * 2 > len(votes) else "en" for subject, votes in chinese.items()}
    return [q._replace(form=forms[q.subject]) for q in questions]


# --- What the model reads ---------------------------------------------------------------------------------------------


def asked(question: Question, letters: bool) -> str:
    """The question in plain text, up to where the answer begins."""
    form = FORMS[question.form]
    options = "".join(form.option.format(*option) for option in question.options.items()) if letters else ""
    return form.question.format(question.text) + options + form.answer


def plain_prompt(question: Question, shots: Sequence[Question], letters: bool) -> str:
    """The whole prompt in plain text: each shot with its answer and an empty line behind it, then the question."""
    parts = []
    for shot in shots:
        parts.append(asked(shot, letters) + FORMS[shot.form].blank + replies(shot, letters)[shot.answer] + "\n\n")
    return "".join(parts) + asked(question, letters)


def chat_turns(question: Question, shots: Sequence[Question], letters: bool) -> list[dict[str, str]]:
    """The prompt as turns of a chat; shots are earlier exchanges."""
    turns = []
    for one in (*shots, question):
        form, text = FORMS[one.form], one.text
        if letters:
            options = "".join(form.option.format(*option) for option in one.options.items())
            text = f"{one.text}\n{options}{form.ask_letter}"
        turns.append({"role": "user", "content": text})
        turns.append({"role": "assistant", "content": replies(one, letters)[one.answer]})
    return turns[:-1]


def replies(question: Question, letters: bool) -> dict[str, str]:
    """What may follow, by letter."""
    return {letter: letter for letter in question.options} if letters else question.options


def pick_shots(question: Question, pool: Sequence[Question], count: int) -> list[Question]:
    """The first `count` others of its subject in the pool: those that ask or answer something else."""
    shots: list[Question] = []
    for other in pool:
        if len(shots) == count:
            break
        if other.subject == question.subject and (other.text, other.options) != (question.text, question.options):
            shots.append(other)
    return shots


def encode_question(
    tokenizer: PreTrainedTokenizerFast,
    question: Question,
    shots: Sequence[Question],
    letters: bool,
    front: Sequence[int],
    chat: bool,
    thinking: bool | None,
) -> list[tuple[list[int], list[int]]]:
    """(context, option) in tokens for each option. `front` stands before a plain prompt."""
    said = list(replies(question, letters).values())
    if chat:
        context = chat_ids(tokenizer, chat_turns(question, shots, letters), thinking)
        return [(context, ids) for ids in encode(tokenizer, said)]
    prompt, blank = plain_prompt(question, shots, letters), FORMS[question.form].blank
    pairs = encode_pairs(tokenizer, [(prompt, blank + option) for option in said])
    return [([*front, *context], option) for context, option in pairs]


def as_items(pairs: Sequence[tuple[list[int], list[int]]], limit: int) -> list[Item]:
    """One item for the options of a question, or one for each where the context has to be cut to `limit` tokens.

    The beginning goes, as in lm-eval: a model reads at most `limit` tokens, the last of an option not among them.
    """
    contexts = [context[max(len(context) + len(option) - 1 - limit, 0) :] for context, option in pairs]
    if all(context == contexts[0] for context in contexts):
        return [Item(contexts[0], [option for _, option in pairs])]
    return [Item(context, [option]) for context, (_, option) in zip(contexts, pairs, strict=True)]


# --- Figures ----------------------------------------------------------------------------------------------------------


def decide(question: Question, logps: Sequence[float]) -> dict[str, str]:
    """The letter that each measure of the text form picks; the first of equal ones."""
    texts = list(question.options.values())
    values = np.array(logps)
    lengths = {"acc": 1.0, "acc_norm": [len(t) for t in texts], "acc_bytes": [len(t.encode()) for t in texts]}
    letters = list(question.options)
    return {name: letters[int(np.argmax(values / np.array(length)))] for name, length in lengths.items()}


def accuracy(right: Sequence[bool]) -> dict:
    """The share of right answers with its 95 % interval (Wilson)."""
    count = int(sum(right))
    return {
        "right": count,
        "total": len(right),
        "accuracy": count / len(right),
        "interval95": wilson(count, len(right)),
    }


def baselines(questions: Sequence[Question]) -> dict[str, float]:
    """What guessing gives, and what naming always the same letter would at best."""
    random = sum(1 / len(q.options) for q in questions) / len(questions)
    return {"random": random, "majority": max(Counter(q.answer for q in questions).values()) / len(questions)}


def summary(questions: Sequence[Question], rows: Sequence[dict]) -> dict:
    """Accuracy by each measure that the rows hold, and the baselines."""
    measures = [name for name in MEASURES if name in rows[0]]
    found = {
        name: accuracy([row[name] == q.answer for q, row in zip(questions, rows, strict=True)]) for name in measures
    }
    return {"questions": len(questions), "baselines": baselines(questions), **found}


def evaluate_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    pool: Sequence[Question],
    *,
    shots: int,
    ways: Sequence[str],
    chat: bool,
    thinking: bool | None,
    front: Sequence[int],
    batch_tokens: int,
    title: str,
) -> dict:
    """Accuracy of all and by subject, and the log-probabilities of every option under "answers".

    Args: pool: where shots are taken from; ways: "letter", "text" or both; front: tokens before a plain prompt.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    rows = [{"line": q.line, "subject": q.subject, "answer": q.answer} for q in questions]
    chosen_shots = [pick_shots(q, pool, shots) for q in questions]
    longest = cut = 0
    for way in ways:
        letters = way == "letter"
        items: list[Item] = []
        owners: list[int] = []
        for number, (q, examples) in enumerate(zip(questions, chosen_shots, strict=True)):
            pairs = encode_question(tokenizer, q, examples, letters, front, chat, thinking)
            pairs = [(context or [first_token(tokenizer)], option) for context, option in pairs]
            longest = max(longest, *(len(context) + len(option) for context, option in pairs))
            cut += any(len(context) + len(option) - 1 > limit for context, option in pairs)
            found = as_items(pairs, limit)
            items += found
            owners += [number] * len(found)
        logps: list[list[float]] = [[] for _ in questions]
        for owner, branches in zip(owners, score(model, items, batch_tokens, f"{title}, {way}"), strict=True):
            logps[owner] += [branch.sum().item() for branch in branches]
        for row, q, values in zip(rows, questions, logps, strict=True):
            row[f"{way}_logps"] = values
            picked = decide(q, values)
            row |= {"letter": picked["acc"]} if letters else picked
    return {
        "shots": shots, "fewest_shots": min(map(len, chosen_shots)), "chat": chat, "longest_prompt": longest,
        "cut_prompts": cut, **summary(questions, rows), "by_subject": by_group(questions, rows, lambda q: q.subject),
        "answers": rows,
    }  # fmt: skip


def by_group(questions: Sequence[Question], rows: Sequence[dict], key: Callable[[Question], str]) -> dict[str, dict]:
    """The summary of each group of questions."""
    groups = {}
    for name in sorted({key(q) for q in questions}):
        mine = [i for i, q in enumerate(questions) if key(q) == name]
        groups[name] = summary([questions[i] for i in mine], [rows[i] for i in mine])
    return groups
