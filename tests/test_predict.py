import copy
import io
import math
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from helpers import REPOSITORY, flags, make_reviews
from saved_runs import RUNS
from tiny_models import TINY_CONFIGS, save_encoder

import predict
import train_bert_hf
import train_gpt
import train_sklearn_logreg
from finetuning.reporting import records
from finetuning.reporting.saved_models import read_settings


def printed_predictions(capsys, *arguments):
    """Run predict.py; return the fields of each printed line: label, probability, beginning of the text."""
    capsys.readouterr()
    predict.main([str(argument) for argument in arguments])
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_test_reviews_get_the_recorded_probabilities(name, saved_run, data_dir, capsys, monkeypatch):
    folder = saved_run(name)
    if name == "bf16":  # measured on the hardware otherwise, which varies
        monkeypatch.setattr("finetuning.performance.device.select_precision", lambda *_: ("bf16", "as requested"))
    recorded = records.read_predictions(folder, records.read_record(folder))["probability"]
    assert recorded.std() > 1e-3  # predictions differ between reviews
    texts = pd.read_csv(data_dir / "test.csv")["text"]
    assert texts.str.split().str.len().max() > 16  # some are truncated
    tolerance = 5e-3 if name == "bf16" else 2e-6
    for lines in (
        printed_predictions(capsys, folder, "--csv", data_dir / "test.csv"),
        printed_predictions(capsys, folder, *texts),
    ):
        assert [label for label, *_ in lines] == ["positive" if p > 0.5 else "negative" for p in recorded]
        positive = [float(p) if label == "positive" else 1 - float(p) for label, p, _ in lines]
        assert positive == pytest.approx(recorded.tolist(), abs=tolerance)
        assert [preview for *_, preview in lines] == [text[:80] for text in texts]
    single = printed_predictions(capsys, folder, texts[0])
    assert float(single[0][1]) == pytest.approx(float(lines[0][1]), abs=tolerance)


# Every pooling of a GPT, and two encoders, one without dropout.
MODELS = {
    "last": [],
    "first": ["--trainable_token_pos", "first"],
    "flexible": ["--trainable_token_pos", "flexible"],
    "average": ["--average_embeddings"],
    "flexible average": ["--trainable_token_pos", "flexible", "--average_embeddings"],
    "modernbert-base": [],
    "bert": [],
}


@pytest.fixture(scope="module")
def tiny_encoders(tmp_path_factory):
    """{name: folder} of tiny encoders whose predictions differ between texts."""
    folders = {}
    for name in ("modernbert-base", "bert"):
        config = copy.deepcopy(TINY_CONFIGS[name])
        config.initializer_range = 0.5
        folders[name] = tmp_path_factory.mktemp("encoders") / "encoder"
        save_encoder(folders[name], config)
    return folders


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layers", ["last_layer", "last_block", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_classifier_reproduces_the_recorded_probabilities(
    name, layers, precision, tiny_gpt, tiny_encoders, data_dir, monkeypatch
):
    """Training caches the outputs of frozen layers over two epochs; prediction computes them again."""
    monkeypatch.setattr("finetuning.experiment.plot_run", lambda folder: None)
    monkeypatch.setattr("finetuning.performance.device.cpu_bf16_speedup", lambda: 0.5)  # "auto" would choose fp32
    command = [*MODELS[name], "--group_by_length", "--save_model"]
    command += flags(trainable_layers=layers, precision=precision, num_epochs=2, learning_rate=1e-2, batch_size=16)
    command += flags(context_length=16, data_dir=data_dir, output_dir=data_dir / "run")
    if name in tiny_encoders:
        train_bert_hf.main(["--model", str(tiny_encoders[name]), *command])
    else:
        monkeypatch.setattr("train_gpt.instantiate_model", lambda *_: large_weight_gpt(tiny_gpt))
        train_gpt.main(["--model_size", tiny_gpt, *command])
    recorded = records.read_predictions(data_dir / "run", records.read_record(data_dir / "run"))["probability"]
    assert recorded.std() > 1e-3
    folder, settings = read_settings(data_dir / "run")
    script = train_bert_hf if name in tiny_encoders else train_gpt
    classifier = predict.NeuralClassifier(script, folder, settings, "cpu")
    assert classifier.classifier.precision == precision
    assert classifier(pd.read_csv(data_dir / "test.csv")["text"].tolist()) == pytest.approx(recorded, abs=1e-6)


def large_weight_gpt(size):
    """Return a GPT with large random weights, which make rounding differences visible, as of GELU in bf16."""
    torch.manual_seed(0)
    model = train_gpt.GPTModel(train_gpt.load_config(size))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_contributions_match_a_hand_computation(tmp_path, capsys):
    """Each contribution is a coefficient times a count."""
    for split in ("train", "validation", "test"):
        pd.DataFrame({"text": ["good plot", "bad plot"], "label": [1, 0]}).to_csv(tmp_path / f"{split}.csv")
    train_sklearn_logreg.main(["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "run"), "--save_model"])
    (label, probability, _), *lines = printed_predictions(
        capsys, tmp_path / "run", "good good plot, unheard of", "--explain"
    )
    # By symmetry "plot" and the intercept have the coefficient 0, and "good" has w where "bad" has -w. The gradient
    # of the loss is 0 if w = sigmoid(-w), with one text of each class: w = 0.401058.
    weight = 0.401058
    assert weight == pytest.approx(1 / (1 + math.exp(weight)), abs=1e-6)
    assert (label, float(probability)) == ("positive", pytest.approx(1 / (1 + math.exp(-2 * weight)), abs=1e-4))
    assert lines[1] == ["", "positive: good +0.80"]
    assert lines[2] == ["", "all 2 features +0.80, intercept +0.00: log-odds +0.80"]


def test_contributions_of_ngrams_name_their_words(saved_run, capsys):
    folder = saved_run("nb-ngrams")
    texts = make_reviews(3, seed=9)["text"]
    words = set(" ".join(texts).split())
    lines = printed_predictions(capsys, folder, *texts, "--explain")
    assert len(lines) == 3 * 4
    for text, (label, probability, _), positive, total in zip(texts, lines[::4], lines[2::4], lines[3::4], strict=True):
        log_odds = float(total[1].split()[-1])
        positive_probability = float(probability) if label == "positive" else 1 - float(probability)
        assert 1 / (1 + math.exp(-log_odds)) == pytest.approx(positive_probability, abs=5e-3)
        names = [contribution.rpartition(" ")[0] for contribution in positive[1].removeprefix("positive: ").split(", ")]
        assert any(" " in name for name in names)
        assert all(name in text and set(name.split()) <= words for name in names)


def test_explain_is_refused_for_a_neural_model(saved_run, failing, capsys):
    folder = saved_run("last")
    capsys.readouterr()
    assert "--explain needs a linear model" in failing(predict.main, folder, "good", "--explain")


def test_standard_input_is_classified_by_line(counts_run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a good\tfilm\n\n  a dull film \n"))
    first, blank, second = printed_predictions(capsys, counts_run)
    assert (first[2], blank, second[2]) == ("a good film", [""], "a dull film")


def test_standard_input_gives_the_prediction_of_an_argument(saved_run, capsys, monkeypatch):
    """A line end would be one more token, at which this model's logits are read."""
    folder = saved_run("flexible")
    capsys.readouterr()
    from_argument = printed_predictions(capsys, folder, "a good film")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a good film\n"))
    assert printed_predictions(capsys, folder) == from_argument


def test_blank_input_lines_give_blank_output_lines(counts_run, capsys, monkeypatch):
    monkeypatch.setattr(predict, "TEXTS_PER_CHUNK", 2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n \t\n\na good film\n\n"))
    blank, film = [""], ["positive"]
    assert [line[:1] for line in printed_predictions(capsys, counts_run)] == [blank, blank, blank, film, blank]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert printed_predictions(capsys, counts_run, "--explain") == [blank]


@pytest.mark.parametrize(
    "settings",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp932:strict"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_every_console_encoding_can_print_all_reviews(settings, counts_run, tmp_path):
    """Characters outside the encoding are escaped; standard input and arguments are UTF-8 in any case."""
    texts = ["good caf\u00e9", "\u6620\u753b good", "good \N{GRINNING FACE} \u0435"]
    (tmp_path / "a.csv").write_text("text\n" + "\n".join(texts), encoding="utf-8")
    code = """if True:
        import sys, predict
        from finetuning.cli import run_main
        folder, csv, *texts = sys.argv[1:]
        run_main(lambda: [predict.main([folder, *arguments]) for arguments in (["--csv", csv], texts, [])])
    """
    done = subprocess.run(
        [sys.executable, "-c", code, counts_run, tmp_path / "a.csv", *texts],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONIOENCODING": "", **settings},
        input="\n".join(texts).encode("utf-8-sig"),
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    encoding = settings.get("PYTHONIOENCODING", "ascii").partition(":")[0]
    assert [line.split("\t")[2] for line in done.stdout.decode(encoding).splitlines()] == 3 * [
        text.encode(encoding, "backslashreplace").decode(encoding) for text in texts
    ]


def test_chunked_input_keeps_the_order(counts_run, data_dir, capsys, monkeypatch):
    expected = printed_predictions(capsys, counts_run, "--csv", data_dir / "train.csv")
    monkeypatch.setattr(predict, "TEXTS_PER_CHUNK", 7)
    assert printed_predictions(capsys, counts_run, "--csv", data_dir / "train.csv") == expected
    assert printed_predictions(capsys, counts_run, *pd.read_csv(data_dir / "train.csv")["text"]) == expected


def test_unreadable_input_is_reported(counts_run, tmp_path, failing, monkeypatch, capsys):
    capsys.readouterr()
    assert "cannot read --csv nowhere.csv" in failing(predict.main, counts_run, "--csv", "nowhere.csv")
    (tmp_path / "a.csv").write_text("review\ngood\n")
    assert "a.csv has no column text" in failing(predict.main, counts_run, "--csv", tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("text,label\ngood,3\n")  # the labels are ignored
    assert len(printed_predictions(capsys, counts_run, "--csv", tmp_path / "a.csv")) == 1
    assert "a text is empty" in failing(predict.main, counts_run, "good", " ")
    assert "choose one" in failing(predict.main, counts_run, "good", "--csv", tmp_path / "a.csv")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert "standard input is not in UTF-8" in failing(predict.main, counts_run)
    monkeypatch.setattr(sys, "stdin", None)
    assert "no text is given, and standard input is closed" in failing(predict.main, counts_run)


@pytest.mark.skipif(sys.platform == "win32", reason="arguments are Unicode there")
def test_argument_that_is_not_utf_8_is_reported(counts_run, failing):
    assert "a text is not in UTF-8" in failing(predict.main, counts_run, os.fsdecode(b"caf\xe9"))


def test_linear_model_does_not_import_torch(counts_run):
    code = f"import sys, predict; predict.main([{str(counts_run)!r}, 'good']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no broken pipes")
def test_closed_output_pipe_ends_quietly(counts_run, data_dir):
    command = [sys.executable, "predict.py", str(counts_run)]
    run = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    run.stdout.close()
    run.stdin.write(b"good film\n" * 10)
    run.stdin.close()
    assert (run.stderr.read(), run.wait()) == (b"", 141)
    run.stderr.close()
