"""Norms of position and momentum over a run, and whether they move as the Fokker-Planck equation says [1]_.

With position theta, momentum r, mass m, friction g, temperature T and d coordinates, SGHMC has::

    d/dt E theta'theta = 2 E theta'r / m
    d/dt E theta'r     = E r'r / m - E theta'grad U - g E theta'r / m
    d/dt E r'r         = -2 E r'grad U - 2 g E r'r / m + 2 T g d

and at stationarity E theta'r = E r'grad U = 0, E theta'grad U = d T and E r'r = m d T. All hold in expectation only:
a chain strays from them by noise of the order sqrt(d).

A kernel records its momentum r just before the kick by -h g~, h the step and g~ the gradient at theta, so that r lags
behind theta: on a Gaussian BAOAB has E theta'r = h T d / 2 and E r'grad U = h E |grad U|^2 / 2 there [2]_. The
moments are therefore taken at the time of theta. BAOAB's are the means of those before and after the kick, those of
symplectic Euler belong to the mean of the momenta of two steps, with a = h g / m and b = 1 - a / 2::

                  theta'r                      r'r                                                r'grad U
    baoab         theta'r - h theta'g~ / 2     r'r - h r'g~ + h^2 g~'g~ / 2                       r'g~ - h g~'g~ / 2
    symplectic    b theta'r - h theta'g~ / 2   b^2 r'r - h b r'g~ + h^2 g~'g~ / 4 + h g T d / 2   b r'g~ - h g~'g~ / 2

With exact gradients of a Gaussian they are exactly 0, m d T and 0 at stationarity, whatever the step; elsewhere they
and the equations are off by O(h^2). Independent errors of the minibatch gradient, of covariance V, heat r'r by h tr(V)
a unit of time: that is in the right-hand side already, for r'grad U has the mean -h tr(V) / 2 with them.

References
----------
.. [1] Risken (1989), The Fokker-Planck equation: methods of solution and applications.
.. [2] Leimkuhler & Matthews (2013), Rational construction of stochastic numerical methods for molecular sampling.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from bnn_ppl.diagnostics.checks import check_finite
from bnn_ppl.diagnostics.temperature import batch_means_error
from bnn_ppl.diagnostics.trees import group_of, setting
from bnn_ppl.settings import INTEGRATORS, SGHMCSettings, check_choice

MOMENTS = ("position_norm_sq", "position_momentum", "momentum_norm_sq")
STATIONARY = ("position_momentum", "position_gradient", "momentum_norm_sq", "momentum_gradient")


def weight_norm(
    tree: Any,
    *,
    friction: float | None = None,
    mass: float | Mapping[str, float] | None = None,
    integrator: str | None = None,
    steps_per_draw: int | None = None,
) -> xr.Dataset:
    """Norms of position and momentum, their equations of motion, and their values at stationarity.

    Parameters
    ----------
    tree
        From `bnn_ppl.to_arviz`, of SGHMC, or its group `sample_stats`.
    friction, mass, integrator, steps_per_draw
        Of the kernel; by default from the attributes of `sample_stats`. Masses are a number, or a dict by site.

    Returns
    -------
    xarray.Dataset
        For each `part`, ``"all"`` and the sites: the moments (`moment`: ``"position_norm_sq"``,
        ``"position_momentum"``, ``"momentum_norm_sq"``) and the means at stationarity (`statistic`: the last two,
        ``"position_gradient"`` and ``"momentum_gradient"``), all at the time of theta.

        - `dimension` (part) and `time` (draw), in units of the SDE, from the first draw on;
        - `moments` and `rates`, the right-hand sides, (part, moment, chain, draw);
        - `measured_rate`, the change over the interval from a draw to the next by its time, and `predicted_rate`, the
          mean of the right-hand sides at both ends, means over chains; `rate_error`, the standard error over chains
          of their difference, NaN for one chain; (part, moment, interval);
        - `balance`, the mean of measured minus predicted rate over all chains and intervals, `balance_error`, from
          batch means, and `balance_z`; (part, moment);
        - `mean` over all draws, `expected` at stationarity, `mean_error` from batch means, `mean_z`; (part, statistic).

        Intervals with a momentum refresh or a diverging draw have NaN rates and are left out of the balance.

    Raises
    ------
    ValueError
        If a statistic or a setting is missing, values are not finite, or draws do not fall at equal steps.

    Notes
    -----
    Draws must be near one another, for the trapezoid over an interval is off by its square: take `steps_per_draw`
    small beside a period of the motion. Gradient steps are counted from the start of the run; after a resume give
    draws without momentum refresh.

    Examples
    --------
    >>> found = weight_norm(bnn_ppl.to_arviz(mcmc))
    >>> found["balance_z"].sel(part="all")
    """
    statistics = tree if isinstance(tree, xr.Dataset) else group_of(tree, "sample_stats")
    run = _read(statistics, friction, mass, integrator, steps_per_draw)
    moments, rates, means, expected = _right_hand_sides(run)
    spacing = run.steps_between * run.step_size[:, 1:]
    measured = np.diff(moments, axis=-1) / spacing
    predicted = 0.5 * (rates[..., :-1] + rates[..., 1:])
    measured[..., ~run.undisturbed] = np.nan
    rest = measured - predicted
    chains = len(spacing)
    spread = rest.std(axis=2, ddof=1) / chains**0.5 if chains > 1 else np.full_like(rest[:, :, 0], np.nan)
    balance, balance_error = _means(rest[..., run.undisturbed])
    mean, mean_error = _means(means - expected)
    level = expected.mean(axis=(-2, -1))
    variables: dict[str, Any] = {
        "dimension": ("part", run.dimension),
        "time": ("draw", np.concatenate([[0.0], np.cumsum(spacing[0])])),
        "moments": (("part", "moment", "chain", "draw"), moments),
        "rates": (("part", "moment", "chain", "draw"), rates),
        "measured_rate": (("part", "moment", "interval"), measured.mean(axis=2)),
        "predicted_rate": (("part", "moment", "interval"), predicted.mean(axis=2)),
        "rate_error": (("part", "moment", "interval"), spread),
        "balance": (("part", "moment"), balance),
        "balance_error": (("part", "moment"), balance_error),
        "balance_z": (("part", "moment"), _over(balance, balance_error)),
        "mean": (("part", "statistic"), mean + level),
        "expected": (("part", "statistic"), level),
        "mean_error": (("part", "statistic"), mean_error),
        "mean_z": (("part", "statistic"), _over(mean, mean_error)),
    }
    return xr.Dataset(variables, {"part": run.parts, "moment": list(MOMENTS), "statistic": list(STATIONARY)})


class _Run(NamedTuple):
    """What is read of a run; statistics have the shape (part, chain, draw), `step_size` (chain, draw)."""

    parts: list[str]
    friction: float
    mass: np.ndarray  # (part, 1, 1); NaN for the whole where masses go by site
    integrator: str
    dimension: np.ndarray  # (part,)
    step_size: np.ndarray
    temperature: np.ndarray
    steps_between: int  # gradient steps from a draw to the next
    undisturbed: np.ndarray  # (interval,)
    by_part: dict[str, np.ndarray]

    def whole(self, rows: np.ndarray) -> np.ndarray:
        """Rows (part, chain, draw) in which the whole is the sum of its sites where masses go by site."""
        if np.isnan(self.mass[0]).any():
            rows[0] = rows[1:].sum(axis=0)
        return rows


def _read(statistics: xr.Dataset, friction: Any, mass: Any, integrator: Any, steps_per_draw: Any) -> _Run:
    names = ("position_norm_sq", "position_momentum", "momentum_norm_sq", "momentum_gradient")
    for name in (*names, "configurational_temperature", "kinetic_temperature", "gradient_norm", "step_size"):
        if name not in statistics:
            raise ValueError(f"sample_stats has no {name!r}: give what bnn_ppl.to_arviz makes of SGHMC")
    settings = {name: setting(value) for name, value in statistics.attrs.items()}
    if settings.get("kernel") == "SGNHT":
        raise ValueError("the friction of SGNHT's thermostat changes at each step: give a run of SGHMC")
    if "Cyclical" in str(settings.get("step_size")):
        raise ValueError("step_size=Cyclical takes draws at unequal steps: give a run with another step_size")
    given = {"friction": friction, "mass": mass, "integrator": integrator, "steps_per_draw": steps_per_draw}
    settings |= {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in settings:
            raise ValueError(f"sample_stats has no attribute {name!r}: give {name}= of the kernel")
    check_choice("integrator", settings["integrator"], INTEGRATORS)
    parts = ["all", *(statistics["site"].values.tolist() if "site_position_norm_sq" in statistics else [])]
    others = ("kinetic_temperature", "configurational_temperature", "gradient_norm")
    by_part = {name: _rows(statistics, name, parts) for name in (*names, *others)}
    masses = _masses(settings["mass"], parts)
    with np.errstate(invalid="ignore", divide="ignore"):
        norms, kinetic = (by_part[name].sum(axis=(1, 2)) for name in ("momentum_norm_sq", "kinetic_temperature"))
        dimension = np.round(norms / (masses[:, 0, 0] * kinetic))
    if np.isnan(masses[0]).any():
        dimension[0] = dimension[1:].sum()
    if not np.isfinite(dimension).all():
        raise ValueError("kinetic_temperature is 0 in all draws: there is no motion to follow; give a run with T > 0")
    by_part["position_gradient"] = dimension[:, None, None] * by_part.pop("configurational_temperature")
    steps_between = int(settings["steps_per_draw"]) * int(settings.get("thinning", 1))
    return _Run(
        parts=parts,
        friction=float(settings["friction"]),
        mass=masses,
        integrator=settings["integrator"],
        dimension=dimension,
        step_size=np.asarray(statistics["step_size"].values, np.float64),
        temperature=np.asarray(statistics["temperature"].values, np.float64),
        steps_between=steps_between,
        undisturbed=_undisturbed(statistics, settings, steps_between),
        by_part=by_part,
    )


def _rows(statistics: xr.Dataset, name: str, parts: list[str]) -> np.ndarray:
    """Values of the whole and of each site, shape (part, chain, draw)."""
    rows = statistics[name].values[None]
    if len(parts) > 1:
        if f"site_{name}" not in statistics:
            raise ValueError(f"sample_stats has no 'site_{name}': give what bnn_ppl.to_arviz makes of SGHMC")
        rows = np.concatenate([rows, np.moveaxis(statistics[f"site_{name}"].values, -1, 0)])
    check_finite(f"sample_stats {name}", rows)
    return np.asarray(rows, np.float64)


def _masses(mass: Any, parts: list[str]) -> np.ndarray:
    """Masses, shape (part, 1, 1)."""
    if isinstance(mass, str):
        raise ValueError(f"mass={mass!r} changes over the run: the equations need masses that are fixed")
    if not isinstance(mass, Mapping):
        return np.full((len(parts), 1, 1), float(mass))
    by_site = {site.replace("/", "."): float(m) for site, m in mass.items()}
    if sorted(by_site) != sorted(parts[1:]):
        raise ValueError(
            f"mass names the sites {sorted(by_site)} and sample_stats has {sorted(parts[1:])}: give each one"
        )
    return np.array([np.nan, *(by_site[site] for site in parts[1:])])[:, None, None]


def _undisturbed(statistics: xr.Dataset, settings: Mapping[str, Any], steps_between: int) -> np.ndarray:
    """Whether the momentum is never redrawn between a draw and the next, shape (interval,)."""
    intervals = statistics.sizes["draw"] - 1
    free = np.ones(intervals, bool)
    if "diverging" in statistics:
        free &= ~statistics["diverging"].values[:, 1:].any(axis=0)
    if settings.get("resample_every") is not None:
        refresh = SGHMCSettings(
            step_size=1.0,
            resample_every=int(settings["resample_every"]),
            resample_jitter=bool(settings.get("resample_jitter", False)),
        )
        first = int(settings.get("num_warmup", 0)) * int(settings["steps_per_draw"]) + steps_between
        due = refresh.refresh_is_due(first + np.arange(intervals * steps_between))
        free &= ~np.reshape(due, (intervals, steps_between)).any(axis=1)
    return free


def _right_hand_sides(run: _Run) -> tuple[np.ndarray, ...]:
    """Moments and rates (part, moment, chain, draw); means and their expectations (part, statistic, chain, draw)."""
    h, g, T, m = run.step_size, run.friction, run.temperature, run.mass
    virial, norm = run.by_part["position_gradient"], run.by_part["momentum_norm_sq"]
    along, uphill = run.by_part["position_momentum"], run.by_part["momentum_gradient"]
    slope_sq = run.by_part["gradient_norm"] ** 2
    dT = run.dimension[:, None, None] * T
    if run.integrator == "baoab":
        b, share, heat = np.ones_like(m), 0.5, 0.0 * dT
    else:
        b, share, heat = 1 - 0.5 * h * g / m, 0.25, 0.5 * h * g * dT
    along = run.whole(b * along) - 0.5 * h * virial
    norm = run.whole(b**2 * norm - h * b * uphill + share * h**2 * slope_sq + heat)
    uphill = run.whole(b * uphill) - 0.5 * h * slope_sq
    along_over_m, norm_over_m = run.whole(along / m), run.whole(norm / m)
    rates = (
        2 * along_over_m,
        norm_over_m - virial - g * along_over_m,
        -2 * uphill - 2 * g * norm_over_m + 2 * g * dT,
    )
    moments = (run.by_part["position_norm_sq"], along, norm)
    expected = (0 * dT, dT, run.whole(m * dT), 0 * dT)
    return tuple(np.stack(parts, axis=1) for parts in (moments, rates, (along, virial, norm, uphill), expected))


def _means(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over chains and draws, and their errors from batch means; NaN where values are unknown or none."""
    mean, error = np.full((2, *values.shape[:2]), np.nan)
    for index in np.ndindex(*values.shape[:2]):
        if values[index].size and np.isfinite(values[index]).all():
            mean[index], error[index] = values[index].mean(), batch_means_error(values[index])
    return mean, error


def _over(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    return np.divide(value, error, out=np.full_like(value, np.nan), where=error > 0)
