"""Is an export the same model? Its logits on real text against those of the original, in float32.

An export is compared with the original *rounded to the type it was written in*, so that nothing but the last bits of
float32 sums may differ, whatever that type is: a mistake cannot hide behind rounding. What the rounding itself costs
is reported beside it.

Dimension legend: B rows · T tokens · V vocabulary.

中文：检验导出是否与原模型一致：在真实文本上比较 logits。
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trainer.command_line import UserError

EXACT = 1e-5  # of the largest logit, or of 1 where all are smaller: what summing in another order changes
LONGEST = 256  # tokens of a row
CHILD_SECONDS = 600

TEXTS = (
    "The harbour wakes before the town does. Gulls quarrel over the first boats, a lorry coughs, and somebody has "
    "already burnt the coffee. By seven the fish are sold, by eight the stalls are wet and empty, and the old men who "
    "bought nothing walk home slowly, arguing about the weather that everyone can see.",
    "清晨的菜市场最热闹。卖豆腐的老人把担子放在桥头，一边擦汗一边和熟客打招呼；孩子们背着书包从人群里挤过去，"
    "谁也不肯错过刚出锅的油条。太阳升起来以后，雾慢慢散了，河水又变得清清楚楚。",
    "Water boils at 100 °C at sea level, but at about 93.3 °C in a town 2,000 metres up; that is why rice takes longer "
    "there. 3 × 17 = 51, 81 - 50 = 31, and 1/8 = 0.125.",
    "第一步：把 200 克面粉倒进碗里，加 110 毫升温水（约 40℃）。第二步：揉 8 分钟，盖上湿布，等 30 分钟。"
    "What you see after that is called 面团, or dough.",
    'def mean(numbers):\n    """Average of a list; 0.0 when it is empty."""\n    total = 0.0\n    for n in numbers:\n'
    "        total += n\n    return total / len(numbers) if numbers else 0.0\n",
    "Grüße aus Köln! Ça va? Привет, мир. こんにちは。 안녕하세요 🙂👍🏽 — “quoted”, 50 % … \t tab\n\n two lines.",
)
ODD_TEXT = "<|im_start|>user\n<think>7</think><|im_end|> a  b\r\n\u3000\u200d𠮷 "
CHAT = [{"role": "system", "content": "S"}, {"role": "user", "content": "你好"}]
QUESTIONS = ("What is the capital of France?", "星期三的后一天是星期几？", "Sort 3, 12, 7 from small to large.")


class BadExport(UserError):
    """The export computes something else than the original."""


@dataclass(frozen=True)
class Difference:
    """How two models differ on the same tokens.

    largest |Δ logit|, in which row at which token; of_tokens (N,), the largest of each token; the largest |logit| of
    the original and the standard deviation of all; the share of tokens where both find the same token likeliest.
    """

    largest: float
    row: int
    token: int
    of_tokens: Tensor
    scale: float
    spread: float
    agreement: float

    @property
    def tokens(self) -> int:
        return len(self.of_tokens)


def read_texts(path: Path | None) -> tuple[str, ...]:
    """The paragraphs of a UTF-8 text file, or the built-in texts.  Raises: UserError."""
    if path is None:
        return TEXTS
    try:
        texts = tuple(filter(str.strip, path.read_text(encoding="utf-8").split("\n\n")))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--verify_text {path} cannot be read: {error}.") from error
    if not texts:
        raise UserError(f"--verify_text {path} is empty; expected UTF-8 text, paragraphs parted by an empty line.")
    return texts[:64]


def token_rows(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], positions: int, questions: Sequence[str] = QUESTIONS
) -> list[list[int]]:
    """The texts as pretraining saw them, questions in the chat template, and all of it as one long row."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = [bos + tokenizer.encode(text, add_special_tokens=False) for text in texts]
    if tokenizer.chat_template:
        for question in questions:
            turns = [{"role": "user", "content": question}]
            rows.append(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
    longest = min(LONGEST, positions)
    joined = [token for row in rows for token in row][: min(2 * LONGEST, positions)]
    return [row[:longest] for row in rows if row] + [joined]


@torch.inference_mode()
def logits_of(model: PreTrainedModel, rows: Sequence[Sequence[int]], what: str = "verifying") -> list[Tensor]:
    """Float32 logits of each row.  Shape: one (T, V) per row."""
    bar = tqdm(rows, desc=what, unit="text", disable=None, leave=False)
    return [model(torch.tensor([row])).logits[0].float() for row in bar]


def difference(original: Sequence[Tensor], found: Sequence[Tensor]) -> Difference:
    """Compares logits of the same rows. What is no number counts as infinitely far off."""
    deltas = [(a - b).abs().nan_to_num(torch.inf, torch.inf).amax(-1) for a, b in zip(original, found, strict=True)]
    row = max(range(len(deltas)), key=lambda i: float(deltas[i].max()))
    flat = torch.cat([a.flatten() for a in original])
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(original, found, strict=True)])
    return Difference(
        largest=float(deltas[row].max()),
        row=row,
        token=int(deltas[row].argmax()),
        of_tokens=torch.cat(deltas),
        scale=float(flat.abs().max()),
        spread=float(flat.std()),
        agreement=float(same.float().mean()),
    )


def float32_noise(model: PreTrainedModel, rows: Sequence[Sequence[int]], found: Sequence[Tensor]) -> float:
    """What float32 itself changes: the largest difference to the same model in float64.

    A deep network can amplify the last bits of a sum beyond `EXACT`, whoever computes it.  Args: found, its logits in
    float32.
    """
    return difference(logits_of(copy.deepcopy(model).double(), rows, "in float64"), found).largest


def check(
    what: str,
    original: Sequence[Tensor],
    found: Sequence[Tensor],
    share: float | None = None,
    beyond: float = 0.0,
    noise: Callable[[], float] | None = None,
) -> Difference:
    """Prints the largest difference and passes judgement.

    Args: share, of the standard deviation of the logits that may differ; None: `EXACT`. beyond, share of the tokens
    that may differ by more: where two experts are equally likely but for the last bits, a router may choose the other.
    noise, asked where that is not enough: what may differ in any case.
    Raises: BadExport when they differ by more.
    """
    d = difference(original, found)
    allowed = EXACT * max(d.scale, 1.0) if share is None else share * d.spread

    def further() -> int:
        return int((d.of_tokens > allowed).sum())

    if noise and further() > beyond * d.tokens:
        allowed = max(allowed, noise())
    good = further() <= beyond * d.tokens
    exceptions = f" but for {further()} tokens, of {int(beyond * d.tokens)}" if beyond and further() else ""
    print(
        f"  {what}: largest logit difference {d.largest:.2e} (allowed {allowed:.1e}{exceptions}; the largest logit is "
        f"{d.scale:.1f}), same likeliest token at {d.agreement:.2%} of {d.tokens:,} tokens: "
        f"{'good' if good else 'NOT GOOD'}",
        flush=True,
    )
    if not good:
        raise BadExport(
            f"the export is not the same model: {what} differs by {d.largest:.3g} at text {d.row + 1}, token "
            f"{d.token + 1}, where {allowed:.1e} is allowed."
        )
    return d


def report_rounding(dtype: str, original: Sequence[Tensor], rounded: Sequence[Tensor]) -> Difference:
    """Prints what the type alone changes."""
    d = difference(original, rounded)
    change = f"moves logits by at most {d.largest:.2e}" if d.largest else "changes nothing"
    print(
        f"  rounding to {dtype} {change}, same likeliest token at {d.agreement:.2%} of {d.tokens:,} tokens", flush=True
    )
    return d


def tokenizer_facts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text and of an odd one, and of a chat where there is a template."""
    facts = [tokenizer.encode(text) for text in (*texts, ODD_TEXT)]
    if tokenizer.chat_template:
        facts.append(tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False))
    return facts


def check_tokenizer(found: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> None:
    """The `tokenizer_facts` of an export against ours.  Raises: BadExport."""
    expected = tokenizer_facts(tokenizer, texts)
    for i, ids in enumerate(expected):
        if i >= len(found) or list(found[i]) != ids:
            what = repr((*texts, ODD_TEXT)[i][:60]) if i <= len(texts) else "a chat"
            raise BadExport(f"the exported tokenizer reads {what} as other tokens.")
    print(f"  tokenizer and chat template: the same tokens for {len(expected)} texts", flush=True)


CLEAN_CODE = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.disable_progress_bar()
folder, chat, rows, texts, out = sys.argv[1:]
texts = json.load(open(texts, encoding="utf-8"))
with np.load(rows, allow_pickle=False) as file:
    rows = [file[name] for name in file.files]
local = {"trust_remote_code": True, "local_files_only": True}
model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **local)
if report["missing_keys"] or report["unexpected_keys"]:
    sys.exit(f"missing {report['missing_keys']}, unexpected {report['unexpected_keys']}")
with torch.inference_mode():
    found = [model.eval()(torch.from_numpy(row)[None]).logits[0].float().numpy() for row in rows]
tokenizer = AutoTokenizer.from_pretrained(folder, **local)
found += [np.array(tokenizer.encode(text)) for text in texts]
if tokenizer.chat_template:
    ids = tokenizer.apply_chat_template(json.loads(chat), add_generation_prompt=True, return_dict=False)
    found.append(np.array(ids))
np.savez(out, *found)
"""


def run_child(
    code: str, arguments: Sequence[str], rows: Sequence[Sequence[int]], texts: Sequence[str]
) -> list[np.ndarray]:
    """Runs code in a process of its own that sees nothing of this project, and reads the arrays it saved.

    The code gets the arguments, a file with the rows of token ids, one with the texts, and where to save. A crash of a
    native library ends that process and not this one.

    Raises: BadExport with the last line it wrote when it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, words, saved = (Path(folder) / name for name in ("rows.npz", "texts.json", "found.npz"))
        np.savez(given, *[np.array(row, dtype=np.int64) for row in rows])
        words.write_text(json.dumps(list(texts)), encoding="utf-8")
        environment = {
            **os.environ, "HF_MODULES_CACHE": str(Path(folder) / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1",
            "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }  # fmt: skip
        python = [sys.executable, "-I", "-X", "utf8"]
        command = [*python, "-c", code, *map(str, arguments), str(given), str(words), str(saved)]
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, timeout=CHILD_SECONDS, encoding="utf-8",
                errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise BadExport(f"loading the export took more than {CHILD_SECONDS} s.") from error
        if done.returncode or not saved.is_file():
            reason = (done.stderr.strip().splitlines() or ["no word"])[-1][:300]
            raise BadExport(f"the export does not load (status {done.returncode}): {reason}.")
        with np.load(saved, allow_pickle=False) as file:
            return [file[name] for name in file.files]


def run_clean(
    folder: Path, rows: Sequence[Sequence[int]], texts: Sequence[str]
) -> tuple[list[Tensor], list[list[int]]]:
    """Logits and `tokenizer_facts` of a transformers folder in a clean process, with its remote code: our own module,
    written a moment ago.  Raises: BadExport when it does not load.
    """
    arrays = run_child(CLEAN_CODE, [str(folder.absolute()), json.dumps(CHAT)], rows, [*texts, ODD_TEXT])
    return [torch.from_numpy(array) for array in arrays[: len(rows)]], [a.tolist() for a in arrays[len(rows) :]]
