"""Run by test_resident.py in Triton's interpreter."""

from pathlib import Path

from alexnet_dist.data import crops
from tests.conftest import write_images
from tests.data.test_gpu_cache import check_cut
from tests.prepare.packed_folder import write_prepared


def test_crops_are_those_of_the_cpu(tmp_path: Path) -> None:
    plain = write_images(tmp_path / "plain", side=96)
    check_cut(crops.cut_by_triton, write_prepared(plain, tmp_path / "pixels", "pixels"))
