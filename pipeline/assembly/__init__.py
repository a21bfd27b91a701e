"""The layer between wings and commands: what several stages build from configs, checkpoints, caches and teachers."""
