"""Variance networks: a guide whose weights have mean zero, q(w) = N(0, sigma^2), and know by their scales alone [1]_.

It is what variational dropout becomes as alpha grows: for D weights that share an alpha, the total variation between
N(mu, alpha mu^2) and N(0, alpha mu^2) is erf(sqrt(D / (8 alpha))), and the divergence D / (2 alpha). Under
`ImproperLogUniform` the divergence from the prior is constant, 0.

References
----------
.. [1] Neklyudov, Molchanov, Ashukha & Vetrov (2018), Variance networks: when expectation does not meet your
   expectations.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, random
from numpyro.distributions.kl import kl_divergence

from bnn_ppl.guide_sites import Sites
from bnn_ppl.numpyro.log_uniform import ImproperLogUniform, divergence_at
from bnn_ppl.numpyro.weight_guide import WeightGuide
from bnn_ppl.parameters import fan_in_of, output_axis


class ZeroMeanNormal(dist.Normal):
    """N(0, sigma^2) for sigma of any sign, whose divergence from `ImproperLogUniform` has no 0 / 0 at sigma = 0."""

    def __init__(self, sigma: Array):
        super().__init__(jnp.zeros_like(sigma), jnp.abs(sigma), validate_args=False)


@kl_divergence.register(ZeroMeanNormal, ImproperLogUniform)
def _divergence_from_zero_mean(q: ZeroMeanNormal, p: ImproperLogUniform) -> Array:
    return divergence_at(p, jnp.zeros_like(q.scale))


class AutoVarianceNetwork(WeightGuide):
    """Guide with zero-mean normals of trained scales, for ``numpyro.infer.SVI``.

    Parameters
    ----------
    model
        NumPyro model.
    sites
        Latent sites that the guide is for: names, or a callable of (name, shape); by default all. Give the others,
        biases say, a guide with the host's ``AutoGuideList``.

    Raises
    ------
    ValueError
        At the start of training, for unknown sites, and sites whose support is not the real numbers or that lie in a
        plate.

    Notes
    -----
    Parameters are ``{name}_auto_sigma``, of any sign: sigma is the absolute value. They start uniform in
    +-1 / sqrt(fan-in), the published choice; outputs are a site's last axis, and the first where the last part of its
    name begins with ``weight``, as in torch. Predictions are averages over draws (``scheme="ensemble"`` of
    `predict`): at the mean, zero, such a network says nothing about its input.

    Examples
    --------
    >>> guide = AutoGuideList(model)
    >>> guide.append(AutoVarianceNetwork(model, sites=["w1"]))
    >>> guide.append(AutoNormal(handlers.block(model, hide=["w1"])))
    >>> SVI(model, guide, optax.adam(1e-3), TraceMeanField_ELBO()).run(random.key(0), 10_000, x, y)
    """

    def __init__(self, model: Callable, *, sites: Sites = None):
        super().__init__(model, sites=sites)

    def _starts(self, name: str, loc: Array) -> dict[str, Callable]:
        bound = fan_in_of(loc.shape, outputs_first=output_axis(name) == 0) ** -0.5
        return {"sigma": lambda key: random.uniform(key, loc.shape, loc.dtype, -bound, bound)}

    def _normal(self, *, sigma: Array) -> dist.Normal:
        return ZeroMeanNormal(sigma)
