"""Review texts as token ids, cached on disk, so that no review is tokenized twice.

A cache entry is a folder `token_cache/<key>` beside the CSV files, or in the user's own cache folder
where that place is read-only; the key is made of the CSV file's content, the tokenizer and the
number of tokens kept. It holds `ids.bin` (all reviews'
ids behind one another, little-endian int32), `lengths.npy` and `labels.npy` (one int64 a
review), and `sha256`, the digest of the three.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetuning.errors import UserError
from finetuning.files import disk_named, folder_written_whole, locked, sha256
from finetuning.reviews import csv_paths, iterate_reviews

FILES = ("ids.bin", "lengths.npy", "labels.npy")


class Tokenizer(NamedTuple):
    """What batching needs to know of a tokenizer."""

    encode: Callable[[list[str], int | None], list[list[int]]]  # texts, most tokens of each (None: all) -> ids
    fingerprint: str  # differs where `encode` does
    pad_token_id: int


class Tokens(NamedTuple):
    """Tokenized reviews with their labels."""

    ids: np.ndarray  # (all tokens,) int32: the reviews behind one another
    lengths: np.ndarray  # (reviews,) int64
    labels: np.ndarray  # (reviews,) int64


def flatten(token_ids, labels):
    """A list of id lists and their labels as Tokens."""
    return Tokens(np.concatenate([np.asarray(ids, dtype="<i4") for ids in token_ids]),
                  np.array([len(ids) for ids in token_ids], dtype=np.int64), np.array(labels, dtype=np.int64))


def load_tokens(data_dir, tokenizer, context_length, limit):
    """The Tokens of the training, validation and test set, and the number of tokens kept of each review.

    `context_length` is that number or one of `finetuning.cli.CONTEXT_LENGTHS`; `limit` is the
    most the model can read. Raises UserError where the number exceeds the limit.
    """
    paths = csv_paths(data_dir)
    if context_length == "longest_training_example":
        context_length = min(limit, int(cached_tokens(paths[0], tokenizer, None).lengths.max()))
    elif context_length == "model_context_length":
        context_length = limit
    if context_length > limit:
        raise UserError(f"--context_length {context_length} is more than the {limit} tokens this model can read")
    return [cached_tokens(path, tokenizer, context_length) for path in paths], context_length


def cached_tokens(path, tokenizer, max_length):
    """The Tokens of a CSV file, its ids memory-mapped from the cache; a damaged entry is made anew."""
    parts = [sha256(path), tokenizer.fingerprint, max_length]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]
    roots = [root for root in cache_roots(path) if is_trusted(root, path)]
    folder = next((root / key for root in roots if is_whole(root / key)), None)
    if folder is None:
        writable = [root for root in roots if is_writable(root)]
        if not writable:
            raise UserError(f"cannot write to {' or '.join(map(str, cache_roots(path)))}, where tokenized reviews are "
                            "kept; set XDG_CACHE_HOME to a folder of your own")
        folder = writable[0] / key
        build(folder, path, tokenizer, max_length)
    return Tokens(np.memmap(folder / FILES[0], dtype="<i4", mode="r"),
                  *(np.load(folder / file, allow_pickle=False) for file in FILES[1:]))


def cache_roots(path):
    """The folders that may hold the cache entries of a CSV file: one beside it, and one of the user's own.

    The latter is where the XDG Base Directory Specification has it.
    """
    homes = map(os.path.expanduser, (os.environ.get("XDG_CACHE_HOME", ""), "~/.cache"))
    own = [Path(home) / "imdb-finetuning" / "token_cache" for home in homes if os.path.isabs(home)]
    return [path.parent / "token_cache", *own[:1]]


def is_trusted(root, path):
    """Whether a cache folder, if it exists, belongs to this user or to the owner of the CSV file."""
    return not os.path.exists(root) or root.stat().st_uid in {getattr(os, "geteuid", lambda: 0)(), path.stat().st_uid}


def is_writable(folder):
    """Whether a folder, or where there is none the one to make it in, can be written to."""
    return (is_writable(folder.parent) if not os.path.exists(folder) else
            folder.is_dir() and os.access(folder, os.W_OK | os.X_OK))


def is_whole(folder):
    """Whether a cache entry is there and holds what was written to it."""
    try:
        return (folder / "sha256").read_text(encoding="ascii") == digest(folder)
    except (OSError, ValueError):
        return False


def digest(folder):
    """What `sha256` in a cache entry must hold."""
    return " ".join(sha256(folder / file) for file in FILES)


def build(folder, path, tokenizer, max_length):
    """Tokenize a CSV file piece by piece into a cache entry, which appears only once it is whole.

    One process at a time does so; the others wait, and find the entry.
    """
    with disk_named(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent, wait=True):
            if not is_whole(folder):
                with folder_written_whole(folder) as temporary:
                    tokenize(temporary, path, tokenizer, max_length)


def tokenize(folder, path, tokenizer, max_length):
    """Write a cache entry's files."""
    lengths, labels = [], []
    with open(folder / FILES[0], "wb") as ids_file:
        for frame in iterate_reviews(path):
            tokens = flatten(tokenizer.encode(frame["text"].tolist(), max_length), frame["label"])
            ids_file.write(tokens.ids)
            lengths.append(tokens.lengths)
            labels.append(tokens.labels)
    np.save(folder / FILES[1], np.concatenate(lengths))
    np.save(folder / FILES[2], np.concatenate(labels))
    (folder / "sha256").write_text(digest(folder), encoding="ascii")
