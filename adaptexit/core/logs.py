"""What models answered, from a log: a table with one row a sample, and columns of scores and answers for each model."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptexit.core.costs import cost_array
from adaptexit.exceptions import SaverWarning, warn
from adaptexit.utils.frames import read_frame

Array = NDArray[Any]

SCORE, CORRECT, PREDICTION = SUFFIXES = ("_score", "_correct", "_prediction")
"""What follows a model's name in its columns, where these are found by name."""


@dataclass(frozen=True)
class _Columns:
    """Which columns tell what of K models, cheapest first; ``scores[-1]`` may be None."""

    models: list[Any]
    scores: list[Any]
    correct: list[Any] | None
    predictions: list[Any] | None


class _Table:
    """Columns of one length, by name."""

    def __init__(self, frame: Any) -> None:
        if isinstance(frame, (str, os.PathLike)):
            frame = read_frame(frame)
        if isinstance(frame, Mapping):
            self.names = list(frame)
        elif hasattr(frame, "columns") and hasattr(frame, "__getitem__"):
            self.names = list(frame.columns)
        else:
            raise TypeError(
                "frame must be the path of a CSV or Parquet file, a DataFrame or a dict of columns; got "
                f"{type(frame).__name__}."
            )
        self._frame = frame
        self._n_rows: int | None = None

    def check(self, name: Any, argument: str) -> None:
        """Refuse a column that is not there, or there twice."""
        if name not in self.names:
            near = get_close_matches(str(name), [str(own) for own in self.names], n=1)
            hint = f"Was {near[0]!r} meant?" if near else f"There are {_shortened(self.names)}."
            raise ValueError(f"{argument} must name columns of frame; it has no column {name!r}. {hint}")
        if self.names.count(name) > 1:
            raise ValueError(
                f"columns of frame must have different names; {self.names.count(name)} are called {name!r}. "
                "Rename all but one."
            )

    def column(self, name: Any) -> tuple[Array, NDArray[np.bool_]]:
        """Values (N,) of a column and where they are missing."""
        values = np.asarray(self._frame[name])
        if values.ndim != 1:
            raise ValueError(f"column {name!r} must hold one value a row; got shape {values.shape}.")
        if self._n_rows not in (None, len(values)):
            raise ValueError(f"columns must be equally long; {name!r} has {len(values)} rows, others {self._n_rows}.")
        if not len(values):
            raise ValueError(f"frame must hold at least one row; column {name!r} has none.")
        self._n_rows = len(values)
        if values.dtype.kind == "f":
            return values, np.isnan(values)
        if values.dtype.kind != "O":
            return values, np.zeros(len(values), dtype=bool)
        return values, np.fromiter(map(_is_missing, values), dtype=bool, count=len(values))


def read_log(
    frame: Any,
    *,
    models: Sequence[Any] | None,
    scores: Sequence[Any] | None,
    correct: Sequence[Any] | None,
    predictions: Sequence[Any] | None,
    label: Any,
    classes: ArrayLike | None,
    cost: ArrayLike | Mapping[Any, float] | None,
    stage_costs: ArrayLike | None,
    exit_costs: ArrayLike | None,
    sample_weight: Any = None,
) -> dict[str, Any]:
    """Arguments of :class:`~adaptexit.core.outputs.ExitOutputs`, as its ``from_frame`` says."""
    table = _Table(frame)
    if models is None and scores is None and isinstance(cost, Mapping):
        models = list(cost)
    if (scores, correct, predictions) == (None, None, None):
        columns = _by_name(table, models, label)
    else:
        columns = _by_column(table, models, scores, correct, predictions)
    if columns.predictions is not None:
        table.check(label, "label")
    _check_all_asked(table, columns)
    fields = {"scores": _scores(table, columns.scores)} | _costs(columns.models, cost, stage_costs, exit_costs)
    if columns.correct is not None:
        fields["quality"] = np.stack([_correctness(table, name) for name in columns.correct])
    if columns.predictions is not None:
        fields |= _coded(table, columns.predictions, label, classes)
    if sample_weight is not None:
        fields["sample_weight"] = _weights(table, sample_weight)
    return fields


# -- which columns ---------------------------------------------------------------------------------------------------


def _by_name(table: _Table, models: Sequence[Any] | None, label: Any) -> _Columns:
    """Columns ``<model>_score`` and so on; models in the order of their first column unless given."""
    names = [name for name in table.names if isinstance(name, str)]
    if models is None:
        found = [name.removesuffix(suffix) for name in names for suffix in SUFFIXES if name.endswith(suffix)]
        models = list(dict.fromkeys(found))
        if not models:
            raise ValueError(
                "frame must have columns <model>_score and <model>_correct or <model>_prediction for each model, or "
                f"scores= and correct= or predictions= must name them; it has {_shortened(table.names)}."
            )
    models = _listed("models", models)
    kinds = {suffix: [f"{model}{suffix}" for model in models] for suffix in SUFFIXES}
    usable = {suffix: any(name in names for name in kinds[suffix]) for suffix in SUFFIXES}
    if usable[PREDICTION] and usable[CORRECT] and label not in table.names:
        usable[PREDICTION] = False  # correctness is enough
    if not (usable[PREDICTION] or usable[CORRECT]):
        table.check(f"{models[0]}{CORRECT}", "models")
    for suffix in (CORRECT, PREDICTION):
        for name in kinds[suffix] if usable[suffix] else []:
            table.check(name, "models")
    score_names: list[Any] = list(kinds[SCORE])
    if score_names[-1] not in names:
        score_names[-1] = None
    for name in score_names[: len(models) if score_names[-1] else -1]:
        table.check(name, "models")
    return _Columns(
        models,
        score_names,
        kinds[CORRECT] if usable[CORRECT] else None,
        kinds[PREDICTION] if usable[PREDICTION] else None,
    )


def _by_column(table: _Table, models: Any, scores: Any, correct: Any, predictions: Any) -> _Columns:
    """Columns told one by one."""
    if scores is None or (correct is None and predictions is None):
        missing = "scores" if scores is None else "correct or predictions"
        raise ValueError(f"{missing} must name columns too: a score and an answer for each model, cheapest first.")
    answers = {
        name: _listed(name, value)
        for name, value in (("correct", correct), ("predictions", predictions))
        if value is not None
    }
    score_names = _listed("scores", scores)
    sizes = {name: len(value) for name, value in answers.items()}
    n_models = next(iter(sizes.values()))
    if len(score_names) == n_models - 1:
        score_names = [*score_names, None]
    sizes["scores"] = len(score_names)
    if models is not None:
        sizes["models"] = len(_listed("models", models))
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"{', '.join(sizes)} must name one column a model, cheapest first (scores may leave out the last); got "
            f"{', '.join(map(str, sizes.values()))}."
        )
    for argument, names in (answers | {"scores": score_names}).items():
        for name in names:
            if name is not None or argument != "scores":
                table.check(name, argument)
    model_names = next(iter(answers.values())) if models is None else _listed("models", models)
    return _Columns(model_names, score_names, answers.get("correct"), answers.get("predictions"))


def _listed(argument: str, names: Any) -> list[Any]:
    if isinstance(names, (str, bytes)) or not np.iterable(names):
        raise TypeError(f"{argument} must be a list of names, one a model, cheapest first; got {names!r}.")
    columns = list(names)
    present = [name for name in columns if name is not None]
    if not present or len(set(present)) < len(present):
        raise ValueError(f"{argument} must be different names, one a model, cheapest first; got {columns!r}.")
    return columns


# -- what they hold --------------------------------------------------------------------------------------------------


def _check_all_asked(table: _Table, columns: _Columns) -> None:
    """Refuse the log of a running cascade, where whoever is sure keeps the next model from being asked."""
    answers = columns.predictions if columns.correct is None else columns.correct
    assert answers is not None
    first_answered = ~table.column(answers[0])[1]
    for model, name in zip(columns.models[1:], answers[1:], strict=True):
        missing = table.column(name)[1] & first_answered
        n_missing = int(np.count_nonzero(missing))
        if n_missing > 1:
            raise ValueError(
                f"column {name!r} must have a value in every row; {n_missing:,} of {len(missing):,} rows have none, "
                f"the first is row {_first(missing)}. If {model!r} was not asked there, as in the log of a running "
                "cascade, leaving those rows out would keep the hard samples alone. Ask all models on a random share "
                "of the samples, and give those rows only."
            )


def _complete(table: _Table, name: Any) -> Array:
    values, missing = table.column(name)
    if missing.any():
        others = int(np.count_nonzero(missing)) - 1
        more = f", and in {others:,} other rows" if others else ""
        raise ValueError(
            f"column {name!r} must have a value in every row; it is missing in row {_first(missing)} (the first row "
            f"is 0){more}. Fill it in; leave rows out only where what is missing has nothing to do with the answers."
        )
    return values


def _numbers(table: _Table, name: Any, allowed: str, accepts: Callable[[Array], Array]) -> NDArray[np.float64]:
    """A column as numbers of which ``accepts`` says which are allowed."""
    values = _complete(table, name)
    if values.dtype.kind not in "fiub":
        texts = np.fromiter((not _is_number(value) for value in values), dtype=bool, count=len(values))
        if texts.any():
            where = _first(texts)
            raise ValueError(
                f"column {name!r} must hold {allowed}; row {where} (the first is 0) has {values[where]!r}."
            )
    numbers = values.astype(np.float64)
    bad = ~accepts(numbers)
    if bad.any():
        where = _first(bad)
        raise ValueError(
            f"column {name!r} must hold {allowed}; row {where} (the first is 0) has {float(numbers[where])}."
        )
    return numbers


def _scores(table: _Table, names: list[Any]) -> NDArray[np.float64]:
    """Scores (K, N); the full model's, which decide nothing, are 0 where the log has none."""
    rows = [_numbers(table, name, "finite numbers, larger = surer", np.isfinite) for name in names[:-1]]
    last = names[-1]
    if last is not None and not table.column(last)[1].all():
        rows.append(_numbers(table, last, "finite numbers, or nothing at all, as it decides nothing", np.isfinite))
    else:
        rows.append(np.zeros(table._n_rows or 0))
    return np.stack(rows)


def _weights(table: _Table, name: Any) -> NDArray[np.float64]:
    """Weights (N,) of the samples, of the column that is named."""
    if not isinstance(name, Hashable):
        raise TypeError(
            f"sample_weight must name a column of frame; got {type(name).__name__}. Add the weights to the frame."
        )
    table.check(name, "sample_weight")
    return _numbers(table, name, "weights, finite and at least 0", lambda n: np.isfinite(n) & (n >= 0))


def _correctness(table: _Table, name: Any) -> Array:
    numbers = _numbers(table, name, "correctness from 0 (wrong) to 1 (right)", lambda n: (n >= 0) & (n <= 1))
    whole = numbers.astype(bool)
    return whole if (whole == numbers).all() else numbers


def _coded(table: _Table, predictions: list[Any], label: Any, classes: ArrayLike | None) -> dict[str, Any]:
    """Predictions (K, N) and labels (N,) as positions among the classes: those given, or all that occur, sorted."""
    names = [label, *predictions]
    columns = [_class_names(_complete(table, name), f"column {name!r}") for name in names]
    if classes is None:
        known = None
    else:
        known = _class_names(np.asarray(classes), "classes")
        if known.ndim != 1 or len(np.unique(known)) < len(known):
            raise ValueError(f"classes must be different labels; got {_shortened(list(known))}.")
    first, argument = (columns[0], f"column {label!r}") if known is None else (known, "classes")
    for name, values in zip(names, columns, strict=True):
        if (values.dtype.kind == "U") != (first.dtype.kind == "U"):
            raise ValueError(
                f"labels and predictions must be all names or all whole numbers; {argument} has {first[0].item()!r}, "
                f"column {name!r} has {values[0].item()!r}. Convert one of them."
            )
    if known is None:
        known = np.unique(np.concatenate(columns))
    order = np.argsort(known)
    codes = []
    for name, values in zip(names, columns, strict=True):
        places = order[np.minimum(np.searchsorted(known, values, sorter=order), len(known) - 1)]
        strange = known[places] != values
        if strange.any():
            where = _first(strange)
            raise ValueError(
                f"column {name!r} must hold labels among classes {_shortened(list(known))}; row {where} (the first is "
                f"0) has {values[where].item()!r}."
            )
        codes.append(places)
    return {"labels": codes[0], "predictions": np.stack(codes[1:]), "n_classes": len(known)}


def _class_names(values: Array, source: str) -> Array:
    """Class names as an array of text or of whole numbers."""
    if values.dtype.kind == "O":
        is_text = np.fromiter((isinstance(value, str) for value in values), dtype=bool, count=len(values))
        if is_text.all():
            return values.astype(str)
        odd = np.fromiter((not _is_number(value) for value in values), dtype=bool, count=len(values))
        if odd.any():
            raise ValueError(
                f"{source} must hold names (text) throughout, or whole numbers; row {_first(odd)} (the first is 0) has "
                f"{values[_first(odd)]!r}."
            )
        values = values.astype(np.float64)
    if values.dtype.kind == "U":
        return values
    if values.dtype.kind == "f" and (values == np.rint(values)).all():
        return values.astype(np.int64)
    if values.dtype.kind not in "iub":
        raise ValueError(f"{source} must hold names or whole numbers; got dtype {values.dtype}.")
    return values.astype(np.int64)


def _costs(
    models: list[Any], cost: ArrayLike | Mapping[Any, float] | None, stage_costs: Any, exit_costs: Any
) -> dict[str, Any]:
    """Models that share nothing have exit costs alone, as those of a cascade have."""
    if cost is None:
        if stage_costs is None and exit_costs is None:
            raise ValueError(
                f"cost must be what each of the {len(models)} models costs a sample, cheapest first (or give "
                "stage_costs and exit_costs of exits on one model); got none."
            )
        return {"stage_costs": stage_costs, "exit_costs": exit_costs}
    if stage_costs is not None or exit_costs is not None:
        raise ValueError("cost replaces stage_costs and exit_costs: give either cost or those two, not both.")
    if isinstance(cost, Mapping):
        if set(cost) != set(models):
            raise ValueError(f"cost must have the models {_shortened(models)} as keys; got {_shortened(list(cost))}.")
        cost = [cost[model] for model in models]
    own = cost_array(cost, len(models), "cost")
    if (np.diff(own) <= 0).any():
        warn(
            f"models are meant to come cheapest first, the full model last; their costs are {own.tolist()}.",
            SaverWarning,
        )
    return {"stage_costs": np.zeros(len(models)), "exit_costs": own}


# -- single values ---------------------------------------------------------------------------------------------------


def _is_missing(value: Any) -> bool:
    return value is None or type(value).__name__ in ("NAType", "NaTType") or (_is_number(value) and value != value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number, np.bool_)) and not isinstance(value, np.complexfloating)


def _first(mask: NDArray[np.bool_]) -> int:
    return int(np.argmax(mask))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _shortened(names: list[Any]) -> str:
    shown = list(map(_plain, names))
    return str(shown) if len(shown) <= 12 else f"[{', '.join(map(repr, shown[:10]))}, ... {len(shown)} in all]"
