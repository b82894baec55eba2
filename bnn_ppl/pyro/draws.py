"""Where `predict` has its draws from: a finished MCMC, a dict of draws, or a guide."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from pyro.infer import MCMC, SVI
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from bnn_ppl import responses
from bnn_ppl.pyro.results import HoldParams
from bnn_ppl.pyro.results import read as read_mcmc


class Origin(NamedTuple):
    """A model, values of its param sites, its draws, and how to read those of some sites at some indices.

    `samples` are all draws, the first one of a guide, or its medians.
    """

    model: Callable
    held: dict[str, Any]
    draws: responses.Draws
    samples: dict[str, Tensor]
    read: Callable[..., dict[str, Tensor]]


def origin_of(
    source: Any,
    model: Any,
    params: dict[str, Any],
    scheme: str,
    num_draws: int | None,
    seed: int,
    args: tuple,
    kwargs: dict,
) -> Origin:
    """Draws and model; `args` and `kwargs` are those of the model, which guides take too, the rest as in `predict`."""
    if isinstance(source, MCMC):
        results = read_mcmc(source)
        samples, held = results.samples, results.held
        observed: tuple[str, ...] = ()
        if model is None and results.model is not None:
            model = results.model
            observed = tuple(name for name, site in results.sites.items() if site.kind == "observed")
        elif model is None:  # with minibatches=, kernels hide their model, for which nobody has all data
            model = getattr(source.kernel, "_model", None)
            responses.check_model(model, "a chain of a potential_fn")
            held = source.kernel._layout.held
        draws = responses.Draws(_shapes(samples), (2,), observed)
        return Origin(model, held | params, draws, samples, partial(_take, samples))
    if isinstance(source, Mapping):
        responses.check_model(model, "a dict of draws")
        responses.check_draws(source)
        samples = {name: v if isinstance(v, Tensor) else torch.as_tensor(np.asarray(v)) for name, v in source.items()}
        return Origin(model, params, responses.Draws(_shapes(samples), (1, 2)), samples, partial(_take, samples))
    responses.check_source(source, "pyro", SVI)
    params = getattr(source, "averaged_params", {}) | params
    responses.check_model(model, "a guide")
    responses.check_trained(source)
    if responses.takes_medians(source, scheme, num_draws):
        samples = {name: value[None] for name, value in _medians(source, params, args, kwargs).items()}
        return Origin(model, params, responses.Draws(_shapes(samples), (1,)), samples, partial(_take, samples))

    def read(names: list[str], index: np.ndarray) -> dict[str, Tensor]:
        some = [_guide_draw(source, params, seed, int(number), args, kwargs) for number in index]
        return {name: torch.stack([draw[name] for draw in some]) for name in names}

    first = {name: value[None] for name, value in _guide_draw(source, params, seed, 0, args, kwargs).items()}
    total = 1 if scheme == "stochastic" else num_draws or responses.GUIDE_DRAWS
    shapes = {name: (total, *shape[1:]) for name, shape in _shapes(first).items()}
    return Origin(model, params, responses.Draws(shapes, (1,)), first, read)


def _shapes(samples: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in samples.items()}


def _take(samples: Mapping[str, Tensor], names: list[str], *index: np.ndarray) -> dict[str, Tensor]:
    return {name: samples[name][tuple(map(torch.as_tensor, index))] for name in names}


def _guide_draw(
    guide: Callable, params: Mapping[str, Any], seed: int, number: int, args: tuple, kwargs: dict
) -> dict[str, Tensor]:
    """The draw of a number, values by site, whatever was drawn before."""
    torch.manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    with poutine.block(), HoldParams(params):
        sites = poutine.trace(guide).get_trace(*args, **kwargs).nodes
    return {
        name: site["value"]
        for name, site in sites.items()
        if site["type"] == "sample" and not isinstance(site["fn"], _Subsample)
    }


def _medians(guide: Any, params: Mapping[str, Any], args: tuple, kwargs: dict) -> dict[str, Tensor]:
    """Medians by site, in the user's coordinates."""
    # Outside its context a module has its own parameters, whatever `params` and Pyro's store say.
    with poutine.block(), HoldParams(params), getattr(guide, "_pyro_context", nullcontext()):
        try:
            found = guide.median(*args, **kwargs)
        except NotImplementedError:
            found = {}
    recorded = getattr(guide, "prototype_trace", None)
    responses.check_medians(guide, found, [name for name, _ in recorded.iter_stochastic_nodes()] if recorded else [])
    return {name: torch.as_tensor(value) for name, value in found.items()}
