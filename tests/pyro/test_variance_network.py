"""Variance networks in Pyro's SVI; mirrors tests/numpyro/test_variance_network.py."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import Adam, ExponentialLR
from torch.distributions.kl import kl_divergence

from bnn_ppl.pyro import AutoVarianceNetwork, ImproperLogUniform
from bnn_ppl.pyro.variational_dropout import DropoutNormal
from tests import variance


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def log_uniform():
    w = pyro.sample("w", ImproperLogUniform().expand([2, 3]).to_event(2))
    pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=torch.tensor(0.0))


def test_distribution_and_divergence():
    """N(0, sigma^2), also of a negative sigma, whose divergence from the log-uniform prior is 0 with no gradient."""
    guide = AutoVarianceNetwork(log_uniform)
    guide()
    ((_, parameter),) = guide.named_parameters()
    assert parameter.shape == guide.sigmas.w.shape == (2, 3)
    parameter.data = torch.as_tensor(variance.SIGMA)
    assert not guide.median()["w"].any()
    high = guide.quantiles([0.5, float(dist.Normal(0.0, 1.0).cdf(torch.tensor(2.0)))])["w"]
    np.testing.assert_allclose(high, [0 * variance.SIGMA, 2 * np.abs(variance.SIGMA)], rtol=1e-6, atol=1e-12)
    variance.check_draws(guide.sample_posterior(sample_shape=(20_000,))["w"].numpy())
    q = poutine.trace(guide).get_trace().nodes["w"]["fn"]
    divergence = kl_divergence(q, ImproperLogUniform().expand([2, 3]).to_event(2))
    assert divergence.item() == 0
    assert not divergence.requires_grad


@pytest.mark.filterwarnings("ignore:Encountered")
def test_a_scale_of_zero():
    """Which training passes through: the weight is 0, and the loss and its gradient stay finite."""
    guide = AutoVarianceNetwork(log_uniform)
    guide()
    ((_, parameter),) = guide.named_parameters()
    parameter.data = torch.as_tensor(variance.SIGMA).clone()
    parameter.data[0, 0] = 0.0
    assert guide.sample_posterior()["w"][0, 0] == 0
    loss = TraceMeanField_ELBO().differentiable_loss(log_uniform, guide)
    loss.backward()
    assert loss.isfinite()
    assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", variance.FAN_IN)
def test_published_start(name):
    def model():
        pyro.sample(name, dist.Normal(0.0, 1.0).expand([40, 50]).to_event(2))

    guide = AutoVarianceNetwork(model)
    guide()
    ((_, found),) = guide.named_parameters()
    variance.check_uniform(found.detach().numpy(), variance.FAN_IN[name] ** -0.5)


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x @ w[..., None]).squeeze(-1).reshape(*w.shape[:-2], len(x)), 1.0), obs=y)


DATA = torch.as_tensor(variance.X), torch.as_tensor(variance.Y)


def test_conjugate_optimum():
    """sigma^2 = 1 / (1 + sum x^2), whatever the observations are."""
    guide = AutoVarianceNetwork(regression)
    optimiser = ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.03}, "gamma": 0.995})
    elbo = TraceMeanField_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(regression, guide, optimiser, elbo)
    for _ in range(1000):
        svi.step(*DATA)
        optimiser.step()
    np.testing.assert_allclose(guide.sigmas.w.detach().abs(), variance.conjugate(), rtol=0.05)


@pytest.mark.parametrize("alpha", [1.0, 10.0, 100.0, 1e4])
def test_limit_of_variational_dropout(alpha):
    """For D weights that share alpha the divergence is D / (2 alpha), the total variation erf(sqrt(D / (8 alpha)))."""
    loc, alpha = torch.as_tensor(variance.LOC), torch.tensor(alpha)
    q, p = DropoutNormal(loc, alpha.log()), dist.Normal(0.0, alpha.sqrt() * loc.abs())
    assert float(kl_divergence(q, p).sum()) == pytest.approx(variance.DIMENSIONS / (2 * float(alpha)), rel=1e-9)
    draws = q.sample((200_000,))
    variance.check_total_variation((p.log_prob(draws) - q.log_prob(draws)).sum(-1).numpy(), float(alpha))


def test_beside_a_guide_of_the_host():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w + b, 1.0), obs=y)

    guide = AutoGuideList(model)
    guide.append(AutoVarianceNetwork(model, sites=["w"]))
    guide.append(AutoNormal(poutine.block(model, hide=["w"])))
    svi = SVI(model, guide, Adam({"lr": 1e-2}), TraceMeanField_ELBO())
    assert all(np.isfinite(svi.step(*DATA)) for _ in range(20))
    assert set(guide.median()) == {"w", "b"}


@pytest.mark.parametrize(("arguments", "message"), variance.BAD)
def test_bad_input(arguments, message):
    def model():
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("noise", dist.HalfNormal(1.0))
        with pyro.plate("rows", 4):
            pyro.sample("local", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=message):
        AutoVarianceNetwork(model, **arguments)()


def test_before_training():
    guide = AutoVarianceNetwork(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))
    for ask in (guide.median, guide.sample_posterior, lambda: guide.quantiles([0.5])):
        with pytest.raises(
            ValueError, match="the guide AutoVarianceNetwork has not been trained: run SVI with it first"
        ):
            ask()
