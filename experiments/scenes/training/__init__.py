"""What the training of every scenes model shares: the data, the loss of sight, the optimizers, resumable stages."""
