"""The definitions written out sample by sample, independent of the library's arithmetic."""

import itertools
import math
from fractions import Fraction


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
        taken = last
        for k in range(last):
            if float(outputs.scores[k][i]) > threshold_of(outputs, thresholds, k, i):
                taken = k
                break
        exits.append(taken)
    return exits


def full_cost(outputs):
    """What the plain full model costs."""
    return math.fsum(outputs.stage_costs) + outputs.exit_costs[-1]


def spent(outputs, run, taken):
    """What a sample has spent when it leaves at exit ``taken`` and the early exits ``run`` are run."""
    last = outputs.n_exits - 1
    total = math.fsum(outputs.stage_costs[: taken + 1])
    total += math.fsum(outputs.exit_costs[k] for k in run if k <= taken)
    return total + (outputs.exit_costs[last] if taken == last else 0.0)


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
    return [(*chosen, -math.inf) for chosen in itertools.product(*cells)]


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
    gone = [False] * n
    for k in range(len(scores) - 1):
        order = sorted(range(n), key=lambda i: -scores[k][i])
        threshold, count = math.inf, 0
        for i in order:
            if not gone[i] and quotas[k] > 0:
                count += 1
                threshold = scores[k][i]
                if count == quotas[k]:
                    break
        for i in range(n):
            if not gone[i] and scores[k][i] >= threshold:
                gone[i], exits[i] = True, k
    return exits
