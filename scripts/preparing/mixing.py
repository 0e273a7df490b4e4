"""Several files as one, in given shares and random order, without reading any of them into memory.

Of every record only its place is kept (some 30 bytes); records are then copied one by one in the drawn order.

中文：按给定比例混合多个文件并随机打乱；内存中只保存每条记录的位置，不读入全文。
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dataset import json_lines
from trainer.command_line import UserError

BOM = b"\xef\xbb\xbf"


@dataclass
class Places:
    """Where the good records of a file begin and how long they are, in bytes."""

    path: Path
    starts: array = field(default_factory=lambda: array("Q"))
    sizes: array = field(default_factory=lambda: array("L"))

    def mean_bytes(self) -> float:
        return sum(self.sizes) / len(self.sizes)


def find_places(
    path: Path, check: Callable[[dict], object], bad: Callable[[str, str], None], step: Callable[[], object] = int
) -> Places:
    """The places of the records that `check` takes.

    Args: bad: called with place and reason of every other record, and may raise; step: called after every line.
    """
    places, start = Places(path), 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            body = line.removeprefix(BOM) if start == 0 else line
            record = body.strip()
            if record:
                try:
                    check(json_lines.parse_line(record))
                    places.starts.append(start + len(line) - len(body.lstrip()))
                    places.sizes.append(len(record))
                except ValueError as error:
                    bad(f"{path} line {number}", str(error))
            start += len(line)
            step()
    return places


def share_out(sources: list[Places], weights: list[float], records: int | None, by: str) -> list[int]:
    """How many records each source gives.

    Args: weights: any scale, in the order of the sources; records: in all, None for as many as need no repetition;
        by: "records" or "bytes", of which the weights are shares.
    Raises: UserError when a source is empty, or the result would be.
    """
    for source in sources:
        if not source.starts:
            raise UserError(f"{source.path} holds no good record, so it has nothing to mix in.")
    shares = np.array(weights, float)
    if by == "bytes":
        shares = shares / [source.mean_bytes() for source in sources]
    shares /= shares.sum()
    if records is None:
        records = int(min(len(s.starts) / share for s, share in zip(sources, shares, strict=True)) + 1e-9)
    counts = np.floor(shares * records + 1e-9).astype(int)
    for i in np.argsort(-(shares * records - counts), kind="stable")[: records - counts.sum()]:  # largest remainders
        counts[i] += 1
    if not counts.all():
        raise UserError(f"{records} records are too few for shares of {', '.join(f'{s:.2%}' for s in shares)}.")
    return counts.tolist()


def draw_order(sizes: list[int], counts: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(source, record) of every line of the mixture, in its order.

    A source that gives more records than it has gives all of them equally often, give or take one.
    Shape: two (N,) arrays, N = sum of `counts`.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for size, count in zip(sizes, counts, strict=True):
        rounds, rest = divmod(count, size)
        chosen += [np.arange(size)] * rounds + [rng.permutation(size)[:rest]]
    source = np.repeat(np.arange(len(sizes), dtype=np.uint16), counts)
    order = rng.permutation(len(source))
    return source[order], np.concatenate(chosen)[order]
