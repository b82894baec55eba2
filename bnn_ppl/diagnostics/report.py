"""One page on a finished run: convergence of functions, temperatures, divergences and scores, with advice in words.

Convergence is judged where it means something for a network, on its predictions: split R-hat and effective sample
sizes of function values at given rows (Vehtari et al. 2021), never of weights, which hidden units permute.
"""

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from bnn_ppl.diagnostics.classification import classification_scores
from bnn_ppl.diagnostics.function_space import function_diagnostics, least_draws, summarize
from bnn_ppl.diagnostics.regression import regression_scores
from bnn_ppl.diagnostics.temperature_table import temperature_table
from bnn_ppl.diagnostics.uncertainty import mutual_information

_MOST_FUNCTIONS = 500  # of which R-hat takes about a second
_WELL_MIXED = 1.01
_MIXED = 1.05
# By source of the draws: what sets their spread, and what to try against over- and underconfidence.
_SPREADS = {
    "chains": ("the temperature", "a higher temperature or more draws", "a lower temperature"),
    "guide": ("the guide", "a wider guide or more draws", "a narrower guide or longer training"),
    "snapshots": ("the snapshots", "more snapshots, further apart", "snapshots after longer training"),
}


def report(tree: Any, predictions: xr.Dataset | None = None, *, path: str | Path | None = None) -> str:
    """Print whether a run can be trusted, how good it is, and what to change.

    Of a guide that SVI trained it prints the mean ELBO of the draws, and leaves R-hat out: its draws are independent.

    Parameters
    ----------
    tree
        From `bnn_ppl.to_arviz`, of chains or of a guide.
    predictions
        From ``predict(mcmc, x_test, y_test, functions=True)``: with `functions` convergence of chains is judged, on at
        most 500 rows, evenly spaced; with `observed` the predictions are scored.
    path
        File for a page with the text and the usual plots: ``.html`` or ``.png``. Needs the extra ``[plots]``.

    Returns
    -------
    str
        What was printed.

    Raises
    ------
    ImportError
        For a `path` without matplotlib.
    ValueError
        If `tree` has no draws, `predictions` are none of `predict`, or `path` ends otherwise.
    """
    if path is not None and Path(path).suffix not in (".html", ".png"):
        raise ValueError(f"path must end in .html or .png, got {str(path)!r}")
    if predictions is not None and not {"probabilities", "mean"} & set(predictions):
        raise ValueError(f"predictions must come from predict(mcmc, x, y), got a Dataset of {list(predictions)}")
    try:
        statistics = _dataset(tree["sample_stats"])
        chains, draws = (tree["posterior"].sizes[dim] for dim in ("chain", "draw"))
    except (KeyError, TypeError):
        raise ValueError("tree must have the groups posterior and sample_stats, as bnn_ppl.to_arviz makes") from None
    if _source(statistics) != "chains":
        sections = {"Guide": _guide(statistics, draws)}
    else:
        sections = {
            "Chains": _chains(statistics, chains, draws),
            "Temperatures": _temperatures(tree, statistics),
            "Convergence of predictions": _convergence(predictions, chains),
        }
    sections["Scores"] = _scores(predictions, _SPREADS[_source(statistics)])
    text = "\n\n".join("\n".join([title, "-" * len(title), *lines]) for title, lines in sections.items() if lines)
    print(text)
    if path is not None:
        _write(Path(path), text, tree, statistics, predictions)
    return text


def _dataset(group: Any) -> xr.Dataset:
    return group.to_dataset() if isinstance(group, xr.DataTree) else group


def _source(statistics: xr.Dataset) -> str:
    if "guide" not in statistics.attrs:
        return "chains"
    weighted = "averaging_weight" in statistics and "draw" in statistics["averaging_weight"].dims
    return "snapshots" if weighted else "guide"


def _guide(statistics: xr.Dataset, draws: int) -> list[str]:
    name = statistics.attrs["guide"]
    if _source(statistics) == "snapshots":
        return [
            f"{name}: {draws} snapshots of its training",
            "Snapshots are no chain: convergence of the fit is seen in the losses, not in R-hat.",
        ]
    lines = [f"{name}: {draws} independent draws of the guide"]
    for elbo, where in (("elbo", ""), ("elbo_minibatch", ", each on a minibatch")):
        if elbo in statistics:
            lines.append(f"mean ELBO of the draws: {float(statistics[elbo].mean()):.6g}{where}")
    return [*lines, "Draws are independent: convergence of the fit is seen in the losses, not in R-hat."]


def _chains(statistics: xr.Dataset, chains: int, draws: int) -> list[str]:
    about = statistics.attrs
    steps = f", {about['steps_per_draw']} gradient steps a draw" if "steps_per_draw" in about else ""
    lines = [f"{about.get('kernel', 'sampler')}: {chains} chain(s) of {draws} draws{steps}"]
    if chains == 1:
        lines.append("! One chain cannot show that it missed a mode: run 2 or more.")
    if "diverging" in statistics:
        bad = int(statistics["diverging"].sum())
        if bad:
            advice = "lower step_size, or raise friction where the kernel has one; do not use these draws"
            if "steps_per_draw" not in about:
                advice = "raise target_accept_prob, or reparametrise the model"
            lines.append(f"! {bad} of {chains * draws} draws diverged: {advice}.")
        else:
            lines.append("No divergences.")
    return lines


def _temperatures(tree: Any, statistics: xr.Dataset) -> list[str]:
    if "configurational_temperature" not in statistics:
        return []  # a kernel of the host, which needs none
    table = temperature_table(tree)
    whole = table[table["part"] == "all"]
    lines = []
    for row in whole.itertuples():
        mark = "" if row.verdict.startswith(("at its", "T = 0")) else "! "
        error = f" (error {row.error:.2g})" if np.isfinite(row.error) else ""
        lines.append(f"{mark}{row.quantity}: {row.mean:.4g}, expected {row.expected:.4g}{error}: {row.verdict}")
    parts = table[table["verdict"].str.startswith("out of")]  # sites that are wrong where the whole is right
    shown = parts.iloc[:5]
    lines += [f"! {row.quantity} of {row.part}: {row.mean:.4g}: {row.verdict}" for row in shown.itertuples()]
    if len(parts) > len(shown):
        lines.append(f"  and {len(parts) - len(shown)} more: bnn_ppl.diagnostics.temperature_table(tree)")
    return lines


def _spread(size: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, size - 1, min(size, most)).round().astype(int))


def _functions(predictions: xr.Dataset | None) -> xr.DataArray | None:
    """Function values (chain, draw, row, ...) on at most 500 rows; of two classes one is enough."""
    if predictions is None or "functions" not in predictions:
        return None
    values = predictions["functions"]
    values = values.isel(row=_spread(values.sizes["row"], _MOST_FUNCTIONS))
    return values.isel({"class": [1]}) if values.sizes.get("class") == 2 else values


def _convergence(predictions: xr.Dataset | None, chains: int) -> list[str]:
    values = _functions(predictions)
    if values is None:
        return ["Not judged: pass predictions=predict(mcmc, x_test, y_test, functions=True)."]
    if not {"chain", "draw"} <= set(values.dims):
        return ["Not judged: the predictions are of independent draws."]
    if (draws := values.sizes["draw"]) < least_draws(values.sizes["chain"]):
        return [f"! Not judged: {draws} draws a chain are too few. Take at least 4 of several chains, or 8 of one."]
    found = summarize(function_diagnostics(values), (0.0, 0.5, 0.95, 1.0))
    if found.attrs["constant"] == found.attrs["functions"]:
        return ["! All functions are constant over the draws: the chains do not move. Raise step_size."]
    at = found.sel(quantile=0.5), found.sel(quantile=0.95), found.sel(quantile=1.0), found.sel(quantile=0.0)
    middle, high, worst, least = at
    r_hat = float(high["r_hat"])
    lines = [
        f"R-hat of {found.attrs['functions']} function values: median {float(middle['r_hat']):.3f}, 95% "
        f"{r_hat:.3f}, largest {float(worst['r_hat']):.3f}",
        f"effective draws: median {float(middle['ess_bulk']):.0f} (bulk) and {float(middle['ess_tail']):.0f} (tails), "
        f"least {float(least['ess_bulk']):.0f} and {float(least['ess_tail']):.0f}",
    ]
    if r_hat > _MIXED:
        cause = "the chains predict differently" if chains > 1 else "the chain still moves"
        lines.append(f"! Not converged: {cause}. Warm up longer, take more or larger steps, or raise steps_per_draw.")
    elif r_hat > _WELL_MIXED:
        lines.append("Usable for averages: for quantiles of single predictions take more draws.")
    else:
        lines.append("Converged, as far as the predictions tell.")
    if float(middle["ess_bulk"]) < 100:
        lines.append("! Few effective draws: raise steps_per_draw, or take more draws.")
    return lines


def _scores(predictions: xr.Dataset | None, spread: tuple[str, str, str]) -> list[str]:
    if predictions is None or "observed" not in predictions:
        return []
    observed = predictions["observed"].values
    if "probabilities" in predictions:
        return _classes(predictions, observed, spread)
    if observed.ndim > 1:
        density = float(predictions["log_density"].mean())
        error = float(np.sqrt(((predictions["mean"].values - observed) ** 2).mean()))
        return [f"{len(observed)} rows: RMSE {error:.4g}, log density {density:.4g} a row"]
    scores = regression_scores(predictions["mean"].values, predictions["sd"].values, observed, levels=(0.5, 0.9))
    lines = [
        f"{len(observed)} rows: RMSE {scores['rmse']:.4g}, log density {float(predictions['log_density'].mean()):.4g}, "
        f"CRPS {scores['crps']:.4g} (Gaussian)",
        f"intervals of 50% and 90% cover {scores['coverage_50']:.1%} and {scores['coverage_90']:.1%} of the rows",
    ]
    off = scores["coverage_90"] - 0.9
    if abs(off) > 3 * np.sqrt(0.09 / len(observed)) + 0.02:
        how = "too narrow" if off < 0 else "too wide"
        lines.append(f"! The intervals are {how}: look at the noise's prior, {spread[0]}, and for outliers.")
    return lines


def _classes(predictions: xr.Dataset, observed: np.ndarray, spread: tuple[str, str, str]) -> list[str]:
    probabilities = predictions["probabilities"].values
    scores = classification_scores(probabilities, observed)
    information = mutual_information(probabilities, predictions["mean_entropy"].values)
    single = -float(predictions["draw_log_density"].mean()) / len(observed)
    lines = [
        f"{len(observed)} rows: accuracy {scores['accuracy']:.4f}, NLL {scores['nll']:.4f}, Brier "
        f"{scores['brier']:.4f}, ECE {scores['ece']:.4f}",
        f"NLL of single draws {single:.4f}, {single - scores['nll']:.4f} more than their average's",
        f"entropy {scores['entropy']:.4f} nats, {float(np.mean(information)):.4f} of it from the spread of the draws",
        f"AUROC of confidence for right against wrong: {scores['selective_auroc']:.3f}",
    ]
    gap = float((probabilities.max(axis=1)).mean()) - scores["accuracy"]
    if abs(gap) > 3 * np.sqrt(0.25 / len(observed)):
        how, advice = ("over", spread[1]) if gap > 0 else ("under", spread[2])
        lines.append(f"! {how}confident by {abs(gap):.1%} on average: try {advice}, and look at the priors.")
    return lines


def _write(path: Path, text: str, tree: Any, statistics: xr.Dataset, predictions: xr.Dataset | None) -> None:
    from bnn_ppl.plots.summary import plot_summary

    functions = None if "guide" in statistics.attrs else _functions(predictions)
    if functions is not None and functions.sizes["draw"] < least_draws(functions.sizes["chain"]):
        functions = None
    figure = plot_summary(
        tree if "configurational_temperature" in statistics else None,
        predictions if predictions is not None and {"observed", "probabilities"} <= set(predictions) else None,
        functions,
        text if path.suffix == ".png" else None,
    )
    if path.suffix == ".png":
        figure.savefig(path, dpi=110)
        return
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    image = base64.b64encode(picture.getvalue()).decode()
    path.write_text(
        "<!DOCTYPE html><html><head><meta charset='utf-8'><title>bnn_ppl report</title></head><body>"
        f"<pre>{html.escape(text)}</pre><img alt='plots' src='data:image/png;base64,{image}'></body></html>\n",
        encoding="utf-8",
    )
