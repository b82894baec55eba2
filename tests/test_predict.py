"""predict on both hosts: against loops over draws in NumPy, and each other; batches, plates, refusals and memory."""

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
import xarray as xr
from scipy import stats
from scipy.special import entr, log_softmax, logsumexp, softmax

import bnn_ppl.numpyro
import bnn_ppl.pyro
from bnn_ppl import diagnostics, predictions

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


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=[NUMPYRO, PYRO], ids=lambda host: host.name)
def host(request):
    return request.param


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


# ---- against loops


@pytest.mark.parametrize("kind", PLATES)
def test_classes_equal_a_loop_over_draws(host, kind):
    found = host.predict(
        WEIGHTS, *on(host, X, LABELS), model=classifier(host, kind), functions=True, row_batch_size=4, draw_batch_size=5
    )
    assert_equal(found, by_hand_classes())
    assert found["probabilities"].dims == ("row", "class")
    assert found["functions"].dims == ("chain", "draw", "row", "class")
    assert found["observed"].dtype == np.int64
    assert found.attrs == {"site": "y", "num_draws": CHAINS * DRAWS}


@pytest.mark.parametrize("kind", PLATES)
def test_values_equal_a_loop_over_draws(host, kind):
    model = regression(host, kind)
    found = host.predict(REGRESSION, *on(host, X, VALUES), model=model, functions=True, row_batch_size=5)
    assert_equal(found, by_hand_regression())
    assert found["mean"].dims == ("row",)
    assert found["noise_sd"].dims == ("chain", "draw", "row")


def test_both_hosts_agree():
    arguments = {"functions": True, "row_batch_size": 3}
    for draws, y, model in ((WEIGHTS, LABELS, classifier), (REGRESSION, VALUES, regression)):
        one, other = (h.predict(draws, *on(h, X, y), model=model(h), **arguments) for h in (NUMPYRO, PYRO))
        xr.testing.assert_allclose(one, other, rtol=1e-12)
        assert one.attrs == other.attrs
        assert list(one.data_vars) == list(other.data_vars)
        assert [v.dtype for v in one.values()] == [v.dtype for v in other.values()]


@pytest.mark.parametrize("row_batch_size", [1, 4, 10, N, None])
@pytest.mark.parametrize("draw_batch_size", [1, 5, CHAINS * DRAWS, 1000])
def test_batches_do_not_matter(host, row_batch_size, draw_batch_size):
    found = host.predict(
        REGRESSION,
        *on(host, X, VALUES),
        model=regression(host),
        functions=True,
        row_batch_size=row_batch_size,
        draw_batch_size=draw_batch_size,
    )
    assert_equal(found, by_hand_regression())


def test_without_observations(host):
    found = host.predict(WEIGHTS, *on(host, X), model=classifier(host))
    expected = by_hand_classes()
    assert_equal(found, {name: expected[name] for name in ("probabilities", "mean_entropy")})
    assert set(found.coords) == {"row", "class"}


def test_draws_of_one_chain_or_several(host):
    flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in REGRESSION.items()}
    found = host.predict(flat, *on(host, X, VALUES), model=regression(host), functions=True)
    expected = by_hand_regression()
    one_chain = {
        n: expected[n].reshape(1, -1, *expected[n].shape[2:]) for n in found.data_vars if "chain" in found[n].dims
    }
    assert set(one_chain) == {"functions", "noise_sd", "draw_log_density"}
    assert_equal(found, expected | one_chain)


def test_some_draws_of_each_chain(host):
    found = host.predict(REGRESSION, *on(host, X, VALUES), model=regression(host), functions=True, num_draws=3)
    np.testing.assert_array_equal(found["draw"], [0, 2, 4])
    expected = by_hand_regression()["functions"][:, :6:2]
    np.testing.assert_allclose(found["functions"], expected)
    np.testing.assert_allclose(found["mean"], expected.mean((0, 1)))
    assert found.attrs["num_draws"] == 6


def test_a_model_without_a_plate(host):
    def model(x, y=None):
        w = host.ppl.sample("w", normal(host, [3]))
        noise = host.ppl.sample("noise", host.dist.HalfNormal(host.array(1.0)))
        host.ppl.sample("y", host.dist.Normal(x @ w, noise), obs=y)

    found = host.predict(REGRESSION, *on(host, X, VALUES), model=model, functions=True, row_batch_size=4)
    assert_equal(found, by_hand_regression())


def test_a_distribution_that_rows_share(host):
    """Its parameters have no rows, and the plate expands it."""

    def model(x):
        w = host.ppl.sample("w", normal(host, [3]))
        with host.ppl.plate("data", len(x)):
            host.ppl.sample("y", host.dist.Bernoulli(logits=w.sum()), obs=x)

    labels = LABELS % 2 * 1.0
    found = host.predict(LINEAR, *on(host, labels), model=model, row_batch_size=4)
    p = (1 / (1 + np.exp(-LINEAR["w"].sum(-1)))).mean()
    np.testing.assert_allclose(found["probabilities"], np.tile([1 - p, p], (N, 1)))
    np.testing.assert_allclose(found["log_density"], np.log(np.where(labels, p, 1 - p)))
    np.testing.assert_array_equal(found["observed"], labels)
    assert found["observed"].dtype == np.int64


# ---- the exact inequalities, and stability


def test_jensen_and_mutual_information(host):
    found = host.predict(WEIGHTS, *on(host, X, LABELS), model=classifier(host), functions=True)
    assert float(found["log_density"].sum()) > float(found["draw_log_density"].mean())
    information = entr(found["probabilities"]).sum("class") - found["mean_entropy"]
    assert float(information.min()) > 0
    p = found["functions"].values.reshape(-1, N, CLASSES)
    expected = diagnostics.mutual_information(p)
    np.testing.assert_allclose(
        diagnostics.mutual_information(found["probabilities"], found["mean_entropy"]), expected, rtol=1e-9
    )
    one = {name: value[:, :1].repeat(3, axis=1)[:1] for name, value in WEIGHTS.items()}  # equal draws: both are equal
    found = host.predict(one, *on(host, X, LABELS), model=classifier(host))
    np.testing.assert_allclose(float(found["log_density"].sum()), found["draw_log_density"].values[0], rtol=1e-12)
    np.testing.assert_allclose(entr(found["probabilities"]).sum("class"), found["mean_entropy"], rtol=1e-12)


def test_diagnostics_take_the_results(host):
    found = host.predict(WEIGHTS, *on(host, X, LABELS), model=classifier(host), functions=True)
    assert diagnostics.function_diagnostics(found["functions"])["r_hat"].dims == ("row", "class")
    diagnostics.accuracy(found["probabilities"], found["observed"])


def test_far_rows_and_large_means(host):
    """Densities that underflow, and means beside which their spread is small."""
    draws = {"w": np.array([[1.0, 2e-9, 0.0], [1.0, 4e-9, 0.0], [1.0, 0.0, 0.0]]), "noise": np.array([1.0, 1e-3, 1.0])}
    x, y = np.tile([1e6, 1.0, 0.0], (2, 1)), np.array([1e6 + 100.0, 1e6])
    with np.errstate(divide="raise", invalid="raise"):
        found = host.predict(draws, *on(host, x, y), model=regression(host), draw_batch_size=2)
    mean = x @ draws["w"].T
    np.testing.assert_allclose(found["function_sd"], mean.std(1), rtol=0.1)
    log_p = stats.norm(mean, draws["noise"]).logpdf(y[:, None])
    np.testing.assert_allclose(found["log_density"], logsumexp(log_p, axis=1) - np.log(3), rtol=1e-9)


def test_an_impossible_observation_has_density_zero(host):
    def response(f):
        return host.dist.Categorical(logits=f[..., None] * 0 + host.array(np.array([-np.inf, 0.0])))

    y = np.where(np.arange(N) == 3, 0, 1)
    with np.errstate(all="raise"):
        found = host.predict(LINEAR, *on(host, X, y), model=in_plate(host, response), draw_batch_size=5)
    np.testing.assert_array_equal(found["log_density"], np.where(y, 0.0, -np.inf))
    np.testing.assert_array_equal(found["mean_entropy"], 0.0)


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


# ---- bad input


def bad(host, message, draws=REGRESSION, arrays=(X, VALUES), model=regression, **arguments):
    with pytest.raises(ValueError, match=message):
        host.predict(draws, *on(host, *arrays), model=model and model(host), **arguments)


@pytest.mark.parametrize("name", ["num_draws", "row_batch_size", "draw_batch_size"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "2"])
def test_numbers(host, name, value):
    bad(host, rf"{name} must be an integer of at least 1, got {value!r}", **{name: value})


def test_too_many_draws(host):
    bad(host, "num_draws=8, and there are 7 draws in a chain", num_draws=8)
    bad(host, "there are no draws", draws={name: value[:0] for name, value in REGRESSION.items()})


def test_what_is_no_source(host):
    for source in (None, [REGRESSION], xr):
        with pytest.raises(
            TypeError, match=rf"source must be a {host.name}\.infer\.MCMC after its run, a dict of draws"
        ):
            host.predict(source, *on(host, X), model=regression(host))


def test_a_model_is_needed(host):
    bad(host, r"model=None: a dict of draws brings no model", model=None)
    with pytest.raises(ValueError, match="model=None: a guide brings no model"):
        host.predict(lambda x: None, *on(host, X))


def test_draws_of_another_model(host):
    bad(host, r"latent sites \['noise'\] of the model have no draws; there are draws of \['w'\]", draws=LINEAR)
    bad(host, r"draws of site 'w' have the shape \(2, 7, 4\), and the model's site has \(3,\)",
        draws=REGRESSION | {"w": np.zeros((CHAINS, DRAWS, 4))})  # fmt: skip
    bad(host, r"draws of site 'w' have the shape \(3,\)", draws={"w": np.zeros(3), "noise": np.ones(())})
    few = REGRESSION | {"noise": np.ones((CHAINS, DRAWS - 1))}
    bad(host, r"draws differ in number from site to site, \{'w': \(2, 7\), 'noise': \(2, 6\)\}", draws=few)
    chains_and_none = REGRESSION | {"noise": np.ones(CHAINS * DRAWS)}
    bad(host, r"draws differ in number", draws=chains_and_none)


def test_no_rows(host):
    bad(host, r"array arguments have the lengths \[\]", arrays=())
    bad(host, r"array arguments have the lengths \[0, 0\]", arrays=(X[:0], VALUES[:0]))


@pytest.mark.parametrize("kind", [*PLATES, "none"])
@pytest.mark.parametrize("count", [1, 5, N - 1, N + 1, 2 * N])
def test_another_number_of_observations(host, kind, count):
    def without_plate(x, y):
        w = host.ppl.sample("w", normal(host, [3]))
        noise = host.ppl.sample("noise", host.dist.HalfNormal(host.array(1.0)))
        host.ppl.sample("y", host.dist.Normal(x @ w, noise), obs=y)

    model = without_plate if kind == "none" else regression(host, kind)
    for row_batch_size in (4, 1000):
        with pytest.raises(ValueError, match=r"as many rows of x as of y") as caught:
            host.predict(REGRESSION, *on(host, X, np.resize(VALUES, count)), model=model, row_batch_size=row_batch_size)
        assert str(count) in str(caught.value)


def test_arguments_that_are_equal_to_observations_by_chance(host):
    def model(x, scales, y):
        w = host.ppl.sample("w", normal(host, [3]))
        with host.ppl.plate("data", len(x)):
            host.ppl.sample("y", host.dist.Normal(x @ w, scales[0]), obs=y)

    for scales in (np.ones(1), np.array([1.0, 1.0, 3.0]), np.ones(2 * N)):
        y = np.where(np.arange(N) < 2 if len(scales) < N else True, 1.0, 2.0)
        found = host.predict(LINEAR, *on(host, X, scales, y), model=model, row_batch_size=4)
        np.testing.assert_array_equal(found["observed"], y)


def test_no_observed_site(host):
    def nothing(host):
        return lambda x, y: host.ppl.sample("w", normal(host, [3]))

    bad(host, r"no observed site with one value per row.* \['w'\]", model=nothing)

    def a_number(host):
        def model(x, y):
            w = host.ppl.sample("w", normal(host, [3]))
            host.ppl.sample("y", host.dist.Normal((x @ w).sum(), host.array(1.0)), obs=host.array(0.0))

        return model

    for site in (None, "y"):
        bad(host, r"no observed site with one value per row.* \['w', 'y'\]", draws=LINEAR, model=a_number, site=site)


def test_one_density_for_all_rows(host):
    def model(host):
        def model(x, y):
            w = host.ppl.sample("w", normal(host, [3]))
            host.ppl.sample("y", host.dist.Normal(x @ w, host.array(1.0)).to_event(1), obs=y)

        return model

    bad(host, r"site 'y' of shape \(11,\) has its rows among its 1 event dimensions", model=model)


def test_nothing_to_average(host):
    def model(host):
        def model(x, y):
            with host.ppl.plate("data", len(x)):
                host.ppl.sample("y", host.dist.Normal(x.sum(-1), host.array(1.0)), obs=y)

        return model

    bad(host, "no draw enters the model before site 'y'", model=model)


def test_local_latent_sites(host):
    def model(host):
        def model(x, y):
            w = host.ppl.sample("w", normal(host, [3]))
            with host.ppl.plate("data", len(x)):
                z = host.ppl.sample("z", host.dist.Normal(host.array(0.0), host.array(1.0)))
                host.ppl.sample("y", host.dist.Normal(x @ w + z, host.array(1.0)), obs=y)

        return model

    message = r"latent site 'z' has a value for each row of the data"
    bad(host, message, draws=LINEAR | {"z": np.zeros((CHAINS, DRAWS, 60))}, model=model)
    bad(host, r"observed sites \['z', 'y'\]", draws=LINEAR, model=model)
    bad(host, r"'y' has another distribution.* depends on \['z'\]", draws=LINEAR, model=model, site="y")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_predictions_that_are_not_finite(host, value):
    draws = REGRESSION | {"w": REGRESSION["w"].copy()}
    draws["w"][1, 2, 0] = value
    message = "the mean of site 'y' is not finite at row 0 under draw 2 of chain 1: leave out draws that diverged"
    bad(host, message, draws=draws, row_batch_size=4)
    flat = {name: v.reshape(-1, *v.shape[2:]) for name, v in draws.items()}
    bad(host, "not finite at row 0 under draw 9:", draws=flat, draw_batch_size=3)
    x, y = X.copy(), VALUES.copy()
    x[7, 1] = y[8] = value
    bad(host, "not finite at row 7 under draw 0 of chain 0", arrays=(x,), row_batch_size=3)
    bad(host, "the observation of site 'y' is not finite at row 8", arrays=(X, y), row_batch_size=4)


@pytest.mark.parametrize(("label", "text"), [(CLASSES, "4"), (-1, "-1")])
def test_labels_outside_the_classes(host, label, text):
    y = LABELS.copy()
    y[9] = label
    message = rf"observed site 'y' is {text} at row 9, and its classes are 0 to 3: give class numbers"
    bad(host, message, draws=WEIGHTS, arrays=(X, y), model=classifier, row_batch_size=4)


def test_labels_that_are_no_numbers_of_classes(host):
    y = LABELS % 2 * 1.0
    y[5] = 0.5

    def model(host):
        return in_plate(host, lambda f: host.dist.Bernoulli(logits=f))

    bad(
        host,
        r"observed site 'y' is 0\.5 at row 5, and its classes are 0 to 1",
        draws=LINEAR,
        arrays=(X, y),
        model=model,
    )


def test_means_of_the_wrong_shape(host):
    def model(host):
        def model(x, y):
            w = host.ppl.sample("w", normal(host, [3, 1]))
            host.ppl.sample("y", host.dist.Normal(x @ w, host.array(1.0)), obs=y)

        return model

    bad(
        host,
        r"observed site 'y' has values of shape \(11,\).*squeezing the network's output",
        draws={"w": LINEAR["w"][..., None]},
        model=model,
    )


def test_distributions_without_a_mean(host):
    def cauchy(host):
        return in_plate(host, lambda f: host.dist.Cauchy(f, host.array(1.0)))

    bad(host, r"the (mean|variance) of site 'y' is not finite .*has a mean and a variance", draws=LINEAR, model=cauchy)

    def transformed(host):
        transforms = numpyro_dist.transforms if host.name == "numpyro" else torch.distributions.transforms

        def response(f):
            return host.dist.TransformedDistribution(
                host.dist.Normal(f, host.array(1.0)), [transforms.SoftplusTransform()]
            )

        return in_plate(host, response)

    bad(host, r"site 'y' has the distribution TransformedDistribution, without a mean", draws=LINEAR, model=transformed)


def test_the_models_own_errors(host):
    def model(host):
        def model(x, y):
            raise ZeroDivisionError("of the model")

        return model

    with pytest.raises(ZeroDivisionError, match="of the model"):
        host.predict(LINEAR, *on(host, X, VALUES), model=model(host))


# ---- speed and memory


def test_draws_together():
    """Many for few rows and weights, one for a convolution."""
    together = [predictions._together(rows, [(8, 50), (50,)]) for rows in (1, 50, 1000)]
    assert together == [32768, 655, 32]
    assert predictions._together(1000, [(784, 100), (100,), (100, 10), (10,)]) == 25
    assert predictions._together(1, [(10_000, 1000)]) == 1
    assert predictions._together(1, [(3, 3, 8, 8)]) == 1


MEMORY = """
    import resource
    import numpy as np
    ROWS, DRAWS, WIDTH = 2000, 400, 500   # hidden units of all draws and rows: 1.6 GB

    def model(x, y):
        w = ppl.sample("w", dist.Normal(zero, one).expand([4, WIDTH]).to_event(2))
        v = ppl.sample("v", dist.Normal(zero, one).expand([WIDTH]).to_event(1))
        with ppl.plate("data", len(x)) as i:
            ppl.sample("y", dist.Normal(tanh(x[i] @ w) @ v, one), obs=y[i])

    rng = np.random.default_rng(0)
    draws = {"w": rng.normal(size=(DRAWS, 4, WIDTH)), "v": rng.normal(size=(DRAWS, WIDTH))}
    draws = {name: array(value.astype("float32")) for name, value in draws.items()}
    x, y = array(rng.normal(size=(ROWS, 4)).astype("float32")), array(np.zeros(ROWS, "float32"))
    few = {name: value[:2] for name, value in draws.items()}
    predict(few, x[:3], y[:3], model=model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = predict(draws, x, y, model=model)
    assert found["log_density"].shape == (ROWS,)
    predict(draws, x, y, model=model, row_batch_size=50, draw_batch_size=DRAWS)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
IMPORTS = {
    "numpyro": """
    import jax, jax.numpy as jnp, numpyro as ppl, numpyro.distributions as dist
    from bnn_ppl.numpyro import predict
    zero, one, tanh, array = 0.0, 1.0, jnp.tanh, jnp.asarray
    """,
    "pyro": """
    import torch, pyro as ppl, pyro.distributions as dist
    from bnn_ppl.pyro import predict
    zero, one, tanh, array = torch.tensor(0.0), torch.tensor(1.0), torch.tanh, torch.tensor
    """,
}


def test_memory_is_bounded(host, tmp_path):
    code = textwrap.dedent(IMPORTS[host.name]) + textwrap.dedent(MEMORY)
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    # Hidden units of all draws on 1000 rows take 800 MB, those of one batch, 32 draws on 1000 rows, 64 MB. In the
    # second call, all rows take 1.6 GB and one batch 40 MB.
    assert float(ran.stdout) < 300
