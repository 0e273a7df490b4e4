"""A GGUF file under llama.cpp itself, where the package llama-cpp-python is installed: tokens, logits, greedy text.

It runs in a process of its own: llama.cpp ends its process where something does not fit.

中文：用 llama.cpp 本身检验 GGUF 文件：分词、logits、贪心生成的文本。
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scripts.converting.verify import run_child

# The cache in float32 and no flash attention: llama.cpp's own defaults round keys and values to float16.
CODE = """
import json, sys
import llama_cpp, numpy as np
path, new_tokens, rows, texts, out = sys.argv[1:]
with np.load(rows, allow_pickle=False) as file:
    rows = [file[name] for name in file.files]
longest = max(len(row) for row in rows) + int(new_tokens)
llama = llama_cpp.Llama(
    path, n_ctx=longest, n_batch=longest, n_ubatch=longest, logits_all=True, type_k=0, type_v=0, flash_attn=False,
    n_threads=1, n_threads_batch=1, verbose=False,
)
found = {}
for i, row in enumerate(rows):
    llama.reset()
    llama.eval(row.tolist())
    found[f"logits{i}"] = llama.scores[: len(row)].copy()
for i, row in enumerate(rows if int(new_tokens) else []):
    llama.reset()
    written = []
    for token in llama.generate(row.tolist(), temp=0.0, repeat_penalty=1.0):
        written.append(token)
        if len(written) == int(new_tokens):
            break
    found[f"greedy{i}"] = np.array(written)
for i, text in enumerate(json.load(open(texts, encoding="utf-8"))):
    for special in (False, True):
        ids = llama.tokenize(text.encode(), add_bos=False, special=special)
        found[f"tokens{i}{special}"] = np.array(ids, dtype=np.int64)
np.savez(out, **found)
llama.close()
"""


@dataclass(frozen=True)
class Found:
    """What llama.cpp said: logits of each row (T, V); the greedy continuation of each row; the tokens of each text,
    control tokens read as text and as tokens."""

    logits: list[Tensor]
    greedy: list[list[int]]
    plain: list[list[int]]
    special: list[list[int]]


def installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def run_llama_cpp(path: Path, rows: Sequence[Sequence[int]], texts: Sequence[str] = (), new_tokens: int = 0) -> Found:
    """Runs a file.  Raises: BadExport when llama.cpp refuses it."""
    arrays = iter(run_child(CODE, [str(path.absolute()), str(new_tokens)], rows, texts))
    logits = [torch.from_numpy(next(arrays)) for _ in rows]
    greedy = [next(arrays).tolist() for _ in (rows if new_tokens else ())]
    tokens: list[np.ndarray] = list(arrays)
    return Found(logits, greedy, [t.tolist() for t in tokens[::2]], [t.tolist() for t in tokens[1::2]])
