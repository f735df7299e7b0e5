import os
import shutil
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from processes import CONTEXT, DEADLINE

from finetuning.data import tokenization
from finetuning.data.tokenization import Tokenizer, concatenate, load_encoded_splits, load_or_tokenize
from finetuning.system.errors import UserError


def numbers(calls=None, fingerprint="numbers"):
    """Return a tokenizer of texts that consist of numbers; `calls` collects the texts it encodes."""

    def encode(texts, max_length):
        if calls is not None:
            calls.extend(texts)
        return [[int(word) for word in text.split()][:max_length] for text in texts]

    return Tokenizer(encode, fingerprint, pad_token_id=0)


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.csv").write_text("text,label\n1 2 3 4,1\n5,0\n6 7,1\n")
    return tmp_path


def as_lists(encoded):
    return [ids.tolist() for ids in np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])]


def test_concatenate_joins_ids_and_keeps_lengths_and_labels():
    flat = concatenate([[1, 2, 3], [4]], [1, 0])
    assert (flat.ids.tolist(), flat.lengths.tolist(), flat.labels.tolist()) == ([1, 2, 3, 4], [3, 1], [1, 0])


@pytest.mark.parametrize(
    ("context_length", "limit", "length"),
    [(2, 8, 2), ("longest_training_example", 8, 4), ("longest_training_example", 3, 3), ("model_context_length", 5, 5)],
)
def test_reviews_are_truncated_to_the_context_length(folder, context_length, limit, length):
    (folder / "test.csv").write_text("text,label\n1 2 3 4 5 6,0\n")
    (train, _, test), cut = load_encoded_splits(folder, numbers(), context_length, limit)
    assert cut == length
    assert as_lists(train) == [[1, 2, 3, 4][:length], [5], [6, 7]]
    assert train.labels.tolist() == [1, 0, 1]
    assert as_lists(test) == [[1, 2, 3, 4, 5, 6][:length]]


def test_context_length_above_the_models_limit_is_refused(folder):
    with pytest.raises(UserError, match="--context_length 9 is more than the 8 tokens"):
        load_encoded_splits(folder, numbers(), 9, 8)


def test_cached_reviews_are_not_tokenized_again(folder):
    calls = []
    first = load_or_tokenize(folder / "train.csv", numbers(calls), 3)
    second = load_or_tokenize(folder / "train.csv", numbers(calls), 3)
    assert calls == ["1 2 3 4", "5", "6 7"]
    assert as_lists(first) == as_lists(second)
    assert isinstance(second.ids, np.memmap)


def test_cache_key_depends_on_content_tokenizer_and_length(folder):
    calls = []
    path = folder / "train.csv"
    load_or_tokenize(path, numbers(calls), 3)
    load_or_tokenize(path, numbers(calls), 2)
    load_or_tokenize(path, numbers(calls, "other"), 2)
    path.write_text("text,label\n8 9,0\n")
    assert as_lists(load_or_tokenize(path, numbers(calls), 2)) == [[8, 9]]
    assert len(calls) == 3 * 3 + 1


@pytest.mark.parametrize("file", [*tokenization.FILES, "sha256"])
@pytest.mark.parametrize("damage", ["truncate", "change", "remove", "empty"])
def test_damaged_cache_entry_is_rebuilt(folder, file, damage):
    path = folder / "train.csv"
    load_or_tokenize(path, numbers(), 3)
    (entry,) = (folder / "token_cache").iterdir()
    content = (entry / file).read_bytes()
    if damage == "remove":
        (entry / file).unlink()
    else:
        (entry / file).write_bytes({"truncate": content[:-3], "change": content[:-1] + b"\xff", "empty": b""}[damage])
    assert as_lists(load_or_tokenize(path, numbers(), 3)) == [[1, 2, 3], [5], [6, 7]]
    assert [path.name for path in (folder / "token_cache").iterdir()] == [entry.name]


def test_interrupted_tokenization_leaves_no_cache_entry(folder):
    def interrupted(texts, max_length):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_or_tokenize(folder / "train.csv", Tokenizer(interrupted, "numbers", 0), 3)
    assert list((folder / "token_cache").iterdir()) == []
    assert as_lists(load_or_tokenize(folder / "train.csv", numbers(), 3)) == [[1, 2, 3], [5], [6, 7]]


def tokenize_elsewhere(path, calls, results):
    """Tokenize slowly in another process."""

    def encode(texts, max_length):
        calls.put(os.getpid())
        time.sleep(0.3)
        return numbers().encode(texts, max_length)

    results.put(as_lists(load_or_tokenize(path, Tokenizer(encode, "numbers", 0), 3)))


def test_concurrent_runs_tokenize_once(folder):
    calls, results = CONTEXT.Queue(), CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=tokenize_elsewhere, args=(folder / "train.csv", calls, results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    encoded = [results.get(timeout=DEADLINE) for _ in processes]
    for process in processes:
        process.join()
    assert encoded == [[[1, 2, 3], [5], [6, 7]]] * 3
    calls.get(timeout=1)
    assert calls.empty()
    assert len(list((folder / "token_cache").iterdir())) == 1


def test_leftovers_of_a_killed_run_are_replaced(folder):
    load_or_tokenize(folder / "train.csv", numbers(), 3)
    (entry,) = (folder / "token_cache").iterdir()
    entry.rename(entry.with_name(f".{entry.name}.tmp"))
    assert as_lists(load_or_tokenize(folder / "train.csv", numbers(), 3)) == [[1, 2, 3], [5], [6, 7]]
    assert len(list((folder / "token_cache").iterdir())) == 1


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder, without XDG_CACHE_HOME."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def read_only(monkeypatch):
    """Return a function that makes folders look read-only, even to root."""

    def make(*folders):
        access = os.access
        monkeypatch.setattr(
            os, "access", lambda path, mode: os.fspath(path) not in map(str, folders) and access(path, mode)
        )

    return make


@pytest.mark.parametrize(
    ("setting", "cache_folder"), [(None, ".cache"), ("", ".cache"), ("relative", ".cache"), ("~/caches", "caches")]
)
def test_read_only_data_folder_uses_the_users_cache_folder(setting, cache_folder, folder, home, read_only, monkeypatch):
    if setting is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", setting)
    read_only(folder)
    calls = []
    for _ in range(2):
        assert as_lists(load_or_tokenize(folder / "train.csv", numbers(calls), 3)) == [[1, 2, 3], [5], [6, 7]]
    assert len(calls) == 3
    assert not (folder / "token_cache").exists()
    assert len(list((home / cache_folder / "imdb-finetuning" / "token_cache").iterdir())) == 1


def test_existing_cache_entry_beside_read_only_data_is_used(folder, home, read_only):
    load_or_tokenize(folder / "train.csv", numbers(), 3)
    read_only(folder, folder / "token_cache")
    calls = []
    load_or_tokenize(folder / "train.csv", numbers(calls), 3)
    assert calls == []
    load_or_tokenize(folder / "test.csv", numbers(calls), 2)
    assert len(list((home / ".cache" / "imdb-finetuning" / "token_cache").iterdir())) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no owners")
@pytest.mark.parametrize(("owner", "trusted"), [(1001, False), (1002, True), (1003, True)])
def test_is_trusted_compares_the_owners_of_cache_and_data(owner, trusted, folder, monkeypatch):
    """User 1002 owns the data; user 1003 runs the script."""
    (folder / "token_cache").mkdir()
    owners = {"token_cache": owner, "train.csv": 1002}
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 1003)
        patch.setattr(Path, "stat", lambda path: SimpleNamespace(st_uid=owners[path.name]))
        result = tokenization.is_trusted(folder / "token_cache", folder / "train.csv")
    assert result == trusted


def test_cache_folder_of_another_user_is_not_used(folder, home, monkeypatch):
    load_or_tokenize(folder / "train.csv", numbers(), 3)
    monkeypatch.setattr(tokenization, "is_trusted", lambda root, path: root.parent != folder)
    calls = []
    for _ in range(2):
        load_or_tokenize(folder / "train.csv", numbers(calls), 3)
    assert len(calls) == 3
    assert len(list((folder / "token_cache").iterdir())) == 1


def test_error_without_a_writable_cache_folder_names_xdg_cache_home(folder, home, read_only):
    read_only(folder, home)
    with pytest.raises(UserError, match=f"cannot write to {folder}.* or {home}.*; set XDG_CACHE_HOME to a folder of"):
        load_or_tokenize(folder / "train.csv", numbers(), 3)


def test_tokenizing_memory_does_not_grow_with_the_number_of_reviews(tmp_path, monkeypatch):
    """Compare Python's peak allocation for 2,000 and 20,000 reviews, tokenized 500 at a time."""
    monkeypatch.setattr("finetuning.data.reviews.CHUNK_SIZE", 500)
    peaks = []
    for count in (2_000, 20_000):
        path = tmp_path / "train.csv"
        pd.DataFrame({"text": ["1 2 3 4 5 6 7 8 " * 10] * count, "label": 1}).to_csv(path, index=False)
        shutil.rmtree(tmp_path / "token_cache", ignore_errors=True)
        tracemalloc.start()
        load_or_tokenize(path, numbers(), None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]
