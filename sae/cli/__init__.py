"""The command `sae`; it imports torch only once a request has been checked."""

import os

# Before torch loads. A thread that spins while it waits for another one takes the core that the
# other needs as soon as anything else runs: four times the clock and CPU time beside other jobs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
