"""AlexNet (Krizhevsky, Sutskever, Hinton 2012), trained on one machine or a cluster."""

import gc
import sys

__version__ = "1.0.0"

if sys.argv[:1] == ["-m"]:  # a command is about to import much, and all of it stays: no garbage
    gc.disable()  # until errors.run_command; a third of the time that starting takes
