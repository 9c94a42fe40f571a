"""latemax.compat.<host> compared with the host's own functions, then through ``patch``: ``parity/<host>.py``.

Its functions named check_* are run in turn. The last line is JSON: the counters of parity/common.py. Exits with 77 if
the host cannot be imported, after printing why.
"""

import importlib
import json
import os
import sys
import warnings
from pathlib import Path

import torch

if __name__ == "__main__":
    host = sys.argv[1]
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.append(str(Path(__file__).parents[1]))
    import torchvision_shim

    torchvision_shim.install()
    warnings.simplefilter("ignore")
    try:
        if host != "vllm":
            importlib.import_module(host)
    except ImportError as error:
        print(f"{host} cannot be imported: {error}")
        sys.exit(77)
    checks = importlib.import_module(f"parity.{host}")
    for name, check in list(vars(checks).items()):
        if name.startswith("check_"):
            torch.manual_seed(0)
            check()
    from parity import common

    print(json.dumps({"tried": common.tried, "refused": common.refused, "differs": common.differs}))
