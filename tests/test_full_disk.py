"""A disk that is full, for real: a small one is mounted where the system lets us."""

import contextlib
import subprocess
import sys

import pytest
from conftest import TINY_CONFIGS, save_encoder
from local_server import MisbehavingServer
from test_bad_inputs import snapshot
from test_checkpoint import Killed, kill_after, same
from test_download import CONTENT, fine, official
from test_download_prepare_dataset import FOLDERS, make_archive

import download_prepare_dataset as dataset
import train_bert_hf
import train_sklearn_logreg
from finetuning import checkpoint
from finetuning.download import download
from finetuning.errors import UserError

FILLER = "filler"
MEGABYTE = 1 << 20


@pytest.fixture
def disk(tmp_path):
    """A disk of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here (that takes root on Linux)")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk, leave=0):
    """Fill the disk but for `leave` bytes."""
    with contextlib.suppress(OSError), open(disk / FILLER, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with open(disk / FILLER, "rb+") as file:
        file.truncate((disk / FILLER).stat().st_size - leave)


@contextlib.contextmanager
def refused(disk):
    """Check that the disk is named, and all files on it are as they were."""
    before = snapshot(disk)
    with pytest.raises(UserError, match=f"No space left on device .disk {disk}: "):
        yield
    assert snapshot(disk) == before


def test_while_the_csv_files_are_written(disk, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "REVIEWS_PER_FOLDER", 3)
    monkeypatch.setitem(dataset.PARTITIONS, "random", lambda rows: dataset.cut(rows, 6, 3, 3))
    archive = make_archive(tmp_path / "a.tar.gz", {f"{folder}/{i}_7.txt": b"long " * 60_000
                                                   for folder in FOLDERS for i in range(3)})
    for split in ("train", "validation", "test"):
        (disk / f"{split}.csv").write_text("old")
    fill(disk, leave=2 * MEGABYTE)  # room for the training set, and not for all three
    with refused(disk):
        dataset.main(["--archive", str(archive), "--data_dir", str(disk)])


def test_while_the_archive_is_downloaded(disk):
    fill(disk, leave=len(CONTENT) // 2)
    with MisbehavingServer(CONTENT, fine) as server:
        before = snapshot(disk)
        with pytest.raises(UserError, match=f"No space left on device .disk {disk}: "):
            download(official(server), disk / "a.tar.gz")
        (disk / FILLER).unlink()
        assert set(snapshot(disk)) == {".a.tar.gz.part"}
        assert before.keys() == {FILLER}
        download(official(server), disk / "a.tar.gz")
    assert server.requests[1].startswith("bytes=")  # what had come is not lost
    assert (disk / "a.tar.gz").read_bytes() == CONTENT


@pytest.fixture
def command(data_dir, tmp_path):
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    return ["--model", str(tmp_path / "model"), "--context_length", "24", "--precision", "fp32", "--num_epochs", "2",
            "--checkpoint_minutes", "1e-9", "--data_dir"]


def test_while_the_reviews_are_tokenized(disk, command, data_dir, tmp_path):
    for path in data_dir.glob("*.csv"):
        (disk / path.name).write_bytes(path.read_bytes())
    (disk / "token_cache").mkdir()
    fill(disk, leave=4096)
    with refused(disk):
        train_bert_hf.main([*command, str(disk), "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_before_a_run(disk, command, data_dir):
    fill(disk, leave=MEGABYTE // 2)
    with refused(disk):
        train_bert_hf.main([*command, str(data_dir), "--output_dir", str(disk / "a" / "run")])
    with refused(disk):
        train_sklearn_logreg.main(["--data_dir", str(data_dir), "--output_dir", str(disk / "run")])


def test_while_checkpoints_and_the_record_are_written(disk, command, data_dir, tmp_path, monkeypatch, capsys):
    """The run goes on without new checkpoints; without its record it ends, and can be resumed."""
    command.append(str(data_dir))
    train_bert_hf.main([*command, "--output_dir", str(tmp_path / "whole")])
    run = disk / "run"
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            train_bert_hf.main([*command, "--output_dir", str(run)])
    before = snapshot(disk)
    write = checkpoint.write

    def write_on_a_full_disk(*arguments):
        if not (disk / FILLER).exists():
            fill(disk)
        write(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", write_on_a_full_disk)
        with pytest.raises(UserError, match=f"cannot write to {run}: No space left on device .disk {disk}: "):
            train_bert_hf.main([*command, "--output_dir", str(run), "--resume"])
    assert f"No checkpoint after update 4: cannot write to {run}: No space left" in capsys.readouterr().err
    (disk / FILLER).unlink()
    assert snapshot(disk) == before
    train_bert_hf.main([*command, "--output_dir", str(run), "--resume"])
    same(run, tmp_path / "whole")
