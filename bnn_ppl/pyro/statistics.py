"""The statistics of `bnn_ppl.statistics`, computed on flat tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _by_site(products: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sum over the coordinates of each site, shape (sites,)."""
    return torch.stack([piece.sum() for piece in products.split(list(sizes))])


def position_statistics(z: Tensor, energy: Tensor, gradient: Tensor, sizes: Sequence[int]) -> dict[str, Any]:
    """Statistics of a position; step size and temperature are added by the kernel."""
    virial, norm_sq, slope_sq = (_by_site(a * b, sizes) for a, b in ((z, gradient), (z, z), (gradient, gradient)))
    return {
        "lp_minibatch": -float(energy),
        "configurational_temperature": float(virial.sum()) / sum(sizes),
        "site_configurational_temperature": [v / n for v, n in zip(virial.tolist(), sizes, strict=True)],
        "position_norm_sq": float(norm_sq.sum()),
        "site_position_norm_sq": norm_sq.tolist(),
        "gradient_norm": float(slope_sq.sum().sqrt()),
        "site_gradient_norm": slope_sq.sqrt().tolist(),
    }


def momentum_statistics(
    z: Tensor, momentum: Tensor, gradient: Tensor, mass: Tensor | float, sizes: Sequence[int]
) -> dict[str, Any]:
    """Statistics of a momentum; `mass` is a number or has an entry for each coordinate."""
    norm_sq, along, uphill = (_by_site(momentum * other, sizes) for other in (momentum, z, gradient))
    kinetic = _by_site(momentum * momentum / mass, sizes)
    return {
        "kinetic_temperature": float(kinetic.sum()) / sum(sizes),
        "site_kinetic_temperature": [k / n for k, n in zip(kinetic.tolist(), sizes, strict=True)],
        "position_momentum": float(along.sum()),
        "site_position_momentum": along.tolist(),
        "momentum_norm_sq": float(norm_sq.sum()),
        "site_momentum_norm_sq": norm_sq.tolist(),
        "momentum_gradient": float(uphill.sum()),
        "site_momentum_gradient": uphill.tolist(),
    }
