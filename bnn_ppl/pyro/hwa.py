"""Hyperparameter weight averaging: the laws of a guide averaged along the path of SVI.

The averages and the four covariances are those of `bnn_ppl.averages`. With a point guide (``AutoDelta``) this is SWA
and SWAG, `bnn_ppl.pyro.SWA` and `bnn_ppl.pyro.SWAG`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnn_ppl import averages
from bnn_ppl.pyro.averaged_guide import AveragedGuide
from bnn_ppl.pyro.site_laws import Law, find_laws, read_laws
from bnn_ppl.pyro.snapshots import SnapshotSVI


class Averages(NamedTuple):
    """Averages of the unconstrained parameters; and by site, in unconstrained coordinates, of its locations and laws.

    These are mean and variance of the locations, the mean of the variances, and the last deviations of the locations,
    shape (rank, ...).
    """

    params: Any
    mean: dict[str, Tensor]
    spread: dict[str, Tensor]
    within: dict[str, Tensor]
    columns: dict[str, Tensor]


class HWASVI(SnapshotSVI):
    """``pyro.infer.SVI`` that averages its guide along the way, and leaves the way as it is.

    Every method of the host's class does what it does there, with the same numbers; `averaged_guide` gives the average.

    Parameters
    ----------
    model, guide, optim, loss
        As of ``pyro.infer.SVI``. The guide's sites are normal, in one vector too, points, or transforms of these:
        ``AutoNormal``, ``AutoDiagonalNormal``, ``AutoLowRankMultivariateNormal``, ``AutoDelta``, the guides of this
        library, and those written by hand. With ``covariance="parameters"`` any guide is taken.
    start
        Steps before the first snapshot, which is taken after that step; those of this object count, and of one whose
        state was loaded. What anneals, such as the weight of the divergence, must be over by then.
    cycle_length
        Steps from one snapshot to the next: an epoch at a constant learning rate, and a cycle of a cyclical one, with
        `start` where the rate is lowest.
    covariance
        Of the averaged law, see `bnn_ppl.averages`: ``"mixture"`` has mean and variance of the mixture of the
        snapshots' laws; ``"iterate"`` the variance of their locations alone; ``"low_rank"`` the covariance of these by
        deviations as SWAG, with the mean of the laws' variances; ``"parameters"`` averages the parameters. Guides with
        correlations enter with their variances.
    rank
        Deviations kept, the last ones, for ``"low_rank"``.
    multiplier
        Weight of a new snapshot, in (0, 1]: a callable of the number of earlier ones. By default 1 / (n + 1), which
        weighs all alike; ``lambda n: 0.1`` forgets.
    learning_rate
        The schedule that `optim` has, if it should be looked at.
    **host
        Further arguments of the host's class.

    Raises
    ------
    ValueError
        If an argument is out of range; in the first step for a guide without locations, or, with ``"iterate"``,
        without parameters that move them; in `averaged_guide` before the first snapshot.

    Warns
    -----
    UserWarning
        If `learning_rate` differs between snapshots, or is not the lowest of its cycle there; if there are fewer
        snapshots than `rank`.

    Notes
    -----
    Averages are taken in unconstrained coordinates. They take the memory of the parameters and three times that of the
    sites, and `rank` times that with ``"low_rank"``. `state_dict` and `load_state_dict` go on bit for bit.

    References
    ----------
    Izmailov et al. (2018), Averaging weights leads to wider optima and better generalization; Maddox et al. (2019), A
    simple baseline for Bayesian uncertainty in deep learning.

    Examples
    --------
    >>> svi = HWASVI(model, guide, Adam({"lr": 1e-3}), Trace_ELBO(), start=8_000, cycle_length=500)
    >>> for _ in range(20_000):
    ...     svi.step(x, y)
    >>> averaged = svi.averaged_guide()
    >>> Predictive(model, guide=averaged, num_samples=100)(x_test)
    >>> predict(averaged, x_test, y_test, model=model)
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Any,
        loss: Any,
        *,
        start: int,
        cycle_length: int,
        covariance: str = "mixture",
        rank: int = 20,
        multiplier: Callable | None = None,
        learning_rate: float | Callable | None = None,
        **host: Any,
    ):
        averages.check_averaging(covariance, rank, multiplier)
        super().__init__(
            model, guide, optim, loss, start=start, cycle_length=cycle_length, learning_rate=learning_rate, **host
        )
        self.covariance = covariance
        self.rank = rank
        self.multiplier = multiplier
        self._supports: dict[str, Any] = {}
        self._names: dict[str, str] = {}

    def _empty(self, params: dict[str, Tensor], args: tuple, kwargs: dict) -> Averages:
        laws: dict[str, Law] = {}
        if self.covariance != "parameters":
            moved = self._constrained({name: value + 0.01 for name, value in params.items()})
            found = find_laws(self.model, self._bare_guide, moved, args, kwargs)
            averages.check_locations(found.supports, found.fixed, found.refused, self.covariance)
            self._supports, self._names = found.supports, found.names
            laws = read_laws(found.supports, self._bare_guide, args, kwargs)

        def zeros(*rows: int) -> dict[str, Tensor]:
            return {name: law.mean.new_zeros(rows + law.mean.shape) for name, law in laws.items()}

        columns = zeros(self.rank) if self.covariance == "low_rank" else {}
        return Averages(
            {name: torch.zeros_like(value) for name, value in params.items()}, zeros(), zeros(), zeros(), columns
        )

    def _add(self, kept: Averages, number: int, params: dict[str, Tensor], args: tuple, kwargs: dict) -> Averages:
        share = 1.0 if number == 0 else float(averages.weight_of(self.multiplier, number))
        laws = read_laws(self._supports, self._bare_guide, args, kwargs) if self._supports else {}
        mean, spread, within = {}, {}, {}
        for name, law in laws.items():
            spread[name] = averages.add_to_spread(kept.spread[name], kept.mean[name], law.mean, share)
            mean[name] = averages.add_to_mean(kept.mean[name], law.mean, share)
            within[name] = averages.add_to_mean(kept.within[name], law.variance, share)
        for name, columns in kept.columns.items():
            columns[number % self.rank] = laws[name].mean - mean[name]
        averaged = {name: averages.add_to_mean(kept.params[name], value, share) for name, value in params.items()}
        return Averages(averaged, mean, spread, within, kept.columns)

    _own = (*SnapshotSVI._own, "_supports", "_names")
    _settings = (*SnapshotSVI._settings, "covariance", "rank")

    def averaged_params(self) -> dict[str, Tensor]:
        """Averages of the ``param`` sites of model and guide, taken in unconstrained coordinates, in the user's."""
        self._check_taken()
        return self._constrained(self._kept.params)

    def averaged_moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and variance of the averaged law of each site, in unconstrained coordinates.

        Raises
        ------
        ValueError
            Before the first snapshot, and with ``covariance="parameters"``, which has no moments.
        """
        count = self._check_taken()
        averages.check_moments(self.covariance)
        kept = self._kept
        columns = self._columns(kept, count)
        return {
            self._names.get(name, name): (
                kept.mean[name],
                averages.variance(self.covariance, kept.within[name], kept.spread[name])
                + ((columns[name] ** 2).sum(0) if columns else 0),
            )
            for name in kept.mean
        }

    def averaged_guide(self) -> AveragedGuide:
        """Guide with the averaged law, for ``Predictive``, ELBOs and `bnn_ppl.pyro.predict`.

        It takes the arguments of the model, and has no parameters. ``param`` sites of the model have theirs from
        `averaged_params`, which `predict` takes by itself; ``Predictive`` and ELBOs have those of the last step, from
        Pyro's store. A variance of 0, of a weight that never moved, is taken as 1e-30.

        Raises
        ------
        ValueError
            Before the first snapshot.
        """
        count = self._check_taken()
        kept, laws, columns = self._kept, {}, None
        for name, mean in kept.mean.items():
            variance = averages.variance(self.covariance, kept.within[name], kept.spread[name])
            laws[name] = Law(mean, variance.clamp_min(averages.LEAST_VARIANCE))
        if self.covariance == "low_rank":
            averages.warn_few_columns(count, self.rank)
            columns = self._columns(kept, count) if count > 1 else None
        return AveragedGuide(self._bare_guide, self.averaged_params(), laws, columns, self._supports)

    def _columns(self, kept: Averages, count: int) -> dict[str, Tensor]:
        """Factors of the covariance of all sites, shapes (K, ...)."""
        used = min(count, self.rank)
        return {name: value[:used] * averages.columns_scale(used) for name, value in kept.columns.items()}

    def averaging_weights(self) -> np.ndarray:
        """Weights of the snapshots in the average, shape (snapshots,)."""
        return averages.weights_in_mean(self.multiplier, self._count)
