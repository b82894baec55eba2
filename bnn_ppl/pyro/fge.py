"""Fast geometric ensembling [1]_: snapshots along one run with a cyclical learning rate, predicted with together.

With the learning rate of `bnn_ppl.schedules.Triangular` a snapshot is taken in the middle of each cycle, where the rate
is lowest, and the predictions of all K of them are averaged::

    p(y | x) = (1 / K) sum_k p(y | x, w_k)

References
----------
.. [1] Garipov, Izmailov, Podoprikhin, Vetrov & Wilson (2018), Loss surfaces, mode connectivity, and fast ensembling of
   DNNs.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from bnn_ppl import snapshots
from bnn_ppl.pyro.results import HoldParams
from bnn_ppl.pyro.site_laws import aside
from bnn_ppl.pyro.snapshots import SnapshotSVI
from bnn_ppl.schedules import check_count


class FGE(SnapshotSVI):
    """``pyro.infer.SVI`` that keeps snapshots of its parameters along the way, and leaves the way as it is.

    Parameters
    ----------
    model, guide, optim, loss, start, cycle_length, learning_rate
        As of `HWASVI`. The guide is ``AutoDelta`` for an ensemble of networks.
    num_snapshots
        Snapshots kept, the last ones, each of the memory of the parameters.
    **host
        Further arguments of the host's class.

    Raises
    ------
    ValueError
        If an argument is out of range; in `snapshots` before the first of them.

    Warns
    -----
    UserWarning
        As of `HWASVI`.

    Notes
    -----
    The running statistics of batch normalisation belong to the last weights, those of a `random_torch_module` are
    still the ones from before training, and each snapshot wants its own: see `update_batch_norm`, one call for each
    draw.

    Examples
    --------
    >>> rate = Triangular(peak=0.05, floor=0.01, cycle_length=1_000, begin=10_000)
    >>> optim = pyro.optim.LambdaLR({"optimizer": SGD, "optim_args": {"lr": 1.0}, "lr_lambda": rate})
    >>> svi = FGE(model, AutoDelta(model), optim, Trace_ELBO(), start=10_501, cycle_length=1_000)
    >>> for _ in range(20_000):
    ...     svi.step(x, y)
    ...     optim.step()
    >>> predict(svi.snapshots(x, y), x_test, y_test, model=model)
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
        num_snapshots: int = 20,
        learning_rate: float | Callable | None = None,
        **host: Any,
    ):
        check_count("num_snapshots", num_snapshots)
        self.num_snapshots = num_snapshots
        super().__init__(
            model, guide, optim, loss, start=start, cycle_length=cycle_length, learning_rate=learning_rate, **host
        )

    def _empty(self, params: dict[str, Tensor], args: tuple, kwargs: dict) -> list[dict[str, Tensor]]:
        return []

    def _add(
        self, kept: list[dict[str, Tensor]], number: int, params: dict[str, Tensor], args: tuple, kwargs: dict
    ) -> list[dict[str, Tensor]]:
        return [*kept, {name: value.clone() for name, value in params.items()}][-self.num_snapshots :]

    _settings = (*SnapshotSVI._settings, "num_snapshots")

    def snapshot_params(self) -> dict[str, Tensor]:
        """Values of the ``param`` sites at the snapshots, in the user's coordinates, shapes (snapshots, ...)."""
        self._check_taken()
        found = [self._constrained(params) for params in self._kept]
        return {name: torch.stack([params[name] for params in found]) for name in found[0]}

    def snapshots(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of the latent sites, one of each snapshot's guide: the weights themselves for ``AutoDelta``.

        Parameters
        ----------
        *args, **kwargs
            Of the model and guide.

        Returns
        -------
        dict
            By site, in the user's coordinates and the order of the run, shapes (snapshots, ...).

        Raises
        ------
        ValueError
            Before the first snapshot, and for a model with ``param`` sites of its own, which differ between snapshots.
        """
        self._check_taken()
        draws, names = [], set()
        with aside(), getattr(self._bare_guide, "_pyro_context", nullcontext()):
            torch.manual_seed(0)
            for params in self._kept:
                with HoldParams(self._constrained(params)):
                    sites = poutine.trace(self._bare_guide).get_trace(*args, **kwargs)
                names |= set(sites.param_nodes)
                latent = {name: sites.nodes[name] for name in sites.stochastic_nodes}
                draws.append({n: s["value"].clone() for n, s in latent.items() if not s["infer"].get("is_auxiliary")})
        snapshots.check_of_guide([name for name in self._kept[0] if name not in names])
        return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}

    def averaging_weights(self) -> np.ndarray:
        """Weights of the snapshots kept, shape (snapshots,): all alike."""
        self._check_taken()
        return np.full(len(self._kept), 1 / len(self._kept))

    def snapshot_steps(self) -> np.ndarray:
        """Numbers of steps after which the snapshots kept were taken, shape (snapshots,)."""
        return super().snapshot_steps()[-self.num_snapshots :]
