"""Invalid inputs on the command line: each ends in one line of error and status 2, and changes no file."""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import flags, folder_contents, write_splits
from processes import CONTEXT, end, run_script, start
from safetensors.torch import load_file, save_file
from tiny_models import TINY_CONFIGS, TINY_GPT2_CONFIG, save_encoder, tiny_gpt2_tensors
from transformers import BertConfig

import gpt_download
import train_bert_hf
import train_gpt
import train_sklearn_logreg
from finetuning import checkpoint, cli

SCRIPTS = {"gpt": train_gpt, "bert": train_bert_hf, "logreg": train_sklearn_logreg}
VALID_ARGUMENTS = {
    "gpt": ["--model_size", "gpt2-tiny (0M)", "--models_dir", "models", "--weights", "random"],
    "bert": ["--model", "model"],
    "logreg": [],
}
PRETRAINED = "--weights", "pretrained"


class BadInput(NamedTuple):
    """An invalid input, prepared in a folder of valid ones, with the scripts to run and the expected message."""

    name: str
    message: str
    prepare: Callable[[Path], object] | None = None
    arguments: tuple = ()
    scripts: str = "bert"


def csv(name, content, message, split="train", scripts="bert logreg"):
    """Return a case with an invalid CSV file, or without it if `content` is None."""

    def prepare(folder):
        path = folder / "data" / f"{split}.csv"
        path.unlink()
        if content is not None:
            path.write_bytes(content)

    return BadInput(name, message, prepare, scripts=scripts)


def arguments(*arguments, message, scripts="gpt bert"):
    """Return a case with invalid arguments."""
    return BadInput(" ".join(arguments)[:40], message, arguments=arguments, scripts=scripts)


def weights(name, message, change):
    """Return a case with invalid weights: `change` returns new tensors or bytes from the valid ones."""

    def prepare(folder):
        path = folder / "model" / "model.safetensors"
        changed = change(load_file(path), path.read_bytes())
        path.write_bytes(changed) if isinstance(changed, bytes) else save_file(changed, path, {"format": "pt"})

    return BadInput(name, message, prepare)


def gpt_weights(name, message, change):
    """Return a case with invalid GPT-2 weights: `change` returns new bytes from the valid ones."""

    def prepare(folder):
        path = folder / "models" / "0M" / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return BadInput(name, message, prepare, PRETRAINED, scripts="gpt")


def file(name, path, content, message, *arguments, scripts="bert", instead_of=None):
    """Return a case with an invalid file, or without it if `content` is None; `instead_of` is removed."""

    def prepare(folder):
        (folder / (instead_of or path)).unlink()
        if content is not None:
            (folder / path).write_bytes(content)

    return BadInput(name, message, prepare, arguments, scripts)


def leftover_checkpoint(name, message, content, *arguments):
    """Return a case with a checkpoint of an earlier run in the output folder."""

    def prepare(folder):
        (folder / "run").mkdir()
        if callable(content):
            checkpoint.write_checkpoint(content(), folder / "run" / checkpoint.CHECKPOINT)
        else:
            (folder / "run" / checkpoint.CHECKPOINT).write_bytes(content)

    return BadInput(name, message, prepare, arguments or ("--resume",))


class Bomb:
    """Object that runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def pickle_with_code(folder):
    (folder / "model" / "model.safetensors").unlink()
    with open(folder / "model" / "pytorch_model.bin", "wb") as weights_file:
        pickle.dump({"weight": Bomb()}, weights_file, protocol=2)


def torch_file_with_code(folder):
    (folder / "model" / "model.safetensors").unlink()
    torch.save({"weight": Bomb()}, folder / "model" / "pytorch_model.bin")


def without_tokenizer(folder):
    for path in (folder / "model").glob("token*"):
        path.unlink()


def edit_json(path, **changes):
    """Change values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def file_as_output_dir(folder):
    (folder / "run").write_text("a file")


def other_run():
    """Return the content of a checkpoint of another run."""
    return {key: {} for key in checkpoint.KEYS} | {"fingerprint": {"seed": 7}}


def model_with_code(folder):
    """Add an architecture defined in a file of the model, which would create a folder if it were executed."""
    settings = {
        "model_type": "other",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"},
    }
    (folder / "model" / "config.json").write_text(json.dumps(settings))
    (folder / "model" / "code.py").write_text("import os\nos.mkdir('exploded')\n")


def adapter_without_weights(folder):
    for path in (folder / "model").iterdir():
        path.unlink()
    (folder / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/bert"}')


def tokenizer_without(*roles):
    def prepare(folder):
        path = folder / "model" / "tokenizer_config.json"
        path.write_text(
            json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in roles})
        )

    return prepare


def nested(folder):
    (folder / "model").rename(folder / "inner")
    (folder / "model").mkdir()
    (folder / "inner").rename(folder / "model" / "checkpoint-5")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 440449768\n"
TWO_REVIEWS = b"text,label\ngood,1\nbad,0\n"
CASES = [
    csv("no CSV", None, "cannot find data/train.csv; create the CSV files with: python download_prepare_dataset.py"),
    csv("no test CSV", None, "cannot find data/test.csv", split="test"),
    csv("an empty CSV", b"", "train.csv is not a CSV file in UTF-8"),
    csv("no rows", b"text,label\n", "train.csv holds no reviews"),
    csv("no text column", b"review,label\ngood,1\n", "has no column text; its columns are: review, label"),
    csv("no label column", b"text,sentiment\ngood,1\n", "has no column label", split="validation"),
    csv("no header", b"good,1\nbad,0\n", "has no column text and no column label"),
    csv("another separator", b"text;label\ngood;1\n", "has no column text and no column label"),
    csv("label pos", TWO_REVIEWS + b"fine,pos\n", "train.csv, review 3: label 'pos' is neither 0 (negative) nor 1"),
    csv("label 2", TWO_REVIEWS + b"fine,2\n", "review 3: label '2'"),
    csv("label 1.0", TWO_REVIEWS + b"fine,1.0\n", "review 3: label '1.0'"),
    csv("label NaN", TWO_REVIEWS + b"fine,NaN\n", "review 3: label 'NaN'"),
    csv("an empty label", TWO_REVIEWS + b"fine,\n", "review 3: label ''"),
    csv("an empty text", TWO_REVIEWS + b",1\n", "review 3: the text is empty"),
    csv("a blank text", TWO_REVIEWS + b'" \t\n",1\n', "review 3: the text is empty"),
    csv("an unclosed quote", TWO_REVIEWS + b'"fine,1\nfine,0\n', "not a CSV file in UTF-8"),
    csv("too many fields", TWO_REVIEWS + b"fine,1,1,1\n", "not a CSV file in UTF-8"),
    csv("one field more in each row", b"text,label\n1,good,1\n2,bad,0\n", "rows have more fields than its first line"),
    csv("a truncated row", TWO_REVIEWS + b"fine", "review 3: label ''"),
    csv("Latin-1", TWO_REVIEWS + "caf\u00e9,1\n".encode("latin-1"), "not a CSV file in UTF-8"),
    csv("UTF-16", TWO_REVIEWS.decode().encode("utf-16"), "not a CSV file in UTF-8"),
    csv(
        "a NUL byte",
        TWO_REVIEWS + b"fi\0ne,1\n",
        "review 3: the text holds a NUL byte; the file is damaged",
        split="test",
    ),
    csv("NUL bytes only", bytes(4096), "it is a file of zero bytes"),
    csv("a Git LFS pointer", POINTER, "data/train.csv is not a CSV file in UTF-8: it is a Git LFS pointer"),
    csv("a column twice", b"text,label,text\ngood,1,bad\n", "train.csv has the column text 2 times"),
    csv(
        "rows in a text",
        TWO_REVIEWS + b'"Great film,1\nfine,0\n"Bad film,0\n',
        "review 3: the quotation mark",
        split="test",
    ),
    csv("a zip file", b"PK\x03\x04\x14\0\0\0\x08\0\xff\xfe", "not a CSV file in UTF-8"),
    csv("one class", b"text,label\n" + b"good,1\n" * 48, "train.csv holds positive reviews only"),
    csv("the other class", b"text,label\n" + b"bad,0\n" * 48, "train.csv holds negative reviews only"),
    csv(
        "no words",
        b"text,label\n" + b"?,0\n!,1\n" * 24,
        "cannot compute --features counts of the training set: empty vocabulary",
        scripts="logreg",
    ),
    arguments("--num_epochs", "0", message="--num_epochs: must be a whole number of 1 or more, not '0'"),
    arguments("--max_steps", "-3", message="--max_steps: must be a whole number of 1 or more, not '-3'"),
    arguments("--learning_rate", "-0.001", message="--learning_rate: must be a number above 0, not '-0.001'"),
    arguments("--learning_rate", "inf", message="must be a number above 0, not 'inf'"),
    arguments("--batch_size", "49", message="--batch_size 49 is more than the 48 reviews of the training set"),
    arguments("--batch_size", "2.5", message="must be a whole number of 1 or more, not '2.5'"),
    arguments("--context_length", "65", message="--context_length 65 is more than the 64 tokens", scripts="gpt"),
    arguments("--context_length", "41", message="--context_length 41 is more than the 40 tokens", scripts="bert"),
    arguments("--context_length", "9" * 30, message="tokens this model can read"),
    arguments("--checkpoint_minutes", "0", message="--checkpoint_minutes: must be a number above 0"),
    arguments("--device", "cuda:99", message="--device cuda:99 is not on this machine; it has: "),
    arguments("--device", "tpu", message="--device tpu is no"),
    arguments("--precision", "tf32", "--device", "cpu", message="--precision tf32 is for CUDA, not for cpu"),
    arguments("--data_dir", "nowhere", message="cannot find nowhere/train.csv", scripts="gpt bert logreg"),
    arguments(
        "--output_dir",
        "train.csv",
        message="cannot write to --output_dir train.csv: File exists",
        scripts="gpt bert logreg",
    ),
    arguments(
        "--output_dir",
        "train.csv/run",
        message="cannot write to --output_dir train.csv/run: Not a directory",
        scripts="gpt bert logreg",
    ),
    arguments("--output_dir", "x" * 300, message="File name too long", scripts="gpt bert logreg"),
    BadInput(
        "a file as output folder",
        "cannot write to --output_dir run: File exists",
        file_as_output_dir,
        scripts="gpt bert logreg",
    ),
    arguments("--resume", message="--resume: there is no checkpoint at run/checkpoint.pt"),
    arguments(
        "--model", "nonsense", message="cannot load --model nonsense; it is none of distilbert, bert", scripts="bert"
    ),
    arguments("--model", "a/b/c", message="cannot load --model a/b/c", scripts="bert"),
    arguments("--model", "roberta", message="cannot load --model roberta", scripts="bert"),
    arguments("--model", "data", message="cannot load --model data", scripts="bert"),
    arguments("--model_size", "gpt2-huge", message="invalid choice: 'gpt2-huge'", scripts="gpt"),
    weights("truncated weights", "cannot load --model model", lambda tensors, content: content[:-100]),
    weights("a truncated header", "cannot load --model model", lambda tensors, content: content[:100]),
    weights("empty weights", "cannot load --model model", lambda tensors, content: b""),
    weights("zeros as weights", "cannot load --model model", lambda tensors, content: bytes(len(content))),
    weights("an HTML page as weights", "cannot load --model model", lambda tensors, content: b"<html>Log in</html>"),
    weights(
        "missing tensors",
        "1 parameters, such as bert.encoder.layer.1.output.dense.weight, are missing",
        lambda tensors, content: {
            name: tensor for name, tensor in tensors.items() if name != "bert.encoder.layer.1.output.dense.weight"
        },
    ),
    weights(
        "wrong shapes",
        "are missing or of another shape",
        lambda tensors, content: {name: tensor[:3].clone() for name, tensor in tensors.items()},
    ),
    weights(
        "weights of another model",
        "are missing or of another shape",
        lambda tensors, content: {f"gpt.{name}": tensor for name, tensor in tensors.items()},
    ),
    weights(
        "a NaN",
        "the checkpoint of --model model is damaged: bert.encoder.layer.1.output.dense.bias holds NaN",
        lambda tensors, content: (
            tensors | {"bert.encoder.layer.1.output.dense.bias": torch.tensor([float("nan")] + [0.0] * 15)}
        ),
    ),
    BadInput(
        "a model with custom code",
        "cannot load --model model: it needs code of its own, which is never run here",
        model_with_code,
    ),
    BadInput(
        "an adapter beside the weights",
        "cannot load --model model: it holds an adapter (adapter_config.json)",
        lambda folder: (folder / "model" / "adapter_config.json").write_text("{}"),
    ),
    BadInput("an adapter instead of weights", "it holds an adapter (adapter_config.json)", adapter_without_weights),
    BadInput("no padding token", "its tokenizer has neither a pad nor an eos token", tokenizer_without("pad_token")),
    BadInput("a pickle that runs code", "cannot load --model model", pickle_with_code),
    BadInput("a PyTorch file that runs code", "its weights are a pickle of more than tensors", torch_file_with_code),
    BadInput("no tokenizer", "cannot load --model model: its tokenizer has no vocabulary", without_tokenizer),
    file("no weights", "model/model.safetensors", None, "model: it has no model.safetensors or pytorch_model.bin"),
    file(
        "no weights of PyTorch",
        "model/tf_model.h5",
        b"\x89HDF",
        "or pytorch_model.bin, only tf_model.h5",
        instead_of="model/model.safetensors",
    ),
    file("no configuration", "model/config.json", None, "cannot load --model model: it has no config.json; it is a "),
    BadInput(
        "no model but one in a folder within",
        "it has no config.json; it is a folder of checkpoint-5; did you mean model/checkpoint-5?",
        nested,
    ),
    BadInput(
        "a folder without any model",
        "cannot load --model data: it has no config.json; it is a folder of CSV files",
        arguments=("--model", "data"),
    ),
    BadInput(
        "a file for a model",
        "cannot load --model model/config.json: it is a file; name the folder",
        arguments=("--model", "model/config.json"),
    ),
    file(
        "a PyTorch file that is none",
        "model/pytorch_model.bin",
        b"abc",
        "pytorch_model.bin is not a PyTorch file",
        instead_of="model/model.safetensors",
    ),
    file(
        "an empty PyTorch file",
        "model/pytorch_model.bin",
        b"",
        "pytorch_model.bin is empty",
        instead_of="model/model.safetensors",
    ),
    *[
        file(
            f"a Git LFS pointer for {name}",
            f"model/{name}",
            POINTER,
            f"cannot load --model model: {name} is a Git LFS",
            instead_of=f"model/{replaced}",
        )
        for name, replaced in [
            ("model.safetensors", "model.safetensors"),
            ("pytorch_model.bin", "model.safetensors"),
            ("model-00001-of-00002.safetensors", "model.safetensors"),
            ("config.json", "config.json"),
            ("tokenizer.json", "tokenizer.json"),
            ("spm.model", "tokenizer.json"),
            ("vocab.txt", "tokenizer.json"),
            ("merges.txt", "tokenizer.json"),
        ]
    ],
    *[
        file(
            f"a Git LFS pointer for GPT-2's {name}",
            f"models/0M/{name}",
            POINTER,
            f"models/0M/{name} is a Git LFS",
            *PRETRAINED,
            scripts="gpt",
        )
        for name in ("config.json", "model.safetensors")
    ],
    BadInput(
        "a tokenizer that allows less",
        "--context_length 30 is more than the 25 tokens this model's tokenizer allows",
        lambda folder: edit_json(folder / "model" / "tokenizer_config.json", model_max_length=25),
        ("--context_length", "30"),
    ),
    BadInput(
        "a tokenizer that allows less, and a model",
        "--context_length 41 is more than the 40 tokens this model can",
        lambda folder: edit_json(folder / "model" / "tokenizer_config.json", model_max_length=40),
        ("--context_length", "41"),
    ),
    file("a truncated configuration", "model/config.json", b'{"model_type": "be', "cannot load --model model"),
    file("a list as configuration", "model/config.json", b"[]", "cannot load --model model"),
    file("an image model", "model/config.json", b'{"model_type": "vit"}', "cannot load --model model"),
    file("an unknown architecture", "model/config.json", b'{"model_type": "nonsense"}', "cannot load --model model"),
    file(
        "a smaller vocabulary",
        "model/config.json",
        json.dumps({**TINY_CONFIGS["bert"].to_dict(), "vocab_size": 5}).encode(),
        "its tokenizer is of another model",
    ),
    file("a truncated tokenizer", "model/tokenizer.json", b"{", "cannot load --model model"),
    gpt_weights("truncated GPT-2", "models/0M/model.safetensors is cut short or damaged", lambda content: content[:-9]),
    gpt_weights(
        "an HTML page as GPT-2", "models/0M/model.safetensors is cut short or damaged", lambda content: b"<html>"
    ),
    gpt_weights(
        "GPT-2 of other names",
        "the checkpoint does not fit gpt2-tiny (0M): ",
        lambda content: content.replace(b"h.1.ln_1.weight", b"h.x.ln_1.weight"),
    ),
    gpt_weights("GPT-2 of another size", "wte has shape (7, 4), not (50257, 4)", lambda content: content),
    arguments(*PRETRAINED, "--models_dir", "", message="cannot get config.json of someone/tiny", scripts="gpt"),
    file(
        "a truncated GPT-2 configuration",
        "models/0M/config.json",
        b'{"n_embd": 4}',
        "is not GPT-2's config.json",
        *PRETRAINED,
        scripts="gpt",
    ),
    file(
        "a list as GPT-2 configuration",
        "models/0M/config.json",
        b"[]",
        "is not GPT-2's config.json",
        *PRETRAINED,
        scripts="gpt",
    ),
    leftover_checkpoint("a Git LFS pointer for a checkpoint", "run/checkpoint.pt is a Git LFS pointer", POINTER),
    leftover_checkpoint("an empty checkpoint", "run/checkpoint.pt: damaged, or not a checkpoint of this version", b""),
    leftover_checkpoint("a checkpoint of random bytes", "run/checkpoint.pt: damaged", bytes(range(256)) * 100),
    leftover_checkpoint("a checkpoint of another program", "run/checkpoint.pt: damaged", lambda: {"model": {}}),
    leftover_checkpoint(
        "a checkpoint that runs code", "run/checkpoint.pt: damaged", lambda: other_run() | {"state": Bomb()}
    ),
    leftover_checkpoint("a checkpoint of another run", "run/checkpoint.pt belongs to a run with other", other_run),
    leftover_checkpoint(
        "an interrupted run", "run holds the checkpoint of an interrupted run: add --resume", other_run, "--seed", "7"
    ),
]
PARAMETERS = [pytest.param(bad, script, id=f"{script}: {bad.name}") for bad in CASES for script in bad.scripts.split()]


@pytest.fixture(scope="module")
def valid_folder(tmp_path_factory):
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
def folder(valid_folder, tmp_path, monkeypatch, tiny_gpt):
    """Change to a copy of the valid inputs; return it."""
    copy = shutil.copytree(valid_folder, tmp_path / "inputs")
    monkeypatch.setitem(train_gpt.MODEL_CONFIGS, tiny_gpt, {"emb_dim": 4, "n_layers": 2, "n_heads": 2})
    monkeypatch.setitem(gpt_download.REPOSITORIES, "0M", "someone/tiny")
    monkeypatch.chdir(copy)
    return copy


def command(script, arguments):
    """Return the arguments of a short run of a script on the valid inputs, with `arguments` last."""
    short = [] if script == "logreg" else ["--context_length", "24", "--max_steps", "2"]
    return [*VALID_ARGUMENTS[script], "--data_dir", "data", "--output_dir", "run", *short, *arguments]


@pytest.mark.parametrize(("bad", "script"), PARAMETERS)
def test_bad_input_ends_in_one_line_and_changes_no_file(bad, script, folder, monkeypatch, capfd):
    if bad.prepare:
        bad.prepare(folder)
    before = folder_contents(folder)
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
    assert folder_contents(folder) == before


def test_valid_inputs_run(folder):
    for script, module in SCRIPTS.items():
        module.main(command(script, ["--output_dir", script]))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(
            "text,label\n" + "\N{GRINNING FACE} \u05d8\u05d5\u05d1 \u0637\u064a\u0628,1\nbad,0\n" * 24,
            id="emoji and right-to-left text",
        ),
        pytest.param("\ufefftext,label\n" + "good,1\nbad,0\n" * 24, id="a BOM"),
        pytest.param("text,label\n" + "good " * 200_000 + ",1\n" + "bad,0\n" * 47, id="a review of a megabyte"),
        pytest.param("label,text,more\r\n" + '1,"two\nlines, ""quoted""",x\r\n0,NaN,y\r\n' * 24, id="quotes and NaN"),
    ],
)
@pytest.mark.parametrize("script", ["bert", "logreg"])
def test_unusual_valid_csv_runs(script, content, folder):
    (folder / "data" / "train.csv").write_bytes(content.encode())
    (folder / "data" / "test.csv").write_text("text,label\ngood,1\n")  # a test set may have one class
    SCRIPTS[script].main(command(script, []))
    assert (folder / "run" / "record.json").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train_bert_hf", ["--data_dir", "nowhere"], "cannot find nowhere/train.csv"),
        ("train_bert_hf", ["--batch_size", "0"], "must be a whole number of 1 or more"),
        ("train_sklearn_logreg", ["--output_dir", "train.csv/run"], "Not a directory"),
    ],
)
def test_bad_input_of_a_new_process_ends_in_one_line(script, arguments, message, folder):
    before = folder_contents(folder)
    model = ["--model", "model"] if script == "train_bert_hf" else []
    assert end(start(script, [*model, "--data_dir", "data", *arguments], folder.parent / "log", folder)) == 2
    assert (folder.parent / "log.out").read_text() == ""
    (line,) = (folder.parent / "log.err").read_text().splitlines()
    assert message in line
    assert folder_contents(folder) == before


def run_with_little_memory(*arguments):
    """Run a script with an address space limit of 150 MB above what the process uses now."""
    import resource

    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20), resource.RLIM_INFINITY))
    run_script(*arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
def test_process_out_of_memory_ends_in_advice(folder):
    save_encoder(folder / "large", BertConfig(**{**TINY_CONFIGS["bert"].to_dict(), "intermediate_size": 40_000}))
    # In bf16 the CPU's library may crash instead.
    arguments = flags(
        model="large", data_dir="data", output_dir="run", context_length=40, batch_size=48, precision="fp32"
    )
    process = CONTEXT.Process(
        target=run_with_little_memory, args=("train_bert_hf", arguments, str(folder / "log"), str(folder))
    )
    process.start()
    assert end(process) == 2, (folder / "log.err").read_text()
    assert (folder / "log.err").read_text().splitlines()[-1] == (
        "train_bert_hf.py: out of memory in training; try --micro_batch_size 24 or a shorter --context_length or "
        "--trainable_layers last_block"
    )
    assert not (folder / "run").exists()
