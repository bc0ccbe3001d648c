"""From images on a disk to batches of uint8: sources, decoding, order."""
