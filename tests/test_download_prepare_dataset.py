import hashlib
import os
from pathlib import Path

import pandas as pd
import pytest
from helpers import ARCHIVE_FOLDERS, make_archive, refused
from local_server import LocalServer, MisbehavingServer, send_correctly

import download_prepare_dataset as dataset
from finetuning.system.files import exclusive_dir, sha256


@pytest.fixture(scope="module")
def full_dataset():
    """50,000 tiny reviews whose text states their path: {"test/pos/0_7.txt": b"test pos 0", ...}."""
    return {
        f"{folder}/{i}_7.txt": f"{folder.replace('/', ' ')} {i}".encode()
        for folder in ARCHIVE_FOLDERS
        for i in range(12_500)
    }


@pytest.fixture(scope="module")
def archive(full_dataset, tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("archive") / "aclImdb.tar.gz", full_dataset)


def read_splits(folder):
    return [pd.read_csv(folder / f"{split}.csv") for split in ("train", "validation", "test")]


def test_random_split_equals_the_published_one(archive, tmp_path, capsys):
    dataset.main(["--archive", str(archive), "--data_dir", str(tmp_path)])
    train, validation, test = read_splits(tmp_path)
    assert (len(train), len(validation), len(test)) == (35_000, 5_000, 10_000)
    assert list(train.columns) == ["text", "label"]
    texts = pd.concat([train, validation, test])
    assert set(texts["text"][texts["label"] == 1].str.split().str[1]) == {"pos"}
    assert set(texts["text"][texts["label"] == 0].str.split().str[1]) == {"neg"}
    assert texts["text"].nunique() == 50_000
    # The published procedure: folders in this order, file names sorted as text, shuffled twice by pandas.
    names = sorted(f"{i}_7.txt" for i in range(12_500))
    rows = pd.Series(
        [
            f"{part} {kind} {name.split('_')[0]}"
            for part in ("test", "train")
            for kind in ("pos", "neg")
            for name in names
        ]
    )
    for _ in range(2):
        rows = rows.sample(frac=1, random_state=123).reset_index(drop=True)
    assert rows.tolist() == texts["text"].tolist()
    printed = capsys.readouterr().out
    assert "Training:   35,000 reviews, " in printed
    assert "Train-test overlap: 0 of the 10,000 test reviews are exact duplicates of training reviews" in printed


def test_official_split_keeps_the_test_folder_of_the_release(archive, tmp_path):
    dataset.main(["--archive", str(archive), "--data_dir", str(tmp_path), "--split", "official"])
    train, validation, test = read_splits(tmp_path)
    assert (len(train), len(validation), len(test)) == (20_000, 5_000, 25_000)
    assert set(test["text"].str.split().str[0]) == {"test"}
    assert set(pd.concat([train, validation])["text"].str.split().str[0]) == {"train"}
    assert 0.48 < train["label"].mean() < 0.52


def test_summary_counts_exact_duplicates():
    train = pd.DataFrame({"text": ["a", "b", "b"], "label": [1, 0, 0]})
    test = pd.DataFrame({"text": ["b", "b", "c", "a "], "label": [0, 0, 1, 1]})
    lines = dataset.summary(train, test, test).splitlines()
    assert lines[-1] == "Train-test overlap: 2 of the 4 test reviews are exact duplicates of training reviews"
    assert lines[0] == "Training:        3 reviews, 33.33% positive"


def test_csv_round_trip_preserves_special_characters(small_dataset, tmp_path):
    text = 'A "quoted", comma\nand a line; emoji \N{PILE OF POO}, \u05e9\u05dc\u05d5\u05dd, NA'
    small_dataset = {name: text.encode() for name in small_dataset} | {"test/pos/0_7.txt": b"one\r\ntwo\rthree"}
    archive = make_archive(tmp_path / "a.tar.gz", small_dataset)
    dataset.main(["--archive", str(archive), "--data_dir", str(tmp_path)])
    texts = pd.concat(read_splits(tmp_path))["text"]
    assert sorted(set(texts)) == sorted([text, "one\ntwo\nthree"])


def test_missing_reviews_are_reported_by_folder(small_dataset, tmp_path, failing):
    del small_dataset["train/neg/1_7.txt"]
    message = refused(tmp_path, failing, make_archive(tmp_path / "a.tar.gz", small_dataset))
    assert "train/neg holds 2 of 3 reviews" in message
    assert "train/pos" not in message


def test_full_disk_leaves_the_old_files(small_dataset, tmp_path, failing, monkeypatch):
    archive = make_archive(tmp_path / "a.tar.gz", small_dataset)
    write = pd.DataFrame.to_csv

    def full(frame, path, **options):
        if "test.csv" in str(path):
            Path(path).write_text("half")
            raise OSError(28, "No space left on device", str(path))
        write(frame, path, **options)

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    assert "No space left on device" in refused(tmp_path, failing, archive)


@pytest.fixture
def served(small_dataset, tmp_path, monkeypatch):
    """The content of a valid archive, and a function that makes a URL the official one."""
    content = make_archive(tmp_path / "served.tar.gz", small_dataset).read_bytes()

    def official(url):
        monkeypatch.setattr(
            dataset, "OFFICIAL", dataset.RemoteFile(url, len(content), hashlib.md5(content).hexdigest())
        )
        return url

    return content, official


def test_official_archive_is_downloaded_once(served, tmp_path):
    content, official = served
    files = {"/aclImdb_v1.tar.gz": content}
    with LocalServer(files) as server:
        url = official(f"{server.url}/aclImdb_v1.tar.gz")
        dataset.main(["--archive", url, "--data_dir", str(tmp_path / "data")])
        files.clear()  # a second download would fail
        dataset.main(["--archive", url, "--data_dir", str(tmp_path / "data")])
    assert sorted(os.listdir(tmp_path / "data")) == ["aclImdb_v1.tar.gz", "test.csv", "train.csv", "validation.csv"]


def test_archive_served_with_content_encoding_gzip_stays_compressed(served, tmp_path):
    content, official = served
    with LocalServer({"/a.tar.gz": content}, headers={"Content-Encoding": "x-gzip"}) as server:
        path = dataset.fetch_archive(official(f"{server.url}/a.tar.gz"), tmp_path / "data")
    assert path.read_bytes() == content


def test_incomplete_download_is_replaced(served, tmp_path):
    content, official = served
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "aclImdb_v1.tar.gz").write_bytes(content[:500])
    with LocalServer({"/aclImdb_v1.tar.gz": content}) as server:
        dataset.main(["--archive", official(f"{server.url}/aclImdb_v1.tar.gz"), "--data_dir", str(tmp_path / "data")])
    assert (tmp_path / "data" / "aclImdb_v1.tar.gz").read_bytes() == content


def test_archive_of_another_url_needs_no_checksum(served, tmp_path):
    content, _ = served
    with LocalServer({"/mirror/reviews.tgz": content}) as server:
        dataset.main(["--archive", f"{server.url}/mirror/reviews.tgz?from=here", "--data_dir", str(tmp_path / "data")])
    assert (tmp_path / "data" / "reviews.tgz").read_bytes() == content
    assert len(pd.concat(read_splits(tmp_path / "data"))) == 12


def test_download_does_not_overwrite_a_file_of_the_same_name(served, tmp_path, failing):
    content, _ = served
    (tmp_path / "train.csv").write_text("mine")
    with LocalServer({"/train.csv": content}) as server:
        error = failing(dataset.main, "--archive", f"{server.url}/train.csv", "--data_dir", tmp_path)
    assert f"{tmp_path / 'train.csv'} exists; pass --archive" in error
    assert (tmp_path / "train.csv").read_text() == "mine"


@pytest.mark.parametrize("archive", ["http://127.0.0.1:9/a.tar.gz", "http://", "https://[/a.tar.gz", "http://a b/c"])
def test_unreachable_server_is_reported(tmp_path, failing, archive, monkeypatch):
    monkeypatch.setattr("finetuning.system.download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("finetuning.system.download.print_status", lambda message: None)
    assert "cannot download" in failing(dataset.main, "--archive", archive, "--data_dir", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_concurrent_run_in_the_same_folder_is_refused(small_dataset, tmp_path, failing):
    archive = make_archive(tmp_path / "a.tar.gz", small_dataset)
    with exclusive_dir(tmp_path / "data", "--data_dir"):
        assert "another run is writing to" in refused(tmp_path, failing, archive)


@pytest.mark.skipif("IMDB_ARCHIVE" not in os.environ, reason="IMDB_ARCHIVE names no archive of the real reviews")
def test_real_reviews_have_the_published_class_balance(tmp_path, capsys):
    dataset.main(["--archive", os.environ["IMDB_ARCHIVE"], "--data_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "121 of the 10,000 test reviews are exact duplicates of training reviews" in printed
    train, validation, test = read_splits(tmp_path)
    # The fractions of negative reviews are the accuracies of the published dummy classifier.
    assert [f"{(frame['label'] == 0).mean():.2%}" for frame in (train, validation, test)] == [
        "50.01%",
        "50.14%",
        "49.91%",
    ]


@pytest.mark.skipif("IMDB_ARCHIVE" not in os.environ, reason="IMDB_ARCHIVE names no archive of the real reviews")
@pytest.mark.parametrize("num_bytes", [3_300_000, 1_500_000, 100_000])
def test_truncated_real_archive_is_refused_and_its_download_resumed(tmp_path, failing, monkeypatch, num_bytes):
    """Public repositories hold such archives; a file with the suffix .part is a download to resume."""
    content = Path(os.environ["IMDB_ARCHIVE"]).read_bytes()
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "truncated.tar.gz").write_bytes(content[:num_bytes])
    assert "truncated" in refused(tmp_path, failing, tmp_path / "truncated.tar.gz")
    (data / "a.tar.gz").write_bytes(content[:num_bytes])
    (data / ".a.tar.gz.part").write_bytes(content[:num_bytes])
    with MisbehavingServer(content, send_correctly) as server:
        url = f"{server.url}/a.tar.gz"
        monkeypatch.setattr(
            dataset, "OFFICIAL", dataset.RemoteFile(url, len(content), hashlib.md5(content).hexdigest())
        )
        path = dataset.fetch_archive(url, data)
    assert server.requests == [f"bytes={num_bytes}-"]
    assert sha256(path) == sha256(os.environ["IMDB_ARCHIVE"])
