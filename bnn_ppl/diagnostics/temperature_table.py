"""Temperatures of a finished run against what they should be, with advice in words.

A row compares the mean of T_K or T_C over the draws, as a whole or at one site, with its expectation: for T_K that of
`expected_kinetic_temperature` (symplectic Euler: T / (1 - a / 2 - s / 4)), for T_C the temperature T itself, since
there an error of the step is one of the draws. Errors are from batch means [1]_, so z = (mean - expected) / error is
about normal once the chain is much longer than its correlations.

References
----------
.. [1] Wenzel et al. (2020), How good is the Bayes posterior in deep neural networks really?.
"""

import itertools
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from bnn_ppl.diagnostics.checks import check_finite
from bnn_ppl.diagnostics.temperature import batch_means_error, expected_kinetic_temperature, temperature_band
from bnn_ppl.diagnostics.trees import group_of, setting

_KINDS = ("kinetic", "configurational")
_SIGNIFICANT = 3.0  # standard errors
_GOOD = "at its temperature"
_BAD = ("too hot", "too cold", "still moving")


def temperature_series(tree: Any, *, curvature: float = 0.0) -> xr.Dataset:
    """Temperatures of each draw, and what they should be.

    Parameters
    ----------
    tree
        From `bnn_ppl.to_arviz`, of a kernel of this library.
    curvature
        Mean curvature k of U per coordinate, where it is known, for the kinetic temperature under symplectic Euler.

    Returns
    -------
    xarray.Dataset
        `temperature` T (chain, draw); `configurational` and, for kernels with a momentum, `kinetic` and
        `expected_kinetic` (part, chain, draw), where the first part is ``"all"`` and the others are the sites; and
        `dimension` (part), the number of coordinates, NaN where it cannot be known. Where masses go by site, a site
        that the group `posterior` lacks counts as one coordinate of the whole.

    Raises
    ------
    ValueError
        If the tree lacks the statistics or settings of such a kernel.
    """
    statistics = group_of(tree, "sample_stats")
    for name in ("temperature", "step_size", "configurational_temperature"):
        if name not in statistics:
            raise ValueError(f"sample_stats has no {name!r}: give what bnn_ppl.to_arviz makes of SGHMC or SGLD")
    settings = {name: setting(value) for name, value in statistics.attrs.items()}
    parts = ["all", *(statistics["site"].values.tolist() if "site" in statistics.coords else [])]
    mass = settings.get("mass", 1.0)
    mass = {site.replace("/", "."): m for site, m in mass.items()} if isinstance(mass, Mapping) else mass
    sizes = _sizes(tree, {*parts[1:], *(mass if isinstance(mass, Mapping) else ())})
    if isinstance(mass, str):
        mass = _adapted(statistics, parts[1:], sizes)
    variables: dict[str, Any] = {"temperature": statistics["temperature"].astype(np.float64)}
    shape = dict(statistics["temperature"].sizes)
    for kind in _KINDS:
        if f"{kind}_temperature" in statistics:
            by_part = [statistics[f"{kind}_temperature"].values]
            if f"site_{kind}_temperature" in statistics:
                by_part += list(np.moveaxis(statistics[f"site_{kind}_temperature"].values, -1, 0))
            for part, values in zip(parts, by_part, strict=False):
                check_finite(f"sample_stats {kind}_temperature ({part})", values)
            by_part += [np.full(tuple(shape.values()), np.nan)] * (len(parts) - len(by_part))
            variables[kind] = (("part", *shape), np.array(by_part, np.float64))
    whole = np.nan
    if "kinetic" in variables:
        expected = _expected(statistics, settings, mass, sizes, parts, curvature)
        variables["expected_kinetic"] = (("part", *shape), expected)
        if isinstance(mass, Mapping):
            whole = sum(sizes.get(site, np.nan) for site in mass)
        elif float(statistics["kinetic_temperature"].sum()) > 0:  # r' r = M d T_K
            total = statistics["momentum_norm_sq"].sum() / statistics["kinetic_temperature"].sum()
            whole = round(float(total) / mass)
    variables["dimension"] = ("part", [float(whole), *(sizes.get(site, np.nan) for site in parts[1:])])
    return xr.Dataset(variables, {"part": parts})


def _adapted(statistics: xr.Dataset, sites: list[str], sizes: Mapping[str, float]) -> dict[str, Any]:
    """Adapted mass of each site in each draw, from r' r = M n T_K; 1 where it cannot be told.

    Without curvature it does not matter, for the friction is per unit of mass.
    """
    masses: dict[str, Any] = {} if sites else {"all": 1.0}
    for i, site in enumerate(sites):
        kinetic = statistics["site_kinetic_temperature"].values[..., i] * sizes.get(site, np.nan)
        norm_sq = statistics["site_momentum_norm_sq"].values[..., i]
        masses[site] = np.divide(norm_sq, kinetic, out=np.ones_like(norm_sq), where=kinetic > 0)
    return masses


def _sizes(tree: Any, sites: set[str]) -> dict[str, float]:
    """Coordinates of each site, as far as the group `posterior` has them."""
    try:
        posterior = group_of(tree, "posterior")
    except ValueError:
        return {}
    return {site: float(np.prod(posterior[site].shape[2:])) for site in sites if site in posterior}


def _expected(
    statistics: xr.Dataset,
    settings: Mapping[str, Any],
    mass: Any,
    sizes: Mapping[str, float],
    parts: list[str],
    curvature: float,
) -> np.ndarray:
    """Expected kinetic temperature, shape (part, chain, draw)."""
    for name in ("integrator", "friction"):
        if name not in settings:
            raise ValueError(
                f"sample_stats has no attribute {name!r}: give what bnn_ppl.to_arviz makes, which keeps the settings"
            )
    scale = settings.get("resample_scale")
    adapted = isinstance(settings.get("mass"), str)  # with the friction per unit of mass
    arguments = {
        "step_size": statistics["step_size"].values,
        "temperature": statistics["temperature"].values,
        "curvature": curvature,
        "resample_every": settings.get("resample_every"),
        # That of a schedule is not known.
        "resample_scale": scale if isinstance(scale, numbers.Real) else None,
        "steps_per_draw": settings.get("steps_per_draw", 1),
    }
    masses = mass if isinstance(mass, Mapping) else dict.fromkeys(parts, mass)
    by_site = {
        site: expected_kinetic_temperature(
            settings["integrator"], mass=m, friction=settings["friction"] * (m if adapted else 1.0), **arguments
        )
        for site, m in masses.items()
    }
    if "all" not in by_site:
        weights = [sizes.get(site, 1.0) for site in by_site]
        by_site["all"] = np.average(list(by_site.values()), axis=0, weights=weights)
    unknown = np.full(arguments["temperature"].shape, np.nan)
    return np.array([by_site.get(part, unknown) for part in parts], np.float64)


class _Comparison(NamedTuple):
    """Means over the draws with the standard error of their difference, and over each half of the draws."""

    mean: float
    expected: float
    error: float
    halves: tuple[float, float]
    change: float  # of the difference from the first half to the second, and its z-score
    change_z: float


def _z(difference: float, error: float) -> float:
    return difference / error if error > 0 else float("nan")


def _compare(series: np.ndarray, expected: np.ndarray) -> _Comparison:
    """Series and expectation, shapes (chain, draw)."""
    rest, half = series - expected, max(series.shape[1] // 2, 1)
    error, change = batch_means_error(rest), float(rest[:, -half:].mean() - rest[:, :half].mean())
    change_z = float("nan")
    if error > 0:  # against the error about a parabola, for a trend is not to hide itself
        time = np.linspace(-1.0, 1.0, rest.shape[1])
        trend = np.polynomial.Polynomial.fit(time, rest.mean(axis=0), 2)
        change_z = _z(change, 2 * batch_means_error(rest - trend(time)))
    return _Comparison(
        mean=float(series.mean()),
        expected=float(expected.mean()),
        error=error,
        halves=(float(series[:, :half].mean()), float(series[:, -half:].mean())),
        change=change,
        change_z=change_z,
    )


def temperature_table(tree: Any, *, curvature: float = 0.0, tolerance: float = 0.05, level: float = 0.99) -> Any:
    """Whether a chain is at its temperature, as a whole and by site, and what to change where it is not.

    Parameters
    ----------
    tree
        From `bnn_ppl.to_arviz`, of a kernel of this library.
    curvature
        Mean curvature k of U per coordinate, where it is known, for the kinetic temperature under symplectic Euler.
    tolerance
        Relative deviation that is good enough, at least 0.
    level
        Probability of the band `lower`, `upper` of single kinetic temperatures, between 0 and 1.

    Returns
    -------
    pandas.DataFrame
        A row for each quantity (kinetic, configurational) and part (``"all"``, sites), apart for draws at T = 0: the
        number of `draws` of a chain, `temperature` T, `expected` and `mean` value, `error` of the mean from batches,
        `z`, the band `lower` to `upper` of one draw (kinetic, where the dimension is known), and a `verdict`.

    Raises
    ------
    ValueError
        If the tree lacks the statistics or settings of such a kernel, or an argument is out of range.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance!r}")
    series = temperature_series(tree, curvature=curvature)
    cold = (series["temperature"] == 0).all("chain").values
    lower, upper = temperature_band(series["dimension"].values, level=level)
    scale = setting(group_of(tree, "sample_stats").attrs.get("resample_scale"))
    rows: list[dict[str, Any]] = []
    for draws in (np.flatnonzero(~cold), np.flatnonzero(cold)):
        verdicts: dict[tuple[str, str], str] = {}
        for kind, (i, part) in itertools.product(_KINDS, enumerate(series["part"].values.tolist())):
            if not draws.size or kind not in series or np.isnan(series[kind].values[i]).all():
                continue
            target = series["temperature"].values[:, draws]
            expected = series["expected_kinetic"].values[i][:, draws] if kind == "kinetic" else target
            found = _compare(series[kind].values[i][:, draws], expected)
            verdict = _verdict(kind, found, tolerance, verdicts.get(("kinetic", part)), scale)
            if verdict.startswith(_BAD) and verdicts.get((kind, "all")) == _GOOD:
                verdict = f"out of equilibrium while the whole is at its temperature: {verdict}"
            verdicts[kind, part] = verdict
            rows.append(
                {
                    "quantity": kind,
                    "part": part,
                    "draws": draws.size,
                    "temperature": target.mean(),
                    "expected": found.expected,
                    "mean": found.mean,
                    "error": found.error,
                    "z": _z(found.mean - found.expected, found.error),
                    "lower": found.expected * lower[i] if kind == "kinetic" else np.nan,
                    "upper": found.expected * upper[i] if kind == "kinetic" else np.nan,
                    "verdict": verdict,
                }
            )
    columns = {name: ("row", [row[name] for row in rows]) for name in rows[0]}
    return xr.Dataset(columns).to_dataframe()


def _verdict(kind: str, found: _Comparison, tolerance: float, kinetic: str | None, scale: Any) -> str:
    """A comparison in words; `kinetic` is the verdict on the momentum of the same part, None without one."""
    if found.expected == 0:
        return "T = 0, an optimiser: goes to 0 as the chain comes to rest"
    if not np.isfinite(found.expected):
        return "no expectation is known, for the kernel's masses do not name this part"
    if not np.isfinite(found.error):
        return "too few draws to tell"
    off, error = found.mean / found.expected - 1, found.error / found.expected
    if abs(found.change_z) > _SIGNIFICANT and abs(found.change) > tolerance * found.expected:
        first, second = found.halves
        return f"still moving, from {first:.3g} in the first half of the draws to {second:.3g}: warm up longer"
    if abs(off) <= max(tolerance, _SIGNIFICANT * error):
        if max(abs(off), error) <= tolerance:
            return _GOOD
        return f"cannot tell: {off:+.0%} with an error of {error:.0%}; take more draws"
    by = f"too {'hot' if off > 0 else 'cold'} by {abs(off):.0%}: "
    if kind == "configurational" and isinstance(scale, numbers.Real) and (float(scale) - found.expected) * off > 0:
        return f"{by}resample_scale={scale:g} is another temperature; leave it out to sample at the temperature"
    if off < 0 and kind == "kinetic":
        return f"{by}warm up longer; if gradient_noise_variance is set, it may be too large"
    if off < 0:
        return f"{by}the weights have not spread out yet; warm up longer, or take more or larger steps"
    if kind == "configurational" and kinetic == _GOOD:
        return f"{by}the momentum is right, so warm up longer, and if it stays try a smaller step_size"
    if kind == "configurational" and kinetic is None:
        return f"{by}lower step_size or take larger batches"
    return f"{by}lower step_size, take larger batches, or raise friction"
