"""Rows of data files as typed objects, and the generators of training and evaluation documents."""
