import copy
import io
import json
import math
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
import transformers
from conftest import REPOSITORY, TINY_CONFIGS, reviews, save_encoder
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import predict
import train_bert_hf
import train_gpt
import train_sklearn_logreg
from finetuning import records
from finetuning.checkpoint import CHECKPOINT
from finetuning.errors import UserError
from finetuning.records import MODEL, PREDICTIONS
from finetuning.saved import DIGESTS, SETTINGS, model_card

ENCODER = ["--context_length", "16", "--learning_rate", "1e-3", "--precision", "fp32"]
GPT = [*ENCODER, "--learning_rate", "1e-2", "--weights", "random"]
# Every way of reading a class, with and without the padding and the mask, the head alone or all that learns.
RUNS = {
    "last": (train_gpt, [*GPT, "--trainable_layers", "all"]),
    "first": (train_gpt, [*GPT, "--trainable_token_pos", "first"]),
    "flexible": (train_gpt, [*GPT, "--trainable_token_pos", "flexible"]),
    "average": (train_gpt, [*GPT, "--average_embeddings"]),
    "head of a GPT": (train_gpt, [*GPT, "--trainable_layers", "last_layer"]),
    "bf16": (train_gpt, [*GPT, "--precision", "bf16"]),
    "distilbert": (train_bert_hf, ENCODER),
    "roberta": (train_bert_hf, ENCODER),
    "head of modernbert-base": (train_bert_hf, [*ENCODER, "--trainable_layers", "last_layer"]),
    "bert": (train_bert_hf, [*ENCODER, "--use_attention_mask", "false"]),
    "counts": (train_sklearn_logreg, []),
    "nb-ngrams": (train_sklearn_logreg, ["--features", "nb-ngrams"]),
}


@pytest.fixture
def saved_run(tiny_gpt, data_dir, tmp_path):
    """Train one of RUNS; returns its folder."""
    def train(name):
        script, flags = RUNS[name]
        model = {train_gpt: ["--model_size", tiny_gpt], train_sklearn_logreg: []}.get(script)
        if model is None:
            config = copy.deepcopy(TINY_CONFIGS[name.split()[-1]])
            config.initializer_range = 0.5  # as small as usual, so small a model would tell no two texts apart
            save_encoder(tmp_path / "encoder", config)
            model = ["--model", str(tmp_path / "encoder")]
        folder = tmp_path / "run"
        script.main([*model, *flags, "--data_dir", str(data_dir), "--output_dir", str(folder), "--save_model"])
        return folder
    return train


def answers_of(capsys, *arguments):
    """What predict.py prints: a list of (label, probability, beginning)."""
    capsys.readouterr()
    predict.main([str(argument) for argument in arguments])
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_the_test_reviews_get_the_probabilities_that_the_run_recorded(name, saved_run, data_dir, capsys, monkeypatch):
    folder = saved_run(name)
    if name == "bf16":  # whether the hardware gains by it is measured, and differs from moment to moment
        monkeypatch.setattr("finetuning.runtime.select_precision", lambda *_: ("bf16", "as asked"))
    recorded = records.read_predictions(folder, records.read_record(folder))["probability"]
    assert recorded.std() > 1e-3  # a model that tells all reviews the same would prove nothing
    texts = pd.read_csv(data_dir / "test.csv")["text"]
    assert texts.str.split().str.len().max() > 16  # some are cut
    rounding = 5e-3 if name == "bf16" else 2e-6
    for found in (answers_of(capsys, folder, "--csv", data_dir / "test.csv"), answers_of(capsys, folder, *texts)):
        assert [label for label, *_ in found] == ["positive" if p > 0.5 else "negative" for p in recorded]
        positive = [float(p) if label == "positive" else 1 - float(p) for label, p, _ in found]
        assert positive == pytest.approx(recorded.tolist(), abs=rounding)
        assert [beginning for *_, beginning in found] == [text[:80] for text in texts]
    alone = answers_of(capsys, folder, texts[0])
    assert float(alone[0][1]) == pytest.approx(float(found[0][1]), abs=rounding)


@pytest.mark.parametrize(("name", "head"), [("head of a GPT", "out_head"), ("head of modernbert-base", "classifier")])
def test_the_head_that_learned_alone_is_in_the_whole_model(name, head, saved_run, tiny_gpt, tmp_path):
    """What learned is saved as it ended, and the rest as it began."""
    tensors = load_file(saved_run(name) / MODEL / "model.safetensors")
    if name == "head of a GPT":
        before = train_gpt.instantiate_model(tiny_gpt, "random", seed=123)
        train_gpt.replace_head(before, seed=123)
    else:
        before, _ = train_bert_hf.load_model(str(tmp_path / "encoder"), seed=123)
    before = before.state_dict()
    assert before.keys() == tensors.keys()
    learned = {key for key, tensor in tensors.items() if not torch.equal(tensor, before[key])}
    assert learned == {f"{head}.weight", f"{head}.bias"}


@pytest.mark.parametrize("name", ["distilbert", "roberta"])
def test_a_saved_encoder_is_one_of_transformers(name, saved_run, data_dir):
    folder = saved_run(name)
    recorded = records.read_predictions(folder, records.read_record(folder))["probability"]
    classify = transformers.pipeline("text-classification", str(folder / MODEL))
    texts = pd.read_csv(data_dir / "test.csv")["text"].tolist()
    for text, positive in zip(texts, recorded, strict=True):
        answer = classify(text, truncation=True)[0]  # to the length it was trained with
        assert answer["label"] == ("positive" if positive > 0.5 else "negative")
        assert answer["score"] == pytest.approx(max(positive, 1 - positive), abs=1e-6)
    short = min(texts, key=len)
    assert classify(short) == classify(short, truncation=True)
    assert classify.model.config.label2id == {"negative": 0, "positive": 1}


def test_a_saved_encoder_has_a_model_card(saved_run):
    folder = saved_run("distilbert")
    record = records.read_record(folder)
    card = ModelCard.load(folder / MODEL / "README.md")
    assert card.data.base_model is None  # a local folder, not a model of the Hub
    assert "It is `encoder`," in card.text
    assert card.data.datasets == ["stanfordnlp/imdb"]
    assert card.data.pipeline_tag == "text-classification"
    result, = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", record["accuracy"]["test"])
    low, high = record["test_interval_95"]
    assert f"{record['accuracy']['test']:.2%} (95% interval {low:.2%} to {high:.2%})" in card.text
    assert record["command"] in card.text


def test_a_model_card_names_the_base_model_on_the_hub():
    record = {"name": "run", "command": "python train_bert_hf.py", "accuracy": {"test": 0.5},
              "test_interval_95": [0.4, 0.6], "reviews": {"test": 4}}
    card = model_card(record, {"base_model": "google-bert/bert-base-uncased"})
    assert card.data.base_model == "google-bert/bert-base-uncased"


@pytest.mark.parametrize(("name", "files"), [
    ("last", {"config.json", "model.safetensors", "tokenizer.tiktoken"}),
    ("distilbert", {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                    "README.md"}),
    ("nb-ngrams", {"vocabulary.json", "arrays.safetensors"})])
def test_what_is_saved_executes_nothing(name, files, saved_run):
    folder = saved_run(name) / MODEL
    assert {path.name for path in folder.iterdir()} == files | {SETTINGS, DIGESTS}
    if name == "last":
        config = json.loads((folder / "config.json").read_text())
        assert (config["emb_dim"], config["context_length"], config["n_layers"]) == (8, 64, 2)
        settings = json.loads((folder / SETTINGS).read_text())
        assert (settings["trainable_token_pos"], settings["average_embeddings"], settings["context_length"]) == (
            "last", False, 16)


@pytest.fixture
def counts(saved_run):
    return saved_run("counts")


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink()])
@pytest.mark.parametrize("file", ["arrays.safetensors", "vocabulary.json", SETTINGS, DIGESTS])
def test_a_damaged_file_is_noticed(damage, file, counts, failing):
    damage(counts / MODEL / file)
    message = failing(predict.main, counts, "good")
    assert str(counts / MODEL) in message
    assert file in message or file == DIGESTS  # a damaged digest makes its file look damaged


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum")
def test_the_digests_are_those_of_a_common_program(counts):
    subprocess.run(["sha256sum", "--check", "--strict", DIGESTS], cwd=counts / MODEL, check=True)


def test_a_run_without_a_model(tmp_path, failing):
    assert "holds no saved model; a training run with --save_model leaves one" in failing(predict.main, tmp_path, "a")
    assert failing(predict.main, tmp_path / "absent", "a").endswith(f"there is no folder {tmp_path / 'absent'}")


def test_the_models_folder_instead_of_the_runs(counts, failing):
    assert failing(predict.main, counts / MODEL, "a").endswith(f"is a run's model; name the run's folder: {counts}")


@pytest.mark.parametrize("file", [SETTINGS, DIGESTS, "arrays.safetensors"])
def test_a_saved_model_that_git_has_not_fetched(counts, failing, file):
    (counts / MODEL / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    assert f"{counts / MODEL / file} is a Git LFS pointer, not the file itself" in failing(predict.main, counts, "a")


def test_a_run_that_saves_no_model_removes_the_one_before(counts, data_dir, failing, capsys):
    assert (counts / MODEL).is_dir()
    train_sklearn_logreg.main(["--data_dir", str(data_dir), "--output_dir", str(counts)])
    capsys.readouterr()
    assert "holds no saved model" in failing(predict.main, counts, "good")


def test_a_failure_while_saving_leaves_no_model(saved_run, tmp_path, monkeypatch):
    def write_half(model, tokenizer, settings, folder):
        (folder / "config.json").write_text("{")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train_bert_hf, "save", write_half)
    with pytest.raises(UserError, match="No space"):
        saved_run("distilbert")
    # The checkpoint stays, so that --resume can save the model once there is room.
    assert {path.name for path in (tmp_path / "run").iterdir()} == {records.RECORD, PREDICTIONS, CHECKPOINT}


def test_reasons_by_hand(tmp_path, capsys):
    """Two reviews, words that tell opposite stories: of a text's pushes, each is a coefficient times a count."""
    for split in ("train", "validation", "test"):
        pd.DataFrame({"text": ["good plot", "bad plot"], "label": [1, 0]}).to_csv(tmp_path / f"{split}.csv")
    train_sklearn_logreg.main(["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "run"), "--save_model"])
    (label, probability, _), *lines = answers_of(capsys, tmp_path / "run", "good good plot, unheard of", "--explain")
    # By symmetry "plot" and the intercept weigh 0, and "good" w = -"bad"; the loss's gradient is 0 where
    # w = sigmoid(-w) for the two texts of one class each: w = 0.401058.
    weight = 0.401058
    assert weight == pytest.approx(1 / (1 + math.exp(weight)), abs=1e-6)
    assert (label, float(probability)) == ("positive", pytest.approx(1 / (1 + math.exp(-2 * weight)), abs=1e-4))
    assert lines[1] == ["", "positive: good +0.80"]
    assert lines[2] == ["", "all 2 together +0.80, with any text's +0.00: log-odds +0.80"]


def test_reasons_of_ngrams_are_spelled_out(saved_run, capsys):
    folder = saved_run("nb-ngrams")
    texts = reviews(3, seed=9)["text"]
    words = set(" ".join(texts).split())
    lines = answers_of(capsys, folder, *texts, "--explain")
    assert len(lines) == 3 * 4
    for text, (label, probability, _), positive, total in zip(texts, lines[::4], lines[2::4], lines[3::4], strict=True):
        log_odds = float(total[1].split()[-1])
        positive_probability = float(probability) if label == "positive" else 1 - float(probability)
        assert 1 / (1 + math.exp(-log_odds)) == pytest.approx(positive_probability, abs=5e-3)
        names = [push.rpartition(" ")[0] for push in positive[1].removeprefix("positive: ").split(", ")]
        assert any(" " in name for name in names)
        assert all(name in text and set(name.split()) <= words for name in names)


def test_only_a_linear_model_gives_reasons(saved_run, failing, capsys):
    folder = saved_run("last")
    capsys.readouterr()
    assert "--explain needs a linear model" in failing(predict.main, folder, "good", "--explain")


def test_lines_of_standard_input(counts, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a good\tfilm\n\n  a dull film \n"))
    first, blank, second = answers_of(capsys, counts)
    assert (first[2], blank, second[2]) == ("a good film", [""], "a dull film")


def test_blank_lines_keep_their_place_wherever_they_are(counts, capsys, monkeypatch):
    monkeypatch.setattr(predict, "CHUNK", 2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n \t\n\na good film\n\n"))
    blank, film = [""], ["positive"]
    assert [line[:1] for line in answers_of(capsys, counts)] == [blank, blank, blank, film, blank]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert answers_of(capsys, counts, "--explain") == [blank]


@pytest.mark.parametrize("settings", [{"PYTHONIOENCODING": "cp1252"}, {"PYTHONIOENCODING": "ascii"},
                                      {"PYTHONIOENCODING": "cp932:strict"},
                                      {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_any_console_shows_every_review(settings, counts, tmp_path):
    """What it cannot show comes escaped; standard input, with a byte order mark, and arguments are UTF-8 all the same.
    """
    texts = ["good caf\u00e9", "\u6620\u753b good", "good \N{GRINNING FACE} \u0435"]
    (tmp_path / "a.csv").write_text("text\n" + "\n".join(texts), encoding="utf-8")
    code = """if True:
        import sys, predict
        from finetuning.cli import run
        folder, csv, *texts = sys.argv[1:]
        run(lambda: [predict.main([folder, *arguments]) for arguments in (["--csv", csv], texts, [])])
    """
    done = subprocess.run([sys.executable, "-c", code, counts, tmp_path / "a.csv", *texts], cwd=REPOSITORY,
                          env={**os.environ, "PYTHONIOENCODING": "", **settings},
                          input="\n".join(texts).encode("utf-8-sig"), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    encoding = settings.get("PYTHONIOENCODING", "ascii").partition(":")[0]
    assert [line.split("\t")[2] for line in done.stdout.decode(encoding).splitlines()] == 3 * [
        text.encode(encoding, "backslashreplace").decode(encoding) for text in texts]


def test_texts_come_in_pieces_and_in_their_order(counts, data_dir, capsys, monkeypatch):
    whole = answers_of(capsys, counts, "--csv", data_dir / "train.csv")
    for module in (predict, sys.modules["finetuning.reviews"]):
        monkeypatch.setattr(module, "CHUNK", 7)
    assert answers_of(capsys, counts, "--csv", data_dir / "train.csv") == whole
    assert answers_of(capsys, counts, *pd.read_csv(data_dir / "train.csv")["text"]) == whole


def test_what_cannot_be_read(counts, tmp_path, failing, monkeypatch, capsys):
    capsys.readouterr()
    assert "cannot read --csv nowhere.csv" in failing(predict.main, counts, "--csv", "nowhere.csv")
    (tmp_path / "a.csv").write_text("review\ngood\n")
    assert "a.csv has no column text" in failing(predict.main, counts, "--csv", tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("text,label\ngood,3\n")  # the labels are not looked at
    assert len(answers_of(capsys, counts, "--csv", tmp_path / "a.csv")) == 1
    assert "a text is empty" in failing(predict.main, counts, "good", " ")
    assert "choose one" in failing(predict.main, counts, "good", "--csv", tmp_path / "a.csv")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert "standard input is not in UTF-8" in failing(predict.main, counts)
    monkeypatch.setattr(sys, "stdin", None)
    assert "no text is given, and standard input is closed" in failing(predict.main, counts)


@pytest.mark.skipif(sys.platform == "win32", reason="arguments are Unicode there")
def test_an_argument_that_is_not_utf_8(counts, failing):
    assert "a text is not in UTF-8" in failing(predict.main, counts, os.fsdecode(b"caf\xe9"))


def test_a_linear_model_needs_no_torch(counts):
    code = f"import sys, predict; predict.main([{str(counts)!r}, 'good']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no broken pipes")
def test_a_reader_that_has_seen_enough(counts, data_dir):
    command = [sys.executable, "predict.py", str(counts)]
    run = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE)
    run.stdout.close()
    run.stdin.write(b"good film\n" * 10)
    run.stdin.close()
    assert (run.stderr.read(), run.wait()) == (b"", 141)
    run.stderr.close()
