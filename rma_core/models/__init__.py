"""The records that agents, coordinators, detectors and tools exchange."""
