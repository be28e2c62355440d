"""ldm_edu.conditioning.text: conditions, the word tokenizer, the text transformer and its conditioner."""

import random

import pytest
import torch
from torch import nn

from ldm_edu.conditioning.condition import Condition
from ldm_edu.conditioning.text import TextConditioner, TextTransformer, WordTokenizer, suggest
from ldm_edu.data.toy.captions import VOCABULARY
from ldm_edu.data.toy.datasets import ToyCOCO
from ldm_edu.data.toy.scenes import SPLITS
from ldm_edu.errors import LDMError


def random_condition(b: int, seed: int) -> Condition:
    "A condition of b images with at least one slot; slots and shapes depend on the seed alone."
    rng, g = random.Random(seed), torch.Generator().manual_seed(1000 * seed + b)
    shapes = {
        "context": (rng.randint(1, 5), rng.randint(1, 6)),
        "concat": (rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 4)),
        "vector": (rng.randint(1, 6),),
    }
    filled = rng.sample(sorted(shapes), rng.randint(1, 3))
    return Condition(**{name: torch.randn(b, *shapes[name], generator=g) for name in filled})


def assert_same(a: Condition, b: Condition) -> None:
    assert a.slots().keys() == b.slots().keys()
    for name, v in a.slots().items():
        assert torch.equal(v, b.slots()[name]), name


# ---- Condition
@pytest.mark.parametrize("seed", range(8))
def test_where_is_a_choice_row_by_row(seed):
    b = 2 + seed
    cond, null = random_condition(b, seed), random_condition(1, seed)
    keep = torch.rand(b, generator=torch.Generator().manual_seed(seed)) < 0.5
    mixed = cond.where(keep, null)
    by_hand = Condition.cat([(cond[i : i + 1] if keep[i] else null) for i in range(b)])
    assert_same(mixed, by_hand)
    assert_same(cond.where(keep, null.expand(b)), by_hand)


def test_where_all_and_none():
    cond, null = random_condition(4, 1), random_condition(1, 1)
    assert_same(cond.where(torch.ones(4, dtype=torch.bool), null), cond)
    assert_same(cond.where(torch.zeros(4, dtype=torch.bool), null), null.expand(4))


def test_where_keeps_its_own_dtype_and_sends_gradients_to_the_chosen_rows_only():
    context, nothing = (
        torch.randn(3, 2, 4, requires_grad=True),
        torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True),
    )
    mixed = Condition(context=context).where(torch.tensor([True, False, True]), Condition(context=nothing))
    assert mixed.context.dtype == torch.float32
    mixed.context.sum().backward()
    assert context.grad.sum(dim=(1, 2)).tolist() == [8, 0, 8] and nothing.grad.sum() == 8


@pytest.mark.parametrize("seed", range(6))
def test_cat_and_slices_undo_each_other(seed):
    parts = [random_condition(b, seed) for b in (1, 3, 2)]
    whole = Condition.cat(parts)
    assert len(whole) == 6
    for part, piece in zip(parts, (whole[:1], whole[1:4], whole[4:])):
        assert_same(part, piece)
    assert_same(whole[torch.tensor([5, 0])], Condition.cat([whole[5:6], whole[:1]]))
    assert_same(whole[[5, 0]], whole[torch.tensor([5, 0])])


def test_expand_makes_no_copy():
    one = random_condition(1, 3)
    for name, v in one.expand(7).slots().items():
        assert len(v) == 7 and v.data_ptr() == one.slots()[name].data_ptr()
    assert_same(one.expand(7).expand(7), one.expand(7))


def test_to_reaches_every_filled_slot():
    cond = random_condition(2, 5).to(torch.float64)
    assert all(v.dtype == torch.float64 for v in cond.slots().values())


def test_the_empty_condition():
    assert len(Condition()) == 0 and Condition().slots() == {} and Condition().to(torch.float64).context is None


@pytest.mark.parametrize(
    "mistake, message",
    [
        (lambda c: c[0], "slice"),
        (lambda c: c.expand(5), "expand"),
        (lambda c: Condition.cat([c, Condition(vector=torch.zeros(2, 3))]), "different slots"),
        (lambda c: Condition.cat([c, Condition(context=torch.zeros(2, 9, 4))]), "slot context"),
        (lambda c: c.where(torch.ones(2, dtype=torch.bool), Condition(context=torch.zeros(1, 1, 4))), "slot context"),
        (lambda c: c.where(torch.ones(2, dtype=torch.bool), Condition()), "different slots"),
    ],
)
def test_mistakes_with_conditions_are_named(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake(Condition(context=torch.zeros(2, 3, 4)))


def test_slots_of_different_batch_sizes_are_refused():
    with pytest.raises((ValueError, TypeError)):  # TypeError: from jaxtyping, where shapes are checked
        Condition(context=torch.zeros(2, 3, 4), vector=torch.zeros(3, 5))


# ---- WordTokenizer
@pytest.mark.parametrize("seed", range(5))
def test_round_trip(seed):
    rng = random.Random(seed)
    words = list(dict.fromkeys("".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(40)))
    tokenizer = WordTokenizer(words, length=12)
    prompts = [" ".join(rng.choices(words, k=rng.randint(0, 12))) for _ in range(20)]
    ids = tokenizer(prompts)
    assert ids.shape == (20, 12) and ids.dtype == torch.long and ids.max() < len(tokenizer)
    assert tokenizer.decode(ids) == prompts
    for prompt, row in zip(prompts, ids):
        n = len(prompt.split())
        assert (row[:n] > 0).all() and (row[n:] == 0).all()


def test_case_and_punctuation_do_not_count():
    tokenizer = WordTokenizer(VOCABULARY)
    assert torch.equal(
        tokenizer(["A small, RED ball; left-of\n a cube."]), tokenizer(["a small red ball left of a cube"])
    )


@pytest.mark.parametrize("split", SPLITS)
def test_every_caption_of_the_toy_data_fits(split):
    dataset, tokenizer = ToyCOCO(split), WordTokenizer(VOCABULARY)
    captions = [dataset.describe(i)[1][0] for i in range(300)]
    assert tokenizer.decode(tokenizer(captions)) == captions


def test_unknown_words_are_named_with_known_ones_beside_them():
    with pytest.raises(LDMError) as caught:
        WordTokenizer(VOCABULARY)(["a red ball", "a crimson sphear near a Crimson cube"])
    message = str(caught.value)
    assert "crimson, sphear, near" in message and "sphere" in message


@pytest.mark.parametrize(
    "typo, word", [("bal", "ball"), ("purpel", "purple"), ("cylindr", "cylinder"), ("litle", "little")]
)
def test_the_closest_word_comes_first(typo, word):
    assert suggest([typo], VOCABULARY)[0] == word


def test_the_limit_is_named_and_exact():
    tokenizer = WordTokenizer(["a"], length=3)
    assert tokenizer(["a a a"]).tolist() == [[1, 1, 1]]
    with pytest.raises(LDMError, match="at most 3 words"):
        tokenizer(["a a a a"])


@pytest.mark.parametrize(
    "vocabulary, named", [(["a", "b", "a"], "'a'"), (["left of"], "left of"), (["Red"], "Red"), ([""], "''")]
)
def test_a_bad_vocabulary_is_refused(vocabulary, named):
    with pytest.raises(ValueError, match=named):
        WordTokenizer(vocabulary)


def test_a_bare_string_is_refused():
    with pytest.raises(LDMError, match="list of strings"):
        WordTokenizer(VOCABULARY)("a red ball")


# ---- TextTransformer, which test_text_encoders.py holds against others
@pytest.mark.parametrize("seed", range(3))
def test_a_batch_of_n_equals_n_batches_of_one(seed):
    torch.manual_seed(seed)
    model, ids = TextTransformer(20, 9, dim=24, depth=3, heads=3), torch.randint(20, (5, 9))
    torch.testing.assert_close(model(ids), torch.cat([model(row[None]) for row in ids]), atol=1e-5, rtol=1e-4)


def test_without_positions_it_is_a_function_of_a_set():
    torch.manual_seed(0)
    model, ids, order = TextTransformer(20, 9, dim=24, depth=2, heads=3), torch.randint(20, (2, 9)), torch.randperm(9)
    assert not torch.allclose(model(ids[:, order]), model(ids)[:, order], atol=1e-2)
    nn.init.zeros_(model.positions.weight)
    torch.testing.assert_close(model(ids[:, order]), model(ids)[:, order], atol=1e-5, rtol=1e-4)


def test_nothing_is_masked():
    "The first token hears the last one, and padding too."
    torch.manual_seed(0)
    model = TextTransformer(5, 4, dim=16, depth=1, heads=2)
    a, b, c = model(torch.tensor([[1, 2, 3, 0], [1, 2, 3, 4], [1, 2, 4, 0]]))[:, 0]
    assert not torch.allclose(a, b) and not torch.allclose(a, c)


def test_heads_must_divide_dim():
    with pytest.raises(ValueError, match="heads=5"):
        TextTransformer(10, dim=16, heads=5)


# ---- TextConditioner
@pytest.fixture
def conditioner() -> TextConditioner:
    torch.manual_seed(0)
    return TextConditioner(VOCABULARY, length=16, dim=24, depth=2, heads=3)


def test_it_reads_lists_and_batches(conditioner):
    captions = ["a red ball", "a big blue cube"]
    cond = conditioner(captions)
    assert cond.context.shape == (2, 16, 24) and cond.concat is None and cond.vector is None
    assert torch.equal(conditioner({"image": torch.zeros(2), "caption": captions}).context, cond.context)
    with pytest.raises(ValueError, match="caption"):
        conditioner({"image": torch.zeros(2)})


def test_the_null_is_the_empty_prompt_and_learns(conditioner):
    null = conditioner.null(3)
    assert len(null) == 3 and len(conditioner.null()) == 1
    torch.testing.assert_close(null.context, conditioner(["", " ", ""]).context)
    null.context.pow(3).sum().backward()
    rows = conditioner.transformer.tokens.weight.grad.abs().sum(dim=1).nonzero()[:, 0].tolist()
    assert rows == [0]  # only padding occurs in it


@pytest.mark.parametrize("half", [False, True])
def test_saved_and_loaded(conditioner, tmp_path, half):
    conditioner.save_pretrained(tmp_path / "conditioner", half=half)
    again = TextConditioner.from_pretrained(tmp_path, part="conditioner")
    captions = ["a tiny white can behind a large orange box", ""]
    assert again.tokenizer.words == conditioner.tokenizer.words and again.tokenizer.length == 16
    assert not again.training and again.transformer.tokens.weight.dtype == torch.float32
    tolerance = 2e-2 if half else 0
    torch.testing.assert_close(again(captions).context, conditioner(captions).context, atol=tolerance, rtol=tolerance)
