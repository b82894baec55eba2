"""What a kernel records of each draw, at the draw's own position z and momentum r, with g~ the gradient there.

All in unconstrained coordinates, d of them; `site_` ones have an entry for each latent site, in the order of names::

    lp_minibatch                  minus the minibatch potential
    step_size, temperature        those of the draw's last gradient step
    configurational_temperature   z' g~ / d                         site_configurational_temperature
    position_norm_sq              z' z                              site_position_norm_sq
    gradient_norm                 |g~|                          site_gradient_norm
    kinetic_temperature           r' M^-1 r / d                     site_kinetic_temperature
    position_momentum             z' r                              site_position_momentum
    momentum_norm_sq              r' r                              site_momentum_norm_sq
    momentum_gradient             r' g~                             site_momentum_gradient
"""

POSITION = (
    "lp_minibatch",
    "step_size",
    "temperature",
    "configurational_temperature",
    "site_configurational_temperature",
    "position_norm_sq",
    "site_position_norm_sq",
    "gradient_norm",
    "site_gradient_norm",
)
MOMENTUM = (
    "kinetic_temperature",
    "site_kinetic_temperature",
    "position_momentum",
    "site_position_momentum",
    "momentum_norm_sq",
    "site_momentum_norm_sq",
    "momentum_gradient",
    "site_momentum_gradient",
)
