"""A Bayesian neural network on handwritten digits with NumPyro: minibatch SGHMC, several chains, ArviZ."""

import argparse
from pathlib import Path

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray as xr
from numpyro.infer import MCMC
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import bnn_ppl
from bnn_ppl.numpyro import SGHMC, predict

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--temperature", type=float, default=1.0, help="1 is the posterior, less is colder")
parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that it runs")
parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plots and the draws")
options = parser.parse_args()
num_warmup, num_samples = (5, 10) if options.smoke else (200, 500)


def network(w, x):
    hidden = jnp.tanh(x @ w["w0"] + w["b0"])
    return hidden @ w["w1"] + w["b1"]


def model(x, y=None):
    w = {
        "w0": numpyro.sample("w0", dist.Normal(0, 0.3).expand([64, 50]).to_event(2)),
        "b0": numpyro.sample("b0", dist.Normal(0, 1).expand([50]).to_event(1)),
        "w1": numpyro.sample("w1", dist.Normal(0, 0.5).expand([50, 10]).to_event(2)),
        "b1": numpyro.sample("b1", dist.Normal(0, 1).expand([10]).to_event(1)),
    }
    with numpyro.plate("images", len(x), subsample_size=128):
        x = numpyro.subsample(x, event_dim=1)
        y = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Categorical(logits=network(w, x)), obs=y)


x, y = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split(x / 8 - 1, y, test_size=0.2, random_state=0)

kernel = SGHMC(model, step_size=0.01, friction=5.0, temperature=options.temperature, steps_per_draw=24)
mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, num_chains=4, chain_method="vectorized")
mcmc.run(jax.random.key(0), jnp.asarray(x), jnp.asarray(y))

tree = bnn_ppl.to_arviz(mcmc)
predictions = predict(mcmc, x_test, y_test, functions=True)
options.out.mkdir(exist_ok=True)
bnn_ppl.report(tree, predictions, path=options.out / "numpyro_report.png")

# The weights of a network are not identified, its predictions are: ArviZ looks at those.
uncertain = xr.DataArray(np.argsort(predictions["probabilities"].max("class").values)[:4], dims="test_image")
p_right = predictions["functions"].isel(row=uncertain, **{"class": predictions["observed"].isel(row=uncertain)})
functions = (
    p_right.drop_vars(["row", "class"], errors="ignore").assign_coords(test_image=uncertain).to_dataset(name="p_right")
)
print(az.summary(functions).to_string())
functions["p_right"].plot.line(x="draw", hue="chain", row="test_image", aspect=5, size=2, linewidth=0.6)
plt.savefig(options.out / "numpyro_trace.png")
az.plot_rank(functions)
plt.savefig(options.out / "numpyro_rank.png", bbox_inches="tight")
tree.to_netcdf(options.out / "numpyro.nc")
print(f"wrote the report, the plots and the draws to {options.out}/")
