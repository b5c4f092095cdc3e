"""Pretrain a small GPT within a fixed time budget: the fewer bits it needs for unseen text, the better.

    uv run train.py > run.log 2>&1        then: grep "^val_bpb:" run.log

Metric: val_bpb, bits per byte of the validation text; lower is better. Budget: constants.TIME_BUDGET seconds
from clock.start() on; compiling and warming up come before it and are not counted.
The agent edits this file and no other. Frozen: constants.py (the rules), prepare.py (data, clock, metric).
Every edit keeps: begin_run first, training until clock.progress() is 1, evaluate_bpb, clock.summary; model(x)
gives logits (B, T, V); save_checkpoint and load_model work.
Writes checkpoint.pt beside this file (weights, configuration, run id); all else goes to stdout.
"""

import gc
import importlib.util
import os
import random
import shutil
import sys
from collections import namedtuple
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from constants import MAX_SEQ_LEN
from prepare import FA3_KERNEL, begin_run, evaluate_bpb, load_tokenizer, make_dataloader, warmup_batch

# ------------------------------------------------------------------------------------------------
# Hyperparameters: these on a large GPU; SMALL below goes over them on CPU and Apple silicon

# Model
DEPTH = 8  # layers
ASPECT_RATIO = 64  # model dim = DEPTH * ASPECT_RATIO, rounded up to a multiple of HEAD_DIM
HEAD_DIM = 128
QUERIES_PER_KV = 1  # query heads that share one key/value head; above 1 is grouped-query attention
MLP_RATIO = 4  # hidden width of the MLP, in model dims
WINDOW_PATTERN = "SSSL"  # layer by layer, repeated: L full context, S short; the last layer is always L
SHORT_WINDOW_RATIO = 0.5  # of MAX_SEQ_LEN
ROPE_BASE = 10_000
SOFTCAP = 15.0  # logits stay between minus and plus this
INIT_SCALE = 1.0  # on the uniform initialisation of the matrices
X0_INIT = 0.1  # how much of the embedding each layer mixes back in, at first

# Batch: TOTAL_BATCH_SIZE must be a multiple of DEVICE_BATCH_SIZE * MAX_SEQ_LEN
DEVICE_BATCH_SIZE = 128  # rows; halved by itself where memory is short
TOTAL_BATCH_SIZE = 2**19  # tokens an optimizer step

# AdamW: the first two learning rates are for dim 768 and are scaled by (dim / 768)**-0.5
EMBEDDING_LR = 0.6  # token and value embeddings
UNEMBEDDING_LR = 0.004  # lm_head
SCALAR_LR = 0.5  # x0 scalars
RESID_LR = 0.005  # residual scalars: each multiplies the whole stream
ADAM_BETAS = (0.8, 0.95)
X0_BETAS = (0.96, 0.95)
EMBEDDING_WEIGHT_DECAY = 0.0

# Muon, for the matrices of the blocks
MATRIX_LR = 0.04
WEIGHT_DECAY = 0.2  # cautious; falls linearly to 0
MUON_MOMENTUM = (0.85, 0.95)  # from, to
MUON_MOMENTUM_RAMP = 0.3  # share of the run that the way takes
MUON_BETA2 = 0.95  # of NorMuon's second moment; None is plain Muon

# Schedule of all learning rates, in shares of the run
WARMUP_RATIO = 0.0
WARMUP_START = 0.1  # where a warm-up begins, as a share of the full learning rate
WARMDOWN_RATIO = 0.5
FINAL_LR_FRAC = 0.0

DTYPE = None  # of the matmuls: torch.bfloat16, torch.float32, or None: choose_dtype decides
COMPILE = True  # torch.compile, where it works
SEED = 42  # AUTORESEARCH_SEED goes over it; another seed is noise, not progress

SMALL = dict(  # measured on two cores: benchmarks/README.md
    DEPTH=4, ASPECT_RATIO=32, HEAD_DIM=64, WINDOW_PATTERN="L",
    DEVICE_BATCH_SIZE=2**11 // MAX_SEQ_LEN, TOTAL_BATCH_SIZE=2**11,
    WARMDOWN_RATIO=0.6, FINAL_LR_FRAC=0.05, COMPILE=False,  # compiling takes a minute, for a quarter more tokens/s
)  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Attention: query q sees the keys k with 0 <= q - k <= window, whichever back end computes it

# make_mask(T, window, device) gives the mask that attend takes; it is called outside the compiled graph.
# attend(q, k, v, window, mask): q and the result are (B, T, H, D), k and v (B, T, KV, D).
Attention = namedtuple("Attention", "name make_mask attend")


@lru_cache(maxsize=64)
def sdpa_mask(T, window, device):
    if window >= T - 1:
        return None  # full context: is_causal lets SDPA take a fused kernel
    age = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)  # q - k, (T, T)
    return (age >= 0) & (age <= window)


def sdpa_attend(q, k, v, window, mask):
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    grouped = q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return y.transpose(1, 2)


def load_flex():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # takes seconds

    @lru_cache(maxsize=64)
    def flex_mask(T, window, device):
        visible = lambda b, h, q, k: (k <= q) & (q - k <= window)  # noqa: E731
        return create_block_mask(visible, None, None, T, T, device=device)

    def flex_attend(q, k, v, window, mask):
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)

    return Attention("flex", flex_mask, flex_attend)


def load_fa3():
    """FlashAttention-3 from the local kernel cache, which prepare.py fills: a run touches no network."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when kernels is imported: what is not there fails at once
    from kernels import get_kernel

    kernel = get_kernel(**FA3_KERNEL)
    flash_attn_func = getattr(kernel, "flash_attn_interface", kernel).flash_attn_func

    def fa3_attend(q, k, v, window, mask):
        y = flash_attn_func(q, k, v, causal=True, window_size=(window, 0))  # window keys back, and its own
        return y[0] if isinstance(y, tuple) else y  # some builds return the log-sum-exp too

    return Attention("fa3", lambda T, window, device: None, fa3_attend)


SDPA = Attention("sdpa", sdpa_mask, sdpa_attend)


def choose_attention(device, dtype, compiled=True, failed=()):
    """The fastest back end that can run here, and why; `failed` is {name: why} from the warm-up."""
    if device.type != "cuda":
        return SDPA, f"on {device.type}"
    refused = dict(failed)
    if torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0) or dtype != torch.bfloat16:
        refused["fa3"] = "needs a Hopper GPU and bfloat16"
    if not compiled:
        refused["flex"] = "needs torch.compile"
    for name, load in (("fa3", load_fa3), ("flex", load_flex), ("sdpa", lambda: SDPA)):
        if name not in refused:
            try:
                attention = load()
                break
            except Exception as error:  # never fetched, untrusted, built for another torch: the next one
                refused[name] = one_line(error)
    reasons = [f"{name.upper()} not used: {why}" for name, why in refused.items()]
    return attention, "; ".join(reasons) or "a Hopper GPU and bfloat16"


def one_line(error, limit=200):
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:limit]


# ------------------------------------------------------------------------------------------------
# Model

def build_config(vocab_size):
    n_head = -(-DEPTH * ASPECT_RATIO // HEAD_DIM)
    assert n_head % QUERIES_PER_KV == 0, f"{n_head} heads: QUERIES_PER_KV {QUERIES_PER_KV} must divide them"
    pattern = [WINDOW_PATTERN[i % len(WINDOW_PATTERN)] for i in range(DEPTH - 1)] + ["L"]
    short = int(MAX_SEQ_LEN * SHORT_WINDOW_RATIO)
    return SimpleNamespace(
        sequence_len=MAX_SEQ_LEN, vocab_size=vocab_size, rope_base=ROPE_BASE, softcap=SOFTCAP,
        n_head=n_head, n_kv_head=n_head // QUERIES_PER_KV, n_embd=n_head * HEAD_DIM, mlp_ratio=MLP_RATIO,
        windows=[MAX_SEQ_LEN if letter == "L" else short for letter in pattern],  # one a layer, in tokens
    )  # fmt: skip


def norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6).to(x.dtype)  # autocast may make it float32


def rotate(x, cos, sin):  # (B, T, H, D) by (T, 1, D/2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, gated):
        super().__init__()
        self.head_dim = config.n_embd // config.n_head
        kv_dim = config.n_kv_head * self.head_dim
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, kv_dim, bias=False)
        self.c_v = nn.Linear(config.n_embd, kv_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        if gated:  # mixes in a value embedding: one gate a head, which looks at 32 of the input's channels
            self.ve_gate = nn.Linear(min(32, config.n_embd), config.n_kv_head, bias=False)

    def forward(self, x, ve, cos, sin, attend, window, mask):
        B, T, _ = x.shape
        q, k, v = (c(x).view(B, T, -1, self.head_dim) for c in (self.c_q, self.c_k, self.c_v))
        if ve is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., : self.ve_gate.in_features]))  # (B, T, KV)
            v = v + gate.unsqueeze(-1) * ve.view_as(v)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        y = attend(q, k, v, window, mask)  # (B, T, H, D)
        return self.c_proj(y.reshape(B, T, -1))


class Block(nn.Module):
    def __init__(self, config, gated):
        super().__init__()
        self.attn = CausalSelfAttention(config, gated)
        self.c_fc = nn.Linear(config.n_embd, config.mlp_ratio * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.mlp_ratio * config.n_embd, config.n_embd, bias=False)

    def forward(self, x, *attention_inputs):
        x = x + self.attn(norm(x), *attention_inputs)
        return x + self.c_proj(F.relu(self.c_fc(norm(x))).square())  # the MLP


class GPT(nn.Module):
    def __init__(self, config, dtype=torch.float32, attention=SDPA):
        super().__init__()
        self.config, self.dtype, self.attention = config, dtype, attention
        self.network = self.eager_network  # or what torch.compile makes of it
        n_layer, head_dim = len(config.windows), config.n_embd // config.n_head
        ve_layers = range((n_layer - 1) % 2, n_layer, 2)  # every other layer, the last one included
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList([Block(config, gated=i in ve_layers) for i in range(n_layer)])
        ve_shape = config.vocab_size, config.n_kv_head * head_dim
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(*ve_shape) for i in ve_layers})
        self.resid_lambdas = nn.Parameter(torch.ones(n_layer))
        self.x0_lambdas = nn.Parameter(torch.full((n_layer,), X0_INIT))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        frequency = config.rope_base ** -(torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.arange(config.sequence_len)[:, None, None] * frequency  # (T, 1, D/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    @torch.no_grad()
    def init_weights(self):
        """Output projections begin at zero, so each block as the identity; a zero gate lets through 1."""
        bound = INIT_SCALE * (3 / self.config.n_embd) ** 0.5  # standard deviation INIT_SCALE * n_embd**-0.5
        for name, p in self.named_parameters():
            if "c_proj" in name or "ve_gate" in name:
                p.zero_()
            elif name.startswith(("blocks", "value_embeds")):
                p.uniform_(-bound, bound)
        self.wte.weight.normal_(std=1.0)
        self.lm_head.weight.normal_(std=0.001)

    def forward(self, idx, targets=None):
        """Logits (B, T, V) in float32; with targets the mean cross-entropy in nats instead."""
        T, longest = idx.size(1), self.config.sequence_len
        assert T <= longest, f"a row has {T} tokens, the model takes {longest}: cut the row"
        masks = [self.attention.make_mask(T, window, idx.device) for window in self.config.windows]
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.network(idx, targets, masks)

    def eager_network(self, idx, targets, masks):
        cos, sin = self.cos[: idx.size(1)], self.sin[: idx.size(1)]
        x = x0 = norm(self.wte(idx).to(self.dtype))  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            ve = self.value_embeds[str(i)](idx).to(self.dtype) if str(i) in self.value_embeds else None
            x = block(x, ve, cos, sin, self.attention.attend, self.config.windows[i], masks[i])
        logits = self.lm_head(norm(x)).float()  # (B, T, V)
        logits = self.config.softcap * torch.tanh(logits / self.config.softcap)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def flops_per_token(self):
        """Forward and backward: 6 a matmul weight, 12 a channel and key of a window, causal or not."""
        weights = sum(p.numel() for p in [*self.blocks.parameters(), self.lm_head.weight])
        return 6 * weights + 12 * self.config.n_embd * sum(self.config.windows)


# ------------------------------------------------------------------------------------------------
# Optimizer, and its schedules over progress, the share of the time budget that has gone

# Polar Express (arXiv:2505.16932): a quintic (a, b, c) a step, which together bring singular values from
# [0.002, 1.03] into [0.85, 1.15]; for that room above 1 (bfloat16 rounds) the first is stretched by 2 %.
POLAR_EXPRESS = (
    (7.996623, -21.186509, 14.381891),
    (4.042930, -2.808917, 0.500018),
    (3.891668, -2.772484, 0.506065),
    (3.285754, -2.368129, 0.464490),
    (2.346541, -1.709783, 0.423236),
)


def adamw_step(p, grad, state, lr, betas, eps, weight_decay):
    """In place. lr and state["step"] are 0-dim tensors, so that a new value compiles nothing anew."""
    state["step"].add_(1)
    mean = state["exp_avg"].lerp_(grad, 1 - betas[0]) / (1 - betas[0] ** state["step"])
    mean_square = state["exp_avg_sq"].lerp_(grad.square(), 1 - betas[1]) / (1 - betas[1] ** state["step"])
    p.mul_(1 - lr * weight_decay)
    p.sub_(lr * mean / (mean_square.sqrt() + eps))


def orthogonalize(G, coefficients, dtype):
    """Near the orthogonal matrix nearest to each of G (..., rows, cols): singular values of about 1."""
    tall = G.size(-2) > G.size(-1)
    X = G.mT if tall else G  # the Gram matrix of the shorter side is the smaller one
    X = (X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)).to(dtype)
    for a, b, c in coefficients:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if tall else X).to(G.dtype)


def even_out(update, second_moment, beta2):
    """NorMuon (arXiv:2510.05491): rows (of a wide matrix: columns) of like size, the norm as before."""
    dim = -1 if second_moment.size(-1) == 1 else -2
    second_moment.lerp_(update.square().mean(dim, keepdim=True), 1 - beta2)
    evened = update * second_moment.clamp_min(1e-10).rsqrt()
    size, evened_size = (x.norm(dim=(-2, -1), keepdim=True) for x in (update, evened))
    return evened * (size / evened_size.clamp_min(1e-10))


def muon_step(p, grad, state, lr, momentum, weight_decay, beta2, coefficients, dtype):
    """In place, on a stack of matrices (K, rows, cols). lr, momentum and weight_decay are 0-dim tensors."""
    momentum_buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
    update = orthogonalize(grad.lerp(momentum_buffer, momentum), coefficients, dtype)  # Nesterov
    if beta2 is not None:
        update = even_out(update, state["second_moment"], beta2)
    agrees = update * p > 0  # cautious: decay only the weights that the update makes smaller too
    shape_scale = max(1, p.size(-2) / p.size(-1)) ** 0.5
    p.sub_(lr * shape_scale * (update + weight_decay * agrees * p))


class MuonAdamW(torch.optim.Optimizer):
    """Steps groups of kind "muon", each a stack of matrices of one shape, and groups of kind "adamw"."""

    def __init__(self, groups, dtype):
        super().__init__(groups, {})
        self.dtype = dtype  # of the orthogonalisation
        self.adamw_step, self.muon_step = adamw_step, muon_step  # or what torch.compile makes of them
        device = self.param_groups[0]["params"][0].device
        self.lr, self.momentum, self.weight_decay = (torch.zeros((), device=device) for _ in range(3))
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
            if group["kind"] == "muon":
                stack = torch.zeros_like(torch.stack(group["params"]))
                one_a_row = stack.mean(-1 if stack.size(-2) >= stack.size(-1) else -2, keepdim=True)
                self.state[group["params"][0]] = dict(momentum_buffer=stack, second_moment=one_a_row)
            else:
                for p in group["params"]:
                    zeros = torch.zeros_like(p)
                    self.state[p] = dict(exp_avg=zeros, exp_avg_sq=zeros.clone(), step=zeros.new_zeros(()))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            self.lr.fill_(group["lr"])
            if group["kind"] == "adamw":
                knobs = self.lr, group["betas"], group["eps"], group["weight_decay"]
                for p in params:
                    self.adamw_step(p, p.grad, self.state[p], *knobs)
            else:
                self.momentum.fill_(group["momentum"])
                self.weight_decay.fill_(group["weight_decay"])
                knobs = self.momentum, self.weight_decay, group["beta2"], group["coefficients"], self.dtype
                stack, grads = torch.stack(params), torch.stack([p.grad for p in params])
                self.muon_step(stack, grads, self.state[params[0]], self.lr, *knobs)
                torch._foreach_copy_(params, list(stack.unbind()))


def build_optimizer(model, dtype):
    scale = (model.config.n_embd / 768) ** -0.5
    embeddings = [*model.wte.parameters(), *model.value_embeds.parameters()]
    matrices = list(model.blocks.parameters())
    adamw = dict(kind="adamw", betas=ADAM_BETAS, eps=1e-10, weight_decay=0.0)
    muon = dict(kind="muon", lr=MATRIX_LR, beta2=MUON_BETA2, coefficients=POLAR_EXPRESS)
    groups = [
        adamw | dict(params=embeddings, lr=EMBEDDING_LR * scale, weight_decay=EMBEDDING_WEIGHT_DECAY),
        adamw | dict(params=[model.lm_head.weight], lr=UNEMBEDDING_LR * scale),
        adamw | dict(params=[model.resid_lambdas], lr=RESID_LR),
        adamw | dict(params=[model.x0_lambdas], lr=SCALAR_LR, betas=X0_BETAS),
    ]
    for shape in sorted({p.shape for p in matrices}):
        groups.append(muon | dict(params=[p for p in matrices if p.shape == shape]))
    grouped, every = [p for group in groups for p in group["params"]], list(model.parameters())
    assert sorted(map(id, grouped)) == sorted(map(id, every)), (
        f"{len(grouped)} parameters in groups, {len(every)} in the model: put each into one group"
    )
    optimizer = MuonAdamW(groups, dtype)
    set_schedules(optimizer, progress=0)
    return optimizer


def lr_multiplier(progress, warmup, start, warmdown, final):
    """From start up to 1 over the share `warmup`, then 1, then down to final over the share `warmdown`."""
    if progress < warmup:
        return ramp(progress / warmup, start, 1.0)
    return ramp((1 - progress) / warmdown, final, 1.0) if warmdown else 1.0


def ramp(share, start, end):
    return start + (end - start) * min(share, 1.0)


def set_schedules(optimizer, progress):
    """Gives every group its values for the next step; returns the learning rates' multiplier."""
    multiplier = lr_multiplier(progress, WARMUP_RATIO, WARMUP_START, WARMDOWN_RATIO, FINAL_LR_FRAC)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
        if group["kind"] == "muon":
            group["momentum"] = ramp(progress / MUON_MOMENTUM_RAMP, *MUON_MOMENTUM)
            group["weight_decay"] = ramp(progress, WEIGHT_DECAY, 0.0)
    return multiplier


# ------------------------------------------------------------------------------------------------
# Warm-up: find what works on this machine before the clock starts, then put everything back

def choose_dtype(device):
    if DTYPE is not None:
        return DTYPE, "set by DTYPE"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float32, f"CUDA capability {major}.{minor}"
    for feature in ("avx512_bf16", "amx_tile"):
        if device.type == "cpu" and getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)():
            return torch.bfloat16, f"the CPU has {feature}"
    return torch.float32, f"no fast bfloat16 on this {device.type}"


def choose_compile(device):
    if not COMPILE or device.type == "mps":
        return False, "not tried on mps" if COMPILE else "COMPILE is off"
    if device.type == "cuda":
        return (True, "triton") if importlib.util.find_spec("triton") else (False, "triton is not installed")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as inductor has it
    return (True, compiler) if shutil.which(compiler) else (False, f"no C++ compiler: {compiler} not found")


def set_compile(model, optimizer, compiled, device):
    """Compiles the network and, on CUDA, the optimizer's two steps; or goes back to the plain functions."""
    model.network, optimizer.adamw_step, optimizer.muon_step = model.eager_network, adamw_step, muon_step
    if compiled:
        torch.compiler.reset()  # the graphs of an attempt that failed
        model.network = torch.compile(model.eager_network, dynamic=False)
    if compiled and device.type == "cuda":  # on a CPU it takes a minute more and saves little
        torch._dynamo.config.recompile_limit = 64  # a graph for each shape
        optimizer.adamw_step = torch.compile(adamw_step, dynamic=False)
        optimizer.muon_step = torch.compile(muon_step, dynamic=False)


def snapshot(model, optimizer, device):
    """Copies all that a training step changes; returns the function that puts it back, in place."""
    tensors = [*model.parameters(), *model.buffers()]  # state_dict() would leave out non-persistent buffers
    tensors += [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    copies = [(t, t.detach().to("cpu", copy=True)) for t in tensors]
    stepped, rng = set(optimizer.state), (random.getstate(), torch.get_rng_state())
    device_rng = None if device.type == "cpu" else getattr(torch, device.type).get_rng_state()

    @torch.no_grad()
    def restore():
        for tensor, value in copies:
            tensor.copy_(value)
        for p in set(optimizer.state) - stepped:  # state that an optimizer creates at its first step
            del optimizer.state[p]
        optimizer.zero_grad(set_to_none=True)
        random.setstate(rng[0])
        torch.set_rng_state(rng[1])
        if device_rng is not None:
            getattr(torch, device.type).set_rng_state(device_rng)

    return restore


def train_step(model, optimizer, batches, micro_batches):
    """One optimizer step on the mean of micro-batches; returns the loss, still on the device, and epoch."""
    losses = []
    for x, y, epoch in islice(batches, micro_batches):  # noqa: B007 (returned)
        loss = model(x, y) / micro_batches
        loss.backward()
        losses.append(loss.detach())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sum(losses), epoch


def rehearse(model, optimizer, device, batch_size, micro_batches):
    """Two steps as in training, then evaluation: compiles every graph and reaches the peak of memory."""
    batches = ((*warmup_batch(batch_size, MAX_SEQ_LEN), 1) for _ in count())
    for _ in range(2):
        train_step(model, optimizer, batches, min(micro_batches, 2))
    model.eval()
    with torch.no_grad():
        x, _, _ = next(batches)
        _both = model(x), model(x)  # the audit holds the logits of two passes at once
    model.train()
    getattr(torch, device.type).synchronize()


def is_out_of_memory(error):
    signs = ("out of memory", "alloc_failed", "not enough memory", "can't allocate memory")
    found = isinstance(error, torch.OutOfMemoryError) or any(sign in str(error).lower() for sign in signs)
    return found and "out of resource" not in str(error)  # of shared memory: no smaller batch helps


def warm_up(model, optimizer, device, batch_size, rows):
    """Rehearses until it works: after a failure with a smaller batch, the next attention back end, or eager.

    rows: those of an optimizer step. Returns the device batch size, which divides them."""
    restore = snapshot(model, optimizer, device)
    (compiled, why), failed = choose_compile(device), {}
    while True:
        model.attention, why_attention = choose_attention(device, model.dtype, compiled, failed)
        set_compile(model, optimizer, compiled, device)
        try:
            rehearse(model, optimizer, device, batch_size, rows // batch_size)
            remedy = None
        except Exception as error:
            remedy = one_line(error)
            if is_out_of_memory(error):
                if batch_size == 1:
                    raise SystemExit(f"out of memory at one row: make the model smaller ({remedy})") from None
                batch_size = max(n for n in range(1, batch_size // 2 + 1) if rows % n == 0)
                remedy = f"out of memory, with a device batch of {batch_size}"
            elif model.attention.name != "sdpa":
                failed[model.attention.name] = remedy
                remedy = f"{model.attention.name} failed, with the next attention: {remedy}"
            elif compiled:
                compiled, why, failed = False, remedy, {}
                remedy = f"torch.compile failed, in eager mode: {remedy}"
            else:
                raise
        # Not in the except clause: its traceback holds the activations.
        model.train()
        restore()
        gc.collect()
        if device.type != "cpu":
            getattr(torch, device.type).empty_cache()
        if remedy is None:
            break
        print(f"warm-up again: {remedy}", flush=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    print(f"attention: {model.attention.name} ({why_attention})")
    print(f"torch.compile: {'yes' if compiled else 'no, eager'} ({why})")
    print(f"device batch: {batch_size} x {MAX_SEQ_LEN} tokens, {rows // batch_size} micro-batches a step")
    return batch_size


# ------------------------------------------------------------------------------------------------
# The run

def save_checkpoint(path, model, run_id):
    beside = Path(f"{path}.tmp")
    torch.save({"model": model.state_dict(), "config": vars(model.config), "run_id": run_id}, beside)
    os.replace(beside, path)


def load_model(path, device):
    """The model of a checkpoint that this file wrote, in eval mode, for any T up to its sequence_len."""
    device = torch.device(device)
    checkpoint = torch.load(path, map_location=device, weights_only=True)
    model = GPT(SimpleNamespace(**checkpoint["config"]), choose_dtype(device)[0])
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval()


def checked(loss, step):
    if not loss <= 100:  # NaN compares false
        print(flush=True)
        raise SystemExit(f"FAIL: loss {loss} at step {step}: lower the learning rates, or undo the last edit")
    return loss


def train(clock, model, optimizer, loader, micro_batches):
    """Trains until the budget is spent; returns the number of steps."""
    on_terminal, flops_per_token = sys.stdout.isatty(), model.flops_per_token()
    step, average, pending, next_print = 0, 0.0, None, 0.0
    progress = clock.progress()
    while progress < 1:
        began = clock.training_seconds()
        multiplier = set_schedules(optimizer, progress)
        loss, epoch = train_step(model, optimizer, loader, micro_batches)
        if step:  # the loss of the step before: reading this one's would wait for the device
            average += 0.1 * (checked(pending.item(), step) - average)
        pending, step = loss, step + 1
        progress, now = clock.progress(), clock.training_seconds()
        if step > 1 and (on_terminal or now >= next_print or progress == 1):
            seconds, next_print = max(now - began, 1e-9), now + 10
            print(
                f"step {step:05d} ({progress:.1%}) | loss {average / (1 - 0.9 ** (step - 1)):.6f}"
                f" | lrm {multiplier:.2f} | {1000 * seconds:.0f} ms | {TOTAL_BATCH_SIZE / seconds:,.0f} tok/s"
                f" | mfu {clock.mfu_percent(flops_per_token, TOTAL_BATCH_SIZE, seconds):.1f}%"
                f" | epoch {epoch} | {now / progress - now:.0f} s left",
                end="\r" if on_terminal else "\n", flush=True,
            )  # fmt: skip
    if step:
        checked(pending.item(), step)
    if on_terminal:
        print()
    return step


def main():
    clock = begin_run(__file__, seed=SEED)
    device = clock.device
    if device.type != "cuda":
        assert SMALL.keys() <= globals().keys(), "SMALL sets what is no hyperparameter: correct the name"
        globals().update(SMALL)
    rows, tokens = TOTAL_BATCH_SIZE // MAX_SEQ_LEN, DEVICE_BATCH_SIZE * MAX_SEQ_LEN
    if rows < 1 or TOTAL_BATCH_SIZE % tokens:
        raise SystemExit(
            f"TOTAL_BATCH_SIZE {TOTAL_BATCH_SIZE} is not a multiple of DEVICE_BATCH_SIZE * MAX_SEQ_LEN = "
            f"{tokens}: set it to {-(-TOTAL_BATCH_SIZE // tokens) * tokens}, or change DEVICE_BATCH_SIZE"
        )
    tokenizer = load_tokenizer()
    random.seed(clock.seed)
    torch.manual_seed(clock.seed)
    torch.set_float32_matmul_precision("high")

    dtype, why = choose_dtype(device)
    print(f"dtype: {str(dtype).removeprefix('torch.')} ({why})")
    model = GPT(build_config(tokenizer.vocab_size), dtype)
    model.init_weights()  # on the CPU: a seed gives the same weights on every device
    model.to(device)
    optimizer = build_optimizer(model, dtype)
    params = sum(p.numel() for p in model.parameters())
    print(f"model: {params:,} parameters, {vars(model.config)}", flush=True)

    batch_size = warm_up(model, optimizer, device, DEVICE_BATCH_SIZE, rows)
    clock.start(model, batch_size)
    loader = make_dataloader(tokenizer, batch_size, MAX_SEQ_LEN, "train")
    gc.freeze()  # of the collection that warm_up made; one in the loop would stall the device
    gc.disable()
    try:
        steps = train(clock, model, optimizer, loader, rows // batch_size)
    finally:  # or an exit from the loop would leave libraries to report leaks
        gc.enable()
        gc.unfreeze()
    evaluate_bpb(model, tokenizer, batch_size)  # stops the clock: saving before it would count as training
    save_checkpoint(Path(__file__).with_name("checkpoint.pt"), model, clock.run_id)
    tokens, flops = steps * TOTAL_BATCH_SIZE, model.flops_per_token()
    clock.summary(num_steps=steps, total_tokens=tokens, num_params=params, flops_per_token=flops, depth=DEPTH)


if __name__ == "__main__":
    main()
