"""MuonAdamW against torch's own AdamW and Muon, and against cases computed by hand."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_model import tiny_model

import train

QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5  # torch.optim.Muon's own, five times
SHAPES = [(32, 64), (64, 32)]  # wide, tall


def parameters(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in shapes]


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def muon(params, lr=0.1, momentum=0.9, weight_decay=0.0, beta2=None, coefficients=QUINTIC, dtype=torch.float32):
    group = dict(kind="muon", params=params, lr=lr, momentum=momentum, weight_decay=weight_decay)
    return train.MuonAdamW([group | dict(beta2=beta2, coefficients=coefficients)], dtype)


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


# --- AdamW --------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay, eps", [(0.0, 1e-10), (0.1, 1e-10), (0.0, 0.1)])
def test_adamw_is_torchs_adamw(weight_decay, eps):
    ours, theirs = parameters((7, 5), (3,)), parameters((7, 5), (3,))
    knobs = dict(lr=0.02, betas=(0.8, 0.95), eps=eps, weight_decay=weight_decay)
    optimizer = train.MuonAdamW([dict(kind="adamw", params=ours, **knobs)], torch.float32)
    reference = torch.optim.AdamW(theirs, **knobs)
    for step in range(20):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_changed_learning_rate_counts_from_the_next_step():
    (p,) = parameters((4, 4))
    optimizer = train.MuonAdamW(
        [dict(kind="adamw", params=[p], lr=0.1, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)], torch.float32
    )
    before = p.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.3
    set_grads([p], 0)
    optimizer.step()  # Adam's first step is the learning rate in the direction of the sign
    torch.testing.assert_close(before - p.detach(), 0.3 * p.grad.sign())


# --- Muon ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_is_torchs_muon(shape):
    """Nesterov dropped, a step less, or no scale for tall shapes: each is off by far more than bfloat16."""
    ours, theirs = parameters(shape, shape), parameters(shape, shape)
    start = [p.detach().clone() for p in ours]
    optimizer = muon(ours, lr=0.1, momentum=0.9)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0, momentum=0.9, nesterov=True)
    for step in range(5):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        reference.step()
        for p, q, p0 in zip(ours, theirs, start, strict=True):
            assert relative_error(p - p0, q - p0) < 0.02


def singular_values(coefficients, shape, dtype=torch.float32, scale=1.0):
    G = scale * torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    return torch.linalg.svdvals(train.orthogonalize(G, coefficients, dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_brings_singular_values_near_one(shape, scale, dtype):
    values = singular_values(train.POLAR_EXPRESS, shape, dtype, scale)
    assert 0.8 <= values.min() and values.max() <= 1.2


@pytest.mark.parametrize("shape", SHAPES)
def test_the_plain_quintic_does_not(shape):
    assert singular_values(QUINTIC, shape).min() < 0.8


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_keeps_the_singular_vectors(shape):
    G = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    assert relative_error(train.orthogonalize(G, train.POLAR_EXPRESS, torch.float32), U @ Vh) < 0.15


def test_polar_express_holds_for_every_singular_value_and_a_little_above_one():
    x = torch.linspace(0.002, 1.03, 10_001, dtype=torch.float64)
    for a, b, c in train.POLAR_EXPRESS:
        x = a * x + b * x**3 + c * x**5
    assert 0.85 <= x.min() and x.max() <= 1.15


def test_a_matrix_of_rank_one_does_not_blow_up_in_bfloat16():
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        G = torch.randn(64, 1, generator=generator) @ torch.randn(1, 48, generator=generator)
        largest = torch.linalg.matrix_norm(train.orthogonalize(G, train.POLAR_EXPRESS, torch.bfloat16), 2)
        assert 0.8 <= largest <= 1.2


def test_a_zero_gradient_moves_nothing():
    (p,) = parameters((8, 8))
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    muon([p], beta2=0.95, weight_decay=0.2, coefficients=train.POLAR_EXPRESS).step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("shape, dim", [((6, 9), -2), ((9, 6), -1), ((6, 6), -1)])
def test_normuon_evens_out_the_longer_side_and_keeps_the_norm(shape, dim):
    generator = torch.Generator().manual_seed(4)
    update = torch.randn(2, *shape, generator=generator) * torch.rand(2, *shape, generator=generator)
    (p,) = parameters(shape)
    second_moment = muon([p], beta2=0.95).state[p]["second_moment"].expand(2, -1, -1).clone()
    evened = train.even_out(update, second_moment, 0.95)
    sizes = evened.norm(dim=dim)
    torch.testing.assert_close(sizes, sizes[:, :1].expand_as(sizes))
    torch.testing.assert_close(evened.norm(dim=(-2, -1)), update.norm(dim=(-2, -1)))
    torch.testing.assert_close(second_moment, 0.05 * update.square().mean(dim, keepdim=True))


def test_weight_decay_acts_only_where_update_and_weight_agree_in_sign():
    p = torch.nn.Parameter(torch.tensor([[2.0, -2.0, 2.0, 0.0]]))
    p.grad = torch.tensor([[3.0, 4.0, 0.0, -12.0]])
    # With no iterations and no momentum the update is the gradient over its norm 13.
    optimizer = muon([p], lr=0.1, momentum=0.0, weight_decay=0.5, coefficients=())
    optimizer.step()
    update = torch.tensor([[3.0, 4.0, 0.0, -12.0]]) / 13
    decay = 0.5 * torch.tensor([[2.0, 0.0, 0.0, 0.0]])  # only the first: the second's signs differ
    expected = torch.tensor([[2.0, -2.0, 2.0, 0.0]]) - 0.1 * (update + decay)
    torch.testing.assert_close(p.detach(), expected)


def test_a_stack_steps_each_matrix_as_if_it_were_alone():
    shapes = [(12, 8)] * 3
    together, alone = parameters(*shapes), parameters(*shapes)
    set_grads(together, 5)
    set_grads(alone, 5)
    knobs = dict(weight_decay=0.1, beta2=0.95, coefficients=train.POLAR_EXPRESS)
    muon(together, **knobs).step()
    for p in alone:
        muon([p], **knobs).step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q)


# --- Groups -------------------------------------------------------------------


def test_groups_partition_the_model_and_muon_has_the_matrices_of_the_blocks():
    model = tiny_model(n_layer=3, n_head=4, n_kv_head=2)
    optimizer = train.build_optimizer(model, torch.float32)
    kind_of = {id(p): group["kind"] for group in optimizer.param_groups for p in group["params"]}
    assert len(kind_of) == sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert kind_of[id(p)] == ("muon" if name.startswith("blocks") else "adamw"), name
    for group in optimizer.param_groups:
        if group["kind"] == "muon":
            assert len({p.shape for p in group["params"]}) == 1


def role(model, optimizer, name):
    """(kind, initial learning rate) of the parameter's group."""
    wanted = model.get_parameter(name)
    (group,) = [g for g in optimizer.param_groups if any(p is wanted for p in g["params"])]
    return group["kind"], group["initial_lr"]


def test_a_new_parameter_gets_the_optimizer_of_its_type():
    """Wherever it is in the model: vectors and scalars, embedding tables, matrices of any number of dimensions."""
    model = tiny_model()
    model.blocks[0].gain = torch.nn.Parameter(torch.ones(32))
    model.blocks[1].attn.temperature = torch.nn.Parameter(torch.tensor(1.0))
    model.bigrams = torch.nn.Embedding(97, 32)
    model.blocks[0].inside = torch.nn.Embedding(8, 32)
    model.blocks[0].experts = torch.nn.Parameter(torch.zeros(3, 8, 32))
    model.mix = torch.nn.Linear(32, 32)
    optimizer = train.build_optimizer(model, torch.float32)
    embedding = "adamw", train.EMBEDDING_LR * (32 / 768) ** -0.5
    vector, matrix = ("adamw", train.VECTOR_LR), ("muon", train.MATRIX_LR)
    assert role(model, optimizer, "blocks.0.gain") == role(model, optimizer, "mix.bias") == vector
    assert role(model, optimizer, "blocks.1.attn.temperature") == vector
    assert role(model, optimizer, "bigrams.weight") == role(model, optimizer, "blocks.0.inside.weight") == embedding
    assert role(model, optimizer, "blocks.0.experts") == role(model, optimizer, "mix.weight") == matrix
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_grads(list(model.parameters()), 7)
    optimizer.step()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


def test_initialization_leaves_a_new_vector_as_it_was_made():
    model = tiny_model()
    model.blocks[0].gain = torch.nn.Parameter(torch.full((32,), 3.0))
    model.init_weights()
    assert set(model.blocks[0].gain.tolist()) == {3.0}


def test_a_parameter_that_is_in_no_group_is_refused(monkeypatch):
    model = tiny_model()
    named = list(model.named_parameters())
    monkeypatch.setattr(model, "named_parameters", lambda: iter(named[1:]))
    monkeypatch.setattr(model, "parameters", lambda: iter([p for _, p in named]))
    with pytest.raises(AssertionError, match="put each parameter into exactly one group"):
        train.build_optimizer(model, torch.float32)


def test_learning_rates_of_matrices_scale_with_the_model_and_those_of_scalars_do_not():
    def lr(n_embd, name):
        model = tiny_model(n_head=1, n_kv_head=1, n_embd=n_embd)
        return role(model, train.build_optimizer(model, torch.float32), name)[1]

    assert lr(768, "wte.weight") == pytest.approx(train.EMBEDDING_LR)
    assert lr(192, "wte.weight") == pytest.approx(2 * train.EMBEDDING_LR)
    assert lr(192, "value_embeds.1.weight") == pytest.approx(2 * train.EMBEDDING_LR)
    assert lr(192, "lm_head.weight") == pytest.approx(2 * train.UNEMBEDDING_LR)
    assert lr(192, "x0_lambdas") == train.X0_LR
    assert lr(192, "resid_lambdas") == train.VECTOR_LR
    assert lr(192, "blocks.0.c_fc.weight") == train.MATRIX_LR


def test_a_few_steps_learn_a_batch_by_heart():
    model = tiny_model(init="fresh")
    optimizer = train.build_optimizer(model, torch.float32)
    x = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(6))
    batches = ((x[:, :-1], x[:, 1:], 1) for _ in range(40))
    losses = [train.train_step(model, optimizer, batches, 1, 16)[0].item() for _ in range(40)]
    assert losses[0] == pytest.approx(torch.tensor(64.0).log().item(), abs=0.05)
    assert losses[-1] < 0.5


def test_new_values_of_a_schedule_compile_nothing_anew(monkeypatch):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile(f, backend=count, fullgraph=True, **kw))
    eager, compiled = tiny_model(), tiny_model()
    optimizers = [train.build_optimizer(model, torch.float32) for model in (eager, compiled)]
    network = compiled.network
    train.set_compile(compiled, optimizers[1], True, torch.device("cuda"))
    compiled.network = network  # only the optimizer is looked at here
    for step in range(3):
        for model, optimizer in zip((eager, compiled), optimizers, strict=True):
            train.set_schedules(optimizer, progress=0.6 + step / 10)
            set_grads(list(model.parameters()), step)
            optimizer.step()
        if step == 0:
            first = len(graphs)
    assert first == len(graphs) > 0
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    torch.compiler.reset()


STEP_WITHOUT_A_TRACER = """
import sys
from test_optimizer import tiny_model, torch, train
model = tiny_model()
optimizer = train.build_optimizer(model, torch.float32)
tokens = torch.zeros(2, 16, dtype=torch.int64)
train.train_step(model, optimizer, iter([(tokens, tokens, 1)]), 1, 16)
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""


def test_an_eager_step_does_not_import_what_compiles():
    """It takes more than a second, and four where Python may not keep bytecode. torch.optim.Optimizer imports it."""
    done = subprocess.run(
        [sys.executable, "-c", STEP_WITHOUT_A_TRACER], cwd=ROOT / "tests", env={"PYTHONPATH": str(ROOT)}, text=True, capture_output=True
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr
