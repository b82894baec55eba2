"""Cases that the tests of prediction schemes share: a small network, its draws, and what one draw predicts."""

from collections.abc import Mapping

import numpy as np
import xarray as xr
from scipy.special import entr, log_softmax

ROWS, CHAINS, DRAWS, CLASSES = 9, 2, 5, 3
SHAPES = {"w0": (2, 4), "w1": (4, CLASSES), "scale": ()}
ENTRIES = sum(int(np.prod(shape)) for shape in SHAPES.values())

rng = np.random.default_rng(0)
X = rng.normal(size=(ROWS, 2))
LABELS = rng.integers(0, CLASSES, ROWS)
# Chains with means of their own, in each of which the draws have a trend.
SHIFT = 1.5 * np.arange(CHAINS)[:, None] + 0.3 * np.arange(DRAWS)
BY_CHAIN = {
    name: np.abs(rng.normal(size=(CHAINS, DRAWS, *shape)) + SHIFT.reshape(CHAINS, DRAWS, *[1] * len(shape)))
    for name, shape in SHAPES.items()
}
FLAT = {name: value.reshape(-1, *value.shape[2:]) for name, value in BY_CHAIN.items()}
SEEDS = range(8)


def mean(draws: Mapping[str, np.ndarray], leading: int) -> dict[str, np.ndarray]:
    """By a loop over the draws, which have so many dimensions in front."""
    found = {}
    for name, value in draws.items():
        places = list(np.ndindex(*np.shape(value)[:leading]))
        found[name] = sum(np.asarray(value)[place] for place in places) / len(places)
    return found


def log_probabilities(weights: Mapping[str, np.ndarray]) -> np.ndarray:
    w0, w1, scale = (np.asarray(weights[name]) for name in SHAPES)
    return log_softmax(scale * np.tanh(X @ w0) @ w1, -1)


def entries(draws: np.ndarray) -> dict[str, np.ndarray]:
    """Weights by site of their entries in a row, shape (draws, ENTRIES), as the models `reveal` predict them."""
    found, start = {}, 0
    for name, shape in SHAPES.items():
        stop = start + int(np.prod(shape))
        found[name] = np.asarray(draws)[:, start:stop].reshape(-1, *shape)
        start = stop
    return found


def assert_one(found: xr.Dataset, weights: Mapping[str, np.ndarray]) -> None:
    """What is predicted for X and LABELS, with functions, is what these weights alone predict."""
    log_p = log_probabilities(weights)
    p, by_row = np.exp(log_p), log_p[np.arange(ROWS), LABELS]
    expected = {
        "probabilities": p,
        "mean_entropy": entr(p).sum(-1),
        "observed": LABELS,
        "log_density": by_row,
        "draw_log_density": by_row.sum()[None, None],
        "functions": p[None, None],
    }
    assert set(found.data_vars) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
    assert found["functions"].dims == ("chain", "draw", "row", "class")
    assert found.attrs == {"site": "y", "num_draws": 1}


def at(draws: Mapping[str, np.ndarray], found: xr.Dataset) -> dict[str, np.ndarray]:
    """The draw of chains that a prediction says it was made with."""
    (chain,), (draw,) = found["chain"].values, found["draw"].values
    return {name: np.asarray(value)[chain, draw] for name, value in draws.items()}


# Draws of which some means are exactly 0, and the weights that the warning names.
MIRRORED = {name: np.concatenate([np.ceil(value), -np.ceil(value)]) for name, value in FLAT.items()}  # exact sums
ZERO = [
    (FLAT | {"w0": 0 * FLAT["w0"]}, ["w0"]),
    (BY_CHAIN | {"w1": np.ceil(BY_CHAIN["w1"][:1]) * np.array([1, -1]).reshape(2, 1, 1, 1)}, ["w1"]),
    (MIRRORED | {"scale": np.abs(MIRRORED["scale"])}, ["w0", "w1"]),
]

BAD = [
    ({"scheme": "mean"}, "scheme must be one of 'ensemble', 'stochastic', 'deterministic', got 'mean'"),
    ({"scheme": None}, "scheme must be one of 'ensemble', .* got None"),
    (
        {"scheme": "stochastic", "num_draws": 3},
        "num_draws=3 with scheme='stochastic', which predicts with one draw: leave num_draws out",
    ),
    ({"scheme": "stochastic", "seed": -1}, "seed must be an integer of at least 0 for scheme='stochastic', got -1"),
    ({"scheme": "stochastic", "seed": 0.5}, "seed must be an integer of at least 0 .* got 0.5"),
    ({"scheme": "stochastic", "seed": True}, "seed must be an integer of at least 0 .* got True"),
    ({"scheme": "stochastic", "num_draws": 0}, "num_draws must be an integer of at least 1, got 0"),
    ({"scheme": "deterministic", "num_draws": DRAWS + 1}, "num_draws=6, and there are 5 draws in a chain"),
]
BAD_DRAWS = [
    (
        BY_CHAIN | {"scale": np.ceil(BY_CHAIN["scale"]).astype(int)},
        "draws of site 'scale' are integers, .* take scheme='ensemble', or",
    ),
    (
        BY_CHAIN | {"w1": np.where(SHIFT[..., None, None] == SHIFT[1, 2], np.nan, BY_CHAIN["w1"])},
        "mean of the draws of site 'w1' is not finite: leave out draws that diverged",
    ),
]
