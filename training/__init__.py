"""Trains the model shipped with tinydiff: procedural data, the autoencoder, the text encoder with the
transformer, and their evaluation.
"""
