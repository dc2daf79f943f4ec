"""The run's folder and its records: one stream of events, several readers of it."""
