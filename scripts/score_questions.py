"""Scores a model on a file of test questions: `python eval_model.py --questions FILE`.

Every question is answered greedily, in batches; a reply is right or wrong, and the share of right ones is shown by kind
and language, with 95 % intervals. Reading order: questions → answers → figures → table → the whole.

Dimension legend: B batch · T tokens.

中文：用测试题给模型打分，按题型和语言列出正确率及 95% 置信区间。
"""

import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dataset.make_demo_data import is_right
from model.generation import NOT_A_NUMBER, Decoder, Sampling, stop_ids
from model.model_minimind import MiniMindForCausalLM
from model.weights import WeightsError
from scripts.chat_text import chat_ids, decode, split_thinking
from trainer.command_line import UserError


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
            except (json.JSONDecodeError, RecursionError) as error:
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
) -> list[str]:
    """The greedy answer to each prompt, in the order given, `batch_size` at a time."""
    stop = stop_ids(model, tokenizer)
    if isinstance(model, MiniMindForCausalLM):
        return decoder_replies(model, tokenizer, prompts, stop, max_new_tokens, batch_size)
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    replies = [""] * len(prompts)
    # Prompts of like length share a left-padded batch. The longest first: if memory does not suffice, it shows at once.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    with tqdm(total=len(prompts), unit="question", disable=None, leave=False) as bar:  # None: only on a terminal
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
                )  # (B, T + new)  # fmt: skip
            for i, ids in zip(batch, out[:, T:].tolist(), strict=True):
                end = next((n for n, token in enumerate(ids) if token in stop), len(ids))
                replies[i] = decode(tokenizer, ids[:end])
            bar.update(len(batch))
    return replies


def decoder_replies(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    stop: set[int],
    max_new_tokens: int,
    slots: int,
) -> list[str]:
    """`greedy_replies` of our own models: where an answer ends, the next question takes its place."""
    longest = max(map(len, prompts), default=1) + max_new_tokens
    decoder = Decoder(model, min(slots, max(len(prompts), 1)), longest)
    sampling = Sampling(temperature=0, max_new_tokens=max_new_tokens, stop_ids=frozenset(stop))
    requests = [decoder.add(prompt, sampling) for prompt in prompts]
    with tqdm(total=len(prompts), unit="question", disable=None, leave=False) as bar:  # None: only on a terminal
        while decoder.busy:
            events = decoder.step()
            if any(event.token is None for event in events):
                raise WeightsError(NOT_A_NUMBER)
            bar.update(sum(event.finish_reason is not None for event in events))
    return [decode(tokenizer, request.answer) for request in requests]


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share, from right answers out of total ≥ 1 (Wilson 1927, JASA 22, 209–212)."""
    z = 1.959964
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def tally(results: Sequence[dict]) -> dict:
    """Accuracy in all, by language, and by kind and language, with counts and 95 % intervals."""

    def figures(rows: Sequence[dict]) -> dict:
        right, total = sum(row["right"] for row in rows), len(rows)
        return {"right": right, "total": total, "accuracy": right / total, "interval95": wilson(right, total)}

    by_lang: dict[str, list[dict]] = {lang: [] for lang in sorted({row["lang"] for row in results})}
    by_kind: dict[str, dict[str, list[dict]]] = {}
    for row in results:
        by_lang[row["lang"]].append(row)
        by_kind.setdefault(row["kind"], {}).setdefault(row["lang"], []).append(row)
    return {
        **figures(results),
        "by_lang": {lang: figures(rows) for lang, rows in by_lang.items()},
        "by_kind": {kind: {lang: figures(rows) for lang, rows in cells.items()} for kind, cells in by_kind.items()},
    }


def score_table(scores: dict) -> str:
    """The tally as text: a row per kind, a column per language."""
    langs = list(scores["by_lang"])

    none = {"right": 0, "total": 0}

    def cell(counts: dict) -> str:
        right, total = counts["right"], counts["total"]
        return f"{right / total:6.1%} ({right}/{total})" if total else "–"

    def interval(figures: dict) -> str:
        return "{:.1%} to {:.1%}".format(*figures["interval95"])

    rows = [["kind", *langs, "all"]]
    for kind, by_lang in [*scores["by_kind"].items(), ("total", scores["by_lang"])]:
        cells = [by_lang.get(lang, none) for lang in langs]
        rows.append([kind, *map(cell, cells), cell({key: sum(c[key] for c in cells) for key in none})])
    rows.append(["95% interval", *(interval(scores["by_lang"][lang]) for lang in langs), interval(scores)])
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(rows[0]))]
    return "\n".join("".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def run_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    *,
    max_new_tokens: int,
    max_seq_len: int,
    enable_thinking: bool | None,
    system: str,
    batch_size: int,
    show_wrong: int,
) -> dict:
    """Scores a test file, prints the table and some wrong answers, and returns the figures with every reply.

    The prompt ends as training had it, in the bare assistant header, unless `enable_thinking` says otherwise: the empty
    think block of "off" is something a model without reasoning data has never seen.

    Raises: UserError on a malformed file, and on a question that leaves no room for its answer.
    """
    questions = read_questions(path)
    front = [{"role": "system", "content": system}] if system else []
    prompts = []
    for question in questions:
        ids = chat_ids(tokenizer, front + question["conversations"], enable_thinking)
        if len(ids) + max_new_tokens > max_seq_len:
            raise UserError(
                f"{path}, line {question['line']}: the question takes {len(ids)} tokens; with max_new_tokens "
                f"{max_new_tokens} that is more than max_seq_len {max_seq_len}."
            )
        prompts.append(ids)
    start = time.perf_counter()
    replies = greedy_replies(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    seconds = time.perf_counter() - start

    results = []
    for question, reply in zip(questions, replies, strict=True):
        _, said = split_thinking(reply, opened=enable_thinking is True)
        results.append({**question, "reply": reply, "right": is_right(said, question)})
    scores = tally(results)
    print(score_table(scores))
    wrong = [row for row in results if not row["right"]]
    picked = random.Random(0).sample(wrong, min(show_wrong, len(wrong)))  # over all kinds, the same ones every time
    for row in sorted(picked, key=lambda row: row["line"]):
        asked, reply = (" ".join(text.split())[:160] for text in (row["conversations"][-1]["content"], row["reply"]))
        print(f"  line {row['line']} ({row['kind']}, {row['lang']}): {asked}")
        print(f"    expected {row['answer']!r}, got {reply!r}")
    print(f"{len(questions)} questions in {seconds:.1f} s")
    return {"file": str(path), "seconds": seconds, **scores, "answers": results}
