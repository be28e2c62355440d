"""The repository keeps its promises: its files agree, and the notebooks are the source of the package."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
PACKAGE = ROOT / "ldm_edu"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BY_HAND = set(PYPROJECT["tool"]["ldm_edu"]["by_hand"])  # modules that no notebook exports, as paths below ldm_edu/


def found(files: Iterable[Path], least: int) -> list[Path]:
    """The files, sorted; fails where there are fewer than `least`, so that no check over files passes on nothing."""
    files = sorted(files)
    assert len(files) >= least, f"only {len(files)} files found, at least {least} were expected: did a folder move?"
    return files


def visible(path: Path) -> bool:
    """Neither a cache nor a checkpoint of an editor."""
    return not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(ROOT).parts)


INDEX = NBS / "index.ipynb"
PAGES = found((p for p in NBS.rglob("*.ipynb") if visible(p) and "exercises" not in p.relative_to(NBS).parts), 25)
LESSONS = [path for path in PAGES if path != INDEX]
MODULES = found((p for p in PACKAGE.rglob("*.py") if visible(p) and p.name != "_modidx.py"), 25)


def read(path: Path) -> list[dict]:
    """The cells of a notebook, the source of each as one string."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def code(path: Path) -> list[dict]:
    """The code cells of a notebook."""
    return [cell for cell in read(path) if cell["cell_type"] == "code"]


# --- The files that say what is installed ---


def requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    lines = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    return [r for r in map(Requirement, lines) if canonicalize_name(r.name) != "ldm-edu"]


def pins() -> dict[str, str]:
    """Name to version, from constraints.txt; every line of it must be an exact pin."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!-]+", line) for line in lines), "constraints.txt: only NAME==VERSION"
    names = [canonicalize_name(line.split("==")[0]) for line in lines]
    assert len(set(names)) == len(names), "constraints.txt names a package twice"
    return dict(zip(names, (line.split("==")[1] for line in lines)))


def test_constraints_pin_every_requirement_within_its_bounds():
    pinned = pins()
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert pinned[name] in requirement.specifier, (
            f"constraints.txt has {name} {pinned[name]}, against {requirement}"
        )


def test_constraints_hold_on_every_system():
    linux_only = [name for name in pins() if re.match(r"(nvidia|cuda)-|triton$", name)]
    assert not linux_only, "torch pins these itself, and no other system has them"


def test_every_requirement_has_a_lower_bound():
    assert not [str(r) for r in requirements() if not any(s.operator in (">=", "~=") for s in r.specifier)]


def test_python_versions_agree():
    least = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + least.replace(".", "")
    assert f"python={least}\n" in (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert str(tuple(map(int, least.split(".")))) in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_conda_installs_what_pip_installs():
    lines = [line.strip() for line in (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines()]
    assert "- -c constraints.txt" in lines and "- -e .[dev]" in lines


def test_citation_and_package_agree():
    from ldm_edu import __version__

    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in text
    assert f"\nlicense: {PYPROJECT['project']['license']}\n" in text


# --- The documents ---


def links(text: str) -> list[str]:
    """Where the links and pictures of a text in Markdown lead, without those to the outside."""
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)  # code is not a link
    found = re.findall(r"\]\(([^)\s]+?)(?:\s+\"[^\"]*\")?\)", text)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(text: str) -> set[str]:
    """The names that the headings of a text in Markdown can be reached by."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def documents() -> dict[Path, str]:
    """Every text in Markdown: files, and the prose of pages."""
    texts = [
        p for p in ROOT.rglob("*.md") if visible(p) and p.relative_to(ROOT).parts[0] not in ("runs", "build", "dist")
    ]
    files = {path: path.read_text(encoding="utf-8") for path in found(texts, 8)}
    pages = {p: "\n\n".join(c["source"] for c in read(p) if c["cell_type"] == "markdown") for p in PAGES}
    return files | pages


def test_links_lead_somewhere():
    texts, checked = documents(), 0
    for path, text in texts.items():
        for link in links(text):
            target, _, anchor = link.partition("#")
            there = (path.parent / target).resolve() if target else path
            assert there.exists(), f"{path.relative_to(ROOT)} links to {link}, which is not there"
            if anchor and there in texts:
                assert anchor.lower() in anchors(texts[there]), f"{path.relative_to(ROOT)}: no heading for {link}"
            checked += 1
    assert checked >= 100


def test_contributing_says_where_is_what():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    answers = re.findall(r"^\| [^|]+\? \| `([^`|]+)` \|$", text, re.M)
    assert len(answers) >= 10
    assert not [answer for answer in answers if not (ROOT / answer).is_file()]


# --- The notebooks ---


def exported_to() -> dict[str, Path]:
    """Module name, without `ldm_edu.`, to the notebook that exports it."""
    modules = {}
    for path in LESSONS:
        if match := re.search(r"^#\|\s*default_exp:?\s+(\S+)", "\n".join(c["source"] for c in code(path)), re.M):
            assert match[1] not in modules, f"{path.name} and {modules[match[1]].name} both export to {match[1]}"
            modules[match[1]] = path
    return modules


def file_of(module: str) -> Path | None:
    """The file of a module of ours, given without `ldm_edu.`; None where there is none."""
    path = PACKAGE.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def home(module: str, name: str) -> str:
    """The module that a name comes from, where it is imported from a room or from the front door."""
    path = file_of(module) if module else PACKAGE / "__init__.py"
    if path.name != "__init__.py":
        return module
    inner = f"{module}.{name}" if module else name
    if file_of(inner):
        return inner
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and name in {a.asname or a.name for a in node.names}:
            target = "." * node.level + (node.module or "")
            base = module.split(".")[: len(module.split(".")) - node.level + 1] if node.level else []
            return home(".".join([*base, node.module or ""] if node.level else target.split(".")[1:]), name)
    raise AssertionError(f"ldm_edu.{module} has no {name}")


def imported(source: str) -> set[tuple[str, str, str]]:
    """What a cell imports of ours: where from, the name, and the module that the name lives in."""
    plain = re.sub(r"^(\s*)[%!].*", r"\1pass", source, flags=re.M)  # shell lines and magics are not Python
    names = set()
    for node in ast.walk(ast.parse(plain)):
        if isinstance(node, ast.Import):
            ours = [a.name.partition(".")[2] for a in node.names if a.name.startswith("ldm_edu.")]
            names |= {(module, module, module) for module in ours}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ldm_edu":
            module = node.module.partition(".")[2]
            names |= {(module, a.name, home(module, a.name)) for a in node.names}
    return names


ROAD = [path for path in LESSONS if path.parent.name[0].isdigit()]
# Any page may use these from the front door, in a cell that says which page builds them; nothing else that comes later.
USED_EVERYWHERE = {"LatentDiffusion", "SceneReader", "prompt_accuracy", "psnr", "LPIPS", "ToyFeatures"}


def test_the_road_is_ordered():
    """Page numbers rise from folder to folder, and the first digit of a page is its folder's."""
    assert len(ROAD) >= 15
    numbers = [path.stem[:2] for path in ROAD]
    assert numbers == sorted(set(numbers)), "two pages have one number, or a page stands in a wrong folder"
    assert not [p for p in ROAD if p.stem[0] != p.parent.name[0]]
    assert {path.parent.name for path in LESSONS if path not in ROAD} == {"workshop"}


@pytest.mark.parametrize("path", ROAD, ids=lambda p: p.stem)
def test_a_page_imports_only_what_stands_before_it(path):
    """Earlier pages of the road, the workshop, and modules written by hand."""
    source = exported_to()
    for where, name, module in set().union(*(imported(cell["source"]) for cell in code(path))):
        assert file_of(module) or module == "__version__", f"{path.name} imports {name} from nowhere: {module}"
        later = module in source and source[module] in ROAD and source[module].stem > path.stem
        allowed = where == "" and (name in USED_EVERYWHERE or path.stem == "01_tour")  # it shows the finished parts
        assert not later or allowed, f"{path.name} imports {name} from {source[module].name}, which comes later"


def test_the_index_names_every_notebook():
    text = "\n".join(cell["source"] for cell in read(INDEX))
    assert not [path.name for path in LESSONS if path.stem not in text]


def test_the_idea_is_told_in_the_same_words_everywhere():
    """Under the drawing stand the same five sentences, on the README, the index and the first page of part 1."""
    told = {}
    for path, text in documents().items():
        _, drawing, below = re.sub("part_1.svg", "architecture.svg", text).partition("images/architecture.svg)\n\n")
        if drawing and below.startswith("1. "):
            told[path.stem] = " ".join(below.partition("\n\n")[0].split())
    assert told.keys() == {"README", "index", "11_autoencoder"} and len(set(told.values())) == 1
    assert all(f"{k}. " in next(iter(told.values())) for k in range(1, 6))


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_a_notebook_is_committed_as_a_clean_run_left_it(path):
    cells = code(path)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs or len(cells) <= 3, "no outputs: run it top to bottom and save"
    assert not [o["evalue"] for o in outputs if o["output_type"] == "error"], "an error is committed"
    assert not ["".join(o["text"]) for o in outputs if o.get("name") == "stderr"], "warnings are committed"
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert "application/vnd.jupyter.widget-view+json" not in kinds, "a widget without its state: LDM_EDU_STATIC=1"
    assert path.stat().st_size <= 1.5 * 2**20, "over 1.5 MB"


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_checked_outputs_are_text(path):
    for cell in code(path):
        if re.search(r"^\s*#\s*NBVAL_CHECK_OUTPUT\s*$", cell["source"], re.M):
            assert cell["outputs"], "NBVAL_CHECK_OUTPUT on a cell without output"
            assert "image/png" not in {kind for o in cell["outputs"] for kind in o.get("data", {})}, (
                "an image is checked"
            )


def test_every_module_is_exported_or_listed_as_written_by_hand():
    exported = {p for p in MODULES if "# AUTOGENERATED! DO NOT EDIT!" in p.read_text(encoding="utf-8")}
    by_hand = {p.relative_to(PACKAGE).as_posix() for p in MODULES if p not in exported}
    assert by_hand == BY_HAND, "pyproject.toml, [tool.ldm_edu] by_hand, is the list of modules written by hand"
    assert len(exported) == len(exported_to()) >= 20
    formatted = set(PYPROJECT["tool"]["ruff"]["format"]["exclude"])
    assert {p.relative_to(ROOT).as_posix() for p in exported} == formatted, "[tool.ruff.format] exclude lists the rest"


# Who may do what, and why. Everybody else calls these modules: their errors name the file and the remedy.
ONLY = {
    "open a picture": {"data/images.py"},  # with a list of formats, or a file could start other programs
    "write to a file": {"files.py"},  # whole or not at all, and never through a link that lies there
    "parse JSON": {"files.py"},  # text that is nested without end, or has NaN in it, is refused
}


def deeds(path: Path) -> set[str]:
    """Which of ONLY a module does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in ("json", "PIL.Image"):
            found |= {"parse JSON"} if {a.name for a in node.names} & {"load", "loads"} else set()
            found |= {"open a picture"} if "open" in {a.name for a in node.names} else set()
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in ("json.load", "json.loads"):
            found.add("parse JSON")
        elif called in ("Image.open", "PIL.Image.open"):
            found.add("open a picture")
        elif called.rpartition(".")[2] in ("write_text", "write_bytes") and called not in ("write_text", "write_bytes"):
            found.add("write to a file")
        elif called.rpartition(".")[2] == "open":
            modes = [a.value for a in (*node.args, *(k.value for k in node.keywords if k.arg == "mode"))
                     if isinstance(a, ast.Constant) and isinstance(a.value, str)]  # fmt: skip
            found |= {"write to a file"} if any(re.fullmatch("[rbt]*[wax+][bt+]*", mode) for mode in modes) else set()
    return found


def test_pictures_files_and_json_are_opened_in_one_place_each():
    done = {(deed, path.relative_to(PACKAGE).as_posix()) for path in MODULES for deed in deeds(path)}
    allowed = {(deed, module) for deed, modules in ONLY.items() for module in modules}
    assert not sorted(done - allowed), "call ldm_edu.files or ldm_edu.data.images instead"
    assert allowed <= done, "the modules that may do it do not: did the code move?"


def test_a_module_that_opens_files_by_itself_is_found(tmp_path):
    for line, deed in {
        "Image.open(path)": "open a picture",
        "from PIL.Image import open": "open a picture",
        "with path.open('wb') as file: pass": "write to a file",
        "open(path, mode='a')": "write to a file",
        "open(path, 'r+b')": "write to a file",
        "path.write_text('x')": "write to a file",
        "Path('x').write_bytes(b'x')": "write to a file",
        "json.load(file)": "parse JSON",
        "values = json.loads(path.read_text())": "parse JSON",
        "from json import loads": "parse JSON",
    }.items():
        (tmp_path / "a.py").write_text(line)
        assert deeds(tmp_path / "a.py") == {deed}, line
    (tmp_path / "a.py").write_text("open(path)\nopen(path, 'rb')\npath.open()\nwrite_text('x', path)\njson.dumps(1)")
    assert not deeds(tmp_path / "a.py")


def test_exported_cells_are_short():
    """A class that is longer than this is built up in parts, each shown before the next."""
    cells = [
        (path, c["source"]) for path in LESSONS for c in code(path) if re.search(r"^#\|\s*export", c["source"], re.M)
    ]
    assert len(cells) >= 200
    for path, source in cells:
        lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]
        assert len(lines) <= 40, f"{path.stem}: {len(lines)} lines in the cell with {lines[0]!r}"


def test_public_is_what_a_page_shows():
    """About 280 names in all; what is plumbing begins with an underscore or is exported by `#| exporti`."""
    public = {}
    for path in MODULES:
        if path.name != "__init__.py":
            public |= {(path, name): True for name in names_of(path)}
    assert 150 <= len(public) <= 320
    assert len(names_of(PACKAGE / "__init__.py")) <= 80


def names_of(path: Path) -> list[str]:
    """`__all__` of a module, read, not imported."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def test_the_exercises_are_never_collected(pytester):
    """They have holes on purpose, and graders of their own."""
    for folder in ("nbs/exercises/one", "nbs/1_part"):
        (pytester.path / folder).mkdir(parents=True)
        shutil.copy(INDEX, pytester.path / folder / "page.ipynb")
    pytester.makeconftest((ROOT / "conftest.py").read_text(encoding="utf-8"))
    options = ("--collect-only", "-q", "--nbval-lax", "-p", "no:cacheprovider")
    asked = pytester.runpytest_subprocess("nbs/exercises/one/page.ipynb", "nbs", *options)
    told = asked.stdout.str()
    assert "1_part/page.ipynb" in told and "exercises" not in told


def test_notebooks_are_clean_and_the_package_is_what_they_export(tmp_path):
    for name in ("nbs", "ldm_edu"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("pretrained", "__pycache__", ".*", "release")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path in (tmp_path / "ldm_edu").rglob("*.py"):  # what no notebook writes any more must not survive unseen
        if path.relative_to(tmp_path / "ldm_edu").as_posix() not in BY_HAND:
            path.unlink()
    script = "from nbdev.clean import *; from nbdev.doclinks import *; nbdev_clean(); nbdev_export()"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300)

    def contents(folder: Path) -> dict[str, bytes]:
        files = [*folder.glob("nbs/**/*.ipynb"), *folder.glob("nbs/llms.txt"), *folder.glob("ldm_edu/**/*.py")]
        files = [p for p in files if "release" not in p.relative_to(folder).parts]  # what nbgrader has written, ignored
        kept = [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
        return {p.relative_to(folder).as_posix(): p.read_bytes().replace(b"\r\n", b"\n") for p in kept}

    here, there = contents(ROOT), contents(tmp_path)
    stale = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    assert not stale, f"run `make export` and commit: {', '.join(stale)}"
