"""Exact laws of the discrete chains on quadratic potentials, in NumPy and float64.

Every scheme is an affine map of x = (theta, r), theta and r of d coordinates each, for U = theta' K theta / 2 and
a gradient K theta + n whose error n has covariance V::

    x' = A x + b n + noise of covariance Q

Stationary and transient moments follow by linear algebra. The maps are written as products of their substeps and
share nothing with `bnn_ppl.updates`, which they are there to test.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Map(NamedTuple):
    """x' = A x + b n + noise of covariance Q; shapes (2d, 2d), (2d, d) and (2d, 2d)."""

    A: np.ndarray
    b: np.ndarray
    Q: np.ndarray


def then(first: Map, second: Map) -> Map:
    """`first`, then `second`, of which at most one takes a gradient."""
    return Map(
        second.A @ first.A,
        second.A @ first.b + second.b,
        second.A @ first.Q @ second.A.T + second.Q,
    )


def _shift(d: int, *, theta_by_r: float = 0.0, r_by_theta: np.ndarray | None = None, decay: float = 1.0) -> np.ndarray:
    """One substep: theta += theta_by_r r, or r += r_by_theta theta, or r *= decay."""
    unit, zero = np.eye(d), np.zeros((d, d))
    below = zero if r_by_theta is None else r_by_theta
    return np.block([[unit, theta_by_r * unit], [below, decay * unit]])


def _in_r(d: int, value: float) -> np.ndarray:
    """The matrix diag(0, value) of blocks d x d."""
    return np.kron(np.diag([0.0, value]), np.eye(d))


def sgld(h: float, k, *, T: float = 1.0, V: float = 0.0) -> Map:
    """theta' = theta - h g + N(0, 2 h T - h^2 V): V is the compensated part; r stays 0."""
    K = np.atleast_2d(k).astype(float)
    d = len(K)
    A = np.kron(np.diag([1.0, 0.0]), np.eye(d)) + np.block([[-h * K, 0 * K], [0 * K, 0 * K]])
    Q = np.kron(np.diag([2 * h * T - h**2 * V, 0.0]), np.eye(d))
    return Map(A, np.vstack([-h * np.eye(d), np.zeros((d, d))]), Q)


def baoab(h: float, k, *, M: float = 1.0, C: float = 1.0, T: float = 1.0, V: float = 0.0, kick: float = 1.0) -> Map:
    """B with kick h, A with h / 2, O, A with h / 2; the injected noise is less by the heat of V as s -> 0."""
    K = np.atleast_2d(k).astype(float)
    d = len(K)
    c = np.exp(-h * C / M)
    B = _shift(d, r_by_theta=-kick * h * K)
    half_A = _shift(d, theta_by_r=h / (2 * M))
    O = _shift(d, decay=c)  # noqa: E741
    injected = M * T * (1 - c**2) - (kick * h) ** 2 * V * (1 + c) ** 2 / 4
    after_B = half_A @ O @ half_A
    error = np.vstack([np.zeros((d, d)), -kick * h * np.eye(d)])
    return Map(after_B @ B, after_B @ error, half_A @ _in_r(d, injected) @ half_A.T)


def symplectic_euler(
    h: float, k, *, M: float = 1.0, C: float = 1.0, T: float = 1.0, V: float = 0.0, kick: float = 1.0
) -> Map:
    """r' = (1 - a) r - h g + N(0, 2 a M T - h^2 V), then theta' = theta + (h / M) r'."""
    K = np.atleast_2d(k).astype(float)
    d = len(K)
    a = h * C / M
    new_r = _shift(d, r_by_theta=-kick * h * K, decay=1 - a)
    drift = _shift(d, theta_by_r=h / M)
    error = np.vstack([np.zeros((d, d)), -kick * h * np.eye(d)])
    injected = 2 * a * M * T - (kick * h) ** 2 * V
    return Map(drift @ new_r, drift @ error, drift @ _in_r(d, injected) @ drift.T)


def lm(h: float, k, *, T: float = 1.0, V: float = 0.0) -> Map:
    """theta' = theta - h g + s (xi + xi') / 2, s^2 = 2 h T - h^2 V, where r is the noise xi of the step before."""
    K = np.atleast_2d(k).astype(float)
    unit, zero = np.eye(len(K)), np.zeros_like(K)
    half = 0.5 * (2 * h * T - h**2 * V) ** 0.5
    A = np.block([[unit - h * K, half * unit], [zero, zero]])
    new = np.vstack([half * unit, unit])
    return Map(A, np.vstack([-h * unit, zero]), new @ new.T)


def sgnht(h: float, k, x: float, *, C: float, T: float) -> Map:
    """BAOAB of unit mass whose momentum decays with the thermostat x and gets the noise of the friction C."""
    decay = np.exp(-h * x)
    injected = C * T / x * (1 - decay**2)
    plain = baoab(h, k, C=x, T=1.0)
    return plain._replace(Q=plain.Q * injected / (1 - decay**2))


def thermostat(h: float, k: float, V: float = 0.0, *, C: float, T: float) -> float:
    """SGNHT's thermostat in many dimensions: the one at which momenta before and after O have mean square T."""
    low, high = 1e-3, 1e3
    while high - low > 1e-12 * high:
        x = (low * high) ** 0.5
        S = stationary(sgnht(h, k, x, C=C, T=T), V)
        kicked = np.array([-h * k, 1.0])
        before = kicked @ S @ kicked + h**2 * V
        low, high = (x, high) if before + S[1, 1] > 2 * T else (low, x)
    return x


UNDERDAMPED = {"baoab": baoab, "symplectic_euler": symplectic_euler}
OVERDAMPED = {"sgld": sgld, "lm": lm}
SCHEMES = OVERDAMPED | UNDERDAMPED


def refresh(scale: float, M: float = 1.0, d: int = 1) -> Map:
    """The momentum redrawn from N(0, scale M)."""
    return Map(_shift(d, decay=0.0), np.zeros((2 * d, d)), _in_r(d, scale * M))


def refreshed(scheme: str, h: float, k, *, L: int, scale: float, M: float = 1.0, **arguments) -> list[Map]:
    """The L steps of a period: the momentum is redrawn before the first, which kicks with h / 2."""
    make = UNDERDAMPED[scheme]
    full = make(h, k, M=M, **arguments)
    first = then(refresh(scale, M, len(np.atleast_2d(k))), make(h, k, M=M, kick=0.5, **arguments))
    return [first] + [full] * (L - 1)


def lyapunov(A: np.ndarray, Q: np.ndarray) -> np.ndarray:
    """S with S = A S A' + Q."""
    n = len(A)
    return np.linalg.solve(np.eye(n * n) - np.kron(A, A), Q.reshape(-1)).reshape(n, n)


def _total(step: Map, V) -> np.ndarray:
    d = step.b.shape[1]
    return step.Q + step.b @ (np.asarray(V) * np.eye(d)) @ step.b.T


def stationary(steps: Map | Sequence[Map], V=0.0) -> np.ndarray:
    """Covariance of x after the last of `steps`, which repeat for ever; n independent, of covariance V."""
    steps = [steps] if isinstance(steps, Map) else steps
    A, Q = np.eye(len(steps[0].A)), np.zeros_like(steps[0].A)
    for step in steps:
        A, Q = step.A @ A, step.A @ Q @ step.A.T + _total(step, V)
    return lyapunov(A, Q)


def transition(steps: Iterable[Map], mean, covariance, V=0.0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and covariance of x after each step, from those before the first."""
    mean, S, laws = np.asarray(mean, float), np.asarray(covariance, float), []
    for step in steps:
        mean, S = step.A @ mean, step.A @ S @ step.A.T + _total(step, V)
        laws.append((mean, S))
    return laws


def epoch_stream(step: Map, V: float, m: int, phase: int = 0) -> np.ndarray:
    """Covariance of x `phase` steps into an epoch of m batches, d = 1.

    The m errors of an epoch sum to 0: Cov(n_i, n_j) = V m / (m - 1) (1[i = j] - 1 / m).
    """
    powers = [np.linalg.matrix_power(step.A, j) for j in range(m + 1)]

    def added(count: int) -> np.ndarray:
        pushed = [powers[count - 1 - i] @ step.b for i in range(count)]
        noise = sum((powers[j] @ step.Q @ powers[j].T for j in range(count)), np.zeros_like(step.A))
        for i in range(count):
            for j in range(count):
                noise = noise + V * m / (m - 1) * ((i == j) - 1 / m) * pushed[i] @ pushed[j].T
        return noise

    at_end = lyapunov(powers[m], added(m))
    return powers[phase] @ at_end @ powers[phase].T + added(phase)


def random_batches(maps: Sequence[tuple[Map, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Stationary mean and covariance where each step takes one of `maps` (and shifts x), all equally likely.

    This is minibatch sampling where the batch moves the curvature too, as in linear regression.
    """
    n = len(maps[0][0].A)
    mean_A = np.mean([step.A for step, _ in maps], 0)
    mean = np.linalg.solve(np.eye(n) - mean_A, np.mean([c for _, c in maps], 0))
    constant, square = np.zeros((n, n)), np.zeros((n * n, n * n))
    for step, c in maps:
        cross = step.A @ np.outer(mean, c)
        constant += (step.Q + cross + cross.T + np.outer(c, c)) / len(maps)
        square += np.kron(step.A, step.A) / len(maps)
    second = np.linalg.solve(np.eye(n * n) - square, constant.reshape(-1)).reshape(n, n)
    return mean, second - np.outer(mean, mean)


def z_over_units(values, expected: float) -> float:
    """z-score of the mean of `values`, shape (units,) or (draws, units), units independent and draws not."""
    values = np.asarray(values, float)
    means = values.mean(0) if values.ndim == 2 else values
    return float((means.mean() - expected) / (means.std(ddof=1) / np.sqrt(means.size)))


def z_over_draws(values, expected: float) -> float:
    """z-score of the mean of `values`, shape (draws, units), draws independent and units not."""
    return z_over_units(np.asarray(values, float).mean(1), expected)
