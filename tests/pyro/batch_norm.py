"""A torch network with two layers of batch normalisation, and its model, for the tests of their statistics."""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from bnn_ppl.pyro import random_torch_module
from tests.batch_norm import CUTS, draw_weights
from tests.batch_norm import X as X_NUMPY
from tests.batch_norm import Y as Y_NUMPY

X, Y = torch.tensor(X_NUMPY), torch.tensor(Y_NUMPY)
BATCHES = [(X[cut], Y[cut]) for cut in CUTS]
NAMES = [f"{i}.{part}" for i in (0, 1, 3, 4, 6) for part in ("weight", "bias")]
NORMAL = dist.Normal(torch.tensor(0.0).double(), torch.tensor(1.0).double())
EQUAL = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)


def network(momentum=0.1, **norm):
    norm = {"momentum": momentum, "dtype": torch.float64} | norm
    layers = [torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3, **norm), torch.nn.Tanh()]
    layers += [torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4, **norm), torch.nn.Tanh(), torch.nn.Linear(4, 1)]
    return torch.nn.Sequential(*layers).double().eval()


def model_of(net, size=None):
    def model(x, y=None, subsample_size=None):
        f = random_torch_module("net", net, NORMAL)
        with pyro.plate("data", size or len(x), subsample_size=subsample_size) as rows:
            mean = pyro.deterministic("mean", f(x if size else x[rows]).squeeze(-1))
            pyro.sample("y", dist.Normal(mean, 0.5), obs=None if y is None else y if size else y[rows])

    return model


def sites(seed=1, prefix="net."):
    weights = [torch.tensor(value.T.copy()) for value in draw_weights(seed)]
    return {prefix + name: value for name, value in zip(NAMES, weights, strict=True)}
