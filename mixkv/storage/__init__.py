"""The rows held: ragged buffers, and chunks outside them."""
