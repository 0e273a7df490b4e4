"""The forward pass of the model: every way to feed a sequence, outputs, loss, dropout, initialisation, precision.

Weights as in test_model.py. Legend as in model_minimind.py: D hidden size, T tokens, V vocabulary.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_model import BOTH, TINY, V, close, ids, pad_batch, same_gradients, tiny
from torch import Tensor
from transformers import DynamicCache, StaticCache

from model import model_minimind
from model.model_minimind import IGNORE, MiniMindConfig, MiniMindForCausalLM, attention_mask_4d, rotary_tables
from trainer.trainer_utils import checkpoint_activations

# Cache, padding, packing: every way to feed a sequence gives the logits of the plain one


@BOTH
@pytest.mark.parametrize("flash", [True, False], ids=["sdpa", "plain"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("chunks", [(12,), (1,) * 12, (5, 7), (3, 1, 4, 1, 3)], ids=str)
def test_cached_and_chunked_equal_plain(moe, flash, static, chunks):
    model, x = tiny(use_moe=moe, flash_attn=flash), ids(2, 12)
    expected = model(x).logits
    cache = StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    logits = []
    with torch.no_grad():
        for part in x.split(chunks, dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            assert out.past_key_values is cache
            logits.append(out.logits)
    close(torch.cat(logits, 1), expected)


def test_use_cache_makes_a_cache():
    model, x = tiny(), ids(1, 6)
    assert model(x).past_key_values is None
    first = model(x[:, :4], use_cache=True)
    assert first.past_key_values.get_seq_length() == 4
    close(model(x[:, 4:], past_key_values=first.past_key_values).logits, model(x).logits[:, 4:])


@BOTH
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("flash", [True, False], ids=["sdpa", "plain"])
def test_padded_batch_equals_each_alone(moe, side, flash):
    model = tiny(use_moe=moe, flash_attn=flash)
    rows = [ids(n, seed=n) for n in (9, 4, 7, 1)]
    batch, mask = pad_batch(rows, side)
    logits = model(batch, attention_mask=mask).logits
    assert logits.isfinite().all()
    for i, row in enumerate(rows):
        close(logits[i][mask[i].bool()], model(row[None]).logits[0])


@pytest.mark.parametrize("cache_kind", ["dynamic", "static", "static with a mask of its full size"])
@pytest.mark.parametrize("flash", [True, False], ids=["sdpa", "plain"])
def test_left_padded_batch_in_cached_chunks(cache_kind, flash):
    model = tiny(flash_attn=flash)
    rows = [ids(n, seed=n) for n in (9, 4)]
    batch, mask = pad_batch(rows, "left")
    static = cache_kind != "dynamic"
    cache = StaticCache(config=model.config, max_cache_len=11) if static else DynamicCache(config=model.config)
    logits, done = [], 0
    with torch.no_grad():
        for n in (3, 4, 1, 1):
            done += n
            seen = F.pad(mask[:, :done], (0, 11 - done if cache_kind.endswith("size") else 0))
            part = batch[:, done - n : done]
            logits.append(model(part, attention_mask=seen, past_key_values=cache, use_cache=True).logits)
    logits = torch.cat(logits, 1)
    for i, row in enumerate(rows):
        close(logits[i][mask[i].bool()], model(row[None]).logits[0])


def test_masks_drawn_out():
    """1 where query t (row) may look at slot s (column), written down by hand."""

    def drawn(*rows: str) -> Tensor:
        return torch.tensor([[c == "1" for c in row] for row in rows])

    def built(tokens, past, slots, attention_mask=None, documents=None, growing=True):
        given = None if attention_mask is None else torch.tensor([attention_mask])
        packed_in = None if documents is None else torch.tensor([documents])
        mask = attention_mask_4d(tokens, past, slots, torch.device("cpu"), given, packed_in, growing)
        return None if mask is None else mask[0, 0]

    assert built(4, 0, 4) is None and built(1, 5, 6) is None  # the kernel's own causal mode
    assert torch.equal(built(2, 2, 4), drawn("1110", "1111"))  # a chunk after two cached tokens
    assert torch.equal(built(2, 1, 5, growing=False), drawn("11000", "11100"))  # a static cache of five slots
    # Padding sees itself only, so that no softmax runs over nothing; nobody else sees it.
    assert torch.equal(built(4, 0, 4, [0, 0, 1, 1]), drawn("1000", "0100", "0010", "0011"))
    assert torch.equal(built(4, 0, 4, [1, 1, 0, 0]), drawn("1000", "1100", "1110", "1101"))
    assert torch.equal(built(1, 2, 5, [0, 1, 1], growing=False), drawn("01100"))
    assert torch.equal(built(5, 0, 5, documents=[0, 0, 1, -1, -1]), drawn("10000", "11000", "00100", "00010", "00011"))
    assert torch.equal(built(3, 0, 3, [0, 1, 1], documents=[0, 0, 1]), drawn("100", "010", "001"))


def test_mask_must_cover_the_cached_tokens():
    model, x = tiny(), ids(1, 6)
    cache = model(x, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="attention_mask has 1 .* 7"):
        model(x[:, :1], attention_mask=torch.ones(1, 1), past_key_values=cache)


@pytest.mark.parametrize("flash", [True, False], ids=["sdpa", "plain"])
def test_row_of_padding_gives_no_nan(flash):
    """Forward and backward: a row of nothing but padding, and one with holes on both sides."""
    model = tiny(flash_attn=flash).train()
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0]])
    x = ids(3, 5)
    out = model(x, attention_mask=mask, labels=x.masked_fill(mask == 0, IGNORE))
    out.loss.backward()
    assert out.logits.isfinite().all() and out.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    close(out.logits[2, 1:4], model(x[2:, 1:4]).logits[0])


def packed(lengths: list[int], width: int, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """One row of packed documents: ids, documents (−1 on the padding behind them), positions, each (1, width)."""
    documents = torch.full((1, width), -1)
    positions = torch.zeros(1, width, dtype=torch.long)
    start = 0
    for d, n in enumerate(lengths):
        documents[0, start : start + n] = d
        positions[0, start : start + n] = torch.arange(n)
        start += n
    return ids(1, width, seed=seed), documents, positions


@BOTH
@pytest.mark.parametrize("flash", [True, False], ids=["sdpa", "plain"])
def test_packed_documents_equal_each_alone(moe, flash):
    model = tiny(use_moe=moe, flash_attn=flash)
    rows = [packed([5, 1, 7], 15), packed([15], 15, seed=4), packed([], 15, seed=5)]
    x, documents, positions = (torch.cat(parts) for parts in zip(*rows, strict=True))
    logits = model(x, documents=documents, position_ids=positions).logits
    assert logits.isfinite().all()  # padding included
    for b, first, last in [(0, 0, 5), (0, 5, 6), (0, 6, 13), (1, 0, 15)]:
        close(logits[b, first:last], model(x[b : b + 1, first:last]).logits[0])


@BOTH
def test_no_gradient_crosses_documents(moe):
    model = tiny(use_moe=moe)
    x, documents, positions = packed([5, 6], 13)
    embeddings = model.model.embed_tokens(x).detach().requires_grad_()
    labels = x.masked_fill(documents != 1, IGNORE)
    labels[0, 5] = IGNORE  # the first token of a document is predicted by nobody
    out = model(inputs_embeds=embeddings, documents=documents, position_ids=positions, labels=labels)
    out.loss.backward()
    seen = embeddings.grad[0].abs().sum(-1)
    assert (seen[:5] == 0).all() and (seen[11:] == 0).all()
    assert (seen[5:10] > 0).all() and seen[10] == 0  # the last token of the document predicts nothing


def test_documents_cannot_be_cached():
    x, documents, positions = packed([4], 4)
    with pytest.raises(ValueError, match="documents"):
        tiny()(x, documents=documents, position_ids=positions, use_cache=True)


def test_documents_and_mask_together():
    """A mask on top of documents hides tokens inside them."""
    model = tiny()
    x, documents, positions = packed([6, 4], 10)
    mask = torch.ones(1, 10, dtype=torch.long)
    mask[0, 0] = 0
    logits = model(x, attention_mask=mask, documents=documents, position_ids=positions).logits
    close(logits[0, 1:6], model(x[:, 1:6]).logits[0])
    close(logits[0, 6:], model(x[:, 6:]).logits[0])


def test_future_tokens_change_nothing():
    model, x = tiny(), ids(1, 10)
    changed = x.clone()
    changed[0, 6:] = (x[0, 6:] + 1) % V
    assert torch.equal(model(changed).logits[0, :6], model(x).logits[0, :6])


@pytest.mark.parametrize("T", [300, 1024, 1030], ids=["ragged", "longest", "fused"])
@pytest.mark.parametrize("how", ["causal", "packed", "padded", "checkpointed"])
def test_training_on_a_cpu_equals_the_fused_kernel(T, how, monkeypatch):
    """Rows that are trained on in blocks of queries: logits and gradients of torch's kernel, which eval mode uses."""
    taken = []
    blocks = model_minimind.attention_in_blocks
    monkeypatch.setattr(model_minimind, "attention_in_blocks", lambda *a, **k: taken.append(1) or blocks(*a, **k))
    x, given = ids(2, T), {}
    if how == "packed":
        given["documents"] = torch.stack([torch.arange(T) // 170, (torch.arange(T) > T // 3).long()])
    if how == "padded":
        given["attention_mask"] = torch.stack([torch.arange(T) >= 40, torch.arange(T) < T]).long()
    trained, oracle = tiny().train(), tiny()
    if how == "checkpointed":
        checkpoint_activations(trained)
    logits = []
    for model in (trained, oracle):
        out = model(x, **given).logits[:, -T + 40 :]  # behind the padding
        (out.float() ** 2).mean().backward()
        logits.append(out)
    assert bool(taken) == (T <= 1024)
    close(*logits)
    same_gradients(trained, oracle)


def test_a_mask_from_elsewhere_may_look_ahead():
    """In training, too: a later token that a ready-made mask shows is not cut off with the block of its query."""
    x = ids(1, 300)
    everything = torch.ones(1, 1, 300, 300, dtype=torch.bool)
    expected = tiny()(x, attention_mask=everything).logits
    model = tiny().train()
    close(model(x, attention_mask=everything).logits, expected)
    checkpoint_activations(model)
    close(model(x, attention_mask=everything).logits, expected)


def test_flash_equals_plain_for_ready_made_masks():
    """4D masks, boolean and additive, with a query that may see nothing: finite, and equal where something is seen."""
    x = ids(1, 6)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    allowed[:, 0] = False  # token 0 is hidden, from itself too
    allowed[4, 2] = False
    mask = allowed[None, None]
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    reference = tiny(flash_attn=True)(x, attention_mask=mask).logits
    for flash in (True, False):
        for given in (mask, additive):
            logits = tiny(flash_attn=flash)(x, attention_mask=given).logits
            assert logits.isfinite().all()
            close(logits[:, 1:], reference[:, 1:])
    full = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    close(tiny()(x, attention_mask=full).logits, tiny()(x).logits)


# Outputs


def test_logits_to_keep():
    model, x = tiny(), ids(2, 8)
    full = model(x).logits
    close(model(x, logits_to_keep=1).logits, full[:, -1:])
    close(model(x, logits_to_keep=3).logits, full[:, -3:])
    close(model(x, logits_to_keep=0).logits, full)
    close(model(x, logits_to_keep=torch.tensor([1, 4, 7])).logits, full[:, [1, 4, 7]])
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(x, labels=x, logits_to_keep=1)


def test_hidden_states_without_the_head():
    model, x = tiny(), ids(3, 9)
    out = model(x, need_logits=False)
    assert out.logits is None
    close(out.hidden_states @ model.lm_head.weight.T, model(x).logits)
    with pytest.raises(ValueError, match="need_logits"):
        model(x, labels=x, need_logits=False)


def test_inputs_embeds():
    model, x = tiny(), ids(2, 8)
    close(model(inputs_embeds=model.model.embed_tokens(x)).logits, model(x).logits)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(x, inputs_embeds=model.model.embed_tokens(x))


def test_hidden_states():
    model, x = tiny(), ids(2, 8)
    states = model(x, output_hidden_states=True).hidden_states
    assert len(states) == 3
    close(states[0], model.model.embed_tokens(x))
    close(states[2], model(x).hidden_states)
    close(model.lm_head(states[2]), model(x).logits)
    close(model.model.norm(model.model.layers[1](states[1], *layer_inputs(model, 8))[0]), states[2])


def layer_inputs(model: MiniMindForCausalLM, T: int) -> tuple:
    """rotary, mask, cache, looks_ahead, valid of a plain causal call."""
    return rotary_tables(model.config, torch.arange(T)[None]), None, None, False, None


@BOTH
def test_forward_leaves_everything_as_it_was(moe):
    """No shared output object, no change of configuration, default dtype, random state or weights."""
    model = tiny(use_moe=moe)
    before = copy.deepcopy(model.config.to_dict()), torch.get_rng_state(), torch.get_default_dtype()
    weights = copy.deepcopy(model.state_dict())
    first = model(ids(1, 6), use_cache=True)
    kept = first.logits.clone()
    second = model(ids(1, 6, seed=9), use_cache=True)
    assert first is not second and first.past_key_values is not second.past_key_values
    assert torch.equal(first.logits, kept) and not torch.equal(second.logits, kept)
    assert model.config.to_dict() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1]) and torch.get_default_dtype() == before[2]
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())


# Loss


def test_loss_shifts_once():
    """nll of token t + 1 under the distribution after token t, written as a loop in float64."""
    model, x = tiny(), ids(2, 7)
    labels = x.clone()
    labels[0, 2] = labels[0, 0] = labels[1, 5:] = IGNORE
    out = model(x, labels=labels)
    logps = out.logits.double().log_softmax(-1)
    picked = [logps[b, t, labels[b, t + 1]] for b in range(2) for t in range(6) if labels[b, t + 1] != IGNORE]
    assert len(picked) == 9
    close(out.loss.double(), -sum(picked) / 9, 1e-6)
    for count in (36, torch.tensor(36)):  # Trainer passes the number of labels of all micro-batches
        batch = {"input_ids": x, "labels": labels, "attention_mask": torch.ones_like(x)}
        close(model(**batch, num_items_in_batch=count).loss.double(), -sum(picked) / 36, 1e-6)


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)], ids=str)
def test_nothing_to_train_on_is_zero_not_nan(count):
    model, x = tiny().train(), ids(2, 6)
    loss = model(x, labels=torch.full_like(x, IGNORE), num_items_in_batch=count).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_single_token_has_no_loss():
    assert tiny()(ids(2, 1), labels=ids(2, 1)).loss.item() == 0.0


@BOTH
def test_gradient_reaches_every_parameter(moe):
    model = tiny(use_moe=moe, n_shared_experts=2, seed=2).train()
    x = ids(4, 16)
    out = model(x, labels=x)
    (out.loss + out.aux_loss).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_dropout_only_in_training():
    model, x = tiny(dropout=0.5), ids(1, 8)
    assert torch.equal(model(x).logits, model(x).logits)
    close(model(x).logits, tiny(dropout=0.0)(x).logits)
    model.train()
    assert not torch.equal(model(x).logits, model(x).logits)
    close(tiny().train()(x).logits, tiny()(x).logits)


def test_short_and_long_rows_in_training_agree():
    """Rows of up to 1,024 tokens take another attention path on a CPU; a causal model must not notice."""
    model, x = tiny().train(), ids(1, 1025)
    documents = (torch.arange(1025) // 100)[None]
    close(model(x).logits[:, :1024], model(x[:, :1024]).logits)
    packed = model(x, documents=documents).logits[:, :1024]
    close(packed, model(x[:, :1024], documents=documents[:, :1024]).logits)


def test_dropout_on_embedding_attention_and_feed_forward():
    """Half of the channels vanish at each of the three places, the others double."""
    model, x = tiny(dropout=0.5).train(), ids(8, 32)
    seen = {}
    block = model.model.layers[0]
    block.register_forward_hook(lambda module, args, out: seen.update(start=args[0], end=out[0]))
    block.self_attn.register_forward_hook(lambda module, args, out: seen.update(attention=out))
    model(x)
    embedded = model.model.embed_tokens(x)
    kept = seen["start"] != 0
    close(seen["start"][kept], 2 * embedded[kept])
    between = seen["start"] + seen["attention"]
    for dropped in (~kept, seen["attention"] == 0, seen["end"] == between):
        assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("flash", [True, False], ids=["sdpa", "plain"])
def test_dropout_keeps_the_mean(flash):
    """Attention probabilities are dropped and rescaled: the average over many draws is the eval output."""
    attention = tiny(dropout=0.2, flash_attn=flash).model.layers[0].self_attn
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    rotary = rotary_tables(MiniMindConfig(**TINY), torch.arange(5)[None])
    with torch.no_grad():
        expected = attention(x, rotary, None, None, False)
        attention.train()
        many = attention(x.expand(8000, -1, -1), rotary, None, None, False)
    deviation = (many.mean(0) - expected[0]).abs().max()
    assert deviation < 6 * many.std(0).max() / math.sqrt(8000)
    assert many.std() > 0.1 * expected.std()


# Initialisation


def test_initialisation_statistics():
    """Normal weights of 0.02, 0.02/√(2L) where a layer writes into the residual stream, norms at one."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=128, num_hidden_layers=4, use_moe=True, vocab_size=1000))
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
            continue
        residual = "o_proj" in name or "down_proj" in name
        expected = 0.02 / math.sqrt(8) if residual else 0.02
        spread = 5 / math.sqrt(2 * p.numel())  # five standard errors of a sample standard deviation
        assert p.std().item() == pytest.approx(expected, rel=spread), name
        assert abs(p.mean().item()) < 5 * expected / math.sqrt(p.numel()), name


def test_first_loss_is_that_of_a_uniform_guess():
    """Near ln V. Logits of variance D·0.02² cost half of it: 0.10 nats for the 26M model, 0.006 for a tiny one."""
    torch.manual_seed(0)
    small = MiniMindForCausalLM(MiniMindConfig()).eval()
    for model, vocabulary, excess in ((small, 6400, 0.102), (tiny(initializer_range=0.02), V, 0.006)):
        x = torch.randint(3, vocabulary, (2, 128))
        with torch.no_grad():
            assert model(x, labels=x).loss.item() == pytest.approx(math.log(vocabulary) + excess, abs=0.05)


# Precision


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_weights(moe, dtype):
    """Cast weights follow the float32 logits; activations near 1e4 neither overflow nor turn into NaN."""
    model, x = tiny(use_moe=moe, initializer_range=0.05), ids(2, 16)
    expected = model(x).logits
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    half = copy.deepcopy(model).to(dtype)
    assert half(x).logits.dtype == dtype
    scale = expected.abs().max()
    assert (half(x).logits.float() - expected).abs().max() < (0.01 if dtype == torch.float16 else 0.06) * scale
    large = half.model.embed_tokens(x) * (1e4 / half.model.embed_tokens(x).abs().max())
    out = half(inputs_embeds=large, attention_mask=mask, labels=x)
    assert out.logits.isfinite().all() and out.loss.isfinite()
    assert out.loss.dtype == torch.float32


@BOTH
@pytest.mark.parametrize("flash", [True, False], ids=["sdpa", "plain"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_autocast(moe, flash, dtype):
    model, x = tiny(use_moe=moe, flash_attn=flash, initializer_range=0.05).train(), ids(2, 16)
    reference = model(x, labels=x)
    _, documents, positions = packed([7, 9], 16)
    with torch.autocast("cpu", dtype):
        out = model(x, labels=x)
        more = model(x, labels=x, documents=documents.expand(2, -1), position_ids=positions.expand(2, -1))
        large = model(inputs_embeds=model.model.embed_tokens(x) * 1e5, labels=x)
    assert out.loss.dtype == torch.float32 and out.aux_loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(reference.loss.item(), rel=0.01)
    (out.loss + more.loss + large.loss + large.aux_loss).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_dense_compiles_without_graph_breaks(backend):
    """Forward and backward against the eager model: capture in every case, generated code once (it takes long)."""
    torch._dynamo.reset()
    eager = tiny(num_hidden_layers=1 if backend == "inductor" else 2).train()
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x, documents, positions = packed([6, 8], 16)
    cases = [(x, {"documents": documents, "position_ids": positions})]
    if backend == "aot_eager":
        cases += [(x, {}), (x, {"attention_mask": (documents >= 0).long()})]
        cases += [(ids(1, 300), {"documents": torch.arange(300)[None] // 80})]  # attention in three blocks
    for x, extra in cases:
        eager.zero_grad()
        model.zero_grad()
        expected, out = eager(x, labels=x, **extra), compiled(x, labels=x, **extra)
        close(out.logits, expected.logits)
        expected.loss.backward()
        out.loss.backward()
        same_gradients(model, eager)
