r"""Target densities with known moments, for ``potential_fn=`` and for testing samplers.

Each function returns a :class:`Density`. Its target is

.. math:: p_T(x) = \exp(-U(x) / T - \log Z_T),

and its ``mean``, ``covariance`` and ``log_normalizer`` are those of that target at the given ``temperature``
:math:`T`. They are closed forms where there is one, and otherwise trapezoidal sums over an analytic integrand
that has fallen below 1e-21 of its peak at the ends of the range, accurate to rounding.

The potentials work on NumPy, JAX and torch arrays alike, can be differentiated and pickled, and keep the
dtype and device of their argument.

References
----------
- T. Chen, E. Fox, C. Guestrin, "Stochastic Gradient Hamiltonian Monte Carlo", ICML 2014 (the double well).
- R. Zhang et al., "Cyclical Stochastic Gradient MCMC for Bayesian Deep Learning", ICLR 2020 (25 Gaussians).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np

from bnn_ppl.namespaces import namespace

from .checks import check_count, check_positive

__all__ = ["Density", "banana", "double_well", "gaussian", "gaussian_grid", "quartic"]


@dataclass(frozen=True, eq=False)
class Density:
    """A target ``exp(-U(x) / temperature)`` with its exact moments.

    Attributes
    ----------
    name : str
        Name of the function that made it.
    formula : callable
        ``U`` as a function of a floating array of shape (..., dim); use :meth:`energy`, which checks.
    dim : int
        Number of coordinates of one copy.
    mean : numpy.ndarray, shape (dim,)
    covariance : numpy.ndarray, shape (dim, dim)
    log_normalizer : float
        ``log`` of the integral of ``exp(-U / temperature)``.
    temperature : float
        Temperature of the moments. It is *not* in the potential: give it to the sampler too.
    modes : numpy.ndarray, shape (number of modes, dim), or None
        Centres of the mixture's components; None where the density is no mixture.
    """

    name: str
    formula: Callable[[Any], Any]
    dim: int
    mean: np.ndarray
    covariance: np.ndarray
    log_normalizer: float
    temperature: float
    modes: np.ndarray | None = None

    @property
    def variance(self) -> np.ndarray:
        """Variance of each coordinate, shape (dim,)."""
        return np.diagonal(self.covariance)

    def potential_fn(self, z: Mapping[str, Any]) -> Any:
        """Potential energy of ``{"x": array}``, summed over all leading dimensions.

        The sum makes ``x`` of shape (1000, dim) a thousand independent copies of the target inside one
        chain: the value stays the scalar that MCMC needs, and the gradient of each copy is its own.

        Parameters
        ----------
        z
            ``{"x": x}`` with ``x`` a NumPy, JAX or torch array of shape (..., dim).

        Returns
        -------
        array, shape ()
            Sum of ``U`` over the copies, without the temperature.

        Raises
        ------
        ValueError
            If the last dimension of ``x`` is not ``dim``.
        """
        return self.energy(z["x"]).sum()

    def energy(self, x: Any) -> Any:
        """``U`` of each copy: from shape (..., dim) to shape (...).

        Raises
        ------
        ValueError
            If the last dimension of ``x`` is not ``dim``.
        """
        if not len(x.shape) or x.shape[-1] != self.dim:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but {self.name} has dim={self.dim}: give x the shape "
                f"(..., {self.dim}), for instance ({self.dim},) or (1000, {self.dim})."
            )
        return self.formula(x * 1.0)  # integers become floats; floats keep their dtype

    def log_density(self, x: Any) -> Any:
        """Exact normalised log density at ``temperature``: from shape (..., dim) to shape (...)."""
        return -self.energy(x) / self.temperature - self.log_normalizer


def gaussian(variance: Any = 1.0, *, mean: Any = 0.0, temperature: float = 1.0) -> Density:
    r"""Normal distribution, :math:`U = \tfrac12 (x - \mu)^\top \Sigma^{-1} (x - \mu)`.

    Parameters
    ----------
    variance : float or array_like, shape () or (dim,) or (dim, dim)
        One variance (then dim = 1), the variance of each coordinate, or the full covariance.
    mean : float or array_like, shape () or (dim,)
    temperature : float
        Temperature of the moments; the covariance is ``temperature`` times the one given.

    Returns
    -------
    Density

    Raises
    ------
    ValueError
        If the covariance is not symmetric positive definite, or ``mean`` does not fit it.
    """
    check_positive("temperature", temperature)
    given = np.asarray(variance, dtype=float)
    if given.ndim > 2 or (given.ndim == 2 and given.shape[0] != given.shape[1]) or given.size == 0:
        raise ValueError(f"variance has shape {given.shape}: give a number, shape (dim,) or shape (dim, dim).")
    covariance = given if given.ndim == 2 else np.diag(np.atleast_1d(given))
    dim = len(covariance)
    symmetric = np.isfinite(covariance).all() and np.allclose(covariance, covariance.T, rtol=1e-10, atol=0.0)
    if not symmetric or np.linalg.eigvalsh(covariance)[0] <= 0:
        raise ValueError(f"variance={variance!r} is not symmetric positive definite: give one that is.")
    try:
        centre = np.broadcast_to(np.asarray(mean, dtype=float), (dim,)).copy()
    except ValueError:
        raise ValueError(f"mean has shape {np.shape(mean)}: give a number or shape ({dim},).") from None
    if given.ndim == 2:
        formula = partial(_gaussian_energy, mean=centre, precision=np.linalg.inv(covariance))
    else:
        formula = partial(_diagonal_gaussian_energy, mean=centre, precision=1.0 / np.diagonal(covariance))
    log_normalizer = 0.5 * (dim * math.log(2 * math.pi * temperature) + np.linalg.slogdet(covariance)[1])
    return Density("gaussian", formula, dim, centre, temperature * covariance, float(log_normalizer), temperature)


def quartic(dim: int = 1, *, scale: float = 1.0, temperature: float = 1.0) -> Density:
    r"""Independent coordinates with :math:`U = \sum_i (x_i / s)^4 / 4`.

    The variance is :math:`2 s^2 \sqrt{T}\, \Gamma(3/4) / \Gamma(1/4)`: it grows as the root of T.

    Parameters
    ----------
    dim : int
    scale : float
        The length s.
    temperature : float
        Temperature of the moments.

    Returns
    -------
    Density

    Raises
    ------
    ValueError
        If an argument is not positive.
    """
    check_count("dim", dim)
    check_positive("scale", scale)
    check_positive("temperature", temperature)
    variance = 2 * scale**2 * math.sqrt(temperature) * math.gamma(0.75) / math.gamma(0.25)
    log_normalizer = math.log(scale * (4 * temperature) ** 0.25 * math.gamma(0.25) / 2)
    formula = partial(_quartic_energy, scale=scale)
    return _independent("quartic", formula, dim, variance, log_normalizer, temperature)


def double_well(dim: int = 1, *, height: float = 1.0, temperature: float = 1.0) -> Density:
    r"""Independent coordinates with two wells, :math:`U = \sum_i b (x_i^2 - 1)^2`.

    With height b = 1 this is, less a constant, the :math:`U = -2 x^2 + x^4` of Chen et al. (2014).

    Parameters
    ----------
    dim : int
    height : float
        The barrier b between the wells at -1 and 1.
    temperature : float
        Temperature of the moments.

    Returns
    -------
    Density

    Raises
    ------
    ValueError
        If an argument is not positive.
    """
    check_count("dim", dim)
    check_positive("height", height)
    check_positive("temperature", temperature)
    formula = partial(_double_well_energy, height=height)
    # Half the line is enough by symmetry; the range is where U / T < 50, cut at the centre.
    reach = math.sqrt(50.0 * temperature / height)
    grid = np.linspace(math.sqrt(max(0.0, 1.0 - reach)), math.sqrt(1.0 + reach), 20_001)
    variance, log_normalizer = _half_line_moments(formula, grid, temperature)
    return _independent("double_well", formula, dim, variance, log_normalizer, temperature)


def banana(
    *,
    location: float = 0.0,
    scale: float = 1.0,
    curvature: float = 1.0,
    width: float = 0.5,
    temperature: float = 1.0,
) -> Density:
    r"""Curved ridge of Rosenbrock's kind in two dimensions.

    .. math:: U = \frac{(x_1 - a)^2}{2 s^2} + \frac{(x_2 - c x_1^2)^2}{2 w^2}

    At every temperature :math:`x_1 \sim N(a, T s^2)` and :math:`x_2 | x_1 \sim N(c x_1^2, T w^2)`, so that
    all moments are closed forms. Rosenbrock's function itself has a = c = 1, s = sqrt(1/2), w = sqrt(1/200).

    Parameters
    ----------
    location, scale : float
        The centre a and spread s of the first coordinate.
    curvature : float
        The bend c; 0 gives a Gaussian.
    width : float
        The spread w across the ridge.
    temperature : float
        Temperature of the moments.

    Returns
    -------
    Density

    Raises
    ------
    ValueError
        If ``scale``, ``width`` or ``temperature`` is not positive.
    """
    for name, value in (("scale", scale), ("width", width), ("temperature", temperature)):
        check_positive(name, value)
    along, across = temperature * scale**2, temperature * width**2
    mean = np.array([location, curvature * (location**2 + along)])
    cross = 2 * curvature * location * along
    second = across + curvature**2 * (2 * along**2 + 4 * location**2 * along)
    covariance = np.array([[along, cross], [cross, second]])
    log_normalizer = math.log(2 * math.pi) + 0.5 * math.log(along * across)
    formula = partial(_banana_energy, location=location, scale=scale, curvature=curvature, width=width)
    return Density("banana", formula, 2, mean, covariance, log_normalizer, temperature)


def gaussian_grid(*, variance: float = 0.03, temperature: float = 1.0) -> Density:
    """Mixture of 25 equal Gaussians in the plane, with means (2i, 2j) for i, j in -2, ..., 2.

    ``U`` is minus the log density of the mixture, normalised. At temperature 1 the variance of each
    coordinate is ``8 + variance``.

    Parameters
    ----------
    variance : float
        Variance of each component in each coordinate.
    temperature : float
        Temperature of the moments. The target is the mixture to the power 1 / temperature, which is no
        mixture of 25 equal Gaussians unless they are well apart.

    Returns
    -------
    Density
        With ``modes`` of shape (25, 2).

    Raises
    ------
    ValueError
        If an argument is not positive.
    """
    check_positive("variance", variance)
    check_positive("temperature", temperature)
    formula = partial(_gaussian_grid_energy, variance=variance)
    # The 25 terms are products of 5 and 5, so that the coordinates are independent, at any temperature.
    # Two lengths to resolve: the width of a mode, and that of the change from one mode to the next.
    width = math.sqrt(variance * temperature)
    end = 4.0 + 10.0 * width
    count = math.ceil(end / min(width / 4, variance / 6)) + 1
    if count > 10_000_000:
        raise ValueError(
            f"variance={variance} at temperature={temperature} makes modes too narrow for the quadrature: "
            f"raise the one or the other."
        )
    second, log_normalizer = _half_line_moments(formula, np.linspace(0.0, end, count), temperature)
    axis = np.arange(-4.0, 5.0, 2.0)
    modes = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(25, 2)
    return _independent("gaussian_grid", formula, 2, second, log_normalizer, temperature, modes)


def _independent(
    name: str,
    formula: Callable[[Any], Any],
    dim: int,
    variance: float,
    log_normalizer: float,
    temperature: float,
    modes: np.ndarray | None = None,
) -> Density:
    """Density of `dim` independent centred coordinates, from the moments of one."""
    covariance = variance * np.eye(dim)
    return Density(name, formula, dim, np.zeros(dim), covariance, dim * log_normalizer, temperature, modes)


def _half_line_moments(formula: Callable[[Any], Any], grid: np.ndarray, temperature: float) -> tuple[float, float]:
    """Variance and log normaliser of an even density in one dimension, from a grid on x >= 0."""
    exponent = -formula(grid[:, None]) / temperature
    peak = exponent.max()
    weight = np.exp(exponent - peak)
    weight[[0, -1]] /= 2  # the trapezoidal rule
    total = weight.sum()
    variance = float((weight * grid**2).sum() / total)
    return variance, float(peak + np.log(2 * total * (grid[1] - grid[0])))


def _like(constant: np.ndarray, x: Any) -> Any:
    """A NumPy constant as an array of the same library, dtype and device as `x`."""
    if hasattr(x, "new_tensor"):
        return x.new_tensor(constant)
    return namespace(x).asarray(constant, dtype=x.dtype)


def _gaussian_energy(x: Any, mean: np.ndarray, precision: np.ndarray) -> Any:
    deviation = x - _like(mean, x)
    return 0.5 * ((deviation @ _like(precision, x)) * deviation).sum(-1)


def _diagonal_gaussian_energy(x: Any, mean: np.ndarray, precision: np.ndarray) -> Any:
    return 0.5 * (_like(precision, x) * (x - _like(mean, x)) ** 2).sum(-1)


def _quartic_energy(x: Any, scale: float) -> Any:
    return 0.25 * ((x / scale) ** 4).sum(-1)


def _double_well_energy(x: Any, height: float) -> Any:
    return height * ((x**2 - 1.0) ** 2).sum(-1)


def _banana_energy(x: Any, location: float, scale: float, curvature: float, width: float) -> Any:
    first, second = x[..., 0], x[..., 1]
    return 0.5 * ((first - location) / scale) ** 2 + 0.5 * ((second - curvature * first**2) / width) ** 2


def _gaussian_grid_energy(x: Any, variance: float) -> Any:
    terms = [-((x - centre) ** 2) / (2.0 * variance) for centre in (-4.0, -2.0, 0.0, 2.0, 4.0)]
    log_sum = reduce(namespace(x).logaddexp, terms)
    return (math.log(5.0 * math.sqrt(2.0 * math.pi * variance)) - log_sum).sum(-1)
