"""Inference on a CPU in fewer steps: norms, gated blocks and layers that share an input, each as one kernel call."""

from __future__ import annotations

import os
from collections import defaultdict

import torch
from torch.nn.modules.module import _has_any_global_hook

from quip import cpu
from quip.kernels import QuantizedLinear

# A module's `forward` is replaced on the instance, and only where both forms give the same numbers. Whenever somebody
# has to see what happens inside (autograd, a compiler, hooks, adapters, another device), the module runs as it always
# did. Parameters, names, saving and copying are not touched. The environment variable QUIP_FUSE=0 turns it all off.

CLOSE = 1e-3  # relative difference of two forms that are the same but for rounding


class Fused:
    """A module's other `forward`. It has no state of its own that would have to be saved or copied."""

    def __init__(self, module: torch.nn.Module):
        self.module = module

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """What the module's own `forward` returns: by the kernel if that can do it."""
        y = self.run(x) if cpu.is_plain(x) and not args and not kwargs else None
        return type(self.module).forward(self.module, x, *args, **kwargs) if y is None else y

    def run(self, x: torch.Tensor) -> torch.Tensor | None:
        """The output for plain numbers, or None if it has to be computed the ordinary way."""
        raise NotImplementedError


class Norm(Fused):
    """`weight · x / sqrt(mean(x²) + eps)`: RMSNorm as Llama and most of its successors have it."""

    def __init__(self, module: torch.nn.Module):
        super().__init__(module)
        self.eps = epsilon(module)

    @staticmethod
    def fits(module: torch.nn.Module) -> bool:
        """Whether the module has an epsilon and one vector, `weight`."""
        names = [name for name, _ in module.named_parameters()]
        return names == ["weight"] and module.weight.dim() == 1 and isinstance(epsilon(module), float)

    def run(self, x: torch.Tensor) -> torch.Tensor | None:
        weight = self.module._parameters.get("weight")
        if weight is None or (weight.requires_grad and torch.is_grad_enabled()):
            return None
        return cpu.rms_norm(x, weight, self.eps)

    def sample(self) -> torch.Tensor:
        """Inputs: an ordinary one, and one so small that eps counts."""
        weight = self.module.weight
        return (gaussian(2, len(weight)) * torch.tensor([[1.0], [1e-3]])).to(weight.dtype)


def epsilon(module: torch.nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


class Together:
    """Layers with one V, of one width and one number of bits."""

    def __init__(self, layers: list[QuantizedLinear]):
        self.layers, self.sure = layers, []

    def calls(self, x: torch.Tensor) -> list[cpu.Call] | None:
        """The kernel's calls of all layers; None if x is not for them, or they do not share V (any more)."""
        calls = [layer.prepared() for layer in self.layers]
        if None in calls or not calls[0].takes(x):
            return None
        if calls != self.sure:  # they compare by identity: some layer has been changed
            if not cpu.share_input(calls):
                return None
            self.sure = calls
        return calls


class Gated(Fused):
    """`down(silu(gate(x)) · up(x))`, the block between two attentions, its three layers quantized."""

    def __init__(self, module: torch.nn.Module):
        super().__init__(module)
        self.gate, self.up, self.down, self.act = (module.get_submodule(name) for name in PARTS)
        self.outer = Together([self.gate, self.up])

    @staticmethod
    def fits(module: torch.nn.Module) -> bool:
        """Whether the module has these layers and an activation, and nothing else."""
        children = dict(module.named_children())
        return children.keys() == set(PARTS) and all(type(children[name]) is QuantizedLinear for name in PARTS[:3])

    def run(self, x: torch.Tensor) -> torch.Tensor | None:
        parts = [self.module._modules.get(name) for name in PARTS]
        own = self.gate, self.up, self.down, self.act
        if any(part is not mine or is_watched(mine) for part, mine in zip(parts, own, strict=True)):
            return None
        calls, down = self.outer.calls(x), self.down.prepared()
        return cpu.gated(*calls, down, x) if calls and down else None

    def sample(self) -> torch.Tensor:
        """Inputs."""
        return gaussian(2, self.gate.in_features)


PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


def is_watched(module: torch.nn.Module) -> bool:
    """Whether hooks, or another `forward`, want to see a call of this module."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    own = module.__dict__.get("forward")
    return bool(hooks) or _has_any_global_hook() or not (own is None or is_ours(own))


def is_ours(forward) -> bool:
    return isinstance(getattr(forward, "__self__", None), Fused)


class Shared:
    """Layers that are called one after the other with one x, such as q, k and v: the first call computes all.

    The others find their results, if they are called with the very same tensor, unchanged. If results are not asked
    for, the layers are not used as was thought, and each computes its own from then on.
    """

    def __init__(self, layers: list[QuantizedLinear]):
        self.together, self.waiting, self.given_up = Together(layers), None, False

    def take(self, i: int, x: torch.Tensor) -> torch.Tensor | None:
        """The output of layer i, or None if it has to be computed alone."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            of, version, outputs = waiting
            if of is x and version == x._version and i in outputs:
                self.waiting = waiting if len(outputs) > 1 else None
                return outputs.pop(i)
            self.given_up = True
        calls = None if self.given_up or x.is_inference() else self.together.calls(x)  # inference tensors: no versions
        if not calls:
            return None
        outputs = dict(enumerate(cpu.linears(calls, x)))
        self.waiting = x, x._version, outputs
        return outputs.pop(i)


class Member(Fused):
    """One of the layers that share an input."""

    def __init__(self, module: QuantizedLinear, shared: Shared, i: int):
        super().__init__(module)
        self.shared, self.i = shared, i

    def run(self, x: torch.Tensor) -> torch.Tensor | None:
        return self.shared.take(self.i, x)


def fuse(model: torch.nn.Module) -> torch.nn.Module:
    """Give the modules of a model on the CPU their faster forms; those that have none, or differ, stay as they are."""
    unfuse(model)
    if os.environ.get("QUIP_FUSE") == "0" or cpu.load()[0] is None:
        return model
    for module in model.modules():
        for kind in (Norm, Gated):
            if kind.fits(module) and agree(module, fused := kind(module)):
                module.forward = fused.forward
        for layers in sharing(module):
            shared = Shared(layers)
            for i, layer in enumerate(layers):
                layer.forward = Member(layer, shared, i).forward
    return model


def unfuse(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `fuse`."""
    for module in model.modules():
        if is_ours(module.__dict__.get("forward")):
            del module.forward
    return model


def sharing(module: torch.nn.Module) -> list[list[QuantizedLinear]]:
    """The layers right inside a module that have their V in common."""
    groups = defaultdict(list)
    for layer in module.children():
        if type(layer) is QuantizedLinear and layer.rescale is None and "forward" not in layer.__dict__:
            kind = layer.in_features, layer.bits, layer.incoherence, layer.permute
            groups[kind, layer.transforms[0, 0].item()].append(layer)
    return [layers for layers in groups.values() if len(layers) > 1]


@torch.no_grad()
def agree(module: torch.nn.Module, fused: Fused) -> bool:
    """Whether both forms of a module give the same numbers, but for rounding."""
    x = fused.sample()
    y = fused.run(x) if "forward" not in module.__dict__ and cpu.is_plain(x) else None
    if y is None:
        return False
    expected = type(module).forward(module, x)
    return y.dtype == expected.dtype and bool((y - expected).float().norm() <= CLOSE * expected.float().norm())


def gaussian(*shape: int) -> torch.Tensor:
    """Standard normal numbers on the CPU, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), device="cpu")
