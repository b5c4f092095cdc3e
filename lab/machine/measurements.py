"""What torch and train.py report of this machine, and what they measure at: runs in a child process of doctor.

The working directory is the tree whose train.py is measured. Each stage prints one line of JSON: {stage: {...}}, or
{stage: {"error": sentence}}. What libraries and train.py print goes to stderr. Files are written only into the compile
cache, which doctor puts into a temporary folder.
"""

import contextlib
import functools
import importlib
import itertools
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

from lab.machine.back_ends import OTHERS
from lab.store import names

SEED = 42
EVAL_SECONDS = 3  # of scoring, from which the time of an evaluation follows
COMPARED_STEPS, COMPARED_ROWS = 10, 4
REPEATS = 10  # timed calls of an attention back end
KNOBS = ["DEPTH", "TOTAL_BATCH_SIZE", "DEVICE_BATCH_SIZE", "WINDOW_PATTERN", "MAX_SEQ_LEN"]


def main():
    wanted, answers = json.loads(sys.argv[1]), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    session, ready = Session(wanted), True
    for stage in wanted["stages"]:
        found = attempt(getattr(session, stage)) if ready else {"error": "set-up failed"}
        ready = ready and not (stage == "setup" and "error" in found)
        print(json.dumps({stage: found}), file=answers, flush=True)
    answers.close()
    sys.stdout.flush()
    os._exit(0)  # a broken driver may crash, or hang, while Python ends


def attempt(stage):
    try:
        return stage()
    except (Exception, SystemExit) as error:  # a broken driver, torch or train.py
        module = Path(names.TRAIN).stem  # an agent may have rewritten it, within its contract
        reason = str(error) if isinstance(error, SystemExit) else one_line(error, 300)
        return {"error": reason, "rewritten": isinstance(error, AttributeError) and f"module '{module}'" in str(error)}


class Session:
    """The stages, in the order in which they are called. wanted: the child's arguments, as probes.py gives them."""

    def __init__(self, wanted):
        self.wanted = wanted

    # --- facts ---

    def torch(self):
        """What torch reports. "why" is its reason if it sees no GPU."""
        import torch

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            available = torch.cuda.is_available()
        why = " ".join(str(said[0].message).split()).partition(". ")[0] if said else "torch gives no reason"
        found = {
            "version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "available": available,
            "why": why, "mps": torch.backends.mps.is_available(), "arch_list": torch.cuda.get_arch_list(), "devices": [],
        }  # fmt: skip
        for i in range(torch.cuda.device_count() if available else 0):
            properties = torch.cuda.get_device_properties(i)
            found["devices"].append({
                "name": properties.name, "capability": [properties.major, properties.minor],
                "memory": properties.total_memory, "uuid": str(getattr(properties, "uuid", "") or ""),
                "arch": getattr(properties, "gcnArchName", ""), "used": None,
            })  # fmt: skip
            if torch.version.hip and self.wanted["touch_gpu"]:  # nvidia-smi has it for NVIDIA's
                free, total = torch.cuda.mem_get_info(i)
                found["devices"][-1]["used"] = total - free
        try:
            import triton

            return found | {"triton": triton.__version__, "triton_error": None}
        except Exception as error:
            return found | {"triton": None, "triton_error": one_line(error)}

    def train(self):
        """What train.py chooses here, without training."""
        import torch

        prepare, train = self.core()
        device = prepare.pick_device()[0]
        dtype, dtype_why = train.choose_dtype(device)
        compiled, compile_why = train.choose_compile(device)
        attention, attention_why = train.choose_attention(device, dtype, compiled)
        hopper = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9
        states = {}
        for name, load in train.ATTENTIONS.items():
            if name == "fa3" and not hopper:
                states[name] = "needs a Hopper GPU"
            elif name == "flex" and not compiled:
                states[name] = "needs torch.compile"
            else:
                states[name] = loads(load)
        states |= {
            name: state for name, load in OTHERS.items() if (state := loads(lambda f=load: f(train))) == "loaded"
        }
        with torch.device("meta"):  # shapes only
            model = train.GPT(train.build_config(prepare.VOCAB_SIZE, dtype))
        return {
            "device": device.type, "dtype": str(dtype).removeprefix("torch."), "dtype_why": dtype_why,
            "compile": compiled, "compile_why": compile_why, "hopper": hopper,
            "attention": attention.name, "attention_why": attention_why, "attentions": states,
            "params": sum(p.numel() for p in model.parameters()), "flops_per_token": model.flops_per_token(),
            **{name: getattr(train, name, None) for name in KNOBS},
        }  # fmt: skip

    def core(self):
        """(prepare, train) of the tree."""
        return importlib.import_module("prepare"), importlib.import_module(Path(names.TRAIN).stem)

    # --- measurements ---

    def setup(self):
        """A run up to its first step: seconds from the start of the process until the warm-up is done."""
        import torch

        process, frozen_device = importlib.import_module("frozen.process"), importlib.import_module("frozen.device")
        self.prepare, self.trainer = prepare, train = self.core()
        # prepare's run without data, lock and deadline; it only tells train.py the device.
        self.run = prepare._run = prepare.Run(
            time.monotonic, process.Watchdog(lambda: 0.0), prepare.pick_device(), SEED, None, None
        )
        self.device = self.run.device
        if self.device.type == "cpu":
            frozen_device.keep_freed_memory()  # as begin_run does
        torch.set_float32_matmul_precision("high")
        self.model, self.optimizer = self.build()
        self.batch_size = train.warm_up(self.model, self.optimizer, self.device)
        graphs = frozen_device.compiled_graphs()
        return {
            "seconds": process.process_age(), "device_batch": self.batch_size, "attention": self.model.attention.name,
            "compiled": graphs > 0, "graphs": graphs, "device_name": self.run.device_name,
        }  # fmt: skip

    def build(self):
        """(model, optimizer) as train.py's main builds them."""
        import torch

        train = self.trainer
        torch.manual_seed(SEED)
        dtype, _ = train.choose_dtype(self.device)
        model = train.GPT(train.build_config(self.prepare.VOCAB_SIZE, dtype))
        model.init_weights()
        model.to(self.device)
        return model, train.build_optimizer(model, dtype)

    def random_batches(self, B):
        """Endless batches of random tokens, (x, y, epoch), which are on the device already."""
        import torch

        T, generator = self.trainer.MAX_SEQ_LEN, torch.Generator().manual_seed(SEED)
        rows = [torch.randint(0, self.prepare.NUM_ORDINARY, (2, B, T), generator=generator) for _ in range(4)]
        batches = [(*row.to(self.device), 1) for row in rows]
        return itertools.cycle(batches)

    def training(self):
        """The loop of train.py for some seconds of wall clock."""
        devices, train = importlib.import_module("frozen.device"), self.trainer
        graphs, batches = devices.compiled_graphs(), self.random_batches(self.batch_size)
        devices.synchronize(self.device)
        clock = ShortClock(self.run, self.wanted["seconds"])
        steps, tokens = train.train(clock, self.model, self.optimizer, batches, self.batch_size)
        devices.synchronize(self.device)
        seconds = clock.training_seconds()
        flops = self.model.flops_per_token()
        return {
            "seconds": seconds, "steps": steps, "tokens": tokens, "tokens_per_second": tokens / seconds,
            "step_ms": 1000 * seconds / steps, "mfu_percent": self.run.mfu_percent(flops, tokens, seconds),
            "peak_memory_mb": devices.peak_memory_mb(self.device), "late_graphs": devices.compiled_graphs() - graphs,
        }  # fmt: skip

    def evaluation(self):
        """Seconds that scoring all of constants.EVAL_TOKENS would take, from some batches of random rows."""
        import numpy as np

        constants, rng, B = importlib.import_module("constants"), np.random.default_rng(SEED), self.batch_size
        rows = rng.integers(0, self.prepare.NUM_ORDINARY, (B, constants.MAX_SEQ_LEN + 1)).astype(np.uint16)
        token_bytes = np.ones(constants.VOCAB_SIZE, dtype=np.int32)
        self.model.eval()
        self.prepare.score_rows(self.model, rows, token_bytes, B)  # the first call may load kernels
        spent, began = [], time.monotonic()
        while not spent or time.monotonic() - began < EVAL_SECONDS:
            mark = time.monotonic()
            self.prepare.score_rows(self.model, rows, token_bytes, B)
            spent.append(time.monotonic() - mark)
        self.model.train()
        return {"seconds": statistics.median(spent) * constants.EVAL_TOKENS / (B * constants.MAX_SEQ_LEN)}

    def attention(self):
        """{back end: {"error": largest relative error of the output and of the gradients, "ms": of one forward and
        backward at full size, None except on CUDA}, or {"failed": sentence}}."""
        import torch

        train, device = self.trainer, self.device
        loaders = dict(train.ATTENTIONS)
        if device.type != "cuda":
            loaders = {"sdpa": loaders["sdpa"]}
        else:
            loaders |= {name: (lambda f=load: f(train)) for name, load in OTHERS.items()}
            if torch.version.hip or torch.cuda.get_device_capability(device)[0] != 9:
                loaders.pop("fa3", None)
        found = {}
        for name, load in loaders.items():
            try:
                attention = load()
                found[name] = {
                    "error": largest_error(attention, self.model, device),
                    "ms": milliseconds(attention, self.model, device),
                }
            except Exception as error:
                found[name] = {"failed": one_line(error)}
        return found

    def compiled(self):
        """Ten steps from the same weights on the same batch, as set up and in eager mode with SDPA: losses in nats. And
        the gradients of both at the weights where the first of them ended, as the norm of their difference over the norm.

        The losses agree only roughly: at first Adam divides gradients by themselves and Muon orthogonalises rounding
        errors, so a change of 1e-7 in the weights moves a loss by up to 2 % of the fall. The gradients agree closely."""
        train, model, optimizer = self.trainer, *self.build()
        train.set_compile(model, optimizer, True, self.device)
        model.attention = self.model.attention
        batch = next(self.random_batches(min(COMPARED_ROWS, self.batch_size)))
        compiled, gradients = self.losses(model, optimizer, batch), self.gradients(model, batch)
        train.set_compile(model, optimizer, False, self.device)
        model.attention = train.SDPA
        expected = self.gradients(model, batch)
        off = sum((a - b).square().sum() for a, b in zip(gradients, expected, strict=True))
        all_of_it = sum(g.square().sum() for g in expected)
        del model, optimizer, gradients
        model, optimizer = self.build()
        model.attention = train.SDPA
        eager = self.losses(model, optimizer, batch)
        difference = max(abs(a - b) for a, b in zip(compiled, eager, strict=True))
        return {
            "compiled": compiled, "eager": eager, "loss_difference": finite(difference),
            "gradient_difference": finite((off / all_of_it).sqrt().item()),
        }  # fmt: skip

    def losses(self, model, optimizer, batch):
        step = functools.partial(
            self.trainer.train_step, model, optimizer, itertools.repeat(batch), 1, batch[0].size(1)
        )
        return [step()[0].item() for _ in range(COMPARED_STEPS)]

    def gradients(self, model, batch):
        model(*batch[:2]).backward()
        found = [p.grad.float() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return found


class ShortClock:
    """Replaces prepare's clock for a training of some seconds."""

    def __init__(self, run, seconds):
        self.run, self.seconds, self.began = run, seconds, time.monotonic()
        self.mfu_percent = run.mfu_percent

    def training_seconds(self):
        return time.monotonic() - self.began

    def progress(self):
        return min(self.training_seconds() / self.seconds, 1.0)


# ---------------------------------------------------------------------------------------------------
# Attention


def naive(q, k, v, window):
    """The reference, in float32: all scores, a mask, a softmax. Shapes as in train.py, (B, T, H, D)."""
    import torch

    T, groups = q.size(1), q.size(2) // k.size(2)
    q, k, v = (t.float().transpose(1, 2) for t in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    age = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
    scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill((age < 0) | (age > window), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def attend_function(attention, device):
    """The back end's function as train.py runs it: FlexAttention only compiled, the kernels as they are."""
    import torch

    if attention.name == "flex" and device.type != "cpu":
        return torch.compile(attention.attend, dynamic=False)
    return attention.attend


def largest_error(attention, model, device, B=2, T=256, H=4):
    """Largest relative error (of norms) of output and gradients, over full context and a window, one and two query
    heads per key/value head."""
    import torch

    D, worst, attend = model.config.n_embd // model.config.n_head, 0.0, attend_function(attention, device)
    generator = torch.Generator().manual_seed(SEED)
    with exact_matmuls():
        for window, heads in itertools.product([T, 37], [H, H // 2]):
            inputs = [torch.randn(B, T, n, D, generator=generator).to(device, model.dtype) for n in (H, heads, heads)]
            inputs = [t.requires_grad_() for t in inputs]
            weight = torch.randn(B, T, H, D, generator=generator).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=False):
                y = attend(*inputs, window, attention.make_mask(T, window, device))
                got = [y, *torch.autograd.grad((y.float() * weight).sum(), inputs)]
                exact = [t.detach().float().requires_grad_() for t in inputs]
                y = naive(*exact, window)
                expected = [y, *torch.autograd.grad((y * weight).sum(), exact)]
            errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]
            worst = max(worst, *map(finite, errors))
    return worst


@contextlib.contextmanager
def exact_matmuls():
    """The reference multiplies in float32, not in TF32."""
    import torch

    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(kept)


def milliseconds(attention, model, device, B=8):
    """Median of one forward and backward at the model's shapes with its shortest window; None except on CUDA."""
    import torch

    if device.type != "cuda":
        return None
    config = model.config
    T, D, window = config.sequence_len, config.n_embd // config.n_head, min(config.windows)
    q, k, v = (
        torch.randn(B, T, heads, D, device=device, dtype=model.dtype, requires_grad=True)
        for heads in (config.n_head, config.n_kv_head, config.n_kv_head)
    )
    attend, mask, spent = attend_function(attention, device), attention.make_mask(T, window, device), []
    for _ in range(2 + REPEATS):
        torch.cuda.synchronize()
        mark = time.perf_counter()
        attend(q, k, v, window, mask).sum().backward()
        torch.cuda.synchronize()
        spent.append(1000 * (time.perf_counter() - mark))
    return statistics.median(spent[2:])


def finite(x):
    return x if abs(x) < 1e9 else 1e9  # JSON has neither NaN nor infinity


def loads(load):
    try:
        load()
    except Exception as error:
        return one_line(error)
    return "loaded"


def one_line(error, limit=200):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:limit]
