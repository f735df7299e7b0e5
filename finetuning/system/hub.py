"""The Hugging Face Hub's cache: detect damaged weights."""

import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from finetuning.system.errors import UserError
from finetuning.system.files import sha256

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def check_cached_weights(repository: str) -> None:
    """Raise UserError if the cached weights that Transformers loads of a repository are damaged."""
    cached = (try_to_load_from_cache(repository, filename) for filename in WEIGHTS)
    if path := next((path for path in cached if isinstance(path, str)), None):
        check_digest(Path(path))


def check_digest(path: Path) -> None:
    """Raise UserError if a file of the cache is damaged; files elsewhere have no digest to compare with.

    The cache names a large file by the SHA-256 that the Hub reports. The Hub's client compares only
    the size of a download, and a disk can corrupt a file later.
    """
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name) and sha256(blob) != blob.name:
        raise UserError(
            f"{path} in the Hugging Face cache is damaged (its SHA-256 differs); delete {blob} and run again"
        )
