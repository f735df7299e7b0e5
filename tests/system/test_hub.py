import os
import sys

import pytest
from tiny_models import TINY_CONFIGS, save_encoder

import train_bert_hf
from finetuning.system.errors import UserError
from finetuning.system.files import sha256
from finetuning.system.hub import check_cached_weights


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need privileges on Windows")
def test_check_cached_weights_detects_a_flipped_bit(hub_snapshot):
    """The file remains readable; only its SHA-256 shows the damage."""
    snapshot = hub_snapshot("someone/bert")
    save_encoder(snapshot, TINY_CONFIGS["bert"])
    weights = snapshot / "model.safetensors"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    blob = weights.rename(blobs / sha256(weights))
    weights.symlink_to(os.path.relpath(blob, snapshot))
    train_bert_hf.load_pretrained("someone/bert", seed=1)
    content = blob.read_bytes()
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=f"model.safetensors in the Hugging Face cache is damaged .*; delete {blob}"):
        train_bert_hf.load_pretrained("someone/bert", seed=1)


def test_check_cached_weights_accepts_an_absent_repository():
    check_cached_weights("someone/absent")


def test_check_cached_weights_accepts_files_that_are_not_named_by_digest(hub_snapshot):
    snapshot = hub_snapshot("someone/copied")
    (snapshot / "model.safetensors").write_bytes(b"content of a cache without symbolic links")
    check_cached_weights("someone/copied")


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need privileges on Windows")
def test_check_cached_weights_reads_only_the_file_that_is_loaded(hub_snapshot):
    snapshot = hub_snapshot("someone/both")
    (snapshot / "model.safetensors").write_bytes(b"weights")
    damaged = snapshot.parent.parent / ("0" * 64)
    damaged.write_bytes(b"content with another digest")
    (snapshot / "pytorch_model.bin").symlink_to(damaged)
    check_cached_weights("someone/both")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pytorch_model.bin in the Hugging Face cache is damaged"):
        check_cached_weights("someone/both")
