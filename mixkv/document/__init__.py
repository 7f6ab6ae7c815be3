"""Synthetic pages: their content, their images and questions about them; and the weights of a small model that reads them."""
