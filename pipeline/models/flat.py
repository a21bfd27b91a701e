"""State dicts under the reference code's flat names, from modules that are composed of parts.

A model that holds `self.encoder` and `self.decoder` would save `encoder.blocks.0…`, where public checkpoints have
`blocks.0…`. `flatten_parts(model, "encoder", "decoder")` drops the names of these parts on saving and adds them on
loading. Only state dicts are renamed: `named_parameters()` keeps the parts' names.
"""

from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from typing import Any

from torch import nn


def flatten_parts(model: nn.Module, *parts: str) -> None:
    """Leave the names of these child modules out of the model's state dict."""
    on_save: Callable[..., Any] = model.register_state_dict_post_hook  # torch leaves both untyped
    on_load: Callable[..., Any] = model.register_load_state_dict_pre_hook
    on_save(partial(_shorten, parts=parts))
    on_load(partial(_lengthen, parts=parts))


def _shorten(_: nn.Module, state: MutableMapping[str, Any], prefix: str, __: object, *, parts: tuple[str, ...]) -> None:
    for key in list(state):
        part, dot, name = key.removeprefix(prefix).partition(".")
        state[prefix + name if dot and part in parts and key.startswith(prefix) else key] = state.pop(key)


def _lengthen(
    model: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: object, parts: tuple[str, ...]
) -> None:
    owner = _owners(model, parts)
    for key in [key for key in state if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        part = owner.get(name.partition(".")[0])
        if part:
            state[f"{prefix}{part}.{name}"] = state.pop(key)


def _owners(model: nn.Module, parts: tuple[str, ...]) -> Mapping[str, str]:
    """First component of a flat name -> the part that holds it."""
    owners = {}
    for part in parts:
        module = model.get_submodule(part)
        names = [name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))]
        owners.update(dict.fromkeys(names, part))
    return owners
