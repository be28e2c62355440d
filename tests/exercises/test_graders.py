"""No wrong answer passes and no right one fails: every case of every exercise, each in a process of its own."""

import pytest
from exercise import CASES, NAMES, STUB, Case, Exercise
from prove import STUDENTS, TABLE, row, wrong_with_misconception, wrong_with_right_answer

EXERCISES = {name: Exercise(name) for name in NAMES}
SOME = pytest.mark.parametrize("name", NAMES)


def cases(kind: str) -> list:
    """Every case of a kind as a parameter: the exercise, the case, and one of two students."""
    found = []
    for name, exercise in EXERCISES.items():
        for i, case in enumerate(getattr(exercise, kind)):
            student = case.student or STUDENTS[i % 2]
            found.append(pytest.param(name, case, student, id=f"{name}-{kind[:-1]}-{case.name}"))
    return found


def test_every_exercise_has_its_cases():
    assert len(EXERCISES) >= 15 and {path.stem for path in CASES.glob("*.toml")} == set(NAMES)
    for name, exercise in EXERCISES.items():
        assert len(exercise.misconceptions) >= 6 and len(exercise.right_answers) >= 3, name
        assert {case.answer for case in exercise.misconceptions} == set(exercise.answers), f"{name}: an answer untried"
        assert all(case.why and case.says and case.loses in exercise.tests for case in exercise.misconceptions), name
        for kind in (exercise.misconceptions, exercise.right_answers):
            assert len({case.name for case in kind}) == len(kind), f"{name}: two cases of one name"
    assert sum(len(exercise.misconceptions) for exercise in EXERCISES.values()) >= 90


@pytest.mark.parametrize(("name", "case", "student"), cases("misconceptions"))
def test_a_misconception_loses_its_points(name: str, case: Case, student: str):
    assert not wrong_with_misconception(EXERCISES[name], case, student)


@pytest.mark.parametrize(("name", "case", "student"), cases("right_answers"))
def test_another_right_answer_gets_full_marks(name: str, case: Case, student: str):
    assert not wrong_with_right_answer(EXERCISES[name], case, student)


@SOME
@pytest.mark.parametrize("student", STUDENTS)
def test_the_solution_gets_full_marks_for_every_student(name: str, student: str):
    result = EXERCISES[name].run(student=student)
    assert not result.messages and not result.crashed and sum(result.earned.values()) >= 6


@SOME
@pytest.mark.parametrize("answer", [STUB, "return None", "pass"])
def test_no_answer_gets_no_points_and_stops_nothing(name: str, answer: str):
    exercise = EXERCISES[name]
    result = exercise.run(exercise.every_answer(answer))
    assert sum(result.earned.values()) == 0 and result.lost == set(exercise.tests)
    assert not result.crashed, "a cell without points raises: running all cells would stop there"


def test_a_crash_is_no_catch():
    exercise = Exercise("21_diffusion")
    fails = Case(
        "crash",
        "amplitudes",
        old="return left.sqrt()",
        new="return left.no_such_method()",
        loses="test-amplitudes",
        says="no",
    )
    assert "without saying" in wrong_with_misconception(exercise, fails, "ann")


def test_the_table_tells_of_these_cases():
    table = TABLE.read_text(encoding="utf-8").splitlines()
    for exercise in EXERCISES.values():
        assert row(exercise, 0, 0) in table, "python tests/exercises/prove.py --write"
