"""A small document model, and the pages it reads: made, drawn, asked about."""
