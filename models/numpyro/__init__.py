"""Models for NumPyro: the same names, arguments and sites as in ``bnn_ppl.models.pyro``."""

try:
    import numpyro  # noqa: F401  (the host package: imports are absolute)
except ImportError as error:
    raise ImportError("bnn_ppl.models.numpyro needs NumPyro: pip install 'bnn_ppl[numpyro]'.") from error

from .linear import LinearRegression, linear_regression
from .logistic import LogisticRegression, logistic_regression
from .mlp import MLPClassification, MLPRegression, mlp_classification, mlp_regression

__all__ = [
    "LinearRegression",
    "LogisticRegression",
    "MLPClassification",
    "MLPRegression",
    "linear_regression",
    "logistic_regression",
    "mlp_classification",
    "mlp_regression",
]
