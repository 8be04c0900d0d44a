"""Recipes: ways to train heads on a frozen backbone, one published method a file."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Literal

from torch import nn

from adaptexit.training.recipes.auto import AutoRecipe as AutoRecipe
from adaptexit.training.recipes.base import Recipe as Recipe
from adaptexit.training.recipes.boostnet import BoostNetRecipe as BoostNetRecipe
from adaptexit.training.recipes.calexnet import CalexNetRecipe as CalexNetRecipe
from adaptexit.training.recipes.frozen import FrozenRecipe as FrozenRecipe
from adaptexit.training.recipes.ptee import PTEERecipe as PTEERecipe
from adaptexit.training.recipes.ztw import ZTWRecipe as ZTWRecipe

RecipeName = Literal["auto", "frozen", "calexnet", "calexnet_reference", "ptee", "ztw", "boostnet"]

RECIPES: dict[str, Callable[[], Recipe]] = {
    "auto": AutoRecipe,
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
