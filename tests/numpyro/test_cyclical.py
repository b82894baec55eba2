"""Cycles in NumPyro's MCMC: draws in the sampling phases, with the exact law; mirrors tests/pyro/test_cyclical.py."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import MCMC

import bnn_ppl
from bnn_ppl.numpyro import SGHMC, SGLD
from bnn_ppl.schedules import CosineRestarts, Cyclical
from tests import cases, cycles, laws


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def make_kernel(scheme, **arguments):
    if scheme in laws.OVERDAMPED:
        return SGLD(model, integrator="euler" if scheme == "sgld" else scheme, **arguments)
    return SGHMC(model, integrator=scheme, **arguments)


def model(units=cycles.UNITS):
    for site, k in cases.TRANSITION_CURVATURE.items():
        numpyro.sample(site, dist.Normal(0.0, k**-0.5).expand([units]).to_event(1))


def run(kernel, warmup, draws, *args, chains=1, method="sequential", start=None):
    mcmc = MCMC(
        kernel, num_warmup=warmup, num_samples=draws, num_chains=chains, chain_method=method, progress_bar=False
    )
    fields = ("momentum",) if isinstance(kernel, SGHMC) else ()
    mcmc.run(random.key(0), *args, init_params=start, extra_fields=fields)
    return mcmc


def leaves(mcmc, by_chain=True):
    return jax.tree.map(np.asarray, (mcmc.get_samples(by_chain), mcmc.get_extra_fields(by_chain)))


@pytest.mark.parametrize("scheme", laws.SCHEMES)
def test_law_of_the_draws(scheme):
    start = {site: jnp.full(cycles.UNITS, cases.START) for site in cases.MASS}
    mcmc = run(make_kernel(scheme, **cycles.arguments(scheme)), cycles.WARMUP, cycles.DRAWS, start=start)
    theta, statistics = leaves(mcmc, by_chain=False)
    cases.assert_scores(cycles.scores(scheme, theta, statistics.pop("momentum", None)))
    cycles.assert_statistics(statistics)


@pytest.mark.parametrize("scheme", ["lm", "baoab"])
def test_chain_methods_and_a_resumed_run(scheme):
    def make():
        return make_kernel(scheme, **cycles.arguments(scheme))

    whole = leaves(run(make(), 1, 9, 5, chains=3, method="vectorized"))
    apart = leaves(run(make(), 1, 9, 5, chains=3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), whole, apart)
    first = run(make(), 1, 4, 5, chains=3, method="vectorized")
    second = MCMC(make(), num_warmup=0, num_samples=5, num_chains=3, chain_method="vectorized", progress_bar=False)
    second.post_warmup_state = first.last_state
    second.run(first.last_state.rng_key, 5, extra_fields=("momentum",) if scheme == "baoab" else ())
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b], 1), leaves(first), leaves(second))
    jax.tree.map(np.testing.assert_array_equal, whole, joined)


def test_cycle_is_in_arviz_and_a_cycle_that_is_not_filled_is_told():
    kernel = SGLD(model, step_size=Cyclical(0.1, 10, draws_per_cycle=2))
    tree = bnn_ppl.to_arviz(run(kernel, 2, 4, 3))
    np.testing.assert_array_equal(tree["sample_stats"]["cycle"], [[1, 1, 2, 2]])
    assert "Cyclical" in tree["posterior"].attrs["step_size"]
    with pytest.warns(UserWarning, match="the last cycle has 1 of its 2 draws"):
        bnn_ppl.to_arviz(run(kernel, 2, 3, 3))
    plain = bnn_ppl.to_arviz(run(SGLD(model, step_size=0.1), 2, 3, 3))
    assert "cycle" not in plain["sample_stats"]


def test_a_cyclic_momentum_scale_with_cycles_of_the_step():
    """Without a potential the momenta of a draw are those redrawn in the middle of its cycle, where the scale is 5."""
    scale = CosineRestarts(peak=9.0, cycle_length=8, floor=1.0)
    options = {"step_size": Cyclical(0.05, 8, exploration=0.5), "resample_scale": scale}
    kernel = SGHMC(potential_fn=lambda z: 0.0 * z["x"].sum(), friction=1e-9, resample_every=4, **options)
    _, statistics = leaves(run(kernel, 0, 3, start={"x": jnp.zeros(cycles.UNITS)}), by_chain=False)
    np.testing.assert_allclose(statistics["kinetic_temperature"], 5.0, rtol=4 * (2 / cycles.UNITS) ** 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps_per_draw": 5}, "steps_per_draw=5 together with step_size=Cyclical"),
        ({"gradient_noise_variance": 1.0}, "gradient_noise_variance=1.0 asks to subtract more noise .* step 0"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(SGLD(model, step_size=Cyclical(0.1, 10), **arguments), 0, 1, 3)
