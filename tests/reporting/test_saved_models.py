import json
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import predict
import train_bert_hf
import train_gpt
import train_sklearn_logreg
from finetuning.checkpoint import CHECKPOINT
from finetuning.reporting import records
from finetuning.reporting.records import MODEL, PREDICTIONS
from finetuning.reporting.saved_models import DIGESTS, SETTINGS, model_card, read_settings, save_model
from finetuning.system.errors import UserError


@pytest.mark.parametrize(("name", "head"), [("head of a GPT", "out_head"), ("head of modernbert-base", "classifier")])
def test_model_with_only_its_head_trained_is_saved_completely(name, head, saved_run, tiny_gpt, tmp_path):
    """The saved model has the trained head and the initial weights of all other layers."""
    tensors = load_file(saved_run(name) / MODEL / "model.safetensors")
    if name == "head of a GPT":
        before = train_gpt.instantiate_model(tiny_gpt, "random", seed=123)
        train_gpt.replace_head(before, seed=123)
    else:
        before, _ = train_bert_hf.load_pretrained(str(tmp_path / "encoder"), seed=123)
    before = before.state_dict()
    assert before.keys() == tensors.keys()
    changed = {key for key, tensor in tensors.items() if not torch.equal(tensor, before[key])}
    assert changed == {f"{head}.weight", f"{head}.bias"}


@pytest.mark.parametrize("name", ["distilbert", "roberta"])
def test_saved_encoder_loads_as_a_transformers_pipeline(name, saved_run, data_dir):
    folder = saved_run(name)
    recorded = records.read_predictions(folder, records.read_record(folder))["probability"]
    classify = transformers.pipeline("text-classification", str(folder / MODEL))
    texts = pd.read_csv(data_dir / "test.csv")["text"].tolist()
    for text, positive in zip(texts, recorded, strict=True):
        prediction = classify(text, truncation=True)[0]  # to the training length
        assert prediction["label"] == ("positive" if positive > 0.5 else "negative")
        assert prediction["score"] == pytest.approx(max(positive, 1 - positive), abs=1e-6)
    short = min(texts, key=len)
    assert classify(short) == classify(short, truncation=True)
    assert classify.model.config.label2id == {"negative": 0, "positive": 1}


def test_saved_encoder_has_a_model_card(saved_run):
    folder = saved_run("distilbert")
    record = records.read_record(folder)
    card = ModelCard.load(folder / MODEL / "README.md")
    assert card.data.base_model is None  # a local folder, not a model of the Hub
    assert "It is `encoder`," in card.text
    assert card.data.datasets == ["stanfordnlp/imdb"]
    assert card.data.pipeline_tag == "text-classification"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", record["accuracy"]["test"])
    low, high = record["test_interval_95"]
    assert f"{record['accuracy']['test']:.2%} (95% interval {low:.2%} to {high:.2%})" in card.text
    assert record["command"] in card.text


def test_model_card_names_the_base_model_on_the_hub():
    record = {
        "name": "run",
        "command": "python train_bert_hf.py",
        "accuracy": {"test": 0.5},
        "test_interval_95": [0.4, 0.6],
        "reviews": {"test": 4},
    }
    card = model_card(record, {"base_model": "google-bert/bert-base-uncased"})
    assert card.data.base_model == "google-bert/bert-base-uncased"


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("last", {"config.json", "model.safetensors", "tokenizer.tiktoken"}),
        ("distilbert", {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}),
        ("nb-ngrams", {"vocabulary.json", "arrays.safetensors"}),
    ],
)
def test_saved_model_holds_only_json_and_safetensors_files(name, files, saved_run):
    folder = saved_run(name) / MODEL
    assert {path.name for path in folder.iterdir()} == files | {SETTINGS, DIGESTS}
    if name == "last":
        config = json.loads((folder / "config.json").read_text())
        assert (config["emb_dim"], config["context_length"], config["n_layers"]) == (8, 64, 2)
        settings = json.loads((folder / SETTINGS).read_text())
        assert (settings["trainable_token_pos"], settings["average_embeddings"], settings["context_length"]) == (
            "last",
            False,
            16,
        )


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("file", ["arrays.safetensors", "vocabulary.json", SETTINGS, DIGESTS])
def test_damaged_model_file_is_detected(damage, file, counts_run, failing):
    damage(counts_run / MODEL / file)
    message = failing(predict.main, counts_run, "good")
    assert str(counts_run / MODEL) in message
    assert file in message or file == DIGESTS  # a damaged digest makes its file look damaged


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum")
def test_digests_can_be_checked_with_sha256sum(counts_run):
    subprocess.run(["sha256sum", "--check", "--strict", DIGESTS], cwd=counts_run / MODEL, check=True)


def test_digests_cover_files_in_subfolders(counts_run, failing):
    """Transformers saves several chat templates in a folder."""

    def save(folder):
        (folder / "templates").mkdir()
        (folder / "templates" / "a.jinja").write_text("a")
        return {"model_type": "linear"}

    save_model(counts_run, save)
    folder, _ = read_settings(counts_run)
    assert "  templates/a.jinja\n" in (folder / DIGESTS).read_text()
    (folder / "templates" / "a.jinja").write_text("b")
    with pytest.raises(UserError, match=r"a\.jinja is missing or not what was saved"):
        read_settings(counts_run)


def test_run_without_a_saved_model_is_reported(tmp_path, failing):
    assert "holds no saved model; run its training command again with --save_model" in failing(
        predict.main, tmp_path, "a"
    )
    assert failing(predict.main, tmp_path / "absent", "a").endswith(f"there is no folder {tmp_path / 'absent'}")


def test_error_for_the_model_folder_names_the_run_folder(counts_run, failing):
    assert failing(predict.main, counts_run / MODEL, "a").endswith(
        f"is a run's model; name the run's folder: {counts_run}"
    )


@pytest.mark.parametrize("file", [SETTINGS, DIGESTS, "arrays.safetensors"])
def test_git_lfs_pointer_is_reported(counts_run, failing, file):
    (counts_run / MODEL / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    assert f"{counts_run / MODEL / file} is a Git LFS pointer, not the file itself" in failing(
        predict.main, counts_run, "a"
    )


def test_run_without_save_model_removes_the_previous_model(counts_run, data_dir, failing, capsys):
    assert (counts_run / MODEL).is_dir()
    train_sklearn_logreg.main(["--data_dir", str(data_dir), "--output_dir", str(counts_run)])
    capsys.readouterr()
    assert "holds no saved model" in failing(predict.main, counts_run, "good")


def test_failure_while_saving_leaves_no_model(saved_run, tmp_path, monkeypatch):
    def write_half(model, tokenizer, padding, folder):
        (folder / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_bert_hf, "save", write_half)
    with pytest.raises(UserError, match="No space"):
        saved_run("distilbert")
    # The checkpoint stays, so that --resume can save the model when the disk has space.
    assert {path.name for path in (tmp_path / "run").iterdir()} == {records.RECORD, PREDICTIONS, CHECKPOINT}
