"""Run by test_heartbeat.py as each of several processes: one of them works alone for long, and then stops."""

import os
import signal
import sys
import time

import torch

from wuerstchen.errors import UserError
from wuerstchen.train.engine import heartbeat
from wuerstchen.train.engine.distributed import distributed

heartbeat.TICK = 0.2
which, hasty = map(int, sys.argv[1:])
if int(os.environ["RANK"]) != hasty:
    heartbeat.TICKS *= 2
try:
    with distributed(torch.device("cpu")) as processes:
        processes.barrier()
        print("met", flush=True)
        if processes.rank == which:
            time.sleep(4)  # longer than the hasty one would wait for a dead process
        processes.barrier()
        print("met again", flush=True)
        if processes.rank == which:
            # Its connections stay open, as those of NCCL seem to: nobody is told.
            os.kill(os.getpid(), signal.SIGSTOP)
        processes.barrier()
except UserError as error:  # as the command does
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(2)
print("end", flush=True)
