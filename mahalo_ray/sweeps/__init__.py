"""Weight sweeps: methods as Ray Tune trials, weights that cover the front evenly, and portfolios of
policies."""

from mahalo_ray.sweeps.portfolio import Portfolio, portfolio
from mahalo_ray.sweeps.surf import SurfSampler

__all__ = ["Portfolio", "SurfSampler", "portfolio"]
