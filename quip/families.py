"""What in a model is quantized: its largest list of blocks, in them the linear layers, and what the blocks are called
with (masks, positions), heard by calling the model with blocks that only listen. There is no table of families."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, MutableSequence

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quip.errors import QuipError

log = logging.getLogger("quip")

LINEAR = (torch.nn.Linear, Conv1D)  # y = W x + b; GPT-2's Conv1D stores W transposed
Call = tuple[tuple, dict]  # what a block is called with beside its hidden states, by position and by name


def decoder_blocks(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """The name and the list of the model's decoder blocks: its largest ModuleList, by number of weights.

    Lists inside of lists, such as a block's experts, do not count. Raises `QuipError` if there is none.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m)}
    outer = {name: m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if not outer:
        raise QuipError(f"{type(model).__name__} has no list of decoder blocks")
    return max(outer.items(), key=lambda item: count_weights(item[1]))


def count_weights(module: torch.nn.Module) -> int:
    """The number of parameters below a module; packed codes count as bytes."""
    return sum(x.numel() for tensors in (module.parameters(), module.buffers()) for x in tensors)


def quantizable(block: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers of a block (or of anything) that can be quantized, by name: Linear and GPT-2's Conv1D."""
    return {name: m for name, m in block.named_modules() if isinstance(m, LINEAR)}


def unquantizable(block: torch.nn.Module) -> dict[str, str]:
    """The modules of a block that hold matrices in a form of their own, such as fused experts: name -> what of them.

    They stay in 16 bits, as do embeddings, which are looked up rather than multiplied by.
    """
    found = {}
    for name, module in block.named_modules():
        matrices = [key for key, p in module.named_parameters(recurse=False) if p.ndim > 1]
        if matrices and not isinstance(module, (*LINEAR, torch.nn.Embedding)):
            found[name] = f"{' and '.join(matrices)} of {type(module).__name__}"
    return found


def warn_unquantizable(model: torch.nn.Module) -> None:
    """Log, one line for each kind, what in the decoder blocks cannot be quantized, and how much of them that is."""
    prefix, blocks = decoder_blocks(model)
    total, found = count_weights(blocks), {}
    for name, kind in unquantizable(blocks).items():
        pattern = re.sub(r"^\d+", "*", name)
        count = sum(p.numel() for p in blocks.get_submodule(name).parameters(recurse=False))
        found[pattern, kind] = found.get((pattern, kind), 0) + count
    for (pattern, kind), count in found.items():
        log.warning(
            "%s.%s (%s, %.1f %% of the blocks' weights) cannot be quantized and stay in 16 bits",
            *(prefix, pattern, kind, 100 * count / total),
        )


def weight(layer: torch.nn.Module) -> torch.Tensor:
    """A layer's W `(m, n)`, outputs × inputs: a view, so that `weight(layer).copy_(Ŵ)` writes back."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def run_block(block: torch.nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """The output hidden states of a block for the hidden states `(1, seq_len, d)` of one sample."""
    args, kwargs = call
    out = block(hidden, *args, **kwargs)
    return out if isinstance(out, torch.Tensor) else out[0]


@torch.no_grad()
def block_calls(
    model: PreTrainedModel,
    samples: torch.Tensor,  # (count, seq_len) token ids
    hidden: MutableSequence[torch.Tensor] | None = None,
) -> tuple[MutableSequence[torch.Tensor], list[Call]]:
    """The hidden states `(1, seq_len, d)` that enter the first block, a sample each, and each block's other arguments.

    They are appended to `hidden`, if that is given: it may keep them elsewhere than in memory.

    Those differ from block to block (Gemma's alternate between two masks and two kinds of positions), but not from
    sample to sample, as all have one length. Only what comes before the blocks runs: of the blocks, no weight is
    touched. Raises `QuipError`, naming block and argument, for a model whose blocks take something of each sample's own
    beside its hidden states.
    """
    prefix, blocks = decoder_blocks(model)
    hidden, calls = [] if hidden is None else hidden, []
    for sample in samples:
        heard: list[tuple[torch.Tensor, Call]] = []
        with listening(blocks, heard), contextlib.suppress(_Heard):
            model(sample[None].to(model.device), use_cache=False)
        if len(heard) < len(blocks):
            raise QuipError(f"{type(model).__name__} calls {len(heard)} of its {len(blocks)} blocks in {prefix}")
        hidden.append(heard[0][0])
        calls = calls or [call for _, call in heard]
        for i, (_, call) in enumerate(heard):
            check_call(call, calls[i], f"{prefix}.{i}")
    return hidden, calls


class _Heard(Exception):
    """Ends a forward pass once the last block has been called."""


class _Passed(torch.Tensor):
    """Hidden states that a listening block hands on; a model that expects a tuple of it takes the first entry."""

    def __getitem__(self, index):
        return self if isinstance(index, int) and index == 0 else super().__getitem__(index)


@contextlib.contextmanager
def listening(blocks: torch.nn.ModuleList, heard: list) -> Iterator[None]:
    """While this lasts, blocks compute nothing: each appends what it is called with to `heard`, and the last one ends
    the forward pass."""
    own = [block.__dict__.get("forward") for block in blocks]

    def listen(*args, **kwargs):
        x = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        heard.append((x.as_subclass(torch.Tensor), (args[1:], kwargs)))
        if len(heard) == len(blocks):
            raise _Heard
        return x.as_subclass(_Passed)

    try:
        for block in blocks:
            block.forward = listen
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:  # of a device hook
                block.forward = forward


def check_call(call: Call, first: Call, block: str) -> None:
    """Raise `QuipError` unless a block is called for this sample as it was for the first, with nothing to be filled."""
    ours, theirs = ({**dict(enumerate(args, 1)), **kwargs} for args, kwargs in (call, first))
    for key in ours.keys() | theirs.keys():
        if isinstance(ours.get(key), (dict, list)) and not ours[key]:  # as where blocks share keys and values
            raise QuipError(f"{block}: argument {key!r} is filled by other blocks; such blocks cannot be calibrated")
        if not same(ours.get(key), theirs.get(key)):
            raise QuipError(f"{block}: argument {key!r} differs between samples; such blocks cannot be calibrated")


def same(a: object, b: object) -> bool:
    """Equality of arguments: tensors by their entries, nested tuples and dictionaries by their parts."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a is b or a == b
