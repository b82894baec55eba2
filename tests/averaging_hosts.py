"""SVI with snapshots of both hosts behind one interface: a run, its path, and what it gives back."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions
import numpyro.infer
import optax
import pyro
import pyro.distributions
import pyro.infer
import torch
from numpyro.infer import autoguide as numpyro_guides
from pyro.infer import autoguide as pyro_guides

import bnn_ppl.numpyro
import bnn_ppl.pyro


def arrays(params):
    return {name: jax.tree.map(np.array, value) for name, value in params.items()}


class NumPyro:
    name, ppl, dist, guides, ours = "numpyro", numpyro, numpyro.distributions, numpyro_guides, bnn_ppl.numpyro
    SVI, infer, np, block = numpyro.infer.SVI, numpyro.infer, jnp, numpyro.handlers.block
    array = staticmethod(jnp.asarray)

    def __init__(
        self, model, guide, cls, args, steps, *, kwargs=None, loss=None, optim=None, changing=None, **settings
    ):
        """Take steps; `changing` gives keyword arguments by step."""
        settings = {"loss": loss or numpyro.infer.Trace_ELBO(), "optim": optim or self.adam(0.05)} | settings
        self.model, self.args, self.kwargs, self.changing = model, args, kwargs or {}, changing or (lambda step: {})
        self.svi = cls(model, guide, **settings)
        self.step = jax.jit(lambda state, more: self.svi.update(state, *args, **self.kwargs, **more))
        self.losses, self.path = [], []
        self.state = self.svi.init(jax.random.key(0), *args, **self.kwargs)
        self.go_on(steps)

    def go_on(self, steps):
        for _ in range(steps):
            self.state, loss = self.step(self.state, self.changing(len(self.losses)))
            self.losses.append(float(loss))
            self.path.append(arrays(self.svi.get_params(self.state)))
        return self

    def get(self, name, *args, **kwargs):
        """What a method of the object gives, which here takes the state."""
        return getattr(self.svi, name)(self.state, *args, **kwargs)

    @staticmethod
    def adam(rate):
        return optax.adam(rate)

    @staticmethod
    def sgd(rate):
        return optax.sgd(rate)

    @staticmethod
    def param(name, value, positive=False):
        constraint = numpyro.distributions.constraints.positive if positive else numpyro.distributions.constraints.real
        return numpyro.param(name, jnp.asarray(value), constraint=constraint)

    @staticmethod
    def draws(model, guide, count, args, sites, params=None):
        found = numpyro.infer.Predictive(model, guide=guide, params=params, num_samples=count, return_sites=list(sites))
        return arrays(found(jax.random.key(7), *args))

    @staticmethod
    def elbos(elbo, model, guide, count, args):
        keys = jax.random.split(jax.random.key(8), count)
        return np.asarray(jax.jit(jax.vmap(lambda key: elbo.loss(key, {}, model, guide, *args)))(keys))

    @staticmethod
    def free(site, value):
        """Unconstrained coordinates of a value."""
        return np.asarray(numpyro.distributions.biject_to(site.support).inv(jnp.asarray(value)))

    @staticmethod
    def laws(kind, params, sites):
        """Means and variances in unconstrained coordinates, by site of the averaged moments."""
        if kind == "AutoNormal":
            return {n: (params[f"{n}_auto_loc"], params[f"{n}_auto_scale"] ** 2) for n in sites}
        variance = params["auto_scale"] ** 2
        if kind == "AutoLowRankMultivariateNormal":
            variance = variance * (1 + (params["auto_cov_factor"] ** 2).sum(-1))
        return {"_auto_latent": (params["auto_loc"], variance)}

    @staticmethod
    def point(params, site):
        return params[f"{site}_auto_loc"]


class Pyro:
    name, ppl, dist, guides, ours = "pyro", pyro, pyro.distributions, pyro_guides, bnn_ppl.pyro
    SVI, infer, np, block = pyro.infer.SVI, pyro.infer, torch, staticmethod(pyro.poutine.block)
    array = staticmethod(lambda x: torch.as_tensor(np.asarray(x), dtype=torch.get_default_dtype()))

    def __init__(
        self,
        model,
        guide,
        cls,
        args,
        steps,
        *,
        kwargs=None,
        loss=None,
        optim=None,
        changing=None,
        scheduled=False,
        **settings,
    ):
        """Take steps in an empty store; `changing` gives keyword arguments by step."""
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        self.scheduled = scheduled
        settings = {"loss": loss or pyro.infer.Trace_ELBO(), "optim": optim or self.adam(0.05)} | settings
        self.model, self.args, self.kwargs, self.changing = model, args, kwargs or {}, changing or (lambda step: {})
        self.svi = cls(model, guide, **settings)
        self.losses, self.path = [], []
        self.go_on(steps)

    def go_on(self, steps):
        for _ in range(steps):
            self.losses.append(self.svi.step(*self.args, **self.kwargs, **self.changing(len(self.losses))))
            if self.scheduled:
                self.svi.optim.step()
            self.path.append({name: value.detach().numpy().copy() for name, value in pyro.get_param_store().items()})
        return self

    def get(self, name, *args, **kwargs):
        """What a method of the object gives."""
        return getattr(self.svi, name)(*args, **kwargs)

    @staticmethod
    def adam(rate):
        if not callable(rate):
            return pyro.optim.Adam({"lr": rate})
        return pyro.optim.LambdaLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 1.0}, "lr_lambda": rate})

    @staticmethod
    def sgd(rate):
        if not callable(rate):
            return pyro.optim.SGD({"lr": rate})
        return pyro.optim.LambdaLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "lr_lambda": rate})

    @staticmethod
    def param(name, value, positive=False):
        constraints = pyro.distributions.constraints
        value = torch.as_tensor(np.asarray(value), dtype=torch.get_default_dtype())
        return pyro.param(name, value, constraint=constraints.positive if positive else constraints.real)

    @staticmethod
    def draws(model, guide, count, args, sites):
        pyro.set_rng_seed(7)
        found = pyro.infer.Predictive(model, guide=guide, num_samples=count, return_sites=tuple(sites))(*args)
        # Pyro puts dimensions of plates that are not there before those of events.
        return {
            name: value.detach().numpy().reshape(count, *(n for n in value.shape[1:] if n > 1))
            for name, value in found.items()
        }

    @staticmethod
    def elbos(elbo, model, guide, count, args):
        pyro.set_rng_seed(8)
        return np.array([elbo.loss(model, guide, *args) for _ in range(count)])

    @staticmethod
    def free(site, value):
        """Unconstrained coordinates of a value."""
        return torch.distributions.biject_to(site.support).inv(torch.as_tensor(value)).numpy()

    @staticmethod
    def laws(kind, params, sites):
        """Means and variances in unconstrained coordinates, by site of the averaged moments."""
        if kind == "AutoNormal":
            locs, scales = (f"AutoNormal.{group}." for group in ("locs", "scales"))
            return {n: (params[locs + n], params[scales + n] ** 2) for n in sites}
        variance = params[f"{kind}.scale"] ** 2
        if kind == "AutoLowRankMultivariateNormal":
            variance = variance * (1 + (params[f"{kind}.cov_factor"] ** 2).sum(-1))
        return {f"_{kind}_latent": (params[f"{kind}.loc"], variance)}

    @staticmethod
    def point(params, site):
        return params[f"AutoDelta.{site}"]
