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
from operator import attrgetter
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroModule, PyroParam
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.kl import register_kl

from bnn_ppl.dropout_sites import (
    PARAMETERIZATIONS,
    Sites,
    check_found,
    check_log_alpha,
    check_outside,
    check_real,
    check_sites,
    chooser,
    noise_shape,
)
from bnn_ppl.pyro.initialization import init_to_prior_center
from bnn_ppl.pyro.log_uniform import ImproperLogUniform, divergence_at
from bnn_ppl.settings import check_choice


class DropoutNormal(dist.Normal):
    """N(mu, alpha mu^2), which knows its alpha: the divergence from `ImproperLogUniform` has no 0 / 0 at mu = 0."""

    def __init__(self, loc: Tensor, log_alpha: Tensor, validate_args: bool | None = None):
        self.log_alpha = log_alpha.expand(loc.shape)
        super().__init__(loc, loc.abs() * (0.5 * self.log_alpha).exp(), validate_args=False)


@register_kl(DropoutNormal, ImproperLogUniform)
def _divergence_from_dropout(q: DropoutNormal, p: ImproperLogUniform) -> Tensor:
    return divergence_at(p, 0.5 * (-q.log_alpha).exp())


class AutoVariationalDropout(AutoGuide):
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
        started = InitMessenger(init_loc_fn)(model)
        super().__init__(poutine.block(started, hide_fn=self._is_left_out))
        self.parameterization = parameterization
        self.sites = check_sites(sites)
        self._init_log_alpha = init_log_alpha
        self._chosen = chooser(self.sites)
        self._latent: set[str] = set()

    def _is_left_out(self, site: dict) -> bool:
        if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
            return False
        self._latent.add(site["name"])
        return not self._chosen(site["name"], tuple(site["fn"].shape()))

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        found = dict(self.prototype_trace.iter_stochastic_nodes())
        check_found(self.sites, found, self._latent)
        self._event_dims = {name: site["fn"].event_dim for name, site in found.items()}
        self.locs, noises = PyroModule(), PyroModule()
        for name, site in found.items():
            support = site["fn"].support
            base = support.base_constraint if isinstance(support, constraints.independent) else support
            check_real(name, base is constraints.real, support)
            check_outside(name, [frame.name for frame in site["cond_indep_stack"]])
            loc = site["value"].detach()
            start = loc.new_full(noise_shape(self.parameterization, name, tuple(loc.shape)), self._init_log_alpha)
            if self.parameterization == "additive":
                start = 0.5 * (start + loc.square().mean().log())
            deep_setattr(self.locs, name, PyroParam(loc.clone()))
            deep_setattr(noises, name, PyroParam(start))
        setattr(self, "log_sigmas" if self.parameterization == "additive" else "log_alphas", noises)

    def _normal(self, name: str) -> dist.Normal:
        loc = attrgetter(name)(self.locs)
        if self.parameterization == "additive":
            return dist.Normal(loc, attrgetter(name)(self.log_sigmas).exp())
        return DropoutNormal(loc, attrgetter(name)(self.log_alphas))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the sites; the host calls this."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return {n: pyro.sample(n, self._normal(n).to_event(dim)) for n, dim in self._event_dims.items()}

    @torch.no_grad()
    def sample_posterior(self, *, sample_shape: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """Draws of the sites, shapes sample_shape + that of the site."""
        return {name: self._normal(name).sample(sample_shape) for name in self._event_dims}

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Mu of each site."""
        return {name: self._normal(name).loc.clone() for name in self._event_dims}

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of each weight, shapes (quantiles,) + that of the site."""
        found = {}
        for name in self._event_dims:
            q = self._normal(name)
            levels = torch.as_tensor(quantiles, dtype=q.loc.dtype, device=q.loc.device)
            found[name] = q.icdf(levels.reshape(-1, *[1] * q.loc.ndim))
        return found

    @torch.no_grad()
    def log_alpha(self) -> dict[str, Tensor]:
        """Logarithm of alpha of each weight, in the shape of the site: above 3 a weight is mostly noise."""
        normals = {name: self._normal(name) for name in self._event_dims}
        if self.parameterization == "additive":
            return {n: 2 * (q.scale.log() - q.loc.abs().log()) for n, q in normals.items()}
        return {n: q.log_alpha.clone() for n, q in normals.items()}
