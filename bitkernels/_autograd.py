"""Gradients of operators, registered as ``torch.library.register_autograd`` registers them, at a tenth of its cost.

For every call that takes gradients that function reads the schema of the operator as often as it has arguments squared,
to fill in defaults: a hundred microseconds for the sixteen of a scan. Here they are read once.
"""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("bitkernels", "FRAGMENT")
# By operator that is registered here: what is called where gradients are wanted.
_FUNCTIONS: dict[Callable, Callable] = {}


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
                output = op(*args) if keyset is None else op.redispatch(keyset & after_autograd, *args)
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
    _FUNCTIONS[op] = apply


def skipping_autograd(op: Callable) -> Callable:
    """Calls ``op`` without the way through the dispatcher to the Python of its gradients, which costs a call eight
    microseconds: past it where there are none, and where there are, to it directly if they are registered here.
    """
    below_autograd, any_requires_grad = torch._C._AutoDispatchBelowAutograd, torch._C._any_requires_grad

    def call(*args):
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return op(*args)
        if torch.is_grad_enabled() and any_requires_grad(*args):
            return _FUNCTIONS[op](*args, None) if op in _FUNCTIONS else op(*args)
        with below_autograd():
            return op(*args)

    return call
