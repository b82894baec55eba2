"""What a finished NumPyro MCMC holds, and a model replayed on draws, as NumPy arrays for `bnn_ppl.export`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import lax, random
from numpyro.distributions.distribution import validation_enabled
from numpyro.handlers import seed as seed_handler
from numpyro.handlers import substitute, trace
from numpyro.infer import MCMC
from numpyro.primitives import Messenger
from numpyro.util import is_prng_key

from bnn_ppl.numpyro.compilation import jit_over_data
from bnn_ppl.numpyro.gradient_noise import gradient_noise as variance_of_gradient
from bnn_ppl.numpyro.kernel import StochasticGradientKernel
from bnn_ppl.numpyro.layout import plates_of
from bnn_ppl.numpyro.plates import FullData, SetPlates, as_arrays
from bnn_ppl.results import Results, Site, bound_arguments, missing_latents

# Names that ArviZ gives to the statistics of the host's kernels.
_ARVIZ_NAMES = {
    "adapt_state.step_size": "step_size",
    "num_steps": "n_steps",
    "accept_prob": "acceptance_rate",
    "potential_energy": "lp",
}


def to_numpy(value: Any) -> np.ndarray:
    """An array as NumPy, not copied where it is on the CPU."""
    value = np.asarray(value)
    return value.astype(np.float32) if value.dtype.kind == "V" else value  # bfloat16


def read(mcmc: Any) -> Results:
    """What a finished MCMC holds.

    Parameters
    ----------
    mcmc
        ``numpyro.infer.MCMC`` after ``run``.

    Returns
    -------
    Results

    Raises
    ------
    TypeError
        If it is something else.
    ValueError
        If it has not run.
    """
    if not isinstance(mcmc, MCMC):
        raise TypeError(f"mcmc must be a numpyro.infer.MCMC, got {type(mcmc).__name__}")
    if mcmc._states is None or _only_warmed_up(mcmc):
        raise ValueError("mcmc has no draws yet: call mcmc.run first")
    kernel = mcmc.sampler
    ours = isinstance(kernel, StochasticGradientKernel)
    modelled = ours and kernel._model is not None
    samples = _by_name(mcmc.get_samples(group_by_chain=True))
    args, kwargs = as_arrays((mcmc._args, mcmc._kwargs))
    model, held, plates = getattr(kernel, "model", None), {}, {}
    if ours and model is not None:
        layout = kernel._layout(args, kwargs)
        model, held, plates = kernel._model, layout.held, layout.plates
    sites: dict[str, Site] = {}
    if model is not None:
        rows = {p.name: np.arange(p.batch_size) for p in plates.values() if p.subsampled}
        found = sites_of(model, {n: v[0, 0] for n, v in samples.items()} | held, rows, args, kwargs)
        plates = plates or plates_of(found)
        held = held or {n: s["value"] for n, s in found.items() if s["type"] in ("param", "mutable")}
        sites = describe(found)
    full_batch = not any(plate.subsampled for plate in plates.values()) and not (modelled and model is None)
    statistics = _statistics(mcmc, full_batch)
    settings = {"kernel": type(kernel).__name__, "num_warmup": mcmc.num_warmup, "thinning": mcmc.thinning}
    return Results(
        samples=samples,
        statistics=statistics,
        shape=next(iter(samples.values())).shape[:2],
        plates=plates,
        sites=sites,
        settings=settings | (vars(kernel.settings) if ours else {}),
        libraries={"inference_library": "numpyro", "inference_library_version": numpyro.__version__},
        model=model,
        held=held,
        args=args,
        kwargs=kwargs,
        arguments={} if model is None else by_parameter(model, mcmc._args, mcmc._kwargs),
        site_names=sorted(kernel._layout(*kernel._arguments(args, kwargs)).shapes if modelled else samples),
    )


def _only_warmed_up(mcmc: MCMC) -> bool:
    """Whether only ``MCMC.warmup`` was called, after which the host has zeros in the place of draws."""
    if mcmc._warmup_state is None or mcmc._warmup_state is not mcmc._last_state:
        return False
    return not any(jnp.any(leaf) for leaf in jax.tree.leaves(mcmc._states[mcmc.sampler.sample_field]))


def _by_name(samples: Any) -> dict[str, Any]:
    """Draws by site; those of a potential_fn as ArviZ names them."""
    if hasattr(samples, "_asdict"):
        samples = samples._asdict()
    if isinstance(samples, dict) and all(hasattr(value, "shape") for value in samples.values()):
        return samples
    return {f"Param:{i}": value for i, value in enumerate(jax.tree.leaves(samples))}


def _statistics(mcmc: MCMC, full_batch: bool) -> dict[str, np.ndarray]:
    names = _ARVIZ_NAMES | ({"lp_minibatch": "lp"} if full_batch else {})
    statistics = {}
    for name, value in mcmc.get_extra_fields(group_by_chain=True).items():
        if hasattr(value, "shape") and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            sign = -1 if name == "potential_energy" else 1
            statistics[names.get(name, name)] = to_numpy(value) if sign == 1 else -to_numpy(value)
    return statistics


def sites_of(
    model: Callable, values: dict, rows: Mapping[str, np.ndarray], args: tuple, kwargs: dict
) -> dict[str, dict]:
    """Trace of a model with these values and rows of its plates."""
    seeded = seed_handler(substitute(model, data=values), random.key(0))
    model = SetPlates(seeded, lambda name, size, b: jnp.asarray(rows[name]) if name in rows else None)
    with validation_enabled(False):  # as the host samples: a draw may lie at the edge of a support
        return trace(model).get_trace(*args, **kwargs)


def describe(found: Mapping[str, dict]) -> dict[str, Site]:
    """Sites of a trace that have values: latent, observed and deterministic ones, and factors."""
    return {name: site for name in found if (site := _describe(found[name])) is not None}


def _describe(site: dict) -> Site | None:
    if site["type"] not in ("sample", "deterministic"):
        return None
    plates = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
    if site["type"] == "deterministic":
        # Where its event begins is not known: the outermost plate is taken for its first dimension.
        deepest = max((-dim for dim in plates.values()), default=0)
        return Site("deterministic", plates, max(jnp.ndim(site["value"]) - deepest, 0))
    kind = "observed" if site["is_observed"] else "latent"
    if kind == "observed" and not jnp.size(site["value"]):
        kind = "factor"
    return Site(kind, plates, len(site["fn"].event_shape))


def unwrapped(model: Any) -> Callable:
    """A model without the handlers around it."""
    while isinstance(model, Messenger | FullData):
        model = model.fn if isinstance(model, Messenger) else model.model
    return model


def by_parameter(model: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Array arguments of a model by the names of its parameters."""
    named = bound_arguments(unwrapped(model), args, kwargs)
    return {name: value for name, value in named.items() if _is_array(value)}


def _is_array(value: Any) -> bool:
    if isinstance(value, jax.Array):
        return not jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return isinstance(value, np.ndarray) and value.dtype.kind in "biufc"


def arguments(results: Results) -> dict[str, np.ndarray]:
    """Array arguments of the model by name."""
    return {name: to_numpy(value) for name, value in results.arguments.items()}


def gradient_noise(mcmc: MCMC, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Variance of the minibatch gradients at the last draws, shape (chain, site), and coordinates of the sites."""
    kernel: Any = mcmc.sampler
    args, kwargs = as_arrays((mcmc._args, mcmc._kwargs))
    state = mcmc.last_state
    one = is_prng_key(state.rng_key)
    z = jax.tree.map(lambda x: x[None], state.z) if one else state.z
    temperature = kernel.settings.temperature_at(jnp.max(state.step))

    def over_chains(args: tuple, kwargs: dict, z: Any) -> dict[str, jax.Array]:
        target = kernel._target(args, kwargs)
        rest = temperature, random.key(seed), count, kernel.settings.subsampling
        return lax.map(lambda z: variance_of_gradient(target, z, *rest), z)

    found = jit_over_data(over_chains, args, kwargs)(z)
    return np.stack([to_numpy(found[n]) for n in sorted(found)], -1), np.array([z[n][0].size for n in sorted(found)])


def deterministics(results: Results) -> list[str]:
    """Deterministic sites that are computed by `posterior`: none, for the host's MCMC collects them."""
    return []


def posterior(results: Results, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Draws of some sites, shapes (chain, draw, ...)."""
    return {name: to_numpy(results.samples[name]) for name in names}


class _SampleObserved(Messenger):
    """Sample the observed sites, with a key for each site, draw and chunk of the plates around the site.

    A site outside the plates then has the same value in all their chunks.
    """

    def __init__(self, fn: Callable, key: Any, chunk: Mapping[str, Any], sites: Mapping[str, Site]):
        super().__init__(fn)
        self.key = key
        self.chunk = chunk
        self.numbers = {name: i for i, name in enumerate(sites)}

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "sample" and msg["is_observed"]:
            key = random.fold_in(self.key, self.numbers[msg["name"]])
            for frame in msg["cond_indep_stack"]:
                key = random.fold_in(key, self.chunk.get(frame.name, 0))
            msg["value"], msg["is_observed"], msg["kwargs"]["rng_key"] = None, False, key


def evaluator(results: Results, what: str, names: Sequence[str], seed: int) -> Callable:
    """Function that evaluates observed sites on some rows, under each draw.

    Parameters
    ----------
    results
        From `read`.
    what
        ``"observed"``: their values; ``"log_likelihood"`` and ``"posterior_predictive"``: for each draw.
    names
        The sites that will be asked for.
    seed
        Of the predictions.

    Returns
    -------
    callable
        Of the wanted sites, the row indices (B,) of each subsampled plate, and the number of the chunk of each, which
        are all dicts by plate; it returns arrays by site, with chain and draw in front except for ``"observed"``.

    Raises
    ------
    ValueError
        If draws of latent sites are missing.
    """
    missing = missing_latents(results)
    if what != "observed" and missing:
        raise ValueError(f"{what}=True needs the draws of all latent sites, and those of {missing} were not kept")
    leaves, structure = jax.tree.flatten((results.args, results.kwargs))
    # Data are arguments of the compiled function; what is no array, such as a string, stays as it is.
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def one(draw: dict, index: tuple, data: list, rows: dict, chunk: dict, wanted: tuple[str, ...]) -> dict:
        filled = list(leaves)
        for i, array in zip(where, data, strict=True):
            filled[i] = array
        args, kwargs = jax.tree.unflatten(structure, filled)
        key = random.key(seed)
        for i in index:
            key = random.fold_in(key, i)
        model: Callable = seed_handler(substitute(results.model, data=results.held | draw), key)
        if what == "posterior_predictive":
            model = _SampleObserved(model, random.fold_in(key, 0), chunk, results.sites)
        found = trace(SetPlates(model, lambda name, size, b: rows.get(name))).get_trace(*args, **kwargs)
        if what == "log_likelihood":
            return {name: found[name]["fn"].log_prob(found[name]["value"]) for name in wanted}
        return {name: jnp.asarray(found[name]["value"]) for name in wanted}

    guide = results.guide
    inputs = results.latents if guide is None else guide.inputs

    def all_draws(draws: Any, data: list, rows: dict, chunk: dict, wanted: tuple[str, ...]) -> dict:
        if guide is not None:
            if what == "observed":
                return one(guide.latents(draws, 0), (), data, rows, chunk, wanted)
            found = lax.map(
                lambda i: one(guide.latents(draws, i), (0, i), data, rows, chunk, wanted), jnp.arange(results.shape[1])
            )
            return {name: value[None] for name, value in found.items()}
        if what == "observed":
            return one(jax.tree.map(lambda x: x[0, 0], draws), (), data, rows, chunk, wanted)
        # One draw after another: the activations of all at once may not fit into memory.
        chains, number = jnp.arange(results.shape[0]), jnp.arange(results.shape[1])

        def one_chain(x: tuple) -> dict:
            return lax.map(lambda y: one(y[0], (x[1], y[1]), data, rows, chunk, wanted), (x[0], number))

        return lax.map(one_chain, (draws, chains))

    data = [leaves[i] for i in where]
    compiled = jax.jit(all_draws, static_argnames="wanted")
    with_data_inside = jax.jit(
        lambda draws, rows, chunk, wanted: all_draws(draws, data, rows, chunk, wanted), static_argnames="wanted"
    )
    reads_values: list[bool] = []

    def evaluate(wanted: Sequence[str], rows: Mapping[str, np.ndarray], chunk: Mapping[str, int]) -> dict:
        indices = {name: jnp.asarray(index) for name, index in rows.items()}
        numbers = {name: jnp.uint32(i) for name, i in chunk.items()}
        if not reads_values:
            try:
                values = compiled(inputs, data, indices, numbers, wanted=tuple(wanted))
            except jax.errors.JAXTypeError:  # a model that looks at the values of its arguments
                reads_values.append(True)
        if reads_values:
            values = with_data_inside(inputs, indices, numbers, wanted=tuple(wanted))
        return {name: to_numpy(value) for name, value in values.items()}

    return evaluate
