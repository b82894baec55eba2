"""The log-uniform prior in Pyro's ELBO; mirrors tests/numpyro/test_log_uniform.py."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import kl_divergence

from bnn_ppl import divergences
from bnn_ppl.pyro import ImproperLogUniform
from tests.test_divergences import ALPHA, EXACT, SLOPE


def divergence(log_alpha, kl="exact", loc=1.0):
    loc = torch.full_like(log_alpha, loc)
    return kl_divergence(dist.Normal(loc, (0.5 * log_alpha).exp() * loc.abs()), ImproperLogUniform(kl))


def slope(log_alpha, kl="exact"):
    log_alpha = log_alpha.clone().requires_grad_()
    return torch.autograd.grad(divergence(log_alpha, kl).sum(), log_alpha)[0]


def test_table_and_its_gradient():
    log_alpha = torch.tensor(ALPHA).log()
    np.testing.assert_allclose(divergence(log_alpha, loc=-0.3), EXACT, rtol=1e-10)
    np.testing.assert_allclose(slope(log_alpha), SLOPE, rtol=3e-10)


def test_table_in_single_precision():
    log_alpha = torch.tensor(ALPHA, dtype=torch.float32).log()
    assert divergence(log_alpha).dtype == torch.float32
    np.testing.assert_allclose(divergence(log_alpha), EXACT, rtol=1e-5)
    np.testing.assert_allclose(slope(log_alpha), SLOPE, rtol=1e-5)


@pytest.mark.parametrize("kl", divergences.KINDS)
def test_gradients_by_differences(kl):
    log_alpha = torch.linspace(-8.0, 6.0, 41, dtype=torch.float64) + 1e-3
    numeric = (divergence(log_alpha + 1e-6, kl) - divergence(log_alpha - 1e-6, kl)) / 2e-6
    np.testing.assert_allclose(slope(log_alpha, kl), numeric, rtol=1e-6, atol=1e-8)
    second = torch.func.vmap(torch.func.grad(torch.func.grad(divergence)))(log_alpha)
    np.testing.assert_allclose(second, (slope(log_alpha + 1e-6) - slope(log_alpha - 1e-6)) / 2e-6, atol=1e-8)


@pytest.mark.parametrize("kl", divergences.KINDS)
def test_weights_of_mean_zero_have_finite_gradients(kl):
    loc = torch.zeros(1, requires_grad=True)
    value = kl_divergence(dist.Normal(loc, 2.0), ImproperLogUniform(kl))
    assert torch.autograd.grad(value.sum(), loc)[0] == 0
    assert value.item() == pytest.approx(0.0 if kl != "cubic" else divergences.cubic(np.zeros(1))[0])


LOC = torch.tensor([[0.5, -1.0, 2.0], [0.1, 0.0, -0.2]], dtype=torch.float64)
SCALE = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


def model():
    w = pyro.sample("w", ImproperLogUniform().expand([2, 3]).to_event(2))
    pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=torch.zeros(()))


def guide():
    pyro.sample("w", dist.Normal(LOC, SCALE).to_event(2))


def test_divergence_in_the_elbo():
    """Summed over the weights, in the place of log densities."""
    pyro.set_rng_seed(0)
    loss = TraceMeanField_ELBO().loss(model, guide)
    pyro.set_rng_seed(0)
    w = poutine.trace(guide).get_trace().nodes["w"]["value"]
    density = dist.Normal(w.sum(), 1.0).log_prob(torch.zeros(()))
    expected = divergences.exact(0.5 * (LOC / SCALE) ** 2).sum() - density
    assert loss == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("loc", [0.0, 0.5, 3.0])
def test_constant_between_divergence_and_density(loc):
    q, prior = dist.Normal(torch.tensor(loc, dtype=torch.float64), 0.7), ImproperLogUniform()
    w = loc + 0.7e-5 * (torch.arange(-12e5, 12e5, dtype=torch.float64) + 0.5)
    expected = 0.7e-5 * (q.log_prob(w).exp() * (q.log_prob(w) - prior.log_prob(w))).sum()
    constant = 0.5 * (1 + np.euler_gamma + np.log(4 * np.pi))
    assert constant == pytest.approx(2.0541, abs=5e-5)
    assert float(kl_divergence(q, prior) - expected) == pytest.approx(constant, abs=1e-4)


def test_density_and_support():
    prior = ImproperLogUniform().expand([2, 3]).to_event(1)
    assert (prior.batch_shape, prior.event_shape) == ((2,), (3,))
    np.testing.assert_allclose(prior.log_prob(LOC + 0.3), -(LOC + 0.3).abs().log().sum(1), rtol=1e-6)
    draws = np.abs(prior.sample((4000,)).numpy())
    assert draws.shape == (4000, 2, 3)
    assert 0.001 <= draws.min() < 0.00102
    assert 0.99 < draws.max() <= 1
    np.testing.assert_allclose(np.log(draws).mean(), 0.5 * np.log(1e-3), atol=5 * 2 / 24_000**0.5)
    with pytest.raises(ValueError, match="kl must be one of 'exact', 'sigmoid', 'cubic', 'ard', got 'fit'"):
        ImproperLogUniform("fit")
    with pytest.raises(NotImplementedError, match="No KL"):
        kl_divergence(dist.Laplace(0.0, 1.0), ImproperLogUniform())
