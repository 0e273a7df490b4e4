"""How a model writes: logits become probabilities, one token is drawn, and it is fed back in.

    p(next token | text so far) = softmax(logits / temperature), cut by top-k, top-p and min-p

Reading order: settings → penalties → cuts → drawing → the sampler, which does all this for many rows at once → requests
→ the decoder, which runs many requests side by side → one text as a stream → its end. The model's arithmetic is in
model/decode_step.py.

Dimension legend: B rows (requests) · T tokens · V vocabulary · W candidates, the likeliest tokens.

中文：模型如何逐个生成 token：采样设置、惩罚、截断、抽取，以及支持连续批处理的解码器。
"""

import itertools
import math
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from model.decode_step import DecodeStep
from model.model_minimind import MiniMindForCausalLM
from model.weights import WeightsError

COLDEST = 1e-5  # a temperature below is as good as 0, and a quotient could overflow
CANDIDATES = 256  # on a CPU, ranking so many is 5 times cheaper than ranking the vocabulary, and mostly they suffice
NOT_A_NUMBER = "The model's output is not a number: try --dtype float32, else the weights are damaged."


# --- Settings ---------------------------------------------------------------------------------------------------------


class Guide(Protocol):
    """Limits what one answer may say, a JSON object for example. It follows the answer: each has one of its own."""

    def allowed(self) -> Tensor | None:
        """Which tokens may come next, at least one; None: any.  Shape: (V,) bool."""

    def advance(self, token: int) -> None:
        """The answer goes on with this token."""


@dataclass(frozen=True)
class Sampling:
    """How one request is answered.

    Args:
        temperature: 0: the likeliest token, always.
        top_k: draw from the k likeliest tokens; 0 = off.
        top_p: draw from the smallest set of likeliest tokens that reaches this share; 1 = off.
        min_p: draw from tokens at least this share as likely as the likeliest; 0 = off.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or answer; 1 = off.
        presence_penalty, frequency_penalty: taken off the logit of a token in the answer, once and per occurrence.
        logit_bias: added to the logits of these tokens, −100 to 100.
        guide: rules tokens out, before temperature and cuts; None: off.
        max_new_tokens: longest answer. stop_ids: tokens that end it.
        seed: same seed, same text, alone or beside others; None: another one each time.
        logps: whether to report the log-probability of each token. top_logps: of how many likeliest tokens besides.

    Raises: ValueError when a value is impossible.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    guide: Guide | None = None
    max_new_tokens: int = 512
    stop_ids: frozenset[int] = frozenset()
    seed: int | None = None
    logps: bool = False
    top_logps: int = 0

    def __post_init__(self):
        object.__setattr__(self, "stop_ids", frozenset(self.stop_ids))
        for name, good, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (the likeliest token, always) or more, as in 0.7"),
            ("top_k", self.top_k >= 0, "a whole number, 0 or more (0 = off)"),
            ("top_p", 0 <= self.top_p <= 1, "a share between 0 and 1 (1 = off)"),
            ("min_p", 0 <= self.min_p <= 1, "a share between 0 and 1 (0 = off)"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a factor above 0 (1 = off, 1.1 = mild)"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a number, as in 0.5 (0 = off)"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a number, as in 0.5 (0 = off)"),
            ("logit_bias", all(-100 <= b <= 100 for b in self.logit_bias.values()), "numbers from -100 to 100"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 token or more"),
            ("top_logps", self.top_logps >= 0, "a whole number, 0 or more (0 = off)"),
        ):
            if not good:
                raise ValueError(f"{name} {getattr(self, name)} is impossible: expected {expected}.")

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST

    @property
    def cuts(self) -> bool:
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def reports(self) -> bool:
        return self.logps or self.top_logps > 0


# --- From logits to a token -------------------------------------------------------------------------------------------


def penalised(
    logits: Tensor, seen: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Makes tokens that occurred before less likely.

    Repetition (CTRL, Keskar et al. 2019, arXiv:1909.05858, section 4.1), tokens of prompt and answer: l / penalty where
    l > 0, l · penalty where l < 0. Presence and frequency (OpenAI's API reference), tokens of the answer only:
    l − presence · [count > 0] − frequency · count.

    Args: seen (B, V) bool: occurs in the prompt; counts (B, V): occurrences in the answer; penalties (B, 1).
    Shape: (B, V) → (B, V).
    """
    old = seen | (counts > 0)
    logits = torch.where(old, torch.where(logits < 0, logits * repetition, logits / repetition), logits)
    return logits - presence * (counts > 0) - frequency * counts


def ranked(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest `width` tokens, likeliest first, and their probabilities, 0 behind the cuts.

    Each cut keeps a first part of this ranking: top-k its first k; top-p what stands before the share p is reached, the
    nucleus (Holtzman et al. 2019, arXiv:1904.09751), of what top-k left; min-p what is at least that share as likely as
    the first (Nguyen et al. 2024, arXiv:2407.01082). The first token always stays. The sum is not 1.

    Args: logits (B, V), already divided by the temperature; top_k (B, 1), 0 = off; top_p and min_p (B, 1).
    Shape: → probabilities (B, W), token ids (B, W), and (B,) bool: whether W tokens were enough to find the end.
    """
    values, ids = logits.topk(width)  # (B, W)
    probs = (values - logits.logsumexp(-1, keepdim=True)).exp()
    place = torch.arange(width, device=logits.device)
    kept = (place < top_k) | (top_k == 0)
    probs = probs * kept
    before = probs.cumsum(-1) - probs  # what stands before a token
    mass = torch.where(top_k > 0, probs.sum(-1, keepdim=True), 1.0)
    nucleus = (before < top_p * mass) | (top_p == 1)  # the running sum may round to 1 before the end
    kept = (kept & nucleus & (probs >= min_p * probs[:, :1])) | (place == 0)
    return probs * kept, ids, ~kept[:, -1] | (width == logits.shape[-1])


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Index of the drawn column: where the running sum passes uniform · total. Probabilities need not sum to 1.

    One number per row decides, so a row's draw depends on nothing beside it.  Shape: (B, N), (B, 1) in [0, 1) → (B,).
    """
    total = probs.cumsum(-1)
    index = torch.searchsorted(total, uniform * total[:, -1:], right=True)
    return index[:, 0].clamp(max=probs.shape[-1] - 1)


class Drawn(NamedTuple):
    """What one call of the sampler gives, one entry per row. Token −1: the logits were not numbers.

    logps: log softmax(logits), of the model itself (OpenAI's `logprobs`). tempered_logps: log softmax(logits /
    temperature), of the policy that reinforcement learning trains, before penalties and cuts; at temperature 0 as if it
    were 1. Both are None unless a row asks, top_logps: [(token, log-probability), likeliest first].
    """

    tokens: list[int]
    logps: list[float] | None = None
    tempered_logps: list[float] | None = None
    top_logps: list[list[tuple[int, float]]] | None = None


class Sampler:
    """Draws the next token of many rows at once, each with settings of its own.

    Order: bias, penalties, guide, temperature, top-k, top-p, min-p. A row uses up one random number per token, of a
    generator of its own: neighbours do not change its text.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device):
        self.vocab_size, self.device = vocab_size, device
        self.samplings: list[Sampling | None] = [None] * rows
        self.generators: list[random.Random | None] = [None] * rows
        self.settings = torch.ones(rows, 7, device=device)
        # (rows, V) each, made when a first request needs them
        self.bias: Tensor | None = None
        self.seen: Tensor | None = None
        self.counts: Tensor | None = None

    @torch.inference_mode()
    def place(self, row: int, sampling: Sampling, prompt: Sequence[int]) -> None:
        """A request with this prompt takes the row."""
        s, shape = sampling, (len(self.samplings), self.vocab_size)
        self.samplings[row], self.generators[row] = s, random.Random(s.seed)
        temperature = 1.0 if s.greedy else s.temperature
        penalties = s.repetition_penalty, s.presence_penalty, s.frequency_penalty
        self.settings[row] = torch.tensor((temperature, float(s.top_k), s.top_p, s.min_p, *penalties))
        if s.logit_bias and self.bias is None:
            self.bias = torch.zeros(shape, device=self.device)
        if s.penalises and self.counts is None:
            self.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self.counts = torch.zeros(shape, device=self.device)
        if self.bias is not None:
            self.bias[row] = 0
            for token, bias in s.logit_bias.items():
                self.bias[row, token] = bias
        if self.counts is not None:
            self.counts[row] = 0
            self.seen[row] = False
            self.seen[row, torch.tensor(prompt, device=self.device)] = True

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """The request in row `source` goes on in row `target`."""
        for values in (self.samplings, self.generators):
            values[target], values[source] = values[source], None
        for tensor in (self.settings, self.bias, self.seen, self.counts):
            if tensor is not None:
                tensor[target] = tensor[source]

    def clear(self, row: int) -> None:
        self.samplings[row] = self.generators[row] = None

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[int], idle: Sequence[int] = ()) -> Drawn:
        """One token for each row of the logits.

        Args: logits (B, V); rows: the B places they belong to; idle: entries of `rows` whose draw will not be used.
        """
        active = [None if row in idle else self.samplings[row] for row in rows]
        asked = [s for s in active if s is not None]
        raw = logits = logits.float()
        consecutive = rows[-1] - rows[0] + 1 == len(rows) and list(rows) == list(range(rows[0], rows[-1] + 1))
        index = slice(rows[0], rows[-1] + 1) if consecutive else torch.tensor(rows, device=self.device)
        penalises, reports = any(s.penalises for s in asked), any(s.reports for s in asked)
        if penalises or reports or not all(s.greedy for s in asked):
            temperature, top_k, top_p, min_p, *penalties = self.settings[index].split(1, dim=1)  # (B, 1) each
        if any(s.logit_bias for s in asked):
            logits = logits + self.bias[index]
        if penalises:
            logits = penalised(logits, self.seen[index], self.counts[index], *penalties)
        guided = [(i, s.guide) for i, s in enumerate(active) if s is not None and s.guide is not None]
        if guided:
            logits = self.guided(logits, guided)
        best, tokens = logits.max(-1)  # (B,); NaN if there is one
        if not all(s.greedy for s in asked):
            numbers = [0.0 if s is None or s.greedy else self.uniform(row) for row, s in zip(rows, active, strict=True)]
            uniform = torch.tensor(numbers, device=self.device)[:, None]
            tempered = logits / temperature
            warm = self.flags([s is not None and not s.greedy for s in active])
            cut = self.flags([s is not None and s.cuts for s in active])
            drawn = tokens
            if any(not s.greedy and not s.cuts for s in asked):
                drawn = draw(tempered.softmax(-1), uniform)
            if any(s.cuts for s in asked):
                drawn = torch.where(cut, self.draw_cut(tempered, top_k, top_p, min_p, uniform, cut, asked), drawn)
            tokens = torch.where(warm, drawn, tokens)
        if penalises:
            used = self.flags([s is not None for s in active])[:, None]
            self.counts[index] += F.one_hot(tokens, self.vocab_size) * used
        listed = torch.where(best.isnan(), -1, tokens).tolist()
        for i, guide in guided:
            if listed[i] >= 0:
                guide.advance(listed[i])
        if not reports:
            return Drawn(listed)
        return Drawn(listed, *self.log_probabilities(raw, tokens, temperature, max(s.top_logps for s in asked)))

    def guided(self, logits: Tensor, guides: Sequence[tuple[int, Guide]]) -> Tensor:
        """−∞ where a guide rules a token out.  Args: guides: with the rows of the logits.  Shape: (B, V) → (B, V)."""
        logits = logits.clone()
        for i, guide in guides:
            if (allowed := guide.allowed()) is not None:
                logits[i].masked_fill_(~allowed.to(self.device), -torch.inf)
        return logits

    def uniform(self, row: int) -> float:
        """The row's next random number in [0, 1), of 24 bits: float32 holds it exactly, so it never rounds to 1."""
        return self.generators[row].getrandbits(24) / 2**24

    def flags(self, values: list[bool]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def draw_cut(
        self,
        logits: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        uniform: Tensor,
        cut: Tensor,
        asked: Sequence[Sampling],
    ) -> Tensor:
        """Draws behind top-k, top-p and min-p. On a CPU only the candidates are ranked, more where they do not suffice.

        Shape: (B, V), settings (B, 1) → (B,).
        """
        V = self.vocab_size
        widest = min(max(s.top_k for s in asked), V)
        only_top_k = all(s.top_k for s in asked if s.cuts)
        width = widest if only_top_k else V
        if self.device.type == "cpu":
            width = min(max(widest, CANDIDATES), V)
        probs, ids, enough = ranked(logits, top_k, top_p, min_p, width)
        tokens = ids.gather(1, draw(probs, uniform)[:, None])[:, 0]
        if width < V and self.device.type == "cpu" and not (short := cut & ~enough).logical_not().all():
            probs, ids, _ = ranked(logits[short], top_k[short], top_p[short], min_p[short], V)
            tokens[short] = ids.gather(1, draw(probs, uniform[short])[:, None])[:, 0]
        return tokens

    def log_probabilities(self, logits: Tensor, tokens: Tensor, temperature: Tensor, top: int) -> tuple:
        """Fields of `Drawn`.  Shape: logits (B, V), tokens (B,), temperature (B, 1)."""
        logps = logits.log_softmax(-1)
        tempered = logps if (temperature == 1).all() else (logits / temperature).log_softmax(-1)
        picked = [t.gather(1, tokens[:, None])[:, 0].tolist() for t in (logps, tempered)]
        values, ids = logps.topk(min(top, self.vocab_size))
        pairs = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
        return *picked, pairs


# --- Many requests side by side ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class Request:
    """A prompt and the answer so far.

    tokens: all that were drawn, the stop token included: it is an action of the policy like the others. logps,
    tempered_logps and top_logps: one entry per token where asked for, see `Drawn`. finish_reason: None while it runs,
    then "stop" (a stop token), "length" (max_new_tokens or the cache is full), "cancelled" or "error".
    """

    prompt: list[int]
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    tempered_logps: list[float] = field(default_factory=list)
    top_logps: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: str | None = None
    filled: int = 0  # tokens of the prompt that are in the cache
    turn: int = 0  # counts the requests of a decoder: prompts are taken in in this order

    @property
    def answer(self) -> list[int]:
        """The tokens without the stop token."""
        return self.tokens[:-1] if self.finish_reason == "stop" else self.tokens

    @property
    def decoding(self) -> bool:
        return self.filled == len(self.prompt)

    @cached_property
    def fingerprint(self) -> int:
        """The same for equal prompts."""
        return hash(tuple(self.prompt))


class Event(NamedTuple):
    """What a step did for one request: the token it drew, or None if the model's output was not a number."""

    request: Request
    token: int | None
    finish_reason: str | None


class Decoder:
    """Continuous batching: requests join and leave at any step, all of them share each pass through the model.

        decoder = Decoder(model, slots=32, max_seq_len=2048)
        request = decoder.add(prompt_ids, Sampling(temperature=0.7, stop_ids={2}))
        while decoder.busy:
            for request, token, finish_reason in decoder.step(): ...

    The running requests always hold the first rows of the cache: where one leaves, the last one moves in, and a step
    costs what the requests that run cost, not what the slots would. Orca (Yu et al. 2022, OSDI) calls it
    iteration-level scheduling. A request's tokens depend on its prompt, settings and seed; the number of rows of a
    product can change the last bits of its logits (of a bfloat16 model the last of 8), nothing else.

    Args:
        model: it stays as it is; `refresh` takes over weights that changed. Dropout is off here in any case.
        slots: requests that run at a time; others wait. max_seq_len: tokens of prompt and answer together.
        dtype: of cache and arithmetic, by default the model's own where the device multiplies it fast, else float32.
        compile: compiles the decode step: the first ones wait up to a minute, later ones take half the time on a CPU.
            For servers and rollouts; a chat would be over before it pays.
        prefill_tokens: prompt tokens taken in per step, padding included: a longer prompt is taken in over several
            steps, between which the others go on.

    Raises: ValueError when a size is impossible.
    """

    def __init__(
        self,
        model: MiniMindForCausalLM,
        slots: int,
        max_seq_len: int,
        *,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        prefill_tokens: int = 8192,
    ):
        limit = model.config.max_position_embeddings
        for name, value, good, expected in (
            ("slots", slots, slots >= 1, "1 or more"),
            ("max_seq_len", max_seq_len, 2 <= max_seq_len <= limit, f"2 to {limit}, the positions of the model"),
            ("prefill_tokens", prefill_tokens, prefill_tokens >= 1, "1 or more"),
        ):
            if not good:
                raise ValueError(f"{name} {value} is impossible: expected {expected}.")
        self.slots, self.max_seq_len, self.prefill_tokens = slots, max_seq_len, prefill_tokens
        self.device, self.vocab_size = model.device, model.config.vocab_size
        with torch.inference_mode():
            self.model = DecodeStep(model, slots, max_seq_len, dtype, compile)
            self.sampler = Sampler(slots, self.vocab_size, self.device)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # the request of row r of the cache
        self.turns = itertools.count()

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def refresh(self) -> None:
        """Takes over the model's weights as they are now, for example after an optimizer step.

        Raises: ValueError while requests run: their cache belongs to the old weights.
        """
        if self.running:
            raise ValueError(f"{len(self.running)} requests are running: finish or cancel them before refresh.")
        self.model.refresh()

    def add(self, prompt_ids: Sequence[int], sampling: Sampling) -> Request:
        """Queues a request; the next steps answer it.  Raises: ValueError when the prompt is impossible."""
        prompt = list(prompt_ids)
        if not prompt:
            raise ValueError("The prompt is empty: expected at least one token, for example the bos token.")
        if len(prompt) >= self.max_seq_len:
            raise ValueError(
                f"The prompt takes {len(prompt)} tokens and the answer at least one, but the decoder holds max_seq_len "
                f"{self.max_seq_len}: shorten the prompt, or raise max_seq_len."
            )
        for name, ids in (("prompt", prompt), ("logit_bias", sampling.logit_bias)):
            if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
                raise ValueError(f"Token {wrong[0]} in {name} does not exist: expected 0 to {self.vocab_size - 1}.")
        request = Request(prompt, sampling, turn=next(self.turns))
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request at once; nothing happens if it is over."""
        if request in self.waiting:
            self.waiting.remove(request)
            request.finish_reason = "cancelled"
        elif request in self.running:
            self.leave(request, "cancelled")

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Draws one token for each request whose prompt is in the cache, after taking in a share of the prompts."""
        events = self.decode()
        while self.waiting and len(self.running) < self.slots:
            request = self.waiting.popleft()
            self.sampler.place(len(self.running), request.sampling, request.prompt)
            self.running.append(request)
        return events + self.prefill()

    def decode(self) -> list[Event]:
        """One token for each request that has its prompt in the cache."""
        idle = {row for row, request in enumerate(self.running) if not request.decoding}
        if len(idle) == len(self.running):
            return []
        tokens, positions = [], []
        for request in self.running:
            tokens.append(request.tokens[-1] if request.decoding else 0)
            positions.append(len(request.prompt) + len(request.tokens) - 1 if request.decoding else self.max_seq_len)
        length = 1 + max(position for row, position in enumerate(positions) if row not in idle)
        padding = self.bucket(len(self.running), 1, self.slots) - len(self.running) if self.model.captured else 0
        logits = self.model.decode(
            tokens + [0] * padding, positions + [self.max_seq_len] * padding, self.bucket(length, 128, self.max_seq_len)
        )
        rows = range(len(self.running))
        return self.record(list(rows), self.sampler.sample(logits[: len(rows)], rows, idle), idle)

    def prefill(self) -> list[Event]:
        """Takes in up to `prefill_tokens` of prompts; a request whose prompt is complete gets its first token.

        Requests that begin together with the same prompt, as GRPO draws its answers, take it in once, if it fits into
        one step: the others copy its keys and values.
        """
        rows, width, whole, copies = [], 0, {}, {}  # whole: prompts → their rows; copies: row → the row it copies
        for row, request in sorted(enumerate(self.running), key=lambda placed: placed[1].turn):
            if request.decoding:
                continue
            leader = whole.get(request.fingerprint) if request.filled == 0 else None
            if leader is not None and self.running[leader].prompt == request.prompt:
                copies[row] = leader
                continue
            wider = min(max(width, len(request.prompt) - request.filled), self.prefill_tokens)
            if not rows or (len(rows) + 1) * wider <= self.prefill_tokens:
                rows, width = [*rows, row], wider
                if request.filled == 0 and len(request.prompt) <= width:
                    whole[request.fingerprint] = row
        if not rows:
            return []
        tokens, positions, last = [], [], []
        for request in (self.running[row] for row in rows):
            start, end = request.filled, min(request.filled + width, len(request.prompt))
            padding = width - (end - start)
            tokens.append(request.prompt[start:end] + [0] * padding)
            positions.append([*range(start, end)] + [self.max_seq_len] * padding)
            last.append(end - start - 1)
            request.filled = end
        length = self.bucket(max(self.running[row].filled for row in rows), 128, self.max_seq_len)
        inputs = torch.tensor((tokens, positions)).to(self.device)  # (2, B, T)
        places, last = torch.tensor((rows, last)).to(self.device)  # (B,) each
        logits = self.model.prefill(*inputs, length, places, last)  # (B, V)
        if copies:
            self.model.copy(copies, max(len(self.running[row].prompt) for row in copies))
            for row in copies:
                self.running[row].filled = len(self.running[row].prompt)
            logits = logits[[*range(len(rows)), *map(rows.index, copies.values())]]
            rows += copies
        unfinished = {row for row in rows if not self.running[row].decoding}
        return self.record(rows, self.sampler.sample(logits, rows, unfinished), unfinished)

    def bucket(self, number: int, smallest: int, largest: int) -> int:
        """Rounds up, so that few shapes occur: to a power of two where each is captured, else to a multiple of 128."""
        if self.model.captured:
            smallest = max(smallest, 1 << (number - 1).bit_length())
        return min(-(-number // smallest) * smallest, largest)

    def record(self, rows: Sequence[int], drawn: Drawn, idle: set[int]) -> list[Event]:
        """Notes the drawn tokens and lets finished requests leave."""
        events, over = [], []
        for i, row in enumerate(rows):
            if row in idle:
                continue
            request, token = self.running[row], drawn.tokens[i]
            sampling, reason = request.sampling, None
            if token < 0:
                reason, token = "error", None
            else:
                request.tokens.append(token)
                if sampling.reports:
                    request.logps.append(drawn.logps[i])
                    request.tempered_logps.append(drawn.tempered_logps[i])
                    request.top_logps.append(drawn.top_logps[i][: sampling.top_logps])
                room = min(sampling.max_new_tokens, self.max_seq_len - len(request.prompt))
                if token in sampling.stop_ids:
                    reason = "stop"
                elif len(request.tokens) == room:
                    reason = "length"
            events.append(Event(request, token, reason))
            if reason:
                over.append((request, reason))
        # A NaN in the cache would reach the next request of its row, masked or not. All go before the first row moves.
        for request in (request for request, reason in over if reason == "error"):
            self.model.clear(self.running.index(request))
        for request, reason in over:
            self.leave(request, reason)
        return events

    def leave(self, request: Request, reason: str) -> None:
        """Ends a running request; the one in the last row moves to its place."""
        request.finish_reason = reason
        row, last = self.running.index(request), len(self.running) - 1
        if row != last:
            self.running[row] = self.running[last]
            self.model.move(last, row)
            self.sampler.move(last, row)
        self.sampler.clear(last)
        self.running.pop()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]) -> list[Request]:
        """Answers all prompts, in the order given; with one setting for all or one for each.

        Requests with the same setting share its seed: give each a seed of its own to draw several answers to a prompt.

        Raises: ValueError as `add`; WeightsError when the model's output is not a number.
        """
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        requests = []
        try:
            for prompt, settings in zip(prompts, samplings, strict=True):
                requests.append(self.add(prompt, settings))
            while not all(request.finish_reason for request in requests):
                if any(event.token is None for event in self.step()):
                    raise WeightsError(NOT_A_NUMBER)
        finally:
            for request in requests:
                self.cancel(request)
        return requests


# --- One text as a stream ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def stream_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    generator: torch.Generator | None = None,
    decoder: Decoder | None = None,
    **settings,
) -> Iterator[int]:
    """Yields the tokens of the continuation one by one; a stop token ends it and is not yielded.

    Args: input_ids (1, T); generator: gives the seed; decoder: one of this model to use, else one is made; settings:
    those of `Sampling`, max_new_tokens for example.
    Raises: ValueError as `Sampling` and `Decoder.add`; WeightsError when the model's output is not a number.
    """
    sampling = Sampling(seed=int(torch.randint(2**62, (), generator=generator)), **settings)
    if not isinstance(model, MiniMindForCausalLM):
        yield from stream_foreign(model, input_ids, sampling)
        return
    prompt = input_ids[0].tolist()
    needed = min(len(prompt) + sampling.max_new_tokens, model.config.max_position_embeddings)
    if decoder is None or decoder.max_seq_len < needed:
        decoder = Decoder(model, 1, needed)
    request = decoder.add(prompt, sampling)
    try:
        while not request.finish_reason:
            for event in decoder.step():
                if event.request is request and event.token is None:
                    raise WeightsError(NOT_A_NUMBER)
                if event.request is request and event.finish_reason != "stop":
                    yield event.token
    finally:  # the reader stopped listening
        decoder.cancel(request)


def stream_foreign(model: PreTrainedModel, input_ids: Tensor, sampling: Sampling) -> Iterator[int]:
    """The same loop for any transformers model, over its own forward and cache."""
    cache, new = DynamicCache(config=model.config), input_ids
    sampler = Sampler(1, model.config.vocab_size, torch.device("cpu"))
    sampler.place(0, sampling, input_ids[0].tolist())
    for _ in range(sampling.max_new_tokens):
        logits = model(new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].cpu()  # (1, V)
        (token,) = sampler.sample(logits, [0]).tokens
        if token < 0:
            raise WeightsError(NOT_A_NUMBER)
        if token in sampling.stop_ids:
            return
        yield token
        new = input_ids.new_tensor([[token]])  # (1, 1)


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """The tokens that end an answer: what the tokenizer and the model's generation settings call eos."""
    eos = model.generation_config.eos_token_id
    ids = eos if isinstance(eos, list) else [eos]
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}
