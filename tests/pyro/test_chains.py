"""Chains in Pyro's MCMC: resumed, seeded, independent, on the right rows; mirrors tests/numpyro/test_chains.py."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from bnn_ppl.pyro import SGHMC, SGLD
from tests import cases, laws
from tests.pyro.schemes import ONE, ZERO, make_kernel, run


@pytest.fixture(autouse=True)
def one_thread():
    """On busy cores the threads of small operations wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def streamed(scheme, **arguments):
    """A kernel with minibatches that straddle epochs, on data of 10 rows."""

    def model(y):
        theta = pyro.sample("theta", dist.Normal(ZERO, ONE).expand([3]).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(ONE))
        with pyro.plate("data", cases.COUNT_ROWS, subsample_size=cases.COUNT_BATCH) as rows:
            pyro.sample("y", dist.Normal(theta, scale).to_event(1), obs=y[rows])

    common = {"step_size": lambda step: 0.01 / (1 + 0.1 * step), "steps_per_draw": 2, "temperature": 0.7}
    if scheme in laws.UNDERDAMPED:
        common |= {"friction": 1.0, "resample_every": 3}
    return make_kernel(scheme, model, **(common | arguments))


Y = torch.tensor(np.random.default_rng(2).standard_normal((cases.COUNT_ROWS, 3)) + 1)


def same(a, b):
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        for name in x or {}:
            np.testing.assert_array_equal(x[name], y[name])


@pytest.mark.parametrize("scheme", laws.SCHEMES)
def test_a_resumed_run_is_the_uninterrupted_run(scheme):
    whole = run(streamed(scheme), Y, draws=10)
    first, second = streamed(scheme), streamed(scheme)
    halves = [run(first, Y, draws=5)]
    second.load_state_dict(first.state_dict())
    halves.append(run(second, Y, draws=5, seed=99))
    joined = [None if a is None else {n: np.concatenate([a[n], b[n]]) for n in a} for a, b in zip(*halves, strict=True)]
    same(whole, joined)


def test_seeds():
    a, again, b = (run(streamed("baoab"), Y, draws=3, seed=seed) for seed in (0, 0, 1))
    same(a, again)
    assert np.all(a[0]["theta"] != b[0]["theta"])


def test_chains_are_independent(monkeypatch):
    """Noise and momenta of different chains, and of one chain at different draws, are uncorrelated."""
    monkeypatch.setattr("pyro.infer.mcmc.api.mp.cpu_count", lambda: 1)  # chains one after another
    units = 10_000
    kernel = SGHMC(
        potential_fn=lambda z: 0.0 * z["x"].sum(),
        step_size=1.0,
        friction=1.0,
        resample_every=1,
    )
    start = {"x": torch.zeros((3, units), dtype=torch.float64)}
    theta, r, _ = run(kernel, draws=3, chains=3, start=start)
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
    theta = pyro.sample("theta", dist.Normal(ZERO, 1e8 * ONE).expand([cases.COUNT_ROWS]).to_event(1))
    with pyro.plate("data", cases.COUNT_ROWS, subsample_size=cases.COUNT_BATCH) as rows:
        pyro.factor("take", -theta[rows])


@pytest.mark.parametrize("subsampling", cases.SUBSAMPLING)
def test_rows_of_the_minibatches(subsampling):
    """At T = 0 each coordinate goes down by h N / B = 1 whenever its row is in the batch; across a resume, too."""
    zeros = np.zeros((1, cases.COUNT_ROWS))
    step_size = cases.COUNT_BATCH / cases.COUNT_ROWS

    def kernel():
        return SGLD(counting_model, step_size=step_size, temperature=0.0, subsampling=subsampling)

    first, second = kernel(), kernel()
    theta = run(first, draws=17, start={"theta": torch.tensor(zeros[0])})[0]["theta"]
    second.load_state_dict(first.state_dict())
    counts = -np.diff(np.concatenate([zeros, theta, run(second, draws=17, seed=7)[0]["theta"]]), axis=0)
    np.testing.assert_allclose(counts, counts.round(), atol=1e-6)
    cases.assert_counts(counts.round().astype(int), subsampling)
