"""What a multi-exit model answered on a data set, recorded once and calibrated many times."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptexit.core.answer import Answer
from adaptexit.core.costs import Costs
from adaptexit.core.logs import read_log
from adaptexit.core.output_fields import checked_fields, mean_one
from adaptexit.core.saved_outputs import ARRAYS, read_outputs, write_outputs
from adaptexit.core.scores import largest_of, resolve_score, scores_of
from adaptexit.utils.files import naming
from adaptexit.utils.validation import check_finite, check_shape, real_array


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
    sample_weight : float array of shape (N,), optional
        How much each sample counts, where the mix of these differs from the one to come: as often as it is too rare
        here. Finite, not negative, not all 0; only their ratios matter. Kept with a mean of 1, and as None where all
        are alike. Accuracy, cost and exit rates are then weighted means.

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
    sample_weight: NDArray[np.float64] | None = None
    costs: InitVar[ArrayLike | None] = None

    def __post_init__(self, costs: ArrayLike | None) -> None:
        for name, value in checked_fields(vars(self), costs).items():
            object.__setattr__(self, name, value)

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
            ``features``, ``quality``, ``chained``, ``cost_unit``, ``sample_weight``.
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
        cls,
        answers: Sequence[Answer],
        labels: NDArray[Any],
        n_classes: int,
        costs: Costs,
        *,
        chained: bool = False,
        sample_weight: NDArray[Any] | None = None,
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
            cost_unit=costs.unit, chained=chained, logits=logits, sample_weight=sample_weight,
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
        sample_weight: Any = None,
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
        sample_weight : column name, optional
        **others
            ``chained``, ``cost_unit`` ("given" unless told).

        Raises
        ------
        TypeError, ValueError, FileNotFoundError, ImportError
            For a table that lacks a column or a value: the message names the column and the first such row.
        """
        fields = read_log(
            frame, models=models, scores=scores, correct=correct, predictions=predictions, label=label,
            classes=classes, cost=cost, stage_costs=stage_costs, exit_costs=exit_costs, sample_weight=sample_weight,
        )  # fmt: skip
        return cls(**fields, **({"cost_unit": "given"} | others))

    def _replace(self, **fields: Any) -> ExitOutputs:
        """A copy with some fields exchanged, not validated again."""
        copy = object.__new__(ExitOutputs)
        for name in (*ARRAYS, "features", "n_classes", "chained", "cost_unit"):
            object.__setattr__(copy, name, fields.get(name, getattr(self, name)))
        return copy

    def take(self, samples: NDArray[Any]) -> ExitOutputs:
        """The same exits on some of the samples (indices or a mask); repeated indices repeat samples.

        A ValueError where none of them has a weight above 0.
        """

        def pick(array: NDArray[Any] | None, axis: int) -> NDArray[Any] | None:
            return None if array is None else (array[samples] if axis == 0 else array[:, samples])

        features = None if self.features is None else [feature[samples] for feature in self.features]
        weights = self.sample_weight
        return self._replace(
            sample_weight=None if weights is None else mean_one(weights[samples]),
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

    def every_exit_paid(self) -> ExitOutputs:
        """The same outputs where whoever passes an exit pays for it, as papers on networks with exits count.

        Exit costs are moved into stage costs (:meth:`Costs.every_exit_paid`): the full model pays for all exits, and
        relative costs are relative to that.
        """
        priced = self.pricing.every_exit_paid()
        return self._replace(stage_costs=priced.stages, exit_costs=priced.exits) if self.exit_costs.any() else self

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
        return np.array([self.mean(row) for row in self.graded])

    @property
    def full_accuracy(self) -> float:
        """Accuracy of the full model."""
        return self.mean(self.graded[-1])

    def mean(self, values: NDArray[Any]) -> float:
        """Mean of one number a sample, (N,), by the samples' weights."""
        if self.sample_weight is None:
            return float(np.mean(values, dtype=np.float64))
        return float(np.average(values, weights=self.sample_weight))

    @property
    def effective_size(self) -> float:
        """Samples of equal weight that say as much on average: (sum w)^2 / sum w^2 (Kish); N without weights."""
        weights = self.sample_weight
        return float(self.n_samples) if weights is None else float(weights.sum() ** 2 / (weights @ weights))

    def counted(self) -> ExitOutputs:
        """The same outputs without samples of weight 0, which no mean counts."""
        weights = self.sample_weight
        return self if weights is None or weights.all() else self.take(np.flatnonzero(weights))

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
        outputs = object.__new__(cls)
        for name, value in fields.items():
            object.__setattr__(outputs, name, value)
        return outputs

    def __repr__(self) -> str:
        optional = ("logits", "features", "quality", "sample_weight")
        extras = [name for name in optional if getattr(self, name) is not None]
        extra = f", with {', '.join(extras)}" if extras else ""
        return f"ExitOutputs({self.n_exits} exits, {self.n_samples} samples, {self.n_classes} classes{extra})"
