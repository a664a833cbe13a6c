"""What a compiled kernel's machine code tells by itself: which uniform registers it reads before anything set them.

ptxas 12.8 loses the base of some matrix descriptors, so that a kernel which is right in PTX multiplies by whatever
lies at an address that nobody computed. A GPU shows it, and so does the disassembly.
"""

import re
import subprocess
import tempfile

from triton import knobs

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)\s*(.*?)\s*;")
UNIFORM = re.compile(r"\bUR(\d+)\b")
DESCRIPTORS = re.compile(r"gdesc\[UR(\d+)\]")


def unset_registers(cubin: bytes) -> dict[int, str]:
    """Number of each such register -> the first instruction that reads it. Branches are not followed: what stands
    above counts as having run."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[int, str] = {}
    known: set[int] = set()
    for operation, operands in INSTRUCTION.findall(text):
        first, _, others = operands.partition(",")
        sets = operation.startswith(("U", "R2UR", "S2UR")) and (target := UNIFORM.fullmatch(first.strip()))
        read = others if sets else operands
        registers = {int(n) for n in UNIFORM.findall(DESCRIPTORS.sub("", read))}
        for start in map(int, DESCRIPTORS.findall(read)):
            of_a = not re.match(r"R\d+, R\d+,", operands)  # else only B lies in shared memory
            registers.update(range(start if of_a else start + 2, start + 4))
        for register in registers - known:
            found.setdefault(register, f"{operation} {operands}")
        if sets:
            start = int(target.group(1))
            known.update(range(start, start + (2 if ".64" in operation or "WIDE" in operation else 1)))
    return found
