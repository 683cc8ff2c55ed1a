"""Models: the multi-head policy and the process reward model. torch and transformers only."""

from mahalo_ray.models.lora import LoraSettings
from mahalo_ray.models.multi_head import MultiHeadCausalLM
from mahalo_ray.models.reference import ChunkedCausalLM, causal_lm_completion_logps

__all__ = ["ChunkedCausalLM", "LoraSettings", "MultiHeadCausalLM", "causal_lm_completion_logps"]
