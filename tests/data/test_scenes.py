"""Toy scenes: the ray caster, what is true of every pixel, captions, and what is read from captions."""

import itertools
import zlib

import numpy as np
import pytest
import torch

from ldm_edu.data.toy.captions import (
    RELATIONS,
    VOCABULARY,
    WORDS,
    Description,
    Named,
    caption,
    captions,
    meanings,
    read_caption,
    relation,
)
from ldm_edu.data.toy.scenes import (
    COLOURS,
    EYE,
    FIELD,
    HEIGHT,
    HITS,
    INF,
    SEGMENTS,
    SHAPES,
    SIZES,
    TARGET,
    UNSEEN,
    Scene,
    Thing,
    camera_frame,
    camera_rays,
    draw_scene,
    far_enough,
    mask_boxes,
    pack,
    project,
    render,
    trace,
    truth,
)
from ldm_edu.errors import LDMError


def random_scenes(n: int, seed: int = 0, unseen: bool = False) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [draw_scene(rng, unseen) for _ in range(n)]


def centre(thing: Thing) -> torch.Tensor:
    return torch.tensor([thing.x, thing.y, HEIGHT[thing.shape] * thing.radius])


# ---- the ray caster


INSIDE = {  # of the standard solids, straight from their definitions: how far inside, positive where inside
    "sphere": lambda q: 1 - q.norm(dim=-1),
    "cube": lambda q: 0.8 - q.abs().amax(-1),
    "cylinder": lambda q: torch.minimum(0.8 - q[..., :2].norm(dim=-1), 0.9 - q[..., 2].abs()),
}


def test_hits_lie_on_the_surface_and_nothing_is_nearer():
    """March along random rays: the solid is not entered before the distance that the formula gives."""
    generator = torch.Generator().manual_seed(0)
    o = torch.randn(2000, 3, generator=generator) * 0.6 + torch.tensor([0.0, -4, 0])
    d = torch.randn(2000, 3, generator=generator) * 0.2 + torch.tensor([0.0, 1, 0])
    steps = torch.linspace(0, 12, 1201)
    for shape, hit in zip(SHAPES, HITS):
        t = hit(o, d)
        marched = INSIDE[shape](o[:, None] + steps[:, None] * d[:, None]) > 0
        first = torch.where(marched.any(1), steps[marched.float().argmax(1)], INF)
        agree = ((first - t) >= -1e-4) & ((first - t) <= 0.0101) | ((first == INF) & (t == INF))
        grazing = (t < INF) & (first == INF)  # shorter inside than a step
        assert (agree | grazing).all() and grazing.float().mean() < 0.02


def test_a_turned_solid_is_the_solid_turned():
    """Turning a cube by a right angle, or a cylinder by anything, changes nothing."""
    for shape, angle in (("cube", np.pi / 2), ("cylinder", 1.0), ("sphere", 1.0)):
        plain = Thing(shape, "red", "large", 0.3, 0.2)
        turned = Thing(shape, "red", "large", 0.3, 0.2, angle=float(angle))
        difference = (render([Scene((plain,))]) - render([Scene((turned,))])).abs()
        assert (difference > 0.02).float().mean() < 0.005


def test_distance_and_thing_agree_with_the_picture():
    scene = Scene((Thing("sphere", "red", "large", 0.0, 0.0),))
    seen = trace(pack([scene]), camera_rays(64))
    on_ball = seen["thing"][0] == 0
    red = seen["colour"][0][:, 0] > 2 * seen["colour"][0][:, 2]
    assert 0.02 < on_ball.float().mean() < 0.3 and (on_ball == red).float().mean() > 0.99
    assert seen["distance"][0][on_ball].max() < 8.1 and (seen["distance"] < INF).all()


def test_chunks_change_no_pixel():
    scenes = random_scenes(5)
    assert torch.equal(render(scenes, 16, chunk=1), render(scenes, 16, chunk=5))


def test_an_empty_floor_can_be_drawn():
    assert torch.equal(render([Scene(())], 16), render([Scene((), sun=1.0)], 16))


@pytest.mark.parametrize(
    "words, part",
    [(("cone", "red", "small"), "shape"), (("cube", "pink", "small"), "colour"), (("cube", "red", "huge"), "size")],
)
def test_unknown_things_are_refused(words, part):
    with pytest.raises(LDMError, match=f"{part}.*known: "):
        Thing(*words, 0.0, 0.0)
    assert set(SIZES) == {"small", "large"} and len(COLOURS) == 8 and len(SHAPES) == 3


@pytest.mark.parametrize("draw", [render, truth])
def test_what_cannot_be_drawn_is_refused(draw):
    with pytest.raises(LDMError, match="size"):
        draw([Scene(())], 0)
    with pytest.raises(LDMError, match="scenes"):
        draw([])
    with pytest.raises(LDMError, match="chunk"):
        draw([Scene(())], chunk=0)


# ---- the camera


def test_known_points_are_seen_where_they_should_be():
    forward, right, up = camera_frame()
    eye, target, half = torch.tensor(EYE), torch.tensor(TARGET), np.tan(FIELD / 2)
    torch.testing.assert_close(project(target), torch.tensor([0.5, 0.5, (target - eye).norm()]))
    edges = torch.stack([eye + 7 * (forward + x * half * right + y * half * up) for x in (-1, 1) for y in (-1, 1)])
    expected = torch.tensor([[0.0, 1, 7], [0, 0, 7], [1, 1, 7], [1, 0, 7]])
    torch.testing.assert_close(project(edges), expected, atol=1e-5, rtol=1e-5)


def test_project_keeps_shape_and_precision():
    points = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    assert project(points).dtype == torch.float64 and project(points).shape == (2, 5, 3)
    torch.testing.assert_close(project(points)[1, 2], project(points[1, 2]))
    torch.testing.assert_close(project(points.float()), project(points).float())


# ---- what is true of every pixel


def nearest_by_marching(scene: Scene, rays: torch.Tensor, step: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """For each ray what it meets first and about where, in small steps through the solids' definitions: no formulas."""
    t = torch.arange(4, 18, step)
    points = torch.tensor(EYE) + t[:, None, None] * rays  # (t, n, 3)
    inside = [points[..., 2] < 0]  # the floor, then the things
    for thing in scene.things:
        q = points - centre(thing)
        c, s = np.cos(thing.angle), np.sin(thing.angle)
        q = torch.stack([c * q[..., 0] + s * q[..., 1], c * q[..., 1] - s * q[..., 0], q[..., 2]], -1)
        inside.append(INSIDE[thing.shape](q / thing.radius) > 0)
    met = torch.stack(inside)  # (1 + k, t, n)
    first = torch.where(met.any(1), met.float().argmax(1), len(t))
    return first.min(0).indices - 1, t[first.amin(0)]


def test_truth_is_what_small_steps_along_every_ray_find():
    size = 24
    rays = camera_rays(size)
    scenes = random_scenes(12, seed=1) + random_scenes(4, seed=2, unseen=True)
    known, wrong = truth(scenes, size), 0
    for i, scene in enumerate(scenes):
        thing, distance = nearest_by_marching(scene, rays)
        masks = known["instances"][i].flatten(1)
        agree = torch.where(masks.any(0), masks.float().argmax(0), -1) == thing
        wrong += (~agree).sum().item()  # grazed for less than a step
        depth = known["depth"][i].flatten()
        expected = distance * (rays @ camera_frame()[0])
        assert ((expected - depth)[agree] > -1e-4).all() and ((expected - depth)[agree] < 0.0101).all()
    assert wrong < 0.002 * len(scenes) * size**2


def test_every_pixel_lies_on_the_surface_of_what_it_shows():
    scenes, size = random_scenes(20, seed=3), 33
    known, rays = truth(scenes, size), camera_rays(size)
    for i, scene in enumerate(scenes):
        t = known["depth"][i].flatten() / (rays @ camera_frame()[0])
        points = (torch.tensor(EYE) + t[:, None] * rays).reshape(size, size, 3)
        floor = points[known["segmentation"][i] == 0]
        assert floor[:, 2].abs().max() < 1e-4
        for thing, mask in zip(scene.things, known["instances"][i]):
            if thing.shape == "sphere":
                radius = (points[mask] - centre(thing)).norm(dim=-1)
                torch.testing.assert_close(radius, torch.full_like(radius, thing.radius), atol=1e-4, rtol=0)
            assert points[mask][:, 2].min() > 0 and points[mask][:, 2].max() < 2 * thing.radius + 1e-4


@pytest.mark.parametrize("size", [1, 17, 64])
def test_depth_is_the_depth_of_project(size):
    """Put every pixel back into the world by its depth: it must be seen at its own centre, and as deep."""
    scenes = random_scenes(5, seed=4)
    depth, rays = truth(scenes, size)["depth"], camera_rays(size)
    points = torch.tensor(EYE) + (depth.flatten(2)[:, 0] / (rays @ camera_frame()[0]))[..., None] * rays
    u, v, z = project(points).reshape(len(scenes), size, size, 3).unbind(-1)
    centres = (torch.arange(size) + 0.5) / size
    torch.testing.assert_close(u, centres.expand_as(u))
    torch.testing.assert_close(v, centres[:, None].expand_as(v))
    torch.testing.assert_close(z[:, None], depth)


def test_forms_and_kinds():
    scenes = [Scene(()), *random_scenes(8, seed=5)]
    known = truth(scenes, 20)
    assert known.keys() == {"segmentation", "depth", "instances", "boxes"}
    assert known["segmentation"].shape == (9, 20, 20) and known["segmentation"].dtype == torch.int64
    assert known["depth"].shape == (9, 1, 20, 20) and known["depth"].dtype == torch.float32
    for scene, masks, boxes in zip(scenes, known["instances"], known["boxes"]):
        k = len(scene.things)
        assert masks.shape == (k, 20, 20) and masks.dtype == torch.bool
        assert boxes.shape == (k, 5) and boxes.dtype == torch.float32
    assert (known["segmentation"][0] == 0).all()


def test_segmentation_is_the_kinds_of_the_instances():
    scenes = random_scenes(30, seed=6)
    known = truth(scenes, 32)
    for scene, ids, masks, boxes in zip(scenes, known["segmentation"], known["instances"], known["boxes"]):
        kinds = torch.tensor([SEGMENTS.index(thing.shape) for thing in scene.things])
        assert (masks.sum(0) <= 1).all() and torch.equal((kinds[:, None, None] * masks).sum(0), ids)
        assert boxes[:, 0].tolist() == kinds.tolist()


@pytest.mark.parametrize("size", [16, 50])
def test_boxes_hold_what_is_seen_and_nothing_more(size):
    known = truth(random_scenes(40, seed=7), size)
    for masks, boxes in zip(known["instances"], known["boxes"]):
        for mask, box in zip(masks, boxes):
            rows, columns = np.nonzero(mask.numpy())
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(box[1:].numpy(), np.array(edges) / size, rtol=1e-6)


def test_boxes_of_random_masks_that_are_not_square():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(200, 5, 9, generator=generator) < 0.05
    assert not masks.flatten(1).any(1).all()  # some are empty
    for mask, box in zip(masks, mask_boxes(masks)):
        edges = [0, 0, 0, 0]
        if mask.any():
            rows, columns = mask.nonzero(as_tuple=True)
            edges = [columns.min() / 9, rows.min() / 5, (columns.max() + 1) / 9, (rows.max() + 1) / 5]
        torch.testing.assert_close(box, torch.tensor(edges, dtype=torch.float32))


def test_a_thing_that_is_hidden_keeps_its_place():
    screen = Thing("cube", "blue", "large", 0.0, 0.0)
    covered, peeping = (Thing("sphere", "red", "small", x, y) for x, y in ((0.0, 0.0), (0.7, 1.2)))
    outside = Thing("cylinder", "green", "small", 40.0, 0.0)
    known = truth([Scene((covered, outside, screen, peeping)), Scene((peeping,))], 32)
    masks, (alone,) = known["instances"]
    assert masks.flatten(1).any(1).tolist() == [False, False, True, True]
    assert (alone & ~masks[3]).any() and not (masks[3] & ~alone).any()
    boxes = known["boxes"][0]
    assert boxes[:, 0].tolist() == [SEGMENTS.index(shape) for shape in ("sphere", "cylinder", "cube", "sphere")]
    assert (boxes[:2, 1:] == 0).all() and (boxes[2:, 3:] > boxes[2:, 1:3]).all()


def test_chunks_and_company_change_no_truth():
    scenes = random_scenes(7, seed=8)
    one, all_, alone = truth(scenes, 16, chunk=1), truth(scenes, 16, chunk=7), [truth([scene], 16) for scene in scenes]
    for key in one:
        for i in range(len(scenes)):
            assert torch.equal(one[key][i], all_[key][i]) and torch.equal(one[key][i], alone[i][key][0])


def test_truth_of_any_size_is_the_truth_of_the_same_scene():
    """Each third pixel of an image three times as large has the same centre."""
    scenes = random_scenes(10, seed=9)
    small, large = truth(scenes, 30), truth(scenes, 90)
    same = small["segmentation"] == large["segmentation"][:, 1::3, 1::3]
    assert same.float().mean() > 0.999  # a centre that lies on an edge may be rounded to either side
    torch.testing.assert_close(small["depth"][:, 0][same], large["depth"][:, 0, 1::3, 1::3][same], atol=1e-4, rtol=0)


def test_the_picture_shows_the_truth():
    """Without light and shadow a colour says which thing it is: compare the raw colours of an image with the masks."""
    for scene in random_scenes(10, seed=10):
        masks = truth([scene], 32)["instances"][0]
        image = (render([scene], 32, oversample=1)[0] + 1) / 2
        for thing, mask in zip(scene.things, masks):
            own = torch.tensor(COLOURS[thing.colour])
            hue = image[:, mask] / image[:, mask].norm(dim=0)
            likeness = (hue * (own / own.norm())[:, None]).sum(0)
            assert likeness.median() > 0.97


# ---- scenes by chance, and in words


def test_the_streams_are_the_ones_that_shipped_checkpoints_know():
    """Other scenes or words from these streams would be another data set under the same name."""
    lines = []
    for i in range(200):
        rng = np.random.default_rng([0, 0, i])
        scene = draw_scene(rng, unseen=i % 2 == 1)
        lines.append(f"{scene} {caption(scene, rng)}")
    assert zlib.crc32("\n".join(lines).encode()) == CHECKSUM
    assert len(VOCABULARY) == 31 and VOCABULARY == tuple(sorted(VOCABULARY))


CHECKSUM = 1424988177


def test_scenes_keep_the_rules():
    for unseen in (False, True):
        for scene in random_scenes(200, unseen=unseen):
            assert 1 <= len(scene.things) <= 3
            assert all(far_enough(a, b) for a, b in itertools.combinations(scene.things, 2))
            assert any((t.colour, t.shape) in UNSEEN for t in scene.things) == unseen


def test_a_scene_has_several_captions():
    scene = random_scenes(1)[0]
    assert len(set(captions(scene, np.random.default_rng(0), 50))) > 20


def test_the_first_of_many_captions_is_the_caption():
    for i, scene in enumerate(random_scenes(100)):
        five = captions(scene, np.random.default_rng(i))
        assert len(five) == 5 and five[0] == caption(scene, np.random.default_rng(i))
        assert five[:3] == captions(scene, np.random.default_rng(i), 3)


def parse(text: str) -> tuple[list[tuple[str, str, str]], list[str]]:
    """The things that a caption names, as (size, colour, shape), and the relations of the first to the others."""
    same = {"little": "small", "tiny": "small", "big": "large", "ball": "sphere", "box": "cube", "can": "cylinder"}
    words = [same.get(word, word) for word in text.removeprefix("there is ").split()]
    starts = [i for i, word in enumerate(words) if word == "a"]
    things = [tuple(words[i + 1 : i + 4]) for i in starts]
    links = [set(words[i + 4 : j]) & set(RELATIONS) for i, j in zip(starts, starts[1:])]
    return things, [link.pop() if link else "" for link in links]


# ---- reading captions


@pytest.mark.parametrize("unseen", [False, True])
def test_captions_are_true_and_read_back(unseen):
    """Thousands of scenes, five captions each: what is read is the scene, and what a simpler parser reads."""
    rng = np.random.default_rng(11)
    for scene in random_scenes(2000, seed=12, unseen=unseen):
        by_words = {(t.size, t.colour, t.shape): t for t in scene.things}
        assert len(by_words) == len(scene.things)
        for text in captions(scene, rng):
            assert set(text.split()) <= set(VOCABULARY)
            said, (named, links) = read_caption(text), parse(text)
            assert sorted(said.things) == sorted(by_words) and list(said.things) == named
            assert said.relations == tuple((0, link, j) for j, link in enumerate(links, 1) if link)
            assert len(said.relations) in (0, len(scene.things) - 1)
            for i, word, j in said.relations:
                assert relation(by_words[said.things[i]], by_words[said.things[j]]) == word


def test_captions_tell_positions_four_times_in_five():
    scenes = [scene for scene in random_scenes(3000, seed=13) if len(scene.things) > 1]
    rng = np.random.default_rng(14)
    told = np.mean([bool(read_caption(caption(scene, rng)).relations) for scene in scenes])
    assert abs(told - 0.8) < 4 * np.sqrt(0.8 * 0.2 / len(scenes))


BALL, BOX, CAN = Named("small", "red", "sphere"), Named("large", "blue", "cube"), Named("small", "green", "cylinder")
ball, box, can = "a small red ball", "a big blue box", "a tiny green can"


@pytest.mark.parametrize(
    "text, things, relations",
    [
        (ball, [BALL], []),
        ("SMALL red Ball.", [BALL], []),
        ("a red small sphere", [BALL], []),
        (f"there is {ball}", [BALL], []),
        (f"{ball} and {box}", [BALL, BOX], []),
        (f"there is {ball}, and there is {box}", [BALL, BOX], []),
        (f"{ball} and {ball}", [BALL, BALL], []),
        (f"{ball} to the left of {box}", [BALL, BOX], [(0, "left", 1)]),
        (f"{ball} and right of {box}", [BALL, BOX], [(0, "right", 1)]),
        (f"{ball} in front of {box} and behind {can}", [BALL, BOX, CAN], [(0, "front", 1), (0, "behind", 2)]),
        (f"{ball} left of {box} and {can}", [BALL, BOX, CAN], [(0, "left", 1)]),
        (f"{ball} and {box} left of {can}", [BALL, BOX, CAN], [(1, "left", 2)]),
        (f"{ball} and {box} left of {can} and {can}", [BALL, BOX, CAN, CAN], [(1, "left", 2)]),
        (f"{box} and {ball} left of {can} and behind {can}", [BOX, BALL, CAN, CAN], [(1, "left", 2), (1, "behind", 3)]),
    ],
)
def test_what_people_write_is_read(text, things, relations):
    assert read_caption(text) == Description(tuple(things), tuple(relations))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "begin with a thing"),
        ("...", "begin with a thing"),
        ("and a small red ball", "begin with a thing"),
        (f"left of {ball}", "begin with a thing"),
        ("a small red", "end with a shape"),
        (f"{ball} and", "end with a shape"),
        (f"{ball} left of", "end with a shape"),
        (
            "there is a big blue box and a can",
            "'a cylinder' should also have a size .small, large. and a colour .red, .*white",
        ),
        ("a big box", "'a large cube' should also have a colour .red, .*white"),
        ("a blue box", "also have a size .small, large"),
        ("a big small blue box", "one size, one colour"),
        ("a big blue red box", "one size, one colour"),
        ("a a big blue box", "nothing else"),
        ("a big and blue box", "nothing else"),
        (f"{ball} {box}", "linked by 'and' or by a relation, and there is nothing"),
        (f"{ball} and and {box}", "not 'and and'"),
        (f"{ball} left of behind {box}", "not 'left behind'"),
        (f"{ball} there is {box}", "not 'there is'"),
        (f"{ball} left of {box} behind {can}", "the small red sphere or the large blue cube.*'and behind'"),
        ("a small pink ball", "'pink' means nothing here.*closest: "),
        ("a small purpel ball", "'purpel' means nothing here.*closest: purple"),
        (f"{ball} left {box}", "'left' means nothing here.*closest: left of, to the left of"),
        (f"{ball} on {box}", "'on' means nothing"),
        ("ein kleiner roter Würfel", "'ein' means nothing"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(LDMError, match=message):
        read_caption(text)


def say(said: Description) -> str:
    """A description in plain words; only for one whose relations are all from the first thing."""
    links = {j: f"and {WORDS[word][0]}" for _, word, j in said.relations}
    nouns = [f"a {' '.join(thing)}" for thing in said.things]
    related = [f"{links[j]} {nouns[j]}" for j in range(len(nouns)) if j in links]
    return " ".join([nouns[0], *related, *(f"and {nouns[j]}" for j in range(1, len(nouns)) if j not in links)])


def test_plain_words_say_the_same():
    rng = np.random.default_rng(15)
    for scene in random_scenes(500, seed=16):
        said = read_caption(caption(scene, rng))
        assert read_caption(say(said)) == said


def test_any_words_are_read_or_refused():
    """Whatever stands in whatever order: a description that makes sense, or a LDMError."""
    rng, phrases = np.random.default_rng(17), [phrase for said in WORDS.values() for phrase in said]
    pool, read = [*phrases, *COLOURS, "a", "and", "there is", "of", ball, box, can, ball, box, can], 0
    for _ in range(5000):
        text = " ".join(rng.choice(pool, rng.integers(0, 6)))
        try:
            said = read_caption(text)
        except LDMError:
            continue
        read += 1
        assert said.things and all(i < j < len(said.things) and word in RELATIONS for i, word, j in said.relations)
        assert len(said.things) == sum(word in SHAPES for word in meanings(text))
    assert read > 100
