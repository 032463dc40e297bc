"""Checkpoints and pushes that lose nothing."""
