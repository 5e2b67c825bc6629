"""What two or more scripts share: files, data, the network, training, packing, checkpoints."""
