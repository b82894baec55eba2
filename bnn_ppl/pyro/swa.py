"""Stochastic weight averaging: the running mean of the weights, and a normal about them.

``SWA`` [1]_ averages parameters, and ``SWAG`` [2]_ takes the covariance from the path too; the equations are in
`bnn_ppl.averages`.

References
----------
.. [1] Izmailov, Podoprikhin, Garipov, Vetrov & Wilson (2018), Averaging weights leads to wider optima and better
   generalization.
.. [2] Maddox, Garipov, Izmailov, Vetrov & Wilson (2019), A simple baseline for Bayesian uncertainty in deep learning.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bnn_ppl import averages
from bnn_ppl.pyro.hwa import HWASVI, Averages


class SWA(HWASVI):
    """``pyro.infer.SVI`` that averages parameters along the way: with ``AutoDelta`` stochastic weight averaging.

    `averaged_guide` gives the guide at the averaged parameters, `averaged_params` these themselves.

    Parameters
    ----------
    model, guide, optim, loss, start, cycle_length, multiplier, learning_rate
        As of `HWASVI`. The published learning rate falls linearly to a constant, see
        `bnn_ppl.schedules.LinearRamp`, with a snapshot an epoch from there on.
    **host
        Further arguments of the host's class.

    Raises
    ------
    ValueError
        As of `HWASVI`.

    Warns
    -----
    UserWarning
        As of `HWASVI`.

    Notes
    -----
    The running statistics of batch normalisation belong to the last weights; `random_torch_module` leaves the buffers
    of your network alone, so that its are still the ones from before training: see `update_batch_norm`.

    Examples
    --------
    >>> rate = LinearRamp(start=0.05, end=0.01, length=4_000, begin=5_000)
    >>> optim = pyro.optim.LambdaLR({"optimizer": SGD, "optim_args": {"lr": 1.0}, "lr_lambda": rate})
    >>> svi = SWA(model, AutoDelta(model), optim, Trace_ELBO(), start=10_000, cycle_length=500)
    >>> for _ in range(20_000):
    ...     svi.step(x, y)
    ...     optim.step()
    >>> predict(svi.averaged_guide(), x_test, model=model, scheme="deterministic")
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
        multiplier: Callable | None = None,
        learning_rate: float | Callable | None = None,
        **host: Any,
    ):
        super().__init__(
            model,
            guide,
            optim,
            loss,
            start=start,
            cycle_length=cycle_length,
            covariance="parameters",
            multiplier=multiplier,
            learning_rate=learning_rate,
            **host,
        )


class SWAG(HWASVI):
    """``pyro.infer.SVI`` of a point guide, such as ``AutoDelta``, that takes a normal from its own path.

    Parameters
    ----------
    model, guide, optim, loss, start, cycle_length, learning_rate
        As of `HWASVI`. The guide's sites are points.
    rank
        Deviations kept for the covariance, the last ones; one draw of their directions is shared by all sites. 0 keeps
        none, and takes variances alone (SWAG-Diag).
    **host
        Further arguments of the host's class.

    Raises
    ------
    ValueError
        As of `HWASVI`, and for a guide with noise of its own, before the first snapshot.

    Warns
    -----
    UserWarning
        As of `HWASVI`.

    Notes
    -----
    The running statistics of batch normalisation are wanted anew for each draw: see `update_batch_norm`. Those of a
    `random_torch_module` are still the ones from before training.

    Examples
    --------
    >>> svi = SWAG(model, AutoDelta(model), SGD({"lr": 0.01}), Trace_ELBO(), start=10_000, cycle_length=500)
    >>> for _ in range(20_000):
    ...     svi.step(x, y)
    >>> predict(svi.averaged_guide(), x_test, model=model, num_draws=30)
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
        rank: int = 20,
        learning_rate: float | Callable | None = None,
        **host: Any,
    ):
        averages.check_swag_rank(rank)
        super().__init__(
            model,
            guide,
            optim,
            loss,
            start=start,
            cycle_length=cycle_length,
            covariance="low_rank" if rank else "iterate",
            rank=rank or 2,
            learning_rate=learning_rate,
            **host,
        )

    def _empty(self, params: dict[str, Tensor], args: tuple, kwargs: dict) -> Averages:
        kept = super()._empty(params, args, kwargs)
        averages.check_points([name for name, support in self._supports.items() if support is None])
        return kept
