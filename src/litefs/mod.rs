//! LiteFS's own words, spelled once.
