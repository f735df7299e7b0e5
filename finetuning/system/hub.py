"""The Hugging Face Hub's cache: detect damaged weights."""

import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from finetuning.system.errors import UserError
from finetuning.system.files import sha256

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def check_cached_weights(repository: str) -> None:
    """Raise UserError if cached weights of a repository are damaged; do nothing if none are cached.

    The cache names a large file by the SHA-256 that the Hub reports. The Hub's client compares only
    the size of a download, and a disk can corrupt a file later.
    """
    for filename in WEIGHTS:
        cached = try_to_load_from_cache(repository, filename)
        if not isinstance(cached, str):
            continue
        blob = Path(cached).resolve()
        if re.fullmatch("[0-9a-f]{64}", blob.name) and sha256(blob) != blob.name:
            raise UserError(
                f"{filename} of {repository} in the Hugging Face cache is damaged (its SHA-256 differs); "
                f"delete {blob} and run again"
            )
