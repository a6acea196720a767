"""Frequent English words that say little about a sentence."""

_WORDS = """
a an the of in on at to for and or but with by from as is was are were be been it its this that he she they his her
their which who when where had has have not also into than then there
"""
STOP_WORDS = frozenset(_WORDS.split())
