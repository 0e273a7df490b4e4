"""Talk to a trained model in the terminal, or score it on a file of test questions.

    python eval_model.py                                # newest weights in out/; [0] built-in prompts, [1] manual chat
    python eval_model.py --model_mode 0                 # 0 pretrain, 1 full_sft, 2 rlhf, 3 reason, 4 grpo
    python eval_model.py --prompt "你是谁？" --temperature 0         # one question, the answer on standard output
    python eval_model.py --questions dataset/demo/demo_test.jsonl   # accuracy by kind and language
    python eval_model.py --load 1 --model_path ./MiniMind2          # a transformers folder

A pretrained model continues text; all later stages answer in the chat template. `/help` lists the commands of the chat.
Reading order: settings → chat → command line. Elsewhere: how tokens are drawn (model/generation.py), what they say
(scripts/chat_text.py), the terminal (scripts/terminal.py), how test questions are scored (scripts/score_questions.py).

Dimension legend: T tokens.

中文：在终端与训练好的模型对话，或用测试题给模型打分。
"""

import argparse
import dataclasses
import functools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from model.files import atomic_open  # noqa: E402
from model.generation import Decoder, Sampling, stop_ids, stream_generate  # noqa: E402
from model.model_lora import load_lora  # noqa: E402
from model.model_minimind import MiniMindForCausalLM  # noqa: E402
from model.weights import (  # noqa: E402
    STAGES,
    WeightsError,
    find_weights,
    load_model,
    load_tokenizer,
    read_about,
    weight_path,
)
from scripts.chat_text import TextStream, chat_ids, decode, split_thinking, text_ids  # noqa: E402
from scripts.score_questions import run_questions  # noqa: E402
from scripts.terminal import Painter, dim, line_reader, shows_colour  # noqa: E402
from trainer.command_line import BoolFlag, UserError, check_writable, run_script  # noqa: E402
from trainer.trainer_utils import DTYPES, find_device  # noqa: E402

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
COMMANDS = {
    "/help": "this list",
    "/clear": "forget the conversation",
    "/system": "TEXT  put a system turn in front (empty: none)",
    "/set": "NAME VALUE  for example /set temperature 0.7; alone: show all",
    "/exit": "leave (Ctrl-D too); Ctrl-C stops an answer",
}


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
        try:
            Sampling(**self.sampling(), max_new_tokens=self.max_new_tokens)
        except ValueError as error:
            raise UserError(str(error)) from error
        for name, good, expected in (
            ("max_seq_len", self.max_seq_len >= 8, "8 tokens or more"),
            ("history_cnt", self.history_cnt in range(0, 2**31, 2), "an even number, 2 an exchange (0 = no memory)"),
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


# How the text behind `/set NAME` is read: as the type of the default, and on, off or auto for thinking.
SETTING_TYPES: dict[str, Callable[[str], object]] = {
    field.name: type(field.default) for field in dataclasses.fields(Settings)
} | {"enable_thinking": parse_switch}


def check_length(settings: Settings, model: PreTrainedModel) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and settings.max_seq_len > limit:
        raise UserError(f"max_seq_len {settings.max_seq_len} is impossible: the model has {limit} positions.")


# --- Chat -------------------------------------------------------------------------------------------------------------


class Chat:
    """A conversation: the model, the settings, the turns so far, and the commands.

    Args:
        continues_text: True for a pretrained model: no template, no history, the prompt is simply continued.
        out: where answers go; notes: where remarks about them go; colour: dim thoughts and remarks.
        generate: `stream_generate` or a function with the same signature.
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
        self.history: list[dict[str, str]] = []  # turns of the user and the assistant, one after the other
        self.settings = settings
        self.generator = torch.Generator().manual_seed(settings.seed)

    def note(self, text: str) -> None:
        print(dim(text) if self.colour else text, file=self.notes, flush=True)

    def messages(self, history: Sequence[dict[str, str]], question: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *history, {"role": "user", "content": question}]

    def prompt_ids(self, question: str) -> tuple[list[int], int]:
        """The prompt's token ids and how many old exchanges were left out because the prompt would not fit.

        The newest `history_cnt` turns are taken; then the oldest exchange goes, question and answer together, until the
        prompt leaves room for the answer: `max_new_tokens`, but at most half of `max_seq_len`. No turn is ever cut.

        Raises: UserError when the question alone does not fit `max_seq_len`.
        """
        settings, dropped = self.settings, 0
        if self.continues_text:
            ids = text_ids(self.tokenizer, question)
        else:
            room = settings.max_seq_len - min(settings.max_new_tokens, settings.max_seq_len // 2)
            history = self.history[max(len(self.history) - settings.history_cnt, 0) :]
            ids = chat_ids(self.tokenizer, self.messages(history, question), settings.enable_thinking)
            while len(ids) > room and history:
                history, dropped = history[2:], dropped + 1
                ids = chat_ids(self.tokenizer, self.messages(history, question), settings.enable_thinking)
        if len(ids) >= settings.max_seq_len:
            raise UserError(
                f"The prompt takes {len(ids)} tokens and the answer needs room too, but max_seq_len is "
                f"{settings.max_seq_len}: shorten the prompt, or raise max_seq_len."
            )
        return ids, dropped

    def ask(self, question: str) -> bool:
        """Streams one answer and remembers it. Returns False when Ctrl-C stopped it; what was said is kept.

        Raises: UserError when the question does not fit; WeightsError when the model's output is not a number.
        """
        settings = self.settings
        ids, dropped = self.prompt_ids(question)
        if dropped:
            what = "1 old exchange" if dropped == 1 else f"{dropped} old exchanges"
            self.note(f"[{what} left out: the prompt has to fit max_seq_len {settings.max_seq_len}]")
        limit = min(settings.max_new_tokens, settings.max_seq_len - len(ids))
        opened = not self.continues_text and decode(self.tokenizer, ids[-8:]).rstrip().endswith("<think>")
        text, painter = TextStream(self.tokenizer), Painter(self.out, self.colour, opened)
        answer, tokens, finished, start = "", 0, True, time.perf_counter()
        if self.continues_text:
            self.out.write(question)  # the whole text reads on from the prompt
        try:
            input_ids = torch.tensor([ids], device=self.model.device)  # (1, T)
            for token in self.generate(
                self.model, input_ids, max_new_tokens=limit, stop_ids=self.stop_ids, generator=self.generator,
                **settings.sampling(),
            ):  # fmt: skip
                tokens += 1
                piece = text.push(token)
                answer += piece
                painter.write(piece)
        except KeyboardInterrupt:
            finished = False
        seconds = time.perf_counter() - start
        rest = text.flush()
        painter.write(rest + "\n")

        remark = f"{tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s"
        if not finished:
            remark += ", stopped"
        elif tokens == limit:
            name = "max_new_tokens" if limit == settings.max_new_tokens else "max_seq_len"
            remark += f", cut at {name} {getattr(settings, name)}"
        self.note(f"[{remark}]")
        _, reply = split_thinking(answer + rest, opened)  # the reply holds what the thought led to
        self.history += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        return finished

    def handle(self, line: str) -> bool:
        """One line from the user: a command or a question. Returns False when the chat is over.

        A problem with the line is reported and the chat goes on.
        """
        try:
            if line.startswith("/"):
                name, _, rest = line.strip().partition(" ")
                return self.command(name, rest.strip())
            if line.strip():
                self.ask(line.strip())
        except (UserError, WeightsError) as error:
            self.note(f"error: {error}")
        return True

    def command(self, name: str, rest: str) -> bool:
        """Carries out one of COMMANDS. Returns False when the chat is over.

        Raises: UserError on an unknown command or an impossible value.
        """
        if name == "/help":
            self.note("\n".join(f"{command:8}  {text}" for command, text in COMMANDS.items()))
        elif name == "/clear":
            self.history.clear()
            self.note("[the conversation is forgotten]")
        elif name == "/system":
            if self.continues_text:
                raise UserError("A pretrained model continues text and knows no system turn.")
            self.system = rest
            self.note(f"[system turn: {rest}]" if rest else "[no system turn]")
        elif name == "/set":
            self.change_setting(rest)
        elif name != "/exit":
            raise UserError(f"{name} is no command: /help lists them. To send it as text, put a blank in front.")
        return name != "/exit"

    def change_setting(self, text: str) -> None:
        """`NAME VALUE` or `NAME=VALUE` sets and shows one setting, an empty text shows all."""
        name, _, value = text.replace("=", " ", 1).partition(" ")
        if name:
            settings = self.settings.changed(name, value.strip())
            check_length(settings, self.model)
            self.settings = settings
            if name == "seed":
                self.generator.manual_seed(settings.seed)
        values = dataclasses.asdict(self.settings)
        for shown in [name] if name else values:
            self.note(f"{shown} = {'auto' if values[shown] is None else values[shown]}")


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
        chat.history.clear()
        print(file=chat.out)
        if not finished:
            return 130
    return 0


# --- Command line -----------------------------------------------------------------------------------------------------


def add_weight_flags(parser: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
    """Adds what `find_model` and `load_all` read; the `add_argument` of their group comes back for what else says which
    weights."""
    modes = ", ".join(f"{i} {stage}" for i, stage in enumerate(MODE_STAGES))
    add = parser.add_argument_group("which weights").add_argument
    add("--load", type=int, choices=(0, 1), default=0, help="0: own weights in --out_dir, 1: transformers folder (0)")
    add("--model_mode", type=int, choices=range(len(MODE_STAGES)), help=f"{modes} (the newest in --out_dir)")
    add("--weights", type=Path, metavar="PATH", help="a .pth file or a transformers folder, wherever it is")
    add("--model_path", type=Path, default=Path("MiniMind2"), help="the folder for --load 1 (./MiniMind2)")
    add("--tokenizer", type=Path, metavar="FOLDER", help="another tokenizer than that of the weights")
    add("--out_dir", type=Path, default=ROOT / "out", help="folder of the weights (out/ of the project)")
    add("--hidden_size", type=int, help="take only weights of this width, for example 512 (any)")
    add("--num_hidden_layers", type=int, help="insist on this many layers (as saved)")
    add("--use_moe", action=BoolFlag, help="take only mixture-of-experts weights, or only dense ones (any)")
    add("--device", help="cpu, cuda, cuda:1 or mps (the best there is)")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="arithmetic (half precision on CUDA, else float32)")
    return add


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Chat with a trained model, or score it on test questions. Defaults stand in brackets.",
        allow_abbrev=False,
    )
    add = add_weight_flags(parser)
    add("--lora_name", metavar="NAME", help="adapter to apply, OUT_DIR/lora/NAME_512.pth (none)")
    add("--compile", action=BoolFlag, default=False, help="wait a minute, then chat at twice the speed (off)")

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
    add("--history_cnt", type=int, default=Settings.history_cnt, help="earlier turns in the prompt, 2 an exchange (6)")
    add("--seed", type=int, help="same seed, same text (a new one each time; it is printed)")
    add("--enable_thinking", action=BoolFlag, help="ask for a thought first, or for none (as the chat template has it)")
    args = parser.parse_args(argv)
    for name, low in (("batch_size", 1), ("show_wrong", 0)):
        if getattr(args, name) < low:
            parser.error(f"--{name} {getattr(args, name)} is impossible: expected {low} or more")
    if args.json and not args.questions:
        parser.error("--json writes the scores of --questions FILE: give both")
    return args


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
    stage = read_about(path).get("stage")
    return stage if stage in STAGES else None


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
    sizes = {name: getattr(args, name) for name in ("hidden_size", "num_hidden_layers", "use_moe")}
    model = load_model(path, device, pick_dtype(args.dtype, device), **sizes)
    ours = model.config.model_type == "minimind"
    folder = args.tokenizer or read_about(path).get("tokenizer")
    if folder is None and path.is_dir() and (not ours or (path / "tokenizer.json").is_file()):
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
        adapter = weight_path(args.out_dir / "lora", args.lora_name, model.config)
        if not adapter.is_file():
            raise UserError(f"{adapter} does not exist: check --lora_name and --out_dir, or train it first.")
        load_lora(model, adapter)
    return model, tokenizer


def run(args: argparse.Namespace) -> int:
    """Loads the model and does what was asked for. Returns the exit status: 0, or 130 after Ctrl-C."""
    settings = Settings(
        **{name: getattr(args, name) for name in
           ("temperature", "top_p", "top_k", "repetition_penalty", "history_cnt", "enable_thinking")},
        max_new_tokens=args.max_new_tokens if args.max_new_tokens is not None else 48 if args.questions else 512,
        max_seq_len=args.max_seq_len if args.max_seq_len is not None else Settings.max_seq_len,
        seed=args.seed if args.seed is not None else random.randrange(2**31),
    )  # fmt: skip
    if args.questions and not args.questions.is_file():  # before minutes of loading
        raise UserError(f"{args.questions} is no file; `python dataset/make_demo_data.py` writes test questions.")
    if args.json:
        check_writable(args.json.parent, "--json")
    path, stage = find_model(args)
    device = find_device(args.device)
    continues_text = stage == "pretrain"
    if continues_text and args.system:
        raise UserError("--system needs a model that chats; these are pretrained weights, which continue text.")
    model, tokenizer = load_all(args, path, device)
    if args.max_seq_len is None:
        limit = getattr(model.config, "max_position_embeddings", None) or settings.max_seq_len
        settings = dataclasses.replace(settings, max_seq_len=min(settings.max_seq_len, limit))
    check_length(settings, model)

    decoder = None
    if isinstance(model, MiniMindForCausalLM) and not args.questions:
        decoder = Decoder(model, 1, settings.max_seq_len, compile=args.compile)
    chat = Chat(
        model, tokenizer, settings, continues_text=continues_text, system=args.system, colour=shows_colour(),
        notes=sys.stdout if args.prompt is None else sys.stderr,
        generate=functools.partial(stream_generate, decoder=decoder),
    )  # fmt: skip
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    facts = [
        f"{shown} + LoRA {args.lora_name}" if args.lora_name else str(shown),
        stage or "chat",
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters",
        f"{device} {str(model.dtype).removeprefix('torch.')}",
    ]
    chat.note(" · ".join(facts if args.questions else [*facts, f"seed {settings.seed}"]))
    if args.questions:
        if continues_text:
            chat.note("[pretrained weights have not seen the chat format: expect little of the scores]")
        scores = run_questions(
            model, tokenizer, args.questions, max_new_tokens=settings.max_new_tokens, max_seq_len=settings.max_seq_len,
            enable_thinking=settings.enable_thinking, system=args.system, batch_size=args.batch_size,
            show_wrong=args.show_wrong,
        )  # fmt: skip
        if args.json:
            with atomic_open(args.json, "w") as file:
                json.dump({"weights": str(path), "stage": stage, **scores}, file, ensure_ascii=False, indent=2)
        return 0
    if args.prompt is not None:
        return 0 if chat.ask(args.prompt) else 130

    read, mode, first = line_reader(list(COMMANDS)), args.mode, ""
    if mode is None:
        print("[0] built-in prompts  [1] manual chat  (or just type your first message)")
        try:
            choice = read().strip()
        except (EOFError, KeyboardInterrupt):
            return 0
        mode, first = "auto" if choice == "0" else "manual", "" if choice in ("0", "1") else choice
    if mode == "auto":
        return run_prompts(chat, PRETRAIN_PROMPTS if continues_text else CHAT_PROMPTS)
    chat.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.")
    run_manual(chat, read, first)
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: status 0, 130 after Ctrl-C; errors are left to `run_script`."""
    if hasattr(sys.stdin, "reconfigure"):  # a pipe or a Windows console may have another encoding
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    args = parse_args(argv)
    transformers_logging.disable_progress_bar()
    sys.exit(run(args))


if __name__ == "__main__":
    run_script(main)
