"""Control variates in Pyro's MCMC: no noise where the curvature is that of all rows; mirrors the test of NumPyro."""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC

from bnn_ppl.layout import Plate
from bnn_ppl.pyro import PSGLD, SGHMC, SGLD, SGNHT
from bnn_ppl.pyro.control_variates import control_at, corrected
from tests import cases, laws

ZERO, ONE = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
BATCH = 96  # does not divide the rows
ROWS, SMALL = 10, 4


def run(kernel, *args, draws, warmup=0, start=None, seed=0):
    """Samples by site and statistics, shapes (draws, ...)."""
    pyro.set_rng_seed(seed)
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=warmup, initial_params=start, disable_progbar=True)
    mcmc.run(*args)
    statistics = {n: v.numpy() for n, v in mcmc._diagnostics[0].items() if torch.is_tensor(v)}
    return {name: value.numpy() for name, value in mcmc.get_samples().items()}, statistics


def offset_model(y, subsample_size=None):
    theta = {n: pyro.sample(n, dist.Normal(ZERO, ONE).expand([v.shape[1]]).to_event(1)) for n, v in y.items()}
    with pyro.plate("data", cases.ROWS, subsample_size=subsample_size) as rows:
        for n, v in y.items():
            pyro.sample(f"y_{n}", dist.Normal(theta[n], cases.ROWS**0.5).to_event(1), obs=v[rows])


@pytest.mark.parametrize("centre", ["svrg", "fixed"])
@pytest.mark.parametrize("scheme", ["sgld", "baoab"])
def test_law_without_gradient_noise(scheme, centre):
    """The potential of all rows has the curvature of each: the chain is that of full-data gradients."""
    data = {n: torch.tensor(v) for n, v in cases.offset_data(cases.V).items()}
    if centre == "fixed":
        centre = {n: np.full(v.shape[1], 0.7) for n, v in data.items()}
    arguments = cases.GRADIENT_NOISE[scheme]
    options = {
        "steps_per_draw": cases.BATCHES,
        "control_variate": centre,
        "subsampling": "with_replacement",
    } | arguments
    kernel = SGLD(offset_model, **options) if scheme == "sgld" else SGHMC(offset_model, **options)
    samples, _ = run(kernel, data, BATCH, draws=30, warmup=10)
    scores = {}
    for site in samples:
        covariance = laws.stationary(cases.law(scheme, cases.OFFSET_CURVATURE, arguments, site))
        scores |= cases.moment_scores(site, samples[site], None, covariance)
    cases.assert_scores(scores)


def scale_model(y, subsample_size=SMALL):
    theta = pyro.sample("theta", dist.Normal(ZERO, ONE).expand([3]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(ONE))
    with pyro.plate("data", ROWS, subsample_size=subsample_size) as rows:
        pyro.sample("y", dist.Normal(theta, scale).to_event(1), obs=y[rows])


Y = torch.tensor(np.random.default_rng(2).standard_normal((ROWS, 3)) + 1)
START = {"theta": torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64), "scale": 0.2 * ONE}


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
        run(make(scale_model, **common, **arguments), Y, size, draws=3, start=START)[1]["gradient_norm"]
        for arguments, size in (({"control_variate": "svrg"}, SMALL), ({}, None), ({}, SMALL))
    ]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-8)
    assert np.all(np.abs(norms[2] / norms[1] - 1) > 1e-5)


def test_mean_over_minibatches_is_the_gradient_of_all_rows():
    def energy(z, temperature, batch, args=(), kwargs=None):
        rows = Y[batch["data"]]
        return torch.cosh(rows * z).sum() * ROWS / len(rows) + (z**4).sum()

    def gradient(f, batch):
        flat = z.clone().requires_grad_()
        return torch.autograd.grad(f(flat, 0.0, batch, (), {}), flat)[0]

    z, centre = torch.tensor([[0.3, 0.1, -0.4], [0.27, 0.12, -0.37]], dtype=torch.float64)
    control = control_at(energy, Plate("data", ROWS, SMALL), centre, None)
    whole = gradient(energy, {"data": torch.arange(ROWS)})
    batches = [{"data": (torch.arange(SMALL) + i) % ROWS} for i in range(ROWS)]
    plain = torch.stack([gradient(energy, batch) for batch in batches])
    better = torch.stack([gradient(corrected(energy), batch | control) for batch in batches])
    np.testing.assert_allclose(better.mean(0), whole, rtol=1e-10)
    assert torch.all(better.var(0) < 0.5 * plain.var(0))
    same = corrected(energy)(z, 0.0, batches[0] | control, (), {})
    assert float(same) == pytest.approx(float(energy(z, 0.0, batches[0])))


def test_compiled_draws_and_a_resumed_run():
    def make(**arguments):
        common = {"step_size": 0.05, "friction": 2.0, "steps_per_draw": 3, "control_variate": "svrg"}
        return SGHMC(scale_model, **common, **arguments)

    whole, _ = run(make(), Y, draws=8)
    compiled, _ = run(make(jit_compile=True), Y, draws=8)
    first, second = make(), make()
    halves, _ = run(first, Y, draws=3)
    second.load_state_dict(first.state_dict())
    rest, _ = run(second, Y, draws=5, seed=99)
    for name in whole:
        np.testing.assert_allclose(whole[name], compiled[name], rtol=1e-8)
        np.testing.assert_array_equal(whole[name], np.concatenate([halves[name], rest[name]]))


def two_plates(y):
    theta = pyro.sample("theta", dist.Normal(ZERO, ONE).expand([3]).to_event(1))
    for name in ("one", "two"):
        with pyro.plate(name, ROWS, subsample_size=SMALL) as rows:
            pyro.sample(f"y_{name}", dist.Normal(theta, 1.0).to_event(1), obs=y[rows])


@pytest.mark.parametrize(
    ("model", "size", "centre", "message"),
    [
        (two_plates, None, "svrg", r"control_variate needs exactly one plate .* found \['one', 'two'\]"),
        (scale_model, ROWS, "svrg", r"control_variate needs exactly one plate .* found \[\]"),
        (scale_model, SMALL, {"theta": np.zeros(3)}, r"control_variate=\['theta'\] gives sites .* one value for each"),
        (scale_model, SMALL, {"theta": np.zeros(2), "scale": 1.0}, r"shapes .*\(2,\)"),
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
