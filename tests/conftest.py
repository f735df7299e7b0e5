"""Fixtures, and an environment without network access or the user's caches."""

import json
import os
import shutil
import signal
import socket
import sys
import tempfile

# The Hub's client reads these when it is imported.
_home = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = _home.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
# TorchScript, in which some versions of Transformers compute DeBERTa's positions, refuses simulated tensors.
os.environ["PYTORCH_JIT"] = "0"
# Background jobs of a shell and of nohup ignore these signals, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side, each with threads for all cores, slow each other down
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

import pytest  # noqa: E402
import tiktoken  # noqa: E402
import tiny_gpt as tiny  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from bad_inputs import SCRIPTS, command  # noqa: E402
from helpers import ARCHIVE_FOLDERS, HUB_CACHE, Killed, flags, folder_contents, kill_after_step, write_splits  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from saved_runs import train_and_save  # noqa: E402
from tiny_models import TINY_CONFIGS, TINY_GPT2_CONFIG, save_encoder, tiny_gpt2_tensors  # noqa: E402

import download_prepare_dataset as dataset  # noqa: E402
import gpt_download  # noqa: E402
import train_bert_hf  # noqa: E402
import train_gpt  # noqa: E402
from finetuning import checkpoint, cli  # noqa: E402

transformers.logging.disable_progress_bar()


def pytest_make_parametrize_id(val, argname):
    """Name bytes by their argument: compressed content holds the time, and parallel workers must agree on the names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Fail a test that connects to another machine."""
    connect = socket.socket.connect

    def connect_locally(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            pytest.fail(f"the test connected to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)


@pytest.fixture(autouse=True)
def no_gpu(request, monkeypatch):
    """Hide this machine's GPUs from all tests but those of test_cuda.py, so that results do not depend on them."""
    if request.module.__name__ != "test_cuda":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        for module in (torch.cuda, torch.mps):
            monkeypatch.setattr(module, "device_count", lambda: 0)
        for module in (torch.cuda, torch.backends.mps):
            monkeypatch.setattr(module, "is_available", lambda: False)


@pytest.fixture
def data_dir(tmp_path):
    """Return a folder with the three CSV files."""
    write_splits(tmp_path)
    return tmp_path


def small_partition(reviews):
    shuffled = dataset.shuffle(reviews)
    return [shuffled[:6], shuffled[6:9], shuffled[9:]]


@pytest.fixture
def small_dataset(monkeypatch):
    """Return three reviews per folder, {path: content}, and split them into 6, 3 and 3."""
    monkeypatch.setattr(dataset, "REVIEWS_PER_FOLDER", 3)
    monkeypatch.setitem(dataset.PARTITIONS, "random", small_partition)
    return {f"{folder}/{i}_7.txt": f"{folder} {i}".encode() for folder in ARCHIVE_FOLDERS for i in range(3)}


@pytest.fixture
def hub_snapshot():
    """Return a function that adds a repository's snapshot folder to the Hub cache; empty the cache afterwards."""
    created = []

    def make(repository):
        root = HUB_CACHE / f"models--{repository.replace('/', '--')}"
        snapshot = root / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("0" * 40)
        created.append(root)
        return snapshot

    yield make
    for root in created:
        for path in sorted(root.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        root.rmdir()


@pytest.fixture
def byte_tokenizer(monkeypatch):
    """Replace GPT-2's tokenizer, which would have to be downloaded, by one of bytes."""
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": tiny.byte_encoding()}.__getitem__)


@pytest.fixture
def tiny_gpt(monkeypatch, byte_tokenizer):
    """Add a tiny model size to train_gpt; return its name."""
    monkeypatch.setitem(train_gpt.MODEL_CONFIGS, tiny.SIZE, tiny.CONFIG)
    monkeypatch.setitem(train_gpt.BASE_CONFIG, "context_length", tiny.CONTEXT_LENGTH)
    return tiny.SIZE


@pytest.fixture
def saved_run(tiny_gpt, data_dir):
    """Return a function that trains one of `saved_runs.RUNS` and returns its folder."""
    return lambda name: train_and_save(name, tiny_gpt, data_dir)


@pytest.fixture
def counts_run(saved_run):
    """Return the folder of a run that saved a logistic regression on word counts."""
    return saved_run("counts")


@pytest.fixture
def resumable_command(data_dir, tmp_path):
    """Return the arguments of a small run with dropout that saves a checkpoint after every step."""
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    return flags(
        model=tmp_path / "model",
        data_dir=data_dir,
        num_epochs=2,
        eval_freq=2,
        learning_rate=1e-3,
        context_length=24,
        precision="fp32",
        checkpoint_minutes="1e-9",
    )


@pytest.fixture
def interrupted(resumable_command, tmp_path, monkeypatch):
    """Interrupt a run after step 3; return its two checkpoints and the arguments that resume it."""
    resumable_command += ["--output_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        kill_after_step(patch, 3)
        with pytest.raises(Killed):
            train_bert_hf.main(resumable_command)
    return *checkpoint.checkpoint_paths(tmp_path / "run"), [*resumable_command, "--resume"]


@pytest.fixture(scope="session")
def valid_input_folder(tmp_path_factory):
    """Return a folder of valid inputs: data, a tiny encoder, a tiny GPT-2."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "data").mkdir()
    write_splits(folder / "data")
    (folder / "train.csv").write_text("not a folder")
    save_encoder(folder / "model", TINY_CONFIGS["bert"])
    (folder / "models" / "0M").mkdir(parents=True)
    (folder / "models" / "0M" / "config.json").write_text(json.dumps(TINY_GPT2_CONFIG))
    save_file(
        {name: torch.from_numpy(array) for name, array in tiny_gpt2_tensors().items()},
        folder / "models" / "0M" / "model.safetensors",
    )
    return folder


@pytest.fixture
def input_folder(valid_input_folder, tmp_path, monkeypatch, tiny_gpt):
    """Change to a copy of the valid inputs; return it."""
    copy = shutil.copytree(valid_input_folder, tmp_path / "inputs")
    monkeypatch.setitem(train_gpt.MODEL_CONFIGS, tiny_gpt, {"emb_dim": 4, "n_layers": 2, "n_heads": 2})
    monkeypatch.setitem(gpt_download.REPOSITORIES, "0M", "someone/tiny")
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def assert_refused(input_folder, monkeypatch, capfd):
    """Return a function that asserts that a bad input ends in one line of error and status 2 and changes no file."""

    def run(bad, script):
        if bad.prepare:
            bad.prepare(input_folder)
        before = folder_contents(input_folder)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *command(script, bad.arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            cli.run_main(SCRIPTS[script].main)
        out, err = capfd.readouterr()
        assert exit_info.value.code == 2
        assert out == ""
        assert "Traceback" not in err
        assert err.splitlines()[-1].startswith(f"{script}.py: ")
        assert bad.message in err.splitlines()[-1]
        assert folder_contents(input_folder) == before

    return run


@pytest.fixture
def failing(monkeypatch, capsys):
    """Return a function that runs a script's main, asserts exit status 2 and returns the single line of its error."""

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            cli.run_main(main)
        assert exit_info.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return run
