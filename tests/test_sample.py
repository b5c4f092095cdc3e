"""lab sample: text from an archived checkpoint, by the train.py archived beside it."""

import base64
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import TINY_RULES, assert_refused

from lab.verify import sample

# A train.py after an architecture change: its model prefers, after any token, the one that its checkpoint names.
ARCHIVED = """
from dataclasses import dataclass
import torch
import prepare

@dataclass
class Config:
    vocab_size: int

class Model(torch.nn.Module):
    def __init__(self, state):
        super().__init__()
        self.state = state
    def forward(self, x):
        assert x.shape[1] <= prepare.MAX_SEQ_LEN, f"{x.shape[1]} tokens at once"
        logits = torch.zeros(*x.shape, prepare.VOCAB_SIZE)
        logits[:, :, self.state["model"]["favourite"]] = 50.0
        return logits

def load_model(path, device):
    return Model(torch.load(path, map_location=device, weights_only=True)).eval()
"""


class Tokenizer:
    """Bytes below 250, then BOS and three other special tokens."""

    bos_id, vocab_size = 250, 254

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def favouring(*favourites):
    """A model whose logits at the last position grow with the place in `favourites`; it notes what it is shown."""

    def model(x):
        model.seen.append(x.tolist())
        logits = torch.full((1, x.shape[1], Tokenizer.vocab_size), -100.0)
        for i, token in enumerate(favourites):
            logits[:, :, token] = float(i)
        return logits

    model.seen = []
    return model


def generate(model, **kwargs):
    defaults = dict(max_tokens=5, temperature=0, top_k=0, seed=0, context=8, device="cpu")
    return sample.generate(model, Tokenizer(), "ab", **(defaults | kwargs))


def archive(repo, favourite, name="0007-1a2b3c4", dataset="stdlib"):
    folder = repo.path / "runs" / name
    folder.mkdir(parents=True)
    (folder / "train.py").write_text(ARCHIVED)
    (folder / "run.log").write_text(
        f"compiling\nrun: {json.dumps({'run_id': 'x', 'dataset': dataset})}\n---\n"
    )
    torch.save({"model": {"favourite": torch.tensor(favourite)}, "config": {}}, folder / "checkpoint.pt")
    return folder


def give_tokenizer(repo):
    """What load_tokenizer reads, without preparing a dataset: all bytes, and as many pairs as the vocabulary has
    room for besides the four special tokens."""
    tokens = [bytes([i]) for i in range(256)]
    tokens += [bytes([97 + i // 16, 97 + i % 16]) for i in range(TINY_RULES["stdlib"][2] - 4 - len(tokens))]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    where = repo.run_code("import prepare; print(prepare.data_dir())", AUTORESEARCH_DATASET="stdlib").out.strip()
    Path(where).mkdir(parents=True)
    (Path(where) / "tokenizer.tiktoken").write_bytes(b"".join(lines))


# --- generation ---------------------------------------------------------------


def test_the_text_is_the_prompt_and_the_likeliest_tokens():
    assert generate(favouring(120, 121)) == "abyyyyy"


def test_the_context_is_cropped_to_what_the_model_can_take():
    model = favouring(120)
    generate(model, max_tokens=10, context=4)
    assert model.seen[0] == [[250, 97, 98]]
    assert model.seen[-1] == [[120, 120, 120, 120]]
    assert max(len(x[0]) for x in model.seen) == 4


def test_it_ends_where_the_document_ends_and_never_writes_a_special_token():
    assert generate(favouring(120, 250)) == "ab"
    assert generate(favouring(120, 253)) == "abxxxxx"


def test_temperature_and_seed():
    model = favouring(*range(100, 120))
    hot = [generate(model, temperature=20.0, seed=seed, max_tokens=30) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert len(set(hot[0])) > 8
    assert generate(model, temperature=0.01, max_tokens=30) == "ab" + "w" * 30


def test_top_k_leaves_only_the_k_likeliest():
    logits = torch.arange(10.0)
    generator = torch.Generator().manual_seed(0)
    drawn = {sample.next_token(logits, 100.0, 3, generator) for _ in range(300)}
    assert drawn == {7, 8, 9}
    assert {sample.next_token(logits, 1e6, 0, generator) for _ in range(500)} == set(range(10))


def test_probabilities_are_those_of_the_softmax():
    logits, n = torch.tensor([0.0, math.log(3.0)]), 2000
    generator = torch.Generator().manual_seed(0)
    ones = sum(sample.next_token(logits, 1.0, 0, generator) for _ in range(n))
    assert abs(ones / n - 0.75) < 0.04
    ones = sum(sample.next_token(logits, 0.5, 0, generator) for _ in range(n))
    assert abs(ones / n - 0.9) < 0.03


# --- the command --------------------------------------------------------------


def test_command_samples_the_best_run_with_its_own_code(make_repo, prepared_stdlib):
    repo = make_repo(
        "stdlib", AUTORESEARCH_DATASET="climbmix"
    )  # the run's dataset counts, not the environment's
    repo.copy_cache(prepared_stdlib)
    folder = archive(repo, favourite=ord("x"))
    (repo.path / "runs" / "best").symlink_to(folder.name)
    (repo.path / "train.py").write_text("raise SystemExit('the working copy must not be imported')\n")
    length = 100  # more than the tiny rules' MAX_SEQ_LEN of 64
    result = repo.run("-m", "lab", "sample", "--prompt", "a tale", "--max-tokens", length)
    assert result.rc == 0, result.err
    text = result.out.rstrip("\n")
    assert text.startswith("a tale") and len(set(text[6:])) == 1 and len(text) == 6 + length
    for name in ("7", "0007-1a2b3c4", "runs/0007-1a2b3c4"):
        assert sample.find_run(name, repo.path).resolve() == folder

    result = repo.run("-m", "lab", "sample", "7", "--prompt", "b", "--max-tokens", 3, "--output", "text.txt",
                      PYTHONDONTWRITEBYTECODE="")  # fmt: skip
    assert (result.rc, result.out) == (0, ""), result.err
    assert (repo.path / "text.txt").read_text() == "b" + text[-1] * 3 + "\n"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "run.log", "train.py"]


@pytest.mark.parametrize(
    "break_it, says",
    [
        (lambda folder: (folder / "checkpoint.pt").write_bytes(b"PK rubbish"), "0007-1a2b3c4: "),
        (lambda folder: (folder / "train.py").write_text("import torch\nclass Model("), "SyntaxError"),
        (lambda folder: (folder / "train.py").write_text("x = 1\n"), "load_model"),
        (lambda folder: (folder / "checkpoint.pt").unlink(), "no checkpoint.pt"),
    ],
)
def test_failure_is_one_line_and_leaves_the_old_output(make_repo, break_it, says):
    repo = make_repo("stdlib")
    break_it(archive(repo, favourite=1))
    (repo.path / "text.txt").write_text("old")
    assert_refused(repo.run("-m", "lab", "sample", "7", "--output", "text.txt"), "lab sample: ", says)
    assert (repo.path / "text.txt").read_text() == "old"
    assert not list(repo.path.glob("*.tmp"))


def test_no_such_run_and_bad_numbers(make_repo):
    repo = make_repo("stdlib")
    assert_refused(repo.run("-m", "lab", "sample"), "no archived run runs/best")
    assert_refused(repo.run("-m", "lab", "sample", "99"), "no archived run 99")
    assert_refused(repo.run("-m", "lab", "sample", "--max-tokens", "-1"), "negative")
