#!/usr/bin/env python3
"""Prints what ptxas says about each kernel as a Markdown table, and fails where one spills.

    python cuda/resource_table.py                              # all kernels, sm_80 and sm_90
    python cuda/resource_table.py --arch 86 cuda/kernels/norm.cu
    nvcc -Xptxas=-v ... 2>&1 | python cuda/resource_table.py --log -

The build itself stops at spills (cuda/CMakeLists.txt); this shows the numbers. Needs nvcc 12 or
newer, or a log of it, and c++filt for names that can be read.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMESPACES = re.compile(r"moerun::|cuda::|on_device::|\(anonymous namespace\)::|_GLOBAL__N__\w+::")


@dataclass
class Usage:
    """What one kernel uses on one architecture; bytes are those of a thread, shared of a block."""

    kernel: str
    architecture: str
    registers: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0  # stores and loads
    shared_bytes: int = 0


def parse(log):
    """The kernels in what `nvcc -Xptxas=-v` prints, by their mangled names."""
    usages = []
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            usages.append(Usage(found[1], found[2]))
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) \D+, (\d+) bytes spill", line):
            if usages:  # a function that was not inlined counts as a part of its kernel
                usages[-1].stack_bytes += int(found[1])
                usages[-1].spill_bytes += int(found[2]) + int(found[3])
        elif usages and (found := re.search(r"Used (\d+) registers", line)):
            usages[-1].registers = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            usages[-1].shared_bytes = int(shared[1]) if shared else 0
    return usages


def parse_threads(ptx):
    """Kernel -> the most threads of a block, for those that say so."""
    threads = {}
    for entry in re.split(r"\.entry\s+", ptx)[1:]:
        if bound := re.search(r"\.maxntid\s+(\d+)", entry.split("{")[0]):
            threads[re.match(r"\w+", entry)[0]] = int(bound[1])
    return threads


def readable(kernels):
    """Mangled name -> name without namespaces and parameters."""
    kernels = sorted(set(kernels))
    plain = kernels
    if kernels and (demangler := shutil.which("c++filt")):
        names = "\n".join(kernels)
        plain = subprocess.run(
            [demangler], input=names, stdout=subprocess.PIPE, text=True, check=True
        ).stdout.splitlines()
    return {mangled: shortened(name) for mangled, name in zip(kernels, plain, strict=True)}


def shortened(name):
    """compute_few<1u> of void moerun::cuda::...::compute_few<1u>(moerun::cuda::...)."""
    name = NAMESPACES.sub("", name).removeprefix("void ")
    depth = 0
    for position, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:position]
    return name


def table(usages, threads, names):
    """A row for each kernel; a figure for each architecture, or one where all are the same."""
    architectures = sorted({u.architecture for u in usages}, key=lambda a: (len(a), a))
    kernels = sorted({u.kernel for u in usages}, key=lambda k: (names[k], k))

    def row(kernel):
        of_each = [
            u for a in architectures for u in usages if (u.kernel, u.architecture) == (kernel, a)
        ]

        def figures(field):
            values = [getattr(u, field) for u in of_each]
            return " / ".join(map(str, values if len(set(values)) > 1 else values[:1]))

        registers = " / ".join(str(u.registers) for u in of_each)
        rest = [figures(f) for f in ("shared_bytes", "stack_bytes", "spill_bytes")]
        cells = [f"`{names[kernel]}`", str(threads.get(kernel, "")), registers, *rest]
        return f"| {' | '.join(cells)} |"

    head = (
        f"| kernel | threads | registers, {' / '.join(architectures)} | shared | stack | spills |"
    )
    return "\n".join([head, "|---" * 6 + "|", *map(row, kernels)])


def complaints(usages, names):
    """A line for each kernel that keeps in local memory what should be in registers."""
    return [
        f"{names[u.kernel]}, {u.architecture}: {u.spill_bytes} bytes of spill stores and loads, "
        f"{u.stack_bytes} bytes of stack; expected none"
        for u in usages
        if u.spill_bytes or u.stack_bytes
    ]


def compile_kernels(nvcc, sources, architectures):
    """What nvcc printed, and the PTX that it made."""
    log = ptx = ""
    for architecture in architectures:
        for source in sources:
            with tempfile.TemporaryDirectory() as folder:
                command = [nvcc, "-cubin", "-std=c++20", f"-arch=sm_{architecture}", "-Xptxas=-v"]
                command += [f"-I{ROOT / 'cpp'}", f"-I{ROOT / 'cuda'}", "--keep"]
                command += ["-DMOERUN_CUDA_SIDE=on_device", "--keep-dir", folder]
                command += ["-o", f"{folder}/out.cubin", str(source)]
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
                if done.returncode:
                    sys.exit(f"{' '.join(command)}\n{done.stdout}\nfailed")
                log += done.stdout
                ptx += "".join(p.read_text() for p in Path(folder).glob("*.ptx"))
    return log, ptx


def main(arguments=None):
    """Returns the exit status: 1 where a kernel spills."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="*", type=Path, help="default: cuda/kernels/*.cu")
    parser.add_argument("--arch", nargs="+", default=["80", "90"], help="default: 80 90")
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--log", type=argparse.FileType(), help="read this instead of compiling")
    options = parser.parse_args(arguments)
    if options.log:
        log, ptx = options.log.read(), ""
    elif shutil.which(options.nvcc):
        sources = options.sources or sorted((ROOT / "cuda" / "kernels").glob("*.cu"))
        log, ptx = compile_kernels(options.nvcc, sources, options.arch)
    else:
        parser.error(f"{options.nvcc} was not found; give its path with --nvcc")
    usages = parse(log)
    if not usages:
        parser.error("expected lines of ptxas about kernels, found none; was -Xptxas=-v given?")
    names = readable(u.kernel for u in usages)
    print(table(usages, parse_threads(ptx), names))
    wrong = complaints(usages, names)
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
