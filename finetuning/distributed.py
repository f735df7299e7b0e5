"""Several processes as one run: each computes its share of every batch, and together they learn what one would.

    torchrun --nproc_per_node 2 train_gpt.py

`torchrun` starts the processes and gives each a number, its rank. The first, rank 0, draws the
order of the reviews, and it alone prints and writes. Started without torchrun, a run is its own
first and only process, and what is called here changes nothing.
"""

import functools
import os
import platform
import signal
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from finetuning.cli import under_torchrun
from finetuning.errors import UserError
from finetuning.interrupts import Terminated


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def size():
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_size():
    """How many of the run's processes are on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if size() > 1 else 1


def is_first():
    """Whether this is the process that writes."""
    return rank() == 0


@functools.cache
def store():
    """The keys and values that torchrun keeps for its processes; they outlive each of them."""
    return next(dist.rendezvous("env://"))[0]


@contextmanager
def processes():
    """Within this context torchrun's processes are one run, and all but the first are silent."""
    if not under_torchrun() or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    # Gradients go from GPU to GPU, everything else between CPUs.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store(), rank=int(os.environ["RANK"]),
                            world_size=int(os.environ["WORLD_SIZE"]))
    store().set(f"process {rank()}", f"{platform.node()} {os.getpid()}")
    with ExitStack() as stack:
        if not is_first():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield
    # Not after a failure: whoever has failed waits for nobody.
    store().set(f"process {rank()}", "")
    dist.destroy_process_group()


@contextmanager
def first_process_first():
    """Let the first process go through the block alone; the others follow, and find what it downloaded and cached."""
    while not is_first() and not store().check(["first process done"]):
        time.sleep(0.1)  # in Python, where torchrun's signal to end is heard
    yield
    if is_first() and size() > 1:
        store().set("first process done", "")


@contextmanager
def one_voice():
    """The whole work of one of torchrun's processes: of those that fail, only the first says why.

    The others failed alike, or because of it.
    """
    status = 0
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun may ask for what is happening already
        if not failures_before():
            # Their connections to a process that is gone break, or torchrun ends those that are left.
            if isinstance(error, (RuntimeError, Terminated)) and (killed := killed_processes()):
                raise UserError(f"process {' and '.join(map(str, killed))} died without an error message, as where the "
                                "system kills one for want of memory; try fewer processes (--nproc_per_node) or "
                                "--accumulate 2 or more") from error
            raise
        status = 2
    # Without the interpreter's shutdown, which gloo's threads outlive: now and then that ends in an abort.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def killed_processes():
    """The ranks of the run's processes on this machine that have ended without saying so."""
    killed = []
    with suppress(RuntimeError):  # torchrun itself is gone
        time.sleep(1)  # a connection breaks before the process has quite ended
        for number in range(int(os.environ["WORLD_SIZE"])):
            if store().check([f"process {number}"]):
                host, _, pid = store().get(f"process {number}").decode().partition(" ")
                if host == platform.node() and not is_running(int(pid)):
                    killed.append(number)
    return killed


def is_running(pid):
    """Whether a process is there and has not ended."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # no Linux, which would tell
        return True


def failures_before():
    """How many processes have called this before."""
    try:
        return store().add("failures", 1) - 1
    except RuntimeError:  # torchrun itself is gone
        return rank()


def own_device(device):
    """The device of this process: on CUDA each process has a GPU of its own.

    Raises UserError where there are not enough of them, or processes cannot share the work.
    """
    if device.index is not None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: under torchrun choose cpu or cuda; each process takes a GPU of its own")
    if device.type == "cpu":
        return device
    own, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if own >= gpus:
        raise UserError(f"--nproc_per_node {os.environ['LOCAL_WORLD_SIZE']} is more than this machine's {gpus} GPUs")
    return torch.device("cuda", own)


def seed_apart(seed, step):
    """Let each process but the first draw random numbers of its own, for dropout in its share of the batch.

    They depend on nothing but the seed, the rank and the step, so that there is no state to save;
    the first process draws what a single one would.
    """
    if not is_first():
        torch.manual_seed(int(np.random.SeedSequence((seed, rank(), step)).generate_state(1, np.uint64)[0]))


def of_first(value):
    """The first process's `value`, in every process."""
    values = [value]
    if size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def share(items):
    """This process's part of a tensor's rows; the parts' sizes differ by one at most."""
    return items.tensor_split(size())[rank()]


def gather(items):
    """The lists of all processes as one list, in every process."""
    lists = [items]
    if size() > 1:
        lists = [None] * size()
        dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def mean(tensor):
    """The mean of a tensor over the processes; on a GPU nothing waits for it."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor / size()


def learner(classifier, has_unused_parameters):
    """The classifier for training: a backward pass leaves the mean of all processes' gradients in each.

    `has_unused_parameters()` says whether a trainable parameter gets no gradient; looking for those takes time.
    """
    if size() == 1:
        return classifier
    find_unused = of_first(has_unused_parameters())
    return replace(classifier, model=DistributedDataParallel(classifier.model, find_unused_parameters=find_unused))


def exchanging(model, now):
    """The context of a forward and backward pass after which a learner's model exchanges gradients, if it is `now`."""
    return nullcontext() if now or size() == 1 else model.no_sync()
