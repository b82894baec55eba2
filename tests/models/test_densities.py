"""Moments against independent quadrature and closed forms; one value from three array libraries."""

import itertools
import math
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.integrate import quad

from bnn_ppl.models import densities

COVARIANCE = np.array([[2.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.5]])
MAKERS = {
    "gaussian": lambda T: densities.gaussian([0.5, 2.0], mean=[1.0, -1.0], temperature=T),
    "gaussian_full": lambda T: densities.gaussian(COVARIANCE, mean=0.5, temperature=T),
    "quartic": lambda T: densities.quartic(3, scale=1.5, temperature=T),
    "double_well": lambda T: densities.double_well(2, height=2.0, temperature=T),
    "banana": lambda T: densities.banana(location=0.7, scale=0.8, curvature=1.3, width=0.4, temperature=T),
    "gaussian_grid": lambda T: densities.gaussian_grid(temperature=T),
}
TEMPERATURES = [1.0, 0.1, 0.01]


@pytest.fixture(params=sorted(MAKERS))
def make(request):
    return MAKERS[request.param]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def quad_moments(energy, temperature, points, end):
    """Normaliser and second moment of an even density, piece by piece between `points`."""
    cuts = [0.0, *points, end]
    pieces = list(itertools.pairwise(cuts))

    def integral(power):
        return 2 * sum(
            quad(lambda t: t**power * math.exp(-energy(t) / temperature), a, b, epsabs=0, epsrel=1e-12)[0]
            for a, b in pieces
        )

    total = integral(0)
    return math.log(total), integral(2) / total


@pytest.mark.parametrize("temperature", [*TEMPERATURES, 5.0])
def test_quartic_and_double_well_against_quad(temperature):
    density = densities.quartic(2, scale=1.5, temperature=temperature)
    log_total, second = quad_moments(lambda t: (t / 1.5) ** 4 / 4, temperature, [temperature**0.25], 12.0)
    np.testing.assert_allclose(density.variance, [second, second], rtol=1e-10)
    assert density.log_normalizer == pytest.approx(2 * log_total, abs=1e-9)

    density = densities.double_well(3, height=2.0, temperature=temperature)
    log_total, second = quad_moments(lambda t: 2 * (t * t - 1) ** 2, temperature, [0.9, 1.0, 1.1, 1.5], 5.0)
    np.testing.assert_allclose(density.variance, [second] * 3, rtol=1e-10)
    assert density.log_normalizer == pytest.approx(3 * log_total, abs=1e-9)


def test_double_well_cold_limit():
    # y = x^2 has the density exp(-(y - 1)^2 / T) / sqrt(y), so that E y = 1 - T / 4 to first order.
    temperature = 1e-6
    density = densities.double_well(temperature=temperature)
    assert density.variance[0] == pytest.approx(1 - temperature / 4, abs=1e-11)
    assert density.log_normalizer == pytest.approx(math.log(2 * math.sqrt(math.pi * temperature / 4)), abs=1e-5)


def test_double_well_is_that_of_chen():
    x = np.linspace(-2, 2, 9)[:, None]
    difference = densities.double_well().energy(x) - (-2 * x**2 + x**4)[:, 0]
    np.testing.assert_allclose(difference, 1.0, atol=1e-14)


@pytest.mark.parametrize("temperature", [*TEMPERATURES, 20.0])
def test_gaussian_grid_against_quad(temperature):
    variance = 0.03

    def energy(t):
        shifted = [-((t - m) ** 2) / (2 * variance) for m in (-4, -2, 0, 2, 4)]
        top = max(shifted)
        return -top - math.log(sum(math.exp(s - top) for s in shifted)) + math.log(5)

    width = math.sqrt(variance * temperature)
    cuts = sorted({max(1e-6, m + k * width) for m in (0, 2, 4) for k in (-6, -2, 0, 2, 6)} | {1.0, 3.0})
    log_total, second = quad_moments(energy, temperature, cuts, cuts[-1] + 12 * width)
    log_total -= 0.5 * math.log(2 * math.pi * variance) / temperature
    density = densities.gaussian_grid(temperature=temperature)
    np.testing.assert_allclose(density.variance, second, rtol=1e-9)
    assert density.log_normalizer == pytest.approx(2 * log_total, abs=1e-8)


def test_gaussian_grid_at_temperature_one():
    density = densities.gaussian_grid()
    np.testing.assert_allclose(density.covariance, 8.03 * np.eye(2), rtol=1e-12)
    assert density.log_normalizer == pytest.approx(0.0, abs=1e-12)
    assert density.modes.shape == (25, 2)
    assert len({tuple(mode) for mode in density.modes}) == 25
    # At a mode the other components weigh nothing: a 25th of a Gaussian's peak.
    peak = -math.log(25 * 2 * math.pi * 0.03)
    np.testing.assert_allclose(density.log_density(density.modes), peak, atol=1e-12)


def test_all_moments_against_a_grid(make):
    """Normaliser, mean and covariance by brute force over a box, at T = 1 and T = 0.2."""
    for temperature in (1.0, 0.2):
        density = make(temperature)
        count = {1: 4001, 2: 2001, 3: 161}[density.dim]
        spread = 9 if density.name == "gaussian" else 6
        sd = np.sqrt(density.variance)
        low, high = density.mean - spread * sd, density.mean + spread * sd
        if density.name == "gaussian_grid":
            low, high = -6.0 * np.ones(2), 6.0 * np.ones(2)
        if density.name == "banana":  # the second coordinate is skewed
            high[1] += 25 * sd[1]
        axes = [np.linspace(a, b, count) for a, b in zip(low, high, strict=True)]
        points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, density.dim)
        mass = np.exp(density.log_density(points)) * np.prod([axis[1] - axis[0] for axis in axes])
        assert mass.sum() == pytest.approx(1.0, abs=1e-6)
        mean = mass @ points
        np.testing.assert_allclose(mean, density.mean, atol=1e-5)
        centred = points - mean
        np.testing.assert_allclose((mass[:, None] * centred).T @ centred, density.covariance, atol=2e-5)


def test_gaussian_moments():
    density = densities.gaussian(COVARIANCE, mean=[1.0, 2.0, 3.0], temperature=0.1)
    np.testing.assert_allclose(density.covariance, 0.1 * COVARIANCE)
    np.testing.assert_allclose(density.variance, [0.2, 0.1, 0.05])
    np.testing.assert_array_equal(density.mean, [1, 2, 3])
    assert densities.gaussian().dim == 1
    diagonal, full = densities.gaussian([1.0, 4.0]), densities.gaussian(np.diag([1.0, 4.0]))
    x = np.array([[0.3, -0.2], [1.0, 2.0]])
    np.testing.assert_allclose(diagonal.energy(x), full.energy(x))
    np.testing.assert_allclose(diagonal.energy(x), [0.045 + 0.005, 0.5 + 0.5])
    assert diagonal.log_normalizer == pytest.approx(full.log_normalizer)


def test_libraries_agree(make):
    density = make(1.0)
    x = np.random.default_rng(0).normal(size=(7, density.dim)) * 2
    expected = density.potential_fn({"x": x})
    assert np.shape(expected) == ()
    x_jax, x_torch = jnp.asarray(x), torch.tensor(x, requires_grad=True)
    value, gradient = jax.jit(jax.value_and_grad(density.potential_fn))({"x": x_jax})
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    value = density.potential_fn({"x": x_torch})
    assert value.dtype == torch.float64
    np.testing.assert_allclose(value.item(), expected, rtol=1e-12)
    value.backward()
    assert np.isfinite(gradient["x"]).all()
    np.testing.assert_allclose(gradient["x"], x_torch.grad, rtol=1e-10, atol=1e-10)
    functional = torch.func.grad(lambda t: density.potential_fn({"x": t}))(torch.tensor(x))
    np.testing.assert_allclose(gradient["x"], functional, rtol=1e-10, atol=1e-10)
    # Central differences, so that no library's gradient is taken on trust.
    step = 1e-6
    for i in range(density.dim):
        shift = step * np.eye(density.dim)[i]
        slope = (density.energy(x + shift) - density.energy(x - shift)) / (2 * step)
        np.testing.assert_allclose(gradient["x"][:, i], slope, rtol=1e-5, atol=1e-5)


def test_far_away_stays_finite(make):
    density = make(1.0)
    x = np.full((1, density.dim), 100.0)
    _, gradient = jax.value_and_grad(density.potential_fn)({"x": jnp.asarray(x)})
    assert np.isfinite(gradient["x"]).all()
    x_torch = torch.tensor(x, requires_grad=True)
    density.potential_fn({"x": x_torch}).backward()
    assert torch.isfinite(x_torch.grad).all()


def test_leading_dimensions_are_copies(make):
    density = make(1.0)
    x = np.random.default_rng(1).normal(size=(2, 3, density.dim))
    assert density.energy(x).shape == (2, 3)
    np.testing.assert_allclose(
        density.potential_fn({"x": x}), sum(density.potential_fn({"x": row}) for row in x.reshape(6, -1))
    )


def test_dtypes(make):
    density = make(1.0)
    ones = np.ones((2, density.dim))
    expected = density.potential_fn({"x": ones})
    for x in (ones.astype(np.float32), jnp.ones((2, density.dim), jnp.float32), torch.ones(2, density.dim)):
        value = density.potential_fn({"x": x})
        assert str(value.dtype).endswith("float32") or isinstance(x, np.ndarray)
        np.testing.assert_allclose(float(value), expected, rtol=1e-4)
    np.testing.assert_allclose(density.potential_fn({"x": ones.astype(int)}), expected)
    np.testing.assert_allclose(density.potential_fn({"x": torch.ones(2, density.dim).int()}), expected, rtol=1e-4)


def test_pickles(make):
    density = make(0.5)
    copy = pickle.loads(pickle.dumps(density))
    x = np.full(density.dim, 0.3)
    assert copy.potential_fn({"x": x}) == density.potential_fn({"x": x})
    assert pickle.loads(pickle.dumps(density.potential_fn))({"x": x}) == density.potential_fn({"x": x})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: densities.gaussian(-1.0), "variance=-1.0"),
        (lambda: densities.gaussian([[1.0, 2.0], [2.0, 1.0]]), "positive definite"),
        (lambda: densities.gaussian([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (lambda: densities.gaussian(np.ones((2, 3))), r"variance has shape \(2, 3\)"),
        (lambda: densities.gaussian([1.0, 2.0], mean=[1.0, 2.0, 3.0]), r"mean has shape \(3,\)"),
        (lambda: densities.gaussian(temperature=0.0), "temperature=0.0"),
        (lambda: densities.quartic(0), "dim=0"),
        (lambda: densities.quartic(scale=math.nan), "scale=nan"),
        (lambda: densities.double_well(height=-1), "height=-1"),
        (lambda: densities.banana(width=0), "width=0"),
        (lambda: densities.gaussian_grid(variance=0), "variance=0"),
        (lambda: densities.gaussian_grid(variance=1e-9, temperature=1e-9), "too narrow"),
        (lambda: densities.quartic(3).potential_fn({"x": np.ones(2)}), r"x has shape \(2,\).*dim=3"),
        (lambda: densities.quartic().potential_fn({"x": np.ones(())}), r"x has shape \(\)"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_imports_no_backend():
    code = (
        "import sys, bnn_ppl.models, bnn_ppl.models.densities, bnn_ppl.models.conjugate; "
        "assert not {'torch', 'jax', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
