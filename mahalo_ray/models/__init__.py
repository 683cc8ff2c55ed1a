"""Models: the multi-head policy and the process reward model. torch and transformers only."""

from mahalo_ray.models.classifiers import SequenceClassifierScorer, TokenClassifierScorer, load_scorer
from mahalo_ray.models.combination import combine_models
from mahalo_ray.models.multi_head import MultiHeadCausalLM
from mahalo_ray.models.reference import ChunkedCausalLM
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.models.scoring import StepEncoder, StepScorer, TokenTrace, TraceReader, TraceScorer
from mahalo_ray.models.soup import average_models

__all__ = [
    "ChunkedCausalLM",
    "MultiHeadCausalLM",
    "ProcessRewardModel",
    "SequenceClassifierScorer",
    "StepEncoder",
    "StepScorer",
    "TokenClassifierScorer",
    "TokenTrace",
    "TraceReader",
    "TraceScorer",
    "average_models",
    "combine_models",
    "load_scorer",
]
