"""Generates text from an archived checkpoint, with the train.py that is archived beside it.

    uv run -m lab sample                                    the best run: "Once upon a time", 100 tokens
    uv run -m lab sample runs/0007-1a2b3c4 --prompt "def main(" --temperature 0.5
    uv run -m lab sample 7 --output sample.txt              run 7; writes the text to a file

The model's code is the code of that run, so later changes of the architecture cannot break this.
"""

import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path

from lab.base import files
from lab.base.errors import Refused, Stop
from lab.store import names

HELP = "text from an archived checkpoint"


def add_arguments(parser):
    parser.description = (
        "Loads RUN/checkpoint.pt with the load_model of RUN/train.py and prints the prompt and the model's "
        "continuation, up to --max-tokens or the end of the document."
    )
    parser.add_argument("archive", metavar="RUN", nargs="?", default="runs/best", help="folder, its name or its number (runs/best)")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--max-tokens", type=int, default=100, help="tokens after the prompt, at most (100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the K likeliest tokens; 0: from all (0)")
    parser.add_argument("--seed", type=int, default=42, help="(42)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (cpu, because the GPU is usually busy with the next run)")
    parser.add_argument("--output", metavar="FILE", help="write the text to FILE, complete or not at all, and print nothing")


def find_run(name, root):
    """The folder of an archived run: a path, a folder's name in runs/, or its number."""
    numbered = sorted((root / names.RUNS).glob(f"{int(name):04d}-*")) if name.isdecimal() else []
    for path in (root / name, root / names.RUNS / name, *numbered):
        if path.is_file():  # runs/best on a system without symbolic links: the file holds a folder's name
            path = path.with_name(path.read_text().strip())
        if path.is_dir():
            missing = [file for file in (names.TRAIN, names.CHECKPOINT) if not (path / file).is_file()]
            if missing:
                raise Refused(f"{path} has no {' and no '.join(missing)}: it cannot be sampled from")
            return path
    raise Refused(f"no archived run {name}: `lab record` makes one in runs/ of every run that it keeps")


def dataset_of(folder):
    """The dataset that the run was trained on, from the header in its log; None without that line."""
    log = folder / names.RUN_LOG
    text = log.read_text(errors="replace")[:100_000] if log.is_file() else ""
    header = re.search(r"^run: (\{.*\})$", text, re.MULTILINE)
    return json.loads(header[1]).get("dataset") if header else None


def load_train(path):
    """The archived train.py as a separate module. Its `import prepare` finds the working tree's."""
    sys.dont_write_bytecode = True  # do not add __pycache__ to the archive
    spec = importlib.util.spec_from_file_location("archived_train", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def next_token(logits, temperature, top_k, generator):
    """Samples one token id from softmax(logits / temperature) over the top_k likeliest (0: all). logits: (V,)"""
    import torch

    if temperature <= 0:
        return int(logits.argmax())
    if 0 < top_k < logits.numel():
        least = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < least, -math.inf)
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))


def generate(model, tokenizer, prompt, max_tokens, temperature, top_k, seed, context, device):
    """The prompt and up to max_tokens after it; stops early if the model begins another document. There is no KV cache,
    because the architecture is unknown here: each token takes a forward pass over the last `context` tokens."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    for _ in range(max_tokens):
        x = torch.tensor([ids[-context:]], device=device)  # (1, T)
        with torch.no_grad():
            logits = model(x)[0, -1].float().cpu()  # (V,)
        logits[tokenizer.bos_id + 1 :] = -math.inf  # the other special tokens never occur in text
        token = next_token(logits, temperature, top_k, generator)
        if token == tokenizer.bos_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[1:])


def sample(folder, args):
    if dataset := dataset_of(folder):
        os.environ["AUTORESEARCH_DATASET"] = dataset  # before constants.py is imported: the vocabulary follows from it
    import constants
    import prepare

    if dataset and constants.DATASET != dataset:
        raise Refused(f"it was trained on {dataset}, but this process uses {constants.DATASET}")
    model = load_train(folder / names.TRAIN).load_model(folder / names.CHECKPOINT, args.device)
    return generate(
        model, prepare.load_tokenizer(), args.prompt, args.max_tokens, args.temperature, args.top_k, args.seed,
        constants.MAX_SEQ_LEN, args.device,
    )  # fmt: skip


def run(args):
    if args.max_tokens < 0 or args.top_k < 0 or args.temperature < 0:
        raise Refused("--max-tokens, --top-k and --temperature cannot be negative")
    folder = find_run(args.archive, Path.cwd())
    try:
        text = sample(folder, args)
        if args.output:
            files.write(args.output, text + "\n")
    except (Exception, SystemExit) as error:  # the archived train.py is an agent's: anything may be wrong with it
        kind = "" if isinstance(error, (Stop, SystemExit)) else f"{type(error).__name__}: "
        raise Refused(f"{folder}: {kind}{' '.join(str(error).split())[:300]}") from None
    if not args.output:
        print(text)
    return 0
