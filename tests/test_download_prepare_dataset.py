import bz2
import gzip
import hashlib
import io
import lzma
import os
import random
import sys
import tarfile
from pathlib import Path

import pandas as pd
import pytest
from local_server import LocalServer, MisbehavingServer
from test_download import fine

import download_prepare_dataset as dataset
from finetuning.files import held, sha256

FOLDERS = ("test/pos", "test/neg", "train/pos", "train/neg")


def add(archive, name, content, **attributes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in attributes.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def make_archive(path, reviews, extra=(), root="aclImdb/"):
    """Write reviews {"folder/name": bytes} below `root` in a random order, among things that are not reviews."""
    names = list(reviews)
    random.Random(0).shuffle(names)
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        add(archive, "aclImdb/README", b"about")
        add(archive, "aclImdb/train/unsup/0_0.txt", b"unlabelled")
        add(archive, "aclImdb/train/pos", b"", type=tarfile.DIRTYPE)
        add(archive, "/etc/train/pos/1_1.txt", b"absolute")
        add(archive, "aclImdb/../test/pos/1_1.txt", b"dots")
        add(archive, "aclImdb/test/pos/99999_9.txt", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        for name, content in extra:
            add(archive, name, content)
        for name in names:
            add(archive, f"{root}{name}", reviews[name])
    return path


@pytest.fixture(scope="module")
def whole():
    """50,000 tiny reviews whose text tells their place: {"test/pos/0_7.txt": b"test pos 0", ...}"""
    return {f"{folder}/{i}_7.txt": f"{folder.replace('/', ' ')} {i}".encode()
            for folder in FOLDERS for i in range(12_500)}


@pytest.fixture(scope="module")
def archive(whole, tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("archive") / "aclImdb.tar.gz", whole)


def read(folder):
    return [pd.read_csv(folder / f"{split}.csv") for split in ("train", "validation", "test")]


def test_the_published_split(archive, tmp_path, capsys):
    dataset.main(["--archive", str(archive), "--data_dir", str(tmp_path)])
    train, validation, test = read(tmp_path)
    assert (len(train), len(validation), len(test)) == (35_000, 5_000, 10_000)
    assert list(train.columns) == ["text", "label"]
    texts = pd.concat([train, validation, test])
    assert set(texts["text"][texts["label"] == 1].str.split().str[1]) == {"pos"}
    assert set(texts["text"][texts["label"] == 0].str.split().str[1]) == {"neg"}
    assert texts["text"].nunique() == 50_000
    # The protocol spelled out: folders in this order, file names sorted as text, shuffled twice by pandas.
    names = sorted(f"{i}_7.txt" for i in range(12_500))
    rows = pd.Series([f"{part} {kind} {name.split('_')[0]}"
                      for part in ("test", "train") for kind in ("pos", "neg") for name in names])
    for _ in range(2):
        rows = rows.sample(frac=1, random_state=123).reset_index(drop=True)
    assert rows.tolist() == texts["text"].tolist()
    printed = capsys.readouterr().out
    assert "Training:   35,000 reviews, " in printed
    assert "0 of the 10,000 test reviews have an exact copy in the training set" in printed


def test_the_official_split_keeps_the_releases_test_folder(archive, tmp_path):
    dataset.main(["--archive", str(archive), "--data_dir", str(tmp_path), "--split", "official"])
    train, validation, test = read(tmp_path)
    assert (len(train), len(validation), len(test)) == (20_000, 5_000, 25_000)
    assert set(test["text"].str.split().str[0]) == {"test"}
    assert set(pd.concat([train, validation])["text"].str.split().str[0]) == {"train"}
    assert 0.48 < train["label"].mean() < 0.52


def test_copies_in_the_training_set_are_counted():
    train = pd.DataFrame({"text": ["a", "b", "b"], "label": [1, 0, 0]})
    test = pd.DataFrame({"text": ["b", "b", "c", "a "], "label": [0, 0, 1, 1]})
    lines = dataset.summary(train, test, test).splitlines()
    assert lines[-1] == "2 of the 4 test reviews have an exact copy in the training set"
    assert lines[0] == "Training:        3 reviews, 33.33% positive"


@pytest.fixture
def small(monkeypatch):
    """Three reviews a folder, and a partition to match, where the size of the dataset is not the point."""
    monkeypatch.setattr(dataset, "REVIEWS_PER_FOLDER", 3)
    monkeypatch.setitem(dataset.PARTITIONS, "random", lambda rows: dataset.cut(dataset.shuffled(rows), 6, 3, 3))
    return {f"{folder}/{i}_7.txt": f"{folder} {i}".encode() for folder in FOLDERS for i in range(3)}


def test_an_extracted_folder_gives_the_same_files(small, tmp_path):
    make_archive(tmp_path / "a.tar.gz", small)
    for name, content in small.items():
        path = tmp_path / "aclImdb" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    sources = [tmp_path / "a.tar.gz", tmp_path / "aclImdb", tmp_path, tmp_path.parent]
    for i, source in enumerate(sources):
        dataset.main(["--archive", str(source), "--data_dir", str(tmp_path / str(i))])
    digests = [[sha256(tmp_path / str(i) / f"{split}.csv") for split in ("train", "validation", "test")]
               for i in range(4)]
    assert digests == 4 * [digests[0]]


@pytest.mark.parametrize("root", ["imdb/", "./imdb/", "aclImdb_v1/aclImdb/", "a/b c/\u00e9/", "", "./", "././"])
def test_an_archive_may_have_any_root(small, tmp_path, root):
    """The four folders count, not the name of what holds them; what macOS adds to archives does not count."""
    macos = [(f"{folder}/{place}/{name}", b"attributes") for place in FOLDERS
             for folder, name in (("__MACOSX/imdb", "5_5.txt"), ("imdb", "._0_7.txt"))]
    archive = make_archive(tmp_path / "a.tar.gz", small, [*macos, ("imdb/unsup/1_0.txt", b"")], root)
    frame = dataset.load_dataset_to_dataframe(archive)
    assert frame["text"].tolist() == [f"{folder} {i}" for folder in FOLDERS for i in range(3)]


def test_of_several_roots_the_whole_one_is_read_and_two_whole_ones_are_refused(small, tmp_path, failing):
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


def test_text_survives_the_csv(small, tmp_path):
    text = 'A "quoted", comma\nand a line; emoji \N{PILE OF POO}, \u05e9\u05dc\u05d5\u05dd, NA'
    small = {name: text.encode() for name in small} | {"test/pos/0_7.txt": b"one\r\ntwo\rthree"}
    archive = make_archive(tmp_path / "a.tar.gz", small)
    dataset.main(["--archive", str(archive), "--data_dir", str(tmp_path)])
    texts = pd.concat(read(tmp_path))["text"]
    assert sorted(set(texts)) == sorted([text, "one\ntwo\nthree"])


def refused(tmp_path, failing, archive):
    """Run on a bad archive beside old CSV files; check that they stay as they were; return the message."""
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.csv").write_text("old")
    message = failing(dataset.main, "--archive", archive, "--data_dir", folder)
    assert {file.name: file.read_text() for file in folder.iterdir() if file.name != ".lock"} == {
        "train.csv": "old", "validation.csv": "old", "test.csv": "old"}
    return message


def test_a_missing_review_is_named(small, tmp_path, failing):
    del small["train/neg/1_7.txt"]
    message = refused(tmp_path, failing, make_archive(tmp_path / "a.tar.gz", small))
    assert "train/neg holds 2 of 3 reviews" in message
    assert "train/pos" not in message


@pytest.mark.parametrize("kept", [0, 10, 100, 400])
def test_an_archive_cut_short_is_refused(small, tmp_path, failing, kept):
    archive = make_archive(tmp_path / "a.tar.gz", small)
    archive.write_bytes(archive.read_bytes()[:kept])
    assert "download it again" in refused(tmp_path, failing, archive)


def test_a_file_that_is_no_archive_is_refused(tmp_path, failing):
    (tmp_path / "page.html").write_text("<html>404</html>")
    assert "is a web page, no tar archive" in refused(tmp_path, failing, tmp_path / "page.html")
    assert "no archive or folder" in refused(tmp_path, failing, tmp_path / "absent.tar.gz")


def a_tar_of(name, content):
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as archive:
        add(archive, name, content)
    return file.getvalue()


@pytest.mark.parametrize(("content", "message"), [
    (b"text,label\ngood,1\n", "is a text file that begins with 'text,label', no tar archive"),
    (b"<!DOCTYPE html>\n<title>404</title>", "is a web page"),
    (b"\n<HTML>", "is a web page"),
    (b"PK\x03\x04" + bytes(range(256)), "is a zip file, no tar archive of the reviews; extract it and pass the folder"),
    (b"PAR1" + bytes(1000), "is a Parquet file"),
    (b"ARROW1\0\0", "is an Arrow file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 84125825\n", "is a Git LFS pointer"),
    (gzip.compress(b"text,label\n"), "is a gzip file, no tar archive"),
    (gzip.compress(b"PK\x03\x04"), "is a gzip file of a zip file"),
    (b"\x80\x02}", "is a pickle"),
    (bytes(range(129, 256)), "is a file of unknown content"),
    (a_tar_of("checkpoint", b"x"), "holds no reviews in test/pos, test/neg, train/pos, train/neg; it begins with c"),
    (a_tar_of("IMDB Dataset.csv", b"x"), "it begins with IMDB Dataset.csv"),
    (b"", "is empty; download it again"),
    (bytes(10240), "is a file of zero bytes; download it again"),
])
def test_something_else_is_refused_by_what_it_is(tmp_path, failing, content, message):
    """Never with the advice to delete it: it may be dear to its owner."""
    (tmp_path / "a.tar.gz").write_bytes(content)
    refusal = refused(tmp_path, failing, tmp_path / "a.tar.gz")
    assert message in refusal
    assert "delete" not in refusal


@pytest.mark.parametrize(("names", "message"), [
    ([], "is an empty folder"),
    (["record.json", "curves.svg"], "is the folder of a training run"),
    (["train.csv", "test.csv"], "is a folder of CSV files, which the train scripts read with --data_dir"),
    (["dataset_info.json", "data-00000-of-00001.arrow"], "is a folder of the library Datasets"),
    (["data.parquet"], "is a folder of Parquet files"),
    (list("abcdefg"), "is a folder of a, b, c, d, e and 2 more, without the reviews in test/pos, "),
    (["aclImdb_v1.tar.gz", "b"], "; pass the archive in it: "),
])
def test_another_folder_is_refused_by_what_it_is(tmp_path, failing, names, message):
    (tmp_path / "folder").mkdir()
    for name in names:
        (tmp_path / "folder" / name).touch()
    refusal = refused(tmp_path, failing, tmp_path / "folder")
    assert message in refusal
    assert "delete" not in refusal


@pytest.mark.parametrize("place", ["train", "test/neg"])
def test_a_folder_within_the_dataset_names_the_one_to_pass(small, tmp_path, failing, place):
    for folder in FOLDERS:
        (tmp_path / "imdb" / folder).mkdir(parents=True)
    assert refused(tmp_path, failing, tmp_path / "imdb" / place).endswith(f"; pass {tmp_path / 'imdb'}")


def test_an_archive_that_may_not_be_read_is_not_called_damaged(small, tmp_path, failing, monkeypatch):
    def forbidden(*arguments):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(tarfile, "open", forbidden)
    (tmp_path / "a.tar").touch()
    assert "cannot read " in (message := refused(tmp_path, failing, tmp_path / "a.tar"))
    assert message.endswith("a.tar: Permission denied")


def test_oversized_and_undecodable_reviews_are_named(small, tmp_path, failing):
    huge = small | {"test/pos/1_7.txt": b"x" * 1_000_001}
    assert "test/pos/1_7.txt has 1,000,001 bytes" in refused(
        tmp_path, failing, make_archive(tmp_path / "a.tar.gz", huge))
    latin = small | {"test/pos/1_7.txt": "caf\u00e9".encode("latin-1")}
    assert "test/pos/1_7.txt is not UTF-8" in refused(tmp_path, failing, make_archive(tmp_path / "b.tar.gz", latin))


def test_a_disk_that_fills_up_leaves_the_old_files(small, tmp_path, failing, monkeypatch):
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
    """The content of a good archive that stands for the official one."""
    content = make_archive(tmp_path / "served.tar.gz", small).read_bytes()

    def official(url):
        monkeypatch.setattr(dataset, "OFFICIAL", dataset.Download(url, len(content), hashlib.md5(content).hexdigest()))
        return url
    return content, official


def test_the_official_archive_is_downloaded_once_and_checked(served, tmp_path):
    content, official = served
    files = {"/aclImdb_v1.tar.gz": content}
    with LocalServer(files) as server:
        url = official(f"{server.url}/aclImdb_v1.tar.gz")
        dataset.main(["--archive", url, "--data_dir", str(tmp_path / "data")])
        files.clear()  # a second download would now fail
        dataset.main(["--archive", url, "--data_dir", str(tmp_path / "data")])
    assert sorted(os.listdir(tmp_path / "data")) == ["aclImdb_v1.tar.gz", "test.csv", "train.csv", "validation.csv"]


def test_an_archive_that_the_server_calls_a_gzipped_page_is_kept_as_it_is(served, tmp_path):
    content, official = served
    with LocalServer({"/a.tar.gz": content}, headers={"Content-Encoding": "x-gzip"}) as server:
        path = dataset.fetch_archive(official(f"{server.url}/a.tar.gz"), tmp_path / "data")
    assert path.read_bytes() == content


def test_a_half_finished_download_is_not_taken_for_a_whole_one(served, tmp_path):
    content, official = served
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "aclImdb_v1.tar.gz").write_bytes(content[:500])
    with LocalServer({"/aclImdb_v1.tar.gz": content}) as server:
        dataset.main(["--archive", official(f"{server.url}/aclImdb_v1.tar.gz"), "--data_dir", str(tmp_path / "data")])
    assert (tmp_path / "data" / "aclImdb_v1.tar.gz").read_bytes() == content


def test_a_mirror_may_have_packed_the_reviews_otherwise(served, tmp_path):
    content, _ = served
    with LocalServer({"/mirror/reviews.tgz": content}) as server:
        dataset.main(["--archive", f"{server.url}/mirror/reviews.tgz?from=here", "--data_dir", str(tmp_path / "data")])
    assert (tmp_path / "data" / "reviews.tgz").read_bytes() == content
    assert len(pd.concat(read(tmp_path / "data"))) == 12


@pytest.mark.parametrize("archive", ["http://127.0.0.1:9/a.tar.gz", "http://", "https://[/a.tar.gz", "http://a b/c"])
def test_no_server_at_all(tmp_path, failing, archive, monkeypatch):
    monkeypatch.setattr("finetuning.download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("finetuning.download.note", lambda message: None)
    assert "cannot download" in failing(dataset.main, "--archive", archive, "--data_dir", tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz", ""])
def test_damage_behind_the_last_review_is_noticed(small, tmp_path, failing, compression):
    """The checksum comes last; a plain tar archive has none."""
    content = gzip.decompress(make_archive(tmp_path / "a.tar.gz", small).read_bytes())
    if compression:
        content = {"gz": gzip, "bz2": bz2, "xz": lzma}[compression].compress(content)
        (tmp_path / "a.tar").write_bytes(content[:-6] + bytes([content[-6] ^ 1]) + content[-5:])
        assert "damaged" in refused(tmp_path, failing, tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(content)
    dataset.main(["--archive", str(tmp_path / "a.tar"), "--data_dir", str(tmp_path / "good")])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other links")
def test_links_and_other_things_in_an_extracted_folder_are_not_reviews(small, tmp_path, failing):
    for name, content in small.items():
        (tmp_path / "aclImdb" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "aclImdb" / name).write_bytes(content)
    folder = tmp_path / "aclImdb" / "test" / "pos"
    (folder / "9_9.txt").symlink_to("/etc/passwd")
    os.mkfifo(folder / "8_8.txt")
    (folder / "notes.txt").write_text("about")
    assert len(dataset.load_dataset_to_dataframe(tmp_path)) == 12
    with open(folder / "0_7.txt", "wb") as file:
        file.truncate(1 << 30)  # a gigabyte of nothing
    assert "0_7.txt has 1,073,741,824 bytes; a review has a few thousand" in refused(
        tmp_path, failing, tmp_path / "aclImdb")


def test_two_at_once_do_not_mix_their_files(small, tmp_path, failing):
    archive = make_archive(tmp_path / "a.tar.gz", small)
    with held(tmp_path / "data", "--data_dir"):
        assert "another run is writing to" in refused(tmp_path, failing, archive)


@pytest.mark.skipif("IMDB_ARCHIVE" not in os.environ, reason="IMDB_ARCHIVE names no archive of the real reviews")
def test_the_real_reviews(tmp_path, capsys):
    dataset.main(["--archive", os.environ["IMDB_ARCHIVE"], "--data_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "121 of the 10,000 test reviews have an exact copy in the training set" in printed
    train, validation, test = read(tmp_path)
    # The share of negative reviews: what the published dummy classifier reaches.
    assert [f"{(frame['label'] == 0).mean():.2%}" for frame in (train, validation, test)] == [
        "50.01%", "50.14%", "49.91%"]


@pytest.mark.skipif("IMDB_ARCHIVE" not in os.environ, reason="IMDB_ARCHIVE names no archive of the real reviews")
@pytest.mark.parametrize("kept", [3_300_000, 1_500_000, 100_000])
def test_what_interrupted_downloads_leave_of_the_real_archive(tmp_path, failing, monkeypatch, kept):
    """Such pieces lie in public repositories: refused as they are, gone on with where they are known for pieces."""
    content = Path(os.environ["IMDB_ARCHIVE"]).read_bytes()
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "piece.tar.gz").write_bytes(content[:kept])
    assert "cut short" in refused(tmp_path, failing, tmp_path / "piece.tar.gz")
    (data / "a.tar.gz").write_bytes(content[:kept])
    (data / ".a.tar.gz.part").write_bytes(content[:kept])
    with MisbehavingServer(content, fine) as server:
        url = f"{server.url}/a.tar.gz"
        monkeypatch.setattr(dataset, "OFFICIAL", dataset.Download(url, len(content), hashlib.md5(content).hexdigest()))
        path = dataset.fetch_archive(url, data)
    assert server.requests == [f"bytes={kept}-"]
    assert sha256(path) == sha256(os.environ["IMDB_ARCHIVE"])
