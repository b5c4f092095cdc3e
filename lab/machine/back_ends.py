"""Attention back ends that train.py does not have, as `lab doctor` and the benchmarks try them. train: the module."""


def varlen(train, name="varlen"):
    """torch's own variable-length attention, with one sequence per row: cuDNN's kernel for full context where it has
    one, FlashAttention-2's for windows."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    def attend(q, k, v, window, mask):
        B, T = q.shape[:2]
        starts = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
        sizes = dict(window_size=(window if window < T - 1 else -1, 0))
        if q.size(2) != k.size(2):  # older torch takes grouped queries without being told, and lacks the argument
            sizes["enable_gqa"] = True
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        return varlen_attn(q, k, v, starts, starts, T, T, **sizes).view(B, T, *q.shape[1:])

    return train.Attention(name, lambda T, window, device: None, attend)


def flash4(train):
    """FlashAttention-4 (the package flash-attn-4), if it is installed. torch.compile cannot trace it: its call is left
    out of the graphs, as in README's lines."""
    import torch
    from flash_attn.cute import flash_attn_func

    @torch.compiler.disable
    def attend(q, k, v, window, mask):
        y = flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
        return y[0] if isinstance(y, tuple) else y

    return train.Attention("flash4", lambda T, window, device: None, attend)


OTHERS = {"varlen": varlen, "flash4": flash4}
