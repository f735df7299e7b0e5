import errno

import pytest
from conftest import TINY_CONFIGS, save_encoder
from processes import end, start
from test_checkpoint import same

from finetuning import records
from finetuning.errors import UserError
from finetuning.files import LOCK, held, written_whole


def test_a_failed_write_leaves_the_old_files(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("old")
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "a", tmp_path / "b") as (a, b):
        a.write_text("new")
        b.write_text("half")
        raise ZeroDivisionError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "old"}


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    with written_whole(tmp_path / "a") as (left,):
        left.write_text("old")
    left.write_text("half")
    with written_whole(tmp_path / "a") as (temporary,):
        temporary.write_text("new") if temporary == left else pytest.fail("another name")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_in_trouble_is_named(tmp_path, number):
    with pytest.raises(UserError, match=rf"cannot write to {tmp_path}: .* \(disk /.*: [\d,]+ MB free of [\d,]+ MB\)"), \
            written_whole(tmp_path / "a"):
        raise OSError(number, "trouble")
    with pytest.raises(OSError, match="a bug"), written_whole(tmp_path / "a"):
        raise OSError(errno.EBADF, "a bug")


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    folder = tmp_path / "a" / "run"
    with held(folder, "--output_dir"):
        assert [path.name for path in folder.iterdir()] == [LOCK]
        with pytest.raises(UserError, match=f"another run is writing to {folder}; wait for it, or choose another"), \
                held(folder, "--output_dir"):
            pytest.fail("held twice")
        assert (folder / LOCK).exists()
    assert not (tmp_path / "a").exists()  # nothing came of it
    with held(folder, "--output_dir"):
        (folder / "record").write_text("x")
    assert [path.name for path in folder.iterdir()] == ["record"]


def test_a_lock_that_a_killed_run_left_holds_nobody_up(tmp_path):
    (tmp_path / LOCK).write_text("")
    with held(tmp_path, "--output_dir"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_runs_at_once(data_dir, tmp_path):
    """In one folder the second is refused; in folders of their own both share the cache of one data folder."""
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    command = ["--model", "model", "--context_length", "24", "--precision", "fp32", "--device", "cpu",
               "--num_epochs", "10", "--checkpoint_minutes", "1e-9", "--output_dir"]
    runs = [start("train_bert_hf", [*command, folder], tmp_path / f"log{i}", tmp_path)
            for i, folder in enumerate(["one", "one", "two"])]
    statuses = [end(run) for run in runs]
    assert sorted(statuses[:2]) == [0, 2]
    assert statuses[2] == 0
    refused = (tmp_path / f"log{statuses.index(2)}.err").read_text()
    assert refused == ("train_bert_hf.py: another run is writing to one; wait for it, or choose another --output_dir\n")
    same(tmp_path / "one", tmp_path / "two")
    assert records.read_record(tmp_path / "one")["accuracy"] == records.read_record(tmp_path / "two")["accuracy"]
