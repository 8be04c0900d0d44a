"""Models as stages and exits, the executor that runs them, and what they cost."""
