"""Gradient of a potential, run as it is or traced once to a graph and compiled.

Tracing takes Pyro's handlers out of the loop: ``make_fx`` records the tensor operations of one gradient with the
position, temperature, minibatch and data as inputs, and ``torch.compile`` turns them into one program.
"""

import multiprocessing
import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree


def _in_forked_worker() -> bool:
    if multiprocessing.parent_process() is None:
        return False
    method = getattr(multiprocessing.current_process(), "_start_method", None)
    return (method or multiprocessing.get_start_method()) == "fork"


def _has_compiler(device: torch.device) -> bool:
    candidates = [os.environ.get("CXX"), "g++", "clang++"]
    return device.type != "cpu" or any(shutil.which(c) for c in candidates if c)


_IS_DATA = object()


class Gradient:
    """Value and flat gradient of ``energy(z, temperature, batch, args, kwargs)``.

    Parameters
    ----------
    jit_compile
        Whether to trace and compile on the first call.
    """

    def __init__(self, jit_compile: bool):
        self.jit_compile = jit_compile
        self._graph: Callable | None = None
        self._graph_key: Any = None

    def prepare(self, energy: Callable, args: tuple, kwargs: dict) -> None:
        """Set the potential and its data; a graph made for data of the same shapes is kept."""
        self._energy = energy
        self._args, self._kwargs = args, kwargs
        leaves, self._structure = pytree.tree_flatten((args, kwargs))
        self._data = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._constants = [_IS_DATA if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        key = [(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if self._graph is not None and not _same(key, self._graph_key):
            self._graph = None
        self._graph_key = key

    def __call__(
        self, position: Tensor, temperature: float, batch: dict[str, Tensor], unflatten: Callable
    ) -> tuple[Tensor, Tensor]:
        """Energy, a scalar, and its gradient, shape (d,), at a flat position."""
        if not self.jit_compile:
            return self.eager(position, temperature, batch, unflatten)
        inputs = (position, position.new_tensor(temperature), list(batch.values()), self._data)
        if self._graph is None:
            self._graph = self._compiled(inputs, list(batch), unflatten)
        with torch.no_grad():
            return self._graph(*inputs)

    def eager(
        self, position: Tensor, temperature: float, batch: dict[str, Tensor], unflatten: Callable
    ) -> tuple[Tensor, Tensor]:
        """The same without a graph."""
        with torch.enable_grad():
            flat = position.detach().requires_grad_()
            energy = self._energy(unflatten(flat), temperature, batch, self._args, self._kwargs)
            (gradient,) = torch.autograd.grad(energy, flat)
        return energy.detach(), gradient

    def _compiled(self, inputs: tuple, names: list[str], unflatten: Callable) -> Callable:
        def energy(flat: Tensor, temperature: Tensor, rows: list[Tensor], data: list[Tensor]) -> Tensor:
            rest = iter(data)
            leaves = [next(rest) if constant is _IS_DATA else constant for constant in self._constants]
            args, kwargs = pytree.tree_unflatten(leaves, self._structure)
            batch = dict(zip(names, rows, strict=True))
            return self._energy(unflatten(flat), temperature, batch, args, kwargs)

        def energy_and_gradient(*inputs: Any) -> tuple[Tensor, Tensor]:
            gradient, value = torch.func.grad_and_value(energy)(*inputs)
            return value, gradient

        try:
            with pyro.validation_enabled(False):  # it branches on tensors' values
                graph = make_fx(energy_and_gradient)(*inputs)
        except RuntimeError as error:
            where = " ".join(getattr(error, "__notes__", ()))
            raise ValueError(
                "jit_compile=True cannot trace the model, which probably branches on a tensor's value or calls "
                f".item() {where}: set jit_compile=False, or write it with torch.where ({error})"
            ) from error
        if _in_forked_worker():
            warnings.warn(
                "jit_compile=True in a forked chain runs the traced graph uncompiled, since torch.compile can "
                'hang there: pass mp_context="spawn" to MCMC',
                UserWarning,
                stacklevel=2,
            )
            return graph
        if not _has_compiler(inputs[0].device):
            warnings.warn(
                "jit_compile=True found no C++ compiler (g++, clang++ or $CXX) and runs the traced graph uncompiled",
                UserWarning,
                stacklevel=2,
            )
            return graph
        return torch.compile(graph)


def _same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(x is y or (type(x) is type(y) and x == y) for x, y in zip(a, b, strict=True))
