"""Byte-pair encoding: the byte alphabet, how text is cut into words, and which neighbours are joined, in which order.

Pairs are counted between whole characters; the merges that put a character together from its bytes are weighed beside
them (`learn_merges`).

中文：字节对编码：字节字母表、预分词、按权重依次学习合并；以完整的字符为单位统计相邻对。
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Sequence

from tokenizers import pre_tokenizers
from tqdm import tqdm


def byte_symbols() -> list[str]:
    """How byte-level BPE writes the bytes 0..255: printable ones as themselves, the others from U+0100 on (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    symbols, others = [], 0
    for byte in range(256):
        symbols.append(chr(byte) if byte in printable else chr(256 + others))
        others += byte not in printable
    return symbols


BYTE_SYMBOLS = byte_symbols()
SYMBOL_BYTES = {symbol: byte for byte, symbol in enumerate(BYTE_SYMBOLS)}


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """One digit at a time, then the GPT-2 pattern: exactly what llama.cpp calls "smollm"."""
    return pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])


def token_bytes(token: str) -> bytes:
    """The bytes behind a byte-level token."""
    return bytes(SYMBOL_BYTES[symbol] for symbol in token)


def byte_token(data: bytes) -> str:
    """How bytes are written in the vocabulary."""
    return "".join(BYTE_SYMBOLS[byte] for byte in data)


def character_merges(characters: Counter[str]) -> list[tuple[int, bytes, bytes]]:
    """Merges inside characters of more than one byte, from left to right: (weight, left, right), heaviest first.

    A prefix weighs what all characters that begin with it weigh, so it always comes before them.
    """
    weights: Counter[bytes] = Counter()
    for character, weight in characters.items():
        data = character.encode("utf-8")
        for end in range(2, len(data) + 1):
            weights[data[:end]] += weight
    ranked = sorted(weights.items(), key=lambda item: (-item[1], len(item[0]), item[0]))
    return [(weight, data[:-1], data[-1:]) for data, weight in ranked]


def learn_merges(weights: dict[str, int], n_tokens: int, min_weight: int) -> list[tuple[bytes, bytes]]:
    """The heaviest merges, in the order in which they are applied, until they make `n_tokens` tokens.

    Two lists of candidates run side by side, and the heavier head wins: merges that put one character together from
    its bytes, and merges of neighbouring characters (or of what earlier merges made of them). No pair is heavier than
    one of its characters, so both are whole by the time their pair is taken.

    Args:
        weights: text of a word → weight.
        min_weight: a lighter pair is not worth a token.

    Returns:
        (left, right) in bytes. Fewer than asked for when the text gives no more; a few more than `n_tokens` when two
        pairs make the same token (`a` + `bc`, `ab` + `c`).
    """
    characters: Counter[str] = Counter()
    for word, weight in weights.items():
        for character in word:
            characters[character] += weight
    inside = [merge for merge in character_merges(characters) if merge[0] >= min_weight]
    pairs = PairCounts(weights, sorted(characters), min_weight)
    merges: dict[tuple[bytes, bytes], None] = {}
    made: set[bytes] = set()
    next_inside = 0
    with tqdm(total=n_tokens, desc="merging", disable=None) as bar:
        while len(made) < n_tokens:
            heaviest = pairs.heaviest()
            if next_inside < len(inside) and (heaviest is None or inside[next_inside][0] >= heaviest[0]):
                _, left, right = inside[next_inside]
                next_inside += 1
            elif heaviest is not None:
                left, right = pairs.merge(*heaviest[1:])
            else:
                break
            merges[left, right] = None
            made.add(left + right)
            bar.update(len(made) - bar.n)
    return list(merges)


class PairCounts:
    """The words as lists of symbols, with the weight of every pair of neighbours kept up to date while pairs merge.

    A symbol is a number; `symbols[number]` are its bytes. A pair (a, b) is stored as the one number a · 2^24 + b.
    """

    SHIFT = 24

    def __init__(self, weights: dict[str, int], characters: Sequence[str], min_weight: int):
        self.min_weight = min_weight
        self.symbols = [character.encode("utf-8") for character in characters]
        self.number = {data: index for index, data in enumerate(self.symbols)}
        number = {character: index for index, character in enumerate(characters)}
        self.words = [[number[character] for character in word] for word in weights]
        self.word_weights = list(weights.values())
        self.weight: dict[int, int] = {}
        self.places: dict[int, list[int]] = {}  # pair → words that hold it, or held it once
        for index, word in enumerate(tqdm(self.words, desc="counting pairs", disable=None)):
            for left, right in itertools.pairwise(word):
                self._add(left << self.SHIFT | right, self.word_weights[index], index)
        self.heap = [(-weight, pair) for pair, weight in self.weight.items() if weight >= min_weight]
        heapq.heapify(self.heap)

    def _add(self, pair: int, weight: int, index: int) -> None:
        if pair in self.weight:
            self.weight[pair] += weight
            self.places[pair].append(index)
        else:
            self.weight[pair] = weight
            self.places[pair] = [index]

    def heaviest(self) -> tuple[int, int, int] | None:
        """(weight, left, right) of the heaviest pair, None when all are too light."""
        while self.heap:
            weight, pair = self.heap[0]
            now = self.weight.get(pair, 0)
            if -weight == now:
                return now, pair >> self.SHIFT, pair & ((1 << self.SHIFT) - 1)
            # Out of date: the pair lost weight where a merge took one of its two. (What gains weight is pushed anew.)
            if now >= self.min_weight:
                heapq.heapreplace(self.heap, (-now, pair))
            else:
                heapq.heappop(self.heap)
        return None

    def merge(self, left: int, right: int) -> tuple[bytes, bytes]:
        """Makes one symbol of the pair wherever it stands; returns the bytes of the two."""
        data = self.symbols[left] + self.symbols[right]
        new = self.number.setdefault(data, len(self.symbols))
        if new == len(self.symbols):
            self.symbols.append(data)
        shift, weights = self.SHIFT, self.weight
        gained = set()
        for index in dict.fromkeys(self.places.pop(left << shift | right)):
            word, weight = self.words[index], self.word_weights[index]
            i = 0
            while i < len(word) - 1:
                if word[i] == left and word[i + 1] == right:
                    if i > 0:
                        weights[word[i - 1] << shift | left] -= weight
                        self._add(word[i - 1] << shift | new, weight, index)
                        gained.add(word[i - 1] << shift | new)
                    if i + 2 < len(word):
                        weights[right << shift | word[i + 2]] -= weight
                        self._add(new << shift | word[i + 2], weight, index)
                        gained.add(new << shift | word[i + 2])
                    word[i : i + 2] = [new]
                i += 1
        del weights[left << shift | right]
        for pair in gained:
            if weights.get(pair, 0) >= self.min_weight:
                heapq.heappush(self.heap, (-weights[pair], pair))
        return self.symbols[left], self.symbols[right]
