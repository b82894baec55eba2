"""The certificate of a run on Gaussians, whose bias is known, and runs that do not belong together."""

import numpy as np
import pytest
import xarray as xr

from bnn_ppl import updates
from bnn_ppl.diagnostics import bias_certificate, site_temperatures
from tests import laws

CURVATURE = {"a": 1.0, "b": 3.0}
UNITS, DRAWS, STEP = 400, 1000, 0.2
V = {"a": 2.0, "b": 1.0}


def run(step_size, *, seed, offset=0.0, noise=None, units=UNITS, **attributes):
    """What to_arviz makes of SGLD on N(offset, 1 / k), with the noise of its gradients."""
    rng = np.random.default_rng(seed)
    noise = dict.fromkeys(CURVATURE, 0.0) if noise is None else noise
    scale = np.sqrt(2 * step_size)
    positions, gradients = {}, {}
    for site, k in CURVATURE.items():
        law = laws.stationary(laws.sgld(step_size, k), V=noise[site])[0, 0]
        z = np.sqrt(law) * rng.normal(size=(2, units))
        kept = []
        for _ in range(DRAWS):
            for _ in range(round(0.4 / step_size)):
                gradient = k * z + np.sqrt(noise[site]) * rng.normal(size=z.shape)
                z = updates.sgld(z, gradient, rng.normal(size=z.shape), step_size=step_size, noise_scale=scale)
            kept.append(z)
        positions[site] = np.stack(kept, 1) + offset
        gradients[site] = k * np.stack(kept, 1)
    statistics = site_temperatures({n: z - offset for n, z in positions.items()}, gradients)
    like = xr.ones_like(statistics["configurational_temperature"])
    statistics["temperature"], statistics["step_size"] = like, step_size * like
    statistics["gradient_noise"] = ("chain", "site"), np.array([list(V.values())] * 2)
    statistics["site_size"] = ("site",), [units] * 2
    statistics.attrs = {"kernel": "SGLD", "integrator": "euler", "steps_per_draw": round(0.4 / step_size)} | attributes
    posterior = xr.Dataset({n: (("chain", "draw", f"{n}_dim"), z) for n, z in positions.items()})
    return xr.DataTree.from_dict({"posterior": posterior, "sample_stats": statistics})


@pytest.fixture(scope="module")
def full():
    return run(STEP, seed=0)


@pytest.fixture(scope="module")
def half():
    return run(STEP / 2, seed=1, offset=0.3)


def variance(step_size, site):
    return laws.stationary(laws.sgld(step_size, CURVATURE[site]))[0, 0]


def test_halving_finds_the_bias(full, half):
    table = bias_certificate(full, half)
    assert list(table.index) == ["all", "a", "b"]
    for site, k in CURVATURE.items():
        row = table.loc[site]
        estimated = np.log(variance(STEP, site) / variance(STEP / 2, site))  # twice a half
        assert abs(row["sd_bias"] - estimated) < 4 * row["sd_error"]
        assert row["sd_error"] < 0.02
        true = 0.5 * np.log(variance(STEP, site) * k)  # at h = 0
        assert row["sd_bias"] == pytest.approx(true, rel=0.3, abs=0.01)
        shift = 2 * 0.3 / variance(STEP / 2, site) ** 0.5
        assert row["mean_bias"] ** 2 - row["mean_error"] ** 2 == pytest.approx(shift**2, rel=0.1)
    assert np.isnan(table.loc["all", "sd_bias"])


def test_errors_are_those_of_many_runs():
    """The spread of sd_bias over runs, and the noise of mean_bias where there is no shift."""
    tables = [bias_certificate(run(STEP, seed=i, units=20), run(STEP / 2, seed=100 + i, units=20)) for i in range(30)]
    biases = np.array([[table.loc[s, "sd_bias"] for s in CURVATURE] for table in tables])
    errors = np.array([[table.loc[s, "sd_error"] for s in CURVATURE] for table in tables])
    assert np.abs(np.log(biases.std(0, ddof=1) / errors.mean(0))).max() < 4 / (2 * 29) ** 0.5
    shifts = np.array([[table.loc[s, "mean_bias"] ** 2 for s in CURVATURE] for table in tables])
    noises = np.array([[table.loc[s, "mean_error"] ** 2 for s in CURVATURE] for table in tables])
    assert np.log(shifts.mean(0) / noises.mean(0)) == pytest.approx(0.0, abs=4 * (2 / (30 * 20)) ** 0.5)


def test_order(full, half):
    first, second = (bias_certificate(full, half, order=order) for order in (1, 2))
    for column in ("sd_bias", "sd_error", "mean_bias", "mean_error"):
        assert second[column].dropna().values == pytest.approx(first[column].dropna().values * 2 / 3)


def test_noise_ratio_and_temperatures(full):
    table = bias_certificate(full)
    for site, v in V.items():
        assert table.loc[site, "noise_ratio"] == pytest.approx(STEP * v / 2)
        k = CURVATURE[site]
        assert abs(table.loc[site, "configurational"] - k * variance(STEP, site)) < (
            4 * table.loc[site, "configurational_error"]
        )
    assert table.loc["all", "noise_ratio"] == pytest.approx(STEP * 1.5 / 2)
    assert np.isnan(table.loc["a", "kinetic"])
    underdamped = run(STEP, seed=0, friction=4.0, mass=1.0)
    assert bias_certificate(underdamped).loc["b", "noise_ratio"] == pytest.approx(STEP * 1.0 / 8)
    preconditioned = run(STEP, seed=0, damping=4.0)
    assert np.isnan(bias_certificate(preconditioned).loc["b", "noise_ratio"])


def test_functions_of_networks(full, half):
    values = [np.asarray(tree["posterior"]["b"].values)[..., :5] for tree in (full, half)]
    table = bias_certificate(full, half, functions=values)
    assert list(table.index) == ["all", "a", "b", "functions"]
    assert table.loc["functions", "sd_bias"] == pytest.approx(table.loc["b", "sd_bias"], abs=0.1)
    assert np.isnan(table.loc["functions", "configurational"])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (np.zeros(5), r"ndarray of shape \(5,\)"),
        (np.zeros((7, 3)), r"ndarray of shape \(7, 3\)"),
        (np.zeros((1, 2, 3)), r"ndarray of shape \(1, 2, 3\)"),
        (xr.Dataset({"functions": (("chain", "draw", "row"), np.zeros((2, 5, 3)))}), "Dataset"),
        ("functions", "str"),
    ],
)
def test_functions_that_are_not_of_the_chains(full, half, wrong, words):
    right = np.random.default_rng(0).normal(size=(2, 5, 3))
    for name, functions in (("tree", (wrong, right)), ("halved", (right, wrong))):
        remedy = r"give predict\(mcmc, x, functions=True\)\[\"functions\"\] of both runs"
        message = rf"functions of {name} must be an array \(chain, draw, ...\) .* chains, 2, got a {words}: {remedy}"
        with pytest.raises(ValueError, match=message):
            bias_certificate(full, half, functions=functions)
    with pytest.raises(ValueError, match=r"functions of tree must be an array .* got a str: give predict"):
        bias_certificate(full, half, functions=xr.Dataset({"mean": 0.0, "functions": 0.0}))


def test_bad_input(full, half):
    with pytest.raises(ValueError, match=r"halved must be a run at half the step size of tree, .* is 1 times that"):
        bias_certificate(full, full)
    other = run(STEP / 2, seed=1, kernel="PSGLD")
    with pytest.raises(ValueError, match=r"halved must be the same run .* kernel is 'PSGLD', not 'SGLD'"):
        bias_certificate(full, other)
    with pytest.raises(ValueError, match="halved has no site 'a' of shape"):
        bias_certificate(full, run(STEP / 2, seed=1, units=3))
    with pytest.raises(ValueError, match="functions must be those of tree and of halved"):
        bias_certificate(full, functions=[np.zeros((1, 2, 3))] * 2)
    with pytest.raises(ValueError, match=r"functions must be of the same rows in both runs, got \[3, 4\] values"):
        bias_certificate(full, half, functions=[np.zeros((2, 5, 3)), np.zeros((2, 5, 4))])
    with pytest.raises(ValueError, match="order must be an integer of at least 1, got 0"):
        bias_certificate(full, half, order=0)
    broken = half.copy(deep=True)
    broken["posterior"]["b"].values[0, 3, 2] = np.nan
    with pytest.raises(ValueError, match="b of halved has 1 NaN"):
        bias_certificate(full, broken)
