"""Rows of the comparison with CalexNet's papers: recipes and heads by name, in groups that are measured apart.

What "steps" are: minibatches of one head's training. 19,600 images make 77 of 256 an epoch and 10 of 2,048, so that
epochs alone favour whoever has the smaller batch: CalexNet distils in 256 and trains all else in 2,048."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from adaptexit import BoostNetRecipe, CalexNetRecipe, PTEERecipe, ZTWRecipe
from examples.calexnet_cifar10 import ABLATION, METHODS

COSTS = (0.20, 0.35, 0.52, 0.67)
"""Relative MACs up to the four exits, prototype heads included."""

EPOCHS_OF_STEPS = {
    64: {900: 3},
    256: {1000: 13, 2000: 26, 4000: 52, 7700: 100, 8000: 104},
    2048: {1000: 100, 2000: 200, 4000: 400, 8000: 800},
}
"""Epochs of 19,600 images that make about so many steps, by batch size."""


@dataclass(frozen=True)
class Row:
    """One row: a recipe, the head it trains, how features are kept, and whether only the training is looked at."""

    make: Callable[[], Any]
    head: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    trained_only: bool = False


def stepped(make: Callable[..., Any], batch_size: int, steps: int) -> Row:
    """A method with so many steps of one batch size for the classes of each head, and 1,000 for its confidence."""
    epochs = EPOCHS_OF_STEPS[batch_size]
    settings = {"batch_size": batch_size, "epochs": epochs[steps], "confidence_epochs": epochs[1000]}
    if make is not PTEERecipe:
        settings["distillation_batch_size"] = batch_size
    return Row(partial(make, **settings))


STEPPED: dict[str, Callable[..., Any]] = {
    "CalexNet, reference": CalexNetRecipe.reference,
    "CalexNet, distillation only": partial(CalexNetRecipe, alignment=None, cascade_aware=False),
    "CalexNet, alignment only": partial(CalexNetRecipe, distillation=False),
    "CalexNet": CalexNetRecipe,
    "PTEEnet": PTEERecipe,
}
"""The methods that differ in what they learn, not in their heads' form, but for PTEEnet's plain prototypes."""

PUBLISHED = {name: Row(make) for name, make in (METHODS | ABLATION).items()} | {
    "CalexNet, hard filter": Row(lambda: CalexNetRecipe("hard")),
    "BoostNet, fixed factors": Row(BoostNetRecipe),
    "CalexNet, residual heads": Row(CalexNetRecipe, "residual"),
    "reference, residual heads": Row(CalexNetRecipe.reference, "residual"),
}
"""Every method with the settings of the paper that compares them; two recipes also with the kind of head of ZTW's."""

STEPS = {
    f"{name}; {steps:,} of {batch_size:,}": stepped(make, batch_size, steps)
    for steps, batch_size in ((2000, 256), (2000, 2048), (7700, 256))
    for name, make in STEPPED.items()
}

JOINT = {
    f"PTEEnet, joint loss, cost weight {weight:g}": Row(
        partial(PTEERecipe, loss="cumulative", costs=COSTS, cost_weight=weight)
    )
    for weight in (0.9, 0.1, 3)
} | {
    "PTEEnet, joint loss, residual heads; 2,000 of 256": Row(
        partial(PTEERecipe, loss="cumulative", costs=COSTS, batch_size=256, epochs=EPOCHS_OF_STEPS[256][2000]),
        "residual",
    )
}
"""The public code's cost weight is 0.9; all other settings are those of the row "PTEEnet" where a row names none."""

BLOCKS = {
    f"ZTW, {name}; 900 of 64": Row(
        partial(ZTWRecipe, size, batch_size=64, epochs=EPOCHS_OF_STEPS[64][900]), options={"cache_half": True}
    )
    for name, size in (("4x4", 4), ("whole map", None))
}
"""As many steps for heads and again for ensembles, few because convolutions of whole maps take long; features in half
precision, as whole maps take 2 GB so."""

FACTORS = {
    f"BoostNet's factors; {steps:,} of {batch_size:,}": Row(
        partial(
            BoostNetRecipe, rescale="learnable", batch_size=batch_size, epochs=EPOCHS_OF_STEPS[batch_size][steps],
            confidence_epochs=1,
        ),
        trained_only=True,
    )
    for batch_size, most in ((256, 8000), (2048, 2000))
    for steps in (1000, 2000, 4000, 8000)
    if steps <= most
}  # fmt: skip

GROUPS: dict[str, dict[str, Row]] = {
    "published": PUBLISHED, "steps": STEPS, "joint": JOINT, "blocks": BLOCKS, "factors": FACTORS,
}  # fmt: skip
