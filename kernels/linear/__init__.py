"""Linear layers, alone and fused with what stands before them."""
