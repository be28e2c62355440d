"""A whole evaluation: what is compared with what, and that an interruption changes no number."""

import inspect
import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import ldm_edu.evaluation.report as evaluation
from ldm_edu import AutoencoderKL, LatentDiffusion, NoiseSchedule, ToyCOCO, UNet, collate
from ldm_edu.conditioning.condition import Condition, Conditioner
from ldm_edu.conditioning.tokens import ClassConditioner
from ldm_edu.data.registry import open_dataset
from ldm_edu.display import save, to_uint8
from ldm_edu.errors import CheckpointError, DataError, LDMError
from ldm_edu.evaluation.distances import frechet_distance, inception_score, kernel_distance, precision_recall
from ldm_edu.evaluation.extractors import extract, find_extractor
from ldm_edu.evaluation.features import ToyFeatures
from ldm_edu.evaluation.judge import SceneReader, prompt_accuracy
from ldm_edu.evaluation.prompts import captions_of, diversity, score_prompts, score_reconstructions
from ldm_edu.evaluation.report import (
    Drawing,
    Evaluation,
    KeptSamples,
    draw_set,
    evaluate,
    find_evaluation,
    from_bytes,
    is_alike,
    last_evaluation,
    real_set,
    reconstructed_set,
    scores,
    table,
)
from ldm_edu.measurements import Measurement, load_measurements

QUICK = Drawing(steps=2, batch_size=4)
NAMES = ("Fréchet distance", "kernel distance", "precision", "recall", "inception score")
SETS = ("drawn", "reconstructed", "real halves")
BY_SET = "Fréchet excess of a set"
EXCESS = "Fréchet excess"  # of the first two sets


def small(conditioner: Conditioner | None = None, size: int = 16, **provenance) -> LatentDiffusion:
    """An untrained model of any condition."""
    torch.manual_seed(0)
    stage = AutoencoderKL(channels=8, multipliers=(1, 2), blocks=1, latent_channels=3, groups=4, scale_factor=0.7)
    slots = ("context_dim", "vector_dim", "concat_channels")
    slot = {} if conditioner is None else {name: getattr(conditioner, name) for name in slots}
    unet = UNet(3, 3, 32, (1,), 1, (1,), **slot)
    with torch.no_grad():
        for p in unet.parameters():
            if not p.any():
                p.normal_(std=0.05)
    return LatentDiffusion(stage, unet, NoiseSchedule(T=50), conditioner, size, provenance).eval()


@pytest.fixture(scope="module")
def shipped():
    return {name: LatentDiffusion.from_pretrained(name) for name in ("toy-class", "toy-text2image")}


def numbers(measured) -> list[tuple]:
    return [(m.name, dict(m.of), m.value, m.low, m.high, m.n) for m in measured]


# --- Drawing, and going on ---


class Stopped(BaseException):
    """In place of Ctrl-C, which would also end pytest where nobody catches it."""


def stop_after(model, calls, monkeypatch):
    """The model draws so many batches and is interrupted in the next one."""
    real, left = model.sample, [calls]

    def sample(*args, **kwargs):
        if not left[0]:
            raise Stopped
        left[0] -= 1
        return real(*args, **kwargs)

    monkeypatch.setattr(model, "sample", sample)


def count_drawn(model, monkeypatch) -> list[int]:
    """The sizes of the batches that the model draws from now on."""
    real, drawn = model.sample, []

    def sample(batch, n, **kwargs):
        drawn.append(n)
        return real(batch, n, **kwargs)

    monkeypatch.setattr(model, "sample", sample)
    return drawn


def test_an_image_has_its_own_seed_and_condition():
    model, data = small(ClassConditioner(24, 32)), ToyCOCO("test", size=16, keys=("class",))
    images = draw_set(model, replace(QUICK, seed=3), range(6), data)
    assert images.dtype == torch.uint8 and images.shape == (6, 3, 16, 16)
    for i in range(6):
        alone = model.sample(collate([data[i]]), steps=2, scale=3.0, seed=3 + i)
        assert (to_uint8(alone)[0].int() - images[i].int()).abs().max() <= 1
    others = draw_set(model, replace(QUICK, seed=3), [5, 4, 3, 2, 1, 0], data)
    assert not torch.equal(others, images)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_the_images_do_not_depend_on_how_many_are_drawn(seed, monkeypatch):
    """Each batch is filled up to its size: on some machines, sums in a smaller one differ in the last bit."""
    model, drawing, asked = small(), replace(QUICK, seed=seed), []
    real = model.sample
    monkeypatch.setattr(model, "sample", lambda *a, **how: asked.append((how, a[1])) or real(*a, **how))
    whole = draw_set(model, drawing, range(11))
    assert {how.get("batch_size") for how, _ in asked} == {4} and sum(n for _, n in asked) == 11
    assert all(how["seed"] // 4 == (how["seed"] + n - 1) // 4 for how, n in asked), "one batch of `sample` at a time"
    assert torch.equal(draw_set(model, drawing, range(6)), whole[:6])
    later = draw_set(model, replace(drawing, seed=seed + 4), range(7))
    assert torch.equal(later, whole[4:])


def test_an_interrupted_evaluation_goes_on_with_the_same_numbers(tmp_path, monkeypatch):
    model = small(ClassConditioner(24, 32), recipe={"dataset": "toy"})
    options, chance = Evaluation(QUICK, n=14), random.Random(0)
    whole = evaluate(model, options)
    for calls in chance.sample(range(4), 2):
        kept = KeptSamples(tmp_path / f"{calls}.samples")
        with monkeypatch.context() as patched:
            stop_after(model, calls, patched)
            with pytest.raises(Stopped):
                evaluate(model, options, kept=kept)
        assert len(list(kept.folder.glob("*/batch-*.safetensors"))) == calls
        with monkeypatch.context() as patched:
            drawn = count_drawn(model, patched)
            again = evaluate(model, options, kept=KeptSamples(kept.folder))
        assert numbers(again) == numbers(whole) and sum(drawn) == 14 - 4 * calls


def test_a_split_that_is_named_twice_is_measured_once():
    model = small(ClassConditioner(24, 32), recipe={"dataset": "toy"})
    splits = "validation", "test", "validation"
    found = evaluate(model, Evaluation(QUICK, splits=splits, n=4))
    assert found.keys("split") == ["validation", "test"] and "validation" in table(found)
    assert numbers(found) == numbers(evaluate(model, Evaluation(QUICK, splits=splits[:2], n=4)))


def test_only_what_was_drawn_in_the_same_way_is_used_again(tmp_path, monkeypatch):
    model, data = small(ClassConditioner(24, 32)), ToyCOCO("test", size=16, keys=("class",))

    def again(model=model, drawing=QUICK, data=data, rows=range(6), name="drawn"):
        with monkeypatch.context() as patched:
            drawn = count_drawn(model, patched)
            draw_set(model, drawing, rows, data, KeptSamples(tmp_path), name)
        return sum(drawn)

    assert again() == 6 and again() == 0
    assert again(rows=range(10)) == 6, "the first four are there; the batch of two has grown"
    changed = [replace(QUICK, **one) for one in ({"steps": 3}, {"scale": 1.0}, {"sampler": "ddpm"}, {"seed": 4})]
    assert [again(drawing=drawing) for drawing in changed] == [6, 6, 6, 6]
    assert again(drawing=replace(QUICK, batch_size=3)) == 6
    assert again(data=ToyCOCO("validation", size=16, keys=("class",))) == 6
    assert again(rows=[1, 0, 2, 3, 4, 5]) == 4, "the rows of a batch are compared"
    assert again(name="other") == 6
    other = small(ClassConditioner(24, 32))
    torch.nn.init.zeros_(next(other.unet.parameters()))
    assert again(model=other) == 6


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "gone"])
def test_a_damaged_batch_is_drawn_again(damage, tmp_path, monkeypatch):
    model, kept = small(), KeptSamples(tmp_path)
    whole = draw_set(model, QUICK, range(8), kept=kept)
    first, second = sorted(tmp_path.glob("*/batch-*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-5] ^= 1
    first.unlink()
    match damage:
        case "cut":
            first.write_bytes(content[:-7])
        case "flipped":
            first.write_bytes(content)
        case "empty":
            first.touch()
        case "other":
            first.write_bytes(second.read_bytes())
    drawn = count_drawn(model, monkeypatch)
    assert torch.equal(draw_set(model, QUICK, range(8), kept=kept), whole) and drawn == [4]


def test_only_our_own_files_are_removed(tmp_path):
    model, kept = small(), KeptSamples(tmp_path / "x.samples")
    draw_set(model, replace(QUICK, steps=1), range(2), kept=KeptSamples(kept.folder))  # of another evaluation
    draw_set(model, QUICK, range(2), kept=kept)
    (folder,) = kept.used
    (folder / "notes.txt").write_text("mine")
    kept.remove()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert len(list(kept.folder.glob("*/batch-*"))) == 1
    alone = KeptSamples(tmp_path / "y.samples")
    evaluate(model, Evaluation(QUICK, dataset="toy", splits=("test", "validation"), n=2), kept=alone)
    assert len(set(alone.used)) == 1, "an unconditional model draws the same images for every split"
    alone.remove()
    assert not alone.folder.exists()


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldm_edu.files.save_file", full)
    with pytest.raises(LDMError, match="batch-.*cannot be written: the disk is full"):
        draw_set(small(), QUICK, range(2), kept=KeptSamples(tmp_path))


# --- What is compared with what ---


def test_each_set_is_compared_with_other_real_images(shipped):
    """Against the same by hand."""
    model, n = shipped["toy-class"], 10
    measured = evaluate(model, Evaluation(QUICK, n=n), "toy-class")
    data, extractor = ToyCOCO("test"), find_extractor("toy-features")
    real = torch.stack([data[i]["image"] for i in range(2 * n)])
    batch = collate([ToyCOCO("test", keys=("class",))[i] for i in range(n)])
    with torch.no_grad():
        back = model.first_stage.reconstruct(real[:n])
    drawn = torch.cat([model.sample({"class": batch["class"][i : i + 1]}, steps=2, seed=i) for i in range(n)])
    reference = extractor(real[n:])
    for name, images in zip(SETS, (drawn, back, real[:n])):
        x = extractor(images)
        tolerance = {"rel": 0.02}  # here the images are not rounded to bytes
        assert measured.one(NAMES[0], set=name).value == pytest.approx(frechet_distance(reference, x), **tolerance)
        kernel = kernel_distance(reference, x, subset_size=n)
        assert measured.one(NAMES[1], set=name).value == pytest.approx(kernel.value, rel=0.05, abs=0.02)
        shares = precision_recall(reference, x)
        found = [measured.one(score, set=name).value for score in NAMES[2:4]]
        assert found == pytest.approx(shares, abs=1.01 / n)
    assert measured.seed == 0 and all(m.n == n for m in measured)


@pytest.mark.parametrize("name", ["toy-class", "toy-attributes", "toy-layout"])
def test_every_shipped_kind_of_condition_is_scored(name):
    measured = evaluate(LatentDiffusion.from_pretrained(name), Evaluation(replace(QUICK, sampler="dpm_solver_pp"), n=6))
    more = ["boxes hit"] if name == "toy-layout" else []
    wanted = {s: [NAMES[0], *([EXCESS] if s != "real halves" else []), *NAMES[1:], *more] for s in SETS}
    assert [(m.of["set"], m.name) for m in measured] == [(s, score) for s in SETS for score in wanted[s]]
    for m in measured.of(*NAMES, EXCESS):
        assert abs(m.value) < 1e3 and m.of["features"] == "ToyFeatures" and m.of["resize"] == "as they are"
        drawn = {"sampler": "dpm_solver_pp", "steps": 2, "scale": 3.0} if m.of["set"] == "drawn" else {}
        assert m.of.items() >= {"split": "test", **drawn}.items() and ("sampler" in m.of) == bool(drawn)
    told = table(measured)
    for words in ("test, 6 images of each set", "dpm_solver_pp", "ToyFeatures", "as they are", EXCESS, *NAMES):
        assert words in told


def test_real_halves_are_nearer_than_noise():
    measured = evaluate(small(), Evaluation(QUICK, dataset="toy", n=24))
    for name in NAMES[:2]:
        assert measured.one(name, set="real halves").value < 0.5 * measured.one(name, set="drawn").value
    assert measured.one("precision", set="drawn").value < measured.one("precision", set="real halves").value
    assert "scale" not in measured.one(NAMES[0], set="drawn").of, "an unconditional model has none"


def test_another_sampler_changes_the_numbers_and_is_recorded(shipped):
    ddim, other = (
        evaluate(shipped["toy-class"], Evaluation(replace(QUICK, sampler=name), n=5)) for name in ("ddim", "heun")
    )
    assert ddim.one(NAMES[0], set="drawn").value != other.one(NAMES[0], set="drawn").value
    assert ddim.one(NAMES[0], set="real halves") == other.one(NAMES[0], set="real halves")
    assert other.keys("sampler") == ["heun"] and "2 steps of heun" in table(other)


def test_few_images_leave_out_what_needs_more():
    measured = evaluate(small(), Evaluation(QUICK, dataset="toy", n=2))
    assert {m.name for m in measured} == {EXCESS, *NAMES} - {"precision", "recall"}


class MeanBrightness(Conditioner):
    """Of the image itself, never dropped."""

    keys = ("low_resolution", "mask")
    vector_dim = 3

    def forward(self, batch):
        return Condition(vector=batch["low_resolution"].mean((2, 3)) + batch["mask"].mean((2, 3)))

    def null(self, b=1):
        return Condition()


def test_a_conditioner_of_ones_own_needs_nothing_more():
    measured = evaluate(small(MeanBrightness()), Evaluation(QUICK, dataset="toy-faces", n=4))
    assert len(measured) == 17 and "scale" not in measured.one(NAMES[0], set="drawn").of
    assert "low_resolution and mask of sample i" in measured.about


def test_a_small_folder_of_images_is_halved_and_that_is_said(tmp_path):
    for i, image in enumerate(open_dataset("toy", size=16).__getitems__(range(90))):
        save(image["image"], tmp_path / "scenes" / f"{i}.png")
    options = Evaluation(QUICK, dataset="folder", data_dir=tmp_path, features="toy-features", n=64)
    with_classes = small(ClassConditioner(1, 32))
    for model in (small(), with_classes):
        measured = evaluate(model, options)
        size = len(open_dataset("folder", tmp_path, "test", 16))
        n = measured.one(NAMES[0], set="drawn").n
        assert n == size // 2 > 2 and {m.n for m in measured} == {n}
        assert f"Split 'test' of 'folder' has {size} images, so each set has {n} in place of 64." in table(measured)


def test_sets_are_the_first_images_of_a_split():
    data, model = ToyCOCO("test", size=16), small()
    images = real_set(data, range(3, 8), chunk=2)
    assert torch.equal(images, torch.stack([to_uint8(data[i]["image"]) for i in range(3, 8)]))
    with torch.no_grad():
        back = to_uint8(model.first_stage.reconstruct(images.float() / 127.5 - 1))
    assert (reconstructed_set(model, images, chunk=2).int() - back.int()).abs().max() <= 1


# --- Several sets ---


def features_by_hand(model, k: int, n: int, sets: int, seed: int) -> dict[str, tuple]:
    """Features and probabilities of set k of each kind, and of the images that it is compared with."""
    data, extractor = ToyCOCO("test", size=16), find_extractor("toy-features")
    first, rows = seed + n * k, list(range(n * k, n * (k + 1)))
    real, behind = (real_set(data, range(begin, begin + n)) for begin in (n * k, n * (sets + k)))
    drawn = draw_set(model, replace(QUICK, seed=first), rows, ToyCOCO("test", size=16, keys=("class",)))
    sets_of_images = dict(zip((*SETS, "behind"), (drawn, reconstructed_set(model, real, chunk=4), real, behind)))
    return {
        name: (extract(extractor, [from_bytes(images)], n), extractor.probabilities(from_bytes(images)))
        for name, images in sets_of_images.items()
    }


def numbers_by_hand(model, k: int, n: int, sets: int, seed: int) -> dict[tuple[str, str], float]:
    """All distances of set k, by set and name."""
    features = features_by_hand(model, k, n, sets, seed)
    (behind, _), found = features.pop("behind"), {}
    for name, (x, p) in features.items():
        kernel = kernel_distance(behind, x).value
        both = frechet_distance(behind, x), kernel, *precision_recall(behind, x, 3), inception_score(p, 2).value
        found |= {(name, score): value for score, value in zip(NAMES, both)}
    floor = found["real halves", NAMES[0]]
    return found | {(name, EXCESS): found[name, NAMES[0]] - floor for name in SETS[:2]}


N, SEED = 6, 3  # images of each set, and the seed of the first one


@pytest.fixture(scope="module")
def in_sets():
    """A model and its evaluations: of one set of each kind, of two and of three."""
    model = small(ClassConditioner(24, 32), recipe={"dataset": "toy"})
    options = Evaluation(replace(QUICK, seed=SEED), n=N)
    return model, {sets: evaluate(model, replace(options, sets=sets)) for sets in (1, 2, 3)}


def test_one_set_is_the_first_images_of_the_split_and_those_behind_them(in_sets):
    model, measured = in_sets
    wanted = numbers_by_hand(model, 0, N, 1, SEED)
    assert {(m.of["set"], m.name): m.value for m in measured[1]} == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert not measured[1].keys("sets") and "1.96 standard errors" in measured[1].about
    assert numbers(measured[1]) == numbers(evaluate(model, Evaluation(replace(QUICK, seed=SEED), n=N)))


def test_the_excess_is_what_a_distance_is_above_that_of_real_images(in_sets):
    _, measured = in_sets
    floor = measured[1].one(NAMES[0], set="real halves").value
    for name in SETS[:2]:
        far, excess = (measured[1].one(score, set=name) for score in (NAMES[0], EXCESS))
        assert excess.value == far.value - floor and excess.n == far.n == N and dict(excess.of) == dict(far.of)
    assert not measured[1].of(EXCESS, set="real halves").numbers, "it would be 0"
    for name in SETS[:2]:
        far, excess, floor = (
            measured[3].one(score, set=of).value
            for score, of in ((NAMES[0], name), (EXCESS, name), (NAMES[0], "real halves"))
        )
        assert excess == pytest.approx(far - floor)


@pytest.mark.parametrize("sets", [2, 3])
def test_several_sets_are_each_of_other_images_drawn_and_real(sets, in_sets):
    """The mean of numbers by hand, with the interval that scipy gives; the order is that of a single set."""
    model, measured = in_sets
    by_hand = [numbers_by_hand(model, k, N, sets, SEED) for k in range(sets)]
    together, singly = measured[sets].of(*NAMES, EXCESS), measured[sets].of(BY_SET)
    assert len(together) + len(singly) == len(measured[sets]) and len(singly) == 2 * sets
    for m in singly:
        wanted = by_hand[m.of["number"]][m.of["set"], EXCESS]
        assert m.value == pytest.approx(wanted, rel=1e-6, abs=1e-9) and m.n == N
    for m in together:
        values = [found[m.of["set"], m.name] for found in by_hand]
        assert m.value == pytest.approx(np.mean(values), rel=1e-6, abs=1e-9) and m.of["sets"] == sets and m.n == N
        if np.std(values) < 1e-9:
            assert m.low == pytest.approx(m.high)
            continue
        interval = stats.t.interval(0.95, sets - 1, loc=np.mean(values), scale=stats.sem(values))
        assert (m.low, m.high) == pytest.approx(interval, rel=1e-6, abs=1e-9)
    kinds = [[(m.name, m.of["set"]) for m in found] for found in (measured[1], together)]
    assert kinds[0] == kinds[1]
    assert len(set(measured[sets].values(NAMES[0]))) == 3 and measured[sets].seed == SEED


def test_several_sets_are_told_in_table_scores_and_file(in_sets, tmp_path):
    _, measured = in_sets
    told = table(measured[3])
    assert f"test, {N} images of each set, 3 sets of each kind; drawn by" in told
    assert "a number is the mean of 3" in told and "Student's t" in told and "1.96 standard" not in told
    assert "sets of each kind" not in table(measured[1]) and "Diversity" not in told
    m = measured[3].one(EXCESS, set="drawn")
    lines = {line[:30].strip(): line for line in told.splitlines()}
    assert f"{EXCESS:30s} {m.value:.3f} ({m.low:.3f} to {m.high:.3f})" in lines[EXCESS]
    assert lines[EXCESS].count("(") == 2 and lines[NAMES[0]].count("(") == 3
    found = scores(measured[3])
    assert found["sets"] == 3 and "sets" not in scores(measured[1])
    assert found["test"]["drawn"][EXCESS] == m.text(3)
    assert [EXCESS in found["test"][head] for head in ("drawn", "ceiling", "real halves")] == [True, True, False]
    measured[3].save(tmp_path / "three.json")
    assert find_evaluation(tmp_path / "three.json") == measured[3]


def test_evaluations_of_other_numbers_of_sets_are_not_alike(in_sets):
    model, measured = in_sets
    again = evaluate(model, Evaluation(replace(QUICK, seed=SEED), n=N, sets=2))
    assert is_alike(measured[2], again) and numbers(measured[2]) == numbers(again)
    assert not any(is_alike(measured[a], measured[b]) for a, b in ((1, 2), (2, 1), (2, 3)))


def test_shares_of_several_sets_are_those_of_all_images(shipped):
    """Also of a word that the first set has in no caption; diversity is measured once."""
    model, n, sets = shipped["toy-text2image"], 4, 2
    options = Evaluation(replace(QUICK, steps=4), n=n, sets=sets, splits=("test",), varied=2)
    measured, reader = evaluate(model, options), SceneReader.from_pretrained("scene-reader")
    texts, data = captions_of("test", n * sets), ToyCOCO("test", keys=("caption",))
    drawn = torch.cat([draw_set(model, replace(options.drawing, seed=k), range(k, k + n), data) for k in (0, n)])
    back = reconstructed_set(model, real_set(ToyCOCO("test"), range(n * sets)), chunk=4)
    for name, images in (("drawn", drawn), ("reconstructed", back)):
        accuracy = prompt_accuracy(from_bytes(images), texts, reader)
        shares = dict(zip(evaluation.PROMPTS, (accuracy.prompts, accuracy.exact, accuracy.things, accuracy.relations)))
        shares |= {word: accuracy.words[word] for word in evaluation.WORDS}
        wanted = {score: Measurement.share(score, share.right, share.n) for score, share in shares.items() if share.n}
        found = {m.name: m for m in measured.of(*evaluation.PROMPTS, set=name)}
        assert found.keys() == wanted.keys()
        for score, m in found.items():
            assert (m.value, m.low, m.high, m.n) == pytest.approx(
                [getattr(wanted[score], part) for part in ("value", "low", "high", "n")]
            )
            assert "sets" not in m.of and m.unit == "%"
    first = prompt_accuracy(from_bytes(drawn[:n]), texts[:n], reader)
    assert [word for word in evaluation.WORDS if word in found and not first.words[word].n] == ["right"]
    assert measured.one("diversity", set="drawn").n == 2 and "Diversity is measured once" in table(measured)
    assert scores(measured)["test"]["drawn"]["number"].endswith("n = 8)")


@pytest.mark.parametrize("calls", [1, 3, 4])
def test_an_interrupted_evaluation_of_several_sets_goes_on_with_the_same_numbers(calls, tmp_path, monkeypatch):
    """Seeds 0 to 6 are drawn in batches of 4 and 3, seeds 7 to 13 in batches of 1, 4 and 2."""
    model = small(ClassConditioner(24, 32), recipe={"dataset": "toy"})
    options, kept = Evaluation(QUICK, n=7, sets=2), KeptSamples(tmp_path / "kept")
    with monkeypatch.context() as patched:
        drawn = count_drawn(model, patched)
        whole = evaluate(model, options)
    assert drawn == [4, 3, 1, 4, 2]
    with monkeypatch.context() as patched:
        stop_after(model, calls, patched)
        with pytest.raises(Stopped):
            evaluate(model, options, kept=kept)
    again = KeptSamples(kept.folder)
    with monkeypatch.context() as patched:
        left = count_drawn(model, patched)
        assert numbers(evaluate(model, options, kept=again)) == numbers(whole)
    assert left == drawn[calls:] and len(set(again.used)) == 2
    again.remove()
    assert not kept.folder.exists()


def test_a_small_folder_is_cut_into_parts_of_all_sets(tmp_path):
    for i, image in enumerate(open_dataset("toy", size=16).__getitems__(range(90))):
        save(image["image"], tmp_path / "scenes" / f"{i}.png")
    options = Evaluation(QUICK, dataset="folder", data_dir=tmp_path, features="toy-features", n=64, sets=2)
    size, model = len(open_dataset("folder", tmp_path, "test", 16)), small()
    measured = evaluate(model, options)
    assert {m.n for m in measured} == {size // 4} and size // 4 >= 2
    assert f"has {size} images, so each set has {size // 4} in place of 64." in measured.about
    most = size // 4  # sets of which each has two images, and two to be compared with
    assert {m.n for m in evaluate(model, replace(options, sets=most))} == {2}
    told = f"split 'test' of 'folder' has {size} images that fit, but for sets={most + 1}, {2 * most + 2} parts of"
    with pytest.raises(LDMError, match=told):
        evaluate(model, replace(options, sets=most + 1))


# --- Captions ---


def test_prompts_are_scored_as_on_the_page(shipped):
    """Against `score_prompts` and `score_reconstructions`; only the rounding to bytes is new."""
    model, n, steps = shipped["toy-text2image"], 12, 4
    options = Evaluation(Drawing(steps=steps, batch_size=64), n=n, varied=3)
    measured, reader = evaluate(model, options), SceneReader.from_pretrained("scene-reader")
    for split in ("test", "unseen_pairs"):
        drawn = score_prompts(model, reader, captions_of(split, n), 3.0, steps).rows()
        ceiling = score_reconstructions(model, reader, split, n).rows()
        found = scores(measured)[split]
        for name in evaluation.PROMPTS:
            assert found["drawn"][name] == drawn[name] and found["ceiling"][name] == ceiling[name], name
            line = next(line for line in table(measured.of(split=split)).splitlines() if line.startswith(name))
            assert drawn[name] in line and ceiling[name] in line
        assert tuple(name for name in drawn if not name.startswith("judge")) == evaluation.PROMPTS
        assert measured.one("number", set="drawn", split=split).n == n
    distance = ToyFeatures.from_pretrained("toy-features").distance
    means = diversity(model, captions_of("test", 3), distance, 4, 3.0, steps)
    for mean, name in zip(means, ("drawn", "fitting scenes")):
        m = measured.one("diversity", set=name)
        assert m.value == pytest.approx(mean.value, abs=2e-3) and m.n == 3
        assert (m.high - m.value) / 1.96 == pytest.approx(mean.error, abs=2e-3)
    assert "judge, rendered" in measured.about and "diversity of 3 captions of test" in table(measured)


def test_the_scale_with_most_captions_is_chosen(shipped, monkeypatch):
    right = {1.0: 1, 1.5: 2, 2.0: 3, 3.0: 4, 4.0: 4, 6.0: 2, 8.0: 0}
    seen = []

    def pretend(model, drawing, rows, conditions, kept, name="drawn"):
        seen.append((name, drawing.scale, len(rows)))
        return torch.zeros(len(rows), 3, 64, 64, dtype=torch.uint8)

    def judge(images, captions, reader):
        exact = evaluation.Share(right[seen[-1][1]], len(images))
        return replace(prompt_accuracy(images, captions, reader), exact=exact)

    monkeypatch.setattr(evaluation, "draw_set", pretend)
    monkeypatch.setattr(evaluation, "prompt_accuracy", judge)
    measured = evaluate(shipped["toy-text2image"], Evaluation(QUICK, n=9, choose=True, splits=("test",), varied=0))
    assert seen == [*((f"scale {s:g}", s, 4) for s in right), ("drawn", 3.0, 9)]
    assert scores(measured)["choice"] == {str(s): k / 4 for s, k in right.items()} and scores(measured)["scale"] == 3.0
    assert table(measured).count("of the captions drawn exactly") == 7


def test_the_clip_score_stands_beside_that_of_real_images(shipped, monkeypatch):
    asked = []

    def pretend(images, captions, clip, device):
        asked.append((images, list(captions), clip))
        return evaluation.Mean(float(len(asked)), 0.5)

    monkeypatch.setattr(evaluation, "clip_score", pretend)
    options = Evaluation(QUICK, n=4, splits=("test",), varied=0, clip="some/clip")
    measured = evaluate(shipped["toy-text2image"], options)
    assert [m.value for m in measured.of("CLIP score")] == [2.0, 3.0, 4.0], "the first call only asks whether it works"
    for images, captions, clip in asked[1:]:
        assert captions == captions_of("test", 4) and clip == "some/clip" and images.shape == (4, 3, 64, 64)
        assert -1 <= images.min() < images.max() <= 1
    assert "CLIP score" in table(measured) and measured.one("CLIP score", set="drawn").of["features"] == "CLIP clip"


# --- Files ---


def test_an_evaluation_is_saved_and_the_last_one_found(tmp_path):
    assert last_evaluation(tmp_path / "nowhere") is None and last_evaluation(tmp_path) is None
    first, second = (
        evaluate(small(), Evaluation(QUICK, dataset="toy", n=n), "small", command="a command") for n in (2, 3)
    )
    first.save(tmp_path / "z.json")
    second.save(tmp_path / "a.json")
    for name, time in (("z", 1), ("a", 2)):
        os.utime(tmp_path / f"{name}.json", (time, time))
    assert last_evaluation(tmp_path) == second == load_measurements(tmp_path / "a.json")
    assert second.title.startswith("small: images of 16²") and second.command == "a command"
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(CheckpointError, match="b.json is not JSON"):
        last_evaluation(tmp_path)


# --- What is refused ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "dataset: the model does not say on which data set it was trained"),
        ({"dataset": "imagenet"}, "'imagenet' does not exist; known: toy"),
        ({"dataset": "folder", "data_dir": "nowhere"}, "nowhere: there is no such folder"),
        ({"dataset": "toy", "splits": ("holdout",)}, "split 'holdout' does not exist"),
        ({"dataset": "toy", "n": 1}, "n=1 should be a whole number, at least 2"),
        ({"dataset": "toy", "choose": True}, "choose: a scale is chosen only for a model that reads captions"),
        ({"dataset": "toy", "varied": 4}, "varied: diversity is measured only of a model that reads captions"),
        ({"dataset": "toy", "varied": 1}, "varied=1: diversity is a mean over captions"),
        ({"dataset": "toy", "clip": "x"}, "clip: a CLIP score compares images with captions, but the model reads none"),
        ({"dataset": "toy", "features": "resnet"}, "'resnet' is not known; it can be 'toy-features'"),
        ({"dataset": "toy", "drawing": replace(QUICK, sampler="euler")}, "unknown sampler 'euler'"),
        ({"dataset": "toy", "drawing": replace(QUICK, steps=51)}, "steps=51 should be a whole number, 1 to 50"),
        ({"dataset": "toy", "drawing": replace(QUICK, seed=2**32 - 1)}, "seed=4294967295 should be"),
        ({"dataset": "toy", "drawing": replace(QUICK, batch_size=0)}, "batch_size=0 should be"),
        ({"dataset": "toy", "sets": 0}, "sets=0 should be a whole number, 1 to"),
        ({"dataset": "toy", "sets": -1}, "sets=-1 should be a whole number, 1 to"),
        ({"dataset": "toy", "sets": True}, "sets=True should be a whole number, 1 to"),
        ({"dataset": "toy", "sets": 20_000}, "50000 images that fit, but for sets=20000, 40000 parts of at least 2 "),
        ({"dataset": "toy", "sets": 2**30 - 1}, "but for sets=1073741823, 2147483646 parts of at least 2 are needed"),
        ({"dataset": "toy", "sets": 10**30}, "sets=1000000000000000000000000000000 should be a whole number, 1 to"),
        ({"dataset": "toy", "sets": 3, "drawing": replace(QUICK, seed=2**32 - 9)}, "seed=4294967287 should be"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_drawn(options, said, monkeypatch):
    model = small()
    monkeypatch.setattr(model, "sample", None)
    with pytest.raises(LDMError, match=said):
        evaluate(model, Evaluation(**{"drawing": QUICK, "n": 4} | options))


def test_a_data_set_that_does_not_fit_is_refused(shipped, tmp_path, monkeypatch):
    text = shipped["toy-text2image"]
    with pytest.raises(LDMError, match="the model reads caption, but the samples of 'toy-faces' have no caption"):
        evaluate(text, Evaluation(QUICK, dataset="toy-faces", n=4))
    with pytest.raises(LDMError, match="choose looks at captions of validation"):
        evaluate(text, Evaluation(QUICK, n=4, choose=True, splits=("validation",)))
    for name in ("a", "b"):
        for i in range(30):
            save(torch.zeros(3, 16, 16), tmp_path / name / f"{i}.png")
    with pytest.raises(LDMError, match="dataset: 'folder' does not fit the model: .*class"):
        model = small(ClassConditioner(1, 32))
        monkeypatch.setattr(evaluation, "_rows", lambda *_: {"class": torch.tensor([1])})
        evaluate(model, Evaluation(QUICK, dataset="folder", data_dir=tmp_path, features="toy-features", n=4))


def test_a_split_of_too_few_images_is_refused(tmp_path):
    save(torch.zeros(3, 16, 16), tmp_path / "2.png")
    split = next(s for s in ("train", "validation", "test") if _has(tmp_path, s))
    with pytest.raises(LDMError, match=f"split '{split}' of 'folder' has 1 images"):
        evaluate(small(), Evaluation(QUICK, dataset="folder", data_dir=tmp_path, splits=(split,), n=4))


def _has(folder, split) -> bool:
    try:
        return len(open_dataset("folder", folder, split, 16)) == 1
    except DataError:
        return False


def test_images_of_no_size_for_the_features_are_refused_before_the_work(monkeypatch):
    model = small(size=8)
    monkeypatch.setattr(model, "sample", None)
    with pytest.raises(LDMError, match="at least 16 pixels along each side"):
        evaluate(model, Evaluation(QUICK, dataset="toy", n=4))


def test_photographs_need_the_features_of_another_network(monkeypatch, tmp_path):
    """Neither network is at hand: both are named; a damaged file is not passed over."""

    def absent(name, weights_dir, device):
        raise LDMError(f"{name} was not found")

    def damaged(name, weights_dir, device):
        raise CheckpointError(f"{name} is damaged")

    pick = inspect.unwrap(evaluation.pick_extractor)
    monkeypatch.setattr(evaluation, "find_extractor", absent)
    with pytest.raises(LDMError, match="features: 'celeba' needs .*inception was not found. vgg16 was not found"):
        pick(None, "celeba", tmp_path, torch.device("cpu"))
    monkeypatch.setattr(evaluation, "find_extractor", damaged)
    with pytest.raises(CheckpointError, match="inception is damaged"):
        pick(None, "celeba", tmp_path, torch.device("cpu"))
    monkeypatch.setattr(evaluation, "find_extractor", lambda name, *_: name)
    assert [pick(None, name, None, torch.device("cpu")) for name in ("toy", "toy-faces", "coco")] == [
        "toy-features",
        "toy-features",
        "inception",
    ]
