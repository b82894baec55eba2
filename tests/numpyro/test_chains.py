"""Chains in NumPyro's MCMC: resumed, seeded, independent, on the right rows; mirrors tests/pyro/test_chains.py."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

from bnn_ppl.numpyro import SGHMC, SGLD
from tests import cases, laws
from tests.numpyro.schemes import make_kernel, results, run


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def streamed(scheme, **arguments):
    """A kernel with minibatches that straddle epochs, on data of 10 rows."""

    def model(y):
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        with numpyro.plate("data", cases.COUNT_ROWS, subsample_size=cases.COUNT_BATCH) as rows:
            numpyro.sample("y", dist.Normal(theta, scale).to_event(1), obs=y[rows])

    common = {"step_size": lambda step: 0.01 / (1 + 0.1 * step), "steps_per_draw": 2, "temperature": 0.7}
    if scheme in laws.UNDERDAMPED:
        common |= {"friction": 1.0, "resample_every": 3}
    return make_kernel(scheme, model, **(common | arguments))


Y = np.random.default_rng(2).standard_normal((cases.COUNT_ROWS, 3)) + 1


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("scheme", "chains"), [("sgld", 1), ("lm", 3), ("baoab", 3), ("symplectic_euler", 1)])
def test_a_resumed_run_is_the_uninterrupted_run(scheme, chains):
    whole = results(run(streamed(scheme), Y, draws=10, chains=chains), True)
    first = run(streamed(scheme), Y, draws=5, chains=chains)
    second = MCMC(
        streamed(scheme),
        num_warmup=0,
        num_samples=5,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    second.post_warmup_state = first.last_state
    fields = ("momentum",) if scheme in laws.UNDERDAMPED else ()
    second.run(first.last_state.rng_key, Y, extra_fields=fields)
    halves = (results(first, True), results(second, True))
    same(whole, jax.tree.map(lambda a, b: np.concatenate([a, b], 1), *halves))


@pytest.mark.parametrize("scheme", ["sgld", "baoab"])
def test_vectorized_chains_are_sequential_chains(scheme):
    together, apart = (
        results(run(streamed(scheme), Y, draws=10, chains=3, method=method), True)
        for method in ("vectorized", "sequential")
    )
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
    assert np.ptp(together[0]["theta"][:, -1], axis=0).min() > 0


def test_seeds():
    a, again, b = (results(run(streamed("baoab"), Y, draws=3, seed=seed)) for seed in (0, 0, 1))
    same(a, again)
    assert np.all(a[0]["theta"] != b[0]["theta"])


def test_chains_are_independent():
    """Noise and momenta of different chains, and of one chain at different draws, are uncorrelated."""
    units = 10_000
    kernel = SGHMC(
        potential_fn=lambda z: 0.0 * z["x"].sum(),
        step_size=1.0,
        friction=1.0,
        resample_every=1,
    )
    mcmc = run(kernel, draws=3, chains=3, start={"x": jnp.zeros((3, units))})
    theta, r, _ = results(mcmc, group_by_chain=True)
    # Without a potential the increments of theta and the momenta are plain noise of their steps.
    moves = np.diff(np.concatenate([np.zeros((3, 1, units)), theta["x"]], 1), axis=1).reshape(9, units)
    momenta = r["x"].reshape(9, units)
    scores = {}
    for i in range(9):
        for j in range(i):
            scores["moves", i, j] = laws.z_over_units(moves[i] * moves[j], 0.0)
            scores["momenta", i, j] = laws.z_over_units(momenta[i] * momenta[j], 0.0)
    cases.assert_scores(scores)


def counting_model():
    theta = numpyro.sample("theta", dist.Normal(0.0, 1e8).expand([cases.COUNT_ROWS]).to_event(1))
    with numpyro.plate("data", cases.COUNT_ROWS, subsample_size=cases.COUNT_BATCH) as rows:
        numpyro.factor("take", -theta[rows])


@pytest.mark.parametrize("subsampling", cases.SUBSAMPLING)
def test_rows_of_the_minibatches(subsampling):
    """At T = 0 each coordinate goes down by h N / B = 1 whenever its row is in the batch; across a resume, too."""
    start = {"theta": jnp.zeros((2, cases.COUNT_ROWS))}
    step_size = cases.COUNT_BATCH / cases.COUNT_ROWS
    kernel = SGLD(counting_model, step_size=step_size, temperature=0.0, subsampling=subsampling)
    mcmc = run(kernel, draws=17, start=start, chains=2)
    first = mcmc.get_samples(group_by_chain=True)["theta"]
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(mcmc.last_state.rng_key)
    theta = np.concatenate([np.zeros((2, 1, cases.COUNT_ROWS)), first, mcmc.get_samples(True)["theta"]], 1)
    counts = -np.diff(theta, axis=1)
    np.testing.assert_allclose(counts, counts.round(), atol=1e-6)
    for chain in counts.round().astype(int):
        cases.assert_counts(chain, subsampling)
    assert np.any(counts.round()[0] != counts.round()[1])
