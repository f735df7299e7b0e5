"""GPT-2's published weights, from the Hugging Face Hub to NumPy arrays in the book's layout.

Experiment: Sebastian Raschka, "Build a Large Language Model (From Scratch)", bonus material to chapter 6,
https://github.com/rasbt/LLMs-from-scratch
"""

import json
import re
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open

from finetuning.errors import UserError
from finetuning.filetypes import refuse_lfs_pointer
from finetuning.hub import check_cached_weights
from finetuning.network import wrong_setting

REPOSITORIES = {
    "124M": "openai-community/gpt2",
    "355M": "openai-community/gpt2-medium",
    "774M": "openai-community/gpt2-large",
    "1558M": "openai-community/gpt2-xl",
}
# Published names of the arrays -> names in the book's layout.
TOP_LEVEL = {"wte.weight": "wte", "wpe.weight": "wpe", "ln_f.weight": "g", "ln_f.bias": "b"}
IN_BLOCK = re.compile(r"h\.(\d{1,3})\.(.+)\.(weight|bias)")
# Stored beside the weights: causal masks, and the output head, which is the token embedding again.
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", "lm_head.weight")


def download_and_load_gpt2(model_size, models_dir=None):
    """Return `(settings, params)` of a published GPT-2: "124M", "355M", "774M" or "1558M".

    `settings` has the keys n_vocab, n_ctx, n_embd, n_head and n_layer. `params` holds float32
    arrays: "wte", "wpe", "g" and "b" (the final norm), and "blocks", a list with one dictionary
    per block, such as `params["blocks"][0]["attn"]["c_attn"]["w"]` (inputs x outputs).

    The files are kept in `models_dir/<model_size>`, or in the Hugging Face cache when it is None;
    a copy that either of them holds is used as it is. Raises ValueError for an unknown size,
    UserError if the Hub cannot be reached or a file is damaged.
    """
    if model_size not in REPOSITORIES:
        raise ValueError(f"model_size must be one of {', '.join(REPOSITORIES)}, not {model_size!r}")
    repository = REPOSITORIES[model_size]
    config = fetch(repository, "config.json", model_size, models_dir)
    weights = fetch(repository, "model.safetensors", model_size, models_dir)
    check_cached_weights(repository)
    return read_settings(config), read_params(weights)


def fetch(repository, filename, model_size, models_dir):
    """Return the local path of one of the repository's files, downloading it where there is none yet."""
    folder = Path(models_dir) / model_size if models_dir else None
    if folder and (folder / filename).is_file():
        return folder / filename
    cached = try_to_load_from_cache(repository, filename)
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(repository, filename, local_dir=folder))
    except Exception as error:
        problem = wrong_setting(error, "hub")
        if not problem and not isinstance(error, (HfHubHTTPError, OSError)):
            raise
        raise UserError(f"cannot get {filename} of {repository} from the Hugging Face Hub, and the cache has "
                        f"no copy: {problem or error}") from error


def read_settings(path):
    """The model's dimensions from a published config.json, under OpenAI's names."""
    refuse_lfs_pointer(path)
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        return {"n_vocab": config["vocab_size"], "n_ctx": config["n_positions"], "n_embd": config["n_embd"],
                "n_head": config["n_head"], "n_layer": config["n_layer"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not GPT-2's config.json ({error!r}); delete it and run again") from error


def read_params(path):
    """The arrays of a GPT-2 safetensors file in the book's nested layout."""
    refuse_lfs_pointer(path)
    params = {"blocks": []}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118, not a dictionary
                if not name.endswith(NOT_WEIGHTS):
                    place(params, name, file.get_tensor(name).astype("float32", copy=False))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is cut short or damaged ({error}); delete it and run again") from error
    return params


def place(params, name, array):
    """Put one array where the book's layout has it: "h.0.attn.c_attn.weight" -> blocks[0]["attn"]["c_attn"]["w"]."""
    name = name.removeprefix("transformer.")
    match = IN_BLOCK.fullmatch(name)
    if not match:
        params[TOP_LEVEL.get(name, name)] = array
        return
    block, path, kind = match[1], match[2].split("."), match[3]
    blocks = params["blocks"]
    blocks.extend({} for _ in range(int(block) + 1 - len(blocks)))
    target = blocks[int(block)]
    for key in path:
        target = target.setdefault(key, {})
    # A norm's weight is its gain "g", a linear layer's is "w"; both call their bias "b".
    target["b" if kind == "bias" else "g" if path[0].startswith("ln_") else "w"] = array
