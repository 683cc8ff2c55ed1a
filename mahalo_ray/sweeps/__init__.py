"""Weight sweeps: methods as Ray Tune trials, weights that cover the front evenly, and portfolios of
policies."""

from mahalo_ray.sweeps.curve_walks import ArcLengthSampler, RootFindingSampler
from mahalo_ray.sweeps.front_metrics import FrontMeasures, measure_front
from mahalo_ray.sweeps.portfolio import Portfolio, portfolio
from mahalo_ray.sweeps.registry import SAMPLERS, make_sampler
from mahalo_ray.sweeps.sampler import Sampler
from mahalo_ray.sweeps.searcher import SamplerSearcher
from mahalo_ray.sweeps.simplex import DirichletSampler, LatticeSampler, SobolSampler
from mahalo_ray.sweeps.surf import SurfSampler
from mahalo_ray.sweeps.surface import SurfaceSampler

__all__ = [
    "SAMPLERS",
    "ArcLengthSampler",
    "DirichletSampler",
    "FrontMeasures",
    "LatticeSampler",
    "Portfolio",
    "RootFindingSampler",
    "Sampler",
    "SamplerSearcher",
    "SobolSampler",
    "SurfSampler",
    "SurfaceSampler",
    "make_sampler",
    "measure_front",
    "portfolio",
]
