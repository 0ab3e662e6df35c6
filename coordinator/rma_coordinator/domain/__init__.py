"""What the coordinator decides: pure, given a clock and a store."""
