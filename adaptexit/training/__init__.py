"""Training of heads: features recorded once, one loop, one recipe a file."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from numpy.typing import ArrayLike
from torch import nn

from adaptexit.training.cache import FeatureCache, collect
from adaptexit.training.frozen import FrozenRecipe
from adaptexit.training.loop import minimise
from adaptexit.training.shelf import cache_key

if TYPE_CHECKING:
    from adaptexit.heads import Head

__all__ = ["RECIPES", "FeatureCache", "FrozenRecipe", "Recipe", "cache_key", "collect", "minimise", "recipe_of"]


@runtime_checkable
class Recipe(Protocol):
    """A way to train heads on cached features, in place; it returns losses as JSON holds them.

    One that has a method ``check`` is asked there, before anything is run, to refuse settings that cannot be.
    """

    def train(
        self,
        heads: Sequence[Head],
        cache: FeatureCache,
        rows: ArrayLike,
        targets: ArrayLike,
        *,
        random_state: Any = 0,
        verbose: int = 0,
    ) -> dict[str, Any]: ...


RECIPES: dict[str, Callable[[], Recipe]] = {"frozen": FrozenRecipe}
"""Recipes by name, as they are with their default settings."""


def recipe_of(recipe: str | Recipe) -> Recipe:
    """The recipe of that name with its default settings, or the recipe given.

    Raises
    ------
    ValueError
        For an unknown name; names the nearest ones.
    TypeError
        For anything that is neither a name nor an object with ``train``.
    """
    if isinstance(recipe, str):
        if recipe in RECIPES:
            return RECIPES[recipe]()
        near = difflib.get_close_matches(recipe, RECIPES, n=3)
        raise ValueError(
            f"recipe must be one of {', '.join(map(repr, RECIPES))}, or a recipe object; got {recipe!r}."
            + (f" Near it is {', '.join(map(repr, near))}." if near else "")
        )
    if isinstance(recipe, (type, nn.Module)) or not isinstance(recipe, Recipe):
        raise TypeError(
            f"recipe must be a name ({', '.join(map(repr, RECIPES))}) or a recipe such as FrozenRecipe(); "
            f"got {recipe!r}."
        )
    return recipe
