"""Token ids of reviews, cached on disk, so that no review is tokenized twice.

A cache entry is a folder `token_cache/<key>` beside the CSV files, or in the user's cache folder if that is
read-only. The key is a digest of the CSV file, the tokenizer and the maximum length. An entry holds `ids.bin` (the
concatenated ids of all reviews, little-endian int32), `lengths.npy` and `labels.npy` (one int64 per review), and
`sha256`, the digests of the three files.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from finetuning.data.reviews import csv_paths, iterate_reviews
from finetuning.system.errors import UserError
from finetuning.system.files import atomic_write_dir, dir_lock, report_disk_errors, sha256

FILES = ("ids.bin", "lengths.npy", "labels.npy")


class Tokenizer(NamedTuple):
    """What caching and batching need to know of a tokenizer."""

    encode: Callable[[list[str], int | None], list[list[int]]]  # (texts, max_length or None) -> ids
    fingerprint: str  # differs for any two tokenizers whose `encode` differs
    pad_token_id: int


class EncodedReviews(NamedTuple):
    """Tokenized reviews with their labels."""

    ids: np.ndarray  # (tokens,) int32, concatenated
    lengths: np.ndarray  # (reviews,) int64
    labels: np.ndarray  # (reviews,) int64


def concatenate(token_ids: list[list[int]], labels: ArrayLike) -> EncodedReviews:
    """Return lists of ids and their labels as EncodedReviews."""
    return EncodedReviews(
        np.concatenate([np.asarray(ids, dtype="<i4") for ids in token_ids]),
        np.array([len(ids) for ids in token_ids], dtype=np.int64),
        np.array(labels, dtype=np.int64),
    )


def load_encoded_splits(
    data_dir: str, tokenizer: Tokenizer, context_length: int | str, max_length: int
) -> tuple[list[EncodedReviews], int]:
    """Return the encoded training, validation and test set and the context length in tokens.

    `context_length` is a number or one of `finetuning.cli.CONTEXT_LENGTHS`; `max_length` is the
    model's limit. Raises UserError if the number exceeds the limit.
    """
    paths = csv_paths(data_dir)
    if context_length == "longest_training_example":
        length = min(max_length, int(load_or_tokenize(paths[0], tokenizer, None).lengths.max()))
    elif context_length == "model_context_length":
        length = max_length
    else:
        length = int(context_length)
    if length > max_length:
        raise UserError(f"--context_length {length} is more than the {max_length} tokens this model can read")
    return [load_or_tokenize(path, tokenizer, length) for path in paths], length


def load_or_tokenize(path: Path, tokenizer: Tokenizer, max_length: int | None) -> EncodedReviews:
    """Return the encoded reviews of a CSV file, with the ids memory-mapped from the cache."""
    content = json.dumps([sha256(path), tokenizer.fingerprint, max_length])
    key = hashlib.sha256(content.encode()).hexdigest()[:20]
    roots = [root for root in cache_roots(path) if is_trusted(root, path)]
    entry = next((root / key for root in roots if is_valid(root / key)), None)
    if entry is None:
        writable = [root for root in roots if is_writable(root)]
        if not writable:
            raise UserError(
                f"cannot write to {' or '.join(map(str, cache_roots(path)))}, where tokenized reviews are "
                "cached; set XDG_CACHE_HOME to a folder of your own"
            )
        entry = writable[0] / key
        build_entry(entry, path, tokenizer, max_length)
    ids = np.memmap(entry / FILES[0], dtype="<i4", mode="r")
    return EncodedReviews(ids, *(np.load(entry / file, allow_pickle=False) for file in FILES[1:]))


def cache_roots(path: Path) -> list[Path]:
    """Return the folders for cache entries of a CSV file: beside it, and in the user's XDG cache folder."""
    candidates = map(os.path.expanduser, (os.environ.get("XDG_CACHE_HOME", ""), "~/.cache"))
    user_caches = [Path(folder) / "imdb-finetuning" / "token_cache" for folder in candidates if os.path.isabs(folder)]
    return [path.parent / "token_cache", *user_caches[:1]]


def is_trusted(root: Path, path: Path) -> bool:
    """Return whether a cache folder, if it exists, belongs to this user or to the owner of the CSV file."""
    if not os.path.exists(root):
        return True
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    return root.stat().st_uid in {user, path.stat().st_uid}


def is_writable(folder: Path) -> bool:
    """Return whether a folder can be written to, or created."""
    if not os.path.exists(folder):
        return is_writable(folder.parent)
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def is_valid(entry: Path) -> bool:
    """Return whether a cache entry exists and its digests match."""
    try:
        return (entry / "sha256").read_text(encoding="ascii") == digests(entry)
    except (OSError, ValueError):
        return False


def digests(entry: Path) -> str:
    """Return the content of the file `sha256` of a cache entry."""
    return " ".join(sha256(entry / file) for file in FILES)


def build_entry(entry: Path, path: Path, tokenizer: Tokenizer, max_length: int | None) -> None:
    """Tokenize a CSV file into a new cache entry; concurrent processes wait and then find it."""
    with report_disk_errors(entry.parent):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with dir_lock(entry.parent, wait=True):
            if not is_valid(entry):
                with atomic_write_dir(entry) as temporary:
                    write_entry(temporary, path, tokenizer, max_length)


def write_entry(folder: Path, path: Path, tokenizer: Tokenizer, max_length: int | None) -> None:
    """Tokenize a CSV file, chunk by chunk, and write the files of its cache entry."""
    lengths, labels = [], []
    with open(folder / FILES[0], "wb") as file:
        for chunk in iterate_reviews(path):
            encoded = concatenate(tokenizer.encode(chunk["text"].tolist(), max_length), chunk["label"])
            file.write(encoded.ids.tobytes())
            lengths.append(encoded.lengths)
            labels.append(encoded.labels)
    np.save(folder / FILES[1], np.concatenate(lengths))
    np.save(folder / FILES[2], np.concatenate(labels))
    (folder / "sha256").write_text(digests(folder), encoding="ascii")
