import os
import sys

import pytest
from conftest import TINY_CONFIGS, save_encoder

import train_bert_hf
from finetuning.errors import UserError
from finetuning.files import sha256
from finetuning.hub import check_cached_weights


@pytest.mark.skipif(sys.platform == "win32", reason="links take rights on Windows")
def test_weights_that_a_disk_has_changed_are_noticed(hub_snapshot):
    """One bit, within a file that still is a whole one."""
    snapshot = hub_snapshot("someone/bert")
    save_encoder(snapshot, TINY_CONFIGS["bert"])
    weights = snapshot / "model.safetensors"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    stored = weights.rename(blobs / sha256(weights))
    weights.symlink_to(os.path.relpath(stored, snapshot))
    train_bert_hf.load_model("someone/bert", seed=1)
    content = stored.read_bytes()
    stored.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=f"model.safetensors of someone/bert .* is damaged .*; delete {stored}"):
        train_bert_hf.load_model("someone/bert", seed=1)


def test_without_a_cache_there_is_nothing_to_check(hub_snapshot):
    check_cached_weights("someone/absent")
    snapshot = hub_snapshot("someone/copied")
    (snapshot / "model.safetensors").write_bytes(b"a cache without links names no digest")
    check_cached_weights("someone/copied")
