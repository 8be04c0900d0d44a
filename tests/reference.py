"""The definitions written out sample by sample, independent of the library's arithmetic."""

import itertools
import math
from fractions import Fraction

from scipy.stats import binomtest

from adaptexit.core.answer import Answer


def quality_of(outputs, k, i):
    """What sample i is worth when exit k answers."""
    if outputs.quality is not None:
        return float(outputs.quality[k][i])
    return float(outputs.predictions[k][i] == outputs.labels[i])


def threshold_of(outputs, thresholds, k, i):
    """The number that the score of sample i is compared with at exit k."""
    limit = thresholds[k]
    return limit[outputs.predictions[k][i]] if hasattr(limit, "__len__") else limit


def is_on(limit):
    """Whether anybody can leave at a threshold, or at a row of thresholds by class."""
    return any(x < math.inf for x in limit) if hasattr(limit, "__len__") else limit < math.inf


def exits_run(outputs, thresholds):
    """The early exits that are run and paid for."""
    on = [k for k in range(len(thresholds) - 1) if is_on(thresholds[k])]
    return list(range(on[-1] + 1)) if outputs.chained and on else on


def route(outputs, thresholds):
    """The exit of every sample."""
    last = len(thresholds) - 1
    exits = []
    for i in range(outputs.n_samples):
        exit_of_sample = last
        for k in range(last):
            if float(outputs.scores[k][i]) > threshold_of(outputs, thresholds, k, i):
                exit_of_sample = k
                break
        exits.append(exit_of_sample)
    return exits


def online_exits(policy, outputs, batches):
    """The exit of every sample when each batch (indices) goes on with whoever the policy did not let leave."""
    exits = [None] * outputs.n_samples
    for batch in batches:
        alive, memory = list(batch), None
        for k in [k for k in range(outputs.n_exits) if policy.runs[k]]:
            if not alive:
                break
            logits = None if outputs.logits is None else outputs.logits[k][alive]
            features = None if outputs.features is None else outputs.features[k][alive]
            predictions = None if outputs.predictions is None else outputs.predictions[k][alive]
            answer = Answer(logits=logits, predictions=predictions, scores=outputs.scores[k][alive], features=features)
            leave, _, memory = policy.decide(k, answer, memory)
            for i, leaves in zip(alive, leave, strict=True):
                exits[i] = k if leaves or k == outputs.n_exits - 1 else None
            alive = [i for i, leaves in zip(alive, leave, strict=True) if not leaves]
            memory = None if memory is None else memory[~leave]
    return exits


def full_cost(outputs):
    """What the plain full model costs."""
    return math.fsum(outputs.stage_costs) + outputs.exit_costs[-1]


def spent(outputs, run, k):
    """What a sample has spent when it leaves at exit k and the early exits ``run`` are run."""
    last = outputs.n_exits - 1
    total = math.fsum(outputs.stage_costs[: k + 1])
    total += math.fsum(outputs.exit_costs[j] for j in run if j <= k)
    return total + (outputs.exit_costs[last] if k == last else 0.0)


def outcome(outputs, thresholds, always=()):
    """Accuracy and mean relative cost; the exits in ``always`` are run whether anybody leaves there or not."""
    run = sorted({*exits_run(outputs, thresholds), *always})
    exits = route(outputs, thresholds)
    n = outputs.n_samples
    accuracy = math.fsum(quality_of(outputs, k, i) for i, k in enumerate(exits)) / n
    cost = math.fsum(spent(outputs, run, k) for k in exits) / n / full_cost(outputs)
    return accuracy, cost


def every_thresholds(outputs):
    """All thresholds that tell samples apart: never, always and every observed score, at every early exit."""
    early = outputs.n_exits - 1
    cells = [[math.inf, -math.inf, *sorted({float(s) for s in outputs.scores[k]})] for k in range(early)]
    return [(*limits, -math.inf) for limits in itertools.product(*cells)]


def every_outcome(outputs, always=()):
    """Accuracy and cost of all thresholds, all off included."""
    return [outcome(outputs, thresholds, always) for thresholds in every_thresholds(outputs)]


def best_accuracy(outcomes, budget):
    """Best accuracy within a budget, or None where nothing is within it."""
    within = [accuracy for accuracy, cost in outcomes if cost <= budget + 1e-9]
    return max(within) if within else None


def least_cost(outcomes, floor):
    """Least cost at an accuracy of at least ``floor``."""
    return min(cost for accuracy, cost in outcomes if accuracy >= floor - 1e-9)


def falling_fit(outputs, k):
    """Isotonic estimate of P(correct) at exit k for every sample, from the surest: the min-max formula, exact."""
    scores = [float(s) for s in outputs.scores[k]]
    values = sorted(set(scores), reverse=True)
    right = [sum(Fraction(quality_of(outputs, k, i)) for i, s in enumerate(scores) if s == v) for v in values]
    count = [scores.count(v) for v in values]
    fit = []
    for j in range(len(values)):
        best = min(
            max(sum(right[a : b + 1]) / sum(count[a : b + 1]) for b in range(j, len(values))) for a in range(j + 1)
        )
        fit += [best] * count[j]
    return fit


def job_ratio(confidence, saver, base):
    """TinySaver's eq. 7: try every t, keep the largest share on which the saver is not worse."""
    best = 0.0
    for t in confidence:
        leaving = [i for i, c in enumerate(confidence) if c >= t]
        if sum(float(saver[i]) for i in leaving) >= sum(float(base[i]) for i in leaving):
            best = max(best, len(leaving) / len(confidence))
    return best


def required_cost(confidence, saver, base, saver_cost, base_cost, drop):
    """Least saver-then-base cost, relative to the base, over every t and t = inf, at most ``drop`` less accurate."""
    n = len(confidence)
    costs = [saver_cost / base_cost + 1]
    for t in confidence:
        leaving = [i for i, c in enumerate(confidence) if c >= t]
        lost = sum(float(base[i]) - float(saver[i]) for i in leaving)
        if lost <= drop * n + 1e-9:
            costs.append(saver_cost / base_cost + 1 - len(leaving) / n)
    return min(costs)


def msdnet_rule(scores, quotas):
    """MSDNet's published loop over sorted confidences; where a quota is not reached, all who are left leave."""
    n = len(scores[0])
    exits = [len(scores) - 1] * n
    has_left = [False] * n
    for k in range(len(scores) - 1):
        order = sorted(range(n), key=lambda i: -scores[k][i])
        threshold, count = math.inf, 0
        for i in order:
            if not has_left[i] and quotas[k] > 0:
                count += 1
                threshold = scores[k][i]
                if count == quotas[k]:
                    break
        for i in range(n):
            if not has_left[i] and scores[k][i] >= threshold:
                has_left[i], exits[i] = True, k
    return exits


def class_target(outputs, margin, c):
    """(1 - margin) times the full model's precision on class c; infinite where it never answers with it."""
    answers = [i for i in range(outputs.n_samples) if outputs.predictions[-1][i] == c]
    right = sum(bool(outputs.labels[i] == c) for i in answers)
    return (1.0 - margin) * (right / len(answers)) if answers else math.inf


def margin_thresholds(outputs, margin, cascade_aware, cell):
    """Thresholds (K, C) of one margin: ``cell(scores, right, target)`` chooses for one exit and predicted class."""
    alive, rows = set(range(outputs.n_samples)), []
    for k in range(outputs.n_exits - 1):
        row = []
        for c in range(outputs.n_classes):
            here = [i for i in sorted(alive) if outputs.predictions[k][i] == c]
            scores = [float(outputs.scores[k][i]) for i in here]
            row.append(cell(scores, [bool(outputs.labels[i] == c) for i in here], class_target(outputs, margin, c)))
        rows.append(row)
        if cascade_aware:
            alive = {i for i in alive if float(outputs.scores[k][i]) <= row[outputs.predictions[k][i]]}
    return [*rows, [-math.inf] * outputs.n_classes]


def smallest_feasible(scores, right, target, min_support=1, estimate=lambda right, n: right / n):
    """Of -inf and the scores, the smallest above which enough samples lie, with an estimate above the target."""
    for t in [-math.inf, *sorted(set(scores))]:
        leaving = [r for s, r in zip(scores, right, strict=True) if s > t]
        if len(leaving) >= min_support and leaving and estimate(sum(leaving), len(leaving)) > target:
            return t
    return math.inf


def wilson_lower(right, n, delta):
    """Lower end of the one-sided Wilson interval at level 1 - delta."""
    return float(binomtest(right, n).proportion_ci(1 - 2 * delta, method="wilson").low) if right else 0.0


def fixed_sequence(scores, right, target, min_support, delta):
    """Tests from the surest samples on, each with a tenth more of them; the last success before a failure."""
    if target >= 1 or len(scores) < min_support:
        return math.inf
    if target <= 0:
        return -math.inf
    values = [*sorted(set(scores), reverse=True), -math.inf]
    size = max(min_support, 30, math.ceil(2 * math.log(delta) / math.log(target)))
    threshold, testing = math.inf, False
    for value, below in itertools.pairwise(values):
        leaving = [r for s, r in zip(scores, right, strict=True) if s >= value]
        if len(leaving) >= size or (testing and below == -math.inf):
            testing = True
            if binomtest(sum(leaving), len(leaving), target, alternative="greater").pvalue > delta:
                return threshold
            threshold, size = below, -(-11 * len(leaving) // 10)
    return threshold
