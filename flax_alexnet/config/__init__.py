"""Configuration: dataclasses with the ranges of their fields, recipes, and command lines."""
