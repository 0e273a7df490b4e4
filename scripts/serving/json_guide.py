"""Keeps an answer to one JSON object (RFC 8259): before each draw, the tokens that cannot go on with it are ruled out.

    bytes so far ── automaton: what is open, what may follow ──> tokens all of whose bytes may follow ──> mask (V,)

Masks are remembered by the automaton's state, so most steps cost one look-up. The end of the answer is possible only
once the object is closed, and nothing else is then; an answer that runs into its length limit stays open, and its
finish_reason "length" says so. White space between two signs is limited, lest a model pads for ever; so is nesting.

中文：约束解码：每一步只允许能继续构成一个 JSON 对象的 token。  Dimension legend: V vocabulary.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MOST_SPACES = 16
DEEPEST = 32
MASKS_KEPT = 1024

SPACE, DIGITS = frozenset(b" \t\n\r"), frozenset(b"0123456789")
HEX, ESCAPED = frozenset(b"0123456789abcdefABCDEF"), frozenset(b'"\\/bfnrt')
LITERALS = {word[0]: word[1:] for word in (b"true", b"false", b"null")}
# A number's parts: what each byte leads to, and whether the number may end there.
NUMBERS: dict[str, dict[frozenset[int], str]] = {
    "minus": {frozenset(b"0"): "zero", frozenset(b"123456789"): "whole"},
    "zero": {frozenset(b"."): "point", frozenset(b"eE"): "e"},
    "whole": {DIGITS: "whole", frozenset(b"."): "point", frozenset(b"eE"): "e"},
    "point": {DIGITS: "decimals"},
    "decimals": {DIGITS: "decimals", frozenset(b"eE"): "e"},
    "e": {DIGITS: "power", frozenset(b"+-"): "sign"},
    "sign": {DIGITS: "power"},
    "power": {DIGITS: "power"},
}
ENDS_NUMBER = frozenset(("zero", "whole", "decimals", "power"))


class State(NamedTuple):
    """mode: what is expected; open: the brackets that are open; rest: of a literal; key: whether the string is one;
    spaces: so many stand behind the last sign."""

    mode: str
    open: bytes = b""
    rest: bytes = b""
    key: bool = False
    spaces: int = 0


START, DONE = State("start"), State("done")


def begin_value(byte: int, open: bytes) -> State | None:
    """Where the first byte of a value leads."""
    if byte == ord('"'):
        return State("string", open)
    if byte in b"{[" and len(open) < DEEPEST:
        return State("first key" if byte == ord("{") else "first item", open + bytes([byte]))
    if byte in LITERALS:
        return State("literal", open, LITERALS[byte])
    for byte_set, mode in ((frozenset(b"-"), "minus"), *NUMBERS["minus"].items()):
        if byte in byte_set:
            return State(mode, open)
    return None


def close(byte: int, open: bytes) -> State | None:
    """Where a closing bracket leads."""
    if not open or bytes((open[-1], byte)) not in (b"{}", b"[]"):
        return None
    return State("after", open[:-1]) if len(open) > 1 else DONE


def in_string(state: State, byte: int) -> State | None:
    if state.mode == "string":
        if byte == ord('"'):
            return State("colon" if state.key else "after", state.open)
        if byte == ord("\\"):
            return state._replace(mode="escape")
        return state if byte >= 0x20 else None
    if state.mode == "escape":
        mode = "string" if byte in ESCAPED else "hex 4" if byte == ord("u") else None
        return state._replace(mode=mode) if mode else None
    left = int(state.mode[-1])
    return state._replace(mode=f"hex {left - 1}" if left > 1 else "string") if byte in HEX else None


def step(state: State, byte: int) -> State | None:
    """The state behind one more byte, None where it cannot follow."""
    mode, open = state.mode, state.open
    if mode in ("string", "escape") or mode.startswith("hex"):
        return in_string(state, byte)
    if mode == "literal":
        if byte != state.rest[0]:
            return None
        return State("literal", open, state.rest[1:]) if len(state.rest) > 1 else State("after", open)
    if mode in NUMBERS:
        for byte_set, following in NUMBERS[mode].items():
            if byte in byte_set:
                return State(following, open)
        if mode not in ENDS_NUMBER:
            return None
        state, mode = State("after", open), "after"
    if mode == "start":
        return State("first key", b"{") if byte == ord("{") else None
    if mode == "done":
        return None
    if byte in SPACE:
        return state._replace(spaces=state.spaces + 1) if state.spaces < MOST_SPACES else None
    if mode in ("key", "first key"):
        if byte == ord('"'):
            return State("string", open, key=True)
        return close(byte, open) if mode == "first key" else None
    if mode == "colon":
        return State("value", open) if byte == ord(":") else None
    if mode == "after":
        if byte == ord(","):
            return State("key" if open[-1:] == b"{" else "value", open)
        return close(byte, open)
    ended = close(byte, open) if mode == "first item" else None
    return ended or begin_value(byte, open)


class Node:
    """A node of a tree of tokens by their bytes."""

    __slots__ = ("children", "tokens")

    def __init__(self):
        self.children: dict[int, Node] = {}
        self.tokens: list[int] = []


class JsonTables:
    """The masks of a vocabulary, for all guides. Belongs to the engine's thread.

    Args: pieces: the bytes of each token, empty for one that may not occur; vocab_size: rows of the logits; stop_ids:
    what ends an answer.
    """

    def __init__(self, pieces: Sequence[bytes], vocab_size: int, stop_ids: Collection[int]):
        self.pieces, self.vocab_size, self.stop_ids = pieces, vocab_size, sorted(stop_ids)
        self.plain = torch.zeros(vocab_size, dtype=torch.bool)  # tokens that leave a string as open as it was
        self.tree, self.marked = Node(), Node()  # of all tokens; of those that are not plain
        for token, piece in enumerate(pieces):
            if not piece or token in stop_ids:
                continue
            plain = all(byte >= 0x20 and byte not in b'"\\' for byte in piece)
            self.plain[token] = plain
            for root in (self.tree,) if plain else (self.tree, self.marked):
                node = root
                for byte in piece:
                    node = node.children.setdefault(byte, Node())
                node.tokens.append(token)
        self.masks: OrderedDict[State, Tensor] = OrderedDict()
        self.goes_on = torch.ones(vocab_size, dtype=torch.bool)  # all but the end
        self.goes_on[self.stop_ids] = False

    def mask(self, state: State) -> Tensor:
        """Which tokens may follow.  Shape: (V,) bool."""
        if state in self.masks:
            self.masks.move_to_end(state)
            return self.masks[state]
        in_text = state.mode == "string"
        mask = self.plain.clone() if in_text else torch.zeros_like(self.plain)
        if state == DONE:
            mask[self.stop_ids] = True
        found, nodes = [], [(self.marked if in_text else self.tree, state)]
        while nodes:
            node, here = nodes.pop()
            for byte, child in node.children.items():
                if (there := step(here, byte)) is not None:
                    found += child.tokens
                    nodes.append((child, there))
        mask[found] = True
        if not mask.any():  # a vocabulary that lacks a sign: the answer ends here
            mask[self.stop_ids] = True
        self.masks[state] = mask
        if len(self.masks) > MASKS_KEPT:
            self.masks.popitem(last=False)
        return mask


class JsonGuide:
    """One answer's guide (see `Sampling.guide`). behind: the token behind which the object begins; None: at once."""

    def __init__(self, tables: JsonTables, behind: int | None = None):
        self.tables, self.behind, self.state = tables, behind, START

    def allowed(self) -> Tensor:
        """Which tokens may come next; a thought may not end the answer.  Shape: (V,) bool."""
        return self.tables.goes_on if self.behind is not None else self.tables.mask(self.state)

    def advance(self, token: int) -> None:
        """The answer goes on with this token."""
        if self.behind is not None:
            self.behind = None if token == self.behind else self.behind
            return
        if token in self.tables.stop_ids:
            return
        for byte in self.tables.pieces[token]:
            self.state = step(self.state, byte)
