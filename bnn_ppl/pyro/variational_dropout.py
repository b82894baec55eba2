"""Variational dropout: a guide whose noise is proportional to the weight, q(w) = N(mu, alpha mu^2).

alpha is shared by a layer [1]_ or a neuron, or there is one for each weight [2]_. The additive form has N(mu, sigma^2)
with alpha = sigma^2 / mu^2: the same family as one alpha for each weight, with gradients that do not grow with alpha.
Under `ImproperLogUniform` the divergence depends on alpha alone, see `bnn_ppl.divergences`.

References
----------
.. [1] Kingma, Salimans & Welling (2015), Variational dropout and the local reparameterization trick.
.. [2] Molchanov, Ashukha & Vetrov (2017), Variational dropout sparsifies deep neural networks.
"""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.kl import register_kl

from bnn_ppl.guide_sites import PARAMETERIZATIONS, Sites, check_log_alpha, noise_shape
from bnn_ppl.pyro.initialization import init_to_prior_center
from bnn_ppl.pyro.log_uniform import ImproperLogUniform, divergence_at
from bnn_ppl.pyro.weight_guide import WeightGuide
from bnn_ppl.settings import check_choice


class DropoutNormal(dist.Normal):
    """N(mu, alpha mu^2), which knows its alpha: the divergence from `ImproperLogUniform` has no 0 / 0 at mu = 0."""

    def __init__(self, loc: Tensor, log_alpha: Tensor, validate_args: bool | None = None):
        self.log_alpha = log_alpha.expand(loc.shape)
        super().__init__(loc, loc.abs() * (0.5 * self.log_alpha).exp(), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "DropoutNormal":
        """The same for each entry of a batch."""
        new = super().expand(batch_shape, _instance or DropoutNormal.__new__(DropoutNormal))
        new.log_alpha = self.log_alpha.expand(new.batch_shape)
        return new


@register_kl(DropoutNormal, ImproperLogUniform)
def _divergence_from_dropout(q: DropoutNormal, p: ImproperLogUniform) -> Tensor:
    return divergence_at(p, 0.5 * (-q.log_alpha).exp())


class AutoVariationalDropout(WeightGuide):
    """Guide with noise proportional to the weights, for ``pyro.infer.SVI``.

    Parameters
    ----------
    model
        Pyro model, whose weights have an `ImproperLogUniform` prior for the published objective, or any other.
    parameterization
        What has an alpha of its own: each ``"weight"``, each output ``"neuron"`` of a site, each ``"layer"``, that is
        site; or ``"additive"``, q = N(mu, sigma^2) with a sigma for each weight, and alpha = sigma^2 / mu^2. Outputs
        are a site's last axis, and the first where the last part of its name begins with ``weight``, as in torch.
    sites
        Latent sites that the guide is for: names, or a callable of (name, shape); by default all. Give the others
        a guide with the host's ``AutoGuideList``.
    init_log_alpha
        log alpha where training starts; ``"additive"`` has it with the root mean square of the site's weights.
    init_loc_fn
        As for the host's guides; weights start near the prior's centre, with fan-in sized spread.

    Raises
    ------
    ValueError
        For an unknown parameterization here; and at the start of training for unknown sites, sites whose support is not
        the real numbers or that lie in a plate, and scalars that are to share an alpha.

    Notes
    -----
    Parameters are ``locs.{name}`` and ``log_alphas.{name}``, or ``log_sigmas.{name}``. ``TraceMeanField_ELBO`` takes
    the divergence summed over the weights, however many share an alpha; under other ELBOs a weight of mean exactly 0
    has no density.

    Examples
    --------
    >>> guide = AutoVariationalDropout(model, parameterization="additive", sites=["w0", "w1"])
    >>> both = AutoGuideList(model)
    >>> both.append(guide)
    >>> both.append(AutoNormal(poutine.block(model, hide=["w0", "w1"])))
    >>> svi = SVI(model, both, Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    """

    def __init__(
        self,
        model: Callable,
        *,
        parameterization: str = "weight",
        sites: Sites = None,
        init_log_alpha: float = -5.0,
        init_loc_fn: Callable = init_to_prior_center,
    ):
        check_choice("parameterization", parameterization, PARAMETERIZATIONS)
        check_log_alpha(init_log_alpha)
        super().__init__(model, sites=sites, init_loc_fn=init_loc_fn)
        self.parameterization = parameterization
        self._init_log_alpha = init_log_alpha

    def _starts(self, name: str, loc: Tensor) -> dict[str, Tensor]:
        start = loc.new_full(noise_shape(self.parameterization, name, tuple(loc.shape)), self._init_log_alpha)
        if self.parameterization == "additive":
            return {"loc": loc, "log_sigma": 0.5 * (start + loc.square().mean().log())}
        return {"loc": loc, "log_alpha": start}

    def _normal(self, *, loc: Tensor, **noise: Tensor) -> dist.Normal:
        if self.parameterization == "additive":
            return dist.Normal(loc, noise["log_sigma"].exp())
        return DropoutNormal(loc, noise["log_alpha"])

    @torch.no_grad()
    def log_alpha(self) -> dict[str, Tensor]:
        """Logarithm of alpha of each weight, in the shape of the site: above 3 a weight is mostly noise."""
        if self.parameterization == "additive":
            return {n: 2 * (q.scale.log() - q.loc.abs().log()) for n, q in self._normals().items()}
        return {n: q.log_alpha.clone() for n, q in self._normals().items()}
