"""NumPyro and Pyro take the same steps at T = 0 from the same torch DataLoader."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import bnn_ppl.numpyro
import bnn_ppl.pyro

N, B = 22, 5
DRAWS = 12
_rng = np.random.default_rng(2)
X = _rng.normal(size=(N, 3))
Y = np.tanh(X @ [1.0, -0.5, 0.2]) + 0.3 * _rng.normal(size=N)
START = {"scale": np.array(0.8), "w": np.array([0.3, 0.1, -0.2])}
OPTIONS = {"temperature": 0.0, "steps_per_draw": 3, "init_strategy": START}


@pytest.fixture(autouse=True)
def float64():
    """For all threads, since NumPyro's batches are loaded in another one."""
    jax.config.update("jax_enable_x64", True)
    torch.set_default_dtype(torch.float64)
    yield
    jax.config.update("jax_enable_x64", False)
    torch.set_default_dtype(torch.float32)


class Rows(torch.utils.data.Dataset):
    """A dataset of dicts, as those of text and images often are."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"y": Y[i], "x": X[i]}


def loader(**options):
    """A loader whose order is the same whenever it is made."""
    dataset = TensorDataset(torch.tensor(X), torch.tensor(Y))
    options = {"dataset": dataset, "batch_size": B, "shuffle": True} | options
    return DataLoader(**options, generator=torch.Generator().manual_seed(4))


def make_model(ppl, dist, tanh):
    def model(x, y):
        scale = ppl.sample("scale", dist.HalfNormal(1.0))
        w = ppl.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with ppl.plate("data", N, subsample_size=len(x)):
            ppl.sample("y", dist.Normal(tanh(x @ w), scale), obs=y)

    return model


def numpyro_draws(name, batches, arguments):
    model = make_model(numpyro, numpyro_dist, jnp.tanh)
    kernel = getattr(bnn_ppl.numpyro, name)(model, minibatches=batches, **OPTIONS, **arguments)
    mcmc = numpyro.infer.MCMC(kernel, num_warmup=0, num_samples=DRAWS, progress_bar=False)
    mcmc.run(jax.random.key(0))
    return mcmc.get_samples(), mcmc.get_extra_fields()["lp_minibatch"]


def pyro_draws(name, batches, arguments):
    model = make_model(pyro, pyro_dist, torch.tanh)
    kernel = getattr(bnn_ppl.pyro, name)(model, minibatches=batches, **OPTIONS, **arguments)
    mcmc = pyro.infer.MCMC(kernel, DRAWS, warmup_steps=0, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples(), mcmc._diagnostics[0]["lp_minibatch"]


@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [
        ("SGLD", {"step_size": 0.005}, {}),
        ("SGHMC", {"step_size": 0.04, "friction": 2.0, "mass": {"scale": 2.0, "w": 0.7}}, {}),
        ("SGHMC", {"step_size": 0.04, "friction": 2.0, "integrator": "symplectic_euler"}, {"drop_last": True}),
        ("SGLD", {"step_size": lambda step: 0.005 / (1.0 + step)}, {"dataset": Rows()}),
    ],
    ids=["SGLD", "baoab", "symplectic_euler dropping", "SGLD of dicts"],
)
def test_backends_take_the_same_batches(name, arguments, options):
    ours, our_lp = numpyro_draws(name, loader(**options), arguments)
    theirs, their_lp = pyro_draws(name, loader(**options), arguments)
    assert set(ours) == set(theirs) == set(START)
    for site, value in ours.items():
        np.testing.assert_allclose(value, theirs[site], rtol=1e-9, err_msg=site)
        assert (np.diff(value, axis=0) != 0).all()
    np.testing.assert_allclose(our_lp, their_lp, rtol=1e-9)
