"""Plots show what the diagnostics compute, where they are told to."""

import re
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import xarray as xr

from bnn_ppl import diagnostics as d

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bnn_ppl.plots import plot_log_alpha, plot_reliability, plot_temperatures, plot_weight_norm

rng = np.random.default_rng(0)
P = rng.dirichlet(np.ones(4), size=300)
Y = rng.integers(4, size=300)
C, S, D = 2, 50, 80


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def tree_of(momentum=True, by_site=False):
    site = {name: rng.normal(size=(C, S, D // 2)) for name in ("w0", "w1")}
    statistics = d.site_temperatures(site, site, site if momentum else None)
    if not by_site:
        statistics = statistics[[name for name in statistics if not str(name).startswith("site_")]]
    statistics["temperature"] = xr.ones_like(statistics["configurational_temperature"])
    statistics["step_size"] = 0.1 * statistics["temperature"]
    statistics.attrs = {"kernel": "SGLD"}
    if momentum:
        statistics["momentum_norm_sq"] = D * statistics["kinetic_temperature"]
        statistics.attrs = {"integrator": "symplectic_euler", "friction": 2.0, "mass": 1.0}
    posterior = xr.Dataset({name: (("chain", "draw", f"{name}_dim"), z) for name, z in site.items()})
    return {"sample_stats": statistics, "posterior": posterior}


def norms_of(chains, by_site=False):
    """sample_stats of random positions, momenta and gradients at two sites."""
    z, r, g = rng.normal(size=(3, chains, S, 2, D // 2))
    products = {"position_norm_sq": z * z, "position_momentum": z * r, "momentum_norm_sq": r * r}
    products |= {"momentum_gradient": r * g, "configurational_temperature": z * g, "kinetic_temperature": r * r}
    statistics = xr.Dataset({"step_size": (("chain", "draw"), np.full((chains, S), 0.1))}, {"site": ["w0", "w1"]})
    statistics["temperature"] = 10 * statistics["step_size"]
    statistics["gradient_norm"] = ("chain", "draw"), np.sqrt((g**2).sum(axis=(2, 3)))
    if by_site:
        statistics["site_gradient_norm"] = ("chain", "draw", "site"), np.sqrt((g**2).sum(axis=3))
    for name, product in products.items():
        sums, size = product.sum(axis=3), D if name.endswith("temperature") else 1
        statistics[name] = ("chain", "draw"), sums.sum(axis=2) / size
        if by_site:
            statistics[f"site_{name}"] = ("chain", "draw", "site"), 2 * sums / size if size > 1 else sums
    statistics.attrs = {"integrator": "baoab", "friction": 2.0, "mass": 1.0, "steps_per_draw": 1}
    return {"sample_stats": statistics}


def lines(ax):
    return {line.get_label(): np.array(line.get_data()) for line in ax.lines}


@pytest.mark.parametrize("binning", ["equal_width", "equal_mass"])
def test_reliability_shows_the_table(binning):
    table = d.reliability(P, Y, bins=9, binning=binning)
    filled = table.isel(bin=np.flatnonzero(table["count"]))
    ax = plot_reliability(P, Y, bins=9, binning=binning)
    np.testing.assert_array_equal(lines(ax)["prediction"], [filled["confidence"], filled["accuracy"]])
    (counts,) = (other for other in ax.figure.axes if other is not ax)
    assert [bar.get_height() for bar in counts.patches] == filled["count"].values.tolist()
    np.testing.assert_allclose([bar.get_x() for bar in counts.patches], filled["lower"])
    assert (ax.get_xlabel(), ax.get_ylabel(), counts.get_ylabel()) == ("confidence", "accuracy", "rows in the bin")
    ax.figure.canvas.draw()


def test_reliability_on_given_axes_and_of_a_sure_prediction():
    _, ax = plt.subplots()
    assert plot_reliability(np.eye(3), [0, 1, 2], ax=ax) is ax
    ax.figure.canvas.draw()
    plot_reliability(np.eye(3), [0, 1, 2], binning="equal_mass").figure.canvas.draw()


def test_temperatures_show_each_chain_the_expectation_and_the_band():
    tree = tree_of()
    axes = plot_temperatures(tree)
    assert [ax.get_ylabel() for ax in axes] == ["kinetic temperature", "configurational temperature"]
    assert axes[-1].get_xlabel() == "draw"
    kinetic, configurational = (lines(ax) for ax in axes)
    for shown, name in ((kinetic, "kinetic"), (configurational, "configurational")):
        for chain in range(C):
            expected = tree["sample_stats"][f"{name}_temperature"].values[chain]
            np.testing.assert_array_equal(shown[f"chain {chain}"][1], expected)
    np.testing.assert_allclose(kinetic["expected"][1], 1 / 0.9)
    np.testing.assert_allclose(configurational["temperature"][1], 1)
    (band,) = axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx(np.array(d.temperature_band(D)) / 0.9)
    assert not axes[1].collections
    axes[0].figure.canvas.draw()


def test_temperatures_of_a_site_and_without_momentum():
    tree = tree_of(by_site=True)
    _, pair = plt.subplots(2)
    axes = plot_temperatures(tree, part="w1", ax=pair)
    assert list(axes) == list(pair)
    shown = lines(axes[1])["chain 1"][1]
    np.testing.assert_array_equal(
        shown, tree["sample_stats"]["site_configurational_temperature"].sel(site="w1").values[1]
    )
    _, single = plt.subplots()
    (ax,) = plot_temperatures(tree_of(momentum=False), ax=single)
    assert ax is single
    assert ax.get_ylabel() == "configurational temperature"


@pytest.mark.parametrize("chains", [1, 9])
def test_weight_norm_shows_moments_and_rates(chains):
    tree = norms_of(chains)
    found = d.weight_norm(tree).sel(part="all")
    axes = plot_weight_norm(tree)
    assert axes.shape == (2, 3)
    labels = [r"$\|\theta\|^2$", r"$\theta^\top r$", r"$\|r\|^2$"]
    assert [ax.get_ylabel() for ax in axes[0]] == labels
    assert [ax.get_ylabel() for ax in axes[1]] == [f"d/dt {label}" for label in labels]
    for (above, below), moment in zip(axes.T, found["moment"].values, strict=True):
        one = found.sel(moment=moment)
        track = np.array([found["time"], one["moments"].mean("chain")])
        np.testing.assert_array_equal(lines(above)["mean over chains"], track)
        np.testing.assert_array_equal(lines(below)["measured"][1], one["measured_rate"])
        np.testing.assert_array_equal(lines(below)["Fokker-Planck"][1], one["predicted_rate"])
        assert ("at stationarity" in lines(above)) == (moment != "position_norm_sq")
        assert len(above.collections) == len(below.collections) == (chains > 1)
        assert below.get_xlabel() == "time (steps × step size)"
    assert lines(axes[0, 2])["at stationarity"][1][0] == pytest.approx(D)
    axes[0, 0].figure.canvas.draw()


def test_weight_norm_of_a_site_on_given_axes():
    tree, (_, given) = norms_of(3, by_site=True), plt.subplots(2, 3)
    axes = plot_weight_norm(tree, part="w1", friction=0.1, ax=given)
    assert axes is given
    shown = lines(axes[0, 0])["mean over chains"][1]
    np.testing.assert_allclose(shown, tree["sample_stats"]["site_position_norm_sq"][..., 1].mean("chain"))
    predicted = d.weight_norm(tree, friction=0.1).sel(part="w1", moment="momentum_norm_sq")["predicted_rate"]
    np.testing.assert_array_equal(lines(axes[1, 2])["Fokker-Planck"][1], predicted)


LOG_ALPHA = {
    "w0": np.concatenate([rng.normal(-4, 1, 30), rng.normal(8, 1, 169), [np.inf, 90, 95, -np.inf]]).reshape(7, 29),
    "w1": np.full(7, np.inf),
    "b": np.array([3.0, 3.25]),
}


def test_log_alpha_shows_each_site_and_what_lies_beyond():
    axes = plot_log_alpha(LOG_ALPHA)
    table = d.sparsity(LOG_ALPHA)
    assert axes.shape == (3,)
    assert axes[0].get_title() == "w0\n84.7% pruned, 31 of 203 kept"
    assert axes[1].get_title() == "w1\n100.0% pruned, 0 of 7 kept"
    words = [[text.get_text() for text in ax.texts] for ax in axes]
    assert words == [["← 1 beyond the axis", "3 beyond the axis →"], ["7 beyond the axis →"], []]
    low, high = axes[0].get_xlim()
    assert low == pytest.approx(LOG_ALPHA["w0"][np.isfinite(LOG_ALPHA["w0"])].min() - 0.5)
    assert high == pytest.approx(20.5)
    for ax, site in zip(axes, LOG_ALPHA, strict=True):
        inside = (LOG_ALPHA[site] >= low) & (LOG_ALPHA[site] <= high)
        assert sum(bar.get_height() for bar in ax.patches) == inside.sum()
        right = sum(bar.get_height() for bar in ax.patches if bar.get_x() + bar.get_width() / 2 > 5)
        assert right == (inside & (LOG_ALPHA[site] > 5)).sum()
        assert lines(ax)["threshold 3"][0].tolist() == [3, 3]
        assert (ax.get_xlabel(), ax.get_ylabel()) == (r"$\log\,\alpha$", "weights in the bin")
        assert ax.get_yscale() == "log"
        assert ax.get_xlim() == (low, high)
        assert f"{table.loc[site, 'kept']} of {table.loc[site, 'weights']} kept" in ax.get_title()
    axes[0].figure.canvas.draw()


def test_log_alpha_on_given_axes_and_at_another_threshold():
    _, single = plt.subplots()
    (ax,) = plot_log_alpha({"b": LOG_ALPHA["b"]}, threshold=25, ax=single)
    assert ax is single
    assert ax.get_title() == "b\n0.0% pruned, 2 of 2 kept"
    assert ax.get_xlim() == (2.5, 25.5)
    assert lines(ax)["threshold 25"][0].tolist() == [25, 25]
    panels = plot_log_alpha({f"w{i}": LOG_ALPHA["b"] for i in range(4)})
    assert len(panels) == 4
    assert [other.axison for other in panels[0].figure.axes] == [True] * 4 + [False] * 2
    (ax,) = plot_log_alpha({"w1": LOG_ALPHA["w1"]})
    assert ax.get_xlim() == (2.5, 3.5)
    ax.figure.canvas.draw()


def test_bad_arguments():
    with pytest.raises(ValueError, match="ax must have 3 Axes, one for each site, got 1"):
        plot_log_alpha(LOG_ALPHA, ax=plt.subplots()[1])
    with pytest.raises(ValueError, match="log_alpha of site 'w' has 1 NaN values"):
        plot_log_alpha({"w": np.nan})
    with pytest.raises(ValueError, match="threshold must be a finite number, got inf"):
        plot_log_alpha(LOG_ALPHA, threshold=np.inf)
    with pytest.raises(ValueError, match=re.escape("part must be one of ['all'], got 'w7'")):
        plot_weight_norm(norms_of(1), part="w7")
    with pytest.raises(ValueError, match=re.escape("ax must have the shape (2, 3), for three norms and their rates")):
        plot_weight_norm(norms_of(1), ax=plt.subplots(3)[1])
    with pytest.raises(ValueError, match=re.escape("part must be one of ['all'], got 'w7'")):
        plot_temperatures(tree_of(), part="w7")
    with pytest.raises(ValueError, match="ax must have 2 Axes, for kinetic and configurational, got 1"):
        plot_temperatures(tree_of(), ax=plt.subplots()[1])
    with pytest.raises(ValueError, match="labels must be from 0 to 3"):
        plot_reliability(P, Y + 4)


def test_without_matplotlib_the_extra_is_named():
    code = "import sys; sys.modules['matplotlib'] = None; import bnn_ppl.plots"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "ImportError: bnn_ppl.plots needs matplotlib: pip install 'bnn_ppl[plots]'" in ran.stderr
