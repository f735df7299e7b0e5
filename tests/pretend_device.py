"""A pretend GPU in pure Python: a machine without a GPU can test what is moved to it, drawn on it and computed on it.

    with pretend_device("cuda"):
        train_gpt.main(["--device", "cuda", ...])

Within the context `torch.device("cuda")` or `torch.device("mps")` exists. A tensor on it is a `PretendTensor`: to C++
a CPU tensor, where autograd, optimizers and kernels find what they need, and to Python one whose `device` is the
pretend one. A dispatch mode sees every operator that involves one and raises

- `DeviceMismatch` where tensors of different devices meet, with the exceptions that PyTorch makes: tensors without
  dimensions, indices on the CPU, copies;
- TypeError where a float64 tensor would be made on MPS, or a tensor is read by NumPy.

Random operators draw from the generator of their own device. `torch.cuda` and `torch.mps` have the functions that this
project calls, for the current device as in PyTorch: one that leaves out the device means GPU 0 unless `set_device` was
called.

What it cannot tell: autocast is the CPU's, whose lists of operators differ from CUDA's; tensors that meet in a backward
pass are not checked, since autograd's C++ makes some of its tensors where it believes to be, on the CPU; streams,
memory and speed. (`FakeTensorMode` was no alternative: its backward pass aborts a PyTorch built without CUDA.)
"""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CPU = torch.device("cpu")
KINDS = ("cuda", "mps")
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class DeviceMismatch(RuntimeError):
    """What PyTorch calls "Expected all tensors to be on the same device"."""


class PretendTensor(torch.Tensor):
    """A CPU tensor, `inner`, that says it is on another device."""

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

    # C++ believes that a copy to the CPU has nothing to do.
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

    def __reduce_ex__(self, protocol):  # what `torch.save` writes and `map_location="cpu"` reads
        return self.inner.detach().clone().__reduce_ex__(protocol)


class PretendMode(TorchDispatchMode):
    """Takes every operator that makes or reads a PretendTensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        makes_one = kwargs.get("device") is not None and torch.device(kwargs["device"]).type in KINDS
        if not makes_one and not any(isinstance(x, PretendTensor) for x in leaves(args, kwargs)):
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return result
        return execute(func, args, kwargs)


def leaves(args, kwargs):
    """An operator's arguments, those in a list of tensors one by one."""
    return [x for argument in (*args, *kwargs.values())
            for x in (argument if isinstance(argument, (list, tuple)) else [argument])]


def map_only(kind, function, value):
    """Apply a function to a value of this class, or to those in a list or tuple; leave everything else as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(map_only(kind, function, x) for x in value)
    return function(value) if isinstance(value, kind) else value


def execute(func, args, kwargs):
    """Check where an operator's tensors are, run it on the inner ones, and put its results on their device."""
    devices = {x.pretended for x in leaves(args, kwargs) if isinstance(x, PretendTensor)}
    asked = kwargs.get("device")
    in_backward = torch._C._current_graph_task_id() >= 0
    # Where autograd's C++ asks for the CPU it means the device of the tensors at hand.
    device = next(iter(devices), CPU) if asked is None or (in_backward and devices) else with_index(asked)
    if devices and func not in COPIES and not in_backward:
        check_devices(func, args, kwargs, devices)
    inner_args = map_only(PretendTensor, lambda x: x.inner, tuple(args))
    inner_kwargs = {key: map_only(PretendTensor, lambda x: x.inner, value) for key, value in kwargs.items()}
    if asked is not None:
        inner_kwargs["device"] = CPU
    if torch.Tag.nondeterministic_seeded in func.tags and device != CPU:
        with generators[device].drawing():
            result = func(*inner_args, **inner_kwargs)
    else:
        result = func(*inner_args, **inner_kwargs)
    if device.type == "mps" and any(isinstance(x, torch.Tensor) and x.dtype == torch.float64
                                    for x in leaves([result], {})):
        raise TypeError(f"{func}: MPS has no float64")
    return wrap(func, args, kwargs, result, device)


def check_devices(func, args, kwargs, devices):
    """Raise DeviceMismatch where an operator's tensors, those on `devices` and those on the CPU, may not meet."""
    indices = {id(x) for x in args[1]} if func in INDEXING else ()
    on_cpu = [x for x in leaves(args, kwargs) if isinstance(x, torch.Tensor) and not isinstance(x, PretendTensor)
              and x.dim() and id(x) not in indices]
    if len(devices) > 1 or on_cpu:
        found = [*map(str, devices), *(f"cpu {tuple(x.shape)}" for x in on_cpu)]
        raise DeviceMismatch(f"{func}: expected all tensors to be on the same device, found {', '.join(found)}")


def wrap(func, args, kwargs, result, device):
    """An operator's result as PretendTensors; an argument that it wrote to stays the object that it is."""
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
    """The random state of one device."""

    def __init__(self, seed=0):
        self.seed(seed)

    def seed(self, seed):
        self.state = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def drawing(self):
        """Let operators on inner tensors draw from this generator."""
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
    """A device as PyTorch's tensors name theirs: without an index the current one is meant."""
    device = torch.device(device)
    lacks_index = device.type in KINDS and device.index is None
    return torch.device(device.type, current[device.type]) if lacks_index else device


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """`scaled_dot_product_attention` in Python; the one in C++ makes its causal mask on the CPU."""
    scores = query @ key.mT * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.dropout(torch._safe_softmax(scores, -1), dropout_p, True) @ value


@contextmanager
def pretend_device(kind, count=1, capability=(8, 0)):
    """Let `count` GPUs of this kind, "cuda" (of that compute capability) or "mps", exist within the context."""
    generators.update((torch.device(kind, index), Generator()) for index in range(count))
    current[kind] = 0

    def generator(device=kind):
        return generators[with_index(torch.device(kind, device) if isinstance(device, int) else device)]

    def seed_all(seed):
        for index in range(count):
            generator(index).seed(seed)

    def set_rng_state(state, device=kind):
        generator(device).state = state.clone()
    fakes = {
        "device_count": lambda: count, "is_available": lambda: True, "_lazy_init": lambda: None,
        "current_device": lambda: current[kind],
        "set_device": lambda device: current.update({kind: torch.device(device).index or 0}),
        "get_rng_state": lambda device=kind: generator(device).state.clone(), "set_rng_state": set_rng_state,
        "manual_seed": lambda seed: generator().seed(seed), "manual_seed_all": seed_all,
        "synchronize": lambda device=None: None, "empty_cache": lambda: None,
        "get_device_name": lambda device=None: "Pretend GPU",
        "get_device_capability": lambda device=None: capability,
        "max_memory_allocated": lambda device=None: 1 << 20,
    }
    autocast, to = torch.autocast, torch.Tensor.to

    def to_index(tensor, *args, **kwargs):  # C++ does not know which device is the current one
        if "device" in kwargs:
            args = kwargs.pop("device"), *args
        return to(tensor, *map_only((torch.device, str), with_index, args), **kwargs)
    module = getattr(torch, kind)
    with ExitStack() as stack:
        for name, fake in fakes.items():
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, fake))
        stack.enter_context(mock.patch.object(torch.Tensor, "to", to_index))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", torch.Tensor.clone))
        # Tensors made in inference mode keep no record of views, which subclasses need.
        stack.enter_context(mock.patch("torch.inference_mode", torch.no_grad))
        stack.enter_context(mock.patch("torch.autocast", lambda device_type, **settings: autocast("cpu", **settings)))
        stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", attention))
        # `module.to(device)` puts a new tensor in a parameter's place: one on the CPU cannot become a PretendTensor.
        stack.enter_context(mock.patch.object(torch.__future__, "_overwrite_module_params_on_conversion", True))
        stack.enter_context(PretendMode())
        yield
