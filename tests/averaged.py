"""Cases that the tests of weight averaging share: models and guides for both hosts, and averages by hand."""

import numpy as np

RNG = np.random.default_rng(0)
N = 12
X = RNG.normal(size=(N, 2))
Y = 1.5 + X @ [1.0, -0.5] + 0.3 * RNG.normal(size=N)
SITES = ("w", "v", "noise")


def data(host):
    return host.array(X), host.array(Y)


def network(host, noise=True, plate=False):
    """A perceptron; its `noise` is positive, and its weights `v` may lie in a plate."""
    ppl, dist = host.ppl, host.dist

    def model(x, y=None, size=None):
        w = ppl.sample("w", dist.Normal(host.array(0.0), 1.0).expand([2, 3]).to_event(2))
        if plate:
            with ppl.plate("units", 3):
                v = ppl.sample("v", dist.Normal(host.array(0.0), 1.0))
        else:
            v = ppl.sample("v", dist.Normal(host.array(0.0), 1.0).expand([3]).to_event(1))
        scale = ppl.sample("noise", dist.HalfNormal(host.array(1.0))) if noise else 0.5
        mean = host.np.tanh(x @ w) @ v
        with ppl.plate("data", N, subsample_size=size) as rows:
            ppl.sample("y", dist.Normal(mean[rows], scale), obs=None if y is None else y[rows])

    return model


def written(host):
    """A guide by hand, with a plate and a positive site."""
    ppl, dist, param = host.ppl, host.dist, host.param

    def guide(x, y=None, size=None):
        start = np.linspace(-1, 1, 6).reshape(2, 3)
        ppl.sample("w", dist.Normal(param("w_loc", start), param("w_scale", 0.1 + 0 * start, True)).to_event(2))
        with ppl.plate("units", 3):
            ppl.sample("v", dist.Normal(param("v_loc", np.ones(3)), param("v_scale", np.full(3, 0.2), True)))
        ppl.sample("noise", dist.LogNormal(param("noise_loc", -0.5), param("noise_scale", 0.1, True)))

    return guide


def _listed(host):
    model = network(host)
    guide = host.guides.AutoGuideList(model)
    guide.append(host.guides.AutoDiagonalNormal(host.block(model, hide=["w"])))
    guide.append(host.ours.AutoVarianceNetwork(model, sites=["w"]))
    return model, guide


# By name, a model and a guide of it.
PAIRS = {
    "AutoNormal": lambda h: (network(h), h.guides.AutoNormal(network(h))),
    "AutoDiagonalNormal": lambda h: (network(h), h.guides.AutoDiagonalNormal(network(h))),
    "AutoLowRankMultivariateNormal": lambda h: (network(h), h.guides.AutoLowRankMultivariateNormal(network(h), rank=2)),
    "AutoMultivariateNormal": lambda h: (network(h), h.guides.AutoMultivariateNormal(network(h))),
    "AutoDelta": lambda h: (network(h), h.guides.AutoDelta(network(h))),
    "AutoVariationalDropout": lambda h: (network(h, False), h.ours.AutoVariationalDropout(network(h, False))),
    "AutoVarianceNetwork": lambda h: (network(h, False), h.ours.AutoVarianceNetwork(network(h, False))),
    "written": lambda h: (network(h, plate=True), written(h)),
    "AutoGuideList": _listed,
    "local": lambda h: h.ours.local_reparameterization(network(h), h.guides.AutoNormal(network(h))),
}


def steps_of(start, cycle_length, steps):
    """Numbers of steps after which snapshots fall."""
    return [step for step in range(1, steps + 1) if step >= start and (step - start) % cycle_length == 0 and step]


def columns_of(locations):
    """Deviations from the mean that includes them, in the order of the run."""
    return np.array([location - locations[: i + 1].mean(0) for i, location in enumerate(locations)])


def moments_of(laws, covariance, rank):
    """Mean and variances of the averaged law, from (mean, variance) of each snapshot."""
    locations, variances = (np.array([law[i] for law in laws]) for i in (0, 1))
    spread = ((locations - locations.mean(0)) ** 2).mean(0)
    if covariance == "iterate":
        return locations.mean(0), spread
    if covariance == "mixture":
        return locations.mean(0), variances.mean(0) + spread
    last = columns_of(locations)[-rank:]
    return locations.mean(0), variances.mean(0) + spread / 2 + (last**2).sum(0) / (2 * (len(last) - 1))


def check_law(draws, mean, covariance):
    """Draws (draws, D) of N(mean, covariance), each entry by its z-score; all parts of the covariance matter."""
    count = len(draws)
    sd = np.sqrt(np.diag(covariance))
    assert np.abs((draws.mean(0) - mean) / sd).max() < 4.5 / count**0.5
    found = np.cov(draws.T)
    error = np.sqrt((np.outer(sd, sd) ** 2 + covariance**2) / count)
    assert np.abs((found - covariance) / error).max() < 4.5


def small(host):
    """Linear regression with known noise; its weights and the logarithm of `s` are Gaussian, priors and posterior."""
    ppl, dist = host.ppl, host.dist

    def model(x, y=None, size=None):
        w = ppl.sample("w", dist.Normal(host.array(0.0), 1.0).expand([2]).to_event(1))
        s = ppl.sample("s", dist.LogNormal(host.array(0.0), 1.0))
        mean = x @ w + host.np.log(s)
        with ppl.plate("data", N, subsample_size=size) as rows:
            ppl.sample("y", dist.Normal(mean[rows], NOISE), obs=None if y is None else y[rows])

    return model


NOISE = 0.7
DESIGN = np.column_stack([X, np.ones(N)])


def expected_loss(mean, covariance):
    """Negative ELBO of `small` for (w, log s) ~ N(mean, covariance)."""
    divergence = 0.5 * (np.trace(covariance) + mean @ mean - len(mean) - np.linalg.slogdet(covariance)[1])
    squares = ((Y - DESIGN @ mean) ** 2).sum() + np.trace(DESIGN @ covariance @ DESIGN.T)
    return divergence + 0.5 * (N * np.log(2 * np.pi * NOISE**2) + squares / NOISE**2)


def positive_and_simplex(host):
    """Sites that are not real."""
    ppl, dist = host.ppl, host.dist

    def model(y):
        s = ppl.sample("s", dist.HalfNormal(host.array(1.0)))
        p = ppl.sample("p", dist.Dirichlet(host.array([2.0, 2.0, 2.0])))
        ppl.sample("y", dist.Normal(p[0] - p[1], s).expand([N]).to_event(1), obs=y)

    return model


# Arguments of HWASVI that are not as they should be, and what the message says.
BAD = [
    ({"start": -1}, "start must be an integer of at least 0, the steps before the first snapshot, got -1"),
    ({"start": True}, "start must be an integer of at least 0, the steps before the first snapshot, got True"),
    ({"start": 2.5}, r"start must be an integer of at least 0.* got 2\.5"),
    ({"cycle_length": 0}, "cycle_length must be an integer of at least 1, got 0"),
    ({"cycle_length": 1.5}, r"cycle_length must be an integer of at least 1, got 1\.5"),
    ({"rank": 1}, "rank must be at least 2, for one deviation tells no covariance, got 1"),
    ({"rank": 2.0}, r"rank must be an integer of at least 1, got 2\.0"),
    ({"covariance": "full"}, "covariance must be .*'mixture'.*, got 'full'"),
    ({"multiplier": 0.1}, "multiplier must be None or a callable .* got 0.1: for a constant weight give lambda n: 0.1"),
    ({"multiplier": lambda n: 0.0}, r"multiplier must return weights in \(0, 1\], got 0\.0 for snapshot 1"),
    ({"multiplier": lambda n: 1.5}, r"multiplier must return weights in \(0, 1\], got 1\.5 for snapshot 1"),
    ({"multiplier": lambda n: float("nan")}, "multiplier must return finite values"),
    ({"learning_rate": -0.1}, r"learning_rate must be finite and greater than 0, got -0\.1"),
    ({"learning_rate": "0.1"}, "learning_rate must be a number or a callable of the step, got '0.1'"),
]


def _beta(host):
    ppl, dist = host.ppl, host.dist

    def model(x, y=None):
        ppl.sample("rate", dist.Beta(host.array(1.0), 1.0))

    def guide(x, y=None):
        ppl.sample("rate", dist.Beta(host.param("a", 2.0, True), 1.0))

    return model, guide


def _chained(host):
    ppl, dist = host.ppl, host.dist

    def model(x, y=None):
        ppl.sample("b", dist.Normal(ppl.sample("a", dist.Normal(host.array(0.0), 1.0)), 1.0))

    def guide(x, y=None):
        a = ppl.sample("a", dist.Normal(host.param("a_loc", 0.0), 1.0))
        ppl.sample("b", dist.Normal(a + host.param("b_loc", 0.0), 1.0))

    return model, guide


def _of_rows(host):
    ppl, dist = host.ppl, host.dist

    def model(x, y=None):
        with ppl.plate("rows", N, subsample_size=4):
            ppl.sample("local", dist.Normal(host.array(0.0), 1.0))

    def guide(x, y=None):
        loc = host.param("locs", np.zeros(N))
        with ppl.plate("rows", N, subsample_size=4) as rows:
            ppl.sample("local", dist.Normal(loc[rows], 1.0))

    return model, guide


def _nothing(host):
    ppl, dist = host.ppl, host.dist

    def model(x, y=None):
        ppl.sample("y", dist.Normal(ppl.param("loc", host.array(0.0)), 1.0), obs=host.array(1.0))

    return model, lambda x, y=None: None


def _stretched(host):
    ppl, dist = host.ppl, host.dist

    def model(x, y=None):
        ppl.sample("w", dist.Normal(host.array(0.0), 1.0))

    def guide(x, y=None):
        stretch = dist.transforms.AffineTransform(host.param("loc", 1.0), host.param("a", 2.0, True))
        ppl.sample("w", dist.TransformedDistribution(dist.Normal(host.array(0.0), 1.0), [stretch]))

    return model, guide


# Pairs of which no locations can be averaged.
REFUSED = {
    "beta": (
        _beta,
        "site 'rate' of the guide has a Beta, without a location, and covariance='mixture' .* take "
        "covariance='parameters', which averages the parameters of any guide",
    ),
    "chained": (_chained, "site 'b' of the guide has a law that depends on draws of other sites"),
    "of_rows": (_of_rows, "site 'local' of the guide lies in the subsampled plate 'rows', so that its law changes"),
    "nothing": (_nothing, "the guide has no latent site with a location"),
    "flow": (
        lambda h: (small(h), h.guides.AutoIAFNormal(small(h))),
        "site '_.*latent' of the guide lies behind a transform with parameters, and covariance='mixture' averages loc",
    ),
    "stretched": (_stretched, "site 'w' of the guide lies behind a transform with parameters"),
}
