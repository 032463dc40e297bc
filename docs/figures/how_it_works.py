"""Draws docs/figures/how_it_works.png: one training step with two ablations, from masks to loss.

python docs/figures/how_it_works.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Circle, FancyArrowPatch

VARIANTS = ["full model\n(no dropout)", "1 drop\np = 0.3", "2 drops\np = 0.51"]
LOSSES = [0.62, 0.45, 0.90]  # an example whose full model is worse than its first ablation
INK, PALE, WRONG = "#1f2933", "#d5dbe1", "#c2410c"


def main() -> None:
    figure, (neurons, losses) = plt.subplots(1, 2, figsize=(9.6, 3.4), width_ratios=(1.15, 1), layout="constrained")
    draw_neurons(neurons)
    draw_losses(losses)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=160)


def draw_neurons(axes: plt.Axes) -> None:
    uniform = np.random.default_rng(4).random((4, 9))
    for row, (name, rate) in enumerate(zip(VARIANTS, (0, 0.3, 0.51), strict=True)):
        top = -row * 5.2
        axes.text(-1.2, top - 1.5, name, ha="right", va="center", color=INK)
        for (line, column), value in np.ndenumerate(uniform):
            kept = value >= rate  # nested: what is dropped at one rate is dropped at every higher one
            axes.add_patch(Circle((column, top - line), 0.36, color=INK if kept else PALE))
    axes.set_title("same example, same random state:\nwhat is dropped stays dropped", fontsize=11)
    axes.set(xlim=(-6.2, 8.8), ylim=(-14.4, 1), aspect="equal")
    axes.axis("off")


def draw_losses(axes: plt.Axes) -> None:
    axes.bar(range(3), LOSSES, width=0.5, color=[INK, "#64748b", "#9aa5b1"])
    axes.set_xticks(range(4), ["l(0)", "l(1)", "l(2)", "l(3) = b = 0"])
    axes.set(ylabel="task loss of one example", ylim=(0, 1.18), xlim=(-0.5, 3.6))
    arrow = FancyArrowPatch((0, LOSSES[0] + 0.03), (1, LOSSES[1] + 0.03), arrowstyle="-|>", color=WRONG,
                            connectionstyle="arc3,rad=-0.35", mutation_scale=14)  # fmt: skip
    axes.add_patch(arrow)
    axes.text(-0.02, 0.76, "max(0, l(0) - l(1)) > 0:\nthe full model is worse", color=WRONG, fontsize=9.5)
    axes.set_title("the wish l(0) ≤ l(1) ≤ l(2), as a hinge\nover all pairs and the baseline b", fontsize=11)
    axes.plot((2.75, 3.25), (0.004, 0.004), color=WRONG, linewidth=3, clip_on=False)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
