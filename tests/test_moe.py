"""The mixture of experts against a float64 loop over tokens and experts, balance losses by hand, and GraniteMoeShared.

Legend: B batch, T tokens, D hidden size, E routed experts, k experts per token, N = B·T.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_model import V, close, greedy, ids, pad_batch, tiny
from torch import Tensor
from transformers import GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM

from model.model_minimind import IGNORE, MiniMindConfig, MiniMindForCausalLM, MOEFeedForward, grouped_mm_works

D, E = 32, 4
PATHS = pytest.mark.parametrize("grouped", [False, True], ids=["plain", "grouped"])


def layer(seed: int = 0, **fields) -> MOEFeedForward:
    """A mixture in training mode with weights large enough to tell experts apart."""
    torch.manual_seed(seed)
    config = MiniMindConfig(hidden_size=D, num_attention_heads=4, intermediate_size=24, use_moe=True, **fields)
    moe = MOEFeedForward(config).train()
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(std=0.4)
    return moe


def tokens(B: int = 2, T: int = 9, seed: int = 1) -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed))


def swiglu(weights: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    gate = weights[f"{prefix}.gate_proj.weight"] @ x
    return weights[f"{prefix}.down_proj.weight"] @ (
        gate * torch.sigmoid(gate) * (weights[f"{prefix}.up_proj.weight"] @ x)
    )


def naive_moe(weights: dict[str, Tensor], x: Tensor, k: int, norm: bool, shared: int) -> Tensor:
    """One token at a time, one expert at a time.  Shape: x (B, T, D) float64 → (B, T, D)."""
    rows = []
    for token in x.flatten(0, 1):
        score = torch.exp(weights["gate.weight"] @ token)
        score = score / score.sum()
        best = sorted(range(E), key=lambda e: -float(score[e].detach()))[:k]  # noqa: B023
        total = sum(score[e] for e in best) if norm and k > 1 else 1.0
        out = sum(score[e] / total * swiglu(weights, f"experts.{e}", token) for e in best)
        rows.append(out + sum(swiglu(weights, f"shared_experts.{s}", token) for s in range(shared)))
    return torch.stack(rows).view_as(x)


def naive_balance(router: Tensor, x: Tensor, k: int, alpha: float, seq_aux: bool, valid: Tensor) -> Tensor:
    """α·Σ_e f_e·P_e by counting, per sequence and averaged, or over all tokens at once."""
    sequences = [[x[b, t] for t in range(x.shape[1]) if valid[b, t]] for b in range(x.shape[0])]
    if not seq_aux:
        sequences = [[token for sequence in sequences for token in sequence]]
    losses = []
    for sequence in filter(None, sequences):
        probs = [torch.softmax(router @ token, 0) for token in sequence]
        slots = [e for p in probs for e in sorted(range(E), key=lambda e: -float(p[e].detach()))[:k]]  # noqa: B023
        losses.append(sum(slots.count(e) / len(slots) * E * sum(p[e] for p in probs) / len(sequence) for e in range(E)))
    return alpha * sum(losses) / len(losses)


def doubles(moe: MOEFeedForward) -> dict[str, Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in moe.named_parameters()}


def check_against_reference(moe: MOEFeedForward, x: Tensor, k: int, norm: bool, shared: int, tolerance: float = 1e-5):
    """Output, and the gradients of a random projection of it plus the balance loss, for the input and all weights."""
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    x = x.requires_grad_()
    out, aux, _ = moe(x)
    ((out * direction).sum() + aux).backward()

    weights, x64 = doubles(moe), x.detach().double().requires_grad_()
    expected = naive_moe(weights, x64, k, norm, shared)
    everyone = torch.ones(x.shape[:2])
    expected_aux = naive_balance(weights["gate.weight"], x64, k, moe.gate.alpha, moe.gate.seq_aux, everyone)
    ((expected * direction.double()).sum() + expected_aux).backward()

    close(out.double(), expected, tolerance)
    close(aux.double(), expected_aux, tolerance)
    for name, p in [*moe.named_parameters(), ("input", x)]:
        wanted = x64.grad if name == "input" else weights[name].grad
        wanted = torch.zeros_like(p, dtype=torch.float64) if wanted is None else wanted  # the loop skips idle experts
        assert p.grad is not None, name
        assert (p.grad - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max().item()), name


@PATHS
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("norm", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_forward_and_gradients_equal_the_loop(grouped, k, norm, shared):
    moe = layer(num_experts_per_tok=k, norm_topk_prob=norm, n_shared_experts=shared)
    moe.grouped = grouped
    check_against_reference(moe, tokens(), k, norm, shared)


def starve(moe: MOEFeedForward, expert: int = 3) -> Tensor:
    """Router weights and tokens under which one expert is never among the best."""
    with torch.no_grad():
        moe.gate.weight[expert] = -5.0
    return tokens().abs()


@PATHS
def test_idle_expert_has_zero_gradient_not_none(grouped):
    moe = layer()
    moe.grouped = grouped
    x = starve(moe)
    assert 3 not in moe.gate(x, None)[0]
    check_against_reference(moe, x, 2, True, 1)
    for name, p in moe.experts[3].named_parameters():
        assert p.grad is not None and (p.grad == 0).all(), name
    assert all((p.grad != 0).any() for p in moe.experts[0].parameters())


def test_load_counts_the_slots_of_real_tokens():
    moe = layer()
    x = starve(moe)
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    valid[0, 2:] = False  # padding does not count
    load = moe(x, valid)[2]
    chosen = moe.gate(x, valid)[0][valid].flatten().tolist()
    assert load.tolist() == [chosen.count(e) for e in range(4)] and load[3] == 0
    model = tiny(use_moe=True, num_hidden_layers=3)
    out = model(ids(2, 8), attention_mask=torch.ones(2, 8))
    assert out.expert_load.shape == (3, 4) and (out.expert_load.sum(1) == 2 * 8 * 2).all()
    assert tiny()(ids(2, 8)).expert_load is None


class LeavesGarbage(torch.autograd.Function):
    """A grouped product as some GPUs compute it: the weight gradient of a group without rows is never written."""

    @staticmethod
    def forward(ctx, rows, weights, ends):
        ctx.save_for_backward(rows, weights, ends)
        blocks = zip([0, *ends.tolist()], ends.tolist(), weights, strict=False)
        return torch.cat([rows[a:b] @ w for a, b, w in blocks])

    @staticmethod
    def backward(ctx, grad):
        rows, weights, ends = ctx.saved_tensors
        grad_rows, grad_weights = torch.zeros_like(rows), torch.full_like(weights, torch.nan)
        for e, (a, b) in enumerate(zip([0, *ends.tolist()], ends.tolist(), strict=False)):
            grad_rows[a:b] = grad[a:b] @ weights[e].T
            if b > a:
                grad_weights[e] = rows[a:b].T @ grad[a:b]
        return grad_rows, grad_weights, None


def test_garbage_in_the_gradient_of_an_idle_expert_is_dropped(monkeypatch):
    monkeypatch.setattr(F, "grouped_mm", lambda rows, weights, offs: LeavesGarbage.apply(rows, weights, offs))
    moe = layer()
    moe.grouped = True
    check_against_reference(moe, starve(moe), 2, True, 1)


def test_where_the_grouped_path_is_taken(monkeypatch):
    """Not on a CPU, not before Ampere, not for rows that are no multiple of 16 bytes, not without the function."""
    card, bf16, weight = torch.device("cuda", 0), torch.bfloat16, torch.zeros(24, D)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert grouped_mm_works(card, bf16, weight)
    assert not grouped_mm_works(torch.device("cpu"), bf16, weight)
    assert not any(grouped_mm_works(card, dtype, weight) for dtype in (torch.float16, torch.float32))
    assert not any(grouped_mm_works(card, bf16, torch.zeros(shape)) for shape in [(24, 36), (20, D)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not grouped_mm_works(card, bf16, weight)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delattr(F, "grouped_mm")
    assert not grouped_mm_works(card, bf16, weight)


def test_the_router_learns_with_one_expert_per_token_too():
    moe = layer(num_experts_per_tok=1, aux_loss_alpha=0.0)
    moe(tokens())[0].square().sum().backward()
    assert moe.gate.weight.grad.abs().max() > 1e-3


def test_cpu_takes_the_plain_path(monkeypatch):
    moe = layer()
    monkeypatch.setattr(moe, "routed_grouped", None)
    moe(tokens())
    moe.grouped = True
    with pytest.raises(TypeError):
        moe(tokens())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_half_precision_paths_agree(dtype, how):
    """Both paths stay within rounding of the float64 loop, and idle experts stay at zero."""
    source = layer()
    x = starve(source)
    expected = naive_moe(doubles(source), x.double(), 2, True, 1)
    for grouped in (False, True):
        moe = copy.deepcopy(source)
        moe.grouped = grouped
        given = x.clone()
        if how == "cast":
            moe, given = moe.to(dtype), given.to(dtype)
        with torch.autocast("cpu", dtype, enabled=how == "autocast"):
            out, aux, _ = moe(given)
        assert out.dtype == given.dtype and aux.dtype == torch.float32
        error = (out.double() - expected).abs().max() / expected.abs().max()
        assert error < (0.03 if dtype == torch.bfloat16 else 0.004)
        (out.float().pow(2).mean() + aux).backward()
        assert all(p.grad.isfinite().all() for p in moe.parameters())
        assert all((p.grad == 0).all() for p in moe.experts[3].parameters())


@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_router_computes_in_float32(how):
    """Rounded scores would send tokens to other experts."""
    dtype = torch.bfloat16 if how == "cast" else torch.float32
    gate, x = layer().gate.to(dtype), tokens().to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        chosen, weights, _ = gate(x, None)
    expected = torch.softmax(x.double() @ gate.weight.double().T, -1).topk(2)
    assert torch.equal(chosen, expected.indices) and weights.dtype == torch.float32
    close(weights.double(), expected.values / expected.values.sum(-1, keepdim=True), 1e-6)


# Balance loss


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("seq_aux", [True, False])
def test_balance_loss_of_a_uniform_router_is_alpha(k, seq_aux):
    moe = layer(num_experts_per_tok=k, seq_aux=seq_aux, aux_loss_alpha=0.25)
    torch.nn.init.zeros_(moe.gate.weight)
    assert moe(tokens())[1].item() == 0.25
    model = tiny(use_moe=True, num_experts_per_tok=k, seq_aux=seq_aux, aux_loss_alpha=0.25, num_hidden_layers=3).train()
    for block in model.model.layers:
        torch.nn.init.zeros_(block.mlp.gate.weight)
    assert model(ids(2, 8)).aux_loss.item() == 0.75  # summed over three layers


def test_balance_loss_by_hand():
    """Two experts, top-1. Sequence 0 goes to expert 0 and sequence 1 to expert 1, each with probability 0.9.

    Per sequence f = (2, 0), P = (0.9, 0.1): 1.8. Over all tokens f = (1, 1), P = (0.5, 0.5): 1. All to one expert: 1.8.
    """
    for seq_aux, apart in ((True, 1.8), (False, 1.0)):
        config = MiniMindConfig(
            hidden_size=2, num_attention_heads=1, num_key_value_heads=1, intermediate_size=4, use_moe=True,
            n_routed_experts=2, num_experts_per_tok=1, aux_loss_alpha=0.5, seq_aux=seq_aux,
        )  # fmt: skip
        gate = MOEFeedForward(config).train().gate
        with torch.no_grad():
            gate.weight.copy_(torch.eye(2))
        to_first, to_second = torch.tensor([math.log(9), 0.0]), torch.tensor([0.0, math.log(9)])
        split = torch.stack([to_first.expand(3, 2), to_second.expand(3, 2)])
        assert gate(split, None)[2].item() == pytest.approx(0.5 * apart, rel=1e-6)
        together = torch.stack([to_first.expand(3, 2)] * 2)
        assert gate(together, None)[2].item() == pytest.approx(0.5 * 1.8, rel=1e-6)


@pytest.mark.parametrize("seq_aux", [True, False])
@pytest.mark.parametrize("k", [1, 2])
def test_balance_loss_skips_padding(seq_aux, k):
    """Against the counting loop: rows of unequal length, one row of nothing but padding."""
    gate, x = layer(seq_aux=seq_aux, num_experts_per_tok=k).gate, tokens(4, 7)
    valid = torch.ones(4, 7, dtype=torch.bool)
    valid[0, 2:], valid[1, :3], valid[2] = False, False, False
    x[~valid] = x[0, 0].clone()  # padding is one and the same token, so counting it would shift the load
    expected = naive_balance(gate.weight.double(), x.double(), k, 0.1, seq_aux, valid)
    close(gate(x, valid)[2].double(), expected, 1e-6)
    unmasked = naive_balance(gate.weight.double(), x.double(), k, 0.1, seq_aux, torch.ones(4, 7))
    assert abs(expected - unmasked) > 1e-3
    nobody = gate(x, torch.zeros(4, 7, dtype=torch.bool))[2]
    assert nobody.item() == 0.0


@pytest.mark.parametrize("seq_aux", [True, False])
def test_model_sums_the_balance_loss_and_passes_padding_on(seq_aux):
    """The whole model: layer inputs recorded with hooks, the counting loop per layer, summed."""
    model = tiny(use_moe=True, seq_aux=seq_aux, num_hidden_layers=3).train()
    seen = []
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda module, args: seen.append((module, args[0].detach().double())))
    batch, mask = pad_batch([ids(9), ids(4, seed=2)], "left")
    documents = torch.tensor([[0] * 5 + [1] * 4, [0] * 4 + [-1] * 5])
    for given, valid in (({"attention_mask": mask}, mask), ({"documents": documents}, documents >= 0)):
        seen.clear()
        aux = model(batch, **given).aux_loss
        expected = sum(naive_balance(m.gate.weight.double(), x, 2, 0.1, seq_aux, valid) for m, x in seen)
        close(aux.double(), expected, 1e-6)


def test_balance_loss_is_a_training_matter():
    model, x = tiny(use_moe=True), ids(2, 8)
    assert model(x).aux_loss.item() == 0.0
    assert model.train()(x).aux_loss.item() > 0.0
    assert tiny(use_moe=True, aux_loss_alpha=0.0).train()(x).aux_loss.item() == 0.0
    assert tiny().train()(x).aux_loss.item() == 0.0


def test_balance_loss_evens_out_the_load():
    """Gradient descent on the balance loss alone: from one favoured expert to an even split."""
    gate, x = layer(seed=3).gate, tokens(4, 64)
    with torch.no_grad():
        x[..., 0], gate.weight[:, 0] = 1.0, torch.tensor([3.0, 0.0, 0.0, -3.0])
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)

    def shares() -> Tensor:
        return F.one_hot(gate(x, None)[0], E).float().mean((0, 1, 2))

    before = shares()
    for _ in range(100):
        optimizer.zero_grad()
        gate(x, None)[2].backward()
        optimizer.step()
    assert before.max() > 0.4 and before.min() < 0.1
    assert shares().max() < 0.32 and shares().min() > 0.18


# The whole model against GraniteMoeShared of transformers


def granite_twin(model: MiniMindForCausalLM) -> GraniteMoeSharedForCausalLM:
    """The stock form of the same model: shared experts concatenated into one, gate and up stacked."""
    c = model.config
    twin = GraniteMoeSharedForCausalLM(
        GraniteMoeSharedConfig(
            hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            shared_intermediate_size=c.n_shared_experts * c.intermediate_size, num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads,
            vocab_size=c.vocab_size, num_local_experts=c.n_routed_experts, num_experts_per_tok=c.num_experts_per_tok,
            rms_norm_eps=c.rms_norm_eps, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=True, embedding_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0,
            attention_multiplier=c.head_dim**-0.5, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    state = model.state_dict()
    theirs = twin.state_dict()
    for name, tensor in theirs.items():
        if ".block_sparse_moe." not in name and ".shared_mlp." not in name:
            tensor.copy_(state[name])
            continue
        mlp = name.split(".block_sparse_moe.")[0].split(".shared_mlp.")[0] + ".mlp."

        def stacked(kind: str, names: str, count: int, mlp: str = mlp) -> list[Tensor]:
            return [state[f"{mlp}{names}.{e}.{kind}_proj.weight"] for e in range(count)]

        if "router" in name:
            tensor.copy_(state[mlp + "gate.weight"])
        elif ".shared_mlp." in name:
            kinds, axis = (("gate", "up"), 0) if "input" in name else (("down",), 1)
            parts = [w for kind in kinds for w in stacked(kind, "shared_experts", c.n_shared_experts)]
            tensor.copy_(torch.cat(parts, axis))
        elif "down_proj" in name or "output_linear" in name:
            tensor.copy_(torch.stack(stacked("down", "experts", c.n_routed_experts)))
        else:
            pairs = zip(*(stacked(kind, "experts", c.n_routed_experts) for kind in ("gate", "up")), strict=True)
            tensor.copy_(torch.stack([torch.cat(pair) for pair in pairs]))
    return twin


@PATHS
@pytest.mark.parametrize("shared", [1, 2])
def test_equals_granite_moe_shared(grouped, shared):
    model = tiny(use_moe=True, n_shared_experts=shared)
    for block in model.model.layers:
        block.mlp.grouped = grouped
    twin, x = granite_twin(model), ids(2, 20)
    close(model(x).logits, twin(x).logits, 5e-5)
    out = twin.generate(x[:1, :5], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert out[0, 5:].tolist() == greedy(model, x[0, :5], 8)


# A CUDA device, where there is one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_cuda_grouped_path_equals_the_loop(dtype):
    """Autocast as in training, an idle expert, memory that held NaN: output and gradients of the float64 loop."""
    moe = layer().cuda()
    x = starve(moe.cpu()).cuda()
    moe.cuda()
    assert moe.grouped is None
    torch.full((1 << 24,), torch.nan, device="cuda")  # freed at once: what a kernel does not write reads as NaN
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        out, aux, _ = moe(x)
    weights = {name: p.detach().double().cpu().requires_grad_() for name, p in moe.named_parameters()}
    expected = naive_moe(weights, x.double().cpu(), 2, True, 1)
    tolerance = {torch.bfloat16: 0.03, torch.float16: 0.004, torch.float32: 1e-3}[dtype]
    assert (out.double().cpu() - expected).abs().max() < tolerance * expected.abs().max()
    out.float().pow(2).sum().backward()
    expected.pow(2).sum().backward()
    for name, p in moe.named_parameters():
        wanted = weights[name].grad
        if wanted is None:
            assert (p.grad == 0).all(), name
        else:
            assert (p.grad.cpu() - wanted).abs().max() < 2 * tolerance * wanted.abs().max(), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_training_step_never_waits_for_the_device():
    model = tiny(use_moe=True, vocab_size=V).cuda().train()
    x = ids(2, 64).cuda()
    documents = torch.zeros_like(x)
    labels = x.masked_fill(x % 5 == 0, IGNORE)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            out = model(x, labels=labels, documents=documents)
        (out.loss + out.aux_loss).backward()

    step()  # the first call sets up libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
