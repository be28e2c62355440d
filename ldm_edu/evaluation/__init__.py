"""Distances between images, the judge, and scores of whole models."""
