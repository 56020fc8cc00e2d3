"""Launches whose arguments, but for pointers, are prepared once.

Triton binds and specialises every argument of every launch, which takes ten microseconds for the forty of a kernel of
the scan, and its sizes, strides and checks take as long again: on short sequences more than the kernels themselves.
So an operator makes a *plan* of its launches for arguments of a layout, and later calls only bring the pointers.
"""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")

# Of operators and layouts of arguments. Cleared when full: every length of a sequence may need its own.
PLANS: dict[tuple, object] = {}
MAX_PLANS = 1024


class Launch:
    """A kernel, its grid, and the values of all parameters that follow those given at a call.

    What is compiled for the first call serves the others, so pointers must keep their types and alignment.
    """

    def __init__(self, kernel, grid: tuple[int, int, int], *values, **options):
        self.kernel, self.grid, self.values, self.options = kernel, grid, values, options
        self.compiled = None

    def __call__(self, *first) -> None:
        if self.compiled is None:
            self.compiled = self.kernel[self.grid](*first, *self.values, **self.options)
        else:
            self.compiled[self.grid](*first, *self.values)


def layout(t: Tensor | None) -> tuple | None:
    """All of a tensor that a plan may depend on."""
    return None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16, t.device)


def planned(key: tuple, make: Callable[[], T]) -> T:
    plan = PLANS.get(key)
    if plan is None:
        if len(PLANS) >= MAX_PLANS:
            PLANS.clear()
        plan = PLANS[key] = make()
    return plan
