"""Checkpoints of a training state: written by Orbax, with a manifest, verified before use."""
