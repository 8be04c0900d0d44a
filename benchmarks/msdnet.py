"""A simulated network that behaves like MSDNet on CIFAR-100, and MSDNet's own search, sample by sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adaptexit.core.frontier import ParetoFrontier, evaluate
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.scores import max_proba
from adaptexit.core.search import Problem
from adaptexit.core.search.methods import geometric_path

N_CLASSES = 100
MSDNET_POINTS = range(1, 40)


@dataclass(frozen=True)
class Profile:
    """Accuracy and cumulative cost (millions of MACs) of every exit."""

    accuracies: tuple[float, ...]
    cumulative_macs: tuple[float, ...]


MSDNET = Profile((0.60, 0.665, 0.705, 0.73, 0.75), (6.8, 14.2, 27.3, 41.4, 58.1))
ALIKE = Profile((0.70, 0.72, 0.735, 0.745, 0.75), (0.23, 0.44, 0.63, 0.82, 1.0))
TWO_EXITS = Profile((0.60, 0.75), (6.8, 58.1))
TEN_EXITS = Profile(
    tuple(np.interp(np.linspace(0, 4, 10), np.arange(5), MSDNET.accuracies)),
    tuple(np.interp(np.linspace(0, 4, 10), np.arange(5), MSDNET.cumulative_macs)),
)

EASE_SD = 2.0  # how far samples differ in difficulty
RIVAL_MEAN, RIVAL_SD = 2.0, 1.2  # pull of the wrong class that a sample resembles
PERSISTENT = 0.3  # share of the noise variance that all exits see alike
SHARPNESS = 2.25  # of the logits: overconfident


def simulate(profile: Profile, n_samples: int, seed: int, chunk: int = 50_000) -> ExitOutputs:
    """Outputs of a network with such exits on random samples.

    Every exit adds noise to the evidence for the true class and for one rival class. The sample's difficulty, its
    rival and part of the noise are the same at all exits, which makes their errors go together; deeper exits see the
    true class more strongly.
    """
    pilot_true, pilot_noise = _persistent_evidence(np.random.default_rng(0), 20_000)
    rivals = pilot_noise + math.sqrt(1 - PERSISTENT) * np.random.default_rng(1).standard_normal(pilot_noise.shape)
    strengths = np.quantile(rivals[:, 1:].max(axis=1) - rivals[:, 0] - pilot_true, profile.accuracies)

    rng = np.random.default_rng([2, seed])
    labels = rng.integers(N_CLASSES, size=n_samples)
    predictions = np.empty((len(strengths), n_samples), dtype=np.int8)
    confidence = np.empty((len(strengths), n_samples), dtype=np.float32)
    for start in range(0, n_samples, chunk):
        samples = slice(start, min(start + chunk, n_samples))
        ease, persistent = _persistent_evidence(rng, samples.stop - start)
        for k, strength in enumerate(strengths):
            logits = persistent + math.sqrt(1 - PERSISTENT) * rng.standard_normal(persistent.shape, dtype=np.float32)
            logits[:, 0] += strength + ease  # column 0 stands for the true class until classes are named
            logits *= SHARPNESS
            predictions[k, samples] = (logits.argmax(axis=1) + labels[samples]) % N_CLASSES
            confidence[k, samples] = max_proba(logits)

    return ExitOutputs(
        predictions=predictions, scores=confidence, labels=labels, n_classes=N_CLASSES, costs=profile.cumulative_macs
    )  # fmt: skip


def _persistent_evidence(rng: np.random.Generator, n_samples: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Ease of every sample (N,), and the noise that all exits share, a rival class included (N, C)."""
    ease = EASE_SD * rng.standard_normal(n_samples, dtype=np.float32)
    noise = math.sqrt(PERSISTENT) * rng.standard_normal((n_samples, N_CLASSES), dtype=np.float32)
    rival = rng.integers(1, N_CLASSES, size=n_samples)
    noise[np.arange(n_samples), rival] += RIVAL_MEAN + RIVAL_SD * rng.standard_normal(n_samples, dtype=np.float32)
    return ease, noise


def describe_outputs(outputs: ExitOutputs) -> dict[str, Any]:
    """How the simulated exits behave: accuracy, confidence, and how their errors go together."""
    right = outputs.graded
    return {
        "accuracy": outputs.accuracies.tolist(),
        "mean_confidence": outputs.scores.mean(axis=1, dtype=np.float64).tolist(),
        "error_correlation": np.corrcoef(right).tolist(),
        "first_right_last_wrong": float(np.mean(right[0] & ~right[-1])),
    }


class MSDNetLoop:
    """MSDNet's budgeted search: Python loops over samples that read torch tensors element by element."""

    def __init__(self, outputs: ExitOutputs) -> None:
        self.confidence = torch.from_numpy(np.array(outputs.scores))
        self.predictions = torch.from_numpy(outputs.predictions.astype(np.int64))
        self.labels = torch.from_numpy(outputs.labels.astype(np.int64))
        self.costs = torch.from_numpy(outputs.stage_costs.cumsum() / outputs.full_cost)
        self.sort()

    def sort(self) -> None:
        """Samples of every exit from surest to least sure, once for all points."""
        self.order = self.confidence.sort(dim=1, descending=True).indices

    def point(self, p: int) -> tuple[float, float]:
        """Accuracy and mean relative cost of the point with exit rates proportional to (p/20)^k."""
        return self.evaluate(self.thresholds(p))

    def thresholds(self, p: int) -> torch.Tensor:
        """For every exit the confidence at which its quota of the samples still there is reached."""
        n_exits, n_samples = self.confidence.shape
        shares = torch.tensor(p / 20.0) ** torch.arange(n_exits)
        shares /= shares.sum()
        absent = torch.zeros(n_samples)
        thresholds = torch.full((n_exits,), 1e8)
        for k in range(n_exits - 1):
            quota, n_leaving = math.floor(n_samples * shares[k]), 0
            for rank in range(n_samples):
                i = self.order[k][rank]
                if absent[i] == 0:
                    n_leaving += 1
                    if n_leaving == quota:
                        thresholds[k] = self.confidence[k][i]
                        break
            absent += (self.confidence[k] >= thresholds[k]).float()
        thresholds[-1] = -1e8
        return thresholds

    def evaluate(self, thresholds: torch.Tensor) -> tuple[float, float]:
        """Accuracy and mean relative cost: every sample looks for its exit, counts are kept per exit."""
        n_exits, n_samples = self.confidence.shape
        n_right, leavers, right_there = 0, torch.zeros(n_exits), torch.zeros(n_exits)
        for i in range(n_samples):
            label = self.labels[i]
            for k in range(n_exits):
                if self.confidence[k][i] >= thresholds[k]:
                    if self.predictions[k][i] == label:
                        n_right += 1
                        right_there[k] += 1
                    leavers[k] += 1
                    break
        return n_right / n_samples, float(leavers.double() @ self.costs) / n_samples


def geometric_frontier(outputs: ExitOutputs) -> ParetoFrontier:
    """All 39 points of MSDNet's rule and the full model: none is dropped that a budget could choose."""
    problem = Problem.from_outputs(outputs)
    policies = np.concatenate([geometric_path(problem), np.zeros((1, problem.n_early), dtype=np.int64)])
    points = [evaluate(outputs, *problem.thresholds(policy)) for policy in policies]
    return ParetoFrontier.of(points, outputs)
