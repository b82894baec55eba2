"""Both hosts, models, draws and answers by hand that the tests of predict share."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as pyro_dist
import torch
from scipy import stats
from scipy.special import entr, log_softmax, logsumexp, softmax

import bnn_ppl.numpyro
import bnn_ppl.pyro

NUMPYRO = SimpleNamespace(
    name="numpyro",
    ppl=numpyro,
    dist=numpyro_dist,
    predict=bnn_ppl.numpyro.predict,
    array=jnp.asarray,
    tanh=jnp.tanh,
    factor=numpyro.factor,
)
PYRO = SimpleNamespace(
    name="pyro",
    ppl=pyro,
    dist=pyro_dist,
    predict=bnn_ppl.pyro.predict,
    array=torch.as_tensor,
    tanh=torch.tanh,
    factor=pyro.factor,
)
TRAINING_ROWS, BATCH = 60, 4
N, CHAINS, DRAWS, CLASSES = 11, 2, 7, 4

rng = np.random.default_rng(0)
X = rng.normal(size=(N, 3))
LABELS = rng.integers(0, CLASSES, N)
VALUES = rng.normal(size=N)
WEIGHTS = {"w0": rng.normal(size=(CHAINS, DRAWS, 3, 5)), "w1": rng.normal(size=(CHAINS, DRAWS, 5, CLASSES))}
REGRESSION = {"w": rng.normal(size=(CHAINS, DRAWS, 3)), "noise": rng.gamma(2.0, 1.0, (CHAINS, DRAWS))}
LINEAR = {"w": REGRESSION["w"]}


def normal(host, shape, scale=1.0):
    return host.dist.Normal(host.array(0.0), host.array(scale)).expand(shape).to_event(len(shape))


def rows_of(host, kind, arrays):
    """What a model has inside its plate, for each way to write one: the plate, and the function that takes the rows."""
    n = len(arrays)
    plates = {
        "full": (n, None),
        "subsampled": (n, BATCH),
        "subsample statement": (n, BATCH),
        "constant size": (TRAINING_ROWS, None),
        "constant size, subsampled": (TRAINING_ROWS, BATCH),
        "constant size, subsample statement": (TRAINING_ROWS, BATCH),
        "constant size, batch as it is": (TRAINING_ROWS, n),
    }
    size, subsample_size = plates[kind]
    return host.ppl.plate("data", size, subsample_size=subsample_size)


def take(host, kind, index, array, event_dim=0):
    if array is None or kind in ("full", "constant size, batch as it is"):
        return array
    return host.ppl.subsample(array, event_dim=event_dim) if "statement" in kind else array[index]


PLATES = [
    "full",
    "subsampled",
    "subsample statement",
    "constant size",
    "constant size, subsampled",
    "constant size, subsample statement",
    "constant size, batch as it is",
]


def classifier(host, kind="subsampled"):
    def model(x, y=None):
        w0 = host.ppl.sample("w0", normal(host, [3, 5]))
        w1 = host.ppl.sample("w1", normal(host, [5, CLASSES]))
        with rows_of(host, kind, x) as index:
            hidden = host.tanh(take(host, kind, index, x, 1) @ w0)
            host.ppl.deterministic("hidden", hidden.sum(-1))
            host.ppl.sample("y", host.dist.Categorical(logits=hidden @ w1), obs=take(host, kind, index, y))

    return model


def regression(host, kind="subsampled"):
    def model(x, y=None):
        w = host.ppl.sample("w", normal(host, [3]))
        noise = host.ppl.sample("noise", host.dist.HalfNormal(host.array(1.0)))
        with rows_of(host, kind, x) as index:
            mean = take(host, kind, index, x, 1) @ w
            host.ppl.sample("y", host.dist.Normal(mean, noise), obs=take(host, kind, index, y))

    return model


def in_plate(host, response):
    """Model with a linear predictor f = x w, and the distribution `response(f)` of its observed site."""

    def model(x, y=None):
        w = host.ppl.sample("w", normal(host, [3]))
        with host.ppl.plate("data", len(x), subsample_size=min(BATCH, len(x))) as index:
            host.ppl.sample("y", response(x[index] @ w), obs=None if y is None else y[index])

    return model


def on(host, *arrays):
    return [host.array(a) for a in arrays]


def by_hand_classes():
    """A loop over the draws."""
    found = []
    for c, d in np.ndindex(CHAINS, DRAWS):
        logits = np.tanh(X @ WEIGHTS["w0"][c, d]) @ WEIGHTS["w1"][c, d]
        found.append((softmax(logits, -1), log_softmax(logits, -1)[np.arange(N), LABELS]))
    p, log_p = (np.stack(values) for values in zip(*found, strict=True))
    return {
        "probabilities": p.mean(0),
        "mean_entropy": entr(p).sum(-1).mean(0),
        "observed": LABELS,
        "log_density": np.log(np.exp(log_p).mean(0)),
        "draw_log_density": log_p.sum(1).reshape(CHAINS, DRAWS),
        "functions": p.reshape(CHAINS, DRAWS, N, CLASSES),
    }


def by_hand_regression():
    mean = np.stack([X @ w for w in REGRESSION["w"].reshape(-1, 3)])
    noise = REGRESSION["noise"].reshape(-1, 1) * np.ones(N)
    log_p = stats.norm(mean, noise).logpdf(VALUES)
    second_moment = (noise**2 + mean**2).mean(0)
    return {
        "mean": mean.mean(0),
        "sd": np.sqrt(second_moment - mean.mean(0) ** 2),
        "function_sd": mean.std(0),
        "observed": VALUES,
        "log_density": logsumexp(log_p, axis=0) - np.log(len(log_p)),
        "draw_log_density": log_p.sum(1).reshape(CHAINS, DRAWS),
        "functions": mean.reshape(CHAINS, DRAWS, N),
        "noise_sd": noise.reshape(CHAINS, DRAWS, N),
    }


def assert_equal(found, expected, rtol=1e-10):
    assert set(found.data_vars) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=1e-12, err_msg=name)
