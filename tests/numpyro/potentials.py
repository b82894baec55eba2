"""A model on its way to the minibatch potential, and models that the tests of potentials and plates share."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import MCMC, init_to_uniform
from numpyro.infer.util import potential_energy

from bnn_ppl.numpyro import SGLD, potential
from bnn_ppl.numpyro import layout as layouts
from bnn_ppl.numpyro.plates import as_arrays

N, B = 12, 4
rng = np.random.default_rng(0)
X = rng.normal(size=(N, 2))
Y = X @ [1.0, -0.5] + 0.3 * rng.normal(size=N)
TABLE = rng.normal(size=(6, 4))


class Looked:
    """A model, its arguments, and what `inspect_model` found in it."""

    def __init__(self, model, *args, batch_size=None, **kwargs):
        self.model, self.batch_size = model, batch_size
        self.args, self.kwargs = as_arrays((args, kwargs))
        self.layout = layouts.inspect_model(model, self.args, self.kwargs, batch_size)

    def energy(self, z, batch, temperature=1.0):
        return potential.potential_energy(self.model, self.layout, z, temperature, batch, self.args, self.kwargs)

    def start(self):
        """Unconstrained values away from any special point."""
        start = jax.jit(
            lambda key: potential.initial_values(
                self.model, self.layout, key, init_to_uniform(radius=1.0), self.args, self.kwargs
            )
        )
        return start(random.key(1))

    def disjoint_batches(self):
        """Every choice of one part of each plate, the parts of a plate being disjoint and together all its rows."""
        parts = {}
        for name, plate in self.layout.subsampled.items():
            order = np.random.default_rng(plate.size).permutation(plate.size)
            assert plate.size % plate.batch_size == 0
            parts[name] = [jnp.asarray(p) for p in order.reshape(-1, plate.batch_size)]
        return [dict(zip(parts, chosen, strict=True)) for chosen in itertools.product(*parts.values())]

    def assert_unbiased(self, host_model, *args, at_least=2, differentiate=jax.value_and_grad, **kwargs):
        """The mean over disjoint minibatches is the host's potential on all rows, gradient included."""
        z = self.start()
        batches = self.disjoint_batches()
        assert len(batches) >= at_least
        evaluate = jax.jit(differentiate(self.energy))
        values = [evaluate(z, batch) for batch in batches]
        assert np.ptp([jax.tree.leaves(value)[0] for value in values]) > 1e-6  # the minibatches do matter
        mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *values)
        args, kwargs = as_arrays((args, kwargs))
        expected = jax.jit(differentiate(lambda z: potential_energy(host_model, args, kwargs, z)))(z)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), mean, expected)


def refuses(words, model, *args, batch_size=None, **kwargs):
    with pytest.raises(ValueError) as caught:
        Looked(model, *args, batch_size=batch_size, **kwargs)
    for word in words:
        assert word in str(caught.value)


def run(model, *args, num_samples=3, extra_fields=(), **options):
    """A short chain, with few compilations."""
    kernel = SGLD(model, **{"step_size": 1e-3} | options)
    mcmc = MCMC(kernel, num_warmup=0, num_samples=num_samples, progress_bar=False)
    mcmc.run(random.key(0), *args, extra_fields=extra_fields)
    return mcmc.get_samples()


def linear(x, y=None, subsample_size=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("data", len(x), subsample_size=subsample_size) as idx:
        numpyro.sample("y", dist.Normal(x[idx] @ w, scale), obs=None if y is None else y[idx])
