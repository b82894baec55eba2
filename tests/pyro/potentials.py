"""A model on its way to the minibatch potential, and models that the tests of potentials and plates share."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC
from pyro.infer.mcmc.util import initialize_model
from torch.distributions import biject_to

from bnn_ppl.pyro import SGLD, init_to_prior_center, potential
from bnn_ppl.pyro import layout as layouts

N, B = 12, 4
rng = np.random.default_rng(0)
X = torch.tensor(rng.normal(size=(N, 2)))
Y = X @ torch.tensor([1.0, -0.5], dtype=torch.float64) + 0.3 * torch.tensor(rng.normal(size=N))
TABLE = torch.tensor(rng.normal(size=(6, 4)))


class Looked:
    """A model, its arguments, and what `inspect_model` found in it."""

    def __init__(self, model, *args, batch_size=None, **kwargs):
        self.model, self.args, self.kwargs = model, args, kwargs
        self.layout = layouts.inspect_model(model, init_to_prior_center, args, kwargs, batch_size)

    def energy(self, z, batch, temperature=1.0):
        return potential.potential_energy(self.model, self.layout, z, temperature, batch, self.args, self.kwargs)

    def start(self):
        """Unconstrained values away from any special point."""
        return self.layout.initial

    def disjoint_batches(self):
        """Every choice of one part of each plate, the parts of a plate being disjoint and together all its rows."""
        parts = {}
        for name, plate in self.layout.subsampled.items():
            order = np.random.default_rng(plate.size).permutation(plate.size)
            assert plate.size % plate.batch_size == 0
            parts[name] = [torch.tensor(p) for p in order.reshape(-1, plate.batch_size)]
        return [dict(zip(parts, chosen, strict=True)) for chosen in itertools.product(*parts.values())]

    def assert_unbiased(self, host_model, *args, at_least=2, **kwargs):
        """The mean over disjoint minibatches is the host's potential on all rows, gradient included."""
        z = self.start()
        batches = self.disjoint_batches()
        assert len(batches) >= at_least
        values = [value_and_gradient(lambda z, batch=batch: self.energy(z, batch), z) for batch in batches]
        assert np.ptp([v for v, _ in values]) > 1e-6  # the minibatches do matter
        expected, expected_gradient = value_and_gradient(host_potential(host_model, z, *args, **kwargs), z)
        np.testing.assert_allclose(np.mean([v for v, _ in values]), expected, rtol=1e-10)
        for name in z:
            mean = np.mean([g[name] for _, g in values], axis=0)
            np.testing.assert_allclose(mean, expected_gradient[name], rtol=1e-9, atol=1e-9)


def value_and_gradient(energy, z):
    z = {name: value.clone().requires_grad_() for name, value in z.items()}
    value = energy(z)
    gradient = torch.autograd.grad(value, list(z.values()))
    return value.item(), {name: g.numpy() for name, g in zip(z, gradient, strict=True)}


def host_potential(model, z, *args, **kwargs):
    """The host's potential; by its log density for the improper priors, on which its initialize_model fails."""
    try:
        return initialize_model(model, model_args=args, model_kwargs=kwargs, initial_params=z)[1]
    except NotImplementedError:
        sites = poutine.trace(poutine.condition(model, z)).get_trace(*args, **kwargs).nodes
        transforms = {name: biject_to(sites[name]["fn"].support) for name in z}

    def energy(z):
        values = {name: transforms[name](z[name]) for name in z}
        jacobians = [transforms[name].log_abs_det_jacobian(z[name], values[name]).sum() for name in z]
        trace = poutine.trace(poutine.condition(model, values)).get_trace(*args, **kwargs)
        return -trace.log_prob_sum() - sum(jacobians)

    return energy


def refuses(words, model, *args, batch_size=None, **kwargs):
    with pytest.raises(ValueError) as caught:
        Looked(model, *args, batch_size=batch_size, **kwargs)
    for word in words:
        assert word in str(caught.value)


def run(model, *args, num_samples=3, **options):
    """A short chain."""
    mcmc = MCMC(SGLD(model, **{"step_size": 1e-3} | options), num_samples, warmup_steps=0, disable_progbar=True)
    mcmc.run(*args)
    return mcmc.get_samples()


def linear(x, y=None, subsample_size=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x), subsample_size=subsample_size) as idx:
        pyro.sample("y", dist.Normal(x[idx] @ w, scale), obs=None if y is None else y[idx])
