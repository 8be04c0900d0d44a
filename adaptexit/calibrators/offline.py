"""Calibrators on recorded outputs, without an estimator: what they need is checked before any of them is fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sklearn.base import clone

from adaptexit.calibrators.base import Calibrator
from adaptexit.core.outputs import ExitOutputs


def calibrated(method: Calibrator, outputs: ExitOutputs, training: ExitOutputs | None) -> Calibrator:
    """A copy fitted on outputs, and on those of the heads' training data where it learns from such."""
    copy: Calibrator = clone(method)
    return copy.fit(outputs, **({"training": training} if method.needs_training else {}))


def check_like(argument: str, other: ExitOutputs, outputs: ExitOutputs, owner: str = "outputs") -> None:
    """Refuse outputs of other exits or classes than ``outputs``, which are called ``owner``."""
    if (other.n_exits, other.n_classes) != (outputs.n_exits, outputs.n_classes):
        raise ValueError(
            f"{argument} must have the exits and classes of {owner}, {outputs.n_exits} and {outputs.n_classes}; got "
            f"{other.n_exits} and {other.n_classes}. Record both with the same estimator."
        )


def check_needs(
    method: Calibrator,
    name: str,
    learned_on: Mapping[str, ExitOutputs | None],
    reported: Mapping[str, ExitOutputs],
    *,
    without_logits: str,
    without_features: str,
) -> None:
    """Refuse data without the logits or features that a calibrator reads.

    Parameters
    ----------
    method : Calibrator
        Called ``name``.
    learned_on, reported : dicts of what the data are called to outputs
        Nothing is learned on those of a fitted one.
    without_logits, without_features : str
        What to do, for the message.
    """
    sources = {argument: data for argument, data in learned_on.items() if data is not None}
    reads_features = _reads_features(method, list(sources.values()))
    for argument, data in (sources | dict(reported)).items():
        if method.needs_logits and data.logits is None:
            raise ValueError(f"{argument} must have logits for {name}; they have none. {without_logits}")
        if reads_features and not _has_features(data):
            raise ValueError(
                f"{argument} must have features of every early exit for {name}; they have "
                f"{'none' if data.features is None else 'not all'}. {without_features}"
            )


def _reads_features(method: Calibrator, sources: Sequence[ExitOutputs]) -> bool:
    """Whether a method cannot do without features.

    A fitted one, which learns from no more sources, says so itself. Others are told to, or read them where all that
    they learn from has them.
    """
    insists = method.get_params(deep=False).get("inputs") == "features"
    return method.needs_features and (insists or all(map(_has_features, sources)))


def _has_features(outputs: ExitOutputs) -> bool:
    return outputs.features is not None and all(feature.shape[1] for feature in outputs.features[:-1])
