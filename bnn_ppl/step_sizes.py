"""How large a step may be: limits from the curvature, and what the noise of the gradients adds to the temperature.

With k the largest eigenvalue of M^-1/2 H M^-1/2 for the Hessian H of U, V the variance of a component of the minibatch
gradient (sum scale) averaged over coordinates, and a tolerance e for the relative error of a variance on a Gaussian::

    scheme              stable              step-size bias below e          heat of the gradient noise below e T
    euler (SGLD)        h k < 2             h k < 2 e / (1 + e)             h < 2 e T / V
    lm                  h k < 2             h k < 1/2                       h < 2 e T / V
    symplectic_euler    h^2 k < 2 (2 - a)   h^2 k < 2 (2 - a) e / (1 + e)   h < 2 e T C / V
    baoab, SGNHT        h^2 k < 4           h^2 k < 1/2                     h < 2 e T C / V   (SGNHT: absorbed)

a = h C / M. The bound 1/2 stands where a Gaussian has no bias: other targets do. The heat is that of directions that
move slowly against the friction. These follow from the schemes' stationary laws on a Gaussian, see `bnn_ppl.updates`.

The heat over T is also the ratio of the variances of the two noises in a step, that of the gradient (h^2 V) and the
injected one: h V / (2 T) for SGLD, h V / (2 C T) for SGHMC and SGNHT.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bnn_ppl.schedules import check_count, check_values, value_at
from bnn_ppl.settings import SGNHTSettings

_NO_BIAS = 0.5


@dataclass(frozen=True)
class StepSizeAdvice:
    """What `suggest_step_size` found; print it.

    Attributes
    ----------
    step_size
        The suggestion: the smallest of `limits`.
    limits
        Largest step size by what limits it: ``"stability"`` (half of the exact one), ``"bias"``, ``"gradient noise"``.
    curvature
        Largest eigenvalue of the Hessian of the potential, in coordinates in which the mass is 1.
    gradient_noise_variance
        Variance of a component of the minibatch gradient, sum scale, by site.
    temperature_at
        Temperature of slow directions at the kernel's own step size: T and the heat of the gradient noise.
    """

    step_size: float
    limits: dict[str, float]
    curvature: float
    gradient_noise_variance: dict[Any, float] = field(repr=False)
    temperature_at: float

    def __str__(self) -> str:
        """Advice in words."""
        tightest = min(self.limits, key=lambda name: self.limits[name])
        remedy = {
            "stability": "",
            "bias": "",
            "gradient noise": "; larger batches, more friction or control_variate= allow larger steps",
        }[tightest]
        limits = ", ".join(f"{name} {value:.3g}" for name, value in self.limits.items())
        return (
            f"step_size={self.step_size:.3g}, limited by {tightest}{remedy}\n"
            f"limits: {limits}\n"
            f"largest curvature {self.curvature:.4g}; at the kernel's own step size slow directions are at "
            f"T = {self.temperature_at:.3g}"
        )


def advise(
    settings: Any, curvature: float, noise: dict[Any, float], mean_noise: float, tolerance: float, mean_mass: float
) -> StepSizeAdvice:
    """Limits and suggestion for a kernel's settings.

    Parameters
    ----------
    settings
        Of the kernel, evaluated at gradient step 0.
    curvature
        k, above 0.
    noise, mean_noise
        V by site, and its mean over all coordinates.
    tolerance
        e.
    mean_mass
        Mean of M over the coordinates.

    Returns
    -------
    StepSizeAdvice
    """
    scheme = getattr(settings, "integrator", "baoab")
    friction = getattr(settings, "friction", None)
    temperature, own = float(settings.temperature_at(0)), float(value_at(settings.step_size, 0))
    share = tolerance / (1.0 + tolerance)
    if friction is None:
        stable = 2.0 / curvature
        bias = (2.0 * share if scheme == "euler" else _NO_BIAS) / curvature
    else:
        stable, bias = (_underdamped(curvature, friction / mean_mass, scheme, part) for part in (1.0, share))
    heat = 0.0 if isinstance(settings, SGNHTSettings) else heat_of_noise(vars(settings), mean_noise)
    by_noise = tolerance * temperature / heat if heat > 0 else np.inf
    limits = {"stability": 0.5 * float(stable), "bias": float(bias), "gradient noise": float(by_noise)}
    return StepSizeAdvice(min(limits.values()), limits, curvature, noise, temperature + own * heat)


def heat_of_noise(settings: Mapping[str, Any], variance: Any) -> Any:
    """Heat of gradient noise of some variance, by step size: V / 2 or V / (2 C); NaN under preconditioners."""
    if "damping" in settings or isinstance(settings.get("mass"), str):
        return np.nan * variance
    return variance / (2.0 * settings.get("friction", 1.0))


def _underdamped(curvature: float, rate: float, scheme: str, share: float) -> float:
    """Step size at which the stability (share 1) or the bias (share e / (1 + e)) of an underdamped scheme ends."""
    if scheme == "symplectic_euler":  # h^2 k + 2 share h rate = 4 share
        half = share * rate
        return float((np.sqrt(half**2 + 4.0 * share * curvature) - half) / curvature)
    return float(np.sqrt((4.0 if share == 1.0 else _NO_BIAS) / curvature))


def check_request(kernel: Any, tolerance: Any, num_batches: Any, num_iterations: Any) -> None:
    """Raise a ValueError for arguments out of range, or a kernel about which `suggest_step_size` knows nothing."""
    check_values("tolerance", tolerance, (), positive=True)
    check_count("num_iterations", num_iterations)
    check_count("num_batches", num_batches)
    if num_batches == 1:
        raise ValueError("num_batches must be at least 2, to see the noise between them, got 1")
    settings: Any = getattr(kernel, "settings", None)
    if not (hasattr(settings, "friction") or hasattr(settings, "integrator")):
        raise ValueError(f"kernel must be SGLD, SGHMC or SGNHT, got {type(kernel).__name__}")
    if kernel._model is None or kernel.model is None:
        raise ValueError("kernel must have a model and its data in memory; potential_fn and minibatches= have not")
    if isinstance(getattr(settings, "mass", None), str):
        raise ValueError(f"kernel has mass={settings.mass!r}, which is not known before the warm-up: give numbers")
