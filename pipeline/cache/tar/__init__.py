"""The store of WebDataset tars: how they are written, indexed and read. It imports `format` and `files` alone."""
