"""From a NumPyro model and its arguments to a minibatch potential over unconstrained sites.

With theta = t(z) for unconstrained z and a transform t at each latent site, U_c(theta) = -log p(y, theta) and J
the Jacobian of t, the potential at temperature T is::

    U_T(z) = U_c(t(z)) - T log |J(z)|

so that a sampler at temperature T draws theta from p(theta, y)^(1/T) in the user's own coordinates, and T = 0
finds their MAP. On a minibatch the plates scale the observed sites by N / B, which makes U_T unbiased. A likelihood
temperature L divides the log densities of the observed sites by L, and nothing else: p(theta) p(y | theta)^(1/L).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import checkify
from numpyro.distributions import biject_to
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.util import compute_log_probs, helpful_support_errors, log_density
from numpyro.primitives import Messenger

from bnn_ppl.layout import Plate, beyond_message, bypass_message, check_classes, sources, warn_unused_rows
from bnn_ppl.numpyro.compilation import jit_over_data
from bnn_ppl.numpyro.layout import Layout, is_real, number_of_classes
from bnn_ppl.numpyro.plates import SetPlates

Sites = dict[str, Array]


class Evaluation(NamedTuple):
    """A minibatch potential and its gradient at the current position."""

    energy: Array
    gradient: Any


class Target(NamedTuple):
    """What a chain samples: `energy(z, temperature, batch)`, and the plates of which a batch has rows."""

    energy: Callable
    plates: dict[str, Any]


def _conditioned(model: Callable, layout: Layout, batch: Mapping[str, Array]) -> Callable:
    """The model with its held values and a minibatch put in."""
    held = substitute(model, data=layout.held)
    return SetPlates(held, lambda name, size, subsample_size: batch.get(name))


def _is_kept_deterministic(site: dict, plates: Mapping[str, Plate]) -> bool:
    if site["type"] != "deterministic":
        return False
    return not any(plates[frame.name].subsampled for frame in site["cond_indep_stack"])


def _transform(site: dict) -> Any:
    with helpful_support_errors(site):
        return biject_to(site["fn"].support)


def _at_scan_step(z: Array, site: dict) -> Array:
    """The part of a stacked value that belongs to the current step of numpyro.contrib.control_flow.scan."""
    i = site["infer"].get("_scan_current_index")
    return z if i is None or jnp.ndim(z) <= len(site["fn"].shape()) else z[i]


def _constrained(model: Callable, z: Sites) -> Callable:
    def constrain(site: dict) -> Array | None:
        if site["type"] != "sample" or site["name"] not in z:
            return None
        value = _at_scan_step(z[site["name"]], site)
        return value if is_real(site["fn"].support) else _transform(site)(value)

    return substitute(model, substitute_fn=constrain)


class _ScaleObserved(Messenger):
    def __init__(self, fn: Callable, factor: float):
        super().__init__(fn)
        self.factor = factor

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "sample" and msg["is_observed"]:
            msg["scale"] = self.factor * (1.0 if msg["scale"] is None else msg["scale"])


def potential_energy(
    model: Callable,
    layout: Layout,
    z: Sites,
    temperature: Array | float,
    batch: Mapping[str, Array],
    args: tuple,
    kwargs: dict,
    likelihood_temperature: float = 1.0,
) -> Array:
    """Minibatch potential U_T(z).

    Parameters
    ----------
    model, layout
        The model and what `inspect_model` found in it.
    z
        Unconstrained values by latent site.
    temperature
        T; it weighs the log-Jacobian only.
    batch
        Row indices, shape (B,), by subsampled plate.
    args, kwargs
        Arguments of the model.
    likelihood_temperature
        L, by which the log densities of observed sites are divided.

    Returns
    -------
    Array
        Scalar.
    """
    conditioned = _constrained(_conditioned(model, layout, batch), z)
    if likelihood_temperature != 1.0:
        conditioned = _ScaleObserved(conditioned, 1.0 / likelihood_temperature)
    log_joint, model_trace = log_density(conditioned, args, kwargs, {})
    log_jacobian = jnp.zeros(())
    for name, value in z.items():
        site = model_trace[name]
        if not is_real(site["fn"].support):
            log_jacobian += jnp.sum(_transform(site).log_abs_det_jacobian(value, site["value"]))
    return -(log_joint + temperature * log_jacobian)


def constrain(model: Callable, layout: Layout, z: Sites, args: tuple, kwargs: dict) -> Sites:
    """Values in the user's coordinates, with the deterministic sites that lie in no subsampled plate."""
    conditioned = _constrained(_conditioned(model, layout, layout.first_rows()), z)
    model_trace = trace(conditioned).get_trace(*args, **kwargs)
    return {n: s["value"] for n, s in model_trace.items() if n in z or _is_kept_deterministic(s, layout.plates)}


def initial_values(
    model: Callable, layout: Layout, rng_key: Array, init_strategy: Callable, args: tuple, kwargs: dict
) -> Sites:
    """Unconstrained values at which a chain starts, one site at a time by a NumPyro init strategy."""
    seeded = seed(_conditioned(model, layout, layout.first_rows()), rng_key)
    started = substitute(seeded, substitute_fn=init_strategy)
    model_trace = trace(started).get_trace(*args, **kwargs)
    return {name: _transform(model_trace[name]).inv(model_trace[name]["value"]) for name in layout.shapes}


def takes_rows(layout: Layout, args: tuple, kwargs: dict) -> bool:
    """Whether a model takes rows of its data by indices, or may do so beyond their end."""
    largest = max((plate.size for plate in layout.plates.values()), default=0)
    return bool(layout.subsampled) or any(len(array) < largest for array in _with_rows(args, kwargs))


def check_rows(model: Callable, layout: Layout, z: Sites, args: tuple, kwargs: dict) -> None:
    """Raise a ValueError for a model whose data do not follow the plates' rows, or lack some of them."""
    first = layout.first_rows()
    last = {name: rows + layout.plates[name].size - len(rows) for name, rows in first.items()}
    # JAX itself takes the last row for an index beyond the end.
    checked = checkify.checkify(partial(_observed_on, model, layout), errors=checkify.index_checks)
    on_rows = jit_over_data(checked, args, kwargs)
    (_, one), (beyond, other) = on_rows(z, first), on_rows(z, last)
    if message := beyond.get():
        raise ValueError(beyond_message(layout.plates, message.strip(" .")))
    disjoint = all(2 * plate.batch_size <= plate.size for plate in layout.subsampled.values())
    for name, (log_prob, value, _) in one.items():
        log_prob_there, there, classes = other[name]
        for size in {plate.size for plate in layout.subsampled.values()}:
            for array in sources(np.asarray(there), size, _with_rows(args, kwargs)):
                warn_unused_rows(name, size, len(array))
                if classes:
                    check_classes(name, np.asarray(array[:size]), int(classes))
        if disjoint and _alike(log_prob, log_prob_there):
            raise ValueError(bypass_message(name, next(iter(layout.subsampled)), "the log densities"))
        if disjoint and jnp.issubdtype(value.dtype, jnp.inexact) and _alike(value, there):
            raise ValueError(bypass_message(name, next(iter(layout.subsampled)), "the values"))


def _observed_on(
    model: Callable, layout: Layout, args: tuple, kwargs: dict, z: Sites, batch: Mapping[str, Array]
) -> dict[str, tuple[Array, Array, Array]]:
    """Log densities, values and numbers of classes (0: none) of the observed sites inside subsampled plates."""
    conditioned = _constrained(_conditioned(model, layout, batch), z)
    log_probs, model_trace = compute_log_probs(conditioned, args, kwargs, {}, sum_log_prob=False)
    return {
        name: (log_prob, jnp.asarray(model_trace[name]["value"]), jnp.int32(number_of_classes(model_trace[name]["fn"])))
        for name, log_prob in log_probs.items()
        if name not in z and any(frame.name in batch for frame in model_trace[name]["cond_indep_stack"])
    }


def _with_rows(args: tuple, kwargs: dict) -> list[Array]:
    return [leaf for leaf in jax.tree.leaves((args, kwargs)) if isinstance(leaf, Array) and leaf.ndim]


def _alike(a: Array, b: Array) -> bool:
    x, y = np.asarray(a), np.asarray(b)
    return bool(x.size and np.array_equal(x, y) and (x != x.flat[0]).any())


def explain_not_finite(
    model: Callable, layout: Layout, z: Sites, batch: Mapping[str, Array], args: tuple, kwargs: dict
) -> str:
    """Which sites make the potential non-finite at `z`, in words."""
    conditioned = _constrained(_conditioned(model, layout, batch), z)
    log_probs, model_trace = compute_log_probs(conditioned, args, kwargs, {}, sum_log_prob=False)
    causes = []
    for name, log_prob in log_probs.items():
        bad = np.argwhere(~np.isfinite(np.asarray(log_prob)))
        if len(bad):
            site = model_trace[name]
            kind = "observed site" if site["is_observed"] else "latent site"
            where = f", first at {tuple(int(i) for i in bad[0])}" if bad.shape[1] else ""
            frames = [f for f in site["cond_indep_stack"] if -f.dim <= bad.shape[1]]
            if frames:
                at = {f.name: int(bad[0][f.dim]) for f in frames}
                rows = {plate: int(batch[plate][i]) if plate in batch else i for plate, i in at.items()}
                where = ", first at " + " and ".join(f"row {i} of plate {plate!r}" for plate, i in rows.items())
            causes.append(f"{kind} {name!r} ({bad.shape[0]} of {np.size(log_prob)} values{where})")
    if not causes:
        causes = [f"the value of latent site {n!r}" for n, v in z.items() if not np.isfinite(np.asarray(v)).all()]
    return ", ".join(causes) or "the gradient alone"
