"""Laws of a guide's sites: their locations and variances in unconstrained coordinates, and other laws in their place.

A site's law is a normal or a point, maybe behind transforms to the site's support::

    x = f(u),   u ~ N(m, diag(variance))   or   u ~ N(m, diag(variance) + F F'), one for all sites
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array, random
from numpyro import distributions as dist
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.distribution import validation_enabled
from numpyro.distributions.transforms import ComposeTransform
from numpyro.handlers import replay, substitute, trace
from numpyro.handlers import seed as seed_handler
from numpyro.primitives import Messenger

_VECTORS = (dist.MultivariateNormal, dist.LowRankMultivariateNormal)


class Law(NamedTuple):
    """Mean and variance of a site in unconstrained coordinates."""

    mean: Array
    variance: Array


class Found(NamedTuple):
    """Sites of a guide that have a location.

    By site the support of a point, or None; those that no parameter moves; and why the others have none.
    """

    supports: dict[str, Any]
    fixed: list[str]
    refused: dict[str, str]


def find_laws(
    model: Callable, guide: Callable, params: Mapping[str, Any], moved: Mapping[str, Any], args: tuple, kwargs: dict
) -> Found:
    """Which sites of a guide have a law of their own, which does not come from other sites' draws.

    `moved` are other values of the parameters: a transform that changes with them has no fixed coordinates, and a
    location that does not is no parameter's.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, args, kwargs))):
        raise ValueError(
            "init looks at the sites of the guide and cannot be compiled: call it outside jax.jit and jax.vmap, or "
            "take covariance='parameters'"
        )
    with validation_enabled(False):
        drawn = _trace(guide, params, args, kwargs)
        # Without numbers in any draw, what is not a number now depends on one.
        hidden = _trace(_HideDraws(guide), params, args, kwargs)
        other = _trace(guide, params, *jax.tree.map(_shifted, (args, kwargs)))
        seen = trace(seed_handler(substitute(replay(model, drawn), data=dict(params)), random.key(0)))
        latent = seen.get_trace(*args, **kwargs)
        elsewhere = _trace(guide, moved, args, kwargs)
        before, after = _transformed(drawn), _transformed(elsewhere)
    supports, refused = {}, {}
    for name, site in hidden.items():
        if site["type"] != "sample" or site["is_observed"]:
            continue
        base, _ = _taken_apart(site["fn"])
        depends = any(
            not np.isfinite(leaf).all()
            for leaf in map(np.asarray, jax.tree.leaves(site["fn"]))
            if leaf.dtype.kind == "f"
        )
        if isinstance(base, dist.Delta) and depends:  # computed from draws of other sites
            continue
        subsampled = [f.name for f in site["cond_indep_stack"] if _is_subsampled(f, hidden)]
        if not isinstance(base, (dist.Normal, dist.Delta, *_VECTORS)):
            refused[name] = f"has a {type(base).__name__}, without a location"
        elif depends:
            refused[name] = "has a law that depends on draws of other sites"
        elif subsampled:
            refused[name] = f"lies in the subsampled plate {subsampled[0]!r}, so that its law changes with the rows"
        elif name in before and not jnp.array_equal(before[name], after[name]):
            refused[name] = "lies behind a transform with parameters"
        elif not _same(site["fn"], other[name]["fn"]):
            refused[name] = "has a law that depends on the arguments of the guide"
        else:
            support = latent[name]["fn"].support if name in latent else constraints.real
            supports[name] = support if isinstance(base, dist.Delta) else None
    pairs = {n: (_law(drawn[n]["fn"], x).mean, _law(elsewhere[n]["fn"], x).mean) for n, x in supports.items()}
    return Found(supports, [name for name, (here, there) in pairs.items() if jnp.array_equal(here, there)], refused)


def _shifted(value: Any) -> Any:
    """Another value of an argument, if it has floating-point numbers."""
    real = isinstance(value, jax.Array | np.ndarray) and jnp.issubdtype(value.dtype, jnp.floating)
    return value + 1 if real else value


def _same(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(jnp.array_equal(a, b) for a, b in pairs)


def read_laws(
    supports: Mapping[str, Any], guide: Callable, params: Mapping[str, Any], args: tuple, kwargs: dict
) -> dict[str, Law]:
    """Laws of these sites at given parameters."""
    with validation_enabled(False):
        sites = _trace(guide, params, args, kwargs)
    return {name: _law(sites[name]["fn"], support) for name, support in supports.items()}


def _trace(guide: Callable, params: Mapping[str, Any], args: tuple, kwargs: dict) -> dict[str, dict]:
    with numpyro.handlers.block():
        return trace(seed_handler(substitute(guide, data=dict(params)), random.key(0))).get_trace(*args, **kwargs)


def _transformed(sites: Mapping[str, dict]) -> dict[str, Array]:
    """What the transforms of normals make of the same numbers."""
    found = {}
    for name, site in sites.items():
        if site["type"] == "sample" and isinstance(_taken_apart(site["fn"])[0], (dist.Normal, *_VECTORS)):
            transform = _transform(site["fn"], None)
            if transform is not None:
                found[name] = transform(jnp.full(transform.inverse_shape(site["fn"].shape()), 0.3))
    return found


def _is_subsampled(frame: Any, sites: Mapping[str, dict]) -> bool:
    plate = sites.get(frame.name)
    return plate is not None and plate["type"] == "plate" and plate["args"][1] not in (None, plate["args"][0])


class _HideDraws(Messenger):
    """Draws that are not numbers."""

    def postprocess_message(self, msg: dict) -> None:
        if msg["type"] == "sample" and not msg["is_observed"] and jnp.issubdtype(msg["value"].dtype, jnp.floating):
            msg["value"] = jnp.full_like(msg["value"], jnp.nan)


def _taken_apart(fn: Any) -> tuple[Any, list[Any]]:
    """Distribution behind transforms and wrappers, and the transforms."""
    transforms: list[Any] = []
    while True:
        if isinstance(fn, dist.TransformedDistribution):
            transforms = [*fn.transforms, *transforms]
        elif not isinstance(fn, dist.ExpandedDistribution | dist.Independent):
            return fn, transforms
        fn = fn.base_dist


def _transform(fn: Any, support: Any) -> Any:
    """From unconstrained coordinates to the site's; None for the identity."""
    base, transforms = _taken_apart(fn)
    if not isinstance(base, dist.Delta):
        return ComposeTransform(transforms) if transforms else None
    is_real = getattr(support, "base_constraint", support) is constraints.real
    return None if is_real else biject_to(support)


def _law(fn: Any, support: Any) -> Law:
    base, _ = _taken_apart(fn)
    transform, shape = _transform(fn, support), fn.shape()
    if isinstance(base, dist.Delta):
        point = jnp.broadcast_to(base.v, shape)
        mean = point if transform is None else transform.inv(point)
        return Law(mean, jnp.zeros_like(mean))
    if transform is not None:
        shape = transform.inverse_shape(shape)
    variance = base.scale**2 if isinstance(base, dist.Normal) else base.variance
    return Law(jnp.broadcast_to(base.mean, shape), jnp.broadcast_to(variance, shape))


class ReplaceLaws(Messenger):
    """Draw sites from other laws; with `values` in unconstrained coordinates sites are there."""

    def __init__(
        self,
        fn: Callable | None,
        laws: Mapping[str, Law],
        supports: Mapping[str, Any],
        values: Mapping[str, Array] | None = None,
    ):
        super().__init__(fn)
        self.laws = laws
        self.supports = supports
        self.values = values

    def process_message(self, msg: dict) -> None:
        """Replace the law of a site; called by NumPyro."""
        if msg["type"] != "sample" or msg["name"] not in self.laws:
            return
        fn, law = msg["fn"], self.laws[msg["name"]]
        transform = _transform(fn, self.supports[msg["name"]])
        # Event dimensions that the transform does not take for its own.
        outer = fn.event_dim - (0 if transform is None else transform.codomain.event_dim)
        if self.values is not None:
            msg["fn"] = _point(self.values[msg["name"]], transform, outer, fn.event_dim)
            return
        normal = dist.Normal(law.mean, jnp.sqrt(law.variance))
        if transform is None:
            msg["fn"] = normal.to_event(outer)
        else:
            inner = normal.to_event(outer + transform.domain.event_dim)
            msg["fn"] = dist.TransformedDistribution(inner, transform)


def _point(value: Array, transform: Any, outer: int, event_dim: int) -> dist.Delta:
    """Point f(u), with what f adds to the density of u."""
    if transform is None:
        return dist.Delta(value, event_dim=event_dim)
    point = transform(value)
    change = transform.log_abs_det_jacobian(value, point)
    return dist.Delta(point, log_density=-change.sum(tuple(range(-outer, 0))), event_dim=event_dim)


def joint_law(laws: Mapping[str, Law], columns: Mapping[str, Array]) -> dist.LowRankMultivariateNormal:
    """Normal of all sites in one vector, from their columns (K, ...)."""
    return dist.LowRankMultivariateNormal(
        jnp.concatenate([law.mean.ravel() for law in laws.values()]),
        jnp.concatenate([columns[name].reshape(len(columns[name]), -1).T for name in laws]),
        jnp.concatenate([law.variance.ravel() for law in laws.values()]),
        validate_args=False,
    )


def split(vector: Array, laws: Mapping[str, Law]) -> dict[str, Array]:
    """Parts of a vector that belong to the sites."""
    ends = np.cumsum([law.mean.size for law in laws.values()])
    parts = jnp.split(vector, ends[:-1])
    return {name: part.reshape(law.mean.shape) for (name, law), part in zip(laws.items(), parts, strict=True)}
