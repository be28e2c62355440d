"""Attention and the UNet (§ 3.2, 3.3, app. E)."""
