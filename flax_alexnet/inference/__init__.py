"""A trained model over many images."""
