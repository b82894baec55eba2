"""Cases that the tests of variational dropout share."""

import numpy as np

from bnn_ppl import divergences

LOG_ALPHA = -1.3
WEIGHT = np.array([[0.5, -1.0, 2.0], [0.1, -0.4, -0.2]])
SHAPES = {"weight": (2, 3), "neuron": (1, 3), "layer": (1, 1), "additive": (2, 3)}
PARAMETERIZATIONS = tuple(SHAPES)


def sd(parameterization: str) -> np.ndarray:
    """Standard deviations where training starts."""
    size = np.sqrt((WEIGHT**2).mean()) if parameterization == "additive" else np.abs(WEIGHT)
    return np.exp(LOG_ALPHA / 2) * size * np.ones_like(WEIGHT)


def divergence(parameterization: str) -> float:
    """From the log-uniform prior, summed over the weights."""
    return float(divergences.exact(0.5 * (WEIGHT / sd(parameterization)) ** 2).sum())


# Conjugate: y ~ N(X w, 1), w ~ N(0, 1), whose mean-field optimum under one sigma for each weight is known.
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3))
START = np.array([0.5, -0.5, 0.5])  # on the right side of 0, which multiplicative noise does not let weights cross
Y = X @ np.array([1.0, -2.0, 0.5]) + RNG.normal(size=40)


def conjugate() -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviations of the best mean-field normal: inverse roots of the precision's diagonal."""
    precision = np.eye(3) + X.T @ X
    return np.linalg.solve(precision, X.T @ Y), np.diag(precision) ** -0.5


BAD = [
    (
        {"parameterization": "unit"},
        "parameterization must be one of 'weight', 'neuron', 'layer', 'additive', got 'unit'",
    ),
    ({"sites": "w"}, r"sites must be a list of names or a callable .* got 'w': give \['w'\]"),
    ({"init_log_alpha": float("nan")}, "init_log_alpha must be a finite number, got nan"),
    ({"init_log_alpha": "-5"}, "init_log_alpha must be a finite number, got '-5'"),
    (
        {"sites": ["v"]},
        r"names \['v'\], no latent sites; the latent sites of the model are \['local', 'noise'",
    ),
    ({"sites": lambda name, shape: False}, "chooses no latent site"),
    ({"sites": ["noise"]}, "site 'noise' has the support .* leave it out of sites=.* AutoGuideList"),
    (
        {"sites": ["slope"], "parameterization": "layer"},
        "site 'slope' is a scalar, and parameterization='layer' shares",
    ),
    ({"sites": ["local"]}, r"site 'local' lies in the plates \['rows'\], and this guide is for weights"),
]
