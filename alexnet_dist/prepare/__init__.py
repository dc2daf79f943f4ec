"""Prepare ImageNet for training, as it is distributed, into 256-pixel JPEG shards or raw pixels.

- ``__main__.py``: the command ``python -m alexnet_dist.prepare``
- ``sources.py``: find the images: class folders, Kaggle's layout, and what ``archives.py`` reads
- ``archives.py``: the official tars with the devkit, webdataset tars, Hugging Face's parquet
- ``listing.py``: where the bytes of each image are, its class and its name
- ``images.py``: decode, resize and encode one image; channel statistics
- ``shards.py``: write a shard, verify it, and make the index of all of them
- ``workers.py``: worker processes
- ``files.py``: files that are complete or absent, checksums, free space

What is written is described, and read, by ``alexnet_dist/data/prepared.py``.
"""
