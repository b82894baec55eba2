"""Posterior predictive of held-out rows, in batches of rows and of draws.

With p_s(y | x) the predictive distribution of a row under draw s = 1, ..., S, and m_s and v_s its mean and variance::

    p(k | x)     = mean_s p_s(k | x)
    E y, Var y   = mean_s m_s,  mean_s v_s + var_s m_s
    log p(y | x) = log mean_s p_s(y | x)

The model runs as it is, with every plate holding all its rows and the data plate those of the batch, under
``torch.func.vmap`` over some draws at a time where it can.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
import xarray as xr
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.runtime import NonlocalExit
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.utils import _pytree as pytree

from bnn_ppl import responses
from bnn_ppl.layout import check_observation
from bnn_ppl.predictions import Plan, at_expectation, make_plan, predict_all
from bnn_ppl.pyro.batch_norm import warns_of_statistics
from bnn_ppl.pyro.draws import Origin, origin_of
from bnn_ppl.pyro.layout import plates_of, to_numpy
from bnn_ppl.pyro.plates import any_number_of_rows
from bnn_ppl.pyro.results import HoldParams

_WRAPPERS = (dist.ExpandedDistribution, torch.distributions.Independent, dist.MaskedDistribution)


def predict(
    source: Any,
    *args: Any,
    model: Callable | None = None,
    params: Mapping[str, Any] | None = None,
    scheme: str = "ensemble",
    num_draws: int | None = None,
    site: str | None = None,
    functions: bool = False,
    row_batch_size: int | None = 1000,
    draw_batch_size: int | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> xr.Dataset:
    """Average predictions for held-out rows over the draws of a posterior, or predict with one value of the weights.

    Parameters
    ----------
    source
        ``pyro.infer.MCMC`` after ``run``, with a kernel of this library or of the host; or a dict of draws by site,
        such as ``mcmc.get_samples()``, in the user's coordinates, shapes (draws, ...) or (chains, draws, ...); or a
        guide after its training, written by hand or from ``pyro.infer.autoguide``.
    *args, **kwargs
        The model's arguments for the held-out data. Arrays as long as the first one are cut into batches of rows, the
        others go to the model as they are. With observations, ``predict(mcmc, x_test, y_test)``, there are log
        densities too; without, give None or what else the model takes for them.
    model
        By default that of the MCMC's kernel. Draws and guides need it. Its data plate may be subsampled, or state the
        number of training data.
    params
        Values of ``param`` sites by name. By default those that the kernel holds, and those of Pyro's parameter store.
    scheme
        How many values of the weights are predicted with [1]_: ``"ensemble"`` averages the predictions of all draws;
        ``"stochastic"`` takes one draw at random, of all chains; ``"deterministic"`` takes the expected values of the
        latent sites in the user's coordinates, in one forward pass. These are means over chains and draws, the
        ``median`` of a guide that has one, as those of ``autoguide`` do, and means over the draws of other guides.
    num_draws
        Draws taken of each chain, evenly spaced, by default all; or drawn from a guide, by default 1000. With
        ``"stochastic"`` there is one, and a guide's ``median`` takes none.
    site
        The observed site to predict, where the model has several.
    functions
        Whether to keep the prediction of each draw, for `bnn_ppl.diagnostics.function_diagnostics`.
    row_batch_size
        Rows evaluated at a time, at most: what a network computes for that many has to fit into memory. None for all.
    draw_batch_size
        Draws evaluated at a time, at most. By default more of them the fewer rows and weights there are.
    seed
        Seed of the draws from a guide, and of the one draw of ``"stochastic"``. Torch's own random state is left alone.

    Returns
    -------
    xarray.Dataset
        Rows come first, then other plates and events of the site.

        * For categorical and Bernoulli sites `probabilities` (row, class), and `mean_entropy` (row), the average
          over the draws of the entropy in nats, which `bnn_ppl.diagnostics.mutual_information` takes.
        * For others `mean`, `sd` (both of a new observation) and `function_sd`, the standard deviation of the mean
          over the draws, shapes (row, ...), in the units of the observations.
        * With observations `log_density` (row), the log of the mean density in nats, joint over what is not the row;
          `draw_log_density` (chain, draw), summed over the rows; and `observed`, class numbers or values.
        * With `functions` also `functions` (chain, draw, row, ...), probabilities or means, and for others than
          classes `noise_sd`, the standard deviation of an observation under each draw, of the same shape.

        With one value of the weights, chain and draw have the length 1, and `function_sd` is 0.

    Raises
    ------
    TypeError
        If `source` is none of the three, or `params` no dict.
    ValueError
        If the model and its arguments do not fit the draws or each other, there are not as many draws, the model is
        random given a draw, the scheme is unknown or does not go with `num_draws`, `seed` or integer draws, or a
        prediction is not finite; the message names the site and the remedy.

    Warns
    -----
    UserWarning
        With ``"deterministic"``, if the expected values of weights are all exactly 0, as those of a variance network;
        if batch normalisation runs in training mode, or with running statistics that were never updated.

    Notes
    -----
    Memory does not grow with the number of draws, but for `functions`. Where the model does not run under
    ``torch.func.vmap``, it runs for one draw after another. Arguments of the model named as those above must be bound
    before: ``model=functools.partial(model, seed=1)``.

    References
    ----------
    .. [1] Neklyudov, Molchanov, Ashukha & Vetrov (2018), Variance networks: when expectation does not meet your
       expectations.

    Examples
    --------
    >>> found = predict(mcmc, x_test, y_test)
    >>> accuracy(found["probabilities"], found["observed"])
    >>> predict(guide, x_test, model=model)["mean"]
    """
    responses.check_numbers(num_draws=num_draws, row_batch_size=row_batch_size, draw_batch_size=draw_batch_size)
    responses.check_scheme(scheme, num_draws, seed)
    responses.check_params(params, "leave it out for the values in Pyro's store")
    data = _data(args, kwargs)
    with _undisturbed(data):
        origin = origin_of(source, model, dict(params or {}), scheme, num_draws, seed, args, kwargs)
        with warns_of_statistics():
            plan = make_plan(
                partial(_look, origin, data),
                data.lengths,
                origin.draws,
                site=site,
                scheme=scheme,
                num_draws=num_draws,
                row_batch_size=row_batch_size,
                draw_batch_size=draw_batch_size,
                seed=seed,
            )
        read: Callable[..., dict[str, Tensor]] = partial(origin.read, plan.latent)
        if scheme == "deterministic":
            plan, read = at_expectation(plan, read, to_numpy, Tensor.new_tensor)
        over_draws = _over_draws(partial(_one, origin, plan, data))

        def values(draws: dict[str, Tensor], first: int) -> dict[str, np.ndarray]:
            return {name: to_numpy(value) for name, value in over_draws(draws, first).items()}

        first_draw = {name: value[:1] for name, value in read(*next(plan.draw_batches())[1]).items()}
        runs = [values(first_draw, 0) for _ in range(2)]
        responses.check_settled(plan.response.name, runs, plan.others)
        return predict_all(plan, read, values, functions=functions, loose=data.loose())


class _Data(NamedTuple):
    """Arguments of the model: all leaves, the lengths of the arrays among them, and the number of rows."""

    leaves: list[Any]
    structure: Any
    lengths: list[int]
    rows: int

    def arguments(self, first: int, rows: int) -> tuple[tuple, dict]:
        """Positional and keyword arguments with some rows; after the last one they begin anew."""
        where: Any = slice(first, first + rows)
        if first + rows > self.rows:
            where = np.arange(first, first + rows) % self.rows
        cut = [leaf[where] if _length(leaf) == self.rows else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(cut, self.structure)

    def loose(self) -> list[np.ndarray]:
        """Arrays that are not cut."""
        return [to_numpy(leaf) for leaf in self.leaves if _length(leaf) not in (0, self.rows)]


def _data(args: tuple, kwargs: dict) -> _Data:
    leaves, structure = pytree.tree_flatten((args, kwargs))
    lengths = [len(leaf) for leaf in leaves if _is_array(leaf)]
    return _Data(leaves, structure, lengths, responses.number_of_rows(lengths))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, Tensor | np.ndarray) and leaf.ndim > 0


def _length(leaf: Any) -> int:
    return len(leaf) if _is_array(leaf) else 0


@contextmanager
def _undisturbed(data: _Data) -> Iterator[None]:
    """Without gradients and validation, and with the random state restored at the end."""
    on_gpu = any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in data.leaves)
    devices = range(torch.cuda.device_count()) if on_gpu else []
    with torch.no_grad(), torch.random.fork_rng(devices), pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "There is a performance drop because we have not yet implemented the batching"
        )
        yield


class _Conditions(HoldParams):
    """Put values into latent sites, and all their rows into plates; into those of a constant size, the data's.

    `value_of` gives the value for a name and shape, or None. If a response is named, the model ends there.
    """

    def __init__(self, held: Mapping, value_of: Callable, rows: int, constant: int | None, response: str | None = None):
        super().__init__(held)
        self.value_of = value_of
        self.rows = rows
        self.constant = constant
        self.response = response

    def run(self, model: Callable, args: tuple, kwargs: dict) -> None:
        """Run the model under these conditions."""
        with any_number_of_rows(), poutine.block(), self:
            model(*args, **kwargs)

    def _pyro_sample(self, msg: dict) -> None:
        super()._pyro_sample(msg)
        fn = msg["fn"]
        if isinstance(fn, _Subsample):
            msg["value"] = torch.arange(self.rows if fn.size == self.constant else fn.size, device=fn.device)
        elif msg["name"] == self.response:
            msg["done"], msg["continuation"] = True, _leave
        elif not msg["is_observed"] and (value := self.value_of(msg["name"], tuple(fn.shape()))) is not None:
            msg["value"], msg["done"] = value, True


def _leave(msg: dict) -> None:
    raise NonlocalExit(msg)


def _look(origin: Origin, data: _Data, rows: int, constant: int | None) -> responses.Look:
    """Run the model, with the first draw where it fits."""

    def first_draw(name: str, shape: tuple[int, ...]) -> Tensor | None:
        if name not in origin.samples:
            return None
        draws = origin.samples[name]
        fitting = [n for n in origin.draws.leading if draws.shape[n:] == shape and draws.ndim == n + len(shape)]
        return draws[(0,) * fitting[0]] if fitting and draws.numel() else None

    recorder = poutine.trace(origin.model)
    sites, error = {}, None
    try:
        _Conditions(origin.held, first_draw, rows, constant).run(recorder.get_trace, *data.arguments(0, rows))
        sites = {name: found for name, site in recorder.msngr.trace.nodes.items() if (found := _describe(site))}
    except Exception as failure:
        error = failure
    return responses.Look(sites, {plate.size for plate in plates_of(recorder.msngr.trace.nodes).values()}, error)


def _describe(site: dict) -> responses.Site | None:
    if site["type"] != "sample" or isinstance(site["fn"], _Subsample) or site["infer"].get("_deterministic"):
        return None
    fn, shape = site["fn"], tuple(site["fn"].shape())
    if site["is_observed"]:
        value = torch.as_tensor(site["value"])
        if not value.numel():  # a factor
            return None
        check_observation(site["name"], value.shape, fn.batch_shape, fn.event_shape)
        shape = tuple(torch.broadcast_shapes(value.shape, shape))
    plates = {frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.dim is not None}
    return responses.Site(site["name"], site["is_observed"], shape, fn.event_dim, plates)


def _over_draws(one: Callable) -> Callable:
    """`one` for several draws: together where that is possible, else one after another."""
    fails: list[RuntimeError] = []

    def each(draws: dict[str, Tensor], first: int) -> dict[str, Tensor]:
        count = len(next(iter(draws.values())))
        if count > 1 and not fails:
            try:
                return torch.func.vmap(lambda draw: one(draw, first))(draws)
            except RuntimeError as error:
                fails.append(error)
        found = [one({name: value[i] for name, value in draws.items()}, first) for i in range(count)]
        return {name: torch.stack([values[name] for values in found]) for name in found[0]}

    return each


def _one(origin: Origin, plan: Plan, data: _Data, draw: Mapping[str, Tensor], first: int) -> dict[str, Tensor]:
    """What one draw predicts for some rows, which come first in each tensor."""
    response = plan.response
    conditions = _Conditions(
        origin.held, lambda name, shape: draw.get(name), plan.row_batch, plan.constant, response.name
    )
    try:
        conditions.run(origin.model, *data.arguments(first, plan.row_batch))
    except NonlocalExit as reached:
        site = reached.site
    fn, value, axis = site["fn"], site["value"], response.axis
    values = _moments(fn, response)
    if site["is_observed"]:
        if "probabilities" in values:  # what is none of the classes is refused later, with its row
            value = value.clamp(0, values["probabilities"].shape[-1] - 1)
        log_prob = fn.log_prob(value, *site["args"], **site["kwargs"])
        by_row = scale_and_mask(log_prob, 1.0, site["mask"]).expand(fn.batch_shape).movedim(axis + fn.event_dim, 0)
        values["log_density"] = by_row.reshape(len(by_row), -1).sum(-1)
        observed = site["value"].expand(fn.shape()).movedim(axis, 0)
        values["observed"] = _class_numbers(observed) if _is_one_hot(fn) else observed
    return values


def _base(fn: Any) -> Any:
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return fn


def _is_one_hot(fn: Any) -> bool:
    return isinstance(_base(fn), torch.distributions.OneHotCategorical)


def _class_numbers(one_hot: Tensor) -> Tensor:
    """Of rows with a single 1; -1, which is refused later with its row, for others."""
    single = ((one_hot == 0) | (one_hot == 1)).all(-1) & (one_hot.sum(-1) == 1)
    return torch.where(single, one_hot.argmax(-1), -1)


def _class_probabilities(categorical: Any) -> Tensor:
    if "logits" not in vars(categorical):
        return categorical.probs
    unnormalised = categorical.logits.exp()  # torch's softmax over few classes takes ten times as long
    return unnormalised / unnormalised.sum(-1, keepdim=True)


def _moments(fn: Any, response: responses.Site) -> dict[str, Tensor]:
    """Class probabilities and their entropy, or mean and variance, with the rows first."""
    base, shape = _base(fn), fn.shape()
    if _is_one_hot(fn):
        by_row = _class_probabilities(base._categorical).expand(shape).movedim(response.axis, 0)
    elif isinstance(base, torch.distributions.Categorical | torch.distributions.Bernoulli):
        binary = isinstance(base, torch.distributions.Bernoulli)
        probabilities = torch.stack([1 - base.probs, base.probs], -1) if binary else _class_probabilities(base)
        by_row = probabilities.expand(*shape, probabilities.shape[-1]).movedim(response.axis - 1, 0)
    else:
        try:
            moments = {"mean": fn.mean, "variance": fn.variance}
        except NotImplementedError as error:
            raise ValueError(responses.no_moments(response.name, type(base).__name__)) from error
        return {name: value.expand(shape).movedim(response.axis, 0) for name, value in moments.items()}
    return {"probabilities": by_row, "entropy": torch.special.entr(by_row).sum(-1)}
