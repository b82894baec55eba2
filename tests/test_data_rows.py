"""Data with more or fewer rows than the plate, and labels that are no classes."""

import re
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.backends import NumPyro, Pyro, message

N, B = 40, 8
X = np.linspace(-1.0, 1.0, 2 * N, dtype=np.float32).reshape(N, 2)
Y = X @ np.array([1.0, -0.5], np.float32)
LABELS = np.arange(N) * 7 % 3


@pytest.fixture(params=[NumPyro, Pyro], ids=lambda backend: backend.name)
def backend(request):
    return request.param


def regression(backend, size, rows=0):
    """With a plate of the rows of x (0) or y (1)."""
    host, dist = backend.host, backend.host.distributions

    def model(*data):
        w = host.sample("w", dist.Normal(backend.array(np.zeros(2, np.float32)), 1.0).to_event(1))
        with host.plate("data", len(data[rows]), subsample_size=size) as index:
            host.sample("y", dist.Normal(data[0][index] @ w, 0.5), obs=data[1][index])

    return backend.kernels.SGLD(model, step_size=1e-4)


@pytest.mark.parametrize("size", [B, None], ids=["minibatches", "full data"])
@pytest.mark.parametrize("rows", [0, 1], ids=["y", "x"])
def test_too_few_rows(backend, size, rows):
    """JAX takes the last row for all that are missing, which would be another posterior."""
    data = [X, Y]
    data[1 - rows] = data[1 - rows][:15]
    text = message(backend.run, regression(backend, size, rows), *data, error=(ValueError, IndexError))
    assert "out of bounds" in text or "out-of-bounds" in text
    if size == B or backend is NumPyro:  # else torch's own
        assert re.search(r"plate 'data' has 40 rows, and the model takes rows that its data do not have", text)
        assert "give as many rows of each array, x and y alike" in text


def test_one_observation_for_all_rows(backend):
    """A number in the place of observations, as the ones trick has it, has no rows to look at."""
    host, dist = backend.host, backend.host.distributions

    def model(x):
        w = host.sample("w", dist.Normal(backend.array(np.zeros(2, np.float32)), 1.0).to_event(1))
        with host.plate("data", len(x), subsample_size=B) as index:
            host.sample("one", dist.Bernoulli(logits=x[index] @ w), obs=backend.array(np.ones(B, np.float32))[0])

    draws, _ = backend.run(backend.kernels.SGLD(model, step_size=1e-4), X)
    assert np.isfinite(draws["w"]).all()


def test_observations_in_bfloat16(backend):
    """Which NumPy does not have."""
    y = jnp.asarray(Y, jnp.bfloat16) if backend is NumPyro else torch.tensor(Y).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draws, _ = backend.run(regression(backend, B), X, y)
    assert np.isfinite(draws["w"]).all()
    with pytest.warns(UserWarning, match=r"data of observed site 'y' have 40 rows and its plate has 20, so that the"):
        backend.run(regression(backend, B), X[:20], y)


def test_too_many_rows(backend):
    with pytest.warns(UserWarning, match=r"data of observed site 'y' have 40 rows and its plate has 20, so that the"):
        backend.run(regression(backend, B), X[:20], Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.run(regression(backend, B), X, Y)


def classification(backend, size, mask):
    host, dist = backend.host, backend.host.distributions

    def model(x, y):
        w = host.sample("w", dist.Normal(backend.array(np.zeros((2, 3), np.float32)), 1.0).to_event(2))
        with host.plate("data", N, subsample_size=size) as index:
            x, y = (x, y) if size is None else (x[index], y[index])
            law = dist.Categorical(logits=x @ w)
            if mask:
                law, y = law.mask(y >= 0), backend.where(y >= 0, y, 0) if backend is Pyro else y
            host.sample("y", law, obs=y)

    return backend.kernels.SGLD(model, step_size=1e-4)


@pytest.mark.parametrize("size", [B, None], ids=["minibatches", "full data"])
@pytest.mark.parametrize("label", [-1, 3])
def test_labels_that_are_no_classes(backend, size, label):
    """JAX takes -1 for the last class."""
    labels = np.where(np.arange(N) == 17, label, LABELS)  # in neither the first nor the last minibatch
    text = message(backend.run, classification(backend, size, False), X, labels)
    found = f"observed site 'y' is {label} at row 17, and its classes are 0 to 2: give class numbers" in text
    assert found or (label == 3 and "at row 17 of plate 'data'" in text)  # no number, if the chain starts there


@pytest.mark.parametrize("size", [B, None], ids=["minibatches", "full data"])
def test_labels_behind_a_mask(backend, size):
    labels = np.where(np.arange(N) == 17, -1, LABELS)
    draws, _ = backend.run(classification(backend, size, True), X, labels)
    assert np.isfinite(draws["w"]).all()


LAWS = {
    "Normal": lambda dist, f: dist.Normal(f, 1.0).to_event(1),
    "Categorical": lambda dist, f: dist.Categorical(logits=f),
    "Multinomial": lambda dist, f: dist.Multinomial(1, logits=f),
    "OneHotCategorical": lambda dist, f: dist.OneHotCategorical(logits=f),
}


def with_law(backend, name, size):
    host, dist = backend.host, backend.host.distributions

    def model(x, y):
        w = host.sample("w", dist.Normal(backend.array(np.zeros((2, 3), np.float32)), 1.0).to_event(2))
        with host.plate("data", N, subsample_size=size) as index:
            host.sample("y", LAWS[name](dist, x[index] @ w), obs=y[index])

    return backend.kernels.SGLD(model, step_size=1e-4)


@pytest.mark.parametrize("size", [B, None], ids=["minibatches", "full data"])
@pytest.mark.parametrize(
    ("name", "shape", "wanted"), [("Normal", (N, 1), (3,)), ("Multinomial", (N,), (3,)), ("Categorical", (N, 3), ())]
)
def test_observations_of_another_event(backend, name, shape, wanted, size):
    """One number a row would stand for all three, and one-hot rows are no class numbers."""
    y, rows = np.zeros(shape, np.float32 if name == "Normal" else int), size or N
    text = message(backend.run, with_law(backend, name, size), X, y)
    assert f"observed site 'y' has values of shape {(rows, *shape[1:])}, and its distribution has the batch" in text
    assert f"the batch shape ({rows},) and the event shape {wanted}: give values of shape {(rows, *wanted)}" in text


@pytest.mark.parametrize("size", [B, None], ids=["minibatches", "full data"])
def test_one_hot_rows_without_a_single_one(size):
    y = np.eye(3, dtype=np.float32)[LABELS]
    draws, _ = Pyro.run(with_law(Pyro, "OneHotCategorical", size), X, y)
    assert np.isfinite(draws["w"]).all()
    y[17] = 0.5, 0.5, 0.0
    text = message(Pyro.run, with_law(Pyro, "OneHotCategorical", size), X, y)
    assert "observed site 'y' is [0.5 0.5 0. ] at row 17, and its distribution is over rows with a single 1" in text


@pytest.mark.parametrize("size", [B, None], ids=["minibatches", "full data"])
def test_class_numbers_that_are_no_integers(backend, size):
    y = LABELS.astype(np.float32)
    if backend is NumPyro:  # which takes them as indices
        text = message(backend.run, with_law(backend, "Categorical", size), X, y)
        assert "has values of type float32, and its classes are the integers 0 to 2: give integers, such as" in text
        return
    y[17] += 0.5
    text = message(backend.run, with_law(backend, "Categorical", size), X, y)
    assert f"observed site 'y' is {y[17]} at row 17, and its classes are 0 to 2: give class numbers" in text
