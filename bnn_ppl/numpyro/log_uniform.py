"""The log-uniform prior p(w) ~ 1 / |w| of variational dropout, and its divergence from a normal, see `divergences`."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, random
from numpyro.distributions import constraints
from numpyro.distributions.kl import kl_divergence
from numpyro.distributions.util import validate_sample

from bnn_ppl import divergences
from bnn_ppl.settings import check_choice


@jax.custom_jvp
def exact_divergence(u: Array) -> Array:
    """The exact divergence at u = mu^2 / (2 sigma^2), whose derivative is accurate to rounding too."""
    return divergences.exact(u)


@exact_divergence.defjvp
def _exact_jvp(primals: tuple, tangents: tuple) -> tuple:
    (u,), (du,) = primals, tangents
    return exact_divergence(u), divergences.exact_slope(u) * du


_DIVERGENCES: dict[str, Callable] = {
    "exact": exact_divergence,
    "sigmoid": divergences.sigmoid,
    "cubic": divergences.cubic,
    "ard": divergences.ard,
}


class ImproperLogUniform(dist.Distribution):
    r"""Improper prior with the density 1 / \|w\|, under which the scale of a weight is a priori unknown.

    **It does not normalise, and with usual likelihoods neither does the posterior**: what variational dropout minimises
    is no ELBO of a proper posterior (Hron et al. 2018). Its values may be compared between guides, not between priors.

    Parameters
    ----------
    kl
        The divergence from a `Normal` that ``TraceMeanField_ELBO`` takes: ``"exact"``; ``"sigmoid"`` (Molchanov et al.
        2017) and ``"cubic"`` (Kingma et al. 2015, for alpha up to 1; a larger alpha counts as 1) are fits of the
        literature; ``"ard"`` is that from a normal prior whose variance is chosen for each weight. All but the cubic
        are 0 for weights of mean 0.

    Raises
    ------
    ValueError
        If `kl` is none of the four.

    Notes
    -----
    `log_prob` is -log |w|, infinite at 0, whatever `kl` is. `sample` draws from the density cut to 0.001 <= |w| <= 1,
    only so that the hosts, which run a model to see its shapes, can do so. The exact divergence from a normal is
    E[log q(w) - log p(w)] + (1 + gamma + log(4 pi)) / 2, with Euler's gamma, so that an ELBO from `log_prob`, as the
    `elbo` of ``to_arviz``, is 2.0541 a weight above that of ``TraceMeanField_ELBO``.

    References
    ----------
    Kingma, Salimans & Welling (2015), Variational dropout and the local reparameterization trick; Hron, Matthews &
    Ghahramani (2018), Variational Bayesian dropout: pitfalls and fixes.

    Examples
    --------
    >>> numpyro.sample("w", ImproperLogUniform().expand([784, 100]).to_event(2))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real
    pytree_aux_fields = ("kl",)

    def __init__(self, kl: str = "exact", *, validate_args: bool | None = None):
        check_choice("kl", kl, divergences.KINDS)
        self.kl = kl
        super().__init__((), (), validate_args=validate_args)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws from the density between 0.001 and 1, of both signs."""
        key_size, key_sign = random.split(key)
        shape = (*sample_shape, *self.batch_shape)
        size = jnp.exp(random.uniform(key_size, shape, minval=math.log(1e-3), maxval=0.0))
        return jnp.where(random.bernoulli(key_sign, shape=shape), size, -size)

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        """Log density, without a constant."""
        return -jnp.log(jnp.abs(value))


def divergence_at(p: ImproperLogUniform, u: Array) -> Array:
    """The divergence that a prior has chosen, at u = 1 / (2 alpha)."""
    return _DIVERGENCES[p.kl](u)


@kl_divergence.register(dist.Normal, ImproperLogUniform)
def _divergence_from_normal(q: dist.Normal, p: ImproperLogUniform) -> Array:
    return divergence_at(p, 0.5 * jnp.square(q.loc / q.scale))
