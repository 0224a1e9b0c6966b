"""Other forms of a model's modules, for inference on a CPU: each is one call of the kernel (see `quip.fuse`)."""

from __future__ import annotations

import torch
from torch.nn.modules.module import _has_any_global_hook

from quip import calls, cpu
from quip.kernels import QuantizedLinear

PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


class Fused:
    """A module's other `forward`. It has no state that would have to be saved; a module's copy gets its own."""

    def __init__(self, module: torch.nn.Module):
        self.module = module

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """What the module's own `forward` returns: by the kernel if that can do it."""
        y = self.run(x) if not args and not kwargs and cpu.is_plain(x) else None
        return type(self.module).forward(self.module, x, *args, **kwargs) if y is None else y

    def run(self, x: torch.Tensor) -> torch.Tensor | None:
        """The output for plain numbers, or None if it has to be computed the ordinary way."""
        raise NotImplementedError

    def sample(self) -> torch.Tensor:
        """An input to compare both forms with."""
        raise NotImplementedError

    def agrees(self) -> bool:
        """Whether both forms give the same numbers, but for rounding."""
        x = self.sample()
        y = self.run(x) if cpu.is_plain(x) else None
        return y is not None and is_close(y, type(self.module).forward(self.module, x))


def is_close(y: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two forms differ by rounding at most; those of something else are far beyond."""
    tolerance = 1e-3 if y.dtype == torch.float32 else 3e-2
    return y.dtype == expected.dtype and bool((y - expected).float().norm() <= tolerance * expected.float().norm())


def gaussian(*shape: int) -> torch.Tensor:
    """Standard normal numbers on the CPU, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), device="cpu")


def is_watched(module: torch.nn.Module) -> bool:
    """Whether hooks, or another `forward` than ours, want to see a call of this module."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    other = module.__dict__.get("forward")
    return bool(hooks) or not (other is None or is_ours(other))


def is_ours(forward) -> bool:
    return isinstance(getattr(forward, "__self__", None), Fused)


class Norm(Fused):
    """`weight · x / sqrt(mean(x²) + eps)`: RMSNorm as Llama and most of its successors have it."""

    @staticmethod
    def fits(module: torch.nn.Module) -> bool:
        """Whether the module has an epsilon and one vector, `weight`."""
        names = [name for name, _ in module.named_parameters()]
        return names == ["weight"] and module.weight.dim() == 1 and isinstance(epsilon(module), float)

    def run(self, x: torch.Tensor) -> torch.Tensor | None:
        weight = self.module._parameters["weight"]
        if weight.requires_grad and torch.is_grad_enabled():
            return None
        return calls.rms_norm(x, weight, epsilon(self.module))

    def sample(self) -> torch.Tensor:
        """An ordinary row, and one so small that eps counts."""
        weight = self.module.weight
        return (gaussian(2, len(weight)) * torch.tensor([[1.0], [1e-3]])).to(weight.dtype)


def epsilon(module: torch.nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


class Together:
    """Layers that share their input and their V, or a single one."""

    def __init__(self, *layers: QuantizedLinear):
        self.layers, self.sure = layers, []

    def calls(self, x: torch.Tensor | None = None) -> list[cpu.Call] | None:
        """The kernel's calls of all layers, for x if it is given; None if it cannot run one, or all together."""
        found = [layer.prepared() for layer in self.layers]
        if found != self.sure:  # calls compare by identity: some layer has been changed
            if None in found or not calls.share_input(found):
                return None
            self.sure = found
        if x is not None and (not found[0].takes(x) or any(call.is_long(x) for call in found)):
            return None
        return found


class Gated(Fused):
    """`down(silu(gate(x)) · up(x))`, the block between two attentions, its three layers quantized."""

    def __init__(self, module: torch.nn.Module):
        super().__init__(module)
        self.parts = [module.get_submodule(name) for name in PARTS]
        gate, up, down, _ = self.parts
        self.outer, self.inner = Together(gate, up), Together(down)

    @staticmethod
    def fits(module: torch.nn.Module) -> bool:
        """Whether the module has these layers, one after the other, and an activation, and nothing else."""
        children = dict(module.named_children())
        if children.keys() != set(PARTS) or any(type(children[name]) is not QuantizedLinear for name in PARTS[:3]):
            return False
        gate, up, down = (children[name] for name in PARTS[:3])
        return gate.in_features == up.in_features and gate.out_features == up.out_features == down.in_features

    def run(self, x: torch.Tensor) -> torch.Tensor | None:
        for name, part in zip(PARTS, self.parts, strict=True):
            if self.module._modules[name] is not part or is_watched(part):
                return None
        outer, inner = self.outer.calls(x), self.inner.calls()
        if outer is None or inner is None or _has_any_global_hook():
            return None
        return calls.gated(*outer, *inner, x)

    def sample(self) -> torch.Tensor:
        """Two rows."""
        return gaussian(2, self.parts[0].in_features)


class Shared:
    """Layers that are called one after the other with one x, such as q, k and v: the first call computes all.

    The others find their results, if they are called with the very same tensor, unchanged. If results are not asked
    for, the layers are not used as was thought, and each computes its own from then on.
    """

    def __init__(self, layers: list[QuantizedLinear]):
        self.together, self.waiting, self.given_up = Together(*layers), None, False

    def take(self, i: int, x: torch.Tensor) -> torch.Tensor | None:
        """The output of layer i, or None if it has to be computed alone."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            of, version, outputs = waiting
            if of is x and version == x._version and i in outputs:
                self.waiting = waiting if len(outputs) > 1 else None
                return outputs.pop(i)
            self.given_up = True
        if self.given_up or x.is_inference():  # inference tensors do not count their changes
            return None
        found = self.together.calls(x)
        if found is None:
            return None
        outputs = dict(enumerate(cpu.linears(found, x)))
        self.waiting = x, x._version, outputs
        return outputs.pop(i)


class Member(Fused):
    """One of the layers that share an input."""

    def __init__(self, module: QuantizedLinear, shared: Shared, i: int):
        super().__init__(module)
        self.shared, self.i = shared, i

    def run(self, x: torch.Tensor) -> torch.Tensor | None:
        return self.shared.take(self.i, x)
