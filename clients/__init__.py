"""The client's side: an ordinary Flower ClientApp over the library."""
