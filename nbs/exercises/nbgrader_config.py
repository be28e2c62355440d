"""nbgrader's settings for the exercises: nbgrader reads this file, and so do `ldm-edu generate` and `ldm-edu grade`."""

c = get_config()  # noqa: F821  nbgrader provides it

c.CourseDirectory.course_id = "ldm_edu"

# How long a cell of a submission may run, in seconds; then its test has no points, and the cells after it still run.
# A page with the right answers takes a few seconds. A kernel that is slow to answer ends no grading.
c.Execute.timeout = 120
c.Execute.iopub_timeout = 30
c.Execute.raise_on_iopub_timeout = False

# A test cell that a student deleted is put back; otherwise its points would be lost without a word.
c.OverwriteCells.add_missing_cells = True

# nbgrader gives no points for a test cell that wrote to stderr: a warning or progress bar in a right answer would cost
# its points. What was written there is removed before points are counted; an exception is no such text, and stays.
c.IgnorePattern.enabled = True
c.IgnorePattern.pattern = r"[\s\S]"
