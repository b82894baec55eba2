"""How noisy minibatch gradients are at a position: their variance over minibatches, by Welford's recursion."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bnn_ppl.layout import Plate
from bnn_ppl.pyro.minibatches import IndexStream
from bnn_ppl.step_sizes import warn_noise


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


def warn_at_start(kernel: Any) -> None:
    """Warn where the gradient noise at a kernel's position dominates, over two minibatches."""
    layout, position = kernel._layout, kernel._position
    if not layout.subsampled:
        return
    temperature, subsampling = kernel._value("temperature", 0), kernel.settings.subsampling
    with undisturbed(position.device):
        variance = gradient_noise(
            lambda batch: kernel._dynamics.evaluate(position, temperature, batch | kernel._control)[1],
            layout.subsampled,
            layout.devices,
            2,
            subsampling,
        )
    by_site = zip(kernel._shapes, variance.split(kernel._numels), strict=True)
    noise = {name: float(part.mean()) for name, part in by_site}
    warn_noise(kernel.settings, noise, dict(zip(kernel._shapes, kernel._numels, strict=True)))
