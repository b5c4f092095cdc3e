"""Pretrain a small GPT for a fixed time and print how well it compresses text it has not seen.

    uv run train.py > run.log 2>&1        then: grep "^val_bpb:" run.log

Metric: val_bpb, bits per byte of the validation text; lower is better. Budget: constants.TIME_BUDGET seconds of
training, from clock.start() on; compiling and warming up before it are free.
Who edits what: the agent edits this file, and anything in it may change (model, optimizer, schedules, batch sizes).
Frozen: constants.py (the rules) and prepare.py (data, clock, metric).
What every edit keeps: main() begins a run with begin_run, trains until clock.progress() is 1.0, calls evaluate_bpb
and clock.summary; model(x) returns logits (B, T, V); save_checkpoint and load_model go on working.
Writes: checkpoint.pt beside this file (weights, configuration, run id). All else goes to stdout.
"""

import gc
import importlib.util
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from constants import MAX_SEQ_LEN
from prepare import FA3_KERNEL, begin_run, evaluate_bpb, load_tokenizer, make_dataloader, warmup_batch

# ------------------------------------------------------------------------------------------------
# Hyperparameters: these on a large GPU; SMALL below goes over them on CPU and Apple silicon
# ------------------------------------------------------------------------------------------------

# Model
DEPTH = 8  # layers
ASPECT_RATIO = 64  # model dim = DEPTH * ASPECT_RATIO, rounded up to a multiple of HEAD_DIM
HEAD_DIM = 128
QUERIES_PER_KV = 1  # query heads that share one key/value head; above 1 is grouped-query attention
MLP_RATIO = 4  # hidden width of the MLP in model dims
WINDOW_PATTERN = "SSSL"  # over the layers, repeated: L full context, S short window; the last layer is always L
SHORT_WINDOW_RATIO = 0.5  # of MAX_SEQ_LEN
ROPE_BASE = 10_000
SOFTCAP = 15.0  # logits stay within plus and minus this
INIT_SCALE = 1.0  # on the uniform initialisation of the matrices
X0_INIT = 0.1  # how much of the embedding each layer mixes back in, to begin with

# Batch, in rows on the device and in tokens an optimizer step: the second is a multiple of the first * MAX_SEQ_LEN
DEVICE_BATCH_SIZE = 128  # halved by itself where memory is short
TOTAL_BATCH_SIZE = 2**19

# Optimizer. The first three are AdamW's, for matrices at dim 768: scaled by (dim / 768)**-0.5
EMBEDDING_LR = 0.6  # token and value embeddings
UNEMBEDDING_LR = 0.004  # lm_head
ADAM_BETAS = (0.8, 0.95)
SCALAR_LR = 0.5  # x0 scalars, with X0_BETAS
X0_BETAS = (0.96, 0.95)
RESID_LR = 0.005  # residual scalars: each multiplies the whole stream
EMBEDDING_WEIGHT_DECAY = 0.0
MATRIX_LR = 0.04  # Muon, for the matrices of the blocks
WEIGHT_DECAY = 0.2  # Muon's, cautious, falls linearly to 0
MUON_MOMENTUM = (0.85, 0.95)  # from, to
MUON_MOMENTUM_RAMP = 0.3  # share of the run in which it gets there
MUON_BETA2 = 0.95  # of NorMuon's second moment; None is plain Muon

# Schedule of all learning rates, as shares of the run
WARMUP_RATIO = 0.0
WARMUP_START = 0.1  # learning rate at the first step where WARMUP_RATIO > 0, of the full one
WARMDOWN_RATIO = 0.5
FINAL_LR_FRAC = 0.0

DTYPE = None  # None: choose_dtype decides; or torch.bfloat16, torch.float32
COMPILE = True  # torch.compile where it works
SEED = 42  # AUTORESEARCH_SEED goes over it: a changed seed is noise, not progress

SMALL = dict(
    DEPTH=4,
    ASPECT_RATIO=64,
    HEAD_DIM=64,
    WINDOW_PATTERN="L",
    DEVICE_BATCH_SIZE=max(1, 2**12 // MAX_SEQ_LEN),
    TOTAL_BATCH_SIZE=max(2**12, MAX_SEQ_LEN),
    WARMDOWN_RATIO=0.6,
    FINAL_LR_FRAC=0.05,
)


def use_small_defaults():
    unknown = set(SMALL) - set(globals())
    assert not unknown, f"SMALL sets {sorted(unknown)}, which no hyperparameter above is called: correct the name"
    globals().update(SMALL)


# ------------------------------------------------------------------------------------------------
# Attention: query q sees the keys k with 0 <= q - k <= window, whichever back end computes it
# ------------------------------------------------------------------------------------------------


class Attention(NamedTuple):
    name: str
    make_mask: Callable  # (T, window, device) -> what attend takes as mask; called outside the compiled graph
    attend: Callable  # q (B, T, H, D), k and v (B, T, KV, D), window, mask -> (B, T, H, D)


def no_mask(T, window, device):
    return None


@lru_cache(maxsize=64)
def sdpa_mask(T, window, device):
    if window >= T - 1:
        return None  # full context: is_causal lets SDPA take a fused kernel
    age = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)  # q - k, (T, T)
    return (age >= 0) & (age <= window)


def sdpa_attend(q, k, v, window, mask):
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    gqa = q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
    return y.transpose(1, 2)


@lru_cache(maxsize=64)
def flex_mask(T, window, device):
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b, h, q, k):
        return (k <= q) & (q - k <= window)

    return create_block_mask(visible, None, None, T, T, device=device)


def flex_attend(q, k, v, window, mask):
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    y = flex_attention(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)


SDPA = Attention("sdpa", sdpa_mask, sdpa_attend)
FLEX = Attention("flex", flex_mask, flex_attend)


def load_fa3():
    """FlashAttention-3 from the local kernel cache (prepare.py fetches it: a run touches no network)."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when kernels is imported: missing files fail at once
    from kernels import get_kernel

    kernel = get_kernel(**FA3_KERNEL)
    flash_attn_func = getattr(kernel, "flash_attn_interface", kernel).flash_attn_func

    def fa3_attend(q, k, v, window, mask):
        y = flash_attn_func(q, k, v, causal=True, window_size=(window, 0))  # `window` keys to the left, and its own
        return y[0] if isinstance(y, tuple) else y  # some builds return the log-sum-exp too

    return Attention("fa3", no_mask, fa3_attend)


def choose_attention(device, dtype, compiled=True, failed=()):
    """The fastest back end that can run here, and why not a faster one; `failed` is {name: why} from the warm-up."""
    refused = dict(failed)
    if device.type != "cuda":
        return SDPA, f"on {device.type}"
    if "fa3" not in refused:
        if torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0) or dtype != torch.bfloat16:
            refused["fa3"] = "needs a Hopper GPU and bfloat16"
        else:
            try:
                return load_fa3(), "Hopper, bfloat16"
            except Exception as error:  # never fetched, untrusted, built for another torch: all mean the next one
                refused["fa3"] = one_line(error)
    if "flex" not in refused:
        if compiled:
            return FLEX, not_used(refused)
        refused["flex"] = "needs torch.compile"
    return SDPA, not_used(refused)


def not_used(refused):
    return "; ".join(f"{name.upper()} not used: {why}" for name, why in refused.items())


def one_line(error, limit=200):
    """An exception's type and first line, for a reason that is printed."""
    text = " ".join(str(error).split("\n", 1)[0].split())
    return f"{type(error).__name__}: {text}"[:limit]


# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    sequence_len: int  # the longest T
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    mlp_ratio: int
    window_pattern: str
    short_window: int
    rope_base: float
    softcap: float

    def window(self, layer):
        """How far back the layer looks, in tokens."""
        long = layer == self.n_layer - 1 or self.window_pattern[layer % len(self.window_pattern)] == "L"
        return self.sequence_len if long else self.short_window

    def has_value_embedding(self, layer):
        """On alternating layers, the last one always."""
        return layer % 2 == (self.n_layer - 1) % 2


def norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6).to(x.dtype)  # under autocast it may come back as float32


def rotate(x, cos, sin):  # (B, T, H, D) by (T, 1, D/2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    GATE_CHANNELS = 32  # of the input, that the gate on the value embedding looks at

    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        self.c_q = nn.Linear(config.n_embd, self.n_head * self.head_dim, bias=False)
        self.c_k = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.c_v = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.c_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=False)
        self.ve_gate = None
        if config.has_value_embedding(layer):
            self.ve_gate = nn.Linear(self.GATE_CHANNELS, self.n_kv_head, bias=False)

    def forward(self, x, ve, cos, sin, attend, window, mask):
        B, T, _ = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if ve is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., : self.GATE_CHANNELS]))  # (B, T, KV), 1 at the start
            v = v + gate.unsqueeze(-1) * ve.view(B, T, self.n_kv_head, self.head_dim)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        y = attend(q, k, v, window, mask)
        return self.c_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_ratio * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.mlp_ratio * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, *attention_inputs):
        x = x + self.attn(norm(x), *attention_inputs)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, config, dtype=torch.float32, attention=SDPA):
        super().__init__()
        self.config, self.dtype, self.attention = config, dtype, attention
        self.network = self.eager_network  # or what torch.compile makes of it
        kv_dim = config.n_kv_head * (config.n_embd // config.n_head)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(config.vocab_size, kv_dim)
             for i in range(config.n_layer) if config.has_value_embedding(i)}
        )  # fmt: skip
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        half = config.n_embd // config.n_head // 2
        frequency = config.rope_base ** (-torch.arange(half, dtype=torch.float32) / half)
        angle = torch.arange(config.sequence_len, dtype=torch.float32)[:, None] * frequency  # (T, D/2)
        self.register_buffer("cos", angle.cos()[:, None], persistent=False)  # (T, 1, D/2)
        self.register_buffer("sin", angle.sin()[:, None], persistent=False)

    @torch.no_grad()
    def init_weights(self, scale=1.0, x0=0.1):
        """Output projections and gates start at zero, so that every block starts as the identity."""
        bound = scale * (3 / self.config.n_embd) ** 0.5  # uniform with standard deviation scale * n_embd**-0.5
        self.wte.weight.normal_(std=1.0)
        self.lm_head.weight.normal_(std=0.001)
        for embed in self.value_embeds.values():
            embed.weight.uniform_(-bound, bound)
        for block in self.blocks:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                linear.weight.uniform_(-bound, bound)
            for linear in (block.attn.c_proj, block.mlp.c_proj, block.attn.ve_gate):
                if linear is not None:
                    linear.weight.zero_()
        self.resid_lambdas.fill_(1.0)
        self.x0_lambdas.fill_(x0)

    def forward(self, idx, targets=None):
        """Logits (B, T, V) in float32; with targets the mean cross-entropy in nats instead."""
        T, device, config = idx.size(1), idx.device, self.config
        assert T <= config.sequence_len, f"a row of {T} tokens exceeds the model's {config.sequence_len}"
        masks = [self.attention.make_mask(T, config.window(i), device) for i in range(config.n_layer)]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.network(idx, targets, masks)

    def eager_network(self, idx, targets, masks):
        cos, sin = self.cos[: idx.size(1)], self.sin[: idx.size(1)]
        x = x0 = norm(self.wte(idx).to(self.dtype))  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            ve = self.value_embeds[str(i)](idx).to(self.dtype) if str(i) in self.value_embeds else None
            x = block(x, ve, cos, sin, self.attention.attend, self.config.window(i), masks[i])
        logits = self.lm_head(norm(x)).float()  # (B, T, V)
        logits = self.config.softcap * torch.tanh(logits / self.config.softcap)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Forward and backward: 6 a matmul weight, and attention counted over the whole window, causal or not."""
        config = self.config
        weights = sum(p.numel() for p in self.blocks.parameters()) + self.lm_head.weight.numel()
        keys = sum(min(config.window(i), config.sequence_len) for i in range(config.n_layer))
        return 6 * weights + 12 * config.n_embd * keys


# ------------------------------------------------------------------------------------------------
# Optimizer
# ------------------------------------------------------------------------------------------------

# Polar Express (arXiv:2505.16932): one quintic a step that together bring every singular value in [0.002, 1] into
# [0.86, 1.15]. The first is widened by 2 %, which leaves room for bfloat16 around 1.
POLAR_EXPRESS = (
    (7.996623, -21.186509, 14.381891),
    (4.042930, -2.808917, 0.500018),
    (3.891668, -2.772484, 0.506065),
    (3.285754, -2.368129, 0.464490),
    (2.346541, -1.709783, 0.423236),
)


def adamw_step(p, grad, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """Decoupled Adam, in place. step and lr are 0-dim tensors: a new value compiles nothing anew."""
    beta1, beta2 = betas
    step += 1
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.lerp_(grad.square(), 1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt() + eps
    p.mul_(1 - lr * weight_decay)
    p.sub_(lr * (exp_avg / (1 - beta1**step)) / denominator)


def orthogonalize(G, coefficients=POLAR_EXPRESS, dtype=torch.bfloat16):
    """The orthogonal matrix nearest to each of G (..., rows, cols), roughly: its singular values become about 1."""
    tall = G.size(-2) > G.size(-1)
    X = G.mT if tall else G  # the Gram matrix of the shorter side is the cheaper one
    X = (X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)).to(dtype)
    for a, b, c in coefficients:
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return (X.mT if tall else X).to(G.dtype)


def normalize_variance(update, second_moment, beta2):
    """NorMuon (arXiv:2510.05491): even out the rows (of tall matrices) or columns, and keep the Frobenius norm."""
    dim = -1 if second_moment.size(-1) == 1 else -2
    second_moment.lerp_(update.square().mean(dim=dim, keepdim=True), 1 - beta2)
    scaled = update * second_moment.clamp_min(1e-10).rsqrt()
    frobenius = update.norm(dim=(-2, -1), keepdim=True)
    return scaled * (frobenius / scaled.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))


def muon_step(
    p, grad, momentum_buffer, second_moment, lr, momentum, weight_decay, beta2, coefficients=POLAR_EXPRESS,
    dtype=torch.bfloat16,
):  # fmt: skip
    """Muon on stacked matrices (K, rows, cols), in place; lr, momentum and weight_decay are 0-dim tensors."""
    momentum_buffer.lerp_(grad, 1 - momentum)
    update = orthogonalize(grad.lerp(momentum_buffer, momentum), coefficients, dtype)  # Nesterov
    if beta2 is not None:
        update = normalize_variance(update, second_moment, beta2)
    agrees = update * p >= 0  # cautious: decay only what the update shrinks too
    lr = lr * max(1, p.size(-2) / p.size(-1)) ** 0.5
    p.sub_(lr * (update + weight_decay * agrees * p))


class MuonAdamW(torch.optim.Optimizer):
    """Groups of kind "muon" (matrices of one shape, stepped as one stack) and of kind "adamw"."""

    def __init__(self, groups, dtype=torch.bfloat16):
        super().__init__(groups, defaults={})
        self.adamw_step, self.muon_step, self.dtype = adamw_step, muon_step, dtype
        device = self.param_groups[0]["params"][0].device
        self.lr, self.momentum, self.weight_decay = (torch.zeros((), device=device) for _ in range(3))
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
            if group["kind"] == "muon":
                stack = torch.zeros(len(group["params"]), *group["params"][0].shape, device=device)
                along = -1 if stack.size(-2) >= stack.size(-1) else -2
                second_moment = torch.zeros_like(stack.mean(dim=along, keepdim=True))
                self.state[group["params"][0]] = dict(momentum_buffer=stack, second_moment=second_moment)
            else:
                for p in group["params"]:
                    step = torch.zeros((), device=device)
                    self.state[p] = dict(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            self.lr.fill_(group["lr"])
            params = group["params"]
            if group["kind"] == "muon":
                self.momentum.fill_(group["momentum"])
                self.weight_decay.fill_(group["weight_decay"])
                stack = torch.stack(params)
                grads = torch.stack([p.grad for p in params])
                state = self.state[params[0]]
                self.muon_step(
                    stack, grads, state["momentum_buffer"], state["second_moment"], self.lr, self.momentum,
                    self.weight_decay, group["beta2"], group["coefficients"], self.dtype,
                )  # fmt: skip
                torch._foreach_copy_(params, list(stack.unbind()))
            else:
                for p in params:
                    self.adamw_step(
                        p, p.grad, **self.state[p], lr=self.lr, betas=group["betas"], eps=group["eps"],
                        weight_decay=group["weight_decay"],
                    )  # fmt: skip


def build_optimizer(model, dtype):
    scale = (model.config.n_embd / 768) ** -0.5
    adamw = dict(kind="adamw", eps=1e-10, weight_decay=0.0, betas=ADAM_BETAS)
    embeddings = [*model.wte.parameters(), *model.value_embeds.parameters()]
    groups = [
        adamw | dict(params=embeddings, lr=EMBEDDING_LR * scale, weight_decay=EMBEDDING_WEIGHT_DECAY),
        adamw | dict(params=[model.lm_head.weight], lr=UNEMBEDDING_LR * scale),
        adamw | dict(params=[model.resid_lambdas], lr=RESID_LR),
        adamw | dict(params=[model.x0_lambdas], lr=SCALAR_LR, betas=X0_BETAS),
    ]
    muon = dict(kind="muon", lr=MATRIX_LR, beta2=MUON_BETA2, coefficients=POLAR_EXPRESS)
    muon |= dict(momentum=MUON_MOMENTUM[0], weight_decay=WEIGHT_DECAY)
    matrices = list(model.blocks.parameters())
    for shape in sorted({p.shape for p in matrices}):
        groups.append(muon | dict(params=[p for p in matrices if p.shape == shape]))
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters()), (
        f"{len(grouped)} parameters are in groups, the model has {len(list(model.parameters()))}: "
        "put each into exactly one group of build_optimizer"
    )
    return MuonAdamW(groups, dtype)


# ------------------------------------------------------------------------------------------------
# Schedules: functions of progress, the share of the time budget that has gone
# ------------------------------------------------------------------------------------------------


def lr_multiplier(progress, warmup, start, warmdown, final):
    """Linear from start to 1 over the first `warmup` of the run, 1, linear to `final` over the last `warmdown`."""
    if progress < warmup:
        return start + (1 - start) * progress / warmup
    if progress <= 1 - warmdown:
        return 1.0
    return final + (1 - final) * (1 - progress) / warmdown


def ramp(progress, start, end, over):
    return start + (end - start) * min(progress / over, 1.0)


def set_schedules(optimizer, progress):
    """Give every group its values for this moment; returns the learning rate's multiplier."""
    multiplier = lr_multiplier(progress, WARMUP_RATIO, WARMUP_START, WARMDOWN_RATIO, FINAL_LR_FRAC)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
        if group["kind"] == "muon":
            group["momentum"] = ramp(progress, *MUON_MOMENTUM, over=MUON_MOMENTUM_RAMP)
            group["weight_decay"] = WEIGHT_DECAY * (1 - progress)
    return multiplier


# ------------------------------------------------------------------------------------------------
# What this machine can do
# ------------------------------------------------------------------------------------------------


def choose_dtype(device):
    if DTYPE is not None:
        return DTYPE, "set by DTYPE"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"CUDA capability {major}.{minor}"
        return torch.float32, f"CUDA capability {major}.{minor} has no bfloat16"
    if device.type == "cpu":
        for name in ("avx512_bf16", "amx_tile"):
            if getattr(torch.cpu, f"_is_{name}_supported", lambda: False)():
                return torch.bfloat16, f"the CPU has {name}"
        return torch.float32, "the CPU has neither avx512_bf16 nor AMX"
    return torch.float32, f"on {device.type}"


def choose_compile(device):
    if not COMPILE:
        return False, "COMPILE is off"
    if device.type == "mps":
        return False, "torch.compile is slow to mature on MPS"
    if device.type == "cpu":
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if not shutil.which(compiler):
            return False, f"no C++ compiler: {compiler} is not on the PATH"
    elif not importlib.util.find_spec("triton"):
        return False, "triton is not installed"
    return True, f"on {device.type}"


def set_compile(model, optimizer, compiled):
    """Compile the network and the optimizer's two steps, or go back to plain functions."""
    model.network, optimizer.adamw_step, optimizer.muon_step = model.eager_network, adamw_step, muon_step
    if compiled:
        import torch._dynamo

        torch._dynamo.reset()  # graphs of an attempt that failed
        torch._dynamo.config.recompile_limit = 64  # one optimizer graph a shape
        model.network = torch.compile(model.network, dynamic=False)
        optimizer.adamw_step = torch.compile(adamw_step, dynamic=False)
        optimizer.muon_step = torch.compile(muon_step, dynamic=False)


def graphs_compiled():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def synchronize(device):
    getattr(torch, device.type).synchronize()


def free_memory(device):
    gc.collect()
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


# ------------------------------------------------------------------------------------------------
# Warm-up: compile and find what fits before the clock starts, then put everything back
# ------------------------------------------------------------------------------------------------


def snapshot(model, optimizer, device):
    """All that a training step changes, copied: state_dict() would leave out non-persistent buffers."""

    def copy(value):
        return value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value

    return dict(
        tensors=[(tensor, copy(tensor)) for tensor in [*model.parameters(), *model.buffers()]],
        state={p: {key: copy(value) for key, value in state.items()} for p, state in optimizer.state.items()},
        groups=[{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups],
        rng=(random.getstate(), torch.get_rng_state()),
        device_rng=None if device.type == "cpu" else getattr(torch, device.type).get_rng_state(),
    )


@torch.no_grad()
def restore(saved, optimizer, device):
    """Put a snapshot back, in place."""
    for tensor, value in saved["tensors"]:
        tensor.copy_(value)
    for p in list(optimizer.state):
        before = saved["state"].get(p, {})
        for key, value in list(optimizer.state[p].items()):
            if key not in before:
                del optimizer.state[p][key]
            elif torch.is_tensor(value):
                value.copy_(before[key])
            else:
                optimizer.state[p][key] = before[key]
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(values)
    optimizer.zero_grad(set_to_none=True)
    random.setstate(saved["rng"][0])
    torch.set_rng_state(saved["rng"][1])
    if device.type != "cpu":
        getattr(torch, device.type).set_rng_state(saved["device_rng"])


def train_step(model, optimizer, next_batch, micro_batches):
    """One optimizer step over the mean of the micro-batches' gradients; returns the mean loss, on the device."""
    losses = []
    for _ in range(micro_batches):
        x, y = next_batch()
        loss = model(x, y) / micro_batches
        loss.backward()
        losses.append(loss.detach())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sum(losses)


def rehearse(model, optimizer, device, batch_size, micro_batches):
    """Two steps as in training and a forward as in evaluation: every graph is compiled, the memory peak is seen."""
    for _ in range(2):
        train_step(model, optimizer, lambda: warmup_batch(batch_size, MAX_SEQ_LEN), min(micro_batches, 2))
    model.eval()
    with torch.no_grad():
        model(warmup_batch(batch_size, MAX_SEQ_LEN)[0])
    model.train()
    synchronize(device)


def is_out_of_memory(error):
    text = str(error).lower()
    if "out of resource" in text:  # a kernel short of shared memory: a smaller batch does not help
        return False
    signs = ("out of memory", "alloc_failed", "not enough memory", "can't allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in text for sign in signs)


def warm_up(model, optimizer, device, batch_size, rows):
    """Rehearse until it works: on failure a smaller batch, the next attention back end, or eager.

    Returns the device batch size, which divides `rows` (those of an optimizer step), and whether it is compiled.
    """
    saved = snapshot(model, optimizer, device)
    (compiled, why), failed = choose_compile(device), {}
    while True:
        model.attention, why_attention = choose_attention(device, model.dtype, compiled, failed)
        set_compile(model, optimizer, compiled)
        try:
            rehearse(model, optimizer, device, batch_size, rows // batch_size)
            remedy = None
        except Exception as error:
            reason = one_line(error)
            if is_out_of_memory(error):
                if batch_size == 1:
                    raise SystemExit(f"out of memory with one row on the device: make the model smaller ({reason})") from None
                batch_size = max(n for n in range(1, batch_size // 2 + 1) if rows % n == 0)
                remedy = f"out of memory: device batch {batch_size}, {rows // batch_size} micro-batches a step"
            elif model.attention.name != "sdpa":
                failed[model.attention.name] = reason
                remedy = f"attention {model.attention.name} failed in the warm-up: {reason}"
            elif compiled:
                (compiled, why), failed = (False, f"torch.compile failed: {reason}"), {}
                remedy = why
            else:
                raise
        # Here and not in the except clause, whose frames hold the activations.
        model.train()
        restore(saved, optimizer, device)
        free_memory(device)
        if remedy is None:
            break
        print(remedy, flush=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    print(f"attention: {model.attention.name} ({why_attention})")
    print(f"torch.compile: {'yes' if compiled else 'no, eager'} ({why})")
    print(f"device batch: {batch_size} rows of {MAX_SEQ_LEN} tokens, {rows // batch_size} micro-batches a step")
    return batch_size, compiled


# ------------------------------------------------------------------------------------------------
# Checkpoint
# ------------------------------------------------------------------------------------------------


def save_checkpoint(path, model, run_id):
    beside = Path(f"{path}.tmp")
    torch.save({"model": model.state_dict(), "config": asdict(model.config), "run_id": run_id}, beside)
    os.replace(beside, path)


def load_model(path, device):
    """The model of a checkpoint that this file wrote, ready to call on any T up to its sequence_len."""
    device = torch.device(device)
    checkpoint = torch.load(path, map_location=device, weights_only=True)
    model = GPT(GPTConfig(**checkpoint["config"]), choose_dtype(device)[0])
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval()


# ------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------


def build_config(vocab_size):
    n_head = -(-DEPTH * ASPECT_RATIO // HEAD_DIM)
    assert n_head % QUERIES_PER_KV == 0, f"QUERIES_PER_KV {QUERIES_PER_KV} must divide the {n_head} heads"
    return GPTConfig(
        sequence_len=MAX_SEQ_LEN,
        vocab_size=vocab_size,
        n_layer=DEPTH,
        n_head=n_head,
        n_kv_head=n_head // QUERIES_PER_KV,
        n_embd=n_head * HEAD_DIM,
        mlp_ratio=MLP_RATIO,
        window_pattern=WINDOW_PATTERN,
        short_window=int(MAX_SEQ_LEN * SHORT_WINDOW_RATIO),
        rope_base=ROPE_BASE,
        softcap=SOFTCAP,
    )


def check_batch_sizes():
    """Rows of an optimizer step."""
    tokens = DEVICE_BATCH_SIZE * MAX_SEQ_LEN
    if TOTAL_BATCH_SIZE % tokens or not TOTAL_BATCH_SIZE:
        raise SystemExit(
            f"TOTAL_BATCH_SIZE {TOTAL_BATCH_SIZE} is not a multiple of DEVICE_BATCH_SIZE * MAX_SEQ_LEN = "
            f"{DEVICE_BATCH_SIZE} * {MAX_SEQ_LEN} = {tokens}: set it to {max(1, TOTAL_BATCH_SIZE // tokens) * tokens}"
        )
    return TOTAL_BATCH_SIZE // MAX_SEQ_LEN


def check_loss(loss, step):
    if not loss <= 100:  # NaN compares false
        print(flush=True)
        raise SystemExit(f"FAIL: the loss is {loss} after {step} steps: lower the learning rates or undo the last edit")


def train(clock, model, optimizer, loader, micro_batches):
    """Until the budget is spent; returns the number of steps."""
    on_terminal = sys.stdout.isatty()
    flops_per_token = model.flops_per_token()
    step, average, pending, last_print = 0, 0.0, None, float("-inf")
    epoch = 1

    def next_batch():
        nonlocal epoch
        x, y, epoch = next(loader)
        return x, y

    gc.collect()
    gc.freeze()  # a collection in the loop would stall the device
    gc.disable()
    progress = clock.progress()
    while progress < 1.0:
        began = clock.training_seconds()
        multiplier = set_schedules(optimizer, progress)
        loss = train_step(model, optimizer, next_batch, micro_batches)
        if pending is not None:  # the loss of the step before: reading this one's would wait for the device
            value = pending.item()
            check_loss(value, step)
            average = 0.9 * average + 0.1 * value
        pending = loss
        step += 1
        progress = clock.progress()
        now = clock.training_seconds()
        if step > 1 and (on_terminal or now - last_print >= 10 or progress >= 1.0):
            last_print = now
            seconds = max(now - began, 1e-9)
            print(
                f"step {step:05d} ({100 * progress:.1f}%) | loss {average / (1 - 0.9 ** (step - 1)):.6f}"
                f" | lrm {multiplier:.2f} | {1000 * seconds:.0f} ms | {TOTAL_BATCH_SIZE / seconds:,.0f} tok/s"
                f" | mfu {clock.mfu_percent(flops_per_token, TOTAL_BATCH_SIZE, seconds):.1f}%"
                f" | epoch {epoch} | {now * (1 - progress) / progress:.0f} s left",
                end="\r" if on_terminal else "\n",
                flush=True,
            )
    if step:
        check_loss(pending.item(), step)
    if on_terminal:
        print()
    gc.enable()
    gc.unfreeze()
    return step


def main():
    clock = begin_run(__file__, seed=SEED)
    device = clock.device
    if device.type != "cuda":
        use_small_defaults()
    rows = check_batch_sizes()
    tokenizer = load_tokenizer()
    random.seed(clock.seed)
    torch.manual_seed(clock.seed)
    torch.set_float32_matmul_precision("high")

    dtype, why = choose_dtype(device)
    print(f"dtype: {str(dtype).removeprefix('torch.')} ({why})")
    model = GPT(build_config(tokenizer.vocab_size), dtype)
    model.init_weights(INIT_SCALE, X0_INIT)  # on the CPU: a seed means the same weights on every device
    model.to(device)
    optimizer = build_optimizer(model, dtype)
    print(f"model: {model.num_params():,} parameters, {model.config}", flush=True)

    batch_size, compiled = warm_up(model, optimizer, device, DEVICE_BATCH_SIZE, rows)
    graphs = graphs_compiled() if compiled else 0
    clock.start(model, batch_size)
    loader = make_dataloader(tokenizer, batch_size, MAX_SEQ_LEN, "train")
    num_steps = train(clock, model, optimizer, loader, rows // batch_size)
    save_checkpoint(Path(__file__).with_name("checkpoint.pt"), model, clock.run_id)
    evaluate_bpb(model, tokenizer, batch_size)
    if compiled:
        print(f"graphs compiled after the clock started: {graphs_compiled() - graphs}")
    clock.summary(
        num_steps=num_steps,
        total_tokens=num_steps * TOTAL_BATCH_SIZE,
        num_params=model.num_params(),
        flops_per_token=model.flops_per_token(),
        depth=DEPTH,
    )


if __name__ == "__main__":
    main()
