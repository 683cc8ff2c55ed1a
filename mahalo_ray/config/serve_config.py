"""The endpoint: its limits, its keys, and how its models are placed."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from mahalo_ray.config.section import (
    NOT_BOOL,
    EnvironmentVariable,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RewardServer,
    Section,
    ServerSource,
    Strength,
    Text,
)

SERVED_MODEL_ID = "mahalo"  # of the run's own policy
SPARE_BODIES = 64


class RewardDeploymentConfig(Section):
    """Reward models as Ray Serve deployments of their own: one for every reward model, with replicas that
    come and go with the queue in front of them.
    """

    min_replicas: PositiveInt = 1
    """Fewest replicas of each reward model."""

    max_replicas: PositiveInt = 1
    """Most replicas of each reward model. More than `min_replicas`: their number follows the queue."""

    target_requests: PositiveFloat = 2
    """Requests that run or wait, per replica, at which the number of replicas is right. One request holds up
    to 16 candidates."""

    upscale_delay_s: NonNegativeFloat = 5
    """Seconds that the queue has to be longer before replicas are added."""

    downscale_delay_s: NonNegativeFloat = 60
    """Seconds that the queue has to be shorter before replicas are removed."""

    cpus_per_replica: PositiveFloat = 1
    """CPU cores reserved for each replica."""

    gpus_per_replica: PositiveFloat = 1
    """GPUs reserved for each replica where `cluster.use_gpu` is set. 0.5: two share one."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}: raise the "
                "latter"
            )
        return self


class FurtherModel(Section):
    """A further model behind the endpoint's address, which clients ask for by its id. Either `policy` or
    `server`."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """What clients send as `model`, also with weights behind it: `ID@accuracy=0.8,engagement=0.2`."""

    policy: Text | None = None
    """Output folder of a finished run, or folder or URL of a policy."""

    server: ServerSource | None = None
    """A completion server (vLLM, SGLang) that samples in a policy's place."""

    reward: Text | None = None
    """Output folder of a finished run, or folder or URL of a reward model. Null, and no `reward_server`:
    answers are not guided."""

    reward_server: RewardServer | None = None
    """A language model on a completion server that judges in a reward model's place."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.policy is None) == (self.server is None):
            raise ValueError(f"the model '{self.id}' needs either a policy or a completion server")
        if self.reward is not None and self.reward_server is not None:
            raise ValueError(f"the model '{self.id}' has 'reward' and 'reward_server': leave one out")
        return self


class ServeConfig(Section):
    """The OpenAI-compatible endpoint. Binds to loopback unless told otherwise; port 0 takes a free one.

    Per replica, up to `max_ongoing_requests` are decoded together and `max_queued_requests` more may wait;
    beyond that the answer is 503 with Retry-After.
    """

    host: Text = "127.0.0.1"
    """Network address the endpoint listens on. `127.0.0.1`: this machine only; `0.0.0.0`: all of its
    networks."""

    port: Annotated[int, Field(ge=0, le=65535), NOT_BOOL] = 8000
    """TCP port. 0 takes a free one."""

    replicas: PositiveInt = 1
    """Copies of policy and reward model that answer side by side."""

    cpus_per_replica: PositiveFloat = 1
    """CPU cores reserved for each copy."""

    server: ServerSource | None = None
    """A completion server (vLLM, SGLang) that samples in the place of the run's own policy. Null: every
    replica holds the policy."""

    reward_server: RewardServer | None = None
    """A language model on a completion server that judges in the place of the run's own reward model."""

    reward_deployment: RewardDeploymentConfig | None = None
    """Reward models as deployments of their own. Null: every replica holds its reward models beside the
    policies."""

    models: list[FurtherModel] = []
    """Further models behind the same address. Every replica holds all policies."""

    max_ongoing_requests: PositiveInt = 16
    """Most requests that one replica decodes together, of each model."""

    max_queued_requests: NonNegativeInt = 64
    """Most requests per replica that wait beyond these; the next one gets 503 with Retry-After."""

    batch_window_s: Annotated[float, Field(ge=0, le=10), NOT_BOOL] = 0
    """Seconds that a request waits at an idle replica for others to start with it. 0: it starts at once, and
    others join after a few tokens."""

    max_candidates: PositiveInt = 16
    """Most candidates that a request may ask for."""

    max_strength: Strength = 4.0
    """Largest decoding strength that a request may ask for."""

    max_new_tokens: PositiveInt = 512
    """Most tokens of one answer."""

    max_choices: PositiveInt = 16
    """Most answers of one request: `n`, for completions times the number of prompts."""

    max_messages: PositiveInt = 128
    """Most messages of a request."""

    max_request_bytes: PositiveInt = 1_000_000
    """Largest body of a request, in bytes."""

    request_timeout_s: PositiveFloat = 60.0
    """Seconds that one request may take, waiting included."""

    body_timeout_s: PositiveFloat = 10.0
    """Seconds that the body of a request may take to arrive; after that the answer is 408."""

    sockets: bool = True
    """Whether Serve's proxy sends requests to replicas on its own machine over Unix sockets, which costs a
    request a tenth of Ray's way, by calls between actors."""

    shutdown_grace_s: Annotated[float, Field(ge=0, le=3600), NOT_BOOL] = 10.0
    """Seconds that running answers have to end when the endpoint stops."""

    path_prefix: Annotated[str, Field(pattern=r"^(/[A-Za-z0-9._~-]+)*$")] = ""
    """What all addresses of the endpoint begin with, as `/tutor`: `/tutor/v1/models`. Of an endpoint
    in a Ray Serve config file the application's `route_prefix` says so instead."""

    cors_origins: list[Text] = []
    """Origins whose pages may call the endpoint from a browser, as `https://example.org`; `*` for all."""

    log_folder: Text | None = None
    """Folder on the replicas' machines for the log of internal errors. Null: `serve_logs` in the run's
    folder, or a folder under the temporary one where the run is in an object store."""

    api_key_env: EnvironmentVariable | None = None
    """Name of the environment variable that holds the key clients must send, or several separated by commas.
    Null, and no `api_key_file`: no key is asked for."""

    api_key_file: Text | None = None
    """File with a key on every line; empty lines and lines that begin with `#` are left out."""

    requests_per_minute: PositiveInt | None = None
    """Most requests a minute that one key may send to one replica; the next one gets 429 with Retry-After.
    Without keys all clients share them. Null: no limit."""

    @property
    def max_bodies(self) -> int:
        """Most bodies that one replica reads at once, beside the requests that run and wait."""
        return self.max_ongoing_requests + self.max_queued_requests + SPARE_BODIES

    def cpus(self, num_rewards: int | None = None) -> float:
        """CPU cores that all replicas may take together; `num_rewards`: different reward models (None: the
        run's own and those of `models`)."""
        total = self.replicas * self.cpus_per_replica
        apart = self.reward_deployment
        if apart is None:
            return total
        if num_rewards is None:
            num_rewards = 1 + len({model.reward for model in self.models if model.reward is not None})
        return total + num_rewards * apart.max_replicas * apart.cpus_per_replica

    @model_validator(mode="after")
    def _ids_differ(self) -> Self:
        ids = [SERVED_MODEL_ID, *(model.id for model in self.models)]
        for given in ids:
            if ids.count(given) > 1:
                raise ValueError(
                    f"models: two models have the id '{given}' ('{SERVED_MODEL_ID}' is the run's own)"
                )
        return self
