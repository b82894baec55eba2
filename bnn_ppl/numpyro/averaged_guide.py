"""A guide with other laws of its sites, or other parameters: what weight averaging gives back."""

from collections.abc import Callable, Mapping
from typing import Any

import numpyro
from jax import Array, random
from numpyro import handlers

from bnn_ppl import averages
from bnn_ppl.numpyro.site_laws import Law, ReplaceLaws, joint_law, split


class AveragedGuide:
    """Guide without parameters of its own, for ``Predictive`` and ELBOs of the host, and for `predict`.

    Parameters
    ----------
    guide
        The guide as it was trained.
    params
        Averages of the ``param`` sites of model and guide, in the user's coordinates, kept as `averaged_params`.
    laws
        Laws in the place of those of its sites, in unconstrained coordinates.
    columns
        Columns of a covariance of all sites beside their variances, shapes (K, ...) by site; None for none. The sites
        are then cut from one draw, an auxiliary site ``_averaged_latent``.
    supports
        From `find_laws`.
    """

    def __init__(
        self,
        guide: Callable,
        params: Mapping[str, Any],
        laws: Mapping[str, Law],
        columns: Mapping[str, Array] | None,
        supports: Mapping[str, Any],
    ):
        self._guide = guide
        self.averaged_params = dict(params)
        self._laws = dict(laws)
        self._joint = None if columns is None else joint_law(laws, columns)
        self._supports = supports

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the sites; the host calls this with the arguments of the model."""
        values = None
        if self._joint is not None:
            values = split(numpyro.sample("_averaged_latent", self._joint, infer={"is_auxiliary": True}), self._laws)
        return self._run(values, args, kwargs)

    def median(self, params: Any = None, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Medians of the latent sites, in the user's coordinates; `params` is what hosts' guides take, and not read."""
        if not self._laws:
            if not hasattr(self._guide, "median"):
                raise ValueError(averages.no_median(self._guide))
            return self._guide.median(self.averaged_params)
        with handlers.block(), handlers.trace() as sites, handlers.seed(rng_seed=random.key(0)):
            self._run({name: law.mean for name, law in self._laws.items()}, args, kwargs)
        latent = {n: s for n, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}
        return {n: s["value"] for n, s in latent.items() if not s["infer"].get("is_auxiliary")}

    def _run(self, values: Mapping[str, Array] | None, args: tuple, kwargs: dict) -> Any:
        # Nobody outside sees the parameters, nor puts those of the last step in their place.
        with (
            handlers.block(hide_fn=lambda site: site["type"] == "param"),
            ReplaceLaws(None, self._laws, self._supports, values),
            handlers.substitute(data=self.averaged_params),
        ):
            return self._guide(*args, **kwargs)
