"""The methods of a study: a name, and the arguments that a script is run with.

Those that come built in answer what someone asks of comparative loss: is it better than plain training, than training
without dropout, than either for the same compute; is it the comparison that helps, or only the average over dropout
rates; and how do other regularizers do?
"""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cmp_trainer.errors import nearest

MEAN_OF_VARIANTS = "--cmp_num_ablations 2 --cmp_objective regularized --cmp_primary mean --cmp_weight 0"


@dataclass(frozen=True)
class Method:
    """A way to train: its name in the table, and its arguments as on a command line."""

    name: str
    arguments: str = ""

    @property
    def words(self) -> list[str]:
        """The arguments one by one."""
        return shlex.split(self.arguments)


BUILT_IN = {
    method.name: method
    for method in (
        Method("plain"),
        Method("no-dropout", "--control_no_dropout"),
        # 1 + 2 forwards and backwards a step, as with two ablations
        Method("plain-3x", "--control_epochs 3"),
        Method("no-dropout-3x", "--control_no_dropout --control_epochs 3"),
        Method("label-smoothing", "--label_smoothing_factor 0.1"),
        Method("neftune", "--neftune_noise_alpha 5"),
        Method("r-drop", "--control_r_drop 1"),
        Method("mean-of-variants", MEAN_OF_VARIANTS),
        Method("comparative-1", "--cmp_num_ablations 1"),
        Method("comparative-2", "--cmp_num_ablations 2"),
        Method("comparative-4", "--cmp_num_ablations 4"),
        Method("baseline-first", "--cmp_num_ablations 2 --cmp_baseline first"),
        Method("top-layers", "--cmp_num_ablations 2 --cmp_ablated_layers 2"),
        # the compute of two random skips of six layers; what lies below the first skipped one is run once
        Method("layer-drop", "--control_layer_drop 2 --control_epochs 2.2"),
    )
}
DEFAULT = ("plain", "no-dropout", "plain-3x", "comparative-2")


def make_methods(asked: Iterable[str] | Mapping[str, str | None] | None) -> list[Method]:
    """Methods from `NAME` (built in), `NAME=ARGUMENTS`, or `all` that are built in.

    Args:
        asked: as given on the command line, or a mapping from names to arguments, None for a built-in method; None for
            the default methods.

    Raises:
        ValueError: a name that is not built in and has no arguments, or the same name twice.
    """
    if isinstance(asked, Mapping):
        pairs = list(asked.items())
    else:
        pairs = [split_name(one) for one in (DEFAULT if asked is None else asked)]
    methods: list[Method] = []
    for name, arguments in pairs:
        if arguments is not None:
            methods.append(Method(name, arguments))
        elif name == "all":
            methods += BUILT_IN.values()
        elif name in BUILT_IN:
            methods.append(BUILT_IN[name])
        else:
            raise ValueError(
                f"--method {name}: not built in{nearest(name, BUILT_IN)}; give its arguments, --method "
                f"'{name}=--cmp_num_ablations 2', or use one of {', '.join(BUILT_IN)}, all"
            )
    require_distinct("--method", [method.name for method in methods])
    return methods


def split_name(text: str) -> tuple[str, str | None]:
    """`NAME=ARGUMENTS` apart; no arguments where there is no `=`."""
    name, separator, arguments = text.partition("=")
    return name.strip(), arguments.strip() if separator else None


def require_distinct(option: str, names: Iterable[str]) -> None:
    """Raises a ValueError where a name is empty or there twice."""
    seen: set[str] = set()
    for name in names:
        if not name or name in seen:
            raise ValueError(f"{option} {name or '(empty)'}: {'given twice' if name else 'a name is needed'}")
        seen.add(name)
