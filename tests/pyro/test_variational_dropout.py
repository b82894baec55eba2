"""Variational dropout in Pyro's SVI; mirrors tests/numpyro/test_variational_dropout.py."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.optim import PyroLRScheduler
from torch.distributions import kl_divergence

from bnn_ppl.pyro import AutoVariationalDropout, ImproperLogUniform, predict
from tests import dropout

ZERO, ONE = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
WEIGHT = torch.tensor(dropout.WEIGHT)


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with torch.random.fork_rng():
        yield


def model():
    w = pyro.sample("w", ImproperLogUniform().expand([2, 3]).to_event(2))
    pyro.sample("y", dist.Normal(w.sum(), ONE), obs=ZERO)


def started(parameterization, value=WEIGHT):
    """Guide where training starts."""
    init_loc_fn = init_to_value(values={"w": value})
    guide = AutoVariationalDropout(
        model, parameterization=parameterization, init_log_alpha=dropout.LOG_ALPHA, init_loc_fn=init_loc_fn
    )
    guide()
    return guide


def noise(guide):
    return guide.log_sigmas.w if guide.parameterization == "additive" else guide.log_alphas.w


@pytest.mark.parametrize("parameterization", dropout.PARAMETERIZATIONS)
def test_distribution_and_divergence(parameterization):
    guide = started(parameterization)
    assert noise(guide).shape == dropout.SHAPES[parameterization]
    sd = dropout.sd(parameterization)
    np.testing.assert_allclose(guide.median()["w"], dropout.WEIGHT)
    high = guide.quantiles([0.5, float(dist.Normal(ZERO, ONE).cdf(2 * ONE))])["w"]
    np.testing.assert_allclose(high, [dropout.WEIGHT, dropout.WEIGHT + 2 * sd], rtol=1e-6)
    np.testing.assert_allclose(guide.log_alpha()["w"], 2 * np.log(sd / np.abs(dropout.WEIGHT)), rtol=1e-6)
    draws = guide.sample_posterior(sample_shape=(20_000,))["w"].numpy()
    assert np.abs((draws.mean(0) - dropout.WEIGHT) / sd).max() < 5 / 20_000**0.5
    assert np.abs(draws.std(0) / sd - 1).max() < 5 / 40_000**0.5
    q = poutine.trace(guide).get_trace().nodes["w"]["fn"]
    prior = ImproperLogUniform().expand([2, 3]).to_event(2)
    assert kl_divergence(q, prior).item() == pytest.approx(dropout.divergence(parameterization), rel=1e-9)


@pytest.mark.parametrize("parameterization", dropout.PARAMETERIZATIONS)
def test_loss_and_its_gradient(parameterization):
    """By differences with common random numbers: with means of weights, and a gradient in every parameter."""
    guide = started(parameterization)

    def loss():
        pyro.set_rng_seed(3)
        return TraceMeanField_ELBO().differentiable_loss(model, guide)

    parameters = list(guide.parameters())
    assert len(parameters) == 2
    for parameter, slope in zip(parameters, torch.autograd.grad(loss(), parameters), strict=True):
        for index in np.ndindex(*slope.shape):
            moved = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter[index] += sign * 1e-6
                moved.append(loss().item())
                with torch.no_grad():
                    parameter[index] -= sign * 1e-6
            assert float(slope[index]) == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-5, abs=1e-7)
            assert slope[index] != 0


def test_particles_together():
    """Under the plate of the ELBO distributions are expanded; the divergence stays that of one."""

    def model():
        w = pyro.sample("w", ImproperLogUniform().expand([2, 3]).to_event(2))
        pyro.factor("nothing", 0 * w.sum((-1, -2)))

    guide = AutoVariationalDropout(
        model, init_log_alpha=dropout.LOG_ALPHA, init_loc_fn=init_to_value(values={"w": WEIGHT})
    )
    guide()
    elbo = TraceMeanField_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=0)
    assert elbo.loss(model, guide) == pytest.approx(dropout.divergence("weight"), rel=1e-9)


@pytest.mark.filterwarnings("ignore:Encountered")
def test_weights_of_mean_zero():
    """alpha mu^2 = 0 there: the divergence depends on alpha alone and stays finite, its gradient too."""
    guide = started("neuron", torch.zeros_like(WEIGHT))
    loss = TraceMeanField_ELBO().differentiable_loss(model, guide)
    slopes = torch.autograd.grad(loss, list(guide.parameters()))
    assert torch.isfinite(loss)
    assert all(torch.isfinite(slope).all() for slope in slopes)


X, Y = torch.tensor(dropout.X), torch.tensor(dropout.Y)


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(ZERO, ONE).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, ONE), obs=y)


@pytest.mark.parametrize("parameterization", ["weight", "additive"])
def test_conjugate_optimum(parameterization):
    start = init_to_value(values={"w": torch.tensor(dropout.START)})
    guide = AutoVariationalDropout(regression, parameterization=parameterization, init_loc_fn=start)
    annealed = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.03}, "T_max": 1500}
    scheduler = PyroLRScheduler(torch.optim.lr_scheduler.CosineAnnealingLR, annealed)
    loss = TraceMeanField_ELBO(num_particles=2, vectorize_particles=False)
    svi = SVI(regression, guide, scheduler, loss)
    for _ in range(1500):
        svi.step(X, Y)
        scheduler.step()
    mean, sd = dropout.conjugate()
    np.testing.assert_allclose(guide.median()["w"], mean, atol=0.1 * sd.min())
    found = guide.median()["w"].abs() * (0.5 * guide.log_alpha()["w"]).exp()
    np.testing.assert_allclose(found, sd, rtol=0.1)
    predicted = predict(guide, X, model=regression, num_draws=500)["mean"].values
    np.testing.assert_allclose(predicted, X @ torch.tensor(mean), atol=0.1)


def mixed(y=None):
    w = pyro.sample("w", ImproperLogUniform().expand([2, 3]).to_event(2))
    slope = pyro.sample("slope", dist.Normal(ZERO, ONE))
    noise = pyro.sample("noise", dist.HalfNormal(ONE))
    with pyro.plate("rows", 4):
        local = pyro.sample("local", dist.Normal(ZERO, ONE))
        pyro.sample("y", dist.Normal(w.sum() + slope + local, noise), obs=y)


def test_beside_a_guide_of_the_host():
    guide = AutoGuideList(mixed)
    guide.append(AutoVariationalDropout(mixed, sites=["w"], parameterization="layer"))
    guide.append(AutoNormal(poutine.block(mixed, hide=["w"])))
    svi = SVI(mixed, guide, pyro.optim.Adam({"lr": 1e-2}), TraceMeanField_ELBO())
    y = torch.arange(4.0, dtype=torch.float64)
    assert np.isfinite([svi.step(y) for _ in range(20)]).all()
    chosen = AutoVariationalDropout(mixed, sites=lambda name, shape: len(shape) == 2)
    assert set(chosen(y)) == {"w"}


@pytest.mark.parametrize(("arguments", "message"), dropout.BAD)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoVariationalDropout(mixed, **arguments)(torch.arange(4.0, dtype=torch.float64))


def test_before_training():
    guide = AutoVariationalDropout(lambda: pyro.sample("w", ImproperLogUniform()))
    for ask in (guide.log_alpha, guide.median, guide.sample_posterior, lambda: guide.quantiles([0.5])):
        with pytest.raises(
            ValueError, match="the guide AutoVariationalDropout has not been trained: run SVI with it first"
        ):
            ask()
