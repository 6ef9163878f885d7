"""Compare the model of a checkpoint with that of the recipe, and name the optimizer's state for a checkpoint."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meap_lit.errors import UserError
from meap_lit.hub import is_pinned
from meap_lit.model import DecoderConfig
from meap_lit.model.lora import LoRA


def check_same_model(
    about: dict[str, Any], config: DecoderConfig, lora: LoRA | None, origin: Mapping[str, Any]
) -> None:
    """Compare a checkpoint's entry `decoder` with model, adapters and source of the frozen weights of the recipe.

    Args:
        about: The entry.
        config: Configuration of the recipe's model.
        lora: Adapters of the recipe.
        origin: Of the frozen weights: `init_from`, their place, and `base`, their hash.

    Raises:
        UserError: If the checkpoint does not continue such a run.
    """
    now = dataclasses.asdict(config)
    for name, was in about.get("config", {}).items():
        if was != now[name] and name != "max_seq_len":
            raise UserError(
                f"the checkpoint's model has decoder.{name} {was}, that of the recipe {now[name]}; leave it "
                f"as it was, or start a new run with model.init_from"
            )
    _check_adapters(about.get("lora"), lora)
    trained_on, init_from = about.get("init_from"), origin.get("init_from")
    if lora is None or not trained_on:
        return
    # a checkpoint of an earlier version knows the place alone
    same_place = trained_on == init_from or _may_have_moved(trained_on, init_from)
    if not (about["base"] == origin.get("base") if about.get("base") else same_place):
        raise UserError(
            f"the checkpoint's adapters were trained on {trained_on}, model.init_from is {init_from} now, a model with "
            f"other weights; set model.init_from to {trained_on}, as it was then"
        )


def _may_have_moved(trained_on: str, init_from: str | None) -> bool:
    """Return whether `init_from` can be what the adapters were trained on, at another place.

    A checkpoint keeps its name when its run is moved. When a run goes on, its last checkpoint has another.
    """
    if Path(trained_on).exists() or is_pinned(trained_on):
        return False
    return not trained_on.endswith(".ckpt") or Path(trained_on).name == Path(init_from or "").name


def _check_adapters(were: dict[str, Any] | None, lora: LoRA | None) -> None:
    """Refuse adapters of another shape or scale; options of their training, such as the dropout, may change."""
    if were is None and lora is None:
        return
    if were is None:
        raise UserError("the checkpoint has no adapters, and the recipe has model.lora; leave it out")
    if lora is None:
        raise UserError(f"the checkpoint has adapters, and the recipe has no model.lora; set it as it was: {were}")
    for name in ("rank", "alpha", "targets"):
        was, now = were[name], getattr(lora, name)
        if was != now and (name != "targets" or sorted(was) != sorted(now)):
            raise UserError(
                f"the checkpoint's adapters have model.lora.{name} {_shown(was)}, those of the recipe "
                f"{_shown(now)}; leave it as it was, or start a new run with model.init_from"
            )


def _shown(value: Any) -> str:
    return f"[{', '.join(sorted(value))}]" if isinstance(value, list) else f"{value:g}"


def name_parameters(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]
) -> None:
    """Key the state of an optimizer by the names of its parameters, in place; torch keys it by their numbers.

    A key that is a name already stays.
    """
    names = {id(parameter): name for name, parameter in parameters}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]

    def name(key: int | str) -> str:
        return order[key] if isinstance(key, int) else key

    state["state"] = {name(key): value for key, value in state["state"].items()}
    for group in state["param_groups"]:
        group["params"] = [name(key) for key in group["params"]]
