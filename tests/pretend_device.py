"""A simulated GPU in pure Python, for tests of device placement on a machine without a GPU.

    with pretend_device("cuda"):
        train_gpt.main(["--device", "cuda", ...])

Within the context `torch.device("cuda")` or `torch.device("mps")` exists. A tensor on it is a
`PretendTensor` of pretend_tensor.py: a CPU tensor for C++ (autograd, optimizers, kernels), and for
Python a tensor whose `device` is the simulated one. A dispatch mode intercepts every operator that
involves one and raises

- `DeviceMismatch` if its tensors are on different devices, with PyTorch's exceptions: tensors without
  dimensions, indices on the CPU, copies;
- TypeError if the result is float64 on MPS, or if NumPy reads a tensor.

Random operators use the generator of their own device. `torch.cuda` and `torch.mps` get the functions
that this project calls; without a device argument they use the current device, GPU 0 until `set_device`.

Not simulated: CUDA's autocast (the CPU's is used, with other lists of operators), device checks in
backward passes (autograd's C++ creates some tensors on the CPU), streams, memory and speed.
`FakeTensorMode` is not an alternative: its backward pass aborts a PyTorch built without CUDA.
"""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from pretend_tensor import Generator, PretendMode, current, generators, map_only, with_index


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Compute `scaled_dot_product_attention` in Python; C++ would create its causal mask on the CPU."""
    scores = query @ key.mT * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.dropout(torch._safe_softmax(scores, -1), dropout_p, True) @ value


@contextmanager
def pretend_device(kind, count=1, capability=(8, 0)):
    """Simulate `count` GPUs of a kind, "cuda" (of a compute capability) or "mps", while the block runs."""
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
        "device_count": lambda: count,
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "current_device": lambda: current[kind],
        "set_device": lambda device: current.update({kind: torch.device(device).index or 0}),
        "get_rng_state": lambda device=kind: generator(device).state.clone(),
        "set_rng_state": set_rng_state,
        "manual_seed": lambda seed: generator().seed(seed),
        "manual_seed_all": seed_all,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda device=None: "Pretend GPU",
        "get_device_capability": lambda device=None: capability,
        "is_current_stream_capturing": lambda: False,
        "max_memory_allocated": lambda device=None: 1 << 20,
    }
    autocast, to = torch.autocast, torch.Tensor.to

    def to_index(tensor, *args, **kwargs):  # C++ does not know the current device
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
        # Inference tensors do not track views, which tensor subclasses need.
        stack.enter_context(mock.patch("torch.inference_mode", torch.no_grad))
        stack.enter_context(mock.patch("torch.autocast", lambda device_type, **settings: autocast("cpu", **settings)))
        stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", attention))
        # Let `module.to(device)` replace parameters: a CPU tensor cannot become a PretendTensor in place.
        stack.enter_context(mock.patch.object(torch.__future__, "_overwrite_module_params_on_conversion", True))
        stack.enter_context(PretendMode())
        yield
