"""One model over many devices: every use of torch.distributed in training."""
