"""Training of heads: features recorded once, one loop, one recipe a file."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import nn

from adaptexit.training.boostnet import BoostNetRecipe
from adaptexit.training.cache import FeatureCache, collect
from adaptexit.training.calexnet import CalexNetRecipe
from adaptexit.training.frozen import FrozenRecipe
from adaptexit.training.loop import minimise
from adaptexit.training.ptee import PTEERecipe
from adaptexit.training.recipe import Recipe
from adaptexit.training.shelf import cache_key
from adaptexit.training.ztw import ZTWRecipe

__all__ = [
    "RECIPES",
    "BoostNetRecipe",
    "CalexNetRecipe",
    "FeatureCache",
    "FrozenRecipe",
    "PTEERecipe",
    "Recipe",
    "ZTWRecipe",
    "cache_key",
    "collect",
    "minimise",
    "recipe_of",
]


RECIPES: dict[str, Callable[[], Recipe]] = {
    "frozen": FrozenRecipe,
    "calexnet": CalexNetRecipe,
    "calexnet_reference": CalexNetRecipe.reference,
    "ptee": PTEERecipe,
    "ztw": ZTWRecipe,
    "boostnet": BoostNetRecipe,
}
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
