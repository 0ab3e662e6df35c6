"""The coordinator's HTTP: one route table, Quart for most of it, raw ASGI for what streams or is hot."""
