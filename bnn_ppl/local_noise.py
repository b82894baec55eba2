"""What the local reparameterisations of both backends say of the layers that they find."""

import warnings
from collections import Counter
from collections.abc import Iterable

MARK = "local_reparameterization"  # under which a guide's site leaves its mean and scale


def check_found(names: list[str]) -> None:
    """Raise a ValueError for a guide without normals."""
    if not names:
        raise ValueError(
            "guide draws no site from a normal, whose noise could go to the outputs of a layer: use a guide such as "
            "AutoNormal, or train without local_reparameterization"
        )


def check_uses(names: Iterable[str], uses: Counter) -> None:
    """Raise a ValueError if no layer was found, and warn of a site in several layers."""
    names = sorted(names)
    if not uses:
        raise ValueError(
            f"model has no matrix product or convolution with one of the sites {names}, which the guide draws from "
            "normals: train without local_reparameterization"
        )
    several = sorted(name for name, count in uses.items() if count > 1)
    if several:
        warnings.warn(
            f"the sites {several} are in several layers of the model, whose noise local_reparameterization draws "
            "independently, as if each layer had weights of its own: leave these sites to a guide that is not normal, "
            "or train without it",
            UserWarning,
            stacklevel=2,
        )
