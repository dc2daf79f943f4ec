"""Prepare ImageNet for training, as it is distributed, into 256-pixel JPEG shards or raw pixels.

- ``__main__.py``: the command
- ``sources.py``: find the images, in class folders, Kaggle's layout or ``archives.py``'s forms
- ``archives.py``: the official tars with the devkit, webdataset tars, Hugging Face's parquet
- ``listing.py``: where the bytes of each image are, its class and its name
- ``images.py``: decode, resize and encode one image
- ``shards.py``: write a shard, and make the index of all; ``workers.py``: in processes
"""
