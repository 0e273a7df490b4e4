"""Judges trained models by figures that mean something at their size, one or several side by side.

    python scripts/eval_lm.py                                      # the newest weights in out/, everything, demo data
    python scripts/eval_lm.py --weights out/pretrain_512.pth out/full_sft_512.pth --text my_held_out.jsonl
    python scripts/eval_lm.py --choice dataset/cmmlu.jsonl --shots 5 --shots_file dataset/cmmlu_dev.jsonl
    python scripts/eval_lm.py --questions dataset/demo/demo_test.jsonl --tasks questions free
    python scripts/eval_lm.py --text dataset/pretrain_hq.jsonl --held_out --tasks text long_context
    python scripts/eval_lm.py --weights new.pth --beside out/eval/eval.json --report_dir out/eval_new

Tasks: text (bits per byte and perplexity), choice (multiple choice by log-probability), questions (answers that a
verifier checks), free (repetition, variety), long_context (loss up to 8 × the training length). How each is counted
stands at the head of its file in scripts/evaluating/. C-Eval and CMMLU of so small models are chance: rank them by bits
per byte and by questions. Table on the screen; `eval.json`, `eval.md` and pictures in --report_dir.

中文：评测训练好的模型：困惑度、选择题、可验证问答、重复率与长上下文，可并排比较多个检查点。
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from dataset.make_demo_data import DEMO_DIR, generate
from eval_model import load_all, stage_of
from model.model_lora import load_lora, merge_lora
from model.model_minimind import MiniMindForCausalLM
from model.weights import STAGES, find_weights, weight_path
from scripts.evaluating.generation_tasks import Writer, read_tasks
from scripts.evaluating.language_model import Document, evaluate_text, evenly, read_documents
from scripts.evaluating.long_context import evaluate_long_context
from scripts.evaluating.multiple_choice import Question, evaluate_choices, read_choices
from scripts.evaluating.report import name_all, read_results, text_table, write_report, write_results
from trainer.command_line import BoolFlag, UserError, check_writable, number, run_script
from trainer.trainer_utils import DTYPES, find_device

TASKS = ("text", "choice", "questions", "free", "long_context")
READS = {"text": "text", "long_context": "text", "choice": "choice", "questions": "questions"}  # files of each task
DEMO_FILES = {"text": ("pretrain", "sft"), "choice": ("choice",), "questions": ("test", "reason_test")}
USUAL_LENGTH = 512  # tokens, where nothing says with which length a model was trained


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Judge trained models. Defaults stand in brackets.")
    whole, natural = number(int, 0), number(int, 1)

    add = parser.add_argument_group("which models").add_argument
    add("--weights", nargs="+", default=[], metavar="PATH", help="stages, .pth files, folders (the newest in OUT_DIR)")
    add("--lora", metavar="NAME", help="adapter for all of them: a .pth file, a peft folder, or a name in OUT_DIR/lora")
    add("--tokenizer", type=Path, metavar="FOLDER", help="another tokenizer than that of the weights")
    add("--out_dir", type=Path, default=ROOT / "out", help="folder of the weights (out/ of the project)")
    add("--device", help="cpu, cuda, cuda:1 or mps (the best there is)")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="arithmetic (half precision on CUDA, else float32)")

    add = parser.add_argument_group("what to measure (without files: everything, on the demo data)").add_argument
    add("--tasks", nargs="+", choices=TASKS, help="only these (those that files are named for, else all)")
    add("--text", nargs="+", type=Path, metavar="FILE", help="texts or conversations; long_context reads the texts")
    add("--held_out", action=BoolFlag, help="score what training held out of these files (off; demo data: on)")
    add("--val_ratio", type=number(float, 0, high=1), default=0.01, help="the share it held out (0.01)")
    add("--cache_dir", type=Path, help="where token caches are kept, with --held_out (dataset/.cache)")
    add("--max_documents", type=whole, default=2000, help="of each file, spread evenly, 0: all (2000)")
    add("--window", type=natural, help="tokens read at a time (the shortest training length of the models, else 512)")
    add("--stride", type=natural, help="new tokens in each further window (all of it, as lm-eval)")
    add("--choice", nargs="+", type=Path, metavar="FILE", help="multiple choice: subject, question, A, B, C, D, answer")
    add("--ways", nargs="+", choices=("letter", "text"), default=["letter", "text"], help="what is scored (both)")
    add("--shots", type=whole, default=0, help="examples with answers before each question (0)")
    add("--shots_file", type=Path, help="take them from here (the first other questions of the subject)")
    add("--questions", nargs="+", type=Path, metavar="FILE", help="questions with one right answer each")
    add("--max_questions", type=whole, default=0, help="of each file, spread evenly, 0: all (0)")
    add("--max_new_tokens", type=natural, default=256, help="longest reply in tokens (256)")
    add("--free_samples", type=natural, default=8, help="replies to each built-in prompt (8)")
    add("--train_len", type=natural, help="training length of all models in tokens (from their run folder, else 512)")
    add("--long_rows", type=natural, default=16, help="rows of 8 training lengths (16, fewer where text is short)")

    add = parser.add_argument_group("how to ask").add_argument
    add("--chat", action=BoolFlag, help="chat template, or plain text (pretrained weights: plain, others: chat)")
    add("--bos", action=BoolFlag, help="<|im_start|> before plain prompts (as in training; lm-eval does without)")
    add("--enable_thinking", action=BoolFlag, help="ask for a thought first, or for none (as the chat template has it)")
    add("--batch_tokens", type=natural, default=4096, help="tokens scored at a time, padding included (4096)")
    add("--batch_size", type=natural, default=64, help="replies written at a time (64)")

    add = parser.add_argument_group("report").add_argument
    add("--beside", nargs="+", type=Path, default=[], metavar="JSON", help="show the models of earlier eval.json files")
    add("--report_dir", type=Path, default=ROOT / "out" / "eval", help="eval.json, eval.md, pictures (out/eval)")
    parser.set_defaults(lora_name=None, hidden_size=None, num_hidden_layers=None, use_moe=None)
    args = parser.parse_args()
    named = [kind for kind in DEMO_FILES if getattr(args, kind)]
    args.everything = not args.tasks and not named  # what a model cannot do is then left out, and no error
    only_beside = args.beside and not args.weights and args.everything
    args.tasks = args.tasks or named or ([] if only_beside else list(TASKS))
    for kind in named:
        if not any(READS.get(task) == kind for task in args.tasks):
            parser.error(f"--{kind} names files, but --tasks {' '.join(args.tasks)} does not read them")
    if args.shots_file and not args.shots:
        parser.error("--shots_file without --shots N: say how many examples stand before a question")
    return args


def find_adapter(args: argparse.Namespace, model: PreTrainedModel) -> Path | None:
    """The adapter of --lora: a file, a peft folder, or a name.  Raises: UserError."""
    if not args.lora:
        return None
    if not isinstance(model, MiniMindForCausalLM):
        raise UserError("--lora works with MiniMind weights only.")
    given = Path(args.lora)
    named = weight_path(args.out_dir / "lora", args.lora, model.config)
    for path in (given, named):
        if path.is_file() or (path / "adapter_config.json").is_file():
            return path
    raise UserError(f"--lora {args.lora}: there is neither {given} nor {named}; name an adapter, or train it first.")


def trained_length(path: Path) -> int | None:
    """The --max_seq_len of the training that wrote a weight file, from its run folder; None where that is gone."""
    states = sorted((path.parent / "runs" / path.stem).glob("step_*.json"))
    for state in reversed(states):
        try:
            length = json.loads(state.read_text(encoding="utf-8"))["args"]["max_seq_len"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # half written by a power cut
        if isinstance(length, int) and length > 0:
            return length
    return None


def files_of(args: argparse.Namespace, kind: str) -> list[Path]:
    """The files that some task reads: those named, else the demo data's."""
    if not any(READS.get(task) == kind for task in args.tasks):
        return []
    return getattr(args, kind) or [generate(DEMO_DIR)[name] for name in DEMO_FILES[kind]]


class Data:
    """The files that are asked for, read once for all models: mistakes in them show before any model runs."""

    def __init__(self, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast):
        held_out = args.held_out if args.held_out is not None else not args.text
        ratio = args.val_ratio if held_out else None
        self.documents: list[Document] = []
        for path in files_of(args, "text"):
            self.documents += read_documents(path, tokenizer, ratio, args.max_documents, args.cache_dir)
        self.choices: dict[str, list[Question]] = {}
        for name, path in named_files(files_of(args, "choice")):
            self.choices[name] = evenly(read_choices(path), args.max_questions)
        self.pool = read_choices(args.shots_file) if args.shots_file else None
        self.tasks: dict[str, list[dict]] = {}
        for name, path in named_files(files_of(args, "questions")):
            self.tasks[name] = evenly(read_tasks(path), args.max_questions)


def named_files(paths: list[Path]) -> list[tuple[str, Path]]:
    """Files by their name without its end, by the whole path where two share it."""
    stems = [path.stem for path in paths]
    return [(stem if stems.count(stem) == 1 else str(path), path) for stem, path in zip(stems, paths, strict=True)]


def front_tokens(args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens before a plain prompt."""
    ours = isinstance(model, MiniMindForCausalLM)
    if args.bos is None and not ours:
        return tokenizer.encode("")  # what a tokenizer puts before every text
    return [] if args.bos is False or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def evaluate(
    args: argparse.Namespace, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: Data
) -> dict:
    """Every figure of one model that was asked for."""
    chat = args.chat if args.chat is not None else stage_of(path) != "pretrain" and bool(tokenizer.chat_template)
    front = front_tokens(args, model, tokenizer)
    found: dict = {"chat": chat}
    if "long_context" in args.tasks:  # first: what it lacks shows before minutes of other work
        texts = [d.value for d in data.documents if isinstance(d.value, str)]
        try:
            found["long_context"] = evaluate_long_context(
                model, tokenizer, texts, trained=args.train_len or trained_length(path) or USUAL_LENGTH,
                most_rows=args.long_rows, batch_tokens=args.batch_tokens,
            )  # fmt: skip
        except UserError as error:
            if not args.everything:
                raise
            found["left_out"] = {"long_context": str(error)}
    if "text" in args.tasks:
        stride = args.stride or args.window
        found["text"] = evaluate_text(
            model, tokenizer, data.documents, window=args.window, stride=stride, batch_tokens=args.batch_tokens
        )
    for name, questions in data.choices.items():
        found.setdefault("choice", {})[name] = evaluate_choices(
            model, tokenizer, questions, data.pool or questions, shots=args.shots, ways=args.ways, chat=chat,
            thinking=False if args.enable_thinking is False else None, front=front, batch_tokens=args.batch_tokens,
            title=name,
        )  # fmt: skip
    writer = Writer(
        model, tokenizer, chat=chat, thinking=args.enable_thinking, front=front, batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
    )  # fmt: skip
    for name, tasks in data.tasks.items():
        found.setdefault("questions", {})[name] = writer.answer_tasks(tasks)
    if "free" in args.tasks:
        found["free"] = writer.answer_freely(args.free_samples)
    return found


def notes(checkpoint: dict) -> list[str]:
    """What a reader of the figures has to know."""
    lines = [f"{task} left out: {reason}" for task, reason in checkpoint.get("left_out", {}).items()]
    for name, result in checkpoint.get("choice", {}).items():
        if result["fewest_shots"] < result["shots"]:
            lines.append(f"{name}: some subjects have {result['fewest_shots']} examples only")
        if result["cut_prompts"]:
            lines.append(f"{name}: {result['cut_prompts']} prompts lost their beginning: too few positions")
        if checkpoint["trained"] and result["longest_prompt"] > checkpoint["trained"]:
            lines.append(
                f"{name}: prompts of up to {result['longest_prompt']} tokens, trained on {checkpoint['trained']}"
            )
    if "long_context" in checkpoint:
        result = checkpoint["long_context"]
        whole = f"{result['rows_of_one_document']} of them of one document"
        lines.append(f"long context: {result['rows']} rows of {result['positions'][-1]} tokens, {whole}")
    return lines


def load(
    args: argparse.Namespace, path: Path, device: torch.device
) -> tuple[str, PreTrainedModel, PreTrainedTokenizerFast]:
    """(name, model, tokenizer), the adapter merged.  Raises: WeightsError, UserError."""
    model, tokenizer = load_all(args, path, device)
    name = path.resolve().name if path.is_dir() else path.stem
    if adapter := find_adapter(args, model):
        load_lora(model, adapter)
        merge_lora(model)
        name += f" + {adapter.stem}"
    return name, model, tokenizer


def main() -> None:
    args = parse_args()
    transformers_logging.disable_progress_bar()
    check_writable(args.report_dir, "--report_dir")
    checkpoints = [checkpoint for path in args.beside for checkpoint in read_results(path)]
    names = args.weights or ([None] if args.tasks else [])
    paths = [find_weights(args.out_dir, name) if name is None or name in STAGES else Path(name) for name in names]
    for path in paths:  # the last one too, before the first is measured
        if not path.exists():
            raise UserError(f"--weights {path} does not exist: name a .pth file, a folder, or {', '.join(STAGES)}.")
    lengths = [args.train_len or trained_length(path) for path in paths]
    args.window = args.window or min(filter(None, lengths), default=USUAL_LENGTH)
    if args.stride and args.stride > args.window:
        raise UserError(f"--stride {args.stride} leaves tokens out: expected 1 to {args.window}, the --window.")
    device, data = find_device(args.device), None
    for path, length in zip(paths, lengths, strict=True):
        name, model, tokenizer = load(args, path, device)
        data = data or Data(args, tokenizer)  # what is held out is told by the first model's tokenizer
        size = sum(p.numel() for p in model.parameters())
        print(f"{name} · {size / 1e6:.2f}M parameters · {device} {str(model.dtype).removeprefix('torch.')}", flush=True)
        start = time.perf_counter()
        found = evaluate(args, path, model, tokenizer, data)
        about = {"name": name, "path": str(path), "stage": stage_of(path), "parameters": size, "trained": length}
        checkpoints.append({**about, "seconds": time.perf_counter() - start, **found})
        write_results(checkpoints, args.report_dir)  # an error in the next model costs nothing of this one
        for line in [*notes(checkpoints[-1]), f"{checkpoints[-1]['seconds']:.1f} s"]:
            print(f"[{line}]", flush=True)
    name_all(checkpoints)
    print("\n" + text_table(checkpoints) + "\n")
    print("\n".join(f"written: {path}" for path in write_report(checkpoints, args.report_dir)))


if __name__ == "__main__":
    run_script(main)
