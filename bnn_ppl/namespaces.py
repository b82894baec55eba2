"""The functions (sqrt, exp, ...) that go with an array, whichever backend made it."""

import math
import sys
from types import ModuleType
from typing import Any


def namespace(array: Any) -> ModuleType:
    """Module whose ``sqrt``, ``exp``, ``expm1`` and ``log`` act on `array`.

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
    if type(array).__module__.partition(".")[0] == "torch":
        return sys.modules["torch"]
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return math
