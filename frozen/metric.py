"""The metric: bits per byte from logits. The model gets the inputs, never the targets, and does not report its loss."""

import math

import numpy as np

from constants import VOCAB_SIZE

NATS_AT_ONCE = 2**15  # targets whose logits are converted to float32 together, to save memory


def checked_logits(model, x):
    """model(x) without gradients: (B, T, V) and finite, or a SystemExit."""
    import torch

    with torch.no_grad():
        logits = model(x)
    expected = (*x.shape, VOCAB_SIZE)
    if type(logits) is not type(x) or logits.shape != expected:  # a subclass could answer for the cross-entropy
        got = tuple(logits.shape) if type(logits) is type(x) else type(logits).__name__
        raise SystemExit(f"model(x) returned {got}: evaluation needs logits of shape (B, T, V) = {expected}")
    if modes := watching_modes():
        raise SystemExit(f"{modes[0]} is on while the model is scored: leave each of torch's modes before evaluation")
    if not torch.isfinite(logits.sum(dtype=torch.float32)):
        raise SystemExit(
            "model(x) returned logits that are not finite (NaN or infinity): the training diverged, or the model masks "
            "tokens with -inf (mask them with a finite value such as -1e4)"
        )
    return logits.detach()


def watching_modes():
    """Names of torch's function and dispatch modes that are on: such a mode gets every operation of the metric, and could
    change it. That of torch.set_default_device only moves new tensors."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    return [type(mode).__name__ for mode in modes if type(mode) is not DeviceContext]


def token_nats(logits, y):
    """Cross-entropy of each target in nats, float32 (B, T)."""
    import torch
    import torch.nn.functional as F

    step = max(1, NATS_AT_ONCE // y.shape[1])  # rows
    parts = zip(logits.split(step), y.split(step), strict=True)
    nats = [F.cross_entropy(a.float().flatten(0, 1), b.flatten(), reduction="none").view_as(b) for a, b in parts]
    return torch.cat(nats)


def to_device(rows, device):
    """Rows of T + 1 tokens (uint16) as (x, y), (B, T) int64 each on the device."""
    import torch

    rows = torch.from_numpy(rows.astype(np.int64)).to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def filled(rows, start, batch_size):
    """batch_size rows from `start` on. After the last row, row 0 fills the batch, so that all batches have one
    shape."""
    index = np.arange(start, start + batch_size)
    return rows[np.where(index < len(rows), index, 0)]


def eval_batches(rows, batch_size, device):
    """Yields (x, y, real) for rows (uint16 (R, T + 1)): x and y are (batch_size, T) int64 on the device, of which the
    first `real` rows count."""
    for i in range(0, len(rows), batch_size):
        yield *to_device(filled(rows, i, batch_size), device), min(batch_size, len(rows) - i)


def bits_per_byte(nats, rows, token_bytes):
    """nats: float32 (R, T) of all targets. Targets of zero bytes are left out of both sums."""
    sizes = token_bytes[rows[:, 1:]]
    return float((nats.cpu().double().numpy() * (sizes > 0)).sum() / (math.log(2) * sizes.sum()))


def score_rows(model, rows, token_bytes, batch_size):
    """Bits per byte of a model in eval mode: sum of nats over ln 2 times the bytes that the scored targets stand for.

    rows: uint16 (R, T + 1). token_bytes: int32 (V,)."""
    import torch

    device = next(model.parameters()).device
    nats = [token_nats(checked_logits(model, x), y)[:real] for x, y, real in eval_batches(rows, batch_size, device)]
    return bits_per_byte(torch.cat(nats), rows, token_bytes)
