"""Property-based tests: damaged and random CSV files and archives are read or rejected, without other exceptions.

The environment variable EXAMPLES sets the number of examples, which are the same in each run.
"""

import bz2
import gzip
import io
import lzma
import os
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetuning.data import archive as archives
from finetuning.data.reviews import read_reviews
from finetuning.system.errors import UserError

fuzz = settings(
    max_examples=int(os.environ.get("EXAMPLES", "1000")),
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
CSV_TEXTS = [
    "text,label\ngood film,1\nbad film,0\n",
    'label,text,more\n1,"two\nlines, ""quoted""",x\n0,b,y\n',
    "\ufefftext,label\r\n\N{GRINNING FACE} \u05d8\u05d5\u05d1,1\r\n",
    'text,label\n"' + "long " * 300 + '",0\n',
]
CSV_FRAGMENTS = [
    b'"',
    b",",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"text",
    b"label",
    b"NaN",
    b"2",
    b"'",
    b"\\",
]


def damaged(contents, fragments):
    """Return a strategy for valid files with up to six pieces deleted, inserted or replaced."""
    piece = st.one_of(st.sampled_from(fragments), st.binary(max_size=20))
    edits = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 40), piece), max_size=6)

    def apply(content, edits):
        for position, length, inserted in edits:
            position %= len(content) + 1
            content = content[:position] + inserted + content[position + length :]
        return content

    return st.builds(apply, st.sampled_from(contents), edits)


@fuzz
@given(content=st.one_of(damaged([text.encode() for text in CSV_TEXTS], CSV_FRAGMENTS), st.binary(max_size=300)))
def test_read_reviews_returns_valid_reviews_or_raises_user_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.csv"
    path.write_bytes(content)
    try:
        frame = read_reviews(path)
    except UserError:
        return
    assert len(frame) > 0
    assert set(frame["label"]) <= {0, 1}
    assert all(isinstance(text, str) and text.strip() and "\0" not in text for text in frame["text"])


NAMES = st.one_of(
    st.builds(
        "{}aclImdb/{}/{}_{}.txt".format,
        st.sampled_from(["", "./", "/", "../", "x/"]),
        st.sampled_from([*archives.FOLDERS, "train/unsup", "test/pos/..", "test//pos"]),
        st.integers(0, 20),
        st.integers(0, 10),
    ),
    st.text(max_size=150),
)
MEMBERS = st.lists(
    st.tuples(
        NAMES,
        st.sampled_from(
            [
                tarfile.REGTYPE,
                tarfile.AREGTYPE,
                tarfile.CONTTYPE,
                tarfile.SYMTYPE,
                tarfile.LNKTYPE,
                tarfile.DIRTYPE,
                tarfile.FIFOTYPE,
                tarfile.CHRTYPE,
                tarfile.GNUTYPE_SPARSE,
                b"Z",
            ]
        ),
        st.binary(max_size=600),
        st.sampled_from([0, 1, 512, 10**6 + 1, 2**30, -1]),
    ),
    max_size=8,
)
COMPRESSORS = [lambda content: content, lambda content: gzip.compress(content, 1), bz2.compress, lzma.compress]


def build_archive(members, tar_format, compress):
    """Return a tar archive of members (name, type, content, excess of the declared over the real size)."""
    file = io.BytesIO()
    for name, member_type, content, excess in members:
        member = tarfile.TarInfo(name)
        member.type, member.size, member.linkname = member_type, max(0, len(content) + excess), "/etc/passwd"
        try:
            file.write(member.tobuf(tar_format, "utf-8", "surrogateescape"))
        except (ValueError, UnicodeError):  # a name that this format does not support
            continue
        file.write(content.ljust(-len(content) // 512 * -512, b"\0"))
    return compress(file.getvalue() + bytes(1024))


ARCHIVES = st.builds(
    build_archive,
    MEMBERS,
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.sampled_from(COMPRESSORS),
)


@fuzz
@given(data=st.data())
def test_read_archive_returns_reviews_or_raises_user_error(tmp_path_factory, data):
    content = data.draw(ARCHIVES)
    if data.draw(st.booleans()):
        content = data.draw(damaged([content], [b"\0", b"\xff" * 8, b"aclImdb/", b"77777777777", b"-1", b"path="]))
    path = tmp_path_factory.getbasetemp() / "fuzz.tar"
    path.write_bytes(content)
    try:
        reviews = archives.read_archive(path)
    except UserError:
        return
    assert reviews.keys() == set(archives.FOLDERS)
    for folder, files in reviews.items():
        for name, text in files.items():
            assert archives.REVIEW_NAME.fullmatch(f"aclImdb/{folder}/{name}")
            assert isinstance(text, bytes)
            assert len(text) <= archives.MAX_REVIEW_BYTES


def test_undamaged_fuzzer_files_are_readable(tmp_path):
    members = [("aclImdb/test/pos/1_7.txt", tarfile.REGTYPE, b"good", 0)]
    for compress in COMPRESSORS:
        (tmp_path / "a").write_bytes(build_archive(members, tarfile.GNU_FORMAT, compress))
        assert archives.read_archive(tmp_path / "a")["test/pos"] == {"1_7.txt": b"good"}
    for text in CSV_TEXTS:
        (tmp_path / "a").write_text(text, encoding="utf-8")
        assert len(read_reviews(tmp_path / "a"))
    with pytest.raises(UserError):
        archives.read_archive(tmp_path / "a")
