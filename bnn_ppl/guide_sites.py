"""Which sites a guide of weights is for, and the shapes of its noise parameters: shared by both backends."""

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bnn_ppl.parameters import output_axis
from bnn_ppl.settings import check_choice

PARAMETERIZATIONS = ("weight", "neuron", "layer", "additive")

Sites = Iterable[str] | Callable[[str, tuple[int, ...]], bool] | None


def check_sites(sites: Sites) -> Sites:
    """`sites` as a list or a callable; a ValueError for a string, which is a list of letters."""
    if sites is None or callable(sites):
        return sites
    if isinstance(sites, str):
        raise ValueError(
            f"sites must be a list of names or a callable of (name, shape), got {sites!r}: give [{sites!r}]"
        )
    return list(sites)


def check_log_alpha(value: Any) -> None:
    """Raise a ValueError unless the starting log alpha is a finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"init_log_alpha must be a finite number, got {value!r}: the published one is -5")


def chooser(sites: Sites) -> Callable[[str, tuple[int, ...]], bool]:
    """Whether a site of this name and shape is among `sites`."""
    if sites is None:
        return lambda name, shape: True
    if callable(sites):
        return sites
    names = set(sites)
    return lambda name, shape: name in names


def check_found(sites: Sites, found: Iterable[str], latent: Iterable[str]) -> None:
    """Raise a ValueError where `sites` names what the model lacks, or chooses nothing."""
    found, latent = list(found), list(latent)
    missing = [name for name in sites if name not in found] if isinstance(sites, list) else []
    if missing or not found:
        what = f"names {missing}, no latent sites" if missing else "chooses no latent site"
        raise ValueError(f"sites={sites!r} {what}; the latent sites of the model are {sorted(latent)}")


def check_real(name: str, is_real: bool, support: Any) -> None:
    """Raise a ValueError for a site that a normal does not fit."""
    if not is_real:
        raise ValueError(
            f"site {name!r} has the support {support}, and its guide is normal: leave it out of sites=, and give "
            "it a guide of its own with the host's AutoGuideList"
        )


def check_guide_params(guide: str, params: Any, names: Iterable[str]) -> None:
    """Raise a TypeError for params that are no dict, and a ValueError for a dict without those of the guide."""
    if not isinstance(params, Mapping):
        raise TypeError(
            f"params must be a dict of values by param site, got {type(params).__name__}: give the params of what "
            "svi.run returned, svi_result.params"
        )
    missing = [name for name in names if name not in params]
    if missing:
        raise ValueError(
            f"params has no values for {missing} of the guide {guide}; there are values for {list(params)}: give "
            "svi_result.params of a run with this guide"
        )


def check_outside(name: str, plates: list[str]) -> None:
    """Raise a ValueError for a site in a plate."""
    if plates:
        raise ValueError(
            f"site {name!r} lies in the plates {plates}, and this guide is for weights, which lie outside: leave it "
            "out of sites="
        )


def noise_shape(parameterization: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of log alpha, which broadcasts to that of the weights."""
    check_choice("parameterization", parameterization, PARAMETERIZATIONS)
    if parameterization in ("weight", "additive"):
        return shape
    if len(shape) == 0:
        raise ValueError(
            f"site {name!r} is a scalar, and parameterization={parameterization!r} shares one alpha between weights: "
            "leave it out of sites=, or take 'weight'"
        )
    ones = [1] * len(shape)
    if parameterization == "neuron":
        axis = output_axis(name)
        ones[axis] = shape[axis]
    return tuple(ones)
