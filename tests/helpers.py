"""Command lines, runs, reviews and archives that several tests share."""

import io
import json
import os
import random
import tarfile
import tempfile
from pathlib import Path
from unittest import mock

import pandas as pd
import torch

import download_prepare_dataset as dataset
from finetuning.checkpoint import Checkpointer
from finetuning.data.reviews import SPLITS
from finetuning.reporting.records import PREDICTIONS, RECORD, read_record, write_record
from finetuning.reporting.tables import REVIEWS

REPOSITORY = Path(__file__).resolve().parents[1]
HUB_CACHE = Path(os.environ["HF_HOME"]) / "hub"

# Command lines and runs

FINAL_LOG_PATTERNS = [
    r"Training completed in \d+\.\d\d minutes\.",
    "",
    r"Evaluating on the full datasets \.\.\.",
    "",
    r"Training accuracy: \d+\.\d\d%",
    r"Validation accuracy: \d+\.\d\d%",
    r"Test accuracy: \d+\.\d\d%",
]


def flags(**values) -> list[str]:
    """Return a command line: flags(num_epochs=2, resume=True) is ["--num_epochs", "2", "--resume"]."""
    return [part for key, value in values.items() for part in (f"--{key}", *([] if value is True else [str(value)]))]


def tiny_gpt_flags(model_size: str, data_dir: Path, output_dir: Path) -> list[str]:
    """Return the command line of a run of the tiny GPT-2, whose size is `model_size`."""
    return flags(model_size=model_size, weights="random", data_dir=data_dir, context_length=16, output_dir=output_dir)


def load_task(script, *arguments):
    """Run a train script up to `finetune`; return (task, train, validation, test)."""
    with mock.patch.object(script, "finetune") as finetune, tempfile.TemporaryDirectory() as folder:
        script.main([*map(str, arguments), "--output_dir", folder])
    _, task, *datasets = finetune.call_args.args
    return task, *datasets


class Killed(Exception):
    """Simulated power cut."""


def kill_after_step(monkeypatch, step: int) -> None:
    """Raise Killed as soon as the checkpoint of a step is saved."""
    save = Checkpointer.save

    def save_and_die(self, state):
        save(self, state)
        if state.step == step:
            raise Killed

    monkeypatch.setattr(Checkpointer, "save", save_and_die)


def folder_contents(folder: Path) -> dict[str, bytes | None]:
    """Return the relative path of every file and folder below `folder` with its content, None for folders."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def assert_same_results(folder: Path, other: Path) -> None:
    """Assert that the losses, accuracies and predictions of two runs are equal."""
    record, expected = read_record(folder), read_record(other)
    for key in ("losses", "eval_history", "epoch_metrics", "accuracy"):
        assert record[key] == expected[key]
    assert (folder / PREDICTIONS).read_bytes() == (other / PREDICTIONS).read_bytes()


def example_record(**changes) -> dict:
    """Return a run's record without what `write_record` adds; `changes` replace values."""
    accuracies, seconds = dict.fromkeys(SPLITS, 0.75), {"training": 60.0, "evaluation": 30.0}
    return {
        "name": "example-seed123",
        "command": "python example.py",
        "arguments": {"data_dir": ".", "seed": 123},
        "hardware": "a CPU",
        "precision": None,
        "versions": {},
        "git_commit": None,
        "data": {f"{split}.csv": split for split in SPLITS},
        "parameters": {"total": 2, "trainable": 2},
        "losses": [0.9, 0.8, 0.7, 0.6],
        "eval_history": [
            {"step": 0, "train_loss": 0.9, "validation_loss": 0.95},
            {"step": 2, "train_loss": 0.7, "validation_loss": 0.8},
        ],
        "epoch_metrics": [],
        "accuracy": accuracies,
        "reviews": dict.fromkeys(SPLITS, 4),
        "seconds": seconds,
        "reviews_per_second": seconds,
        "peak_memory": None,
        **changes,
    }


def write_example_record(folder, probabilities=(0.9, 0.25, 1 / 3, 0.1), labels=(1, 0, 1, 0), **changes) -> None:
    """Write an example record whose accuracies are those of the test predictions."""
    correct = [(probability > 0.5) == label for probability, label in zip(probabilities, labels, strict=True)]
    accuracies = dict.fromkeys(SPLITS, sum(correct) / len(correct))
    counts = dict.fromkeys(SPLITS, len(correct))
    duplicated = [True, *[False] * (len(correct) - 1)]
    record = example_record(**{"accuracy": accuracies, "reviews": counts, **changes})
    write_record(folder, record, duplicated, labels, probabilities)


def write_sized_example(folder, accuracy: float, data_dir: str = ".", **changes) -> None:
    """Write an example record with this test accuracy and the numbers of reviews that the tables require."""
    accuracies = dict.fromkeys(SPLITS, accuracy)
    arguments = {"data_dir": data_dir, "seed": int(Path(folder).name.rpartition("seed")[2])}
    write_example_record(folder, reviews=REVIEWS[data_dir], accuracy=accuracies, **{"arguments": arguments, **changes})


# Reviews

FILLER_WORDS = ["the", "a", "film", "plot", "cast", "was", "is", "and", "not", "very"]
POSITIVE_WORDS, NEGATIVE_WORDS = ["good", "great", "fine"], ["bad", "poor", "dull"]
WORDS = [*FILLER_WORDS, *POSITIVE_WORDS, *NEGATIVE_WORDS]


def make_reviews(count: int, seed: int = 0) -> pd.DataFrame:
    """Return reviews of 3 to 30 words, one of which tells the label."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high):
        return int(torch.randint(high, (), generator=generator))

    rows = []
    for _ in range(count):
        label = draw(2)
        words = [FILLER_WORDS[draw(10)] for _ in range(2 + draw(28))]
        position = draw(len(words))
        words.insert(position, (POSITIVE_WORDS if label else NEGATIVE_WORDS)[draw(3)])
        rows.append((" ".join(words), label))
    return pd.DataFrame(rows, columns=["text", "label"])


def write_splits(folder: Path) -> None:
    """Write the three CSV files with 48, 16 and 20 reviews."""
    for seed, (split, count) in enumerate({"train": 48, "validation": 16, "test": 20}.items()):
        make_reviews(count, seed).to_csv(folder / f"{split}.csv", index=False)


# Archives of reviews

ARCHIVE_FOLDERS = ("test/pos", "test/neg", "train/pos", "train/neg")


def add_member(archive: tarfile.TarFile, name: str, content: bytes, **attributes) -> None:
    """Add a file to a tar archive; `attributes` are set on its TarInfo."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in attributes.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def make_archive(path, reviews, extra=(), root="aclImdb/"):
    """Write reviews {"folder/name": bytes} below `root` in random order, among members that are not reviews."""
    names = list(reviews)
    random.Random(0).shuffle(names)
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        add_member(archive, "aclImdb/README", b"about")
        add_member(archive, "aclImdb/train/unsup/0_0.txt", b"unlabelled")
        add_member(archive, "aclImdb/train/pos", b"", type=tarfile.DIRTYPE)
        add_member(archive, "/etc/train/pos/1_1.txt", b"absolute")
        add_member(archive, "aclImdb/../test/pos/1_1.txt", b"dots")
        add_member(archive, "aclImdb/test/pos/99999_9.txt", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        for name, content in extra:
            add_member(archive, name, content)
        for name in names:
            add_member(archive, f"{root}{name}", reviews[name])
    return path


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


def change_record(run, **values):
    """Replace values in the record of a run's folder."""
    record = json.loads((run / RECORD).read_text())
    (run / RECORD).write_text(json.dumps(record | values))
