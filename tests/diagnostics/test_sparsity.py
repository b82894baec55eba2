"""log alpha of draws, how sparse a network is, and its pruned weights."""

import re

import numpy as np
import pytest
import xarray as xr

from bnn_ppl.diagnostics import log_alpha, prune, signal_to_noise, sparsity

INF = np.inf
LOG_ALPHA = {"w0": np.array([[-5.0, 3.0, 3.5], [INF, -INF, 2.9]]), "b": np.array([4.0, INF]), "s": np.array(-1.0)}
VALUES = {
    "w0": np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32),
    "b": np.array([7.0, 8.0]),
    "s": np.array(9.0),
    "noise": np.array(0.3),
}


def test_log_alpha_of_normal_draws():
    """About log(sigma^2 / mu^2), with the standard error sqrt(2 / S + 4 alpha / S)."""
    rng = np.random.default_rng(0)
    count, shape = 4000, (20, 50)
    mean, sd = rng.choice([-1, 1], shape) * rng.uniform(0.5, 3, shape), rng.uniform(0.05, 0.5, shape)
    found = log_alpha({"w": mean + sd * rng.normal(size=(count, *shape))})["w"]
    alpha = (sd / mean) ** 2
    z = (found - np.log(alpha)) / np.sqrt((2 + 4 * alpha) / count)
    assert found.shape == shape
    assert found.dtype == np.float64
    assert abs(z.mean()) * z.size**0.5 < 4
    assert abs(z.std() - 1) * (2 * z.size) ** 0.5 < 4


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_log_alpha_exactly(dtype):
    """Draws m - s and m + s have the mean m and, unbiased, the variance 2 s^2; squares of 300 overflow in float16."""
    mean, distance = np.array([1.0, -2.0, 300.0, 0.0, 0.1]), np.array([0.5, 1.0, 100.0, 3.0, 0.0])
    draws = np.array([mean - distance, mean + distance]).astype(dtype)
    found = log_alpha({"w": draws, "scalar": draws[:, 1]})
    expected = [np.log(0.5), np.log(0.5), np.log(2 / 9), INF, -INF]
    np.testing.assert_allclose(found["w"], expected, rtol=1e-12)
    assert found["scalar"] == pytest.approx(np.log(0.5))
    assert isinstance(found["scalar"], np.ndarray)


def test_equal_draws_have_no_noise_from_rounding():
    assert (log_alpha({"w": np.full((7, 3), 0.1)})["w"] == -INF).all()


def test_signal_to_noise():
    mean, sd = np.array([[2.0, -0.3, 0.0], [1.0, 5.0, 1e-3]]), np.array([[0.5, 3.0, 1.0], [0.0, 5.0, 1e3]])
    with np.errstate(divide="ignore"):
        found = signal_to_noise({"w": 2 * np.log(sd / np.abs(mean))})
        np.testing.assert_allclose(found["w"], np.abs(mean) / sd, rtol=1e-12)
    assert isinstance(signal_to_noise({"s": -1.0})["s"], np.ndarray)


def test_sparsity_counts():
    table = sparsity(LOG_ALPHA)
    assert table.index.tolist() == ["all", "w0", "b", "s"]
    assert table.index.name == "part"
    assert table.columns.tolist() == ["weights", "kept", "pruned", "compression"]
    assert table["weights"].tolist() == [9, 6, 2, 1]
    assert table["kept"].tolist() == [5, 4, 0, 1]  # 3 itself is kept
    assert table["pruned"].tolist() == pytest.approx([4 / 9, 1 / 3, 1, 0])
    assert table["compression"].tolist() == pytest.approx([9 / 5, 3 / 2, INF, 1])
    assert re.search(r"b +2 +0 +1\.0+ +inf", str(table))


def test_sparsity_threshold():
    assert sparsity(LOG_ALPHA, threshold=-5)["kept"].tolist() == [2, 2, 0, 0]
    assert sparsity(LOG_ALPHA, threshold=np.float32(100))["kept"].tolist() == [7, 5, 1, 1]


def test_prune():
    found = prune(VALUES, LOG_ALPHA)
    assert list(found) == list(VALUES)
    np.testing.assert_array_equal(found["w0"], [[[1, 2, 0], [0, 5, 6]]])
    np.testing.assert_array_equal(found["b"], [[0, 0]])
    np.testing.assert_array_equal(found["s"], [9])
    np.testing.assert_array_equal(found["noise"], [0.3])
    assert [found[site].dtype for site in VALUES] == [values.dtype for values in VALUES.values()]
    for site, values in found.items():
        assert values.shape == (1, *VALUES[site].shape)
        assert not np.shares_memory(values, VALUES[site])
    kept = sparsity(LOG_ALPHA, threshold=2.95)["kept"]
    pruned = prune(VALUES, LOG_ALPHA, threshold=2.95)
    assert {site: np.count_nonzero(pruned[site]) for site in LOG_ALPHA} == kept.drop("all").to_dict()
    assert prune(VALUES, {"s": 3.1})["s"] == 0


NAN = {"w0": np.array([[0.0, 1.0, np.nan], [np.nan, 2.0, 3.0]])}


NESTED = {"b": np.ones(2), "net$params": {"Dense_0": {"kernel": np.ones((2, 3))}}}  # as of flax


@pytest.mark.parametrize("call", [signal_to_noise, sparsity, lambda given: prune(VALUES, given)])
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (NAN, ValueError, "log_alpha of site 'w0' has 2 NaN values, the first at index (0, 2): where mean and"),
        ({}, ValueError, "log_alpha must have at least one site, got {}: give guide.log_alpha(params)"),
        (np.ones(3), TypeError, "log_alpha must be a dict of arrays by site, got ndarray: give guide.log_alpha("),
        ({"w0": np.ones((0, 3))}, ValueError, "log_alpha of site 'w0' is empty, shape (0, 3): leave the site out"),
        (NESTED, TypeError, "and log_alpha['net$params'] is a dict: give guide.log_alpha(params), on Pyro guide.log_a"),
        ({"w0": [[1.0], [1.0, 2.0]]}, TypeError, "arrays of numbers by site, and log_alpha['w0'] is a list: give"),
        ({"w0": "weights"}, TypeError, "log_alpha['w0'] is a str: give guide.log_alpha(params)"),
        ({"w0": None}, TypeError, "log_alpha['w0'] is a NoneType: give guide.log_alpha(params)"),
    ],
)
def test_bad_log_alpha(call, given, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(given)


@pytest.mark.parametrize("threshold", [np.nan, INF, "3", True, None])
def test_bad_threshold(threshold):
    message = re.escape(f"threshold must be a finite number, got {threshold!r}: the published one is 3")
    with pytest.raises(ValueError, match=message):
        sparsity(LOG_ALPHA, threshold=threshold)
    with pytest.raises(ValueError, match=message):
        prune(VALUES, LOG_ALPHA, threshold=threshold)


@pytest.mark.parametrize(
    ("values", "given", "error", "message"),
    [
        (VALUES, {"w0": LOG_ALPHA["w0"], "w7": 0.0}, ValueError, "log_alpha has the sites ['w7'], and values has"),
        ({"w0_auto_loc": 1.0}, {"w0": 0.0}, ValueError, "give the weights of each site, as guide.median(params)"),
        (VALUES, {"b": np.zeros(3)}, ValueError, "log_alpha of site 'b' has the shape (3,), and values (2,): give"),
        (VALUES, {"w0": LOG_ALPHA["w0"].T}, ValueError, "log_alpha of site 'w0' has the shape (3, 2), and values (2,"),
        ({"b": np.ones((5, 2))}, {"b": np.zeros(2)}, ValueError, "and values (5, 2): give the weights themselves"),
        ({}, LOG_ALPHA, ValueError, "values must have at least one site, got {}: give guide.median(params)"),
        (NESTED, LOG_ALPHA, TypeError, "values['net$params'] is a dict: give guide.median(params), on Pyro guide.med"),
        ([1.0], LOG_ALPHA, TypeError, "values must be a dict of arrays by site, got list: give guide.median(params)"),
        ({"b": []}, LOG_ALPHA, ValueError, "values of site 'b' is empty, shape (0,): leave the site out"),
    ],
)
def test_values_that_do_not_fit(values, given, error, message):
    with pytest.raises(error, match=re.escape(message)):
        prune(values, given)


POSTERIOR = xr.Dataset({"w": (("chain", "draw", "w_dim"), np.ones((2, 5, 3)))})
LABELLED = "of shape (draws, ...), got {}, whose arrays have an axis for the chains: give mcmc.get_samples()"


@pytest.mark.parametrize(
    ("draws", "error", "message"),
    [
        ({"w": np.ones((1, 3))}, ValueError, "draws of site 'w' must be at least 2, in the shape (draws, ...), got (1"),
        ({"w": 1.0}, ValueError, "draws of site 'w' must be at least 2, in the shape (draws, ...), got (): take more"),
        ({"w": [[1, 2], [1, np.nan]]}, ValueError, "draws of site 'w' has 1 NaN or infinite values, the first at ind"),
        ({"w": [[1, 0], [2, 0]]}, ValueError, "draws of site 'w' are all 0 at index (1,), where alpha is 0 / 0: leave"),
        (
            NESTED,
            TypeError,
            "draws must be a dict of arrays of numbers by site, and draws['net$params'] is a dict: give",
        ),
        ({}, ValueError, "draws must have at least one site, got {}: give mcmc.get_samples()"),
        ({"w": np.ones((0, 3))}, ValueError, "draws of site 'w' is empty, shape (0, 3)"),
        (np.ones((5, 3)), TypeError, "draws must be a dict of arrays by site, got ndarray: give mcmc.get_samples()"),
        (POSTERIOR, TypeError, LABELLED.format("Dataset")),
        ({"w": POSTERIOR["w"]}, TypeError, LABELLED.format("dict")),
        (xr.DataTree.from_dict({"posterior": POSTERIOR}), TypeError, LABELLED.format("DataTree")),
    ],
)
def test_bad_draws(draws, error, message):
    with pytest.raises(error, match=re.escape(message)):
        log_alpha(draws)
