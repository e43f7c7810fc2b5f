"""Run by test_heartbeat.py: one of several processes, of which one stops, or works alone for long."""

import os
import signal
import sys
import time

import torch

from wuerstchen.errors import UserError
from wuerstchen.train.engine import heartbeat
from wuerstchen.train.engine.distributed import distributed

heartbeat.TICK = 0.2
what, which, hasty = sys.argv[1], *map(int, sys.argv[2:])
if int(os.environ["RANK"]) != hasty:
    heartbeat.TICKS *= 2
try:
    with distributed(torch.device("cpu")) as processes:
        processes.barrier()
        print("met", flush=True)
        if processes.rank == which:
            if what == "works":
                time.sleep(6)  # more than the others' patience
            else:
                # Its connections stay open, as those of NCCL seem to: nobody is told.
                os.kill(os.getpid(), signal.SIGSTOP)
        processes.barrier()
except UserError as error:  # as the command does
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(2)
print("end", flush=True)
