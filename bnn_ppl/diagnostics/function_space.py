"""Convergence and agreement of what networks compute, which relabelling their hidden units does not change.

For functions f_cs(x) of draw s of chain c (class probabilities, logits or means on fixed inputs x), rank-normalised
split R-hat and bulk and tail effective sample sizes [1]_ per row and class, from ArviZ. Between two posteriors with
averages p and q, or between members with predicted classes y_s [2]_ [3]_::

    agreement       = mean_x 1[argmax p(x) = argmax q(x)]
    total variation = mean_x 1/2 sum_k |p_k(x) - q_k(x)|
    disagreement    = mean_x 1[y_s(x) != y_t(x)],  over 1 - accuracy when normalised

The R-hat of weights means little, for any permutation of hidden units gives the same function.

References
----------
.. [1] Vehtari, Gelman, Simpson, Carpenter & Buerkner (2021), Rank-normalization, folding, and localization.
.. [2] Izmailov, Vikram, Hoffman & Wilson (2021), What are Bayesian neural network posteriors really like?
.. [3] Fort, Hu & Lakshminarayanan (2019), Deep ensembles: a loss landscape perspective.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from bnn_ppl.diagnostics.checks import check_finite, check_labels, check_probabilities

_TAILS = (0.05, 0.95)


def function_dataset(values: Any, *, name: str = "f") -> xr.Dataset:
    """Functions of each draw with named dimensions, as ArviZ's statistics and plots take them.

    Parameters
    ----------
    values
        Probabilities, logits or means, shape (chain, draw, row) or (chain, draw, row, class); or an
        ``xarray.DataArray`` with the dimensions `chain` and `draw` and any others.
    name
        Of the variable.

    Returns
    -------
    xarray.Dataset
        One variable with `chain` and `draw` in front, and a coordinate for each dimension.

    Raises
    ------
    ValueError
        If a dimension is missing, or values are not finite.

    Examples
    --------
    >>> az.plot_rank(function_dataset(probabilities[:, :, uncertain]))  # rank plots at some rows
    """
    if isinstance(values, xr.DataArray):
        if not {"chain", "draw"} <= set(values.dims):
            raise ValueError(f"values must have the dimensions 'chain' and 'draw', got {values.dims}")
        array = values.transpose("chain", "draw", ...).load()
    else:
        given = np.asarray(values)
        if given.ndim not in (3, 4):
            raise ValueError(f"values must have the shape (chain, draw, row[, class]), got {given.shape}")
        array = xr.DataArray(given, dims=("chain", "draw", "row", "class")[: given.ndim])
    if not array.size:
        raise ValueError(f"values must be not empty, got the shape {array.shape}")
    check_finite("values", array.values)
    numbers = {dim: np.arange(size) for dim, size in array.sizes.items() if dim not in array.coords}
    return array.assign_coords(numbers).to_dataset(name=name)


def least_draws(chains: int) -> int:
    """Draws of each chain that R-hat needs, where a single chain is cut into two."""
    return 8 if chains == 1 else 4


def function_diagnostics(values: Any) -> xr.Dataset:
    """Split R-hat and effective sample sizes of functions.

    Parameters
    ----------
    values
        Probabilities, logits or means, shape (chain, draw, row) or (chain, draw, row, class); or an
        ``xarray.DataArray`` with the dimensions `chain` and `draw` and any others. At least 4 draws, or 8 of a single
        chain. A thousand functions of 2000 draws take about a second.

    Returns
    -------
    xarray.Dataset
        `r_hat`, `ess_bulk` and `ess_tail` (of the 5% and 95% quantiles), shapes (row[, class]). A single chain is cut
        into two for R-hat. A function with one and the same value in all draws has NaN for each.

    Raises
    ------
    ValueError
        If a dimension is missing, draws are too few, or values are not finite.
    """
    import arviz as az  # takes over a second

    functions = function_dataset(values)
    chains, draws = functions.sizes["chain"], functions.sizes["draw"]
    if draws < least_draws(chains):
        raise ValueError(
            f"values has {chains} chain(s) of {draws} draws, which are too few: give at least 4 draws of several "
            "chains, or 8 of one"
        )
    halves = functions
    if chains == 1:
        parts = [functions.isel(draw=slice(i * (draws // 2), (i + 1) * (draws // 2))) for i in range(2)]
        halves = xr.concat([part.drop_vars("draw", errors="ignore") for part in parts], "chain")
    with np.errstate(divide="ignore", invalid="ignore"):  # of constant functions
        statistics = {
            "r_hat": az.rhat(halves, method="rank"),
            "ess_bulk": az.ess(functions, method="bulk"),
            "ess_tail": az.ess(functions, method="tail", prob=_TAILS),
        }
    found = xr.Dataset({name: statistic["f"].drop_attrs() for name, statistic in statistics.items()})
    return found.where(found["r_hat"].notnull())


def summarize(diagnostics: xr.Dataset, quantiles: Sequence[float] = (0.0, 0.05, 0.5, 0.95, 1.0)) -> xr.Dataset:
    """Quantiles over rows and classes of `function_diagnostics`.

    Parameters
    ----------
    diagnostics
        From `function_diagnostics`.
    quantiles
        From 0 to 1. They are values that occur, not interpolated ones.

    Returns
    -------
    xarray.Dataset
        By `quantile`, the variables of `diagnostics`, each over the functions where it is not NaN. The attributes are
        the numbers of `functions` and of those among them that are `constant`.

    Raises
    ------
    ValueError
        If a quantile is outside 0 to 1.
    """
    at = np.asarray(quantiles, np.float64)
    if not ((at >= 0) & (at <= 1)).all():
        raise ValueError(f"quantiles must be from 0 to 1, got {list(quantiles)}")
    variables = {}
    for name, variable in diagnostics.data_vars.items():
        known = variable.values[~np.isnan(variable.values)]
        found = np.quantile(known, at, method="nearest") if known.size else np.full(at.shape, np.nan)
        variables[name] = ("quantile", found)
    r_hat = diagnostics["r_hat"].values
    return xr.Dataset(variables, {"quantile": at}, {"functions": r_hat.size, "constant": int(np.isnan(r_hat).sum())})


def _check_pair(p: Any, q: Any) -> tuple[np.ndarray, np.ndarray]:
    first, second = check_probabilities("p", p), check_probabilities("q", q)
    if first.shape != second.shape:
        raise ValueError(f"p and q must have the same rows and classes, got {first.shape} and {second.shape}")
    return first, second


def agreement(p: Any, q: Any) -> float:
    """Share of the rows for which two predictions name the same class.

    Parameters
    ----------
    p, q
        Averaged class probabilities, shapes (rows, classes).

    Raises
    ------
    ValueError
        If they are no probabilities of the same rows and classes.
    """
    first, second = _check_pair(p, q)
    return float((first.argmax(axis=1) == second.argmax(axis=1)).mean())


def total_variation(p: Any, q: Any) -> float:
    """Total variation distance between two predictions, mean over the rows: from 0 to 1.

    Parameters
    ----------
    p, q
        Averaged class probabilities, shapes (rows, classes).

    Raises
    ------
    ValueError
        If they are no probabilities of the same rows and classes.
    """
    first, second = _check_pair(p, q)
    return float(0.5 * np.abs(first - second).sum(axis=1).mean())


def disagreement(probabilities: Any, labels: Any = None) -> xr.Dataset:
    """Share of the rows for which members (chains, cycles or draws) name different classes.

    Parameters
    ----------
    probabilities
        Averages of each member, shape (members, rows, classes).
    labels
        Class numbers, shape (rows,), for the normalised form.

    Returns
    -------
    xarray.Dataset
        By `member` and `other`: `disagreement`; with labels also `normalized`, which is that over 1 less the mean
        accuracy of the two, NaN where both make no mistake.

    Raises
    ------
    ValueError
        If the arguments do not fit together; the message names the argument and the value.
    """
    p = check_probabilities("probabilities", probabilities, ("members", "rows", "classes"))
    named = p.argmax(axis=-1)
    differ = (named[:, None] != named[None]).mean(axis=-1)
    variables = {"disagreement": (("member", "other"), differ)}
    if labels is not None:
        error = (named != check_labels(labels, *p.shape[1:])).mean(axis=-1)
        mean_error = 0.5 * (error[:, None] + error[None])
        ratio = np.divide(differ, mean_error, out=np.full_like(differ, np.nan), where=mean_error > 0)
        variables["normalized"] = (("member", "other"), ratio)
    return xr.Dataset(variables)


def cosine_similarity(weights: Any, origin: Any = 0.0) -> xr.DataArray:
    """Cosine of the angle between the weights of members, a companion of `disagreement`.

    Parameters
    ----------
    weights
        Shape (members, weights).
    origin
        From where the weights are counted, shape (weights,): the common start of the members, say. By default 0.

    Returns
    -------
    xarray.DataArray
        By `member` and `other`; NaN for a member at the origin. Permuting the hidden units of one member changes it.

    Raises
    ------
    ValueError
        If a shape does not fit, or values are not finite.
    """
    w, start = np.asarray(weights, np.float64), np.asarray(origin, np.float64)
    if w.ndim != 2 or not w.size:
        raise ValueError(f"weights must have the shape (members, weights) and be not empty, got {w.shape}")
    if start.shape not in ((), w.shape[1:]):
        raise ValueError(f"origin must have the shape {w.shape[1:]} of one member's weights, got {start.shape}")
    check_finite("weights", w)
    check_finite("origin", start)
    w = w - start
    norm = np.linalg.norm(w, axis=1)
    scale = np.outer(norm, norm)
    cosine = np.divide(w @ w.T, scale, out=np.full_like(scale, np.nan), where=scale > 0)
    return xr.DataArray(cosine, dims=("member", "other"), name="cosine_similarity")


def predictive_differences(mean: Any, sd: Any, reference_mean: Any, reference_sd: Any) -> xr.Dataset:
    """How a regression posterior differs from a reference such as a long NUTS run, in each row.

    Parameters
    ----------
    mean, sd
        Posterior mean and standard deviation of the function, or of the target, shapes (rows,).
    reference_mean, reference_sd
        Those of the reference.

    Returns
    -------
    xarray.Dataset
        By `row`: `mean_shift`, the difference of the means in standard deviations of the reference, and `sd_ratio`.

    Raises
    ------
    ValueError
        If the shapes differ, values are not finite, or the standard deviations not above 0.
    """
    given = {"mean": mean, "sd": sd, "reference_mean": reference_mean, "reference_sd": reference_sd}
    arrays = {name: np.asarray(value, np.float64) for name, value in given.items()}
    shapes = {name: value.shape for name, value in arrays.items()}
    if len(set(shapes.values())) > 1 or arrays["mean"].ndim != 1 or not arrays["mean"].size:
        raise ValueError(f"all arguments must have the same shape (rows,), got {shapes}")
    for name, value in arrays.items():
        check_finite(name, value)
        if name.endswith("sd") and (value <= 0).any():
            raise ValueError(f"{name} must be above 0, got {value.min():.4g}")
    shift = (arrays["mean"] - arrays["reference_mean"]) / arrays["reference_sd"]
    return xr.Dataset(
        {"mean_shift": ("row", shift), "sd_ratio": ("row", arrays["sd"] / arrays["reference_sd"])},
    )
