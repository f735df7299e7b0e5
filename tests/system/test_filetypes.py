import gzip

import pytest

from finetuning.system.errors import UserError
from finetuning.system.filetypes import file_type, first_line, folder_type, refuse_lfs_pointer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (bytes(600), "a file of zero bytes"),
        (b"text,label\ngood,1\n", None),
        (bytes(range(129, 256)), None),
        (b"\n <!DOCTYPE HTML>", "a web page"),
        (b"PK\x03\x04", "a zip file"),
        (b"a" * 257 + b"ustar", "a tar archive"),
        (b"a" * 258 + b"ustar", None),
        (gzip.compress(b"text"), "a gzip file"),
        (gzip.compress(b"PK\x03\x04"), "a gzip file of a zip file"),
        (gzip.compress(gzip.compress(b"text")), "a gzip file of a gzip file"),
        (b"\x1f\x8bdamaged", "a damaged gzip file"),
    ],
)
def test_file_type_names_the_content(tmp_path, content, expected):
    (tmp_path / "a").write_bytes(content)
    assert file_type(tmp_path / "a") == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", ""), (b"one\ntwo\n", "one"), (b"x" * 61, "x" * 60), (b"caf\xe9 au lait\n", None), (b"a\0b", None)],
)
def test_first_line_is_that_of_a_text(tmp_path, content, expected):
    (tmp_path / "a").write_bytes(content)
    assert first_line(tmp_path / "a") == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "an empty folder"),
        ([".hidden"], "an empty folder"),
        (["b.txt", "a.txt", ".hidden"], "a folder of a.txt, b.txt"),
        (list("abcdefg"), "a folder of a, b, c, d, e and 2 more"),
        (["a.parquet", "b.txt"], "a folder of Parquet files"),
        (["train.csv", "record.json"], "the folder of a training run"),
        (["config.json"], "a model's folder"),
    ],
)
def test_folder_type_names_the_first_known_file(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).touch()
    assert folder_type(tmp_path) == expected


def test_refuse_lfs_pointer_raises_only_for_a_pointer(tmp_path):
    refuse_lfs_pointer(tmp_path / "absent")
    (tmp_path / "a").write_bytes(b"other content")
    refuse_lfs_pointer(tmp_path / "a")
    (tmp_path / "a").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"a is a Git LFS pointer, .* git lfs pull"):
        refuse_lfs_pointer(tmp_path / "a")
