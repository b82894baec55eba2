"""Whether a chain is at its temperature: kinetic and configurational temperature, as a whole and by site [1]_.

With position theta, momentum r, mass M and d coordinates, at temperature T::

    T_K = r' M^-1 r / d          E T_K = T:  d T_K / T is chi-square with d degrees of freedom
    T_C = theta' grad U / d      E T_C = T:  no distribution is known beyond Gaussians

T_K sees the thermostat only, and can be right while theta is far from equilibrium; T_C of each site sees that. A
minibatch gradient (sum scale) at the same theta leaves T_C unbiased. Discrete chains have other expectations, exact
for U = k theta^2 / 2 and independent gradient errors of variance V, with h the step, C the friction, a = h C / M,
c = exp(-a) and s = h^2 k / M [2]_::

    integrator          E T_C                                                 E T_K, as the kernels record it
    euler (SGLD)        (T + h V / 2) / (1 - h k / 2)                         -
    symplectic_euler    T' / (1 - s / (2 (2 - a))),  T' = T + h V / (2 C)     T' / (1 - a / 2 - s / 4)
    baoab               T + (h^2 V / M) (1 + c) / ((1 - c) (4 - s))           T + 4 c^2 h^2 V / (M (1 - c^2) (4 - s))

References
----------
.. [1] Wenzel et al. (2020), How good is the Bayes posterior in deep neural networks really?
.. [2] Leimkuhler & Matthews (2013), Rational construction of stochastic numerical methods for molecular sampling.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from scipy.stats import chi2

from bnn_ppl.diagnostics.checks import check_finite
from bnn_ppl.settings import at_site, check_choice

_FEWEST_BATCHES = 8


def expected_configurational_temperature(
    integrator: str,
    *,
    step_size: Any,
    temperature: Any = 1.0,
    friction: Any = 1.0,
    mass: Any = 1.0,
    curvature: Any = 0.0,
    gradient_noise_variance: Any = 0.0,
) -> Any:
    """Expectation of theta' grad U / d for the discrete chain on a Gaussian, by the module's table.

    Parameters
    ----------
    integrator
        ``"baoab"``, ``"symplectic_euler"``, or ``"euler"`` for SGLD, which takes no friction and mass.
    step_size, temperature, friction, mass
        Of the kernel; numbers, or arrays that broadcast.
    curvature
        k of U = k theta^2 / 2, a number or an array. At 0, the limit of small steps, there is no error of the step.
    gradient_noise_variance
        V, of one component of the minibatch gradient (sum scale), as far as the kernel does not compensate for it.

    Returns
    -------
    float or numpy.ndarray

    Raises
    ------
    ValueError
        If the integrator is unknown, or unstable with these numbers.
    """
    h, T, C, M, k, V = _as_numbers(step_size, temperature, friction, mass, curvature, gradient_noise_variance)
    _check_stable(integrator, h, C, M, k)
    s, c = h**2 * k / M, np.exp(-h * C / M)
    if integrator == "euler":
        return (T + 0.5 * h * V) / (1 - 0.5 * h * k)
    if integrator == "symplectic_euler":
        return (T + 0.5 * h * V / C) / (1 - s / (2 * (2 - h * C / M)))
    return T + h**2 * V / M * (1 + c) / ((1 - c) * (4 - s))


def expected_kinetic_temperature(
    integrator: str,
    *,
    step_size: Any,
    temperature: Any = 1.0,
    friction: Any = 1.0,
    mass: Any = 1.0,
    curvature: Any = 0.0,
    gradient_noise_variance: Any = 0.0,
    resample_every: int | None = None,
    resample_scale: Any = None,
    steps_per_draw: int = 1,
) -> Any:
    """Expectation of r' M^-1 r / d at the draws of the discrete chain on a Gaussian, by the module's table.

    Parameters
    ----------
    integrator
        ``"baoab"`` or ``"symplectic_euler"``.
    step_size, temperature, friction, mass
        Of the kernel; numbers, or arrays that broadcast.
    curvature
        k of U = k theta^2 / 2, a number or an array. At 0, the limit of small steps, symplectic Euler still has
        T / (1 - a / 2).
    gradient_noise_variance
        V, of one component of the minibatch gradient (sum scale), as far as the kernel does not compensate for it.
    resample_every, resample_scale, steps_per_draw
        Of the kernel: the momentum goes from a refresh at the scale (by default T) to the table's value by the factor
        c^2, or (1 - a)^2, a step; exact at curvature 0. The result is the mean over the draws.

    Returns
    -------
    float or numpy.ndarray

    Raises
    ------
    ValueError
        If the integrator is unknown or has no momentum, or is unstable with these numbers.
    """
    check_choice("integrator", integrator, ("baoab", "symplectic_euler"))
    h, T, C, M, k, V = _as_numbers(step_size, temperature, friction, mass, curvature, gradient_noise_variance)
    _check_stable(integrator, h, C, M, k)
    a, s = h * C / M, h**2 * k / M
    if integrator == "baoab":
        decay = np.exp(-a)
        settled = T + 4 * decay**2 * h**2 * V / (M * (1 - decay**2) * (4 - s))
    else:
        decay = 1 - a
        settled = (T + 0.5 * h * V / C) / (1 - 0.5 * a - 0.25 * s)
    if resample_every is None:
        return settled
    # Steps from the last refresh to each draw; the draws go through all the remainders that there are.
    since = {(draw * steps_per_draw - 1) % resample_every + 1 for draw in range(1, resample_every + 1)}
    scale = T if resample_scale is None else np.asarray(resample_scale, np.float64)
    return settled + np.mean([decay ** (2 * steps) for steps in sorted(since)], axis=0) * (scale - settled)


def _as_numbers(*values: Any) -> tuple[Any, ...]:
    return tuple(np.asarray(value, np.float64)[()] for value in values)


def _check_stable(integrator: str, h: Any, C: Any, M: Any, k: Any) -> None:
    check_choice("integrator", integrator, ("baoab", "symplectic_euler", "euler"))
    a, s = h * C / M, h**2 * k / M
    stable = {
        "euler": h * k < 2,
        "symplectic_euler": (a > 0) & (a < 2) & (s < 2 * (2 - a)),
        "baoab": s < 4,
    }[integrator]
    if not np.all(stable):
        raise ValueError(
            f"integrator={integrator!r} is unstable with step_size={np.max(h):.4g} at friction={np.max(C):.4g}, "
            f"mass={np.min(M):.4g} and curvature={np.max(k):.4g}: no expectation exists; lower the step_size"
        )


def temperature_band(dimension: Any, *, level: float = 0.99) -> tuple[Any, Any]:
    """Central interval of T_K / E T_K of one draw: quantiles of chi-square over its degrees of freedom.

    Parameters
    ----------
    dimension
        d, the number of coordinates; a number or an array.
    level
        Probability of the interval, between 0 and 1.

    Returns
    -------
    tuple
        Lower and upper factor: for d = 1000 and 0.99 they are 0.88856 and 1.11895.

    Raises
    ------
    ValueError
        If `level` is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level!r}")
    return chi2.ppf(0.5 - 0.5 * level, dimension) / dimension, chi2.ppf(0.5 + 0.5 * level, dimension) / dimension


def batch_means_error(values: Any) -> float:
    """Standard error of the mean of correlated draws, from the means of batches of them.

    With b batches, their variance v and their correlation rho with the next one, where that is positive::

        error = sqrt(v / b (1 + rho) / (1 - rho))

    Parameters
    ----------
    values
        Shape (chain, draw). Each chain is cut into batches of floor(sqrt(draws)) draws, and a rest at the start is
        left out; batches of all chains are taken together, so that chains that differ count.

    Returns
    -------
    float
        NaN for fewer than 8 batches, which about 50 draws of one chain have, or 4 of each of four.

    Raises
    ------
    ValueError
        If the shape does not fit, or values are not finite.
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 2:
        raise ValueError(f"values must have the shape (chain, draw), got {x.shape}")
    check_finite("values", x)
    length = max(int(np.sqrt(x.shape[1])), 1)
    count = x.shape[1] // length
    means = x[:, x.shape[1] - count * length :].reshape(len(x), count, length).mean(axis=2)
    if means.size < _FEWEST_BATCHES:
        return float("nan")
    rest = means - means.mean()
    square = (rest**2).sum()
    if square == 0:
        return 0.0
    rho = max((rest[:, 1:] * rest[:, :-1]).sum() / square, 0.0)
    return float(np.sqrt(square / (means.size - 1) / means.size * (1 + rho) / (1 - rho)))


def site_temperatures(
    position: Mapping[str, Any],
    gradient: Mapping[str, Any],
    momentum: Mapping[str, Any] | None = None,
    mass: float | Mapping[str, float] = 1.0,
    origin: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Temperatures of recorded chains, of each site and of the whole.

    Parameters
    ----------
    position, gradient, momentum
        By site, shapes (chain, draw, ...): unconstrained values, the gradient of U there (sum scale, also of a
        minibatch), and the momentum, None for kernels without one.
    mass
        M, a number or a dict by site.
    origin
        By site, shapes (...): from where positions are counted, by default 0. E T_C = T for any fixed one, with the
        less noise the nearer it is to the middle of the draws; take it from other draws than these.

    Returns
    -------
    xarray.Dataset
        `configurational_temperature` and `kinetic_temperature`, shapes (chain, draw), and by site
        `site_configurational_temperature` and `site_kinetic_temperature`, shapes (chain, draw, site): the names that
        they have in `sample_stats`.

    Raises
    ------
    ValueError
        If sites or shapes differ, or values are not finite.
    """
    # A product of two arrays over M and summed over all coordinates but chain and draw.
    moved = position if origin is None else {site: z - np.asarray(origin[site]) for site, z in position.items()}
    products: dict[str, Any] = {"configurational": (moved, gradient, 1.0)}
    if momentum is not None:
        products["kinetic"] = (momentum, momentum, mass)
    variables: dict[str, Any] = {}
    for kind, (left, right, over) in products.items():
        sums, means, size = [], [], 0
        for site in position:
            if not set(left) == set(right) == set(position):
                raise ValueError(f"give {kind} arrays for the same sites, got {sorted(left)} and {sorted(right)}")
            a, b = np.asarray(left[site], np.float64), np.asarray(right[site], np.float64)
            if a.shape != b.shape or a.ndim < 2 or a.shape != np.shape(position[site]):
                raise ValueError(f"site {site!r} must have one shape (chain, draw, ...), got {a.shape} and {b.shape}")
            check_finite(f"site {site!r}", a)
            check_finite(f"site {site!r}", b)
            product = (a * b).reshape(*a.shape[:2], -1) / at_site(over, site)
            means.append(product.mean(axis=-1))
            sums.append(product.sum(axis=-1))
            size += product.shape[-1]
        variables[f"{kind}_temperature"] = ("chain", "draw"), np.sum(sums, axis=0) / size
        variables[f"site_{kind}_temperature"] = ("chain", "draw", "site"), np.stack(means, axis=-1)
    return xr.Dataset(variables, {"site": list(position)})
