"""Which records are set aside for validation, and which records share a row.

Legend: T tokens of a row, N records, S segments, R rows. A segment is what one record (or one piece of an over-long
document) contributes to a row.

中文：划分验证集，并用最佳适配把记录装箱成满行。
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dataset.cache_folder import write_meta
from dataset.token_cache import TokenCache


def pack_best_fit(lengths: np.ndarray, max_seq_len: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing bin packing: longest segment first, each into the fullest row that still has room for it.

    Segments of one length are interchangeable, so they are placed together: the work grows with the number of distinct
    lengths, not of segments. For rows of a language model: Ding et al. 2024, arXiv:2404.10830.

    Args:
        lengths: (S,) tokens per segment, each in 1 … max_seq_len.
        rng: mixes segments of equal length, and the rows.
    Returns:
        order: (S,) segment numbers, row by row; rows: (R + 1,) row r holds order[rows[r]:rows[r + 1]].
    """
    lengths = np.asarray(lengths)
    if not len(lengths):
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    if not 1 <= lengths.min() <= lengths.max() <= max_seq_len:
        raise ValueError(f"segment lengths {lengths.min()} … {lengths.max()}; expected 1 … {max_seq_len}")
    by_length = rng.permutation(len(lengths))
    by_length = by_length[np.argsort(-lengths[by_length], kind="stable")]
    room_rows: list[list[np.ndarray]] = [[] for _ in range(max_seq_len + 1)]  # rows by the room they have left
    rooms = 0  # bit r is set when room_rows[r] has rows
    row_of = np.empty(len(lengths), dtype=np.int64)  # aligned with by_length
    n_rows = 0

    def keep(rows: np.ndarray, room: int) -> None:
        nonlocal rooms
        if room and len(rows):
            room_rows[room].append(rows)
            rooms |= 1 << room

    distinct, starts = np.unique(-lengths[by_length], return_index=True)
    for length, at, end in zip(
        (-distinct).tolist(), starts.tolist(), [*starts[1:].tolist(), len(lengths)], strict=True
    ):
        while at < end:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1  # the least room that suffices
                rows = room_rows[room].pop()
                if not room_rows[room]:
                    rooms ^= 1 << room
            else:
                room = max_seq_len
                rows = np.arange(n_rows, n_rows + -(-(end - at) // (room // length)))
                n_rows += len(rows)
            each = room // length  # best fit puts the next equal segment into the row just used, as long as it fits
            n_full, rest = divmod(min(end - at, each * len(rows)), each)
            row_of[at : at + n_full * each] = np.repeat(rows[:n_full], each)
            keep(rows[:n_full], room - each * length)
            at += n_full * each
            used = n_full
            if rest:  # the last segments of this length fill one row in part
                row_of[at : at + rest] = rows[n_full]
                keep(rows[n_full : n_full + 1], room - rest * length)
                at += rest
                used += 1
            keep(rows[used:], room)
    row_of = rng.permutation(n_rows)[row_of]  # neighbours in length are not neighbours in order
    by_row = np.argsort(row_of, kind="stable")
    return by_length[by_row], np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=n_rows))]).astype(np.int64)


def split_records(hashes: np.ndarray, val_ratio: float, max_val_records: int) -> np.ndarray:
    """(N,) bool, True for the validation part: a function of the record's own tokens, not of order or seed.

    Equal records share a hash and so a side. At least one record is set aside when there are two different ones, and at
    most `max_val_records` (more only when the first hash alone has more equal records).
    """
    if val_ratio <= 0 or len(hashes) < 2 or max_val_records < 1:
        return np.zeros(len(hashes), dtype=bool)
    distinct, counts = np.unique(hashes, return_counts=True)  # ascending hashes: a random but fixed order
    if len(distinct) < 2:
        return np.zeros(len(hashes), dtype=bool)
    below = int(np.searchsorted(distinct, np.uint64(min(val_ratio * 2.0**64, 2.0**64 - 2048)), side="right"))
    n = min(below, int(np.searchsorted(np.cumsum(counts), max_val_records, side="right")), len(distinct) - 1)
    return hashes <= distinct[max(n, 1) - 1]


def write_plan(tmp: Path, cache: TokenCache, settings: dict) -> None:
    """Which tokens make up which row, of both parts: {train,val}_{rows,starts,lengths}.npy and meta.json."""
    width = settings["max_seq_len"]
    offsets = cache.offsets.array
    lengths = np.diff(offsets)
    is_val = split_records(cache.hashes.array, settings["val_ratio"], settings["max_val_records"])
    dropped = np.zeros(len(lengths), dtype=bool)
    if cache.first_trained is not None:
        # The first token of a segment is never predicted, so a mask that begins there begins at the second.
        dropped = np.maximum(cache.first_trained.array, 1) >= np.minimum(lengths, width)
    if settings.get("whole"):
        dropped |= lengths > width
    stats = {}
    for part, here in (("train", ~is_val), ("val", is_val)):
        mine = np.flatnonzero(here & ~dropped)
        starts, sizes = offsets[mine], lengths[mine]
        long = int((sizes > width).sum())
        if cache.trained is not None:
            sizes = np.minimum(sizes, width)
            trained_tokens = _count_trained(cache, starts, sizes)
        else:
            trained_tokens = int((sizes - 1).sum())
            pieces = np.maximum(
                1, -(-(sizes - 1) // (width - 1))
            )  # a piece begins with the last token of the one before
            skip = (np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * (width - 1)
            starts, sizes = np.repeat(starts, pieces) + skip, np.minimum(np.repeat(sizes, pieces) - skip, width)
        order, rows = pack_best_fit(sizes, width, np.random.default_rng(settings["seed"]))
        np.save(tmp / f"{part}_starts.npy", starts[order].astype(np.int64))
        np.save(tmp / f"{part}_lengths.npy", sizes[order].astype(np.int32))
        np.save(tmp / f"{part}_rows.npy", rows)
        n_rows, tokens = len(rows) - 1, int(sizes.sum())
        stats[part] = {
            "used": len(mine),
            "dropped": int((here & dropped).sum()),
            "truncated": long if cache.trained is not None else 0,
            "split": long if cache.trained is None else 0,
            "segments": len(sizes),
            "tokens": tokens,
            "trained_tokens": trained_tokens,
            "rows": n_rows,
            "fill": tokens / (n_rows * width) if n_rows else 0.0,
        }
    write_meta(tmp, {"settings": settings, **stats})


def _count_trained(cache: TokenCache, starts: np.ndarray, lengths: np.ndarray, block: int = 1 << 16) -> int:
    """Trained tokens of record heads but for the first token of each; `starts` ascend. Blockwise, in little memory."""
    total = 0
    for i in range(0, len(starts), block):
        s, n = starts[i : i + block], lengths[i : i + block]
        base = int(s[0])
        trained = cache.trained.array[base : int(s[-1] + n[-1])] == 1
        sums = np.concatenate([[0], np.cumsum(trained, dtype=np.int64)])
        total += int((sums[s + n - base] - sums[s + 1 - base]).sum())
        cache.trained.release()
    return total
