"""What a finished Pyro MCMC holds, and a model replayed on draws, as NumPy arrays for `bnn_ppl.export`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import MCMC
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Distribution, Transform

from bnn_ppl.pyro.gradient_noise import gradient_noise as variance_of_gradient
from bnn_ppl.pyro.gradient_noise import undisturbed
from bnn_ppl.pyro.kernel import StochasticGradientKernel
from bnn_ppl.pyro.layout import plates_of, to_numpy
from bnn_ppl.pyro.plates import FullData, any_number_of_rows
from bnn_ppl.pyro.potential import potential_energy
from bnn_ppl.results import Results, Site, bound_arguments, missing_latents


def read(mcmc: Any) -> Results:
    """What a finished MCMC holds.

    Parameters
    ----------
    mcmc
        ``pyro.infer.MCMC`` after ``run``.

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
        raise TypeError(f"mcmc must be a pyro.infer.MCMC, got {type(mcmc).__name__}")
    if mcmc._samples is None:
        raise ValueError("mcmc has no draws yet: call mcmc.run first")
    kernel = mcmc.kernel
    ours = isinstance(kernel, StochasticGradientKernel)
    modelled = ours and kernel._model is not None
    samples = mcmc.get_samples(group_by_chain=True)
    model, held, plates = getattr(kernel, "model", None), {}, {}
    if ours and model is not None:
        model, held, plates = kernel._model, kernel._layout.held, kernel._layout.plates
    sites: dict[str, Site] = {}
    if model is not None:
        rows = {p.name: np.arange(p.batch_size) for p in plates.values() if p.subsampled}
        with random_state_kept():
            first = Replay({name: value[0, 0] for name, value in samples.items()}, held, rows)
            found = first.run(model, mcmc._args, mcmc._kwargs)
        plates = plates or plates_of(found)
        held = held or {n: s["value"].detach() for n, s in found.items() if s["type"] == "param"}
        sites = describe(found)
    full_batch = not any(plate.subsampled for plate in plates.values()) and not (modelled and model is None)
    statistics = _statistics(mcmc, full_batch)
    settings = {"kernel": type(kernel).__name__, "num_warmup": mcmc.warmup_steps, "thinning": 1}
    return Results(
        samples=samples,
        statistics=statistics,
        shape=(mcmc.num_chains, mcmc.num_samples),
        plates=plates,
        sites=sites,
        settings=settings | (vars(kernel.settings) if ours else {}),
        libraries={"inference_library": "pyro", "inference_library_version": pyro.__version__},
        model=model,
        held=held,
        args=mcmc._args,
        kwargs=mcmc._kwargs,
        arguments={} if model is None else by_parameter(model, mcmc._args, mcmc._kwargs),
        site_names=sorted(kernel._layout.shapes if modelled else samples),
    )


def _statistics(mcmc: MCMC, full_batch: bool) -> dict[str, np.ndarray]:
    # Never through mcmc.diagnostics(), which computes the effective sample size of every weight.
    diverging = np.zeros((mcmc.num_chains, mcmc.num_samples), bool)
    for chain, diagnostics in enumerate(mcmc._diagnostics):
        for draw in diagnostics.get("divergences", []):
            diverging[chain, draw] = True
    statistics = {}
    for name in getattr(mcmc.kernel, "statistic_fields", ()):
        if name != "diverging":
            values = [to_numpy(diagnostics[name]) for diagnostics in mcmc._diagnostics]
            statistics["lp" if full_batch and name == "lp_minibatch" else name] = np.stack(values)
    return statistics | {"diverging": diverging}


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Without gradients and validation (as the host samples), and with the random state restored at the end."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.no_grad(), torch.random.fork_rng(devices), pyro.validation_enabled(False):
        yield


class HoldParams(Messenger):
    """Give param sites their values, where these are known; the others have theirs from Pyro's store."""

    def __init__(self, held: Mapping[str, Any]):
        super().__init__()
        self.held = held
        self._own: list[tuple[torch.nn.Parameter, Tensor]] = []

    def _pyro_param(self, msg: dict) -> None:
        if msg["name"] not in self.held:
            return
        msg["value"], msg["done"] = self.held[msg["name"]], True
        start = msg["args"][1] if len(msg["args"]) > 1 else None
        if isinstance(start, torch.nn.Parameter):  # modules tell of these, and read their own all the same
            self._own.append((start, start.data))
            start.data = torch.as_tensor(msg["value"]).detach()

    def _pyro_sample(self, msg: dict) -> None:
        # The parameter itself has its own value again when somebody reads the law in a trace.
        if self._own:
            msg["fn"] = _detached(msg["fn"], {id(parameter) for parameter, _ in self._own})

    def __exit__(self, *error: Any) -> None:
        for parameter, data in reversed(self._own):
            parameter.data = data
        self._own.clear()
        super().__exit__(*error)


def _detached(value: Any, parameters: set[int]) -> Any:
    """A distribution without these parameters, which are there as tensors of their own; itself if it has none."""
    if id(value) in parameters:
        return value.detach()
    if type(value) in (list, tuple):
        parts = [_detached(part, parameters) for part in value]
        return type(value)(parts) if any(a is not b for a, b in zip(parts, value, strict=True)) else value
    if not isinstance(value, Distribution | Transform) or isinstance(value, torch.nn.Module):
        return value
    inside = {k: old for k, old in vars(value).items() if k != "_inv"}  # an inverse, which leads back here
    changed = {k: new for k, old in inside.items() if (new := _detached(old, parameters)) is not old}
    if not changed:
        return value
    found = copy(value)
    vars(found).update(changed)
    return found


class Replay(HoldParams):
    """Put values, held parameters and rows of the plates into a model."""

    def __init__(self, values: Mapping[str, Tensor], held: Mapping[str, Any], rows: Mapping[str, np.ndarray]):
        super().__init__(held)
        self.values = values
        self.rows = rows

    def trace(self, model: Any, args: tuple, kwargs: dict) -> poutine.Trace:
        """Trace of the model; plates without rows draw their own."""
        with poutine.block(), self:
            return poutine.trace(model).get_trace(*args, **kwargs)

    def run(self, model: Any, args: tuple, kwargs: dict) -> dict[str, dict]:
        """Sites of the model; plates without rows have all of them."""
        with any_number_of_rows():
            return dict(self.trace(model, args, kwargs).nodes)

    def _pyro_sample(self, msg: dict) -> None:
        super()._pyro_sample(msg)
        name, fn = msg["name"], msg["fn"]
        if isinstance(fn, _Subsample):
            if name in self.rows:
                msg["value"] = torch.as_tensor(self.rows[name], device=fn.device)
        elif msg["is_observed"]:
            self.observe(msg)
        elif name in self.values:
            msg["value"], msg["done"] = self.values[name], True

    def observe(self, msg: dict) -> None:
        """What happens at an observed site: nothing."""


class _SampleObserved(Replay):
    """Sample the observed sites, with a seed for each site, draw and chunk of the plates around the site.

    A site outside the plates then has the same value in all their chunks.
    """

    entropy: tuple[int, ...]
    chunk: Mapping[str, int]
    numbers: Mapping[str, int]

    def observe(self, msg: dict) -> None:
        """Seed the site and let it sample."""
        if msg["infer"].get("_deterministic"):
            return
        chunks = [self.chunk.get(frame.name, 0) for frame in msg["cond_indep_stack"]]
        words = np.random.SeedSequence([*self.entropy, self.numbers[msg["name"]], *chunks])
        torch.manual_seed(int(words.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        msg["value"], msg["is_observed"], msg["done"] = None, False, False


def describe(found: Mapping[str, dict]) -> dict[str, Site]:
    """Sites of a trace that have values: latent, observed and deterministic ones, and factors."""
    return {name: site for name in found if (site := _describe(found[name])) is not None}


def _describe(site: dict) -> Site | None:
    if site["type"] != "sample" or isinstance(site["fn"], _Subsample):
        return None
    plates = {frame.name: frame.dim for frame in site["cond_indep_stack"] if frame.dim is not None}
    if site["infer"].get("_deterministic"):
        # Where its event begins is not known: the outermost plate is taken for its first dimension.
        deepest = max((-dim for dim in plates.values()), default=0)
        return Site("deterministic", plates, max(site["value"].ndim - deepest, 0))
    kind = "observed" if site["is_observed"] else "latent"
    if kind == "observed" and not torch.as_tensor(site["value"]).numel():
        kind = "factor"
    return Site(kind, plates, site["fn"].event_dim)


def unwrapped(model: Any) -> Callable:
    """The function whose arguments are those of a model."""
    while isinstance(model, FullData):
        model = model.model
    return model.forward if isinstance(model, torch.nn.Module) else model


def by_parameter(model: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Array arguments of a model by the names of its parameters."""
    named = bound_arguments(unwrapped(model), args, kwargs)
    return {name: value for name, value in named.items() if _is_array(value)}


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc")


def arguments(results: Results) -> dict[str, np.ndarray]:
    """Array arguments of the model by name."""
    return {name: to_numpy(value) for name, value in results.arguments.items()}


def gradient_noise(mcmc: MCMC, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Variance of the minibatch gradients at the last draws, shape (chain, site), and coordinates of the sites."""
    kernel: Any = mcmc.kernel
    layout, settings = kernel._layout, kernel.settings
    names = sorted(layout.shapes)
    sizes = [layout.shapes[name].numel() for name in names]
    found = []
    for diagnostics in mcmc._diagnostics:
        state = diagnostics["last_state"]
        flat = torch.cat([state["params"][name].reshape(-1) for name in names])
        temperature = float(settings.temperature_at(state["step"]))

        def energy(flat: Tensor, temperature: float, batch: dict[str, Tensor]) -> Tensor:
            pieces = zip(names, flat.split(sizes), strict=True)
            z = {name: piece.reshape(layout.shapes[name]) for name, piece in pieces}
            arguments = mcmc._args, mcmc._kwargs, settings.likelihood_temperature
            return potential_energy(kernel._model, layout, z, temperature, batch, *arguments)

        with undisturbed(flat.device):
            torch.manual_seed(seed)
            at_draw = partial(torch.func.grad(energy), flat, temperature)
            variance = variance_of_gradient(at_draw, layout.subsampled, layout.devices, count, settings.subsampling)
        found.append([float(part.mean()) for part in variance.split(sizes)])
    return np.array(found), np.array(sizes)


def deterministics(results: Results) -> list[str]:
    """Deterministic sites outside subsampled plates, which the host's MCMC does not collect."""
    small = {plate.name for plate in results.plates.values() if plate.subsampled}
    return [
        name for name, site in results.sites.items() if site.kind == "deterministic" and not small & set(site.plates)
    ]


def posterior(results: Results, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Draws of some sites, shapes (chain, draw, ...); deterministic ones are computed from the others."""
    computed = [name for name in names if name not in results.samples]
    values = {}
    if computed:
        _check_complete(results, f"the deterministic sites {computed}")
        rows = {p.name: np.arange(p.batch_size) for p in results.plates.values() if p.subsampled}

        def replay(chain: int, draw: int) -> dict[str, Tensor]:
            found = Replay(_one_draw(results, chain, draw), results.held, rows).run(
                results.model, results.args, results.kwargs
            )
            return {name: found[name]["value"] for name in computed}

        values = _over_draws(results, replay)
    return {name: values[name] if name in values else to_numpy(results.samples[name]) for name in names}


def _one_draw(results: Results, chain: int, draw: int) -> dict[str, Tensor]:
    if results.guide is not None:
        return results.guide.latents(results.guide.inputs, draw)
    return {name: value[chain, draw] for name, value in results.latents.items()}


def _check_complete(results: Results, what: str) -> None:
    missing = missing_latents(results)
    if missing:
        raise ValueError(f"{what} need the draws of all latent sites, and those of {missing} were not kept")


def _over_draws(results: Results, replay: Callable[[int, int], dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """Results of one draw after another: the activations of all at once may not fit into memory."""
    values: dict[str, np.ndarray] = {}
    with random_state_kept():
        for chain, draw in np.ndindex(*results.shape):
            for name, value in replay(chain, draw).items():
                array = to_numpy(value)
                if name not in values:
                    values[name] = np.empty((*results.shape, *array.shape), array.dtype)
                values[name][chain, draw] = array
    return values


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

    Warns
    -----
    UserWarning
        If batch normalisation runs in training mode, or with running statistics that were never updated.
    """
    from bnn_ppl.pyro.batch_norm import warns_of_statistics  # which imports this

    if what != "observed":
        _check_complete(results, f"{what}=True:")
    checks = [warns_of_statistics(stacklevel=6)]
    numbers = {name: i for i, name in enumerate(results.sites)}

    def evaluate(wanted: Sequence[str], rows: Mapping[str, np.ndarray], chunk: Mapping[str, int]) -> dict:
        def replay(chain: int, draw: int) -> dict[str, Tensor]:
            kind = _SampleObserved if what == "posterior_predictive" else Replay
            one = kind(_one_draw(results, chain, draw), results.held, rows)
            if isinstance(one, _SampleObserved):
                one.entropy, one.chunk, one.numbers = (seed, chain, draw), chunk, numbers
            sites = one.run(results.model, results.args, results.kwargs)
            return {
                name: _log_prob(sites[name]) if what == "log_likelihood" else sites[name]["value"] for name in wanted
            }

        if what == "observed":
            with random_state_kept():
                return {name: to_numpy(value) for name, value in replay(0, 0).items()}
        with checks.pop() if checks else nullcontext():  # the first chunk tells
            return _over_draws(results, replay)

    return evaluate


def _log_prob(site: dict) -> Tensor:
    """Log density of each row, 0 where it is masked, and without the scale of the plates, as the hosts have it."""
    return scale_and_mask(site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]), 1.0, site["mask"])
