"""The exception for everything that is not a bug, and how out-of-memory errors are recognized."""

import errno
import re

# The messages of CUDA, HIP, MPS, cuBLAS, cuDNN and PyTorch's allocators on Linux and Windows.
OUT_OF_MEMORY = re.compile(
    "out of memory|outofmemory|_ALLOC_FAILED|invalid buffer size|bad_alloc|"
    "(can't|cannot|failed to) allocate|not enough memory",
    re.IGNORECASE,
)
ONEDNN_OUT_OF_MEMORY = "could not create a primitive"  # the whole message; longer ones report unsupported operations


class UserError(Exception):
    """A mistake of the user or an external failure; the message says what is wrong and what to do.

    `finetuning.cli.run_main` prints it as one line on standard error and exits with status 2.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that the memory of the GPU or of the machine has run out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # without importing torch
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    message = str(error)
    return isinstance(error, RuntimeError) and (message == ONEDNN_OUT_OF_MEMORY or bool(OUT_OF_MEMORY.search(message)))
