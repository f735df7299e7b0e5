"""What a process stands on: device, precision of the arithmetic, random state, an honest clock, memory."""

import contextlib
import ctypes
import platform
import statistics
import time

import torch
import torch.nn.functional as F

from finetuning import distributed
from finetuning.errors import UserError
from finetuning.machine import cpu_flags, cpu_name, process_peak_memory

DEVICE_TYPES = ("cuda", "mps", "cpu")  # in the order of preference
EMULATING = {"cuda": "GPU", "cpu": "CPU"}
# The flags under which Linux lists an x86 CPU's native bf16 arithmetic.
CPU_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}
# Parameters of glibc's `mallopt`, from its malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
COMPILATIONS = 64  # of one model: for training and evaluation, with and without mask, for a few lengths
WORTHWHILE = 1.2  # bf16 costs some accuracy of the arithmetic, so it has to be clearly faster


def select_device(name="auto"):
    """The torch.device called `name`, or with "auto" the first there is of CUDA, MPS and CPU.

    Of several processes each gets its own GPU. Raises UserError if the device is not there.
    """
    available = [kind for kind in DEVICE_TYPES if device_count(kind)]
    if name == "auto":
        name = available[0]
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device; choose auto, cpu, mps, cuda or cuda:1") from error
    if (device.index or 0) >= device_count(device.type):
        raise UserError(f"--device {name} is not on this machine; it has: {', '.join(available)}")
    if distributed.size() > 1:
        device = distributed.own_device(device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what a library does without naming a device is done there
    return device


def device_count(kind):
    """How many devices of this type PyTorch can use here."""
    return {"cuda": torch.cuda.device_count, "mps": torch.mps.device_count, "cpu": lambda: 1}.get(kind, lambda: 0)()


def select_precision(name, device):
    """Return ("fp32", "tf32" or "bf16", why); "auto" takes bf16 where the hardware has it natively and gains by it.

    The precision is that of the arithmetic; weights are float32 either way. bf16 that a CPU has to
    emulate can be hundreds of times slower, so the CPU's flags are read before anything is tried.
    Raises UserError for "tf32", fp32 whose products are rounded, on anything but CUDA from Ampere on.
    """
    if name == "tf32" and device.type != "cuda":
        raise UserError(f"--precision tf32 is for CUDA, not for {device.type}")
    if name == "tf32" and not is_ampere(device):
        raise UserError(f"--precision tf32 needs compute capability 8.0 or more; {hardware(device)} has "
                        f"{compute_capability(device)}: use --precision fp32")
    if name == "bf16" and emulates_bf16(device):
        return name, f"as asked; this {EMULATING[device.type]} emulates bf16, which is slower than fp32, perhaps by far"
    if name != "auto":
        return name, "as asked"
    if device.type == "cuda":
        return ("bf16" if is_ampere(device) else "fp32"), f"compute capability {compute_capability(device)}"
    if device.type == "cpu":
        native = " and ".join(sorted(CPU_BF16_FLAGS & cpu_flags()))
        if not native:
            return "fp32", "the CPU has no native bf16"
        # Some CPUs have the instructions and yet are faster in fp32.
        speedup = cpu_bf16_speedup()
        because = f"the CPU has {native}; a trial ran {speedup:.1f} times as fast as in fp32"
        return ("bf16" if speedup > WORTHWHILE else "fp32"), because
    return "fp32", "bf16 only when asked for on this device"


def compute_capability(device):
    """A GPU's compute capability, such as "7.5"."""
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def is_ampere(device):
    """Whether a GPU is of the Ampere generation or a later one, the first with TF32 and bf16."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def emulates_bf16(device):
    """Whether the device is known to compute bf16 by way of float32."""
    # Of other CPUs than x86 on Linux no flags are known.
    return (device.type == "cuda" and not is_ampere(device)
            or device.type == "cpu" and bool(cpu_flags()) and not CPU_BF16_FLAGS & cpu_flags())


def cpu_bf16_speedup(repeats=7):
    """How many times as fast a transformer-sized matrix product is in bf16 as in fp32, tried in about 50 ms."""
    x, weight = torch.ones(512, 768), torch.ones(768, 768)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        operands = x.to(dtype), weight.to(dtype)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            F.linear(*operands)
            times.append(time.perf_counter() - start)
        seconds[dtype] = statistics.median(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def autocast(device, precision):
    """The context in which forward passes run in the chosen precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def keep_freed_memory():
    """Let this process keep the memory that a training step frees for the next one; does nothing without glibc.

    As set up, glibc returns large blocks to the system, which then has to clear them page by
    page when the next step asks again: a tenth of a GPT-2 step's time.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def check_compiler(device):
    """Raise UserError where torch.compile cannot build a kernel for the device; a small one takes a few seconds."""
    try:
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.ones(2, device=device))
    except Exception as error:  # of any kind: nothing is wrong with what is compiled
        lines = [line for line in str(error).splitlines() if line and not line.endswith(" raised:")] or [repr(error)]
        reason = next((line for line in lines if " error: " in line), lines[0])
        tool = {"cpu": "a C++ compiler, which CXX may name", "cuda": "Triton"}.get(device.type, "what is missing")
        raise UserError(f"--compile does not work on this machine: {reason}; install {tool}, or leave out --compile"
                        ) from error


def compile_model(model, device, parts=1):
    """Compile a model for the shapes it meets, which should be few; on CUDA its kernels are replayed as one graph.

    Not where the gradients of several `parts` of a batch add up: a graph's next replay overwrites the last one's.
    """
    torch._dynamo.config.recompile_limit = COMPILATIONS
    model.compile(dynamic=False, mode="reduce-overhead" if device.type == "cuda" and parts == 1 else None)


def is_compiled(model):
    """Whether `compile_model` was called on the model, or on one that it wraps."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def hardware(device):
    """The name of what did the work, as a results table should state it."""
    names = {"cuda": lambda: torch.cuda.get_device_name(device), "mps": platform.machine,
             "cpu": lambda: f"{cpu_name()}, {torch.get_num_threads()} threads"}
    processes = f"{distributed.size()} processes, each on " if distributed.size() > 1 else ""
    return processes + names[device.type]()


def synchronize(device):
    """Wait until the device has finished, so that a clock read afterwards is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def empty_cache(device):
    """Return the memory that PyTorch keeps for later to the device."""
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


def peak_memory(device):
    """The most memory held so far, in bytes: on CUDA of the GPU, else of the process; None if unknown."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_peak_memory()


def random_state(device):
    """The state of every generator that training draws from: {device type: uint8 tensor}."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state, device):
    """Put back what `random_state` returned for a device of the same type."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state["mps"])
