"""Measured numbers in one form: what was measured of what, its interval and count; and where, how and with what."""

import json
import math
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ldm_edu.checks import check_count, check_fields, check_number, shown
from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.files import load_json, place, write_text

__all__ = ["Measurement", "Measurements", "load_measurements", "measured_here", "results"]

FORM = 1  # of the files, raised when an older reader could not read a newer file

Key = str | int | float  # what a thing that is measured is told apart by: 4, "KL"


_MOST = 1e300  # larger numbers are no floats, or hardly


def _is_number(value: Any) -> bool:
    "Is this a number, perhaps an infinite one, and not NaN?"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -_MOST <= value <= _MOST if isinstance(value, int) else not math.isnan(value)


def _is_plain(name: Any, value: Any) -> bool:
    "Is this a name, with a text or a number that is not infinite?"
    return isinstance(name, str) and (isinstance(value, str) or (_is_number(value) and math.isfinite(value)))


@dataclass(frozen=True)
class Measurement:
    "One measured number."

    name: str  # of the quantity: "PSNR"
    value: int | float  # may be infinite, as the PSNR of equal images is; never NaN
    of: Mapping[str, Key] = field(default_factory=dict)  # of what it was measured: {"f": 4, "regulariser": "KL"}
    unit: str = ""  # "dB", "%", "s"; empty for a pure number
    low: int | float | None = None  # of the 95 % interval; None: no interval is known
    high: int | float | None = None
    n: int | None = None  # how many samples the number is taken from
    seed: int | None = None  # where it is another one than that of the whole file

    def __post_init__(self):
        for name in ("value", "low", "high"):
            number = getattr(self, name)
            if number is None and name != "value":
                continue
            if not _is_number(number):
                raise LDMError(f"{name}={shown(number)} of {shown(self.name)} should be a number")
        if (self.low is None) != (self.high is None):
            raise LDMError(f"low and high of {shown(self.name)} should both be given, or neither")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise LDMError(f"low={self.low} of {shown(self.name)} should be at most high={self.high}")
        if not isinstance(self.of, Mapping) or not all(_is_plain(name, value) for name, value in self.of.items()):
            raise LDMError(f"of={shown(self.of)} should hold texts and numbers by name")
        if not isinstance(self.name, str) or not self.name or not isinstance(self.unit, str):
            raise LDMError(f"name={shown(self.name)} and unit={shown(self.unit)} should be texts, the name not empty")
        for name in ("n", "seed"):
            if (number := getattr(self, name)) is not None:
                check_count(name, number, 0)

    @classmethod
    def mean(cls, name: str, value: int | float, error: int | float, n: int, **more: Any) -> "Measurement":
        "A mean of n samples with its standard error; the interval is 1.96 of them to either side."
        if not math.isinf(value):
            check_number("error", error, 0.0)
        low, high = (None, None) if math.isinf(value) else (value - 1.96 * error, value + 1.96 * error)
        return cls(name, value, low=low, high=high, n=n, **more)

    @classmethod
    def repeated(cls, name: str, values: Iterable[int | float], **more: Any) -> "Measurement":
        """The mean of a few independent values, such as those of several sets of images, with Student's t interval.

        Of two models that were measured on the same sets, give the differences: they scatter less than the values.
        """
        found = [float(value) for value in values]
        if len(found) < 2:
            raise LDMError(f"values: {len(found)} of {shown(name)}, but an interval needs at least 2")
        from scipy.stats import t  # loaded here, since it takes a second

        middle = math.fsum(found) / len(found)
        spread = math.sqrt(math.fsum((value - middle) ** 2 for value in found) / (len(found) - 1))
        half = float(t.ppf(0.975, len(found) - 1)) * spread / len(found) ** 0.5
        return cls(name, middle, low=middle - half, high=middle + half, **more)

    @classmethod
    def share(cls, name: str, right: int, n: int, **more: Any) -> "Measurement":
        "A share, `right` of `n`, in percent, with Wilson's interval."
        check_count("right", right, 0, check_count("n", n))
        from scipy.stats import binomtest  # loaded here, since it takes a second

        found = binomtest(right, n).proportion_ci(0.95, "wilson")
        low, high = 100 * float(found.low), 100 * float(found.high)
        return cls(name, 100 * right / n, low=min(low, 100 * right / n), high=high, n=n, unit="%", **more)

    def text(self, digits: int | None = None) -> str:
        "The number with its unit and its interval, as a page prints it; `digits` behind the point."
        if digits is None and self.low is None and isinstance(self.value, int):
            digits = 0
        elif digits is None:
            widest = max((abs(x) for x in (self.value, self.low or 0, self.high or 0) if math.isfinite(x)), default=0)
            digits = 0 if widest >= 1000 else 1 if widest >= 10 else 3 if widest >= 0.01 else 5
            digits = None if 0 < widest < 1e-4 else digits

        def written(number: int | float) -> str:
            return f"{number:.3g}" if digits is None else f"{number:,.{digits}f}"

        told = f"{written(self.value)}{f' {self.unit}' if self.unit else ''}"
        return (
            told if self.low is None or self.high is None else f"{told} ({written(self.low)} to {written(self.high)})"
        )

    def __str__(self) -> str:
        what = ", ".join(f"{name} {value}" for name, value in self.of.items())
        count = "" if self.n is None else f", n = {self.n:,}"
        return f"{self.name}{f' of {what}' if what else ''}: {self.text()}{count}"


@dataclass(frozen=True)
class Measurements:
    "Measured numbers, with everything that is needed to measure them again."

    title: str  # what was measured, in one line
    command: str  # that measured it, from the project's root
    numbers: tuple[Measurement, ...] = ()
    about: str = ""  # how: data, training, what the intervals contain, what they do not
    seed: int | None = None  # of everything that is drawn
    machine: str = ""  # processor or GPU, and how many threads
    versions: Mapping[str, str] = field(default_factory=dict)  # of Python and of packages
    commit: str | None = None  # of the project's source; with "+" where files had been changed since
    date: str = ""  # of the measurement, as 2026-11-29

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self.numbers)

    def of(self, *names: str, **of: Key) -> "Measurements":
        "Those numbers that have one of the names (of any name where none is given) and were measured of all of `of`."
        kept = (m for m in self.numbers if not names or m.name in names)
        return replace(self, numbers=tuple(m for m in kept if all(m.of.get(k) == v for k, v in of.items())))

    def one(self, name: str, **of: Key) -> Measurement:
        "The one number of that name and of all of `of`; LDMError where there is none, or more than one."
        found = self.of(name, **of).numbers
        if len(found) != 1:
            wanted = ", ".join([name, *(f"{key}={value!r}" for key, value in of.items())])
            known = ", ".join(sorted({m.name for m in self.numbers})[:8]) or "none"
            told = f"{len(found)} numbers" if found else f"no number (its names: {known})"
            raise LDMError(f"{self.title}: {wanted} fits {told}; it should fit one")
        return found[0]

    def values(self, name: str, **of: Key) -> list[int | float]:
        "The values of a name, in their order."
        return [m.value for m in self.of(name, **of).numbers]

    def keys(self, key: str) -> list[Key]:
        "The different values of a key of `of`, in their order: keys('f') are [2, 4, 8]."
        return list(dict.fromkeys(m.of[key] for m in self.numbers if key in m.of))

    def with_numbers(self, numbers: Iterable[Measurement]) -> "Measurements":
        "The same with these numbers added."
        return replace(self, numbers=(*self.numbers, *numbers))

    def table(
        self,
        columns: Sequence[str] | None = None,  # names of numbers; None: all
        digits: int | None = None,  # behind the point; None: as many as the size of a number wants
        intervals: bool = True,
        keys: Sequence[str] | None = None,  # of `of`, shown in each row; None: all
    ) -> str:
        "A Markdown table: a row for each thing that was measured, a column for each name."
        names = list(columns or dict.fromkeys(m.name for m in self.numbers))
        keys = list(keys or dict.fromkeys(key for m in self.numbers if m.name in names for key in m.of))
        rows: dict[tuple, dict[str, str]] = {}
        for m in self.numbers:
            if m.name in names:
                told = m.text(digits) if intervals else replace(m, low=None, high=None).text(digits)
                row = rows.setdefault(tuple(m.of.get(key, "") for key in keys), {})
                if row.setdefault(m.name, told) != told:
                    raise LDMError(f"keys={shown(keys)} do not tell two numbers of {shown(m.name)} apart")
        lines = [keys + names, ["---"] * len(keys + names)]
        lines += [[*map(str, row), *(cells.get(name, "–") for name in names)] for row, cells in rows.items()]
        cells = ([" ".join(cell.replace("|", "/").split()) for cell in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)

    def source(self) -> str:
        "Command, machine, versions, seed, commit and date in one line."
        packages = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        seed = "" if self.seed is None else f"seed {self.seed}"
        commit = f"commit {self.commit}" if self.commit else ""
        return "; ".join(
            part for part in (f"`{self.command}`", self.machine, packages, seed, commit, self.date) if part
        )

    def save(self, path: str | Path) -> None:
        "Write all as JSON, whole or not at all, a number in each line."
        values = {"form": FORM} | {k: v for k, v in asdict(self).items() if k != "numbers" and v not in (None, "")}
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()]
        numbers = ",\n    ".join(json.dumps(_to_json(m)) for m in self.numbers)
        lines.append(f'"numbers": [\n    {numbers}\n  ]' if numbers else '"numbers": []')
        write_text("{\n  " + ",\n  ".join(lines) + "\n}\n", path)


def _to_json(number: Measurement) -> dict[str, Any]:
    "A number as JSON holds it: without what is not known, infinities as texts."
    kept = {name: value for name, value in asdict(number).items() if value not in (None, "", {})}
    return {k: str(v) if isinstance(v, float) and math.isinf(v) else v for k, v in kept.items()}


def _from_json(values: Any, where: str) -> Measurement:
    "The number of one entry of a file; LDMError says which entry is no number."
    if not isinstance(values, Mapping):
        raise LDMError(f"{where} should be a JSON object, not {shown(values)}")
    infinite = {"inf": math.inf, "-inf": -math.inf}
    read: dict[str, Any] = {k: infinite.get(v, v) if k in ("value", "low", "high") else v for k, v in values.items()}
    try:
        check_fields(Measurement, {name: value for name, value in read.items() if value not in infinite.values()})
        return Measurement(**read)
    except (LDMError, TypeError) as error:
        raise LDMError(f"{where}: {error}") from error


def load_measurements(
    path: str | Path,  # of a JSON file that `Measurements.save` wrote
) -> Measurements:
    "Read measured numbers; CheckpointError where the file is missing or holds something else."
    path = place(path)
    values = load_json(path)
    if values.pop("form", None) != FORM:
        raise CheckpointError(f"{path} holds no measured numbers of form {FORM}: `ldm-edu evaluate` writes such files")
    numbers: Any = values.pop("numbers", [])
    try:
        if not isinstance(numbers, list):
            raise LDMError(f"numbers should be a list, not {shown(numbers)}")
        check_fields(Measurements, values)
        read = tuple(_from_json(entry, f"numbers[{i}]") for i, entry in enumerate(numbers))
        return Measurements(numbers=read, **values)
    except (LDMError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def results(name: str) -> Measurements:
    "The measured numbers that come with the package under that name; LDMError lists the known ones."
    folder = resources.files("ldm_edu") / "results"
    known = sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))
    if name not in known:
        raise LDMError(f"there are no results named {shown(name)}; known: {', '.join(known)}")
    with resources.as_file(folder / f"{name}.json") as path:
        return load_measurements(path)


# Where and how something is measured ---------------------------------------------------------------------------------


def _processor() -> str:
    "The name of the processor, as the system gives it."
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine_name(device: str | torch.device = "cpu") -> str:
    "The GPU, or the processor with the number of threads that torch uses."
    where = torch.device(device)
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads > 1)}"


def _git(*words: str) -> str:
    "What git says in the folder of the source; an empty text where there is no checkout."
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()
    return ""


def _commit() -> str | None:
    "The commit of the source, with a plus where tracked files had been changed since; None outside a checkout."
    commit = _git("rev-parse", "--short=10", "HEAD")
    return f"{commit}{'+' * bool(_git('status', '--porcelain', '--untracked-files=no'))}" if commit else None


def _version(package: str) -> str | None:
    "The installed version of a package."
    if package == "torch":
        return str(torch.__version__)  # says for which CUDA it was built
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def _in_project(path: Path) -> str:
    "A path below the project's root, and of other paths the last name."
    root = Path(__file__).resolve().parents[1]
    inside = path.is_relative_to(root) and (root / ".git").exists()
    return path.relative_to(root).as_posix() if inside else path.name


def _program() -> list[str]:
    "What was typed before the arguments: the command line tool, or a script by its path in the project."
    script = Path(sys.argv[0]).resolve()
    return ["ldm-edu"] if script.name in ("ldm-edu", "__main__.py") else ["python", _in_project(script)]


def _without_place(word: str) -> str:
    "An argument, with a path of this machine shortened to what says something elsewhere."
    option, sign, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
    path = Path(value).expanduser() if value.startswith(("/", "~", "..")) else Path(value)
    is_place = path.is_absolute() or value.startswith("..")
    return f"{option}{sign}{_in_project(path.resolve())}" if is_place else word


def measured_here(
    title: str,
    numbers: Iterable[Measurement] = (),
    about: str = "",
    seed: int | None = None,
    device: str | torch.device = "cpu",
    packages: Sequence[str] = (),  # others than torch and this one whose versions matter
    command: str | None = None,  # None: the one that runs
) -> Measurements:
    "Measurements of this moment: the machine, the versions, the commit, and the command that runs are filled in."
    versions = {"python": platform.python_version()}
    versions |= {name: found for name in ("ldm_edu", "torch", *packages) if (found := _version(name))}
    if command is None:
        command = shlex.join([*_program(), *map(_without_place, sys.argv[1:])])
    return Measurements(
        title=title,
        command=command,
        numbers=tuple(numbers),
        about=about,
        seed=seed,
        machine=machine_name(device),
        versions=versions,
        commit=_commit(),
        date=date.today().isoformat(),
    )
