"""Control variates in NumPyro's MCMC: no noise where the curvature is that of all rows; mirrors the test of Pyro."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import MCMC

from bnn_ppl.layout import Plate
from bnn_ppl.numpyro import PSGLD, SGHMC, SGLD, SGNHT
from bnn_ppl.numpyro.control_variates import control_at, corrected
from tests import cases, laws

BATCH = 96  # does not divide the rows
ROWS, SMALL = 10, 4


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def run(kernel, *args, draws, warmup=0, chains=1, method="vectorized", start=None):
    mcmc = MCMC(
        kernel, num_warmup=warmup, num_samples=draws, num_chains=chains, chain_method=method, progress_bar=False
    )
    mcmc.run(random.key(0), *args, init_params=start)
    return mcmc


def offset_model(y, subsample_size=None):
    theta = {n: numpyro.sample(n, dist.Normal(0.0, 1.0).expand([v.shape[1]]).to_event(1)) for n, v in y.items()}
    with numpyro.plate("data", cases.ROWS, subsample_size=subsample_size) as rows:
        for n, v in y.items():
            numpyro.sample(f"y_{n}", dist.Normal(theta[n], cases.ROWS**0.5).to_event(1), obs=v[rows])


@pytest.mark.parametrize("centre", ["svrg", "fixed"])
@pytest.mark.parametrize("scheme", ["sgld", "baoab"])
def test_law_without_gradient_noise(scheme, centre):
    """The potential of all rows has the curvature of each: the chain is that of full-data gradients."""
    data = cases.offset_data(cases.V)
    if centre == "fixed":
        centre = {n: np.full(v.shape[1], 0.7) for n, v in data.items()}
    arguments = cases.GRADIENT_NOISE[scheme]
    options = {
        "steps_per_draw": cases.BATCHES,
        "control_variate": centre,
        "subsampling": "with_replacement",
    } | arguments
    kernel = SGLD(offset_model, **options) if scheme == "sgld" else SGHMC(offset_model, **options)
    samples = jax.tree.map(np.asarray, run(kernel, data, BATCH, draws=30, warmup=10).get_samples())
    scores = {}
    for site in samples:
        covariance = laws.stationary(cases.law(scheme, cases.OFFSET_CURVATURE, arguments, site))
        scores |= cases.moment_scores(site, samples[site], None, covariance)
    cases.assert_scores(scores)


def scale_model(y, subsample_size=SMALL):
    theta = numpyro.sample("theta", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("data", ROWS, subsample_size=subsample_size) as rows:
        numpyro.sample("y", dist.Normal(theta, scale).to_event(1), obs=y[rows])


Y = np.random.default_rng(2).standard_normal((ROWS, 3)) + 1
START = {"theta": jnp.array([0.3, -0.2, 0.5]), "scale": jnp.array(0.2)}


@pytest.mark.parametrize(
    ("make", "temperature"),
    [
        (SGLD, 1.0),
        (SGLD, 0.1),
        (partial(SGHMC, friction=1.0), 1.0),
        (partial(SGNHT, friction=1.0), 1.0),
        (partial(PSGLD, freeze=False), 1.0),
    ],
)
def test_gradient_at_the_centre_is_that_of_all_rows(make, temperature):
    """With a log-Jacobian at any temperature, and rows that the minibatch does not divide."""
    common = {"step_size": 1e-24, "temperature": temperature}
    norms = [
        run(make(scale_model, **common, **arguments), Y, size, draws=3, start=START).get_extra_fields()["gradient_norm"]
        for arguments, size in (({"control_variate": "svrg"}, SMALL), ({}, None), ({}, SMALL))
    ]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-8)
    assert np.all(np.abs(norms[2] / norms[1] - 1) > 1e-5)


def test_mean_over_minibatches_is_the_gradient_of_all_rows():
    def energy(z, temperature, batch):
        rows = jnp.asarray(Y)[batch["data"]]
        return jnp.sum(jnp.cosh(rows * z)) * ROWS / len(rows) + jnp.sum(z**4)

    z, centre = jnp.array([0.3, 0.1, -0.4]), jnp.array([0.27, 0.12, -0.37])
    control = control_at(energy, Plate("data", ROWS, SMALL), centre)
    whole = jax.grad(energy)(z, 0.0, {"data": jnp.arange(ROWS)})
    batches = [{"data": (jnp.arange(SMALL) + i) % ROWS} for i in range(ROWS)]
    plain = jnp.stack([jax.grad(energy)(z, 0.0, batch) for batch in batches])
    better = jnp.stack([corrected(energy, control, batch, g) for batch, g in zip(batches, plain, strict=True)])
    np.testing.assert_allclose(better.mean(0), whole, rtol=1e-10)
    assert np.all(better.var(0) < 0.5 * plain.var(0))


def test_chain_methods_and_a_resumed_run():
    def make():
        return SGHMC(scale_model, step_size=0.05, friction=2.0, steps_per_draw=3, control_variate="svrg")

    def draws(mcmc):
        return jax.tree.map(np.asarray, mcmc.get_samples(group_by_chain=True))

    whole = draws(run(make(), Y, draws=8, chains=3))
    apart = draws(run(make(), Y, draws=8, chains=3, method="sequential"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), whole, apart)
    first = run(make(), Y, draws=3, chains=3)
    second = MCMC(make(), num_warmup=0, num_samples=5, num_chains=3, chain_method="vectorized", progress_bar=False)
    second.post_warmup_state = first.last_state
    second.run(first.last_state.rng_key, Y)
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b], 1), draws(first), draws(second))
    jax.tree.map(np.testing.assert_array_equal, whole, joined)


def two_plates(y):
    theta = numpyro.sample("theta", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    for name in ("one", "two"):
        with numpyro.plate(name, ROWS, subsample_size=SMALL) as rows:
            numpyro.sample(f"y_{name}", dist.Normal(theta, 1.0).to_event(1), obs=y[rows])


@pytest.mark.parametrize(
    ("model", "size", "centre", "message"),
    [
        (two_plates, None, "svrg", r"control_variate needs exactly one plate .* found \['one', 'two'\]"),
        (scale_model, ROWS, "svrg", r"control_variate needs exactly one plate .* found \[\]"),
        (scale_model, SMALL, {"theta": np.zeros(3)}, r"control_variate=\['theta'\] gives sites .* one value for each"),
        (scale_model, SMALL, {"theta": np.zeros(2), "scale": 1.0}, "shape \\(2,\\)|shapes .*\\(2,\\)"),
        (scale_model, SMALL, "saga", "control_variate must be None, 'svrg' or a dict of values by site, got 'saga'"),
    ],
)
def test_bad_input(model, size, centre, message):
    with pytest.raises(ValueError, match=message):
        run(SGLD(model, step_size=0.01, control_variate=centre), Y, *(() if size is None else (size,)), draws=1)


def test_needs_rows():
    with pytest.raises(ValueError, match="control_variate needs a model"):
        SGLD(potential_fn=lambda z: z["x"] ** 2, step_size=0.1, control_variate="svrg")
    with pytest.raises(ValueError, match="minibatches and control_variate='svrg' exclude each other"):
        SGLD(scale_model, step_size=0.1, control_variate="svrg", minibatches=[Y])
