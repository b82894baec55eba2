"""One look at a NumPyro model: its plates, latent sites and held values, and what it cannot be sampled for."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import biject_to, constraints
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.util import helpful_support_errors
from numpyro.primitives import Messenger

from bnn_ppl.layout import (
    STREAM_FAILURE,
    Plate,
    check_classes,
    check_dtype_of_classes,
    check_observation,
    resolve_batch_size,
    warn_data,
)
from bnn_ppl.numpyro.initialization import init_to_prior_center
from bnn_ppl.numpyro.plates import SetPlates, full_data


@dataclass(frozen=True)
class Layout:
    """What one look at a model tells: plates, latent sites' unconstrained shapes, and values that stay fixed."""

    plates: dict[str, Plate]
    shapes: dict[str, tuple[int, ...]]
    held: dict[str, Any] = field(repr=False)
    warned_params: tuple[str, ...]

    @property
    def subsampled(self) -> dict[str, Plate]:
        """The plates of which a minibatch takes a part, by name."""
        return {name: plate for name, plate in self.plates.items() if plate.subsampled}

    def first_rows(self) -> dict[str, Array]:
        """Rows 0 .. B - 1 of each subsampled plate: a stand-in where any minibatch will do."""
        return {name: jnp.arange(plate.batch_size) for name, plate in self.subsampled.items()}


class _FindRandomKeys(Messenger):
    """Note whether the model asks for random keys of its own."""

    found = False

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "prng_key":
            self.found = True


def is_real(support: Any) -> bool:
    """Whether a support is all of the real numbers, elementwise."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def plates_of(model_trace: Mapping[str, dict]) -> dict[str, Plate]:
    """Plates of a trace by name."""
    plates = {}
    for name, site in model_trace.items():
        if site["type"] == "plate":
            inside = [
                s
                for s in model_trace.values()
                if s["type"] == "sample" and name in {frame.name for frame in s["cond_indep_stack"]}
            ]
            plates[name] = Plate(
                name,
                size=site["args"][0],
                batch_size=len(site["value"]),
                observes=any(s["is_observed"] for s in inside),
                holds_latents=any(not s["is_observed"] for s in inside),
            )
    return plates


def _check_latents(model_trace: Mapping[str, dict], plates: Mapping[str, Plate], *, complete: bool = True) -> None:
    """Refuse latent sites that cannot be; a model that failed leaves an incomplete trace, from which it is told why."""
    latents = [s for s in model_trace.values() if s["type"] == "sample" and not s["is_observed"]]
    modules = {name.removesuffix("$params") for name in model_trace if name.endswith("$params")}
    for site in latents:
        name = site["name"]
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"site {name!r} is discrete, and stochastic gradients need continuous sites: sum it out of the "
                "model, or observe it"
            )
        around = [plates[frame.name] for frame in site["cond_indep_stack"]]
        in_module = name.partition("/")[0] in modules
        data = [p for p in around if p.subsampled or ((p.observes or not complete) and in_module)]
        if data:
            raise ValueError(
                f"latent site {name!r} lies inside the data plate {data[0].name!r} and would get one copy per row "
                "of it: sample it before the plate. A network (random_flax_module, random_nnx_module, "
                "random_eqx_module) must be made outside the data plate and called inside. If the site is meant to be "
                "observed, its data were None: pass them to MCMC.run"
            )
    if complete and not latents:
        raise ValueError("the model has no latent sites to sample: every sample statement is observed")


def number_of_classes(fn: Any) -> int:
    """Of a categorical distribution; 0 for others, and for one with a mask, whose values may be anything."""
    while isinstance(fn, dist.ExpandedDistribution | dist.Independent):
        fn = fn.base_dist
    categorical = isinstance(fn, dist.CategoricalProbs | dist.CategoricalLogits)
    return int(fn.support.upper_bound) + 1 if categorical else 0


def _check_rows(model_trace: Mapping[str, dict], plates: Mapping[str, Plate], cut: Mapping[str, int]) -> None:
    for name, site in model_trace.items():
        if site["type"] != "sample" or not site["is_observed"]:
            continue
        if site["cond_indep_stack"]:
            check_observation(name, jnp.shape(site["value"]), site["fn"].batch_shape, site["fn"].event_shape)
        if classes := number_of_classes(site["fn"]):
            check_dtype_of_classes(name, jnp.result_type(site["value"]), classes)
            if not isinstance(site["value"], jax.core.Tracer):
                check_classes(name, np.atleast_1d(site["value"]), classes)
        for frame in site["cond_indep_stack"]:
            plate = plates[frame.name]
            axis = frame.dim - len(site["fn"].event_shape)
            shape = jnp.shape(site["value"])
            rows = shape[axis] if len(shape) >= -axis else 1
            if plate.subsampled and shape and rows != plate.batch_size:
                raise ValueError(
                    f"observed site {name!r} has {rows} rows in plate {frame.name!r}, whose minibatch has "
                    f"{plate.batch_size}{_pass_through(frame.name, cut)}"
                )


def _pass_through(name: str, cut: Mapping[str, int]) -> str:
    given = f" (batch_size={cut[name]})" if name in cut else ""
    return (
        f"{given}: pass the data through the plate, `with numpyro.plate({name!r}, N) as idx: ... x[idx]`, or "
        "`numpyro.subsample(x, event_dim=...)` inside it, for inputs and observations alike"
    )


def _look(
    model: Callable, held: Mapping[str, Any], cut: Mapping[str, int], args: tuple, kwargs: dict, streamed: bool = False
) -> tuple[dict[str, dict], bool]:
    """Trace of the model on the first rows of each plate, and whether it drew random keys of its own."""

    def first_rows(name: str, size: int, subsample_size: int | None) -> Array:
        return jnp.arange(cut.get(name, subsample_size or size))

    key = jax.random.key(0)
    keys = _FindRandomKeys(seed(substitute(model, data=held), key))
    started = substitute(keys, substitute_fn=init_to_prior_center())
    recorder = trace(SetPlates(started, first_rows))
    try:
        model_trace = recorder.get_trace(*args, **kwargs)
    except Exception as error:
        # A network inside the data plate has weights of shapes with which the model may fail.
        plates = plates_of(recorder.trace)
        _check_latents(recorder.trace, plates, complete=False)
        if streamed and not isinstance(error, jax.errors.JAXTypeError):
            raise ValueError(STREAM_FAILURE) from error
        subsampled = [name for name, plate in plates.items() if plate.subsampled]
        if subsampled and _works(full_data(model), held, args, kwargs):
            name = subsampled[0]
            raise ValueError(f"the model fails on a minibatch of plate {name!r}{_pass_through(name, cut)}") from error
        raise
    return model_trace, keys.found


def _unconstrained_shape(site: dict) -> tuple[int, ...]:
    with helpful_support_errors(site):
        return biject_to(site["fn"].support).inverse_shape(jnp.shape(site["value"]))


def _held_values(model_trace: Mapping[str, dict]) -> dict[str, Any]:
    return {n: s["value"] for n, s in model_trace.items() if s["type"] in ("param", "mutable")}


def _works(model: Callable, held: Mapping[str, Any], args: tuple, kwargs: dict) -> bool:
    try:
        _look(model, held, {}, args, kwargs)
    except Exception:
        return False
    return True


def inspect_model(
    model: Callable,
    args: tuple,
    kwargs: dict,
    batch_size: int | Mapping[str, int] | None,
    held: dict | None = None,
    streamed: bool = False,
) -> Layout:
    """Look at a model: find its plates and sites, and refuse what minibatch sampling cannot do.

    Parameters
    ----------
    model, args, kwargs
        A NumPyro model and its arguments.
    batch_size
        As given to the kernel.
    held
        Values of ``param`` and ``mutable`` sites, if they are known already.
    streamed
        Whether the arguments are one batch of the kernel's ``minibatches=``.

    Returns
    -------
    Layout

    Raises
    ------
    ValueError
        For a model that cannot be sampled; the message names the site or plate and the remedy.
    """
    found: list[Layout] = []
    # Traced, not run: eagerly, each operation of the model would be compiled on its own.
    jax.eval_shape(lambda: found.append(_inspect_once(model, args, kwargs, batch_size, held, streamed)))
    if held is not None or not found[0].held:
        return found[0]
    with jax.ensure_compile_time_eval():
        values = jax.jit(lambda: _held_values(_look(model, {}, {}, args, kwargs)[0]))()
    return replace(found[0], held=values)


def _inspect_once(
    model: Callable,
    args: tuple,
    kwargs: dict,
    batch_size: int | Mapping[str, int] | None,
    held: dict | None,
    streamed: bool,
) -> Layout:
    model_trace, _ = _look(model, held or {}, {}, args, kwargs, streamed)
    for site in model_trace.values():
        if site["type"] == "plate" and site["args"][1] is not None and site["args"][1] > site["args"][0]:
            raise ValueError(
                f"plate {site['name']!r} has subsample_size={site['args'][1]}, more than its {site['args'][0]} rows"
            )
    cut = resolve_batch_size(plates_of(model_trace), batch_size)
    if held is None:
        held = _held_values(model_trace)
    model_trace, random_keys = _look(model, held, cut, args, kwargs)
    _check_rows(model_trace, plates_of(model_trace), cut)
    if random_keys:
        raise ValueError(
            "the model draws random keys of its own (numpyro.prng_key, as dropout does), which has no fixed "
            "potential: switch that off, or make the noise a sample site"
        )
    plates = plates_of(model_trace)
    _check_latents(model_trace, plates)
    latents = {n: s for n, s in model_trace.items() if s["type"] == "sample" and not s["is_observed"]}
    return Layout(
        plates=plates,
        shapes={name: _unconstrained_shape(site) for name, site in latents.items()},
        held=held,
        warned_params=tuple(
            n for n, s in model_trace.items() if s["type"] == "param" and not n.endswith(("$params", "$state"))
        ),
    )


def warn_held(layout: Layout) -> None:
    """Tell the user of param sites that keep the value they have at set-up."""
    if layout.warned_params:
        warnings.warn(
            f"param sites {list(layout.warned_params)} are held at their initial values: MCMC samples latent "
            "sites only. Give them priors (numpyro.sample) to infer them",
            UserWarning,
            stacklevel=3,
        )


def warn_not_finite(args: tuple, kwargs: dict) -> None:
    """Tell the user of data that are not finite, which only some minibatches meet."""
    for leaf in jax.tree.leaves((args, kwargs)):
        known = isinstance(leaf, Array) and not isinstance(leaf, jax.core.Tracer)
        if known and jnp.issubdtype(leaf.dtype, jnp.inexact) and not bool(jnp.isfinite(leaf).all()):
            warn_data(leaf.shape)
