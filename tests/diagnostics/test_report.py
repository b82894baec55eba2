"""The report says what is right and what is wrong with a run, and only that."""

import numpy as np
import pytest
import xarray as xr
from PIL import Image

import bnn_ppl
from bnn_ppl import diagnostics as d

C, S, ROWS, K = 3, 600, 150, 4
rng = np.random.default_rng(0)


def make_tree(heat=1.0, diverging=0, chains=C, site_heat=1.0, momentum=True):
    """What to_arviz makes of a chain on a Gaussian, whose draws are independent."""
    position = {"a": rng.normal(size=(chains, S, 600)), "b": site_heat**0.5 * rng.normal(size=(chains, S, 30))}
    position = {name: heat**0.5 * z for name, z in position.items()}
    velocity = {name: heat**0.5 * rng.normal(size=z.shape) for name, z in position.items()}
    statistics = d.site_temperatures(position, position, velocity if momentum else None)
    statistics["temperature"] = xr.ones_like(statistics["configurational_temperature"])
    statistics["step_size"] = 0.01 * statistics["temperature"]
    statistics["diverging"] = xr.zeros_like(statistics["temperature"]).astype(bool)
    statistics["diverging"][0, :diverging] = True
    statistics.attrs = {"kernel": "SGLD", "steps_per_draw": 7}
    if momentum:
        statistics["momentum_norm_sq"] = 630 * statistics["kinetic_temperature"]
        statistics.attrs |= {"kernel": "SGHMC", "integrator": "baoab", "friction": 2.0, "mass": 1.0}
    posterior = xr.Dataset({name: (("chain", "draw", f"{name}_dim"), z) for name, z in position.items()})
    return xr.DataTree.from_dict({"posterior": posterior, "sample_stats": statistics})


def make_classes(apart=0.0, confidence=1.0):
    """Predictions of classes that are right on average; `apart` moves the chains from each other."""
    logits = rng.normal(size=(1, 1, ROWS, K)) * 2 + 0.1 * rng.normal(size=(C, S, ROWS, K))
    logits = logits + apart * np.arange(C)[:, None, None, None] * np.array([1, 0, 0, 0])
    true = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    average = true.mean((0, 1))
    labels = np.array([rng.choice(K, p=p) for p in average])
    p = true**confidence / (true**confidence).sum(-1, keepdims=True)
    log_density = np.log(p[:, :, np.arange(ROWS), labels])
    dims = ("chain", "draw", "row", "class")
    return xr.Dataset(
        {
            "probabilities": (dims[2:], p.mean((0, 1))),
            "mean_entropy": ("row", -(p * np.log(p)).sum(-1).mean((0, 1))),
            "functions": (dims, p),
            "log_density": ("row", np.log(np.exp(log_density).mean((0, 1)))),
            "draw_log_density": (dims[:2], log_density.sum(-1)),
            "observed": ("row", labels),
        }
    )


def make_values(spread=1.0):
    mean, y = rng.normal(size=ROWS), None
    y = mean + rng.normal(size=ROWS)
    sd = np.full(ROWS, spread)
    log_density = -0.5 * ((y - mean) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2 * np.pi)
    functions = mean + 0.1 * rng.normal(size=(C, S, ROWS))
    named = {"mean": mean, "sd": sd, "log_density": log_density, "observed": y}
    return xr.Dataset(
        {name: ("row", value) for name, value in named.items()} | {"functions": (("chain", "draw", "row"), functions)}
    )


def warnings_of(text):
    return [line for line in text.splitlines() if line.startswith("!")]


def test_a_good_run_gets_no_warning(capsys):
    found = make_classes()
    text = bnn_ppl.report(make_tree(), found)
    assert capsys.readouterr().out == text + "\n"
    assert warnings_of(text) == []
    assert "SGHMC: 3 chain(s) of 600 draws, 7 gradient steps a draw" in text
    assert "No divergences." in text
    assert "at its temperature" in text
    assert "Converged, as far as the predictions tell." in text
    scores = d.classification_scores(found["probabilities"].values, found["observed"].values)
    assert f"accuracy {scores['accuracy']:.4f}, NLL {scores['nll']:.4f}" in text
    single = -float(found["draw_log_density"].mean()) / ROWS
    assert f"NLL of single draws {single:.4f}, {single - scores['nll']:.4f} more" in text


def test_each_fault_is_told():
    (hot, *_) = warnings_of(bnn_ppl.report(make_tree(heat=1.5)))
    assert hot.startswith(("! kinetic: 1.49", "! kinetic: 1.5"))
    assert "too hot by 50%" in hot
    assert warnings_of(bnn_ppl.report(make_tree(diverging=5)))[0].startswith("! 5 of 1800 draws diverged: lower step")
    assert "One chain" in warnings_of(bnn_ppl.report(make_tree(chains=1)))[0]
    (site,) = warnings_of(bnn_ppl.report(make_tree(site_heat=1.6)))
    assert site.startswith(("! configurational of b: 1.5", "! configurational of b: 1.6"))
    assert "out of equilibrium" in site
    (apart, *_) = warnings_of(bnn_ppl.report(make_tree(), make_classes(apart=1.0)))
    assert apart.startswith("! Not converged: the chains predict differently")
    (sure,) = warnings_of(bnn_ppl.report(make_tree(), make_classes(confidence=6.0)))
    assert sure.startswith("! overconfident by")
    (unsure,) = warnings_of(bnn_ppl.report(make_tree(), make_classes(confidence=0.2)))
    assert unsure.startswith("! underconfident by")


def test_regression():
    found = make_values()
    text = bnn_ppl.report(make_tree(momentum=False), found)
    error = d.rmse(found["mean"].values, found["observed"].values)
    assert f"RMSE {error:.4g}, log density {float(found['log_density'].mean()):.4g}, CRPS" in text
    assert warnings_of(text) == []
    assert "kinetic" not in text
    assert "intervals are too narrow" in warnings_of(bnn_ppl.report(make_tree(), make_values(spread=0.3)))[0]
    assert "intervals are too wide" in warnings_of(bnn_ppl.report(make_tree(), make_values(spread=5.0)))[0]


def test_without_predictions_and_with_other_kernels():
    text = bnn_ppl.report(make_tree())
    assert "pass predictions=predict(mcmc, x_test, y_test, functions=True)" in text
    assert "Scores" not in text
    tree = make_tree()
    nuts = tree["sample_stats"].to_dataset()[["diverging"]]
    nuts.attrs = {}
    text = bnn_ppl.report(xr.DataTree.from_dict({"posterior": tree["posterior"].to_dataset(), "sample_stats": nuts}))
    assert "Temperatures" not in text
    functions = make_classes()[["probabilities", "functions"]]
    still = functions.assign(functions=xr.zeros_like(functions["functions"]))
    assert "the chains do not move" in bnn_ppl.report(make_tree(), still)


@pytest.mark.parametrize("predictions", [None, make_classes(), make_values()], ids=["none", "classes", "values"])
def test_pages(tmp_path, predictions):
    text = bnn_ppl.report(make_tree(), predictions, path=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert text.splitlines()[2] in page
    assert "data:image/png;base64," in page
    bnn_ppl.report(make_tree(momentum=False), predictions, path=str(tmp_path / "page.png"))
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.width > 1000


@pytest.mark.parametrize(
    ("name", "words"), [("elbo", "mean ELBO of the draws: -13.5\n"), ("elbo_minibatch", "-13.5, each on a minibatch\n")]
)
def test_draws_of_a_guide_are_no_chain(tmp_path, name, words):
    stats = xr.Dataset({name: (("chain", "draw"), -12.0 - np.arange(4.0)[None])}, attrs={"guide": "AutoNormal"})
    posterior = xr.Dataset({"w": (("chain", "draw"), np.zeros((1, 4)))})
    tree = xr.DataTree.from_dict({"posterior": posterior, "sample_stats": stats})
    drifting = make_values().isel(chain=[0])
    drifting = drifting.assign(functions=drifting["functions"] + drifting["draw"])
    for predictions in (None, drifting):
        text = bnn_ppl.report(tree, predictions, path=tmp_path / "page.html")
        assert "AutoNormal: 4 independent draws of the guide\n" in text
        assert words in text
        assert "convergence of the fit is seen in the losses, not in R-hat." in text
        assert not any(word in text for word in ("chain", "onverged", "Not judged", "!"))
        assert ("RMSE" in text) == (predictions is not None)


def test_snapshots_are_no_chain():
    stats = xr.Dataset({"averaging_weight": (("chain", "draw"), np.full((1, 4), 0.25))}, attrs={"guide": "AutoDelta"})
    posterior = xr.Dataset({"w": (("chain", "draw"), np.zeros((1, 4)))})
    text = bnn_ppl.report(xr.DataTree.from_dict({"posterior": posterior, "sample_stats": stats}))
    assert "AutoDelta: 4 snapshots of its training\n" in text
    assert "seen in the losses" in text
    assert not any(word in text for word in ("One chain", "independent", "Not judged", "!"))


@pytest.mark.parametrize(
    ("source", "over", "under", "intervals"),
    [
        ("chains", "a higher temperature or more draws", "a lower temperature", "the temperature"),
        ("guide", "a wider guide or more draws", "a narrower guide or longer training", "the guide"),
        ("snapshots", "more snapshots, further apart", "snapshots after longer training", "the snapshots"),
    ],
)
def test_advice_fits_where_the_draws_come_from(source, over, under, intervals):
    tree = make_tree()
    if source != "chains":
        name = "elbo" if source == "guide" else "averaging_weight"
        stats = xr.Dataset({name: (("chain", "draw"), np.full((1, 4), 0.25))}, attrs={"guide": "AutoNormal"})
        posterior = xr.Dataset({"w": (("chain", "draw"), np.zeros((1, 4)))})
        tree = xr.DataTree.from_dict({"posterior": posterior, "sample_stats": stats})
    given = make_classes(confidence=6.0), make_classes(confidence=0.2), make_values(spread=0.3)
    found = [warnings_of(bnn_ppl.report(tree, predictions)) for predictions in given]
    for lines, start, advice in zip(found, ("over", "under"), (over, under), strict=False):
        (line,) = lines
        assert line.startswith(f"! {start}confident by")
        assert line.endswith(f"on average: try {advice}, and look at the priors.")
    assert found[2] == [f"! The intervals are too narrow: look at the noise's prior, {intervals}, and for outliers."]


def test_few_draws_are_told(tmp_path):
    few = make_classes().isel(draw=slice(3))
    text = bnn_ppl.report(make_tree(), few, path=tmp_path / "page.png")
    assert "! Not judged: 3 draws a chain are too few. Take at least 4 of several chains, or 8 of one." in text
    assert (tmp_path / "page.png").exists()
    assert "Not judged" not in bnn_ppl.report(make_tree(), make_classes().isel(draw=slice(4)))
    assert "Not judged: 7 draws" in bnn_ppl.report(make_tree(), make_classes().isel(chain=[0], draw=slice(7)))


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in \.html or \.png, got 'page\.pdf'"):
        bnn_ppl.report(make_tree(), path="page.pdf")
    with pytest.raises(ValueError, match=r"predictions must come from predict\(mcmc, x, y\), got a Dataset of \['z'\]"):
        bnn_ppl.report(make_tree(), xr.Dataset({"z": 1.0}))
    with pytest.raises(ValueError, match="tree must have the groups posterior and sample_stats"):
        bnn_ppl.report({"posterior": xr.Dataset()})
    with pytest.raises(ValueError, match="tree must have the groups"):
        bnn_ppl.report(None)
