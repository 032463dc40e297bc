"""Studies: the same script by several methods and with several seeds, and what that says."""
