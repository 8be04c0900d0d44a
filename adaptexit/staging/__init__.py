"""Models as stages and exits, the executor that runs them, and what they cost."""

from adaptexit.exceptions import SplitError, SplitWarning
from adaptexit.staging.cuts import auto_cuts, list_cuts
from adaptexit.staging.splitting import Split, from_stages, split

__all__ = ["Split", "SplitError", "SplitWarning", "auto_cuts", "from_stages", "list_cuts", "split"]
