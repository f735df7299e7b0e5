"""A trained model in its run's folder: `model/`, which --save_model writes and predict.py reads.

It holds a model's own files, all in formats that execute nothing when they are read, for an encoder
a model card (`README.md`) as the Hugging Face Hub expects it, and two more:
`sha256`, the digests of all others as the program `sha256sum` writes them, and `settings.json`, an
object with the keys

    family      which script wrote the model and reads it: "gpt", "encoder" or "linear"
    precision   "fp32", "tf32" or "bf16": of the arithmetic in which the test reviews were classified;
                null for scikit-learn

and those that the script adds, such as how many tokens of a review the model reads.
"""

import json
from pathlib import Path

from finetuning.cli import note
from finetuning.errors import UserError
from finetuning.files import folder_written_whole, sha256
from finetuning.filetypes import refuse_lfs_pointer
from finetuning.records import MODEL, read_record

SETTINGS, DIGESTS, CARD = "settings.json", "sha256", "README.md"
DATASET = "stanfordnlp/imdb"  # on the Hub


def save_model(run_folder, save, **settings):
    """Put a model into a run's folder, whole or not at all.

    `save(folder)` writes its files into a folder and returns the script's own settings.
    """
    with folder_written_whole(Path(run_folder) / MODEL) as folder:
        settings |= save(folder)
        if settings["family"] == "encoder":
            model_card(read_record(run_folder), settings).save(folder / CARD)
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
        (folder / DIGESTS).write_text("".join(lines), encoding="utf-8", newline="\n")
    note(f"Model: {Path(run_folder) / MODEL}")


def model_card(record, settings):
    """Return the huggingface_hub.ModelCard of a saved encoder; a record's run must be that of the model."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    base, accuracy, (low, high) = settings["base_model"], record["accuracy"]["test"], record["test_interval_95"]
    data = ModelCardData(
        language="en", library_name="transformers", pipeline_tag="text-classification", datasets=[DATASET],
        base_model=None if Path(base).exists() else base, model_name=record["name"],
        eval_results=[EvalResult(task_type="text-classification", dataset_type=DATASET, dataset_name="IMDb",
                                 metric_type="accuracy", metric_value=accuracy, dataset_split="test")])
    return ModelCard(f"""---
{data.to_yaml()}
---

# {record["name"]}

Classifies English movie reviews as negative or positive. It is `{Path(base).name if Path(base).exists() else base}`,
fine-tuned on the Large Movie Review Dataset (Maas et al., 2011) with this command:

    {record["command"]}

Accuracy on {record["reviews"]["test"]:,} test reviews: {accuracy:.2%} (95% interval {low:.2%} to {high:.2%}).
The split is the one of the command, not that of the dataset on the Hub.

    pipeline("text-classification", FOLDER)("A film to remember.", truncation=True)
""")


def read_settings(run_folder):
    """The folder of a run's model and its settings; raises UserError where there is none, or a file of it is damaged.
    """
    folder = Path(run_folder) / MODEL
    if not Path(run_folder).is_dir():
        raise UserError(f"there is no folder {run_folder}")
    if (Path(run_folder) / SETTINGS).is_file():
        raise UserError(f"{run_folder} is a run's model; name the run's folder: {Path(run_folder).resolve().parent}")
    if not folder.is_dir():
        raise UserError(f"{run_folder} holds no saved model; a training run with --save_model leaves one")
    refuse_lfs_pointer(folder / DIGESTS)
    try:
        digests = dict(reversed(line.split("  ")) for line in (folder / DIGESTS).read_text("utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / DIGESTS} is missing or damaged; train the model again") from error
    for name in digests | {SETTINGS: ""}:
        refuse_lfs_pointer(folder / name)
        if not (folder / name).is_file() or sha256(folder / name) != digests.get(name):
            raise UserError(f"{folder / name} is missing or not what was saved; train the model again")
    return folder, json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
