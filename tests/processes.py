"""Scripts as processes of their own, for real signals: they share one set of imports and so start quickly."""

import importlib
import multiprocessing
import os
import sys
import time

from conftest import REPOSITORY

from finetuning import cli

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT = multiprocessing.get_context(METHOD)
CONTEXT.set_forkserver_preload(["train_bert_hf"])
DEADLINE = 300  # seconds after which something hangs


def run_script(module, arguments, output, cwd):
    """What the process does: as `python module.py arguments`, its output in files."""
    os.chdir(cwd)
    for descriptor, name in enumerate(("out", "err"), start=1):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = [f"{module}.py", *arguments]
    cli.run(importlib.import_module(module).main)


def start(module, arguments, output, cwd="."):
    """Start a script, its standard output in the file `output`.out and its errors in `output`.err."""
    os.environ["PYTHONPATH"] = str(REPOSITORY)  # where the processes import from
    process = CONTEXT.Process(target=run_script, args=(module, [*map(str, arguments)], str(output), str(cwd)))
    process.start()
    return process


def end(process):
    """Wait for a process; return its exit status, the negative signal if one killed it."""
    process.join(DEADLINE)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"still running after {DEADLINE} seconds")
    return process.exitcode


def wait_for(condition, process):
    """Wait until `condition()` holds while the process runs."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert process.is_alive(), "the process ended too early"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
