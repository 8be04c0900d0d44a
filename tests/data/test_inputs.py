import warnings

import numpy as np
import pytest
import torch

from adaptexit import InputWarning
from adaptexit.data.inputs import InputSpec

IMAGES = InputSpec((3, 32, 24))
TABLE = InputSpec((7,))


def test_a_spec_is_that_of_one_input():
    assert InputSpec.of(torch.zeros(5, 3, 32, 24), False) == IMAGES
    assert InputSpec.of(np.zeros((5, 7)), True) == InputSpec((7,), True)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_inputs_like_those_of_fit_pass(n):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IMAGES.check((n, 3, 32, 24))
        TABLE.check((n, 7))


@pytest.mark.parametrize(("spec", "shape"), [(IMAGES, (3, 32, 24)), (IMAGES, (3, 64, 64)), (TABLE, (7,))])
def test_one_input_alone_is_recognised(spec, shape):
    with pytest.raises(ValueError, match=r"looks like one input alone. Give it an axis for the samples: X\[None\]"):
        spec.check(shape)


@pytest.mark.parametrize("resizes", [False, True])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, 1, 32, 24), r"X must have the shape \(N, 3, 32, 24\) .*got \(5, 1, 32, 24\): 1 channels instead of 3"),
        ((5, 32, 24, 3), r"got \(5, 32, 24, 3\): 32 channels instead of 3"),
        ((5, 32, 24), r"got \(5, 32, 24\): other axes"),
        ((5, 3), r"got \(5, 3\): other axes"),
        ((5,), r"got \(5,\): other axes"),
    ],
)
def test_other_channels_and_axes_are_refused_even_where_images_are_resized(shape, message, resizes):
    with pytest.raises(ValueError, match=message + ".*Convert the inputs, or fit on inputs like these"):
        InputSpec(IMAGES.shape, resizes).check(shape)


def test_other_numbers_of_features_are_refused():
    with pytest.raises(ValueError, match=r"X must have the shape \(N, 7\) .*got \(5, 6\): 6 features instead of 7"):
        TABLE.check((5, 6))


def test_another_size_is_warned_of_where_the_model_takes_it():
    with pytest.warns(InputWarning, match=r"shape \(3, 64, 64\), those of fit had \(3, 32, 24\)") as warned:
        IMAGES.check((5, 3, 64, 64))
    assert len(warned) == 1
    assert warned[0].filename == __file__


def test_nothing_is_said_of_sizes_where_every_model_resizes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        InputSpec(IMAGES.shape, resizes=True).check((5, 3, 64, 64))
