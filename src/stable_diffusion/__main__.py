"""The command ``minisd``, also ``python -m stable_diffusion``."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the caller has it ignored
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # while the command is imported, Ctrl-C ends it without a traceback

from stable_diffusion.cli import main

if __name__ == "__main__":
    main()
