"""Training: of heads on features recorded once, or of networks with their exits; one recipe a file."""

from adaptexit.training.feature_cache import FeatureCache as FeatureCache
from adaptexit.training.feature_cache import collect as collect
from adaptexit.training.feature_store import cache_key as cache_key
from adaptexit.training.loop import minimise as minimise
from adaptexit.training.recipes import RECIPES as RECIPES
from adaptexit.training.recipes import AutoRecipe as AutoRecipe
from adaptexit.training.recipes import BoostNetRecipe as BoostNetRecipe
from adaptexit.training.recipes import CalexNetRecipe as CalexNetRecipe
from adaptexit.training.recipes import FrozenRecipe as FrozenRecipe
from adaptexit.training.recipes import JointRecipe as JointRecipe
from adaptexit.training.recipes import PTEERecipe as PTEERecipe
from adaptexit.training.recipes import Recipe as Recipe
from adaptexit.training.recipes import ZTWRecipe as ZTWRecipe
from adaptexit.training.recipes import recipe_of as recipe_of
