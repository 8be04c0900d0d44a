"""The mathematics, on NumPy arrays: importing it does not import torch."""
