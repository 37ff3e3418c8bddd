"""Dependencies point one way: an import may only go to a lower layer or stay in its own room."""

import ast
import graphlib
import re
from collections import Counter
from pathlib import Path

import sslkit

ROOT = Path(sslkit.__file__).parent
LAYERS = {
    "text": 0,
    "random_draws": 0,
    "exit_codes": 0,
    "command_line": 1,
    "errors": 1,
    "terminal": 2,
    "progress": 3,
    "files": 3,
    "hub": 3,
    "distributed": 3,
    "watch": 4,
    "parts": 4,
    "methods": 5,
    "data": 5,
    "evaluate": 6,
    "recipe": 7,
    "publish": 8,
    "engine": 9,
    "doctor": 10,
    "profiling": 10,
    "cluster": 10,
    "plan": 11,
    "report": 11,
    "adapt": 11,
    "python_api": 12,
    "cli": 13,
    "pretrain": 14,
    "__main__": 14,
    "__init__": 14,
}


def imports_of(file: Path) -> list[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = [
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    ]
    found = []
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sslkit"):
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "sslkit" else [node.module]
            )
            found += names
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("sslkit.")]
    return found


def calls_of(text: str, function: str) -> list[ast.Call]:
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) == function]


def room(module: str) -> str:
    return module.split(".")[1]


def test_imports_go_down_only() -> None:
    upward = []
    for file in ROOT.rglob("*.py"):
        own = file.relative_to(ROOT).parts[0].removesuffix(".py")
        for target in map(room, imports_of(file)):
            if target != own and LAYERS[target] >= LAYERS[own]:
                upward.append(f"{file.relative_to(ROOT)} imports sslkit.{target}")
    assert not upward, upward


def children_that_import_each_other(folder: Path) -> str:
    """A cycle among a folder's files and subfolders, each subfolder taken as one; empty if there is none."""
    own = ".".join(("sslkit", *folder.relative_to(ROOT).parts))
    imports: dict[str, set[str]] = {}
    for file in folder.rglob("*.py"):
        child = file.relative_to(folder).parts[0].removesuffix(".py")
        if child == "__init__":  # it offers the room's functions to others
            continue
        local = [target.removeprefix(f"{own}.") for target in imports_of(file) if target.startswith(own)]
        targets = {target.split(".")[0] for target in local}
        imports.setdefault(child, set()).update(targets - {child})
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return " imports ".join(reversed(error.args[1]))
    return ""


def test_imports_inside_rooms_have_one_direction() -> None:
    folders = [folder.parent for folder in ROOT.rglob("__init__.py")]
    cycles = {str(folder): found for folder in folders if (found := children_that_import_each_other(folder))}
    assert not cycles, cycles


def test_rooms_have_a_dozen_files_and_no_two_files_one_name() -> None:
    files = [file for file in ROOT.rglob("*.py") if file.name != "__init__.py"]
    names = Counter(file.name for file in files)
    assert not [name for name, count in names.items() if count > 1]
    crowded = {str(folder): count for folder, count in Counter(file.parent for file in files).items() if count > 13}
    assert not crowded, crowded


def test_accelerate_stays_in_the_engine_and_pickle_nowhere() -> None:
    for file in ROOT.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if file.relative_to(ROOT).as_posix() == "publish/detectron2.py":  # it writes the one file that must be one
            assert not re.search(r"pickle\.loads?\b|Unpickler", text)
            text = re.sub(r"pickle\.Pickler|import pickle|is a pickle", "", text)
        if (
            file.relative_to(ROOT).as_posix() == "publish/importing/pickle_opcodes.py"
        ):  # it checks opcodes and runs none
            assert {ast.unparse(call.func) for call in calls_of(text, "pickletools.genops")} == {"pickletools.genops"}
            assert not re.search(r"pickle\.loads?\b|import pickle\b|Unpickler", text)
            text = re.sub(r"pickle", "", text)
        text = re.sub(r"^from .*pickle_opcodes import .*$", "", text, flags=re.MULTILINE)
        assert "pickle" not in text.replace("no pickle", "").replace("No pickle", "").replace("not a pickle", ""), file
        if (
            file.relative_to(ROOT).as_posix() == "publish/importing/convert.py"
        ):  # it reads others' checkpoints, as weights only
            assert [ast.unparse(call) for call in calls_of(text, "torch.load")] == [
                "torch.load(file, map_location='cpu', weights_only=True)"
            ]
            text = text.replace("torch.load(file, ", "")
        assert "torch.load" not in text, file
        if "engine" not in file.parts:
            assert "import accelerate" not in text, file
            assert "from accelerate" not in text, file


def test_files_and_functions_stay_short() -> None:
    for file in ROOT.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{file}: {node.name}"


def test_no_function_has_more_than_eight_parameters() -> None:
    many = []
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names = [each.arg for each in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
                if len(set(names) - {"self", "cls"}) > 8:
                    many.append(f"{file.relative_to(ROOT)}: {node.name}")
    assert not many, many
