"""Takes a model where it is wanted: transformers, stock architectures, GGUF for llama.cpp and Ollama, PEFT, and back.

    python scripts/convert_model.py to-stock --model out/full_sft_512.pth     # Llama, or a stock mixture of experts
    python scripts/convert_model.py to-gguf --model full_sft --dtype q8_0     # llama.cpp, Ollama; a Modelfile beside it
    python scripts/convert_model.py to-transformers                           # our own classes, as remote code
    python scripts/convert_model.py to-pth --model folder/of/MiniMind2 --to out/full_sft_768.pth
    python scripts/convert_model.py merge-lora --lora out/lora/identity_512.pth --to out/identity_512.pth
    python scripts/convert_model.py lora-to-peft --lora out/lora/identity_512.pth --to out/export/identity-peft
    python scripts/convert_model.py lora-from-peft --lora out/export/identity-peft --to out/lora/back_512.pth
    python scripts/convert_model.py verify --model full_sft --export out/export/full_sft_512-llama

`--model` is a stage (the newest of its weights in `--out_dir`), a `.pth` file, a transformers folder (MiniMind, Llama,
GraniteMoeShared, Mixtral) or, for to-pth, a ZeRO checkpoint of DeepSpeed. Nothing in it is executed.

Every export is loaded again before it gets its name, and its logits on real text are compared with those of the
original; one that differs by more than float32 sums may is thrown away, and the status is 2. What cannot be expressed
exactly is refused. How each form is made stands in scripts/converting/.

中文：把模型转换为 transformers、标准架构、GGUF（llama.cpp、Ollama）或 PEFT，也可反向转换；导出后核对 logits。
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.model_lora import load_lora, lora_state_dict, merge_lora, save_lora, save_peft
from model.model_minimind import MiniMindForCausalLM
from model.weights import STAGES, find_weights, load_model, save_weights
from scripts.converting import checks, stock_architectures, verify, zero_checkpoint
from scripts.converting.folders import (
    Source,
    build_model,
    model_type,
    new_place,
    open_source,
    read_config_from,
    rounded,
    write_folder,
)
from scripts.converting.model_card import model_card
from scripts.converting.ollama import modelfile
from trainer.command_line import BoolFlag, UserError, check_writable, run_script

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")


class Steps:
    """Announces the steps of a conversion, with the seconds since its start."""

    def __init__(self, total: int):
        self.total, self.done, self.start = total, 0, time.perf_counter()

    def say(self, text: str) -> None:
        self.done += 1
        print(f"[{self.done}/{self.total}, {time.perf_counter() - self.start:.1f} s] {text}", flush=True)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- Where from, where to ---------------------------------------------------------------------------------------------


def find_model(args: argparse.Namespace) -> Path:
    """The path of `--model`, by default the newest weights.  Raises: WeightsError, UserError."""
    if args.model is None or args.model in STAGES:
        return find_weights(args.out_dir, args.model)
    path = Path(args.model)
    if not path.exists():
        raise UserError(f"--model {path} does not exist; expected a path or a stage: {', '.join(STAGES)}.")
    return path


def open_model(args: argparse.Namespace, steps: Steps) -> tuple[Source, Path]:
    path = find_model(args)
    steps.say(f"reading {path}")
    return open_source(path, args.tokenizer, args.config_from), path


def place_for(args: argparse.Namespace, source: Source, ending: str) -> Path:
    target = args.to or ROOT / "out" / "export" / f"{source.name}-{ending}"
    if target.suffix == ".pth":
        raise UserError(f"--to {target}: a folder is written here.")
    check_writable(target.absolute().parent, "--to")
    return target


def weight_file(args: argparse.Namespace) -> Path:
    if args.to.suffix != ".pth":
        raise UserError(f"--to {args.to}: a file that ends in .pth is written here, as out/full_sft_512.pth.")
    check_writable(args.to.absolute().parent, "--to")
    return args.to


def write_card(folder: Path, source: Source, form: str, type_name: str, figures: list[str]) -> None:
    text = model_card(source, form, type_name, figures)
    (folder / "README.md").write_text(text, encoding="utf-8", newline="\n")


# --- transformers, GGUF -----------------------------------------------------------------------------------------------


def to_folder(args: argparse.Namespace, stock: bool) -> None:
    """A transformers folder, of our own classes or of a stock architecture."""
    steps = Steps(4)
    source, path = open_model(args, steps)
    dtype = DTYPES.get(args.dtype, source.dtype)
    state = source.model.state_dict()
    if stock:
        config = stock_architectures.stock_config(source.config)
        kind, form = config.model_type, config.architectures[0]
        fields, state = stock_architectures.config_json(config), stock_architectures.to_stock(source.config, state)
    else:
        kind, form = "transformers", "minimind"
        fields = {**source.config.to_diff_dict(), "model_type": "minimind"}
        if source.config.tie_word_embeddings:
            del state["lm_head.weight"]
    target = place_for(args, source, "granite" if kind == "granitemoeshared" else kind)
    reference = rounded(source.model, dtype)
    with new_place(target, args.overwrite, (path,)) as folder:
        steps.say(f"writing {form} in {name_of(dtype)}")
        write_folder(folder, fields, state, dtype, source, remote_code=not stock)
        steps.say("comparing with the original on real text")
        figures = checks.check_folder(source, reference, folder, name_of(dtype), not stock, args.verify_text)
        write_card(folder, source, form, name_of(dtype), figures)
    steps.say(f"{target} is ready")


def gguf_module():
    if importlib.util.find_spec("gguf") is None:
        raise UserError("GGUF files need the package gguf: pip install gguf")
    from scripts.converting import gguf_export

    return gguf_export


def to_gguf(args: argparse.Namespace) -> None:
    """A folder with one GGUF file and a Modelfile."""
    gguf_export, steps = gguf_module(), Steps(4)
    source, path = open_model(args, steps)
    target = place_for(args, source, f"gguf-{args.dtype}")
    state, name = source.model.state_dict(), f"{source.name}-{args.dtype}.gguf"
    arch = gguf_export.architecture(source.config)
    reference = build_model(source.config, gguf_export.round_as_gguf(state, args.dtype), path)
    with new_place(target, args.overwrite, (path,)) as folder:
        steps.say(f"writing {name}, architecture {arch}")
        gguf_export.write_gguf(folder / name, source.config, state, source.tokenizer, args.dtype, source.name)
        text = modelfile(name, source.tokenizer, source.stage == "pretrain")
        (folder / "Modelfile").write_text(text, encoding="utf-8", newline="\n")
        steps.say("comparing with the original on real text")
        figures = checks.check_gguf(source, reference, folder / name, args.dtype, args.verify_text)
        write_card(folder, source, name, args.dtype, figures)
    steps.say(f"{target} is ready: {name}, Modelfile")


# --- Back to our own file, and LoRA -----------------------------------------------------------------------------------


def to_pth(args: argparse.Namespace) -> None:
    """Our half-precision state dict with its JSON, from any model that can be read here."""
    weight_file(args)
    steps, path = Steps(4), find_model(args)
    if not (path.is_dir() and zero_checkpoint.is_zero_checkpoint(path)):
        source, _ = open_model(args, steps)
        write_pth(args, steps, source.model, source.about(), source.model, (path,))
        return
    steps.say(f"joining the pieces of {path}")
    config = read_config_from(args.config_from) if args.config_from else zero_checkpoint.run_config(path)
    model = build_model(config, zero_checkpoint.read_zero_checkpoint(path), path)
    about = {"tokenizer": str(args.tokenizer.resolve())} if args.tokenizer else {}
    write_pth(args, steps, model, about, model, (path,))


def write_pth(
    args: argparse.Namespace, steps: Steps, model: MiniMindForCausalLM, about: dict, original, keep: tuple[Path, ...]
) -> None:
    """Args: model, whose weights are written; original, which they are compared with; keep as `new_place`."""
    target, reference = args.to, rounded(model, torch.float16)
    with new_place(target, args.overwrite, keep) as folder:
        steps.say(f"writing {target}")
        save_weights(model, folder / target.name, about)
        steps.say("comparing with the original on real text")
        source = open_source(folder / target.name, args.tokenizer)
        _, rows = checks.rows_to_compare(source, args.verify_text)
        expected, before = verify.logits_of(reference, rows, "original"), verify.logits_of(original, rows, "original")
        if original is not model:
            merged = verify.logits_of(model, rows, "merged")
            checks.check_equal("merged, float32", source, original, rows, before, merged)
        verify.check("read back, float32", expected, verify.logits_of(load_model(folder / target.name), rows, "export"))
        verify.report_rounding("float16", before, expected)
    steps.say(f"{target} is ready")


def merge(args: argparse.Namespace) -> None:
    """Base and adapter become one weight file, compared with the base that carries the adapter."""
    weight_file(args)
    steps = Steps(4)
    source, path = open_model(args, steps)
    original = open_source(path, args.tokenizer, args.config_from).model
    for model in (source.model, original):
        load_lora(model, args.lora)
    write_pth(args, steps, merge_lora(source.model), source.about(), original, (path, args.lora))


def lora_to_peft(args: argparse.Namespace) -> None:
    """An adapter as a folder of peft."""
    steps = Steps(4)
    source, path = open_model(args, steps)
    target = place_for(args, source, "")
    config = load_lora(source.model, args.lora)
    _, rows = checks.rows_to_compare(source, args.verify_text)
    expected = verify.logits_of(source.model, rows, "original")
    with new_place(target, args.overwrite, (path, args.lora)) as folder:
        steps.say(f"writing {target}")
        save_peft(source.model, folder, config)
        steps.say("comparing with the original on real text")
        plain = open_source(path, args.tokenizer, args.config_from).model
        checks.check_peft(source, plain, folder, rows, expected)
    steps.say(f"{target} is ready")


def lora_from_peft(args: argparse.Namespace) -> None:
    """A folder of peft as an adapter file of ours, half precision."""
    weight_file(args)
    steps = Steps(4)
    source, path = open_model(args, steps)
    config = load_lora(source.model, args.lora)
    _, rows = checks.rows_to_compare(source, args.verify_text)
    original = verify.logits_of(source.model, rows, "original")
    with new_place(args.to, args.overwrite, (path, args.lora)) as folder:
        steps.say(f"writing {args.to}")
        save_lora(source.model, folder / args.to.name, config, extra=source.about())
        steps.say("comparing with the original on real text")
        again = open_source(path, args.tokenizer, args.config_from).model
        load_lora(again, folder / args.to.name)
        for tensor in lora_state_dict(source.model).values():  # the parameters themselves
            tensor.copy_(tensor.half())
        expected = verify.logits_of(source.model, rows, "original")
        verify.check("read back, float32", expected, verify.logits_of(again, rows, "export"))
        verify.report_rounding("float16", original, expected)
    steps.say(f"{args.to} is ready")


# --- An export that is there already ----------------------------------------------------------------------------------


def verify_export(args: argparse.Namespace) -> None:
    """Compares it, tokenizer included, with the original rounded as it is. Code in a folder is not run."""
    steps, export = Steps(2), args.export
    source, path = open_model(args, steps)
    if not export.exists():
        raise UserError(f"--export {export} does not exist.")
    steps.say(f"comparing {export} with {path} on real text")
    if export.is_dir() and (files := sorted(export.glob("*.gguf"))):
        export = files[0]
    if export.suffix == ".gguf":
        gguf_export = gguf_module()
        _, kind = gguf_export.open_gguf(export)
        reference = build_model(source.config, gguf_export.round_as_gguf(source.model.state_dict(), kind), path)
        checks.check_gguf(source, reference, export, kind, args.verify_text)
        return
    other = open_source(export)
    reference, kind = rounded(source.model, other.dtype), name_of(other.dtype)
    if export.is_dir() and model_type(export) in stock_architectures.ARCHITECTURES:  # as everybody else loads it
        checks.check_folder(source, reference, export, kind, False, args.verify_text)
        return
    texts, rows = checks.rows_to_compare(source, args.verify_text)
    expected = verify.logits_of(reference, rows, "original")
    verify.check("the export, float32", expected, verify.logits_of(other.model, rows, "export"))
    verify.report_rounding(kind, verify.logits_of(source.model, rows, "original"), expected)
    verify.check_tokenizer(verify.tokenizer_facts(other.tokenizer, texts), source.tokenizer, texts)


# --- Command line -----------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert a model. Defaults stand in brackets.", allow_abbrev=False)
    commands = parser.add_subparsers(title="what to do", dest="command", metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str, model: str) -> Callable:
        about = f"{text}. Defaults stand in brackets."
        sub = commands.add_parser(name, help=text, description=about, allow_abbrev=False)
        sub.set_defaults(run=run)
        add, sizes = sub.add_argument, "a config.json, or a .pth file with its JSON"
        add("--model", help=f"{model} (the newest weights in --out_dir)")
        add("--out_dir", type=Path, default=ROOT / "out", help="where the weights of a stage are (out/ of the project)")
        add("--tokenizer", type=Path, metavar="FOLDER", help="another tokenizer than that of the weights")
        add("--config_from", type=Path, metavar="FILE", help=f"sizes of weights that do not tell them: {sizes}")
        add("--verify_text", type=Path, metavar="FILE", help="UTF-8 text to compare on (built-in texts)")
        return add

    one = "a stage, a .pth file or a transformers folder"
    many = "a .pth file, a folder of MiniMind, Llama, GraniteMoeShared or Mixtral, or a ZeRO checkpoint"
    base = "the base the adapter was trained on: a stage, a .pth file or a folder"
    own = command("to-transformers", lambda args: to_folder(args, False), "A folder of our classes, code included", one)
    what = "A folder of a stock architecture: Llama, GraniteMoeShared, Mixtral"
    stock = command("to-stock", lambda args: to_folder(args, True), what, one)
    gguf = command("to-gguf", to_gguf, "A GGUF file for llama.cpp, a Modelfile for Ollama", one)
    pth = command("to-pth", to_pth, "Our own half-precision weight file", many)
    merged = command("merge-lora", merge, "Base and adapter as one weight file", base)
    peft = command("lora-to-peft", lora_to_peft, "An adapter as a folder of the peft library", base)
    back = command("lora-from-peft", lora_from_peft, "An adapter of the peft library as a file of ours", base)
    again = command("verify", verify_export, "Compare an export that is there with its original", one)
    for add in (own, stock):
        add("--dtype", choices=["auto", *DTYPES], default="auto", help="type of the numbers (as they are stored)")
        add("--to", type=Path, metavar="FOLDER", help="where to (out/export/NAME-llama and the like)")
    gguf("--dtype", choices=GGUF_TYPES, default="f16", help="type of the matrices (f16)")
    gguf("--to", type=Path, metavar="FOLDER", help="where to (out/export/NAME-gguf-DTYPE)")
    for add in (merged, peft, back):
        add("--lora", type=Path, required=True, help="the adapter: a .pth file, or a folder of peft")
    for add in (pth, merged, back):
        add("--to", type=Path, required=True, metavar="FILE", help="for example out/full_sft_768.pth")
    peft("--to", type=Path, required=True, metavar="FOLDER", help="where to")
    for add in (own, stock, gguf, pth, merged, peft, back):
        add("--overwrite", action=BoolFlag, default=False, help="replace an earlier export (off)")
    again("--export", type=Path, required=True, help="a transformers folder, a .pth file or a GGUF file")
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        parser.exit()
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    transformers_logging.disable_progress_bar()
    args.run(args)


if __name__ == "__main__":
    run_script(main)
