"""Tensors on the simulated GPUs of pretend_device.py, and the checks of each operator on them."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CPU = torch.device("cpu")
KINDS = ("cuda", "mps")
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class DeviceMismatch(RuntimeError):
    """Exception for PyTorch's "Expected all tensors to be on the same device"."""


class PretendTensor(torch.Tensor):
    """A CPU tensor, `inner`, that reports another device."""

    @staticmethod
    def __new__(cls, inner, device):
        return torch.Tensor._make_subclass(cls, inner, False)

    def __init__(self, inner, device):
        self.inner, self.pretended = inner, device

    device = property(lambda self: self.pretended)
    is_cuda = property(lambda self: self.pretended.type == "cuda")
    is_mps = property(lambda self: self.pretended.type == "mps")
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})

    # C++ would skip a copy to the CPU, because for C++ the tensor is on the CPU.
    def to(self, *args, copy=False, **kwargs):
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":
            return aten._to_copy.default(self, dtype=dtype or self.dtype, device=CPU)
        return super().to(dtype or self.dtype, copy=copy)

    def type_as(self, other):
        return self.to(other.dtype)

    def cpu(self):
        return self.to(CPU)

    def numpy(self, **_):
        raise TypeError(f"can't convert {self.pretended} device type tensor to numpy")

    __array__ = numpy

    def tolist(self):
        return self.inner.detach().tolist()

    def __repr__(self, **_):
        return f"{self.inner!r} on {self.pretended}"

    def __reduce_ex__(self, protocol):  # for torch.save; loaded as a CPU tensor
        return self.inner.detach().clone().__reduce_ex__(protocol)


class PretendMode(TorchDispatchMode):
    """Dispatch mode that intercepts every operator that creates or reads a PretendTensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        creates = kwargs.get("device") is not None and torch.device(kwargs["device"]).type in KINDS
        if not creates and not any(isinstance(x, PretendTensor) for x in leaves(args, kwargs)):
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return result
        return execute(func, args, kwargs)


def leaves(args, kwargs):
    """Return an operator's arguments, with lists of tensors flattened."""
    return [
        x
        for argument in (*args, *kwargs.values())
        for x in (argument if isinstance(argument, (list, tuple)) else [argument])
    ]


def map_only(kind, function, value):
    """Apply a function to a value, or to the elements of a list or tuple, that are of a class."""
    if isinstance(value, (list, tuple)):
        return type(value)(map_only(kind, function, x) for x in value)
    return function(value) if isinstance(value, kind) else value


def execute(func, args, kwargs):
    """Check the devices of an operator's tensors, run it on the inner tensors and wrap its results."""
    devices = {x.pretended for x in leaves(args, kwargs) if isinstance(x, PretendTensor)}
    requested = kwargs.get("device")
    in_backward = torch._C._current_graph_task_id() >= 0
    # If autograd's C++ requests the CPU, it means the device of the other tensors.
    use_inputs = requested is None or (in_backward and devices)
    device = next(iter(devices), CPU) if use_inputs else with_index(requested)
    if devices and func not in COPIES and not in_backward:
        check_devices(func, args, kwargs, devices)
    inner_args = map_only(PretendTensor, lambda x: x.inner, tuple(args))
    inner_kwargs = {key: map_only(PretendTensor, lambda x: x.inner, value) for key, value in kwargs.items()}
    if requested is not None:
        inner_kwargs["device"] = CPU
    if torch.Tag.nondeterministic_seeded in func.tags and device != CPU:
        with generators[device].active():
            result = func(*inner_args, **inner_kwargs)
    else:
        result = func(*inner_args, **inner_kwargs)
    if device.type == "mps" and any(
        isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in leaves([result], {})
    ):
        raise TypeError(f"{func}: MPS has no float64")
    return wrap(func, args, kwargs, result, device)


def check_devices(func, args, kwargs, devices):
    """Raise DeviceMismatch if an operator's tensors are on several of `devices`, or on one of them and on the CPU."""
    indices = {id(x) for x in args[1]} if func in INDEXING else ()
    on_cpu = [
        x
        for x in leaves(args, kwargs)
        if isinstance(x, torch.Tensor) and not isinstance(x, PretendTensor) and x.dim() and id(x) not in indices
    ]
    if len(devices) > 1 or on_cpu:
        found = [*map(str, devices), *(f"cpu {tuple(x.shape)}" for x in on_cpu)]
        raise DeviceMismatch(f"{func}: expected all tensors to be on the same device, found {', '.join(found)}")


def wrap(func, args, kwargs, result, device):
    """Wrap an operator's result in PretendTensors; return an argument that it wrote to as the same object."""
    written = {}
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            written.update(dict.fromkeys(argument.alias_info.before_set, given))

    def wrap_one(value, spec):
        if spec.alias_info is not None and spec.alias_info.is_write:
            return written[next(iter(spec.alias_info.before_set))]
        return value if device == CPU else map_only(torch.Tensor, lambda x: PretendTensor(x, device), value)

    returns = func._schema.returns
    if len(returns) == 1:
        return wrap_one(result, returns[0])
    return tuple(map(wrap_one, result, returns)) if returns else result


class Generator:
    """Random state of one device."""

    def __init__(self, seed=0):
        self.seed(seed)

    def seed(self, seed):
        self.state = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def active(self):
        """Use this generator as the CPU's while the block runs."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(before)


generators = {}  # by device, with index
current = {}  # the index of the current device, by kind


def with_index(device):
    """Return a device with its index, as tensors have it: by default that of the current device."""
    device = torch.device(device)
    lacks_index = device.type in KINDS and device.index is None
    return torch.device(device.type, current[device.type]) if lacks_index else device
