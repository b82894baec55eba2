"""A model, a kernel and its runs in Pyro's MCMC, for the tests of the host and of compilation."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC

from bnn_ppl.pyro import SGHMC

N, B = 24, 8
rng = np.random.default_rng(0)
X = torch.tensor(rng.normal(size=(N, 2)))
Y = X @ torch.tensor([1.0, -0.5], dtype=torch.float64) + 0.3 * torch.tensor(rng.normal(size=N))


def model(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x), subsample_size=B) as idx:
        pyro.sample("y", dist.Normal(x[idx] @ w, scale), obs=y[idx])


def make(model=model, **options):
    return SGHMC(model, **{"step_size": 0.02, "friction": 5.0, "resample_every": 3, "steps_per_draw": 2} | options)


def run(kernel=None, *args, seed=0, num_samples=4, warmup_steps=1, **options):
    pyro.set_rng_seed(seed)
    mcmc = MCMC(
        make() if kernel is None else kernel,
        num_samples,
        **{"warmup_steps": warmup_steps, "disable_progbar": True} | options,
    )
    mcmc.run(*(args or (X, Y)))
    return mcmc


def draws(mcmc):
    return mcmc.get_samples(group_by_chain=True)


def assert_same(a, b, rtol=0.0, atol=0.0):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=atol, err_msg=name)


def quadratic(z):
    return ((z["a"] - 1.0) ** 2).sum() + (z["b"] - 1.0) ** 2
