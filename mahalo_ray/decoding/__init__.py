"""Decoding: many conversations at once over a shared-prefix cache, and guidance by reward models. No Ray."""

from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.guidance import GuidedRequest
from mahalo_ray.decoding.guided import GuidedDecoder
from mahalo_ray.decoding.sampling import SamplingParams

__all__ = ["Engine", "GuidedDecoder", "GuidedRequest", "SamplingParams"]
