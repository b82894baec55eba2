"""Rademacher complexity of networks with one hidden layer, bounded by their norms [1]_.

For functions x -> sum_k w_k s(v_k'x) of m hidden units, with |v_k|_2 <= B0 and an activation s that is L-Lipschitz
with s(0) = 0, the complexity R = E_e sup_f (2 / n) sum_i e_i f(x_i), of signs e_i = +-1 by chance, is at most::

    |w|_2 <= B1    2 sqrt(m) L B0 B1 max|x_i|_2 / sqrt(n)
    |w|_1 <= B1    2 L B0 B1 max|x_i|_2 / sqrt(n)

A loss that is rho-Lipschitz in the 2-norm of C such outputs has at most sqrt(2) rho C times that [2]_.

References
----------
.. [1] Bartlett & Mendelson (2002), Rademacher and Gaussian complexities: risk bounds and structural results.
.. [2] Maurer (2016), A vector-contraction inequality for Rademacher complexities.
"""

from typing import Any, NamedTuple

import numpy as np

from bnn_ppl.diagnostics.checks import check_finite
from bnn_ppl.schedules import check_values
from bnn_ppl.settings import check_choice


class RademacherBound(NamedTuple):
    """B0, B1 and the bound, each of the shape (...) of the weights' leading dimensions."""

    hidden_norm: Any
    output_norm: Any
    bound: Any


def rademacher_bound(
    v: Any, w: Any, x: Any, *, norm: str = "l2", lipschitz: float = 1.0, loss_lipschitz: float | None = None
) -> RademacherBound:
    """Bound on the Rademacher complexity of the networks whose norms are at most those of the given weights.

    Parameters
    ----------
    v
        Weights of the hidden units, a row each, shape (..., m, inputs): the transpose of ``w0`` in ``x @ w0``. For
        biases append them as a column, and a column of ones to `x`. Leading dimensions may be chain and draw.
    w
        Weights of the outputs, a row each, shape (..., C, m), with the leading dimensions of `v`.
    x
        Inputs of the training rows, shape (n, inputs).
    norm
        ``"l2"`` or ``"l1"``: of the rows of `w`.
    lipschitz
        L of the activation: 1 for ReLU and tanh.
    loss_lipschitz
        rho, to bound the complexity of the loss on all C outputs: sqrt(2) for softmax cross-entropy. By default that
        of one output is bounded.

    Returns
    -------
    RademacherBound
        `hidden_norm` B0, the largest norm of a row of `v`; `output_norm` B1, of a row of `w`; and `bound`.

    Raises
    ------
    ValueError
        If shapes do not fit together, values are not finite, or an argument is out of range.

    Notes
    -----
    For real networks the bound is far above 1 and says nothing by itself; how it moves with the weights may.
    """
    check_choice("norm", norm, ("l2", "l1"))
    check_values("lipschitz", lipschitz, (), positive=True)
    hidden, output, rows = (np.asarray(a, np.float64) for a in (v, w, x))
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"x must have the shape (n, inputs) and be not empty, got {rows.shape}")
    if hidden.ndim < 2 or hidden.shape[-1] != rows.shape[1]:
        raise ValueError(
            f"v must have the shape (..., m, {rows.shape[1]}), a row for each hidden unit, got {hidden.shape}: "
            "transpose weights that multiply x from the right"
        )
    units = hidden.shape[-2]
    if output.ndim < 2 or output.shape[-1] != units or output.shape[:-2] != hidden.shape[:-2]:
        raise ValueError(
            f"w must have the shape (..., C, {units}), a row for each output and leading dimensions "
            f"{hidden.shape[:-2]}, got {output.shape}"
        )
    for name, values in (("v", hidden), ("w", output), ("x", rows)):
        check_finite(name, values)
    b0 = np.linalg.norm(hidden, axis=-1).max(axis=-1)
    b1 = np.linalg.norm(output, ord=int(norm[1]), axis=-1).max(axis=-1)
    bound = 2 * lipschitz * b0 * b1 * np.linalg.norm(rows, axis=-1).max() / len(rows) ** 0.5
    if norm == "l2":
        bound = bound * units**0.5
    if loss_lipschitz is not None:
        check_values("loss_lipschitz", loss_lipschitz, (), positive=True)
        bound = bound * 2**0.5 * loss_lipschitz * output.shape[-2]
    return RademacherBound(b0, b1, bound)
