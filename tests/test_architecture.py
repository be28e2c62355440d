"""Who imports whom: rooms only from rooms below, no circles, and no toy world in the rooms of the paper."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ldm_edu"

# A module may import from its own room and from rooms with a smaller number; docs/design.md has the same as a table.
LEVELS = {
    "errors": 0,
    "start": 0,
    "files": 1,
    "checks": 1,
    "layers": 2,
    "devices": 2,
    "checkpoints": 2,
    "measurements": 2,
    "basics": 3,
    "settings": 4,
    "display": 5,
    "data": 6,
    "first_stage": 6,
    "diffusion": 6,
    "denoiser": 6,
    "conditioning": 7,
    "inputs": 7.5,
    "latent_diffusion": 8,
    "applications": 9,
    "evaluation": 9,
    "published": 9,
    "training": 10,
    "doctor": 10.5,
    "exercises": 2,
    "grading": 10.7,
    "cli": 11,
}
PAPER = ("first_stage", "diffusion", "denoiser", "conditioning", "latent_diffusion")


def modules() -> dict[str, Path]:
    """Every module but the front door and the rooms' doors, without `ldm_edu.`."""
    files = [p for p in PACKAGE.rglob("*.py") if not p.stem.startswith("_")]
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in files}


def targets(module: str, path: Path) -> set[str]:
    """What a module imports of ours, wherever it stands in the file; a name of a room's door is the door itself."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "ldm_edu"}
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:  # nbdev writes relative imports
                base = [*module.split(".")[: len(module.split(".")) - node.level], *base]
            elif base[:1] != ["ldm_edu"]:
                continue
            else:
                base = base[1:]
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in known else ".".join(base))
    return found


ARROWS = {name: targets(name, path) for name, path in modules().items()}


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_stands_in_a_known_room():
    assert len(ARROWS) >= 40 and sum(map(len, ARROWS.values())) >= 100
    assert {room(name) for name in ARROWS} == set(LEVELS)


@pytest.mark.parametrize("module", sorted(ARROWS))
def test_a_module_imports_only_from_below(module):
    for target in ARROWS[module]:
        assert target in ARROWS, f"{module} imports from the door of {target or 'the package'}: name the module instead"
        lower = LEVELS[room(target)] < LEVELS[room(module)]
        assert lower or room(target) == room(module), f"{module} imports {target}, which is not below it"


def test_there_is_no_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join([*path, module])}"
        if module not in done:
            for target in ARROWS[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in ARROWS:
        visit(module, ())


def test_the_paper_knows_no_toy_world():
    reached = {name: targets for name, targets in ARROWS.items() if room(name) in PAPER}
    assert len(reached) >= 12
    assert not [(name, t) for name, targets in reached.items() for t in targets if room(t) in ("data", "evaluation")]


def test_a_forbidden_import_would_be_seen(tmp_path):
    path = tmp_path / "new.py"
    path.write_text("def f():\n    from ..data.toy import scenes\n    import ldm_edu.cli\n", encoding="utf-8")
    assert targets("first_stage.new", path) == {"data.toy.scenes", "cli"}
