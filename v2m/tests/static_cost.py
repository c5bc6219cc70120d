"""What a Triton kernel costs, read from its compiled code; no GPU is needed.

`ptxas -v` tells registers and spills (compiled.py); the disassembly (SASS) tells how many instructions the steady-state
loop holds, the one over the chunks of a line, which for a kernel bound by instructions is its speed. What is paid once
a line (the loop over the lines around it: the steps that do not fill a chunk, the next line's addresses) and once a
program is counted apart.
"""

from collections import Counter
from dataclasses import dataclass

from .compiled import backward_branches, compiled_for


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
    """Compile a `triton.jit` function for sm_<capability> and read its cost; arguments as ``compiled_for``."""
    compiled = compiled_for(kernel, signature, constants, options, capability)
    loop, line, program, opcodes = _loops(compiled.code)
    return StaticCost(loop, line, program, compiled.registers, compiled.spill_bytes, compiled.shared_bytes, opcodes)


def _loops(code: list[tuple[int, str, str]]) -> tuple[int, int, int, dict[str, int]]:
    """Return the lengths of the longest innermost loop, of the rest of the loop around it and of all else.

    And how often each operation occurs in the innermost one.
    """
    # After the last EXIT or RET, or a branch back, stands a branch to itself and padding.
    final = max(place for place, (_, name, _) in enumerate(code) if name.split(".")[0] in ("EXIT", "RET"))
    spans = set(backward_branches(code))
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
