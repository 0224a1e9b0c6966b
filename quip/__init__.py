"""QuIP, 2-bit quantization of large language models with guarantees: a book and its library. Importing it registers the
method `quip` with Transformers, so that `AutoModelForCausalLM.from_pretrained` loads what `quip quantize` wrote."""

__version__ = "0.1.0"

from quip.algorithm import QuantizedMatrix, quantize_matrix
from quip.checkpoint import save_model
from quip.errors import QuipError
from quip.evaluate import perplexity
from quip.hf import QuipConfig
from quip.kernels import QuantizedLinear
from quip.ldlq import ldlq
from quip.loading import load_model
from quip.models import quantize_model
from quip.pipeline import quantize
from quip.proxy import SecondMoment, proxy_loss

__all__ = [
    "QuantizedLinear",
    "QuantizedMatrix",
    "QuipConfig",
    "QuipError",
    "SecondMoment",
    "ldlq",
    "load_model",
    "perplexity",
    "proxy_loss",
    "quantize",
    "quantize_matrix",
    "quantize_model",
    "save_model",
]
