"""Files in the Hugging Face cache: whether they still are what the Hub sent."""

import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from finetuning.errors import UserError
from finetuning.files import sha256

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
DIGEST = re.compile("[0-9a-f]{64}")


def check_cached_weights(repository):
    """Raise UserError if a repository's cached weights are damaged; where none are cached there is nothing to check.

    The cache stores a large file under the SHA-256 that the Hub tells of it. A download is compared
    with its size only, and a disk may lose bits later.
    """
    for filename in WEIGHTS:
        cached = try_to_load_from_cache(repository, filename)
        if not isinstance(cached, str):
            continue
        stored = Path(cached).resolve()
        if DIGEST.fullmatch(stored.name) and sha256(stored) != stored.name:
            raise UserError(f"{filename} of {repository} in the Hugging Face cache is damaged (its SHA-256 differs); "
                            f"delete {stored} and run again")
