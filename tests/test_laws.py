"""The oracles of `tests.laws` against published closed forms and numbers."""

import numpy as np
import pytest

from tests.laws import (
    SCHEMES,
    UNDERDAMPED,
    Map,
    baoab,
    epoch_stream,
    lm,
    random_batches,
    refresh,
    refreshed,
    sgld,
    sgnht,
    stationary,
    symplectic_euler,
    then,
    thermostat,
    transition,
    z_over_draws,
    z_over_units,
)

POINTS = [
    {"h": 0.1, "k": 4.0, "M": 1.0, "C": 1.0, "T": 1.0},
    {"h": 0.25, "k": 2.5, "M": 0.5, "C": 0.7, "T": 0.1},
    {"h": 0.4, "k": 1.3, "M": 3.0, "C": 2.0, "T": 0.01},
]


def numbers(h, k, M, C, T):
    return h**2 * k / M, h * C / M, np.exp(-h * C / M)


@pytest.mark.parametrize(("h", "value"), [(0.05, 10 / 9), (0.1, 1.25), (0.25, 2.0)])
def test_sgld_numbers(h, value):
    assert 4 * stationary(sgld(h, 4.0))[0, 0] == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("h", "friction", "position", "momentum"),
    [(0.1, 1.0, 1.0106382979, 1.0638297872), (0.25, 0.5, 1.0714285714, 1.1428571429), (0.5, 1.0, 1.5, 2.0)],
)
def test_symplectic_euler_numbers(h, friction, position, momentum):
    S = stationary(symplectic_euler(h, 4.0, C=friction))
    assert [4 * S[0, 0], S[1, 1]] == pytest.approx([position, momentum], rel=1e-10)


@pytest.mark.parametrize("point", POINTS)
def test_stationary_closed_forms(point):
    s, a, _ = numbers(**point)
    h, k, M, T = (point[name] for name in ("h", "k", "M", "T"))
    S = stationary(sgld(h, k, T=T))
    assert k * S[0, 0] / T == pytest.approx(1 / (1 - h * k / 2), rel=1e-12)
    assert k * stationary(lm(h, k, T=T))[0, 0] / T == pytest.approx(1, rel=1e-12)
    S = stationary(symplectic_euler(**point))
    assert k * S[0, 0] / T == pytest.approx(1 / (1 - s / (2 * (2 - a))), rel=1e-12)
    assert S[1, 1] / (M * T) == pytest.approx(1 / (1 - a / 2 - s / 4), rel=1e-12)
    S = stationary(baoab(**point))
    assert [k * S[0, 0] / T, S[1, 1] / (M * T), S[0, 1]] == pytest.approx([1, 1, h * T / 2], rel=1e-12)
    half_kick = np.array([-h * k / 2, 1.0])  # to the momentum at the end of BAOAB proper
    assert half_kick @ S @ half_kick / (M * T) == pytest.approx(1 - s / 4, rel=1e-12)


def test_thermostat_closed_forms():
    """C without gradient noise, C + h V / (2 T) with it as h -> 0; the momenta at T."""
    assert thermostat(0.3, 2.0, C=1.5, T=0.4) == pytest.approx(1.5, rel=1e-9)
    h, V = 1e-4, 4e3
    x = thermostat(h, 2.0, V, C=1.5, T=0.4)
    assert x == pytest.approx(1.5 + h * V / 0.8, rel=1e-3)
    S = stationary(sgnht(h, 2.0, x, C=1.5, T=0.4), V)
    assert [2 * S[0, 0], S[1, 1]] == pytest.approx([0.4, 0.4], rel=1e-3)


def test_baoab_at_a_large_step():
    S = stationary(baoab(0.9, 4.0))
    half_kick = np.array([-0.9 * 2, 1.0])
    assert [4 * S[0, 0], half_kick @ S @ half_kick] == pytest.approx([1, 0.19], rel=1e-10)


@pytest.mark.parametrize("point", POINTS)
def test_gradient_noise_closed_forms(point):
    s, a, c = numbers(**point)
    h, k, M, T = (point[name] for name in ("h", "k", "M", "T"))
    V = 0.3 * a * M * T / h**2
    S = stationary(sgld(h, k, T=T), V)
    assert k * S[0, 0] == pytest.approx((T + h * V / 2) / (1 - h * k / 2), rel=1e-12)
    assert k * stationary(lm(h, k, T=T), V)[0, 0] == pytest.approx(T + h * V / (2 - h * k), rel=1e-12)
    S = stationary(symplectic_euler(**point), V)
    assert k * S[0, 0] == pytest.approx((T + h**2 * V / M / (2 * a)) / (1 - s / (2 * (2 - a))), rel=1e-12)
    S = stationary(baoab(**point), V)
    assert k * S[0, 0] == pytest.approx(T + h**2 * V / M * (1 + c) / ((1 - c) * (4 - s)), rel=1e-12)
    assert S[1, 1] / M == pytest.approx(T + 4 * c**2 * h**2 * V / (M * (1 - c**2) * (4 - s)), rel=1e-12)


@pytest.mark.parametrize("point", POINTS)
def test_compensated_noise(point):
    """Exact with SGLD and symplectic Euler; with BAOAB as s goes to 0."""
    _, a, _ = numbers(**point)
    h, k, M, T = (point[name] for name in ("h", "k", "M", "T"))
    V = 0.5 * a * M * T / h**2
    for make, arguments in ((sgld, {"h": h, "k": k, "T": T}), (symplectic_euler, point)):
        np.testing.assert_allclose(stationary(make(**arguments, V=V), V), stationary(make(**arguments)), rtol=1e-12)
    slow = point | {"k": 1e-9}
    assert slow["k"] * stationary(baoab(**slow, V=V), V)[0, 0] == pytest.approx(T, rel=1e-6)


def test_heavy_ball():
    h, k, V, a, M = 0.2, 1.5, 2.0, 0.3, 2.0
    eta = h**2 / M
    S = stationary(symplectic_euler(h, k, M=M, C=a * M / h, T=0.0), V)
    assert S[0, 0] == pytest.approx(eta * V * (2 - a) / (a * k * (4 - 2 * a - eta * k)), rel=1e-12)


def test_epoch_stream_numbers():
    step, V, m = sgld(0.05, 1.0), 50.0, 20
    at_end, independent = epoch_stream(step, V, m)[0, 0], stationary(step, V)[0, 0]
    assert [at_end, independent] == pytest.approx([1.13, 2.31], abs=0.005)
    A = 0.95 ** np.arange(m)
    sums = 2 * 0.05 * (A**2).sum() + 0.05**2 * V * m / (m - 1) * ((A**2).sum() - A.sum() ** 2 / m)
    assert at_end == pytest.approx(sums / (1 - 0.95 ** (2 * m)), rel=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_epoch_stream_is_periodic_and_matches_simulated_epochs(scheme):
    step, V, m = SCHEMES[scheme](0.3, 1.7, T=0.4), 3.0, 5
    np.testing.assert_allclose(epoch_stream(step, V, m, m), epoch_stream(step, V, m), rtol=1e-12)
    rng, x = np.random.default_rng(0), np.zeros((2, 50_000))
    values, vectors = np.linalg.eigh(step.Q)
    factor = vectors * np.sqrt(np.maximum(values, 0.0))
    for _ in range(10):
        errors = rng.standard_normal((m, x.shape[1]))
        errors = (errors - errors.mean(0)) * np.sqrt(V * m / (m - 1))
        for phase, n in enumerate(errors):
            if phase == 2:
                halfway = x
            x = step.A @ x + step.b * n + factor @ rng.standard_normal(x.shape)
    assert abs(z_over_units(x[0] ** 2, epoch_stream(step, V, m)[0, 0])) < 4
    assert abs(z_over_units(halfway[0] ** 2, epoch_stream(step, V, m, 2)[0, 0])) < 4


@pytest.mark.parametrize("L", [2, 5, 20])
def test_refresh_of_symplectic_euler(L):
    """Without the half kick the variance is L / (L + 1) at any small step; with it 1 / (1 - s / 4) at any L."""
    h, k = 1e-3, 1.0
    steps = refreshed("symplectic_euler", h, k, L=L, scale=1.0, C=1e-12)
    assert k * stationary(steps)[0, 0] == pytest.approx(1 / (1 - h**2 * k / 4), rel=1e-9)
    full = symplectic_euler(h, k, C=1e-12)
    assert k * stationary([then(refresh(1.0), full)] + [full] * (L - 1))[0, 0] == pytest.approx(L / (L + 1), rel=1e-4)


def test_refresh_of_symplectic_euler_at_a_large_step():
    steps = refreshed("symplectic_euler", 0.5, 1.7, L=3, scale=1.0, M=0.6, C=1e-12)
    assert 1.7 * stationary(steps)[0, 0] == pytest.approx(1 / (1 - 0.25 * 1.7 / 0.6 / 4), rel=1e-9)


TABLE = [  # k, M, boost, friction, T, time between refreshes, momentum scale, k times the variance of theta
    (1, 1, 1, 1, 1, 1, 1, 1.0),
    (1, 1, 1, 1, 1, 1, 0.001, 0.496551950594),
    (1, 1, 5, 1, 1, 1, 1, 0.300712608651),
    (1, 1, 3, 0.001, 1, 2, 0.001, 8.74677668e-4),
    (1, 1, 3, 0.001, 1, 2, 3, 1.0),
    (2, 0.5, 3, 0.5, 0.5, 1.5, 0.1, 0.216810125666),
    (1, 1, 1, 1e-12, 1, 1, 0.3, 0.3),
]


@pytest.mark.parametrize("scheme", UNDERDAMPED)
@pytest.mark.parametrize(("k", "M", "boost", "friction", "T", "period", "beta", "value"), TABLE)
def test_refresh_at_another_temperature(scheme, k, M, boost, friction, T, period, beta, value):
    """The discrete chain tends to the continuous-time table as h goes to 0."""

    def at(L):
        steps = refreshed(scheme, period / L, k, L=L, scale=beta / boost, M=boost * M, C=friction, T=T)
        return k * stationary(steps)[0, 0]

    error = [abs(at(L) - value) for L in (100, 400)]
    order = {"baoab": 2, "symplectic_euler": 1}[scheme]
    assert error[1] < 1e-5 * value + 1.3 * error[0] / 4**order
    assert error[1] < 4e-3 * value


@pytest.mark.parametrize(("scheme", "value"), [("baoab", 0.216946), ("symplectic_euler", 0.230214)])
def test_refresh_at_another_temperature_and_a_finite_step(scheme, value):
    steps = refreshed(scheme, 0.1, 2.0, L=15, scale=0.1 / 3, M=1.5, C=0.5, T=0.5)
    assert 2 * stationary(steps)[0, 0] == pytest.approx(value, rel=1e-5)


def test_refresh_of_position_first_euler():
    """The published 0.2114 is that of the position moved first and no half kick, which the kernels do not do."""
    h, k, M, a, T = 0.1, 2.0, 1.5, 0.1 / 3, 0.5
    A = np.array([[1.0, 0.0], [-h * k, 1 - a]]) @ np.array([[1.0, h / M], [0.0, 1.0]])
    full = Map(A, np.zeros((2, 1)), np.diag([0.0, 2 * a * M * T]))
    steps = [then(refresh(0.1 / 3, M), full)] + [full] * 14
    assert 2 * stationary(steps)[0, 0] == pytest.approx(0.2114, abs=5e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transition_tends_to_the_stationary_law(scheme):
    step = SCHEMES[scheme](0.3, 1.4, T=0.3)
    mean, S = transition([step] * 400, [2.0, 0.0], np.zeros((2, 2)), V=0.7)[-1]
    np.testing.assert_allclose(S, stationary(step, 0.7), rtol=1e-10)
    np.testing.assert_allclose(mean, 0, atol=1e-10)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_matrix_of_curvatures_has_the_laws_of_its_eigenvalues(scheme):
    values, vectors = np.array([0.8, 2.1]), np.array([[0.6, 0.8], [-0.8, 0.6]])
    S = stationary(SCHEMES[scheme](0.3, vectors @ np.diag(values) @ vectors.T, T=0.5), V=0.2)
    rotated = np.kron(np.eye(2), vectors.T) @ S @ np.kron(np.eye(2), vectors)
    for i, k in enumerate(values):
        np.testing.assert_allclose(
            rotated[i::2, i::2], stationary(SCHEMES[scheme](0.3, k, T=0.5), V=0.2), rtol=1e-10, atol=1e-14
        )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_batches_of_equal_curvature(scheme):
    """Then the batch only shifts the gradient, and the law is that of independent gradient noise."""
    step, errors = SCHEMES[scheme](0.3, 1.4, T=0.5), np.array([-1.0, 0.2, 0.8])
    mean, S = random_batches([(step, step.b[:, 0] * (n - 0.3)) for n in errors])
    np.testing.assert_allclose(S, stationary(step, np.mean(errors**2)), rtol=1e-10)
    np.testing.assert_allclose(mean, [0.3 / 1.4, 0], atol=1e-12)


def test_z_scores_have_unit_variance():
    rng = np.random.default_rng(1)
    values = rng.standard_normal((300, 20, 50)) + 2
    for z in (z_over_units, z_over_draws):
        scores = np.array([z(v, 2.0) for v in values])
        assert 0.8 < scores.std() < 1.2
        assert abs(scores.mean()) < 4 / np.sqrt(300)
