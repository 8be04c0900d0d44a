"""Models that answer with an object instead of a tensor, as those of transformers do."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.nets import branched_trained, large_trained, small_trained


@dataclass
class Output:
    """A plain record."""

    logits: Any
    hidden: Any = None


@dataclass
class Strict(OrderedDict):
    """A record that is a dict of what it holds, and may only be made whole."""

    logits: Any = None
    hidden: Any = None

    def __post_init__(self):
        for name in ("logits", "hidden"):
            if getattr(self, name) is not None:
                OrderedDict.__setitem__(self, name, getattr(self, name))

    def update(self, *args, **kwargs):
        raise TypeError("what is said is said")

    def __getitem__(self, key):
        return OrderedDict.__getitem__(self, key) if isinstance(key, str) else tuple(self.values())[key]


FORMS = {"record": Output, "strict dict": Strict, "dict": lambda logits: {"logits": logits}}


class Wrapped(nn.Module):
    """A classifier whose answer comes in another form."""

    def __init__(self, net, form):
        super().__init__()
        self.net, self.form = net, form

    def forward(self, x):
        return self.form(self.net(x))


def wrapped(form, factory=small_trained):
    """A trained network whose answer comes in a form by name."""
    return Wrapped(factory(), FORMS[form]).eval()


class Recording(nn.Module):
    """A block that gives a ``Strict``."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return Strict(hidden=self.net(x))


class Encoder(nn.Module):
    """Its blocks give records, so that those are carried from stage to stage."""

    def __init__(self, net):
        super().__init__()
        self.one, self.two, self.three = Recording(net.one), Recording(net.two), net.three
        self.top = nn.Sequential(net.pool, net.flat, net.drop, net.out)

    def forward(self, x):
        record = self.one(x)
        record = self.two(record.hidden)
        return Strict(logits=self.top(self.three(record["hidden"])))


def encoder():
    """``branched_net`` as an encoder of records."""
    return Encoder(branched_trained()).eval()


def plain_answers(net, X):
    """Labels of a network that answers with tensors."""
    with torch.inference_mode():
        return net(torch.from_numpy(X)).argmax(dim=1).tolist()


NETS = {"saver": small_trained, "base": large_trained, "backbone": branched_trained}
