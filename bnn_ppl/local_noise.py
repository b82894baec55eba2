"""What the local reparameterisations of both backends say of the sites and layers that they find."""

import warnings
from collections import Counter
from collections.abc import Iterable

from bnn_ppl.guide_sites import Sites

MARK = "local_reparameterization"  # under which a guide's site leaves its mean and scale
UNMARKED = "unmarked"  # attribute of such a guide: the one that it was made from


def check_found(names: list[str], sites: Sites) -> None:
    """Raise a ValueError for a guide without normals at the sites."""
    missing = [name for name in sites if name not in names] if isinstance(sites, list) else []
    if missing:
        raise ValueError(f"sites={sites!r} names {missing}, which the guide does not draw from normals: it has {names}")
    if not names:
        raise ValueError(
            "guide draws no site from a normal of its own, whose noise could go to the outputs of a layer: use a guide "
            "such as AutoNormal, or train without local_reparameterization"
        )


def check_uses(names: Iterable[str], uses: Counter, known: str) -> None:
    """Raise a ValueError if no layer was found, and warn of a site in several layers."""
    names = sorted(names)
    if not uses:
        raise ValueError(
            f"model has no layer with one of the sites {names} that local_reparameterization knows, which are {known}: "
            "write the layers so, or train without it"
        )
    several = sorted(name for name, count in uses.items() if count > 1)
    if several:
        warnings.warn(
            f"the sites {several} are in several layers of the model, whose noise local_reparameterization draws "
            "independently, as if each layer had weights of its own: leave them out of sites=, unless the layers "
            "take different parts of them",
            UserWarning,
            stacklevel=2,
        )
