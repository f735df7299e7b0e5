import errno
import hashlib
import os

import pytest
from helpers import assert_same_results, flags
from processes import end, start
from safetensors import SafetensorError
from tiny_models import TINY_CONFIGS, save_encoder

from finetuning.reporting import records
from finetuning.system.errors import UserError
from finetuning.system.files import LOCK_NAME, atomic_write, exclusive_dir, hex_digest, report_disk_errors


def test_failed_atomic_write_keeps_old_files(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "a", tmp_path / "b") as (a, b):
        a.write_text("new")
        b.write_text("half")
        raise ZeroDivisionError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "old"}


def test_atomic_write_replaces_leftover_temporary_file(tmp_path):
    with atomic_write(tmp_path / "a") as (leftover,):
        leftover.write_text("old")
    leftover.write_text("half")
    with atomic_write(tmp_path / "a") as (temporary,):
        temporary.write_text("new") if temporary == leftover else pytest.fail("another name")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new"}


def test_atomic_write_reports_a_folder_of_the_files_name(tmp_path):
    (tmp_path / "a.csv").mkdir()
    (tmp_path / "file").touch()
    for path, message in (
        ("a.csv", r"cannot write the file .*a\.csv: there is a folder"),
        ("file/a", "cannot write to"),
    ):
        with pytest.raises(UserError, match=message), atomic_write(tmp_path / path):
            pytest.fail("the block ran")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_atomic_write_names_disk_of_disk_errors(tmp_path, number):
    with (
        pytest.raises(UserError, match=rf"cannot write to {tmp_path}: .* \(disk /.*: [\d,]+ MB free of [\d,]+ MB\)"),
        atomic_write(tmp_path / "a"),
    ):
        raise OSError(number, "disk error")
    with pytest.raises(OSError, match="a bug"), atomic_write(tmp_path / "a"):
        raise OSError(errno.EBADF, "a bug")


def test_disk_errors_of_libraries_written_in_rust_are_reported(tmp_path):
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}: No space left"), report_disk_errors(tmp_path):
        raise error
    with pytest.raises(SafetensorError), report_disk_errors(tmp_path):
        raise SafetensorError("invalid header")


def test_files_that_another_program_uses_stay(tmp_path, monkeypatch):
    """Windows does not rename a file that a program has opened."""
    for name in "ab":
        (tmp_path / name).write_text("old")
    replace = os.replace

    def refuse(source, target):
        if source == tmp_path / "b":
            raise PermissionError(errno.EACCES, "used by another process")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="cannot write"), atomic_write(tmp_path / "a", tmp_path / "b") as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "old"}


def test_md5_is_computed_where_it_is_refused_for_security(tmp_path, monkeypatch):
    new = hashlib.new

    def refuse(name, data=b"", *, usedforsecurity=True):
        if usedforsecurity:
            raise ValueError("unsupported")
        return new(name, data, usedforsecurity=False)

    monkeypatch.setattr(hashlib, "new", refuse)
    (tmp_path / "a").write_bytes(b"abc")
    assert hex_digest(tmp_path / "a", "md5") == "900150983cd24fb0d6963f7d28e17f72"


def test_exclusive_dir_is_exclusive_and_removed_if_empty(tmp_path):
    folder = tmp_path / "a" / "run"
    with exclusive_dir(folder, "--output_dir"):
        assert [path.name for path in folder.iterdir()] == [LOCK_NAME]
        with (
            pytest.raises(UserError, match=f"another run is writing to {folder}; wait for it, or choose another"),
            exclusive_dir(folder, "--output_dir"),
        ):
            pytest.fail("locked twice")
        assert (folder / LOCK_NAME).exists()
    assert not (tmp_path / "a").exists()  # it was empty
    with exclusive_dir(folder, "--output_dir"):
        (folder / "record").write_text("x")
    assert [path.name for path in folder.iterdir()] == ["record"]


def test_exclusive_dir_ignores_lock_file_of_killed_run(tmp_path):
    (tmp_path / LOCK_NAME).write_text("")
    with exclusive_dir(tmp_path, "--output_dir"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_concurrent_runs_need_separate_folders_but_share_the_cache(data_dir, tmp_path):
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    command = flags(
        model="model", context_length=24, precision="fp32", device="cpu", num_epochs=10, checkpoint_minutes="1e-9"
    )
    runs = [
        start("train_bert_hf", [*command, "--output_dir", folder], tmp_path / f"log{i}", tmp_path)
        for i, folder in enumerate(["one", "one", "two"])
    ]
    statuses = [end(run) for run in runs]
    assert sorted(statuses[:2]) == [0, 2]
    assert statuses[2] == 0
    error = (tmp_path / f"log{statuses.index(2)}.err").read_text()
    assert error == ("train_bert_hf.py: another run is writing to one; wait for it, or choose another --output_dir\n")
    assert_same_results(tmp_path / "one", tmp_path / "two")
    assert records.read_record(tmp_path / "one")["accuracy"] == records.read_record(tmp_path / "two")["accuracy"]
