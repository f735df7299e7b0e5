import bz2
import gzip
import io
import lzma
import os
import sys
import tarfile

import pytest
from helpers import ARCHIVE_FOLDERS, add_member, make_archive, refused

import download_prepare_dataset as dataset
from finetuning.system.files import sha256


def test_archive_and_extracted_folder_give_the_same_files(small_dataset, tmp_path):
    make_archive(tmp_path / "a.tar.gz", small_dataset)
    for name, content in small_dataset.items():
        path = tmp_path / "downloads" / "extracted" / "aclImdb" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    extracted = tmp_path / "downloads" / "extracted"
    sources = [tmp_path / "a.tar.gz", extracted / "aclImdb", extracted, extracted.parent]
    for i, source in enumerate(sources):
        dataset.main(["--archive", str(source), "--data_dir", str(tmp_path / str(i))])
    digests = [
        [sha256(tmp_path / str(i) / f"{split}.csv") for split in ("train", "validation", "test")] for i in range(4)
    ]
    assert digests == 4 * [digests[0]]


@pytest.mark.parametrize("root", ["imdb/", "./imdb/", "aclImdb_v1/aclImdb/", "a/b c/\u00e9/", "", "./", "././"])
def test_load_accepts_any_root_folder_in_an_archive(small_dataset, tmp_path, root):
    """The four folders are found whatever their parent is called; files that macOS adds are ignored."""
    macos = [
        (f"{root_name}/{subfolder}/{name}", b"attributes")
        for subfolder in ARCHIVE_FOLDERS
        for root_name, name in (("__MACOSX/imdb", "5_5.txt"), ("imdb", "._0_7.txt"))
    ]
    archive = make_archive(tmp_path / "a.tar.gz", small_dataset, [*macos, ("imdb/unsup/1_0.txt", b"")], root)
    frame = dataset.load_dataset_to_dataframe(archive)
    assert frame["text"].tolist() == [f"{folder} {i}" for folder in ARCHIVE_FOLDERS for i in range(3)]


def test_load_reads_the_complete_root_and_refuses_two_of_them(small_dataset, tmp_path, failing):
    partial = [("sample/train/pos/1_1.txt", b"x"), ("sample/test/neg/1_1.txt", b"x")]
    archive = make_archive(tmp_path / "a.tar.gz", small_dataset, partial, root="imdb/")
    assert len(dataset.load_dataset_to_dataframe(archive)) == 12
    copy = [(f"copy/{name}", content) for name, content in small_dataset.items()]
    archive = make_archive(tmp_path / "b.tar.gz", small_dataset, copy, root="imdb/")
    assert "holds copy/ and imdb/, each with all four folders" in refused(tmp_path, failing, archive)
    for name, content in [*((f"imdb/{name}", content) for name, content in small_dataset.items()), *copy]:
        (tmp_path / "both" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "both" / name).write_bytes(content)
    message = refused(tmp_path, failing, tmp_path / "both")
    assert f"holds {tmp_path / 'both' / 'copy'} and {tmp_path / 'both' / 'imdb'}, each" in message


@pytest.mark.parametrize("num_bytes", [0, 10, 100, 400])
def test_truncated_archive_is_refused(small_dataset, tmp_path, failing, num_bytes):
    archive = make_archive(tmp_path / "a.tar.gz", small_dataset)
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
def test_error_for_a_subfolder_names_the_dataset_folder(small_dataset, tmp_path, failing, subfolder):
    for folder in ARCHIVE_FOLDERS:
        (tmp_path / "imdb" / folder).mkdir(parents=True)
    assert refused(tmp_path, failing, tmp_path / "imdb" / subfolder).endswith(f"; pass {tmp_path / 'imdb'}")


def test_unreadable_archive_is_not_reported_as_damaged(small_dataset, tmp_path, failing, monkeypatch):
    def forbidden(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tarfile, "open", forbidden)
    (tmp_path / "a.tar").touch()
    assert "cannot read " in (message := refused(tmp_path, failing, tmp_path / "a.tar"))
    assert message.endswith("a.tar: Permission denied")


def test_oversized_and_undecodable_reviews_are_refused(small_dataset, tmp_path, failing):
    huge = small_dataset | {"test/pos/1_7.txt": b"x" * 1_000_001}
    assert "test/pos/1_7.txt has 1,000,001 bytes" in refused(
        tmp_path, failing, make_archive(tmp_path / "a.tar.gz", huge)
    )
    latin = small_dataset | {"test/pos/1_7.txt": "caf\u00e9".encode("latin-1")}
    assert "test/pos/1_7.txt is not UTF-8" in refused(tmp_path, failing, make_archive(tmp_path / "b.tar.gz", latin))


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz", ""])
def test_damage_after_the_last_review_is_detected(small_dataset, tmp_path, failing, compression):
    """The checksum is at the end of the file; a plain tar archive has none."""
    content = gzip.decompress(make_archive(tmp_path / "a.tar.gz", small_dataset).read_bytes())
    if compression:
        content = {"gz": gzip, "bz2": bz2, "xz": lzma}[compression].compress(content)
        (tmp_path / "a.tar").write_bytes(content[:-6] + bytes([content[-6] ^ 1]) + content[-5:])
        assert "damaged" in refused(tmp_path, failing, tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(content)
    dataset.main(["--archive", str(tmp_path / "a.tar"), "--data_dir", str(tmp_path / "good")])


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need a privilege on Windows")
@pytest.mark.parametrize("linked", ["train", "test/pos"])
def test_folders_may_be_symbolic_links(small_dataset, tmp_path, linked):
    for name, content in small_dataset.items():
        (tmp_path / "aclImdb" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "aclImdb" / name).write_bytes(content)
    (tmp_path / "aclImdb" / linked).rename(tmp_path / "elsewhere")
    (tmp_path / "aclImdb" / linked).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "aclImdb")
    assert len(dataset.load_dataset_to_dataframe(tmp_path / "link")) == 12


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no FIFOs")
def test_links_fifos_and_other_files_in_a_folder_are_ignored(small_dataset, tmp_path, failing):
    for name, content in small_dataset.items():
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
