"""What a model is told: conditions, text, classifier-free guidance (§ 3.3, 4.3)."""
