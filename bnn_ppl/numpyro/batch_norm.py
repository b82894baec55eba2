r"""Running statistics of batch normalisation, for weights that were averaged or drawn.

The running averages of a layer belong to the weights of the last training steps; others need their own. With
:math:`s_i` the mean and the variance of a layer's inputs in batch i of :math:`b_i` rows, where all layers before
normalise by the same batch, one pass through the training data gives

.. math::
    s \leftarrow s + \frac{b_i}{n + b_i} (s_i - s), \quad n \leftarrow n + b_i, \qquad
    s = \frac{\sum_i b_i s_i}{\sum_i b_i}

A layer itself makes m s + (1 - m) s_i of s, with a momentum m that a huge s tells; s = 0 then gives s_i.

References
----------
- P. Izmailov et al., *Averaging Weights Leads to Wider Optima and Better Generalization*, UAI 2018.
- W. Maddox et al., *A Simple Baseline for Bayesian Uncertainty in Deep Learning*, NeurIPS 2019.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro.distributions.distribution import validation_enabled
from numpyro.handlers import seed as seed_handler
from numpyro.handlers import substitute, trace

from bnn_ppl import batch_norm
from bnn_ppl.numpyro.initialization import init_to_prior_center
from bnn_ppl.numpyro.plates import SetPlates, as_arrays

_REMEDY = (
    'a flax_module or random_flax_module needs mutable=["batch_stats"], and a layer of batch normalisation that keeps '
    "running averages (arrays mean and var); one that always normalises by its batch has no statistics"
)
Path = tuple[Any, ...]
State = dict[str, Any]
Statistics = dict[Path, Array]
Arguments = tuple[dict[int, Array], tuple, Any, int]


def update_batch_norm(
    model: Callable,
    draw: Mapping[str, Any],
    batches: Iterable,
    *,
    params: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> State:
    """Compute the running statistics of batch normalisation anew, for one value of the weights.

    For averaged weights, and for each draw of them, before predictions.

    Parameters
    ----------
    model
        A NumPyro model with a ``flax_module`` or ``random_flax_module`` that has ``mutable=["batch_stats"]``, or a
        ``nnx_module`` or ``random_nnx_module``. It has to run in training mode here, and in evaluation mode in
        predictions: let an argument of the model tell ``use_running_average``.
    draw
        One value for each latent site, in the user's coordinates, of the site's shape; such as
        ``guide.median(params)``. Other names are ignored.
    batches
        One pass through the training data: an iterable, such as a ``DataLoader``, of batches of the model's arguments
        as in training. A tuple or list is positional, a dict by keyword, an array the only argument. A batch has the
        rows of its first array. A data plate may be subsampled: it then holds the rows of the batch.
    params
        Values of ``param`` sites by name, ``svi_result.params``; and of ``mutable`` sites, if other layers than those
        of batch normalisation have a state, too.
    **kwargs
        Further arguments of the model, the same for all batches, such as ``train=True``.

    Returns
    -------
    dict
        The model's ``mutable`` sites with the new statistics, ``{"net$state": {"batch_stats": {"BatchNorm_0":
        {"mean": (features,), "var": (features,)}}}}``: for ``predict`` and ``Predictive`` as ``params=params |
        statistics``, to go on with SVI, and for `bnn_ppl.to_arviz`, as
        ``svi_state._replace(mutable_state=statistics)``.

    Raises
    ------
    ValueError
        If the model keeps no statistics, or runs in evaluation mode; if there is no batch; if `draw` lacks a latent
        site, or has values of another shape; if a ``param`` site has no value; if statistics are not finite.

    Notes
    -----
    A layer's statistics are arrays ``mean`` and ``var`` side by side in a mutable site; all else there stays as it
    is. What is random in the model, such as dropout, is the same in each batch. The model runs under ``jax.jit``, so
    it cannot look at the values of its arrays; each call compiles it, once for each number of rows.

    Examples
    --------
    >>> statistics = update_batch_norm(model, guide.median(params), train_batches, params=params, train=True)
    >>> evaluated = functools.partial(model, train=False)
    >>> predict(guide, x_test, model=evaluated, params=params | statistics, scheme="deterministic")

    Draws that are predicted each with its own statistics, as SWAG asks for:

    >>> total = 0.0
    >>> for s in range(num_draws):
    ...     draw = {name: value[s] for name, value in draws.items()}
    ...     statistics = update_batch_norm(model, draw, train_batches, params=params, train=True)
    ...     one = {name: value[None] for name, value in draw.items()}
    ...     total = total + predict(one, x_test, model=evaluated, params=params | statistics)["probabilities"]
    >>> probabilities = total / num_draws
    """
    params = {} if params is None else params
    batch_norm.check_arguments(model, draw, batches, params)
    first, batches = batch_norm.with_first(batches)
    values = {name: jnp.asarray(value) for name, value in draw.items()}
    with validation_enabled(False):
        held, state, shapes = _look(model, params, _arguments(first, kwargs))
        batch_norm.check_draw(values, shapes)
        held |= {name: values[name] for name in shapes}
        compiled = jax.jit(partial(_after_batch, model), static_argnums=0)

        def after_batch(arguments: Arguments, before: Mapping[Path, float]) -> Statistics:
            filled = {p: jnp.full(v.shape, before[p], v.dtype) for p, v in _statistics(state).items()}
            return compiled(arguments[1:], arguments[0], held, _with(state, filled))

        huge = {path: 2.0 ** (jnp.finfo(v.dtype).maxexp - 2) for path, v in _statistics(state).items()}
        momenta = _momenta(after_batch(_arguments(first, kwargs), huge), huge)
        averages: Statistics = {}
        rows = 0
        for batch in batches:
            arguments = _arguments(batch, kwargs)
            rows += arguments[-1]
            found = after_batch(arguments, dict.fromkeys(huge, 0.0))
            for path, value in found.items():
                new = value.astype(jnp.promote_types(value.dtype, np.float32)) / (1 - momenta[path])
                old = averages.get(path, new)
                averages[path] = old + (new - old) * (arguments[-1] / rows)
    _check_finite(averages)
    return _with(state, {path: value.astype(found[path].dtype) for path, value in averages.items()})


def _arguments(batch: Any, kwargs: Mapping[str, Any]) -> Arguments:
    """Arrays of a model's arguments by their place, all else in its place, the structure, and the rows of the batch."""
    # Loaders give torch's tensors, too; numbers and flags stay what they are.
    leaves, structure = jax.tree.flatten(batch_norm.arguments(batch, kwargs))
    leaves = [as_arrays(np.asarray(x)) if getattr(x, "shape", ()) and not isinstance(x, Array) else x for x in leaves]
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Array)}
    others = tuple(None if i in arrays else leaf for i, leaf in enumerate(leaves))
    return arrays, others, structure, batch_norm.number_of_rows(jax.tree.leaves(batch))


def _run(model: Callable, arguments: Arguments) -> dict[str, dict]:
    """Sites of a model, with the rows of the batch in its data plates."""
    arrays, others, structure, rows = arguments

    def rows_of(name: str, size: int, subsample_size: int | None) -> Array | None:
        count = batch_norm.rows_of_plate(size, subsample_size, rows)
        return None if count is None else jnp.arange(count)

    args, kwargs = jax.tree.unflatten(structure, [arrays.get(i, leaf) for i, leaf in enumerate(others)])
    return trace(SetPlates(model, rows_of)).get_trace(*args, **kwargs)


def _look(model: Callable, params: Mapping[str, Any], arguments: Arguments) -> tuple[dict, State, dict[str, tuple]]:
    """Values of the param sites, the mutable sites at their start, and shapes of the latent sites."""
    # A network with a state takes its params and its state together, or makes both, as here.
    given = {name: value for name, value in params.items() if not name.endswith(("$params", "$state"))}
    seeded = seed_handler(substitute(model, data=given), random.key(0))
    shapes = {}

    def values(arrays: dict[int, Array]) -> dict[str, dict]:
        whole = substitute(seeded, substitute_fn=init_to_prior_center())
        sites = _run(whole, (arrays, *arguments[1:]))
        latent = [name for name, site in sites.items() if site["type"] == "sample" and not site["is_observed"]]
        shapes.update({name: sites[name]["fn"].shape() for name in latent})
        return {t: {n: s["value"] for n, s in sites.items() if s["type"] == t} for t in ("param", "mutable")}

    try:
        found = jax.eval_shape(values, arguments[0])
    except Exception as error:
        if type(error).__module__ == "flax.errors" and "batch_stats" in str(error):
            raise ValueError(f"the model's network cannot keep running statistics: {_REMEDY}") from error
        raise
    if not _statistics(found["mutable"]):
        sites = list(found["mutable"])
        raise ValueError(f"the mutable sites {sites} of the model hold no statistics of batch normalisation: {_REMEDY}")
    # Of a network whose parameters are all random there are only their shapes.
    held = {name: params.get(name, value) for name, value in found["param"].items()}
    unknown = [name for name, value in held.items() if name not in params and jax.tree.leaves(value)]
    if unknown:
        raise ValueError(f"the param sites {unknown} of the model have no values: pass params={{{unknown[0]!r}: ...}}")
    state = found["mutable"]
    if not params.keys() >= state.keys() and len(jax.tree.leaves(state)) > len(_statistics(state)):
        state = jax.jit(values)(arguments[0])["mutable"]
    return held, {name: params.get(name, value) for name, value in state.items()}, shapes


def _after_batch(model: Callable, form: Any, arrays: dict[int, Array], held: State, state: State) -> Statistics:
    """What a batch makes of the statistics in a state."""
    sites = _run(seed_handler(substitute(model, data=held | state), random.key(0)), (arrays, *form))
    return _statistics({name: sites[name]["value"] for name in state})


def _momenta(found: Statistics, huge: Mapping[Path, float]) -> dict[Path, float]:
    """Momentum of each layer, from what it makes of huge statistics."""
    _check_finite(found)
    momenta = {}
    for path, values in found.items():
        ratios = np.asarray(values / huge[path])
        ratios = np.where(np.abs(ratios) < jnp.finfo(ratios.dtype).eps, 0, ratios).ravel()
        # The shortest decimal of the rounded 0.99 is what was typed, and has the right 1 - m, too.
        momentum = momenta[path] = float(str(ratios[0]))
        if momentum == 1:
            raise ValueError(
                f"the model runs in evaluation mode, or not at all through {_layer(path)!r}, whose statistics stay as "
                "they are: pass the model's argument for training, as in update_batch_norm(..., train=True)"
            )
        if np.any(ratios != ratios[0]) or not 0 <= momentum < 1:
            raise ValueError(
                f"{_layer(path)!r} does not average its statistics with one momentum, as flax.linen.BatchNorm and "
                "flax.nnx.BatchNorm do: they cannot be computed anew"
            )
    return momenta


def _statistics(tree: Any, path: Path = ()) -> Statistics:
    """Arrays `mean` and `var` side by side in a state, by where they are."""
    if not isinstance(tree, Mapping):
        return {}
    pair = {(*path, name): tree[name] for name in ("mean", "var") if hasattr(tree.get(name), "dtype")}
    found = pair if len(pair) == 2 else {}
    for key, value in tree.items():
        found |= _statistics(value, (*path, key))
    return found


def _with(state: Any, values: Statistics) -> Any:
    """A state with other values in some places."""
    for (key, *rest), value in values.items():
        state = {**state, key: _with(state[key], {tuple(rest): value}) if rest else value}
    return state


def _check_finite(values: Statistics) -> None:
    layers = {_layer(path): None for path, value in values.items() if not jnp.isfinite(value).all()}
    batch_norm.check_finite(list(layers))


def _layer(path: Path) -> str:
    return "/".join(map(str, path[:-1]))
