"""Data sets: drawn ones, CelebA, COCO and folders of images; batches, caches, downloads."""
