"""Scores on several threads, forks, and scores again in the child: fork.py latemax | torch (whose pool ran first)."""

import os
import sys
import time

import torch

from latemax import maxsim

torch.set_num_threads(2)
q, d = torch.ones(32, 128), torch.ones(300, 64, 128)
if sys.argv[1] == "latemax":
    maxsim(q, d)
else:
    torch.mm(torch.ones(1000, 1000), torch.ones(1000, 1000))
child = os.fork()
if child == 0:
    right = all(torch.equal(maxsim(q, d), torch.full((300,), 32.0 * 128)) for _ in range(2))
    os._exit(0 if right else 1)
for _ in range(600):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.1)
os.kill(child, 9)
os.waitpid(child, 0)
sys.exit("the child still hangs after 60 s")
