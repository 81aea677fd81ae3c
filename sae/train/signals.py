"""What a scheduler says to a run that has to stop: SIGTERM, or SIGUSR1 some time before that."""

import signal
import threading
from types import FrameType


class Stopped(SystemExit):
    """The run was told to stop, and its checkpoint is written.

    `wants_requeue` after SIGUSR1, which SLURM sends when it is asked to (`--signal=USR1@120`);
    after a preemption it starts the job again by itself.
    """

    def __init__(self, number: int, n_steps: int) -> None:
        """Take the signal's number, which decides the exit code, and the steps that were done."""
        super().__init__(128 + number)
        self.wants_requeue = number == signal.SIGUSR1
        name = signal.Signals(number).name
        self.message = (
            f"stopped by {name} after step {n_steps}, which is saved; run the same command again, "
            "it goes on from here"
        )


class Signals:
    """Remembers that SIGTERM or SIGUSR1 came, for the next end of a step."""

    def __init__(self) -> None:
        """Hear nothing yet."""
        self.received = 0

    def listen(self) -> None:
        """From now on, remember a signal instead of dying of it; only in the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = number
