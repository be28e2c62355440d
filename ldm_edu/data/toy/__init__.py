"""Data sets that are drawn: small scenes with captions, and faces."""
