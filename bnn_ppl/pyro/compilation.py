"""One gradient step of a kernel, run as it is or traced once to a graph and compiled.

Tracing takes Pyro's handlers out of the loop: ``make_fx`` records the tensor operations of one move and of the
gradient after it, with the chain's state, the coefficients, temperature, minibatch and data as inputs, and
TorchInductor turns them into one program. The noise is drawn outside: compiled normals are many times slower.
"""

import multiprocessing
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
import torch._inductor
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

Extra = dict[str, Tensor]


def _in_forked_worker() -> bool:
    if multiprocessing.parent_process() is None:
        return False
    method = getattr(multiprocessing.current_process(), "_start_method", None)
    return (method or multiprocessing.get_start_method()) == "fork"


def _has_compiler(device: torch.device) -> bool:
    candidates = [os.environ.get("CXX"), "g++", "clang++"]
    return device.type != "cpu" or any(shutil.which(c) for c in candidates if c)


_IS_DATA = object()


class Dynamics:
    """A kernel's move, and value and gradient of ``energy(flat, temperature, batch, args, kwargs)``.

    Parameters
    ----------
    jit_compile
        Whether to trace and compile on the first step.
    """

    def __init__(self, jit_compile: bool):
        self.jit_compile = jit_compile
        self._graph: Callable | None = None
        self._graph_key: Any = None
        self._numbers: dict[float, Tensor] = {}

    def prepare(self, move: Callable, energy: Callable, args: tuple, kwargs: dict) -> None:
        """Set the functions and the data; a graph made for data of the same shapes is kept."""
        self._move, self._energy = move, energy
        self._args, self._kwargs = args, kwargs
        leaves, self._structure = pytree.tree_flatten((args, kwargs))
        self._data = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._constants = [_IS_DATA if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        key = [_kind(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if self._graph is not None and not _same(key, self._graph_key):
            self._graph = None
        self._graph_key = key

    def evaluate(self, position: Tensor, temperature: float, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Energy, a scalar, and its gradient, shape (d,), at a flat position; never compiled."""
        with torch.enable_grad():
            flat = position.detach().requires_grad_()
            energy = self._energy(flat, temperature, batch, self._args, self._kwargs)
            (gradient,) = torch.autograd.grad(energy, flat)
        return energy.detach(), gradient

    def step(
        self,
        position: Tensor,
        extra: Extra,
        gradient: Tensor,
        noise: Tensor,
        coefficients: Sequence[Tensor | float],
        temperature: float,
        batch: Mapping[str, Tensor],
    ) -> tuple[Tensor, Extra, Tensor, Tensor]:
        """Position and what moves with it after one step, and energy and gradient there on the next minibatch."""
        if not self.jit_compile:
            position, extra = self._move(position, extra, gradient, noise, coefficients)
            return position, extra, *self.evaluate(position, temperature, batch)
        numbers = [self._number(value, position) for value in (*coefficients, temperature)]
        inputs = [position, gradient, noise, *extra.values(), *numbers, *batch.values(), *self._data]
        if self._graph is None:
            own = [tensor.clone() for tensor in inputs[: -len(self._data) or None]]  # equal numbers share a tensor
            self._graph = self._compiled(own + self._data, list(extra), len(numbers), list(batch))
        position, energy, gradient, *moved = self._graph(*inputs)
        return position, dict(zip(extra, moved, strict=True)), energy, gradient

    def _number(self, value: Tensor | float, like: Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value
        if value not in self._numbers:
            if len(self._numbers) > 100:  # schedules have a new one at each step
                self._numbers.clear()
            self._numbers[value] = torch.tensor(value, dtype=like.dtype)
        return self._numbers[value]

    def _compiled(self, inputs: list[Tensor], extras: list[str], numbers: int, plates: list[str]) -> Callable:
        def energy(flat: Tensor, temperature: Tensor, batch: dict[str, Tensor], data: Sequence[Tensor]) -> Tensor:
            rest = iter(data)
            leaves = [next(rest) if constant is _IS_DATA else constant for constant in self._constants]
            args, kwargs = pytree.tree_unflatten(leaves, self._structure)
            return self._energy(flat, temperature, batch, args, kwargs)

        def step(position: Tensor, gradient: Tensor, noise: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            leaves = iter(rest)
            extra = {name: next(leaves) for name in extras}
            *coefficients, temperature = (next(leaves) for _ in range(numbers))
            batch = {name: next(leaves) for name in plates}
            position, extra = self._move(position, extra, gradient, noise, coefficients)
            gradient, value = torch.func.grad_and_value(energy)(position, temperature, batch, list(leaves))
            return position, value, gradient, *extra.values()

        try:
            with pyro.validation_enabled(False):  # it branches on tensors' values
                graph = make_fx(step)(*inputs)
        except RuntimeError as error:
            where = " ".join(getattr(error, "__notes__", ()))
            raise ValueError(
                "jit_compile=True cannot trace the model, which probably branches on a tensor's value or calls "
                f".item() {where}: set jit_compile=False, or write it with torch.where ({error})"
            ) from error
        for node in graph.graph.nodes:  # the layout of a tensor may be another one when compiled
            if node.target is torch.ops.aten.view.default:
                node.target = torch.ops.aten.reshape.default
        graph.recompile()
        device = inputs[0].device
        if _in_forked_worker():
            warnings.warn(
                "jit_compile=True in a forked chain runs the traced graph uncompiled, since the compiler can "
                'hang there: pass mp_context="spawn" to MCMC',
                UserWarning,
                stacklevel=2,
            )
            return graph
        if not _has_compiler(device):
            warnings.warn(
                "jit_compile=True found no C++ compiler (g++, clang++ or $CXX) and runs the traced graph uncompiled",
                UserWarning,
                stacklevel=2,
            )
            return graph
        # On a CPU the compiler's choice of layouts made convolutions 1.6 times slower.
        options = {"layout_optimization": False} if device.type == "cpu" else None
        return torch._inductor.compile(graph, list(inputs), options=options)


def _kind(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(x is y or (type(x) is type(y) and x == y) for x, y in zip(a, b, strict=True))
