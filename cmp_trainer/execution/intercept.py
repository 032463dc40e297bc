"""One mode for everything that is intercepted: dropout calls, and the reductions of a loss.

Every torch function of a forward passes a function mode that is entered, so there is one of them, with one dictionary
look-up on the path of all functions that nobody asked for. The mode belongs to the thread it is entered in.
"""

from collections.abc import Callable, Mapping

from torch.overrides import TorchFunctionMode

from cmp_trainer.ablations.protocol import Handler


class Intercept(TorchFunctionMode):
    """Inside, calls of the functions in `handlers` are made by their handler, `(function, args, kwargs) -> result`.

    Args:
        handlers: by torch function. A handler runs outside of the mode, so it can call the function itself.
        others: a handler of all other functions, for runs in which every call has to be seen.
    """

    def __init__(self, handlers: Mapping[Callable, Handler], others: Handler | None = None) -> None:
        super().__init__()
        self.handlers = dict(handlers)
        self.others = others

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.handlers:
            return self.handlers[func](func, args, kwargs or {})
        if self.others is not None:
            return self.others(func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)
