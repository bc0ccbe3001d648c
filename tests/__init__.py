"""Tests; each folder has those of the package of its name."""
