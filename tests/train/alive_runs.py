"""Run by test_alive.py: one of several processes, of which one stops, or works alone for long."""

import os
import signal
import sys
import time

import torch

from wuerstchen.train import alive
from wuerstchen.train.parallel import distributed

alive.TICK = 0.2
with distributed(torch.device("cpu")) as processes:
    processes.wait()
    print("met", flush=True)
    if processes.rank == int(sys.argv[2]):
        if sys.argv[1] == "works":
            time.sleep(6)  # more than twice as long as the others' patience
        else:
            # Its connections stay open, as those of NCCL seem to: nobody is told.
            os.kill(os.getpid(), signal.SIGSTOP)
    processes.wait()
print("end", flush=True)
