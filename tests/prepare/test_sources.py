"""Every form in which people have ImageNet gives the same images."""

import re
import tarfile
from pathlib import Path

import pytest

from alexnet_dist.prepare.__main__ import main
from alexnet_dist.prepare.sources import discover_dataset
from tests.data.corrupt_images import encode, photograph
from tests.prepare.imagenet import CLASSES, FORMS, IMAGES, parquet, tar, webdataset, write


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(form: str, tmp_path: Path) -> None:
    listing = discover_dataset(FORMS[form](tmp_path / "given"), tmp_path, lambda *_: None)
    found = {
        (e.split, e.label, e.name.removesuffix(f"_{e.label}")): e.read().tobytes()
        for e in listing.entries
    }
    assert len(listing.entries) == len(IMAGES)
    assert found == {(split, c, Path(name).stem): data for (split, c, name), data in IMAGES.items()}
    if form in ("Kaggle", "parquet", "webdataset") or form.startswith("official"):
        assert listing.class_names == CLASSES


def test_classes_are_named_by_index_where_file_names_do_not_tell(tmp_path: Path) -> None:
    listing = discover_dataset(parquet(tmp_path / "in", paths=False), tmp_path, lambda *_: None)
    assert listing.class_names == dict(zip("012", CLASSES.values(), strict=True))


def test_hostile_tars_write_nothing_elsewhere_and_make_no_odd_names(tmp_path: Path) -> None:
    given = webdataset(tmp_path / "given")
    names = ["../../outside/a", "/etc/b", "train/../../n1/c\nd", "n1/\t", "n1/e f", "n1/e_f"]
    names += ["n1/e:f", f"n1/{'long' * 70}", "../.../x/y", "n1/\udcff", "n1/?"]
    image = encode(photograph(20, 20), "JPEG")
    files = {f"{name}.jpg": image for name in names} | {f"{name}.cls": b"0" for name in names}
    write(given / "train-2.tar", tar(files))
    with tarfile.open(given / "train-2.tar", "a") as file:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"n1/special-{kind!r}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
    before = set(tmp_path.rglob("*"))
    out = tmp_path / "out"
    main([str(given), "--out", str(out), "--workers", "1"])
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(out)} == before
    with tarfile.open(out / "train-00000.tar") as file:
        members = file.getmembers()
    assert len({member.name for member in members}) == len(members) == 2 * (len(names) + 12)
    for member in members:
        assert member.isreg()
        assert re.fullmatch(r"[012]/[^./][^./]*\.(jpg|png|cls)", member.name)
        assert member.name.isprintable()
        assert len(member.name) < 130
