import pytest
from bad_inputs import POINTER, BadInput, bad_file, parameters

from finetuning.system.model_files import check_model_folder, weight_files


def names(paths):
    return [path.name for path in paths]


def test_weight_files_are_one_file_or_its_shards(tmp_path):
    assert weight_files(tmp_path) == []
    for name in ("pytorch_model.bin", "model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"):
        (tmp_path / name).touch()
    assert names(weight_files(tmp_path)) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert names(weight_files(tmp_path)) == ["model.safetensors"]


def test_check_model_folder_accepts_a_configuration_and_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")  # PyTorch's files are zip files
    check_model_folder(str(tmp_path))


def test_check_model_folder_leaves_an_adapter_to_the_loading(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    check_model_folder(str(tmp_path))


def nested(folder):
    (folder / "model").rename(folder / "inner")
    (folder / "model").mkdir()
    (folder / "inner").rename(folder / "model" / "checkpoint-5")


CASES = [
    bad_file("no weights", "model/model.safetensors", None, "model: it has no model.safetensors or pytorch_model.bin"),
    bad_file(
        "no weights of PyTorch",
        "model/tf_model.h5",
        b"\x89HDF",
        "or pytorch_model.bin, only tf_model.h5",
        instead_of="model/model.safetensors",
    ),
    bad_file(
        "no configuration", "model/config.json", None, "cannot load --model model: it has no config.json; it is a "
    ),
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
    bad_file(
        "a PyTorch file that is none",
        "model/pytorch_model.bin",
        b"abc",
        "pytorch_model.bin is not a PyTorch file",
        instead_of="model/model.safetensors",
    ),
    bad_file(
        "an empty PyTorch file",
        "model/pytorch_model.bin",
        b"",
        "pytorch_model.bin is empty",
        instead_of="model/model.safetensors",
    ),
    *[
        bad_file(
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
]


@pytest.mark.parametrize(("bad", "script"), parameters(CASES))
def test_bad_model_folder_ends_in_one_line_and_changes_no_file(bad, script, assert_refused):
    assert_refused(bad, script)
