"""Multi-objective alignment of language models on Ray, with a balance chosen per request.

The public classes can be imported from here; each is loaded at its first use, so that `import mahalo_ray`
stays light.
"""

from __future__ import annotations

import gc
import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mahalo_ray.config import LoraConfig as LoraConfig
    from mahalo_ray.config import PolicyConfig as PolicyConfig
    from mahalo_ray.config import SamplingParams as SamplingParams
    from mahalo_ray.data.records import Dialogue as Dialogue
    from mahalo_ray.data.records import Message as Message
    from mahalo_ray.data.records import PreferencePair as PreferencePair
    from mahalo_ray.data.records import StepTrace as StepTrace
    from mahalo_ray.decoding.guidance import GuidedRequest as GuidedRequest
    from mahalo_ray.decoding.guided import GuidedDecoder as GuidedDecoder
    from mahalo_ray.models.classifiers import load_scorer as load_scorer
    from mahalo_ray.models.multi_head import MultiHeadCausalLM as MultiHeadCausalLM
    from mahalo_ray.models.reward import ProcessRewardModel as ProcessRewardModel
    from mahalo_ray.objectives import Weights as Weights
    from mahalo_ray.training.trainer import PolicyTrainer as PolicyTrainer

__version__ = "0.1.0"

# Python's collector walks the young objects at every 700th new one. While torch, transformers and Ray are
# imported all objects stay, and the walks are a fifth of the time: the processes of a run do them less often.
# `pipeline.cluster` sets the variable for them; a process that only imports this package is left alone.
gc.set_threshold(int(os.environ.get("MAHALO_GC_THRESHOLD", gc.get_threshold()[0])))

# Where each public name is defined; a test compares this with the imports above, which type checkers read.
_MODULES = {
    "Dialogue": "mahalo_ray.data.records",
    "GuidedDecoder": "mahalo_ray.decoding.guided",
    "GuidedRequest": "mahalo_ray.decoding.guidance",
    "LoraConfig": "mahalo_ray.config",
    "Message": "mahalo_ray.data.records",
    "MultiHeadCausalLM": "mahalo_ray.models.multi_head",
    "PolicyConfig": "mahalo_ray.config",
    "PolicyTrainer": "mahalo_ray.training.trainer",
    "PreferencePair": "mahalo_ray.data.records",
    "ProcessRewardModel": "mahalo_ray.models.reward",
    "SamplingParams": "mahalo_ray.config",
    "StepTrace": "mahalo_ray.data.records",
    "Weights": "mahalo_ray.objectives",
    "load_scorer": "mahalo_ray.models.classifiers",
}

__all__ = ["__version__", *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mahalo_ray' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__]
