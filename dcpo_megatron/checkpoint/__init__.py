"""A run's checkpoints: taken from the model, written beside the training, found again, resumed from."""
