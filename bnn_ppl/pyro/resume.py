"""States of chains: taken, handed out to the chains of the next run in whatever process they are, and put back."""

import multiprocessing
from collections.abc import Sequence
from typing import Any

import torch


class WaitingStates:
    """States that no chain has gone on from yet; each serves one chain.

    Parameters
    ----------
    states
        One a chain.
    """

    def __init__(self, states: Sequence[dict[str, Any]]):
        self._states = list(states)
        self._taken = torch.zeros(len(self._states), dtype=torch.bool).share_memory_()

    def take(self) -> dict[str, Any] | None:
        """The state that this chain goes on from, if any is left."""
        waiting = [i for i, taken in enumerate(self._taken.tolist()) if not taken]
        chain = multiprocessing.current_process().name
        if waiting and multiprocessing.parent_process() is not None and chain.isdigit():  # as the host names its chains
            if int(chain) >= len(self._states):
                raise ValueError(
                    f"the state to resume has {len(self._states)} chains, and this is chain {int(chain) + 1}: give "
                    "MCMC the num_chains that the state comes from"
                )
            waiting = [i for i in waiting if i == int(chain)]
        if not waiting:
            self._states, self._taken = [], self._taken[:0]
            return None
        self._taken[waiting[0]] = True
        return self._states[waiting[0]]


def chain_state(kernel: Any) -> dict[str, Any]:
    """Where a kernel's chain stands: positions, what moves with them, gradient, place in the epoch, generator."""
    if not hasattr(kernel, "_energy"):
        raise ValueError("the kernel has no chain yet: take its state after MCMC.run")
    position = kernel._position
    cuda = position.device.type == "cuda"
    return {
        "kernel": type(kernel).__name__,
        "sizes": _sizes(kernel),
        "step": kernel._step,
        "params": {name: value.clone() for name, value in kernel._unflatten(position).items()},
        "extra": {name: value.clone() for name, value in kernel._extra.items()},
        "energy": kernel._energy.clone(),
        "gradient": kernel._grad.clone(),
        "streams": {name: stream.state_dict() for name, stream in kernel._streams.items()},
        "generator": torch.get_rng_state(),
        "cuda_generator": torch.cuda.get_rng_state(position.device) if cuda else None,
    }


def _sizes(kernel: Any) -> dict[str, Any]:
    """Shapes and types of the sites, rows and minibatch of the plates, and what moves: what a state must fit."""
    sites = {name: (tuple(shape), str(kernel._dtypes[name])) for name, shape in kernel._shapes.items()}
    plates = {name: (stream.plate.size, stream.plate.batch_size) for name, stream in kernel._streams.items()}
    return sites | plates | dict.fromkeys(sorted(kernel._extra), "carried")


def restore(kernel: Any, state: dict[str, Any]) -> None:
    """Let a kernel that is set up go on from a state."""
    theirs, ours = (state["kernel"], state["sizes"]), (type(kernel).__name__, _sizes(kernel))
    if theirs != ours:
        raise ValueError(
            f"the state to resume comes from a chain with (kernel, sites and plates) {theirs}, and this one has "
            f"{ours}: resume with the kernel, model and data that the state comes from"
        )
    if kernel._warmup_steps:
        raise ValueError(
            f"warmup_steps={kernel._warmup_steps} for a chain that goes on from a loaded state: give MCMC "
            "warmup_steps=0"
        )
    kernel._step = state["step"]
    kernel._position = kernel._flatten(state["params"])
    kernel._extra = {name: value.clone() for name, value in state["extra"].items()}
    kernel._energy, kernel._grad = state["energy"].clone(), state["gradient"].clone()
    for name, stream in kernel._streams.items():
        stream.load_state_dict(state["streams"][name])
    torch.set_rng_state(state["generator"])
    if state["cuda_generator"] is not None:
        torch.cuda.set_rng_state(state["cuda_generator"], kernel._position.device)
    kernel._last = kernel._unflatten(kernel._position)
