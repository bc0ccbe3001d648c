"""What the program can be told: dataclasses with their ranges, recipes, and command lines."""
