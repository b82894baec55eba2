"""Diagnostics of functions: against ArviZ, by hand, and unchanged when hidden units are permuted."""

import re

import arviz as az
import numpy as np
import pytest
import xarray as xr

from bnn_ppl import diagnostics as d

C, S, ROWS, HIDDEN, K = 2, 60, 5, 4, 3
X = np.random.default_rng(0).normal(size=(ROWS, 2))


def draws():
    """Weights of an MLP 2-4-3 in correlated chains, by name, shapes (chain, draw, ...)."""
    rng = np.random.default_rng(1)
    shapes = {"w0": (2, HIDDEN), "b0": (HIDDEN,), "w1": (HIDDEN, K)}
    weights = {}
    for name, shape in shapes.items():
        centre = rng.normal(size=shape)
        weights[name] = centre + 0.3 * rng.normal(size=(C, S, *shape)).cumsum(axis=1) / np.sqrt(S)
    return weights


def permuted(weights):
    """The same functions, with the hidden units of each draw in another order."""
    order = np.argsort(np.random.default_rng(2).random((C, S, HIDDEN)), axis=-1)
    return {
        "w0": np.take_along_axis(weights["w0"], order[:, :, None], axis=3),
        "b0": np.take_along_axis(weights["b0"], order, axis=2),
        "w1": np.take_along_axis(weights["w1"], order[..., None], axis=2),
    }


def probabilities(weights):
    """Class probabilities, shape (chain, draw, row, class); the sum over hidden units does not see their order."""
    hidden = np.tanh(X @ weights["w0"] + weights["b0"][:, :, None])
    # Sorted, for floating-point sums depend on the order.
    terms = np.sort(hidden[..., None] * weights["w1"][:, :, None], axis=3)
    p = np.exp(terms.sum(axis=3))
    return p / p.sum(axis=-1, keepdims=True)


def test_permuting_hidden_units_changes_the_weights_r_hat_only():
    first = draws()
    second = permuted(first)
    p, q = probabilities(first), probabilities(second)
    xr.testing.assert_identical(d.function_diagnostics(p), d.function_diagnostics(q))
    xr.testing.assert_identical(d.summarize(d.function_diagnostics(p)), d.summarize(d.function_diagnostics(q)))
    mean_p, mean_q = p.mean(axis=(0, 1)), q.mean(axis=(0, 1))
    assert d.agreement(mean_p, mean_q) == 1
    assert d.total_variation(mean_p, mean_q) == 0
    labels = np.arange(ROWS) % K
    xr.testing.assert_identical(d.disagreement(p.mean(1), labels), d.disagreement(q.mean(1), labels))
    assert (d.disagreement(np.stack([mean_p, mean_q]))["disagreement"] == 0).all()
    assert d.mutual_information(p[0]).tolist() == d.mutual_information(q[0]).tolist()
    differences = d.predictive_differences(mean_p[:, 0], mean_p[:, 1], mean_q[:, 0], mean_q[:, 1])
    assert (differences["mean_shift"] == 0).all()
    assert (differences["sd_ratio"] == 1).all()
    # Weights: the walks of the chains are apart, which permutation hides.
    before, after = (d.function_diagnostics(w["w1"].reshape(C, S, -1))["r_hat"] for w in (first, second))
    assert before.max() > 1.3
    assert after.max() < before.max() - 0.2


def test_function_diagnostics_are_those_of_arviz():
    p = probabilities(draws())
    found = d.function_diagnostics(p)
    assert found["r_hat"].dims == ("row", "class")
    dataset = xr.Dataset({"f": (("chain", "draw", "row", "class"), p)})
    np.testing.assert_array_equal(found["r_hat"], az.rhat(dataset, method="rank")["f"])
    np.testing.assert_array_equal(found["ess_bulk"], az.ess(dataset, method="bulk")["f"])
    np.testing.assert_array_equal(found["ess_tail"], az.ess(dataset, method="tail", prob=(0.05, 0.95))["f"])


def test_function_diagnostics_tell_converged_chains_from_others():
    independent = np.random.default_rng(3).normal(size=(4, 500, 20))
    good = d.summarize(d.function_diagnostics(independent))
    assert good["r_hat"].sel(quantile=1.0) < 1.02
    assert good["ess_bulk"].sel(quantile=0.0) > 1200
    apart = d.summarize(d.function_diagnostics(independent + np.arange(4)[:, None, None]))
    assert apart["r_hat"].sel(quantile=0.0) > 1.4


def test_one_chain_is_cut_into_two():
    trend = np.linspace(0, 3, 200)[:, None] + np.random.default_rng(4).normal(size=(1, 200, 3))
    found = d.function_diagnostics(trend)
    halves = d.function_diagnostics(trend.reshape(2, 100, 3))
    np.testing.assert_array_equal(found["r_hat"], halves["r_hat"])
    assert (found["r_hat"] > 1.3).all()
    # The coordinates of draws, which the halves do not share, do not matter.
    named = xr.DataArray(trend, dims=("chain", "draw", "point"), coords={"draw": np.arange(200)})
    np.testing.assert_array_equal(d.function_diagnostics(named)["r_hat"], halves["r_hat"])


def test_constant_functions_are_counted_and_left_out():
    values = np.random.default_rng(5).normal(size=(2, 100, 4)).astype(np.float32)
    values[:, :, 1] = 1
    found = d.function_diagnostics(values)
    assert np.isnan(found.to_array().sel(row=1)).all()
    summary = d.summarize(found, quantiles=[0.0, 1.0])
    assert summary.attrs == {"functions": 4, "constant": 1}
    known = found.isel(row=[0, 2, 3])
    for name in ("r_hat", "ess_bulk", "ess_tail"):
        assert summary[name].values.tolist() == [known[name].min(), known[name].max()]
    constant = d.summarize(d.function_diagnostics(np.ones((2, 10, 1))))
    assert np.isnan(constant["r_hat"]).all()


def test_dimensions_of_a_data_array_are_kept_in_any_order():
    p = probabilities(draws())
    names = ("chain", "draw", "image", "digit")
    array = xr.DataArray(p, dims=names, coords={"digit": list("abc")}).transpose("digit", "draw", "image", "chain")
    found = d.function_diagnostics(array)
    assert found["r_hat"].dims == ("digit", "image")
    np.testing.assert_array_equal(found["r_hat"].T, d.function_diagnostics(p)["r_hat"])
    assert found["digit"].values.tolist() == ["a", "b", "c"]


def test_function_dataset_goes_to_arviz():
    summary = az.summary(d.function_dataset(probabilities(draws()), name="p"))
    assert len(summary) == ROWS * K
    assert summary.index[0].startswith("p[")


def test_agreement_and_total_variation():
    p = np.array([[0.7, 0.3, 0.0], [0.2, 0.5, 0.3]])
    q = np.array([[0.4, 0.6, 0.0], [0.1, 0.6, 0.3]])
    assert d.agreement(p, q) == 0.5
    assert d.total_variation(p, q) == pytest.approx((0.3 + 0.1) / 2)
    assert d.total_variation([[1.0, 0.0]], [[0.0, 1.0]]) == 1


def test_disagreement():
    members = np.eye(3)[[[0, 1, 2, 0], [0, 1, 1, 1], [0, 1, 2, 2]]]
    labels = [0, 1, 2, 2]
    found = d.disagreement(members, labels)
    differ = np.array([[0, 0.5, 0.25], [0.5, 0, 0.5], [0.25, 0.5, 0]])
    np.testing.assert_array_equal(found["disagreement"], differ)
    error = np.array([0.25, 0.5, 0])
    pairs = (error[:, None] + error) / 2
    expected = np.where(pairs > 0, differ / np.where(pairs > 0, pairs, 1), np.nan)
    np.testing.assert_allclose(found["normalized"], expected)
    assert np.isnan(found["normalized"][2, 2])
    assert set(d.disagreement(members).data_vars) == {"disagreement"}


def test_cosine_similarity():
    found = d.cosine_similarity([[1.0, 0.0], [3.0, 3.0], [0.0, 0.0]])
    np.testing.assert_allclose(found[:2, :2], [[1, np.sqrt(0.5)], [np.sqrt(0.5), 1]])
    assert np.isnan(found[2]).all()
    moved = d.cosine_similarity([[2.0, 5.0], [1.0, 6.0]], origin=[1.0, 5.0])
    np.testing.assert_allclose(moved, np.eye(2))


def test_predictive_differences():
    found = d.predictive_differences([1.0, 2.0], [0.5, 3.0], [0.0, 3.0], [2.0, 2.0])
    assert found["mean_shift"].values.tolist() == [0.5, -0.5]
    assert found["sd_ratio"].values.tolist() == [0.25, 1.5]


GOOD = np.array([[0.5, 0.5], [0.9, 0.1]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: d.function_diagnostics(np.ones((5, 3))), "values must have the shape (chain, draw, row[, class])"),
        (lambda: d.function_diagnostics(np.full((2, 9, 1), np.nan)), "values has 18 NaN or infinite values"),
        (lambda: d.function_diagnostics(np.ones((2, 9, 0))), "values must be not empty, got the shape (2, 9, 0)"),
        (lambda: d.function_diagnostics(np.ones((2, 3, 1))), "values has 2 chain(s) of 3 draws, which are too few"),
        (lambda: d.function_diagnostics(np.ones((1, 7, 1))), "or 8 of one"),
        (
            lambda: d.function_diagnostics(xr.DataArray(np.ones((2, 9)), dims=("draw", "row"))),
            "values must have the dimensions 'chain' and 'draw', got ('draw', 'row')",
        ),
        (lambda: d.summarize(xr.Dataset(), [1.5]), "quantiles must be from 0 to 1, got [1.5]"),
        (lambda: d.agreement(GOOD, GOOD[:1]), "p and q must have the same rows and classes, got (2, 2) and (1, 2)"),
        (lambda: d.total_variation(GOOD, 2 * GOOD), "q must sum to 1 over the classes, got the sum 2 at index (0,)"),
        (lambda: d.disagreement(GOOD), "probabilities must have the shape (members, rows, classes)"),
        (lambda: d.disagreement([GOOD], [0, 3]), "labels must be from 0 to 1"),
        (lambda: d.cosine_similarity([1.0]), "weights must have the shape (members, weights)"),
        (lambda: d.cosine_similarity([[1.0, 2.0]], [1.0]), "origin must have the shape (2,)"),
        (lambda: d.cosine_similarity([[np.inf]]), "weights has 1 NaN or infinite values"),
        (lambda: d.predictive_differences([1.0], [1.0], [1.0], [0.0]), "reference_sd must be above 0, got 0"),
        (lambda: d.predictive_differences([1.0], [1.0], [1.0, 2.0], [1.0]), "must have the same shape (rows,)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
