"""What exercise notebooks use: variants, comparisons, and a closed book that no import gets around."""

import numpy as np
import pytest
import torch

import ldm_edu.diffusion.sampling
from ldm_edu import GaussianMixture, NoiseSchedule, ddim
from ldm_edu.denoiser.attention import CrossAttention
from ldm_edu.diffusion.levels import NoiseLevels, scaled_linear
from ldm_edu.errors import LDMError
from ldm_edu.exercises import Variant, close, closed_book

# --- Variant ---


def test_a_variant_depends_on_student_exercise_and_name_alone():
    mine = Variant("ann", "21_diffusion")
    first = [mine.integer("T", 100, 900), mine.pick("kind", "abcdefgh")]
    again = Variant(" ann ", "21_diffusion")
    assert [again.integer("T", 100, 900), again.pick("kind", "abcdefgh")] == first
    others = {(v.integer("T", 100, 900)) for v in (Variant(f"s{i}", "21_diffusion") for i in range(50))}
    assert len(others) >= 40
    assert Variant("ann", "22_prediction").integer("T", 0, 10**9) != mine.integer("T", 0, 10**9)


def test_every_option_is_somebodys():
    picks = [Variant(f"student {i}", "x").pick("which", ["a", "b", "c"]) for i in range(300)]
    assert all(60 <= picks.count(option) <= 140 for option in "abc")
    numbers = {Variant(f"student {i}", "x").integer("n", 3, 5) for i in range(100)}
    assert numbers == {3, 4, 5}


def test_random_numbers_are_those_of_the_student_at_every_run():
    def drawn(student: str, exercise: str) -> tuple:
        Variant(student, exercise)
        return torch.rand(()).item(), np.random.random()

    assert drawn("ann", "x") == drawn("ann", "x")
    four = [drawn(student, exercise) for student in ("ann", "bob") for exercise in ("x", "y")]
    assert len({a for a, _ in four}) == len({b for _, b in four}) == 4


@pytest.mark.parametrize("student", ["", "  "])
def test_a_student_needs_an_id(student):
    with pytest.raises(LDMError, match="STUDENT=.* should be your id"):
        Variant(student, "x")


def test_who_grades_says_whose_variant_it_is(monkeypatch):
    monkeypatch.setenv("LDM_EDU_STUDENT", "bob")
    assert Variant("ann", "x").student == "bob"


# --- close ---


def test_close_goes_by_the_largest_value():
    right = torch.tensor([100.0, 0.0])
    assert close(right + 0.05, right) and not close(right + 0.2, right)
    assert (
        close(right.double(), right)
        and close(2.0, torch.tensor(2.0001))
        and close(np.float32(2), 2.0)
        and close(right.numpy(), right)
        and close(torch.zeros(3), torch.zeros(3))
    )
    assert close(torch.empty(0), torch.empty(0)) and not close(torch.ones(2), torch.zeros(2))


@pytest.mark.parametrize(
    ("yours", "says"),
    [
        (None, "a NoneType came back"),
        ("2", "a str came back"),
        (torch.zeros(2, 1), r"the shape is \(2, 1\): \(2,\) is expected"),
        (torch.zeros(()), "the shape is"),
        (torch.tensor([0.0, float("nan")]), "not a number"),
        (torch.tensor([0.0, float("inf")]), "infinite"),
    ],
)
def test_close_says_what_cannot_be_compared(yours, says):
    with pytest.raises(AssertionError, match=says):
        close(yours, torch.zeros(2))


# --- closed_book ---

MIXTURE = GaussianMixture(torch.zeros(1, 2), torch.ones(1), torch.ones(1))
SCHEDULE = NoiseSchedule()


def sample() -> torch.Tensor:
    return [*ddim(MIXTURE.denoiser(SCHEDULE), torch.zeros(1, 2), SCHEDULE, steps=2)][-1].x


def test_a_function_is_closed_under_every_name():
    with closed_book("ldm_edu.diffusion.sampling.ddim"):
        noise, denoise = torch.zeros(1, 2), MIXTURE.denoiser(SCHEDULE)
        for call in (sample, lambda: ldm_edu.diffusion.sampling.ddim(denoise, noise, SCHEDULE)):
            with pytest.raises(AssertionError, match="ldm_edu.diffusion.sampling.ddim was called"):
                call()
    assert sample().shape == (1, 2)


def test_a_method_is_closed_for_objects_that_are_there():
    levels, x = NoiseLevels(), torch.zeros(2, 3)
    with closed_book("ldm_edu.diffusion.levels.NoiseLevels.q_sample"):
        with pytest.raises(AssertionError, match="q_sample was called"):
            levels.q_sample(x, torch.tensor([0, 1]), x)
        assert levels.alpha.shape == (1000,)
    assert levels.q_sample(x, torch.tensor([0, 1]), x).shape == (2, 3)


def test_a_class_is_closed_with_all_it_defines():
    attention = CrossAttention(8, heads=2)
    with closed_book("ldm_edu.denoiser.attention.CrossAttention", "ldm_edu.diffusion.levels.NoiseCurves"):
        for call in (lambda: CrossAttention(8), lambda: attention(torch.zeros(1, 2, 8)), lambda: NoiseLevels().snr):
            with pytest.raises(AssertionError, match="was called"):
                call()
    assert attention(torch.zeros(1, 2, 8)).shape == (1, 2, 8) and NoiseLevels().snr.shape == (1000,)


def test_it_is_opened_again_after_an_error():
    with pytest.raises(ZeroDivisionError), closed_book("ldm_edu.diffusion.levels.scaled_linear"):
        1 / 0
    assert scaled_linear(3, 0.1, 0.2).shape == (3,)


@pytest.mark.parametrize("name", ["ldm_edu.diffusion.levels.SCHEDULES", "torch.exp"])
def test_what_cannot_be_closed_is_refused(name):
    with pytest.raises(LDMError, match="no function or class"), closed_book(name):
        pass


def test_a_name_that_is_gone_is_noticed():
    with pytest.raises((AttributeError, ImportError)), closed_book("ldm_edu.diffusion.sampling.no_such"):
        pass
