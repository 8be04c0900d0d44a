"""What tests of many large models need."""

import gc

import pytest


@pytest.fixture
def freed():
    """Traced modules are part of cycles; those that wait to be found would add up to gigabytes."""
    yield
    gc.collect()
