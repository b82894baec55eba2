"""Saved states of chains, handed out to the chains of the next run, in whatever process they are."""

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
