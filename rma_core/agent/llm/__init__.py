"""Models on this machine: their files, who has room in memory, and how each one stands."""
