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

from finetuning import tokens
from finetuning.errors import UserError
from finetuning.tokens import Tokenizer, cached_tokens, flatten, load_tokens


def numbers(calls=None, fingerprint="numbers"):
    """A tokenizer of texts that are numbers; `calls` counts the texts it has seen."""
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


def as_lists(found):
    starts = np.cumsum(found.lengths) - found.lengths
    return [found.ids[start:start + length].tolist() for start, length in zip(starts, found.lengths, strict=True)]


def test_flattening():
    flat = flatten([[1, 2, 3], [4]], [1, 0])
    assert (flat.ids.tolist(), flat.lengths.tolist(), flat.labels.tolist()) == ([1, 2, 3, 4], [3, 1], [1, 0])


@pytest.mark.parametrize(("context_length", "limit", "length"), [
    (2, 8, 2), ("longest_training_example", 8, 4), ("longest_training_example", 3, 3), ("model_context_length", 5, 5)])
def test_reviews_are_cut_to_the_context_length(folder, context_length, limit, length):
    (folder / "test.csv").write_text("text,label\n1 2 3 4 5 6,0\n")
    (train, _, test), cut = load_tokens(folder, numbers(), context_length, limit)
    assert cut == length
    assert as_lists(train) == [[1, 2, 3, 4][:length], [5], [6, 7]]
    assert train.labels.tolist() == [1, 0, 1]
    assert as_lists(test) == [[1, 2, 3, 4, 5, 6][:length]]


def test_a_context_longer_than_the_models_is_refused(folder):
    with pytest.raises(UserError, match="--context_length 9 is more than the 8 tokens"):
        load_tokens(folder, numbers(), 9, 8)


def test_a_second_time_nothing_is_tokenized(folder):
    calls = []
    first = cached_tokens(folder / "train.csv", numbers(calls), 3)
    second = cached_tokens(folder / "train.csv", numbers(calls), 3)
    assert calls == ["1 2 3 4", "5", "6 7"]
    assert as_lists(first) == as_lists(second)
    assert isinstance(second.ids, np.memmap)


def test_content_tokenizer_and_length_each_have_their_own_entry(folder):
    calls = []
    path = folder / "train.csv"
    cached_tokens(path, numbers(calls), 3)
    cached_tokens(path, numbers(calls), 2)
    cached_tokens(path, numbers(calls, "other"), 2)
    path.write_text("text,label\n8 9,0\n")
    assert as_lists(cached_tokens(path, numbers(calls), 2)) == [[8, 9]]
    assert len(calls) == 3 * 3 + 1


@pytest.mark.parametrize("file", [*tokens.FILES, "sha256"])
@pytest.mark.parametrize("damage", ["truncate", "change", "remove", "empty"])
def test_a_damaged_entry_is_made_anew(folder, file, damage):
    path = folder / "train.csv"
    cached_tokens(path, numbers(), 3)
    (entry,) = (folder / "token_cache").iterdir()
    content = (entry / file).read_bytes()
    if damage == "remove":
        (entry / file).unlink()
    else:
        (entry / file).write_bytes({"truncate": content[:-3], "change": content[:-1] + b"\xff", "empty": b""}[damage])
    assert as_lists(cached_tokens(path, numbers(), 3)) == [[1, 2, 3], [5], [6, 7]]
    assert [path.name for path in (folder / "token_cache").iterdir()] == [entry.name]


def test_an_unfinished_entry_is_no_entry(folder):
    def interrupted(texts, max_length):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        cached_tokens(folder / "train.csv", Tokenizer(interrupted, "numbers", 0), 3)
    assert list((folder / "token_cache").iterdir()) == []
    assert as_lists(cached_tokens(folder / "train.csv", numbers(), 3)) == [[1, 2, 3], [5], [6, 7]]


def tokenize_elsewhere(path, calls, results):
    """A run in a process of its own, which takes its time."""
    def encode(texts, max_length):
        calls.put(os.getpid())
        time.sleep(0.3)
        return numbers().encode(texts, max_length)
    results.put(as_lists(cached_tokens(path, Tokenizer(encode, "numbers", 0), 3)))


def test_of_runs_at_once_one_tokenizes_and_the_others_wait(folder):
    calls, results = CONTEXT.Queue(), CONTEXT.Queue()
    processes = [CONTEXT.Process(target=tokenize_elsewhere, args=(folder / "train.csv", calls, results))
                 for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=DEADLINE) for _ in processes]
    for process in processes:
        process.join()
    assert found == [[[1, 2, 3], [5], [6, 7]]] * 3
    calls.get(timeout=1)
    assert calls.empty()
    assert len(list((folder / "token_cache").iterdir())) == 1


def test_what_a_killed_run_left_is_in_nobodys_way(folder):
    cached_tokens(folder / "train.csv", numbers(), 3)
    entry, = (folder / "token_cache").iterdir()
    entry.rename(entry.with_name(f".{entry.name}.tmp"))
    assert as_lists(cached_tokens(folder / "train.csv", numbers(), 3)) == [[1, 2, 3], [5], [6, 7]]
    assert len(list((folder / "token_cache").iterdir())) == 1


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder of the user's own, without settings of where caches go."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def read_only(monkeypatch):
    """Make folders look read-only, as they never do to root."""
    def make(*folders):
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) not in map(str, folders)
                            and access(path, mode))
    return make


@pytest.mark.parametrize(("setting", "place"), [
    (None, ".cache"), ("", ".cache"), ("relative", ".cache"), ("~/caches", "caches")])
def test_a_read_only_data_folder_has_its_cache_in_the_users_own(setting, place, folder, home, read_only, monkeypatch):
    if setting is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", setting)
    read_only(folder)
    calls = []
    for _ in range(2):
        assert as_lists(cached_tokens(folder / "train.csv", numbers(calls), 3)) == [[1, 2, 3], [5], [6, 7]]
    assert len(calls) == 3
    assert not (folder / "token_cache").exists()
    assert len(list((home / place / "imdb-finetuning" / "token_cache").iterdir())) == 1


def test_an_entry_beside_read_only_data_is_used(folder, home, read_only):
    cached_tokens(folder / "train.csv", numbers(), 3)
    read_only(folder, folder / "token_cache")
    calls = []
    cached_tokens(folder / "train.csv", numbers(calls), 3)
    assert calls == []
    cached_tokens(folder / "test.csv", numbers(calls), 2)
    assert len(list((home / ".cache" / "imdb-finetuning" / "token_cache").iterdir())) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no owners")
@pytest.mark.parametrize(("owner", "trusted"), [(1001, False), (1002, True), (1003, True)])
def test_a_cache_folder_is_trusted_by_its_owner_and_for_the_data_owners_sake(owner, trusted, folder, monkeypatch):
    """The data are 1002's, and this is 1003."""
    (folder / "token_cache").mkdir()
    owners = {"token_cache": owner, "train.csv": 1002}
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 1003)
        patch.setattr(Path, "stat", lambda path: SimpleNamespace(st_uid=owners[path.name]))
        found = tokens.is_trusted(folder / "token_cache", folder / "train.csv")
    assert found == trusted


def test_a_cache_folder_of_someone_elses_is_neither_read_nor_written(folder, home, monkeypatch):
    cached_tokens(folder / "train.csv", numbers(), 3)
    monkeypatch.setattr(tokens, "is_trusted", lambda root, path: root.parent != folder)
    calls = []
    for _ in range(2):
        cached_tokens(folder / "train.csv", numbers(calls), 3)
    assert len(calls) == 3
    assert len(list((folder / "token_cache").iterdir())) == 1


def test_without_any_folder_to_write_to_the_variable_is_named(folder, home, read_only):
    read_only(folder, home)
    with pytest.raises(UserError, match=f"cannot write to {folder}.* or {home}.*; set XDG_CACHE_HOME to a folder of"):
        cached_tokens(folder / "train.csv", numbers(), 3)


def test_memory_does_not_grow_with_the_number_of_reviews(tmp_path, monkeypatch):
    """Python's own allocations while tokenizing 2,000 and 20,000 reviews, 500 at a time."""
    monkeypatch.setattr("finetuning.reviews.CHUNK", 500)
    peaks = []
    for count in (2_000, 20_000):
        path = tmp_path / "train.csv"
        pd.DataFrame({"text": ["1 2 3 4 5 6 7 8 " * 10] * count, "label": 1}).to_csv(path, index=False)
        shutil.rmtree(tmp_path / "token_cache", ignore_errors=True)
        tracemalloc.start()
        cached_tokens(path, numbers(), None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]
