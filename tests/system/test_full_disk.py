"""Behavior on a full disk, a small one that is mounted for the test."""

import contextlib
import subprocess
import sys

import pytest
from helpers import ARCHIVE_FOLDERS, Killed, assert_same_results, flags, folder_contents, kill_after_step, make_archive
from local_server import ARCHIVE_CONTENT, MisbehavingServer, remote_file, send_correctly
from tiny_models import TINY_CONFIGS, save_encoder

import download_prepare_dataset as dataset
import train_bert_hf
import train_sklearn_logreg
from finetuning import checkpoint
from finetuning.reporting.saved_models import save_model
from finetuning.system.download import download
from finetuning.system.errors import UserError

FILLER = "filler"
MEGABYTE = 1 << 20


@pytest.fixture
def disk(tmp_path):
    """Mount a disk of 4 MB; return its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk requires root on Linux")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk, free_bytes=0):
    """Fill the disk except for `free_bytes`."""
    with contextlib.suppress(OSError), open(disk / FILLER, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with open(disk / FILLER, "rb+") as file:
        file.truncate((disk / FILLER).stat().st_size - free_bytes)


@contextlib.contextmanager
def assert_disk_full_error(disk):
    """Assert that the block raises an error that names the disk, and leaves its files unchanged."""
    before = folder_contents(disk)
    with pytest.raises(UserError, match=f"No space left on device .disk {disk}: "):
        yield
    assert folder_contents(disk) == before


def test_disk_full_while_writing_csv_files(disk, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "REVIEWS_PER_FOLDER", 3)
    monkeypatch.setitem(dataset.PARTITIONS, "random", lambda rows: [rows[:6], rows[6:9], rows[9:]])
    archive = make_archive(
        tmp_path / "a.tar.gz",
        {f"{folder}/{i}_7.txt": b"long " * 60_000 for folder in ARCHIVE_FOLDERS for i in range(3)},
    )
    for split in ("train", "validation", "test"):
        (disk / f"{split}.csv").write_text("old")
    fill(disk, free_bytes=2 * MEGABYTE)  # enough for the training set, not for all three
    with assert_disk_full_error(disk):
        dataset.main(["--archive", str(archive), "--data_dir", str(disk)])


def test_disk_full_while_downloading(disk):
    fill(disk, free_bytes=len(ARCHIVE_CONTENT) // 2)
    with MisbehavingServer(ARCHIVE_CONTENT, send_correctly) as server:
        before = folder_contents(disk)
        with pytest.raises(UserError, match=f"No space left on device .disk {disk}: "):
            download(remote_file(server), disk / "a.tar.gz")
        (disk / FILLER).unlink()
        assert set(folder_contents(disk)) == {".a.tar.gz.part"}
        assert before.keys() == {FILLER}
        download(remote_file(server), disk / "a.tar.gz")
    assert server.requests[1].startswith("bytes=")  # resumed
    assert (disk / "a.tar.gz").read_bytes() == ARCHIVE_CONTENT


@pytest.fixture
def command(data_dir, tmp_path):
    """Return the arguments of a small run, without those of its folders."""
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    return flags(model=tmp_path / "model", context_length=24, precision="fp32", num_epochs=2, checkpoint_minutes="1e-9")


def test_disk_full_while_writing_token_cache(disk, command, data_dir, tmp_path):
    for path in data_dir.glob("*.csv"):
        (disk / path.name).write_bytes(path.read_bytes())
    (disk / "token_cache").mkdir()
    fill(disk, free_bytes=4096)
    with assert_disk_full_error(disk):
        train_bert_hf.main([*command, "--data_dir", str(disk), "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_disk_full_before_a_run(disk, command, data_dir):
    fill(disk, free_bytes=MEGABYTE // 2)
    with assert_disk_full_error(disk):
        train_bert_hf.main([*command, "--data_dir", str(data_dir), "--output_dir", str(disk / "a" / "run")])
    with assert_disk_full_error(disk):
        train_sklearn_logreg.main(["--data_dir", str(data_dir), "--output_dir", str(disk / "run")])


def test_disk_full_while_writing_checkpoints_and_record(disk, command, data_dir, tmp_path, monkeypatch, capsys):
    """The run continues without new checkpoints, ends when it cannot write its record, and can be resumed."""
    command += ["--data_dir", str(data_dir)]
    train_bert_hf.main([*command, "--output_dir", str(tmp_path / "uninterrupted")])
    run = disk / "run"
    with monkeypatch.context() as patch:
        kill_after_step(patch, 3)
        with pytest.raises(Killed):
            train_bert_hf.main([*command, "--output_dir", str(run)])
    before = folder_contents(disk)
    write = checkpoint.write_checkpoint

    def write_on_a_full_disk(*arguments):
        if not (disk / FILLER).exists():
            fill(disk)
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_checkpoint", write_on_a_full_disk)
        with pytest.raises(UserError, match=f"cannot write to {run}: No space left on device .disk {disk}: "):
            train_bert_hf.main([*command, "--output_dir", str(run), "--resume"])
    assert f"Could not save a checkpoint after step 4: cannot write to {run}: No space left" in capsys.readouterr().err
    (disk / FILLER).unlink()
    assert folder_contents(disk) == before
    train_bert_hf.main([*command, "--output_dir", str(run), "--resume"])
    assert_same_results(run, tmp_path / "uninterrupted")


def test_disk_full_while_saving_the_model(disk, command, data_dir, monkeypatch):
    def save_on_a_full_disk(*arguments, **settings):
        fill(disk)
        save_model(*arguments, **settings)

    monkeypatch.setattr("finetuning.experiment.save_model", save_on_a_full_disk)
    run = disk / "run"
    with pytest.raises(UserError, match=f"cannot write to {run}: No space left on device"):
        train_bert_hf.main([*command, "--data_dir", str(data_dir), "--output_dir", str(run), "--save_model"])
    assert (run / "record.json").exists()
    assert not (run / "model").exists()
