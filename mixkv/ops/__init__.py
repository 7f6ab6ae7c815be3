"""Operations on storage: one dispatcher over plain torch, compiled code and flash attention."""
