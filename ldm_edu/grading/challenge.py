"""A class challenge: models trained on the same budget, and how many held-out captions of toy scenes each draws."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_edu.checks import check_count
from ldm_edu.data.toy.datasets import ToyCOCO
from ldm_edu.errors import DataError, LDMError
from ldm_edu.evaluation.judge import READER_SIZE, SceneReader, Share, prompt_accuracy
from ldm_edu.evaluation.prompts import draw_captions
from ldm_edu.files import brief, printable, write_text
from ldm_edu.latent_diffusion import LatentDiffusion

__all__ = ["Budget", "Entry", "challenge", "ranked", "write_table"]


@dataclass(frozen=True)
class Budget:
    "What a model may have cost. The number of parameters is counted; seconds and steps are what the model says."

    parameters: int | None = 5_000_000  # of the UNet and the conditioner together
    seconds: float | None = None  # of training, all stages after the first stage together
    steps: int | None = None  # of the last stage


@dataclass(frozen=True)
class Entry:
    "One model of the challenge, and what it reached; `reason` says why one takes no part."

    student: str
    right: tuple[bool, ...] = ()  # for each caption: was every thing of it drawn?
    things: Share = field(default_factory=lambda: Share(0, 0))  # things that were drawn, of all that were asked for
    parameters: int = 0  # of the UNet and the conditioner together
    seconds: float = math.nan  # of training, as the model says
    steps: int = 0  # of the last stage, as the model says
    reason: str = ""

    @property
    def prompts(self) -> Share:
        "The share of the captions of which every thing was drawn."
        return Share(sum(self.right), len(self.right))


def _costs(model: LatentDiffusion) -> dict[str, Any]:
    "Parameters that are counted; steps and seconds that the model's provenance names."
    parts = [model.unet, model.conditioner]
    count = sum(p.numel() for part in parts if part is not None for p in part.parameters())
    stages = {k: v for k, v in model.provenance.items() if k not in ("recipe", "first_stage") and isinstance(v, dict)}
    seconds = [v["seconds"] for v in stages.values() if isinstance(v.get("seconds"), int | float)]
    steps = stages.get("diffusion", {}).get("steps")
    return {
        "parameters": count,
        "seconds": float(sum(seconds)) if seconds else math.nan,
        "steps": steps if isinstance(steps, int) else 0,
    }


def _over(costs: dict[str, Any], budget: Budget) -> str:
    "Why a model is over the budget; empty where it is not."
    over = []
    if budget.parameters is not None and costs["parameters"] > budget.parameters:
        over.append(f"{costs['parameters']:,} parameters, of {budget.parameters:,}")
    if budget.seconds is not None and not costs["seconds"] <= budget.seconds:
        told = "unknown" if math.isnan(costs["seconds"]) else f"{costs['seconds']:,.0f}"
        over.append(f"{told} seconds of training, of {budget.seconds:,.0f}")
    if budget.steps is not None and not 0 < costs["steps"] <= budget.steps:
        over.append(f"{costs['steps'] or 'unknown'} steps, of {budget.steps:,}")
    return f"over the budget: {'; '.join(over)}" if over else ""


def _enter(
    student: str,
    folder: Path,
    captions: Sequence[str],
    reader: SceneReader,
    budget: Budget,
    scale: float,
    steps: int,
    seed: int,
) -> Entry:
    "One student's model on the captions; whatever is wrong with it becomes the reason."
    costs: dict[str, Any] = {}
    if not (folder / "config.json").exists() and (folder / "model" / "config.json").exists():
        folder = folder / "model"  # the folder of a run
    try:
        model = LatentDiffusion.from_pretrained(str(folder))
        costs = _costs(model)
        if reason := _over(costs, budget):
            return Entry(student, **costs, reason=reason)
        if model.size != READER_SIZE:
            return Entry(student, **costs, reason=f"draws images of {model.size}²; the judge reads {READER_SIZE}²")
        images = draw_captions(model.eval(), captions, scale, steps, seed)
    except Exception as error:  # noqa: BLE001  one broken model ends no challenge
        kind = "" if isinstance(error, LDMError) else f"{type(error).__name__}: "
        return Entry(student, **costs, reason=printable(f"cannot draw: {kind}{brief(error)}"))
    found = prompt_accuracy(images, captions, reader)
    return Entry(student, tuple(not v.missing for v in found.verdicts), found.things, **costs)


def challenge(
    folder: str | Path,  # holds STUDENT/, a model's folder, for each student
    n: int = 256,  # captions
    first: int = 0,  # index of the first caption in the split: another one gives captions that nobody has seen scored
    split: str = "test",  # "test", or "unseen_pairs": colours and shapes that were never trained together
    budget: Budget = Budget(),
    scale: float = 3.0,  # of the guidance
    steps: int = 25,  # denoising steps (DDIM)
    seed: int = 0,  # caption i is drawn with seed + i, by every model
    after_each: Callable[[Entry], Any] | None = None,  # called with each entry as it comes
) -> list[Entry]:
    """Let every model draw the same captions with the same seeds, and have the shipped judge read what was drawn.

    Models are read from config.json and safetensors: no code of a student runs. `DataError` where there is none.
    """
    folder = Path(folder)
    data = ToyCOCO(split)
    check_count("n", n, 1, len(data))
    check_count("first", first, 0, len(data) - n)
    entrants = (
        sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
        if folder.is_dir()
        else []
    )
    if not entrants:
        raise DataError(f"{folder} should hold a model's folder for each student: STUDENT/config.json")
    captions = [data.describe(i)[1][0] for i in range(first, first + n)]
    reader, entries = SceneReader.from_pretrained("scene-reader"), []
    for entrant in entrants:
        entries.append(_enter(entrant.name, entrant, captions, reader, budget, scale, steps, seed))
        if after_each is not None:
            after_each(entries[-1])
    return entries


def ranked(entries: Sequence[Entry]) -> list[Entry]:
    "The best first; those that take no part at the end."
    return sorted(entries, key=lambda e: (bool(e.reason), -e.prompts.right, e.student))


def _against(best: Entry, other: Entry) -> str:
    "Does an entry differ from the best one? A sign test over the captions that one of them draws and the other not."
    from scipy.stats import binomtest

    ahead = sum(a and not b for a, b in zip(best.right, other.right))
    behind = sum(b and not a for a, b in zip(best.right, other.right))
    if other is best or ahead + behind == 0 or binomtest(ahead, ahead + behind).pvalue > 0.05:
        return "no difference found" if other is not best else ""
    return f"behind on {ahead} captions, ahead on {behind}"


def rows(entries: Sequence[Entry]) -> list[list[str]]:
    "The table of a challenge, its first row the names of the columns; shares have 95 % intervals (Wilson)."
    order = ranked(entries)
    found = [["rank", "student", "captions", "things", "against the first", "parameters", "seconds", "steps", "reason"]]
    for entry in order:
        place = 1 + sum(not other.reason and other.prompts.right > entry.prompts.right for other in order)
        costs = [f"{entry.parameters}", "" if math.isnan(entry.seconds) else f"{entry.seconds:.0f}", f"{entry.steps}"]
        if entry.reason:
            found.append(["", entry.student, "", "", "", *costs, entry.reason])
        else:
            scores = [str(entry.prompts), str(entry.things), _against(order[0], entry)]
            found.append([str(place), entry.student, *scores, *costs, ""])
    return found


def write_table(entries: Sequence[Entry], file: str | Path) -> None:
    "The table of a challenge as CSV."
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows(entries))
    write_text(text.getvalue(), file, DataError)
