"""What networks built with exits have in common: stages, heads, and what is known of every exit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from adaptexit.staging.contexts import evaluating
from adaptexit.staging.cost import counted_macs


class MultiExitBackbone(nn.Module):
    """K stages with a classifier after each: images (N, C, H, W) to a list of K logits (N, n_classes).

    What goes on from stage to stage is one feature map, or a list or tuple whose last entry the classifier reads.

    Attributes
    ----------
    stages, heads : nn.ModuleList of length K
    input_size : (C, H, W)
        Of the images that it was made for; others of a like size are taken too.
    exit_info : list of K dict
        Of every exit, on images of that size: ``name``; ``macs``, multiply-accumulates of an image that leaves there
        after all classifiers on its way, as the papers of such networks count them; ``macs_alone``, where no other
        classifier is run; ``num_chs`` and ``resolution`` (H, W) of the map that the classifier reads.
    """

    def __init__(
        self, stages: Sequence[nn.Module], heads: Sequence[MapClassifier], input_size: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.stages, self.heads = nn.ModuleList(stages), nn.ModuleList(heads)
        self.input_size = input_size
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        logits = []
        carried: Any = x
        for stage, head in zip(self.stages, self.heads, strict=True):
            carried = stage(carried)
            logits.append(head(carried))
        return logits

    @cached_property
    def exit_info(self) -> list[dict[str, Any]]:
        like = next(self.parameters())
        info = []
        stages_macs = heads_macs = 0.0
        with evaluating([self]), torch.no_grad():
            carried: Any = torch.zeros(1, *self.input_size, dtype=like.dtype, device=like.device)
            for k, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
                stages_macs += counted_macs(stage, carried)[0]
                carried = stage(carried)
                head_macs = counted_macs(head, carried)[0]
                heads_macs += head_macs
                read = head.read(carried)  # type: ignore[operator]
                info.append(
                    {
                        "name": f"exit {k}" if k + 1 < len(self.heads) else "full model",
                        "macs": stages_macs + heads_macs,
                        "macs_alone": stages_macs + head_macs,
                        "num_chs": read.shape[1],
                        "resolution": tuple(read.shape[2:]),
                    }
                )
        return info


class MapClassifier(nn.Module):
    """Convolutions, the mean over all pixels and a linear layer, on the last of the maps that go on.

    Parameters
    ----------
    convolutions : nn.Module
        From what is read of the map, (N, C, H, W), to (N, ``channels``, h, w).
    channels, n_classes : int
    reads : int, optional
        Where only so many of the map's last channels are read.
    """

    def __init__(self, convolutions: nn.Module, channels: int, n_classes: int, reads: int | None = None) -> None:
        super().__init__()
        self.convolutions, self.pool = convolutions, nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, n_classes)
        self.reads = reads

    def forward(self, carried: Any) -> Tensor:
        return self.linear(self.pool(self.convolutions(self.read(carried))).flatten(1))

    def read(self, carried: Any) -> Tensor:
        """The map (N, C, H, W) that it answers from, of what goes on from its stage."""
        x: Tensor = carried if isinstance(carried, Tensor) else carried[-1]
        return x if self.reads is None else x[:, -self.reads :]
