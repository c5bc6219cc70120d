"""What a Triton kernel costs, read from its compiled code; no GPU is needed.

`ptxas -v` tells registers and spills (compiled.py); the disassembly (SASS) tells how many instructions the steady-state
loop holds, which for a kernel bound by instructions is its speed. What comes before the loop (prologue) and after it
(epilogue: the steps that do not fill a chunk, the last state) is counted apart: it is paid once a program, not once a
step.
"""

from collections import Counter
from dataclasses import dataclass

from .compiled import backward_branches, compiled_for


@dataclass(frozen=True)
class StaticCost:
    """Instructions of one warp's code, static: each counted once, whichever way the branches go."""

    loop: int
    prologue: int
    epilogue: int
    registers: int  # of a thread
    spill_bytes: int  # stores and loads together
    shared_bytes: int  # of a program
    opcodes: dict[str, int]  # of the loop, without modifiers

    def per(self, steps: int, channels: int) -> float:
        """Instructions of the loop per time step and channel, where a warp's pass covers `steps` x `channels`."""
        return self.loop / (steps * channels)


def static_cost(kernel, signature: dict, constants: dict, options: dict, capability: int) -> StaticCost:
    """Compile a `triton.jit` function for sm_<capability> and read its cost; arguments as ``compiled_for``."""
    compiled = compiled_for(kernel, signature, constants, options, capability)
    loop, prologue, epilogue, opcodes = _loop(compiled.code)
    return StaticCost(
        loop, prologue, epilogue, compiled.registers, compiled.spill_bytes, compiled.shared_bytes, opcodes
    )


def _loop(code: list[tuple[int, str, str]]) -> tuple[int, int, int, dict[str, int]]:
    """Lengths of the longest loop, of what precedes and what follows it, and the loop's operations."""
    # After the last EXIT or RET stands a branch to itself and padding.
    final = max(place for place, (_, name, _) in enumerate(code) if name.split(".")[0] in ("EXIT", "RET"))
    spans = [span for span in backward_branches(code) if span[1] <= final]
    first, last = max(spans, key=lambda span: span[1] - span[0], default=(0, -1))
    body = Counter(name.split(".")[0] for _, name, _ in code[first : last + 1])
    return last + 1 - first, first, final - last, dict(body.most_common())
