"""A Triton kernel compiled for a GPU that need not be there: its code, registers and spills.

Triton compiles for a `GPUTarget` on any machine, and its wheel brings NVIDIA's `ptxas` and `cuobjdump`. `ptxas -v`
tells registers and spills, the disassembly (SASS) the instructions.
"""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# One line of SASS: an address between comment marks, then the instruction, perhaps under a predicate.
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
TARGET = re.compile(r"0x([0-9a-f]+)")


@dataclass(frozen=True)
class Compiled:
    """What a warp executes and what it needs."""

    code: list[tuple[int, str, str]]  # (address, operation, operands) of every instruction
    registers: int  # of a thread
    spill_bytes: int  # stores and loads together
    shared_bytes: int  # of a program


def compiled_for(kernel, signature: dict, constants: dict, options: dict, capability: int) -> Compiled:
    """Compile a `triton.jit` function for sm_<capability>.

    signature: every parameter's Triton type, "constexpr" for those in `constants`; integers that a launch would find
    divisible by 16 may be written "i32:16" or "i64:16", pointers aligned to 16 bytes "*fp32:16".
    options: `num_warps` and the like.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.endswith(":16")
    }
    source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spills = _registers(compiled.asm["ptx"])
    return Compiled(_disassemble(compiled.asm["cubin"]), registers, spills, compiled.metadata.shared)


def backward_branches(code: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """Return the loops of a code, each as the places of its first instruction and of the branch back to it."""
    places = {address: place for place, (address, _, _) in enumerate(code)}
    return [
        (places[int(target[1], 16)], place)
        for place, (address, name, operands) in enumerate(code)
        if name.split(".")[0] == "BRA" and (target := TARGET.search(operands)) and int(target[1], 16) < address
    ]


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _registers(ptx: str) -> tuple[int, int]:
    """Registers a thread and bytes spilled, from `ptxas -v`."""
    architecture = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [_tool("ptxas"), "-v", f"--gpu-name={architecture}", file.name, "-o", os.devnull]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = sum(int(count) for count in re.findall(r"(\d+) bytes spill", log))
    return int(re.search(r"Used (\d+) registers", log).group(1)), spills


def _disassemble(cubin: bytes) -> list[tuple[int, str, str]]:
    """(address, operation, operands) of every instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([_tool("cuobjdump"), "-sass", file.name], check=True, capture_output=True, text=True)
    matches = (INSTRUCTION.match(line) for line in text.stdout.splitlines())
    return [(int(match[1], 16), match[2], match[3]) for match in matches if match]
