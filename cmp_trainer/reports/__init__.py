"""What people look at: logs, curves, plots, the model card."""
