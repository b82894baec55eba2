"""What predictions and labels must be like, with messages that name the argument, the value and the remedy."""

from typing import Any

import numpy as np

_TOLERANCE = 1e-3  # of a sum of probabilities: half precision keeps about three digits


def check_probabilities(name: str, probabilities: Any, dims: tuple[str, ...] = ("rows", "classes")) -> np.ndarray:
    """Probabilities as a float64 array, classes last.

    Parameters
    ----------
    name
        The argument's name, for the message.
    probabilities
        Array with the dimensions `dims`.
    dims
        Their names.

    Raises
    ------
    ValueError
        If the shape does not fit, a value is not finite or below 0, or a row does not sum to 1 (to 1e-3).
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != len(dims) or not p.size:
        raise ValueError(f"{name} must have the shape ({', '.join(dims)}) and be not empty, got {p.shape}")
    check_finite(name, p)
    low = p.min(axis=-1)
    if (low < 0).any():
        raise ValueError(
            f"{name} must be at least 0, got {low.min():.4g}{place(low < 0)}: give probabilities, not logits"
        )
    total = p.sum(axis=-1)
    wrong = np.abs(total - 1) > _TOLERANCE
    if wrong.any():
        raise ValueError(
            f"{name} must sum to 1 over the classes, got the sum {total[wrong][0]:.4g}{place(wrong)}: apply softmax "
            "to logits, or give one column per class"
        )
    return p


def check_finite(name: str, values: np.ndarray) -> None:
    """Raise a ValueError that says how many values are not finite, and where the first is."""
    bad = ~np.isfinite(values)
    if bad.any():
        raise ValueError(
            f"{name} has {bad.sum()} NaN or infinite values, the first{place(bad)}: leave out diverging draws, and "
            "check the inputs"
        )


def place(bad: np.ndarray) -> str:
    """Where the first of some bad entries is."""
    return f" at index {tuple(int(i) for i in np.argwhere(bad)[0])}" if bad.ndim else ""


def check_labels(labels: Any, rows: int, classes: int) -> np.ndarray:
    """Labels as an array, shape (rows,); a ValueError unless they are integers from 0 to classes - 1."""
    y = np.asarray(labels)
    if y.ndim != 1:
        raise ValueError(f"labels must have the shape (rows,), got {y.shape}: of one-hot rows take labels.argmax(-1)")
    if y.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers, got the dtype {y.dtype}: give class numbers from 0 on")
    if len(y) != rows:
        raise ValueError(f"labels has {len(y)} rows and probabilities has {rows}: give one label for each row")
    outside = (y < 0) | (y >= classes)
    if outside.any():
        raise ValueError(
            f"labels must be from 0 to {classes - 1}, since probabilities has {classes} classes; got "
            f"{y[outside][0]}{place(outside)}"
        )
    return y


def check_rows(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (rows, classes) and labels (rows,) as arrays; a ValueError unless they fit together."""
    p = check_probabilities("probabilities", probabilities)
    return p, check_labels(labels, *p.shape)


def correct(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    """1 where the most probable class is the label, else 0; shape (rows,)."""
    return (p.argmax(axis=-1) == y).astype(np.float64)
