"""Checks of options that several commands share. Every message names the option, the allowed and the given value."""

from collections.abc import Collection
from typing import Any

from maml_jax import validation


def seed(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is an integer from 0 to 2**32 - 1. `jax.random.key` ignores higher bits."""
    _within(name, value, 0, 2**32 - 1)


def meta_steps(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is an integer from 1 to 2**31 - 1, the largest int32 of `MetaState.step`."""
    _within(name, value, 1, 2**31 - 1)


def _within(name: str, value: Any, minimum: int, maximum: int) -> None:
    validation.at_least(name, value, minimum)
    if value > maximum:
        raise ValueError(f"{name} must be an integer of at most {maximum}, but got {value!r}.")


def different(name: str, values: Collection[Any]) -> None:
    """Raises ValueError unless there is at least one value and no value is repeated."""
    if not values:
        raise ValueError(f"{name} must have at least one value, but got none.")
    if len(set(values)) < len(values):
        raise ValueError(f"{name} must be different from each other, but got {', '.join(map(str, values))}.")
