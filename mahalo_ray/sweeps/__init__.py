"""Weight sweeps: methods as Ray Tune trials, weights that cover the front evenly, and portfolios of
policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mahalo_ray.objectives import unknown_name
from mahalo_ray.sweeps.curve_walks import ArcLengthSampler, RootFindingSampler
from mahalo_ray.sweeps.front_metrics import FrontMeasures, measure_front
from mahalo_ray.sweeps.portfolio import Portfolio, portfolio
from mahalo_ray.sweeps.sampler import Sampler
from mahalo_ray.sweeps.simplex import DirichletSampler, LatticeSampler, SobolSampler
from mahalo_ray.sweeps.surf import SurfSampler
from mahalo_ray.sweeps.surface import SurfaceSampler

if TYPE_CHECKING:
    from mahalo_ray.sweeps.searcher import SamplerSearcher as SamplerSearcher

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

# By the names that a config gives them.
SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "lattice": LatticeSampler,
    "sobol": SobolSampler,
    "dirichlet": DirichletSampler,
    "surf": SurfSampler,
    "surface": SurfaceSampler,
    "root_finding": RootFindingSampler,
    "arc_length": ArcLengthSampler,
}


def make_sampler(name: str, objectives: Sequence[str], n: int, **options: Any) -> Sampler:
    """The sampler of that name; `options` are its own (see its class). ValueError for an unknown name or an
    option that it does not have.

    >>> make_sampler("lattice", ["accuracy", "engagement"], 3).ask()[1]
    Weights(accuracy=0.5,engagement=0.5)
    """
    if name not in SAMPLERS:
        raise ValueError(unknown_name("sampler", name, SAMPLERS))
    try:
        return SAMPLERS[name](objectives, n, **options)
    except TypeError as error:
        raise ValueError(f"sampler '{name}': {error}") from error


def __getattr__(name: str) -> Any:
    """`SamplerSearcher` when it is asked for: it imports Ray Tune, and endpoints read portfolios without."""
    if name != "SamplerSearcher":
        raise AttributeError(f"module 'mahalo_ray.sweeps' has no attribute '{name}'")
    from mahalo_ray.sweeps.searcher import SamplerSearcher

    return SamplerSearcher
