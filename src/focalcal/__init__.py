"""Calibrating deep neural networks with the focal loss and its successors: the method, without the compendium."""
