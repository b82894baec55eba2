"""predict on both hosts: plates over outputs, events, labels and counts, and models of several sites."""

import jax
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import entr, logsumexp

from tests.predicted import BATCH, LINEAR, NUMPYRO, PYRO, TRAINING_ROWS, VALUES, N, X, in_plate, normal, on, rng


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=[NUMPYRO, PYRO], ids=lambda host: host.name)
def host(request):
    return request.param


# ---- other responses


def test_plates_over_outputs(host):
    """The rows may be any dimension; the density of a row is joint over its outputs."""
    w = rng.normal(size=(7, 3, 2))
    y = rng.normal(size=(N, 2))

    for rows, outputs in ((-2, -1), (-1, -2)):

        def model(x, y, rows=rows, outputs=outputs):
            w = host.ppl.sample("w", normal(host, [3, 2]))
            data = host.ppl.plate("data", len(x), subsample_size=min(BATCH, len(x)), dim=rows)
            with host.ppl.plate("output", 2, dim=outputs), data as index:
                mean, y = x[index] @ w, y[index]
                if rows == -1:
                    mean, y = mean.T, y.T
                host.ppl.sample("y", host.dist.Normal(mean, host.array(0.5)), obs=y)

        found = host.predict({"w": w}, *on(host, X, y), model=model, functions=True, row_batch_size=4)
        mean = np.einsum("ni,sio->sno", X, w)
        assert found["mean"].dims == found["observed"].dims == ("row", "output")
        np.testing.assert_allclose(found["mean"], mean.mean(0))
        np.testing.assert_allclose(found["functions"], mean[None])
        np.testing.assert_allclose(found["sd"], np.sqrt(mean.var(0) + 0.25))
        np.testing.assert_array_equal(found["observed"], y)
        log_p = stats.norm(mean, 0.5).logpdf(y).sum(-1)
        np.testing.assert_allclose(found["log_density"], logsumexp(log_p, axis=0) - np.log(7))


def test_as_many_rows_as_outputs(host):
    """Then only a second look tells which is which."""

    def model(x):
        w = host.ppl.sample("w", normal(host, [3, 2]))
        with host.ppl.plate("output", 2, dim=-1), host.ppl.plate("data", len(x), dim=-2):
            host.ppl.sample("y", host.dist.Normal(x @ w, host.array(0.5)))

    w = rng.normal(size=(7, 3, 2))
    found = host.predict({"w": w}, *on(host, X[:2]), model=model)
    assert found["mean"].dims == ("row", "output")
    np.testing.assert_allclose(found["mean"], X[:2] @ w.mean(0))


def test_plates_with_reserved_names(host):
    def model(x):
        w = host.ppl.sample("w", normal(host, [3, 2]))
        with host.ppl.plate("class", 2), host.ppl.plate("data", len(x)):
            host.ppl.sample("y", host.dist.Bernoulli(logits=x @ w))

    found = host.predict({"w": rng.normal(size=(7, 3, 2))}, *on(host, X), model=model)
    assert found["probabilities"].dims == ("row", "class_", "class")


def test_events(host):
    def joint(f):
        mean = f[..., None] * host.array(np.array([1.0, 2.0]))
        return host.dist.MultivariateNormal(mean, covariance_matrix=host.array(np.array([[2.0, 0.5], [0.5, 1.0]])))

    y = rng.normal(size=(N, 2))
    found = host.predict(LINEAR, *on(host, X, y), model=in_plate(host, joint), row_batch_size=4)
    f = np.stack([X @ w for w in LINEAR["w"].reshape(-1, 3)])
    mean = f[..., None] * [1.0, 2.0]
    assert found["mean"].dims == ("row", "y_dim_1")
    np.testing.assert_allclose(found["mean"], mean.mean(0))
    np.testing.assert_allclose(found["sd"], np.sqrt(mean.var(0) + [2.0, 1.0]))
    log_p = np.stack([stats.multivariate_normal([0, 0], [[2.0, 0.5], [0.5, 1.0]]).logpdf(y - m) for m in mean])
    np.testing.assert_allclose(found["log_density"], logsumexp(log_p, axis=0) - np.log(len(f)))


def test_several_labels_a_row(host):
    def labels(f):
        return host.dist.Bernoulli(logits=f[..., None] * host.array(np.array([1.0, -1.0, 2.0]))).to_event(1)

    y = rng.integers(0, 2, (N, 3)) * 1.0
    found = host.predict(LINEAR, *on(host, X, y), model=in_plate(host, labels), row_batch_size=4)
    f = np.stack([X @ w for w in LINEAR["w"].reshape(-1, 3)])
    p = 1 / (1 + np.exp(-f[..., None] * [1.0, -1.0, 2.0]))
    assert found["probabilities"].dims == ("row", "y_dim_1", "class")
    np.testing.assert_allclose(found["probabilities"][..., 1], p.mean(0))
    np.testing.assert_allclose(found["mean_entropy"], (entr(p) + entr(1 - p)).mean(0))
    assert found["mean_entropy"].dims == found["observed"].dims == ("row", "y_dim_1")
    np.testing.assert_allclose(found["log_density"], np.log(np.where(y, p, 1 - p).prod(-1).mean(0)))


def test_counts(host):
    y = rng.poisson(2.0, N)
    model = in_plate(host, lambda f: host.dist.Poisson(1 + f**2))
    found = host.predict(LINEAR, *on(host, X, y), model=model)
    rate = 1 + np.stack([X @ w for w in LINEAR["w"].reshape(-1, 3)]) ** 2
    np.testing.assert_allclose(found["mean"], rate.mean(0))
    np.testing.assert_allclose(found["sd"], np.sqrt(rate.mean(0) + rate.var(0)))
    np.testing.assert_allclose(found["log_density"], np.log(stats.poisson(rate).pmf(y).mean(0)))


def test_extreme_probabilities(host):
    model = in_plate(host, lambda f: host.dist.Bernoulli(logits=1e6 * f))
    found = host.predict(LINEAR, *on(host, X), model=model)
    np.testing.assert_allclose(found["mean_entropy"], 0.0, atol=1e-12)
    np.testing.assert_allclose(found["probabilities"].sum("class"), 1.0)


# ---- several sites


def two(host, depends):
    """Model with two observed sites, of which the second may depend on the first."""

    def model(x, first=None, second=None):
        w = host.ppl.sample("w", normal(host, [3]))
        with host.ppl.plate("data", len(x), subsample_size=min(BATCH, len(x))) as index:
            f = x[index] @ w
            given = [None if y is None else y[index] for y in (first, second)]
            value = host.ppl.sample("first", host.dist.Normal(f, host.array(1.0)), obs=given[0])
            mean = f + value if depends else 2 * f
            host.ppl.sample("second", host.dist.Normal(mean, host.array(1.0)), obs=given[1])

    return model


def test_one_of_several_sites(host):
    model, x, y = two(host, depends=False), host.array(X), host.array(VALUES)
    mean = X @ LINEAR["w"].mean((0, 1))
    for name, factor in (("first", 1), ("second", 2)):
        np.testing.assert_allclose(host.predict(LINEAR, x, model=model, site=name)["mean"], factor * mean)
    found = host.predict(LINEAR, x, None, y, model=model, site="second")
    assert "log_density" in found
    assert found.attrs["site"] == "second"
    with pytest.raises(ValueError, match=r"observed sites \['first', 'second'\]: name one of them with site="):
        host.predict(LINEAR, x, y, y, model=model)
    with pytest.raises(
        ValueError, match=r"site='z' is no observed site of the model: choose from \['first', 'second'\]"
    ):
        host.predict(LINEAR, x, y, y, model=model, site="z")


def test_sites_that_depend_on_each_other(host):
    model, x, y = two(host, depends=True), host.array(X), host.array(VALUES)
    found = host.predict(LINEAR, x, y, y, model=model, site="second")
    np.testing.assert_allclose(found["mean"], X @ LINEAR["w"].mean((0, 1)) + VALUES)
    with pytest.raises(ValueError, match=r"site 'second' has another distribution.* depends on \['first'\]"):
        host.predict(LINEAR, x, None, y, model=model, site="second")


def test_other_sites_are_left_alone(host):
    """A factor, a plate over hidden units, an observed number, and what comes after the response."""

    def model(x, y=None):
        with host.ppl.plate("units", 3):
            w = host.ppl.sample("w", host.dist.Normal(host.array(0.0), host.array(1.0)))
        host.ppl.sample("summary", host.dist.Normal(w.sum(), host.array(1.0)), obs=host.array(0.5))
        host.factor("penalty", -(w**2).sum())
        with host.ppl.plate("data", TRAINING_ROWS, subsample_size=BATCH) as index:
            host.ppl.sample("y", host.dist.Normal(x[index] @ w, host.array(1.0)), obs=None if y is None else y[index])
        host.ppl.sample("after", host.dist.Normal(w.sum(), host.array(1.0)))

    for arrays in ((X, VALUES), (X,)):
        found = host.predict(LINEAR, *on(host, *arrays), model=model, row_batch_size=4)
        np.testing.assert_allclose(found["mean"], X @ LINEAR["w"].mean((0, 1)))


def test_arguments_that_are_no_rows(host):
    """They go to the model as they are: arrays of other lengths, numbers, strings and None."""

    def model(x, offset, scale, how, y=None, *, extra=None):
        assert how == "plus"
        assert extra["none"] is None
        w = host.ppl.sample("w", normal(host, [3]))
        with host.ppl.plate("data", len(x), subsample_size=min(BATCH, len(x))) as index:
            mean = x[index] @ (w + offset) * scale + extra["rows"][index]
            host.ppl.sample("y", host.dist.Normal(mean, host.array(1.0)), obs=None if y is None else y[index])

    offset = np.array([1.0, 2.0, 3.0])
    x, offset_, y, more = on(host, X, offset, VALUES, VALUES)
    found = host.predict(
        LINEAR, x, offset_, 2.0, "plus", y, model=model, row_batch_size=4, extra={"rows": more, "none": None}
    )
    np.testing.assert_allclose(found["mean"], 2 * X @ (LINEAR["w"].mean((0, 1)) + offset) + VALUES)
    np.testing.assert_array_equal(found["observed"], VALUES)
