"""Data that the tests of the models share."""

import numpy as np

N, D = 12, 3
rng = np.random.default_rng(0)
X = rng.normal(size=(N, D))
TARGETS = X @ [1.0, -0.5, 0.3] + 0.2 + 0.1 * rng.normal(size=N)
BINARY = rng.integers(0, 2, N)
LABELS = np.arange(N) % 4
