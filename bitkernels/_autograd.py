"""Gradients of operators, registered as ``torch.library.register_autograd`` registers them, at a tenth of its cost.

For every call that takes gradients that function reads the schema of the operator as often as it has arguments squared,
to fill in defaults: a hundred microseconds for the sixteen of a scan. Here they are read once.
"""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("bitkernels", "FRAGMENT")


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """``backward(ctx, *grads)`` gives the gradients of the arguments of ``bitkernels::name``; Nones at the end may be
    left out. ``setup_context(ctx, inputs, output)`` keeps what it needs; inputs are all arguments.
    """
    op = getattr(torch.ops.bitkernels, name).default
    defaults = tuple(argument.default_value for argument in op._schema.arguments)
    below_autograd, after_autograd = torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset
    any_requires_grad = torch._C._any_requires_grad

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            *args, keyset = inputs
            with below_autograd():
                output = op.redispatch(keyset & after_autograd, *args)
            # The dispatcher drops arguments at the end that equal their defaults.
            setup_context(ctx, (*args, *defaults[len(args) :]), output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            given = len(ctx.needs_input_grad) - 1
            grads = backward(ctx, *grads)
            return *grads[:given], *[None] * (given - len(grads)), None

    Function.__name__ = Function.__qualname__ = f"{name}_autograd"
    # What Function.apply does but for transforms of torch.func.
    apply = super(torch.autograd.Function, Function).apply

    def kernel(keyset, *args):
        if torch.is_grad_enabled() and any_requires_grad(*args):
            transformed = torch._C._are_functorch_transforms_active()
            return (Function.apply if transformed else apply)(*args, keyset)
        with below_autograd():
            return op.redispatch(keyset & after_autograd, *args)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def skipping_autograd(op: Callable) -> Callable:
    """Calls ``op``, under ``no_grad`` without the Python of its gradients, which costs a call eight microseconds."""

    def call(*args):
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call
