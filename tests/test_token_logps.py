"""Log-probabilities of given tokens, against log_softmax in float64: values, gradients, entropy, pieces, precision.

Dimension legend: N positions · D hidden size · V vocabulary.
"""

import pytest
import torch

from model.model_minimind import IGNORE
from trainer import token_logps as module
from trainer.token_logps import token_logps

N, D, V = 37, 16, 50


@pytest.fixture
def given():
    """hidden (N, D), weight (V, D), targets (N,) of which some are ignored, a factor for each position (N,)."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    targets = torch.randint(V, (N,), generator=generator)
    targets[[0, 5, 6, 20, N - 1]] = IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), targets, torch.randn(N, generator=generator)


def oracle(hidden, weight, targets, factors, temperature):
    """(logps, entropy, gradient of hidden, gradient of weight) of Σ factor · logp, position by position in float64."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logps, entropies = [], []
    for i, target in enumerate(targets.tolist()):
        log_p = torch.log_softmax(w @ h[i] / temperature, 0)
        logps.append(log_p[target] if target != IGNORE else torch.zeros((), dtype=torch.double))
        entropies.append(torch.distributions.Categorical(logits=log_p.detach()).entropy() if target != IGNORE else 0.0)
    logps = torch.stack(logps)
    (logps * factors.double()).sum().backward()
    return logps.detach(), torch.tensor([float(e) for e in entropies]), h.grad, w.grad


def close(a, b, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("size", [None, 1, 8, N, 100])
def test_values_and_gradients(size, temperature, given, monkeypatch):
    hidden, weight, targets, factors = given
    sizes, piece = [], module._piece

    def watched(h, *others):
        sizes.append(len(h))
        return piece(h, *others)

    monkeypatch.setattr(module, "_piece", watched)
    expected = oracle(hidden, weight, targets, factors, temperature)
    logps, entropy = token_logps(hidden, weight, targets, temperature, size)
    assert sum(sizes) == N and max(sizes) <= (size or N)
    assert logps.dtype == entropy.dtype == torch.float32 and logps.shape == entropy.shape == (N,)
    assert not entropy.requires_grad
    (logps * factors).sum().backward()
    assert sum(sizes) == 2 * N  # computed again, a piece at a time: no logits were kept
    for found, right in zip((logps, entropy, hidden.grad, weight.grad), expected, strict=True):
        close(found.detach(), right)
    ignored = targets == IGNORE
    assert ignored.sum() == 5 and not logps[ignored].any() and not entropy[ignored].any()
    assert not hidden.grad[ignored].any()


def test_without_a_gradient_the_values_are_the_same(given):
    hidden, weight, targets, _ = given
    with_gradient = token_logps(hidden, weight, targets, 0.6, 8)
    with torch.no_grad():
        without = token_logps(hidden, weight, targets, 0.6, 8)
    assert not without[0].requires_grad
    for a, b in zip(with_gradient, without, strict=True):
        assert torch.equal(a.detach(), b)


def test_a_frozen_head_or_frozen_states_get_no_gradient(given):
    hidden, weight, targets, factors = given
    *_, right_hidden, right_weight = oracle(hidden, weight, targets, factors, 1.0)
    (token_logps(hidden, weight.detach(), targets, size=8)[0] * factors).sum().backward()
    close(hidden.grad, right_hidden)
    assert weight.grad is None
    hidden.grad = None
    (token_logps(hidden.detach(), weight, targets, size=8)[0] * factors).sum().backward()
    close(weight.grad, right_weight)
    assert hidden.grad is None


def test_nothing_to_score(given):
    hidden, weight, _, _ = given
    logps, entropy = token_logps(hidden, weight, torch.full((N,), IGNORE), size=8)
    assert not logps.any() and not entropy.any()
    logps.sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()
    logps, entropy = token_logps(hidden[:0], weight, torch.zeros(0, dtype=torch.long))
    assert logps.shape == entropy.shape == (0,)


def test_under_autocast_only_the_products_are_rounded(given):
    hidden, weight, targets, factors = given
    *right, right_hidden, right_weight = oracle(hidden, weight, targets, factors, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_logps(hidden, weight, targets, size=8)
        (found[0] * factors).sum().backward()
        products = (hidden.bfloat16() @ weight.bfloat16().T).float().log_softmax(-1).detach()
    kept = targets != IGNORE
    assert all(x.dtype == torch.float32 for x in found) and hidden.grad.dtype == weight.grad.dtype == torch.float32
    close(found[0].detach()[kept], products[kept, targets[kept]], atol=1e-5)  # float32 after the product
    for a, b in zip(found, right, strict=True):
        close(a.detach(), b, rtol=0.02, atol=0.1)
        assert not torch.equal(a.detach(), b.float())
    for grad, expected in ((hidden.grad, right_hidden), (weight.grad, right_weight)):
        assert (grad.double() - expected).norm() < 0.02 * expected.norm()
