"""Hyperparameter weight averaging: the laws of a guide averaged along the path of SVI.

The averages and the four covariances are those of `bnn_ppl.averages`. With a point guide (``AutoDelta``) this is SWA
and SWAG, `bnn_ppl.numpyro.SWA` and `bnn_ppl.numpyro.SWAG`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnn_ppl import averages, snapshots
from bnn_ppl.numpyro.averaged_guide import AveragedGuide
from bnn_ppl.numpyro.site_laws import Law, find_laws, read_laws
from bnn_ppl.numpyro.snapshots import SnapshotState, SnapshotSVI, check_is_state


class Averages(NamedTuple):
    """Averages of the unconstrained parameters; and by site, in unconstrained coordinates, of its locations and laws.

    These are mean and variance of the locations, the mean of the variances, and the last deviations of the locations,
    shape (rank, ...).
    """

    params: Any
    mean: dict[str, Array]
    spread: dict[str, Array]
    within: dict[str, Array]
    columns: dict[str, Array]


class HWASVI(SnapshotSVI):
    """``numpyro.infer.SVI`` that averages its guide along the way, and leaves the way as it is.

    Every method of the host's class does what it does there, with the same numbers; `averaged_guide` gives the average.

    Parameters
    ----------
    model, guide, optim, loss
        As of ``numpyro.infer.SVI``. The guide's sites are normal, in one vector too, points, or transforms of these:
        ``AutoNormal``, ``AutoDiagonalNormal``, ``AutoLowRankMultivariateNormal``, ``AutoDelta``, the guides of this
        library, and those written by hand. With ``covariance="parameters"`` any guide is taken.
    start
        Steps before the first snapshot, which is taken after that step; as the optimiser counts them, so that a run
        from a state goes on. What anneals, such as the weight of the divergence, must be over by then.
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
        Weight of a new snapshot, in (0, 1]: a callable of the number of earlier ones, written with ``jax.numpy``. By
        default 1 / (n + 1), which weighs all alike; ``lambda n: 0.1`` forgets.
    learning_rate
        The schedule that `optim` has, if it should be looked at.
    **host
        Static arguments of model and guide, as the host takes them.

    Raises
    ------
    ValueError
        If an argument is out of range; in ``init`` for a guide without locations, or, with ``"iterate"``, without
        parameters that move them; in `averaged_guide` before the first snapshot.

    Warns
    -----
    UserWarning
        If `learning_rate` differs between snapshots, or is not the lowest of its cycle there; if a run ends before
        `start`; if there are fewer snapshots than `rank`.

    Notes
    -----
    Averages are taken in unconstrained coordinates. They take the memory of the parameters and three times that of the
    sites, and `rank` times that with ``"low_rank"``. A state is a tuple of arrays: saved and given to ``update``, or to
    ``run`` as `init_state`, it goes on bit for bit. ``run`` takes snapshots between compiled steps. Your own
    ``jax.jit(svi.update, donate_argnums=0)`` carries the averages along, and copies them where it does not donate.

    References
    ----------
    Izmailov et al. (2018), Averaging weights leads to wider optima and better generalization; Maddox et al. (2019), A
    simple baseline for Bayesian uncertainty in deep learning.

    Examples
    --------
    >>> svi = HWASVI(model, guide, optax.adam(1e-3), Trace_ELBO(), start=8_000, cycle_length=500)
    >>> result = svi.run(random.key(0), 20_000, x, y)
    >>> averaged = svi.averaged_guide(result.state)
    >>> Predictive(model, guide=averaged, num_samples=100)(random.key(1), x_test)
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
        if multiplier is not None:
            _check_traceable(multiplier)
        super().__init__(
            model,
            guide,
            optim,
            loss,
            start=start,
            cycle_length=cycle_length,
            learning_rate=learning_rate,
            **host,
        )
        self.covariance = covariance
        self.rank = rank
        self.multiplier = multiplier
        self._supports: dict[str, Any] = {}

    def _empty(self, params: dict, mutable: dict, args: tuple, kwargs: dict) -> Averages:
        laws: dict[str, Law] = {}
        if self.covariance != "parameters":
            held = self.constrain_fn(params) | mutable
            moved = self.constrain_fn(jax.tree.map(lambda x: x + 0.01, params)) | mutable
            found = find_laws(self.model, self._bare_guide, held, moved, args, kwargs)
            averages.check_locations(found.supports, found.fixed, found.refused, self.covariance)
            self._supports = found.supports
            laws = read_laws(found.supports, self._bare_guide, held, args, kwargs)

        def zeros(*rows: int) -> dict[str, Array]:
            return {name: jnp.zeros(rows + law.mean.shape, law.mean.dtype) for name, law in laws.items()}

        columns = zeros(self.rank) if self.covariance == "low_rank" else {}
        return Averages(jax.tree.map(jnp.zeros_like, params), zeros(), zeros(), zeros(), columns)

    def _add(self, kept: Averages, number: Array, params: dict, args: tuple, kwargs: dict) -> Averages:
        # Of 32 bits, the quotient would have no more, in double precision either.
        weight = averages.weight_of(self.multiplier, jnp.asarray(number, int))
        share = jnp.where(number == 0, 1.0, weight)

        def to_mean(mean: Array, value: Array) -> Array:
            return averages.add_to_mean(mean, value, share.astype(mean.dtype))

        def to_spread(spread: Array, mean: Array, value: Array) -> Array:
            return averages.add_to_spread(spread, mean, value, share.astype(mean.dtype))

        laws: dict[str, Law] = {}
        if self._supports:
            laws = read_laws(self._supports, self._bare_guide, self.constrain_fn(params), args, kwargs)
        locations = {name: law.mean for name, law in laws.items()}
        mean = jax.tree.map(to_mean, kept.mean, locations)
        deviations = {name: locations[name] - mean[name] for name in kept.columns}
        return Averages(
            jax.tree.map(to_mean, kept.params, params),
            mean,
            jax.tree.map(to_spread, kept.spread, kept.mean, locations),
            jax.tree.map(to_mean, kept.within, {name: law.variance for name, law in laws.items()}),
            {name: kept.columns[name].at[number % self.rank].set(value) for name, value in deviations.items()},
        )

    def _check_kept(self, kept: Averages) -> None:
        rank = len(next(iter(kept.columns.values()))) if kept.columns else None
        snapshots.check_state("rank", rank, self.rank if self.covariance == "low_rank" else None)
        snapshots.check_state("averaged sites", sorted(kept.mean), sorted(self._supports))

    def averaged_params(self, svi_state: SnapshotState) -> dict[str, Any]:
        """Averages of the ``param`` sites of model and guide, taken in unconstrained coordinates, in the user's.

        Parameters
        ----------
        svi_state
            After the first snapshot.
        """
        self._check_taken(svi_state)
        return self.constrain_fn(svi_state.kept.params)

    def averaged_moments(self, svi_state: SnapshotState) -> dict[str, tuple[Array, Array]]:
        """Mean and variance of the averaged law of each site, in unconstrained coordinates.

        Parameters
        ----------
        svi_state
            After the first snapshot.

        Raises
        ------
        ValueError
            Before the first snapshot, and with ``covariance="parameters"``, which has no moments.
        """
        count = self._check_taken(svi_state)
        averages.check_moments(self.covariance)
        kept = svi_state.kept
        columns = self._columns(kept, count)
        return {
            name: (
                kept.mean[name],
                averages.variance(self.covariance, kept.within[name], kept.spread[name])
                + ((columns[name] ** 2).sum(0) if columns else 0),
            )
            for name in kept.mean
        }

    def averaged_guide(self, svi_state: SnapshotState) -> AveragedGuide:
        """Guide with the averaged law, for ``Predictive``, ELBOs and `bnn_ppl.numpyro.predict`.

        It takes the arguments of the model, and has no parameters. ``param`` sites of the model have theirs from
        `averaged_params`, which `predict` takes by itself, and ``Predictive`` as ``params=``. A variance of 0, of a
        weight that never moved, is taken as 1e-30.

        Parameters
        ----------
        svi_state
            After the first snapshot.

        Raises
        ------
        ValueError
            Before the first snapshot.
        """
        count = self._check_taken(svi_state)
        kept, laws, columns = svi_state.kept, {}, None
        for name, mean in kept.mean.items():
            variance = averages.variance(self.covariance, kept.within[name], kept.spread[name])
            laws[name] = Law(mean, jnp.maximum(variance, averages.LEAST_VARIANCE))
        if self.covariance == "low_rank":
            averages.warn_few_columns(count, self.rank)
            columns = self._columns(kept, count) if count > 1 else None
        return AveragedGuide(self._bare_guide, self.averaged_params(svi_state), laws, columns, self._supports)

    def _columns(self, kept: Averages, count: int) -> dict[str, Array]:
        """Factors of the covariance of all sites, shapes (K, ...)."""
        used = min(count, self.rank)
        return {name: value[:used] * averages.columns_scale(used) for name, value in kept.columns.items()}

    def averaging_weights(self, svi_state: SnapshotState) -> np.ndarray:
        """Weights of the snapshots in the average, shape (snapshots,)."""
        check_is_state("svi_state", svi_state)
        return averages.weights_in_mean(self.multiplier, int(svi_state.num_snapshots))


def _check_traceable(multiplier: Callable) -> None:
    try:
        jax.eval_shape(multiplier, jnp.int32(1))
    except jax.errors.JAXTypeError as error:
        raise ValueError(
            f"multiplier={multiplier!r} looks at the value of its argument, which is compiled: write it with "
            "jax.numpy, as in lambda n: jnp.maximum(1 / (n + 1), 0.1)"
        ) from error
