"""The functions (sqrt, exp, ...) that go with an array, whichever backend made it."""

import math
import sys
from types import ModuleType
from typing import Any


def namespace(array: Any) -> ModuleType:
    """Module whose ``sqrt``, ``exp``, ``expm1``, ``log`` and ``concatenate`` act on `array`.

    Parameters
    ----------
    array
        A NumPy, JAX or torch array, or a Python number.

    Returns
    -------
    module
        ``numpy``, ``jax.numpy``, ``torch``, or ``math`` for a Python number. Nothing is imported:
        whoever made the array has loaded its module already.
    """
    package = type(array).__module__.partition(".")[0]
    if package in ("torch", "numpy"):  # arrays of NumPy 1 and of torch do not tell their namespace
        return sys.modules[package]
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return math
