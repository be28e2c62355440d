"""The judge: what it is asked, what it decides, and what is counted."""

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm_edu.data.toy.captions import captions, relation
from ldm_edu.data.toy.datasets import ToyCOCO
from ldm_edu.data.toy.scenes import COLOURS, SHAPES, SIZES, Scene, Thing, draw_scene, render
from ldm_edu.errors import LDMError
from ldm_edu.evaluation.judge import (
    CELLS,
    PromptAccuracy,
    Reading,
    SceneReader,
    Share,
    augment,
    decide,
    heat_map,
    prompt_accuracy,
    reader_accuracy,
    reader_loss,
    reader_targets,
    verdict,
    what,
)


def drawn(n: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [draw_scene(rng) for _ in range(n)]


def sure(scenes: list[Scene]) -> Reading:
    """The reading of somebody who knows the scenes."""
    targets, b = reader_targets(scenes), len(scenes)
    parts = {"shape": 3, "colour": 8, "size": 2, "place": 2}
    maps = {name: torch.zeros(b, c, CELLS, CELLS) for name, c in parts.items()}
    middle = torch.full((b, CELLS, CELLS), -9.0)
    for i, scene in enumerate(scenes):
        for j in range(len(scene.things)):
            column, row = (targets["middle"][i, j] * CELLS).long().tolist()
            middle[i, row, column] = 9.0
            maps["place"][i, :, row, column] = targets["place"][i, j]
            for name in ("shape", "colour", "size"):
                maps[name][i, targets[name][i, j], row, column] = 9.0
    segmentation = torch.nn.functional.one_hot(targets["segmentation"], 4).permute(0, 3, 1, 2) * 20.0
    return Reading(middle, maps["shape"], maps["colour"], maps["size"], maps["place"], segmentation, targets["depth"])


def test_what_is_known_is_decided_for_a_thousand_scenes():
    scenes = drawn(1000)
    for found, scene in zip(decide(sure(scenes)), scenes, strict=True):
        assert sorted(map(what, found)) == sorted(map(what, scene.things))
        for thing in scene.things:
            same = next(f for f in found if what(f) == what(thing))
            assert math.isclose(same.x, thing.x, abs_tol=1e-5) and math.isclose(same.y, thing.y, abs_tol=1e-5)


def test_two_middles_never_share_a_cell_and_hardly_ever_touch():
    """Neighbours would hide each other from `decide`: of 20,000 scenes there are ten such, so it costs nothing."""
    nearest = []
    for scene in drawn(2000, seed=1):
        middle = (reader_targets([scene])["middle"][0] * CELLS).long()
        pairs = [(middle[i] - middle[j]).abs().max().item() for i in range(len(middle)) for j in range(i)]
        nearest.append(min(pairs, default=CELLS))
    assert min(nearest) >= 1 and sum(d == 1 for d in nearest) <= 10


def test_the_truth_has_no_loss_and_anything_else_has():
    scenes = drawn(20)
    reading, targets = sure(scenes), reader_targets(scenes)
    loss, terms = reader_loss(reading, targets)
    assert loss < 0.02
    for name in ("shape", "colour", "size"):
        wrong = reading._replace(**{name: getattr(reading, name).roll(1, dims=1)})
        worse, parts = reader_loss(wrong, targets)
        assert parts[name] > 5 and all(torch.equal(parts[k], terms[k]) for k in terms if k != name)
    assert reader_loss(reading._replace(depth=reading.depth + 1), targets)[1]["depth"] == pytest.approx(0.5, abs=1e-4)
    assert reader_loss(reading._replace(middle=reading.middle.roll(3, dims=1)), targets)[1]["middle"] > 5


def test_rows_without_a_thing_change_nothing():
    """The terms, thing by thing; a padded row may point at the cell of a thing."""
    torch.manual_seed(0)
    scenes = drawn(8)
    assert len({len(scene.things) for scene in scenes}) > 1
    targets, reading = reader_targets(scenes), SceneReader((16, 16, 16))(render(scenes))
    targets["middle"][targets["shape"] < 0] = targets["middle"][0, 0]
    loss, terms = reader_loss(reading, targets)
    by_hand = {name: [] for name in ("shape", "colour", "size", "place")}
    for i, scene in enumerate(scenes):
        for k in range(len(scene.things)):
            column, row = (targets["middle"][i, k] * CELLS).long().tolist()
            for name in ("shape", "colour", "size"):
                log_p = getattr(reading, name)[i, :, row, column].log_softmax(0)
                by_hand[name].append(-log_p[targets[name][i, k]])
            by_hand["place"].append((reading.place[i, :, row, column] - targets["place"][i, k]).abs().mean())
    for name, values in by_hand.items():
        torch.testing.assert_close(terms[name], torch.stack(values).mean())
    wider = {k: torch.cat([v, v[:, :1]], 1) for k, v in targets.items() if k not in ("segmentation", "depth")}
    for name in ("shape", "colour", "size"):
        wider[name][:, -1] = -1
    torch.testing.assert_close(reader_loss(reading, targets | wider)[0], loss)


def test_the_heat_is_one_at_a_middle_and_nowhere_more():
    middle = torch.rand(50, 3, 2) * 0.8 + 0.1
    heat = heat_map(middle, torch.ones(50, 3, dtype=torch.bool))
    cells = (middle * CELLS).long()
    at = heat[torch.arange(50)[:, None], cells[..., 1], cells[..., 0]]
    assert heat.max() <= 1 and (at > 0.6).all()  # half a cell's diagonal away at most
    assert heat_map(middle, torch.zeros(50, 3, dtype=torch.bool)).max() == 0


def test_a_reader_survives_its_file(tmp_path):
    reader = SceneReader((16, 24, 32)).eval()
    reader.provenance = {"scores": {"rendered": "none"}}
    reader.save_pretrained(tmp_path / "reader")
    again = SceneReader.from_pretrained(tmp_path / "reader")
    x = torch.randn(2, 3, 64, 64)
    assert again.provenance == reader.provenance and torch.equal(again(x).segmentation, reader(x).segmentation)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 64, 64), (2, 3, 64, 65)])
def test_pictures_of_another_size_are_refused(shape):
    with pytest.raises(LDMError, match="64"):
        SceneReader((8, 8, 8)).read(torch.zeros(shape))


def test_spoiled_pictures_depend_on_their_own_numbers_only():
    x, u, noise = render(drawn(5)), torch.rand(5, 2), torch.randn(5, 3, 64, 64)
    whole = augment(x, u, noise)
    for i in range(5):
        torch.testing.assert_close(
            augment(x[i : i + 1], u[i : i + 1], noise[i : i + 1]), whole[i : i + 1], atol=1e-6, rtol=0
        )
    assert whole.abs().max() <= 1


@pytest.mark.parametrize("k, n, low, high", [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634)])
def test_intervals_are_wilsons(k, n, low, high):
    """Values from Wilson's formula worked out by hand: 0 of n gives z^2 / (n + z^2)."""
    assert Share(k, n).interval == pytest.approx((low, high), abs=2e-4)


def test_no_trials_say_nothing():
    assert (
        math.isnan(Share(0, 0).share) and Share(0, 0).interval == (0.0, 1.0) and str(Share(0, 0)) == "no case (n = 0)"
    )


def test_many_equal_things_are_matched_at_once():
    """Without relations one matching is as good as another; trying all orders of twelve would take hours."""
    found = [Thing("sphere", "red", "small", float(i), 0.0) for i in range(5)]
    v = verdict(" and ".join(["a small red ball"] * 12), found)
    assert len(v.missing) == 7 and not v.extra and len(v.match) == 12


def test_true_captions_are_drawn_and_false_ones_are_not():
    """For many scenes and phrasings: the verdict on what is there is clean; one changed word is noticed."""
    rng = np.random.default_rng(3)
    for scene in drawn(300, seed=2):
        for text in captions(scene, rng):
            good = verdict(text, scene.things)
            assert not good.missing and all(good.relations)
        first, *rest = scene.things
        colour = next(c for c in COLOURS if c != first.colour and (first.size, c, first.shape) not in map(what, rest))
        assert verdict(text, [replace(first, colour=colour), *rest]).missing == (what(first),)
        assert verdict(text, rest).missing == (what(first),)
        extra = Thing(first.shape, colour, first.size, 0.0, 0.0)
        assert verdict(text, [*scene.things, extra]).extra == (extra,)


def test_turned_relations_are_noticed():
    a, b = Thing("sphere", "red", "small", -1.0, 0.0), Thing("cube", "blue", "large", 1.0, 0.1)
    turn = {"left": "right of", "right": "left of", "front": "behind", "behind": "in front of"}
    link = {"left": "left of", "right": "right of", "front": "in front of", "behind": "behind"}
    true = relation(a, b)
    assert verdict(f"a small red sphere {link[true]} a big blue cube", [a, b]).relations == (True,)
    assert verdict(f"a small red sphere {turn[true]} a big blue cube", [a, b]).relations == (False,)


def test_the_same_thing_twice_must_be_there_twice():
    ball = Thing("sphere", "red", "small", -1.0, 0.0)
    text = "a small red sphere and a small red ball"
    assert verdict(text, [ball]).missing == (what(ball),)
    assert not verdict(text, [ball, replace(ball, x=1.0)]).missing


def test_accuracy_counts_prompts_things_and_relations_apart(monkeypatch):
    texts = ["a small red sphere left of a big blue cube", "a big green cylinder"]
    reader = SceneReader((8, 8, 8))
    found = [
        [Thing("sphere", "red", "small", -1.0, 0.0), Thing("cube", "white", "large", 1.0, 0.0)],
        [Thing("cylinder", "green", "large", 0.0, 0.0), Thing("cube", "red", "small", 1.0, 0.0)],
    ]
    monkeypatch.setattr(reader, "read", lambda images: found)
    score = prompt_accuracy(torch.zeros(2, 3, 64, 64), texts, reader)
    assert isinstance(score, PromptAccuracy)
    shares = {name: getattr(score, name) for name in ("prompts", "exact", "things", "relations")}
    counted = {name: (share.right, share.n) for name, share in shares.items()}
    assert counted == {"prompts": (1, 2), "exact": (0, 2), "things": (2, 3), "relations": (0, 1)}
    assert "not measured" in str(score)  # this judge has no scores of its own, and that is said


def shown(monkeypatch, captions, found):
    """`prompt_accuracy` of images in which the judge finds these things."""
    reader = SceneReader()
    monkeypatch.setattr(reader, "read", lambda images: found)
    return prompt_accuracy(torch.zeros(len(captions), 3, 64, 64), captions, reader)


RED, BLUE = Thing("sphere", "red", "small", -1.0, 0.0), Thing("cube", "blue", "large", 1.0, 0.0)
SAID = "a small red ball left of a big blue box"


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ([RED, BLUE], {}),
        ([replace(RED, x=1.0), replace(BLUE, x=-1.0)], {"left": (0, 1)}),
        ([replace(RED, colour="green"), BLUE], {"colour": (1, 2), "left": (0, 0)}),
        ([replace(RED, shape="cube", size="large"), BLUE], {"shape": (1, 2), "size": (1, 2), "left": (0, 0)}),
        ([BLUE], {"number": (0, 1), "size": (1, 2), "colour": (1, 2), "shape": (1, 2), "left": (0, 0)}),
        ([RED, BLUE, replace(BLUE, colour="red", y=2.0)], {"number": (0, 1)}),
        # the red sphere is taken for the missing one, the white can is nobody's
        ([replace(RED, size="large"), BLUE, Thing("cylinder", "white", "large", 0.0, 2.0)],
         {"number": (0, 1), "size": (1, 2), "left": (0, 0)}),
        # both are missing: each is compared with the one that is more like it
        ([replace(BLUE, size="small"), replace(RED, colour="white")],
         {"size": (1, 2), "colour": (1, 2), "left": (0, 0)}),
        ([], {"number": (0, 1), "size": (0, 2), "colour": (0, 2), "shape": (0, 2), "left": (0, 0)}),
    ],
)  # fmt: skip
def test_each_class_of_words_is_counted_apart(found, wrong, monkeypatch):
    words = shown(monkeypatch, [SAID], [found]).words
    right = {"number": (1, 1), "size": (2, 2), "colour": (2, 2), "shape": (2, 2), "left": (1, 1)}
    right |= {"right": (0, 0), "front": (0, 0), "behind": (0, 0)}
    assert {word: (share.right, share.n) for word, share in words.items()} == right | wrong


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_equal_things_are_matched_so_that_relations_hold(order, monkeypatch):
    """Whichever of them the judge is surer of."""
    pair = [replace(RED, x=-1.0), replace(RED, x=1.0)]
    said = "a small red ball left of a small red sphere"
    found = verdict(said, [pair[i] for i in order])
    assert found.relations == (True,) and not found.missing and not found.extra
    assert [thing.x for thing in found.match] == [-1.0, 1.0]
    alone = verdict(said, pair[:1])
    assert alone.missing == (what(RED),) and alone.relations == (False,)
    three = verdict(said, [*pair, replace(RED, x=3.0)])
    assert len(three.extra) == 1 and three.relations == (True,)


def test_a_relation_of_a_missing_thing_says_nothing_about_the_word(monkeypatch):
    """It counts against `relations`, as before, and not against the word."""
    score = shown(monkeypatch, [SAID, SAID], [[RED], [RED, BLUE]])
    assert (score.relations.right, score.relations.n) == (1, 2)
    assert (score.words["left"].right, score.words["left"].n) == (1, 1)
    assert score.verdicts[0].match == (RED, None) and score.verdicts[1].match == (RED, BLUE)
    assert {*score.words} <= {*score.rows()} and "left" in str(score)


def test_words_of_many_scenes_are_those_of_the_scenes(monkeypatch):
    """Drawn as they are, everything holds; mirrored, left and right are exactly wrong and nothing else is."""
    data = ToyCOCO("test")
    scenes, captions = zip(*((scene, texts[0]) for scene, texts in map(data.describe, range(300))))
    true = shown(monkeypatch, captions, [list(scene.things) for scene in scenes]).words
    mirrored = [[replace(thing, x=-thing.x) for thing in scene.things] for scene in scenes]
    turned = shown(monkeypatch, captions, mirrored).words
    assert all(share.right == share.n > 30 for share in true.values())
    for word, share in turned.items():
        assert share.n == true[word].n
        assert share.right == (0 if word in ("left", "right") else share.n)


def test_one_caption_for_each_picture():
    reader = SceneReader((8, 8, 8))
    with pytest.raises(LDMError, match="one caption for each"):
        prompt_accuracy(torch.zeros(2, 3, 64, 64), ["a small red ball"], reader)
    for texts, said in (([], "captions is empty"), ("a small red ball", "list of captions"), ([3], "should be a text")):
        with pytest.raises(LDMError, match=said):
            inspect.unwrap(prompt_accuracy)(torch.zeros(len(texts), 3, 64, 64), texts, reader)
    with pytest.raises(LDMError, match="giraffe"):
        verdict("a small red giraffe", [])


def test_a_picture_with_one_error_is_wrong(monkeypatch):
    scenes, reader = drawn(4), SceneReader((8, 8, 8))
    right = [list(scene.things) for scene in scenes]
    wrong = [things[:] for things in right]
    wrong[2][0] = replace(wrong[2][0], shape=next(s for s in SHAPES if s != wrong[2][0].shape))
    wrong[3].append(Thing("cube", "red", list(SIZES)[0], 0.0, 0.0))
    for told, count in ((right, 4), (wrong, 2)):
        monkeypatch.setattr(reader, "read", lambda images, told=told: told)
        assert reader_accuracy(reader, torch.zeros(4, 3, 64, 64), scenes) == Share(count, 4)
