"""Models for the standard evaluation harnesses, each keeping a compressed cache. Not imported by `import mixkv`."""
