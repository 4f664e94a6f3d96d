"""Compiles the Triton kernels for a GPU, which need not be there: ``python compile_triton_kernels.py 90 fp32``.

Prints the kernels' names; what Triton or its assembler refuses ends with a traceback.
"""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from evoloss.engine.triton_kernels import BLOCK, NUM_WARPS, _gradients, _mixed


def main(capability: int, dtype: str) -> None:
    """Compile both kernels for a compute capability (90: 9.0) and floats of ``dtype``, fp32 or fp64."""
    floats, number = f"*{dtype}", "i32"
    programs = {"ops": "*i32", "a": "*i32", "b": "*i32", "w": floats, "offsets": "*i32"}
    predictions = {"y": floats, "f": floats, "f_stride": number}
    room = {"scratch": floats, "longest": number, "out": floats}
    rest = {"count": number, "BLOCK": "constexpr"}
    for kernel, own in ((_gradients, room), (_mixed, {"u": floats, **room, "total": number})):
        source = ASTSource(kernel, {**programs, **predictions, **own, **rest}, {"BLOCK": BLOCK})
        options = {"num_warps": NUM_WARPS, "num_stages": 1}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert f".target sm_{capability}" in compiled.asm["ptx"]
        assert compiled.asm["cubin"][:4] == b"\x7fELF"
        sys.stdout.write(f"{kernel.__name__}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
