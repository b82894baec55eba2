"""Cases that the tests of local reparameterisation share."""

from collections.abc import Callable

import numpy as np
import pytest

RNG = np.random.default_rng(0)
ROWS, INPUTS, OUTPUTS, SIZE, WINDOW = 20_000, 4, 3, 4, 3
ROW = RNG.normal(size=INPUTS)
IMAGE = RNG.normal(size=(SIZE, SIZE, INPUTS))
LOC, SCALE = RNG.normal(size=(INPUTS, OUTPUTS)), RNG.uniform(0.2, 1.0, (INPUTS, OUTPUTS))
KERNEL_LOC, KERNEL_SCALE = (
    RNG.normal(size=(WINDOW, WINDOW, INPUTS, OUTPUTS)),
    RNG.uniform(0.2, 1.0, (WINDOW, WINDOW, INPUTS, OUTPUTS)),
)

X = RNG.normal(size=(100, 6))
Y = X.sum(1) + RNG.normal(size=100)


def dense(row: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The outputs of a dense layer."""
    return row @ weights


def convolution(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The outputs of an unpadded convolution, by sums over its windows."""
    reach = range(SIZE - WINDOW + 1)
    windows = np.array([[image[i : i + WINDOW, j : j + WINDOW] for j in reach] for i in reach])
    return np.einsum("ijabc,abco->ijo", windows, kernel)


def check_moments(found: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> None:
    """Outputs of the same inputs in each row have these moments, and each row and entry noise of its own."""
    rows = len(found)
    assert np.abs((found.mean(0) - mean) / np.sqrt(variance / rows)).max() < 4.5
    assert np.abs((found.var(0) / variance - 1) * np.sqrt(rows / 2)).max() < 4.5
    correlation = np.corrcoef(found.reshape(rows, -1), rowvar=False)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 4.5 / np.sqrt(rows)


def check_sites_refused(run: Callable) -> None:
    """Where a guide draws v and w from normals, other names are refused, and a choice of none."""
    has = r"from normals: it has \['v', 'w'\]"
    with pytest.raises(ValueError, match=r"sites=\['u', 'w'\] names \['u'\], which the guide does not draw " + has):
        run(["u", "w"])
    for sites in ([], lambda name, shape: False):
        with pytest.raises(ValueError, match=r"sites=.* chooses none of the sites that the guide draws " + has):
            run(sites)
