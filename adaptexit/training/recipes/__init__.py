"""Recipes: ways to train heads on a frozen backbone, one published method a file."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from adaptexit.training.recipes.auto import AutoRecipe as AutoRecipe
from adaptexit.training.recipes.base import Recipe as Recipe
from adaptexit.training.recipes.boostnet import BoostNetRecipe as BoostNetRecipe
from adaptexit.training.recipes.calexnet import CalexNetRecipe as CalexNetRecipe
from adaptexit.training.recipes.frozen import FrozenRecipe as FrozenRecipe
from adaptexit.training.recipes.joint import JointRecipe as JointRecipe
from adaptexit.training.recipes.ptee import PTEERecipe as PTEERecipe
from adaptexit.training.recipes.ztw import ZTWRecipe as ZTWRecipe

RecipeName = Literal["auto", "frozen", "calexnet", "calexnet_reference", "ptee", "ztw", "boostnet", "joint", "trained"]

RECIPES: dict[str, Callable[[], Recipe | JointRecipe]] = {
    "auto": AutoRecipe,
    "frozen": FrozenRecipe,
    "calexnet": CalexNetRecipe,
    "calexnet_reference": CalexNetRecipe.reference,
    "ptee": PTEERecipe,
    "ztw": ZTWRecipe,
    "boostnet": BoostNetRecipe,
    "joint": JointRecipe,
}
"""Recipes by name, as they are with their default settings."""


def recipe_of(recipe: str | Recipe | JointRecipe) -> Recipe | JointRecipe:
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
    if isinstance(recipe, (type, nn.Module)) or not isinstance(recipe, (Recipe, JointRecipe)):
        raise TypeError(
            f"recipe must be a name ({', '.join(map(repr, RECIPES))}) or a recipe such as FrozenRecipe(); "
            f"got {recipe!r}."
        )
    return recipe


def head_for(recipe: Recipe | JointRecipe, head: Any, name: str | None = None) -> Any:
    """What answers at a cut, for :func:`adaptexit.heads.make_head`.

    The user's choice, the recipe's own where that is "auto", or what the recipe makes of either; with a name, the head
    that the recipe chose under it.
    """
    if name is not None and isinstance(recipe, AutoRecipe):
        return recipe.named(name)
    own = getattr(recipe, "head_for", lambda head: head)(head)
    return "mlp" if isinstance(own, str) and own == "auto" else own


def left_open(recipe: Any) -> bool:
    """Whether a recipe leaves open what is trained: new heads by the default, exits that were built in not at all."""
    return isinstance(recipe, str) and recipe in ("auto", "trained")


def check_recipe_for(recipe: Any, *, native: bool) -> None:
    """Refuse what trains heads alone, for a network built with exits, and what trains nothing, for new heads."""
    if native and not left_open(recipe):
        joint = recipe_of(recipe)
        if not isinstance(joint, JointRecipe):
            raise ValueError(
                "recipe must be 'trained' (or 'auto'), which only calibrates, or 'joint' for a network built with "
                f"exits; got {recipe!r}, which trains heads alone."
            )
        joint.check_native()
    if not native and isinstance(recipe, str) and recipe == "trained":
        raise ValueError(
            "recipe must train the new heads; got 'trained', which is for networks built with exits. Leave it at "
            "'auto'."
        )
