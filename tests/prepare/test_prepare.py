"""Preparation: every form of input, what is written, and what a kill or a full disk leaves."""

import contextlib
import csv
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_dist.data.formats import decode, validate_bytes
from alexnet_dist.errors import UserError
from alexnet_dist.prepare import __main__ as prepare
from alexnet_dist.prepare import shards
from alexnet_dist.prepare.images import Form, shrink
from alexnet_dist.prepare.inputs import find_images
from alexnet_dist.prepare.samples import Listing, read
from tests.conftest import command, environment
from tests.data.corrupt_images import damaged, encode, photograph, whole

CLASSES = ("n01440764", "n02102040", "n03000684")
WORDS = ("tench, Tinca tinca", "English springer", "chain saw, chainsaw")
SIZE = 48

Files = dict[tuple[str, str, str], bytes]
Written = tuple[list[Path], list[Path]]


def make_files() -> Files:
    """Images of three classes under the names that ImageNet gives them: large and small, upright
    and lying, JPEG, greyscale, and a PNG that is called JPEG, as there is one."""
    files = {}
    for split, count in (("train", 12), ("val", 6)):
        for number in range(count):
            label = CLASSES[number % 3]
            height, width = [(70, 110), (120, 64), (40, 52), (150, 151)][number % 4]
            image = photograph(height, width).rotate(7 * number)
            kind = "PNG" if number == 4 else "JPEG"
            content = encode(image.convert("L") if number == 5 else image, kind)
            train = split == "train"
            name = f"{label}_{number}" if train else f"ILSVRC2012_val_{number + 1:08d}"
            files[split, label, f"{name}.JPEG"] = content
    return files


FILES = make_files()


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, BytesIO(content))
    return path


def of(split: str) -> dict[tuple[str, str], bytes]:
    return {(label, name): data for (s, label, name), data in FILES.items() if s == split}


def class_folders(root: Path, val: str = "val") -> Written:
    for (split, label, name), content in FILES.items():
        put(root / (val if split == "val" else split) / label / name, content)
    return [root], []


def one_level(root: Path) -> Written:
    class_folders(root)
    return [root / "train"], [root / "val"]


def kaggle(root: Path) -> Written:
    data = root / "ILSVRC/Data/CLS-LOC"
    for (split, label, name), content in FILES.items():
        put(data / split / (label if split == "train" else ".") / name, content)
    with (root / "LOC_val_solution.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        for label, name in of("val"):
            rows.writerow([Path(name).stem, f"{label} 1 2 30 40 {label} 5 6 7 8"])
    lines = [f"{label} {words}" for label, words in zip(CLASSES, WORDS, strict=True)]
    (root / "LOC_synset_mapping.txt").write_text("\n".join(lines))
    return [root], []


def official(root: Path, packed: bool = False) -> Written:
    from scipy.io import savemat

    inner = {}
    for label in CLASSES:
        mine = {name: data for (other, name), data in of("train").items() if other == label}
        inner[f"{label}.tar"] = tar(root / "made/inner.tar", mine).read_bytes()
    tar(root / "given/ILSVRC2012_img_train.tar", inner)
    tar(
        root / "given/ILSVRC2012_img_val.tar", {name: data for (_, name), data in of("val").items()}
    )
    kinds = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O"), ("num_children", "i4")]
    numbers = (3, 1, 2)  # which are not in the order of the classes
    synsets = np.array([(n, *cw, 0) for n, *cw in zip(numbers, CLASSES, WORDS, strict=True)], kinds)
    matrix = BytesIO()
    savemat(matrix, {"synsets": synsets})
    truth = [numbers[CLASSES.index(label)] for label, _ in of("val")]
    devkit = {
        "data/meta.mat": matrix.getvalue(),
        "data/ILSVRC2012_validation_ground_truth.txt": "\n".join(map(str, truth)).encode(),
    }
    name = "ILSVRC2012_devkit_t12"
    if packed:
        tar(root / f"given/{name}.tar.gz", {f"{name}/{k}": v for k, v in devkit.items()}, "w:gz")
        return [root / "given"], []
    for path, content in devkit.items():
        put(root / name / path, content)
    return [root / "given/ILSVRC2012_img_train.tar"], [
        root / "given/ILSVRC2012_img_val.tar",
        root / name,
    ]


def parquet(root: Path, *, paths: bool = True) -> Written:
    import pyarrow
    from pyarrow.parquet import write_table

    root.mkdir(parents=True)
    feature = {"image": {"_type": "Image"}, "label": {"names": WORDS, "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": feature}}).encode()}
    for split, name in (("train", "train"), ("val", "validation")):
        mine = list(of(split).items())
        for part in range(2):
            rows = mine[part::2]
            stems = [f"{Path(n).stem}_{label}" if split == "val" else n for (label, n), _ in rows]
            images = [
                {"bytes": data, "path": f"{Path(stem).stem}.JPEG" if paths else None}
                for stem, (_, data) in zip(stems, rows, strict=True)
            ]
            labels = [CLASSES.index(label) for (label, _), _ in rows]
            table = pyarrow.table({"image": images, "label": labels})
            table = table.replace_schema_metadata(metadata)
            write_table(table, root / f"{name}-{part:05d}-of-00002.parquet", row_group_size=2)
    return [root], []


def webdataset(root: Path) -> Written:
    for split, name in (("train", "train"), ("val", "val")):
        mine = list(of(split).items())
        for part in range(2):
            members = {}
            for at, ((label, file), data) in enumerate(mine[part::2]):
                named = file if split == "train" else f"{Path(file).stem}_{label}.JPEG"
                number = CLASSES.index(label)
                about = {"filename": named, "class_name": WORDS[number], "label": number}
                members[f"{at:06d}.jpg"] = data
                members[f"{at:06d}.cls"] = str(number).encode()
                members[f"{at:06d}.json"] = json.dumps(about).encode()
            tar(root / f"{name}-{part:04d}.tar", members)
    return [root], []


def packed_folders(root: Path) -> Written:
    members = {f"imagenette2/{split}/{c}/{name}": d for (split, c, name), d in FILES.items()}
    return [tar(root / "imagenette2.tgz", members, "w:gz")], []


FORMS: dict[str, Callable[[Path], Written]] = {
    "class folders": class_folders,
    "train and test": lambda root: class_folders(root, "test"),
    "one level": one_level,
    "Kaggle": kaggle,
    "official tars": official,
    "official tars and packed devkit": lambda root: official(root, packed=True),
    "parquet": parquet,
    "webdataset": webdataset,
    "packed class folders": packed_folders,
}


def listing(root: Path, written: Written) -> Listing:
    scratch = root / "scratch"
    scratch.mkdir(exist_ok=True)
    return find_images(*written, scratch, lambda *_: None)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_input_gives_the_same_samples(form: str, tmp_path: Path) -> None:
    found = listing(tmp_path, FORMS[form](tmp_path / "given"))
    expected = sorted(
        (split, label, Path(name).stem, content) for (split, label, name), content in FILES.items()
    )
    ours = [
        (split, label, name.removesuffix(f"_{label}"), read(sample).tobytes())
        for sample in found.samples
        for split, label, name, *_ in [sample]
    ]
    assert sorted(ours) == expected
    if form in ("Kaggle", "parquet", "webdataset") or form.startswith("official"):
        assert found.class_names == dict(zip(CLASSES, WORDS, strict=True))


def test_classes_of_parquet_are_called_by_their_words_where_names_do_not_tell(
    tmp_path: Path,
) -> None:
    found = listing(tmp_path, parquet(tmp_path / "given", paths=False))
    assert {sample.label for sample in found.samples} == set(WORDS)


def test_cifar10s_own_files(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 3, 32, 32), np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    batches = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]
    for at, name in enumerate(batches):
        batch = {"data": pixels[at].reshape(1, -1), "labels": [at % 2]}
        put(folder / name, pickle.dumps(batch, 2))
    put(folder / "batches.meta", pickle.dumps({"label_names": ["cat", "ship"]}))
    assert prepare._downloaded("cifar10", tmp_path) == folder  # which is not got again
    found = listing(tmp_path, ([tmp_path], []))
    assert [(s.split, s.label) for s in found.samples].count(("val", "ship")) == 1
    by_name = {sample.name: sample for sample in found.samples}
    image = np.asarray(Image.open(BytesIO(read(by_name["data_batch_3_00000"]).tobytes())))
    assert np.array_equal(image, pixels[2].transpose(1, 2, 0))
    put(folder / "test_batch", pickle.dumps(os.system, 2))
    with pytest.raises(UserError, match=r"is not CIFAR-10's \(it names posix\.system\)"):
        listing(tmp_path, ([tmp_path], []))


def test_hostile_tars_write_nothing_elsewhere_and_name_nothing_oddly(tmp_path: Path) -> None:
    given = tmp_path / "given/hostile-train.tar"
    given.parent.mkdir()
    picture = encode(photograph(20, 20), "JPEG")
    names = ["../../outside/n1/a.JPEG", "/etc/n1/b.JPEG", "train/../../n1/c\nd.JPEG", "n1/\t.JPEG"]
    names += ["n1/..JPEG", "n1/e.x.JPEG", "n1/e_x.JPEG", "n1/e.x.png", f"n1/{'long' * 70}.JPEG"]
    names += ["../.../x/y.JPEG", "n1/\udcff.JPEG"]
    with tarfile.open(given, "w") as file:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(picture)
            file.addfile(info, BytesIO(picture))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"n1/special-{kind!r}.JPEG")
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    prepare.main([str(given), "--out", str(out), "--workers", "1"])
    assert [path for path in sorted(tmp_path.rglob("*")) if out not in (path, *path.parents)] == (
        before
    )
    written = []
    for path in out.glob("*.tar"):
        with tarfile.open(path) as file:
            written += file.getmembers()
    assert all(member.isreg() for member in written)
    stems = {member.name.partition(".")[0] for member in written}
    assert len(written) == 2 * len(stems) == 2 * 10  # a name that begins with a dot is hidden
    for member in written:
        label, name = member.name.split("/")
        assert label in ("n1", "x")
        assert name.isprintable()
        assert name.count(".") == 1
        assert not name.startswith(".")
        assert len(name) < 130


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds ``in`` and, made of it by one worker and by four, ``one``, ``four``."""
    root = tmp_path_factory.mktemp("prepared")
    class_folders(root / "in")
    (root / "in/train/n01440764/n01440764_3.JPEG").write_bytes(b"no image")
    cut = root / "in/train/n02102040/n02102040_1.JPEG"
    cut.write_bytes(cut.read_bytes()[:900])
    for name, count in (("one", "1"), ("four", "4")):
        words = ["--size", str(SIZE), "--shard_mb", "0.01", "--workers", count]
        prepare.main([str(root / "in"), "--out", str(root / name), *words])
    return root


def samples_of(out: Path, split: str) -> dict[str, tuple[bytes, int]]:
    """Of each sample of a split its bytes and class, read as webdataset reads a shard."""
    found = {}
    about = json.loads((out / "prepared.json").read_text())["splits"][split]
    for file in about["files"]:
        with tarfile.open(out / file["name"]) as shard:
            members = shard.getmembers()
            for image, label in zip(members[::2], members[1::2], strict=True):
                stem, _, ending = image.name.partition(".")
                assert (label.name, ending) == (f"{stem}.cls", ending.lower())
                content = shard.extractfile(image).read()  # type: ignore[union-attr]
                found[image.name] = content, int(shard.extractfile(label).read())  # type: ignore[union-attr]
    return found


def test_one_worker_and_four_write_the_same_bits(prepared: Path) -> None:
    ours = {path.name: path.read_bytes() for path in (prepared / "one").iterdir()}
    assert {path.name: path.read_bytes() for path in (prepared / "four").iterdir()} == ours
    about = json.loads(ours["prepared.json"])
    tars = [file["name"] for file in about["splits"]["train"]["files"]]
    assert len(tars) > 2
    assert sorted(ours) == sorted(
        [
            *tars,
            *(file["name"] for file in about["splits"]["val"]["files"]),
            *("prepared.json", "statistics.npz", "train.index.npz", "val.index.npz"),
            "bad-images.jsonl",
        ]
    )


def test_shards_and_their_index(prepared: Path) -> None:
    out = prepared / "one"
    about = json.loads((out / "prepared.json").read_text())
    assert about["classes"] == list(CLASSES)
    for split, count in (("train", 10), ("val", 6)):
        files, found = about["splits"][split]["files"], samples_of(out, split)
        index = dict(np.load(out / f"{split}.index.npz"))
        names = index["names"].tobytes().decode().split("\n")
        assert about["splits"][split]["images"] == len(names) == len(found) == count
        assert names == sorted(found)
        assert list(found) != names  # the order in shards is another
        for number, name in enumerate(names):
            content, label = found[name]
            start, length = index["offsets"][number], index["lengths"][number]
            file = (out / files[index["shards"][number]]["name"]).read_bytes()
            assert file[start : start + length] == content
            assert CLASSES[label] == name.split("/")[0]
            assert index["labels"][number] == label
            image = Image.open(BytesIO(content))
            assert [image.height, image.width] == index["sizes"][number].tolist()
            key = (split, *str(Path(name).with_suffix(".JPEG")).split("/"))
            source = Image.open(BytesIO(FILES[key]))  # type: ignore[index]
            if min(source.size) <= SIZE:
                assert content == FILES[key]  # type: ignore[index]
            else:
                assert min(image.size) == SIZE
                assert image.mode == "RGB"
                assert image.width / image.height == pytest.approx(
                    source.width / source.height, rel=0.5 / SIZE
                )


def test_bad_images_are_named_and_left_out(prepared: Path) -> None:
    lines = (prepared / "one/bad-images.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    assert (first["split"], first["name"]) == ("train", "n01440764/n01440764_3")
    assert first["reason"] == "it is no JPEG, PNG, WebP or BMP"
    assert "cut short" in second["reason"]
    assert {first["done"], second["done"]} == {"left out"}
    words = [str(prepared / "in"), "--out", str(prepared / "stop"), "--on_bad_image", "stop"]
    with pytest.raises(UserError, match=r"\.JPEG cannot be decoded \(it is .*--on_bad_image skip"):
        prepare.main([*words, "--workers", "1"])


def central(pixels: np.ndarray) -> np.ndarray:
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


def test_statistics_against_numpy(prepared: Path) -> None:
    form = Form("shards", SIZE, "none", 95)
    bad = {f"{CLASSES[0]}_3.JPEG", f"{CLASSES[1]}_1.JPEG"}
    squares = [
        central(shrink(np.frombuffer(content, np.uint8), form).pixels)
        for (_, name), content in of("train").items()
        if name not in bad
    ]
    ours = dict(np.load(prepared / "one/statistics.npz"))
    weights = np.concatenate([np.full(len(s) ** 2, 1 / len(s) ** 2) for s in squares])
    values = np.concatenate([square.reshape(-1, 3) for square in squares]).astype(np.float64)
    assert np.allclose(ours["mean"], np.average(values, 0, weights))
    assert np.allclose(ours["covariance"], np.cov(values.T, ddof=0, aweights=weights))
    rebuilt = ours["eigenvectors"] @ np.diag(ours["eigenvalues"]) @ ours["eigenvectors"].T
    assert np.allclose(rebuilt, ours["covariance"])
    way = Image.Resampling.BICUBIC
    same = [np.asarray(Image.fromarray(s).resize((SIZE, SIZE), way), float) for s in squares]
    assert np.allclose(ours["mean_image"], np.mean(same, 0), atol=0.2)
    assert np.abs(ours["mean_image"] - np.mean(same, 0)).mean() < 0.01
    assert ours["mean_image"].dtype == np.float32


def test_the_small_image_is_pillows_to_rounding() -> None:
    image = photograph(400, 523)
    ours = shrink(np.frombuffer(encode(image, "PNG"), np.uint8), Form("shards", 256, "none", 95))
    assert ours.pixels.shape == (256, 335, 3)
    pillow = np.asarray(image.resize((335, 256), Image.Resampling.BICUBIC))
    difference = np.abs(ours.pixels.astype(int) - pillow)
    assert difference.mean() < 0.02
    assert difference.max() <= 2
    buffer = BytesIO()
    Image.fromarray(ours.pixels).save(buffer, "JPEG", quality=95)
    again, pillows = (np.asarray(Image.open(file)) for file in (BytesIO(ours.encoded), buffer))
    assert np.array_equal(again, pillows)


def test_odd_images_become_what_the_package_decodes_and_damaged_ones_nothing() -> None:
    form = Form("shards", 64, "none", 95)
    for kind, content in whole().items():
        encoded = np.frombuffer(content, np.uint8)
        image, ours = decode(validate_bytes(encoded)), shrink(encoded, form)
        if min(image.size) <= 64:
            assert ours.encoded == content, kind
            continue
        height, width, _ = ours.pixels.shape
        assert min(height, width) == 64, kind
        pillow = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        assert np.abs(ours.pixels.astype(int) - pillow).max() <= 2, kind
        again = np.asarray(Image.open(BytesIO(ours.encoded)))
        assert np.abs(ours.pixels.astype(int) - again).mean() < 5, kind
    accepted = []
    for kind, damage in damaged().items():
        if isinstance(damage, bytes):
            with contextlib.suppress(OSError):
                shrink(np.frombuffer(damage, np.uint8), form)
                accepted.append(kind)
    assert not accepted


def test_pixels_are_one_array_without_gaps(prepared: Path) -> None:
    out = prepared / "pixels"
    words = ["--format", "pixels", "--crop", "center", "--size", "64", "--shard_mb", "0.05"]
    prepare.main([str(prepared / "in"), "--out", str(out), *words, "--workers", "2"])
    form = Form("pixels", 64, "center", 95)
    for split, count in (("train", 10), ("val", 6)):
        array = np.memmap(out / f"{split}.pixels", np.uint8, "r").reshape(-1, 64, 64, 3)
        index = dict(np.load(out / f"{split}.index.npz"))
        assert len(array) == count
        assert sorted(index["rows"]) == list(range(count))
        for name, row in zip(
            index["names"].tobytes().decode().split("\n"), index["rows"], strict=True
        ):
            key = (split, *str(Path(name).with_suffix(".JPEG")).split("/"))
            content = np.frombuffer(FILES[key], np.uint8)  # type: ignore[index]
            assert np.array_equal(array[row], shrink(content, form).pixels)


def test_a_finished_folder_is_left_alone(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(prepared / "in"), "--out", str(prepared / "one"), "--shard_mb", "0.01"]
    before = {path: path.stat().st_mtime_ns for path in (prepared / "one").iterdir()}
    prepare.main([*words, "--size", str(SIZE)])
    assert "is prepared already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (prepared / "one").iterdir()} == before
    with pytest.raises(
        UserError, match=rf"was made with --size {SIZE}, not 32: give another --out"
    ):
        prepare.main([*words, "--size", "32"])


def test_a_damaged_shard_is_found_when_read_back(tmp_path: Path) -> None:
    found = listing(tmp_path, class_folders(tmp_path / "in"))
    (tmp_path / "out/.partial").mkdir(parents=True)
    form = Form("shards", SIZE, "none", 95)
    shard = next(shards.shards(found, 5, 0))
    shards.write_shard(tmp_path / "out", form, shard, "skip")
    shards.check_shard(tmp_path / "out", form, shard)
    path = tmp_path / "out/train-00000.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="does not read back as it was written"):
        shards.check_shard(tmp_path / "out", form, shard)
    assert not shards.record_of(tmp_path / "out", shard).exists()


def test_what_is_wrong_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sentence(*words: str) -> str:
        with pytest.raises(UserError) as failure:
            prepare.main([*words])
        return str(failure.value)

    folder, out = tmp_path / "in", str(tmp_path / "out")
    assert "there is no option --sise; did you mean --size?" in sentence("x", "--sise", "3")
    assert "wants a whole number of 8 to 4096" in sentence("x", "--out", out, "--size", "4")
    assert "give --crop center" in sentence("x", "--out", out, "--format", "pixels")
    assert "there is no nowhere" in sentence("nowhere", "--out", out)
    assert "give --download DIR" in sentence("imagenette", "--out", out)
    folder.mkdir()
    assert "holds no images in a form that is known" in sentence(str(folder), "--out", out)
    class_folders(folder)
    assert "lies in the source" in sentence(str(folder), "--out", str(folder / "out"))
    assert "has other things in it" in sentence(str(folder / "train"), "--out", str(tmp_path))
    put(tmp_path / "file", b"")
    assert "cannot be written" in sentence(str(folder), "--out", str(tmp_path / "file/out"))
    with prepare.only_one(tmp_path / "held"):
        words = str(folder), "--out", str(tmp_path / "held")
        assert "another command is preparing" in sentence(*words)
    put(folder / "val/n09999999/a.JPEG", b"")
    assert "classes without training images (n09999999)" in sentence(str(folder), "--out", out)
    cut = official(tmp_path / "official")[0][0]
    cut.write_bytes(cut.read_bytes()[:9000])
    assert "is damaged or cut short" in sentence(str(cut), "--out", out)
    tables = parquet(tmp_path / "tables")[0][0]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'alexnet-dist[prepare]'" in sentence(str(tables), "--out", out)


def many_images(root: Path) -> Path:
    noise = np.random.default_rng(1).integers(0, 255, (300, 300, 3), np.uint8)
    for number in range(120):
        image = Image.fromarray(np.roll(noise, number, 0))
        put(root / f"train/{number % 2}/{number:03d}.png", encode(image, "PNG", compress_level=0))
    return root


def bits(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.mark.slow
def test_a_killed_command_goes_on_without_doing_work_again(tmp_path: Path) -> None:
    source, out, calm = many_images(tmp_path / "in"), tmp_path / "out", tmp_path / "calm"
    words = [str(source), "--size", "200", "--shard_mb", "0.3", "--workers", "2"]
    running = subprocess.Popen(
        command(0, "alexnet_dist.prepare", *words, "--out", str(out)),
        start_new_session=True,
        env=environment(),
    )
    deadline = time.monotonic() + 120
    while len(list((out / ".partial").glob("train-*.npz"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    while time.monotonic() < deadline:  # its workers end, too
        try:
            os.killpg(running.pid, 0)
            time.sleep(0.05)
        except ProcessLookupError:
            break
    with pytest.raises(ProcessLookupError):
        os.killpg(running.pid, 0)
    records = list((out / ".partial").glob("train-*.npz"))
    tars = [out / record.with_suffix(".tar").name for record in records]
    before = {path: path.stat().st_mtime_ns for path in tars}
    prepare.main([*words, "--out", str(calm)])
    assert 2 <= len(before) < len(list(calm.glob("*.tar")))
    prepare.main([*words, "--out", str(out)])
    assert {path: path.stat().st_mtime_ns for path in tars} == before
    assert bits(out) == bits(calm)
    assert not (out / ".partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "pixels"])
def test_a_full_disk_is_a_sentence_and_nothing_is_lost(kind: str, tmp_path: Path) -> None:
    source, out, calm = many_images(tmp_path / "in"), tmp_path / "out", tmp_path / "calm"
    words = [str(source), "--size", "100", "--format", kind, "--crop", "center", "--workers", "2"]
    words += ["--shard_mb", "0.2"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    done = subprocess.run(
        command(0, "alexnet_dist.prepare", *words, "--out", str(out)),
        preexec_fn=limit,
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("alexnet_dist: ") == 1
    assert "cannot be written or read (File too large): make room" in done.stderr
    assert "Traceback" not in done.stderr
    prepare.main([*words, "--out", str(out)])
    prepare.main([*words, "--out", str(calm)])
    assert bits(out) == bits(calm)
