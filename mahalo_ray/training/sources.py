"""Where a model to start from lies: a folder, a storage URL or a hub id."""

from __future__ import annotations

from pathlib import Path

from mahalo_ray.data import storage
from mahalo_ray.models.folder import local_folder


def model_folder(url: str) -> Path:
    """A local folder with the model's files; what lies elsewhere is fetched. ValueError if there is
    nothing."""
    return Path(storage.local_copy(url)) if storage.exists(url) else local_folder(url)


def keeps_backbone(url: str) -> bool | None:
    """Whether an adapter trained on the model at `url` must be saved with its base: yes if only a temporary
    copy of the base lies here; else None, the model's own choice."""
    return True if storage.exists(url) and not storage.is_local(url) else None
