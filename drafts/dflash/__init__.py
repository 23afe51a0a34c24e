"""DFlash: block diffusion over the target's captured hidden states."""
