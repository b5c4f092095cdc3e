"""Pretrain a small GPT within a fixed time budget. Metric: val_bpb, bits per byte of unseen text; lower is better.

    uv run train.py > run.log 2>&1        then: grep "^val_bpb:" run.log

The agent edits only this file. Frozen: constants.py (the rules), prepare.py (data, clock, metric).
Every edit keeps: begin_run first; training from clock.start() until clock.progress() is 1, which takes
constants.TIME_BUDGET seconds (the warm-up comes before and is free); evaluate_bpb; clock.summary; model(x) returns
logits (B, T, V); save_checkpoint and load_model work.
Writes checkpoint.pt beside this file (weights, configuration, run id); all other output goes to stdout.
"""

import gc
import importlib.util
import os
import random
import shutil
import sys
from collections import namedtuple
from functools import lru_cache
from itertools import islice, repeat
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from constants import MAX_SEQ_LEN
from prepare import begin_run, evaluate_bpb, fa3_kernel, is_out_of_memory, load_tokenizer, make_dataloader, warmup_batch

# ------------------------------------------------------------------------------------------------
# Hyperparameters. In `a if GPU else b`, a is for a large GPU, b for CPUs and Apple silicon (measured on two cores,
# benchmarks/README.md). To change one, replace the whole right side: each is set here and nowhere else.
GPU = torch.cuda.is_available()

# Model
DEPTH = 8 if GPU else 4  # layers
MODEL_DIM = DEPTH * 64 if GPU else DEPTH * 32  # width; rounded up to a multiple of HEAD_DIM
HEAD_DIM = 128 if GPU else 64
QUERIES_PER_KV = 1  # query heads per key/value head; above 1 is grouped-query attention
MLP_RATIO = 4 if GPU else 2  # hidden width of the MLP, relative to MODEL_DIM
WINDOW_PATTERN = "SSSL" if GPU else "L"  # per layer, repeated: L full context, S short; the last layer is always L
SHORT_WINDOW_RATIO = 0.5  # relative to MAX_SEQ_LEN
ATTENTION = None  # a name from ATTENTIONS; None: the fastest that works on this machine
ROPE_BASE = 10_000
SOFTCAP = 15.0  # logits stay within plus or minus this
INIT_SCALE = 1.0  # scales the uniform initialization of the matrices
X0_INIT = 0.1  # initial weight of the token embedding that each layer adds to its input

# Batch
TOTAL_BATCH_SIZE = 2**19 if GPU else 2**11  # tokens per optimizer step: a multiple of MAX_SEQ_LEN
DEVICE_BATCH_SIZE = 128 if GPU else 2**11 // MAX_SEQ_LEN  # most rows per micro-batch; reduced if memory runs out

# Learning rates by role (build_optimizer), and their schedule in fractions of the run
EMBEDDING_LR = 0.6  # embedding tables; for width 768, scaled by (width / 768)**-0.5
UNEMBEDDING_LR = 0.004  # lm_head; scaled in the same way
MATRIX_LR = 0.04  # all other matrices (Muon)
VECTOR_LR = 0.005  # vectors and scalars, such as resid_lambdas
X0_LR = 0.5  # x0_lambdas
WARMUP_RATIO = 0.0
WARMUP_START = 0.1  # learning rate at the start of the warmup, relative to the peak
WARMDOWN_RATIO = 0.5 if GPU else 0.6
FINAL_LR_FRAC = 0.0 if GPU else 0.05

# Optimizers: Muon for the matrices, AdamW for the rest
ADAM_BETAS = (0.8, 0.95)
X0_BETAS = (0.96, 0.95)
EMBEDDING_WEIGHT_DECAY = 0.0 if GPU else 0.004  # per step, times the learning rate
WEIGHT_DECAY = 0.2  # of Muon: cautious; falls linearly to 0
MUON_MOMENTUM = (0.85, 0.95)  # from, to
MUON_MOMENTUM_RAMP = 0.3  # fraction of the run over which the momentum rises
MUON_BETA2 = 0.95  # of NorMuon's second moment; None gives plain Muon

DTYPE = None  # of the matmuls: torch.bfloat16 or torch.float32; None: choose_dtype decides
COMPILE = GPU  # use torch.compile if it works; on two cores it takes a minute for a quarter more tokens/s


# Schedules: functions of progress, the fraction of the time budget that is spent
def batch_schedule(progress):
    """(tokens per optimizer step, tokens per row). A step is rounded to whole micro-batches, whose size follows from
    the smallest step. Rows of MAX_SEQ_LEN are cut to this length; the warm-up compiles each length that occurs."""
    return TOTAL_BATCH_SIZE, MAX_SEQ_LEN


def lr_multiplier(progress):
    warmup = ramp(progress, WARMUP_RATIO, WARMUP_START, 1.0)
    return min(warmup, ramp(1 - progress, WARMDOWN_RATIO, FINAL_LR_FRAC, 1.0))


def set_schedules(optimizer, progress):
    """Sets every group's values for the next step; returns the multiplier of the learning rates."""
    multiplier = lr_multiplier(progress)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
        if group["kind"] == "muon":
            group["momentum"] = ramp(progress, MUON_MOMENTUM_RAMP, *MUON_MOMENTUM)
            group["weight_decay"] = ramp(progress, 1.0, WEIGHT_DECAY, 0.0)
    return multiplier


def ramp(x, length, start, end):  # linear from start at 0 to end at length, then constant
    return start + (end - start) * min(x / length, 1.0) if length else end


# ------------------------------------------------------------------------------------------------
# Attention: in every back end query q attends to the keys k with 0 <= q - k <= window.
# make_mask(T, window, device) returns the mask for attend; it is called outside the compiled graph.
# attend(q, k, v, window, mask): q and the result are (B, T, H, D), k and v (B, T, KV, D).
Attention = namedtuple("Attention", "name make_mask attend")


@lru_cache(maxsize=64)
def sdpa_mask(T, window, device):
    if window >= T - 1:
        return None  # full context: with is_causal SDPA can use a fused kernel
    age = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)  # q - k, (T, T)
    return (age >= 0) & (age <= window)


def sdpa_attend(q, k, v, window, mask):
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    options = dict(attn_mask=mask, is_causal=mask is None, enable_gqa=q.size(1) != k.size(1))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def load_flex():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # slow import: seconds

    @lru_cache(maxsize=64)
    def flex_mask(T, window, device):
        return create_block_mask(lambda b, h, q, k: (k <= q) & (q - k <= window), None, None, T, T, device=device)

    def flex_attend(q, k, v, window, mask):
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)

    return Attention("flex", flex_mask, flex_attend)


def load_fa3():
    """FlashAttention-3 from the local kernel cache, which prepare.py fills: a run does not use the network."""
    kernel = fa3_kernel()
    flash_attn_func = getattr(kernel, "flash_attn_interface", kernel).flash_attn_func

    def fa3_attend(q, k, v, window, mask):
        y = flash_attn_func(q, k, v, causal=True, window_size=(window, 0))  # window counts the keys before its own
        return y[0] if isinstance(y, tuple) else y  # some builds return the log-sum-exp too

    return Attention("fa3", lambda T, window, device: None, fa3_attend)


SDPA = Attention("sdpa", sdpa_mask, sdpa_attend)
ATTENTIONS = {"fa3": load_fa3, "flex": load_flex, "sdpa": lambda: SDPA}  # fastest first


def choose_attention(device, dtype, compiled=True, failed=()):
    """(back end, reason): the one that ATTENTION names, or the fastest that works here. failed: {name: reason}."""
    if ATTENTION:
        assert ATTENTION in ATTENTIONS, f"ATTENTION {ATTENTION!r} is unknown: use one of {', '.join(ATTENTIONS)}"
        return ATTENTIONS[ATTENTION](), "set by ATTENTION"
    if device.type != "cuda":
        return SDPA, f"on {device.type}"
    refused = dict(failed)
    if torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0) or dtype != torch.bfloat16:
        refused["fa3"] = "needs a Hopper GPU and bfloat16"
    if not compiled:
        refused["flex"] = "needs torch.compile"
    for name, load in ATTENTIONS.items():
        if name not in refused:
            try:
                attention = load()
                break
            except Exception as error:  # not fetched, not trusted, or built for another torch: try the next one
                refused[name] = one_line(error)
    reasons = [f"{name.upper()} not used: {why}" for name, why in refused.items()]
    return attention, "; ".join(reasons) or "a Hopper GPU and bfloat16"


def one_line(error, limit=200):
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:limit]


# ------------------------------------------------------------------------------------------------
# Model
def build_config(vocab_size, dtype):
    n_head = -(-MODEL_DIM // HEAD_DIM)
    assert n_head % QUERIES_PER_KV == 0, f"QUERIES_PER_KV {QUERIES_PER_KV} does not divide {n_head} heads: change one"
    pattern = (WINDOW_PATTERN * DEPTH)[: DEPTH - 1] + "L"
    window = {"L": MAX_SEQ_LEN, "S": int(MAX_SEQ_LEN * SHORT_WINDOW_RATIO)}  # in tokens
    return SimpleNamespace(
        sequence_len=MAX_SEQ_LEN, vocab_size=vocab_size, rope_base=ROPE_BASE, softcap=SOFTCAP,
        n_head=n_head, n_kv_head=n_head // QUERIES_PER_KV, n_embd=n_head * HEAD_DIM, mlp_ratio=MLP_RATIO,
        windows=[window[letter] for letter in pattern], dtype=str(dtype).removeprefix("torch."),  # plain values
    )  # fmt: skip


def norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6).to(x.dtype)  # autocast may make it float32


def rotate(x, cos, sin):  # (B, T, H, D) by (T, 1, D): cos is (c, c), sin is (s, -s)
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin).to(x.dtype)


class ReluSquared(torch.autograd.Function):  # fewer passes over the largest activation than autograd takes
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x := F.relu(x))
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).mul_(2)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, gated):
        super().__init__()
        self.head_dim, self.n_kv_head = config.n_embd // config.n_head, config.n_kv_head
        kv_dim = self.n_kv_head * self.head_dim
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, kv_dim, bias=False)
        self.c_v = nn.Linear(config.n_embd, kv_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        if gated:  # adds a value embedding through one gate per head, which reads 32 channels of the input
            self.ve_gate = nn.Linear(min(32, config.n_embd), config.n_kv_head, bias=False)

    def forward(self, x, ve, cos, sin, attend, window, mask):
        B, T, _ = x.shape
        qkv = F.linear(x, torch.cat([self.c_q.weight, self.c_k.weight, self.c_v.weight]))  # one matmul, not three
        qk, v = qkv.view(B, T, -1, self.head_dim).tensor_split([-self.n_kv_head], dim=2)
        if ve is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., : self.ve_gate.in_features]))  # (B, T, KV)
            v = v + gate.unsqueeze(-1) * ve.view_as(v)
        q, k = norm(rotate(qk, cos, sin)).tensor_split([-self.n_kv_head], dim=2)
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
        return x + self.c_proj(ReluSquared.apply(self.c_fc(norm(x))))  # the MLP


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.dtype, self.attention = config, getattr(torch, config.dtype), SDPA
        self.network = self.eager_network  # or its compiled form
        n_layer, head_dim = len(config.windows), config.n_embd // config.n_head
        ve_layers = range((n_layer - 1) % 2, n_layer, 2)  # every other layer, the last one included
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList([Block(config, gated=i in ve_layers) for i in range(n_layer)])
        kv_dim = config.n_kv_head * head_dim
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(config.vocab_size, kv_dim) for i in ve_layers})
        self.resid_lambdas = nn.Parameter(torch.ones(n_layer))
        self.x0_lambdas = nn.Parameter(torch.full((n_layer,), X0_INIT))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        frequency = config.rope_base ** -(torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.arange(config.sequence_len)[:, None, None] * frequency  # (T, 1, D/2)
        self.register_buffer("cos", torch.cat([angle.cos(), angle.cos()], dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat([angle.sin(), -angle.sin()], dim=-1), persistent=False)

    @torch.no_grad()
    def init_weights(self):
        """Output projections start at zero, so each block is the identity; gates at zero, which lets through 1."""
        bound = INIT_SCALE * (3 / self.config.n_embd) ** 0.5  # standard deviation INIT_SCALE * n_embd**-0.5
        for name, p in self.named_parameters():
            if "c_proj" in name or "ve_gate" in name:
                p.zero_()
            elif p.ndim > 1 and name not in ("wte.weight", "lm_head.weight"):  # vectors keep what __init__ gave them
                p.uniform_(-bound, bound)
        self.wte.weight.normal_(std=1.0)
        self.lm_head.weight.normal_(std=0.001)

    def forward(self, idx, targets=None):
        """Logits (B, T, V) in float32, or with targets the mean cross-entropy in nats."""
        T, longest = idx.size(1), self.config.sequence_len
        assert T <= longest, f"a row has {T} tokens, the model takes at most {longest}: cut the row"
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
        """Forward and backward: 6 per matmul weight, 12 per channel and key of a window (not halved for causality)."""
        weights = sum(p.numel() for p in [*self.blocks.parameters(), self.lm_head.weight] if p.ndim > 1)
        return 6 * weights + 12 * self.config.n_embd * sum(self.config.windows)


# ------------------------------------------------------------------------------------------------
# Optimizer
# Polar Express (arXiv:2505.16932): one quintic (a, b, c) per iteration. Together they map singular values from
# [0.002, 1.03] into [0.85, 1.15]. The first is stretched by 2 %, so that bfloat16 may round to values above 1.
POLAR_EXPRESS = (
    (7.996623, -21.186509, 14.381891), (4.042930, -2.808917, 0.500018), (3.891668, -2.772484, 0.506065),
    (3.285754, -2.368129, 0.464490), (2.346541, -1.709783, 0.423236),
)  # fmt: skip


def adamw_step(p, grad, state, lr, betas, eps, weight_decay):
    """In place. lr and state["step"] are 0-dim tensors, so that a new value does not recompile."""
    state["step"].add_(1)
    mean = state["exp_avg"].lerp_(grad, 1 - betas[0]) / (1 - betas[0] ** state["step"])
    mean_square = state["exp_avg_sq"].lerp_(grad.square(), 1 - betas[1]) / (1 - betas[1] ** state["step"])
    p.mul_(1 - lr * weight_decay)
    p.sub_(lr * mean / (mean_square.sqrt() + eps))


def orthogonalize(G, coefficients, dtype):
    """Approximates the orthogonal matrix nearest to each of G (..., rows, cols): singular values of about 1."""
    tall = G.size(-2) > G.size(-1)
    X = G.mT if tall else G  # the Gram matrix of the shorter side is the smaller one
    X = (X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)).to(dtype).reshape(-1, *X.shape[-2:])
    for a, b, c in coefficients:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # a X + (b A + c A A) X
    return (X.mT if tall else X).reshape(G.shape).to(G.dtype)


def even_out(update, second_moment, beta2):
    """NorMuon (arXiv:2510.05491): gives rows (columns of a wide matrix) similar sizes and keeps the norm."""
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
    agrees = update * p > 0  # cautious: decay only weights that the update shrinks too
    shape_scale = max(1, p.size(-2) / p.size(-1)) ** 0.5
    p.sub_(lr * shape_scale * (update + weight_decay * agrees * p))


class MuonAdamW:  # no torch.optim.Optimizer: its constructor imports torch.compile's tracer, over a second of each run
    """Groups of kind "muon" hold matrices of one shape, which are stepped as a stack; the others are "adamw"."""

    def __init__(self, groups, dtype):
        self.param_groups, self.state, self.dtype = groups, {}, dtype  # dtype: of the orthogonalisation
        self.adamw_step, self.muon_step = adamw_step, muon_step  # or their compiled forms
        self.lr, self.momentum, self.weight_decay = (groups[0]["params"][0].new_zeros(()) for _ in range(3))
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
            if group["kind"] == "muon":
                stack = torch.zeros_like(torch.stack(group["params"]))
                one_per_row = stack.mean(-1 if stack.size(-2) >= stack.size(-1) else -2, keepdim=True)
                self.state[group["params"][0]] = dict(momentum_buffer=stack, second_moment=one_per_row)
            else:
                for p in group["params"]:
                    zeros = torch.zeros_like(p)
                    self.state[p] = dict(exp_avg=zeros, exp_avg_sq=zeros.clone(), step=zeros.new_zeros(()))

    def zero_grad(self, set_to_none=True):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.grad = None

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
    """A parameter's role follows from its type, so a parameter that is added to the model needs no entry here."""
    scale = (model.config.n_embd / 768) ** -0.5
    adamw = dict(kind="adamw", betas=ADAM_BETAS, eps=1e-10, weight_decay=0.0)
    settings = {
        "embedding": adamw | dict(lr=EMBEDDING_LR * scale, weight_decay=EMBEDDING_WEIGHT_DECAY),
        "unembedding": adamw | dict(lr=UNEMBEDDING_LR * scale),
        "vector": adamw | dict(lr=VECTOR_LR),
        "x0": adamw | dict(lr=X0_LR, betas=X0_BETAS),
        "matrix": dict(kind="muon", lr=MATRIX_LR, beta2=MUON_BETA2, coefficients=POLAR_EXPRESS),
    }
    groups = {}
    for name, p in model.named_parameters():
        role = {"lm_head.weight": "unembedding", "x0_lambdas": "x0"}.get(name, "vector" if p.ndim < 2 else "matrix")
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding):
            role = "embedding"
        key = role, p.shape if role == "matrix" else None  # Muon steps matrices of one shape as a stack
        groups.setdefault(key, settings[role] | dict(params=[]))["params"].append(p)
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters())), "put each parameter into exactly one group"
    optimizer = MuonAdamW(list(groups.values()), dtype)
    set_schedules(optimizer, progress=0)
    return optimizer


# ------------------------------------------------------------------------------------------------
# Warm-up: find out what works on this machine before the clock starts, then restore the initial state
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
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # inductor's own choice
    return (True, compiler) if shutil.which(compiler) else (False, f"no C++ compiler: {compiler} not found")


def set_compile(model, optimizer, compiled, device):
    """Compiles the network and, on CUDA, the optimizer's two steps; or restores the plain functions."""
    model.network, optimizer.adamw_step, optimizer.muon_step = model.eager_network, adamw_step, muon_step
    if compiled:
        torch.compiler.reset()  # drops the graphs of an attempt that failed
        torch._dynamo.config.recompile_limit = 64  # one graph for each shape
        model.network = torch.compile(model.eager_network, dynamic=False)
    if compiled and device.type == "cuda":  # on a CPU it takes another minute and saves little
        optimizer.adamw_step = torch.compile(adamw_step, dynamic=False)
        optimizer.muon_step = torch.compile(muon_step, dynamic=False)


def snapshot(model, optimizer, device):
    """Copies everything that a training step changes; returns the function that restores it in place."""
    tensors = [*model.parameters(), *model.buffers()]  # state_dict() lacks non-persistent buffers
    tensors += [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    copies = [(t, t.detach().to("cpu", copy=True)) for t in tensors]
    stepped, rngs = set(optimizer.state), [(random.setstate, random.getstate())]
    for rng in [torch] if device.type == "cpu" else [torch, getattr(torch, device.type)]:
        rngs.append((rng.set_rng_state, rng.get_rng_state()))

    @torch.no_grad()
    def restore():
        for tensor, value in copies:
            tensor.copy_(value)
        for p in set(optimizer.state) - stepped:  # state that an optimizer creates at its first step
            del optimizer.state[p]
        optimizer.zero_grad(set_to_none=True)
        for set_state, state in rngs:
            set_state(state)

    return restore


def train_step(model, optimizer, batches, micro_batches, T):
    """One optimizer step on the mean of micro-batches with rows of T tokens; returns the loss (on the device), epoch."""
    losses = []
    for x, y, epoch in islice(batches, micro_batches):  # noqa: B007 (returned)
        loss = model(x.reshape(-1, T), y.reshape(-1, T)) / micro_batches
        loss.backward()
        losses.append(loss.detach())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sum(losses), epoch


def plan_batches():
    """(rows of the smallest step, row lengths) of the whole run, from batch_schedule."""
    sizes, lengths = zip(*(batch_schedule(i / 1000) for i in range(1001)), strict=True)
    if (size := min(sizes)) < 1 or size % MAX_SEQ_LEN:
        remedy = max(1, -(-size // MAX_SEQ_LEN)) * MAX_SEQ_LEN
        raise SystemExit(f"TOTAL_BATCH_SIZE {size} is not a multiple of MAX_SEQ_LEN {MAX_SEQ_LEN}: set it to {remedy}")
    assert all(MAX_SEQ_LEN % T == 0 for T in lengths), f"row lengths {set(lengths)}: each must divide {MAX_SEQ_LEN}"
    return size // MAX_SEQ_LEN, sorted(set(lengths))


def rehearse(model, optimizer, device, batch_size, lengths):
    """Two steps for each row length, then evaluation: compiles every graph and reaches the peak of memory."""
    batch = (*warmup_batch(batch_size, MAX_SEQ_LEN), 1)
    for T in 2 * lengths:
        train_step(model, optimizer, repeat(batch), 2, T)
    model.eval()
    with torch.no_grad():
        _both = model(batch[0]), model(batch[0])  # the audit holds the logits of two passes at once
    model.train()
    getattr(torch, device.type).synchronize()


def warm_up(model, optimizer, device):
    """Returns the device batch size (rows) that works; on failure tries a smaller one, the next attention, eager."""
    rows, lengths = plan_batches()
    batch_size = max(n for n in range(1, DEVICE_BATCH_SIZE + 1) if rows % n == 0)
    restore = snapshot(model, optimizer, device)
    (compiled, why), failed = choose_compile(device), {}
    while True:
        model.attention, why_attention = choose_attention(device, model.dtype, compiled, failed)
        set_compile(model, optimizer, compiled, device)
        try:
            rehearse(model, optimizer, device, batch_size, lengths)
            remedy = None
        except Exception as error:
            remedy = one_line(error)
            if is_out_of_memory(error):
                if batch_size == 1:
                    raise SystemExit(f"out of memory at one row: make the model smaller, or free the GPU ({remedy})") from None
                batch_size = max(n for n in range(1, batch_size // 2 + 1) if rows % n == 0)
                remedy = f"out of memory, with a device batch of {batch_size} ({remedy})"
            elif model.attention.name != "sdpa" and not ATTENTION:
                failed[model.attention.name] = remedy
                remedy = f"{model.attention.name} failed, with the next attention: {remedy}"
            elif compiled:
                compiled, why, failed = False, remedy, {}
                remedy = f"torch.compile failed, in eager mode: {remedy}"
            else:
                raise
            print(f"warm-up again: {remedy}", flush=True)
        # Outside the except clause, because its traceback holds the activations.
        model.train()
        restore()
        gc.collect()
        if device.type != "cpu":
            getattr(torch, device.type).empty_cache()
        if remedy is None:
            break
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    print(f"attention: {model.attention.name} ({why_attention})")
    print(f"torch.compile: {'yes' if compiled else 'no, eager'} ({why})")
    print(f"device batch: {batch_size} x {MAX_SEQ_LEN} tokens, {rows // batch_size} micro-batches a step")
    return batch_size


# ------------------------------------------------------------------------------------------------
# The run
def save_checkpoint(path, model, run_id):
    temporary = Path(f"{path}.tmp")
    try:
        torch.save({"model": model.state_dict(), "config": vars(model.config), "run_id": run_id}, temporary)
        os.replace(temporary, path)
    finally:  # if the disk is full, half a file
        temporary.unlink(missing_ok=True)


def load_model(path, device, dtype=None):
    """A checkpoint's model in eval mode, for any T up to its sequence_len, with the dtype it was trained with or this."""
    checkpoint = torch.load(path, map_location=device, weights_only=True)
    config = SimpleNamespace(**checkpoint["config"])
    if dtype or "dtype" not in checkpoint["config"]:  # older checkpoints lack it
        config.dtype = str(dtype or choose_dtype(torch.device(device))[0]).removeprefix("torch.")
    model = GPT(config)
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval()


def checked(loss, step):
    if not loss <= 100:  # NaN compares false
        print(flush=True)
        raise SystemExit(f"FAIL: loss {loss} at step {step}: lower the learning rates, or undo the last edit")
    return loss


def train(clock, model, optimizer, loader, batch_size):
    """Trains until the budget is spent; returns the numbers of steps and of tokens."""
    on_terminal, flops_per_token, device_tokens = sys.stdout.isatty(), model.flops_per_token(), batch_size * MAX_SEQ_LEN
    step, total_tokens, average, pending, next_print = 0, 0, 0.0, torch.zeros(()), 0.0
    progress = clock.progress()
    while progress < 1:
        began = clock.training_seconds()
        multiplier = set_schedules(optimizer, progress)
        tokens, T = batch_schedule(progress)
        micro_batches = max(1, round(tokens / device_tokens))
        loss, epoch = train_step(model, optimizer, loader, micro_batches, T)
        if step:  # the loss of the previous step: reading this one's would wait for the device
            average += 0.1 * (checked(pending.item(), step) - average)
        pending, step, tokens = loss, step + 1, micro_batches * device_tokens
        total_tokens += tokens
        progress, now = clock.progress(), clock.training_seconds()
        if step > 1 and (on_terminal or now >= next_print or progress == 1):
            seconds, next_print = max(now - began, 1e-9), now + 10
            print(
                f"step {step:05d} ({progress:.1%}) | loss {average / (1 - 0.9 ** (step - 1)):.6f}"
                f" | lrm {multiplier:.2f} | {1000 * seconds:.0f} ms | {tokens / seconds:,.0f} tok/s"
                f" | mfu {clock.mfu_percent(flops_per_token, tokens, seconds):.1f}%"
                f" | epoch {epoch} | {now / progress - now:.0f} s left",
                end="\r" if on_terminal else "\n", flush=True,
            )  # fmt: skip
    checked(pending.item(), step)
    print(end="\n" if on_terminal else "")
    return step, total_tokens


def main():
    clock = begin_run(__file__)  # seeds all generators; another seed would be noise, not progress
    device = clock.device
    tokenizer = load_tokenizer()
    dtype, why = choose_dtype(device)
    config = build_config(tokenizer.vocab_size, dtype)
    print(f"dtype: {config.dtype} ({why})")
    model = GPT(config)
    model.init_weights()  # on the CPU: a seed gives the same weights on every device
    model.to(device)
    optimizer = build_optimizer(model, dtype)
    params = sum(p.numel() for p in model.parameters())
    print(f"model: {params:,} parameters, {vars(config)}", flush=True)

    batch_size = warm_up(model, optimizer, device)
    clock.start(model, batch_size)
    loader = make_dataloader(tokenizer, batch_size, MAX_SEQ_LEN, "train")
    gc.freeze()  # exempts the objects made so far; a collection in the loop would stall the device
    gc.disable()
    try:
        steps, tokens = train(clock, model, optimizer, loader, batch_size)
    finally:  # a run that fails in the loop would otherwise make libraries report leaks
        gc.enable()
        gc.unfreeze()
    evaluate_bpb(model, tokenizer, batch_size)  # stops the clock: saving before it would count as training
    save_checkpoint(Path(__file__).with_name("checkpoint.pt"), model, clock.run_id)
    flops = model.flops_per_token()
    clock.summary(num_steps=steps, total_tokens=tokens, num_params=params, flops_per_token=flops, depth=DEPTH)


if __name__ == "__main__":
    main()
