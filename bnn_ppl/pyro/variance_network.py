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
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.kl import register_kl

from bnn_ppl.guide_sites import Sites
from bnn_ppl.parameters import fan_in_of, output_axis
from bnn_ppl.pyro.log_uniform import ImproperLogUniform, divergence_at
from bnn_ppl.pyro.weight_guide import WeightGuide


class ZeroMeanNormal(dist.Normal):
    """N(0, sigma^2) for sigma of any sign, whose divergence from `ImproperLogUniform` has no 0 / 0 at sigma = 0."""

    def __init__(self, sigma: Tensor):
        super().__init__(torch.zeros_like(sigma), sigma.abs(), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ZeroMeanNormal":
        """The same for each entry of a batch."""
        return super().expand(batch_shape, _instance or ZeroMeanNormal.__new__(ZeroMeanNormal))


@register_kl(ZeroMeanNormal, ImproperLogUniform)
def _divergence_from_zero_mean(q: ZeroMeanNormal, p: ImproperLogUniform) -> Tensor:
    return divergence_at(p, torch.zeros_like(q.scale))


class AutoVarianceNetwork(WeightGuide):
    """Guide with zero-mean normals of trained scales, for ``pyro.infer.SVI``.

    Parameters
    ----------
    model
        Pyro model.
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
    Parameters are ``sigmas.{name}``, of any sign: sigma is the absolute value. They start uniform in
    +-1 / sqrt(fan-in), the published choice; outputs are a site's last axis, and the first where the last part of its
    name begins with ``weight``, as in torch. Predictions are averages over draws (``scheme="ensemble"`` of
    `predict`): at the mean, zero, such a network says nothing about its input.

    Examples
    --------
    >>> guide = AutoGuideList(model)
    >>> guide.append(AutoVarianceNetwork(model, sites=["w1"]))
    >>> guide.append(AutoNormal(poutine.block(model, hide=["w1"])))
    >>> svi = SVI(model, guide, Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    """

    def __init__(self, model: Callable, *, sites: Sites = None):
        super().__init__(model, sites=sites)

    def _starts(self, name: str, loc: Tensor) -> dict[str, Tensor]:
        bound = fan_in_of(tuple(loc.shape), outputs_first=output_axis(name) == 0) ** -0.5
        return {"sigma": bound * (2 * torch.rand_like(loc) - 1)}

    def _normal(self, *, sigma: Tensor) -> dist.Normal:
        return ZeroMeanNormal(sigma)
