"""The index stream of a data plate, owned by the kernel.

By default an epoch is a random permutation of all rows cut into minibatches; a batch that straddles two epochs
takes its tail from the next, so that each index comes exactly once per epoch.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn_ppl.layout import Plate


class IndexStream:
    """Minibatches of one plate.

    Parameters
    ----------
    plate
        Its rows N and the minibatch's rows B.
    subsampling
        ``"epoch"``, ``"without_replacement"`` (a fresh subset each time) or ``"with_replacement"``.
    device
        Where the indices live.
    """

    def __init__(self, plate: Plate, subsampling: str, device: Any = None):
        self.plate = plate
        self.subsampling = subsampling
        self.device = device
        self._order = torch.empty(0, dtype=torch.long, device=device)
        self._offset = 0

    def _shuffled(self) -> Tensor:
        return torch.randperm(self.plate.size, device=self.device)

    def next(self) -> Tensor:
        """Row indices of the next minibatch, shape (B,)."""
        rows = self.plate.batch_size
        if self.subsampling == "with_replacement":
            return torch.randint(self.plate.size, (rows,), device=self.device)
        if self.subsampling == "without_replacement":
            return self._shuffled()[:rows]
        batch = self._order[self._offset : self._offset + rows]
        self._offset += rows
        missing = rows - len(batch)
        if missing:
            self._order, self._offset = self._shuffled(), missing
            batch = torch.cat([batch, self._order[:missing]])
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The rest of the epoch; the generator's state is the kernel's to keep."""
        return {"order": self._order.clone(), "offset": self._offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._order, self._offset = state["order"].to(self.device), state["offset"]


def as_tensor(value: Any) -> Tensor:
    """A tensor of what a batch of ``minibatches=`` holds, in the layout that every batch of its shape has."""
    if isinstance(value, str | bytes):
        raise TypeError
    if isinstance(value, Tensor):
        return value.contiguous()
    return torch.tensor(np.asarray(value) if hasattr(value, "__array__") else value)
