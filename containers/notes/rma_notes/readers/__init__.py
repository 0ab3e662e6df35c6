"""One module a format, each with ``read(data, …) -> Document``."""
