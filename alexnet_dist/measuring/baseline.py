"""What everybody starts from, written anew in as few lines: the loop of PyTorch's ImageNet example,
its DataLoader, and the DALI pipeline of NVIDIA's example. Each yields the images done so far."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from alexnet_dist.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from alexnet_dist.parallel.mesh import available_cpus


def training(train: Path, batch: int) -> Iterator[int]:
    """torchvision's AlexNet in float32, for as many classes as there are folders, its transforms in
    worker processes, torch's SGD."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    classes = len(ImageFolder(str(train)).classes)
    model = torchvision.models.alexnet(num_classes=classes).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    model.train()
    for images, labels in _batches(train, batch):
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield len(images)


def dataloader(train: Path, batch: int) -> Iterator[int]:
    """The images of that loop alone."""
    for images, _ in _batches(train, batch):
        yield len(images)


def _batches(train: Path, batch: int) -> Iterator[Any]:
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN.tolist(), IMAGENET_STD.tolist()),
        ]
    )
    loader: DataLoader[Any] = DataLoader(
        ImageFolder(str(train), augment),
        batch_size=batch,
        shuffle=True,
        num_workers=available_cpus(),
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
        persistent_workers=True,
    )
    while True:
        yield from loader


def dali(train: Path, batch: int) -> Iterator[int]:
    """DALI's own reader of files, its decoder that draws the crop, resize, flip and floats."""
    from nvidia.dali import Pipeline, fn, types

    gpu = torch.cuda.is_available()
    pipeline = Pipeline(
        batch_size=batch, num_threads=available_cpus(), device_id=0 if gpu else None, seed=1
    )
    with pipeline:
        files, labels = fn.readers.file(file_root=str(train), random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(
            files,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            random_area=[0.08, 1.0],
            random_aspect_ratio=[3 / 4, 4 / 3],
        )
        images = fn.resize(images, size=[224, 224], interp_type=types.INTERP_TRIANGULAR)
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(),
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=(255 * IMAGENET_MEAN).tolist(),
            std=(255 * IMAGENET_STD).tolist(),
        )
        pipeline.set_outputs(images, labels)
    pipeline.build()
    while True:
        images, _ = pipeline.run()
        yield len(images)
