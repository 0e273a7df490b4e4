"""Weights become models that can be asked for by name: the base, and each LoRA adapter on it.

A name has a decoder of its own. Adapters are merged into its copy of the weights, so they cost nothing per token; each
takes the memory of its weights and of its key/value cache, which is printed at the start. A transformers model of
another family has no batched decoder here: its requests take turns, one token of each after the other.

中文：把权重与 LoRA 适配器装入各自的解码器，按名字提供服务。
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from model.decode_step import fast_dtype
from model.generation import Decoder, Event, Request, Sampling, stop_ids, stream_foreign
from model.model_lora import key_of, load_lora, set_adapter
from model.model_minimind import MiniMindForCausalLM
from model.weights import WeightsError, weight_path
from scripts.serving.engine import AnyDecoder
from trainer.command_line import UserError


class ForeignDecoder:
    """The decoder's interface over `stream_foreign`, for any transformers model: a step draws a token for each text.

    Log-probabilities are not reported.
    """

    def __init__(self, model: PreTrainedModel, slots: int, max_seq_len: int):
        self.model, self.slots, self.max_seq_len = model, slots, max_seq_len
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.streams: dict[Request, Iterator[int]] = {}

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, prompt_ids: Sequence[int], sampling: Sampling) -> Request:
        request = Request(list(prompt_ids), sampling)
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        if request in self.waiting:
            self.waiting.remove(request)
            request.finish_reason = "cancelled"
        elif request in self.running:
            self.leave(request, "cancelled")

    def leave(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        self.running.remove(request)
        self.streams.pop(request).close()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        while self.waiting and len(self.running) < self.slots:
            request = self.waiting.popleft()
            prompt = torch.tensor([request.prompt], device=self.model.device)  # (1, T)
            self.streams[request] = stream_foreign(self.model, prompt, request.sampling)
            self.running.append(request)
        return [self.advance(request) for request in list(self.running)]

    def advance(self, request: Request) -> Event:
        """The next token of one text."""
        reason = None
        try:
            token = next(self.streams[request])
        except StopIteration:  # the stop token itself is not shown
            token, reason = None, "stop"
        except WeightsError:
            token, reason = None, "error"
        else:
            request.tokens.append(token)
            room = min(request.sampling.max_new_tokens, self.max_seq_len - len(request.prompt))
            reason = "length" if len(request.tokens) == room else None
        if reason:
            self.leave(request, reason)
        return Event(request, token, reason)


@dataclass
class ServedModels:
    """What the server offers.

    ours: whether it is a MiniMind model, whose decoder reports log-probabilities and whose states make embeddings.
    chats: False where the tokenizer has no chat template.
    """

    base: str
    decoders: dict[str, AnyDecoder]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    max_seq_len: int
    ours: bool
    share_tokens: int  # tokens of an embedding that are read between two steps
    stop_ids: frozenset[int] = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self):
        self.stop_ids = frozenset(stop_ids(self.model, self.tokenizer))

    @property
    def vocab_size(self) -> int:
        """Ids that a request may name."""
        return min(len(self.tokenizer), self.model.config.vocab_size)

    @property
    def chats(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def embed(self, name: str, prompt: list[int]) -> Iterator[list[float] | None]:
        """The mean of the last hidden states, of length 1. Yields None after each share of the prompt.

        Shape: (T,) ids → (D,).
        """
        cache, total = DynamicCache(config=self.model.config), 0
        ids = torch.tensor([prompt], device=self.model.device)  # (1, T)
        for start in range(0, len(prompt), self.share_tokens):
            if start:
                yield None
            with torch.inference_mode():
                if len(self.decoders) > 1:  # decoders have copies of their own: nobody else looks at this
                    set_adapter(self.model, None if name == self.base else name)
                part = ids[:, start : start + self.share_tokens]
                out = self.model.model(input_ids=part, past_key_values=cache, use_cache=True)
                total = total + out.last_hidden_state[0].float().sum(0)  # (D,)
        with torch.inference_mode():
            yield torch.nn.functional.normalize(total, dim=0).tolist()


def parse_lora(text: str, out_dir: Path, model: PreTrainedModel) -> tuple[str, Path]:
    """(name, path) of `name=path`, or of a bare name: `out_dir/lora/NAME_512.pth`.  Raises: UserError."""
    name, given, path = text.partition("=")
    try:
        key_of(name)
    except ValueError as error:
        raise UserError(f"--lora {text}: {error}; for example --lora medical=out/lora/lora_medical_512.pth") from None
    path = Path(path) if given else weight_path(out_dir / "lora", name, model.config)
    if not path.exists():
        raise UserError(f"--lora {text}: {path} does not exist; give --lora NAME=PATH, or train it first.")
    return name, path


def serve_models(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    loras: Mapping[str, Path],
    *,
    slots: int,
    max_seq_len: int,
    prefill_tokens: int,
    compile: bool = False,
) -> ServedModels:
    """A decoder for the base and for each adapter.  Raises: UserError; WeightsError when an adapter does not fit."""
    ours = isinstance(model, MiniMindForCausalLM)
    limit = getattr(model.config, "max_position_embeddings", None) or max_seq_len
    if not 2 <= max_seq_len <= limit:
        raise UserError(f"--max_seq_len {max_seq_len} is impossible: expected 2 to {limit}, the model's positions.")
    if name in loras:
        raise UserError(f"--lora {name}: that is the name of the base model; take another, or set --model_name.")
    decoders: dict[str, AnyDecoder] = {}
    if ours:
        sizes = {"prefill_tokens": prefill_tokens, "compile": compile}
        decoders[name] = Decoder(model, slots, max_seq_len, **sizes)
        for lora, path in loras.items():
            load_lora(model, path, lora)  # active from now on, as the decoder takes its weights over
            decoders[lora] = Decoder(model, slots, max_seq_len, **sizes)
    elif loras:
        raise UserError("--lora works with MiniMind weights only; merge the adapter into the transformers folder.")
    else:
        decoders[name] = ForeignDecoder(model, slots, max_seq_len)
    for decoder in decoders.values():
        warm_up(decoder)
    return ServedModels(name, decoders, model, tokenizer, max_seq_len, ours, prefill_tokens)


def warm_up(decoder: AnyDecoder) -> None:
    """Two short answers side by side and one alone: memory is allocated, and the step compiled where that is wanted."""
    for together in (2, 1):
        for _ in range(min(together, decoder.slots)):
            decoder.add([0], Sampling(temperature=0, max_new_tokens=min(3, decoder.max_seq_len - 1)))
        while decoder.busy:
            decoder.step()


def cache_bytes(model: PreTrainedModel, slots: int, max_seq_len: int) -> int:
    """Memory of the keys and values of one decoder."""
    config = model.config
    size = fast_dtype(model.dtype, model.device).itemsize
    head_dim = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * slots * (max_seq_len + 1) * size
