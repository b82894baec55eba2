r"""What SVI trained, as `bnn_ppl.export` reads it: draws of its guide, with the ELBO of each.

.. math:: \mathrm{elbo} = \log p(y, \theta) - \log q(\theta), \qquad \theta \sim q,

whose mean over draws is that of the host's ``Trace_ELBO``.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array, lax, random
from jax.experimental import checkify
from numpyro.distributions.distribution import validation_enabled
from numpyro.handlers import seed as seed_handler
from numpyro.handlers import substitute
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoLaplaceApproximation
from numpyro.infer.svi import SVIRunResult
from numpyro.infer.util import compute_log_probs

from bnn_ppl import svi_arguments as checks
from bnn_ppl.layout import beyond_message, check_classes, check_dtype_of_classes, check_observation
from bnn_ppl.numpyro.compilation import jit_over_data
from bnn_ppl.numpyro.layout import Layout, number_of_classes, plates_of
from bnn_ppl.numpyro.plates import as_arrays
from bnn_ppl.numpyro.potential import takes_rows
from bnn_ppl.numpyro.results import by_parameter, describe, sites_of, to_numpy, unwrapped
from bnn_ppl.responses import check_trained
from bnn_ppl.results import Guide, Results
from bnn_ppl.svi_arguments import SVIArguments, ValueCheck


def read(svi: Any, given: SVIArguments) -> tuple[Results, dict[str, ValueCheck]]:
    """What SVI trained; draws of its guide are made when they are asked for.

    Parameters
    ----------
    svi
        ``numpyro.infer.SVI`` after its training.
    given
        The arguments of `bnn_ppl.to_arviz` for an SVI.

    Returns
    -------
    Results, and checks of the values of observed sites

    Raises
    ------
    TypeError
        If it is something else, or `svi_result` is neither what ``svi.run`` returned nor a state.
    ValueError
        If it was not trained, or the arguments do not fit it, or lack rows of a plate.
    """
    if not isinstance(svi, SVI):
        raise TypeError(f"source must be a numpyro.infer.SVI, got {type(svi).__name__}")
    kwargs = given.kwargs | svi.static_kwargs
    checks.check_fits(unwrapped(svi.model), given, kwargs)
    state, held, given = _trained(svi, given)
    arguments = by_parameter(svi.model, given.args, kwargs)
    args, kwargs = as_arrays((given.args, kwargs))
    guide, total, draws, averaged = svi.guide, given.total, None, None
    if hasattr(svi, "snapshots"):
        checks.check_no_number(given)
        draws = {name: jnp.asarray(value) for name, value in svi.snapshots(state, *args, **kwargs).items()}
        total = len(svi.averaging_weights(state))
    elif hasattr(svi, "averaged_guide"):
        guide, held = svi.averaged_guide(state), held | svi.averaged_params(state)
        averaged = svi.snapshot_steps(state), svi.averaging_weights(state)
    else:
        check_trained(guide)
    if isinstance(guide, AutoLaplaceApproximation):
        guide = _approximation(guide, held)

    program = _Program(svi.model, guide if draws is None else None, args, kwargs, given.seed)
    with validation_enabled(False):
        values, guide_sites = program.draw((held, draws, {}), 0)[1:]
    missing = [name for name, site in guide_sites.items() if site["type"] == "param" and name not in held]
    checks.check_params(guide, missing, "run SVI with it, and pass what it returned as svi_result")
    found = sites_of(svi.model, held | values, {}, args, kwargs)
    plates, sites = plates_of(guide_sites) | plates_of(found), describe(found)
    around = {n: [f.name for f in guide_sites[n]["cond_indep_stack"]] if guide_sites else [] for n in values}
    checks.check_sites(sites, around, plates)
    value_checks = _value_checks({name: found[name] for name, site in sites.items() if site.kind == "observed"})
    program = replace(program, latent=tuple(n for n, site in sites.items() if site.kind == "latent"))
    inputs = program.inputs({n: value for n, value in held.items() if n in found or n in guide_sites}, draws)
    observed = checks.observed_inside(sites, plates)

    def on_rows(args: tuple, kwargs: dict, values: dict[str, Any], rows: Mapping[str, Any]) -> dict[str, Array]:
        found = sites_of(svi.model, values, rows, args, kwargs)
        return {name: jnp.asarray(found[name]["value"]) for name in observed}

    # JAX itself takes the last row for an index beyond the end.
    checked = jit_over_data(checkify.checkify(on_rows, errors=checkify.index_checks), args, kwargs)

    def look(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        beyond, seen = checked(held | values, rows)
        if message := beyond.get():
            raise ValueError(beyond_message(plates, message.strip(" .")))
        return {name: to_numpy(value) for name, value in seen.items()}

    def sample(names: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        draws, elbo = program.sample(inputs, names, total)
        if elbo is None:
            return draws, {"averaging_weight": np.asarray(svi.averaging_weights(state))[None]}
        return draws, {checks.elbo_name(plates): elbo}

    if not any(plate.subsampled for plate in plates.values()) and takes_rows(Layout(plates, {}, {}, ()), args, kwargs):
        look({})  # `is_streamed` looks at the ends of the others
    streamed = checks.is_streamed(look, plates)
    if streamed:
        checks.check_values(value_checks, {name: to_numpy(found[name]["value"]) for name in value_checks})
    results = Results(
        samples={},
        statistics={},
        shape=(1, total),
        plates=plates,
        sites=sites,
        settings=checks.settings_of(svi.guide, svi.loss),
        libraries={"inference_library": "numpyro", "inference_library_version": numpyro.__version__},
        model=None if streamed else svi.model,
        held={name: value for name, value in held.items() if name in found},
        args=args,
        kwargs=kwargs,
        arguments=arguments,
        site_names=[],
        guide=Guide(checks.names_to_draw(sites, plates), sample, program.latents, inputs, given.elbo, averaged),
    )
    return results, value_checks


def _value_checks(observed: Mapping[str, dict]) -> dict[str, ValueCheck]:
    found: dict[str, ValueCheck] = {}
    for name, site in observed.items():
        if site["cond_indep_stack"]:
            check_observation(name, jnp.shape(site["value"]), site["fn"].batch_shape, site["fn"].event_shape)
        if classes := number_of_classes(site["fn"]):
            check_dtype_of_classes(name, jnp.result_type(site["value"]), classes)
            found[name] = partial(check_classes, classes=classes)
    return found


def _trained(svi: SVI, given: SVIArguments) -> tuple[Any, dict[str, Any], SVIArguments]:
    """State, values that are not drawn, and the arguments with the losses of the run."""
    result = given.svi_result
    if result is None:
        raise ValueError(
            "svi_result is missing: a NumPyro SVI does not keep what it trained, so pass what svi.run returned, or the "
            "state of svi.update, as svi_result"
        )
    if isinstance(result, SVIRunResult):
        if given.losses is not None:
            raise ValueError("losses given, and svi_result has those of its run: leave losses out")
        state, params, given = result.state, result.params, replace(given, losses=np.asarray(result.losses))
    elif not hasattr(result, "optim_state"):
        raise TypeError(
            "svi_result must be what svi.run returned, or the state of svi.update, whole and not its params, got "
            + type(result).__name__
        )
    elif svi.constrain_fn is None:
        raise ValueError(
            f"svi_result of type {type(result).__name__} needs the SVI that it came from, and this one has not been "
            "trained: call its init or run first, or pass what svi.run returned"
        )
    else:
        state, params = result, svi.get_params(result)
    return state, params | (getattr(state, "mutable_state", None) or {}), given


def _approximation(guide: AutoLaplaceApproximation, params: dict[str, Any]) -> Any:
    """The guide that draws from the approximation, whose own draws are the mode."""
    posterior = guide.get_posterior(params)
    guide = copy(guide)
    guide._get_posterior = lambda *args, **kwargs: posterior
    return guide


@dataclass(frozen=True)
class _Program:
    """Draws by their number, of a guide or, without one, of those in the inputs, and the model under them.

    The inputs are arguments of the compiled functions: the values that are not drawn, the draws if they are given, and
    the array arguments of the model by their place.
    """

    model: Callable
    guide: Callable | None
    args: tuple
    kwargs: dict[str, Any]
    seed: int
    latent: tuple[str, ...] = ()

    def inputs(self, held: dict[str, Any], draws: dict[str, Array] | None) -> tuple:
        """Inputs of the other functions."""
        leaves = jax.tree.leaves((self.args, self.kwargs))
        found = held, draws, {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Array)}
        try:
            jax.eval_shape(lambda inputs: self._evaluate((), inputs, 0), found)
        except jax.errors.JAXTypeError:  # a model that looks at the values of its arguments
            return held, draws, {}
        return found

    def _arguments(self, inputs: tuple) -> tuple[tuple, dict[str, Any]]:
        leaves, structure = jax.tree.flatten((self.args, self.kwargs))
        return jax.tree.unflatten(structure, [inputs[2].get(i, leaf) for i, leaf in enumerate(leaves)])

    def draw(self, inputs: tuple, number: Any) -> tuple[Array | None, dict[str, Array], dict[str, dict]]:
        """Log density, values, and sites of the guide in the draw of a number."""
        held, draws, _ = inputs
        if draws is not None:
            return None, {name: value[number] for name, value in draws.items()}, {}
        args, kwargs = self._arguments(inputs)
        seeded = seed_handler(self.guide, random.fold_in(random.key(self.seed), number))
        log_q, sites = compute_log_probs(seeded, args, kwargs, held)
        values = {n: s["value"] for n, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}
        return sum(log_q.values(), start=jnp.zeros(())), values, sites

    def latents(self, inputs: tuple, number: Any) -> dict[str, Array]:
        """Latent sites of the model in the draw of a number."""
        values = self.draw(inputs, number)[1]
        return {name: values[name] for name in self.latent}

    def _evaluate(self, names: Sequence[str], inputs: tuple, number: Any) -> tuple[dict[str, Array], Array | None]:
        """Values of some sites and the ELBO."""
        log_q, values, guide_sites = self.draw(inputs, number)
        args, kwargs = self._arguments(inputs)
        # Values alone: marks of local_reparameterization would put noise into the layers.
        given = values | {n: s["value"] for n, s in guide_sites.items() if s["type"] == "plate"}
        key = random.fold_in(random.key(self.seed), number)
        model = seed_handler(substitute(self.model, data=given), random.fold_in(key, 1))
        log_p, sites = compute_log_probs(model, args, kwargs, inputs[0])
        elbo = None if log_q is None else sum(log_p.values(), start=jnp.zeros(())) - log_q
        return {name: sites[name]["value"] for name in names}, elbo

    def sample(
        self, inputs: tuple, names: Sequence[str], total: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """All draws of some sites, shapes (1, draw, ...), and their ELBOs, (1, draw)."""
        one = partial(self._evaluate, tuple(names))
        with validation_enabled(False):
            shapes = jax.tree.leaves(jax.eval_shape(one, inputs, 0))
            size = checks.draws_at_once(sum(s.size * s.dtype.itemsize for s in shapes), total)
            # One draw after another: the activations of all at once may not fit into memory.
            several = jax.jit(lambda inputs, numbers: lax.map(partial(one, inputs), numbers))
            whole: dict[str, np.ndarray] = {}
            elbos: list[np.ndarray] = []
            for start in range(0, total, size):
                kept = min(size, total - start)
                values, elbo = several(inputs, jnp.minimum(jnp.arange(start, start + size), total - 1))
                for name, value in values.items():
                    array = to_numpy(value)[:kept]
                    if name not in whole:
                        whole[name] = np.empty((1, total, *array.shape[1:]), array.dtype)
                    whole[name][0, start : start + kept] = array
                elbos += [] if elbo is None else [to_numpy(elbo)[:kept]]
        return whole, np.concatenate(elbos)[None] if elbos else None
