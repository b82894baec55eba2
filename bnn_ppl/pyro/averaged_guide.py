"""A guide with other laws of its sites, or other parameters: what weight averaging gives back."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from bnn_ppl import averages
from bnn_ppl.pyro.results import HoldParams
from bnn_ppl.pyro.site_laws import Law, ReplaceLaws, aside, joint_law, no_new_parameters, split


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
        columns: Mapping[str, Tensor] | None,
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
            values = split(pyro.sample("_averaged_latent", self._joint, infer={"is_auxiliary": True}), self._laws)
        return self._run(values, args, kwargs)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Medians of the latent sites, in the user's coordinates."""
        if not self._laws:
            if not hasattr(self._guide, "median"):
                raise ValueError(averages.no_median(self._guide))
            with aside(), self._held():
                return {name: value.clone() for name, value in self._guide.median(*args, **kwargs).items()}
        with aside(), poutine.trace() as sites:
            self._run({name: law.mean for name, law in self._laws.items()}, args, kwargs)
        latent = {n: sites.trace.nodes[n] for n in sites.trace.stochastic_nodes}
        return {n: s["value"] for n, s in latent.items() if not s["infer"].get("is_auxiliary")}

    def _run(self, values: Mapping[str, Tensor] | None, args: tuple, kwargs: dict) -> Any:
        with ReplaceLaws(self._laws, self._supports, values), self._held():
            return self._guide(*args, **kwargs)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """With the averaged parameters, which nobody outside sees."""
        # Out of its context a module has its own parameters, whatever these say.
        context = getattr(self._guide, "_pyro_context", nullcontext())
        held = HoldParams(self.averaged_params)
        with no_new_parameters(), poutine.block(hide_types=["param"]), held, context, torch.no_grad():
            yield
