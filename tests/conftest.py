"""What all tests share."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs() -> Iterator[None]:
    """JAX keeps every compiled program: over the whole suite, gigabytes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
