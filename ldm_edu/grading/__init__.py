"""For instructors: student versions of exercises, grading by nbgrader, a class challenge. Needs the extra `grading`."""

from ldm_edu.grading.course import Graded, generate, grade, write_feedback, write_grades

__all__ = ["Graded", "generate", "grade", "write_feedback", "write_grades"]
