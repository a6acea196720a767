"""What of which documents a question gets: full-text index, matching, routing, relevance, outlines."""
