"""Pruned networks under Pyro's predict; mirrors tests/numpyro/test_sparsity.py."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value

from bnn_ppl.diagnostics import log_alpha, prune, signal_to_noise, sparsity
from bnn_ppl.pyro import AutoVariationalDropout, ImproperLogUniform, predict

RNG = np.random.default_rng(0)
X = torch.tensor(RNG.normal(size=(9, 4)), dtype=torch.float32)
LOC, SD = torch.tensor([1.0, -0.01, 2.0, 0.0]), torch.tensor([0.1, 0.5, 0.3, 0.4])
KEPT = np.array([1.0, 0.0, 2.0, 0.0])


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with torch.random.fork_rng():
        yield


def model(x, y=None):
    w = pyro.sample("w", ImproperLogUniform().expand([4]).to_event(1))
    offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + offset, 1.0), obs=y)


def test_pruned_model_predicts():
    dropout = AutoVariationalDropout(
        model, sites=["w"], parameterization="additive", init_loc_fn=init_to_value(values={"w": LOC})
    )
    guide = AutoGuideList(model)
    guide.append(dropout)
    offset = init_to_value(values={"offset": torch.tensor(0.7)})
    guide.append(AutoNormal(poutine.block(model, hide=["w"]), init_loc_fn=offset))
    guide(X, X @ LOC)
    dropout.log_sigmas.w = SD.log()
    alpha = dropout.log_alpha()
    assert sparsity(alpha).loc["w", "kept"] == 2
    np.testing.assert_allclose(signal_to_noise(alpha)["w"], LOC.abs() / SD, rtol=1e-5)
    pruned = prune(guide.median(), alpha)
    np.testing.assert_array_equal(pruned["w"], [KEPT])
    found = predict(pruned, X, X @ LOC, model=model)
    np.testing.assert_allclose(found["mean"], X.numpy() @ KEPT + 0.7, rtol=1e-5)
    np.testing.assert_allclose(found["sd"], 1)
    assert found.attrs["num_draws"] == 1


def test_log_alpha_of_draws_of_a_guide():
    loc, sd = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64), 0.3
    guide = AutoNormal(
        lambda: pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1)),
        init_loc_fn=init_to_value(values={"w": loc}),
        init_scale=sd,
    )
    with pyro.plate("draws", 20_000, dim=-2):
        draws = {name: value.reshape(20_000, 4) for name, value in guide().items()}
    assert draws["w"].requires_grad
    alpha = (sd / loc.numpy()) ** 2
    z = (log_alpha(draws)["w"] - np.log(alpha)) / np.sqrt((2 + 4 * alpha) / 20_000)
    assert np.abs(z).max() < 4


def test_tensors_that_need_a_gradient():
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    found = prune({"w": value}, {"w": torch.tensor([4.0, 0.0], requires_grad=True)})["w"]
    assert found.tolist() == [[0, 2]]
    assert found.dtype == np.float32
    assert value.tolist() == [1, 2]
