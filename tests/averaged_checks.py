"""What the tests of weight averaging assert of both hosts."""

import numpy as np
import pytest

from tests import averaged
from tests.averaged import columns_of, moments_of

MOMENTS = [
    ("AutoNormal", "mixture"),
    ("AutoNormal", "iterate"),
    ("AutoNormal", "low_rank"),
    ("AutoDiagonalNormal", "low_rank"),
    ("AutoLowRankMultivariateNormal", "mixture"),
    ("AutoLowRankMultivariateNormal", "low_rank"),
]
DRAWS = [
    ("AutoNormal", "mixture"),
    ("AutoNormal", "low_rank"),
    ("AutoDelta", "low_rank"),
    ("AutoLowRankMultivariateNormal", "low_rank"),
]


def arrays(values):
    return {name: np.asarray(value) for name, value in values.items()}


def same_run(one, other):
    assert one.losses == other.losses
    assert len(one.path) == len(other.path)
    for found, expected in zip(one.path, other.path, strict=True):
        assert set(found) == set(expected)
        for name in found:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def path_of(host, name, cls, settings, **kwargs):
    """Losses and parameters with averages are those of the host's own SVI."""
    args = averaged.data(host)
    plain = host(*averaged.PAIRS[name](host), host.SVI, args, 9, **kwargs)
    ours = host(*averaged.PAIRS[name](host), cls, args, 9, start=3, cycle_length=2, **settings, **kwargs)
    assert len(ours.get("snapshot_steps")) == 4
    same_run(ours, plain)
    return plain, ours


def train(host, kind, steps, cls=None, model=averaged.small, **settings):
    pair = model(host), getattr(host.guides, kind)(model(host))
    return host(*pair, cls or host.ours.HWASVI, averaged.data(host), steps, **settings)


def at_snapshots(run):
    return [run.path[step - 1] for step in run.get("snapshot_steps")]


def points(host, run, sites=("w", "s")):
    """Locations of AutoDelta at the snapshots, by site in unconstrained coordinates."""
    free = {"w": np.asarray, "v": np.asarray, "s": np.log}
    return {n: np.array([free[n](host.point(params, n)) for params in at_snapshots(run)]) for n in sites}


def moments_by_hand(host, kind, covariance):
    """Of 4 snapshots, and 3 columns."""
    run = train(host, kind, 12, start=2, cycle_length=3, covariance=covariance, rank=3)
    np.testing.assert_array_equal(run.get("snapshot_steps"), [2, 5, 8, 11])
    laws = [host.laws(kind, params, ("w", "s")) for params in at_snapshots(run)]
    found = run.get("averaged_moments")
    assert set(found) == set(laws[0])
    for name, (mean, variance) in found.items():
        expected = moments_of([law[name] for law in laws], covariance, 3)
        np.testing.assert_allclose(mean, expected[0], rtol=1e-12)
        np.testing.assert_allclose(variance, expected[1], rtol=1e-9)


def point_guide(host, rank):
    """SWAG's moments and columns are those of the path, also with fewer snapshots than its rank."""
    run = train(host, "AutoDelta", 11, host.ours.SWAG, start=2, cycle_length=3, rank=rank)
    locations, moments = points(host, run), run.get("averaged_moments")
    kept = run.state.kept if host.name == "numpyro" else run.svi._kept
    for name, path in locations.items():
        mean, variance = moments_of([(value, 0 * value) for value in path], "low_rank" if rank else "iterate", rank)
        np.testing.assert_allclose(moments[name][0], mean, rtol=1e-12)
        np.testing.assert_allclose(moments[name][1], variance, rtol=1e-9)
        np.testing.assert_allclose(kept.spread[name], path.var(0), rtol=1e-9)
        if not rank:
            continue
        columns = np.zeros((rank, *path.shape[1:]))
        for number, column in enumerate(columns_of(path)):
            columns[number % rank] = column
        np.testing.assert_allclose(kept.columns[name], columns, rtol=1e-8, atol=1e-13)
    return run


def mixture_is_iterate(host):
    """Of points, whose laws have no variance."""
    found = [
        arrays_of(train(host, "AutoDelta", 8, start=2, cycle_length=2, covariance=covariance))
        for covariance in ("mixture", "iterate")
    ]
    for name in ("w", "s"):
        np.testing.assert_array_equal(found[0][name], found[1][name])


def arrays_of(run):
    return {name: np.stack([np.asarray(part) for part in law]) for name, law in run.get("averaged_moments").items()}


def joint_law(host, kind, run, covariance, rank):
    """Mean and covariance of (w, log s) in one vector, from the path."""
    path = at_snapshots(run)
    if kind == "AutoDelta":
        found = points(host, run)
        locations = np.column_stack([found["w"], found["s"]])
        variances = 0 * locations
    else:
        laws = [list(host.laws(kind, params, ("w", "s")).values()) for params in path]
        locations, variances = (
            np.array([np.concatenate([np.ravel(law[i]) for law in site]) for site in laws]) for i in (0, 1)
        )
    spread = locations.var(0)
    if covariance != "low_rank":
        return locations.mean(0), np.diag(variances.mean(0) + spread)
    last = columns_of(locations)[-rank:]
    return locations.mean(0), np.diag(variances.mean(0) + spread / 2) + last.T @ last / (2 * (len(last) - 1))


def draws_and_losses(host, kind, covariance, count, losses):
    """Draws of the host's Predictive have the averaged law; the ELBOs their closed form; nothing is left behind."""
    rank = 3
    run = train(host, kind, 11, start=2, cycle_length=3, covariance=covariance, rank=rank, optim=host.adam(0.3))
    mean, matrix = joint_law(host, kind, run, covariance, rank)
    guide, model, x, y = run.get("averaged_guide"), run.model, *run.args
    found = host.draws(model, guide, count, (x,), ("w", "s", "y"))
    together = np.column_stack([found["w"], np.log(found["s"])])
    averaged.check_law(together, mean, matrix)
    fitted = found["y"].mean(0) - averaged.DESIGN @ together.mean(0)
    assert np.abs(fitted).max() < 4.5 * averaged.NOISE / count**0.5
    for elbo in (host.infer.Trace_ELBO(), host.infer.TraceMeanField_ELBO()):
        values = host.elbos(elbo, model, guide, losses, (x, y))
        expected = averaged.expected_loss(mean, matrix)
        if host.name == "pyro" and type(elbo) is not host.infer.Trace_ELBO:
            expected += mean[-1]  # its divergence of points leaves out the Jacobian, of its own guides too
        assert abs(values.mean() - expected) < 4 * values.std() / losses**0.5
    return run, mean


def at_the_mean(host, run, mean):
    """Expected weights, and draws, of `predict`."""
    guide, x = run.get("averaged_guide"), run.args[0]
    medians = arrays(guide.median(None, *run.args) if host.name == "numpyro" else guide.median(*run.args))
    np.testing.assert_allclose([*medians["w"], np.log(medians["s"])], mean, rtol=1e-10)
    assert set(medians) == {"w", "s"}
    found = host.ours.predict(guide, x, model=run.model, scheme="deterministic")
    np.testing.assert_allclose(found["mean"], averaged.DESIGN @ mean, rtol=1e-5, atol=1e-6)
    several = host.ours.predict(guide, x, model=run.model, num_draws=100)
    assert float(several["function_sd"].min()) > 0


def constant_trajectory(host, covariance):
    """Where nothing moves the law is the guide's own, to the last bit."""
    run = train(host, "AutoNormal", 6, start=1, cycle_length=1, covariance=covariance, rank=4, optim=host.sgd(0.0))
    laws = host.laws("AutoNormal", run.path[0], ("w", "s"))
    for name, (mean, variance) in run.get("averaged_moments").items():
        np.testing.assert_array_equal(mean, laws[name][0])
        np.testing.assert_allclose(variance, laws[name][1], rtol=4e-16)
    run = train(host, "AutoDelta", 6, start=1, cycle_length=1, covariance=covariance, rank=4, optim=host.sgd(0.0))
    for _, variance in run.get("averaged_moments").values():
        assert not np.any(np.asarray(variance))
    return run


def forgetting(host):
    """Weights of snapshots, and moments with them."""
    run = train(host, "AutoDelta", 10, start=2, cycle_length=2, multiplier=lambda n: 0.3)
    weights = run.get("averaging_weights")
    np.testing.assert_allclose(weights, 0.7 ** np.arange(4, -1, -1) * np.where(np.arange(5), 0.3, 1), rtol=1e-12)
    assert weights.sum() == pytest.approx(1, abs=1e-14)
    for name, path in points(host, run).items():
        mean, variance = run.get("averaged_moments")[name]
        expected = np.tensordot(weights, path, 1)
        np.testing.assert_allclose(mean, expected, rtol=1e-12)
        np.testing.assert_allclose(variance, np.tensordot(weights, (path - expected) ** 2, 1), rtol=1e-9)


def in_unconstrained_coordinates(host):
    """Means are those of logarithms and what a simplex comes from, not of the values."""
    model = averaged.positive_and_simplex(host)
    guide, args = host.guides.AutoDelta(model), (host.array(averaged.Y),)
    run = host(model, guide, host.ours.HWASVI, args, 9, start=1, cycle_length=2, optim=host.adam(0.3))
    path = {name: np.array([host.point(params, name) for params in at_snapshots(run)]) for name in ("s", "p")}
    priors = {"s": host.dist.HalfNormal(1.0), "p": host.dist.Dirichlet(host.array([2.0, 2.0, 2.0]))}
    for name, values in path.items():
        free = host.free(priors[name], values)
        mean, variance = run.get("averaged_moments")[name]
        np.testing.assert_allclose(mean, free.mean(0), rtol=1e-9)
        np.testing.assert_allclose(variance, free.var(0), rtol=1e-9)
    found = {name: host.point(arrays(run.get("averaged_params")), name) for name in path}
    assert found["s"] == pytest.approx(np.exp(np.log(path["s"]).mean()), rel=1e-9)
    assert found["p"].sum() == pytest.approx(1, rel=1e-9)
    assert found["s"] != pytest.approx(path["s"].mean(), rel=1e-4)
    return run, path, found


def too_early(run):
    message = r"no snapshot to average after 3 steps: the first falls after step 5 \(start=5, cycle_length=2\); train"
    for name in ("averaged_guide", "averaged_moments", "averaged_params"):
        with pytest.raises(ValueError, match=message):
            run.get(name)


def few_snapshots(host):
    """A rank above their number is said, and scaled by it; one alone has no covariance."""
    run = train(host, "AutoDelta", 6, host.ours.SWAG, start=2, cycle_length=2, rank=20)
    with pytest.warns(UserWarning, match=r"rank=20 is more than the 3 snapshots so far, .* rank 2 at most; it is sc"):
        run.get("averaged_guide")
    run = train(host, "AutoNormal", 3, start=2, cycle_length=2, covariance="low_rank")
    with pytest.warns(UserWarning, match=r"rank=20 is more than the 1 snapshots so far, which tell no covariance"):
        guide = run.get("averaged_guide")
    laws = host.laws("AutoNormal", run.path[1], ("w", "s"))
    for name, (mean, variance) in run.get("averaged_moments").items():
        np.testing.assert_allclose(mean, laws[name][0], rtol=1e-12)
        np.testing.assert_allclose(variance, laws[name][1], rtol=1e-12)
    found = host.draws(run.model, guide, 5, run.args[:1], ("w",))["w"]
    assert np.isfinite(found).all()


def without_locations(host, name):
    pair, message = averaged.REFUSED[name]
    with pytest.raises(ValueError, match=message):
        host(*pair(host), host.ours.HWASVI, averaged.data(host), 1, start=1, cycle_length=1)
    run = host(*pair(host), host.ours.HWASVI, averaged.data(host), 3, start=1, cycle_length=1, covariance="parameters")
    if name == "of_rows":
        found = np.asarray(run.get("averaged_params")["locs"])
        np.testing.assert_allclose(
            found, np.mean([params["locs"] for params in run.path], axis=0), rtol=1e-10, atol=1e-14
        )
    with pytest.raises(ValueError, match="covariance='parameters' averages parameters, and has no moments"):
        run.get("averaged_moments")


def real(host):
    return averaged.network(host, noise=False)


def average_of_parameters(host):
    """Of AutoNormal: in unconstrained coordinates, from which its laws and their medians come."""
    run = train(host, "AutoNormal", 11, host.ours.SWA, start=2, cycle_length=3)
    path = at_snapshots(run)
    found = arrays(run.get("averaged_params"))
    assert set(found) == set(path[0])
    for name, value in found.items():
        values = np.array([params[name] for params in path])
        if "scale" in name:  # the softplus of what is averaged, in both hosts
            expected = np.log1p(np.exp(np.log(np.expm1(values)).mean(0)))
        else:
            expected = values.mean(0)
        np.testing.assert_allclose(value, expected, rtol=1e-9)
    guide = run.get("averaged_guide")
    law = host.laws("AutoNormal", found, ("w", "s"))
    draws = host.draws(run.model, guide, 400, run.args[:1], ("w",))["w"]
    mean, variance = next(law[name] for name in law if name.startswith("w"))
    assert np.abs((draws.mean(0) - mean) / np.sqrt(variance / 400)).max() < 4.5
    assert np.abs(draws.var(0) / variance - 1).max() < 4.5 * (2 / 400) ** 0.5


def across_layers(host, count):
    """One draw of the columns moves all sites."""
    run = train(
        host, "AutoDelta", 14, host.ours.SWAG, model=real, start=2, cycle_length=3, rank=3, optim=host.adam(0.2)
    )
    path = points(host, run, ("w", "v"))
    locations = np.column_stack([path["w"].reshape(5, -1), path["v"]])
    last = columns_of(locations)[-3:]
    matrix = np.diag(locations.var(0) / 2) + last.T @ last / 4
    found = host.draws(run.model, run.get("averaged_guide"), count, run.args[:1], ("w", "v"))
    assert found["w"].shape == (count, 2, 3)
    averaged.check_law(np.column_stack([found["w"].reshape(count, -1), found["v"]]), locations.mean(0), matrix)
    cross = matrix[:6, 6:] / np.sqrt(np.outer(matrix.diagonal()[:6], matrix.diagonal()[6:]))
    assert np.abs(cross).max() > 0.3


def guides_with_noise(host):
    message = (
        r"SWAG takes a guide of points, such as AutoDelta, and sites \[.*\] of this one have noise of their own: "
        r"take HWASVI\(covariance='low_rank'\)"
    )
    with pytest.raises(ValueError, match=message):
        train(host, "AutoNormal", 1, host.ours.SWAG, start=1, cycle_length=1)


def kept_snapshots(host, num_snapshots):
    """Parameters and draws are those of the path, the last ones, the earliest first."""
    run = train(host, "AutoDelta", 12, host.ours.FGE, start=2, cycle_length=2, num_snapshots=num_snapshots)
    steps = [2, 4, 6, 8, 10, 12][-num_snapshots:]
    np.testing.assert_array_equal(run.get("snapshot_steps"), steps)
    found, draws = arrays(run.get("snapshot_params")), arrays(run.get("snapshots", *run.args))
    assert set(found) == set(run.path[0])
    for name, values in found.items():
        np.testing.assert_allclose(values, [run.path[step - 1][name] for step in steps], rtol=1e-14)
    for site in ("w", "s"):
        np.testing.assert_allclose(draws[site], [host.point(run.path[step - 1], site) for step in steps], rtol=1e-14)
    assert set(draws) == {"w", "s"}
    np.testing.assert_allclose(run.get("averaging_weights"), np.full(len(steps), 1 / len(steps)))
    return run


def ensemble(host):
    """The mean of the predictions."""
    run = kept_snapshots(host, 4)
    draws = run.get("snapshots", *run.args)
    found = host.ours.predict(draws, *run.args, model=run.model)
    w, s = (np.asarray(draws[name]) for name in ("w", "s"))
    means = averaged.X @ w.T + np.log(s)
    densities = (
        np.exp(-0.5 * ((averaged.Y[:, None] - means) / averaged.NOISE) ** 2) / averaged.NOISE / (2 * np.pi) ** 0.5
    )
    np.testing.assert_allclose(found["mean"], means.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["log_density"], np.log(densities.mean(1)), rtol=1e-4)


def ensemble_of_guides(host):
    """Of guides with noise a draw each, from the law of its own snapshot."""
    run = train(
        host, "AutoNormal", 300, host.ours.FGE, start=1, cycle_length=1, num_snapshots=300, optim=host.sgd(1e-3)
    )
    draws = arrays(run.get("snapshots", *run.args))
    assert draws["w"].shape == (300, 2)
    laws = [host.laws("AutoNormal", params, ("w",)) for params in at_snapshots(run)]
    mean, variance = (np.array([next(iter(law.values()))[i] for law in laws]) for i in (0, 1))
    z = (draws["w"] - mean) / np.sqrt(variance)
    assert np.abs(z.mean(0)).max() < 4.5 / 300**0.5
    assert np.abs(z.var(0) - 1).max() < 4.5 * (2 / 300) ** 0.5


def at_the_lowest_rate(host, rate, **kwargs):
    """With the triangular rate, each snapshot is taken after a step at the floor."""
    start = rate.begin + rate.cycle_length // 2 + 1
    settings = {"start": start, "cycle_length": rate.cycle_length, "learning_rate": rate, "optim": host.sgd(rate)}
    run = train(host, "AutoDelta", 20, host.ours.FGE, **settings, **kwargs)
    steps = run.get("snapshot_steps")
    np.testing.assert_array_equal(steps, [9, 15])
    assert [float(rate(int(step) - 1)) for step in steps] == pytest.approx([rate.floor] * 2)
    return run
