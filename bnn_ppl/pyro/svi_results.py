r"""What SVI trained, as `bnn_ppl.export` reads it: draws of its guide, with the ELBO of each.

.. math:: \mathrm{elbo} = \log p(y, \theta) - \log q(\theta), \qquad \theta \sim q,

whose mean over draws is that of the host's ``Trace_ELBO``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from bnn_ppl import svi_arguments as checks
from bnn_ppl.layout import Plate, beyond_message, check_observation
from bnn_ppl.pyro.layout import check_values, plates_of, to_numpy
from bnn_ppl.pyro.results import Replay, by_parameter, describe, random_state_kept, unwrapped
from bnn_ppl.responses import check_trained
from bnn_ppl.results import Guide, Results
from bnn_ppl.svi_arguments import SVIArguments, ValueCheck


def read(svi: Any, given: SVIArguments) -> tuple[Results, dict[str, ValueCheck]]:
    """What SVI trained; draws of its guide are made when they are asked for.

    Parameters
    ----------
    svi
        ``pyro.infer.SVI`` after its training.
    given
        The arguments of `bnn_ppl.to_arviz` for an SVI.

    Returns
    -------
    Results, and checks of the values of observed sites

    Raises
    ------
    TypeError
        If it is something else.
    ValueError
        If it was not trained, or the arguments do not fit it, or lack rows of a plate.
    """
    if not isinstance(svi, SVI):
        raise TypeError(f"source must be a pyro.infer.SVI, got {type(svi).__name__}")
    if given.svi_result is not None:
        raise ValueError(
            f"svi_result of type {type(given.svi_result).__name__}: a Pyro SVI has none, its parameters are in Pyro's "
            "store: leave it out, and pass the losses of svi.step as losses"
        )
    args, kwargs = given.args, given.kwargs
    checks.check_fits(unwrapped(svi.model), given, kwargs)
    guide, total, held, draws, averaged = svi.guide, given.total, {}, None, None
    if hasattr(svi, "snapshots"):
        checks.check_no_number(given)
        draws = {name: torch.as_tensor(value).detach() for name, value in svi.snapshots(*args, **kwargs).items()}
        total = len(svi.averaging_weights())
    elif hasattr(svi, "averaged_guide"):
        guide, held = svi.averaged_guide(), svi.averaged_params()
        averaged = svi.snapshot_steps(), svi.averaging_weights()
    else:
        check_trained(guide)

    trained = _Trained(guide, held)

    def draw(number: int) -> tuple[poutine.Trace | None, dict[str, Tensor]]:
        """Trace of the guide, if it is one, and values of a draw."""
        if draws is not None:
            return None, {name: value[number] for name, value in draws.items()}
        words = np.random.SeedSequence([given.seed, number]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0] >> np.uint64(1)))
        with poutine.block():
            trace = poutine.trace(trained(guide)).get_trace(*args, **kwargs)
        return trace, {n: s["value"] for n, s in trace.nodes.items() if _is_drawn(s)}

    with random_state_kept():
        guide_trace, values = draw(0)
        guide_sites = {} if guide_trace is None else guide_trace.nodes
        model = poutine.trace(trained(svi.model))
        with _beyond_refused(lambda: plates_of(model.msngr.trace.nodes)):
            found = dict(Replay(values, held, {}).trace(model, args, kwargs).nodes)
    plates, sites = plates_of(guide_sites) | plates_of(found), describe(found)
    around = {n: [f.name for f in guide_sites[n]["cond_indep_stack"]] if guide_sites else [] for n in values}
    checks.check_sites(sites, around, plates)
    held = {n: s["value"].detach() for n, s in found.items() if s["type"] == "param"}
    latent = [name for name, site in sites.items() if site.kind == "latent"]
    observed = checks.observed_inside(sites, plates)

    def latents(inputs: None, number: int) -> dict[str, Tensor]:
        values = draw(number)[1]
        return {name: values[name] for name in latent}

    def evaluate(names: Sequence[str], number: int) -> tuple[dict[str, Tensor], float | None]:
        """Values of some sites and the ELBO."""
        trace, values = draw(number)
        rows = {} if trace is None else {n: s["value"] for n, s in trace.nodes.items() if _is_plate(s)}
        # Values alone: marks of local_reparameterization would put noise into the layers.
        model_trace = Replay(values, held, rows).trace(svi.model, args, kwargs)
        elbo = None if trace is None else float(model_trace.log_prob_sum()) - float(trace.log_prob_sum())
        return {name: model_trace.nodes[name]["value"] for name in names}, elbo

    def sample(names: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        whole: dict[str, np.ndarray] = {}
        elbos = []
        with random_state_kept():
            for number in range(total):
                values, elbo = evaluate(names, number)
                for name, value in values.items():
                    array = to_numpy(value)
                    if name not in whole:
                        whole[name] = np.empty((1, total, *array.shape), array.dtype)
                    whole[name][0, number] = array
                elbos.append(elbo)
        if draws is not None:
            return whole, {"averaging_weight": np.asarray(svi.averaging_weights())[None]}
        return whole, {checks.elbo_name(plates): np.array([elbos])}

    def look(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with random_state_kept(), _beyond_refused(lambda: plates):
            found = Replay(values, held, rows).run(svi.model, args, kwargs)
        return {name: to_numpy(found[name]["value"]) for name in observed}

    streamed = checks.is_streamed(look, plates)
    value_checks = _value_checks({name: found[name] for name, site in sites.items() if site.kind == "observed"})
    if streamed:
        checks.check_values(value_checks, {name: to_numpy(found[name]["value"]) for name in value_checks})
    results = Results(
        samples={},
        statistics={},
        shape=(1, total),
        plates=plates,
        sites=sites,
        settings=checks.settings_of(svi.guide, svi.loss),
        libraries={"inference_library": "pyro", "inference_library_version": pyro.__version__},
        model=None if streamed else svi.model,
        held=held,
        args=args,
        kwargs=kwargs,
        arguments=by_parameter(svi.model, args, kwargs),
        site_names=[],
        guide=Guide(checks.names_to_draw(sites, plates), sample, latents, None, given.elbo, averaged),
    )
    return results, value_checks


@contextmanager
def _beyond_refused(plates: Callable[[], Mapping[str, Plate]]) -> Iterator[None]:
    """Say in words that a model with these plates takes rows beyond the end of its data."""
    try:
        yield
    except IndexError as error:
        found = plates()
        if not found or "out of bounds" not in str(error):
            raise
        raise ValueError(beyond_message(found, str(error))) from error


def _value_checks(observed: Mapping[str, dict]) -> dict[str, ValueCheck]:
    found: dict[str, ValueCheck] = {}
    for name, site in observed.items():
        if site["cond_indep_stack"]:
            check_observation(
                name, torch.as_tensor(site["value"]).shape, site["fn"].batch_shape, site["fn"].event_shape
            )
        if site["mask"] is None:  # what is masked may be anything
            found[name] = partial(check_values, fn=site["fn"])
    return found


def _is_plate(site: dict) -> bool:
    return site["type"] == "sample" and isinstance(site["fn"], _Subsample)


def _is_drawn(site: dict) -> bool:
    return site["type"] == "sample" and not site["is_observed"] and not isinstance(site["fn"], _Subsample)


class _Trained(Messenger):
    """Refuse param sites that have no value yet, which would get their initial one."""

    def __init__(self, guide: Callable, held: Mapping[str, Any]):
        super().__init__()
        self.guide = guide
        self.held = held

    def _pyro_param(self, msg: dict) -> None:
        if msg["name"] not in self.held and msg["name"] not in pyro.get_param_store():
            checks.check_params(self.guide, [msg["name"]], "run svi.step first, or load Pyro's store")
