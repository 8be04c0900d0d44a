"""Spend less compute on easy inputs: cascades and early exits for pretrained vision models.

Names and submodules, listed in ``__init__.pyi``, are imported when first used, so that :mod:`adaptexit.core` can be had
without torch.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
