"""The base of SVI that looks at its own path: snapshots after steps start, start + c, start + 2 c, ... of a run.

The path itself is that of the host's ``SVI``, bit for bit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpyro.infer import SVI
from numpyro.infer.svi import SVIRunResult, SVIState
from tqdm import trange

from bnn_ppl import snapshots
from bnn_ppl.local_noise import UNMARKED
from bnn_ppl.numpyro.annealed_elbo import AnnealedELBO
from bnn_ppl.schedules import check_count


class SnapshotState(NamedTuple):
    """State of the host's SVI, then the number of snapshots so far, and what is kept of them."""

    optim_state: Any
    mutable_state: Any
    rng_key: Array
    num_snapshots: Array
    kept: Any


def _joined(state: SVIState, num_snapshots: Array, kept: Any) -> SnapshotState:
    return SnapshotState(state.optim_state, state.mutable_state, state.rng_key, num_snapshots, kept)


def check_is_state(name: str, state: Any, *others: type) -> None:
    """Raise a TypeError for what is no state, as the result of a run, or its params."""
    if not isinstance(state, (SnapshotState, *others)):
        raise TypeError(
            f"{name} must be a state of this SVI, got {type(state).__name__}: give result.state of result = "
            "svi.run(...), or the state that svi.update returned"
        )


class SnapshotSVI(SVI):
    """SVI with snapshots; a class of its own says what is kept of them."""

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Any,
        loss: Any,
        *,
        start: int,
        cycle_length: int,
        learning_rate: float | Callable | None,
        **host: Any,
    ):
        snapshots.check_snapshots(start, cycle_length)
        if learning_rate is not None:
            snapshots.check_learning_rate(learning_rate, start, cycle_length)
        self._bare_guide = getattr(guide, UNMARKED, guide)  # laws are read and averaged without local noise
        self.learning_rate = learning_rate
        self.start = start
        self.cycle_length = cycle_length
        super().__init__(model, guide, optim, loss, **host)

    def _empty(self, params: dict, mutable: dict, args: tuple, kwargs: dict) -> Any:
        """What is kept before the first snapshot; the arguments are those of the guide.

        `params` are unconstrained, `mutable` values of the ``mutable`` sites.
        """
        raise NotImplementedError

    def _check_kept(self, kept: Any) -> None:
        """Raise a ValueError for what another object has kept, with other settings."""
        raise NotImplementedError

    def _add(self, kept: Any, number: Array, params: dict, args: tuple, kwargs: dict) -> Any:
        """What is kept after the snapshot of a number, 0 for the first."""
        raise NotImplementedError

    def init(self, rng_key: Array, *args: Any, init_params: dict | None = None, **kwargs: Any) -> SnapshotState:
        """Start, as the host's."""
        state = super().init(rng_key, *args, init_params=init_params, **kwargs)
        return self._begin(state, args, kwargs)

    def update(
        self, svi_state: SnapshotState, *args: Any, forward_mode_differentiation: bool = False, **kwargs: Any
    ) -> tuple[SnapshotState, Array]:
        """Take a step, as the host's."""
        check_is_state("svi_state", svi_state)
        forward = {"forward_mode_differentiation": forward_mode_differentiation}
        state, loss = super().update(svi_state, *args, **forward, **kwargs)
        return self._look(svi_state, state, args, kwargs), loss

    def stable_update(
        self, svi_state: SnapshotState, *args: Any, forward_mode_differentiation: bool = False, **kwargs: Any
    ) -> tuple[SnapshotState, Array]:
        """Take a step, as the host's; one that the host takes back is no step, and has no snapshot."""
        check_is_state("svi_state", svi_state)
        forward = {"forward_mode_differentiation": forward_mode_differentiation}
        state, loss = super().stable_update(svi_state, *args, **forward, **kwargs)
        return self._look(svi_state, state, args, kwargs), loss

    def run(
        self,
        rng_key: Array,
        num_steps: int,
        *args: Any,
        progress_bar: bool = True,
        stable_update: bool = False,
        forward_mode_differentiation: bool = False,
        init_state: Any = None,
        init_params: dict | None = None,
        **kwargs: Any,
    ) -> SVIRunResult:
        """Run, as the host's; `init_state` may also be the state of a run of the host's own ``SVI``.

        Snapshots are taken between compiled steps, so that these do not carry what is kept.
        """
        check_count("num_steps", num_steps)
        if init_state is not None:
            check_is_state("init_state", init_state, SVIState)
        before = 0 if init_state is None else init_state.optim_state[0]
        if not isinstance(before, jax.core.Tracer):
            snapshots.warn_no_snapshot(int(before), num_steps, self.start, self.cycle_length)
            self._warn_of_rates(int(before), num_steps)
        state = init_state
        if not isinstance(init_state, SnapshotState) or self.constrain_fn is None:
            state = self.init(rng_key, *args, init_params=init_params, **kwargs)
            if init_state is not None:
                state = state._replace(**init_state._asdict())
        self._check_kept(state.kept)
        if stable_update:  # which steps are taken back is known on the device only
            options = {"progress_bar": progress_bar, "stable_update": True, "init_state": state}
            forward = {"forward_mode_differentiation": forward_mode_differentiation}
            return super().run(rng_key, num_steps, *args, **options, **forward, **kwargs)

        def advance(state: SVIState) -> tuple[SVIState, Array]:
            forward = {"forward_mode_differentiation": forward_mode_differentiation}
            return SVI.update(self, state, *args, **forward, **kwargs)

        def add(state: SVIState, kept: Any, number: Array) -> Any:
            return self._add(kept, number, self.optim.get_params(state.optim_state), args, self._of_guide(kwargs))

        loop = self._with_bar if progress_bar else self._compiled
        state, losses = loop(advance, add, state, num_steps)
        return SVIRunResult(self.get_params(state), state, losses)

    def _warn_of_rates(self, before: int, num_steps: int) -> None:
        if self.learning_rate is None:
            return
        first = snapshots.first_snapshot(self.start, self.cycle_length)
        later = (step for step in range(first, before + num_steps + 1, self.cycle_length) if step > before)
        any(snapshots.warn_changed_rate(self.learning_rate, first, step) for step in later)

    def _with_bar(
        self, advance: Callable, add: Callable, state: SnapshotState, num_steps: int
    ) -> tuple[SnapshotState, Array]:
        """Step by step, with the bar that the host shows."""
        advance, add = jax.jit(advance), jax.jit(add)
        before, losses = int(state.optim_state[0]), []
        batch = max(num_steps // 20, 1)
        svi_state, kept, count = SVIState(*state[:3]), state.kept, int(state.num_snapshots)
        with trange(1, num_steps + 1) as bar:
            for i in bar:
                svi_state, loss = advance(svi_state)
                losses.append(loss)
                if snapshots.is_due(before + i, self.start, self.cycle_length):
                    kept = add(svi_state, kept, count)
                    count += 1
                if i % batch == 0:
                    losses[i - batch :] = jax.device_get(losses[i - batch :])
                    average = sum(losses[i - batch :]) / batch
                    text = f"init loss: {losses[0]:.4f}, avg. loss [{i - batch + 1}-{i}]: {average:.4f}"
                    bar.set_postfix_str(text, refresh=False)
        return _joined(svi_state, jnp.int32(count), kept), jnp.stack(losses)

    def _compiled(
        self, advance: Callable, add: Callable, state: SnapshotState, num_steps: int
    ) -> tuple[SnapshotState, Array]:
        """In one program: loops of steps up to a snapshot or the end, one after another."""
        before, first = state.optim_state[0], snapshots.first_snapshot(self.start, self.cycle_length)
        _, loss = jax.eval_shape(advance, SVIState(*state[:3]))

        def steps_up_to(end: Array, carry: tuple) -> tuple:
            def one(i: Array, inner: tuple) -> tuple:
                svi_state, loss = advance(inner[0])
                return svi_state, inner[1].at[i - before].set(loss)

            return lax.fori_loop(carry[0].optim_state[0], end, one, carry)

        def part(carry: tuple, _: None) -> tuple[tuple, None]:
            svi_state, losses, kept, count = carry
            step = svi_state.optim_state[0]
            to_next = jnp.where(step < first, first - step, 1 + (first - step - 1) % self.cycle_length)
            end = jnp.minimum(step + to_next, before + num_steps)
            svi_state, losses = steps_up_to(end, (svi_state, losses))
            due = snapshots.is_due(end, self.start, self.cycle_length) & (end > step)
            kept = lax.cond(due, add, lambda svi_state, kept, number: kept, svi_state, kept, count)
            return (svi_state, losses, kept, count + due), None

        start = SVIState(*state[:3]), jnp.zeros(num_steps, loss.dtype), state.kept, state.num_snapshots
        parts = num_steps // self.cycle_length + 2
        (svi_state, losses, kept, count), _ = lax.scan(part, start, None, length=parts)
        return _joined(svi_state, count, kept), losses

    def _begin(self, state: SVIState, args: tuple, kwargs: dict) -> SnapshotState:
        mutable = jax.tree.map(lambda value: value, state.mutable_state or {})  # which networks write into
        kept = self._empty(self.optim.get_params(state.optim_state), mutable, args, self._of_guide(kwargs))
        return _joined(state, jnp.zeros((), jnp.int32), kept)

    def _of_guide(self, kwargs: dict) -> dict:
        """Keyword arguments of the guide: the loss takes its own away."""
        own = {"kl_weight"} if isinstance(self.loss, AnnealedELBO) else set()
        return {name: value for name, value in (kwargs | self.static_kwargs).items() if name not in own}

    def _look(self, before: SnapshotState, state: SVIState, args: tuple, kwargs: dict) -> SnapshotState:
        self._check_kept(before.kept)
        step = state.optim_state[0]
        due = snapshots.is_due(step, self.start, self.cycle_length) & (step != before.optim_state[0])

        def add(kept: Any) -> Any:
            params = self.optim.get_params(state.optim_state)
            return self._add(kept, before.num_snapshots, params, args, self._of_guide(kwargs))

        kept = lax.cond(due, add, lambda kept: kept, before.kept)
        return _joined(state, before.num_snapshots + due, kept)

    def _check_taken(self, svi_state: SnapshotState) -> int:
        """Number of snapshots; a ValueError without any."""
        check_is_state("svi_state", svi_state)
        if self.constrain_fn is None:
            raise ValueError("this object does not know the parameters yet: call its init or run first")
        self._check_kept(svi_state.kept)
        count = int(svi_state.num_snapshots)
        snapshots.check_taken(count, int(svi_state.optim_state[0]), self.start, self.cycle_length)
        return count

    def snapshot_steps(self, svi_state: SnapshotState) -> np.ndarray:
        """Numbers of steps after which snapshots were taken, shape (snapshots,)."""
        check_is_state("svi_state", svi_state)
        step, count = int(svi_state.optim_state[0]), int(svi_state.num_snapshots)
        return snapshots.steps_of(step, count, self.start, self.cycle_length)
