"""Measured numbers in one form: what they refuse, how they are printed and chosen, and that they survive a file."""

import getpass
import json
import math
import platform
import re
import socket
import subprocess
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch
from scipy import stats
from scipy.stats import binomtest, norm

from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.files import load_json
from ldm_edu.measurements import Measurement, Measurements, load_measurements, measured_here, results

NUMBERS = (
    Measurement("PSNR", 27.5, {"f": 4, "regulariser": "KL"}, "dB", 27.1, 27.9, n=1024),
    Measurement("PSNR", 24.25, {"f": 8, "regulariser": "KL"}, "dB", 24.0, 24.5, n=1024),
    Measurement("SSIM", 0.82, {"f": 4, "regulariser": "KL"}),
    Measurement("PSNR", math.inf, {"f": 1}, "dB", n=1024),
    Measurement("share", 0.0, {"f": 4.0, "regulariser": "VQ"}, "%", 0.0, 0.4, 0, seed=3),
)
MEASURED = Measurements(
    title="first stages",
    command="ldm-edu evaluate --n 1024",
    numbers=NUMBERS,
    about="how, in ünïcode",
    seed=0,
    machine="a processor, 1 thread",
    versions={"python": "3.12.3", "torch": "2.15.0"},
    commit="0123456789+",
    date="2026-11-29",
)
BARE = Measurements("nothing but a title", "true")


# A number -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 1.5, -3.0, 0, 1e-300, 10**20, math.inf, -math.inf])
def test_a_value_may_be_any_number(value):
    assert Measurement("x", value).value == value


@pytest.mark.parametrize("values", [[1, 2], [0.3, 0.1, 0.25, 0.4], [2.5] * 3, [1e-9, -1e9, 5]])
def test_repeated_values_have_the_mean_and_students_interval(values):
    found = Measurement.repeated("x", values, of={"set": "drawn"}, n=512)
    error = stats.sem(values)
    low, high = (
        stats.t.interval(0.95, len(values) - 1, loc=sum(values) / len(values), scale=error)
        if error
        else 2 * (found.value,)
    )
    assert found.value == pytest.approx(sum(values) / len(values)) and (found.n, dict(found.of)) == (
        512,
        {"set": "drawn"},
    )
    assert (found.low, found.high) == pytest.approx((low, high))


def test_an_interval_of_repeated_values_needs_two():
    for values in ([], [1.0]):
        with pytest.raises(LDMError, match=f"values: {len(values)} of 'x', but an interval needs at least 2"):
            Measurement.repeated("x", values)


def test_a_table_shows_the_keys_that_are_asked_for():
    numbers = [
        Measurement("distance", 0.5, {"step": 1, "features": "toy"}),
        Measurement("share", 50.0, {"step": 1}, "%"),
        Measurement("distance", 0.25, {"step": 2, "features": "toy"}),
    ]
    told = replace(BARE, numbers=tuple(numbers)).table(digits=2, keys=("step",))
    assert told.split("\n")[2:] == ["| 1 | 0.50 | 50.00 % |", "| 2 | 0.25 | – |"]
    with pytest.raises(LDMError, match="do not tell two numbers of 'distance' apart"):
        replace(BARE, numbers=tuple(numbers)).table(keys=("features",))


REFUSED = """
import json, math
from ldm_edu.errors import LDMError
from ldm_edu.measurements import Measurement

def told(**arguments):
    try:
        return f"taken: {Measurement('psnr', **({'value': 1.0} | arguments))}"
    except LDMError as error:
        return str(error)

print(json.dumps({name: told(**arguments) for name, arguments in {
    **{f"value {x}": {"value": x} for x in (None, True, "1", [1.0], 1j, math.nan)},
    **{f"low {x}": {"low": x, "high": 2.0} for x in (True, "1", [1.0], 1j, math.nan)},
    **{f"of {x}": {"of": x} for x in ({"f": [1, 2]}, {"f": None}, {"f": math.inf}, {"f": {"g": 1}}, [4], "f")},
    **{f"n {x}": {"n": x} for x in (-1, 1.5, True, "3")},
}.items()}))
"""


def test_what_is_of_another_type_is_refused_by_its_name():
    """In a process of its own: the types that pytest checks here would be refused before ours."""
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    wanted = {"value": "value=.* of 'psnr' should be a number", "low": "low=.* of 'psnr' should be a number"}
    wanted |= {"of": "of=.* should hold texts and numbers by name", "n": "n=.* should be a whole number, at least 0"}
    assert len(told) == 21
    for name, message in told.items():
        assert re.match(wanted[name.split()[0]], message), (name, message)


def test_a_value_that_is_no_number_is_refused():
    with pytest.raises(LDMError, match="value=nan of 'psnr' should be a number"):
        Measurement("psnr", math.nan)


def test_an_end_that_is_no_number_is_refused():
    with pytest.raises(LDMError, match="high=nan of 'psnr'"):
        Measurement("psnr", 1.0, low=0.0, high=math.nan)


@pytest.mark.parametrize("half", [{"low": 0.0}, {"high": 0.0}])
def test_half_an_interval_is_refused(half):
    with pytest.raises(LDMError, match="low and high of 'psnr' should both be given"):
        Measurement("psnr", 0.0, **half)


def test_an_interval_has_its_ends_in_order():
    with pytest.raises(LDMError, match="low=2.0 of 'psnr' should be at most high=1.0"):
        Measurement("psnr", 1.5, low=2.0, high=1.0)
    assert Measurement("psnr", 1.0, low=1.0, high=1.0).low == 1.0


@pytest.mark.parametrize("of", [{"f": math.inf}, {"f": math.nan}])
def test_what_was_measured_is_told_by_finite_numbers(of):
    with pytest.raises(LDMError, match="^of=.* should hold texts and numbers by name"):
        Measurement("psnr", 1.0, of)


@pytest.mark.parametrize("n", [-1, True])
def test_a_count_is_a_whole_number(n):
    with pytest.raises(LDMError, match="^n=.* should be a whole number, at least 0"):
        Measurement("psnr", 1.0, n=n)


# Intervals ------------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_the_normal_one():
    found = Measurement.mean("FID", 12.0, 0.5, 100, of={"steps": 50}, unit="")
    low, high = norm.interval(0.95, 12.0, 0.5)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    assert (found.n, found.of, found.value) == (100, {"steps": 50}, 12.0)


def test_a_mean_that_is_infinite_has_no_interval():
    found = Measurement.mean("PSNR", math.inf, math.nan, 5)
    assert found.value == math.inf and found.low is None and found.high is None


@pytest.mark.parametrize("right, n", [(0, 1), (1, 1), (0, 512), (512, 512), (423, 512), (1, 3), (87, 96)])
def test_the_interval_of_a_share_is_wilsons(right, n):
    found = Measurement.share("right", right, n, of={"scale": 2})
    wanted = binomtest(right, n).proportion_ci(0.95, "wilson")
    assert found.value == pytest.approx(100 * right / n)
    assert (found.low, found.high) == pytest.approx((100 * wanted.low, 100 * wanted.high))
    assert 0 <= found.low <= found.value <= found.high <= 100
    assert (found.n, found.unit, found.of) == (n, "%", {"scale": 2})


@pytest.mark.parametrize("n", range(1, 60))
def test_a_share_lies_in_its_interval_to_the_last_digit(n):
    for right in {0, 1, n // 2, n}:
        found = Measurement.share("right", right, n)
        assert found.low <= found.value <= found.high


# Texts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, told",
    [
        (0.0, "0.00000"),
        (0, "0"),
        (0.00123, "0.00123"),
        (-0.00123, "-0.00123"),
        (0.05, "0.050"),
        (0.8204, "0.820"),
        (-2.5, "-2.500"),
        (27.456, "27.5"),
        (-999.96, "-1,000.0"),
        (1234.5, "1,234"),
        (-1234567.8, "-1,234,568"),
        (300_000, "300,000"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
    ],
)
def test_a_number_has_as_many_digits_as_its_size_wants(value, told):
    assert Measurement("x", value).text() == told


def test_the_largest_number_of_an_interval_decides_the_digits():
    assert Measurement("x", 9.5, low=8.5, high=10.5).text() == "9.5 (8.5 to 10.5)"
    assert Measurement("x", 0.1, low=-1000.0, high=1.0).text() == "0 (-1,000 to 1)"


def test_a_text_has_unit_and_interval():
    assert NUMBERS[0].text() == "27.5 dB (27.1 to 27.9)"
    assert NUMBERS[0].text(2) == "27.50 dB (27.10 to 27.90)" and NUMBERS[0].text(0).startswith("28 dB")
    assert NUMBERS[3].text() == "inf dB"


def test_an_infinite_number_with_an_interval_is_printed():
    assert Measurement("x", math.inf, low=20.0, high=math.inf).text() == "inf (20.0 to inf)"
    assert Measurement("x", math.inf, low=math.inf, high=math.inf).text() == "inf (inf to inf)"


def test_a_number_says_what_it_was_measured_of():
    assert str(NUMBERS[0]) == "PSNR of f 4, regulariser KL: 27.5 dB (27.1 to 27.9), n = 1,024"
    assert str(Measurement("FID", 5.0)) == "FID: 5.000"


# Choosing -------------------------------------------------------------------------------------------------------------


def test_numbers_are_chosen_by_name_and_by_what_they_are_of():
    assert MEASURED.of("PSNR").numbers == (NUMBERS[0], NUMBERS[1], NUMBERS[3])
    assert MEASURED.of("PSNR", "SSIM", f=4).numbers == (NUMBERS[0], NUMBERS[2])
    assert MEASURED.of(f=4).numbers == (NUMBERS[0], NUMBERS[2], NUMBERS[4])
    assert MEASURED.of(f=4, regulariser="VQ").numbers == (NUMBERS[4],)
    assert len(MEASURED.of("FID")) == 0 and MEASURED.of().numbers == NUMBERS
    assert MEASURED.of("PSNR").title == MEASURED.title and list(MEASURED) == list(NUMBERS) and len(MEASURED) == 5


def test_one_number_is_found_or_refused():
    assert MEASURED.one("PSNR", f=8) is NUMBERS[1]
    with pytest.raises(LDMError, match="^first stages: PSNR fits 3 numbers; it should fit one"):
        MEASURED.one("PSNR")
    with pytest.raises(LDMError, match=r"PSNR, f=16 fits no number \(its names: PSNR, SSIM, share\)"):
        MEASURED.one("PSNR", f=16)
    with pytest.raises(LDMError, match=r"FID fits no number \(its names: none\)"):
        BARE.one("FID")


def test_values_and_keys_come_in_their_order():
    assert MEASURED.values("PSNR") == [27.5, 24.25, math.inf] and MEASURED.values("PSNR", f=8) == [24.25]
    assert MEASURED.keys("f") == [4, 8, 1] and MEASURED.keys("regulariser") == ["KL", "VQ"]
    assert MEASURED.keys("colour") == [] == BARE.values("x")


def test_numbers_are_added_and_the_old_ones_stay():
    more = MEASURED.with_numbers(iter([Measurement("FID", 5.0)]))
    assert len(more) == 6 and len(MEASURED) == 5 and more.one("FID").value == 5.0


def test_a_table_has_a_row_for_each_thing_and_a_column_for_each_name():
    assert MEASURED.of("PSNR", "SSIM").table() == "\n".join(
        [
            "| f | regulariser | PSNR | SSIM |",
            "| --- | --- | --- | --- |",
            "| 4 | KL | 27.5 dB (27.1 to 27.9) | 0.820 |",
            "| 8 | KL | 24.2 dB (24.0 to 24.5) | – |",
            "| 1 |  | inf dB | – |",
        ]
    )


def test_a_table_can_leave_columns_and_intervals_out():
    lines = MEASURED.table(["SSIM", "PSNR"], digits=2, intervals=False).splitlines()
    assert lines[0] == "| f | regulariser | SSIM | PSNR |" and lines[2] == "| 4 | KL | 0.82 | 27.50 dB |"
    assert len(lines) == 5 and BARE.table().splitlines()[0].strip("| ") == ""


def test_the_source_of_the_numbers_is_one_line():
    told = MEASURED.source()
    assert told.startswith("`ldm-edu evaluate --n 1024`; a processor, 1 thread; python 3.12.3, torch 2.15.0; seed 0;")
    assert told.endswith("commit 0123456789+; 2026-11-29") and "\n" not in told
    assert BARE.source() == "`true`"


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measured", [MEASURED, BARE, replace(MEASURED, seed=None, commit=None)])
def test_measured_numbers_survive_a_file(measured, tmp_path):
    measured.save(tmp_path / "numbers.json")
    assert load_measurements(tmp_path / "numbers.json") == measured
    assert load_measurements(str(tmp_path / "numbers.json")) == measured
    measured.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "numbers.json").read_bytes()


def test_a_file_is_plain_json(tmp_path):
    MEASURED.save(tmp_path / "numbers.json")
    values = json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert values["form"] == 1 and values["numbers"][3]["value"] == "inf"


def test_infinite_ends_survive_a_file(tmp_path):
    found = replace(BARE, numbers=(Measurement("x", -math.inf, low=-math.inf, high=math.inf),))
    found.save(tmp_path / "numbers.json")
    assert load_measurements(tmp_path / "numbers.json") == found


def test_a_zero_is_not_left_out_of_a_file(tmp_path):
    found = replace(BARE, numbers=(Measurement("x", 0, {"f": 0}, low=0, high=0, n=0, seed=0),), seed=0)
    found.save(tmp_path / "numbers.json")
    assert load_measurements(tmp_path / "numbers.json") == found
    assert json.loads((tmp_path / "numbers.json").read_text())["numbers"][0]["n"] == 0


def test_texts_that_look_like_infinity_stay_texts(tmp_path):
    found = replace(BARE, title="inf", numbers=(Measurement("inf", 1.0, {"inf": "inf", "name": "-inf"}, "inf"),))
    found.save(tmp_path / "numbers.json")
    assert load_measurements(tmp_path / "numbers.json") == found


GOOD = {"form": 1, "title": "t", "command": "c", "numbers": [{"name": "x", "value": 1.0}]}


def entry(**values) -> dict:
    return GOOD | {"numbers": [{"name": "y", "value": 1.0}, {"name": "x", "value": 1.0} | values]}


@pytest.mark.parametrize(
    "content, told",
    [
        ({}, "no measured numbers of form 1"),
        (GOOD | {"form": 2}, "form 1"),
        (GOOD | {"form": "1"}, "form 1"),
        ({k: v for k, v in GOOD.items() if k != "form"}, "form 1"),
        ({k: v for k, v in GOOD.items() if k != "title"}, "title"),
        ({k: v for k, v in GOOD.items() if k != "command"}, "command"),
        (GOOD | {"colour": "red"}, "no field colour"),
        (GOOD | {"title": 3}, "title=3"),
        (GOOD | {"seed": "0"}, "seed='0'"),
        (GOOD | {"versions": ["torch"]}, "versions"),
        (GOOD | {"numbers": {"x": 1}}, "numbers should be a list"),
        (GOOD | {"numbers": "x"}, "numbers should be a list"),
        (GOOD | {"numbers": [3]}, r"numbers\[0\] should be a JSON object"),
        (entry(value="much"), r"numbers\[1\].*value"),
        (entry(value=None), r"numbers\[1\].*value"),
        (entry(value=True), r"numbers\[1\].*value"),
        (entry(value="nan"), r"numbers\[1\].*value"),
        (entry(low=0.0), r"numbers\[1\].*both"),
        (entry(low=2.0, high=1.0), r"numbers\[1\].*at most"),
        (entry(n=-1), r"numbers\[1\].*n=-1"),
        (entry(n=1.5), r"numbers\[1\].*n=1.5"),
        (entry(of={"f": [1]}), r"numbers\[1\].*of"),
        (entry(of={"f": None}), r"numbers\[1\].*of"),
        (entry(of="f"), r"numbers\[1\].*of"),
        (entry(value=10**400), r"numbers\[1\].*value"),
        (entry(colour="red"), r"numbers\[1\].*colour"),
        (entry(name=3), r"numbers\[1\].*name=3"),
        (GOOD | {"numbers": [{"value": 1.0}]}, r"numbers\[0\].*name"),
        (GOOD | {"numbers": [{"name": "x"}]}, r"numbers\[0\].*value"),
    ],
)
def test_a_damaged_or_foreign_file_is_named(content, told, tmp_path):
    path = tmp_path / "numbers.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"(?s)numbers.json.*{told}"):
        load_measurements(path)


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"{", b'{"form": NaN}', b"\xff\xfe", b"[" * 100_000, b"null"])
def test_what_is_no_json_object_is_named(content, tmp_path):
    (tmp_path / "numbers.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="numbers.json"):
        load_measurements(tmp_path / "numbers.json")


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="numbers.json"):
        load_measurements(tmp_path / "numbers.json")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        load_measurements(tmp_path)


@pytest.mark.parametrize("content", [GOOD, entry(value="inf"), entry(of={"f": 4}), GOOD | {"numbers": []}])
def test_a_good_file_is_read(content, tmp_path):
    """So that the refusals above are no refusals of everything."""
    (tmp_path / "numbers.json").write_text(json.dumps(content))
    assert len(load_measurements(tmp_path / "numbers.json")) == len(content["numbers"])


# Results of the package -----------------------------------------------------------------------------------------------

FILES = [file.name for file in (resources.files("ldm_edu") / "results").iterdir() if file.name.endswith(".json")]


def test_there_are_results():
    assert len(FILES) >= 3


@pytest.mark.parametrize("file", sorted(FILES))
def test_results_of_the_package_can_be_read(file):
    found = results(file.removesuffix(".json"))
    assert len(found) and found.title and found.command
    if not found.command.startswith("printed in"):  # the paper's numbers were measured elsewhere
        assert found.machine and found.date and found.versions


def test_results_with_another_name_list_the_known_ones():
    with pytest.raises(LDMError, match="there are no results named 'first_stage'; known: .*" + min(FILES)[:-5]):
        results("first_stage")
    for name in ("../pretrained/toy-class/config", "", min(FILES)):
        with pytest.raises(LDMError, match="there are no results named"):
            results(name)


# Here and now ---------------------------------------------------------------------------------------------------------


def everything(measured: Measurements, folder: Path) -> str:
    """All that a file of measured numbers says."""
    measured.save(folder / "here.json")
    return (folder / "here.json").read_text(encoding="utf-8")


def test_where_something_is_measured_is_filled_in(root):
    found = measured_here("speed", [Measurement("step", 0.1, unit="s")], "how", 3, packages=("scipy", "not-there"))
    assert (found.title, found.about, found.seed, len(found)) == ("speed", "how", 3, 1)
    assert found.versions["python"] == platform.python_version() and torch.__version__.startswith(
        found.versions["torch"]
    )
    assert {"ldm_edu", "scipy"} <= found.versions.keys() and "not-there" not in found.versions
    assert re.search(rf", {torch.get_num_threads()} threads?$", found.machine)
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", found.date)
    if (root / ".git").exists():
        assert re.fullmatch("[0-9a-f]{10}[+]?", found.commit)


def test_a_single_thread_is_no_plural(monkeypatch):
    for threads, told in ((1, ", 1 thread"), (2, ", 2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert measured_here("t").machine.endswith(told)


def test_a_measurement_outside_of_a_checkout_has_no_commit(monkeypatch):
    monkeypatch.setattr("ldm_edu.measurements._git", lambda *words: "")
    assert measured_here("t").commit is None


def test_changed_files_are_marked_behind_the_commit(monkeypatch):
    monkeypatch.setattr("ldm_edu.measurements._git", lambda word, *more: {"rev-parse": "0123456789"}.get(word, " M x"))
    assert measured_here("t").commit == "0123456789+"
    monkeypatch.setattr("ldm_edu.measurements._git", lambda word, *more: {"rev-parse": "0123456789"}.get(word, ""))
    assert measured_here("t").commit == "0123456789"


def test_nothing_of_it_names_this_machine(tmp_path, monkeypatch, root):
    monkeypatch.setattr(sys, "argv", [str(root / "benchmarks" / "speed.py"), "--n", "3"])
    told = everything(measured_here("t", packages=("scipy",)), tmp_path)
    for word in {str(root), str(Path.home()), str(tmp_path), socket.gethostname(), platform.node()} - {"", "/"}:
        assert word not in told
    if len(user := getpass.getuser()) > 3 and user != "root":
        assert user not in told


@pytest.mark.parametrize(
    "argv, told",
    [
        (["{root}/benchmarks/speed.py", "--n", "3"], "python benchmarks/speed.py --n 3"),
        (["/somewhere/else/bin/ldm-edu", "evaluate", "a b"], "ldm-edu evaluate 'a b'"),
        (["{root}/ldm_edu/__main__.py", "evaluate"], "ldm-edu evaluate"),
        (["/home/someone/own.py", "--x"], "python own.py --x"),
    ],
)
def test_the_command_is_the_one_that_runs_without_the_path_to_it(argv, told, monkeypatch, root):
    if not (root / ".git").exists() and "benchmarks" in told:
        pytest.skip("outside of a checkout a script is told by its name alone")
    monkeypatch.setattr(sys, "argv", [word.format(root=root) for word in argv])
    assert measured_here("t").command == told


@pytest.mark.parametrize("argument", ["{tmp}/run/model", "--data-dir={tmp}/coco", "{home}/faces", "{root}/data/toy"])
def test_the_arguments_of_the_command_have_no_path_of_this_machine(argument, monkeypatch, tmp_path, root):
    where = {"tmp": tmp_path, "home": Path.home(), "root": root}
    monkeypatch.setattr(sys, "argv", ["ldm-edu", "evaluate", argument.format(**where)])
    command = measured_here("t").command
    assert not any(str(folder) in command for folder in where.values()) and command.startswith("ldm-edu evaluate")


def test_a_command_that_is_given_is_kept():
    assert measured_here("t", command="ldm-edu evaluate").command == "ldm-edu evaluate"


def test_what_is_measured_here_survives_a_file(tmp_path):
    found = measured_here("t", [Measurement.share("right", 3, 4)], seed=1)
    found.save(tmp_path / "here.json")
    assert load_measurements(tmp_path / "here.json") == found
    assert load_json(tmp_path / "here.json")["form"] == 1
