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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro import handlers

from bnn_ppl import snapshots
from bnn_ppl.numpyro.snapshots import SnapshotState, SnapshotSVI
from bnn_ppl.schedules import check_count


class FGE(SnapshotSVI):
    """``numpyro.infer.SVI`` that keeps snapshots of its parameters along the way, and leaves the way as it is.

    Parameters
    ----------
    model, guide, optim, loss, start, cycle_length, learning_rate
        As of `HWASVI`. The guide is ``AutoDelta`` for an ensemble of networks.
    num_snapshots
        Snapshots kept, the last ones, each of the memory of the parameters.
    **host
        Static arguments of model and guide, as the host takes them.

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
    The running statistics of batch normalisation belong to the last weights, and each snapshot wants its own: see
    `update_batch_norm`, one call for each draw.

    Examples
    --------
    >>> rate = Triangular(peak=0.05, floor=0.01, cycle_length=1_000, begin=10_000)
    >>> svi = FGE(model, AutoDelta(model), optax.sgd(rate), Trace_ELBO(), start=10_501, cycle_length=1_000)
    >>> result = svi.run(random.key(0), 20_000, x, y)
    >>> predict(svi.snapshots(result.state, x, y), x_test, y_test, model=model)
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
            model,
            guide,
            optim,
            loss,
            start=start,
            cycle_length=cycle_length,
            learning_rate=learning_rate,
            **host,
        )

    def _empty(self, params: dict, mutable: dict, args: tuple, kwargs: dict) -> Any:
        return jax.tree.map(lambda x: jnp.zeros((self.num_snapshots, *x.shape), x.dtype), params)

    def _add(self, kept: Any, number: Array, params: dict, args: tuple, kwargs: dict) -> Any:
        return jax.tree.map(lambda rows, x: rows.at[number % self.num_snapshots].set(x), kept, params)

    def snapshot_params(self, svi_state: SnapshotState) -> dict[str, Any]:
        """Values of the ``param`` sites at the snapshots, in the user's coordinates, shapes (snapshots, ...).

        Parameters
        ----------
        svi_state
            After the first snapshot.
        """
        rows = self._rows(svi_state)
        return jax.vmap(self.constrain_fn)(jax.tree.map(lambda x: x[rows], svi_state.kept))

    def snapshots(self, svi_state: SnapshotState, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Draws of the latent sites, one of each snapshot's guide: the weights themselves for ``AutoDelta``.

        Parameters
        ----------
        svi_state
            After the first snapshot.
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

        def draw(number: Array, params: dict) -> dict[str, Array]:
            with (
                handlers.block(),
                handlers.trace() as sites,
                handlers.seed(rng_seed=random.fold_in(random.key(0), number)),
                handlers.substitute(data=params),
            ):
                self._bare_guide(*args, **self._of_guide(kwargs))
            latent = {n: s for n, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}
            return {n: s["value"] for n, s in latent.items() if not s["infer"].get("is_auxiliary")}

        params = self.snapshot_params(svi_state)
        with (
            handlers.block(),
            handlers.trace() as sites,
            handlers.seed(rng_seed=random.key(0)),
            handlers.substitute(data=self.get_params(svi_state)),
        ):
            self._bare_guide(*args, **self._of_guide(kwargs))
        snapshots.check_of_guide([name for name in params if name not in sites])
        return jax.vmap(draw)(jnp.arange(len(self._rows(svi_state))), params)

    def _check_kept(self, kept: Any) -> None:
        snapshots.check_state("num_snapshots", len(jax.tree.leaves(kept)[0]), self.num_snapshots)

    def _rows(self, svi_state: SnapshotState) -> np.ndarray:
        """Where the snapshots are, the earliest first."""
        count = self._check_taken(svi_state)
        return np.arange(max(count - self.num_snapshots, 0), count) % self.num_snapshots

    def averaging_weights(self, svi_state: SnapshotState) -> np.ndarray:
        """Weights of the snapshots kept, shape (snapshots,): all alike."""
        kept = len(self._rows(svi_state))
        return np.full(kept, 1 / kept)

    def snapshot_steps(self, svi_state: SnapshotState) -> np.ndarray:
        """Numbers of steps after which the snapshots kept were taken, shape (snapshots,)."""
        return super().snapshot_steps(svi_state)[-self.num_snapshots :]
