"""Prove the graders of exercises both ways, and write the table of docs/graders.md.

python tests/exercises/prove.py 21_diffusion     # one exercise, with what is wrong
python tests/exercises/prove.py --write          # all of them, and the table
"""

import argparse
import time

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
    result = exercise.run(exercise.patched(case), student)
    message = result.messages.get(case.loses, "")
    if not message:
        return f"{case.loses} is passed"
    if not message.startswith("AssertionError: ") or case.says not in message:
        return f"{case.loses} fails without saying {case.says!r}: {message}"
    if result.crashed:
        return f"raises an exception: {result.crashed}"
    others = result.lost - {case.loses, "test-picture"}
    return f"other tasks lose points as well: { {t: result.messages[t] for t in others} }" if others else ""


def wrong_with_right_answer(exercise: Exercise, case: Case, student: str) -> str:
    """Why the grader rejects a right answer; empty where it earns all points."""
    result = exercise.run(exercise.patched(case), student)
    return str({**result.messages, **result.crashed} or "")


def prove(exercise: Exercise) -> tuple[int, int]:
    """Run every case; print what is wrong; return how many misconceptions are missed and right answers rejected."""
    for student in STUDENTS:
        if (result := exercise.run(student=student)).lost or result.crashed:
            print(f"  the solution of {student}: {result.messages | result.crashed}")
    for text in (STUB, "return None"):
        result = exercise.run(exercise.every_answer(text))
        if sum(result.earned.values()) or result.crashed:
            print(f"  {text!r} for every answer: {result.earned}, {result.crashed}")
    missed = rejected = 0
    for case in exercise.misconceptions:
        wrong = [(s, why) for s in students(case) if (why := wrong_with_misconception(exercise, case, s))]
        missed += bool(wrong)
        for student, why in wrong:
            print(f"  misconception {case.name!r}, {student}: {why}")
    for case in exercise.right_answers:
        wrong = [(s, why) for s in students(case) if (why := wrong_with_right_answer(exercise, case, s))]
        rejected += bool(wrong)
        for student, why in wrong:
            print(f"  right answer {case.name!r}, {student}: {why}")
    return missed, rejected


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
