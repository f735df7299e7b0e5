"""A trained model in its run's folder: `model/`, written by --save_model and read by predict.py.

It holds the model's own files, in formats that execute nothing when they are loaded; for an encoder, a
model card (`README.md`) in the format of the Hugging Face Hub; `sha256`, the digests of all other files
in the format of the program `sha256sum`; and `settings.json`, an object with the keys

    model_type  "gpt", "encoder" or "linear": the script that wrote the model
    precision   "fp32", "tf32" or "bf16", as in the evaluation on the test set; null for scikit-learn
    hardware    as in the record; null for scikit-learn
    skip_padding  whether linear layers skipped the padding on a CPU; absent for scikit-learn

and the script's own, such as the number of tokens that the model reads.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.reporting.records import MODEL, read_record
from finetuning.system.console import print_status
from finetuning.system.errors import UserError
from finetuning.system.files import atomic_write_dir, sha256
from finetuning.system.filetypes import refuse_lfs_pointer

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

SETTINGS, DIGESTS, CARD = "settings.json", "sha256", "README.md"
DATASET = "stanfordnlp/imdb"  # on the Hub


def save_model(run_folder: str | Path, save: Callable[[Path], dict], **settings: Any) -> None:
    """Save a model in its run's folder, atomically.

    `save(folder)` writes the model's files and returns the script's own settings.
    """
    with atomic_write_dir(Path(run_folder) / MODEL) as folder:
        settings |= save(folder)
        if settings["model_type"] == "encoder":
            model_card(read_record(run_folder), settings).save(folder / CARD)
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        files = sorted(path for path in folder.rglob("*") if path.is_file())  # chat templates are in a subfolder
        lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
        (folder / DIGESTS).write_text("".join(lines), encoding="utf-8", newline="\n")
    print_status(f"Model: {Path(run_folder) / MODEL}")


def model_card(record: dict, settings: dict) -> "ModelCard":
    """Return the huggingface_hub.ModelCard of a saved encoder from its run's record."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    base, accuracy, (low, high) = settings["base_model"], record["accuracy"]["test"], record["test_interval_95"]
    is_folder = Path(base).exists()
    data = ModelCardData(
        language="en",
        library_name="transformers",
        pipeline_tag="text-classification",
        datasets=[DATASET],
        base_model=None if is_folder else base,
        model_name=record["name"],
        eval_results=[
            EvalResult(
                task_type="text-classification",
                dataset_type=DATASET,
                dataset_name="IMDb",
                metric_type="accuracy",
                metric_value=accuracy,
                dataset_split="test",
            )
        ],
    )
    return ModelCard(f"""---
{data.to_yaml()}
---

# {record["name"]}

This model classifies English movie reviews as negative or positive. It is `{Path(base).name if is_folder else base}`,
fine-tuned on the Large Movie Review Dataset (Maas et al., 2011) with this command:

    {record["command"]}

Accuracy on {record["reviews"]["test"]:,} test reviews: {accuracy:.2%} (95% interval {low:.2%} to {high:.2%}).
The test set is that of the command's --data_dir, which may differ from the test split of the dataset on the Hub.

    pipeline("text-classification", FOLDER)("A film to remember.", truncation=True)
""")


def read_settings(run_folder: str | Path) -> tuple[Path, dict]:
    """Return (folder, settings) of a run's saved model; raise UserError if a file is missing or damaged."""
    folder = Path(run_folder) / MODEL
    if not Path(run_folder).is_dir():
        raise UserError(f"there is no folder {run_folder}")
    if (Path(run_folder) / SETTINGS).is_file():
        raise UserError(f"{run_folder} is a run's model; name the run's folder: {Path(run_folder).resolve().parent}")
    if not folder.is_dir():
        raise UserError(f"{run_folder} holds no saved model; run its training command again with --save_model")
    refuse_lfs_pointer(folder / DIGESTS)
    try:
        lines = [line.split("  ") for line in (folder / DIGESTS).read_text("utf-8").splitlines()]
        digests = {name: digest for digest, name in lines}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / DIGESTS} is missing or damaged; train the model again") from error
    for name in digests | {SETTINGS: ""}:
        refuse_lfs_pointer(folder / name)
        if not (folder / name).is_file() or sha256(folder / name) != digests.get(name):
            raise UserError(f"{folder / name} is missing or not what was saved; train the model again")
    return folder, json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
