"""RMS norm and layer norm, with the addition of a residual."""
