"""Scores against scikit-learn, torchmetrics, scoringrules and closed forms; exact inequalities; refusals."""

import re
import sys

import numpy as np
import pytest
import scoringrules
import torch
from sklearn import metrics
from sklearn.calibration import calibration_curve
from torchmetrics.functional.classification import multiclass_calibration_error

from bnn_ppl import diagnostics as d

rng = np.random.default_rng(0)
S, N, K = 7, 400, 5
DRAWS = rng.dirichlet(0.4 * np.ones(K), size=(S, N))
P = DRAWS[0]
# Half of the labels from the probabilities, half from anywhere: neither calibrated nor useless.
Y = np.where(rng.random(N) < 0.5, (P.cumsum(1) < rng.random((N, 1))).sum(1), rng.integers(K, size=N))
MEAN, SD, TARGETS = rng.normal(size=(S, N)), rng.uniform(0.3, 2.0, size=(S, N)), rng.normal(size=N)


# Classification


def test_proper_scores_against_scikit_learn():
    assert d.accuracy(P, Y) == metrics.accuracy_score(Y, P.argmax(1))
    assert d.nll(P, Y) == pytest.approx(metrics.log_loss(Y, P, labels=range(K)), rel=1e-12)
    brier = metrics.brier_score_loss(Y, P, labels=range(K), scale_by_half=False)
    assert d.brier(P, Y) == pytest.approx(brier, rel=1e-12)


def test_nll_is_in_nats_and_infinite_for_an_impossible_label():
    assert d.nll([[0.25, 0.75]], [0]) == pytest.approx(np.log(4))
    assert d.nll([[1.0, 0.0]], [1]) == np.inf
    logs = np.array([[0.0, -200.0]])
    assert d.nll(logs, [1], log=True) == 200
    assert d.nll(np.log(P), Y, log=True) == pytest.approx(d.nll(P, Y))


def test_brier_goes_up_to_2():
    assert d.brier([[1.0, 0.0]], [1]) == 2
    assert d.brier([[0.5, 0.5]], [1]) == 0.5


@pytest.mark.parametrize(("norm", "theirs"), [("l1", "l1"), ("max", "max")])
@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error_against_torchmetrics(norm, theirs, bins):
    expected = multiclass_calibration_error(
        torch.tensor(P), torch.tensor(Y), num_classes=K, n_bins=bins, norm=theirs
    ).item()
    assert d.calibration_error(P, Y, bins=bins, norm=norm) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("binning", "strategy"), [("equal_width", "uniform"), ("equal_mass", "quantile")])
def test_reliability_against_scikit_learn(binning, strategy):
    table = d.reliability(P, Y, bins=12, binning=binning)
    right = P.argmax(1) == Y
    accuracy, confidence = calibration_curve(right, P.max(1), n_bins=12, strategy=strategy)
    filled = table.isel(bin=np.flatnonzero(table["count"]))
    np.testing.assert_allclose(filled["accuracy"], accuracy)
    np.testing.assert_allclose(filled["confidence"], confidence)
    assert table["count"].sum() == N
    if binning == "equal_mass":
        assert set(table["count"].values.tolist()) <= {33, 34}


def test_a_bin_contains_its_upper_edge():
    p = np.array([[0.75, 0.25], [1.0, 0.0], [0.5, 0.5]])
    table = d.reliability(p, [0, 1, 0], bins=4)
    assert table["count"].values.tolist() == [0, 1, 1, 1]
    assert table["upper"].values.tolist() == [0.25, 0.5, 0.75, 1]
    np.testing.assert_equal(table["accuracy"].values, [np.nan, 1, 1, 0])
    assert d.calibration_error(p, [0, 1, 0], bins=4) == pytest.approx((0.5 + 0.25 + 1) / 3)
    assert d.calibration_error(p, [0, 1, 0], bins=4, norm="max") == 1
    above = np.array([[1.0 + 1e-6, 0.0]])  # as single precision rounds
    assert d.reliability(above, [0], bins=4)["count"].values.tolist() == [0, 0, 0, 1]


def test_equal_mass_bins_do_not_depend_on_the_order_of_equal_confidences():
    p = np.repeat([[0.9, 0.1], [1.0, 0.0]], 10, axis=0)
    y = np.random.default_rng(2).integers(2, size=20)
    order = np.random.default_rng(1).permutation(20)
    ours = {"bins": 8, "binning": "equal_mass"}
    assert d.calibration_error(p, y, **ours) == d.calibration_error(p[order], y[order], **ours)


# Uncertainty


def test_entropies():
    assert d.predictive_entropy(np.full((1, K), 1 / K))[0] == pytest.approx(np.log(K))
    assert d.predictive_entropy([[0.0, 1.0]])[0] == 0
    half = [[[1.0, 0.0]], [[0.0, 1.0]]]
    assert d.mutual_information(half)[0] == pytest.approx(np.log(2))
    apart = d.predictive_entropy(DRAWS.mean(0)) - np.mean([d.predictive_entropy(p) for p in DRAWS], axis=0)
    np.testing.assert_allclose(d.mutual_information(DRAWS), apart)
    mean_entropy = np.mean([d.predictive_entropy(p) for p in DRAWS], axis=0)
    np.testing.assert_allclose(d.mutual_information(DRAWS.mean(0), mean_entropy), apart)


def test_exact_inequalities():
    assert (d.mutual_information(DRAWS) > 0).all()
    same = d.mutual_information(np.repeat(DRAWS[:1], 3, axis=0))
    assert ((same >= 0) & (same < 1e-12)).all()
    assert d.nll(DRAWS.mean(0), Y) <= np.mean([d.nll(p, Y) for p in DRAWS])
    assert d.brier(DRAWS.mean(0), Y) <= np.mean([d.brier(p, Y) for p in DRAWS])
    assert d.calibration_error(P, Y) <= d.calibration_error(P, Y, norm="max")


def test_aurocs_against_scikit_learn():
    right = P.argmax(1) == Y
    assert d.selective_auroc(P, Y) == pytest.approx(metrics.roc_auc_score(right, P.max(1)))
    numbers = np.random.default_rng(1)
    scores = numbers.integers(6, size=N)  # with ties
    assert d.selective_auroc(P, Y, uncertainty=scores) == pytest.approx(metrics.roc_auc_score(~right, scores))
    inside, outside = numbers.integers(5, size=40), numbers.integers(2, 8, size=70)
    truth = np.repeat([0, 1], [40, 70])
    expected = metrics.roc_auc_score(truth, np.concatenate([inside, outside]))
    assert d.out_of_distribution_auroc(inside, outside) == pytest.approx(expected)
    assert expected > 0.7
    assert np.isnan(d.selective_auroc([[0.9, 0.1]], [0]))


def test_risk_coverage():
    uncertainty = np.random.default_rng(1).permutation(N)
    curve = d.risk_coverage(P, Y, uncertainty=uncertainty)
    wrong = (P.argmax(1) != Y)[np.argsort(uncertainty)]
    np.testing.assert_allclose(curve["risk"], [wrong[:n].mean() for n in range(1, N + 1)])
    assert curve["coverage"].values[[0, -1]].tolist() == [1 / N, 1]
    assert curve.attrs["area"] == pytest.approx(curve["risk"].values.mean())
    assert d.risk_coverage(P, Y)["risk"].values[-1] == pytest.approx(1 - d.accuracy(P, Y))
    # Of equal uncertainties each order counts the same, so that the risk is the overall one throughout.
    np.testing.assert_allclose(d.risk_coverage(P, Y, uncertainty=np.zeros(N))["risk"], wrong.mean())


def test_classification_scores():
    scores = d.classification_scores(P, Y, bins=10)
    assert scores["accuracy"] == d.accuracy(P, Y)
    assert scores["nll"] == d.nll(P, Y)
    assert scores["brier"] == d.brier(P, Y)
    assert scores["ece"] == d.calibration_error(P, Y, bins=10)
    assert scores["mce"] == d.calibration_error(P, Y, bins=10, norm="max")
    assert scores["selective_auroc"] == d.selective_auroc(P, Y)
    assert scores["selective_area"] == d.risk_coverage(P, Y).attrs["area"]
    assert scores["entropy"] == d.predictive_entropy(P).mean()


# Regression


def test_gaussian_crps_against_the_closed_form_and_scoringrules():
    for v in (0.5, 2.0):  # at its mean a Gaussian has the CRPS (sqrt(2) - 1) / sqrt(pi) v
        assert d.crps([0.0], [v], [0.0]) == pytest.approx(v * (np.sqrt(2) - 1) / np.sqrt(np.pi))
    expected = scoringrules.crps_normal(TARGETS, MEAN[0], SD[0]).mean()
    assert d.crps(MEAN[0], SD[0], TARGETS) == pytest.approx(expected)
    mixture = scoringrules.crps_mixnorm(TARGETS, MEAN.T, SD.T).mean()
    assert d.crps(MEAN, SD, TARGETS) == pytest.approx(mixture)


def test_crps_in_blocks_of_rows(monkeypatch):
    whole = d.crps(MEAN, SD, TARGETS)
    monkeypatch.setattr(sys.modules["bnn_ppl.diagnostics.regression"], "_PAIRS", 3 * S**2)
    assert d.crps(MEAN, SD, TARGETS) == pytest.approx(whole, rel=1e-12)


def test_sample_crps_is_unbiased_for_that_of_the_distribution():
    noise = np.random.default_rng(1)
    draws = MEAN[0, :, None, None] + SD[0, :, None, None] * noise.normal(size=(N, 5, 200))
    small = [d.sample_crps(draws[:, :, i].T, TARGETS) for i in range(200)]  # of 5 draws each
    error = np.std(small) / np.sqrt(200)
    assert abs(np.mean(small) - d.crps(MEAN[0], SD[0], TARGETS)) < 4 * error
    assert error < 0.002


def test_log_density_averages_densities_and_counts_the_scale():
    densities = np.exp(-0.5 * ((TARGETS - MEAN) / SD) ** 2) / (SD * np.sqrt(2 * np.pi))
    assert d.log_density(MEAN, SD, TARGETS) == pytest.approx(np.log(densities.mean(0)).mean())
    assert d.log_density(MEAN, SD, TARGETS) >= np.log(densities).mean()
    # The same prediction in other units: a density in them is divided by the scale.
    c = 7.0
    standardized, whole = (MEAN, SD, TARGETS), (c * MEAN, c * SD, c * TARGETS)
    for score in (d.log_density, d.crps):
        assert score(*standardized, target_scale=c) == pytest.approx(score(*whole))
    assert d.rmse(MEAN, TARGETS, target_scale=c) == pytest.approx(d.rmse(c * MEAN, c * TARGETS))
    assert d.sample_crps(MEAN, TARGETS, target_scale=c) == pytest.approx(d.sample_crps(c * MEAN, c * TARGETS))
    expected = metrics.root_mean_squared_error(TARGETS, MEAN.mean(0))
    assert d.rmse(MEAN, TARGETS) == pytest.approx(expected)


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_coverage(level):
    z = {0.5: 0.6744897501960817, 0.9: 1.6448536269514722}[level]
    y = np.linspace(-3, 3, 1001)
    expected = (np.abs(y) <= z).mean()
    assert d.coverage(np.zeros(1001), 1.0, y, level=level) == expected
    # Equal components are one Gaussian; two narrow ones have their interval from one to the other.
    assert d.coverage(np.zeros((3, 1001)), 1.0, y, level=level) == expected
    two = d.coverage(np.array([[-1.0], [1.0]]) * np.ones(1001), 1e-3, y, level=level)
    assert two == pytest.approx((np.abs(y) <= 1).mean(), abs=2e-3)


def test_sample_coverage_is_that_of_calibrated_draws():
    n, size = 20_000, 39  # (size + 1) times the tail probability is an integer: exact
    x = np.random.default_rng(1).normal(size=(size + 1, n))
    for level in (0.5, 0.9):
        error = np.sqrt(level * (1 - level) / n)
        assert abs(d.sample_coverage(x[1:], x[0], level=level) - level) < 4 * error


def test_sample_coverage_of_few_draws():
    """Positions (rank + 1/2) / 5 of a target among 4 draws: 0.1, 0.3, ..., 0.9, and 0.4 at the second draw."""
    draws = np.arange(4.0)[:, None] * np.ones(6)
    targets = [-1.0, 0.5, 1.5, 2.5, 9.0, 1.0]
    for level, inside in ((0.9, 6), (0.7, 4), (0.3, 2), (0.1, 1)):
        assert d.sample_coverage(draws, targets, level=level) == inside / 6


def test_regression_scores():
    scores = d.regression_scores(MEAN, SD, TARGETS, levels=(0.5, 0.95), target_scale=2.0)
    assert scores == {
        "rmse": d.rmse(MEAN, TARGETS, target_scale=2.0),
        "log_density": d.log_density(MEAN, SD, TARGETS, target_scale=2.0),
        "crps": d.crps(MEAN, SD, TARGETS, target_scale=2.0),
        "coverage_50": d.coverage(MEAN, SD, TARGETS, level=0.5),
        "coverage_95": d.coverage(MEAN, SD, TARGETS, level=0.95),
    }
    draws = d.regression_scores(MEAN, SD, TARGETS, draws=MEAN, levels=[0.9], target_scale=2.0)
    assert draws["crps"] == d.sample_crps(MEAN, TARGETS, target_scale=2.0)
    assert draws["coverage_90"] == d.sample_coverage(MEAN, TARGETS, level=0.9)


# Bad input

NOT_FINITE = np.array([[0.5, 0.5], [np.nan, 0.5]])
GOOD = np.array([[0.5, 0.5], [0.9, 0.1]])


@pytest.mark.parametrize("score", [d.accuracy, d.nll, d.brier, d.calibration_error, d.reliability, d.selective_auroc])
@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (NOT_FINITE, [0, 1], "probabilities has 1 NaN or infinite values, the first at index (1, 0)"),
        (
            [[0.5, 0.4], [0.9, 0.1]],
            [0, 1],
            "probabilities must sum to 1 over the classes, got the sum 0.9 at index (0,)",
        ),
        ([[0.5, 0.5], [1.5, -0.5]], [0, 1], "probabilities must be at least 0, got -0.5 at index (1,)"),
        ([0.5, 0.5], [0, 1], "probabilities must have the shape (rows, classes) and be not empty, got (2,)"),
        (np.ones((0, 2)), [], "got (0, 2)"),
        (GOOD, [0, 2], "labels must be from 0 to 1, since probabilities has 2 classes; got 2 at index (1,)"),
        (GOOD, [-1, 1], "got -1 at index (0,)"),
        (GOOD, [0, 1, 1], "labels has 3 rows and probabilities has 2"),
        (GOOD, [0.0, 1.0], "labels must be integers, got the dtype float64"),
        (
            GOOD,
            [[1, 0], [0, 1]],
            "labels must have the shape (rows,), got (2, 2): of one-hot rows take labels.argmax(-1)",
        ),
    ],
)
def test_bad_probabilities_and_labels(score, probabilities, labels, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        score(probabilities, labels)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: d.calibration_error(GOOD, [0, 1], bins=0), "bins must be an integer of at least 1, got 0"),
        (lambda: d.reliability(GOOD, [0, 1], bins=2.5), "bins must be an integer of at least 1, got 2.5"),
        (lambda: d.reliability(GOOD, [0, 1], binning="wide"), "binning must be one of 'equal_width', 'equal_mass'"),
        (lambda: d.calibration_error(GOOD, [0, 1], norm="l2"), "norm must be one of 'l1', 'max', got 'l2'"),
        (lambda: d.nll([[800.0, 2.0]], [0], log=True), "probabilities has 1 NaN or infinite values"),
        (lambda: d.mutual_information(GOOD), "probabilities must have the shape (draws, rows, classes)"),
        (lambda: d.mutual_information(GOOD, [0.1]), "mean_entropy must have the shape (2,), got (1,)"),
        (lambda: d.risk_coverage(GOOD, [0, 1], uncertainty=[1.0]), "uncertainty must have the shape (2,)"),
        (lambda: d.selective_auroc(GOOD, [0, 1], uncertainty=[1.0, np.nan]), "uncertainty has 1 NaN"),
        (lambda: d.out_of_distribution_auroc([], [1.0]), "inside must have the shape (rows,) and be not empty"),
        (lambda: d.out_of_distribution_auroc([1.0], [np.inf]), "outside has 1 NaN or infinite values"),
        (lambda: d.rmse([1.0, np.nan], [1.0, 2.0]), "mean has 1 NaN or infinite values, the first at index (1,)"),
        (lambda: d.rmse([1.0], [1.0, 2.0]), "mean must have the shape (2,) or (draws, 2) as targets has, got (1,)"),
        (lambda: d.rmse([1.0], [[1.0]]), "targets must have the shape (rows,) and be not empty, got (1, 1)"),
        (lambda: d.rmse([1.0], [1.0], target_scale=0), "target_scale must be between 0 and inf, got 0"),
        (lambda: d.crps([1.0], [0.0], [1.0]), "sd must be above 0, got 0"),
        (lambda: d.log_density([1.0, 2.0], [1.0] * 3, [1.0, 2.0]), "sd must have the shape of mean (1, 2)"),
        (lambda: d.coverage([1.0], [1.0], [1.0], level=1.0), "level must be between 0 and 1, got 1.0"),
        (lambda: d.sample_crps([1.0], [1.0]), "draws must have the shape (draws, 1) with at least 2 draws, got (1,)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_sample_crps_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scoringrules", None)
    with pytest.raises(ImportError, match=re.escape("sample_crps needs scoringrules: pip install 'bnn_ppl[scores]'")):
        d.sample_crps(MEAN, TARGETS)


def test_arrays_of_other_libraries():
    assert d.nll(torch.tensor(P, dtype=torch.float32), torch.tensor(Y)) == pytest.approx(d.nll(P, Y), rel=1e-5)
