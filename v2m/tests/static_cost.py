"""What a Triton kernel costs, read from its compiled code; no GPU is needed.

Triton compiles for a `GPUTarget` on any machine, and its wheel brings NVIDIA's `ptxas` and `cuobjdump`. `ptxas -v`
tells registers and spills; the disassembly (SASS) tells how many instructions the steady-state loop holds, the one over
the chunks of a line, which for a kernel bound by instructions is its speed. What is paid once a line (the loop over the
lines around it: the steps that do not fill a chunk, the next line's addresses) and once a program is counted apart.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# One line of SASS: an address between comment marks, then the instruction, perhaps under a predicate.
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
TARGET = re.compile(r"0x([0-9a-f]+)")


@dataclass(frozen=True)
class StaticCost:
    """Instructions of one warp's code, static: each counted once, whichever way the branches go."""

    loop: int  # over the chunks of a line
    line: int  # of the loop around it, without it
    program: int  # of all else
    registers: int  # of a thread
    spill_bytes: int  # stores and loads together
    shared_bytes: int  # of a program
    opcodes: dict[str, int]  # of the loop, without modifiers

    def per(self, steps: int, channels: int) -> float:
        """Instructions of the loop per time step and channel, where a warp's pass covers `steps` x `channels`."""
        return self.loop / (steps * channels)

    def per_line(self, steps: int, channels: int, length: int) -> float:
        """As ``per``, of whole lines, each with its share of what is paid once a line; all shorter chunks count."""
        return (length // steps * self.loop + self.line) / (length * channels)


def static_cost(kernel, signature: dict, constants: dict, options: dict, capability: int) -> StaticCost:
    """Compile a `triton.jit` function for sm_<capability> and read its cost.

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
    loop, line, program, opcodes = _loops(_disassemble(compiled.asm["cubin"]))
    return StaticCost(loop, line, program, registers, spills, compiled.metadata.shared, opcodes)


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
        text = subprocess.run(
            [_tool("cuobjdump"), "-sass", file.name], check=True, capture_output=True, text=True
        )
    found = (INSTRUCTION.match(line) for line in text.stdout.splitlines())
    return [(int(match[1], 16), match[2], match[3]) for match in found if match]


def _loops(code: list[tuple[int, str, str]]) -> tuple[int, int, int, dict[str, int]]:
    """Return the lengths of the longest innermost loop, of the rest of the loop around it and of all else.

    And how often each operation occurs in the innermost one.
    """
    # After the last EXIT or RET, or a branch back, stands a branch to itself and padding.
    final = max(place for place, (_, name, _) in enumerate(code) if name.split(".")[0] in ("EXIT", "RET"))
    places = {address: place for place, (address, _, _) in enumerate(code)}
    spans = {
        (places[int(target[1], 16)], place)
        for place, (address, name, operands) in enumerate(code)
        if name.split(".")[0] == "BRA"
        and (target := TARGET.search(operands))
        and int(target[1], 16) < address
    }

    final = max([final, *(last for _, last in spans)])

    def within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
        return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]

    innermost = [span for span in spans if not any(within(other, span) for other in spans)]
    first, last = max(innermost, key=lambda span: span[1] - span[0], default=(0, -1))
    around = [span for span in spans if within((first, last), span)]
    begin, end = max(around, key=lambda span: span[1] - span[0], default=(first, last))
    body = Counter(name.split(".")[0] for _, name, _ in code[first : last + 1])
    loop, whole = last + 1 - first, end + 1 - begin
    return loop, whole - loop, final + 1 - whole, dict(body.most_common())
