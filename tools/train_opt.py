"""Train the small OPT of the book on text that every Python carries, and write it as a float16 checkpoint.

    OMP_NUM_THREADS=1 python tools/train_opt.py book/data/opt --bf16

Text: the topics of Python's language reference that `quip.data` does not evaluate on, and the docstrings of the
standard library, both of the Python that runs this; another version of Python has another text, so the weights of the
book are data, and this is how they were made. Beside them it writes the text to evaluate on, and some of the training
text to calibrate on. Needs no network; a quarter of an hour on one core.
"""

import argparse
import ast
import math
import platform
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from quip.data import load_text, python_docs, tokenize
from quip.evaluate import perplexity

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # 0 to 3, as in OPT, which begins every text with </s>
TOPICS = 3  # times that a pass reads the topics: they are closer to what is evaluated than docstrings are
CONFIG = {  # OPT in small: biases, ReLU, learned positions, embeddings narrower than the model as in the 350m size
    "vocab_size": 1536,
    "word_embed_proj_dim": 96,
    "hidden_size": 192,
    "ffn_dim": 576,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
LEFT_OUT = {"test", "tests", "site-packages", "pydoc_data", "idlelib", "turtledemo", "lib2to3", "ensurepip"}


def docstrings() -> Iterator[str]:
    """The docstrings of each module of the standard library, as one text, by file name."""
    root = Path(sysconfig.get_path("stdlib"))
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if LEFT_OUT & set(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue  # what some systems leave out, and what is about one system
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escape sequences
            tree = ast.parse(path.read_bytes())
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        if any(found):
            yield "\n\n".join(filter(None, found))


def training_texts() -> list[str]:
    """The training text, documents apart. No paragraph of it is a paragraph of the evaluation text."""
    held_out = set(python_docs("evaluation").text.split("\n\n"))
    paragraphs = python_docs("calibration").text.split("\n\n")
    topics = ["\n\n".join(paragraphs[i : i + 64]) for i in range(0, len(paragraphs), 64)]
    others = ["\n\n".join(p for p in text.split("\n\n") if p not in held_out) for text in docstrings()]
    return topics * TOPICS + others


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens, with OPT's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **names)


def new_model(seed: int) -> OPTForCausalLM:
    torch.manual_seed(seed)
    return OPTForCausalLM(OPTConfig(**CONFIG, bos_token_id=2, eos_token_id=2, pad_token_id=1, init_std=0.05))


def batches(ids: torch.Tensor, count: int, size: int, length: int, seed: int) -> Iterator[torch.Tensor]:
    """`count` batches `(size, length)` of windows; a pass over the text begins at a random place, in random order."""
    generator, waiting = torch.Generator().manual_seed(seed), torch.empty(0, length, dtype=torch.long)
    for _ in range(count):
        if len(waiting) < size:
            start = torch.randint(length, (1,), generator=generator).item()
            windows = ids[start : start + (len(ids) - start) // length * length].view(-1, length)
            waiting = torch.cat([waiting, windows[torch.randperm(len(windows), generator=generator)]])
        yield waiting[:size]
        waiting = waiting[size:]


def optimizer(model: OPTForCausalLM) -> torch.optim.Optimizer:
    """AdamW; biases, norms and embeddings do not decay."""
    decays = {id(m.weight) for m in model.model.modules() if isinstance(m, torch.nn.Linear)}
    groups = [
        {"params": [p for p in model.parameters() if (id(p) in decays) == decay], "weight_decay": 0.1 * decay}
        for decay in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98))


def train(model: OPTForCausalLM, ids: torch.Tensor, args: argparse.Namespace) -> None:
    """Cross-entropy on windows of the text: warm-up, then a cosine down to a tenth of the learning rate."""
    optimise, start, mean = optimizer(model), time.perf_counter(), 0.0
    model.train()
    warm = max(args.steps // 20, 1)
    for step, batch in enumerate(batches(ids, args.steps, args.batch, args.length, args.seed), 1):
        rate = args.rate * min(step / warm, 0.55 + 0.45 * math.cos(math.pi * max(step - warm, 0) / args.steps))
        for group in optimise.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits = model(batch, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimise.step()
        optimise.zero_grad()
        mean += (loss.item() - mean) / min(step, 50)
        if step % 50 == 0 or step == args.steps:
            tokens, seconds = step * batch.numel(), time.perf_counter() - start
            print(f"step {step}: loss {mean:.3f}, {tokens / 1e6:.2f} M tokens, {seconds:.0f} s", flush=True)
    model.eval()


def write_texts(out: Path) -> None:
    """`evaluation.txt`, all that was held out, and `calibration.txt`, 16 paragraphs in 96 of the topics trained on."""
    paragraphs = python_docs("calibration").text.split("\n\n")
    chosen = [p for i, p in enumerate(paragraphs) if i // 16 % 6 == 0]
    (out / "calibration.txt").write_text("\n\n".join(chosen) + "\n", encoding="utf-8")
    (out / "evaluation.txt").write_text(python_docs("evaluation").text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=8, help="windows in a step (default: 8)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window (default: 256)")
    parser.add_argument("--rate", type=float, default=3e-3, help="largest learning rate (default: 0.003)")
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16: twice as fast where the CPU can")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    texts = training_texts()
    tokenizer = train_tokenizer(texts)
    ids = torch.tensor([i for text in texts for i in tokenizer(text, verbose=False).input_ids])
    model = new_model(args.seed)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.2f} M parameters, {sum(map(len, texts)):,} characters, {len(ids):,} tokens", flush=True)
    train(model, ids, args)
    model = model.half()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    write_texts(Path(args.out))
    held_out = tokenize(tokenizer, load_text(str(Path(args.out, "evaluation.txt"))))
    result = perplexity(model.float(), held_out, 256, progress=False)
    text = f"python-docs (Python {platform.python_version()})"
    print(f"perplexity {result['ppl']:.3f} on {result['tokens']} tokens of {text}")


if __name__ == "__main__":
    main()
