"""How the forwards of one step are run."""
