import errno

import pytest

from finetuning.system.errors import UserError, is_out_of_memory


class OutOfMemoryError(RuntimeError):
    """Stands for PyTorch's, which is recognized by its name."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("Tried to allocate 2.00 GiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Invalid buffer size: 24.00 GB"),
        RuntimeError("could not create a primitive"),
    ],
    ids=repr,
)
def test_is_out_of_memory_recognizes_types_and_messages(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("out of memory"),  # without the number
        ValueError("out of memory"),
        UserError("out of memory"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("could not create a primitive descriptor for a matmul primitive"),
    ],
    ids=repr,
)
def test_is_out_of_memory_ignores_other_errors(error):
    assert not is_out_of_memory(error)
