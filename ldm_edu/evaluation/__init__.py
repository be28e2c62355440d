"""Distances between pictures, the judge, and scores of whole models."""
