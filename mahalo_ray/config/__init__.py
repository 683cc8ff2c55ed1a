"""The whole run as one typed document: load, override, validate, write resolved.

Unknown keys are errors that name the file, the key and the nearest known key. Sizes are global unless their
name says `per_device`; times are seconds; lengths are tokens.
"""

from mahalo_ray.config.loading import dump_config, load_config, load_document
from mahalo_ray.config.policy import PolicyConfig
from mahalo_ray.config.run import (
    BaselineConfig,
    BaselineName,
    CompareConfig,
    DataConfig,
    PairsSource,
    RunConfig,
    TracesSource,
)
from mahalo_ray.config.section import ConfigError, EndpointConfig, SamplingParams, Section
from mahalo_ray.config.stages import (
    ActorsConfig,
    ClusterConfig,
    EvaluationConfig,
    GuidedConfig,
    LoraConfig,
    MiniatureConfig,
    ModelConfig,
    ObjectiveConfig,
    PairsConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
    ScratchModelConfig,
    ServeConfig,
    SftConfig,
    SweepConfig,
    TrainingConfig,
)

__all__ = [
    "ActorsConfig",
    "BaselineConfig",
    "BaselineName",
    "ClusterConfig",
    "CompareConfig",
    "ConfigError",
    "DataConfig",
    "EndpointConfig",
    "EvaluationConfig",
    "GuidedConfig",
    "LoraConfig",
    "MiniatureConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "PairsConfig",
    "PairsSource",
    "PolicyConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplingConfig",
    "SamplingParams",
    "ScratchModelConfig",
    "Section",
    "ServeConfig",
    "SftConfig",
    "SweepConfig",
    "TracesSource",
    "TrainingConfig",
    "dump_config",
    "load_config",
    "load_document",
]
