"""What jobs beside a run share (`mahalo dialogues`, `label`, `generate`): each has an output of its own."""

from __future__ import annotations

from mahalo_ray.config import Section, dump_config
from mahalo_ray.data import storage
from mahalo_ray.pipeline.fingerprint import read_started, write_started


def claim_output(output: str, config: Section, fingerprint: str, made: str) -> None:
    """Begin, or go on with, the job of this fingerprint in `output` and write its configuration there.

    ValueError if the output holds what another job made: `made`, of other settings or input.
    """
    if read_started(output) not in (None, fingerprint):
        raise ValueError(
            f"'{output}' holds {made} of other settings or input: give another 'output', or delete it"
        )
    write_started(output, fingerprint)
    storage.write_bytes(storage.join(output, "config.yaml"), dump_config(config).encode())
