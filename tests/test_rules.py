"""Rules of the code that no linter knows."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

import tpray
from tpray.artifacts.key import SHAPING_CODE, code_digest
from tpray.commands.cli import app

ROOT = Path(tpray.__file__).parent
MODULES = sorted(path for path in ROOT.rglob("*.py") if "demo" not in path.parts)


def names_of_os(path: Path) -> set[str]:
    """What a module takes from `os`."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    taken = {
        n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "os"
    }
    return taken | {a.name for n in nodes if isinstance(n, ast.ImportFrom) and n.module == "os" for a in n.names}


def test_only_config_reads_the_environment() -> None:
    readers = [path.name for path in MODULES if names_of_os(path) & {"environ", "getenv", "putenv", "environb"}]
    assert readers == ["config.py"]


def test_loggers_have_the_names_of_their_modules() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("logging.getLogger("):
                assert ast.unparse(node.value) in ("logging.getLogger(__name__)", "logging.getLogger()"), path


def test_modules_are_short() -> None:
    lengths = sorted((len(path.read_text().splitlines()), path.name) for path in MODULES if path.name != "__init__.py")
    assert not [name for length, name in lengths if length > 400]
    assert lengths[len(lengths) // 2][0] < 170


@pytest.mark.parametrize("package", SHAPING_CODE)
def test_all_code_that_shapes_a_program_is_in_the_cache_key(package: str, tmp_path: Path) -> None:
    """Nested modules too: a changed pass must not meet an old artifact."""
    for path in (path for path in MODULES if path.relative_to(ROOT).parts[0] in SHAPING_CODE):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    assert code_digest.__wrapped__(tmp_path) == code_digest()
    for path in sorted((tmp_path / package).rglob("*.py")):
        before = path.read_text()
        path.write_text(before + "# changed")
        assert code_digest.__wrapped__(tmp_path) != code_digest(), path
        path.write_text(before)


def test_the_readme_names_every_flag() -> None:
    readme = (ROOT.parent / "README.md").read_text()
    commands = get_command(app)
    assert isinstance(commands, TyperGroup)
    flags = {flag for command in commands.commands.values() for option in command.params for flag in option.opts}
    named = set(re.findall(r"--[a-z][a-z-]*", readme))
    assert sorted(flag for flag in flags - named if flag.startswith("--")) == []


PRIVATE = re.compile(r"ray(\.\w+)*\.(_[a-z]|core\.generated|experimental)")


def private_names(path: Path) -> set[str]:
    """Ray's private names in a module: imported, reached through ``ray`` or ``serve``, as text, or as arguments."""
    tree, found = ast.parse(path.read_text()), set()
    docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    knows_ray = re.search(r"^\s*(from|import) ray\b", path.read_text(), re.MULTILINE) is not None
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if PRIVATE.match(alias.name)}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {name for a in node.names if PRIVATE.match(name := f"{node.module}.{a.name}")}
        elif isinstance(node, ast.Attribute) and PRIVATE.match(f"ray.{ast.unparse(node)}".replace("ray.ray.", "ray.")):
            if ast.unparse(node).startswith(("ray.", "serve.")):
                found.add(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found |= {node.value} if PRIVATE.match(node.value) else set()
        elif isinstance(node, ast.keyword) and knows_ray and (node.arg or "").startswith("_"):
            found.add(f"{node.arg}=")
    return found


def test_only_one_module_knows_what_is_private_to_ray() -> None:
    """And a test of each of these names holds it against Ray: `tests/test_ray_private.py`."""
    assert {str(path.relative_to(ROOT)): names for path in MODULES if (names := private_names(path))}.keys() == {
        "ray_private.py"
    }


@pytest.mark.parametrize(
    "line",
    [
        "from ray._private import services",
        "import ray._raylet",
        "from ray.serve._private.constants import X",
        "from ray.experimental.internal_kv import get",
        "import ray\nray._private.worker",
        "from ray import serve\nserve.context._disconnect()",
        "import ray\nray.init(_node_ip_address='127.0.0.1')",
        "setattr_of('ray.serve._private.replica')",
    ],
)
def test_what_is_private_to_ray_is_noticed(line: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(line)
    assert private_names(tmp_path / "module.py")


def test_each_file_of_deployments_is_named_by_a_test() -> None:
    """A test that reads or runs a file names it: its name is the end of a string in a module of tests.

    ``"inf2.yaml"``, ``"deployments/constraints.txt"``; a docstring that mentions a file does not count. Serve config
    files, which one test takes all together, need no names.
    """
    from tests.serving.test_deployments import FILES

    tests = Path(__file__).parent
    strings: set[str] = set()
    for module in tests.rglob("*.py"):
        nodes = (node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Constant))
        strings |= {node.value.rpartition("/")[2] for node in nodes if isinstance(node.value, str)}
    files = {path for path in (tests.parent / "deployments").rglob("*") if path.is_file()} - {*FILES}
    assert files
    assert sorted(str(path) for path in files if path.name not in strings) == []
