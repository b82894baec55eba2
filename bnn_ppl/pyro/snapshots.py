"""The base of SVI that looks at its own path: snapshots after steps start, start + c, start + 2 c, ... of a run.

The path itself is that of the host's ``SVI``, bit for bit.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import transform_to

from bnn_ppl import snapshots
from bnn_ppl.local_noise import UNMARKED
from bnn_ppl.pyro.annealed_elbo import AnnealedELBO
from bnn_ppl.pyro.site_laws import aside


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
        super().__init__(model, guide, optim, loss, **host)
        self._bare_guide = getattr(guide, UNMARKED, guide)  # laws are read and averaged without local noise
        self.learning_rate = learning_rate
        self.start = start
        self.cycle_length = cycle_length
        self._annealed = isinstance(loss, AnnealedELBO)
        self._taken = 0
        self._count = 0
        self._kept: Any = None
        self._constraints: dict[str, Any] = {}
        self._warned = False
        self._random_state: dict[str, Any] | None = None

    def _empty(self, params: dict[str, Tensor], args: tuple, kwargs: dict) -> Any:
        """What is kept before the first snapshot; `params` are unconstrained, the arguments those of the guide."""
        raise NotImplementedError

    def _add(self, kept: Any, number: int, params: dict[str, Tensor], args: tuple, kwargs: dict) -> Any:
        """What is kept after the snapshot of a number, 0 for the first."""
        raise NotImplementedError

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take a step, as the host's."""
        of_guide = {name: value for name, value in kwargs.items() if name != "kl_weight" or not self._annealed}
        self._go_on(args, of_guide)
        with poutine.trace(param_only=True) as seen:
            loss = super().step(*args, **kwargs)
        self._note(seen.trace.nodes)
        if self._kept is None:
            self._kept = self._empty(self._params(), args, of_guide)
        self._taken += 1
        if snapshots.is_due(self._taken, self.start, self.cycle_length):
            self._warn_of_rate()
            self._kept = self._add(self._kept, self._count, self._params(), args, of_guide)
            self._count += 1
        return loss

    def _note(self, names: Iterable[str]) -> None:
        """Keep the constraints of parameters, of which compiled losses tell in the first step only."""
        new = sorted(set(names) - set(self._constraints))
        if new and self._kept is not None:
            raise ValueError(
                f"the param sites {new} came after the first step, and averages need all from there on: use them in "
                "every step"
            )
        constraints = pyro.get_param_store().get_state()["constraints"]
        self._constraints |= {name: constraints[name] for name in new}

    def _params(self) -> dict[str, Tensor]:
        """Unconstrained parameters of model and guide."""
        found = dict(pyro.get_param_store().named_parameters())
        return {name: found[name].detach() for name in self._constraints}

    def _constrained(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: transform_to(self._constraints[name])(value) for name, value in params.items()}

    def _warn_of_rate(self) -> None:
        if self.learning_rate is None or self._warned:
            return
        used = [getattr(optim, "optimizer", optim).param_groups[0]["lr"] for optim in self.optim.optim_objs.values()]
        first = snapshots.first_snapshot(self.start, self.cycle_length)
        self._warned = snapshots.warn_changed_rate(self.learning_rate, first, self._taken)
        self._warned |= snapshots.warn_other_rate(self.learning_rate, self._taken, used[0])

    def _check_taken(self) -> int:
        """Number of snapshots; a ValueError without any."""
        snapshots.check_taken(self._count, self._taken, self.start, self.cycle_length)
        return self._count

    def snapshot_steps(self) -> np.ndarray:
        """Numbers of steps after which snapshots were taken, shape (snapshots,)."""
        return snapshots.steps_of(self._taken, self._count, self.start, self.cycle_length)

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: parameters, optimiser, what is kept of snapshots, and torch's random states.

        ``torch.save`` it; `load_state_dict` then goes on bit for bit, in another process too. Buffers of modules, such
        as running statistics, are not in it: save those with the modules.
        """
        return deepcopy(
            {
                "params": pyro.get_param_store().get_state(),
                "optim": self.optim.get_state(),
                "random_state": _random_state(),
                "own": {name: getattr(self, name) for name in self._own},
                "settings": {name: getattr(self, name) for name in self._settings},
            }
        )

    _own: tuple[str, ...] = ("_taken", "_count", "_kept", "_constraints")
    _settings: tuple[str, ...] = ("start", "cycle_length")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, with the next step; a guide that has not run yet is set up there first.

        Parameters
        ----------
        state
            From `state_dict`, of an object made with the same arguments. Pyro's parameter store is set to its.

        Raises
        ------
        ValueError
            If it is no such state, or one of other settings.
        """
        snapshots.check_state_dict(state, ("params", "optim", "random_state", "own", "settings"))
        for name in self._settings:
            snapshots.check_state(name, state["settings"].get(name), getattr(self, name))
        state = deepcopy(state)
        store = pyro.get_param_store()
        here = dict(store.named_parameters())
        for name, value in state["params"]["params"].items():
            if name in here:  # modules and optimisers know a parameter by its tensor
                here[name].data.copy_(value)
                state["params"]["params"][name] = here[name]
        store.set_state(state["params"])
        self.optim.optim_objs.clear()
        self.optim.set_state(state["optim"])
        self._random_state = state["random_state"]
        for name, value in state["own"].items():
            setattr(self, name, value)

    def _go_on(self, args: tuple, kwargs: dict) -> None:
        if self._random_state is None:
            return
        with aside(), _IntoModules():
            guide = poutine.trace(self._bare_guide).get_trace(*args, **kwargs)
            poutine.replay(self.model, guide)(*args, **kwargs)
        torch.set_rng_state(self._random_state["cpu"])
        torch.cuda.set_rng_state_all(self._random_state["cuda"])
        self._random_state = None


class _IntoModules(Messenger):
    """Put values of Pyro's store into modules that were made anew, and their parameters into the store."""

    def _pyro_param(self, msg: dict) -> None:
        store, name = pyro.get_param_store(), msg["name"]
        start = msg["args"][1] if len(msg["args"]) > 1 else None
        known = dict(store.named_parameters()).get(name)
        if isinstance(start, torch.nn.Parameter) and known is not None and known is not start:
            start.copy_(known)
            del store[name]


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
