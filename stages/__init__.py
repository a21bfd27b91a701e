"""One file per command: a config class and run(config), reading top to bottom like its help."""
