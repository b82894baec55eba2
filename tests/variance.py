"""Cases that the tests of variance networks share."""

import numpy as np
from scipy.special import erf

SIGMA = np.array([[0.5, -1.0, 2.0], [0.1, -0.4, 0.2]])
DIMENSIONS = 5
LOC = np.array([0.5, -1.0, 2.0, 0.1, -3.0])

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3))
Y = X @ np.array([1.0, -2.0, 0.5]) + RNG.normal(size=40)
FAN_IN = {"w": 40, "net.weight": 50}  # of shape (40, 50)


def check_draws(draws: np.ndarray) -> None:
    """Shape (draws, ...), from N(0, SIGMA^2)."""
    sd = np.abs(SIGMA)
    assert np.abs(draws.mean(0) / sd).max() < 4.5 / len(draws) ** 0.5
    assert np.abs(draws.std(0) / sd - 1).max() < 4.5 / (2 * len(draws)) ** 0.5


def check_uniform(values: np.ndarray, bound: float) -> None:
    """Uniform within +-bound."""
    assert np.abs(values).max() <= bound
    assert abs(values.mean() / bound) < 4 * (3 * values.size) ** -0.5
    assert abs(3 * (values**2).mean() / bound**2 - 1) < 4 * (0.8 / values.size) ** 0.5


def conjugate() -> np.ndarray:
    """Standard deviations of the best zero-mean normals for y ~ N(X w, 1), w ~ N(0, 1)."""
    return (1 + (X**2).sum(0)) ** -0.5


def check_total_variation(log_ratio: np.ndarray, alpha: float) -> None:
    """Of N(0, alpha mu^2) and N(mu, alpha mu^2), from log p / q at draws of q: E max(0, 1 - p / q)."""
    parts = np.maximum(0, -np.expm1(log_ratio))
    error = parts.std() / len(parts) ** 0.5
    assert abs(parts.mean() - erf(np.sqrt(DIMENSIONS / (8 * alpha)))) < 4 * error


BAD = [
    ({"sites": "w"}, r"sites must be a list of names or a callable .* got 'w': give \['w'\]"),
    ({"sites": ["v"]}, r"names \['v'\], no latent sites; the latent sites of the model are \['local', 'noise'"),
    ({"sites": ["noise"]}, "site 'noise' has the support .* leave it out of sites=.* AutoGuideList"),
    ({"sites": ["local"]}, r"site 'local' lies in the plates \['rows'\], and this guide is for weights"),
]
