"""Profiles of the property tests, chosen by HYPOTHESIS_PROFILE, and the cascades that several files ask questions."""

import gc
import os

import pytest
from hypothesis import settings

settings.register_profile("dev", max_examples=8, deadline=None)
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("nightly", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_collection_finish():
    """What was imported is not searched for garbage again and again, which took a tenth of the time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Found again at the end, as libraries that count their own objects expect."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def cascade():
    """A small and a large network on digits, calibrated."""
    from adaptexit import CascadeSaver, ThresholdCalibrator
    from tests.nets import digits, large_trained, small_trained

    calibrator = ThresholdCalibrator(max_drop=0.01)
    return CascadeSaver(large_trained(), small_trained(), calibrator=calibrator).fit(*digits()[1])


@pytest.fixture(scope="session")
def three():
    """Three networks on digits, calibrated."""
    from adaptexit import CascadeSaver, ThresholdCalibrator
    from tests.nets import digits, large_trained, middle_trained, small_trained

    calibrator = ThresholdCalibrator(search="exact", max_drop=0.01)
    return CascadeSaver(large_trained(), [small_trained(), middle_trained()], calibrator=calibrator).fit(*digits()[1])
