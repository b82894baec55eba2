"""PSGLD in NumPyro's MCMC against exact laws; mirrors tests/pyro/test_psgld.py."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import MCMC

from bnn_ppl.numpyro import PSGLD
from bnn_ppl.schedules import Cyclical
from tests import adapted, cases


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


FIELDS = ("average.second_moment", "average.weight", "average.until")


def run(kernel, *args, draws, warmup=0, start=None, chains=1, method="vectorized", state=None):
    """Run the host's MCMC, from a state of another run if given."""
    mcmc = MCMC(
        kernel, num_warmup=warmup, num_samples=draws, num_chains=chains, chain_method=method, progress_bar=False
    )
    mcmc.post_warmup_state = state
    mcmc.run(random.key(0) if state is None else state.rng_key, *args, init_params=start, extra_fields=FIELDS)
    return mcmc


def results(mcmc, group_by_chain=False):
    """Positions by site, average by site and statistics by name, all of shape (draws, ...)."""
    statistics = jax.tree.map(np.asarray, mcmc.get_extra_fields(group_by_chain))
    theta = jax.tree.map(np.asarray, mcmc.get_samples(group_by_chain))
    return theta, statistics.pop("average.second_moment"), statistics


def gaussian():
    for site, k in adapted.precisions().items():
        numpyro.sample(site, dist.Normal(0.0, jnp.asarray(k**-0.5)).to_event(1))


@pytest.mark.parametrize(("temperature", "noise"), [(1.0, "normal"), (0.1, "normal"), (1.0, "fast")])
def test_stationary_law_given_the_preconditioner(temperature, noise):
    kernel = PSGLD(gaussian, temperature=temperature, noise=noise, **adapted.PSGLD)
    theta, average, statistics = results(run(kernel, draws=adapted.PSGLD_DRAWS, warmup=adapted.PSGLD_WARMUP))
    for values in average.values():
        np.testing.assert_array_equal(values, np.broadcast_to(values[0], values.shape))
    weight = statistics["average.weight"][0]
    assert weight == pytest.approx(1 - 0.99 ** (adapted.PSGLD_WARMUP * adapted.PSGLD["steps_per_draw"]))
    G = {site: adapted.preconditioner(v[0], weight, adapted.PSGLD["damping"]) for site, v in average.items()}
    cases.assert_scores(adapted.psgld_scores(theta, G, temperature))
    assert not statistics["diverging"].any()
    np.testing.assert_array_equal(statistics["temperature"], temperature)


def test_transition_law():
    def model():
        for site, k in cases.TRANSITION_CURVATURE.items():
            numpyro.sample(site, dist.Normal(0.0, k**-0.5).expand([adapted.TRANSITION_UNITS]).to_event(1))

    start = {site: jnp.full(adapted.TRANSITION_UNITS, cases.START) for site in cases.TRANSITION_CURVATURE}
    mcmc = run(PSGLD(model, **adapted.TRANSITION), draws=adapted.TRANSITION_DRAWS, warmup=1, start=start)
    cases.assert_scores(adapted.psgld_transition_scores(results(mcmc)[0]))


def quartic(z):
    return sum(jnp.sum((adapted.SCALES[site] * value) ** 4) for site, value in z.items()) / 4


@pytest.mark.parametrize("freeze", [True, False])
def test_zero_temperature_step_for_step(freeze):
    kernel = PSGLD(potential_fn=quartic, freeze=freeze, steps_per_draw=adapted.PATH_STEPS, **adapted.PSGLD_PATH)
    start = jax.tree.map(jnp.asarray, adapted.quartic_start())
    theta, average, _ = results(run(kernel, draws=adapted.PATH_DRAWS, warmup=adapted.PATH_WARMUP, start=start))
    for draw, expected in enumerate(adapted.psgld_path(freeze)):
        for site, value in expected.items():
            np.testing.assert_allclose(theta[site][draw], value, rtol=1e-10)
    frozen = [np.all(values == values[0]) for values in average.values()]
    assert frozen == [freeze] * len(average)


def streamed(**arguments):
    """A kernel with minibatches that straddle epochs, on data of 10 rows."""

    def model(y):
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        with numpyro.plate("data", cases.COUNT_ROWS, subsample_size=cases.COUNT_BATCH) as rows:
            numpyro.sample("y", dist.Normal(theta, scale).to_event(1), obs=y[rows])

    return PSGLD(model, **({"step_size": 0.02, "steps_per_draw": 2, "temperature": 0.7} | arguments))


Y = np.random.default_rng(2).standard_normal((cases.COUNT_ROWS, 3)) + 1


def short_run(freeze, draws, warmup=4, chains=2, **arguments):
    """Draws of several chains that start alike."""
    kernel = PSGLD(potential_fn=quartic, freeze=freeze, step_size=0.1, temperature=0.3, steps_per_draw=2)
    start = {site: jnp.stack([jnp.asarray(x)] * chains) for site, x in adapted.quartic_start().items()}
    return run(kernel, draws=draws, warmup=warmup, start=start, chains=chains, **arguments)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_resumed_run_is_the_uninterrupted_run(freeze):
    """Whatever the warm-up of the second run's MCMC, whose kernel is another one."""
    whole = results(short_run(freeze, draws=10), True)
    first = short_run(freeze, draws=5)
    second = short_run(freeze, draws=5, warmup=50, state=first.last_state)
    halves = (results(first, True), results(second, True))
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b], 1), *halves)
    jax.tree.map(np.testing.assert_array_equal, whole, joined)


def test_vectorized_chains_are_sequential_chains():
    together, apart = (
        results(short_run(True, draws=6, chains=3, method=method), True) for method in ("vectorized", "sequential")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), together, apart)
    assert np.ptp(together[1]["b"][:, -1], axis=0).min() > 0  # chains have averages of their own


def test_adaptation_ends_with_the_warmup_in_cycles():
    kernel = streamed(step_size=Cyclical(**adapted.CYCLE), steps_per_draw=1)
    _, average, statistics = results(run(kernel, Y, draws=5, warmup=adapted.CYCLE_WARMUP))
    np.testing.assert_array_equal(statistics["average.until"], adapted.CYCLE_UNTIL)
    assert all(np.all(values == values[0]) for values in average.values())


def test_a_chain_that_diverged_keeps_its_average():
    def walled(z):
        return jnp.sum(jnp.where(jnp.abs(z["x"]) < adapted.WALL, z["x"] ** 2 / 2, jnp.nan))

    kernel = PSGLD(potential_fn=walled, step_size=0.1)
    theta, average, statistics = results(
        run(kernel, draws=adapted.WALL_DRAWS, warmup=adapted.WALL_WARMUP, start={"x": jnp.full(2, 0.1)})
    )
    assert 0 < statistics["diverging"].sum() < adapted.WALL_DRAWS
    assert np.abs(theta["x"]).max() < adapted.WALL
    assert np.all(average["x"] == average["x"][0])
    assert np.all(average["x"] > 0)


@pytest.mark.parametrize(("options", "message"), adapted.BAD_PSGLD)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        PSGLD(gaussian, **{"step_size": 0.1} | options)


def test_without_a_warmup():
    with pytest.raises(ValueError, match="freeze=True " + adapted.NO_WARMUP + "freeze=False"):
        run(PSGLD(gaussian, step_size=0.1), draws=1)
    run(PSGLD(gaussian, step_size=0.1, freeze=False), draws=1)
