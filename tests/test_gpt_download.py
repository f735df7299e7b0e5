import json
import os
import subprocess
import sys

import numpy as np
import pytest
from bad_inputs import POINTER, PRETRAINED, BadInput, bad_arguments, bad_file, parameters
from helpers import REPOSITORY
from local_server import LocalServer
from safetensors.numpy import save_file
from tiny_models import TINY_GPT2_CONFIG, tiny_gpt2_tensors

from finetuning.system.errors import UserError
from gpt_download import download_and_load_gpt2


@pytest.fixture
def repository(tmp_path):
    """A folder with the files of a tiny GPT-2 repository."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_GPT2_CONFIG))
    save_file(tiny_gpt2_tensors(), folder / "model.safetensors")
    return folder


def move_to_models_dir(repository, tmp_path):
    """Make the repository the downloaded files of size 124M; return the models folder."""
    (tmp_path / "models").mkdir()
    repository.rename(tmp_path / "models" / "124M")
    return tmp_path / "models"


def test_download_and_load_gpt2_returns_the_books_layout(repository, hub_snapshot):
    snapshot = hub_snapshot("openai-community/gpt2")
    for file in repository.iterdir():
        file.rename(snapshot / file.name)
    settings, params = download_and_load_gpt2("124M")
    assert settings == {"n_vocab": 7, "n_ctx": 5, "n_embd": 4, "n_head": 2, "n_layer": 2}
    assert set(params) == {"wte", "wpe", "g", "b", "blocks"}
    block = params["blocks"][1]
    assert {key: sorted(value) for key, value in block.items()} == {
        "attn": ["c_attn", "c_proj"],
        "mlp": ["c_fc", "c_proj"],
        "ln_1": ["b", "g"],
        "ln_2": ["b", "g"],
    }
    assert block["attn"]["c_attn"]["w"].shape == (4, 12)
    assert "lm_head.weight" not in params
    published = tiny_gpt2_tensors()
    assert (block["attn"]["c_attn"]["b"] == published["h.1.attn.c_attn.bias"]).all()
    assert (block["mlp"]["c_proj"]["w"] == published["h.1.mlp.c_proj.weight"]).all()
    assert (block["ln_2"]["g"] == published["h.1.ln_2.weight"]).all()
    assert (params["g"] == published["ln_f.weight"]).all()


def test_download_and_load_gpt2_converts_half_precision_to_float32(repository, tmp_path):
    save_file(
        {name: array.astype(np.float16) for name, array in tiny_gpt2_tensors().items()},
        repository / "model.safetensors",
    )
    _, params = download_and_load_gpt2("124M", move_to_models_dir(repository, tmp_path))
    assert params["wte"].dtype == np.float32


def test_download_and_load_gpt2_downloads_into_models_dir(repository, tmp_path):
    """Run the Hub's client against a local server that speaks the Hub's protocol, without torch and transformers."""
    models_dir = tmp_path / "models"
    files = {
        f"/openai-community/gpt2-medium/resolve/main/{file.name}": file.read_bytes() for file in repository.iterdir()
    }
    code = f"""
import sys, gpt_download
print(gpt_download.download_and_load_gpt2("355M", {str(models_dir)!r})[0])
assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
    with LocalServer(files, headers={"X-Repo-Commit": "0" * 40, "ETag": '"0123456789abcdef"'}) as server:
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.url}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
        )
    assert "'n_embd': 4" in done.stdout
    assert (models_dir / "355M" / "model.safetensors").read_bytes() == (repository / "model.safetensors").read_bytes()
    settings, _ = download_and_load_gpt2("355M", models_dir)  # without the server
    assert settings["n_layer"] == 2


def test_download_and_load_gpt2_reports_an_unreachable_hub():
    with pytest.raises(UserError, match=r"cannot get config.json of openai-community/gpt2-xl"):
        download_and_load_gpt2("1558M")


@pytest.mark.parametrize("num_bytes", [3, 100, 2000])
def test_download_and_load_gpt2_refuses_a_truncated_file(repository, tmp_path, num_bytes):
    weights = repository / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:num_bytes])
    with pytest.raises(UserError, match="truncated or damaged"):
        download_and_load_gpt2("124M", move_to_models_dir(repository, tmp_path))


def test_download_and_load_gpt2_refuses_an_unknown_size():
    with pytest.raises(ValueError, match="124M, 355M, 774M, 1558M"):
        download_and_load_gpt2("125M")


def gpt_weights(name, message, change):
    """Return a case with invalid GPT-2 weights: `change` returns new bytes from the valid ones."""

    def prepare(folder):
        path = folder / "models" / "0M" / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return BadInput(name, message, prepare, PRETRAINED, scripts="gpt")


CASES = [
    *[
        bad_file(
            f"a Git LFS pointer for GPT-2's {name}",
            f"models/0M/{name}",
            POINTER,
            f"models/0M/{name} is a Git LFS",
            *PRETRAINED,
            scripts="gpt",
        )
        for name in ("config.json", "model.safetensors")
    ],
    gpt_weights("truncated GPT-2", "models/0M/model.safetensors is truncated or damaged", lambda content: content[:-9]),
    gpt_weights(
        "an HTML page as GPT-2", "models/0M/model.safetensors is truncated or damaged", lambda content: b"<html>"
    ),
    gpt_weights(
        "GPT-2 of other names",
        "the checkpoint does not fit gpt2-tiny (0M): ",
        lambda content: content.replace(b"h.1.ln_1.weight", b"h.x.ln_1.weight"),
    ),
    gpt_weights("GPT-2 of another size", "wte has shape (7, 4), not (50257, 4)", lambda content: content),
    bad_arguments(*PRETRAINED, "--models_dir", "", message="cannot get config.json of someone/tiny", scripts="gpt"),
    bad_file(
        "a truncated GPT-2 configuration",
        "models/0M/config.json",
        b'{"n_embd": 4}',
        "is not GPT-2's config.json",
        *PRETRAINED,
        scripts="gpt",
    ),
    bad_file(
        "a list as GPT-2 configuration",
        "models/0M/config.json",
        b"[]",
        "is not GPT-2's config.json",
        *PRETRAINED,
        scripts="gpt",
    ),
]


@pytest.mark.parametrize(("bad", "script"), parameters(CASES))
def test_bad_gpt2_files_end_in_one_line_and_change_no_file(bad, script, assert_refused):
    assert_refused(bad, script)
