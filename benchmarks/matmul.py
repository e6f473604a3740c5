"""Time and error of several ways to multiply float32 matrices, (E, K) @ (K, N), on one CUDA device.

    python benchmarks/matmul.py [--edges 212992] [--sizes 256 384]

K = N = size. Milliseconds are medians of triton.testing.do_bench (the cache is cleared before every call) and
include splitting w; TFLOP/s counts 2 E K N operations. Errors are relative to float64: the largest error of a
row divided by the largest |y| of the row, maximum over 8192 rows. Inputs are random normal x and w (normal);
x with rows scaled by 1e-4 to 1e4 and columns by 1 to 1e-3 (scaled); |x| and |w| (positive, where truncation
errors add up). A variant that fails prints the reason.
"""

import argparse
import time
from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from dpa4.ops.split_matmul import precise_matmul
from dpa4.ops.triton.split_matmul import Tile, matmul

Product = Callable[[Tensor, Tensor], Tensor]

TILES = [
    Tile(128, 128, 32, 8, 3),
    Tile(64, 128, 32, 4, 3),
    Tile(128, 128, 64, 8, 2),
    Tile(64, 128, 64, 4, 2),
    Tile(64, 256, 32, 8, 3),
    Tile(128, 64, 32, 4, 3),
]


def reduced(precision: str) -> Product:
    """Product of torch at the precision "highest" or "high" (TF32)."""

    def product(x: Tensor, w: Tensor) -> Tensor:
        torch.set_float32_matmul_precision(precision)
        y = x @ w
        torch.set_float32_matmul_precision("highest")
        return y

    return product


def halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split x = (high + low) * scale into float16 parts, with a power of two per row (dim 1) or column (dim 0)."""
    exponent = torch.frexp(x.abs().amax(dim, keepdim=True)).exponent - 15
    x = torch.ldexp(x, -exponent)
    high = x.half()
    return high, (x - high).half(), torch.ldexp(torch.ones_like(exponent, dtype=x.dtype), exponent)


def pieces_side_by_side(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float16 matrices (E, 3K) and (3K, N) whose product times the third result, the scale, is x @ w."""
    high, low, scale_x = halves(x, 1)
    w_high, w_low, scale_w = halves(w, 0)
    return torch.cat([high, low, high], 1), torch.cat([w_low, w_high, w_high], 0), scale_x * scale_w


def mm(left: Tensor, right: Tensor) -> Tensor:
    """float16 product of torch with float32 results."""
    return torch.mm(left, right, out_dtype=torch.float32)


def split_mm(x: Tensor, w: Tensor) -> Tensor:
    """Product of float32 matrices by ``mm``, with the operands split by ordinary operators."""
    left, right, scale = pieces_side_by_side(x, w)
    return mm(left, right) * scale


def with_tile(tile: Tile) -> Product:
    return lambda x, w: matmul(x, w, tile)


def variants() -> list[tuple[str, str, Product]]:
    """Name, tile and product of every variant."""
    found: list[tuple[str, str, Product]] = [
        ("torch float32", "", reduced("highest")),
        ("torch TF32", "", reduced("high")),
        ("torch bfloat16, casts included", "", lambda x, w: (x.bfloat16() @ w.bfloat16()).float()),
        ("torch float16 x 3, eager split", "", split_mm),
        ("precise_matmul (as installed)", "", precise_matmul),
    ]
    return found + [("our kernel", "x".join(map(str, tile)), with_tile(tile)) for tile in TILES]


def errors(product: Product, size: int) -> list[float]:
    """Largest errors for the inputs normal, scaled and positive."""
    rng = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(8192, size, device="cuda", generator=rng)
    w = torch.randn(size, size, device="cuda", generator=rng)
    rows = torch.logspace(-4, 4, len(x), device="cuda")[:, None]
    columns = torch.logspace(0, -3, size, device="cuda")
    found = []
    for left, right in ((x, w), (x * rows * columns, w), (x.abs(), w.abs())):
        exact = left.double() @ right.double()
        error = (product(left, right).double() - exact).abs().amax(1) / exact.abs().amax(1)
        found.append(error.max().item())
    return found


def milliseconds(product: Product, x: Tensor, w: Tensor) -> float:
    return float(do_bench(lambda: product(x, w), warmup=10, rep=40, return_mode="median"))


def print_row(name: str, tile: str, size: int, rest: str) -> None:
    print(f"{name:<34} {tile:<16} {size:>4}  {rest}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Time and error of float32 matrix products.")
    parser.add_argument("--edges", type=int, default=212_992, help="number of rows E")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 384], help="values of K = N")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    start = time.perf_counter()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"E = {arguments.edges}; tiles: rows x columns x inner x warps x stages")
    heading = f"{'ms':>8} {'TFLOP/s':>8} {'normal':>9} {'scaled':>9} {'positive':>9}"
    print(f"{'variant':<34} {'tile':<16} {'K=N':>4}  {heading}")
    for size in arguments.sizes:
        x = torch.randn(arguments.edges, size, device="cuda")
        w = torch.randn(size, size, device="cuda")
        flop = 2 * x.numel() * size
        for name, tile, product in variants():
            try:
                measured = errors(product, size)
                ms = milliseconds(product, x, w)
            except Exception as error:  # a tile may not fit; continue with the others
                print_row(name, tile, size, " ".join(f"{type(error).__name__}: {error}".split())[:100])
                continue
            numbers = f"{ms:8.3f} {flop / ms / 1e9:8.0f} " + " ".join(f"{e:9.1e}" for e in measured)
            print_row(name, tile, size, numbers)
        try:
            left, right, _ = pieces_side_by_side(x, w)
            ms = milliseconds(mm, left, right)
            print_row("torch float16 x 3, split not timed", "", size, f"{ms:8.3f} {flop / ms / 1e9:8.0f}")
            ms = milliseconds(torch.mm, x.bfloat16(), w.bfloat16())
            print_row("torch bfloat16, casts not timed", "", size, f"{ms:8.3f} {flop / ms / 1e9:8.0f}")
        except Exception as error:
            print_row("torch, operands prepared", "", size, str(error)[:100])
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
