"""Prove the graders of exercises both ways, and write the table of docs/graders.md.

python tests/exercises/prove.py 21_diffusion     # one exercise, with what is wrong
python tests/exercises/prove.py --write          # all of them, and the table
"""

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from exercise import NAMES, ROOT, STUB, Case, Exercise

TABLE = ROOT / "docs" / "graders.md"
STUDENTS = ("ann", "ben", "eve", "kim", "2026-0042")  # their variants are tried with the solution
HEAD = """# What the graders of the exercises catch

Every exercise has a list of *misconceptions*, wrong answers that people give, each with the reason why they give it,
and of *other right answers*. A misconception is missed where it keeps the points of the task that it concerns; a right
answer is rejected where it loses any. The lists are `tests/exercises/cases/*.toml`. `make test` runs each case in a
process of its own, `make test-exercises` runs all through nbgrader's `generate_assignment` and `autograde`.

This table is written by `python tests/exercises/prove.py --write`.

| exercise | points | misconceptions tried | missed | other right answers tried | rejected |
|---|---|---|---|---|---|
"""


def students(case: Case) -> tuple[str, ...]:
    return (case.student,) if case.student else STUDENTS[:2]


def wrong_with_misconception(exercise: Exercise, case: Case, student: str) -> str:
    """Why the grader misses a misconception, or takes points for something else; empty where all is as it should be."""
    result = exercise.run(exercise.patched(case), student, picture=False)
    message = result.messages.get(case.loses, "")
    if not message:
        return f"{case.loses} is passed"
    if not message.startswith("AssertionError: ") or case.says not in message:
        return f"{case.loses} fails without saying {case.says!r}: {message}"
    if result.crashed:
        return f"raises an exception: {result.crashed}"
    others = result.lost - {case.loses}
    return f"other tasks lose points as well: { {t: result.messages[t] for t in others} }" if others else ""


def wrong_with_right_answer(exercise: Exercise, case: Case, student: str) -> str:
    """Why the grader rejects a right answer; empty where it earns all points."""
    result = exercise.run(exercise.patched(case), student)
    return str({**result.messages, **result.crashed} or "")


def _complaints(wrong: Callable[[Exercise, Case, str], str], exercise: Exercise, case: Case) -> list[str]:
    """What is wrong with a case, for each student whose variant is tried."""
    return [f"{case.name!r}, {s}: {why}" for s in students(case) if (why := wrong(exercise, case, s))]


def prove(exercise: Exercise) -> tuple[int, int]:
    """Run every case; print what is wrong; return how many misconceptions are missed and right answers rejected."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        solved = pool.map(lambda student: exercise.run(student=student), STUDENTS)
        blank = pool.map(lambda text: exercise.run(exercise.every_answer(text)), (STUB, "return None"))
        wrong = [pool.submit(_complaints, wrong_with_misconception, exercise, c) for c in exercise.misconceptions]
        right = [pool.submit(_complaints, wrong_with_right_answer, exercise, c) for c in exercise.right_answers]
    for student, result in zip(STUDENTS, solved):
        if result.lost or result.crashed:
            print(f"  the solution of {student}: {result.messages | result.crashed}")
    for result in blank:
        if sum(result.earned.values()) or result.crashed:
            print(f"  no answers: {result.earned}, {result.crashed}")
    if len(exercise.misconceptions) < 6 or len(exercise.right_answers) < 3:
        print("  at least six misconceptions and three other right answers are wanted")
    for answer in set(exercise.answers) - {case.answer for case in exercise.misconceptions}:
        print(f"  no misconception of the answer {answer!r}")
    for kind, done in (("misconception", wrong), ("right answer", right)):
        for complaint in (text for one in done for text in one.result()):
            print(f"  {kind} {complaint}")
    return sum(bool(one.result()) for one in wrong), sum(bool(one.result()) for one in right)


def row(exercise: Exercise, missed: int, rejected: int) -> str:
    """The line of an exercise in the table."""
    tried = [len(exercise.misconceptions), missed, len(exercise.right_answers), rejected]
    return f"| {exercise.name} | {sum(exercise.tests.values()):g} | {' | '.join(map(str, tried))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="EXERCISE", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--write", action="store_true", help="write docs/graders.md; needs all exercises")
    asked = parser.parse_args()
    if asked.write and asked.names:
        parser.error("--write needs all exercises")
    rows, sums = [], [0, 0, 0, 0]
    for name in asked.names or NAMES:
        exercise, begun = Exercise(name), time.time()
        missed, rejected = prove(exercise)
        rows.append(row(exercise, missed, rejected))
        tried = len(exercise.misconceptions), missed, len(exercise.right_answers), rejected
        sums = [a + b for a, b in zip(sums, tried)]
        print(f"{rows[-1]}  {time.time() - begun:.0f} s", flush=True)
    if asked.write:
        total = f"| **all {len(rows)}** | | {' | '.join(f'**{n}**' for n in sums)} |"
        TABLE.write_text(HEAD + "\n".join([*rows, total]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
