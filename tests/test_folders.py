"""People's folders and archives: what is an image, a class, a split and a hidden file, for all
commands alike; and which label is which output."""

import json
import os
import random
import resource
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alexnet_dist.config import Config
from alexnet_dist.data.folders import LeftOut, is_hidden, is_image_name
from alexnet_dist.data.index import DatasetInfo, open_datasets, scan_dataset
from alexnet_dist.data.loader import CorruptImagePolicy
from alexnet_dist.errors import UserError
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.predict import find_images
from alexnet_dist.prepare.__main__ import main as prepare
from alexnet_dist.prepare.listing import DatasetListing, sanitize_name
from alexnet_dist.prepare.sources import discover_dataset
from alexnet_dist.setup import LoadedModel, same_classes
from tests.conftest import error_of, events, train, write_images
from tests.data.corrupt_images import encode, photograph, png
from tests.data.loading import scan
from tests.prepare import imagenet
from tests.prepare.imagenet import tar, write

JPEG = encode(photograph(20, 24), "JPEG")
PLAIN = [f"{split}/{c}/{n}.jpg" for split in ("train", "val") for c in ("ant", "bee") for n in "01"]


def make(root: Path, *names: str | bytes, content: bytes = JPEG) -> Path:
    for name in names:
        write(root / os.fsdecode(name), content)
    return root


def discover(root: Path) -> DatasetListing:
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        return discover_dataset(root, Path(scratch), lambda *_: None)


FOUND: dict[str, list[str | bytes]] = {
    "one folder deeper": ["train/ant/images/x.jpg", "train/ant/a/b/y.jpg"],
    "other endings": ["train/ant/x.jfif", "train/ant/y.JPG"],
    "companions": [],
    "more splits": [],
    "odd names": [b"val/bee/\xe9.jpg", "train/ant/a\nb.jpg", "train/ant/ .jpg", "val/bee/x\t,.png"],
}
OTHERS = {
    "other endings": "train/ant/a.tif train/bee/c/b.TIF val/ant/c.gif val/a val/x.jpg",
    "companions": "train/__MACOSX/ant/._0.jpg val/@eaDir/0.jpg train/ant/._0.jpg val/.x/y.jpg",
    "more splits": "test/ant/0.jpg validation/0.jpg unlabeled/0.jpg",
}
LEFT_OUT = {
    "other endings": {".tif files": 2, ".gif files": 1, "files of no known kind": 1}
    | {"images outside of class folders": 1},
    "more splits": {"folders of other splits": 2},
}


def by_reason(left_out: LeftOut) -> dict[str, int]:
    return {reason: count for reason, (count, _) in left_out.items()}


@pytest.mark.parametrize("kind", FOUND)
def test_training_and_prepare_find_the_same_images(kind: str, tmp_path: Path) -> None:
    found, others = FOUND[kind], OTHERS.get(kind, "").split()
    root, out = make(tmp_path / "in", *PLAIN, *found, *others), tmp_path / "out"
    wanted = Counter(tuple(os.fsdecode(n).split("/")[:2]) for n in [*PLAIN, *found])
    prepare([str(root), f"--out={out}", "--workers=1", "--size=64"])
    for each in (root, root, out):
        info = scan(each, tmp_path / "cache")
        counts: Counter[tuple[str, ...]] = Counter()
        for split, dataset in zip(("train", "val"), open_datasets(info), strict=True):
            assert dataset.index.classes == ["ant", "bee"]
            counts.update((split, dataset.index.classes[n]) for n in dataset.index.labels)
            assert {dataset.read(n).tobytes() for n in range(len(dataset.index))} == {JPEG}
        assert counts == wanted
        assert by_reason(info.left_out) == LEFT_OUT.get(kind, {})
        assert len(info.warnings) == (kind in LEFT_OUT)
    below = LeftOut()
    more = {"other endings": 1, "more splits": 3}.get(kind, 0)
    assert len(find_images(str(root), below)) == len(PLAIN) + len(found) + more
    files = {reason for reason in LEFT_OUT.get(kind, {}) if reason.endswith(("files", "kind"))}
    assert by_reason(below) == {reason: LEFT_OUT[kind][reason] for reason in files}


def test_folders_that_are_refused_name_what_to_do(tmp_path: Path) -> None:
    empty = make(tmp_path / "empty", *PLAIN, "train/eel/a.tif", "val/eel/a.tif")
    for call in (scan, discover):
        assert "in " + f"{empty}/train/eel: add some" in error_of(call, empty)
        assert "there are 1 .tif files" in error_of(call, empty)
    flat = make(tmp_path / "flat", *PLAIN[:4], "val/a.jpg", "val/b.jpg")
    tiny = make(tmp_path / "tiny", "train/ant/images/0.jpg", "val/images/0.jpg", "val/images/1.jpg")
    for call, root in ((scan, flat), (discover, flat), (scan, tiny), (discover, tiny)):
        assert f"images in {root}/val are not in folders of their classes" in error_of(call, root)
        assert "LOC_val_solution.csv or Tiny" in error_of(call, root)
    write(tiny / "val/val_annotations.txt", b"0.jpg\tant\t0\t0\t9\t9\n1.jpg\tant\t0\t0\t9\t9\n")
    listing = discover(tiny)
    assert [entry.label for entry in listing.entries if entry.split == "val"] == ["ant"] * 2
    assert not listing.left_out
    only_train = make(tmp_path / "only", *PLAIN[:4])
    assert "no validation images: add a folder val/" in error_of(scan, only_train)
    assert "no validation images: add them in val/" in error_of(discover, only_train)
    for form, form_name in (
        (imagenet.kaggle, "Kaggle's layout"),
        (imagenet.official_tars, "official tars"),
        (imagenet.parquet, "parquet files"),
        (imagenet.webdataset, "webdataset tars"),
    ):
        root = form(tmp_path / form.__name__)
        said = f"holds {form_name}: run python -m alexnet_dist.prepare {root} --out DIR"
        assert said in error_of(scan, root)


def test_unreadable_images_say_the_true_reason(tmp_path: Path) -> None:
    root = make(tmp_path / "in", *PLAIN)
    (root / "train/ant/link.jpg").symlink_to("nowhere")
    (root / "train/ant/folder.jpg").mkdir()
    os.mkfifo(root / "train/ant/pipe.jpg")
    write(root / "train/ant/large.png", png(14000, 13000, 3, 8, bytes(99)))
    info = scan(root)
    assert info.left_out == {"devices, pipes and sockets": [1, [f"{root}/train/ant/pipe.jpg"]]}
    dataset = open_datasets(info)[0]
    reasons = CorruptImagePolicy(dataset, "skip").errors
    stopped = "train/ant/folder.jpg and 2 other images cannot be decoded (Is a directory)"
    assert f"{root}/{stopped}: fix or remove it" in error_of(CorruptImagePolicy, dataset, "stop")
    assert {dataset.index.names[n]: reason for n, reason in reasons.items()} == {
        "ant/folder.jpg": "Is a directory",
        "ant/large.png": "it has more than the 178,956,970 pixels that Pillow takes",
        "ant/link.jpg": "there is no such file, or a link to it leads nowhere",
    }


def test_what_a_machine_does_not_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = error_of(scan_dataset, None, "/proc/nowhere", lambda *_: None)
    assert "digits cannot be written to " in message
    assert "give --data.cache_dir" in message
    root, out = write_images(tmp_path / "in", train=90, val=3, side=20), tmp_path / "out"
    prepare([str(root), f"--out={out}", "--workers=1", "--shard_mb=0.0001"])
    assert len(list(out.glob("train-*.tar"))) == 90
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    umask = os.umask(0o002)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (96, hard))
        dataset = open_datasets(scan(out))[0]
        assert all(len(dataset.read(index)) for index in range(90))
        scan(root, tmp_path / "cache")
        scan_dataset(None, str(tmp_path / "cache"), lambda *_: None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.umask(umask)
    kept = [*(tmp_path / "cache").rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in kept} == {0o775, 0o664}


def test_official_tars_with_companions_and_a_devkit_cut_short(tmp_path: Path) -> None:
    root = imagenet.official_tars(tmp_path / "in")
    double = b"\0\5\x16\7" + bytes(400)
    classes = {"._n01440764.tar": double, "./n01440764.tar": tar({"a.JPEG": JPEG, "._a": double})}
    write(root / "ILSVRC2012_img_train.tar", tar(classes))
    devkit = root / "ILSVRC2012_devkit_t12.tar.gz"
    content = devkit.read_bytes()
    for length in (0, 30, len(content) // 2):
        devkit.write_bytes(content[:length])
        assert f"{devkit} is corrupt or not ImageNet's devkit" in error_of(discover, root)
    devkit.write_bytes(content)
    assert "classes without training images" in error_of(discover, root)  # of two, not of "._n01"


def test_members_without_a_partner_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    good = {"a.jpg": JPEG, "a.cls": b"0", "b.cls": b"1", "b.jpg": JPEG}
    odd = {"22.05.jpg": JPEG, "22.05.cls": b"1", "c.jpg": JPEG, "._d.jpg": JPEG}
    write(root / "x-train-0.tar", tar(good | odd))
    for name in ("x-val-0.tar", "x-test-0.tar"):
        write(root / name, tar(good))
    for _ in range(2):
        said = error_of(lambda _: prepare([str(root), f"--out={out}", "--workers=1"]), root)
        assert said.startswith(f"3 members of tars were left out, as {root}/x-train-0.tar: 22.05")
    assert f"1 tars of other splits ({root}/x-test-0.tar)" in capsys.readouterr().out
    assert len(scan(out).train) == 2


def test_rows_of_parquet_without_a_class_are_counted(tmp_path: Path) -> None:
    listing = discover(imagenet.parquet(tmp_path / "in"))
    assert by_reason(listing.left_out) == {"images of other splits": 1}
    assert listing.class_numbers == imagenet.LABELS
    for path in (tmp_path / "in").glob("validation-*"):
        path.unlink()
    assert error_of(discover, tmp_path / "in").endswith(
        "have no validation images: add them in val/; left out are 1 images without a class "
        f"({tmp_path}/in/test-0.parquet: test.JPEG)"
    )


def test_a_run_tells_at_its_start_what_is_left_out(tmp_path: Path) -> None:
    root = make(tmp_path / "in", *PLAIN, "train/ant/a.tif", b"train/ant/caf\xe9.gif")
    scan(root, tmp_path / "cache")
    make(root, *PLAIN, content=encode(photograph(30, 30), "JPEG"))  # in place
    options = ["--train.max_steps=1", "--data.batch_size=2", "--run.name=run"]
    said = train(0, root, tmp_path, *options, f"--data.cache_dir={tmp_path}/cache").out
    assert "left out of the images: 1 .tif files" in said
    assert "4 images in " + f"{root}/train have changed since they were indexed" in said
    (start,) = events(tmp_path / "run", "start")
    assert start["left_out"][".tif files"] == [1, [f"{root}/train/ant/a.tif"]]


def test_labels_are_matched_to_outputs_by_name_or_number(mesh: Mesh, tmp_path: Path) -> None:
    def labels(root: Path, classes: list[str], *, unnamed: bool = True) -> dict[str, int] | str:
        config = Config()
        config.data.root, config.data.cache_dir = str(root), str(tmp_path / "cache")
        state = {"classes": classes} | ({"unnamed": True} if unnamed else {})
        try:
            model = LoadedModel(Path("w.pth"), state, config)
            info: DatasetInfo = model.scan_dataset(mesh, only_val=True)
        except UserError as error:
            return str(error)
        names = (name.split("/")[0] for name in info.val.names)
        return dict(zip(names, info.val.labels.tolist(), strict=True))

    twelve, numbers = range(12), [str(n) for n in range(12)]
    numbered = make(tmp_path / "numbers", *(f"val/{n}/0.jpg" for n in twelve))
    padded = make(tmp_path / "padded", *(f"val/{n:02d}/0.jpg" for n in twelve))
    wnids = make(tmp_path / "wnids", "n00000002/0.jpg", "n00000001/0.jpg")  # without val/
    named = make(tmp_path / "named", "val/bee/0.jpg", "val/ant/0.jpg", "val/cat/0.jpg")
    assert labels(numbered, numbers) == {str(n): n for n in twelve}
    assert labels(padded, numbers) == {f"{n:02d}": n for n in twelve}
    assert labels(wnids, numbers[:2]) == {"n00000001": 0, "n00000002": 1}
    assert labels(named, ["cat", "ant", "bee"], unnamed=False) == {"ant": 1, "bee": 2, "cat": 0}
    assert labels(numbered, sorted(numbers), unnamed=False) == {
        name: place for place, name in enumerate(sorted(numbers))
    }
    assert "does not name its 3 classes: name the class folders" in str(labels(named, numbers[:3]))
    assert "give --data.root a folder with the same" in str(labels(named, ["ant"], unnamed=False))

    parquet, out = imagenet.parquet(tmp_path / "parquet"), tmp_path / "out"
    prepare([str(parquet), f"--out={out}", "--workers=1"])
    facts = json.loads((out / "prepared.json").read_text())
    assert facts["class_numbers"] == imagenet.LABELS
    wanted = {wnid: 2 - number for wnid, number in imagenet.LABELS.items()}
    facts["class_numbers"] = wanted  # a source that numbers otherwise than names sort
    (out / "prepared.json").write_text(json.dumps(facts))
    assert labels(out, numbers[:3]) == wanted
    info = scan(out)
    assert not same_classes(info, {"classes": numbers[:3], "unnamed": True})
    assert same_classes(info, {"classes": list(imagenet.CLASSES)})
    assert not same_classes(info, {"classes": [*imagenet.CLASSES][::-1]})


COMPONENT = st.binary(min_size=1, max_size=12).filter(
    lambda name: not {b"/"[0], 0} & set(name) and name.strip(b".")
)
ENDS = st.sampled_from([b".jpg", b".JPEG", b".jfif", b".png", b".tif", b".txt", b""])
FILE = st.tuples(st.sampled_from([b"", b"", b".", b"._"]), COMPONENT, ENDS).map(b"".join)
MEMBER_ENDS = st.sampled_from(["jpg", "PNG", "cls", "json", "05.jpg", "05.cls", "tif"])
FOLDERS = st.lists(st.one_of(COMPONENT, st.just(b"@eaDir")), max_size=2)


@settings(max_examples=40, deadline=None)
@given(st.lists(COMPONENT, min_size=1, max_size=3, unique=True), st.data())
def test_any_tree_of_any_names_is_one_data_set(classes: list[bytes], data: st.DataObject) -> None:
    classes = [name for name in classes if not is_hidden(os.fsdecode(name))] or [b"ant"]
    place = st.tuples(st.sampled_from([b"train", b"val"]), st.sampled_from(classes), FOLDERS, FILE)
    with tempfile.TemporaryDirectory() as folder:
        root, made = Path(folder, "in"), {}
        paths = [(split, name, [], b"0.jpg") for name in classes for split in (b"train", b"val")]
        paths += data.draw(st.lists(place, max_size=12))
        for number, (split, name, inner, file) in enumerate(paths):
            path = os.fsdecode(b"/".join([split, name, *inner, file]))
            try:
                write(root / path, JPEG + str(number).encode())
            except OSError:  # a file where a folder is, or a folder where a file is
                continue
            made[path] = JPEG + str(number).encode()
        visible = {path for path in made if not any(map(is_hidden, path.split("/")))}
        wanted = {path: made[path] for path in visible if is_image_name(path.split("/")[-1])}
        left_out = len(visible) - len(wanted)
        for _ in range(2):
            info = scan(root, Path(folder, "cache"))
            seen = {}
            for dataset in open_datasets(info):
                index, split = dataset.index, Path(dataset.index.folder).name
                for n, name in enumerate(index.names):
                    seen[f"{split}/{name}"] = dataset.read(n).tobytes()
                    assert index.classes[index.labels[n]] == name.split("/")[0]
            assert seen == wanted
            assert sum(by_reason(info.left_out).values()) == left_out
        if len({sanitize_name(os.fsdecode(name)) for name in classes}) == len(classes):
            listing = discover(root)
            listed = {os.path.relpath(entry.file, root): entry for entry in listing.entries}
            assert {path: entry.read().tobytes() for path, entry in listed.items()} == wanted
            for path, entry in listed.items():
                assert entry.label == sanitize_name(path.split("/")[1])
            assert listing.left_out == info.left_out


@settings(max_examples=60, deadline=None)
@given(
    st.lists(COMPONENT.map(os.fsdecode), max_size=6),
    st.lists(MEMBER_ENDS, max_size=16),
    st.randoms(use_true_random=False),
)
def test_any_members_in_any_order_are_used_or_counted(
    keys: list[str], endings: list[str], order: random.Random
) -> None:
    members = [(f"{order.choice(keys)}.{ending}") for ending in endings if keys]
    pairs = (f"{key}.{ending}" for key in keys for ending in ("jpg", "cls"))
    members += [name for name in pairs if order.random() < 0.7]
    members = list(dict.fromkeys(members))
    order.shuffle(members)
    contents = {}
    for number, name in enumerate(members):
        number_of_class, image = str(number % 3).encode(), JPEG + str(number).encode()
        contents[name] = number_of_class if name.endswith("cls") else image
    visible = [name for name in members if not is_hidden(name)]
    samples: dict[str, dict[str, str]] = {}
    for name in visible:
        key, _, ending = name.partition(".")
        samples.setdefault(key, {}).setdefault(ending.lower(), name)
    good = [s for s in samples.values() if "cls" in s and len({"jpg", "png"} & set(s)) == 1]
    wanted = Counter((int(contents[s["cls"]]), contents[s.get("jpg") or s["png"]]) for s in good)
    base = {f"base{n}.{e}": c for n in range(3) for e, c in (("jpg", JPEG), ("cls", b"%d" % n))}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root / "train-0.tar", tar(contents))
        write(root / "train-1.tar", tar(base))
        write(root / "val-0.tar", tar(base))
        listing = discover(root)
        entries = [entry for entry in listing.entries if entry.file.endswith("train-0.tar")]
        assert Counter((int(e.label), e.read().tobytes()) for e in entries) == wanted
    assert len(listing.entries) == len(entries) + 2 * 3
    left_out = sum(by_reason(listing.left_out).values())
    assert left_out == len(visible) - sum(map(len, good))
