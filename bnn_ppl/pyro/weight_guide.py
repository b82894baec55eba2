"""The base of guides that give each weight a normal of its own: which sites, their checks, draws and quantiles."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroModule, PyroParam
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from bnn_ppl.guide_sites import Sites, check_found, check_outside, check_real, check_sites, chooser
from bnn_ppl.pyro.initialization import init_to_prior_center
from bnn_ppl.responses import check_trained


class WeightGuide(AutoGuide):
    """Independent normals over chosen real sites; a guide says where its parameters start, and which normal they make.

    Takes `sites` and `init_loc_fn` as its guides do. Parameters are named ``{kind}s.{name}``.
    """

    def __init__(self, model: Callable, *, sites: Sites, init_loc_fn: Callable | None = None):
        started = InitMessenger(init_loc_fn or init_to_prior_center)(model)
        super().__init__(poutine.block(started, hide_fn=self._is_left_out))
        self.sites = check_sites(sites)
        self._chosen = chooser(self.sites)
        self._latent: set[str] = set()

    def _starts(self, name: str, loc: Tensor) -> dict[str, Tensor]:
        """Parameters where training starts, by kind."""
        raise NotImplementedError

    def _normal(self, *args: Any, **kwargs: Any) -> Any:
        """Normal of a site, in the site's shape, from its parameters by kind."""
        raise NotImplementedError

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
        for name, site in found.items():
            support = site["fn"].support
            base = support.base_constraint if isinstance(support, constraints.independent) else support
            check_real(name, base is constraints.real, support)
            check_outside(name, [frame.name for frame in site["cond_indep_stack"]])
            starts = self._starts(name, site["value"].detach().clone())
            self._kinds = tuple(starts)
            for kind, start in starts.items():
                if not hasattr(self, f"{kind}s"):
                    setattr(self, f"{kind}s", PyroModule())
                deep_setattr(getattr(self, f"{kind}s"), name, PyroParam(start))

    def _normals(self) -> dict[str, Any]:
        check_trained(self)
        return {
            name: self._normal(**{kind: attrgetter(name)(getattr(self, f"{kind}s")) for kind in self._kinds})
            for name in self._event_dims
        }

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the sites; the host calls this."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return {n: pyro.sample(n, q.to_event(self._event_dims[n])) for n, q in self._normals().items()}

    @torch.no_grad()
    def sample_posterior(self, *, sample_shape: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """Draws of the sites, shapes sample_shape + that of the site."""
        return {name: q.sample(sample_shape) for name, q in self._normals().items()}

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Median of each weight, which is its mean too."""
        return {name: q.loc.clone() for name, q in self._normals().items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of each weight, shapes (quantiles,) + that of the site."""
        found = {}
        for name, q in self._normals().items():
            levels = torch.as_tensor(quantiles, dtype=q.loc.dtype, device=q.loc.device)
            found[name] = q.icdf(levels.reshape(-1, *[1] * q.loc.ndim))
        return found
