"""Operations that keep only what their gradients need, in place of torch's own."""
