"""The base of guides that give each weight a normal of its own: which sites, their checks, draws and quantiles."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpyro
from jax import Array, random
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoNormal

from bnn_ppl.guide_sites import Sites, check_found, check_guide_params, check_outside, check_real, check_sites, chooser
from bnn_ppl.numpyro.initialization import init_to_prior_center
from bnn_ppl.responses import check_trained


class WeightGuide(AutoNormal):
    """Independent normals over chosen real sites; a guide says where its parameters start, and which normal they make.

    Takes `sites` and `init_loc_fn` as its guides do. Parameters are named ``{name}_auto_{kind}``.
    """

    def __init__(self, model: Callable, *, sites: Sites, init_loc_fn: Callable | None = None):
        self.sites = check_sites(sites)
        self._chosen = chooser(self.sites)
        self._latent: set[str] = set()
        super().__init__(
            handlers.block(model, hide_fn=self._is_left_out),
            init_loc_fn=init_loc_fn or init_to_prior_center,
        )

    def _starts(self, name: str, loc: Array) -> dict[str, Any]:
        """Parameters where training starts, by kind: arrays, or functions of a random key."""
        raise NotImplementedError

    def _normal(self, *args: Any, **kwargs: Any) -> Any:
        """Normal of a site, in the site's shape, from its parameters by kind."""
        raise NotImplementedError

    def _is_left_out(self, site: dict) -> bool:
        latent = site["type"] == "sample" and not site["is_observed"]
        if latent:
            self._latent.add(site["name"])
        return latent and not self._chosen(site["name"], site["fn"].shape())

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        found = {n: s for n, s in self.prototype_trace.items() if s["type"] == "sample" and not s["is_observed"]}
        check_found(self.sites, found, self._latent)
        for name, site in found.items():
            support = site["fn"].support
            base = support.base_constraint if isinstance(support, constraints.independent) else support
            check_real(name, base is constraints.real, support)
            check_outside(name, [frame.name for frame in site["cond_indep_stack"]])
        self._start = {name: self._starts(name, jnp.asarray(self._init_locs[name])) for name in found}

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Sample the sites; the host calls this."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        result = {}
        for name, starts in self._start.items():
            values = {kind: numpyro.param(self._label(name, kind), start) for kind, start in starts.items()}
            result[name] = numpyro.sample(name, self._normal(**values).to_event(self._event_dims[name]))
        return result

    def _label(self, name: str, kind: str) -> str:
        return f"{name}_{self.prefix}_{kind}"

    def _normals(self, params: Mapping[str, Array]) -> dict[str, Any]:
        check_trained(self)
        labels = [self._label(name, kind) for name, starts in self._start.items() for kind in starts]
        check_guide_params(type(self).__name__, params, labels)
        return {
            name: self._normal(**{kind: params[self._label(name, kind)] for kind in starts})
            for name, starts in self._start.items()
        }

    def sample_posterior(
        self, rng_key: Array, params: Mapping[str, Array], *args: Any, sample_shape: tuple[int, ...] = (), **kwargs: Any
    ) -> dict[str, Array]:
        """Draws of the sites, shapes sample_shape + that of the site."""
        normals = self._normals(params)
        keys = random.split(rng_key, len(normals))
        return {n: q.sample(key, sample_shape) for key, (n, q) in zip(keys, normals.items(), strict=True)}

    def median(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """Median of each weight, which is its mean too."""
        return {name: q.loc for name, q in self._normals(params).items()}

    def quantiles(self, params: Mapping[str, Array], quantiles: Any) -> dict[str, Array]:
        """Quantiles of each weight, shapes (quantiles,) + that of the site."""
        levels = jnp.asarray(quantiles)
        normals = self._normals(params)
        return {n: q.icdf(levels.reshape(-1, *[1] * jnp.ndim(q.loc))) for n, q in normals.items()}
