"""Model and loss -> every example's squared gradient norm and the clipped sum, exactly, in one backward pass."""
