"""The files of a model in a local folder, checked before Transformers reads them."""

from pathlib import Path

from finetuning.system.errors import UserError
from finetuning.system.filetypes import EMPTY, LFS_POINTER, ZEROS, file_type, folder_type
from finetuning.system.hub import WEIGHTS

OTHER_WEIGHTS = ("*.h5", "*.msgpack", "*.ckpt*", "*.onnx", "*.gguf", "*.pt", "*.pth")
VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "*.model")  # of tokenizers without tokenizer.json
INVALID_TYPES = {EMPTY, ZEROS, LFS_POINTER, "a web page", "an XML file"}


def check_model_folder(folder: str) -> None:
    """Raise UserError if a folder lacks files of a model, or if one of them has another kind of content."""
    path, prefix = Path(folder), f"cannot load --model {folder}: "
    if path.is_file():
        raise UserError(f"{prefix}it is a file; name the folder that it is in")
    if (path / "adapter_config.json").is_file():  # reported when the model is loaded
        return
    if not (path / "config.json").is_file():
        nested = [f"; did you mean {config.parent}?" for config in sorted(path.glob("*/config.json"))[:1]]
        raise UserError(f"{prefix}it has no config.json; it is {folder_type(path)}{''.join(nested)}")
    weights = weight_files(path)
    if not weights:
        others = sorted(file.name for pattern in OTHER_WEIGHTS for file in path.glob(pattern))
        raise UserError(f"{prefix}it has no {' or '.join(WEIGHTS)}{', only ' * bool(others)}{', '.join(others)}")
    tokenizer_json = path / "tokenizer.json"
    vocabularies = [file for pattern in VOCABULARIES for file in path.glob(pattern)]
    tokenizer = [tokenizer_json] if tokenizer_json.is_file() else vocabularies
    for file in (path / "config.json", *weights, *tokenizer):
        kind = file_type(file)
        if kind in INVALID_TYPES or (file.suffix == ".bin" and kind not in ("a zip file", "a pickle")):
            raise UserError(f"{prefix}{file.name} is {kind or 'not a PyTorch file'}")


def weight_files(folder: Path) -> list[Path]:
    """Return the weights in a folder that Transformers would load: one file or its shards."""
    for name in WEIGHTS:
        stem, suffix = name.split(".")
        if (folder / name).is_file():
            return [folder / name]
        if shards := sorted(folder.glob(f"{stem}-*-of-*.{suffix}")):
            return shards
    return []
