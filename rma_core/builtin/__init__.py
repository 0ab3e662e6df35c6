"""Built-in plugins: found by entry point like any other, written with the public names."""
