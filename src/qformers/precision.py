"""Which arithmetic this machine is fast in: half precision where the processor has it, float32 where it is emulated."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

NAMED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def multiplies_bf16(device_type: str | None = None) -> bool:
    """Whether a device, by default the one that training takes, multiplies matrices of bf16 in hardware.

    A CPU without (x86 before AVX-512-BF16 and AMX) emulates it, and takes 6 to 7 times as long as for float32
    (docs/speed.md). An older torch does not say what a CPU has; it is then taken for one without.
    """
    kind = device_type or training_device()
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return True
    described: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(has for name, has in described.items() if "bf16" in name)


def training_device() -> str:
    """The kind of this machine's accelerator, or "cpu"."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def precision_dtype(precision: str, device_type: str | None = None) -> torch.dtype:
    """The dtype of "bf16", "fp16" or "fp32"; "auto" is bf16 where `multiplies_bf16`, else float32."""
    if precision == "auto":
        return torch.bfloat16 if multiplies_bf16(device_type) else torch.float32
    return NAMED[precision]


def autocast(device_type: str, precision: str = "auto") -> torch.autocast:
    """Half-precision arithmetic over float32 weights, or nothing."""
    dtype = precision_dtype(precision, device_type)
    half = dtype != torch.float32
    return torch.autocast(device_type, dtype if half else torch.bfloat16, enabled=half)


def without_emulation(model: nn.Module) -> None:
    """Bring the weights of `model`, which is on a CPU, into float32 if that CPU would emulate half precision."""
    if not multiplies_bf16("cpu"):
        model.float()
