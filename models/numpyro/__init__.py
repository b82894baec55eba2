"""Models for NumPyro: the same names, arguments and sites as in ``bnn_ppl.models.pyro``.

The functions make models, ``model(x, y=None, *, subsample_size=None)``. ``LeNet5``, ``VGG`` and ``ResNet`` are the
flax.nnx modules in three of them, for use on their own or with NumPyro's ``random_nnx_module``; images are
(N, H, W, C), and sites are called ``net/conv1.kernel``. They need flax, which is imported when one of them is.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

try:
    import numpyro  # noqa: F401  (the host package: imports are absolute)
except ImportError as error:
    raise ImportError("bnn_ppl.models.numpyro needs NumPyro: pip install 'bnn_ppl[numpyro]'.") from error

from .linear import LinearRegression, linear_regression
from .logistic import LogisticRegression, logistic_regression
from .mlp import MLPClassification, MLPRegression, mlp_classification, mlp_regression

if TYPE_CHECKING:
    from .lenet import LeNet5, lenet5
    from .resnet import ResNet, resnet20
    from .vggnet import VGG, vgg

__all__ = [
    "VGG",
    "LeNet5",
    "LinearRegression",
    "LogisticRegression",
    "MLPClassification",
    "MLPRegression",
    "ResNet",
    "lenet5",
    "linear_regression",
    "logistic_regression",
    "mlp_classification",
    "mlp_regression",
    "resnet20",
    "vgg",
]

_WITH_FLAX = {
    "LeNet5": ".lenet",
    "ResNet": ".resnet",
    "VGG": ".vggnet",
    "lenet5": ".lenet",
    "resnet20": ".resnet",
    "vgg": ".vggnet",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_FLAX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import flax  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{__name__}.{name} needs flax: pip install 'bnn_ppl[models]'.") from error
    return getattr(import_module(_WITH_FLAX[name], __name__), name)
