import bz2
import gzip
import hashlib
import io
import lzma
import os
import sys
import tarfile
from pathlib import Path

import pandas as pd
import pytest
from helpers import ARCHIVE_FOLDERS, add_member, make_archive
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


def small_partition(reviews):
    shuffled = dataset.shuffle(reviews)
    return [shuffled[:6], shuffled[6:9], shuffled[9:]]


@pytest.fixture
def small(monkeypatch):
    """Three reviews per folder, with a partition of that size."""
    monkeypatch.setattr(dataset, "REVIEWS_PER_FOLDER", 3)
    monkeypatch.setitem(dataset.PARTITIONS, "random", small_partition)
    return {f"{folder}/{i}_7.txt": f"{folder} {i}".encode() for folder in ARCHIVE_FOLDERS for i in range(3)}


def test_archive_and_extracted_folder_give_the_same_files(small, tmp_path):
    make_archive(tmp_path / "a.tar.gz", small)
    for name, content in small.items():
        path = tmp_path / "aclImdb" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    sources = [tmp_path / "a.tar.gz", tmp_path / "aclImdb", tmp_path, tmp_path.parent]
    for i, source in enumerate(sources):
        dataset.main(["--archive", str(source), "--data_dir", str(tmp_path / str(i))])
    digests = [
        [sha256(tmp_path / str(i) / f"{split}.csv") for split in ("train", "validation", "test")] for i in range(4)
    ]
    assert digests == 4 * [digests[0]]


@pytest.mark.parametrize("root", ["imdb/", "./imdb/", "aclImdb_v1/aclImdb/", "a/b c/\u00e9/", "", "./", "././"])
def test_load_accepts_any_root_folder_in_an_archive(small, tmp_path, root):
    """The four folders are found whatever their parent is called; files that macOS adds are ignored."""
    macos = [
        (f"{root_name}/{subfolder}/{name}", b"attributes")
        for subfolder in ARCHIVE_FOLDERS
        for root_name, name in (("__MACOSX/imdb", "5_5.txt"), ("imdb", "._0_7.txt"))
    ]
    archive = make_archive(tmp_path / "a.tar.gz", small, [*macos, ("imdb/unsup/1_0.txt", b"")], root)
    frame = dataset.load_dataset_to_dataframe(archive)
    assert frame["text"].tolist() == [f"{folder} {i}" for folder in ARCHIVE_FOLDERS for i in range(3)]


def test_load_reads_the_complete_root_and_refuses_two_of_them(small, tmp_path, failing):
    partial = [("sample/train/pos/1_1.txt", b"x"), ("sample/test/neg/1_1.txt", b"x")]
    archive = make_archive(tmp_path / "a.tar.gz", small, partial, root="imdb/")
    assert len(dataset.load_dataset_to_dataframe(archive)) == 12
    copy = [(f"copy/{name}", content) for name, content in small.items()]
    archive = make_archive(tmp_path / "b.tar.gz", small, copy, root="imdb/")
    assert "holds copy/ and imdb/, each with all four folders" in refused(tmp_path, failing, archive)
    for name, content in [*((f"imdb/{name}", content) for name, content in small.items()), *copy]:
        (tmp_path / "both" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "both" / name).write_bytes(content)
    message = refused(tmp_path, failing, tmp_path / "both")
    assert f"holds {tmp_path / 'both' / 'copy'} and {tmp_path / 'both' / 'imdb'}, each" in message


def test_csv_round_trip_preserves_special_characters(small, tmp_path):
    text = 'A "quoted", comma\nand a line; emoji \N{PILE OF POO}, \u05e9\u05dc\u05d5\u05dd, NA'
    small = {name: text.encode() for name in small} | {"test/pos/0_7.txt": b"one\r\ntwo\rthree"}
    archive = make_archive(tmp_path / "a.tar.gz", small)
    dataset.main(["--archive", str(archive), "--data_dir", str(tmp_path)])
    texts = pd.concat(read_splits(tmp_path))["text"]
    assert sorted(set(texts)) == sorted([text, "one\ntwo\nthree"])


def refused(tmp_path, failing, archive):
    """Run on a bad archive next to old CSV files; check that they are unchanged; return the message."""
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.csv").write_text("old")
    message = failing(dataset.main, "--archive", archive, "--data_dir", folder)
    assert {file.name: file.read_text() for file in folder.iterdir() if file.name != ".lock"} == {
        "train.csv": "old",
        "validation.csv": "old",
        "test.csv": "old",
    }
    return message


def test_missing_reviews_are_reported_by_folder(small, tmp_path, failing):
    del small["train/neg/1_7.txt"]
    message = refused(tmp_path, failing, make_archive(tmp_path / "a.tar.gz", small))
    assert "train/neg holds 2 of 3 reviews" in message
    assert "train/pos" not in message


@pytest.mark.parametrize("num_bytes", [0, 10, 100, 400])
def test_truncated_archive_is_refused(small, tmp_path, failing, num_bytes):
    archive = make_archive(tmp_path / "a.tar.gz", small)
    archive.write_bytes(archive.read_bytes()[:num_bytes])
    assert "download it again" in refused(tmp_path, failing, archive)


def test_web_page_and_missing_file_are_refused(tmp_path, failing):
    (tmp_path / "page.html").write_text("<html>404</html>")
    assert "is a web page, not a tar archive" in refused(tmp_path, failing, tmp_path / "page.html")
    assert "no archive or folder" in refused(tmp_path, failing, tmp_path / "absent.tar.gz")


def tar_with(name, content):
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as archive:
        add_member(archive, name, content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,label\ngood,1\n", "is a text file that begins with 'text,label', not a tar archive"),
        (b"<!DOCTYPE html>\n<title>404</title>", "is a web page"),
        (b"\n<HTML>", "is a web page"),
        (
            b"PK\x03\x04" + bytes(range(256)),
            "is a zip file, not a tar archive of the reviews; extract it and pass the folder",
        ),
        (b"PAR1" + bytes(1000), "is a Parquet file"),
        (b"ARROW1\0\0", "is an Arrow file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 84125825\n", "is a Git LFS pointer"),
        (gzip.compress(b"text,label\n"), "is a gzip file, not a tar archive"),
        (gzip.compress(b"PK\x03\x04"), "is a gzip file of a zip file"),
        (b"\x80\x02}", "is a pickle"),
        (bytes(range(129, 256)), "is a file of unknown content"),
        (
            tar_with("checkpoint", b"x"),
            "holds no reviews in test/pos, test/neg, train/pos, train/neg; it begins with c",
        ),
        (tar_with("IMDB Dataset.csv", b"x"), "it begins with IMDB Dataset.csv"),
        (b"", "is empty; download it again"),
        (bytes(10240), "is a file of zero bytes; download it again"),
    ],
)
def test_error_names_the_type_of_another_file(tmp_path, failing, content, message):
    """The message never suggests to delete the file, which may be valuable."""
    (tmp_path / "a.tar.gz").write_bytes(content)
    refusal = refused(tmp_path, failing, tmp_path / "a.tar.gz")
    assert message in refusal
    assert "delete" not in refusal


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "is an empty folder"),
        (["record.json", "curves.svg"], "is the folder of a training run"),
        (["train.csv", "test.csv"], "is a folder of CSV files, which the train scripts read with --data_dir"),
        (["dataset_info.json", "data-00000-of-00001.arrow"], "is a folder of the library Datasets"),
        (["data.parquet"], "is a folder of Parquet files"),
        (list("abcdefg"), "is a folder of a, b, c, d, e and 2 more, without the reviews in test/pos, "),
        (["aclImdb_v1.tar.gz", "b"], "; pass the archive in it: "),
    ],
)
def test_error_names_the_type_of_another_folder(tmp_path, failing, names, message):
    (tmp_path / "folder").mkdir()
    for name in names:
        (tmp_path / "folder" / name).touch()
    refusal = refused(tmp_path, failing, tmp_path / "folder")
    assert message in refusal
    assert "delete" not in refusal


@pytest.mark.parametrize("subfolder", ["train", "test/neg"])
def test_error_for_a_subfolder_names_the_dataset_folder(small, tmp_path, failing, subfolder):
    for folder in ARCHIVE_FOLDERS:
        (tmp_path / "imdb" / folder).mkdir(parents=True)
    assert refused(tmp_path, failing, tmp_path / "imdb" / subfolder).endswith(f"; pass {tmp_path / 'imdb'}")


def test_unreadable_archive_is_not_reported_as_damaged(small, tmp_path, failing, monkeypatch):
    def forbidden(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tarfile, "open", forbidden)
    (tmp_path / "a.tar").touch()
    assert "cannot read " in (message := refused(tmp_path, failing, tmp_path / "a.tar"))
    assert message.endswith("a.tar: Permission denied")


def test_oversized_and_undecodable_reviews_are_refused(small, tmp_path, failing):
    huge = small | {"test/pos/1_7.txt": b"x" * 1_000_001}
    assert "test/pos/1_7.txt has 1,000,001 bytes" in refused(
        tmp_path, failing, make_archive(tmp_path / "a.tar.gz", huge)
    )
    latin = small | {"test/pos/1_7.txt": "caf\u00e9".encode("latin-1")}
    assert "test/pos/1_7.txt is not UTF-8" in refused(tmp_path, failing, make_archive(tmp_path / "b.tar.gz", latin))


def test_full_disk_leaves_the_old_files(small, tmp_path, failing, monkeypatch):
    archive = make_archive(tmp_path / "a.tar.gz", small)
    write = pd.DataFrame.to_csv

    def full(frame, path, **options):
        if "test.csv" in str(path):
            Path(path).write_text("half")
            raise OSError(28, "No space left on device", str(path))
        write(frame, path, **options)

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    assert "No space left on device" in refused(tmp_path, failing, archive)


@pytest.fixture
def served(small, tmp_path, monkeypatch):
    """The content of a valid archive, and a function that makes a URL the official one."""
    content = make_archive(tmp_path / "served.tar.gz", small).read_bytes()

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


@pytest.mark.parametrize("archive", ["http://127.0.0.1:9/a.tar.gz", "http://", "https://[/a.tar.gz", "http://a b/c"])
def test_unreachable_server_is_reported(tmp_path, failing, archive, monkeypatch):
    monkeypatch.setattr("finetuning.system.download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("finetuning.system.download.print_status", lambda message: None)
    assert "cannot download" in failing(dataset.main, "--archive", archive, "--data_dir", tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz", ""])
def test_damage_after_the_last_review_is_detected(small, tmp_path, failing, compression):
    """The checksum is at the end of the file; a plain tar archive has none."""
    content = gzip.decompress(make_archive(tmp_path / "a.tar.gz", small).read_bytes())
    if compression:
        content = {"gz": gzip, "bz2": bz2, "xz": lzma}[compression].compress(content)
        (tmp_path / "a.tar").write_bytes(content[:-6] + bytes([content[-6] ^ 1]) + content[-5:])
        assert "damaged" in refused(tmp_path, failing, tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(content)
    dataset.main(["--archive", str(tmp_path / "a.tar"), "--data_dir", str(tmp_path / "good")])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no FIFOs")
def test_links_fifos_and_other_files_in_a_folder_are_ignored(small, tmp_path, failing):
    for name, content in small.items():
        (tmp_path / "aclImdb" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "aclImdb" / name).write_bytes(content)
    folder = tmp_path / "aclImdb" / "test" / "pos"
    (folder / "9_9.txt").symlink_to("/etc/passwd")
    os.mkfifo(folder / "8_8.txt")
    (folder / "notes.txt").write_text("about")
    assert len(dataset.load_dataset_to_dataframe(tmp_path)) == 12
    with open(folder / "0_7.txt", "wb") as file:
        file.truncate(1 << 30)  # a sparse file of one gigabyte
    assert "0_7.txt has 1,073,741,824 bytes; a review has a few thousand" in refused(
        tmp_path, failing, tmp_path / "aclImdb"
    )


def test_concurrent_run_in_the_same_folder_is_refused(small, tmp_path, failing):
    archive = make_archive(tmp_path / "a.tar.gz", small)
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
