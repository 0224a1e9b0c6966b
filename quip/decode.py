"""A decoder block of Llama's kind, one token at a time, in two calls of the CPU kernel (see `quip.fuse`)."""

from __future__ import annotations

import torch
from torch.nn.modules.module import _has_any_global_hook
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from quip.calls import BlockCall
from quip.cpu import is_plain
from quip.forms import Fused, Gated, Norm, Together, epsilon, gaussian, is_close, is_watched
from quip.kernels import QuantizedLinear

CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# Positions come with their cosines and sines, and a `DynamicCache` appends: older Transformers say it again.
ARGUMENTS = {
    *("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings"),
    "cache_position",
}


class Block(Fused):
    """`y = x + o(attention(norm(x)))`, then `y + mlp(norm(y))`, for one token that sees everything in the cache."""

    def __init__(self, module: torch.nn.Module):
        super().__init__(module)
        self.attention, mlp = module.self_attn, module.mlp
        q, k, v, o = (self.attention.get_submodule(name) for name in ATTENTION)
        self.norms = module.input_layernorm, module.post_attention_layernorm
        self.groups = Together(q, k, v), Together(o), Together(mlp.gate_proj, mlp.up_proj), Together(mlp.down_proj)
        self.parts = [
            (owner, name, part) for owner in (module, self.attention, mlp) for name, part in owner.named_children()
        ]
        self.call = None

    @staticmethod
    def fits(module: torch.nn.Module) -> bool:
        """Whether the module has these parts and no others, of sizes that the kernel takes."""
        if set(module._modules) != CHILDREN or set(module.self_attn._modules) != set(ATTENTION):
            return False
        attention, norms = module.self_attn, (module.input_layernorm, module.post_attention_layernorm)
        layers = [attention.get_submodule(name) for name in ATTENTION]
        if any(type(layer) is not QuantizedLinear for layer in layers):
            return False
        return Gated.fits(module.mlp) and all(map(Norm.fits, norms)) and sizes_fit(attention, layers, module.mlp)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The hidden states after the block."""
        y = self.step(x, **kwargs) if not args and kwargs.keys() <= ARGUMENTS and is_plain(x) else None
        return type(self.module).forward(self.module, x, *args, **kwargs) if y is None else y

    def step(
        self,
        x: torch.Tensor,  # (1, 1, n)
        attention_mask=None,
        past_key_values=None,
        position_embeddings=None,  # cos and sin (1, 1, size)
        **others,
    ) -> torch.Tensor | None:
        """One token further, or None if anything is out of the ordinary."""
        i, cache = self.attention.layer_idx, past_key_values
        if attention_mask is not None or x.shape[:-1] != (1, 1) or type(cache) is not DynamicCache or cache.offloading:
            return None
        if len(cache.layers) <= i or type(cache.layers[i]) is not DynamicLayer or not self.is_as_it_was():
            return None
        call = self.prepared(x)
        if call is None or not all(call.turns_by(angles) for angles in position_embeddings):
            return None
        q, k, v = call.enter(x, *position_embeddings)
        return call.leave(x, q, *cache.update(k, v, i))

    def is_as_it_was(self) -> bool:
        """Whether all parts are still in their places, and nobody watches them."""
        for owner, name, part in self.parts:
            if owner._modules[name] is not part or is_watched(part):
                return False
        return not _has_any_global_hook()

    def prepared(self, x: torch.Tensor) -> BlockCall | None:
        """The kernel's call, made anew if a tensor has changed; None if it cannot take this x."""
        weights = [norm._parameters["weight"] for norm in self.norms]
        groups = [group.calls() for group in self.groups]
        if None in groups or not groups[0][0].takes(x) or any(weight.dtype != x.dtype for weight in weights):
            return None
        if x.dtype == torch.float16 or (torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)):
            return None
        calls = [call for group in groups for call in group]
        if self.call is None or not self.call.is_of(calls, weights):
            eps, attention = [epsilon(norm) for norm in self.norms], self.attention
            self.call = BlockCall(calls, weights, eps, attention.scaling, attention.head_dim)
        return self.call

    def agrees(self) -> bool:
        """Whether both forms give the same, with three tokens in the cache."""
        attention, dtype = self.attention, self.norms[0].weight.dtype
        n, shared, size = attention.q_proj.in_features, attention.k_proj.out_features, attention.head_dim
        x, angles = gaussian(1, 1, n).to(dtype), gaussian(1, 1, size // 2).repeat(1, 1, 2)
        past = gaussian(2, 1, shared // size, 3, size).to(dtype)

        def run(forward) -> torch.Tensor | None:
            cache = DynamicCache()
            cache.update(*past, attention.layer_idx)
            angle = angles.cos().to(dtype), angles.sin().to(dtype)
            return forward(x, past_key_values=cache, position_embeddings=angle, attention_mask=None)

        y = run(self.step) if is_plain(x) else None
        try:
            expected = run(type(self.module).forward.__get__(self.module))
        except Exception:  # a block of another kind wants other arguments
            return False
        return y is not None and isinstance(expected, torch.Tensor) and is_close(y - x, expected - x)


def sizes_fit(attention: torch.nn.Module, layers: list[QuantizedLinear], mlp: torch.nn.Module) -> bool:
    """Whether heads are whole vectors, and every layer takes what the one before it gives."""
    size = getattr(attention, "head_dim", None)
    known = isinstance(size, int) and isinstance(getattr(attention, "layer_idx", None), int)
    if not known or not isinstance(getattr(attention, "scaling", None), float):
        return False
    q, k, v, o = layers
    n = {
        q.in_features,
        k.in_features,
        v.in_features,
        o.out_features,
        mlp.gate_proj.in_features,
        mlp.down_proj.out_features,
    }
    heads = q.out_features == o.in_features and k.out_features == v.out_features
    return heads and len(n) == 1 and size % 16 == k.out_features % size == q.out_features % k.out_features == 0
