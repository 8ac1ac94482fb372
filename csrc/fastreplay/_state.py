"""Checks of a state before it is loaded. Each of them raises ValueError."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def check_keys(state: Any, keys: Iterable[str], owner: str) -> None:
    """`state` is a dict that has these keys."""
    if not isinstance(state, dict):
        raise ValueError(f"the state of a {owner} must be a dict, not {type(state).__name__}")
    missing = sorted(set(keys) - set(state))
    if missing:
        raise ValueError(f"the state does not fit this {owner}; it lacks: {missing[0]}")


def check_equal(state: dict[str, Any], mine: dict[str, Any]) -> None:
    """The settings in `state` are those of the object that loads it."""
    for name, value in mine.items():
        theirs = state[name]
        if not isinstance(theirs, (int, float, list, type(None))) or theirs != value:
            raise ValueError(f"the state has {name} {theirs}, but the object has {value}")


def check_integers(state: dict[str, Any], ranges: dict[str, tuple[int, int]]) -> None:
    """The numbers in `state` are integers in these ranges, both ends included."""
    for name, (low, high) in ranges.items():
        value = state[name]
        if not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"the state is damaged: {name} must be from {low} to {high}")


def check_tensor(tensor: Any, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """`tensor` is a dense tensor of this dtype and shape, and its values can be read."""
    if (
        not isinstance(tensor, Tensor)
        or (tensor.dtype, tuple(tensor.shape)) != (dtype, shape)
        or tensor.layout != torch.strided
        or tensor.is_meta
    ):
        raise ValueError(f"the state is damaged: {name} must be {dtype} of shape {shape}")
