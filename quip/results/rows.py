"""A scale for each row, as OPTQ has it: what the methods that work in a model's own basis are measured with.

In an incoherent basis all rows are alike and one scale serves (chapter 7), so the package's files know no other.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from quip.algorithm import quantize_matrix
from quip.families import block_calls, decoder_blocks, quantizable, run_block, weight
from quip.methods import matrix_arguments
from quip.models import Progress, input_moments, layer_seed
from quip.plan import Plan, make_plan


@torch.no_grad()
def quantize_rows(
    model: PreTrainedModel, samples: torch.Tensor, bits: int, seed: int = 0, progress: Progress | None = None, **changes
) -> dict[str, dict]:
    """Round the weights of a model in place, block by block, to a grid whose scale differs from row to row.

    The proxy loss is a sum over rows, so a row may be rounded in units of its own: what is quantized is `W / r`, r the
    largest weight of each row, and Ŵ is `r` times the result. The weights stay in the model's 16 or 32 bits. Returns
    the report of each layer.
    """
    plan = make_plan(model, bits, seed, **changes)
    prefix, blocks = decoder_blocks(model)
    hidden, calls = block_calls(model, samples)
    reports: dict[str, dict] = {}
    for i, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        for names, moment in input_moments(block, hidden, call):
            for name in names:
                full, W = f"{prefix}.{i}.{name}", weight(quantizable(block)[name])
                What, reports[full] = round_rows(W, moment.H, plan, full)
                W.copy_(What)
        hidden = [run_block(block, x, call) for x in hidden]
        if progress:
            progress(i + 1, len(blocks), reports)
    return reports


def round_rows(W: torch.Tensor, H: torch.Tensor, plan: Plan, name: str) -> tuple[torch.Tensor, dict]:
    """Ŵ `(m, n)`, float64, and the report of its layer; W `(m, n)`, H `(n, n)`."""
    r = W.double().abs().amax(1, keepdim=True)
    r = torch.where(r > 0, r, 1.0)
    arguments = matrix_arguments(plan.choices, layer_seed(plan.seed, f"{name}/rounding"))
    q = quantize_matrix(W / r, H, plan.bits, name=name, **arguments)
    return q.dequantize() * r, {"shape": list(W.shape), **q.report}


def row_sizes(reports: dict[str, dict], bits: int) -> dict:
    """Bits per quantized weight if each row had a scale in float32; no file is written that has them."""
    shapes = [report["shape"] for report in reports.values()]
    return {"bits_per_weight": bits + 32 * sum(m for m, _ in shapes) / sum(m * n for m, n in shapes)}
