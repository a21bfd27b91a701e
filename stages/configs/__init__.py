"""The keys of each command, by its name. Nothing heavy is imported here: see `pipeline/configs/`."""
