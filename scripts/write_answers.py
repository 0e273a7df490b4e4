"""Black-box distillation: a teacher answers the questions of a file, and a student learns from the answers by SFT.

Teacher and student may have different vocabularies; where they share one, trainer/train_distillation.py learns more.
Kim & Rush 2016, arXiv:1606.07947, with drawn answers in place of the likeliest. An answer that did not end by itself
would teach the student to stop in mid-sentence: it is left out and counted. The last answer in the file is not read.

    python scripts/write_answers.py --model out/full_sft_768.pth --data_path dataset/sft_512.jsonl --out_path new.jsonl
    python scripts/write_answers.py --model folder/of/transformers --data_path questions.jsonl --out_path new.jsonl
    python trainer/train_full_sft.py --data_path new.jsonl

中文：黑盒蒸馏：让教师模型回答文件中的问题，写成学生可用的 SFT 数据。  Dimension legend: B batch · T tokens.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.json_lines import DataError, check_file, parse_line, read_lines
from dataset.lm_dataset import encode_prompt
from dataset.record_formats import parse_rl, parse_sft
from dataset.token_cache import has_markers
from eval_model import load_all
from model.files import atomic_open
from model.generation import NOT_A_NUMBER, Decoder, Sampling, stop_ids
from model.model_minimind import MiniMindForCausalLM
from model.weights import STAGES, WeightsError, find_weights
from scripts.chat_text import decode
from trainer.command_line import BoolFlag, UserError, check_writable, number, run_script
from trainer.trainer_utils import DTYPES, find_device


def read_questions(path: Path, tokenizer: PreTrainedTokenizerFast, system: str, thinking: bool | None) -> list[tuple]:
    """(turns as they are written again, ids of the prompt) of each record.  Raises: DataError with the line."""
    questions, options = [], {} if thinking is None else {"enable_thinking": thinking}
    for line, raw in read_lines(path):
        try:
            turns, tools, _ = parse_rl(parse_line(raw))
            if system and turns[0]["role"] != "system":
                turns = [{"role": "system", "content": system}, *turns]
            parse_sft({"conversations": [*turns, {"role": "assistant", "content": "any"}]})  # can be trained on
            if has_markers(tokenizer.chat_template):
                ids = encode_prompt(turns, tools, tokenizer, **options)
            else:  # the template of another family
                begin = dict(add_generation_prompt=True, return_dict=False)
                ids = tokenizer.apply_chat_template(turns, tools=tools, **begin, **options)
        except (ValueError, TemplateError) as error:
            raise DataError(f"{path}, line {line}: {error}") from None
        turns = [{**turns[0], "tools": json.dumps(tools, ensure_ascii=False)}, *turns[1:]] if tools else turns
        questions.append((turns, ids))
    return questions


def draw_answers(
    model: PreTrainedModel, prompts: list[list[int]], samplings: list[Sampling], batch_size: int, pad: int
) -> list[tuple[list[int], bool]]:
    """(tokens, whether it ended by itself) of each answer."""
    first, answers = samplings[0], [([], False)] * len(prompts)
    with tqdm(total=len(prompts), unit="answer", disable=None, leave=False) as bar, torch.inference_mode():
        if isinstance(model, MiniMindForCausalLM):  # where an answer ends, the next prompt takes its place
            decoder = Decoder(model, min(batch_size, len(prompts)), max(map(len, prompts)) + first.max_new_tokens)
            requests = [decoder.add(prompt, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)]
            while decoder.busy:
                events = decoder.step()
                if any(event.token is None for event in events):
                    raise WeightsError(NOT_A_NUMBER)
                bar.update(sum(event.finish_reason is not None for event in events))
            return [(request.answer, request.finish_reason == "stop") for request in requests]
        settings = {"temperature": first.temperature, "top_p": first.top_p, "top_k": 0}
        settings = dict.fromkeys(settings) if first.greedy else settings
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # prompts of like length share a batch
        for batch in (order[start : start + batch_size] for start in range(0, len(order), batch_size)):
            T = max(len(prompts[i]) for i in batch)
            input_ids = torch.tensor([[pad] * (T - len(prompts[i])) + prompts[i] for i in batch])  # (B, T)
            real = torch.tensor([[0] * (T - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])  # (B, T)
            torch.manual_seed(samplings[batch[0]].seed)
            out = model.generate(
                input_ids.to(model.device), attention_mask=real.to(model.device), do_sample=not first.greedy,
                num_beams=1, max_new_tokens=first.max_new_tokens, pad_token_id=pad,
                eos_token_id=sorted(first.stop_ids) or None, **settings,
            )  # (B, T + new)  # fmt: skip
            for i, ids in zip(batch, out[:, T:].tolist(), strict=True):
                end = next((n for n, token in enumerate(ids) if token in first.stop_ids), None)
                answers[i] = ids[:end], end is not None
            bar.update(len(batch))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description="Let a teacher answer questions. Defaults stand in brackets.")
    add, natural, share = parser.add_argument, number(int, 1), number(float, 0, most=1)
    add("--model", default="full_sft", help="the teacher: a stage, a .pth file or a transformers folder (full_sft)")
    add("--out_dir", type=Path, default=ROOT / "out", help="where the weights of a stage are (out/ of the project)")
    add("--data_path", type=Path, required=True, help="the questions: a JSON Lines file of SFT or RL records")
    add("--out_path", type=Path, required=True, help="the SFT file to write, for example dataset/answers.jsonl")
    add("--system", default="", help="system turn for conversations that have none (none)")
    add("--enable_thinking", action=BoolFlag, help="ask for a thought first, or for none (as the chat template has it)")
    add("--num_answers", type=natural, default=1, help="answers to each question (1)")
    add("--temperature", type=number(float, 0), default=0.8, help="0: always the likeliest token (0.8)")
    add("--top_p", type=share, default=1.0, help="draw from the likeliest tokens up to this share (1: all)")
    add("--max_new_tokens", type=natural, default=512, help="longest answer in tokens (512)")
    add("--max_seq_len", type=natural, default=2048, help="longest question with its answer in tokens (2048)")
    add("--keep_unfinished", action=BoolFlag, default=False, help="keep answers cut at --max_new_tokens (off)")
    add("--batch_size", type=natural, default=64, help="answers written at a time (64)")
    add("--device", help="cpu, cuda, cuda:1 or mps (the best there is)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="arithmetic (half precision on CUDA, else float32)")
    add("--seed", type=number(int, 0, high=2**32), default=42, help="same seed, same file (42)")
    parser.set_defaults(lora_name=None, tokenizer=None, hidden_size=None, num_hidden_layers=None, use_moe=None)
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    check_writable(args.out_path.parent, "--out_path")
    if check_file(args.data_path) and args.out_path.exists() and args.out_path.samefile(args.data_path):
        raise UserError(f"--out_path {args.out_path} holds the questions themselves; name another file.")
    if args.temperature == 0 and args.num_answers > 1:
        raise UserError(f"--temperature 0 gives {args.num_answers} times the same answer; leave out --num_answers.")
    path = find_weights(args.out_dir, args.model) if args.model in STAGES else Path(args.model)
    model, tokenizer = load_all(args, path, find_device(args.device))
    questions = read_questions(args.data_path, tokenizer, args.system, args.enable_thinking)
    room = min(args.max_seq_len, getattr(model.config, "max_position_embeddings", args.max_seq_len))
    asked = [q for q in questions if len(q[1]) + args.max_new_tokens <= room for _ in range(args.num_answers)]
    if not asked:
        raise UserError(f"no question leaves room for --max_new_tokens {args.max_new_tokens} within {room} tokens.")
    settings = {name: getattr(args, name) for name in ("temperature", "top_p", "max_new_tokens")}
    settings["stop_ids"] = frozenset(stop_ids(model, tokenizer))
    samplings = [Sampling(seed=args.seed * 1_000_003 + n, **settings) for n in range(len(asked))]
    answers = draw_answers(model, [ids for _, ids in asked], samplings, args.batch_size, tokenizer.pad_token_id or 0)
    records = []
    for (turns, prompt), (ids, ended) in zip(asked, answers, strict=True):
        begun = "<think>\n" if decode(tokenizer, prompt[-8:]).rstrip().endswith("<think>") else ""  # by the template
        content = decode(tokenizer, ids)
        if content.strip() and (ended or args.keep_unfinished):
            records.append({"conversations": [*turns, {"role": "assistant", "content": begun + content}]})
    facts = f"of {len(answers)} answers {sum(not ended for _, ended in answers)} unfinished, {len(records)} written"
    if not records:
        raise UserError(f"{facts}: raise --max_new_tokens, or take another teacher.")
    with atomic_open(args.out_path, "w") as f:
        f.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    print(f"{args.out_path}: {facts}; {len(questions) - len(asked) // args.num_answers} questions too long")


if __name__ == "__main__":
    run_script(main)
