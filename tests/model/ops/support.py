"""What the tests of the ops share: comparison of values and gradients, documents, and the largest intermediate."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def leaf(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def packed(*lengths: Sequence[int], state: bool = True) -> Tensor:
    """(B, T) int32 index of documents of these lengths, row by row; the first document of a row continues a state."""
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]
    return (torch.stack(rows) + (0 if state else 1)).to(torch.int32)


def outputs_and_gradients(run: Callable[[], Sequence[Tensor]], leaves: Sequence[Tensor]) -> list[Tensor]:
    """The outputs and the gradients of a fixed random linear functional of them, whatever computes them."""
    outputs = [y for y in run() if y is not None]
    weights = [leaf(*y.shape, seed=7).detach().to(y.device, y.dtype) for y in outputs]
    grads = torch.autograd.grad(outputs, leaves, weights)
    return [*(y.detach() for y in outputs), *grads]


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor], within: float) -> None:
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = a.detach().double(), b.detach().double()
        assert (a - b).abs().max() <= within * max(1.0, float(b.abs().max())), f"number {i} differs"


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor of each dtype that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                size = x.untyped_storage().nbytes() // x.element_size()
                self.elements[x.dtype] = max(self.elements.get(x.dtype, 0), size)
        return result


def largest(run: Callable[[], Tensor], leaves: Sequence[Tensor]) -> int:
    """Elements of the largest tensor that `run` and its backward make."""
    with Largest() as record:
        y = run()
        torch.autograd.grad(y.float().sum(), leaves)
    return max(record.elements.values())
