"""Readers: what turns an exit's output into an answer and a score, so that nothing behind them knows of classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptexit.core.answer import Answer
from adaptexit.core.scores import SCORES, resolve_score


class Reader(Protocol):
    """From what an exit gives to predictions and scores, as arrays.

    It may have ``score_of_one(output)``, the score of a single sample as a number: where only that decides, nothing
    else is read at the exits that the sample passes.
    """

    def __call__(self, k: int, output: Any, *, logits: bool) -> Answer:
        """Read exit k's output of B samples; ``logits`` says whether the answer is to hold them."""
        ...


class LogitsReader:
    """Reads classifiers: the largest logit is the answer, a confidence of the logits the score.

    Parameters
    ----------
    confidence : {"auto", "max_proba", "entropy", "margin"} or callable
        From logits (B, C) to one number a sample, larger = surer. "auto" takes a head's own confidence where it has
        one, and the largest probability elsewhere.
    """

    def __init__(self, confidence: str | Callable[[Any], Any] = "max_proba") -> None:
        self.prefers_own = isinstance(confidence, str) and confidence == "auto"
        self.confidence: Any = "max_proba" if self.prefers_own else confidence
        resolve_score(self.confidence, "confidence", torch, also=("auto",))

    def __call__(self, k: int, output: Any, *, logits: bool) -> Answer:
        answer = output if isinstance(output, Answer) else Answer(logits_in(output))
        logit_rows = _widened(answer.logits)
        if logit_rows.ndim != 2:
            raise ValueError(
                f"the model of exit {k} must answer with logits of shape (B, C); got shape {tuple(logit_rows.shape)}. "
                "If the model is fine, look whether X has an axis for the samples."
            )
        predictions = logit_rows.argmax(1)
        if self.prefers_own and answer.confidence_logits is not None:
            scores = self._own_scores(answer.confidence_logits, predictions)
        else:
            scores = self._scores(logit_rows)
        if not _all_finite(scores):
            raise ValueError(
                f"exit {k} gave a score that is NaN or infinite. Look for NaN or inf in the weights of that model, for "
                "values of X beyond those it was trained on, for "
                "an overflow in half precision, or for a confidence that is undefined on some outputs."
            )
        answer.predictions, answer.scores = _array(predictions), scores
        answer.logits = _array(logit_rows) if logits else None
        answer.confidence_logits = answer.state = None
        if answer.features is not None:
            answer.features = _array(_widened(answer.features))
        return answer

    def score_of_one(self, output: Any) -> float:
        """The score alone of a single sample: the same number as in the answer."""
        answer = output if isinstance(output, Answer) else Answer(logits_in(output))
        logits = _widened(answer.logits)
        if self.prefers_own and answer.confidence_logits is not None:
            return float(self._own_scores(answer.confidence_logits, logits.argmax(1))[0])
        return float(self._scores(logits)[0])

    @staticmethod
    def _own_scores(confidence_logits: Tensor, predictions: Tensor) -> NDArray[Any]:
        """What heads that learn a confidence say of their answers."""
        return _array(_widened(confidence_logits.gather(1, predictions[:, None]).squeeze(1).sigmoid()))

    def _scores(self, logits: Tensor) -> NDArray[Any]:
        """The confidence of logits (B, C); named ones are looked up here, so that a reader can be pickled."""
        if isinstance(self.confidence, str):
            return _array(SCORES[self.confidence](logits, torch))
        scores = self.confidence(logits)
        if not isinstance(scores, (Tensor, np.ndarray, list, tuple)):
            raise ValueError(
                f"confidence must turn an output of B samples into B numbers; got {type(scores).__name__}."
            )
        scores = torch.as_tensor(scores)
        if scores.shape != logits.shape[:1]:
            raise ValueError(
                "confidence must turn an output of B samples into B numbers, one a sample: expected shape "
                f"{tuple(logits.shape[:1])}, got {tuple(scores.shape)}."
            )
        return _array(_widened(scores))


def logits_in(output: Any, label: str = "the model") -> Tensor:
    """The logits that a classifier returned: a tensor, or the ``logits`` of an object or dict (as of transformers).

    Raises
    ------
    TypeError
        For anything else.
    """
    logits = output
    if not isinstance(output, Tensor):
        logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{label} must return a tensor of logits (B, C), or an object with .logits; got {type(output).__name__}. "
            "Wrap the module so that it returns the logits alone."
        )
    return logits


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.numpy() if tensor.is_cpu else tensor.cpu().numpy()


def _all_finite(scores: NDArray[Any]) -> bool:
    """Whether all are; Python is quicker than NumPy for a few."""
    return all(map(math.isfinite, scores.tolist())) if len(scores) <= 16 else bool(np.isfinite(scores).all())


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
