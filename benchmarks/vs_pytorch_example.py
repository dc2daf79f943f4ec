"""This trainer against the loop of PyTorch's ImageNet example, its DataLoader, and NVIDIA's DALI
example, in turns, on the same folder of JPEGs; on a GPU as on a CPU.

python -m benchmarks.vs_pytorch_example --data DIR [more of python -m alexnet_dist.bench]

It is ``bench --baseline`` with torchvision's AlexNet, which that loop has: alexnet_dist/bench.py,
alexnet_dist/measuring/baseline.py.
"""

from alexnet_dist.bench import main
from alexnet_dist.config import pop_option
from alexnet_dist.errors import UserError, run_command


def compare(arguments: list[str]) -> None:
    """Measure both on the folder that --data names."""
    folders, more = pop_option(arguments, "data")
    if len(folders) != 1:
        raise UserError(
            "give --data one folder with train/CLASS/ and val/CLASS/", on_all_ranks=True
        )
    main(["--baseline", "--config", "configs/fast.yaml", "--data.root", folders[0], *more])


if __name__ == "__main__":
    run_command(compare)
