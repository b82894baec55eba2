"""KL annealing in Pyro's SVI; mirrors tests/numpyro/test_annealed_elbo.py."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import SGD

from bnn_ppl.pyro import AnnealedELBO
from tests import annealed

X = torch.linspace(-1, 1, 8, dtype=torch.float64)


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", -(w**2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x * w, 1.0), obs=y)


def guide(x, y=None):
    scale = pyro.param("scale", torch.tensor(annealed.SCALE), constraint=dist.constraints.positive)
    pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(annealed.LOC)), scale))


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)


def loss_and_slopes(elbo, **kwargs):
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    loss = elbo.loss_and_grads(model, guide, X, 2 * X, **kwargs)
    slopes = {name: pyro.param(name).unconstrained().grad.item() for name in ("loc", "scale")}
    return loss, slopes | {"scale": slopes["scale"] / annealed.SCALE}


@pytest.mark.parametrize("kl_weight", annealed.WEIGHTS)
@pytest.mark.parametrize("particles", [1, 3])
def test_value_of_the_elbo_and_gradient_of_the_weighted_one(kl_weight, particles):
    value, slope = loss_and_slopes(TraceMeanField_ELBO(num_particles=particles))
    found, changed = loss_and_slopes(AnnealedELBO(num_particles=particles), kl_weight=kl_weight)
    assert found == pytest.approx(value, rel=1e-12)
    for name, lack in zip(("loc", "scale"), annealed.missing(kl_weight), strict=True):
        assert changed[name] == pytest.approx(slope[name] + lack, rel=1e-9)


def test_in_svi():
    """The weight may change from step to step, and is 1 where it is left out."""
    svi = SVI(model, guide, SGD({"lr": 0.1}), AnnealedELBO())
    moved = {}
    for kl_weight in (0.0, 1.0, None):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = svi.step(X, 2 * X) if kl_weight is None else svi.step(X, 2 * X, kl_weight=kl_weight)
        moved[kl_weight] = pyro.param("loc").item(), loss
    assert moved[0.0][0] - moved[1.0][0] == pytest.approx(0.1 * annealed.LOC, rel=1e-6)
    assert moved[0.0][1] == moved[1.0][1]
    assert moved[None] == moved[1.0]
    pyro.set_rng_seed(0)
    loss = svi.evaluate_loss(X, 2 * X, kl_weight=0.1)
    pyro.set_rng_seed(0)
    assert loss == svi.evaluate_loss(X, 2 * X)
    pyro.set_rng_seed(0)
    assert loss == pytest.approx(AnnealedELBO().differentiable_loss(model, guide, X, 2 * X, kl_weight=0.1).item())


@pytest.mark.parametrize("kl_weight", [-0.1, float("nan"), float("inf"), "0.1", None])
def test_bad_weights(kl_weight):
    svi = SVI(model, guide, SGD({"lr": 0.1}), AnnealedELBO())
    with pytest.raises(ValueError, match="kl_weight must be a finite number of at least 0, got"):
        svi.step(X, 2 * X, kl_weight=kl_weight)
