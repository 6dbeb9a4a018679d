"""Every Triton kernel compiles for GPUs that are not here, as the ops launch it: to machine code, by ptxas."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from model.ops.conv_triton import causal_conv_triton
from model.ops.head_triton import TritonSoftmax
from model.ops.norm_triton import TritonNorm, TritonReLU2, TritonSwiGLU
from model.ops.selective_scan_triton import selective_scan_triton

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
NUMBERS = {int: "i32", float: "fp32"}
SHARED_BYTES = 99 * 2**10
"""Shared memory that a program may have on every GPU from compute capability 8.0."""


@dataclass
class Launch:
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]

    def source(self) -> ASTSource:
        """As Triton specialises a launch: on None, on numbers that are 1, and on those that 16 divides."""
        signature, constants, divisible = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            v = self.arguments[parameter.name]
            if parameter.is_constexpr or v is None or (isinstance(v, int) and v == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", v
                continue
            signature[parameter.name] = f"*{TYPES[v.dtype]}" if isinstance(v, Tensor) else NUMBERS[type(v)]
            if isinstance(v, Tensor) or (isinstance(v, int) and v % 16 == 0):
                divisible[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, divisible)


@pytest.fixture
def launches(monkeypatch) -> list[Launch]:
    """What is launched, instead of launching it."""
    seen: list[Launch] = []

    def record(kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False))
        options = {name: v for name, v in kwargs.items() if name not in kernel.arg_names}
        seen.append(Launch(kernel, named | {k: v for k, v in kwargs.items() if k not in options}, options))

    monkeypatch.setattr(JITFunction, "run", record)
    return seen


def scan(dtype: torch.dtype, full: bool, states: int = 16, sizes: tuple[int, int, int] = (2, 128, 512)) -> None:
    """A layer of width 256; `full`: with documents, a state and D."""
    B, T, C = sizes
    x, dt, A = torch.zeros(B, T, C, dtype=dtype, requires_grad=True), torch.zeros(B, T, C), torch.zeros(C, states)
    b = torch.zeros(B, T, 2 * states, dtype=dtype)[..., :states]
    rest = (torch.zeros(C), torch.zeros(B, T, dtype=torch.int32), torch.zeros(B, C, states))
    y, state = selective_scan_triton(x, dt, A, b, b, *(rest if full else (None, None, None)))
    torch.autograd.grad([y, state], x, [torch.zeros_like(y), torch.zeros_like(state)])


def conv(dtype: torch.dtype, full: bool, taps: int = 4, sizes: tuple[int, int, int] = (2, 128, 640)) -> None:
    B, T, C = sizes
    x = torch.zeros(B, T, 2 * C, dtype=dtype, requires_grad=True)
    rest = (torch.zeros(C), torch.zeros(B, T, dtype=torch.int32), torch.zeros(B, taps - 1, C, dtype=dtype), "silu")
    y = causal_conv_triton(x[..., :C], torch.zeros(C, taps), *(rest if full else (None,)))
    torch.autograd.grad(y, x, torch.zeros_like(y))


def rows(dtype: torch.dtype, full: bool, width: int = 4096, sizes: tuple[int, int] = (2, 128)) -> None:
    """`full`: gated norms; a plain one of the residual stream otherwise."""
    x = torch.zeros(*sizes, 2 * width, dtype=dtype, requires_grad=True)
    a, b = x[..., :width], x[..., width:]
    weight, residual = torch.zeros(width), torch.zeros(*sizes, width, requires_grad=True)
    for y in (
        TritonNorm.apply(a if full else residual, b if full else None, weight, 1e-5, 1, full, dtype),
        TritonSwiGLU.apply(a, b),
        TritonReLU2.apply(a),
    ):
        y.backward(torch.zeros_like(y))


def head(dtype: torch.dtype, full: bool, vocabulary: int = 50304, tokens: int = 128) -> None:
    logits, numbers = torch.zeros(tokens, vocabulary, dtype=dtype), torch.zeros(tokens)
    TritonSoftmax().log_sum_exp(logits, vocabulary - 3, numbers)
    target = torch.zeros(tokens, dtype=torch.int64)
    TritonSoftmax().softmax_slope(logits, vocabulary - 3, numbers, numbers, numbers, target)


def compiles(launches: list[Launch], capability: int, names: set[str]) -> None:
    assert {launch.kernel.__name__ for launch in launches} == names
    for launch in launches:
        made = triton.compile(
            launch.source(), target=GPUTarget("cuda", capability, 32), options={"num_warps": 4} | launch.options
        )
        assert made.asm["cubin"], launch.kernel.__name__
        assert made.metadata.shared <= SHARED_BYTES, launch.kernel.__name__


SCAN = {"_chunk_states", "_pass_states", "_outputs", "_chunk_gradients", "_input_gradients"}
CONV = {"_convolved", "_gradients"}
ROWS = {f"_{name}_{way}" for name in ("norm", "swiglu", "relu2") for way in ("forward", "backward")}
HEAD = {"_log_sum_exp", "_softmax_slope"}
FAST = [(scan, SCAN, torch.bfloat16, 90), (scan, SCAN, torch.float32, 80)]
FAST += [(conv, CONV, torch.bfloat16, 80), (conv, CONV, torch.float32, 90)]
FAST += [(rows, ROWS, torch.bfloat16, 90), (head, HEAD, torch.bfloat16, 80)]


@pytest.mark.parametrize(("call", "names", "dtype", "capability"), FAST)
def test_with_everything(launches, call: Callable, names, dtype, capability):
    call(dtype, True)
    compiles(launches, capability, names)


ROW_SIZES = [(rows, ROWS, 96), (rows, ROWS, 8192), (head, HEAD, 320)]


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("call", "names", "size"), [(scan, SCAN, 16), (scan, SCAN, 64), (conv, CONV, 4), *ROW_SIZES])
def test_every_variant(launches, call: Callable, names, size, dtype, capability, full):
    call(dtype, full, size)
    compiles(launches, capability, names)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 512), (1, 37, 1)])
@pytest.mark.parametrize(("call", "names"), [(scan, SCAN), (conv, CONV)])
def test_sizes_of_one(launches, call: Callable, names, sizes):
    """Triton makes a constant of a size that is 1: of one row, token or channel."""
    call(torch.float16, True, 1, sizes)
    compiles(launches, 80, names)
