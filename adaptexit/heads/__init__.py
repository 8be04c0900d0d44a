"""Heads: the small networks that answer at a cut."""

from adaptexit.core.answer import Answer as Answer
from adaptexit.heads.base import Head as Head
from adaptexit.heads.by_name import HEADS as HEADS
from adaptexit.heads.by_name import NAMED as NAMED
from adaptexit.heads.by_name import HeadName as HeadName
from adaptexit.heads.by_name import make_head as make_head
from adaptexit.heads.chained import BoostedHead as BoostedHead
from adaptexit.heads.chained import ZTWHead as ZTWHead
from adaptexit.heads.layout import FeatureSpec as FeatureSpec
from adaptexit.heads.pooled_map import GridHead as GridHead
from adaptexit.heads.prototype import PrototypeHead as PrototypeHead
from adaptexit.heads.prototype import RefinedPrototypeHead as RefinedPrototypeHead
from adaptexit.heads.residual import ResidualHead as ResidualHead
from adaptexit.heads.residual import WideHead as WideHead
from adaptexit.heads.simple import ConvHead as ConvHead
from adaptexit.heads.simple import LinearHead as LinearHead
from adaptexit.heads.simple import MLPHead as MLPHead
from adaptexit.heads.wrapping import ScalarConfidenceHead as ScalarConfidenceHead
