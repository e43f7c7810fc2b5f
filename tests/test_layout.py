"""Layers: each module and package imports only those before it. Functions and files are short."""

import ast
import importlib.resources
from collections.abc import Collection, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import wuerstchen

ROOT = Path(wuerstchen.__file__).parent
ORDER = [
    {"terminal", "progress_bar"},
    {"errors", "defaults", "version"},
    {"device", "edit_options"},
    {"colour_profiles"},
    {"png_text"},
    {"images"},
    {"masks"},
    {"image_files"},
    {"diffusion"},
    {"sampling"},
    {"models"},
    {"checkpoints"},
    {"runtime"},
    {"lora_layers"},
    {"lora", "progress"},
    {"adapters"},
    {"edits", "prompt_weights"},
    {"sampling_batch"},
    {"reconstruction", "morphs"},
    {"pipeline"},
    {"diffusers"},
    {"data"},
    {"evaluate"},
    {"train"},
    {"recipes"},
    {"doctor"},
    {"serve"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL = {layer: level for level, layers in enumerate(ORDER) for layer in layers}
FILES = sorted(ROOT.rglob("*.py"))


def layer_of(parts: tuple[str, ...]) -> str:
    return Path(parts[0]).stem


def imports(path: Path) -> set[str]:
    """Rooms that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("wuerstchen."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "wuerstchen":
            found |= {alias.name for alias in node.names if alias.name in LEVEL}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("wuerstchen.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = layer_of(path.relative_to(ROOT).parts)
    for other in imports(path):
        assert other == own or LEVEL[other] < LEVEL[own], f"{own} may not import {other}"
    text = path.read_text(encoding="utf-8")
    assert "import diffusers" not in text
    assert "from diffusers" not in text


def module_of(path: Path) -> str:
    parts = ("wuerstchen", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def run_by_python(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        return
    yield tree
    for child in ast.iter_child_nodes(tree):
        yield from run_by_python(child)


def imported_among(tree: ast.AST, known: Collection[str]) -> set[str]:
    """Which of ``known`` modules a file imports by name, inside functions too.

    The packages that a module lies in are not counted, though Python runs them first, nor what is imported
    for type checkers alone: the table of stages names the types of what it finds.
    """
    found = set()
    for node in run_by_python(tree):
        if isinstance(node, ast.ImportFrom) and node.module in known:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & set(known)) | ({node.module} if inner - set(known) else set())
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & set(known)
    return found


def cycle_among(imported: Mapping[str, set[str]]) -> tuple[str, ...]:
    """Modules that import each other in a circle; empty if there is no circle."""
    try:
        tuple(TopologicalSorter(imported).static_order())
    except CycleError as error:
        return tuple(error.args[1])
    return ()


def test_no_modules_import_each_other():
    """Imports inside functions hide a circle from Python, not from who reads the code."""
    known = {module_of(path) for path in FILES}
    trees = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    assert cycle_among({name: imported_among(tree, known) for name, tree in trees.items()}) == ()


def test_a_circle_is_found():
    code = {
        "a": "from wuerstchen.b import run",
        "b": "def run():\n    from wuerstchen import c",
        "c": "import wuerstchen.a",
    }
    known = {f"wuerstchen.{name}" for name in code} | {"wuerstchen"}
    imported = {f"wuerstchen.{n}": imported_among(ast.parse(text), known) for n, text in code.items()}
    assert set(cycle_among(imported)) == {"wuerstchen.a", "wuerstchen.b", "wuerstchen.c"}
    assert cycle_among({**imported, "wuerstchen.c": set()}) == ()


def imports_triton(tree: ast.AST) -> bool:
    """Whether a file imports Triton, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "triton":
            return True
        if isinstance(node, ast.Import) and any(a.name.partition(".")[0] == "triton" for a in node.names):
            return True
    return False


def test_kernels_are_in_their_folder():
    """Nothing else needs Triton to be imported."""
    users = [path for path in FILES if imports_triton(ast.parse(path.read_text(encoding="utf-8")))]
    assert users
    assert {path.relative_to(ROOT).parent.as_posix() for path in users} == {"models/fused"}


@pytest.mark.parametrize(
    "code",
    [
        "import triton",
        "import torch, triton.language as tl",
        "def f():\n    from triton.language import math",
    ],
)
def test_an_import_of_triton_is_found(code):
    assert imports_triton(ast.parse(code))
    assert not imports_triton(ast.parse(code.replace("triton", "tritone")))


# What each folder of train/ may import of train/. Other modules of it may import all that comes before run.
INSIDE_TRAIN = {
    "report": {"report"},
    "feed": {"feed", "config"},
    "stages": {"stages", "feed", "config", "decoder_kinds", "initial_weights", "precision"},
    "engine": {"engine", "feed", "report", "config", "stages.base"},
}
LOWEST_OF_TRAIN = {
    "config",
    "config_fields",
    "config_lora",
    "config_stages",
    "decoder_kinds",
    "initial_weights",
    "precision",
    "recorded_recipe",
    "stage_table",
}


def train_imports(path: Path) -> set[str]:
    """The modules of train/ that a file imports, as ``stages.base``; not for type checkers alone."""
    found = set()
    for node in run_by_python(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("wuerstchen.train"):
            module = node.module.removeprefix("wuerstchen.train").strip(".")
            names = [alias.name for alias in node.names]
            folder = (ROOT / "train" / module.replace(".", "/")).is_dir()
            found.update(f"{module}.{name}".strip(".") for name in names if folder)
            found.update([] if folder else [module])
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "train").rglob("*.py")), ids=lambda p: str(p.name))
def test_imports_inside_train_go_one_way(path):
    """Stages do not know the engine, the engine knows no stage, and nothing below imports the run."""
    parts = path.relative_to(ROOT / "train").with_suffix("").parts
    for module in train_imports(path):
        if len(parts) > 1:
            allowed = INSIDE_TRAIN[parts[0]]
            assert module in allowed or module.partition(".")[0] in allowed, f"{parts[0]} imports {module}"
        elif parts[0] in LOWEST_OF_TRAIN:
            assert "." not in module, f"{parts[0]} imports {module}"
        else:
            assert module != "run" or parts[0] == "export", f"{parts[0]} imports {module}"


DIFFUSION = {"wuerstchen.diffusion", *(module_of(path) for path in (ROOT / "diffusion").glob("*.py"))}
NETWORKS = sorted((ROOT / "models").rglob("*.py"))


@pytest.mark.parametrize("path", NETWORKS, ids=lambda p: p.stem)
def test_networks_know_no_schedule(path):
    """They return their own prediction, and the objective converts it. Only a whole model has objectives."""
    of_a_model = {f"wuerstchen.diffusion.{name}" for name in ("objective", "sampler_table")}
    allowed = of_a_model if path == ROOT / "models" / "cascade.py" else set()
    assert imported_among(ast.parse(path.read_text(encoding="utf-8")), DIFFUSION) <= allowed


@pytest.mark.parametrize(
    "code",
    [
        "from wuerstchen.diffusion.schedule import CosineSchedule",
        "from wuerstchen.diffusion import flow",
        "def f():\n    import wuerstchen.diffusion.objective",
    ],
)
def test_a_network_that_imports_a_schedule_is_found(code):
    assert imported_among(ast.parse(code), DIFFUSION)


def block_classes() -> set[str]:
    """The classes of blocks in models/."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in NETWORKS]
    classes = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    return {name for name in classes if name.endswith("Block")}


def imported_names(tree: ast.AST) -> set[str]:
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    return {alias.name for node in nodes for alias in node.names}


def test_block_classes_are_named_in_models_alone():
    """Training, sharding and compiling read a block's traits, and have no lists of classes to keep."""
    blocks = block_classes()
    assert {"ResBlock", "ConditionedResBlock", "TimestepBlock", "AttnBlock", "MixingResidualBlock"} <= blocks
    for path in FILES:
        if path not in NETWORKS:
            names = imported_names(ast.parse(path.read_text(encoding="utf-8")))
            assert not names & blocks, path


def test_every_layer_is_in_the_order():
    assert {layer_of(path.relative_to(ROOT).parts) for path in FILES} <= LEVEL.keys()


def test_type_checkers_read_the_annotations():
    """Without this file they take the installed package for untyped."""
    assert importlib.resources.files("wuerstchen").joinpath("py.typed").is_file()


# What each makes a tensor of, and whether its dtype follows torch's default too.
FACTORIES = {
    **dict.fromkeys(("zeros", "ones", "empty", "full", "rand", "randn", "linspace", "eye", "tensor"), True),
    **dict.fromkeys(("arange", "randint", "randperm", "as_tensor", "Generator"), False),
}


def unplaced_tensors(tree: ast.AST) -> list[str]:
    """Calls that make a tensor in torch's default dtype or on its default device.

    Parameters and buffers of networks are left out: they follow the defaults as those of torch's own layers
    do, and networks are built in a place of their own.
    """
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            if name in ("Parameter", "register_buffer"):
                return
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and name in FACTORIES:
                needed = {"device", "dtype"} if FACTORIES[name] else {"device"}
                given = {keyword.arg for keyword in node.keywords}
                if name == "Generator" and node.args:
                    given.add("device")
                if needed - given and "pin_memory" not in given:
                    found.append(
                        f"line {node.lineno}: torch.{name} without {', '.join(sorted(needed - given))}"
                    )
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_tensors_do_not_depend_on_torch_s_defaults(path):
    """The same seed draws the same image whatever default dtype and device a caller has set."""
    assert not unplaced_tensors(ast.parse(path.read_text(encoding="utf-8")))


def test_functions_and_files_are_short():
    long = []
    for path in (
        file
        for folder in ("src", "benchmarks")
        for file in (Path(__file__).parents[1] / folder).rglob("*.py")
    ):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 450:
            long.append(f"{path.name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 80:
                    long.append(f"{path.name}, {node.name}: {lines} lines")
    assert not long
