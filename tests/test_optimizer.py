"""Muon with AdamW: who is trained by which, the update against formulas in float64, the state as one."""

import copy

import pytest
import torch

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.optimizer import MuonWithAdamW, make_optimizer, orthogonal, step_if

CPU = torch.device("cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, use_moe=True)
    return MiniMindForCausalLM(MiniMindConfig(**size)).train()


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def fill_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_every_parameter_is_in_exactly_one_group(model):
    optimizer = make_optimizer(model, 0.1, CPU)
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    muon, matrices, vectors = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    routers = {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}
    assert matrices == routers | {"model.embed_tokens.weight"}
    assert all("norm" in name for name in vectors) and len(vectors) == 5
    assert all(name.endswith("_proj.weight") for name in muon)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


def test_frozen_parameters_are_left_out(model):
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    listed = {id(p) for group in make_optimizer(model, 0.1, CPU).param_groups for p in group["params"]}
    assert not listed & {id(p) for p in model.model.layers[0].parameters()}


def test_muon_update_is_nearly_orthogonal_and_has_the_size_of_adamw(model):
    """The step divided by lr · 0.2·√max has singular values near 1, whatever the gradient's spectrum."""
    weight = model.model.layers[0].self_attn.q_proj.weight
    optimizer = make_optimizer(model, 0.0, CPU)
    set_lr(optimizer, 0.01)
    fill_gradients(model, 1)
    weight.grad = weight.grad @ torch.diag(torch.logspace(0, -2, 32))  # a gradient with a condition number near 100
    before = weight.detach().clone()
    optimizer.step()
    step = (before - weight.detach()).double() / (0.01 * 0.2 * 32**0.5)
    values = torch.linalg.svdvals(step)
    assert values.max() < 1.4 and values.median() > 0.6
    # It points where the gradient does.
    assert (step * weight.grad.double()).sum() > 0


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_newton_schulz_keeps_singular_vectors_and_evens_out_values(shape):
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(3, *shape, generator=generator).double() * torch.tensor([1e-6, 1.0, 1e6]).view(3, 1, 1)
    result = orthogonal(batch, torch.float64)
    for matrix, out in zip(batch, result, strict=True):
        u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
        # The iteration on a matrix is the quintic on each singular value.
        expected = values / values.norm()
        for _ in range(5):
            expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
        torch.testing.assert_close(out, u @ torch.diag(expected) @ vt, atol=1e-9, rtol=1e-7)
    assert not orthogonal(torch.zeros(1, 4, 4), torch.float32).any()


def test_muon_equals_the_one_of_torch(model):
    """Three steps beside torch.optim.Muon, which works matrix by matrix in bfloat16; experts make shapes repeat."""
    theirs = copy.deepcopy(model)
    names = [name for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    ours = make_optimizer(model, 0.1, CPU, dtype=torch.bfloat16)
    oracle = torch.optim.Muon([theirs.get_parameter(name) for name in names], lr=0.01, weight_decay=0.1,
                              momentum=0.95, adjust_lr_fn="match_rms_adamw")  # fmt: skip
    set_lr(ours, 0.01)
    start = copy.deepcopy(model)
    for seed in (1, 2, 3):
        for one in (model, theirs):
            fill_gradients(one, seed)
        ours.step()
        oracle.step()
    for name in names:
        a, b = (one.get_parameter(name) - start.get_parameter(name) for one in (model, theirs))
        assert (a - b).norm() < 0.02 * b.norm(), name


def test_a_weight_without_gradient_stays(model):
    optimizer = make_optimizer(model, 0.1, CPU)
    set_lr(optimizer, 0.01)
    fill_gradients(model, 1)
    idle = model.model.layers[0].self_attn.q_proj.weight
    idle.grad, before = None, idle.detach().clone()
    optimizer.step()
    assert torch.equal(idle, before)


def test_the_rest_follows_adamw_by_formula(model):
    optimizer = make_optimizer(model, 0.1, CPU)
    set_lr(optimizer, 0.01)
    weight = model.model.embed_tokens.weight
    expected, m, v = weight.detach().double().clone(), 0.0, 0.0
    for t in (1, 2, 3):
        fill_gradients(model, t)
        g = weight.grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, atol=1e-6, rtol=1e-5)


def test_plain_adamw_decays_matrices_only(model):
    optimizer = make_optimizer(model, 0.1, CPU, "adamw")
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] == 0.1) for p in group["params"])


def test_state_goes_on_where_it_was(model):
    """Saved after two steps and loaded into a fresh optimiser, the third step is the same, bit for bit."""
    optimizer = make_optimizer(model, 0.1, CPU)
    set_lr(optimizer, 0.01)
    for seed in (1, 2):
        fill_gradients(model, seed)
        optimizer.step()
    state, other = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    again = make_optimizer(other, 0.1, CPU)
    again.load_state_dict(state)
    for one, opt in ((model, optimizer), (other, again)):
        set_lr(opt, 0.005)
        fill_gradients(one, 3)
        opt.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_zero_learning_rate_moves_nothing_and_zero_grad_clears(model):
    optimizer = make_optimizer(model, 0.1, CPU)
    assert isinstance(optimizer, MuonWithAdamW)
    before = [p.detach().clone() for p in model.parameters()]
    fill_gradients(model, 1)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())


def test_the_gradient_scaler_steps_and_skips_both_parts(model):
    optimizer = make_optimizer(model, 0.1, CPU)
    set_lr(optimizer, 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for poison in (True, False):
        before = [p.detach().clone() for p in model.parameters()]
        fill_gradients(model, 1)
        scaler.scale(torch.zeros(()))  # creates the scale
        if poison:
            model.model.norm.weight.grad[0] = float("inf")
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert not any(moved) if poison else all(moved)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_step_on_condition_is_a_step_or_nothing(model, kind):
    plain = copy.deepcopy(model)
    optimizer, oracle = make_optimizer(model, 0.1, CPU, kind), make_optimizer(plain, 0.1, CPU, kind)
    for either in (optimizer, oracle):
        set_lr(either, 1e-2)
    for seed in range(2):
        for each in (model, plain):
            fill_gradients(each, seed)
        oracle.step()
        step_if(torch.tensor(True), optimizer)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)

    weights = [p.detach().clone() for p in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    fill_gradients(model, 2)
    for p in model.parameters():  # what clipping by a norm of NaN or infinity makes of gradients
        p.grad.flatten()[::2] = torch.nan
        p.grad.flatten()[1] = torch.inf
    step_if(torch.tensor(False), optimizer)
    for p, before in zip(model.parameters(), weights, strict=True):
        assert torch.equal(p, before)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    fill_gradients(model, 3)
    optimizer.step()  # the next one without a condition is a step again
    assert not any(torch.equal(p, before) for p, before in zip(model.parameters(), weights, strict=True))
