"""At which temperature a chain samples whose momentum is redrawn at another one than T.

With U = k theta^2 / 2, mass m, friction g, temperature T and a momentum redrawn from N(0, S m) after every time tau
(T the temperature, S the `resample_scale`), SGHMC in continuous time has, where the momentum is redrawn [1]_::

    k Var theta = (1 - w) T + w S,    w = k m P01^2 / (1 - P00^2),    P = exp(tau [[0, 1 / m], [-k, -g / m]])

Without friction w = 1, and then S is the temperature for every U, if tau varies. Elsewhere it lies between T and S,
and differs from curvature to curvature: such a chain is at no single temperature.

References
----------
.. [1] From the solution of linear SDEs, as in Särkkä & Solin (2019), Applied stochastic differential equations.
"""

import numbers
from typing import Any

import numpy as np
from scipy.linalg import expm

from bnn_ppl.diagnostics.checks import check_finite
from bnn_ppl.diagnostics.temperature import batch_means_error
from bnn_ppl.diagnostics.trees import group_of, setting
from bnn_ppl.schedules import check_values

_SIGNIFICANT = 3.0  # standard errors


def hidden_temperature(
    *,
    curvature: Any,
    interval: Any,
    friction: Any,
    resample_scale: Any,
    temperature: Any = 1.0,
    mass: Any = 1.0,
) -> Any:
    """Temperature of a Gaussian coordinate whose momentum is redrawn at another scale, in continuous time.

    Parameters
    ----------
    curvature
        k of U = k theta^2 / 2, above 0; a number or an array, as all arguments, which broadcast.
    interval
        tau, the time between two refreshes: `resample_every` times `step_size`. Above 0.
    friction, mass
        g, at least 0, and m, above 0, of the kernel. The norm-adjusting notes' are gamma C and alpha M.
    resample_scale
        S, variance of the redrawn momentum over the mass; beta / alpha in the notes. At least 0.
    temperature
        T, at least 0.

    Returns
    -------
    float or numpy.ndarray
        k Var theta where the momentum is redrawn. A discrete chain comes to it as its step goes to 0.

    Raises
    ------
    ValueError
        If an argument is out of range, or a coordinate without friction swings by half periods in an interval, so
        that it never forgets where it started.

    Examples
    --------
    >>> hidden_temperature(curvature=1.0, interval=1.0, friction=1.0, resample_scale=0.2, mass=5.0)  # 0.3007
    """
    given = {"curvature": curvature, "interval": interval, "friction": friction, "mass": mass}
    given |= {"resample_scale": resample_scale, "temperature": temperature}
    for name, values in given.items():
        for value in np.ravel(values):
            check_values(name, value, (), positive=name in ("curvature", "interval", "mass"))
    k, tau, g, m, S, T = np.broadcast_arrays(*(np.asarray(value, np.float64) for value in given.values()))
    rate = np.stack([np.stack([0 * k, 1 / m], axis=-1), np.stack([-k, -g / m], axis=-1)], axis=-2)
    motion = expm(tau[..., None, None] * rate)
    forgotten = 1 - motion[..., 0, 0] ** 2
    if (forgotten < 1e-12).any():
        raise ValueError(
            f"interval={interval!r} is a multiple of half a period of a coordinate without friction, which never "
            "forgets where it started: change interval, or add friction"
        )
    w = k * m * motion[..., 0, 1] ** 2 / forgotten
    return ((1 - w) * T + w * S)[()]


def describe_temperature(tree: Any) -> str:
    """At which temperature a run with momentum refresh sampled, in a sentence.

    Parameters
    ----------
    tree
        From `bnn_ppl.to_arviz`, of SGHMC with `resample_every`.

    Returns
    -------
    str
        With the mean configurational temperature of the draws, its standard error from batch means, the temperature
        T and the scale of the redrawn momentum.

    Raises
    ------
    ValueError
        If the run has no momentum refresh, or its statistics are missing or not finite.
    """
    statistics = group_of(tree, "sample_stats")
    for name in ("configurational_temperature", "temperature"):
        if name not in statistics:
            raise ValueError(f"sample_stats has no {name!r}: give what bnn_ppl.to_arviz makes of SGHMC")
    every = setting(statistics.attrs.get("resample_every"))
    if every is None:
        raise ValueError("sample_stats has no attribute 'resample_every': the run has no momentum refresh to describe")
    measured = statistics["configurational_temperature"].values
    check_finite("sample_stats configurational_temperature", measured)
    mean, error = float(measured.mean()), batch_means_error(measured)
    temperature = float(statistics["temperature"].mean())
    scale = setting(statistics.attrs.get("resample_scale"))
    spread = f" ± {error:.1g}" if np.isfinite(error) else ""
    found = f"the draws are at {mean:.3g}{spread} by their configurational temperature"
    if scale is None:
        return f"The momentum is redrawn every {every} steps at the temperature, {temperature:.3g}: {found}."
    if not isinstance(scale, numbers.Real):
        return (
            f"The momentum is redrawn every {every} steps on a schedule while the temperature is {temperature:.3g}: "
            f"{found} on average, and only those at a scale near {temperature:.3g} are at the temperature."
        )
    low, high = sorted((temperature, float(scale)))
    slack = _SIGNIFICANT * error
    between = "between the two" if low - slack <= mean <= high + slack else "not between the two, so not settled"
    if not np.isfinite(error):
        between = "with too few draws for an error"
    return (
        f"The momentum is redrawn every {every} steps at {scale:.3g} while the temperature is {temperature:.3g}: "
        f"{found}, {between}; leave resample_scale out to sample at {temperature:.3g}."
    )
