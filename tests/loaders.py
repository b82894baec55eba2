"""A regression whose rows come in batches, and its exact path at T = 0, for the tests of `minibatches=`, in NumPy."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from tests import cases

N, B = 10, 4
NOISE = 0.5
START = np.array([0.7, -0.4])
COLD = {
    "sgld": {"step_size": 0.01},
    "baoab": {"step_size": 0.08, "friction": 2.0, "mass": 1.5},
    "symplectic_euler": {"step_size": 0.08, "friction": 2.0, "mass": 1.5},
}
ORDER = np.arange(100 * B).reshape(-1, B) % N  # rows of the minibatches of a list, the last batch filled up

_rng = np.random.default_rng(7)
X = _rng.normal(size=(N, 2))
Y = X @ [1.0, -0.5] + NOISE * _rng.normal(size=N)


def batches(as_array=np.asarray) -> list[tuple]:
    """All rows in batches of 4, 4 and 2."""
    ends = [*range(0, N, B), N]
    return [(as_array(X[a:b]), as_array(Y[a:b])) for a, b in itertools.pairwise(ends)]


class Counting:
    """The batches, and how many epochs of them were begun."""

    def __init__(self, given: Sequence):
        self.given, self.epochs = given, 0

    def __len__(self) -> int:
        return len(self.given)

    def __iter__(self) -> Iterator:
        self.epochs += 1
        return iter(self.given)


def epochs(steps: int) -> int:
    """Epochs that a chain begins in so many steps, one gradient each and one at the start."""
    return -(-(steps + 1) * B // N)


def path(scheme: str, rows: np.ndarray, noise: float = NOISE, shift: float = 0.0) -> np.ndarray:
    """Positions at T = 0 after each step, shape (len(rows), 2): step k moves with the gradient on `rows[k]`."""
    position, found = np.concatenate([START, 0 * START]), []
    for taken in rows:
        scale = N / B / noise**2
        step = cases.law(scheme, scale * X[taken].T @ X[taken] + np.eye(2), COLD[scheme], T=0.0)
        position = step.A @ position - step.b @ (scale * X[taken].T @ (Y[taken] - shift))
        found.append(position[:2])
    return np.array(found)


def log_joint(theta: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Minibatch estimate of log p(y, theta) of draws (draws, 2) on rows (draws, B)."""
    errors = (Y[rows] - np.einsum("nbi,ni->nb", X[rows], theta)) / NOISE
    likelihood = -0.5 * errors**2 - np.log(NOISE) - 0.5 * np.log(2 * np.pi)
    prior = -0.5 * theta**2 - 0.5 * np.log(2 * np.pi)
    return N / B * likelihood.sum(1) + prior.sum(1)


# ---- augmentation: one regression a coordinate, whose inputs come with fresh noise

COORDINATES = 2000
AUGMENTED_ROWS, AUGMENTED_BATCH = 20, 4
AUGMENTATION = 0.7
AUGMENTED = {"step_size": 0.004, "steps_per_draw": 8}
AUGMENTED_WARMUP, AUGMENTED_DRAWS = 20, 60


class Augmented:
    """Endless batches of rows, which each coordinate takes on its own, with noise on the inputs."""

    def __init__(self, seed: int, dtype: str):
        rng = np.random.default_rng(seed)
        shape = (AUGMENTED_ROWS, COORDINATES)
        self.x = rng.normal(size=shape)
        self.y = 0.8 * self.x + rng.normal(size=shape)
        self.rng, self.dtype = rng, dtype

    def __iter__(self) -> Iterator:
        while True:
            rows = self.rng.integers(AUGMENTED_ROWS, size=(AUGMENTED_BATCH, COORDINATES))
            x, y = np.take_along_axis(self.x, rows, 0), np.take_along_axis(self.y, rows, 0)
            x = x + AUGMENTATION * self.rng.normal(size=x.shape)
            yield x.astype(self.dtype), y.astype(self.dtype)

    def scores(self, draws: np.ndarray) -> dict[str, float]:
        """Scores of the chain's mean, draws (draws, COORDINATES), against that of the expected log likelihood."""
        precision = 1 + (self.x**2 + AUGMENTATION**2).sum(0)
        pull = (self.x * self.y).sum(0)
        errors = draws.mean(0) - pull / precision
        return {name: cases.laws.z_over_units(errors * by, 0.0) for name, by in (("mean", 1.0), ("size", pull))}
