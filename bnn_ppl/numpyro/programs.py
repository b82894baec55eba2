"""Traced programs, taken apart: what functions that exchange some primitives of a program share."""

from collections.abc import Callable
from typing import Any

from jax.extend import core
from jax.extend.core import primitives


def inner_program(eqn: Any) -> Any:
    """The program inside a call, as a ClosedJaxpr, or None: custom derivatives and loops stay closed."""
    if eqn.primitive in (primitives.jit_p, primitives.closed_call_p):
        return eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
    if eqn.primitive is primitives.remat_p:
        return core.ClosedJaxpr(eqn.params["jaxpr"], ())
    return None


def as_function(jaxpr: Any, eqn: Any) -> Callable[..., list]:
    """One equation of a program as a program of its own, so that JAX itself runs it; it takes no literals."""
    operands = [v for v in eqn.invars if not isinstance(v, core.Literal)]
    blank = {"arg_names": ("",) * len(operands), "result_paths": ("",) * len(eqn.outvars)}
    ends = {"constvars": (), "invars": operands, "outvars": eqn.outvars, "effects": eqn.effects}
    own = jaxpr.replace(eqns=[eqn], debug_info=jaxpr.debug_info._replace(**blank), **ends)
    return core.jaxpr_as_fun(core.ClosedJaxpr(own, ()))
