"""SGNHT in NumPyro's MCMC against its stationary law; mirrors tests/pyro/test_sgnht.py."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import MCMC

from bnn_ppl.numpyro import SGNHT
from tests import cases, thermostats


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def run(kernel, *args, draws, warmup=0, chains=1, method="vectorized", start=None):
    mcmc = MCMC(
        kernel, num_warmup=warmup, num_samples=draws, num_chains=chains, chain_method=method, progress_bar=False
    )
    mcmc.run(random.key(0), *args, init_params=start, extra_fields=("momentum",))
    return mcmc


def results(mcmc, by_chain=False):
    statistics = jax.tree.map(np.asarray, mcmc.get_extra_fields(by_chain))
    return jax.tree.map(np.asarray, mcmc.get_samples(by_chain)), statistics.pop("momentum"), statistics


def model(y, subsample_size=None):
    theta = {n: numpyro.sample(n, dist.Normal(0.0, 1.0).expand([v.shape[1]]).to_event(1)) for n, v in y.items()}
    size = len(next(iter(y.values())))
    with numpyro.plate("data", size, subsample_size=subsample_size) as rows:
        for n, v in y.items():
            numpyro.sample(f"y_{n}", dist.Normal(theta[n], size**0.5).to_event(1), obs=v[rows])


@pytest.mark.parametrize("case", thermostats.NOISES)
def test_stationary_law(case):
    """Gradient noise moves the thermostat, not the momenta's temperature."""
    variance = thermostats.NOISES[case]
    data = cases.offset_data(dict.fromkeys("ab", variance))
    if not variance:
        data = {n: v[:1] for n, v in data.items()}  # zeros, of which one row says as much
    kernel = SGNHT(model, subsampling="with_replacement", steps_per_draw=thermostats.STEPS, **thermostats.ARGUMENTS)
    rows = cases.BATCH if variance else None
    found = results(run(kernel, data, rows, draws=thermostats.DRAWS, warmup=20))
    cases.assert_scores(thermostats.scores(*found, cases.OFFSET_CURVATURE, variance))
    assert not found[2]["diverging"].any()


def test_spread_of_the_thermostat():
    def few():
        numpyro.sample("x", dist.Normal(0.0, 1.0).expand([12]).to_event(1))

    kernel = SGNHT(few, steps_per_draw=2, **thermostats.ARGUMENTS)
    thermostats.assert_thermostat(results(run(kernel, draws=20_000, warmup=100))[2]["thermostat"], 12)


def test_chains_and_a_resumed_run():
    data = cases.offset_data({"a": 1.0, "b": 1.0})

    def make():
        return SGNHT(model, steps_per_draw=2, step_size=0.1, friction=1.0, temperature=lambda step: 0.5 + 0.01 * step)

    whole = results(run(make(), data, 32, draws=8, chains=3), True)
    apart = results(run(make(), data, 32, draws=8, chains=3, method="sequential"), True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), whole, apart)
    first = run(make(), data, 32, draws=3, chains=3)
    second = MCMC(make(), num_warmup=0, num_samples=5, num_chains=3, chain_method="vectorized", progress_bar=False)
    second.post_warmup_state = first.last_state
    second.run(first.last_state.rng_key, data, 32, extra_fields=("momentum",))
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b], 1), results(first, True), results(second, True))
    jax.tree.map(np.testing.assert_array_equal, whole, joined)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0 for SGNHT"),
        ({"friction": 0.0}, "friction must be finite and greater than 0, got 0"),
        ({"step_size": -1.0}, "step_size must be finite and greater than 0, got -1"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        SGNHT(model, **({"step_size": 0.1, "friction": 1.0} | arguments))


def test_a_chain_that_is_not_finite_starts_anew():
    kernel = SGNHT(potential_fn=lambda z: jnp.where(z["x"] > 0.5, jnp.nan, -z["x"]).sum(), step_size=0.5, friction=1.0)
    theta, _, statistics = results(run(kernel, draws=20, start={"x": jnp.zeros(1)}))
    assert statistics["diverging"].any()
    assert np.isfinite(theta["x"]).all()
    assert np.isfinite(statistics["thermostat"]).all()
