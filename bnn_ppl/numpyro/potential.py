"""From a NumPyro model and its arguments to a minibatch potential over unconstrained sites.

With theta = t(z) for unconstrained z and a transform t at each latent site, U_c(theta) = -log p(y, theta) and J
the Jacobian of t, the potential at temperature T is::

    U_T(z) = U_c(t(z)) - T log |J(z)|

so that a sampler at temperature T draws theta from p(theta, y)^(1/T) in the user's own coordinates, and T = 0
finds their MAP. On a minibatch the plates scale the observed sites by N / B, which makes U_T unbiased.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
import warnings

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to, constraints
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.util import compute_log_probs, helpful_support_errors, log_density
from numpyro.primitives import Messenger

from bnn_ppl.numpyro.initialization import init_to_prior_center
from bnn_ppl.settings import Plate, resolve_batch_size

Sites = dict[str, Array]


class _SetPlates(Messenger):
    """Give plates their rows: `rows(name, size, subsample_size)` returns indices, or None to leave one alone."""

    def __init__(self, fn: Callable, rows: Callable[[str, int, int | None], Array | None]):
        super().__init__(fn)
        self.rows = rows

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "plate":
            size, subsample_size = msg["args"]
            indices = self.rows(msg["name"], size, subsample_size)
            if indices is not None:
                msg["value"] = indices
                msg["args"] = (size, indices.shape[0])


class _FindRandomKeys(Messenger):
    """Note whether the model asks for random keys of its own."""

    found = False

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "prng_key":
            self.found = True


class FullData(NamedTuple):
    """A model whose subsampled plates hold all their rows; made by `full_data`."""

    model: Callable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on all rows."""
        whole = _SetPlates(self.model, lambda name, size, subsample_size: jnp.arange(size))
        args, kwargs = as_arrays((args, kwargs))
        return whole(*args, **kwargs)


def full_data(model: Callable) -> Callable:
    """View of a model in which every subsampled plate holds all its rows.

    Parameters
    ----------
    model
        A NumPyro model; its data pass through the plate's indices or ``numpyro.subsample``.

    Returns
    -------
    callable
        The same model on the full data, for ``Predictive``, ``log_likelihood`` and everything else of the host
        that would silently see one minibatch otherwise.
    """
    return model if isinstance(model, FullData) else FullData(model)


@dataclass(frozen=True)
class Layout:
    """What one look at a model tells: its plates, latent sites and the values that stay fixed."""

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


def as_arrays(tree: Any) -> Any:
    """Model arguments with NumPy arrays made into JAX arrays, which traced indices can index."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) and x.dtype.kind in "biufc" else x, tree)


def _conditioned(model: Callable, layout: Layout, batch: Mapping[str, Array]) -> Callable:
    """The model with its held values and a minibatch put in."""
    held = substitute(model, data=layout.held)
    return _SetPlates(held, lambda name, size, subsample_size: batch.get(name))


def _plates_of(model_trace: Mapping[str, dict]) -> dict[str, Plate]:
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
                "random_eqx_module) must be made outside the data plate and called inside"
            )
    if complete and not latents:
        raise ValueError("the model has no latent sites to sample: every sample statement is observed")


def _check_rows(model_trace: Mapping[str, dict], plates: Mapping[str, Plate], cut: Mapping[str, int]) -> None:
    for name, site in model_trace.items():
        if site["type"] != "sample" or not site["is_observed"]:
            continue
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
    model: Callable, held: Mapping[str, Any], cut: Mapping[str, int], args: tuple, kwargs: dict
) -> tuple[dict[str, dict], bool]:
    """Trace of the model on the first rows of each plate, and whether it drew random keys of its own."""

    def first_rows(name: str, size: int, subsample_size: int | None) -> Array:
        return jnp.arange(cut.get(name, subsample_size or size))

    key = jax.random.key(0)
    keys = _FindRandomKeys(seed(substitute(model, data=held), key))
    started = substitute(keys, substitute_fn=init_to_prior_center())
    recorder = trace(_SetPlates(started, first_rows))
    try:
        model_trace = recorder.get_trace(*args, **kwargs)
    except Exception as error:
        # A network inside the data plate has weights of shapes with which the model may fail.
        plates = _plates_of(recorder.trace)
        _check_latents(recorder.trace, plates, complete=False)
        subsampled = [name for name, plate in plates.items() if plate.subsampled]
        if subsampled and _works(full_data(model), held, args, kwargs):
            name = subsampled[0]
            raise ValueError(f"the model fails on a minibatch of plate {name!r}{_pass_through(name, cut)}") from error
        raise
    return model_trace, keys.found


def _works(model: Callable, held: Mapping[str, Any], args: tuple, kwargs: dict) -> bool:
    try:
        _look(model, held, {}, args, kwargs)
    except Exception:
        return False
    return True


def inspect(
    model: Callable, args: tuple, kwargs: dict, batch_size: int | Mapping[str, int] | None, held: dict | None = None
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
    jax.eval_shape(lambda: found.append(_inspect(model, args, kwargs, batch_size, held)))
    if held is not None or not found[0].held:
        return found[0]
    with jax.ensure_compile_time_eval():
        return _inspect(model, args, kwargs, batch_size, held)


def _inspect(
    model: Callable, args: tuple, kwargs: dict, batch_size: int | Mapping[str, int] | None, held: dict | None
) -> Layout:
    model_trace, _ = _look(model, held or {}, {}, args, kwargs)
    for site in model_trace.values():
        if site["type"] == "plate" and site["args"][1] is not None and site["args"][1] > site["args"][0]:
            raise ValueError(
                f"plate {site['name']!r} has subsample_size={site['args'][1]}, more than its {site['args'][0]} rows"
            )
    cut = resolve_batch_size(_plates_of(model_trace), batch_size)
    if held is None:
        held = {n: s["value"] for n, s in model_trace.items() if s["type"] in ("param", "mutable")}
    model_trace, random_keys = _look(model, held, cut, args, kwargs)
    _check_rows(model_trace, _plates_of(model_trace), cut)
    if random_keys:
        raise ValueError(
            "the model draws random keys of its own (numpyro.prng_key, as dropout does), which has no fixed "
            "potential: switch that off, or make the noise a sample site"
        )
    plates = _plates_of(model_trace)
    _check_latents(model_trace, plates)
    latents = {n: s for n, s in model_trace.items() if s["type"] == "sample" and not s["is_observed"]}
    return Layout(
        plates=plates,
        shapes={name: jnp.shape(site["value"]) for name, site in latents.items()},
        held=held,
        warned_params=tuple(
            n for n, s in model_trace.items() if s["type"] == "param" and not n.endswith(("$params", "$state"))
        ),
    )


def _is_kept_deterministic(site: dict, plates: Mapping[str, Plate]) -> bool:
    if site["type"] != "deterministic":
        return False
    return not any(plates[frame.name].subsampled for frame in site["cond_indep_stack"])


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


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
        return value if _is_real(site["fn"].support) else _transform(site)(value)

    return substitute(model, substitute_fn=constrain)


def potential_energy(
    model: Callable,
    layout: Layout,
    z: Sites,
    temperature: Array | float,
    batch: Mapping[str, Array],
    args: tuple,
    kwargs: dict,
) -> Array:
    """Minibatch potential U_T(z).

    Parameters
    ----------
    model, layout
        The model and what `inspect` found in it.
    z
        Unconstrained values by latent site.
    temperature
        T; it weighs the log-Jacobian only.
    batch
        Row indices, shape (B,), by subsampled plate.
    args, kwargs
        Arguments of the model.

    Returns
    -------
    Array
        Scalar.
    """
    conditioned = _constrained(_conditioned(model, layout, batch), z)
    log_joint, model_trace = log_density(conditioned, args, kwargs, {})
    log_jacobian = 0.0
    for name, value in z.items():
        site = model_trace[name]
        if not _is_real(site["fn"].support):
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


def explain_not_finite(
    model: Callable, layout: Layout, z: Sites, batch: Mapping[str, Array], args: tuple, kwargs: dict
) -> str:
    """Which sites make the potential non-finite at `z`, in words."""
    conditioned = _constrained(_conditioned(model, layout, batch), z)
    log_probs, model_trace = compute_log_probs(conditioned, args, kwargs, {}, sum_log_prob=False)
    causes = []
    for name, log_prob in log_probs.items():
        bad = np.argwhere(~np.isfinite(np.asarray(log_prob)))
        if bad.size or bad.shape[0]:
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


def warn_held(layout: Layout) -> None:
    """Tell the user of param sites that keep the value they have at set-up."""
    if layout.warned_params:
        warnings.warn(
            f"param sites {list(layout.warned_params)} are held at their initial values: MCMC samples latent "
            "sites only. Give them priors (numpyro.sample) to infer them",
            UserWarning,
            stacklevel=3,
        )
