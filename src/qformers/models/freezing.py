"""The one place where a part of a model is frozen."""

from __future__ import annotations

from functools import partial

from torch import nn

_NAME = "frozen_name"


def freeze(module: nn.Module, name: str) -> None:
    """Freeze `module`: no gradients, and eval mode that `.train()` on it or on any parent does not undo.

    So a frozen encoder's dropout stays off and its batch-norm statistics stay as they were (the authors'
    frozen OPT kept its dropout on). Names and classes of modules and parameters do not change. `name` is what
    `frozen_parts` calls it; modules of one name are counted as one part.
    """
    module.requires_grad_(False)
    module.eval()
    # A partial of a plain function, unlike a lambda or a bound method, survives both pickling and deepcopy.
    module.train = partial(_stay_in_eval, module)  # type: ignore[method-assign]
    setattr(module, _NAME, name)


def frozen_parts(model: nn.Module) -> dict[str, int]:
    """The frozen parts of `model` and their numbers of parameters, for the log and the saved run."""
    parts: dict[str, int] = {}
    for module in model.modules():
        if hasattr(module, _NAME):
            name, count = getattr(module, _NAME), sum(parameter.numel() for parameter in module.parameters())
            parts[name] = parts.get(name, 0) + count
    return parts


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
