"""The class challenge: same captions and seeds for all, a budget, and a table that says what is a difference."""

import csv
import json
import shutil

import pytest

from ldm_edu.checkpoints import PRETRAINED
from ldm_edu.errors import DataError, LDMError
from ldm_edu.evaluation.judge import Share
from ldm_edu.grading.challenge import Budget, Entry, challenge, ranked, rows, write_table


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A class of three: a good model, one that says that it trained for long, and something else."""
    folder = tmp_path_factory.mktemp("models")
    for student in ("ann", "bob"):
        shutil.copytree(PRETRAINED / "toy-text2image", folder / student)
    config = json.loads((folder / "bob" / "config.json").read_text(encoding="utf-8"))
    config["provenance"]["diffusion"]["seconds"] = 10_000_000
    (folder / "bob" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "eve").mkdir()
    (folder / "eve" / "model.py").write_text("raise SystemExit", encoding="utf-8")
    return folder


def test_a_class_is_ranked(models, tmp_path):
    entries = challenge(models, n=4, first=7, budget=Budget(seconds=1e6), steps=4)
    assert [e.student for e in entries] == ["ann", "bob", "eve"]
    ann, bob, eve = entries
    assert ann.prompts.n == 4 and ann.things.n >= 4 and not ann.reason and ann.parameters > 1_000_000
    assert "over the budget: 10,000,042 seconds of training, of 1,000,000" in bob.reason and not bob.right
    assert eve.reason.startswith("cannot draw: ") and "config.json" in eve.reason
    write_table(entries, tmp_path / "table.csv")
    with open(tmp_path / "table.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["student"] for row in table] == ["ann", "bob", "eve"] and [row["rank"] for row in table] == [
        "1",
        "",
        "",
    ]
    assert "n = 4" in table[0]["captions"] and table[0]["seconds"] == "8536" and table[0]["steps"] == "28000"


@pytest.mark.parametrize(
    ("budget", "says"),
    [(Budget(parameters=1000), "parameters, of 1,000"), (Budget(steps=10), "28000 steps, of 10")],
)
def test_what_is_over_the_budget_takes_no_part(models, budget, says):
    assert all(says in entry.reason for entry in challenge(models, n=1, budget=budget, steps=1)[:2])


def test_a_difference_is_one_only_where_captions_say_so():
    def entry(student: str, right: str) -> Entry:
        return Entry(student, tuple(letter == "1" for letter in right), Share(1, 2))

    good, same, worse = entry("a", "1" * 20), entry("b", "1" * 18 + "00"), entry("c", "1" * 8 + "0" * 12)
    assert ranked([worse, Entry("d", reason="broken"), same, good])[0] is good
    table = rows([worse, same, good])
    told = table[0].index("against the first")
    assert [row[told] for row in table[1:]] == ["", "no difference found", "behind on 12 captions, ahead on 0"]


def test_nonsense_is_refused(models, tmp_path):
    with pytest.raises(DataError, match="a model's folder for each student"):
        challenge(tmp_path / "nowhere")
    with pytest.raises(LDMError, match="first"):
        challenge(models, n=4, first=10**9)
