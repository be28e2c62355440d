"""Forward diffusion and sampling (§ 3.2, app. B)."""
