"""alexnet-dist COMMAND [OPTION ...]: the same as python -m alexnet_dist.COMMAND [OPTION ...]"""

import gc
import os
import runpy
import sys

from alexnet_dist import __version__

COMMANDS = {
    "train": "train a network, or resume a run",
    "evaluate": "exact top-1 and top-5 error of a run, or of the average of several",
    "predict": "the best labels of photographs",
    "prepare": "ImageNet as it comes -> shards or raw pixels",
    "figures": "the paper's figures 1, 3 and 4, and curves",
    "export": "safetensors, ONNX, torchvision's state_dict",
    "doctor": "look for what would stop a run on these machines",
    "bench": "what this machine reaches, and what limits it",
    "submit": "train in a SLURM job",
    "replay": "a run's records as one W&B run",
    "summary": "layers, parameters and multiply-adds of a network",
}


def main() -> None:
    """Run the command that the first word names, with the other words."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        gc.disable()  # as for python -m; see __init__.py
        sys.argv[1:] = words
        try:
            runpy.run_module(f"alexnet_dist.{name}", run_name="__main__", alter_sys=True)
        except KeyboardInterrupt:  # while it imports
            os._exit(130)
    elif name == "--version":
        print(__version__)
    elif name in ("-h", "--help"):
        print(__doc__, "", *(f"  {name:<10}{about}" for name, about in COMMANDS.items()), sep="\n")
        print("\nalexnet-dist COMMAND --help lists the options of a command.")
    else:
        sys.exit(f"alexnet_dist: there is no command {name}; there are {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main()
