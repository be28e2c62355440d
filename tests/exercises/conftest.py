"""The complete proof, by nbgrader itself, takes a quarter of an hour: `make test-exercises` asks for it."""

import os

collect_ignore = [] if os.environ.get("LDM_EDU_NBGRADER") else ["test_by_nbgrader.py"]
