import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY
from local_server import LocalServer
from safetensors.numpy import save_file

from finetuning.errors import UserError
from gpt_download import download_and_load_gpt2

CONFIG = {"vocab_size": 7, "n_positions": 5, "n_embd": 4, "n_head": 2, "n_layer": 2, "model_type": "gpt2"}


def tensors():
    """Arrays under the published names, each filled with a number of its own."""
    shapes = {"wte.weight": (7, 4), "wpe.weight": (5, 4), "ln_f.weight": (4,), "ln_f.bias": (4,)}
    for i in range(2):
        shapes |= {f"h.{i}.attn.bias": (1, 1, 5, 5), f"h.{i}.attn.c_attn.weight": (4, 12),
                   f"h.{i}.attn.c_attn.bias": (12,), f"h.{i}.attn.c_proj.weight": (4, 4),
                   f"h.{i}.attn.c_proj.bias": (4,), f"h.{i}.mlp.c_fc.weight": (4, 16), f"h.{i}.mlp.c_fc.bias": (16,),
                   f"h.{i}.mlp.c_proj.weight": (16, 4), f"h.{i}.mlp.c_proj.bias": (4,), f"h.{i}.ln_1.weight": (4,),
                   f"h.{i}.ln_1.bias": (4,), f"h.{i}.ln_2.weight": (4,), f"h.{i}.ln_2.bias": (4,)}
    shapes["lm_head.weight"] = (7, 4)
    return {name: np.full(shape, number, dtype=np.float32) for number, (name, shape) in enumerate(shapes.items())}


@pytest.fixture
def repository(tmp_path):
    """A folder with the files of a tiny GPT-2 repository."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), folder / "model.safetensors")
    return folder


def test_the_books_layout(repository, hub_snapshot):
    snapshot = hub_snapshot("openai-community/gpt2")
    for file in repository.iterdir():
        file.rename(snapshot / file.name)
    settings, params = download_and_load_gpt2("124M")
    assert settings == {"n_vocab": 7, "n_ctx": 5, "n_embd": 4, "n_head": 2, "n_layer": 2}
    assert set(params) == {"wte", "wpe", "g", "b", "blocks"}
    block = params["blocks"][1]
    assert {key: sorted(value) for key, value in block.items()} == {
        "attn": ["c_attn", "c_proj"], "mlp": ["c_fc", "c_proj"], "ln_1": ["b", "g"], "ln_2": ["b", "g"]}
    assert block["attn"]["c_attn"]["w"].shape == (4, 12)
    assert "lm_head.weight" not in params
    published = tensors()
    assert (block["attn"]["c_attn"]["b"] == published["h.1.attn.c_attn.bias"]).all()
    assert (block["mlp"]["c_proj"]["w"] == published["h.1.mlp.c_proj.weight"]).all()
    assert (block["ln_2"]["g"] == published["h.1.ln_2.weight"]).all()
    assert (params["g"] == published["ln_f.weight"]).all()


def test_half_precision_files_become_float32(repository, tmp_path):
    save_file({name: array.astype(np.float16) for name, array in tensors().items()}, repository / "model.safetensors")
    models_dir = tmp_path / "models"
    models_dir.mkdir()
    repository.rename(models_dir / "124M")
    _, params = download_and_load_gpt2("124M", models_dir)
    assert params["wte"].dtype == np.float32


def test_downloads_into_models_dir_from_the_hub(repository, tmp_path):
    """The real client against a local server that speaks the Hub's protocol."""
    models_dir = tmp_path / "models"
    files = {f"/openai-community/gpt2-medium/resolve/main/{file.name}": file.read_bytes()
             for file in repository.iterdir()}
    with LocalServer(files, headers={"X-Repo-Commit": "0" * 40, "ETag": '"0123456789abcdef"'}) as server:
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.url}
        code = f"import gpt_download; print(gpt_download.download_and_load_gpt2('355M', {str(models_dir)!r})[0])"
        done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True,
                              text=True, check=True)
    assert "'n_embd': 4" in done.stdout
    assert (models_dir / "355M" / "model.safetensors").read_bytes() == (repository / "model.safetensors").read_bytes()
    # Without the server the copy in models_dir is enough.
    settings, _ = download_and_load_gpt2("355M", models_dir)
    assert settings["n_layer"] == 2


def test_no_network_and_an_empty_cache():
    with pytest.raises(UserError, match="cannot get config.json of openai-community/gpt2-xl"):
        download_and_load_gpt2("1558M")


@pytest.mark.parametrize("kept", [3, 100, 2000])
def test_a_file_cut_short_is_refused(repository, tmp_path, kept):
    weights = repository / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    (tmp_path / "models").mkdir()
    repository.rename(tmp_path / "models" / "124M")
    with pytest.raises(UserError, match="cut short or damaged"):
        download_and_load_gpt2("124M", tmp_path / "models")


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="124M, 355M, 774M, 1558M"):
        download_and_load_gpt2("125M")
