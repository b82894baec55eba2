"""How noisy minibatch gradients are at a position: their variance over minibatches, by Welford's recursion."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from bnn_ppl.layout import Plate
from bnn_ppl.pyro.minibatches import IndexStream


@contextmanager
def undisturbed(on: torch.device) -> Iterator[None]:
    """Restore torch's random state at the end, that of a GPU included."""
    with torch.random.fork_rng(range(torch.cuda.device_count()) if on.type == "cuda" else []):
        yield


def gradient_noise(
    gradient: Callable[[dict[str, Tensor]], Tensor],
    plates: Mapping[str, Plate],
    devices: Mapping[str, torch.device],
    count: int,
    subsampling: str,
) -> Tensor:
    """Variance of each component of the minibatch gradient (sum scale).

    Parameters
    ----------
    gradient
        Of the rows of each plate, flat.
    plates, devices
        The subsampled plates, and where the indices of each live.
    count
        Minibatches, at least 2.
    subsampling
        The kernel's.

    Returns
    -------
    Tensor
        Shape (d,).
    """
    streams = {name: IndexStream(plate, subsampling, devices[name]) for name, plate in plates.items()}
    mean = square = torch.zeros(())
    for i in range(count):
        found = gradient({name: stream.next() for name, stream in streams.items()}).detach()
        rest = found - mean
        mean = mean + rest / (i + 1)
        square = square + rest * (found - mean)
    return square / (count - 1)
