"""ldm_edu.conditioning.tokens: classes, attributes, boxes, and CLIP's text encoder held against transformers'."""

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_clip import small_clip
from torch import Tensor

from ldm_edu import (
    AttributesConditioner,
    CheckpointError,
    ClassConditioner,
    CLIPConditioner,
    Condition,
    Conditioner,
    LayoutConditioner,
    LDMError,
    ToyCelebA,
    ToyCOCO,
    collate,
    drop,
)
from ldm_edu.conditioning.tokens import box_tokens, layout_ids

CAPTIONS = ["a red ball", "", "RED  cube"]


def boxes(*rows: tuple) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).view(-1, 5)


LAYOUTS = [boxes((1, 0, 0, 1, 1), (0, 0.25, 0.25, 0.5, 0.5)), boxes(), boxes((3, 0.1, 0.2, 0.3, 0.9))]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    small_clip(folder)
    return folder


PARTS = {
    "class": (lambda _: ClassConditioner(5, 8), {"class": torch.tensor([1, 4, 0])}),
    "class, vector": (lambda _: ClassConditioner(5, 8, slot="vector"), {"class": torch.tensor([1, 4, 0])}),
    "attributes": (lambda _: AttributesConditioner(3, 8), {"attributes": torch.eye(3)}),
    "layout": (lambda _: LayoutConditioner(4, max_boxes=3, bins=4, dim=16, depth=1), {"boxes": LAYOUTS}),
    "clip": (lambda folder: CLIPConditioner(str(folder)), {"caption": CAPTIONS}),
}


@pytest.fixture(params=PARTS)
def made(request, clip_folder) -> tuple[Conditioner, dict]:
    """A conditioner with random weights, and a batch of three for it."""
    torch.manual_seed(0)
    make, batch = PARTS[request.param]
    return make(clip_folder).eval(), batch


def rows(batch: dict, at: slice) -> dict:
    return {key: value[at] for key, value in batch.items()}


def assert_same(a: Condition, b: Condition) -> None:
    assert a.slots().keys() == b.slots().keys() and a.slots()
    assert all(torch.equal(v, b.slots()[name]) for name, v in a.slots().items())


# ---- what all of them can do


SHAPES = {"ClassConditioner": (1, 8), "AttributesConditioner": (3, 8), "LayoutConditioner": (9, 16)}


def test_shapes_are_those_it_declares(made):
    part, batch = made
    cond, null = part(batch), part.null(3)
    if part.vector_dim:
        assert part.context_dim is None and cond.vector.shape == null.vector.shape == (3, 8)
    else:
        tokens, width = SHAPES.get(type(part).__name__, (77, 32))
        assert part.context_dim == width and cond.context.shape == null.context.shape == (3, tokens, width)
    assert len(cond.slots()) == len(null.slots()) == 1 and part.concat_channels == 0
    assert part.keys == tuple(batch) and len(part.null()) == 1


def test_the_null_is_what_a_dropped_condition_becomes(made):
    part, batch = made
    assert_same(drop(part(batch), part.null(), 1, torch.tensor([0.0, 0.5, 0.999])), part.null(3))
    assert_same(drop(part(batch), part.null(), 0.5, torch.tensor([0.6, 0.5, 1 - 2**-24])), part(batch))


def test_a_batch_of_n_equals_n_batches_of_one(made):
    part, batch = made
    (together,) = part(batch).slots().values()
    for i in range(3):
        (alone,) = part(rows(batch, slice(i, i + 1))).slots().values()
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_different_conditions_differ_from_each_other_and_from_the_null(made):
    part, batch = made
    (found,), (null,) = part(batch).slots().values(), part.null(3).slots().values()
    said = [i for i in range(3) if batch.get("caption", CAPTIONS[::2] * 2)[i] and len(batch.get("boxes", [0] * 3)) == 3]
    said = [i for i in said if "boxes" not in batch or len(batch["boxes"][i])]
    assert len(said) >= 2
    assert all(not torch.allclose(found[i], null[i], atol=1e-3) for i in said)
    assert not torch.allclose(found[said[0]], found[said[1]], atol=1e-3)


def test_saved_and_loaded_they_give_the_same_condition(made, tmp_path):
    part, batch = made
    part.save_pretrained(tmp_path)
    again = Conditioner.from_pretrained(tmp_path)
    assert type(again) is type(part) and again.keys == part.keys and again.context_dim == part.context_dim
    assert_same(again(batch), part(batch)), assert_same(again.null(2), part.null(2))


def test_a_batch_without_its_key_is_refused(made):
    part, batch = made
    with pytest.raises(LDMError, match=f"has no '{part.keys[0]}', only image"):
        part({"image": torch.zeros(3)})


# ---- a class


@pytest.mark.parametrize("slot", ["context", "vector"])
def test_gradients_reach_the_rows_of_the_classes_alone(slot):
    part = ClassConditioner(5, 8, slot=slot)
    (v,) = part({"class": torch.tensor([1, 3, 1])}).slots().values()
    v.sum().backward()
    assert part.embedding.weight.grad.sum(1).tolist() == [0, 16, 0, 8, 0, 0]
    (v,) = part.null(4).slots().values()
    v.sum().backward()
    assert part.embedding.weight.grad.sum(1).tolist() == [0, 16, 0, 8, 0, 32]


WHOLE_NUMBERS = [[1, 2], (1, 2), np.array([1, 2]), torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32)]


@pytest.mark.parametrize("values", WHOLE_NUMBERS)
def test_whole_numbers_of_any_kind_are_classes(values):
    part = ClassConditioner(5, 8)
    assert torch.equal(part({"class": values}).context[:, 0], part.embedding.weight[1:3])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_small_whole_numbers_are_classes(dtype):
    part = ClassConditioner(5, 8)
    assert torch.equal(part({"class": torch.tensor([1, 2], dtype=dtype)}).context[:, 0], part.embedding.weight[1:3])


@pytest.mark.parametrize(
    "values, message",
    [
        (torch.tensor([5]), r"class should lie in \[0, 5\), but runs from 5 to 5"),  # not the null's row
        ([0, -1], "class should lie in .* but runs from -1 to 0"),
        (torch.tensor([1.0]), "class should be whole numbers"),
        (torch.tensor([float("nan")]), "class should be whole numbers"),
        (torch.tensor([True]), "class should be whole numbers"),
        (torch.tensor([[1]]), "class should be whole numbers"),
        (torch.tensor(1), "class should be whole numbers"),
        (1, "class should be whole numbers"),
        ("red", "class should be whole numbers"),
        (["red"], "class should be whole numbers"),
        ([None], "class should be whole numbers"),
        ([10**30], "class should be whole numbers"),
        (None, "class should be whole numbers"),
    ],
)
def test_what_is_no_class_is_refused(values, message):
    with pytest.raises(LDMError, match=message):
        ClassConditioner(5, 8)({"class": values})


def test_the_key_can_be_another_one():
    part = ClassConditioner(5, 8, key="kind")
    assert part.keys == ("kind",) and part({"kind": [1]}).context.shape == (1, 1, 8)
    with pytest.raises(LDMError, match="kind should lie"):
        part({"kind": [7]})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ClassConditioner(0), "classes=0"),
        (lambda: ClassConditioner(True), "classes=True"),
        (lambda: ClassConditioner(5, 0), "dim=0"),
        (lambda: ClassConditioner(5, slot="concat"), "slot='concat'.*'context', 'vector'"),
        (lambda: AttributesConditioner(0), "attributes=0"),
        (lambda: AttributesConditioner(3, 2.5), "dim"),
        (lambda: LayoutConditioner(0), "classes=0"),
        (lambda: LayoutConditioner(4, max_boxes=0), "max_boxes=0"),
        (lambda: LayoutConditioner(4, bins=0), "bins=0"),
        (lambda: LayoutConditioner(4, dim=10, heads=4), "heads=4 does not divide dim=10"),
    ],
)
def test_arguments_that_cannot_be_are_named(make, message):
    with pytest.raises((LDMError, TypeError), match=message):  # TypeError: from beartype, where types are checked
        make()


# ---- attributes


def test_each_attribute_is_a_token_of_three_rows():
    part = AttributesConditioner(3, 8)
    w = part.embedding.weight.view(3, 3, 8)  # attribute, what is said
    cond = part({"attributes": torch.tensor([[0.0, 1, 1], [1, 0, 1]])})
    assert torch.equal(cond.context, torch.stack([w[range(3), [0, 1, 1]], w[range(3), [1, 0, 1]]]))
    assert torch.equal(part.null().context[0], w[:, 2])
    cond.context.sum().backward()
    assert part.embedding.weight.grad.sum(1).tolist() == [8, 8, 0, 8, 8, 0, 0, 16, 0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_attributes_are_read_in_any_dtype(dtype):
    part = AttributesConditioner(3, 8)
    assert_same(part({"attributes": torch.eye(3).to(dtype)}), part({"attributes": torch.eye(3)}))


@pytest.mark.parametrize(
    "values, message",
    [
        (
            torch.ones(2, 4),
            r"attributes should be \(b, 3\), 0 \(no\) or 1 \(yes\) for each attribute of each image, not \(2, 4\)",
        ),
        (torch.ones(3), "attributes should be .* of each image, not"),
        (torch.ones(2, 3, 1), "attributes should be .* of each image, not"),
        ("smiling", "attributes should be .* of each image, not"),
        (None, "attributes should be .* of each image, not"),
        (torch.full((2, 3), 0.5), "attributes should be .*, and nothing else"),
        (torch.full((2, 3), 2), "attributes should be .*, and nothing else"),  # 2 is the null's row
        (torch.full((2, 3), -1), "attributes should be .*, and nothing else"),
        (torch.full((2, 3), float("nan")), "attributes should be .*, and nothing else"),
        (torch.full((2, 3), float("inf")), "attributes should be .*, and nothing else"),
    ],
)
def test_what_are_no_attributes_is_refused(values, message):
    with pytest.raises(LDMError, match=message):
        AttributesConditioner(3, 8)({"attributes": values})


# ---- boxes


def layout(**arguments) -> LayoutConditioner:
    torch.manual_seed(0)
    return LayoutConditioner(**{"classes": 4, "max_boxes": 3, "bins": 4, "dim": 16, "depth": 1} | arguments)


def ids(these: Tensor, bins: int = 4, max_boxes: int = 3, strict: bool = True) -> list[int]:
    return layout_ids(these, 4, bins, max_boxes, strict)


def random_boxes(seed: int, k: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    corners = torch.rand(k, 2, 2, generator=g).sort(dim=1).values
    return torch.cat([torch.randint(4, (k, 1), generator=g), corners.flatten(1)], 1)


@pytest.mark.parametrize("seed", range(8))
def test_the_order_of_boxes_does_not_count(seed):
    part, these = layout(max_boxes=6), random_boxes(seed, random.Random(seed).randint(2, 6))
    mixed = these[torch.randperm(len(these), generator=torch.Generator().manual_seed(seed))]
    assert ids(mixed, max_boxes=6) == ids(these, max_boxes=6)
    assert_same(part({"boxes": [mixed]}), part({"boxes": [these]}))


@pytest.mark.parametrize("seed", range(8))
def test_the_ids_say_where_the_boxes_are(seed):
    """Counted by hand, cell by cell."""
    these = random_boxes(seed, 4)
    cell = [i / 5 for i in range(6)]

    def index(x: float, y: float) -> int:
        column, row = (max(i for i in range(5) if cell[i] <= v or i == 0) for v in (x, y))
        return 5 * row + column

    wanted = sorted((index(x, y), index(right, lower), int(kind)) for kind, x, y, right, lower in these.tolist())
    assert box_tokens(these.double(), 5) == wanted
    flat = [i for begin, end, kind in wanted for i in (1 + begin, 1 + end, 26 + kind)]
    assert ids(these, bins=5, max_boxes=6) == flat + [0] * 6


def test_corners_on_the_very_edges_are_in_the_first_and_last_cell():
    assert ids(boxes((3, 0, 0, 1, 1))) == [1, 16, 20, 0, 0, 0, 0, 0, 0]
    assert ids(boxes((0, 0, 0, 0.25, 0.25))) == [1, 1 + 4 * 1 + 1, 17, 0, 0, 0, 0, 0, 0]
    assert max(ids(boxes((3, 0.999, 0.999, 1, 1)))) < len(layout().transformer.tokens.weight) == 21


def test_boxes_without_area_are_left_out():
    flat = boxes((1, 0.5, 0, 0.5, 1), (2, 0, 0.5, 1, 0.5), (0, 1, 1, 1, 1), (1, 0, 0, 0, 0))
    assert ids(torch.cat([LAYOUTS[0], flat])) == ids(LAYOUTS[0])
    part = layout()
    assert_same(part({"boxes": [flat]}), part.null())


def test_too_many_boxes_are_refused_or_the_largest_kept():
    large = [(0, 0, 0, 0.9, 0.9), (1, 0.5, 0, 1, 1), (2, 0, 0.5, 0.5, 1)]
    many = boxes((3, 0.1, 0.1, 0.2, 0.2), *large, (3, 0.3, 0.3, 0.4, 0.4))
    with pytest.raises(LDMError, match="boxes: an image has 5, but .*max_boxes=3"):
        layout()({"boxes": [many]})
    assert ids(many, strict=False) == ids(boxes(*large))
    assert_same(layout(strict=False)({"boxes": [many]}), layout()({"boxes": [boxes(*large)]}))
    layout()({"boxes": [torch.cat([boxes(*large), boxes((3, 0, 0, 0, 1))])]})  # one without area does not count


def test_gradients_reach_the_ids_that_occur():
    part = layout()
    part({"boxes": [LAYOUTS[0]]}).context.pow(3).sum().backward()
    reached = part.transformer.tokens.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert reached == sorted(set(ids(LAYOUTS[0])))
    part.zero_grad()
    part.null().context.pow(3).sum().backward()
    assert part.transformer.tokens.weight.grad.abs().sum(1).nonzero()[:, 0].tolist() == [0]


NO_BOXES = {
    "a number": 3,
    "a text": "boxes",
    "nothing": None,
    "a list of nothing": [None],
    "a list of lists": [[[0, 0, 0, 1, 1]]],
    "numpy": [np.zeros((1, 5), np.float32)],
    "whole numbers": [torch.tensor([[0, 0, 0, 1, 1]])],
    "one box": [torch.tensor([0.0, 0, 0, 1, 1])],
    "four columns": [torch.zeros(1, 4)],
    "pixels": [boxes((0, 0, 0, 64, 64))],
    "negative": [boxes((0, -0.1, 0, 1, 1))],
    "right before left": [boxes((0, 0.5, 0, 0.4, 1))],
    "bottom before top": [boxes((0, 0, 0.5, 1, 0.4))],
    "nan": [boxes((0, float("nan"), 0, 1, 1))],
    "infinite": [boxes((0, 0, 0, float("inf"), 1))],
    "a class of nan": [boxes((float("nan"), 0, 0, 1, 1))],
    "half a class": [boxes((0.5, 0, 0, 1, 1))],
    "a class too many": [boxes((4, 0, 0, 1, 1))],
    "a negative class": [boxes((-1, 0, 0, 1, 1))],
}


@pytest.mark.parametrize("case", NO_BOXES)
def test_what_are_no_boxes_is_refused(case):
    with pytest.raises((LDMError, TypeError), match="boxes"):  # TypeError: from beartype, where types are checked
        layout()({"boxes": NO_BOXES[case]})


# ---- what the training data decide


def test_classes_and_attributes_are_counted_in_the_data():
    scenes, faces = ToyCOCO(keys=("class", "boxes"), length=60), ToyCelebA(keys=("attributes",), length=3)
    seen = collate([scenes[i] for i in range(60)])
    assert ClassConditioner.complete({"dim": 8}, seen.get) == {"classes": 1 + max(seen["class"].tolist()), "dim": 8}
    most = max(int(each[:, 0].max()) for each in seen["boxes"])
    assert LayoutConditioner.complete({"bins": 4}, seen.get) == {"classes": 1 + most, "bins": 4}
    assert AttributesConditioner.complete({}, collate([faces[0]]).get) == {"attributes": 16}
    assert ClassConditioner.complete({"key": "kind"}, {"kind": torch.tensor([4, 2])}.get)["classes"] == 5
    assert LayoutConditioner.complete({}, {"boxes": [boxes()]}.get) == {"classes": 1}


def test_what_a_recipe_says_is_not_counted():
    def nobody(key):
        raise AssertionError(key)

    assert ClassConditioner.complete({"classes": 3}, nobody) == {"classes": 3}
    assert AttributesConditioner.complete({"attributes": 3}, nobody) == {"attributes": 3}
    assert LayoutConditioner.complete({"classes": 3}, nobody) == {"classes": 3}
    assert CLIPConditioner.complete({"pretrained": "x"}, nobody) == {"pretrained": "x"}


def test_toy_data_are_read_as_they_come():
    scenes, faces = ToyCOCO(keys=("class", "boxes"), length=40), ToyCelebA(keys=("attributes",), length=4)
    batch = collate([scenes[i] for i in range(40)])
    assert ClassConditioner(len(ToyCOCO.class_names), 8)(batch).context.shape == (40, 1, 8)
    assert layout()(batch).context.shape == (40, 9, 16)
    assert AttributesConditioner(16, 8)(collate([faces[i] for i in range(4)])).context.shape == (4, 16, 8)


# ---- CLIP


@pytest.mark.parametrize("apart", [True, False])
def test_clip_equals_transformers_to_the_bit(apart, tmp_path):
    from transformers import CLIPTokenizer

    theirs = small_clip(tmp_path, apart, seed=1)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer" if apart else tmp_path)
    captions = [*CAPTIONS, "a Ball; a cube!", "é ☃", "red " * 200, " ".join(["ball"] * 75)]
    ids = tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    part = CLIPConditioner(str(tmp_path))
    assert torch.equal(part.ids(captions), ids) and ids.shape == (7, 77)
    with torch.no_grad():
        assert torch.equal(part(captions).context, theirs(input_ids=ids).last_hidden_state)
    assert torch.equal(part({"caption": captions}).context, part(captions).context)


def test_long_captions_are_cut_at_77(clip_folder):
    part = CLIPConditioner(str(clip_folder))
    long, longer = part.ids(["red " * 75, "red " * 75 + "ball"])
    assert torch.equal(long, longer) and (long[0], long[-1]) == (0, 1) and (long[1:-1] == long[1]).all()
    assert not torch.equal(part.ids(["red " * 74 + "ball"])[0], long)
    assert CLIPConditioner(str(clip_folder), length=5)(["red " * 9]).context.shape == (1, 5, 32)


def test_clip_is_frozen(clip_folder):
    part = CLIPConditioner(str(clip_folder)).train()
    assert part.training and not part.encoder.training and not any(m.training for m in part.encoder.modules())
    assert [*part.parameters()] and not any(p.requires_grad for p in part.parameters())
    assert not part(CAPTIONS).context.requires_grad and not part.null().context.requires_grad
    assert not part.eval().encoder.training


def test_a_saved_clip_needs_its_first_folder_no_more(tmp_path):
    small_clip(tmp_path / "first")
    part = CLIPConditioner(str(tmp_path / "first"), length=7)
    expected = part(CAPTIONS).context
    part.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "first")
    again = Conditioner.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(CAPTIONS).context, expected) and again.config["pretrained"] is None
    assert not any(p.requires_grad for p in again.parameters())
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(Conditioner.from_pretrained(tmp_path / "twice")(CAPTIONS).context, expected)


@pytest.mark.parametrize("lacking", ["everything", "text_encoder"])
def test_a_folder_without_clip_is_named(lacking, tmp_path):
    folder = tmp_path / "clip"
    if lacking != "everything":
        small_clip(folder)
        shutil.rmtree(folder / lacking)
    with pytest.raises(CheckpointError, match=f"{folder}: no CLIP text encoder can be loaded"):
        CLIPConditioner(str(folder))


@pytest.mark.parametrize("apart", [True, False])
def test_a_folder_without_a_tokenizer_is_named(apart, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    small_clip(tmp_path, apart)
    where = tmp_path / "tokenizer" if apart else tmp_path
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.remove(where / name)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no CLIP tokenizer"):
        CLIPConditioner(str(tmp_path))


def test_a_damaged_encoder_is_named(tmp_path):
    small_clip(tmp_path)
    path = tmp_path / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no CLIP text encoder can be loaded"):
        CLIPConditioner(str(tmp_path))


@pytest.mark.parametrize(
    "captions", ["a red ball", ["red", 1], [None], [["red"]], [b"red"], [], None, torch.zeros(2), 3]
)
def test_what_are_no_captions_is_refused(clip_folder, captions):
    part = CLIPConditioner(str(clip_folder))
    for given in (captions, {"caption": captions}):
        with pytest.raises((LDMError, TypeError), match="caption|'batch'"):  # TypeError: from beartype
            part(given)


def test_clip_needs_a_name_or_both_descriptions(clip_folder):
    config = CLIPConditioner(str(clip_folder)).config
    for some in ({}, {"text_config": config["text_config"]}, {"tokenizer": config["tokenizer"]}):
        with pytest.raises(LDMError, match="give either pretrained, .* or text_config and tokenizer"):
            CLIPConditioner(**some)
    fresh = CLIPConditioner(text_config=config["text_config"], tokenizer=config["tokenizer"])
    assert fresh(CAPTIONS).context.shape == (3, 77, 32)
    for length in (1, 78):
        with pytest.raises(LDMError, match=f"length={length} should be a whole number"):
            CLIPConditioner(str(clip_folder), length=length)
