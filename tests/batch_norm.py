"""A network with two layers of batch normalisation, by hand, and data that the tests of update_batch_norm share."""

import numpy as np

N, EPSILON = 13, 1e-5
CUTS = [slice(0, 5), slice(5, 10), slice(10, 13)]  # batches, the last of which is shorter
rng = np.random.default_rng(0)
X = 1.0 + 2.0 * rng.normal(size=(N, 2))
Y = X.sum(1)
X_TEST = rng.normal(size=(4, 2))


def draw_weights(seed):
    """Weights as (inputs, outputs), biases, scales and shifts of the two normalised layers, and of the last one."""
    rng = np.random.default_rng(seed)
    shapes = [(2, 3), (3,), (3,), (3,), (3, 4), (4,), (4,), (4,), (4, 1), (1,)]
    return [rng.normal(size=shape) for shape in shapes]


def forward(weights, x, statistics=None, ddof=0):
    """Output, and mean and variance of the inputs of each normalisation; `statistics` take the place of the batch's."""
    found = []
    for i in (0, 4):
        weight, bias, scale, shift = weights[i : i + 4]
        x = x @ weight + bias
        found.append((x.mean(0), x.var(0, ddof=ddof)))
        mean, variance = (x.mean(0), x.var(0)) if statistics is None else statistics[i // 4]
        x = np.tanh((x - mean) / np.sqrt(variance + EPSILON) * scale + shift)
    return (x @ weights[8] + weights[9])[:, 0], found


def averaged(weights, ddof, cuts=CUTS):
    """Statistics of both layers over all batches, each weighed by its rows."""
    found = [forward(weights, X[cut], ddof=ddof)[1] for cut in cuts]
    rows = [len(X[cut]) for cut in cuts]
    return [[np.average([f[i][k] for f in found], axis=0, weights=rows) for k in range(2)] for i in range(2)]
