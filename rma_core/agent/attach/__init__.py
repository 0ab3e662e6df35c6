"""What owners share beside the pool's services: model servers that already run, found, asked and guarded."""
