"""What can be asked for: the classes of a config that stages compose.

Nothing heavy is imported here, nor in `stages/configs/`: a config is checked before torch is. The parts import their
choices from here.
"""
