"""Operators of AlexNet that JAX and Flax do not have in the form it needs."""
