"""Priors of networks, as callables of (name, shape) that the host's `random_*_module` functions take.

With s the scale of a tensor, and s = scale / sqrt(fan_in) on weights where fan-in scaling is asked for::

    normal, fan_in_normal   w ~ N(m, s^2)
    laplace                 w ~ Laplace(m, s)
    student_t               w ~ StudentT(df, m, s)
    hierarchical_normal     r ~ HalfNormal(s),  w ~ N(0, r^2)                           a site "{name}_scale"
    horseshoe               t ~ HalfCauchy(s),  l_i ~ HalfCauchy(1),  w_i ~ N(0, r_i^2)
                            r_i = c t l_i / sqrt(c^2 + t^2 l_i^2)       sites "{name}_global" and "{name}_local"

A *weight* is a parameter of two axes or more whose name's last part has no `bias` in it; its fan-in is the product of
all axes but that of the outputs, the last of a flax kernel, (..., in, out), and the first of an equinox weight,
(out, in, ...), told by names that begin with `weight`. The centre m is 0, but 1 on normalisation scales: parameters
called `scale` or `weight` of one axis. Name and shape do not tell embeddings, attention's kernels of several heads and
normalisations over several axes from other weights: give these a prior of their own by name, in a callable ``lambda
name, shape: dist.Normal() if name.endswith("embedding") else weights(name, shape)``.

Any scale may be a value that the model samples, one for the whole network. Hierarchical scales are centred; NumPyro's
``handlers.reparam`` with ``LocScaleReparam(0)`` on a weight's site takes the scale out of it.

References: Neal, Bayesian Learning for Neural Networks (1996); Fortuin et al., Bayesian Neural Network Priors Revisited
(2022); Piironen and Vehtari, Sparsity information and regularization in the horseshoe (2017).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpyro
import numpyro.distributions as dist

from bnn_ppl.parameters import center, check_fan_in, check_scale, fan_in_of, is_weight, output_axis

Prior = Callable[[str, tuple[int, ...]], Any]


def normal(scale: float = 1.0) -> Prior:
    """Isotropic normal prior: every parameter ~ N(m, scale^2).

    Parameters
    ----------
    scale
        Standard deviation, in the parameters' units.

    Returns
    -------
    callable
        Of a parameter's name and shape; it returns a distribution that broadcasts to the shape.

    Raises
    ------
    ValueError
        If the scale is not above 0.
    """
    check_scale("scale", scale)
    return partial(_normal, scale)


def fan_in_normal(gain: float = 1.0, bias_scale: float = 1.0) -> Prior:
    """Normal prior that keeps a layer's output at the size of its input: weights ~ N(0, gain^2 / fan_in).

    Parameters
    ----------
    gain
        Standard deviation of a unit's input for activations of mean square 1; sqrt(2) for ReLU networks (He et al.).
    bias_scale
        Standard deviation of everything that is no weight: biases ~ N(0, bias_scale^2), normalisation scales
        ~ N(1, bias_scale^2).

    Returns
    -------
    callable
        Of a parameter's name and shape; it returns a distribution that broadcasts to the shape.

    Raises
    ------
    ValueError
        If an argument is not above 0.
    """
    check_scale("gain", gain)
    check_scale("bias_scale", bias_scale)
    return partial(_fan_in_normal, gain, bias_scale)


def laplace(scale: float = 1.0, fan_in: bool = False) -> Prior:
    """Laplace prior: every parameter ~ Laplace(m, s), whose standard deviation is sqrt(2) s.

    Parameters
    ----------
    scale
        s, in the parameters' units.
    fan_in
        Whether s = scale / sqrt(fan_in) on weights.

    Returns
    -------
    callable
        Of a parameter's name and shape; it returns a distribution that broadcasts to the shape.

    Raises
    ------
    ValueError
        If the scale is not above 0, or fan_in no bool.
    """
    _check(scale, fan_in)
    return partial(_laplace, scale, fan_in)


def student_t(df: float = 3.0, scale: float = 1.0, fan_in: bool = False) -> Prior:
    """Student-t prior: every parameter ~ StudentT(df, m, s), of variance s^2 df / (df - 2) where df > 2.

    Parameters
    ----------
    df
        Degrees of freedom; 1 is Cauchy.
    scale
        s, in the parameters' units.
    fan_in
        Whether s = scale / sqrt(fan_in) on weights.

    Returns
    -------
    callable
        Of a parameter's name and shape; it returns a distribution that broadcasts to the shape.

    Raises
    ------
    ValueError
        If df or the scale is not above 0, or fan_in no bool.
    """
    check_scale("df", df)
    _check(scale, fan_in)
    return partial(_student_t, df, scale, fan_in)


def hierarchical_normal(scale: float = 1.0, fan_in: bool = False) -> Prior:
    """Normal prior with one learned scale for each weight tensor: r ~ HalfNormal(s), weights ~ N(0, r^2).

    Biases and normalisation scales keep N(m, scale^2): too few numbers to learn a scale from.

    Parameters
    ----------
    scale
        s, in the parameters' units.
    fan_in
        Whether s = scale / sqrt(fan_in).

    Returns
    -------
    callable
        Of a parameter's name and shape; it samples the site ``{name}_scale``, a scalar, and returns a distribution
        that broadcasts to the shape.

    Raises
    ------
    ValueError
        If the scale is not above 0, or fan_in no bool.
    """
    _check(scale, fan_in)
    return partial(_hierarchical_normal, scale, fan_in)


def horseshoe(scale: float = 1.0, slab_scale: float = 2.0, fan_in: bool = False) -> Prior:
    """Regularised horseshoe prior: most weights near 0, a few as free as N(0, c^2) lets them.

    It makes two latent numbers of each weight. Biases and normalisation scales have N(m, slab_scale^2).

    Parameters
    ----------
    scale
        s, the scale of the half-Cauchy prior of a weight tensor's global scale: the smaller, the sparser.
    slab_scale
        c, the standard deviation of weights that are not shrunk, in their units.
    fan_in
        Whether both s and c are divided by sqrt(fan_in).

    Returns
    -------
    callable
        Of a parameter's name and shape; it samples the sites ``{name}_global``, a scalar, and ``{name}_local``, of
        the parameter's shape, and returns a distribution of that shape.

    Raises
    ------
    ValueError
        If a scale is not above 0, or fan_in no bool.
    """
    check_scale("slab_scale", slab_scale)
    _check(scale, fan_in)
    return partial(_horseshoe, scale, slab_scale, fan_in)


def _check(scale: Any, fan_in: Any) -> None:
    check_scale("scale", scale)
    check_fan_in(fan_in)


def _scaled(scale: Any, fan_in: bool, name: str, shape: tuple[int, ...]) -> Any:
    if not (fan_in and is_weight(name, shape)):
        return scale
    return scale / math.sqrt(fan_in_of(shape, outputs_first=output_axis(name) == 0))


def _normal(scale: Any, name: str, shape: tuple[int, ...]) -> Any:
    return dist.Normal(center(name, shape), scale)


def _fan_in_normal(gain: Any, bias_scale: Any, name: str, shape: tuple[int, ...]) -> Any:
    if not is_weight(name, shape):
        return dist.Normal(center(name, shape), bias_scale)
    return dist.Normal(0.0, _scaled(gain, True, name, shape))


def _laplace(scale: Any, fan_in: bool, name: str, shape: tuple[int, ...]) -> Any:
    return dist.Laplace(center(name, shape), _scaled(scale, fan_in, name, shape))


def _student_t(df: Any, scale: Any, fan_in: bool, name: str, shape: tuple[int, ...]) -> Any:
    return dist.StudentT(df, center(name, shape), _scaled(scale, fan_in, name, shape))


def _hierarchical_normal(scale: Any, fan_in: bool, name: str, shape: tuple[int, ...]) -> Any:
    if not is_weight(name, shape):
        return dist.Normal(center(name, shape), scale)
    learned = numpyro.sample(f"{name}_scale", dist.HalfNormal(_scaled(scale, fan_in, name, shape)))
    return dist.Normal(0.0, learned)


def _horseshoe(scale: Any, slab_scale: Any, fan_in: bool, name: str, shape: tuple[int, ...]) -> Any:
    if not is_weight(name, shape):
        return dist.Normal(center(name, shape), slab_scale)
    overall = numpyro.sample(f"{name}_global", dist.HalfCauchy(_scaled(scale, fan_in, name, shape)))
    local = numpyro.sample(f"{name}_local", dist.HalfCauchy(1.0).expand(shape).to_event(len(shape)))
    slab = _scaled(slab_scale, fan_in, name, shape)
    free = overall * local
    return dist.Normal(0.0, free * slab / (free**2 + slab**2) ** 0.5)
