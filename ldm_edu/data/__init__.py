"""Data sets: drawn ones, CelebA, COCO and folders of pictures; batches, caches, downloads."""
