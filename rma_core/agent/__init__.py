"""The agent: detect, register, reconcile, heartbeat, execute, report."""
