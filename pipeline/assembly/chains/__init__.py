"""Several commands from one file: one after the other, side by side, and the tables of what they found."""
