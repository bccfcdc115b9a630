"""Includes go the way the table in section 3 of docs/DESIGN.md says, and no other."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE_SUFFIXES = {".h", ".cc", ".cu", ".cuh"}


def allowed_arrows():
    """The table's rows: folder -> the folders it may include from."""
    text = (ROOT / "docs" / "DESIGN.md").read_text()
    section = text.split("\n## 3.")[1].split("\n## ")[0]
    arrows = {}
    for row in re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", section, re.MULTILINE):
        folder, may_use = row
        arrows[folder] = {folder} | set(re.findall(r"\w+", may_use))
    return arrows


def source_files(*folders):
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SOURCE_SUFFIXES:
                yield path


def includes(path, pattern):
    """Pairs of line number and what the pattern finds in each include line."""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if found := re.match(rf"\s*#\s*include\s*{pattern}", line):
            yield number, found[1]


ARROWS = allowed_arrows()


def test_the_table_is_read():
    assert ARROWS["base"] == {"base"}
    assert ARROWS["weights"] == {"weights", "io", "device", "base"}
    assert all(used <= ARROWS.keys() for used in ARROWS.values())


def test_the_table_has_no_cycle():
    def reachable(folder):
        direct = ARROWS[folder] - {folder}
        return direct | {f for used in direct for f in reachable(used)}

    assert not [folder for folder in ARROWS if folder in reachable(folder)]


@pytest.mark.parametrize("folder", sorted(p.name for p in (ROOT / "cpp").iterdir() if p.is_dir()))
def test_a_folder_includes_only_what_the_table_allows(folder):
    assert folder in ARROWS, f"cpp/{folder} has no row in the table"
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {included}"
        for path in source_files(f"cpp/{folder}")
        for number, included in includes(path, r'"([^"]+)"')
        if "/" in included and included.split("/")[0] not in ARROWS[folder]
    ]
    assert not wrong, f"cpp/{folder} may use {sorted(ARROWS[folder])} only:\n" + "\n".join(wrong)


def test_cuda_includes_device_and_base_only():
    allowed = {"device", "base", "runtime", "kernels", "host"}
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {included}"
        for path in source_files("cuda")
        for number, included in includes(path, r'"([^"]+)"')
        if "/" in included and included.split("/")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_only_cuda_includes_the_cuda_headers():
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {included}"
        for path in source_files("cpp", "python", "tests")
        for number, included in includes(path, r'[<"](cuda[^/>"]*\.h|cuda/[^>"]*|cub/[^>"]*)[>"]')
    ]
    assert not wrong, "\n".join(wrong)


def test_every_included_file_of_the_project_exists():
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {included}"
        for path in source_files("cpp")
        for number, included in includes(path, r'"([^"]+)"')
        if not (ROOT / "cpp" / included).exists() and not (path.parent / included).exists()
    ]
    assert not wrong, "\n".join(wrong)
