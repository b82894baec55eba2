"""SGHMC against NumPyro's NUTS in function space, on a network small enough for it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import MCMC, NUTS

from bnn_ppl.numpyro import SGHMC

CHAINS = 40
POINTS = jnp.array([-2.5, -1.0, -0.2, 0.6, 2.5])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def forward(weights, x):
    return jnp.tanh(x[:, None] * weights["w"] + weights["b"]) @ weights["v"]


def model(x, y):
    weights = {n: numpyro.sample(n, dist.Normal(0.0, 1.0).expand([3]).to_event(1)) for n in ("b", "v", "w")}
    noise = numpyro.sample("noise", dist.LogNormal(-1.2, 0.2))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(forward(weights, x), noise), obs=y)


def functions(kernel, seed, warmup, draws, x, y):
    """Network outputs at POINTS and the log of the noise, shape (chains, draws, 6)."""
    mcmc = MCMC(
        kernel,
        num_warmup=warmup,
        num_samples=draws,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(random.key(seed), x, y)
    samples = mcmc.get_samples(group_by_chain=True)
    outputs = jax.vmap(jax.vmap(lambda weights: forward(weights, POINTS)))(samples)
    return np.asarray(jnp.concatenate([outputs, jnp.log(samples["noise"])[..., None]], -1))


@pytest.mark.parametrize("integrator", ["baoab"])
def test_sghmc_agrees_with_nuts(integrator):
    """Means and second moments of the functions, with errors from independent chains."""
    x = jnp.linspace(-2.0, 2.0, 12)
    y = jnp.sin(1.5 * x) + 0.2 * random.normal(random.key(3), x.shape)
    nuts = functions(NUTS(model), 1, 200, 200, x, y)
    kernel = SGHMC(model, step_size=0.03, friction=1.0, steps_per_draw=25, integrator=integrator)
    sghmc = functions(kernel, 2, 150, 400, x, y)
    spread = nuts.std((0, 1))
    for power in (1, 2):
        centre = nuts.mean((0, 1)) if power == 2 else 0.0  # a constant: it moves the power, not the truth
        means = [((f - centre) ** power).mean(1) for f in (nuts, sghmc)]
        error = np.sqrt(sum(m.var(0, ddof=1) / CHAINS for m in means))
        z = (means[1].mean(0) - means[0].mean(0)) / error
        assert np.all(np.abs(z) < 4), z
        assert np.all(error < 0.1 * spread**power), error / spread**power  # else the test says little
