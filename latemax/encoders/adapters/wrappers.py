"""Wrappers around a model: PEFT, transformers' TimmWrapperModel, torch.compile, data parallelism, hand-written ones.

A wrapper that forwards attribute lookups looks like the model inside it, but a ``View`` of the wrapper would leave the
inner model's own norm and head in place. So families are matched on what a module itself owns, and a wrapper is either
unwrapped, where its forward is known to be the inner model's, or refused with the name of the inner model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# Children of torch.compile's OptimizedModule and of FSDP 1.
COMPILED, SHARDED = "_orig_mod", "_fsdp_wrapped_module"


def unwrap(model: nn.Module) -> nn.Module | None:
    """The model inside a wrapper whose forward only calls it; None where ``model`` is no such wrapper.

    Raises:
        ValueError: PEFT adapters that change the inputs, or run a forward of their own.
    """
    if callable(getattr(type(model), "get_base_model", None)) and isinstance(getattr(model, "peft_config", None), dict):
        _check_peft_prompts(model)
        return model._modules.get("base_model")
    tuner: Any = next((base for base in type(model).__mro__ if base.__name__ == "BaseTuner"), None)
    if tuner is not None and model._modules.get("model") is not None:
        if type(model).forward is not tuner.forward:
            raise ValueError(
                f"model: PEFT's {type(model).__name__} runs a forward of its own; merge the adapters, or pass the "
                f"model inside: PatchEncoder(model.get_base_model())"
            )
        return model._modules["model"]
    # transformers' TimmWrapperModel and TimmWrapperForImageClassification.
    return model._modules.get("timm_model") or _passed_through(model)


def _check_peft_prompts(model: Any) -> None:
    for config in model.peft_config.values():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"model: PEFT's {config.peft_type} adds tokens to the input, so the tokens that come out have no grid; "
                f"use an adapter of weights (LoRA), or pass the model inside: PatchEncoder(model.get_base_model())"
            )


def why_opaque(model: nn.Module) -> str | None:
    """How to get at the model inside a wrapper that is not taken off; None where ``model`` is no wrapper."""
    name = type(model).__name__
    if COMPILED in model._modules:
        return (
            "model is already wrapped by torch.compile; pass the plain model and compile the encoder: "
            "torch.compile(PatchEncoder(model))"
        )
    if _is_parallel(model) or (_delegates(model) and model._modules):
        return (
            f"model: {name} wraps another module and runs a forward of its own; pass the module inside, "
            f"PatchEncoder({_path_inside(model)}), and wrap the encoder where that is needed"
        )
    return None


def _is_parallel(model: nn.Module) -> bool:
    return isinstance(model, (DataParallel, DistributedDataParallel)) or SHARDED in model._modules


def _delegates(model: nn.Module) -> bool:
    """Whether the class answers attribute lookups that ``nn.Module`` would refuse."""
    cls = type(model)
    return cls.__getattr__ is not nn.Module.__getattr__ or cls.__getattribute__ is not object.__getattribute__


def _path_inside(model: nn.Module) -> str:
    """Expression of the first module below ``model`` that is no wrapper itself."""
    path, module = "model", model
    while _delegates(module) or _is_parallel(module):
        inside = next(module.named_children(), None)
        if inside is None:
            break
        path, module = f"{path}.{inside[0]}", inside[1]
    return path


class _Probe(nn.Module):
    """Takes the place of a wrapper's only child, and records what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[Any]] = []
        self.answer = torch.zeros(1)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls.append([*args, *kwargs.values()])
        return self.answer


def _passed_through(model: nn.Module) -> nn.Module | None:
    """The only child of a module without parameters or hooks whose forward hands its input to the child, and the
    child's answer back; else None.

    The class's forward runs on a twin of ``model`` that holds a probe in place of the child.
    """
    children = {child for child in model._modules.values() if child is not None}
    own = [t for t in (*model._parameters.values(), *model._buffers.values()) if t is not None]
    if len(children) != 1 or own or model._forward_hooks or model._forward_pre_hooks:
        return None
    if _is_parallel(model) or COMPILED in model._modules:
        return None
    probe, image = _Probe(), torch.zeros(1, 3, 8, 8)
    try:
        twin = object.__new__(type(model))
        vars(twin).update({**vars(model), "_modules": dict.fromkeys(model._modules, probe)})
        answer = type(model).forward(twin, image)
    # Any forward that does something else with the image may fail on it in any way.
    except Exception:
        return None
    handed_on = len(probe.calls) == 1 and len(probe.calls[0]) == 1 and probe.calls[0][0] is image
    return children.pop() if handed_on and answer is probe.answer else None
