"""Laws of a guide's sites: their locations and variances in unconstrained coordinates, and other laws in their place.

A site's law is a normal or a point, maybe behind transforms to the site's support::

    x = f(u),   u ~ N(m, diag(variance))   or   u ~ N(m, diag(variance) + F F'), one for all sites
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import ComposeTransform, biject_to, constraints
from torch.distributions import TransformedDistribution as TorchTransformed
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_map

from bnn_ppl.pyro.results import HoldParams, random_state_kept

_VECTORS = (dist.MultivariateNormal, dist.LowRankMultivariateNormal)


class Law(NamedTuple):
    """Mean and variance of a site in unconstrained coordinates."""

    mean: Tensor
    variance: Tensor


class Found(NamedTuple):
    """Sites of a guide that have a location.

    By site the support of a point, or None; those that no parameter moves; why the others have none; and the latent
    sites of the model that auxiliary ones belong to, as ``w_unconstrained`` of ``AutoNormal`` to ``w``.
    """

    supports: dict[str, Any]
    fixed: list[str]
    refused: dict[str, str]
    names: dict[str, str]


@contextmanager
def aside() -> Iterator[None]:
    """Run models without a trace elsewhere.

    No gradients, checks or messages; torch's random state, the buffers of modules and the names in Pyro's parameter
    store are put back.
    """
    buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(module: torch.nn.Module, args: Any) -> None:
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in buffers:
                buffers[id(buffer)] = buffer, buffer.clone()

    with random_state_kept(), poutine.block():
        hook = register_module_forward_pre_hook(keep)
        try:
            with no_new_parameters():
                yield
        finally:
            hook.remove()
            for buffer, before in buffers.values():
                buffer.copy_(before)


@contextmanager
def no_new_parameters() -> Iterator[None]:
    """Take parameters out of Pyro's store again that came into it."""
    store = pyro.get_param_store()
    before = set(store.keys())
    try:
        yield
    finally:
        for name in set(store.keys()) - before:
            del store[name]


def find_laws(model: Callable, guide: Callable, moved: Mapping[str, Tensor], args: tuple, kwargs: dict) -> Found:
    """Which sites of a guide have a law of their own, which does not come from other sites' draws.

    `moved` are other values of the parameters: a transform that changes with them has no fixed coordinates, and a
    location that does not is no parameter's.
    """
    with aside():
        torch.manual_seed(0)
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        before = _transformed(drawn.nodes)
        with HoldParams(moved), getattr(guide, "_pyro_context", nullcontext()):
            torch.manual_seed(0)
            elsewhere = poutine.trace(guide).get_trace(*args, **kwargs).nodes
            after = _transformed(elsewhere)
        # Without numbers in any draw, what is not a number now depends on one.
        with _HideDraws():
            try:
                hidden = poutine.trace(guide).get_trace(*args, **kwargs)
            except RuntimeError as error:
                raise ValueError(
                    "the guide computes laws from draws of other sites, in a way that needs numbers: take "
                    "covariance='parameters', which averages the parameters of any guide"
                ) from error
        torch.manual_seed(0)
        other = poutine.trace(guide).get_trace(*tree_map(_shifted, args), **tree_map(_shifted, kwargs)).nodes
        latent = poutine.trace(poutine.replay(model, drawn)).get_trace(*args, **kwargs).nodes
    supports, refused = {}, {}
    for name, site in hidden.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
            continue
        base, _ = _taken_apart(site["fn"])
        depends = any(torch.isnan(value).any() for value in _tensors(site["fn"]))
        if isinstance(base, dist.Delta) and depends:  # computed from draws of other sites
            continue
        subsampled = [f.name for f in site["cond_indep_stack"] if f.full_size not in (None, f.size)]
        if not isinstance(base, (dist.Normal, dist.Delta, *_VECTORS)):
            refused[name] = f"has a {type(base).__name__}, without a location"
        elif depends:
            refused[name] = "has a law that depends on draws of other sites"
        elif subsampled:
            refused[name] = f"lies in the subsampled plate {subsampled[0]!r}, so that its law changes with the rows"
        elif name in before and not torch.equal(before[name], after[name]):
            refused[name] = "lies behind a transform with parameters"
        elif not all(map(torch.equal, _tensors(site["fn"]), _tensors(other[name]["fn"]))):
            refused[name] = "has a law that depends on the arguments of the guide"
        else:
            support = latent[name]["fn"].support if name in latent else constraints.real
            supports[name] = support if isinstance(base, dist.Delta) else None
    pairs = {n: (_law(drawn.nodes[n]["fn"], x).mean, _law(elsewhere[n]["fn"], x).mean) for n, x in supports.items()}
    fixed = [name for name, (here, there) in pairs.items() if torch.equal(here, there)]
    auxiliary = [name for name in supports if drawn.nodes[name]["infer"].get("is_auxiliary")]
    names = {name: name.removesuffix("_unconstrained") for name in auxiliary}
    names = {name: site for name, site in names.items() if site != name and site in latent and site not in supports}
    return Found(supports, fixed, refused, names)


def _shifted(value: Any) -> Any:
    """Another value of an argument, if it has floating-point numbers."""
    return value + 1 if isinstance(value, Tensor) and value.is_floating_point() else value


def read_laws(supports: Mapping[str, Any], guide: Callable, args: tuple, kwargs: dict) -> dict[str, Law]:
    """Laws of these sites at the parameters that the guide has."""
    with aside():
        sites = poutine.trace(guide).get_trace(*args, **kwargs).nodes
        return {name: _law(sites[name]["fn"], support) for name, support in supports.items()}


def _transformed(sites: Mapping[str, dict]) -> dict[str, Tensor]:
    """What the transforms of normals make of the same numbers."""
    found = {}
    for name, site in sites.items():
        if site["type"] == "sample" and isinstance(_taken_apart(site["fn"])[0], (dist.Normal, *_VECTORS)):
            transform = _transform(site["fn"], None)
            if transform is not None:
                found[name] = transform(torch.full(transform.inverse_shape(site["fn"].shape()), 0.3))
    return found


class _HideDraws(Messenger):
    """Draws that are not numbers."""

    def _pyro_post_sample(self, msg: dict) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg) and msg["value"].is_floating_point():
            msg["value"] = torch.full_like(msg["value"], torch.nan)


def _taken_apart(fn: Any) -> tuple[Any, list[Any]]:
    """Distribution behind transforms and wrappers, and the transforms."""
    transforms: list[Any] = []
    while True:
        if isinstance(fn, TorchTransformed):
            transforms = [*fn.transforms, *transforms]
        elif not isinstance(fn, dist.Independent | dist.ExpandedDistribution):
            return fn, transforms
        fn = fn.base_dist


def _tensors(fn: Any) -> Iterator[Tensor]:
    """Floating-point tensors in a distribution and what it is made of."""
    for value in vars(fn).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value
        elif isinstance(value, torch.distributions.Distribution):
            yield from _tensors(value)


def _transform(fn: Any, support: Any) -> Any:
    """From unconstrained coordinates to the site's; None for the identity."""
    base, transforms = _taken_apart(fn)
    if not isinstance(base, dist.Delta):
        return ComposeTransform(transforms) if transforms else None
    # Not the object itself: a state that was saved has copies.
    is_real = isinstance(getattr(support, "base_constraint", support), type(constraints.real))
    return None if is_real else biject_to(support)


def _law(fn: Any, support: Any) -> Law:
    base, _ = _taken_apart(fn)
    transform, shape = _transform(fn, support), fn.shape()
    if isinstance(base, dist.Delta):
        point = base.v.expand(shape)
        mean = point.clone() if transform is None else transform.inv(point)
        return Law(mean, torch.zeros_like(mean))
    if transform is not None:
        shape = transform.inverse_shape(shape)
    variance = base.scale**2 if isinstance(base, dist.Normal) else base.variance
    return Law(base.mean.expand(shape).clone(), variance.expand(shape).clone())


class ReplaceLaws(Messenger):
    """Draw sites from other laws; with `values` in unconstrained coordinates sites are there."""

    def __init__(
        self, laws: Mapping[str, Law], supports: Mapping[str, Any], values: Mapping[str, Tensor] | None = None
    ):
        super().__init__()
        self.laws = laws
        self.supports = supports
        self.values = values

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] not in self.laws:
            return
        fn, law = msg["fn"], self.laws[msg["name"]]
        transform = _transform(fn, self.supports[msg["name"]])
        # Event dimensions that the transform does not take for its own.
        outer = fn.event_dim - (0 if transform is None else transform.codomain.event_dim)
        if self.values is not None:
            msg["fn"] = _point(self.values[msg["name"]], transform, outer, fn.event_dim)
            return
        normal = dist.Normal(law.mean, law.variance.sqrt())
        if transform is None:
            msg["fn"] = normal.to_event(outer)
        else:
            inner = normal.to_event(outer + transform.domain.event_dim)
            msg["fn"] = dist.TransformedDistribution(inner, [transform])


def _point(value: Tensor, transform: Any, outer: int, event_dim: int) -> dist.Delta:
    """Point f(u), with what f adds to the density of u."""
    if transform is None:
        return dist.Delta(value, event_dim=event_dim)
    point = transform(value)
    change = transform.log_abs_det_jacobian(value, point)
    density = -change.sum(tuple(range(-outer, 0))) if outer else -change
    return dist.Delta(point, log_density=density, event_dim=event_dim)


def joint_law(laws: Mapping[str, Law], columns: Mapping[str, Tensor]) -> dist.LowRankMultivariateNormal:
    """Normal of all sites in one vector, from their columns (K, ...)."""
    return dist.LowRankMultivariateNormal(
        torch.cat([law.mean.flatten() for law in laws.values()]),
        torch.cat([columns[name].reshape(len(columns[name]), -1).T for name in laws]),
        torch.cat([law.variance.flatten() for law in laws.values()]),
        validate_args=False,
    )


def split(vector: Tensor, laws: Mapping[str, Law]) -> dict[str, Tensor]:
    """Parts of a vector that belong to the sites."""
    parts = vector.split([law.mean.numel() for law in laws.values()], -1)
    pairs = zip(laws.items(), parts, strict=True)
    return {name: part.reshape(vector.shape[:-1] + law.mean.shape) for (name, law), part in pairs}
