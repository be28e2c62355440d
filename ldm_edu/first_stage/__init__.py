"""The first stage (§ 3.1, app. G): autoencoders, their losses, the weights of others, tiles."""
