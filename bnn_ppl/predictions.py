"""Posterior predictive of held-out rows, summed over batches of draws and of rows.

With p_s(y | x) the predictive distribution of a row under draw s = 1, ..., S, and m_s and v_s its mean and variance::

    p(k | x)     = mean_s p_s(k | x)                         class probabilities
    E y, Var y   = mean_s m_s,  mean_s v_s + var_s m_s       the law of total variance
    log p(y | x) = log mean_s p_s(y | x)                     log-mean-exp, never the mean of the logarithms

in double precision. One draw alone, or the expected values of the weights in place of draws, is a sum of one term.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from bnn_ppl.parameters import is_weight
from bnn_ppl.responses import Draws, Look, Site, choose_draws, choose_response, fit_draws, inspect_rows, number_of_rows

Arrays = dict[str, np.ndarray]

# Draws are evaluated together up to these numbers of multiplications (tens of milliseconds, beside which what a call
# costs does not show), of rows, and of weights (64 MB).
_MULTIPLICATIONS, _ROWS, _WEIGHTS = 2e9, 2**15, 2**24
_WORDS = {
    "observed": "observation",
    "probabilities": "class probability",
    "mean": "mean",
    "variance": "variance",
    "log_density": "log density",
}


@dataclass(frozen=True)
class Plan:
    """What to predict, on how many rows, by which draws, and in batches of how many.

    `constant` is the constant size of the data plate, if it has one; `latent` are the sites that draws are read of, and
    `others` random sites without draws.
    """

    response: Site
    constant: int | None
    rows: int
    row_batch: int
    latent: list[str]
    others: list[str]
    index: tuple[np.ndarray, ...]
    draw_batch: int

    @property
    def draws(self) -> int:
        """Number of draws of all chains."""
        return len(self.index[0])

    def draw_batches(self) -> Iterator[tuple[slice, tuple[np.ndarray, ...]]]:
        """Places and indices of draws: always as many indices, the last batch being filled up."""
        for start in range(0, self.draws, self.draw_batch):
            at = np.minimum(np.arange(start, start + self.draw_batch), self.draws - 1)
            yield slice(start, min(start + self.draw_batch, self.draws)), tuple(axis[at] for axis in self.index)

    def row_batches(self) -> Iterator[tuple[slice, int]]:
        """Places of rows, and the row from which to evaluate always as many: the last batch begins early."""
        for start in range(0, self.rows, self.row_batch):
            stop = min(start + self.row_batch, self.rows)
            yield slice(start, stop), stop - self.row_batch

    def name_of(self, draw: int) -> str:
        """A draw by its place, in words."""
        *chain, number = (int(axis[draw]) for axis in self.index)
        return f"draw {number} of chain {chain[0]}" if chain else f"draw {number}"


def make_plan(
    look: Callable[[int, int | None], Look],
    lengths: Sequence[int],
    draws: Draws,
    *,
    site: str | None,
    scheme: str,
    num_draws: int | None,
    row_batch_size: int | None,
    draw_batch_size: int | None,
    seed: int,
) -> Plan:
    """Look at a model and decide what to compute.

    Parameters
    ----------
    look
        Runs the model on so many rows, as many in its plates of the second number.
    lengths
        Of the model's array arguments.
    draws
        That it is predicted by.
    site, scheme, num_draws, row_batch_size, draw_batch_size, seed
        As given to `predict`.

    Raises
    ------
    ValueError
        If the model, its arguments and the draws do not fit together.
    """
    rows = number_of_rows(lengths)
    row_batch = _even_part(rows, row_batch_size or rows)
    sites, constant = inspect_rows(look, row_batch, lengths, draws.shapes)
    response = choose_response(sites, draws, site)
    counts, latent, others = fit_draws(sites, draws, response)
    index = choose_draws(counts, num_draws, scheme, seed)
    most = draw_batch_size or _together(row_batch, [sites[name].shape for name in latent])
    return Plan(response, constant, rows, row_batch, latent, others, index, _even_part(len(index[0]), most))


def _together(rows: int, shapes: Sequence[tuple[int, ...]]) -> int:
    """Draws of sites of these shapes that are evaluated together on so many rows."""
    if any(len(shape) > 2 for shape in shapes):  # a convolution, which computes and keeps much more than it has weights
        return 1
    weights = sum(map(math.prod, shapes))
    return max(int(min(_MULTIPLICATIONS / (rows * weights), _ROWS / rows, _WEIGHTS / weights)), 1)


def _even_part(total: int, most: int) -> int:
    """Length of equal parts of at most `most`, as few as cover `total`."""
    return math.ceil(total / math.ceil(total / most))


def at_expectation(
    plan: Plan,
    read: Callable[..., Mapping[str, Any]],
    to_numpy: Callable[[Any], np.ndarray],
    as_like: Callable[[Any, np.ndarray], Any],
) -> tuple[Plan, Callable[..., dict[str, Any]]]:
    """Plan and reader of one draw in place of all: the means of the latent sites over the draws.

    Parameters
    ----------
    plan
        Of the draws.
    read
        Draws at given indices.
    to_numpy
        Turns an array of the backend into one of NumPy.
    as_like
        Turns an array of NumPy into one of the backend, of the data type and device of another.

    Raises
    ------
    ValueError
        If draws are integers or not finite.

    Warns
    -----
    UserWarning
        If a weight is 0 in all its entries.
    """
    totals: Arrays = {}
    for places, index in plan.draw_batches():
        draws = read(*index)
        for name, value in draws.items():
            some = to_numpy(value)[: places.stop - places.start]
            if some.dtype.kind in "biu":
                raise ValueError(
                    f"the draws of site {name!r} are integers, and scheme='deterministic' takes their mean: take "
                    "scheme='ensemble', or give them as floating-point numbers"
                )
            totals[name] = totals.get(name, np.float64(0)) + some.sum(axis=0, dtype=np.float64)
    means = {name: total / plan.draws for name, total in totals.items()}
    for name, mean in means.items():
        if not np.isfinite(mean).all():
            raise ValueError(f"the mean of the draws of site {name!r} is not finite: leave out draws that diverged")
    zero = [name for name, mean in means.items() if is_weight(name, mean.shape) and not mean.any()]
    if zero:
        warnings.warn(
            f"the expected values of the weights {zero} are all exactly 0: with scheme='deterministic' the network "
            "ignores its input and predicts at chance for every row. Take scheme='ensemble', which averages the "
            "predictions of draws",
            UserWarning,
            stacklevel=3,
        )
    one_draw = {name: as_like(draws[name], mean[None]) for name, mean in means.items()}
    return replace(plan, index=(np.zeros(1, int),), draw_batch=1), lambda *index: one_draw


def predict_all(
    plan: Plan,
    read: Callable[..., Any],
    evaluate: Callable[[Any, int], Arrays],
    *,
    functions: bool,
    loose: Sequence[np.ndarray],
) -> xr.Dataset:
    """Predictions by name.

    Parameters
    ----------
    plan
        What to predict.
    read
        Draws at given indices.
    evaluate
        Of these draws and the first of ``plan.row_batch`` rows: `probabilities` and `entropy`, or `mean` and
        `variance`, shapes (draws, rows, ...); with observations `log_density`, shape (draws, rows), and `observed`.
    functions
        Whether to keep the predictions of each draw.
    loose
        The model's array arguments that are not cut into rows.

    Raises
    ------
    ValueError
        If a prediction is not finite, or the observations do not fit the rows or the classes.
    """
    totals: Arrays = {}
    for draws, index in plan.draw_batches():
        weights = read(*index)
        for rows, first in plan.row_batches():
            values = evaluate(weights, first)
            part = {name: value[: draws.stop - draws.start, rows.start - first :] for name, value in values.items()}
            if draws.start == 0 and "observed" in part:
                _check_observed(plan, rows, part, loose)
            _check_finite(plan, draws, rows, part)
            _add(totals, plan, draws, rows, part, functions)
    return _dataset(totals, plan)


def _check_observed(plan: Plan, rows: slice, part: Arrays, loose: Sequence[np.ndarray]) -> None:
    """Refuse observations taken from an argument with more or fewer rows, and what is no class number."""
    name, observed = plan.response.name, part["observed"][0]
    for array in loose if rows.start == 0 else []:
        # What a plate's indices take; JAX takes the last entry for those beyond the end.
        taken = array[np.minimum(np.arange(len(observed)), len(array) - 1)] if len(array) else array
        differ = (observed != observed[0]).any()  # equal ones may be equal to another argument by chance
        if np.array_equal(taken, observed) and (differ or len(array) < len(observed)):
            raise ValueError(
                f"the data of observed site {name!r} have {len(array)} rows, and the model's first argument "
                f"{plan.rows}: give as many rows of x as of y"
            )
    if "probabilities" in part:
        classes = part["probabilities"].shape[-1]
        bad = (observed < 0) | (observed >= classes) | (observed != np.floor(observed))
        if bad.any():
            raise ValueError(
                f"observed site {name!r} is {observed[bad][0]} at row {rows.start + np.argwhere(bad)[0][0]}, and its "
                f"classes are 0 to {classes - 1}: give class numbers (or rows with a single 1) as the model has them"
            )


def _check_finite(plan: Plan, draws: slice, rows: slice, part: Arrays) -> None:
    for name, word in _WORDS.items():
        if name not in part:
            continue
        good = part[name] < np.inf if name == "log_density" else np.isfinite(part[name])  # -inf: an impossible row
        if not good.all():
            draw, row = np.argwhere(~good)[0][:2]
            raise ValueError(
                f"the {word} of site {plan.response.name!r} is not finite at row {rows.start + row} under "
                f"{plan.name_of(draws.start + draw)}: leave out draws that diverged, check the arguments of the model "
                "for NaN, and that its distribution has a mean and a variance"
            )


def _add(totals: Arrays, plan: Plan, draws: slice, rows: slice, part: Arrays, functions: bool) -> None:
    """Add the values of some draws at some rows to the sums over draws."""

    def total(name: str, shape: tuple[int, ...], fill: float = 0.0, dtype: Any = np.float64) -> np.ndarray:
        if name not in totals:
            totals[name] = np.full(shape, fill, dtype)
        return totals[name]

    def add(name: str, value: np.ndarray) -> None:
        total(name, (plan.rows, *value.shape[2:]))[rows] += value.sum(axis=0, dtype=np.float64)

    def keep(name: str, value: np.ndarray) -> None:
        if functions:
            total(name, (plan.draws, plan.rows, *value.shape[2:]), dtype=value.dtype)[draws, rows] = value

    if "probabilities" in part:
        add("probabilities", part["probabilities"])
        add("entropy", part["entropy"])
        keep("functions", part["probabilities"])
    else:
        mean = part["mean"].astype(np.float64)
        # About the first draw, for squares lose the spread of means that are large beside it.
        origin = total("origin", (plan.rows, *mean.shape[2:]))
        if draws.start == 0:
            origin[rows] = mean[0]
        add("shift", mean - origin[rows])
        add("squares", (mean - origin[rows]) ** 2)
        add("variance", part["variance"])
        keep("functions", part["mean"])
        keep("noise_sd", np.sqrt(part["variance"]))
    if "observed" in part:
        observed = part["observed"][0]
        total("observed", (plan.rows, *observed.shape[1:]), dtype=observed.dtype)[rows] = observed
        log_density = part["log_density"].astype(np.float64)
        mixture = total("log_density", (plan.rows,), -np.inf)
        mixture[rows] = np.logaddexp(mixture[rows], _log_sum_exp(log_density))
        total("draw_log_density", (plan.draws,))[draws] += log_density.sum(axis=1)


def _log_sum_exp(x: np.ndarray) -> np.ndarray:
    """Logarithm of the sum of exponentials over the first axis, -inf included."""
    top = x.max(axis=0)
    safe = np.where(np.isneginf(top), 0.0, top)
    with np.errstate(divide="ignore"):
        return safe + np.log(np.exp(x - safe).sum(axis=0))


def _dataset(totals: Arrays, plan: Plan) -> xr.Dataset:
    """Averages, with the rows first or after chain and draw."""
    n, site = plan.draws, plan.response
    by_row: Arrays = {}
    if "probabilities" in totals:
        by_row |= {"probabilities": totals["probabilities"] / n, "mean_entropy": totals["entropy"] / n}
    else:
        shift = totals["shift"] / n
        spread = np.maximum(totals["squares"] / n - shift**2, 0.0)
        by_row |= {
            "mean": totals["origin"] + shift,
            "sd": np.sqrt(totals["variance"] / n + spread),
            "function_sd": np.sqrt(spread),
        }
    if "observed" in totals:
        labels = "probabilities" in totals
        by_row["observed"] = totals["observed"].astype(np.int64) if labels else totals["observed"]
        by_row["log_density"] = totals["log_density"] - math.log(n)

    def dims(name: str, value: np.ndarray) -> tuple[str, ...]:
        classes = name == "probabilities" or (name == "functions" and "probabilities" in totals)
        return ("row", *site.dims[: value.ndim - 1 - classes], *["class"] * classes)

    chains = np.unique(plan.index[0]) if len(plan.index) > 1 else np.zeros(1, int)
    variables: dict[str, Any] = {name: (dims(name, value), value) for name, value in by_row.items()}
    for name in ("functions", "noise_sd"):
        if name in totals:
            value = totals[name].reshape(len(chains), -1, *totals[name].shape[1:])
            variables[name] = (("chain", "draw", *dims(name, value[0, 0])), value)
    if "draw_log_density" in totals:
        variables["draw_log_density"] = (("chain", "draw"), totals["draw_log_density"].reshape(len(chains), -1))
    found = xr.Dataset(variables, attrs={"site": site.name, "num_draws": n})
    numbers = {dim: np.arange(size) for dim, size in found.sizes.items()}
    if "draw" in numbers:
        numbers |= {"chain": chains, "draw": plan.index[-1][: numbers["draw"].size]}
    return found.assign_coords(numbers)
