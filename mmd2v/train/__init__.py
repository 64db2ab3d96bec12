"""The training loop and the DeepSpeed engine around it."""
