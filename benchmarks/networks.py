"""The three networks of the benchmark, for both backends, with random data of N rows.

Each function takes a dict of weights and a batch of inputs; the models and the hand-written losses use the same
functions, so that all rows of the table do the same work.
"""

import math

import numpy as np

N, B = 60_000, 128
SHAPES = {
    "mlp": {"w0": (784, 100), "b0": (100,), "w1": (100, 10), "b1": (10,)},
    "lenet5": {
        "k0": (5, 5, 1, 20),
        "c0": (20,),
        "k1": (5, 5, 20, 50),
        "c1": (50,),
        "w0": (800, 500),
        "b0": (500,),
        "w1": (500, 10),
        "b1": (10,),
    },
    "regression": {"w0": (8, 50), "b0": (50,), "w1": (50, 1), "b1": (1,)},
}
INPUTS = {"mlp": (784,), "lenet5": (28, 28, 1), "regression": (8,)}


def weights(name: str, channels_first: bool = False) -> dict[str, np.ndarray]:
    """Start values; convolution kernels as (out, in, height, width) if `channels_first`."""
    rng = np.random.default_rng(0)
    values = {}
    for site, shape in SHAPES[name].items():
        value = rng.normal(size=shape) / math.sqrt(max(math.prod(shape[:-1]), 1))
        values[site] = (value.transpose(3, 2, 0, 1) if channels_first and len(shape) == 4 else value).astype("float32")
    return values


def data(name: str, channels_first: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (N, ...) and targets (N,)."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(N, *INPUTS[name])).astype("float32")
    if name == "regression":
        return x, rng.normal(size=N).astype("float32")
    return (np.moveaxis(x, -1, 1) if channels_first and name == "lenet5" else x), rng.integers(0, 10, size=N)


def forward_jax(name: str):
    """Forward pass in JAX."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    def mlp(w, x):
        return jax.nn.relu(x @ w["w0"] + w["b0"]) @ w["w1"] + w["b1"]

    def regression(w, x):
        return (jnp.tanh(x @ w["w0"] + w["b0"]) @ w["w1"] + w["b1"])[..., 0]

    def lenet5(w, x):
        for i in range(2):
            x = jax.lax.conv_general_dilated(x, w[f"k{i}"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = nn.max_pool(x + w[f"c{i}"], (2, 2), (2, 2))
        return mlp(w, x.reshape(x.shape[0], -1))

    return {"mlp": mlp, "lenet5": lenet5, "regression": regression}[name]


def forward_torch(name: str):
    """Forward pass in torch."""
    import torch
    from torch.nn import functional

    def mlp(w, x):
        return functional.relu(x @ w["w0"] + w["b0"]) @ w["w1"] + w["b1"]

    def regression(w, x):
        return (torch.tanh(x @ w["w0"] + w["b0"]) @ w["w1"] + w["b1"])[..., 0]

    def lenet5(w, x):
        for i in range(2):
            x = functional.max_pool2d(functional.conv2d(x, w[f"k{i}"], w[f"c{i}"]), 2)
        return mlp(w, x.flatten(1))

    return {"mlp": mlp, "lenet5": lenet5, "regression": regression}[name]
