"""Texts that nearly equal an earlier one, found with MinHash and locality-sensitive hashing (the library datasketch).

What is compared are the sets of all runs of `shingle` letters and digits (case, blanks and punctuation count as
nothing), which suits Chinese and English alike. Their Jaccard similarity |A∩B| / |A∪B| is estimated from signatures
(Broder 1997); records that share one of the bands of their signature are looked up again and compared exactly, so
nothing is removed on an estimate.

中文：用 MinHash 与 LSH 找近似重复；比较的是字符片段集合，中英文都适用；删除之前逐对精确核对相似度。
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from trainer.command_line import UserError

if TYPE_CHECKING:
    from datasketch import MinHash

# Of the signature: at a similarity of 0.8 95 % of the pairs share a band, at 0.5 15 %, at 0.2 0.06 %.
BANDS, ROWS = 10, 6
FACTOR = np.uint64(0x9E3779B97F4A7C15)
NO_LETTERS = re.compile(r"[\W_]+")


def shingles(text: str, length: int) -> np.ndarray:
    """Sorted 64-bit hashes of all runs of `length` characters, each once; of the whole text when it is shorter.

    Shape: (S,) uint64, S ≥ 1.
    """
    letters = NO_LETTERS.sub("", text.casefold()) or text
    codes = np.frombuffer(letters.encode("utf-32-le", "replace"), np.uint32).astype(np.uint64)
    length = min(length, len(codes))
    hashes = np.zeros(len(codes) - length + 1, np.uint64)
    for i in range(length):  # a polynomial modulo 2^64
        hashes = hashes * FACTOR + codes[i : i + len(hashes)]
    hashes = (hashes ^ (hashes >> np.uint64(29))) * FACTOR
    hashes.sort()
    return hashes[np.concatenate(([True], hashes[1:] != hashes[:-1]))]  # np.unique takes three times as long


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Similarity of two sets given as sorted arrays."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


class NearDuplicates:
    """The records kept so far, by their signatures. Memory: about 4 KB per record, whatever its length."""

    def __init__(self, threshold: float, length: int, read: Callable[[int], str]):
        """Args: threshold: similarity from which two texts count as one; length: of a shingle; read: key → text."""
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise UserError("near duplicates need the package datasketch: pip install datasketch") from None
        self.threshold, self.length, self.read = threshold, length, read
        self.index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
        self.minhash, self.base = MinHash, MinHash(num_perm=BANDS * ROWS, seed=1)

    def signature(self, hashes: np.ndarray) -> "MinHash":
        """For every permutation of datasketch the smallest value over the set.

        Computed here for all shingles at once: `update_batch` takes them one by one, four times as long.
        """
        factors, offsets = (p.reshape(-1, 1) for p in self.base.permutations)
        values = (factors * (hashes >> np.uint64(32)).astype(np.uint32) + offsets).min(axis=1)
        return self.minhash(
            seed=self.base.seed, hashvalues=values, permutations=self.base.permutations, scheme=self.base.scheme
        )

    def find_or_add(self, key: int, text: str) -> tuple[int, float] | None:
        """(key, similarity) of the most similar earlier record from the threshold on; without one, this one is kept."""
        mine = shingles(text, self.length)
        signature = self.signature(mine)
        similar = ((jaccard(mine, shingles(self.read(k), self.length)), -k) for k in self.index.query(signature))
        similarity, earlier = max(similar, default=(0.0, 0))
        if similarity >= self.threshold:
            return -earlier, similarity
        self.index.insert(key, signature)
        return None
