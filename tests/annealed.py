"""Cases that the tests of KL annealing share: w ~ N(0, 1) with the guide N(LOC, SCALE^2)."""

LOC, SCALE = 0.7, 0.4
WEIGHTS = (0.0, 0.3, 1.0, 2.0)


def missing(kl_weight: float) -> tuple[float, float]:
    """What the gradients by mean and scale lack, beside those of the ELBO."""
    return (kl_weight - 1) * LOC, (kl_weight - 1) * (SCALE - 1 / SCALE)
