"""SGHMC with masses that are adapted in the warm-up, in NumPyro's MCMC; mirrors tests/pyro/test_adapted_mass.py."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import MCMC

import bnn_ppl
from bnn_ppl.diagnostics import temperature_series, temperature_table
from bnn_ppl.numpyro import SGHMC, norm_adjusting_sghmc
from tests import adapted, cases


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def run(kernel, *args, draws, warmup=0, start=None, chains=1, method="vectorized", state=None):
    """Run the host's MCMC, from a state of another run if given."""
    mcmc = MCMC(
        kernel, num_warmup=warmup, num_samples=draws, num_chains=chains, chain_method=method, progress_bar=False
    )
    mcmc.post_warmup_state = state
    key = random.key(0) if state is None else state.rng_key
    mcmc.run(key, *args, init_params=start, extra_fields=("momentum", "mass"))
    return mcmc


def results(mcmc, group_by_chain=False):
    """Positions, momenta and masses by site, shape (draws, ...), and statistics by name."""
    statistics = jax.tree.map(np.asarray, mcmc.get_extra_fields(group_by_chain))
    theta = jax.tree.map(np.asarray, mcmc.get_samples(group_by_chain))
    return theta, statistics.pop("momentum"), statistics.pop("mass"), statistics


def frozen(mass):
    """The masses, which all draws have."""
    for values in mass.values():
        np.testing.assert_array_equal(values, np.broadcast_to(values[0], values.shape))
    return {site: values[0] for site, values in mass.items()}


def gaussian():
    for site, k in adapted.precisions().items():
        numpyro.sample(site, dist.Normal(0.0, jnp.asarray(k**-0.5)).to_event(1))


@pytest.mark.parametrize("kind", adapted.KINDS)
@pytest.mark.parametrize("integrator", adapted.INTEGRATORS)
def test_stationary_law_given_the_masses(integrator, kind):
    kernel = SGHMC(gaussian, mass=kind, integrator=integrator, **adapted.SGHMC)
    mcmc = run(kernel, draws=adapted.SGHMC_DRAWS, warmup=adapted.SGHMC_WARMUP[kind])
    theta, r, mass, statistics = results(mcmc)
    mass = frozen(mass)
    adapted.assert_masses_follow_gradients(mass, integrator, kind)
    cases.assert_scores(adapted.mass_scores(theta, r, mass, integrator))
    kinetic = np.stack([(r[site] ** 2 / mass[site]).mean(1) for site in sorted(r)], 1)
    np.testing.assert_allclose(statistics["site_kinetic_temperature"], kinetic, rtol=1e-9)
    np.testing.assert_allclose(statistics["kinetic_temperature"], kinetic.mean(1), rtol=1e-9)
    assert not statistics["diverging"].any()


def quartic(z):
    return sum(jnp.sum((adapted.SCALES[site] * value) ** 4) for site, value in z.items()) / 4


@pytest.mark.parametrize("kind", adapted.KINDS)
@pytest.mark.parametrize("integrator", adapted.INTEGRATORS)
def test_zero_temperature_step_for_step(integrator, kind):
    """Averages, masses, the rescaling of momenta, friction and the end of the adaptation."""
    kernel = SGHMC(
        potential_fn=quartic,
        mass=kind,
        integrator=integrator,
        steps_per_draw=adapted.PATH_STEPS,
        **adapted.SGHMC_PATH,
    )
    start = jax.tree.map(jnp.asarray, adapted.quartic_start())
    parts = results(run(kernel, draws=adapted.PATH_DRAWS, warmup=adapted.PATH_WARMUP, start=start))
    for draw, expected in enumerate(adapted.sghmc_path(integrator, kind)):
        for part, values in zip(parts, expected, strict=False):
            for site, value in values.items():
                np.testing.assert_allclose(part[site][draw], value, rtol=1e-9)


def test_positions_without_names():
    kernel = SGHMC(potential_fn=lambda z: jnp.sum(z[0] ** 2) + 50 * jnp.sum(z[1] ** 2), mass="adapt", **adapted.STIFF)
    mcmc = run(kernel, draws=5, warmup=20, start=(jnp.ones(50), jnp.ones(50)))
    soft, stiff = mcmc.last_state.mass
    assert soft == 1
    assert 5 < stiff < 10  # sqrt(50) at stationarity


@pytest.mark.parametrize("kind", adapted.KINDS)
def test_a_badly_scaled_gaussian(kind):
    def model():
        for site, k in adapted.STIFF_CURVATURE.items():
            units = adapted.STIFF_UNITS[kind][site]
            numpyro.sample(site, dist.Normal(0.0, k**-0.5).expand([units]).to_event(1))

    mcmc = run(SGHMC(model, mass=kind, **adapted.STIFF), draws=adapted.STIFF_DRAWS, warmup=adapted.STIFF_WARMUP)
    theta, _, _, statistics = results(mcmc)
    assert not statistics["diverging"].any()
    cases.assert_scores(adapted.stiff_scores(theta))
    _, _, _, statistics = results(run(SGHMC(model, **adapted.STIFF), draws=30))
    assert statistics["diverging"].any()


@pytest.mark.parametrize("kind", adapted.KINDS)
def test_refresh(kind):
    start = {site: jnp.ones(len(k)) for site, k in adapted.precisions().items()}
    _, r, mass, _ = results(run(SGHMC(gaussian, mass=kind, **adapted.REFRESH), draws=20, warmup=2, start=start))
    cases.assert_scores(adapted.refresh_scores(r, frozen(mass)))


def short_run(kind, draws, warmup=4, chains=2, **arguments):
    """Draws of several chains that start alike."""
    kernel = SGHMC(potential_fn=quartic, mass=kind, steps_per_draw=2, **adapted.SHORT)
    start = {site: jnp.stack([jnp.asarray(x)] * chains) for site, x in adapted.quartic_start().items()}
    return run(kernel, draws=draws, warmup=warmup, start=start, chains=chains, **arguments)


@pytest.mark.parametrize("kind", adapted.KINDS)
def test_a_resumed_run_is_the_uninterrupted_run(kind):
    """Whatever the warm-up of the second run's MCMC, whose kernel is another one."""
    whole = results(short_run(kind, draws=10), True)
    first = short_run(kind, draws=5)
    second = short_run(kind, draws=5, warmup=50, state=first.last_state)
    halves = (results(first, True), results(second, True))
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b], 1), *halves)
    jax.tree.map(np.testing.assert_array_equal, whole, joined)


def test_vectorized_chains_are_sequential_chains():
    together, apart = (
        results(short_run("adapt_coordinates", draws=6, chains=3, method=method), True)
        for method in ("vectorized", "sequential")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), together, apart)
    assert np.ptp(together[2]["a"][:, -1]) + np.ptp(together[2]["b"][:, -1]) > 0  # masses of their own


def test_a_chain_that_diverged_keeps_its_masses():
    def walled(z):
        x = jnp.concatenate([z["a"], z["b"]])
        return jnp.sum(jnp.where(jnp.abs(x) < adapted.WALL, x**2 / 2, jnp.nan))

    kernel = SGHMC(potential_fn=walled, step_size=0.1, friction=1.0, mass="adapt")
    start = {"a": jnp.full(1, 0.1), "b": jnp.full(1, 0.4)}
    theta, _, mass, statistics = results(run(kernel, draws=adapted.WALL_DRAWS, warmup=adapted.WALL_WARMUP, start=start))
    assert 0 < statistics["diverging"].sum() < adapted.WALL_DRAWS
    assert max(np.abs(value).max() for value in theta.values()) < adapted.WALL
    assert max(value for value in frozen(mass).values()) > 1


def test_temperatures_in_a_table():
    mcmc = run(SGHMC(gaussian, mass="adapt", **adapted.TABLE), draws=adapted.TABLE_DRAWS, warmup=60)
    tree = bnn_ppl.to_arviz(mcmc)
    mass = frozen(results(mcmc)[2])
    adapted.assert_expected_kinetic(temperature_series(tree), temperature_series(tree, curvature=5.0), mass)
    table = temperature_table(tree)
    assert set(table["verdict"][(table["quantity"] == "kinetic") & (table["part"] == "soft")]) == {"at its temperature"}


@pytest.mark.parametrize(("options", "message"), adapted.BAD_SGHMC)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SGHMC(gaussian, **{"step_size": 0.1, "friction": 1.0} | options)


@pytest.mark.parametrize("kind", adapted.KINDS)
def test_without_a_warmup(kind):
    with pytest.raises(ValueError, match=f"mass='{kind}' {adapted.NO_WARMUP}mass to a number"):
        run(SGHMC(gaussian, mass=kind, **adapted.SGHMC), draws=1)


@pytest.mark.parametrize("integrator", adapted.INTEGRATORS)
def test_other_ways_to_make_a_kernel(integrator):
    one, kind = (
        SGHMC.from_learning_rate(gaussian, mass=mass, integrator=integrator, **adapted.LEARNING_RATE).settings
        for mass in (1.0, "adapt")
    )
    assert (one.step_size, one.friction, "adapt") == (kind.step_size, kind.friction, kind.mass)
    with pytest.raises(ValueError, match=r"mass must be a number or a dict by site name here, .* got 'adapt'"):
        norm_adjusting_sghmc(gaussian, mass="adapt", integrator=integrator, **adapted.NORM_ADJUSTING)
