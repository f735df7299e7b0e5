"""Scripts in separate processes, for tests with real signals; a fork server imports their modules only once."""

import importlib
import multiprocessing
import os
import sys
import time

from helpers import REPOSITORY

from finetuning import cli

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT = multiprocessing.get_context(METHOD)
CONTEXT.set_forkserver_preload(["train_bert_hf"])
DEADLINE = 300  # seconds


def run_script(module, arguments, output, cwd):
    """Run `python module.py arguments` in this process, its output redirected to files."""
    os.chdir(cwd)
    for descriptor, name in enumerate(("out", "err"), start=1):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = [f"{module}.py", *arguments]
    cli.run_main(importlib.import_module(module).main)


def start(module, arguments, output, cwd="."):
    """Start a script; write its standard output to `output`.out and its standard error to `output`.err."""
    os.environ["PYTHONPATH"] = str(REPOSITORY)  # import path of the new process
    process = CONTEXT.Process(target=run_script, args=(module, [*map(str, arguments)], str(output), str(cwd)))
    process.start()
    return process


def end(process):
    """Wait for a process; return its exit status, or the negative number of the signal that killed it."""
    process.join(DEADLINE)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"still running after {DEADLINE} seconds")
    return process.exitcode


def wait_for(condition, process):
    """Wait until `condition()` is true; fail if the process ends before."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert process.is_alive(), "the process ended before the condition was true"
        assert time.monotonic() < deadline, f"the condition is still false after {DEADLINE} seconds"
        time.sleep(0.01)
