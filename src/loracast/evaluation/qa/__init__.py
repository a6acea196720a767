"""Question answering about real documents: an adapter beside all that a document could be given with instead."""
