"""One check for each form of export: it is loaded again and compared with the original (verify.py).

Each returns sentences for the model card and raises BadExport when the export is not good.

中文：对每种导出形式的检验：重新加载并与原模型比较。
"""

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.generation import Decoder, Sampling
from model.model_lora import load_lora
from model.model_minimind import MiniMindForCausalLM
from scripts.converting import llama_cpp_check, verify
from scripts.converting.folders import Source, build_model
from scripts.converting.verify import BadExport

# What llama.cpp's logits may differ by, as a share of their standard deviation. In f32 that holds for every token; in
# the other types for the middle one: there llama.cpp rounds the activations too, and a mistake moves every token.
LLAMA_CPP_SHARE = {"f32": 1e-4, "f16": 0.02, "bf16": 0.1, "q8_0": 0.3}
# Share of the tokens at which a router may choose the other of two experts that are equal but for rounding.
OTHER_EXPERT = {"exact": 0.01, "f32": 0.05}
GREEDY_TOKENS = 24
# How many times what float32 itself changes another implementation may differ by. Measured on 16 layers of large random
# weights: transformers 1.7 times, llama.cpp 5.7 times.
NOISE, LLAMA_CPP_NOISE = 4, 16


def beyond(source: Source, kind: str) -> float:
    """The share of tokens that may differ by more than is allowed."""
    return OTHER_EXPERT.get(kind, 0.5) if source.config.use_moe or kind not in OTHER_EXPERT else 0.0


def rows_to_compare(source: Source, text_file: Path | None) -> tuple[tuple[str, ...], list[list[int]]]:
    """(texts, token rows) to compare on."""
    texts = verify.read_texts(text_file)
    questions = () if source.stage == "pretrain" else verify.QUESTIONS
    return texts, verify.token_rows(source.tokenizer, texts, source.config.max_position_embeddings, questions)


def check_equal(
    what: str, source: Source, reference: MiniMindForCausalLM, rows: list[list[int]], expected, found
) -> verify.Difference:
    """Another implementation in float32, equal but for the order of sums.  Args: expected, the reference's logits."""

    def noise() -> float:
        return NOISE * verify.float32_noise(reference, rows, expected)

    return verify.check(what, expected, found, None, beyond(source, "exact"), noise)


def check_folder(
    source: Source, reference: MiniMindForCausalLM, folder: Path, type_name: str, clean: bool, text_file: Path | None
) -> list[str]:
    """Args: reference, the original in the type of the folder; clean, in a process of its own."""
    texts, rows = rows_to_compare(source, text_file)
    expected = verify.logits_of(reference, rows, "original")
    found, tokens = verify.run_clean(folder, rows, texts) if clean else run_stock(folder, rows, texts)
    d = check_equal("transformers, float32", source, reference, rows, expected, found)
    cost = verify.report_rounding(type_name, verify.logits_of(source.model, rows, "original"), expected)
    verify.check_tokenizer(tokens, source.tokenizer, texts)
    return [
        f"largest logit difference to the original weights in {type_name}: {d.largest:.1e} (float32 arithmetic, "
        f"{d.tokens:,} tokens of real text, largest logit {d.scale:.1f})",
        f"what storing them as {type_name} itself changes: {cost.largest:.1e}",
    ]


def run_stock(
    folder: Path, rows: Sequence[Sequence[int]], texts: Sequence[str]
) -> tuple[list[Tensor], list[list[int]]]:
    """Logits and `tokenizer_facts` of a folder that needs no code of ours.  Raises: BadExport."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise BadExport(f"the export does not load: {' '.join(str(error).split())[:300]}.") from error
    if wrong := sorted(report["missing_keys"] | report["unexpected_keys"]):
        raise BadExport(f"the export lacks or does not know {wrong[0]}.")
    return verify.logits_of(model.eval(), rows, "export"), verify.tokenizer_facts(tokenizer, texts)


def check_peft(
    source: Source, plain: MiniMindForCausalLM, folder: Path, rows: list[list[int]], expected: Sequence[Tensor]
) -> None:
    """The adapter in a folder, on a plain model, by the peft library where it is installed."""
    if importlib.util.find_spec("peft"):
        peft = importlib.import_module("peft")  # no requirement of the project
        model, what = peft.PeftModel.from_pretrained(plain, str(folder)).eval(), "peft, float32"
    else:
        print("  peft itself was not run: pip install peft", flush=True)
        load_lora(plain, folder)
        model, what = plain, "read back, float32"
    check_equal(what, source, source.model, rows, expected, verify.logits_of(model, rows, "export"))


def check_gguf(
    source: Source, reference: MiniMindForCausalLM, file: Path, kind: str, text_file: Path | None
) -> list[str]:
    """Reads the file back and, where llama-cpp-python is installed, runs it."""
    from scripts.converting import gguf_export

    texts, rows = rows_to_compare(source, text_file)
    expected = verify.logits_of(reference, rows, "original")
    again = build_model(source.config, gguf_export.read_gguf(file, source.config, source.tokenizer)[0], file)
    d = verify.check("read back, float32", expected, verify.logits_of(again, rows, "export"))
    cost = verify.report_rounding(kind, verify.logits_of(source.model, rows, "original"), expected)
    figures = [
        f"read back from the file: largest logit difference {d.largest:.1e} on {d.tokens:,} tokens of real text",
        f"what rounding to {kind} itself changes: {cost.largest:.1e}, same likeliest token at {cost.agreement:.2%}",
    ]
    if not llama_cpp_check.installed():
        print("  llama.cpp itself was not run: pip install llama-cpp-python", flush=True)
        return [*figures, "llama.cpp itself was not run"]
    found = llama_cpp_check.run_llama_cpp(file, rows, texts)
    for text, ids in zip(texts, found.special, strict=True):
        if ids != source.tokenizer.encode(text, add_special_tokens=False):
            raise BadExport(f"llama.cpp reads {text[:60]!r} as other tokens.")

    def noise() -> float:
        return LLAMA_CPP_NOISE * verify.float32_noise(reference, rows, expected)

    share, exceptions = LLAMA_CPP_SHARE[kind], beyond(source, kind)
    d = verify.check(f"llama.cpp, {kind}", expected, found.logits, share, exceptions, noise)
    figures.append(f"llama.cpp: largest logit difference {d.largest:.1e}, same likeliest token at {d.agreement:.2%}")
    if kind == "f32":
        figures.append(check_greedy(source, reference, file, [row[: max(len(row) // 2, 1)] for row in rows]))
    return figures


def check_greedy(source: Source, reference: MiniMindForCausalLM, file: Path, starts: list[list[int]]) -> str:
    """llama.cpp's greedy continuations against ours."""
    found = llama_cpp_check.run_llama_cpp(file, starts, (), GREEDY_TOKENS).greedy
    decoder = Decoder(reference, len(starts), max(map(len, starts)) + GREEDY_TOKENS)
    ours = decoder.generate(starts, Sampling(temperature=0, max_new_tokens=GREEDY_TOKENS))
    other = [i for i, request in enumerate(ours) if request.tokens != found[i]]
    if len(other) > source.config.use_moe:  # one may have met two experts that are equal but for rounding
        decode, i = source.tokenizer.decode, other[0]
        raise BadExport(
            f"llama.cpp continues {decode(starts[i])[-40:]!r} with {decode(found[i])!r}, the original with "
            f"{decode(ours[i].tokens)!r}."
        )
    same = f"the same {GREEDY_TOKENS} tokens after {len(starts) - len(other)} of {len(starts)} beginnings"
    print(f"  llama.cpp, greedy: {same}", flush=True)
    return f"llama.cpp, greedy: {same}"
