import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from adaptexit.training.joint_loss import exit_losses, exit_weights, mixed, mixup_of

SETTINGS = {"teacher": "original", "distillation": 0.3, "temperature": 2.0, "label_smoothing": 0.0}


def some_logits(n_exits=3, n=6, n_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    answers = [torch.randn(n, n_classes, generator=generator, dtype=torch.float64) for _ in range(n_exits)]
    return answers, torch.randint(0, n_classes, (n,), generator=generator)


def naive_loss(logits, label, teacher, a, temperature):
    """Of one sample, written out."""
    p = np.exp(logits) / np.exp(logits).sum()
    loss = -(1 - a) * np.log(p[label])
    if a:
        q = np.exp(teacher / temperature) / np.exp(teacher / temperature).sum()
        r = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        loss += a * temperature**2 * (q * (np.log(q) - np.log(r))).sum()
    return loss


@given(a=st.floats(0, 1), temperature=st.floats(0.5, 8), seed=st.integers(0, 99))
def test_losses_equal_the_formula_sample_by_sample(a, temperature, seed):
    answers, target = some_logits(seed=seed)
    teacher = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    settings = SETTINGS | {"distillation": a, "temperature": temperature}
    losses = exit_losses(answers, target, teacher, settings=settings, n_samples=6)
    for loss, logits in zip(losses, answers, strict=True):
        rows = zip(logits.numpy(), target.tolist(), teacher.numpy(), strict=True)
        assert float(loss) == pytest.approx(np.mean([naive_loss(*row, a, temperature) for row in rows]))


def test_the_last_exit_as_the_teacher_learns_from_labels_alone_and_gets_no_gradient_from_the_others():
    answers, target = some_logits()
    answers = [logits.requires_grad_() for logits in answers]
    settings = SETTINGS | {"teacher": "last", "distillation": 1.0}
    losses = exit_losses(answers, target, None, settings=settings, n_samples=6)
    assert torch.equal(losses[-1], F.cross_entropy(answers[-1], target, reduction="sum") / 6)
    losses[:-1].sum().backward()
    assert not answers[-1].grad.any()
    assert all(logits.grad.any() for logits in answers[:-1])


def test_parts_of_a_batch_add_up_to_its_mean():
    answers, target = some_logits()
    whole = exit_losses(answers, target, answers[0], settings=SETTINGS, n_samples=6)
    parts = [
        exit_losses([a[rows] for a in answers], target[rows], answers[0][rows], settings=SETTINGS, n_samples=6)
        for rows in (slice(0, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


COSTS = np.array([0.2, 0.5, 1.0])


@pytest.mark.parametrize(
    ("weights", "over", "expected"),
    [
        ("equal", 0.3, [1, 1, 1]),
        ("rising", 0.3, [1 / 3, 2 / 3, 1]),
        ("scheduled", 0.0, [0.01, 0.01, 1]),
        ("scheduled", 0.5, [0.105, 0.255, 1]),
        ("scheduled", 1.0, [0.2, 0.5, 1]),
        ([0.5, 0, 2], 0.3, [0.5, 0, 2]),
    ],
)
def test_what_each_exit_counts(weights, over, expected):
    np.testing.assert_allclose(exit_weights(weights, COSTS)(over), expected)


@pytest.mark.parametrize("weights", [[1, 1], [1, -1, 1], [0, 0, 0], [1, np.nan, 1]])
def test_weights_that_cannot_be_are_refused(weights):
    with pytest.raises(ValueError, match="weights must be 3 numbers, one an exit"):
        exit_weights(weights, COSTS)


@pytest.mark.parametrize("n", [7, 8])
def test_mixed_targets_are_probabilities_and_an_odd_sample_stays_as_it_is(n):
    settings = {"mixup": 1.0, "cutmix": 0.0, "label_smoothing": 0.1}
    x, target = torch.rand(n, 1, 4, 4), torch.arange(n) % 3
    before = x.clone()
    np.random.seed(0)  # noqa: NPY002  # what timm draws from
    blended, probabilities = mixed(mixup_of(settings, 3), x, target, 0.1, 3)
    assert torch.equal(x, before)
    assert blended.shape == x.shape
    torch.testing.assert_close(probabilities.sum(1), torch.ones(n))
    assert not torch.equal(blended[:6], x[:6])
    if n == 7:
        assert torch.equal(blended[-1], x[-1])
        torch.testing.assert_close(probabilities[-1], F.one_hot(target[-1:], 3)[0] * 0.9 + 0.1 / 3)


def test_nothing_is_mixed_where_nothing_is_asked_for():
    assert mixup_of({"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.1}, 3) is None
