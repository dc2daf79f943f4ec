"""Processes and layouts: how one network is computed by many."""
