"""One temperature an exit, then one threshold on the probabilities that it gives."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from adaptexit.calibrators.base import Memory, check_outputs
from adaptexit.calibrators.threshold import ThresholdCalibrator
from adaptexit.core.answer import Answer
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.scores import max_proba, scores_of, widened
from adaptexit.core.search import SearchName
from adaptexit.core.temperature import fit_temperature
from adaptexit.utils.learning import learned_at_once
from adaptexit.utils.validation import stored_array


class TemperatureCalibrator(ThresholdCalibrator):
    """Largest probabilities after temperature scaling, and thresholds on those, searched for every budget.

    The usual way to make an exit's probabilities mean what they say, with which CalexNet (2026), appendix A.1, compares
    its class precision margins. One number an exit knows nothing of classes and says nothing about when to leave, so
    the thresholds are searched as :class:`ThresholdCalibrator` does.

    Parameters
    ----------
    search, budget, max_drop, n_points, random_state
        As for :class:`ThresholdCalibrator`.

    Attributes
    ----------
    temperatures_ : array of shape (K,)
        Logits are divided by these. Above 1 the exit was too sure.
    thresholds_, point_, frontier_, search_report_
        As for :class:`ThresholdCalibrator`, for scaled confidences.
    """

    needs_logits = True  # type: ignore[assignment]
    temperatures_: NDArray[np.float64]

    def __init__(
        self,
        search: SearchName = "auto",
        *,
        budget: float | None = None,
        max_drop: float | None = None,
        n_points: int = 200,
        random_state: int = 0,
    ) -> None:
        super().__init__(
            "max_proba", search, budget=budget, max_drop=max_drop, n_points=n_points, random_state=random_state
        )

    @learned_at_once
    def fit(self, outputs: ExitOutputs, y: None = None) -> TemperatureCalibrator:
        """Fit the temperatures on calibration outputs with logits and labels, then search the frontier.

        Raises
        ------
        ValueError
            For outputs without logits or labels, and as :class:`ThresholdCalibrator` does.
        """
        check_outputs(outputs)
        if outputs.logits is None or outputs.labels is None:
            gap = "logits (record them with keep_logits=True)" if outputs.logits is None else "labels"
            raise ValueError(f"outputs must have logits and labels for temperatures to be fitted; they lack {gap}.")
        labels, weights = outputs.labels, outputs.sample_weight
        temperatures = np.array([fit_temperature(logits, labels, weights) for logits in outputs.logits])
        self._search(_scaled(outputs, temperatures))
        self.temperatures_ = temperatures
        return self

    def rescored(self, outputs: ExitOutputs) -> ExitOutputs:
        check_is_fitted(self)
        if outputs.logits is None:
            raise ValueError("temperatures need logits, but the outputs have none. Record them (keep_logits=True).")
        return _scaled(outputs, self.temperatures_)

    def scores(self, k: int, batch: Answer, memory: Memory = None) -> tuple[NDArray[Any], Memory]:
        if batch.logits is None:
            raise ValueError("temperatures need logits, but the batch has none.")
        return _confidence(batch.logits, self.temperatures_[k]), None

    def get_state(self) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
        state, arrays = super().get_state()
        return state, arrays | {"temperatures": self.temperatures_}

    def set_state(self, state: dict[str, Any], arrays: dict[str, NDArray[np.float64]], outputs: ExitOutputs) -> None:
        super().set_state(state, arrays, outputs)
        temperatures = stored_array(arrays, "temperatures", (outputs.n_exits,))
        if (temperatures <= 0).any():
            raise ValueError(f"array temperatures must be above 0; got {temperatures.tolist()}.")
        self.temperatures_ = temperatures


def _scaled(outputs: ExitOutputs, temperatures: NDArray[np.float64]) -> ExitOutputs:
    assert outputs.logits is not None
    pairs = zip(outputs.logits, temperatures, strict=True)
    return outputs.with_scores(
        np.stack([scores_of(logits, partial(_confidence, temperature=temperature)) for logits, temperature in pairs])
    )


def _confidence(logits: NDArray[Any], temperature: float) -> NDArray[Any]:
    return np.asarray(max_proba(widened(logits) / temperature))
