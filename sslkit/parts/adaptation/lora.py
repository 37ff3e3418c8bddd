"""Low-rank updates of linear layers (LoRA) through ``peft``, which is imported only when they are asked for."""

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sslkit.errors import UserError

BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
PROJECTIONS = ("attn", "attention", "mlp")  # parts of a linear layer's name


def add_lora(model: nn.Module, rank: int) -> None:
    """Add updates of ``rank`` to the attention and MLP projections of a model, in place; nothing else is trained.

    The updates are zero at first and are not scaled (alpha = rank).

    Raises:
        UserError: ``peft`` is not installed, or the model has no such projections.
    """
    targets = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and any(part in PROJECTIONS for part in name.split("."))
    ]
    if not targets:
        raise UserError(
            "[adapt] lora_rank: the model has no linear layers of attention or MLP blocks; set lora_rank to 0 and "
            "last_blocks to 1 or more"
        )
    try:
        peft: Any = importlib.import_module("peft")
    except ImportError as error:
        raise UserError(f"[adapt] lora_rank: needs peft ({error}); pip install peft") from error
    config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets)
    peft.inject_adapter_in_model(config, model)


def merge_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model with its updates added to its weights, under the model's own names.

    A state dict without updates is returned as it is.
    """
    merged = {}
    for name, value in state.items():
        if BASE not in name:
            if DOWN not in name and UP not in name:
                merged[name] = value
            continue
        layer, _, kind = name.rpartition(BASE)
        if kind == "weight":
            update = state[f"{layer}{UP}"].double() @ state[f"{layer}{DOWN}"].double()
            value = (value.double() + update).to(value.dtype)
        merged[f"{layer}.{kind}"] = value
    return merged
