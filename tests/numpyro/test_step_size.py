"""Advice on step sizes from NumPyro models of known curvature and noise; mirrors tests/pyro/test_step_size.py."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from bnn_ppl.numpyro import PSGLD, SGHMC, SGLD, SGNHT, suggest_step_size
from tests import cases


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def gaussian():
    numpyro.sample("a", dist.Normal(0.0, 0.5).expand([3]).to_event(1))  # curvature 4
    numpyro.sample("b", dist.Normal(0.0, 0.1).expand([2]).to_event(1))  # curvature 100


def offset_model(y):
    theta = {n: numpyro.sample(n, dist.Normal(0.0, 1.0).expand([v.shape[1]]).to_event(1)) for n, v in y.items()}
    with numpyro.plate("data", cases.ROWS, subsample_size=cases.BATCH) as rows:
        for n, v in y.items():
            numpyro.sample(f"y_{n}", dist.Normal(theta[n], cases.ROWS**0.5).to_event(1), obs=v[rows])


@pytest.mark.parametrize(("kernel", "curvature", "stability", "bias"), cases.step_sizes(SGLD, SGHMC, SGNHT))
def test_limits_of_curvature(kernel, curvature, stability, bias):
    found = suggest_step_size(kernel(gaussian), tolerance=0.1)
    assert found.curvature == pytest.approx(curvature, rel=1e-3)
    assert found.limits["stability"] == pytest.approx(stability / 2, rel=1e-3)
    assert found.limits["bias"] == pytest.approx(bias, rel=1e-3)
    assert found.limits["gradient noise"] == np.inf
    assert found.step_size == min(found.limits.values())
    assert "limited by bias" in str(found)


@pytest.mark.parametrize("name", ["SGLD", "SGHMC"])
def test_limit_of_gradient_noise(name):
    """With the variance that the rows were made for; at this step the variance of slow directions is 10% too large."""
    options = {"step_size": 1e-3, "subsampling": "with_replacement", "temperature": 0.5}
    kernel = SGLD(offset_model, **options) if name == "SGLD" else SGHMC(offset_model, friction=3.0, **options)
    found = suggest_step_size(kernel, cases.offset_data(cases.V), num_batches=400, num_iterations=2, tolerance=0.1)
    for site, variance in cases.V.items():
        assert found.gradient_noise_variance[site] == pytest.approx(variance, rel=0.1)
    mean = np.mean(list(cases.V.values()))
    assert found.limits["gradient noise"] == pytest.approx(0.1 * (1 if name == "SGLD" else 3) / mean, rel=0.1)
    assert found.temperature_at == pytest.approx(0.5 + 1e-3 * mean / (2 if name == "SGLD" else 6), rel=1e-3)
    assert "larger batches" in str(found)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGLD(potential_fn=lambda z: z["x"] ** 2, step_size=0.1), "kernel must have a model"),
        (lambda: PSGLD(gaussian, step_size=0.1), "kernel must be SGLD, SGHMC or SGNHT, got PSGLD"),
        (lambda: SGHMC(gaussian, step_size=0.1, friction=1.0, mass="adapt"), "kernel has mass='adapt'"),
    ],
)
def test_bad_kernels(make, message):
    with pytest.raises(ValueError, match=message):
        suggest_step_size(make())


def test_bad_arguments():
    with pytest.raises(ValueError, match="tolerance must be finite and greater than 0, got 0"):
        suggest_step_size(SGLD(gaussian, step_size=0.1), tolerance=0)
    with pytest.raises(ValueError, match=r"num_batches must be at least 2, .* got 1"):
        suggest_step_size(SGLD(gaussian, step_size=0.1), num_batches=1)
