"""A run's folder and its records: one stream of events; console, W&B and plots read along."""

from typing import Any

Event = dict[str, Any]
"""A record of a run: {"event": its kind, "time": seconds since 1970, ...}."""
