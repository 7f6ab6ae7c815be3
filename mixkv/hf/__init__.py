"""Everything that touches transformers: binding a model, its attention function, versions, frames, projections."""
