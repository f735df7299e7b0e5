"""GPT-2's published weights, from the Hugging Face Hub to NumPy arrays in the book's layout.

Experiment: Sebastian Raschka, "Build a Large Language Model (From Scratch)", bonus material to chapter 6,
https://github.com/rasbt/LLMs-from-scratch
"""

import json
import re
from pathlib import Path

import numpy as np
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open

from finetuning.system.errors import UserError
from finetuning.system.filetypes import refuse_lfs_pointer
from finetuning.system.hub import check_digest
from finetuning.system.network import is_network_error, misconfigured_variable

REPOSITORIES = {
    "124M": "openai-community/gpt2",
    "355M": "openai-community/gpt2-medium",
    "774M": "openai-community/gpt2-large",
    "1558M": "openai-community/gpt2-xl",
}
# Published names of arrays outside the blocks -> names in the book's layout.
TOP_LEVEL = {"wte.weight": "wte", "wpe.weight": "wpe", "ln_f.weight": "g", "ln_f.bias": "b"}
IN_BLOCK = re.compile(r"h\.(\d{1,3})\.(.+)\.(weight|bias)")
# Not parameters of their own: causal masks, and the output head, which shares the token embedding.
IGNORED = (".attn.bias", ".attn.masked_bias", "lm_head.weight")


def download_and_load_gpt2(model_size, models_dir=None):
    """Return `(settings, params)` of a published GPT-2: "124M", "355M", "774M" or "1558M".

    `settings` has the keys n_vocab, n_ctx, n_embd, n_head and n_layer. `params` holds float32
    arrays: "wte", "wpe", "g" and "b" (the final norm), and "blocks", a list with one dictionary
    per block, such as `params["blocks"][0]["attn"]["c_attn"]["w"]` (inputs x outputs).

    The files are stored in `models_dir/<model_size>`, or in the Hugging Face cache if it is None;
    files already in either are not downloaded. Raises ValueError for an unknown size, UserError if
    the Hub cannot be reached or a file is damaged.
    """
    if model_size not in REPOSITORIES:
        raise ValueError(f"model_size must be one of {', '.join(REPOSITORIES)}, not {model_size!r}")
    repository = REPOSITORIES[model_size]
    folder = Path(models_dir) / model_size if models_dir else None
    config = fetch(repository, "config.json", folder)
    weights = fetch(repository, "model.safetensors", folder)
    check_digest(weights)
    return read_settings(config), read_params(weights)


def fetch(repository: str, filename: str, folder: Path | None) -> Path:
    """Return the local path of one of the repository's files; download it if neither folder nor cache has it."""
    if folder and (folder / filename).is_file():
        return folder / filename
    cached = try_to_load_from_cache(repository, filename)
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(repository, filename, local_dir=folder))
    except Exception as error:
        problem = misconfigured_variable(error, "hub")
        if not (problem or isinstance(error, (HfHubHTTPError, OSError)) or is_network_error(error)):
            raise
        raise UserError(
            f"cannot get {filename} of {repository} from the Hugging Face Hub, and the cache has "
            f"no copy: {problem or error}"
        ) from error


def read_settings(path: str | Path) -> dict[str, int]:
    """Return the model's dimensions from a published config.json, under OpenAI's names."""
    refuse_lfs_pointer(path)
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        return {
            "n_vocab": config["vocab_size"],
            "n_ctx": config["n_positions"],
            "n_embd": config["n_embd"],
            "n_head": config["n_head"],
            "n_layer": config["n_layer"],
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not GPT-2's config.json ({error!r}); delete it and run again") from error


def read_params(path: str | Path) -> dict:
    """Return the arrays of a GPT-2 safetensors file in the book's nested layout."""
    refuse_lfs_pointer(path)
    params: dict = {"blocks": []}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118, not a dictionary
                if not name.endswith(IGNORED):
                    insert(params, name, file.get_tensor(name).astype("float32", copy=False))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); delete it and run again") from error
    return params


def insert(params: dict, name: str, array: np.ndarray) -> None:
    """Store an array in the book's layout: "h.0.ln_1.weight" as `params["blocks"][0]["ln_1"]["g"]`."""
    name = name.removeprefix("transformer.")
    match = IN_BLOCK.fullmatch(name)
    if not match:
        params[TOP_LEVEL.get(name, name)] = array
        return
    block, path, kind = int(match[1]), match[2].split("."), match[3]
    blocks = params["blocks"]
    blocks.extend({} for _ in range(block + 1 - len(blocks)))
    target = blocks[block]
    for key in path:
        target = target.setdefault(key, {})
    # The book calls the weight of a norm "g" (gain) and that of a linear layer "w".
    target["b" if kind == "bias" else "g" if path[0].startswith("ln_") else "w"] = array
