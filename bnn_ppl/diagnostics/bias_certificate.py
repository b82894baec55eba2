r"""What is known about the bias of a finished run, in one table: temperatures, gradient noise, and a halved step.

Without a Metropolis test a chain at step size h samples a law that is off by b(h). A second run at h / 2 shows it
without a reference [1]_: for a bias of order p,

.. math:: b(h) = (E_h - E_{h/2}) \, 2^p / (2^p - 1) + o(h^p) .

Minibatch noise has order 1, and so has SGLD's step; SGHMC on all rows has order 2, for which p = 1 is the cautious
choice. `sd_bias` is that of log standard deviations, from the variances pooled over the coordinates of a part;
`mean_bias` is the root of the mean square over coordinates, in standard deviations, which sampling errors alone make
`mean_error`.

References
----------
.. [1] Mattingly, Stuart & Tretyakov (2010), Convergence of numerical time-averaging and stationary measures via Poisson
   equations; the extrapolation is that of Talay & Tubaro (1990).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from bnn_ppl.diagnostics.checks import check_finite
from bnn_ppl.diagnostics.temperature import batch_means_error
from bnn_ppl.diagnostics.temperature_table import temperature_table
from bnn_ppl.diagnostics.trees import group_of, setting
from bnn_ppl.schedules import check_count
from bnn_ppl.step_sizes import heat_of_noise


def bias_certificate(tree: Any, halved: Any = None, *, functions: Sequence[Any] | None = None, order: int = 1) -> Any:
    """Temperatures, gradient noise and the bias of the step size, as a whole and by site.

    Parameters
    ----------
    tree
        From ``bnn_ppl.to_arviz(mcmc, noise_batches=32)``, of a kernel of this library at T > 0.
    halved
        That of the same run at half the step size, with twice the `steps_per_draw`, so that its draws lie as far apart.
    functions
        With `halved`: function values of both runs, shapes (chain, draw, ...), as ``predict(..., functions=True)`` has
        them. For networks, whose weights are not identified, they are what to look at.
    order
        p of the bias, at least 1.

    Returns
    -------
    pandas.DataFrame
        Index: ``"all"``, the sites, and with `functions` ``"functions"``. Columns: `kinetic` and `configurational`
        temperature over what they should be, with `kinetic_error` and `configurational_error`; `noise_ratio`, variance
        of the gradient noise in a step over that of the injected noise, which SGHMC's slow directions are hotter by,
        and which SGNHT absorbs; with `halved` `sd_bias`, `sd_error`, `mean_bias` and `mean_error`. What is not known
        is NaN.

    Raises
    ------
    ValueError
        If the runs do not belong together, or an argument does not fit.
    """
    check_count("order", order)
    if functions is not None and (halved is None or len(functions) != 2):
        raise ValueError("functions must be those of tree and of halved, two arrays, and halved be given")
    statistics = group_of(tree, "sample_stats")
    table = temperature_table(tree)
    rows: dict[str, dict[str, float]] = {part: {} for part in dict.fromkeys(table["part"])}
    for row in table[table["temperature"] > 0].itertuples():
        if row.expected > 0:
            rows[row.part][row.quantity] = row.mean / row.expected
            rows[row.part][f"{row.quantity}_error"] = row.error / row.expected
    for part, ratio in _noise_ratios(statistics).items():
        rows[part]["noise_ratio"] = ratio
    columns = ["kinetic", "kinetic_error", "configurational", "configurational_error", "noise_ratio"]
    if halved is not None:
        _check_halved(statistics, group_of(halved, "sample_stats"))
        factor = 2.0**order / (2.0**order - 1.0)
        pairs = _draws(group_of(tree, "posterior"), group_of(halved, "posterior"), list(rows))
        if functions is not None:
            ours, theirs = functions
            pairs["functions"] = _functions("tree", tree, ours), _functions("halved", halved, theirs)
            counts = [values.shape[2] for values in pairs["functions"]]
            if counts[0] != counts[1]:
                raise ValueError(f"functions must be of the same rows in both runs, got {counts} values a draw")
        for part, (at_full, at_half) in pairs.items():
            rows.setdefault(part, {}).update(_halving(part, at_full, at_half, factor))
        columns += ["sd_bias", "sd_error", "mean_bias", "mean_error"]
    values = {name: ("part", [row.get(name, np.nan) for row in rows.values()]) for name in columns}
    return xr.Dataset(values, {"part": list(rows)}).to_dataframe()


def _noise_ratios(statistics: xr.Dataset) -> dict[str, float]:
    """Heat of the measured gradient noise over T, as a whole and by site."""
    if "gradient_noise" not in statistics:
        return {}
    settings = {name: setting(value) for name, value in statistics.attrs.items()}
    per_heat = float(statistics["step_size"].mean() / statistics["temperature"].mean())
    by_site = statistics["gradient_noise"].mean("chain")
    ratios = {s: per_heat * float(heat_of_noise(settings, by_site.sel(site=s))) for s in by_site["site"].values}
    whole = float(by_site.weighted(statistics["site_size"]).mean())
    return {"all": per_heat * float(heat_of_noise(settings, whole)), **ratios}


def _check_halved(statistics: xr.Dataset, halved: xr.Dataset) -> None:
    ratio = float(halved["step_size"].mean() / statistics["step_size"].mean())
    if not np.isclose(ratio, 0.5, rtol=1e-3):
        raise ValueError(
            f"halved must be a run at half the step size of tree, and its step size is {ratio:.4g} times that"
        )
    for name in ("kernel", "temperature", "batch_size", "friction", "mass", "integrator", "likelihood_temperature"):
        ours, theirs = statistics.attrs.get(name), halved.attrs.get(name)
        if ours != theirs:
            raise ValueError(
                f"halved must be the same run but for the step size, and its {name} is {theirs!r}, not {ours!r}"
            )


def _functions(name: str, tree: Any, values: Any) -> np.ndarray:
    """Function values of a run, shape (chain, draw, coordinate)."""
    chains = group_of(tree, "posterior").sizes["chain"]
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        found = None
    if found is None or found.ndim < 2 or found.shape[0] != chains:
        what = type(values).__name__ + ("" if found is None else f" of shape {found.shape}")
        raise ValueError(
            f"functions of {name} must be an array (chain, draw, ...) with its number of chains, {chains}, got a "
            f'{what}: give predict(mcmc, x, functions=True)["functions"] of both runs'
        )
    return _flat(found)


def _flat(values: np.ndarray) -> np.ndarray:
    """Shape (chain, draw, coordinate)."""
    return values.reshape(*values.shape[:2], -1)


def _draws(full: xr.Dataset, half: xr.Dataset, parts: list[str]) -> dict[str, tuple[np.ndarray, ...]]:
    """Draws of each part in both runs."""
    sites = [site for site in parts if site in full] or [str(name) for name in full]
    found: dict[str, tuple[np.ndarray, ...]] = {}
    for site in sites:
        shape = full[site].shape[2:]
        if site not in half or half[site].shape[2:] != shape:
            raise ValueError(f"halved has no site {site!r} of shape {shape}: give a run of the same model")
        found[site] = tuple(_flat(np.asarray(run[site].values, np.float64)) for run in (full, half))
    return found


def _halving(part: str, full: np.ndarray, half: np.ndarray, factor: float) -> dict[str, float]:
    """Bias of standard deviations and of means, from draws at a step size and at half of it."""
    moments = []
    for name, values in (("tree", full), ("halved", half)):
        check_finite(f"{part} of {name}", values)
        centre = values.mean(axis=(0, 1))
        squares = (values - centre) ** 2
        errors = np.array([batch_means_error(values[..., i]) for i in range(values.shape[2])])
        moments.append((centre, squares.mean(axis=(0, 1)), errors, batch_means_error(squares.mean(axis=2))))
    (mean, variance, error, pooled), (mean_half, variance_half, error_half, pooled_half) = moments
    moves = (variance > 0) & (variance_half > 0)
    if not moves.any():
        return {}
    a, b = variance.mean(), variance_half.mean()
    shift, noise = (mean - mean_half)[moves] ** 2, (error**2 + error_half**2)[moves]
    return {
        "sd_bias": 0.5 * factor * float(np.log(a / b)),
        "sd_error": 0.5 * factor * float(np.hypot(pooled / a, pooled_half / b)),
        "mean_bias": factor * float(np.sqrt((shift / variance_half[moves]).mean())),
        "mean_error": factor * float(np.sqrt((noise / variance_half[moves]).mean())),
    }
