"""What all Triton kernels of the engine share: how they are started, and compiled without a GPU.

Kernels run on CUDA, or, with TRITON_INTERPRET=1 in the environment before Triton is imported, on
any machine in Triton's interpreter. The interpreter multiplies bf16 matrices wrongly, so kernels
take a flag, `UPCAST`, with which they multiply in fp32 there.

`compile_ahead` compiles a kernel for a GPU that is not there and says what it takes of it.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

INTERPRETED: Final = bool(knobs.runtime.interpret)
# fp32 products are taken in three parts of tf32, almost as precise; others are not affected.
PRECISION: Final = tl.constexpr("tf32x3")
# Shared memory that one program may have, by compute capability (CUDA programming guide).
SHARED_BYTES_MAX: Final = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_POINTERS: Final = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


class ResourceUsageError(RuntimeError):
    """The assembler did not say what a kernel takes."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start a kernel. The one place where its arguments are not checked by type."""
    if "UPCAST" in kernel.arg_names:
        options["UPCAST"] = INTERPRETED
    kernel[grid](*args, **options)


def power_of_two(value: int) -> int:
    """The smallest one that is not smaller."""
    return 1 << max(0, value - 1).bit_length()


@dataclass(frozen=True, slots=True)
class KernelCase:
    """A kernel with the arguments of one launch, as the compiler sees them.

    `arguments`: a dtype stands for a pointer to it, aligned to 16 bytes; "i32" and "i32:16" for an
    integer and one that 16 divides; "fp32" for a number.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, torch.dtype | str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class KernelUsage:
    """What a compiled kernel takes. `spilled_bytes`: stores and loads of registers to memory."""

    registers: int
    shared_bytes: int
    spilled_bytes: int


def compile_ahead(case: KernelCase, capability: int) -> KernelUsage:
    """Compile for a capability (80, 90, 100). Raises ResourceUsageError and Triton's errors."""
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(case.kernel.arg_names):
        kind = case.arguments.get(name)
        signature[name] = "constexpr" if kind is None else _signature(kind)
        if isinstance(kind, torch.dtype) or kind == "i32:16":
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={
            name: value
            for name, value in {"UPCAST": False, **case.constants}.items()
            if name in case.kernel.arg_names
        },
        attrs=attributes,
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    registers, spilled_bytes = _assembled(compiled.asm["ptx"], capability)
    return KernelUsage(registers, int(compiled.metadata.shared), spilled_bytes)


def _signature(kind: torch.dtype | str) -> str:
    return _POINTERS[kind] if isinstance(kind, torch.dtype) else kind.partition(":")[0]


def _assembled(ptx: str, capability: int) -> tuple[int, int]:
    """Registers and spilled bytes, as the assembler says them."""
    tool = "ptxas" if capability < 100 else "ptxas-blackwell"
    architecture = f"sm_{capability}" + ("a" if capability >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [str(_TOOLS / tool), "-v", f"-arch={architecture}", "-o", f"{path}.cubin"]
        done = subprocess.run(
            [*command, str(path)], capture_output=True, text=True, check=False, timeout=60
        )
    spills, registers = _SPILLS.search(done.stderr), _REGISTERS.search(done.stderr)
    if done.returncode != 0 or spills is None or registers is None:
        raise ResourceUsageError(f"{tool}: {done.stderr[-500:]}")
    return int(registers[1]), int(spills[1]) + int(spills[2])
