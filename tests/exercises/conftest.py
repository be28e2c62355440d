"""The complete proof, by nbgrader itself, takes ten minutes: `make test-exercises` asks for it."""

import os
import re

ASKED = bool(os.environ.get("LDM_EDU_NBGRADER"))
collect_ignore = [] if ASKED else ["test_by_nbgrader.py"]


def pytest_xdist_make_scheduler(config, log):
    """All tests of an exercise go to the same worker, which has its class graded once."""
    if not ASKED:
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByExercise(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            found = re.search(r"\[.*?(\d\d_[a-z_]+)", nodeid)
            return found[1] if found else "odd"

    return ByExercise(config, log)
