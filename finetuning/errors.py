"""The one exception that means "not a bug": a mistake of the user's, or a failure of the world's."""

import errno
import re

# How CUDA and HIP, MPS, cuBLAS and cuDNN, and the allocators of PyTorch on Linux and Windows say it in a RuntimeError.
OUT_OF_MEMORY = re.compile("out of memory|outofmemory|_ALLOC_FAILED|invalid buffer size|bad_alloc|"
                           "(can't|cannot|failed to) allocate|not enough memory", re.IGNORECASE)
ONEDNN = "could not create a primitive"  # oneDNN's errors that say more are about what it cannot do


class UserError(Exception):
    """Something the person at the keyboard can put right; its text says what is wrong and what to do.

    `finetuning.cli.run` turns it into one line on standard error and exit status 2.
    """


def is_out_of_memory(error):
    """Whether an exception means that the memory of a GPU or of the machine has run out."""
    return (isinstance(error, MemoryError)
            or type(error).__name__ == "OutOfMemoryError"  # PyTorch's, which not every script imports
            or isinstance(error, OSError) and error.errno == errno.ENOMEM
            or isinstance(error, RuntimeError) and (str(error) == ONEDNN or bool(OUT_OF_MEMORY.search(str(error)))))
