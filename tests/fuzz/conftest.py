"""How the public functions are tried: with arguments of all kinds, in bounded memory, each try ending well or clearly.

LDM_EDU_FUZZ_EXAMPLES is the number of tries of each kind in `make fuzz`; tests/test_fuzz.py runs a short round.
"""

import os
import resource
import sys
import warnings
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings

sys.path.insert(0, str(Path(__file__).parent))

GIB = 2**30
# PyTorch alone maps about 10 GiB of addresses; what a try may take on top of them is bounded by this.
resource.setrlimit(resource.RLIMIT_AS, (24 * GIB, resource.getrlimit(resource.RLIMIT_AS)[1]))
torch.set_num_threads(1)
torch.set_printoptions(threshold=8, edgeitems=1)
warnings.simplefilter("ignore")

SHORT = "LDM_EDU_FUZZ_EXAMPLES" not in os.environ
settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get("LDM_EDU_FUZZ_EXAMPLES", "25")),
    deadline=None,  # the machines are shared
    derandomize=SHORT,  # the short round tries the same every time
    database=None,
    print_blob=not SHORT,
    phases=[Phase.explicit, Phase.generate] + [Phase.shrink] * (not SHORT),
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("fuzz")
