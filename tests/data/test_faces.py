"""The drawn faces: exact shapes and edges, attributes that can be seen, images that depend on the face alone."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ldm_edu.data.toy.faces import (
    CHOICES,
    FACE_ATTRIBUTES,
    FACE_SEGMENTS,
    HAIR_COLOURS,
    LAYERS,
    RANGES,
    SKIN,
    Face,
    Light,
    blank,
    box,
    bump,
    coverage,
    disc,
    dome,
    draw_face,
    draw_layers,
    ellipse,
    face_truth,
    head_outline,
    inflate,
    intersection,
    light_of,
    pack_faces,
    pixel_centres,
    pixel_sine,
    relief,
    render_faces,
    rgb,
    shade,
    skin_colour,
    slopes,
    smooth_union,
    smoothstep,
    strands,
    stroke,
    turn_egg,
    under,
    union,
)
from ldm_edu.errors import LDMError


def gallery(seed: int, n: int) -> list[Face]:
    return [draw_face(np.random.default_rng([seed, i])) for i in range(n)]


def truth_of(face: Face) -> dict[str, bool]:
    return dict(zip(FACE_ATTRIBUTES, face.attributes, strict=True))


def segment(name: str) -> int:
    return FACE_SEGMENTS.index(name)


# ---- shapes and edges


def nearest(points: torch.Tensor, outline: torch.Tensor) -> torch.Tensor:
    """Distance of every point to the nearest of many points of an outline."""
    return torch.cdist(points, outline).amin(1)


def test_disc_and_box_are_the_distances_to_their_outlines():
    points = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    a = torch.linspace(0, 2 * math.pi, 20_000)
    round_ = 0.7 * torch.stack([a.cos(), a.sin()], 1)
    torch.testing.assert_close(disc(*points.T, 0.7).abs(), nearest(points, round_), atol=1e-3, rtol=0)
    s = torch.linspace(-1, 1, 5000)
    lying, standing = torch.stack([0.8 * s, 0.4 + 0 * s], 1), torch.stack([0.8 + 0 * s, 0.4 * s], 1)
    sides = torch.cat([lying, -lying, standing, -standing])
    torch.testing.assert_close(box(*points.T, 0.8, 0.4).abs(), nearest(points, sides), atol=1e-3, rtol=0)


def test_rounded_corners_leave_the_sides_where_they_are_and_cut_the_corner():
    x, y = torch.tensor([0.8, 0.0, 0.8]), torch.tensor([0.0, 0.4, 0.4])
    d = box(x, y, 0.8, 0.4, 0.1)
    torch.testing.assert_close(d, torch.tensor([0.0, 0.0, 0.1 * (math.sqrt(2) - 1)]))


@pytest.mark.parametrize("rx, ry", [(0.8, 0.4), (0.5, 0.9), (1.25, 0.14)])
def test_ellipse_has_the_right_sign_everywhere_and_the_right_size_near_its_outline(rx, ry):
    x, y = (v.flatten() for v in pixel_centres(150))
    d = ellipse(x, y, rx, ry)
    assert torch.equal(d < 0, (x / rx) ** 2 + (y / ry) ** 2 < 1)
    a = torch.linspace(0, 2 * math.pi, 4000)
    exact = nearest(torch.stack([x, y], 1), torch.stack([rx * a.cos(), ry * a.sin()], 1))
    near = exact < 0.02
    assert (d.abs()[near] - exact[near]).abs().max() < 0.004


def gradient_length(shape, n: int = 64) -> torch.Tensor:
    """Length of the gradient of a shape's function at the centres of n x n pixels."""
    x, y = (v.requires_grad_() for v in pixel_centres(n))
    gx, gy = torch.autograd.grad(shape(x, y).sum(), (x, y))
    return (gx**2 + gy**2).sqrt()


def test_the_gradient_of_a_distance_has_length_one():
    for shape in (lambda x, y: disc(x, y, 0.5), lambda x, y: box(x, y, 0.6, 0.3, 0.1)):
        torch.testing.assert_close(gradient_length(shape), torch.ones(64, 64))
    x, y = pixel_centres(64)
    near = ellipse(x, y, 0.8, 0.4).abs() < 0.02
    assert (gradient_length(lambda x, y: ellipse(x, y, 0.8, 0.4))[near] - 1).abs().max() < 0.08
    torch.testing.assert_close(under(y, x**2, 2 * x), (y - x**2) / gradient_length(lambda x, y: y - x**2))


def test_minimum_maximum_and_minus_combine_shapes():
    x, y = pixel_centres(64)
    a, b = disc(x + 0.2, y, 0.5), box(x - 0.3, y, 0.4, 0.3)
    assert torch.equal(intersection(a, b) < 0, (a < 0) & (b < 0))
    assert torch.equal(union(a, b) < 0, (a < 0) | (b < 0))
    assert torch.equal(stroke(a, 0.05) < 0, (a > -0.05) & (a < 0.05))


def test_under_a_straight_line_is_exact():
    x, y = pixel_centres(20)
    torch.testing.assert_close(under(y, 0.75 * x, 0.75), (y - 0.75 * x) / 1.25)


def test_smooth_union_never_goes_above_the_union_nor_further_below_than_a_quarter_of_its_seam():
    x, y = pixel_centres(50)
    a, b = disc(x + 0.3, y, 0.4), box(x - 0.3, y, 0.3, 0.5)
    gain = union(a, b) - smooth_union(a, b, 0.2)
    assert gain.min() >= 0 and gain.max() <= 0.05 + 1e-6


@pytest.mark.parametrize("size", [16, 33, 64])
def test_a_soft_edge_is_right_to_a_sixteenth_of_a_pixel(size):
    k = 2000 // size  # samples along each side of a pixel
    for dx in (0.0, 0.013, 0.2):
        x, y = pixel_centres(size * k)
        exact = F.avg_pool2d((disc(x - dx, y, 0.6) < 0).float()[None], k)[0]
        x, y = pixel_centres(size)
        assert (coverage(disc(x - dx, y, 0.6), 2 / size) - exact).abs().max() < 1 / 16


# ---- light, texture and turning


def test_slopes_of_a_half_sphere_give_its_normals():
    n = 200
    x, y = pixel_centres(n)
    h = (1 - x**2 - y**2).clamp(min=0).sqrt()
    h_x, h_y = (slope[0, 0] for slope in slopes(h[None, None], 2 / n))
    normal = torch.stack([-h_x, -h_y, torch.ones(n, n)]) / (1 + h_x**2 + h_y**2).sqrt()
    inside = x**2 + y**2 < 0.9
    torch.testing.assert_close(normal[:, inside], torch.stack([x, y, h])[:, inside], atol=2e-3, rtol=0)


def test_light_on_a_flat_surface_is_the_formula():
    s = torch.tensor([0.48, 0.6, 0.64])
    light = Light(s.reshape(1, 3, 1, 1), torch.full((1, 3, 1, 1), 0.7), torch.full((1, 3, 1, 1), 0.3))
    m = (s + torch.tensor([0.0, 0, 1])) / (s + torch.tensor([0.0, 0, 1])).norm()
    expected = 0.5 * (0.3 + 0.7 * s[2]) + 0.2 * 0.7 * m[2] ** 16
    seen = shade(rgb(0.5, 0.5, 0.5), torch.zeros(1, 1, 2, 2), 1.0, light, gloss=0.2)
    torch.testing.assert_close(seen, expected.expand(1, 3, 2, 2))


def test_heights():
    """A disc inflated by its own radius is a half sphere, which is also a dome; a bump is 1 / e at its radius."""
    x, y = pixel_centres(200)
    d = disc(x, y, 0.8)
    h, inside = inflate(d, 0.8), d < -0.02
    torch.testing.assert_close((x**2 + y**2 + h**2)[inside], torch.full_like(h[inside], 0.64))
    torch.testing.assert_close(h[inside], 0.8 * dome(x, y, 0.8, 0.8)[inside])
    torch.testing.assert_close(bump(torch.tensor(0.3), torch.tensor(0.0), 0.3, 1), torch.tensor(1.0).exp() ** -1)
    torch.testing.assert_close(smoothstep(torch.tensor([1.0, 2, 3]), 1.0, 3.0), torch.tensor([0, 0.5, 1]))


def test_a_small_turn_is_a_rotation_up_to_the_square_of_its_angle():
    x, y = pixel_centres(64)
    theta = torch.tensor(0.1)
    z = (1 - (x / 0.85) ** 2 - (y / 1.05) ** 2).clamp(min=0)
    rotated = x * theta.cos() - z * theta.sin()
    assert (turn_egg(x, y, theta.sin(), 0)[0] - rotated).abs().max() <= theta**2 / 2
    centre_and_edge = torch.tensor([0.0, 0.85]), torch.zeros(2)
    torch.testing.assert_close(turn_egg(*centre_and_edge, 0.2, 0.1)[0], torch.tensor([-0.2, 0.85]))


def test_strands_fade_with_the_size_of_a_pixel():
    def patch(size: int) -> torch.Tensor:
        d = blank([Face(hair="red")], size)
        return strands(d, *d.body, 0.5)

    assert patch(128).abs().max() < 1.2 and patch(128).std() > 3 * patch(12).std()


def test_a_sine_over_a_pixel_is_its_mean_and_vanishes_where_a_pixel_holds_a_wave():
    u = (np.arange(4000) + 0.5) / 4000 - 0.5
    for phase, frequency, pixel in ((0.3, 2.0, 0.1), (1.7, 40.0, 0.05), (-2.0, 83.0, 0.07)):
        mean = np.sin(phase + frequency * pixel * u).mean()
        value = pixel_sine(torch.tensor(phase, dtype=torch.float64), frequency, pixel).item()
        assert value == pytest.approx(mean, abs=1e-6)
    assert pixel_sine(torch.ones(5), 100.0, 0.063).abs().max() == 0


# ---- traits


@pytest.mark.parametrize("trait", CHOICES)
def test_an_unknown_choice_is_refused_with_the_known_ones(trait):
    with pytest.raises(LDMError, match=f"`{trait}` cannot be 'plaid'; known: .*{list(CHOICES[trait])[-1]}"):
        Face(**{trait: "plaid"})


@pytest.mark.parametrize("trait", RANGES)
def test_a_number_outside_of_its_range_is_refused_with_the_range(trait):
    low, high = RANGES[trait]
    for wrong in (low - 0.01, high + 0.01, math.nan):
        with pytest.raises(LDMError, match=f"`{trait}` should be a number from {low} to {high}"):
            Face(**{trait: wrong})
    for right in (low, high):
        assert render_faces([Face(**{trait: float(right)})], 16).isfinite().all()


def test_an_image_that_cannot_be_drawn_is_refused():
    with pytest.raises(LDMError, match="`size`"):
        render_faces([Face()], 1)
    with pytest.raises(LDMError, match="`chunk`"):
        face_truth([Face()], 8, chunk=0)


def test_chance_draws_every_choice_and_keeps_clear_of_every_threshold():
    faces = gallery(0, 1000)
    for trait, known in CHOICES.items():
        assert {getattr(face, trait) for face in faces} == set(known)
    gaps = {"skin": (0.05, 0.22), "brows": (0.3, 0.8), "smile": (0, 0.65), "mouth": (0, 0.5), "blush": (0, 0.7)}
    for trait, (low, high) in gaps.items():
        assert not any(low < getattr(face, trait) < high for face in faces)


def test_attributes_do_not_contradict_one_another():
    for face in gallery(1, 500):
        truth = truth_of(face)
        colours = [truth[f"{name}_Hair"] for name in ("Black", "Blond", "Brown", "Gray")]
        assert sum(colours) + truth["Bald"] <= 1
        assert not (truth["Wearing_Hat"] and (truth["Bangs"] or truth["Bald"]))
        assert not (truth["Bald"] and truth["Bangs"])


def test_the_face_that_a_seed_gives_is_fixed():
    """Other faces for these seeds would be another data set under the same name."""
    assert [(f.hair, f.style, f.hat, f.glasses, f.backdrop) for f in gallery(0, 3)] == [
        ("gray", "bun", "none", "none", "slate"),
        ("black", "bob", "beanie", "none", "rose"),
        ("brown", "curly", "none", "none", "sand"),
    ]


# ---- images


@pytest.mark.parametrize("size", [17, 64])
def test_a_face_alone_is_the_same_as_in_any_batch(size):
    faces = gallery(2, 21)
    together = render_faces(faces, size)
    assert all(torch.equal(render_faces([face], size)[0], image) for face, image in zip(faces, together))
    assert torch.equal(render_faces(faces[::-1], size, chunk=4).flip(0), together)
    maps = face_truth(faces, size)["segmentation"]
    assert all(torch.equal(face_truth([face], size)["segmentation"][0], m) for face, m in zip(faces, maps))


@pytest.mark.parametrize("size", [2, 3, 7, 64, 100])
def test_pictures_of_any_size_are_finite_and_in_range(size):
    faces = gallery(3, 8)
    images, maps = render_faces(faces, size), face_truth(faces, size)["segmentation"]
    assert images.shape == (8, 3, size, size) and images.dtype == torch.float32
    assert images.isfinite().all() and images.abs().max() <= 1
    assert maps.shape == (8, size, size) and maps.dtype == torch.int64
    assert 0 <= maps.min() <= maps.max() < len(FACE_SEGMENTS)


def test_no_faces_make_an_empty_batch():
    assert render_faces([]).shape == (0, 3, 64, 64) and face_truth([])["segmentation"].shape == (0, 64, 64)


def test_drawing_touches_no_global_random_stream_and_changes_no_default():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    render_faces(gallery(4, 3), 16)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    assert torch.get_default_dtype() == torch.float32


def test_a_small_picture_is_the_mean_of_a_large_one_but_for_an_error_that_shrinks_with_the_pixel():
    faces = gallery(5, 12)
    large = render_faces(faces, 256, chunk=4)
    for size in (32, 64, 128):
        error = (F.avg_pool2d(large, 256 // size) - render_faces(faces, size)).abs().mean((1, 2, 3))
        assert error.mean() < 1 / size and error.max() < 2 / size


def test_a_small_map_agrees_with_a_large_one():
    faces = gallery(6, 12)
    large = face_truth(faces, 192)["segmentation"][:, 1::3, 1::3]  # the middle of each 3 x 3
    assert (large == face_truth(faces, 64)["segmentation"]).float().mean() > 0.995


# ---- what is true can be seen, and what is seen is true


def test_segments_and_attributes_tell_the_same():
    faces = gallery(7, 200)
    maps = face_truth(faces)["segmentation"]
    count = {name: (maps == segment(name)).sum((1, 2)).tolist() for name in FACE_SEGMENTS}
    for i, face in enumerate(faces):
        truth = truth_of(face)
        seen = {name: count[name][i] for name in FACE_SEGMENTS}
        assert (seen["hair"] >= 60) == (seen["hair"] > 0) == face.hair_shown
        assert (seen["hat"] >= 300) == (seen["hat"] > 0) == truth["Wearing_Hat"]
        assert (seen["glasses"] >= 40) == (seen["glasses"] > 0) == truth["Eyeglasses"]
        assert (seen["earrings"] >= 10) == (seen["earrings"] > 0) == truth["Wearing_Earrings"]
        assert (seen["beard"] >= 12) == (seen["beard"] > 0) == (truth["Mustache"] or truth["Goatee"])
        assert (seen["eyes"] >= 25) == (seen["eyes"] > 0) == (face.glasses != "shades")
        assert seen["brows"] >= (20 if truth["Bushy_Eyebrows"] else 3)
        assert seen["mouth"] >= (20 if truth["Mouth_Slightly_Open"] else 8)
        assert seen["skin"] > 300 and seen["background"] > 300


TOGGLES = {
    "Bushy_Eyebrows": ({"brows": 0.2}, {"brows": 0.85}),
    "Eyeglasses": ({"glasses": "none"}, {"glasses": "round"}),
    "Goatee": ({"goatee": False}, {"goatee": True}),
    "Mouth_Slightly_Open": ({"mouth": 0.0}, {"mouth": 0.55}),
    "Mustache": ({"mustache": False}, {"mustache": True}),
    "Pale_Skin": ({"skin": 0.25}, {"skin": 0.04}),
    "Rosy_Cheeks": ({"blush": 0.0}, {"blush": 0.75}),
    "Smiling": ({"smile": 0.0}, {"smile": 0.65}),
    "Wearing_Hat": ({"hat": "none"}, {"hat": "cap"}),
}


@pytest.mark.parametrize("name", TOGGLES)
def test_an_attribute_changes_every_picture(name):
    faces, (off, on) = gallery(8, 40), TOGGLES[name]
    without, with_ = [replace(face, **off) for face in faces], [replace(face, **on) for face in faces]
    assert not any(truth_of(face)[name] for face in without) and all(truth_of(face)[name] for face in with_)
    change = (render_faces(with_) - render_faces(without)).abs().amax(1)
    assert ((change > 0.1).sum((1, 2)) >= 10).all()


@pytest.mark.parametrize(
    "face, hidden",
    [
        (Face(hat="cap"), {"fringe": True}),
        (Face(hat="beanie", style="bald"), {"style": "buzz"}),
        (Face(hat="brim", style="bald"), {"style": "bun"}),
        (Face(style="bald"), {"fringe": True}),
        (Face(style="long"), {"earrings": "hoops"}),
        (Face(style="bob"), {"earrings": "drops", "jewel": "ruby"}),
        (Face(glasses="none"), {"frame": "wine"}),
        (Face(hat="none"), {"hat_colour": "coral"}),
    ],
)
def test_what_is_hidden_leaves_no_trace(face, hidden):
    other = replace(face, **hidden)
    assert other.attributes == face.attributes
    assert torch.equal(*render_faces([face, other]).unbind())


NEEDS = {"hat_colour": {"hat": "cap"}, "frame": {"glasses": "square"}, "jewel": {"earrings": "hoops"}}


@pytest.mark.parametrize("trait", CHOICES)
def test_every_kind_looks_different(trait):
    images = render_faces([Face(**{**NEEDS.get(trait, {}), trait: kind}) for kind in CHOICES[trait]])
    for i in range(len(images)):
        for j in range(i):
            assert ((images[i] - images[j]).abs().amax(0) > 0.05).sum() >= 8


# ---- how it is drawn


def test_traits_as_tensors():
    traits = pack_faces([Face(hair="red"), Face(smile=0.5, style="long")])
    assert traits.smile.flatten().tolist() == [0, 0.5] and traits.length.flatten().tolist() == [0, 1.75]
    assert traits.hair.shape == (2, 3, 1, 1) and traits.light.shape == (2, 1, 1, 1)
    torch.testing.assert_close(light_of(traits).sun.norm(dim=1), torch.ones(2, 1, 1))
    assert np.allclose([skin_colour(tone) for tone in (0.0, 0.2, 1.0)], [SKIN[0], SKIN[1], SKIN[-1]])


def test_paint_and_only_touch_what_they_are_asked_to():
    d = blank([Face(hair="red"), Face(hair="red", hat="cap")], 32)
    d.only(lambda face: face.hat == "cap", lambda part: part.paint(disc(*part.head, 0.8), part.traits.hair, "hat"))
    assert d.colour[0].sum() == 0 and d.segment[0].sum() == 0
    torch.testing.assert_close(d.colour[1, :, 16, 16], torch.tensor(HAIR_COLOURS["red"]))
    assert set(d.segment[1].flatten().tolist()) == {0, segment("hat")}
    assert d.flag(lambda face: face.hat == "cap").flatten().tolist() == [0, 1]


def test_heads_are_wider_with_a_wider_jaw_and_brighter_on_the_side_of_the_light():
    inside = (head_outline(blank([Face(jaw=jaw) for jaw in (0.0, 0.5, 1.0)], 120)) < 0).sum((1, 2, 3))
    assert inside[0] < inside[1] < inside[2]
    height = relief(blank([Face()], 120))
    assert height[0, 0, 82, 60] > height[0, 0, 82, 48] + 0.05  # the nose stands above the cheek beside it
    left, right = render_faces([Face(light=-1.0), Face(light=1.0)], 120)[..., 50:70, :].chunk(2, -1)
    assert left[0].mean() > right[0].mean() and right[1].mean() > left[1].mean()


SITTER = Face(style="tucked", smile=0.8, mouth=0.6, mustache=True, glasses="round", earrings="hoops", hat="brim")
ADDS = {
    "back_hair": {"hair"},
    "body": {"skin", "clothes"},
    "ears": {"skin", "earrings"},
    "head": {"skin"},
    "eyes": {"eyes"},
    "brows": {"brows"},
    "mouth": {"mouth"},
    "beard": {"beard"},
    "glasses": {"glasses"},
    "hair": {"hair"},
    "hat": {"hat"},
}


def test_a_layer_adds_its_own_segments_and_no_others():
    d = blank([SITTER], 128)
    for layer in LAYERS:
        before = d.segment.clone()
        layer(d)
        added = {FACE_SEGMENTS[k] for k in d.segment[d.segment != before].tolist()}
        assert added == ADDS.get(layer.__name__.removeprefix("paint_"), set())


def test_layers_change_only_what_they_are_for():
    """A layer for something that a face has not leaves its image alone, also where others in the batch have it."""
    plain, dressed = Face(style="bald"), Face(hat="brim", glasses="cat", mustache=True, goatee=True)
    d = blank([plain, dressed], 48)
    for layer in LAYERS:
        before = d.colour.clone()
        layer(d)
        if layer.__name__ in ("paint_hat", "paint_glasses", "paint_beard", "paint_hair", "paint_back_hair"):
            assert torch.equal(before[0], d.colour[0])
    assert not torch.equal(d.colour[0], d.colour[1])


def test_one_drawing_has_both_picture_and_truth():
    faces = gallery(9, 3)
    d = draw_layers(faces, 32)
    torch.testing.assert_close(d.colour.clamp(0, 1) * 2 - 1, render_faces(faces, 32), atol=0, rtol=0)
    assert torch.equal(d.segment[:, 0], face_truth(faces, 32)["segmentation"])
