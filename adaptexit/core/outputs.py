"""What a multi-exit model answered on a data set, recorded once and calibrated many times."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptexit.core.answer import Answer
from adaptexit.core.costs import Costs
from adaptexit.core.logs import read_log
from adaptexit.core.saved_outputs import ARRAYS, read_outputs, write_outputs
from adaptexit.core.scores import largest_of, resolve_score, scores_of
from adaptexit.utils.files import naming
from adaptexit.utils.validation import check_finite, check_shape, check_switch, compact_classes, plain_array, real_array


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ExitOutputs:
    """Answers, scores and costs of K exits on N samples: the value that every calibrator, metric and plot works on.

    Validated once, here; functions of :mod:`adaptexit.core` trust it afterwards. Arrays are kept in the form given
    where it is compact already (memory-mapped ones stay on disk) and narrowed otherwise: class indices to the
    smallest signed integer that holds ``n_classes``, half-precision scores widened to single.

    Parameters
    ----------
    predictions : integer array of shape (K, N) or None
        Class index that each exit answers; the last exit is the full model. None only with ``quality``.
    scores : float array of shape (K, N)
        How sure each exit is, larger = surer, finite. The last row decides nothing.
    labels : integer array of shape (N,) or None
        True class indices in 0 ... n_classes - 1. None only with ``quality``.
    n_classes : int or None
        Number of classes C. None only with ``quality``.
    stage_costs, exit_costs : float arrays of shape (K,)
        Cost of stage k, which nobody avoids on the way past exit k, and cost of exit k itself, paid only where
        that exit is switched on. Any unit (usually MACs); finite, not negative.
    costs : float array of shape (K,), optional
        Instead of both: cumulative stage costs, rising, with free exits.
    logits : float array of shape (K, N, C), optional
    features : list of K float arrays of shape (N, d_k), optional
    quality : array of shape (K, N), optional
        What accuracy averages: correctness (0 or 1) unless given, so that boxes or regressions fit in.
    chained : bool, default=False
        Exits read earlier exits, so all of them up to the deepest one switched on are run and paid for.
    cost_unit : str, optional
        Of the costs, where it is known: "MACs" or "seconds" a sample, or "given" by the user.

    Raises
    ------
    ValueError
        For shapes that disagree, values that are not finite, class indices outside the classes or costs that
        cannot be: the message names the argument, what was allowed and what came.
    """

    predictions: NDArray[Any] | None = None
    scores: NDArray[Any] = None  # type: ignore[assignment]  # required; keyword order follows the contract
    labels: NDArray[Any] | None = None
    n_classes: int | None = None
    stage_costs: NDArray[np.float64] = None  # type: ignore[assignment]
    exit_costs: NDArray[np.float64] = None  # type: ignore[assignment]
    logits: NDArray[Any] | None = None
    features: list[NDArray[Any]] | None = None
    quality: NDArray[Any] | None = None
    chained: bool = False
    cost_unit: str | None = None
    costs: InitVar[ArrayLike | None] = None

    def __post_init__(self, costs: ArrayLike | None) -> None:
        store = _Setter(self)
        check_switch("chained", self.chained)
        if self.cost_unit is not None and not isinstance(self.cost_unit, str):
            raise ValueError(f"cost_unit must be a word, as 'MACs', or None; got {self.cost_unit!r}.")
        scores = np.empty(()) if self.scores is None else real_array("scores", self.scores)
        if self.scores is None or scores.ndim != 2 or scores.shape[0] < 1:
            raise ValueError(f"scores must have shape (K, N) with K >= 1 exits; got shape {scores.shape}.")
        n_exits, n_samples = scores.shape
        if n_samples == 0:
            raise ValueError("scores must hold at least one sample; got none. Check that the data set is not empty.")
        if scores.dtype not in (np.float32, np.float64):
            scores = scores.astype(np.float32 if scores.dtype == np.float16 else np.float64)
        check_finite(scores, "scores")
        store.scores = scores

        self._check_classes(store, n_exits, n_samples)
        if self.quality is not None:
            quality = real_array("quality", self.quality)
            check_shape(quality, (n_exits, n_samples), "quality")
            check_finite(quality, "quality")
            store.quality = quality
        elif self.predictions is None or self.labels is None:
            raise ValueError(
                "accuracy is undefined: give predictions and labels, or quality of shape (K, N) instead; "
                f"got predictions={_shape(self.predictions)}, labels={_shape(self.labels)}, quality=None."
            )
        if self.logits is not None:
            logits = real_array("logits", self.logits)
            if self.n_classes is None:
                raise ValueError("logits need n_classes; got n_classes=None.")
            check_shape(logits, (n_exits, n_samples, self.n_classes), "logits")
            check_finite(logits, "logits")
            store.logits = logits
        if self.features is not None:
            if not isinstance(self.features, (list, tuple)):
                raise TypeError(f"features must be a list of {n_exits} arrays; got {type(self.features).__name__}.")
            features = [real_array("features", feature) for feature in self.features]
            if len(features) != n_exits or any(f.ndim != 2 or f.shape[0] != n_samples for f in features):
                raise ValueError(
                    f"features must be a list of {n_exits} arrays of shape ({n_samples}, d_k); "
                    f"got shapes {[f.shape for f in features]}."
                )
            check_finite(features, "features")
            store.features = features
        checked = Costs.checked(self.stage_costs, self.exit_costs, costs, n_exits)
        store.stage_costs, store.exit_costs = checked.stages, checked.exits

    def _check_classes(self, store: _Setter, n_exits: int, n_samples: int) -> None:
        if self.predictions is None and self.labels is None and self.n_classes is None:
            return
        if not isinstance(self.n_classes, Integral) or isinstance(self.n_classes, bool) or self.n_classes < 1:
            raise ValueError(f"n_classes must be a positive integer; got {self.n_classes!r}.")
        store.n_classes = int(self.n_classes)
        for name, shape in (("predictions", (n_exits, n_samples)), ("labels", (n_samples,))):
            array = getattr(self, name)
            if array is not None:
                array = plain_array(name, array)
                check_shape(array, shape, name)
                setattr(store, name, compact_classes(array, int(self.n_classes), name))

    # -- construction --------------------------------------------------------------------------------------------

    @classmethod
    def from_logits(
        cls,
        logits: ArrayLike,
        labels: ArrayLike,
        *,
        score: str | Callable[[Any], Any] = "max_proba",
        stage_costs: ArrayLike | None = None,
        exit_costs: ArrayLike | None = None,
        costs: ArrayLike | None = None,
        keep_logits: bool = True,
        **others: Any,
    ) -> ExitOutputs:
        """Outputs of exits that are classifiers, from their logits.

        Parameters
        ----------
        logits : float array of shape (K, N, C)
        labels : integer array of shape (N,)
        score : {"max_proba", "entropy", "margin"} or callable from logits (N, C) to scores (N,)
        stage_costs, exit_costs, costs : as in the constructor
        keep_logits : bool, default=True
            False keeps predictions and scores only.
        **others
            ``features``, ``quality``, ``chained``, ``cost_unit``.
        """
        array = real_array("logits", logits)
        if array.ndim != 3 or array.shape[0] < 1 or array.shape[2] < 1:
            raise ValueError(f"logits must have shape (K, N, C) with K, C >= 1; got shape {array.shape}.")
        check_finite(array, "logits")
        formula = resolve_score(score, "score")
        return cls(
            predictions=np.stack([largest_of(exit_logits) for exit_logits in array]),
            scores=np.stack([scores_of(exit_logits, formula) for exit_logits in array]),
            labels=labels,  # type: ignore[arg-type]
            n_classes=array.shape[2],
            stage_costs=stage_costs,  # type: ignore[arg-type]
            exit_costs=exit_costs,  # type: ignore[arg-type]
            costs=costs,
            logits=array if keep_logits else None,
            **others,
        )

    @classmethod
    def from_answers(
        cls, answers: Sequence[Answer], labels: NDArray[Any], n_classes: int, costs: Costs, *, chained: bool = False
    ) -> ExitOutputs:
        """Outputs from what each of K exits says of all samples (:func:`adaptexit.staging.executor.record`)."""
        widths = {answer.logits.shape[1] for answer in answers if answer.logits is not None}
        if len(widths) > 1:
            raise ValueError(f"all exits must answer for the same number of classes; got {sorted(widths)}.")
        has_features = any(answer.features is not None for answer in answers)
        none = np.empty((len(labels), 0), dtype=np.float32)
        logits = None if answers[0].logits is None else np.stack([answer.logits for answer in answers])
        return cls(
            predictions=np.stack([answer.predictions for answer in answers]),
            scores=np.stack([answer.scores for answer in answers]),
            labels=labels, n_classes=n_classes, stage_costs=costs.stages, exit_costs=costs.exits,
            cost_unit=costs.unit, chained=chained, logits=logits,
            features=[none if a.features is None else a.features for a in answers] if has_features else None,
        )  # fmt: skip

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        *,
        models: Sequence[Any] | None = None,
        scores: Sequence[Any] | None = None,
        correct: Sequence[Any] | None = None,
        predictions: Sequence[Any] | None = None,
        label: Any = "label",
        classes: ArrayLike | None = None,
        cost: ArrayLike | Mapping[Any, float] | None = None,
        stage_costs: ArrayLike | None = None,
        exit_costs: ArrayLike | None = None,
        **others: Any,
    ) -> ExitOutputs:
        """Outputs of models, or exits, from a log: one row a sample, every model asked in every row.

        Parameters
        ----------
        frame : path of a CSV or Parquet file, DataFrame, or dict of columns
        models : K names, cheapest first, the full model last
            Read are the columns ``<model>_score`` (larger = surer; the last model's decides nothing and may be left
            out) and ``<model>_correct`` (0 ... 1) or ``<model>_prediction``. Unless given, the keys of ``cost``, or
            the models of all such columns in their order.
        scores, correct, predictions : K column names each
            Instead, for columns of other names: scores, and correctness or predictions.
        label : column name, default="label"
            True classes, where predictions are given. Names or whole numbers, as the predictions.
        classes : sequence of C labels, optional
            In the order that class indices are to have. Unless given, all that occur, sorted.
        cost : K floats, or a dict from model to cost
            What each model costs a sample, as ``CascadeSaver(cost=...)``: models share nothing.
        stage_costs, exit_costs : as in the constructor, instead, for exits on one model
        **others
            ``chained``, ``cost_unit`` ("given" unless told).

        Raises
        ------
        TypeError, ValueError, FileNotFoundError, ImportError
            For a table that lacks a column or a value: the message names the column and the first such row.
        """
        fields = read_log(
            frame, models=models, scores=scores, correct=correct, predictions=predictions, label=label,
            classes=classes, cost=cost, stage_costs=stage_costs, exit_costs=exit_costs,
        )  # fmt: skip
        return cls(**fields, **({"cost_unit": "given"} | others))

    def _replace(self, **fields: Any) -> ExitOutputs:
        """A copy with some fields exchanged, not validated again."""
        copy = object.__new__(ExitOutputs)
        for name in (*ARRAYS, "features", "n_classes", "chained", "cost_unit"):
            object.__setattr__(copy, name, fields.get(name, getattr(self, name)))
        return copy

    def take(self, samples: NDArray[Any]) -> ExitOutputs:
        """The same exits on some of the samples (indices or a mask); repeated indices repeat samples."""

        def pick(array: NDArray[Any] | None, axis: int) -> NDArray[Any] | None:
            return None if array is None else (array[samples] if axis == 0 else array[:, samples])

        features = None if self.features is None else [feature[samples] for feature in self.features]
        return self._replace(
            predictions=pick(self.predictions, 1), scores=pick(self.scores, 1), labels=pick(self.labels, 0),
            logits=pick(self.logits, 1), quality=pick(self.quality, 1), features=features,
        )  # fmt: skip

    def with_scores(self, scores: NDArray[Any]) -> ExitOutputs:
        """The same outputs under other scores, shape (K, N)."""
        scores = np.asarray(scores)
        check_shape(scores, self.scores.shape, "scores")
        check_finite(scores, "scores")
        return self._replace(scores=scores)

    def with_costs(self, stage_costs: ArrayLike, exit_costs: ArrayLike, chained: bool | None = None) -> ExitOutputs:
        """The same outputs at other costs, both (K,), and where given with exits that are chained or not."""
        checked = Costs.checked(stage_costs, exit_costs, None, self.n_exits)
        return self._replace(
            stage_costs=checked.stages, exit_costs=checked.exits, chained=self.chained if chained is None else chained
        )

    def drop_exit(self, k: int) -> ExitOutputs:
        """The same model without early exit k; its stage cost falls to the next exit's."""
        rest = np.arange(self.n_exits) != k
        stage_costs = self.stage_costs.copy()
        stage_costs[k + 1] += stage_costs[k]
        rows = {
            name: None if (array := getattr(self, name)) is None else array[rest]
            for name in ("predictions", "scores", "logits", "quality")
        }
        features = None if self.features is None else [f for f, keep in zip(self.features, rest, strict=True) if keep]
        return self._replace(**rows, features=features, stage_costs=stage_costs[rest], exit_costs=self.exit_costs[rest])

    # -- sizes, quality and costs --------------------------------------------------------------------------------

    @property
    def n_exits(self) -> int:
        """Number of exits K."""
        return int(self.scores.shape[0])

    @property
    def n_samples(self) -> int:
        """Number of samples N."""
        return int(self.scores.shape[1])

    @cached_property
    def graded(self) -> NDArray[Any]:
        """What accuracy averages, shape (K, N): ``quality`` where given, else correctness as booleans."""
        if self.quality is not None:
            return self.quality
        assert self.predictions is not None
        assert self.labels is not None
        return np.asarray(self.predictions == self.labels)

    @property
    def accuracies(self) -> NDArray[np.float64]:
        """Accuracy of every exit when all samples leave there, shape (K,)."""
        return np.array([np.mean(row, dtype=np.float64) for row in self.graded])

    @property
    def full_accuracy(self) -> float:
        """Accuracy of the full model."""
        return float(np.mean(self.graded[-1], dtype=np.float64))

    @property
    def pricing(self) -> Costs:
        """What stages and exits cost."""
        return Costs(self.stage_costs, self.exit_costs, self.chained, self.cost_unit)

    @property
    def full_cost(self) -> float:
        """Cost of the plain full model, every other exit switched off: the unit of relative cost."""
        return self.pricing.full

    def path_costs(self, on: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Cost of a sample that leaves at each exit, shape (K,), when the exits of ``on`` are switched on."""
        return self.pricing.paths(on)

    def alone_costs(self) -> NDArray[np.float64]:
        """Cost of a sample when exit k answers for everybody and nothing else is switched on, shape (K,)."""
        return self.pricing.alone()

    # -- persistence ---------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder of ``.npy`` files and one JSON file; an earlier one of the same name is replaced whole."""
        arrays = {name: getattr(self, name) for name in ARRAYS if getattr(self, name) is not None}
        arrays |= {f"features_{k}": feature for k, feature in enumerate(self.features or [])}
        described = {
            "n_classes": self.n_classes, "chained": self.chained, "cost_unit": self.cost_unit,
            "n_exits": self.n_exits, "n_samples": self.n_samples,
        }  # fmt: skip
        write_outputs(folder, described, arrays)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, mmap: bool = False) -> ExitOutputs:
        """Read what :meth:`save` wrote; nothing is unpickled.

        Parameters
        ----------
        folder : path
        mmap : bool, default=False
            Leave the arrays on disk and map them read-only, for outputs larger than memory. Shapes are checked;
            the values, validated when they were recorded, are not read for it.

        Raises
        ------
        FileNotFoundError, ValueError
            For what is no such folder, or a damaged one: the message names the file.
        """
        fields = read_outputs(folder, mmap=mmap)
        if not mmap:
            with naming(Path(folder)):
                return cls(**fields)
        store = _Setter(outputs := object.__new__(cls))
        for name, value in fields.items():
            setattr(store, name, value)
        return outputs

    def __repr__(self) -> str:
        extras = [name for name in ("logits", "features", "quality") if getattr(self, name) is not None]
        extra = f", with {', '.join(extras)}" if extras else ""
        return f"ExitOutputs({self.n_exits} exits, {self.n_samples} samples, {self.n_classes} classes{extra})"


class _Setter:
    """Assigns fields of a frozen dataclass while it is being constructed."""

    def __init__(self, value: object) -> None:
        object.__setattr__(self, "_value", value)

    def __setattr__(self, name: str, content: object) -> None:
        object.__setattr__(object.__getattribute__(self, "_value"), name, content)


def _shape(array: NDArray[Any] | None) -> str:
    return "None" if array is None else f"shape {np.shape(array)}"
