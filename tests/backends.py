"""Both hosts behind one interface, a model for both, and checks of messages."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions
import numpyro.infer
import pyro
import pyro.distributions
import pyro.infer
import pytest
import torch

import bnn_ppl.numpyro
import bnn_ppl.pyro

N, B = 12, 4
rng = np.random.default_rng(0)
X = rng.normal(size=(N, 2))
Y = X @ [1.0, -0.5]


class NumPyro:
    name, host, kernels, where = "numpyro", numpyro, bnn_ppl.numpyro, staticmethod(jnp.where)
    starts, nan, inf = "init_params", jnp.nan, jnp.inf

    @staticmethod
    def array(x):
        return jnp.asarray(x)

    @staticmethod
    def run(kernel, *args, seed=0, num_samples=2, num_warmup=0, start=None):
        """Draws, and whether they diverged."""
        mcmc = numpyro.infer.MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, progress_bar=False)
        mcmc.run(jax.random.key(seed), *args, init_params=start)
        draws = {name: np.asarray(value) for name, value in mcmc.get_samples().items()}
        return draws, {name: np.asarray(value) for name, value in mcmc.get_extra_fields().items()}


class Pyro:
    name, host, kernels, where = "pyro", pyro, bnn_ppl.pyro, staticmethod(torch.where)
    starts, nan, inf = "initial_params", float("nan"), float("inf")

    @staticmethod
    def array(x):
        return torch.tensor(x)

    @staticmethod
    def run(kernel, *args, seed=0, num_samples=2, num_warmup=0, start=None):
        pyro.set_rng_seed(seed)
        mcmc = pyro.infer.MCMC(kernel, num_samples, warmup_steps=num_warmup, initial_params=start, disable_progbar=True)
        mcmc.run(*(torch.tensor(a) if isinstance(a, np.ndarray) else a for a in args))
        draws = {name: value.numpy() for name, value in mcmc.get_samples().items()}
        statistics = mcmc._diagnostics[0]
        return draws, {name: statistics[name].numpy() for name in kernel.statistic_fields}


def make_linear(backend, subsample_size=B, latent=None):
    host, dist = backend.host, backend.host.distributions

    def model(x, y):
        w = host.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        scale = host.sample("scale", dist.HalfNormal(1.0))
        if latent is not None:
            latent(host, dist)
        with host.plate("data", len(x), subsample_size=subsample_size) as idx:
            host.sample("y", dist.Normal(x[idx] @ w, scale), obs=y[idx])

    return model


def message(call, *args, error=ValueError, **kwargs):
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def assert_all_in(words, text):
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in {text!r}"
