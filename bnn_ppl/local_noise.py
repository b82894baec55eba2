"""What the local reparameterisations of both backends say of the sites and layers that they find."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping

from bnn_ppl.guide_sites import Sites

MARK = "local_reparameterization"  # under which a guide's site leaves its mean and scale
UNMARKED = "unmarked"  # attribute of such a guide: the one that it was made from


def check_found(normals: Mapping[str, bool], sites: Sites) -> None:
    """Raise a ValueError for a guide without normals at the sites; `normals` says of each whether it is chosen."""
    if not normals:
        raise ValueError(
            "guide draws no site from a normal of its own, whose noise could go to the outputs of a layer: use a guide "
            "such as AutoNormal, or train without local_reparameterization"
        )
    missing = [name for name in sites if name not in normals] if isinstance(sites, list) else []
    if missing:
        raise ValueError(
            f"sites={sites!r} names {missing}, which the guide does not draw from normals: it has {list(normals)}"
        )
    if not any(normals.values()):
        raise ValueError(
            f"sites={sites!r} chooses none of the sites that the guide draws from normals: it has {list(normals)}"
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
