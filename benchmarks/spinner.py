"""A process that keeps one core busy: `spinner.py CORE NICENESS`. Started by disturbed.py.

Says "spinning" when it does, or why it cannot. Ends with the process that started it, however that
one ends: a spinner of the highest priority that stays behind would take a core from everybody.
"""

import os
import sys


def main(core: int, niceness: int) -> None:
    parent = os.getppid()
    try:
        os.sched_setaffinity(0, {core})
        if niceness:
            os.setpriority(os.PRIO_PROCESS, 0, niceness)
    except OSError as error:
        print(error.strerror, flush=True)
        return
    print("spinning", flush=True)
    while os.getppid() == parent:
        for _ in range(10_000):
            pass


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
