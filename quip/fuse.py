"""Inference on a CPU in fewer steps: modules of a model whose work the CPU kernel can do in one call."""

from __future__ import annotations

import os
from collections import defaultdict

import torch

from quip import cpu
from quip.decode import Block
from quip.forms import Gated, Member, Norm, Shared, is_ours
from quip.kernels import QuantizedLinear

# A module's `forward` is replaced on the instance, and only where both forms give the same numbers. Whenever somebody
# has to see what happens inside (autograd, a compiler, hooks, adapters, another device), the module runs as it always
# did. Parameters, names, saving and copying are not touched. The environment variable QUIP_FUSE=0 turns it all off.


@torch.no_grad()
def fuse(model: torch.nn.Module) -> torch.nn.Module:
    """Give modules of a model on the CPU their forms in `quip.forms` and `quip.decode`; returns the model."""
    unfuse(model)
    if os.environ.get("QUIP_FUSE") == "0" or cpu.load()[0] is None:
        return model
    for module in model.modules():
        if "forward" in module.__dict__:  # somebody else's
            continue
        for kind in (Norm, Gated, Block):
            if kind.fits(module) and (fused := kind(module)).agrees():
                module.forward = fused.forward
        for layers in sharing(module):
            shared = Shared(layers)
            for i, layer in enumerate(layers):
                layer.forward = Member(layer, shared, i).forward
    return model


def unfuse(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `fuse`; returns the model."""
    for module in model.modules():
        if is_ours(module.__dict__.get("forward")):
            del module.forward
    return model


def sharing(module: torch.nn.Module) -> list[list[QuantizedLinear]]:
    """The layers right inside a module that have their V in common."""
    groups = defaultdict(list)
    for layer in module.children():
        if type(layer) is QuantizedLinear and layer.rescale is None and "forward" not in layer.__dict__:
            kind = layer.in_features, layer.bits, layer.incoherence, layer.permute, layer.transforms[0, 0].item()
            groups[kind].append(layer)
    return [layers for layers in groups.values() if len(layers) > 1]
