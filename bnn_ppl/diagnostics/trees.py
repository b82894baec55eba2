"""Groups and settings of what `bnn_ppl.to_arviz` returns."""

import json
from typing import Any

import xarray as xr


def group_of(tree: Any, name: str) -> xr.Dataset:
    """A group of a tree; a ValueError where there is none."""
    try:
        group = tree[name]
    except (KeyError, TypeError):
        raise ValueError(f"tree has no group {name!r}: give what bnn_ppl.to_arviz returns") from None
    return group.to_dataset() if isinstance(group, xr.DataTree) else group


def setting(value: Any) -> Any:
    """A setting as the kernel had it: `to_arviz` writes dicts and booleans as JSON."""
    written = isinstance(value, str) and (value.startswith("{") or value in ("true", "false"))
    return json.loads(value) if written else value
