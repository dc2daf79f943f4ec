"""Taking the measure of a machine and of what runs on it."""
