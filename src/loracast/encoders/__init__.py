"""Encoders turn a condition (text, description, image) into features for a hypernetwork."""
