import numpy as np
import pytest
from scipy.special import log_softmax

from adaptexit.core.em import LEAST, fit_global, fit_per_sample, halting_targets, log_likelihoods
from adaptexit.core.outputs import ExitOutputs

RNG = np.random.default_rng(0)


def outputs(n=6, n_exits=3, scale=1.0, **more):
    logits = scale * RNG.normal(size=(n_exits, n, 4))
    return ExitOutputs.from_logits(logits, RNG.integers(0, 4, n), costs=np.arange(1, n_exits + 1), **more)


def test_likelihoods_are_the_probabilities_of_the_labels():
    recorded = outputs()
    expected = log_softmax(recorded.logits, axis=2)[:, np.arange(6), recorded.labels].T
    np.testing.assert_allclose(log_likelihoods(recorded), expected)


def test_likelihoods_have_a_floor_and_do_not_overflow():
    log_p = log_likelihoods(outputs(scale=1e4))
    assert np.isfinite(log_p).all()
    assert log_p.min() == np.log(LEAST)


def test_likelihoods_need_logits_and_labels():
    with pytest.raises(ValueError, match=r"need logits and labels; the outputs lack logits \(record them"):
        log_likelihoods(outputs(keep_logits=False))


def test_responsibilities_far_below_the_smallest_number_have_targets():
    log_p = np.log(np.array([[1.0, LEAST, LEAST], [LEAST, LEAST, 1.0]]))
    posterior = fit_per_sample(log_p, np.array([0.0, 800.0, 1500.0]))
    targets = halting_targets(posterior.log_responsibilities)
    assert np.exp(posterior.log_responsibilities[0, 1:]).tolist() == [0.0, 0.0]
    assert np.isfinite(targets).all()
    assert targets[:, 0] == pytest.approx(1)
    assert targets[0, 1] == pytest.approx(1)  # of nobody: of the two left, the cheaper


def test_an_exit_that_explains_nothing_loses_its_prior():
    log_p = np.log(np.array([[0.9, 0.1]] * 5))
    posterior = fit_global(log_p, np.zeros(2), n_iter=1000, tol=1e-12)
    assert posterior.converged
    assert posterior.prior == pytest.approx([1, 0], abs=1e-6)
    assert posterior.history[-1] == pytest.approx(np.log(0.9))


def test_a_mixture_is_found():
    """Half of the samples are explained by the first exit and half by the second: so are the priors."""
    log_p = np.log(np.array([[0.99, 0.01]] * 30 + [[0.01, 0.99]] * 10))
    posterior = fit_global(log_p, np.zeros(2), n_iter=1000, tol=1e-14)
    assert posterior.prior == pytest.approx([0.76, 0.24], abs=0.01)


def test_convergence_is_told():
    log_p = np.log(np.random.default_rng(0).random((50, 4)))
    short = fit_global(log_p, np.zeros(4), n_iter=2, tol=1e-12)
    assert not short.converged
    assert len(short.history) == 3
    loose = fit_global(log_p, np.zeros(4), n_iter=2000, tol=1e-3)
    tight = fit_global(log_p, np.zeros(4), n_iter=2000, tol=1e-10)
    assert loose.converged
    assert tight.converged
    assert len(loose.history) < len(tight.history)
    assert tight.history[-1] >= loose.history[-1]
