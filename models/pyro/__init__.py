"""Models for Pyro: the same names, arguments and sites as in ``bnn_ppl.models.numpyro``.

The functions make models, ``model(x, y=None, *, subsample_size=None)``. ``LeNet5``, ``VGG`` and ``ResNet`` are the
torch modules in three of them, for use on their own or with ``bnn_ppl.pyro.random_torch_module``; images are
(N, C, H, W), and sites are called ``net.conv1.weight``.
"""

try:
    import pyro  # noqa: F401  (the host package: imports are absolute)
except ImportError as error:
    raise ImportError("bnn_ppl.models.pyro needs Pyro: pip install 'bnn_ppl[pyro]'.") from error

from .lenet import LeNet5, lenet5
from .linear import LinearRegression, linear_regression
from .logistic import LogisticRegression, logistic_regression
from .mlp import MLPClassification, MLPRegression, mlp_classification, mlp_regression
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
