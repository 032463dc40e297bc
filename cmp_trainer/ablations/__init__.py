"""What is taken away: hidden neurons, layers, input context, or what an ablation of your own takes away."""

from cmp_trainer.ablations.protocol import Ablation

__all__ = ["Ablation"]
