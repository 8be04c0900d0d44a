"""Samples that leave barely and samples that leave with ease, as thumbnails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptexit.displays.checks import (
    check_estimator,
    check_kind,
    chosen_point,
    numbers,
    optional_text,
    sequence,
)
from adaptexit.displays.drawing import drawing
from adaptexit.displays.shared import (
    Outputs,
    Point,
    axes,
    caption,
    check_pair,
    class_labels,
    exit_labels,
    measured,
    operating_point,
    thresholded,
)

Pairs = Sequence[tuple[Any, Any]]
Exemplars = Any  # adaptexit.core.metrics.Exemplars

_CAPTION, _EMPTY = 0.42, 0.42
"""Heights, in widths of a thumbnail: of the two lines beneath it, and of a strip without any."""

_SIDES = ("just above", "far above")


class ExemplarDisplay:
    """For each early exit, samples just above its threshold and samples far above it (CalexNet's Fig. A1).

    Make one with :meth:`from_estimator`, :meth:`from_outputs` or :meth:`from_exemplars`.

    Parameters
    ----------
    images : list of K - 1 pairs (near, deep) of arrays (m, H, W) or (m, H, W, 3)
        Thumbnails in [0, 1] of each early exit; m may differ, and be 0.
    scores : list of K - 1 pairs of arrays (m,)
    labels : list of K - 1 pairs of sequences of m str
        Their classes.
    exit_names : sequence of K str, optional
    chosen : (cost, accuracy), optional
        Of the operating point on the samples that these are taken from.
    chosen_by : str, optional
        What chose it, such as "budget 0.40".

    Attributes
    ----------
    thumbnails_ : list of K - 1 pairs of lists of AxesImage
    ax_, figure_ : matplotlib Axes and Figure
        All after :meth:`plot`.
    """

    def __init__(
        self,
        *,
        images: Pairs,
        scores: Pairs,
        labels: Pairs,
        exit_names: Sequence[str] | None = None,
        chosen: tuple[float, float] | None = None,
        chosen_by: str | None = None,
    ) -> None:
        self.images = [tuple(map(_checked_strip, pair)) for pair in _pairs("images", images)]
        self.scores = _pairs("scores", scores)
        self.labels = _pairs("labels", labels)
        for name, pairs in (("scores", self.scores), ("labels", self.labels)):
            sizes = [[len(sequence(name, strip, "one a thumbnail")) for strip in pair] for pair in pairs]
            if sizes != [[len(strip) for strip in pair] for pair in self.images]:
                raise ValueError(f"{name} must be one a thumbnail of images; got {sizes} in the pairs of strips.")
        for strip in (strip for pair in self.scores for strip in pair):
            numbers("scores", strip, len(strip))
        self.exit_names = exit_labels(exit_names, len(self.images) + 1)
        self.chosen = chosen_point(chosen)
        self.chosen_by = optional_text("chosen_by", chosen_by)

    @classmethod
    def from_exemplars(
        cls,
        exemplars: Exemplars,
        images: ArrayLike,
        *,
        exit_names: Sequence[str] | None = None,
        class_names: Sequence[Any] | None = None,
        chosen: tuple[float, float] | None = None,
        chosen_by: str | None = None,
    ) -> ExemplarDisplay:
        """From :func:`adaptexit.core.metrics.exemplars` and the images that its indices are of.

        Parameters
        ----------
        exemplars : Exemplars
        images : array or tensor (N, H, W), (N, H, W, 3), (N, 3, H, W) or (N, 1, H, W)
            In the order of the outputs. Bytes are read as 0 ... 255; other values outside [0, 1] are stretched, image
            by image, to their range.
        exit_names : sequence of K str, optional
        class_names : sequence of C str, optional
            The class indices unless given.
        chosen, chosen_by : optional
            The operating point, as for the class.
        """
        _check_exemplars(exemplars)
        shape, pairs = _checked_shape(images), exemplars.strips
        if shape[0] != exemplars.n_samples:
            raise ValueError(f"images must be one a sample, {exemplars.n_samples} in all; got {shape[0]}.")

        def names(strip: Any) -> list[str]:
            if strip.labels is None:
                return [""] * len(strip.samples)
            names_of_all = class_labels(class_names, int(strip.labels.max(initial=-1)) + 1)
            return [str(names_of_all[c]) for c in strip.labels]

        return cls(
            images=[(_pictures(images, near.samples), _pictures(images, deep.samples)) for near, deep in pairs],
            scores=[(near.scores, deep.scores) for near, deep in pairs],
            labels=[(names(near), names(deep)) for near, deep in pairs],
            exit_names=exit_names,
            chosen=chosen,
            chosen_by=chosen_by,
        )

    @classmethod
    def from_outputs(
        cls,
        outputs: Outputs,
        point: Point,
        images: ArrayLike,
        *,
        n: int = 6,
        chosen_by: str | None = None,
        exit_names: Sequence[str] | None = None,
        class_names: Sequence[Any] | None = None,
    ) -> ExemplarDisplay:
        """From recorded outputs at an operating point, and the images that they are of.

        Parameters
        ----------
        outputs : ExitOutputs
            Of K exits on N samples, with the scores that the point thresholds: ``calibrator.rescored(outputs)``.
        point : OperatingPoint
        images : array or tensor
            In the order of the outputs, as in :meth:`from_exemplars`.
        n : int, default=6
            Samples in each strip at most.
        chosen_by : str, optional
            What chose the point, such as "budget 0.40".
        exit_names : sequence of K str, optional
        class_names : sequence of C str, optional
            The class indices unless given.

        Raises
        ------
        ValueError
            For images of another number or shape, or a point of other exits or classes.
        """
        from adaptexit.core.metrics import exemplars

        check_pair(outputs, point)
        return cls.from_exemplars(
            exemplars(outputs, point, n),
            images,
            exit_names=exit_names,
            class_names=class_names,
            chosen=measured(outputs, point),
            chosen_by=chosen_by,
        )

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any = None,
        *,
        n: int = 6,
        budget: float | None = None,
        max_drop: float | None = None,
        images: ArrayLike | None = None,
        class_names: Sequence[Any] | None = None,
    ) -> ExemplarDisplay:
        """From a fitted estimator at the point that ``predict`` would use, on (X, y).

        Parameters
        ----------
        estimator : fitted estimator
        X, y : as for its ``record``
            X is what is shown as well, unless ``images`` are given.
        n : int, default=6
            Samples in each strip at most.
        budget, max_drop : float, optional
            As for its ``predict``.
        images : array or tensor, optional
            What to show instead of X, as in :meth:`from_exemplars`, in the order of X (which may not shuffle).
        class_names : sequence of C str, optional
            The estimator's classes unless given.
        """
        check_estimator(estimator)
        images = X if images is None else images
        _checked_shape(images)
        point, chosen_by = operating_point(estimator, budget, max_drop)
        return cls.from_outputs(
            thresholded(estimator, X, y, ordered=True),
            point,
            images,
            n=n,
            chosen_by=chosen_by,
            exit_names=estimator.exit_names,
            class_names=estimator.classes_ if class_names is None else class_names,
        )

    @drawing
    def plot(self, ax: Any = None, **kwargs: Any) -> ExemplarDisplay:
        """Draw on ``ax`` (a new figure unless given); ``kwargs`` go to every ``Axes.imshow``. Returns self."""
        strips = [strip for pair in self.images for strip in pair]
        columns = max([1, *map(len, strips)])
        height = next((strip.shape[1] / strip.shape[2] for strip in strips if len(strip)), 1.0)
        heights = [height + _CAPTION if len(strip) else _EMPTY for strip in strips]
        tops = np.cumsum([0.0, *heights])
        size = (max(4.4, 1.3 + 1.05 * columns), 0.6 + 1.05 * tops[-1])
        ax = axes(ax, figsize=size, layout="constrained")
        names = self.exit_names
        self.thumbnails_: list[tuple[list[Any], list[Any]]] = [([], []) for _ in self.images]
        for row, (strip, top) in enumerate(zip(strips, tops[:-1], strict=True)):
            k, side = divmod(row, 2)
            middle = top + (height if len(strip) else _EMPTY) / 2
            ax.text(-0.08, middle, f"{names[k]}\n{_SIDES[side]}", ha="right", va="center", fontsize=8)
            if not len(strip):
                ax.text(0.04, middle, "none", ha="left", va="center", color="0.6", fontsize=8)
            for i, image in enumerate(strip):
                style = {"cmap": "gray", "vmin": 0.0, "vmax": 1.0} | kwargs
                where = (i + 0.04, i + 0.96, top + 0.96 * height, top + 0.04 * height)
                self.thumbnails_[k][side].append(ax.imshow(image, extent=where, **style))
                below = f"{self.scores[k][side][i]:.3f}\n{self.labels[k][side][i]}"
                ax.text(i + 0.5, top + height, below, ha="center", va="top", fontsize=7, linespacing=1.1)
        ax.set(xlim=(0, columns), ylim=(tops[-1], 0), aspect="equal")
        ax.set_axis_off()
        ax.set_title(caption(self.chosen, self.chosen_by), fontsize=11)
        self.ax_, self.figure_ = ax, ax.figure
        return self


def _check_exemplars(exemplars: Any) -> None:
    """Refuse what are no exemplars."""
    from adaptexit.core.metrics import Exemplars

    check_kind("exemplars", exemplars, Exemplars, "the function exemplars")


def _pairs(name: str, values: Any) -> list[tuple[Any, Any]]:
    """Two strips for each early exit."""
    pairs = [sequence(name, pair, "(near, deep)") for pair in sequence(name, values, "one pair for each early exit")]
    if not all(len(pair) == 2 for pair in pairs):
        raise ValueError(f"{name} must be pairs (near, deep); got {[len(pair) for pair in pairs]} entries.")
    return [(near, deep) for near, deep in pairs]


def _checked_strip(strip: Any) -> NDArray[Any]:
    """Thumbnails beside each other; an empty strip may have any shape."""
    shape = (0,) if isinstance(strip, (list, tuple)) and not strip else tuple(getattr(strip, "shape", ()))
    if shape[:1] == (0,):
        return np.asarray(strip)
    return numbers("images", strip, "m", "H", "W", *((3,) if len(shape) == 4 else ()))


def _checked_shape(images: Any) -> tuple[int, ...]:
    shape = tuple(getattr(images, "shape", ()))
    odd = "complex" in str(getattr(images, "dtype", "")) or isinstance(images, np.ma.MaskedArray)
    if odd or getattr(images, "is_meta", False) or getattr(images, "is_sparse", False):
        raise TypeError(f"images must be plain real numbers; got {type(images).__name__} of {images.dtype}.")
    if len(shape) == 3 or (len(shape) == 4 and (shape[1] in (1, 3) or shape[3] == 3)):
        return shape
    what = f"shape {shape}" if shape else type(images).__name__
    raise ValueError(
        "images must be an array or tensor of shape (N, H, W), (N, H, W, 3), (N, 3, H, W) or (N, 1, H, W); "
        f"got {what}. Where X is something else, give the pictures as images=..., in the order of X."
    )


def _pictures(images: Any, samples: NDArray[np.intp]) -> NDArray[Any]:
    """Some of the images as arrays (m, H, W) or (m, H, W, 3) in [0, 1]."""
    some = images[samples]
    array = np.asarray(some.detach().cpu() if hasattr(some, "detach") else some)
    if array.ndim == 4 and array.shape[1] in (1, 3):
        array = np.moveaxis(array, 1, -1)
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.dtype == np.uint8:
        return array / 255.0
    return np.array([_stretched(image) for image in array.astype(np.float64)]).reshape(array.shape)


def _stretched(image: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = float(image.min()), float(image.max())
    if low >= 0.0 and high <= 1.0:
        return image
    return (image - low) / (high - low if high > low else 1.0)
